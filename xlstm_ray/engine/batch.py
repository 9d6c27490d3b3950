"""A prefill of many rows: one group after the other through the driver, with snapshots of all rows."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from math import inf
from time import perf_counter

import torch
from torch import Tensor

from xlstm_ray.engine import driver
from xlstm_ray.engine.driver import LAST, NO_HOOKS, Each, Hooks, Progress, Sizes, Snapshot
from xlstm_ray.engine.held import HeldRows, States
from xlstm_ray.engine.scores import Scores
from xlstm_ray.engine.tokens import Tokens
from xlstm_ray.engine.windows import Group
from xlstm_ray.errors import GridLost


@dataclass
class BatchOutcome:
    """The results of a run over all groups. Times in seconds."""

    end: Snapshot
    ready_s: list[float]  # for each row: from the run's first tile to the row's logits
    group_s: list[float]  # for each row: the time of its group
    all_logits: list[Tensor] = field(default_factory=list)  # for each row (tokens, vocabulary), if requested
    scores: dict[int, Scores] = field(default_factory=dict)  # of rows that were read, if requested
    seconds: float = 0.0
    tile_seconds: list[float] = field(default_factory=list)
    tile_tokens: list[int] = field(default_factory=list)  # new tokens of each tile, over all rows
    tile_whole: list[bool] = field(default_factory=list)  # False for a window of a tail
    lost: GridLost | None = None  # why it ended early, with its last snapshot


def take(snapshot: Snapshot, rows: Sequence[int], size: int) -> Snapshot:
    """These rows of a snapshot, filled up with empty rows to `size`."""
    empty = size - len(rows)

    def own(logits: Tensor) -> Tensor:
        if list(rows) != list(range(len(logits))):
            logits = logits[list(rows)]
        return torch.cat([logits, logits.new_zeros(empty, logits.shape[1])]) if empty else logits

    return Snapshot(
        [snapshot.consumed[b] for b in rows] + [0] * empty,
        snapshot.some(own),
        HeldRows([*snapshot.rows.pick(rows), *[None] * empty]),
        [snapshot.scored[b] for b in rows] + [None] * empty,
    )


class Whole:
    """The snapshot of all rows, updated group by group. It never writes into the snapshot that it began with or into
    one that it has handed out."""

    def __init__(self, start: Snapshot):
        self.now, self._own = start, False

    def hand_out(self) -> Snapshot:
        self._own = False
        return self.now

    def put(self, rows: Sequence[int], part: Snapshot) -> Snapshot:
        """Replace these rows by the first rows of `part`; returns the new snapshot."""
        batch, n = len(self.now.consumed), len(rows)
        if list(rows) == list(range(batch)) and len(part.consumed) == batch:
            self.now = part
            return part
        consumed, held, scored = list(self.now.consumed), list(self.now.rows), list(self.now.scored)
        logits, self._own = self.now.logits if self._own else self.now.logits.clone(), True  # large
        for b, seen, row, sums in zip(rows, part.consumed, part.rows, part.scored, strict=False):
            consumed[b], held[b], scored[b] = seen, row, sums
        logits[list(rows)] = part.logits[:n]
        self.now = Snapshot(consumed, logits, HeldRows(held), scored)
        return self.now


def prefill_groups(
    states: States,
    rows: Sequence[Tokens],
    groups: Sequence[Group],
    *,
    start: Snapshot,
    sizes: Callable[[], Sizes],
    each: Each = LAST,
    hooks: Hooks = NO_HOOKS,
) -> BatchOutcome:
    """driver.prefill for one group after the other. Snapshots, progress and the outcome are of all rows.

    sizes: called at each group's begin for the sizes to use. hooks.on_group is called with each group that is done and
    the outcome so far; groups that `start` has whole come first. A stopped run does not change the groups after it.
    """
    begin, end = start.consumed, [len(row) for row in rows]
    whole = Whole(start)
    outcome = BatchOutcome(start, [0.0] * len(rows), [0.0] * len(rows))
    logits: dict[int, Tensor] = {}
    unsaved, kept, started = 0, start, perf_counter()  # kept: the last snapshot

    def snapshot(group: Group, part: Snapshot) -> None:
        nonlocal unsaved, kept
        whole.put(group.rows, part)
        if hooks.on_snapshot is not None:
            kept = whole.hand_out()
            hooks.on_snapshot(kept)
        unsaved = 0

    def report(p: Progress) -> None:
        assert hooks.on_progress is not None
        done = p.tokens_done - p.tokens_resumed + sum(whole_begin)
        tiles = p.tiles_done + len(outcome.tile_seconds)
        hooks.on_progress(Progress(done, sum(end), tiles, p.tile_seconds, perf_counter() - started, sum(begin)))

    def window(group: Group, part: Snapshot) -> None:
        assert hooks.on_window is not None
        hooks.on_window(lambda: whole.put(group.rows, part))

    order = sorted(groups, key=lambda g: any(begin[b] < end[b] for b in g.rows))
    for group in order:
        new = any(begin[b] < end[b] for b in group.rows)
        if new or len(groups) == 1:
            whole_begin = list(whole.now.consumed)
            own = [rows[b] for b in group.rows]
            own += [rows[0][:0]] * (group.size - len(own))
            part = take(start, group.rows, group.size)
            states.evict(but=part.rows)  # the states of earlier groups
            own_hooks = replace(
                hooks,
                on_snapshot=hooks.on_snapshot and partial(snapshot, group),
                on_progress=hooks.on_progress and report,
                on_window=hooks.on_window and partial(window, group),
                wants=hooks.wants and partial(hooks.wants, group),
                on_wanted=hooks.on_wanted and partial(hooks.on_wanted, group),
            )
            run = driver.prefill(
                states,
                own,
                start=part,
                sizes=sizes(),
                each=each,
                hooks=own_hooks,
            )
            if run.lost is None or any(run.end.rows):
                outcome.end = whole.put(group.rows, run.end)
            outcome.lost = run.lost
            outcome.tile_seconds += run.tile_seconds
            outcome.tile_tokens += run.tile_tokens
            outcome.tile_whole += run.tile_whole
            every, tiles = hooks.keep_every, len(run.tile_seconds)
            unsaved = unsaved + tiles if every is None or tiles <= every else (tiles - 1) % every + 1
            done = run.lost is None and all(outcome.end.consumed[b] == end[b] for b in group.rows)
            if done and group is not order[-1] and hooks.on_snapshot is not None and unsaved >= (every or inf):
                try:
                    for row in filter(None, whole.now.rows):
                        row.held.bring()
                    snapshot(group, run.end)
                except GridLost as lost:  # with it the state of this group, unless it was brought
                    outcome.end, outcome.lost = kept, lost
                    break
            logits |= dict(zip(group.rows, run.all_logits, strict=False))
            outcome.scores |= dict(zip(group.rows, run.scores, strict=False))
            outcome.seconds = perf_counter() - started
            for b in group.rows:
                outcome.ready_s[b], outcome.group_s[b] = outcome.seconds, run.seconds
            if not done:
                break
        if hooks.on_group is not None:
            hooks.on_group(group, replace(outcome, end=whole.now))
    if each.logits:
        nothing = torch.empty(0, outcome.end.logits.shape[1])
        outcome.all_logits = [logits.get(b, nothing) for b in range(len(rows))]
    return outcome
