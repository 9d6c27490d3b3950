"""Decoding: one token after the other, from an executor's states."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor

from xlstm_ray.engine.held import HeldRow, HeldRows, States
from xlstm_ray.engine.windows import GROUP_SIZES, group_size
from xlstm_ray.errors import CheckpointError
from xlstm_ray.runtime.executor import Executor, StateRef, decoding_step, run
from xlstm_ray.sampling.logprobs import logprobs
from xlstm_ray.sampling.sampler import Sampler
from xlstm_ray.text.answer import Answer


def finite(logits: Tensor) -> Tensor:
    """Logits (..., vocabulary) -> whether a token can be chosen from them (...): NaN or infinity is not among them."""
    return logits.sum(-1).isfinite()  # a sum keeps them, and needs no copy of all logits


def require_finite(logits: Tensor, model: Path) -> None:
    """Raise CheckpointError if logits are not finite."""
    if not finite(logits).all():
        raise not_finite(f"{model}: ")


def not_finite(where: str = "") -> CheckpointError:
    return CheckpointError(
        f"{where}the model's logits are not finite; its weights are damaged, or too large for the dtype"
    )


@dataclass
class Together:
    """Rows that are decoded together, their time and their number of steps."""

    rows: range
    seconds: float = 0.0
    steps: int = 0
    done: bool = False


@dataclass(frozen=True)
class Made:
    """A token's log-probability, and the likeliest tokens at its place: ids and log-probabilities."""

    logprob: float
    likeliest: list[tuple[int, float]]


def made_of(logits: Tensor, chosen: Tensor, counts: Sequence[int | None]) -> list[Made | None]:
    """logits (rows, vocabulary), the tokens chosen (rows,), how many of the likeliest each row asks for -> its Made.

    None for a row that asks for none.
    """
    asked = [count for count in counts if count is not None]
    if not asked:
        return [None] * len(counts)
    rows = zip(*(part.tolist() for part in logprobs(logits, chosen, max(asked))), counts, strict=True)
    return [None if n is None else Made(own, list(zip(ids[:n], top[:n], strict=True))) for own, ids, top, n in rows]


@dataclass(frozen=True)
class Start:
    """The end of a prefill, where decoding starts. seen: for each row, the number of tokens that its state has seen."""

    rows: HeldRows
    logits: Tensor  # (B, vocabulary)
    seen: Sequence[int]
    prompts: Sequence[Sequence[int]]  # tokens for the repetition penalty, as far as they are known


