"""The memory guard's verdict between two windows: go on, go on in smaller windows, or stop."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import NamedTuple

from xlstm_ray.csvlog import CsvLog
from xlstm_ray.engine.core import Core
from xlstm_ray.engine.driver import Sizes
from xlstm_ray.errors import MemoryLimitError
from xlstm_ray.files import MIB
from xlstm_ray.memory.need import advice
from xlstm_ray.memory.room import Room
from xlstm_ray.memory.sample import Sample
from xlstm_ray.memory.watchdog import Event, MemoryWatchdog
from xlstm_ray.plan import Watch


class Go(NamedTuple):
    """Go on with windows of these sizes."""

    sizes: Sizes


class Stop(NamedTuple):
    """Stop, for this reason."""

    error: MemoryLimitError


@dataclass
class MemoryGuard:
    """A soft limit halves the tile, then the chunk; a hard one ends the run.

    events: new events from the watchdogs of other processes. left: the shapes (rows, tokens) of the remaining windows
    with these sizes. note: called with remarks for people.
    """

    room: Room
    watch: Watch
    watchdog: MemoryWatchdog
    batch: int
    events: Callable[[], list[Event]]
    left: Callable[[Sizes], list[tuple[int, int]]]
    note: Callable[[str], object]

    @classmethod
    def of(
        cls,
        core: Core,
        open_: ExitStack,
        *,
        batch: int,
        left: Callable[[Sizes], list[tuple[int, int]]],
        log: CsvLog | None,
    ) -> "MemoryGuard | None":
        """The guard of a run, whose watchdog is there until `open_` is closed; None if memory is not watched."""
        plan = core.plan
        watch, limits = plan.watch, plan.room.limits
        if watch is None or limits is None:
            return None
        watchdog = MemoryWatchdog(
            limits,
            device=plan.own_device,
            poll_s=watch.every_s,
            actions=watch.actions,
            warn=core.on_note,
            log=log,
        )
        open_.enter_context(watchdog)
        return cls(plan.room, watch, watchdog, batch, core.running.events, left, core.on_note)

    def next(self, now: Sizes) -> Go | Stop:
        """The verdict, if the last windows had these sizes."""
        soft = False
        for event in self.events():
            if event.level == "hard":
                return Stop(MemoryLimitError(f"{event.text}; {self._what_to_do_there(event, now)}"))
            soft = True
            if "warn" in self.watch.actions:
                self.note(event.text)
        level, sample = self.watchdog.check()
        if level == "hard":
            return Stop(MemoryLimitError(f"{self.watchdog.text(level, sample)}; {self._what_to_do(sample, now)}"))
        return Go(self._smaller(now) if (soft or level == "soft") and self.watch.shrinks else now)

    def _smaller(self, now: Sizes) -> Sizes:
        tile, chunk = now
        if tile > chunk:
            return Sizes(tile // chunk // 2 * chunk, chunk)
        if chunk % 2 == 0 and chunk // 2 >= self.watch.least_chunk:
            return Sizes(chunk // 2, chunk // 2)
        return now  # the warning was given, and nothing is left to halve

    def _what_to_do(self, sample: Sample, now: Sizes) -> str:
        """Advice after this process's own sample."""
        limits, host = self.watchdog.limits, sample.process_bytes
        excess = host - limits.hard if host > limits.hard else sample.device_driver_bytes - (limits.device_hard or 0)
        ways = {} if host > limits.hard and self.room.where != "process" else self._ways(now)
        ways[f"raise the limit ({self.room.hard_name})"] = sample.available_bytes if host > limits.hard else excess
        return advice(ways, excess)

    def _what_to_do_there(self, event: Event, now: Sizes) -> str:
        """Advice after an event of a node of the grid."""
        ways, sample = self._ways(now), event.sample
        if event.container:
            others = sample.process_bytes - self.room.grid_need(self.batch).total
            ways[f"end other programs in that container, which use about {max(0, others) / MIB:,.0f} MiB"] = others
        else:
            ways[f"raise the limit ({self.room.hard_name})"] = sample.available_bytes
        return advice(ways, event.excess)

    def _ways(self, now: Sizes) -> dict[str, int]:
        loaded = replace(self.room.loaded, tile=now.tile, chunk=now.chunk)
        return replace(self.room, loaded=loaded).ways(self.batch, self.left(now))
