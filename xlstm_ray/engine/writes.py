"""States on their way into the files of a cache: the most useful ones first, so that a killed process leaves those."""

from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock
from typing import NamedTuple

from xlstm_ray.cachefiles import Folder, Saves, Written
from xlstm_ray.engine.tree import Entry
from xlstm_ray.errors import GridLost


class Done(NamedTuple):
    """A state was written, or why not."""

    entry: Entry
    written: Written


class Room(NamedTuple):
    """How room is made for a file, as in Folder.add."""

    budget: int
    order: Sequence[str] = ()
    spare: Collection[str] = ()


class Writes:
    """Writes states in a thread of its own.

    Nobody waits for the disk: what memory has no room for any more is dropped here, too, before its turn has come.
    """

    def __init__(self, folder: Folder):
        self._folder = folder
        self._thread = ThreadPoolExecutor(1, "cache")
        self._lock = Lock()  # of those that wait
        self._waiting: dict[Entry, Callable[[], Saves]] = {}
        self._begun = False
        self._room = Room(0)
        self._jobs: deque[Future[Done | None]] = deque()  # each writes what is the most useful then

    def __len__(self) -> int:
        """How many are to be written, with the one that is."""
        with self._lock:
            return len(self._waiting) + self._begun

    def add(self, entry: Entry, state: Callable[[], Saves], room: Room) -> None:
        """Write it when its turn comes. state: makes it, in the thread. room: for it and those before."""
        with self._lock:
            self._waiting[entry], self._room = state, room
        self._jobs.append(self._thread.submit(self._write))

    def drop(self, entry: Entry) -> None:
        """It is not to be written any more, unless that has begun."""
        with self._lock:
            self._waiting.pop(entry, None)

    def done(self) -> Iterator[Done]:
        """What was written since the last call."""
        while self._jobs and self._jobs[0].done():
            done = self._jobs.popleft().result()  # raises a bug
            if done is not None:
                yield done

    def finish(self) -> None:
        """Wait until all are written."""
        for job in list(self._jobs):
            job.exception()  # waits; `done` raises it

    def close(self) -> None:
        """Write all, and end the thread."""
        self._thread.shutdown()

    def _write(self) -> Done | None:
        with self._lock:
            if not self._waiting:  # it was dropped
                return None
            entry = max(self._waiting, key=lambda entry: (entry.likely, entry.used))
            state, room, self._begun = self._waiting.pop(entry), self._room, True
        try:
            return Done(entry, self._folder.add(f"{entry.name}.state", state(), entry.size, *room))
        except GridLost as lost:
            return Done(entry, Written([], str(lost)))
        finally:
            self._begun = False
