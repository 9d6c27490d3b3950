"""The driver: feeds windows to an executor, counts, and stops between windows. Everything it needs is an argument."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from xlstm_ray.engine.held import HeldRows, States
from xlstm_ray.engine.windows import Group, Window, plan_windows
from xlstm_ray.errors import GridLost
from xlstm_ray.runtime.executor import Executor, Step, run


class Sizes(NamedTuple):
    """Tokens of a tile and of a chunk."""

    tile: int
    chunk: int


class Tail:
    """A row's tokens from `start` on, by their positions in the whole: what came before is in a state, not here."""

    def __init__(self, tokens: Tensor, start: int):
        self.tokens, self._start = tokens, start

    def __len__(self) -> int:
        return self._start + len(self.tokens)

    def __getitem__(self, part: slice) -> Tensor:
        start, stop, _ = part.indices(len(self))
        if start >= stop:  # a row that has nothing in a window
            return self.tokens[:0]
        assert start >= self._start
        return self.tokens[start - self._start : stop - self._start]


Tokens = Tensor | Tail


@dataclass(frozen=True)
class Progress:
    """Where a prefill is: tokens over all rows, those of a resumed state too; seconds since its first tile began."""

    tokens_done: int
    tokens_total: int
    tiles_done: int
    tile_seconds: float
    seconds: float
    tokens_resumed: int = 0  # of those that are done, found in the state that the run began with

    @property
    def tokens_per_s(self) -> float:
        return (self.tokens_done - self.tokens_resumed) / self.seconds if self.seconds > 0 else 0.0

    @property
    def eta_s(self) -> float:
        return (self.tokens_total - self.tokens_done) / self.tokens_per_s if self.tokens_per_s else 0.0


@dataclass(frozen=True)
class Snapshot:
    """All of a prefill at a window's end: what can be resumed there."""

    consumed: list[int]  # a row: how many tokens of its prompt are in the state
    logits: Tensor  # (B, vocabulary) float32: of each row's last consumed token
    rows: HeldRows  # where the state after them is


@dataclass
class Outcome:
    """What a run of the driver leaves."""

    end: Snapshot
    all_logits: list[Tensor] = field(default_factory=list)  # a row (tokens, vocabulary), where they were asked for
    seconds: float = 0.0
    tile_seconds: list[float] = field(default_factory=list)
    tile_tokens: list[int] = field(default_factory=list)  # new tokens in each, over all rows
    tile_whole: list[bool] = field(default_factory=list)  # a window of the tile's size that some row fills
    lost: GridLost | None = None  # why it ended early, at its last snapshot


@dataclass(frozen=True)
class Hooks:
    """What a run of the driver asks and tells on its way.

    Every keep_every windows the state is brought here, for on_snapshot and for the case that the grid is lost: then the
    outcome is that of the last one. on_window is given, after a window whose state can be had cheaply, what makes the
    snapshot of its end. next is asked before every window for the sizes of the windows from there on, which lie on
    the absolute grid of these sizes; None: there is to be none, and what has been submitted by then is finished, so the
    state is that of a window's end. wants is asked of every window whether its end is to be told to on_wanted, which is
    given the snapshot; both get the group first, of a batch. on_group is told of each group of a batch that is done.
    """

    keep_every: int | None = None
    on_snapshot: Callable[[Snapshot], object] | None = None
    on_group: Callable[[Group, Any], object] | None = None
    on_progress: Callable[[Progress], object] | None = None
    on_window: Callable[[Callable[[], Snapshot]], object] | None = None
    wants: Callable[..., bool] | None = None
    on_wanted: Callable[..., object] | None = None
    next: Callable[[], Sizes | None] | None = None


NO_HOOKS = Hooks()


class Part(NamedTuple):
    """A window's tokens for all rows."""

    tokens: Tensor  # (B, T) int64; 0 where a row has none
    start: Tensor  # (B,) int64: row b's are start[b] <= t < end[b]
    end: Tensor


def make_part(window: Window, rows: Sequence[Tokens], begin: Sequence[int]) -> Part:
    """rows: int64 prompts, begin: a row's first token that is not in the state yet."""
    tokens = torch.zeros(len(rows), window.size, dtype=torch.long)
    parts = [window.part(b, len(row)) for b, row in zip(begin, rows, strict=True)]
    for b, (start, end) in enumerate(parts):
        tokens[b, start:end] = rows[b][window.start + start : window.start + end]
    starts, ends = zip(*parts, strict=True)
    return Part(tokens, torch.tensor(starts), torch.tensor(ends))


