"""A prefill of many rows: group after group through the driver, one snapshot of all of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from time import perf_counter

import torch
from torch import Tensor

from xlstm_ray.engine import driver
from xlstm_ray.engine.driver import NO_HOOKS, Hooks, Progress, Sizes, Snapshot, Tokens
from xlstm_ray.engine.held import HeldRows, States
from xlstm_ray.engine.windows import Group
from xlstm_ray.errors import GridLost


@dataclass
class BatchOutcome:
    """What a run over all groups leaves. Times in seconds."""

    end: Snapshot
    ready_s: list[float]  # a row: from the run's first tile to the row's logits
    group_s: list[float]  # a row: what its group took
    all_logits: list[Tensor] = field(default_factory=list)  # a row (tokens, vocabulary), where they were asked for
    seconds: float = 0.0
    tile_seconds: list[float] = field(default_factory=list)
    tile_tokens: list[int] = field(default_factory=list)  # new tokens in each, over all rows
    tile_whole: list[bool] = field(default_factory=list)  # not a tail's window
    lost: GridLost | None = None  # why it ended early, at its last snapshot


def take(snapshot: Snapshot, rows: Sequence[int], size: int) -> Snapshot:
    """These rows of a snapshot, and empty ones up to `size`."""
    empty = size - len(rows)
    logits = snapshot.logits[list(rows)] if list(rows) != list(range(len(snapshot.consumed))) else snapshot.logits
    if empty:
        logits = torch.cat([logits, logits.new_zeros(empty, logits.shape[1])])
    return Snapshot(
        [snapshot.consumed[b] for b in rows] + [0] * empty,
        logits,
        HeldRows([*snapshot.rows.pick(rows), *[None] * empty]),
    )


class Whole:
    """The snapshot of all rows, which is brought up to date a group at a time. Never writes into what it began with,
    nor into what it has handed out."""

    def __init__(self, start: Snapshot):
        self.now, self._own = start, False

    def hand_out(self) -> Snapshot:
        self._own = False
        return self.now

    def put(self, rows: Sequence[int], part: Snapshot) -> Snapshot:
        """The snapshot with these rows as `part` has them first."""
        batch, n = len(self.now.consumed), len(rows)
        if list(rows) == list(range(batch)) and len(part.consumed) == batch:
            self.now = part
            return part
        consumed, held = list(self.now.consumed), list(self.now.rows)
        logits, self._own = self.now.logits if self._own else self.now.logits.clone(), True  # large
        for b, seen, row in zip(rows, part.consumed, part.rows, strict=False):
            consumed[b], held[b] = seen, row
        logits[list(rows)] = part.logits[:n]
        self.now = Snapshot(consumed, logits, HeldRows(held))
        return self.now


def prefill_groups(
    states: States,
    rows: Sequence[Tokens],
    groups: Sequence[Group],
    *,
    start: Snapshot,
    sizes: Callable[[], Sizes],
    all_logits: bool = False,
    hooks: Hooks = NO_HOOKS,
) -> BatchOutcome:
    """As driver.prefill, for each group in turn; snapshots, progress and the outcome are those of all rows.

    sizes: those of now, asked where a group begins. hooks.on_group is called with each group that is done and the
    outcome so far, at once for those that `start` has whole. A stopped run leaves the groups after it as they were.
    """
    begin, end = start.consumed, [len(row) for row in rows]
    whole = Whole(start)
    outcome = BatchOutcome(start, [0.0] * len(rows), [0.0] * len(rows))
    logits: dict[int, Tensor] = {}
    unsaved, started = 0, perf_counter()

    def snapshot(group: Group, part: Snapshot) -> None:
        nonlocal unsaved
        whole.put(group.rows, part)
        if hooks.on_snapshot is not None:
            hooks.on_snapshot(whole.hand_out())
        unsaved = 0

    def report(p: Progress) -> None:
        assert hooks.on_progress is not None
        done = p.tokens_done - p.tokens_resumed + sum(whole_begin)
        tiles = p.tiles_done + len(outcome.tile_seconds)
        hooks.on_progress(Progress(done, sum(end), tiles, p.tile_seconds, perf_counter() - started, sum(begin)))

    def window(group: Group, bring: Callable[[], Snapshot]) -> None:
        assert hooks.on_window is not None
        hooks.on_window(lambda: whole.put(group.rows, bring()))

    for group in sorted(groups, key=lambda g: any(begin[b] < end[b] for b in g.rows)):
        new = any(begin[b] < end[b] for b in group.rows)
        if new or len(groups) == 1:
            whole_begin = list(whole.now.consumed)
            own = [rows[b] for b in group.rows]
            own += [rows[0][:0]] * (group.size - len(own))
            part = take(start, group.rows, group.size)
            states.evict(but=part.rows)  # those of the groups before
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
                all_logits=all_logits,
                hooks=own_hooks,
            )
            if run.lost is None or any(run.end.rows):
                outcome.end = whole.put(group.rows, run.end)
            outcome.lost = run.lost
            outcome.tile_seconds += run.tile_seconds
            outcome.tile_tokens += run.tile_tokens
            outcome.tile_whole += run.tile_whole
            unsaved += len(run.tile_seconds)
            logits |= dict(zip(group.rows, run.all_logits, strict=False))
            outcome.seconds = perf_counter() - started
            for b in group.rows:
                outcome.ready_s[b], outcome.group_s[b] = outcome.seconds, run.seconds
            if run.lost or any(outcome.end.consumed[b] < end[b] for b in group.rows):
                break
            if hooks.on_snapshot is not None and hooks.keep_every is not None and unsaved >= hooks.keep_every:
                hooks.on_snapshot(whole.hand_out())
                unsaved = 0
        if hooks.on_group is not None:
            hooks.on_group(group, replace(outcome, end=whole.now))
    if all_logits:
        nothing = torch.empty(0, outcome.end.logits.shape[1])
        outcome.all_logits = [logits.get(b, nothing) for b in range(len(rows))]
    return outcome