class Decoder:
    """Decodes from the states of its rows; counts tokens and time. Does not change other states of the executor.

    Rows are decoded 16 at a time. A call has 1, 4 or 16 rows: the smallest that holds the active ones. A row's place in
    a call depends only on its group and on which rows of the group are active, so a run that is stopped and resumed
    makes the same calls.

    answers: for each row, how tokens are chosen and when the answer ends. ends: end tokens. warm_up: compiles decoding
    for a number of rows, and returns the seconds it took.
    After the iteration, `logits` has for each row a tensor (vocabulary,): the logits after the last token that its
    state has seen. `made` has the log-probabilities of the tokens, for rows that ask for them.
    """

    def __init__(
        self,
        executor: Executor,
        states: States,
        start: Start,
        answers: Sequence[Answer],
        ends: tuple[int, ...],
        *,
        model: Path,
        warm_up: Callable[[int], float],
    ):
        self._model, self._warm_up = model, warm_up
        self._executor, self._states = executor, states
        self._answers, self._ends, self._prompts = answers, ends, start.prompts
        self._sampler: Sampler | None = None  # of the rows that are decoded now
        logits = start.logits
        batch = len(logits)
        self.logits = list(logits)
        self._call = list(range(batch)), logits  # the active rows of the last call, and their logits
        self.made: list[list[Made]] = [[] for _ in range(batch)]
        self._behind = [False] * batch  # True if the row's state has not seen its last token
        self._seen = start.seen
        self.groups = [Together(range(n, min(n + GROUP_SIZES[-1], batch))) for n in range(0, batch, GROUP_SIZES[-1])]
        self.now = self.groups[0]  # the group of the last step
        self.compile_s = 0.0
        self._rows: list[HeldRow | None] = list(start.rows)  # each row's state; None for rows that are decoded now
        self._resident: StateRef | None = None  # the state of the rows that are decoded now; steps write into it
        self._places: list[int] = []  # the rows in it

    def run(self, should_stop: Callable[[], bool] = lambda: False) -> Iterator[list[str]]:
        """For each token, yield the new piece of every row's text, until all rows have ended.

        Between two groups there is a step without text. A second call goes on where the first one stopped.
        """
        for group in self.groups:
            if group.done:
                continue
            self.now, self._sampler = group, self._sampler_of(group.rows)
            while going := [b for b in group.rows if self._answers[b].finish is None]:
                if should_stop():
                    return
                began, compiled = perf_counter(), self.compile_s
                self._catch_up(group.rows)
                pieces = self._step(going, self._sampler)
                group.seconds += perf_counter() - began - (self.compile_s - compiled)
                made = any(self._behind[b] for b in going)
                group.steps += made
                if made or any(pieces):
                    yield pieces
            group.done = True
            if group is not self.groups[-1]:
                yield [""] * len(self._answers)

    def of_row(self, b: int) -> Together:
        return self.groups[b // GROUP_SIZES[-1]]

    def rows(self) -> HeldRows:
        """The state of all rows, after all tokens that were made."""
        for group in self.groups:
            self._catch_up(group.rows)
        self._settle()  # no step may write into a state that is handed out
        return HeldRows(self._rows)

    # ------------------------------------------------------------------------------------------------------------------
    def _sampler_of(self, group: Sequence[int]) -> Sampler:
        sampler = Sampler(len(group), self._call[1].shape[-1], ends=self._ends)
        for slot, b in enumerate(group):
            answer = self._answers[b]
            sampler.put(
                slot,
                answer.sampling,
                position=self._seen[b] + len(answer.tokens),
                prompt=self._prompts[b],
                made=answer.tokens,
            )
        return sampler

    def _step(self, going: list[int], sampler: Sampler) -> list[str]:
        """Choose the next token of these rows."""
        pieces = [""] * len(self._answers)
        logits = self._logits_of(going)
        chosen = sampler.choose(logits, torch.tensor(going) - self.now.rows.start)
        all_made = made_of(logits, chosen, [self._answers[b].sampling.logprobs for b in going])
        for b, token, made in zip(going, chosen.tolist(), all_made, strict=True):
            answer = self._answers[b]
            before = len(answer.tokens)
            pieces[b] = answer.step(token)
            self._behind[b] = len(answer.tokens) > before  # the state never sees an end token
            if answer.finish is not None and not self._behind[b]:
                self.logits[b] = self.logits[b].clone()  # a view would keep the logits of the whole call alive
            if self._behind[b] and made is not None:
                self.made[b].append(made)
        return pieces

    def _logits_of(self, rows: list[int]) -> Tensor:
        """The logits (rows, vocabulary) of these rows; without a copy if they are the last call's rows."""
        of_call, logits = self._call
        return logits if rows == of_call else torch.stack([self.logits[b] for b in rows])

    def _catch_up(self, group: Sequence[int]) -> None:
        """Feed the tokens that the state has not seen."""
        active = [b for b in group if self._behind[b]]
        if not active:
            return
        state = self._arrange(group, active)
        rows = len(self._places)
        last = [self._answers[b].tokens[-1] if self._behind[b] else None for b in self._places]
        step = decoding_step([*last, *[None] * (state.batch - rows)], in_place=True)
        with self._states.turn():
            ((_, _, result),) = run(self._executor, state, [step])
            assert result.logits is not None
            logits = result.logits.cpu()
        # No copy: copying the logits of 16 rows takes longer than choosing their tokens.
        logits = logits[:rows] if active == self._places else logits[step.end.bool()]
        require_finite(logits, self._model)
        self._call = active, logits
        for b, row in zip(active, logits, strict=True):
            self.logits[b], self._behind[b] = row, False

    def _arrange(self, group: Sequence[int], active: list[int]) -> StateRef:
        """A state of this group's active rows that nobody else uses.

        In a call of the group's full size, each row keeps its place. In a smaller call, only the active rows are there,
        in order. So a resumed run has them in the same places.
        """
        size = group_size(len(active))
        places = list(group) if size == group_size(len(group)) else active
        self.compile_s += self._warm_up(size)
        if places != self._places or self._resident is None:
            self._settle()
            rows = HeldRows([*(self._rows[b] for b in places), *[None] * (size - len(places))])
            self._resident, self._places = self._states.copy_of(rows), places
            for b in places:
                self._rows[b] = None
        return self._resident

    def _settle(self) -> None:
        """Stop writing into the resident state: its rows become states like all others."""
        state, self._resident = self._resident, None
        if state is not None:
            for b, row in zip(self._places, self._states.rows(state, state.batch), strict=False):
                self._rows[b] = row
