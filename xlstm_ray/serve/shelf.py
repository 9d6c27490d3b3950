"""Documents on disk: for each a record, its prompt until it was read, and a state as far as it was computed.

One service at a time has a folder. Without one, prompts are in temporary files, and nothing outlives the service.
"""

import hashlib
import json
import os
import re
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from secrets import token_hex
from tempfile import gettempdir
from time import time
from typing import IO, Literal

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from xlstm_ray.errors import OutputError, StateError, UsageError
from xlstm_ray.files import TEMPORARY, sweep, write_whole
from xlstm_ray.serve.refusals import Refused
from xlstm_ray.state import RecurrentState
from xlstm_ray.text.ondisk import TextFile, TokenFile

Source = Literal["text", "tokens"]
OURS = re.compile(r"[0-9a-f]{32}\.(text|tokens|state)")
Status = Literal["queued", "reading", "ready", "cancelled", "parked", "failed"]
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


class Record(BaseModel):
    """What is known of a document besides its state. source: of its prompt, until it was read; None: there is none.

    base: the document before it. ttl: seconds without use after which it goes. created: in seconds since 1970.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    format: Literal["xlstm-ray document 2"] = "xlstm-ray document 2"
    name: str
    tenant: str = ""
    created: float = Field(default_factory=time)
    ttl: float | None = None
    status: Status = "queued"
    base: str | None = None
    source: Source | None = None
    error: str | None = None
    tokens: int | None = None  # of its state

    @classmethod
    def named(cls, name: str | None, **more: object) -> "Record":
        """A new one; None: a name is made. Raises Refused."""
        if name is not None and not NAME.fullmatch(name):
            text = f"`id` is {name[:100]!r}; allowed: letters and digits, and . _ - after the first, up to 100"
            raise Refused(400, text, param="id")
        return cls(name=name or f"state-{token_hex(6)}", **more)  # type: ignore[arg-type]

    def now(self, status: Status, error: str | None = None, tokens: int | None = None) -> "Record":
        """The same with another status. tokens: of its state, where that is another. What was read needs no prompt."""
        source = None if status == "ready" else self.source
        tokens = self.tokens if tokens is None else tokens
        return self.model_copy(update={"status": status, "error": error, "tokens": tokens, "source": source})

    def of(self, source: Source) -> "Record":
        """The same with a prompt."""
        return self.model_copy(update={"source": source})

    @property
    def file(self) -> str:
        """The beginning of its files' names: a hash, so no name of a caller is a path."""
        return hashlib.sha256(json.dumps([self.tenant, self.name]).encode()).hexdigest()[:32]