def prefill(
    states: States,
    rows: Sequence[Tokens],
    *,
    start: Snapshot,
    sizes: Sizes,
    all_logits: bool = False,
    hooks: Hooks = NO_HOOKS,
) -> Outcome:
    """Consume what is new of every row, from the state of `start` on, by the states' executor.

    rows: prompts, 1-D int64 on the CPU.
    """
    executor = states.executor()
    begin, end = start.consumed, [len(row) for row in rows]
    consumed, last = list(begin), start
    outcome = Outcome(start)
    pieces: list[list[Tensor]] = [[] for _ in rows]
    hidden: Tensor | None = None
    # That are under way, whether each is a tile that some row fills, and whether its end is wanted.
    windows: deque[tuple[Window, bool, bool]] = deque()
    begins = after = states.state_of(start.rows)

    def steps() -> Iterator[Step]:
        now = sizes
        plan = plan_windows(begin, end, tile_size=now.tile, chunk_size=now.chunk)
        for number in count():
            window = next(plan, None)
            asked = hooks.next() if window is not None and hooks.next is not None else now
            if window is None or asked is None:
                return
            if asked != now:
                now = asked
                rest = [max(b, window.start) for b in begin]
                plan = plan_windows(rest, end, tile_size=now.tile, chunk_size=now.chunk)
                window = next(plan)
            part = make_part(window, rows, begin)
            filled = window.size == now.tile and bool(((part.end - part.start) == window.size).any())
            wanted = hooks.wants is not None and hooks.wants(window)
            windows.append((window, filled, wanted))
            keep = hooks.keep_every is not None and (number + 1) % hooks.keep_every == 0
            keep = keep or (wanted and not executor.local)  # with the result it comes before the actors go on
            yield Step(*part, now.chunk, number, "all" if all_logits else "none", keep)

    def snapshot(hidden: Tensor | None, consumed: list[int], rows: HeldRows) -> Snapshot:
        return Snapshot(consumed, _last_logits(executor, hidden, start, consumed), rows)

    started = perf_counter()
    try:
        for step, after, result in run(executor, begins, steps()):
            window, filled, wanted = windows.popleft()
            has = (step.end > step.start).unsqueeze(-1).to(result.hidden.device)
            hidden = result.hidden if hidden is None else torch.where(has, result.hidden, hidden)
            for b, (row_start, row_end) in enumerate(zip(step.start.tolist(), step.end.tolist(), strict=True)):
                if row_start < row_end:
                    consumed[b] = window.start + row_end
                    if result.logits is not None:
                        pieces[b].append(result.logits[b, row_start:row_end].cpu())
            if result.state is not None:
                last = snapshot(hidden, list(consumed), states.rows(None, len(rows), result.state))
                if hooks.on_snapshot is not None:
                    hooks.on_snapshot(last)
            if wanted and hooks.on_wanted is not None:
                kept = last if result.state is not None else None
                hooks.on_wanted(kept or snapshot(hidden, list(consumed), states.rows(after, len(rows))))
            if hooks.on_window is not None and result.state is not None:
                hooks.on_window(partial(replace, last))
            elif hooks.on_window is not None and executor.local:
                hooks.on_window(partial(snapshot, hidden, list(consumed), states.rows(after, len(rows))))
            outcome.seconds = perf_counter() - started
            outcome.tile_seconds.append(result.seconds)
            outcome.tile_whole.append(filled)
            outcome.tile_tokens.append(int((step.end - step.start).clamp(min=0).sum()))
            if hooks.on_progress is not None:
                done, number = sum(consumed), len(outcome.tile_seconds)
                times = result.seconds, outcome.seconds
                hooks.on_progress(Progress(done, sum(end), number, *times, sum(begin)))
        outcome.end = snapshot(hidden, consumed, states.rows(after, len(rows)))
        outcome.seconds = perf_counter() - started
    except GridLost as lost:
        outcome.end, outcome.lost = last, lost
        outcome.seconds = perf_counter() - started
    if all_logits:
        seen = [e - b for b, e in zip(begin, outcome.end.consumed, strict=True)]
        vocabulary = outcome.end.logits.shape[1]
        outcome.all_logits = [
            torch.cat(p)[:n] if p else torch.empty(0, vocabulary) for p, n in zip(pieces, seen, strict=True)
        ]
    return outcome


def _last_logits(executor: Executor, hidden: Tensor | None, start: Snapshot, consumed: Sequence[int]) -> Tensor:
    """Logits of the rows that moved on from `hidden`, those of `start` for the others."""
    if hidden is None:
        return start.logits
    moved = torch.tensor([c > b for b, c in zip(start.consumed, consumed, strict=True)])
    return torch.where(moved.unsqueeze(-1), executor.logits(hidden), start.logits)
