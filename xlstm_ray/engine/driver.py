"""The driver: it feeds windows to an executor, counts, and can stop between windows."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import count
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from xlstm_ray.engine.held import HeldRows, States
from xlstm_ray.engine.scores import Scores, Sums, following
from xlstm_ray.engine.tokens import Tokens, make_part
from xlstm_ray.engine.windows import Group, Window, plan_windows
from xlstm_ray.errors import GridLost
from xlstm_ray.runtime.executor import Executor, Step, StepResult, run
from xlstm_ray.text.history import LaterTrail, Scored


class Sizes(NamedTuple):
    """Tokens of a tile and of a chunk."""

    tile: int
    chunk: int


@dataclass(frozen=True)
class Progress:
    """The progress of a prefill: tokens over all rows, with those of a resumed state; seconds since its first tile."""

    tokens_done: int
    tokens_total: int
    tiles_done: int
    tile_seconds: float
    seconds: float
    tokens_resumed: int = 0  # tokens_done of the state that the run began with

    @property
    def tokens_per_s(self) -> float:
        return (self.tokens_done - self.tokens_resumed) / self.seconds if self.seconds > 0 else 0.0

    @property
    def eta_s(self) -> float:
        return (self.tokens_total - self.tokens_done) / self.tokens_per_s if self.tokens_per_s else 0.0


class Each(NamedTuple):
    """What a run returns of each token: its logits; its log-probability and those of the likeliest tokens there.

    sums: instead of these, only the sum of the tokens' log-probabilities.
    """

    logits: bool = False
    likeliest: int | None = None  # how many; None: no log-probabilities
    sums: bool = False

    @property
    def scores(self) -> bool:
        """Whether log-probabilities are computed."""
        return self.sums or self.likeliest is not None


LAST = Each()  # nothing but the logits of the last one


Logits = Tensor | Callable[[], Tensor]  # a function computes them when they are needed


def computed(logits: Logits) -> Tensor:
    return logits if isinstance(logits, Tensor) else logits()


class Later:
    """Logits (B, vocabulary), computed when they are needed: row b of the b-th tensor of `hidden` (B, D) is after the
    row's last token; None: any will do."""

    def __init__(self, states: States, executor: Executor, hidden: list[Tensor | None]):
        self._states, self._executor, self._hidden = states, executor, hidden
        self._coming: Future[Tensor] | None = None

    def begin(self) -> "Future[Tensor]":
        if self._coming is not None:  # nobody has to wait for a turn
            return self._coming
        with self._states.turn():  # other threads must not use the device now
            if self._coming is None:
                some = next(part for part in self._hidden if part is not None)
                parts = [some if part is None else part for part in self._hidden]
                same = all(part is some for part in parts)
                together = some if same else torch.stack([p[b] for b, p in enumerate(parts)])
                self._coming = self._states.mover.submit(self._executor.logits(together))
            return self._coming

    def __call__(self) -> Tensor:
        return self.begin().result()


class Start(NamedTuple):
    """A state of one row, from which a prompt goes on, and the trail of its tokens. logits: (vocabulary,) float32."""

    rows: HeldRows
    logits: Logits
    trail: LaterTrail

    def bring(self) -> dict[str, Tensor]:
        """All tensors of a RecurrentState, on the CPU. Raises GridLost."""
        return {**self.rows.bring(), "logits": computed(self.logits)[None]}

    def pick(self, rows: Sequence[int]) -> "Start":
        """Itself: it has one row."""
        return self


class Snapshot:
    """A prefill at a window's end, where it can be resumed.

    consumed: for each row, the number of its tokens in the state. rows: the state after them. logits: (B, vocabulary)
    float32, after each row's last consumed token. scored: the sums of each row's log-probabilities, if requested.
    """

    def __init__(
        self, consumed: list[int], logits: Logits, rows: HeldRows, scored: Sequence[Scored | None] | None = None
    ):
        self.consumed, self.rows, self._logits = consumed, rows, logits
        self.scored = [None] * len(consumed) if scored is None else list(scored)

    @property
    def logits(self) -> Tensor:
        self._logits = computed(self._logits)
        return self._logits

    def begin(self) -> None:
        """Begin to compute the logits, where that is beside other work."""
        if isinstance(self._logits, Later):
            self._logits.begin()

    def some(self, change: Callable[[Tensor], Tensor]) -> Logits:
        """Change the logits: now if they are computed, else when they are. The result does not keep the state alive."""
        logits = self._logits
        return change(logits) if isinstance(logits, Tensor) else lambda: change(logits())


