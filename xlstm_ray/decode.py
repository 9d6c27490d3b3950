"""Token after token, from an executor's state."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor

from xlstm_ray.errors import CheckpointError
from xlstm_ray.prefill.executor import Executor
from xlstm_ray.sampling import Sampling


def require_finite(logits: Tensor, model: Path) -> None:
    """Raise CheckpointError where the model's numbers have become NaN or infinite: no token may be chosen from them."""
    if not logits.isfinite().all():
        raise CheckpointError(
            f"{model}: the model's logits are not finite; its weights are damaged, or too large for the dtype"
        )


class Decoder:
    """Decodes from an executor's state; counts tokens and time.

    seen: how many tokens the state has seen, a row. After the iteration `tokens` holds what was made, a row, without
    the end token, `ended_by` that end token or None, and `logits` (B, vocabulary) those of each row's last token that
    the state has seen.
    """

    def __init__(
        self,
        executor: Executor,
        logits: Tensor,
        sampling: Sampling,
        eos: tuple[int, ...],
        *,
        seen: Sequence[int],
        model: Path,
    ):
        self._model = model
        self._executor, self.logits, self._sample, self._eos = executor, logits, sampling.sampler(), eos
        self.tokens: list[list[int]] = [[] for _ in range(len(logits))]
        self._behind = torch.zeros(len(logits), dtype=torch.bool)  # rows whose last token the state has not seen
        self._seen = seen
        self.ended_by: list[int | None] = [None] * len(logits)
        self.seconds = 0.0
        self.steps = 0

    def run(self, max_new_tokens: int, should_stop: Callable[[], bool] = lambda: False) -> Iterator[list[int | None]]:
        """Yield a token for each row, None for rows that have ended, until all have ended or the limit is reached.

        Called again, it goes on where it was left, to the same limit.
        """
        while self.steps < max_new_tokens and None in self.ended_by:
            if should_stop():
                return
            began = perf_counter()
            self.catch_up()
            step: list[int | None] = []
            positions = [n + len(made) for n, made in zip(self._seen, self.tokens, strict=True)]
            for b, token in enumerate(self._sample(self.logits, positions)):
                if self.ended_by[b] is None and token in self._eos:
                    self.ended_by[b] = token
                going = self.ended_by[b] is None
                step.append(token if going else None)
                if going:
                    self.tokens[b].append(token)
                    self._behind[b] = True
            self.seconds += perf_counter() - began
            if None not in self.ended_by:
                return
            self.steps += 1
            yield step

    def catch_up(self) -> None:
        """Let the state see the tokens made since it was last asked."""
        if not self._behind.any():
            return
        last = torch.tensor([row[-1] if row else 0 for row in self.tokens])
        logits = self._executor.decode(last, self._behind)
        self.logits = torch.where(self._behind.unsqueeze(-1), logits, self.logits)
        require_finite(self.logits, self._model)
        self._behind = torch.zeros_like(self._behind)