class Shelf:
    """A folder of documents; None: they do not outlive the service. Raises OutputError and UsageError where it cannot

    be used. Files are whole or absent.
    """

    def __init__(self, folder: Path | None):
        self.lasting, self._folder = folder is not None, (folder or Path(gettempdir())).absolute()
        if folder is None:
            sweep(self._folder)
            return
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._lock = FileLock(folder / "documents.lock", mode=0o600, fallback_to_soft=False)
            self._lock.acquire(timeout=0)
        except Timeout:  # an OSError, too
            raise UsageError(f"{folder}: another service keeps its documents there; give another `cache_dir`") from None
        except OSError as err:
            raise OutputError(f"{folder}: documents cannot be kept there ({err.strerror})") from None

    def close(self) -> None:
        if self.lasting:
            self._lock.release()

    def read(self) -> list[Record]:
        """What is there, the oldest first. What is none of ours is left alone, and files of no record go."""
        if not self.lasting:
            return []
        found: dict[str, Record] = {}
        paths = list(self._folder.iterdir())
        for path in paths:
            if path.suffix != ".json":
                continue
            with suppress(ValidationError, OSError):
                record = Record.model_validate_json(path.read_bytes())
                if path.stem == record.file:
                    found[path.stem] = record
        there = {path.stem for path in paths if path.suffix == ".json"}
        for path in paths:
            known, kind = found.get(path.stem), path.suffix[1:]
            read = known is not None and kind in ("text", "tokens") and kind != known.source
            if TEMPORARY.fullmatch(path.name) or (OURS.fullmatch(path.name) and (path.stem not in there or read)):
                with suppress(OSError):
                    path.unlink()
        return sorted(found.values(), key=lambda record: record.created)

    def write(self, record: Record, state: RecurrentState | None) -> None:
        """Both, each whole or not at all; the state first. Raises OutputError."""
        if not self.lasting:
            return
        path = self._path(record, "state")
        try:
            if state is not None:
                state.save(path)
        except StateError as err:
            raise OutputError(str(err).replace(str(path), f"the document {record.name!r}")) from None
        try:
            write_whole(self._path(record, "json"), record.model_dump_json().encode())
        except OSError as err:
            raise self._unkept(err) from None
        if record.source is None:
            for kind in ("text", "tokens"):
                self._path(record, kind).unlink(missing_ok=True)

    # -- prompts -------------------------------------------------------------------------------------------------------
    @contextmanager
    def room(self) -> Iterator[Path]:
        """A new file to write a prompt to; it goes at the end, unless `take` has taken it. Raises OutputError."""
        path = self._folder / f".xlstm-ray.{token_hex(8)}.tmp"
        try:
            try:
                os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
            except OSError as err:
                raise self._unkept(err) from None
            yield path
        finally:
            path.unlink(missing_ok=True)

    def write_prompt(self, path: Path, prompt: str | Sequence[int]) -> Source:
        """Write it to a file of `room`. Raises Refused for what no token can be, and OutputError."""
        try:
            data = prompt.encode() if isinstance(prompt, str) else array("i", prompt).tobytes()
            path.write_bytes(data)
        except OverflowError:
            raise Refused(400, "`prompt` has a number that is not a token", param="prompt") from None
        except OSError as err:
            raise self._unkept(err) from None
        return "text" if isinstance(prompt, str) else "tokens"

    def take(self, record: Record, path: Path) -> IO[bytes]:
        """Make a file of `room` the prompt of a document. Raises OutputError."""
        assert record.source is not None
        try:
            file = open(path, "rb")  # without a folder, this is all that is left of it
            if self.lasting:
                os.fsync(file.fileno())
                os.replace(path, self._path(record, record.source))
        except OSError as err:
            raise self._unkept(err) from None
        return file

    def reopen(self, record: Record) -> IO[bytes]:
        """The prompt of a document of an earlier service. Raises OutputError."""
        assert record.source is not None
        try:
            return open(self._path(record, record.source), "rb")
        except OSError as err:
            raise OutputError(f"the prompt of {record.name!r} is gone ({err.strerror})") from None

    def prompt(self, record: Record, file: IO[bytes], on_piece: Callable[[int, int], object]) -> TextFile | TokenFile:
        """A document's prompt, to be read from its file."""
        if record.source == "tokens":
            return TokenFile(file)
        return TextFile(file, on_piece, folder=self._folder if self.lasting else None)

    @staticmethod
    def _unkept(err: OSError) -> OutputError:
        return OutputError(f"a document cannot be kept ({err.strerror})")  # callers hear it: no path

    # -- states --------------------------------------------------------------------------------------------------------
    def has_state(self, record: Record) -> bool:
        return self.lasting and self._path(record, "state").exists()

    def load(self, record: Record) -> RecurrentState:
        """Its state, checked. Raises StateError."""
        path = self._path(record, "state")
        try:
            return named(RecurrentState.load(path), record)
        except StateError as err:
            raise StateError(str(err).replace(str(path), f"the state {record.name!r}")) from None

    def remove(self, record: Record) -> None:
        for kind in ("json", "state", "text", "tokens") if self.lasting else ():
            with suppress(OSError):
                self._path(record, kind).unlink()

    def _path(self, record: Record, kind: str) -> Path:
        return self._folder / f"{record.file}.{kind}"


def named(state: RecurrentState, record: Record) -> RecurrentState:
    """The state under its document's name, for errors."""
    state.name = f"the state {record.name!r}"
    return state
