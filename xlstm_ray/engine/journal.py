"""A run's snapshots: one state file in a directory that is this run's alone while it works."""

import os
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

from xlstm_ray.errors import StateError
from xlstm_ray.files import JOURNAL_FILE, require_writable
from xlstm_ray.state import RecurrentState

LOCK_FILE = "prefill.lock"


class Journal:
    """Holds its directory from the start, so that a second run is refused before any work.

    option: what errors call it. resumes: whether a file that is there is the one to go on from. note: told once when a
    snapshot cannot be written; the run goes on, and `failure` says why for as long as no later one could be.
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
        """The lock; the system gives it free when this process ends, however that is. Any thread may let it go."""
        path = self.directory / LOCK_FILE
        lock = FileLock(path, mode=0o600, thread_local=False, fallback_to_soft=False, on_acquired=_sign)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            who = ""
            with suppress(FileNotFoundError):  # its holder has ended meanwhile
                who = path.read_bytes()[:200].decode("utf-8", "replace").strip()
            raise StateError(
                f"{self.option} {self.directory}: another run ({who or 'another process'}) writes its journal there; "
                "wait until it has ended, or give a directory of its own"
            ) from None
        return lock

    def begin(self, size: int) -> None:
        """Before a prefill whose states take `size` bytes: StateError or OutputError where it could not be kept."""
        there = self.path.exists()
        if there and not self._resumes:
            raise StateError(
                f"{self.directory} has the journal of a run that did not end: go on from it with "
                f"`resume={self.directory}`, or remove {self.path}"
            )
        # A snapshot is written beside the one before.
        require_writable(self.path, option=self.option, size=size if there else 2 * size)

    def write(self, state: RecurrentState) -> None:
        """Put the state in the place of the one before."""
        try:
            state.save(self.path)
            self.failure = None
        except StateError as err:
            if self.failure is None:
                self._note(f"a snapshot is missing: {err}; the run goes on without it")
            self.failure = f"{self.option} {err}"

    def discard(self) -> None:
        """Remove the snapshots of a run whose results are safe elsewhere, and let the directory go."""
        self.path.unlink(missing_ok=True)
        self.close()

    def close(self) -> None:
        """Let the directory go."""
        lock, self._lock = self._lock, None
        if lock is not None:
            (self.directory / LOCK_FILE).unlink(missing_ok=True)  # while it is held; who waits for it takes a new one
            lock.release()


def _sign(handle: int) -> None:
    """Say in the lock file whose it is."""
    os.ftruncate(handle, 0)
    os.write(handle, f"pid {os.getpid()} on {socket.gethostname()}".encode())


class Kept:
    """What is kept of runs on their way: snapshots in a journal, where one is asked for; the state at the end of the
    last window; and what was asked for and could not be written."""

    def __init__(self, journal: Journal | None):
        self.journal = journal
        self._failures: list[str] = []
        self._bring: Callable[[], RecurrentState] | None = None

    @property
    def failures(self) -> list[str]:
        """Logs that are not whole, and a journal whose last snapshot could not be written."""
        last = self.journal.failure if self.journal is not None else None
        return [*self._failures, *([last] if last else [])]

    def failed(self, text: str) -> None:
        """A file is not whole."""
        self._failures.append(text)

    def begin(self, size: int) -> None:
        """Before a prefill whose states take `size` bytes; raises as Journal.begin."""
        self._bring = None
        if self.journal is not None:
            self.journal.begin(size)

    def write(self, state: RecurrentState) -> None:
        """Into the journal, where there is one."""
        if self.journal is not None:
            self.journal.write(state)

    def hold(self, bring: Callable[[], RecurrentState]) -> None:
        """What brings the state at the end of a window here."""
        self._bring = bring

    def forget(self) -> None:
        """The run has ended as it should."""
        self._bring = None

    def last(self) -> RecurrentState | None:
        """The state at the last window's end; None: there is none."""
        return None if self._bring is None else self._bring()