@dataclass
class Outcome:
    """The results of a run of the driver."""

    end: Snapshot
    all_logits: list[Tensor] = field(default_factory=list)  # for each row (tokens, vocabulary), if requested
    scores: list[Scores] = field(default_factory=list)  # for each row, if requested
    seconds: float = 0.0
    tile_seconds: list[float] = field(default_factory=list)
    tile_tokens: list[int] = field(default_factory=list)  # new tokens of each tile, over all rows
    tile_whole: list[bool] = field(default_factory=list)  # True for a window of the tile's size that some row fills
    lost: GridLost | None = None  # why it ended early, with its last snapshot


@dataclass(frozen=True)
class Hooks:
    """Functions that the driver calls during a run.

    keep_every: after so many windows each, the state is brought to the host, for on_snapshot and in case the grid is
    lost: then the outcome is the last snapshot.
    on_window: called after a window whose state is cheap to get, with its snapshot; in a batch, with a function that
    makes the snapshot of all rows.
    next: called before every window. It returns the sizes of the windows from this one on, which lie on the absolute
    grid of these sizes. If it returns None, the run ends after the windows that were submitted.
    wants, on_wanted: wants is called for every window. If it returns True, on_wanted is called with the snapshot of the
    window's end. In a batch both get the group first.
    on_group: called for each group that is done.
    """

    keep_every: int | None = None
    on_snapshot: Callable[[Snapshot], object] | None = None
    on_group: Callable[[Group, Any], object] | None = None
    on_progress: Callable[[Progress], object] | None = None
    on_window: Callable[..., object] | None = None
    wants: Callable[..., bool] | None = None
    on_wanted: Callable[..., object] | None = None
    next: Callable[[], Sizes | None] | None = None


NO_HOOKS = Hooks()


class Read(NamedTuple):
    """A window that a Reader has given out. filled: a row fills it, and it is a tile. wanted: keep its snapshot."""

    step: Step
    window: Window
    filled: bool
    wanted: bool


class Reader:
    """Reads rows together: it gives a step for each window, and takes the results in the same order.

    rows: prompts, 1-D int64 on the CPU. start: where to go on from. wants: says for a window whether the snapshot at
    its end is wanted.
    """

    def __init__(
        self,
        states: States,
        rows: Sequence[Tokens],
        start: Snapshot,
        sizes: Sizes,
        *,
        each: Each = LAST,
        wants: Callable[[Window], bool] | None = None,
    ):
        self._states, self._rows, self._sizes, self._each, self._wants = states, rows, sizes, each, wants
        self.executor = states.executor()
        self.start, self.begin, self.end = start, start.consumed, [len(row) for row in rows]
        self.consumed = list(self.begin)  # how far the results that were taken go
        self.read = max(self.begin, default=0)  # how far the windows that were given out go
        self.scores: list[Scores] = []  # of each row, if requested
        self.sums: list[Sums] = []
        if each.sums:
            self.sums = [
                Sums(row, b, start.logits[n], start.scored[n])
                for n, (row, b) in enumerate(zip(rows, self.begin, strict=True))
            ]
        elif each.likeliest is not None:
            self.scores = [
                Scores(row, b, start.logits[n], each.likeliest)
                for n, (row, b) in enumerate(zip(rows, self.begin, strict=True))
            ]
        self._hidden: list[Tensor | None] = [None] * len(rows)  # (B, D) of the window with the row's last token
        self._pieces: list[list[Tensor]] = [[] for _ in rows]
        self._under_way: deque[Read] = deque()
        self._numbers = count()
        self._plan = self._windows(self.begin)

    @property
    def last(self) -> bool:
        """Whether all windows were given out."""
        return self.read >= max(self.end)

    @property
    def under_way(self) -> bool:
        """Whether results are to come."""
        return bool(self._under_way)

    def step(self, ask: Callable[[], Sizes | None] | None = None) -> Step | None:
        """The next window's step; None: there is no window left.

        ask: gives the sizes of the windows from this one on, or None if it must not be read.
        """
        window = next(self._plan, None)
        sizes = ask() if window is not None and ask is not None else self._sizes
        if window is None or sizes is None:
            return None
        if sizes != self._sizes:
            self._sizes = sizes
            self._plan = self._windows([max(b, window.start) for b in self.begin])
            window = next(self._plan)
        part = make_part(window, self._rows, self.begin)
        filled = window.size == sizes.tile and bool(((part.end - part.start) == window.size).any())
        wanted = self._wants is not None and self._wants(window)
        step = Step(
            *part,
            sizes.chunk,
            next(self._numbers),
            "all" if self._each.logits else "none",
            keep=wanted and not self.executor.local,  # actors send it before they go on
            following=following(window, self.sums or self.scores) if self._each.scores else None,
        )
        self._under_way.append(Read(step, window, filled, wanted))
        self.read = min(window.start + window.size, max(self.end))
        return step

    def take(self, result: StepResult) -> Read:
        """Take the oldest window's result; returns the window."""
        read = self._under_way.popleft()
        start, end = read.step.start, read.step.end
        for b, (row_start, row_end) in enumerate(zip(start.tolist(), end.tolist(), strict=True)):
            if row_start < row_end:
                self.consumed[b], self._hidden[b] = read.window.start + row_end, result.hidden
                if self._each.logits and result.logits is not None:
                    with self._states.turn():
                        self._pieces[b].append(result.logits[b, row_start:row_end].cpu())
                if result.logprobs is not None:
                    (self.sums or self.scores)[b].add(result.logprobs, b, row_start, row_end)
        return read

    def snapshot(self, rows: HeldRows) -> Snapshot:
        """The snapshot after the last result that was taken. rows: the state there."""
        consumed, before = list(self.consumed), self.start.some(lambda logits: logits)
        scored = [row.so_far for row in self.sums] or None
        if not any(hidden is not None for hidden in self._hidden):
            return Snapshot(consumed, before, rows, scored)
        logits = Later(self._states, self.executor, list(self._hidden))
        moved = torch.tensor([c > b or e == 0 for b, c, e in zip(self.begin, consumed, self.end, strict=True)])
        if moved.all():
            return Snapshot(consumed, logits, rows, scored)
        return Snapshot(consumed, lambda: torch.where(moved.unsqueeze(-1), logits(), computed(before)), rows, scored)

    def finish(self, end: Snapshot) -> list[Tensor]:
        """Drop scores and logits of tokens after the snapshot `end`. Returns each row's logits, if requested."""
        seen = [e - b for b, e in zip(self.begin, end.consumed, strict=True)]
        for row, length in zip(self.scores, seen, strict=False):
            row.cut(length)
        if not self._each.logits:
            return []
        nothing = torch.empty(0, end.logits.shape[1])
        return [torch.cat(p)[:n] if p else nothing for p, n in zip(self._pieces, seen, strict=True)]

    def _windows(self, begin: Sequence[int]) -> Iterator[Window]:
        return plan_windows(begin, self.end, tile_size=self._sizes.tile, chunk_size=self._sizes.chunk)


