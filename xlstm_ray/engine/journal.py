"""A run's snapshots: one state file in a directory that is locked during the run."""

import os
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from threading import Lock, local

from filelock import FileLock, Timeout

from xlstm_ray.errors import StateError
from xlstm_ray.files import JOURNAL_FILE, require_writable
from xlstm_ray.state import RecurrentState

LOCK_FILE = "prefill.lock"


class Journal:
    """Locks its directory from the start, so that a second run is refused before any work.

    option: its name in errors. resumes: the run goes on from the file that is there. note: called once if a snapshot
    cannot be written. The run goes on, and `failure` has the reason until a later snapshot is written.
    """

    def __init__(self, directory: Path, *, option: str, resumes: bool, note: Callable[[str], None]):
        self.directory, self.path, self.option = directory, directory / JOURNAL_FILE, option
        self.failure: str | None = None
        self._resumes, self._note = resumes, note
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._lock: FileLock | None = self._take()
        except OSError as err:
            raise StateError(f"{option} {directory}: cannot be used ({err.strerror}); choose another") from None

    def _take(self) -> FileLock:
        """Take the lock. The system frees it when this process ends in any way. Any thread may free it."""
        path = self.directory / LOCK_FILE
        lock = FileLock(path, mode=0o600, thread_local=False, fallback_to_soft=False, on_acquired=_sign)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            who = ""
            with suppress(FileNotFoundError):  # its holder has ended in the meantime
                who = path.read_bytes()[:200].decode("utf-8", "replace").strip()
            raise StateError(
                f"{self.option} {self.directory}: another run ({who or 'another process'}) writes its journal there; "
                "wait until it has ended, or give a directory of its own"
            ) from None
        return lock

    def begin(self, size: int) -> None:
        """Call before a prefill with states of `size` bytes. Raises StateError or OutputError if they do not fit."""
        there = self.path.exists()
        if there and not self._resumes:
            raise StateError(
                f"{self.directory} has the journal of a run that did not end: go on from it with "
                f"`resume={self.directory}`, or remove {self.path}"
            )
        # The old snapshot stays until the new one is complete.
        require_writable(self.path, option=self.option, size=size if there else 2 * size)

    def write(self, state: RecurrentState) -> None:
        """Replace the last snapshot by this state."""
        try:
            state.save(self.path)
            self.failure = None
        except StateError as err:
            if self.failure is None:
                self._note(f"a snapshot is missing: {err}; the run goes on without it")
            self.failure = f"{self.option} {err}"

    def discard(self) -> None:
        """Remove the snapshot of a run whose results are saved elsewhere, and free the directory."""
        self.path.unlink(missing_ok=True)
        self.close()

    def close(self) -> None:
        """Free the directory."""
        lock, self._lock = self._lock, None
        if lock is not None:
            (self.directory / LOCK_FILE).unlink(missing_ok=True)  # while it is locked: others make a new one
            lock.release()


def _sign(handle: int) -> None:
    """Write the holder's name into the lock file."""
    os.ftruncate(handle, 0)
    os.write(handle, f"pid {os.getpid()} on {socket.gethostname()}".encode())


class Kept:
    """What is kept of runs: snapshots, if there is a journal; the last state of one that failed; and the names of files
    that could not be written."""

    def __init__(self, journal: Journal | None):
        self.journal = journal
        self._failures: list[str] = []
        self._of_thread = local()  # `bring`: of its last run
        self.one_run = Lock()  # whose files these are: the journal, logs

    @property
    def failures(self) -> list[str]:
        """Incomplete logs, and a journal whose last snapshot could not be written."""
        last = self.journal.failure if self.journal is not None else None
        return [*self._failures, *([last] if last else [])]

    def failed(self, text: str) -> None:
        """Note that a file is incomplete."""
        self._failures.append(text)

    def begin(self, size: int) -> None:
        """Call before a prefill whose states take `size` bytes; raises like Journal.begin."""
        self.hold(None)
        if self.journal is not None:
            self.journal.begin(size)

    def write(self, state: RecurrentState) -> None:
        """Write a snapshot, if there is a journal."""
        if self.journal is not None:
            self.journal.write(state)

    def hold(self, bring: Callable[[], RecurrentState] | None) -> None:
        """Remember how to fetch the last state of a run of this thread that an exception has ended."""
        self._of_thread.bring = bring

    def last(self) -> RecurrentState | None:
        """The state of this thread's last run, if an exception has ended it after a window; else None."""
        bring: Callable[[], RecurrentState] | None = getattr(self._of_thread, "bring", None)
        return None if bring is None else bring()
