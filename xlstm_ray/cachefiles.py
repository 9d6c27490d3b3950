"""A directory of kept states: reads the files' headers, and keeps it within its bytes. No torch.

Every file is whole or absent and its name is a hash, so processes can share a directory. A process that adds or removes
files holds the lock, so that all processes together stay within the budget.
"""

import hashlib
import json
import os
import re
from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from filelock import FileLock, Timeout
from pydantic import ValidationError

from xlstm_ray.errors import OutputError, StateError
from xlstm_ray.files import sweep
from xlstm_ray.text.history import Place, TokenTrail

NAME = re.compile(r"[0-9a-f]{32}\.state")
LOCK_FILE = "cache.lock"
LOCK_S = 30.0  # if another process holds the folder's lock for longer, a state is not written
LARGEST_HEADER = 16 << 20  # bytes


class KeptFile(NamedTuple):
    """A kept state's header. size: in bytes. used: the time of its last use, in seconds since 1970."""

    name: str
    size: int
    used: float
    model: str
    numerics: dict[str, Any]
    tokens: TokenTrail
    place: Place


class Written(NamedTuple):
    """gone: names of files that were removed to make room. failure: why there is no file; None: there is."""

    gone: list[str]
    failure: str | None


class Saves(Protocol):
    """A state."""

    def save(self, path: Path, *, lasting: bool) -> object: ...


class Folder:
    """The directory of a cache. make: create it if it does not exist. Raises OutputError if it cannot be used."""

    def __init__(self, path: Path, *, make: bool = True):
        self.path = path
        self._seen: set[str] = set()  # names of the files that were read
        try:
            if make:
                path.mkdir(parents=True, exist_ok=True)
            os.scandir(path).close()
        except OSError as err:
            raise OutputError(f"{path}: the cache cannot be used ({err.strerror}); choose another directory") from None

    def file(self, name: str) -> Path:
        """The path of the state with this name."""
        assert NAME.fullmatch(name)
        return self.path / name

    def time(self) -> int:
        """Changes whenever a file is added or removed."""
        return self.path.stat().st_mtime_ns

    def bytes(self) -> int:
        """The bytes of all state files."""
        return sum(info.st_size for info in self.entries().values())

    def lock(self) -> FileLock:
        """The lock for adding and removing. Raises OSError if the directory is gone and cannot be created."""
        self.path.mkdir(parents=True, exist_ok=True)
        return FileLock(self.path / LOCK_FILE, mode=0o600, fallback_to_soft=False)

    def entries(self) -> dict[str, os.stat_result]:
        """The state files by name."""
        found = {}
        for name, entry in self._there().items():
            with suppress(FileNotFoundError):  # another process removes them too
                found[name] = entry.stat(follow_symlinks=False)
        return found

    def read(self, known: Collection[str] = ()) -> tuple[list[KeptFile], list[str], Collection[str]]:
        """The new states since the last call; the names of files that are not whole states; and the names of all files.

        Only headers are read: a file's contents are checked when it is used. known: names of files that are not new.
        """
        new, refused, there = [], [], self._there()
        seen = {name for name in there if name in self._seen or name in known}
        for name in [name for name in there if name not in seen]:
            try:
                new.append(self._header(name, there[name].stat(follow_symlinks=False)))
            except OSError:  # it is gone, or cannot be read now, which says nothing about what it holds
                continue
            except StateError:
                refused.append(name)
            seen.add(name)
        self._seen = seen
        return new, refused, there.keys()

    def remove(self, names: Collection[str]) -> int:
        """Remove these files; returns their bytes. Raises OSError where that cannot be done."""
        freed = 0
        for name in names:
            path = self.file(name)
            with suppress(FileNotFoundError):
                freed += path.lstat().st_size
                path.unlink()
        return freed

    def make_room(self, size: int, budget: int, order: Sequence[str] = (), spare: Collection[str] = ()) -> list[str]:
        """Remove files until `size` bytes more are within the budget; the lock is held. Returns the names that went.

        order: the files to remove first; then others follow, the longest unused first. Files in `spare` stay.
        """
        there = self.entries()
        total, gone = sum(info.st_size for info in there.values()), []
        others = sorted(there.keys() - {*order} - {*spare}, key=lambda name: there[name].st_mtime)
        for name in [*(name for name in order if name in there), *others]:
            if total + size <= budget:
                break
            self.remove([name])
            total -= there[name].st_size
            gone.append(name)
        return gone

    def add(
        self, name: str, state: Saves, size: int, budget: int, order: Sequence[str], spare: Collection[str]
    ) -> Written:
        """Write a state; makes room for its `size` bytes, see `make_room`."""
        gone: list[str] = []
        try:
            with self.lock().acquire(timeout=LOCK_S):
                gone = self.make_room(size, budget, order, spare)
                if self.bytes() + size > budget:
                    return Written(gone, f"a state takes {size:,} bytes, and {budget:,} are allowed in all")
                state.save(self.file(name), lasting=False)  # a damaged file is found by its digest, and made again
        except (StateError, OSError) as err:
            return Written(gone, str(err))
        except Timeout:
            return Written(gone, f"another process has held the lock of {self.path} for {LOCK_S:.0f} s")
        return Written(gone, None)

    def tidy(self) -> None:
        """Remove temporary files of killed writers."""
        sweep(self.path)

    def _there(self) -> dict[str, "os.DirEntry[str]"]:
        """The state files by name, not looked at."""
        with os.scandir(self.path) as entries:
            return {e.name: e for e in entries if NAME.fullmatch(e.name) and e.is_file(follow_symlinks=False)}

    def _header(self, name: str, info: os.stat_result) -> KeptFile:
        path = self.path / name
        wrong = StateError(f"{path}: is not a whole state of a cache")
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            text = file.read(min(length, LARGEST_HEADER))
        try:
            tensors = json.loads(text)
            metadata = tensors.pop("__metadata__")
            inner = metadata["xlstm_ray"]
            ends = [tensor["data_offsets"][1] for tensor in tensors.values()]
            if hashlib.sha256(inner.encode()).hexdigest() != metadata["check"]:
                raise wrong
            header = json.loads(inner)
            (row,) = header["rows"]
            tokens = TokenTrail.model_validate(row["tokens"])
            place = Place.model_validate(header["place"])
            kept = KeptFile(name, info.st_size, info.st_mtime, header["model"], header["numerics"], tokens, place)
        except (ValueError, KeyError, TypeError, AttributeError, ValidationError, RecursionError):
            raise wrong from None
        if 8 + length + max(ends, default=0) != info.st_size:
            raise wrong
        return kept
