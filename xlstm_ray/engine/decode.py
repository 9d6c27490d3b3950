"""Token after token, from an executor's state."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor

from xlstm_ray.engine.held import HeldRow, HeldRows, States
from xlstm_ray.engine.windows import GROUP_SIZES, group_size
from xlstm_ray.errors import CheckpointError
from xlstm_ray.runtime.executor import Executor, StateRef, Step, run
from xlstm_ray.sampling.logprobs import logprobs
from xlstm_ray.sampling.sampler import Sampler
from xlstm_ray.text.answer import Answer


def require_finite(logits: Tensor, model: Path) -> None:
    """Raise CheckpointError where the model's numbers have become NaN or infinite: no token may be chosen from them."""
    if not logits.sum(-1).isfinite().all():  # NaN and infinity stay in a sum, which makes no copy of all of them
        raise CheckpointError(
            f"{model}: the model's logits are not finite; its weights are damaged, or too large for the dtype"
        )


@dataclass
class Together:
    """Rows that are decoded together, their time and how often they were given a token."""

    rows: range
    seconds: float = 0.0
    steps: int = 0
    done: bool = False


@dataclass(frozen=True)
class Made:
    """A token's log-probability, and ids and those of the likeliest at its place."""

    logprob: float
    likeliest: list[tuple[int, float]]


@dataclass(frozen=True)
class Start:
    """What a prefill leaves to decode from. seen: how many tokens the state has seen, a row."""

    rows: HeldRows
    logits: Tensor  # (B, vocabulary)
    seen: Sequence[int]
    prompts: Sequence[Sequence[int]]  # of the repetition penalty, as far as they are known


class Decoder:
    """Decodes from states of its rows; counts tokens and time. Other states of the executor stay as they are.

    Rows are decoded 16 at a time, in the smallest call, for 1, 4 or 16 rows, that holds those that have not ended.
    Which row stands where in a call hangs on its group and on which of its rows go on, and on nothing before: so a run
    that is stopped and resumed makes the same calls.

    answers: of the rows, which say how tokens are chosen and when there are enough. ends: end tokens. warm_up: compiles
    decoding for so many rows, and returns the seconds it took.
    After the iteration `logits` are those after each row's last token that the state has seen, a tensor (vocabulary,) a
    row, and `made` has the log-probabilities of the tokens of rows that ask for them.
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
        self._call = list(range(batch)), logits  # the rows of the last call that were active, and their logits
        self.made: list[list[Made]] = [[] for _ in range(batch)]
        self._behind = [False] * batch  # rows whose last token the state has not seen
        self._seen = start.seen
        self.groups = [Together(range(n, min(n + GROUP_SIZES[-1], batch))) for n in range(0, batch, GROUP_SIZES[-1])]
        self.now = self.groups[0]  # the one that the last step was of
        self.compile_s = 0.0
        self._rows: list[HeldRow | None] = list(start.rows)  # where each row's state is, but for those decoded now
        self._resident: StateRef | None = None  # the state that is decoded now, in place
        self._places: list[int] = []  # its rows

    def run(self, should_stop: Callable[[], bool] = lambda: False) -> Iterator[list[str]]:
        """Yield what each row's text gains by a token more, until all have ended.

        A group's end is a step without text, where another follows. Called again, it goes on where it was left.
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
        """The state of all rows, which has seen all tokens made."""
        for group in self.groups:
            self._catch_up(group.rows)
        self._settle()  # what is handed out is not written into again
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
        counts = [self._answers[b].sampling.logprobs for b in going]
        asked = [count for count in counts if count is not None]
        found = [part.tolist() for part in logprobs(logits, chosen, max(asked))] if asked else None
        for n, (b, token) in enumerate(zip(going, chosen.tolist(), strict=True)):
            answer = self._answers[b]
            before = len(answer.tokens)
            pieces[b] = answer.step(token)
            self._behind[b] = len(answer.tokens) > before  # an end token is not among them
            if answer.finish is not None and not self._behind[b]:
                self.logits[b] = self.logits[b].clone()  # a part would keep the whole call's
            count = counts[n]
            if self._behind[b] and found is not None and count is not None:
                of_row = found[0][n], found[1][n][:count], found[2][n][:count]
                self.made[b].append(Made(of_row[0], list(zip(*of_row[1:], strict=True))))
        return pieces

    def _logits_of(self, rows: list[int]) -> Tensor:
        """The logits (rows, vocabulary) of these rows, without a copy where they are those of the last call."""
        of_call, logits = self._call
        return logits if rows == of_call else torch.stack([self.logits[b] for b in rows])

    def _catch_up(self, group: Sequence[int]) -> None:
        """Let the state see the tokens made since it was last asked."""
        active = [b for b in group if self._behind[b]]
        if not active:
            return
        state = self._arrange(group, active)
        rows = len(self._places)
        mask = torch.zeros(state.batch, dtype=torch.bool)
        mask[:rows] = torch.tensor([self._behind[b] for b in self._places])
        last = torch.zeros(len(mask), 1, dtype=torch.long)
        last[:rows, 0] = torch.tensor([(self._answers[b].tokens or [0])[-1] for b in self._places])
        # The state of rows that are not active stays as it is, and their logits mean nothing.
        none = torch.zeros(len(mask), dtype=torch.long)
        step = Step(last, none, mask.long(), chunk_size=1, logits="last", in_place=True)
        ((_, _, result),) = run(self._executor, state, [step])
        logits = result.logits
        assert logits is not None
        logits = logits.cpu()
        # A copy of the logits of 16 rows takes longer than choosing their tokens.
        logits = logits[:rows] if active == self._places else logits[mask]
        require_finite(logits, self._model)
        self._call = active, logits
        for b, row in zip(active, logits, strict=True):
            self.logits[b], self._behind[b] = row, False

    def _arrange(self, group: Sequence[int], active: list[int]) -> StateRef:
        """A state of the rows of this group that are active, which nobody else goes on from.

        In a call of the group's own size each has its own place; in a smaller one they stand together, without those
        that have ended: so a resumed run has them in the same places.
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
        """Nothing is decoded in place any more: its rows are as others are."""
        state, self._resident = self._resident, None
        if state is not None:
            for b, row in zip(self._places, self._states.rows(state, state.batch), strict=False):
                self._rows[b] = row
