"""The driver: feeds windows to an executor, counts, and stops between windows. All that it needs is an argument."""

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
from xlstm_ray.engine.scores import Scores, following
from xlstm_ray.engine.tokens import Tokens, make_part
from xlstm_ray.engine.windows import Group, Window, plan_windows
from xlstm_ray.errors import GridLost
from xlstm_ray.runtime.executor import Executor, Step, run


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
    """What is wanted of each token that is read: its logits, its log-probability with those of the likeliest ones."""

    logits: bool = False
    likeliest: int | None = None  # how many; None: no log-probabilities


LAST = Each()  # only of the last one, its logits


@dataclass(frozen=True)
class Snapshot:
    """A prefill at a window's end, where it can be resumed."""

    consumed: list[int]  # for each row: the number of its tokens in the state
    logits: Tensor  # (B, vocabulary) float32: after each row's last consumed token
    rows: HeldRows  # the state after them


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

    Every keep_every windows the state is brought to the host: for on_snapshot, and in case the grid is lost, when the
    outcome is the last snapshot. on_window is called after a window whose state is cheap to get, with a function that
    makes the snapshot. next is called before every window and returns the sizes of the following windows, which lie on
    the absolute grid of these sizes. If it returns None, the run ends after the windows that were submitted, so the
    state is at a window's end. wants is called for every window; if it returns True, on_wanted is called with the
    snapshot of its end. In a batch both get the group first. on_group is called for each group that is done.
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
    executor = states.executor()
    begin, end = start.consumed, [len(row) for row in rows]
    consumed, last = list(begin), start
    outcome = Outcome(start)
    if each.likeliest is not None:
        outcome.scores = [Scores(rows[b], begin[b], start.logits[b], each.likeliest) for b in range(len(rows))]
    pieces: list[list[Tensor]] = [[] for _ in rows]
    hidden: Tensor | None = None
    # Windows in flight; is it a tile that some row fills; is the snapshot of its end wanted.
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
            after = following(window, outcome.scores) if outcome.scores else None
            yield Step(*part, now.chunk, number, "all" if each.logits else "none", keep, following=after)

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
                    if result.logprobs is not None:
                        outcome.scores[b].add(result.logprobs, b, row_start, row_end)
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
    seen = [e - b for b, e in zip(begin, outcome.end.consumed, strict=True)]
    for row, length in zip(outcome.scores, seen, strict=False):
        row.cut(length)
    if each.logits:
        vocabulary = outcome.end.logits.shape[1]
        outcome.all_logits = [
            torch.cat(p)[:n] if p else torch.empty(0, vocabulary) for p, n in zip(pieces, seen, strict=True)
        ]
    return outcome


def _last_logits(executor: Executor, hidden: Tensor | None, start: Snapshot, consumed: Sequence[int]) -> Tensor:
    """Logits from `hidden` for the rows that consumed tokens, those of `start` for the others."""
    if hidden is None:
        return start.logits
    moved = torch.tensor([c > b for b, c in zip(start.consumed, consumed, strict=True)])
    return torch.where(moved.unsqueeze(-1), executor.logits(hidden), start.logits)
