"""Prompts in files: a text, or token ids. They are read piece by piece, so their length costs no memory."""

import os
from array import array
from bisect import bisect_right
from codecs import BOM_UTF8, BOM_UTF16_BE, BOM_UTF16_LE, getincrementaldecoder
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, NoReturn, overload

from xlstm_ray.errors import UsageError

PIECE = 1 << 18  # bytes that are read at once
ITEM = 4  # bytes of a token


class TextFile:
    """A text in a file, UTF-8. Its length is in characters; a slice is a text. Nothing of it stays in memory.

    on_piece: called between two pieces while it is cut into tokens, with the finished and the total number of
    characters; it may raise. folder: where its tokens go; None: where the system has temporary files. Raises
    UsageError for what is not UTF-8, with its place; source: the file's name there.
    """

    def __init__(
        self,
        file: IO[bytes],
        on_piece: Callable[[int, int], object] = lambda done, of: None,
        *,
        folder: Path | None = None,
        source: str = "the file",
        skipped: int = 0,
    ):
        self._skipped = skipped  # bytes of the source before this file, in errors
        self.on_piece, self.folder, self._file = on_piece, folder, file
        self._size = os.fstat(file.fileno()).st_size
        # Where pieces begin, in characters and in bytes.
        self._characters, self._bytes = array("q", [0]), array("q", [0])
        decoder, lines, at = getincrementaldecoder("utf-8")(), 0, 0
        for piece in self.pieces():
            at += len(piece)
            try:
                text = decoder.decode(piece)
            except UnicodeDecodeError as err:
                self._refuse(source, err, at - len(err.object), lines)
            lines += text.count("\n")
            self._characters.append(self._characters[-1] + len(text))
            self._bytes.append(at - len(decoder.getstate()[0]))
        try:
            decoder.decode(b"", final=True)
        except UnicodeDecodeError as err:
            self._refuse(source, err, at - len(err.object), lines)

    def _refuse(self, source: str, err: UnicodeDecodeError, before: int, lines: int) -> NoReturn:
        """before: bytes of the file before those of the error; lines: their ends of lines."""
        why = f"{err.reason} at byte {self._skipped + before + err.start}"
        if os.pread(self._file.fileno(), 2, 0) in (BOM_UTF16_LE, BOM_UTF16_BE):
            why = "it begins with the byte order mark of UTF-16; save it as UTF-8"
        line = lines + err.object.count(b"\n", 0, err.start) + 1
        raise UsageError(f"{source}, line {line}: is not UTF-8 text ({why})") from None

    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        """Another process may not have the file: it gets the text."""
        return str, (self[:],)

    def __len__(self) -> int:
        return self._characters[-1]

    def __getitem__(self, part: slice) -> str:
        start, stop, _ = part.indices(len(self))
        if start >= stop:
            return ""
        first = bisect_right(self._characters, start) - 1
        last = bisect_right(self._characters, stop - 1)
        data = os.pread(self._file.fileno(), self._bytes[last] - self._bytes[first], self._bytes[first])
        at = self._characters[first]
        return data.decode("utf-8")[start - at : stop - at]

    @property
    def size(self) -> int:
        """In bytes."""
        return self._size

    def pieces(self) -> Iterator[bytes]:
        """All bytes, some at a time."""
        at = 0
        while piece := os.pread(self._file.fileno(), min(PIECE, self._size - at), at):
            at += len(piece)
            yield piece

    def end_before_newline(self) -> int:
        """Leave out one newline at its end. Returns how many characters that are."""
        end = self[max(0, len(self) - 2) : len(self)]
        less = len(end) - len(end.removesuffix("\n").removesuffix("\r"))
        self._size -= less
        length = len(self) - less
        while self._characters[-1] > length:
            self._characters.pop()
            self._bytes.pop()
        self._characters.append(length)
        self._bytes.append(self._size)
        return less


class TokenFile(Sequence[int]):
    """Token ids in a file, as int32. A slice is another one, and reads nothing. Raises UsageError if there are none."""

    def __init__(self, file: IO[bytes], start: int = 0, stop: int | None = None):
        self._file, self._start = file, start
        self._stop = os.fstat(file.fileno()).st_size // ITEM if stop is None else stop

    @classmethod
    def of(cls, pieces: "Iterable[array[int]]", folder: Path | None = None) -> "TokenFile":
        """A file without a name: it goes with whoever refers to it. Raises OSError. folder: as in TextFile."""
        file = TemporaryFile(dir=folder)
        for piece in pieces:
            file.write(piece.tobytes())
        file.flush()
        return cls(file)

    def __reduce__(self) -> tuple[type[list[int]], tuple[list[int]]]:
        """Another process may not have the file: it gets the ids."""
        return list, (list(self),)

    def __len__(self) -> int:
        return self._stop - self._start

    @overload
    def __getitem__(self, part: int) -> int: ...
    @overload
    def __getitem__(self, part: slice) -> "TokenFile": ...
    def __getitem__(self, part: int | slice) -> "int | TokenFile":
        if isinstance(part, slice):
            start, stop, _ = part.indices(len(self))
            return TokenFile(self._file, self._start + start, self._start + max(start, stop))
        place = range(len(self))[part]
        return array("i", self[place : place + 1].tobytes())[0]

    def __iter__(self) -> Iterator[int]:
        for piece in self.pieces():
            yield from piece

    def __reversed__(self) -> Iterator[int]:
        for stop in range(len(self), 0, -PIECE // ITEM):
            yield from reversed(array("i", self[max(0, stop - PIECE // ITEM) : stop].tobytes()))

    @property
    def size(self) -> int:
        """In bytes."""
        return ITEM * len(self)

    def pieces(self) -> "Iterator[array[int]]":
        """All ids, some at a time."""
        for start in range(0, len(self), PIECE // ITEM):
            yield array("i", self[start : start + PIECE // ITEM].tobytes())

    def distinct(self) -> list[int]:
        """The ids that there are, each once."""
        found: set[int] = set()
        for piece in self.pieces():
            found.update(piece)
        return sorted(found)

    def tobytes(self) -> bytes:
        """Its ids as int32, all at once."""
        return os.pread(self._file.fileno(), ITEM * len(self), ITEM * self._start)


def parcels(file: TextFile | TokenFile, size: int) -> Iterator[bytes]:
    """All bytes of a file, at least so many at a time, but for the last."""
    parcel = bytearray()
    for piece in file.pieces():
        parcel += memoryview(piece)
        if len(parcel) >= size:
            yield bytes(parcel)
            parcel.clear()
    if parcel:
        yield bytes(parcel)


def take_text(path: Path, source: str) -> None:
    """Make a file the prompt that it is: without a byte order mark, and without one newline at its end.

    Raises UsageError where that is not UTF-8, or nothing.
    """
    with open(path, "rb") as file:
        text = TextFile(file, source=source)
        first, size = text[:1], os.path.getsize(path) - text.end_before_newline()
    if first.encode() == BOM_UTF8:
        with open(path, "r+b") as file:
            at = len(BOM_UTF8)
            while piece := os.pread(file.fileno(), PIECE, at):
                at += os.pwrite(file.fileno(), piece, at - len(BOM_UTF8))
        size -= len(BOM_UTF8)
    if size <= 0:
        raise UsageError(f"{source}: is empty; give at least one token")
    os.truncate(path, size)
