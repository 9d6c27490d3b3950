"""Memory is acted on here, at every tile boundary of a prefill."""

import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING

from xlstm_ray.csvlog import CsvLog
from xlstm_ray.engine.driver import Progress, Tokens
from xlstm_ray.engine.windows import Group, window_sizes
from xlstm_ray.errors import MemoryLimitError, UsageError
from xlstm_ray.files import MIB
from xlstm_ray.memory.need import advice
from xlstm_ray.memory.sample import Sample, take_sample
from xlstm_ray.memory.watchdog import LOG_COLUMNS, Watchdog
from xlstm_ray.supervisor.mode import Mode

if TYPE_CHECKING:
    from xlstm_ray.actors.watchdog import Event
    from xlstm_ray.engine.engine import Engine


TILE_COLUMNS = (
    "tile tokens_done tokens_total tile_s seconds tile_size chunk_size process_bytes device_driver_bytes".split()
)


class MemoryGuard:
    """What the driver asks at every tile boundary of one prefill: whether to stop, and the sizes to go on with.

    Here memory is acted on: a soft limit halves the tile, then the chunk; a hard one ends the run. `files` closes what
    is opened and ends the watchdog's thread.
    """

    def __init__(
        self,
        engine: "Engine",
        rows: Sequence[Tokens],
        begin: Sequence[int],
        groups: Sequence[Group],
        should_stop: Callable[[], bool],
        *,
        mixed: bool,
        files: ExitStack,
    ):
        self.engine, self.rows, self.begin, self._should_stop = engine, rows, begin, should_stop
        self.left = list(groups)  # those that are not done
        self.grid = engine.grid.model_copy(update={"mixed": mixed})
        self.ended_by: MemoryLimitError | None = None
        self._windows = 0
        self.compile_s = 0.0  # of all sizes
        self.paused_s = 0.0  # of it, for sizes that the run went on with
        settings, local = engine.settings, engine.mode is Mode.LOCAL
        # Actors are watched where they live, and their kernels are compiled for one grid.
        self._shrinks = local and settings.shrink_on_soft
        self._stats_log = self._log(files, "stats_log", TILE_COLUMNS)
        self._watchdog: Watchdog | None = None
        if engine.room.limits is not None:
            watchdog = Watchdog(
                engine.room.limits,
                device=engine.device if local else None,
                poll_s=settings.mem_poll_ms / 1000,
                actions=settings.mem_action,
                warn=engine.on_note,
                log=self._log(files, "mem_log", LOG_COLUMNS),
            )
            self._watchdog = files.enter_context(watchdog)
        if local:
            files.callback(setattr, engine._kernels, "chunk_size", engine.grid.chunk_size)

    def _log(self, files: ExitStack, name: str, columns: Iterable[str]) -> CsvLog | None:
        """The CSV file of that setting: emptied by an engine's first run, lengthened by the next."""
        engine = self.engine
        path, named = getattr(engine.settings, name), engine.settings.named(name)
        if path is None:
            return None
        try:
            log = CsvLog(path, columns, append=name in engine._logs, overwrite=engine.settings.overwrite)
        except OSError as err:
            raise UsageError(f"{named} {path}: cannot be written ({err.strerror})") from None
        engine._logs.add(name)

        def close() -> None:
            log.close()
            if log.failure:
                engine._failures.append(f"{named} {path}: is not whole ({log.failure.strerror})")
                engine.on_note(engine._failures[-1])

        files.callback(close)
        return log

    def warm_up(self) -> float:
        """Compile the sizes of now; returns the seconds it took."""
        seconds = 0.0
        for rows, size in self.left:
            begin, ends = [self.begin[b] for b in rows], [len(self.rows[b]) for b in rows]
            tile, chunk = self.grid.tile_size, self.grid.chunk_size
            seconds += self.engine.warm_up(size, window_sizes(begin, ends, tile_size=tile, chunk_size=chunk))
        self.compile_s += seconds
        return seconds

    def should_stop(self) -> bool:
        if self._should_stop():
            return True
        self.engine.tell_lost_helpers()
        if self._watchdog is None:
            return False
        while self.engine._memory_events:
            event = self.engine._memory_events.pop(0)
            if event.level == "hard":
                self.ended_by = MemoryLimitError(f"{event.text}; {self._what_to_do_there(event)}")
                return True
            if "warn" in self.engine.settings.mem_action:
                self.engine.on_note(event.text)
        level, sample = self._watchdog.check()
        if level == "hard":
            self.ended_by = MemoryLimitError(f"{self._watchdog.text(level, sample)}; {self._what_to_do(sample)}")
            return True
        if level == "soft" and self._shrinks:
            self._shrink()
        return False

    def _what_to_do(self, sample: Sample) -> str:
        """After this process's own sample."""
        engine = self.engine
        assert engine.room.limits is not None
        hard, host = engine.room.limits.hard, sample.process_bytes
        excess = host - hard if host > hard else sample.device_driver_bytes - (engine.room.limits.device_hard or 0)
        ways = {} if host > hard and engine.mode is not Mode.LOCAL else self._ways()
        ways[f"raise the limit ({engine.room.hard_name})"] = sample.available_bytes if host > hard else excess
        return advice(ways, excess)

    def _what_to_do_there(self, event: "Event") -> str:
        """After an event of a node of the grid."""
        ways, sample = self._ways(), event.sample
        if event.container:
            others = sample.process_bytes - self.engine.room.grid_need(len(self.rows)).total
            ways[f"end other programs in that container, which use about {max(0, others) / MIB:,.0f} MiB"] = others
        else:
            ways[f"raise the limit ({self.engine.room.hard_name})"] = sample.available_bytes
        return advice(ways, event.excess)

    def _ways(self) -> dict[str, int]:
        room, tile, chunk = self.engine.room, self.grid.tile_size, self.grid.chunk_size
        room = replace(room, loaded=replace(room.loaded, tile=tile, chunk=chunk))
        return room.ways(len(self.rows), self.engine.calls(self.left, self.begin, [len(row) for row in self.rows]))

    def _shrink(self) -> None:
        tile, chunk = self.grid.tile_size, self.grid.chunk_size
        least = self.engine.settings.min_chunk
        if tile > chunk:
            tile = tile // chunk // 2 * chunk
        elif chunk % 2 == 0 and chunk // 2 >= least:
            tile = chunk = chunk // 2
        else:
            return  # the warning was given; there is nothing left to halve
        begun = self._windows > 0 or any(self.begin)
        sizes = {"tile_size": tile, "chunk_size": chunk, "mixed": self.grid.mixed or begun}
        self.grid = self.grid.model_copy(update=sizes)
        self.engine._kernels.chunk_size = chunk
        self.engine.on_note(
            f"memory: tiles of {tile} tokens and chunks of {chunk} from here on"
            + ("; the result is no longer of one grid: right within rounding, but not to the bit" if begun else "")
        )
        self.paused_s += self.warm_up()

    def resize(self) -> tuple[int, int]:
        self._windows += 1
        return self.grid.tile_size, self.grid.chunk_size

    def reporting(self, on_progress: Callable[[Progress], None] | None) -> Callable[[Progress], None] | None:
        """on_progress, with a row of the log of tiles before it, and what a dashboard shows."""
        log, metrics, local = self._stats_log, self.engine._metrics, self.engine.mode is Mode.LOCAL
        if log is None and metrics is None:
            return on_progress
        done = 0

        def report(p: Progress) -> None:
            nonlocal done
            sample = take_sample(self.engine.device if local else None)
            if metrics is not None:
                metrics.progress(p.tokens_done, p.tokens_total)
                if local:  # else the executor tells, as it knows its actors
                    metrics.tile(p.tokens_done - done, p.tile_seconds, 1)
                    metrics.memory(f"process {os.getpid()}", sample.process_bytes, sample.device_driver_bytes)
                done = p.tokens_done
            if log is None:
                if on_progress is not None:
                    on_progress(p)
                return
            row = p.tiles_done, p.tokens_done, p.tokens_total, p.tile_seconds, p.seconds
            memory = sample.process_bytes, sample.device_driver_bytes
            log.row(*row, self.grid.tile_size, self.grid.chunk_size, *memory)
            if on_progress is not None:
                on_progress(p)

        return report
