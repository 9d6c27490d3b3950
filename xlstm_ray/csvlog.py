"""A CSV file that grows during a run. If it can no longer be written, the run goes on without it.

Its first column is the time in ISO 8601.
"""

import csv
from collections.abc import Iterable
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from threading import Lock

from xlstm_ray.files import LOG, require_replaceable


class CsvLog:
    """Each row is written at once. An older log is replaced, any other file only with `overwrite`.

    Raises OutputError if the file may not be replaced, OSError if it cannot be opened. `failure`: a later error.
    """

    def __init__(self, path: Path, names: Iterable[str], *, append: bool = False, overwrite: bool = False):
        self.failure: OSError | None = None
        self._lock = Lock()
        require_replaceable(path, LOG, overwrite=overwrite)
        self._file = open(path, "a" if append else "w", newline="")
        self._rows = csv.writer(self._file, lineterminator="\n")
        if self._file.tell() == 0:
            self._write("time", *names)

    def row(self, *values: object, at: float | None = None) -> None:
        """Write one row, of any thread. at: its time in seconds since 1970; None: now."""
        with self._lock:
            self._write(now(at), *values)

    def _write(self, *values: object) -> None:
        if self.failure is None:
            try:
                self._rows.writerow(values)
                self._file.flush()
            except OSError as err:
                self.failure = err

    def close(self) -> None:
        """Close the file."""
        with suppress(OSError):  # closing tries once more to write what failed before
            self._file.close()


def now(at: float | None = None) -> str:
    """The time in ISO 8601, with this machine's offset from UTC; of another moment, in seconds since 1970."""
    when = datetime.now() if at is None else datetime.fromtimestamp(at)
    return when.astimezone().isoformat(timespec="milliseconds")
