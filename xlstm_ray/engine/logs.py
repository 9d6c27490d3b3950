"""The CSV files of a prefill, and its figures for a dashboard."""

import os
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from types import TracebackType

from xlstm_ray.csvlog import CsvLog
from xlstm_ray.engine.driver import Progress, Sizes
from xlstm_ray.errors import UsageError
from xlstm_ray.launch import Running
from xlstm_ray.memory.sample import take_sample
from xlstm_ray.memory.watchdog import LOG_COLUMNS, Seen, log_sample
from xlstm_ray.plan import LogFile

TILE_COLUMNS = (
    "tile tokens_done tokens_total tile_s seconds tile_size chunk_size process_bytes device_driver_bytes".split()
)


class RunLogs:
    """The logs of one prefill. An engine's first prefill empties the files, later ones append.

    written: the logs that earlier prefills wrote; this one adds its own. failed: called at the end for a file that is
    incomplete. Raises UsageError for a file that cannot be written.
    """

    def __init__(self, asked: dict[str, LogFile], written: set[str], failed: Callable[[str], object]):
        self._written, self._failed, self._done = written, failed, 0
        with ExitStack() as files:  # closes the first if the second cannot be opened
            self._tiles = self._open(asked, "stats_log", TILE_COLUMNS, files)
            self.memory = self._open(asked, "mem_log", LOG_COLUMNS, files)
            self._files = files.pop_all()

    def __enter__(self) -> "RunLogs":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, where: TracebackType | None
    ) -> None:
        self._files.close()

    def progress(self, p: Progress, sizes: Sizes, running: Running) -> None:
        """Log a finished tile, and what watchdogs of other processes have seen."""
        self.seen(running.seen())
        metrics, device = running.metrics, running.plan.own_device  # no device if actors do the work
        if self._tiles is None and metrics is None:
            return
        sample = take_sample(device)
        if metrics is not None:
            metrics.progress(p.tokens_done, p.tokens_total)
            if device is not None:
                metrics.tile(p.tokens_done - self._done, p.tile_seconds, 1)
                metrics.memory(f"process {os.getpid()}", sample.process_bytes, sample.device_driver_bytes)
            self._done = p.tokens_done
        if self._tiles is not None:
            row = p.tiles_done, p.tokens_done, p.tokens_total, p.tile_seconds, p.seconds
            own = sample.process_bytes, sample.device_driver_bytes
            self._tiles.row(*row, *sizes, *(own if device is not None else running.actors_use() or ("", "")))

    def seen(self, seen: Iterable[Seen]) -> None:
        """Log samples of other processes."""
        for one in seen:
            if self.memory is not None:
                log_sample(self.memory, one)

    def _open(self, asked: dict[str, LogFile], name: str, columns: Iterable[str], files: ExitStack) -> CsvLog | None:
        if name not in asked:
            return None
        path, named, overwrite = asked[name]
        try:
            log = CsvLog(path, columns, append=name in self._written, overwrite=overwrite)
        except OSError as err:
            raise UsageError(f"{named} {path}: cannot be written ({err.strerror})") from None
        self._written.add(name)

        def close() -> None:
            log.close()
            if log.failure:
                self._failed(f"{named} {path}: is not whole ({log.failure.strerror})")

        files.callback(close)
        return log
