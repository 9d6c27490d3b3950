"""Token after token: sampling and turning tokens into pieces of text."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream
from torch import Tensor

from xlstm_ray.errors import CheckpointError, UsageError
from xlstm_ray.prefill.executor import Executor


def require_finite(logits: Tensor, model: Path) -> None:
    """Raise CheckpointError where the model's numbers have become NaN or infinite: no token may be chosen from them."""
    if not logits.isfinite().all():
        raise CheckpointError(
            f"{model}: the model's logits are not finite; its weights are damaged, or too large for the dtype"
        )


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. temperature 0 is greedy; top_p keeps the likeliest tokens of that total mass."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    @classmethod
    def make(cls, temperature: float | None, top_p: float | None, seed: int | None) -> "Sampling":
        """Greedy unless asked otherwise; asking for top_p or a seed asks for sampling, at temperature 1."""
        if temperature is None:
            temperature = 0.0 if top_p is None and seed is None else 1.0
        if not 0 <= temperature <= 100:
            raise UsageError(f"--temperature is {temperature}; allowed: 0 (greedy) to 100")
        if temperature == 0 and (top_p is not None or seed is not None):
            raise UsageError("--top-p and --seed have no effect at --temperature 0 (greedy); leave them out")
        if top_p is not None and not 0 < top_p <= 1:
            raise UsageError(f"--top-p is {top_p}; allowed: above 0, up to 1")
        if seed is not None and not 0 <= seed < 1 << 63:
            raise UsageError(f"--seed is {seed}; allowed: 0 to 2^63 - 1")
        return cls(temperature, 1.0 if top_p is None else top_p, 0 if seed is None else seed)

    def sampler(self) -> Callable[[Tensor], list[int]]:
        """A function from logits (B, vocabulary) to a token a row; it owns its random generator."""
        if self.temperature == 0:
            return lambda logits: logits.argmax(-1).tolist()
        generator = torch.Generator().manual_seed(self.seed)

        def sample(logits: Tensor) -> list[int]:
            p, order = torch.softmax(logits.double() / self.temperature, -1).sort(dim=-1, descending=True, stable=True)
            p = p.masked_fill(p.cumsum(-1) - p >= self.top_p, 0)  # keeps the token that crosses top_p
            return order.gather(-1, torch.multinomial(p, 1, generator=generator)).squeeze(-1).tolist()

        return sample


class TextStream:
    """Tokens of one row to pieces of text; bytes of an unfinished character wait for the rest."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer, self._stream = tokenizer, DecodeStream(skip_special_tokens=True)

    def step(self, token: int) -> str:
        return self._stream.step(self._tokenizer, token) or ""


class Decoder:
    """Decodes from an executor's state; counts tokens and time.

    After the iteration `tokens` holds what was made, a row, without the end token, and `logits` (B, vocabulary) those
    of each row's last token that the state has seen.
    """

    def __init__(self, executor: Executor, logits: Tensor, sampling: Sampling, eos: tuple[int, ...], *, model: Path):
        self._model = model
        self._executor, self.logits, self._sample, self._eos = executor, logits, sampling.sampler(), eos
        self.tokens: list[list[int]] = [[] for _ in range(len(logits))]
        self._behind = torch.zeros(len(logits), dtype=torch.bool)  # rows whose last token the state has not seen
        self._ended = [False] * len(logits)
        self.seconds = 0.0
        self.steps = 0

    def run(self, max_new_tokens: int, should_stop: Callable[[], bool] = lambda: False) -> Iterator[list[int | None]]:
        """Yield a token for each row, None for rows that have ended, until all have ended or the limit is reached.

        Called again, it goes on where it was left, to the same limit.
        """
        while self.steps < max_new_tokens and not all(self._ended):
            if should_stop():
                return
            began = perf_counter()
            self.catch_up()
            step: list[int | None] = []
            for b, token in enumerate(self._sample(self.logits)):
                self._ended[b] = self._ended[b] or token in self._eos
                step.append(None if self._ended[b] else token)
                if not self._ended[b]:
                    self.tokens[b].append(token)
                    self._behind[b] = True
            self.seconds += perf_counter() - began
            if all(self._ended):
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