def prefill(
    states: States,
    rows: Sequence[Tokens],
    *,
    start: Snapshot,
    sizes: Sizes,
    each: Each = LAST,
    hooks: Hooks = NO_HOOKS,
) -> Outcome:
    """Consume every row's new tokens, starting from the state of `start`, on the executor of `states`.

    rows: prompts, 1-D int64 on the CPU.
    """
    reader = Reader(states, rows, start, sizes, each=each, wants=hooks.wants)
    outcome, last = Outcome(start, scores=reader.scores), start
    executor, begins = reader.executor, states.state_of(start.rows)
    after = begins

    def steps() -> Iterator[Step]:
        while (step := reader.step(hooks.next)) is not None:
            # Not at the end: the run's own state is there, and on GPUs bringing one takes as long as 20 tiles.
            keep = hooks.keep_every is not None and (step.number + 1) % hooks.keep_every == 0 and not reader.last
            yield step._replace(keep=step.keep or keep)

    started = perf_counter()
    try:
        for _, after, result in run(executor, begins, steps()):
            read = reader.take(result)
            if result.state is not None:
                here = reader.snapshot(states.rows(None, len(rows), result.state))
                _ = here.logits  # a lost grid cannot compute them: then the snapshot before is the last
                last = here
                if hooks.on_snapshot is not None:
                    hooks.on_snapshot(last)
            elif executor.local:
                here = reader.snapshot(states.rows(after, len(rows)))
            if read.wanted and hooks.on_wanted is not None:
                hooks.on_wanted(here)
            if hooks.on_window is not None and (result.state is not None or executor.local):
                hooks.on_window(here)
            outcome.seconds = perf_counter() - started
            outcome.tile_seconds.append(result.seconds)
            outcome.tile_whole.append(read.filled)
            outcome.tile_tokens.append(int((read.step.end - read.step.start).clamp(min=0).sum()))
            if hooks.on_progress is not None:
                done, number = sum(reader.consumed), len(outcome.tile_seconds)
                times = result.seconds, outcome.seconds
                hooks.on_progress(Progress(done, sum(reader.end), number, *times, sum(reader.begin)))
        outcome.end = reader.snapshot(states.rows(after, len(rows)))
        _ = outcome.end.logits
    except GridLost as lost:
        outcome.end, outcome.lost = last, lost
    outcome.seconds = perf_counter() - started
    outcome.all_logits = reader.finish(outcome.end)
    return outcome
