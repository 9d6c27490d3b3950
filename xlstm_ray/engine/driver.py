"""The driver: feeds windows to an executor, counts, and stops between windows. Everything it needs is an argument."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from xlstm_ray.engine.windows import Group, Window, plan_windows
from xlstm_ray.errors import GridLost
from xlstm_ray.runtime.executor import Executor, Tile


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
    tensors: dict[str, Tensor]  # named as in RecurrentState, on the CPU


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
    outcome is that of the last one. on_window is given, after a window whose state can be had cheaply, what brings the
    snapshot of its end here. next is asked before every window for the sizes of the windows from there on, which lie on
    the absolute grid of these sizes; None: there is to be none, and what has been submitted by then is finished, so the
    state is that of a window's end. on_group is told of each group of a batch that is done.
    """

    keep_every: int | None = None
    on_snapshot: Callable[[Snapshot], object] | None = None
    on_group: Callable[[Group, Any], object] | None = None
    on_progress: Callable[[Progress], object] | None = None
    on_window: Callable[[Callable[[], Snapshot]], object] | None = None
    next: Callable[[], Sizes | None] | None = None


NO_HOOKS = Hooks()


def make_tile(window: Window, rows: Sequence[Tokens], begin: Sequence[int], *, keep: bool) -> Tile:
    """The window's tokens; rows: int64 prompts, begin: a row's first token that is not in the state yet."""
    tokens = torch.zeros(len(rows), window.size, dtype=torch.long)
    parts = [window.part(b, len(row)) for b, row in zip(begin, rows, strict=True)]
    for b, (first, last) in enumerate(parts):
        tokens[b, first:last] = rows[b][window.start + first : window.start + last]
    firsts, lasts = zip(*parts, strict=True)
    return Tile(window.number, tokens, torch.tensor(firsts), torch.tensor(lasts), keep)


def prefill(
    executor: Executor,
    rows: Sequence[Tokens],
    *,
    start: Snapshot,
    tile_size: int,
    chunk_size: int,
    all_logits: bool = False,
    hooks: Hooks = NO_HOOKS,
) -> Outcome:
    """Consume what is new of every row; the executor has been given the state of `start`, and moves on.

    rows: prompts, 1-D int64 on the CPU.
    """
    begin, end = start.consumed, [len(row) for row in rows]
    consumed, last = list(begin), start
    outcome = Outcome(start)
    pieces: list[list[Tensor]] = [[] for _ in rows]
    hidden: Tensor | None = None
    submitted: dict[int, tuple[Window, Tile]] = {}
    whole: dict[int, bool] = {}

    def tiles() -> Iterator[Tile]:
        sizes = Sizes(tile_size, chunk_size)
        plan = plan_windows(begin, end, tile_size=tile_size, chunk_size=chunk_size)
        for number in count():
            window = next(plan, None)
            now = hooks.next() if window is not None and hooks.next is not None else sizes
            if window is None or now is None:
                return
            if now != sizes:
                sizes = now
                rest = [max(b, window.start) for b in begin]
                plan = plan_windows(rest, end, tile_size=sizes.tile, chunk_size=sizes.chunk)
                window = next(plan)
            window = window._replace(number=number)
            keep = hooks.keep_every is not None and (window.number + 1) % hooks.keep_every == 0
            tile = make_tile(window, rows, begin, keep=keep)
            submitted[window.number] = window, tile
            whole[window.number] = window.size == sizes.tile and bool(((tile.last - tile.first) == window.size).any())
            yield tile

    started = perf_counter()
    try:
        for result in executor.stream(tiles(), all_logits=all_logits):
            window, tile = submitted.pop(result.number)
            has = (tile.last > tile.first).unsqueeze(-1).to(result.hidden.device)
            hidden = result.hidden if hidden is None else torch.where(has, result.hidden, hidden)
            for b, (first, end_of_row) in enumerate(zip(tile.first.tolist(), tile.last.tolist(), strict=True)):
                if first < end_of_row:
                    consumed[b] = window.start + end_of_row
                    if result.logits is not None:
                        pieces[b].append(result.logits[b, first:end_of_row].cpu())
            if result.state is not None:
                last = Snapshot(list(consumed), _last_logits(executor, hidden, start, consumed), result.state)
                if hooks.on_snapshot is not None:
                    hooks.on_snapshot(last)
            if hooks.on_window is not None and result.state is not None:
                hooks.on_window(partial(replace, last))
            elif hooks.on_window is not None and result.held is not None:
                hooks.on_window(partial(_snapshot, executor, hidden, start, list(consumed), result.held))
            outcome.seconds = perf_counter() - started
            outcome.tile_seconds.append(result.seconds)
            outcome.tile_whole.append(whole.pop(result.number))
            outcome.tile_tokens.append(int((tile.last - tile.first).clamp(min=0).sum()))
            if hooks.on_progress is not None:
                done, number = sum(consumed), len(outcome.tile_seconds)
                times = result.seconds, outcome.seconds
                hooks.on_progress(Progress(done, sum(end), number, *times, sum(begin)))
        logits = _last_logits(executor, hidden, start, consumed)
        outcome.seconds = perf_counter() - started
        outcome.end = Snapshot(consumed, logits, executor.get_state())
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


def _snapshot(
    executor: Executor,
    hidden: Tensor | None,
    start: Snapshot,
    consumed: list[int],
    held: Callable[[], dict[str, Tensor]],
) -> Snapshot:
    return Snapshot(consumed, _last_logits(executor, hidden, start, consumed), held())


def _last_logits(executor: Executor, hidden: Tensor | None, start: Snapshot, consumed: Sequence[int]) -> Tensor:
    """Logits of the rows that moved on from `hidden`, those of `start` for the others."""
    if hidden is None:
        return start.logits
    moved = torch.tensor([c > b for b, c in zip(start.consumed, consumed, strict=True)])
    return torch.where(moved.unsqueeze(-1), executor.logits(hidden), start.logits)
