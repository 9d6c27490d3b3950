"""Documents on disk: for each a record, and a state as far as it was computed. One service at a time has a folder."""

import hashlib
import json
import re
from contextlib import suppress
from pathlib import Path
from secrets import token_hex
from time import time
from typing import Literal

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from xlstm_ray.errors import OutputError, UsageError
from xlstm_ray.files import write_whole
from xlstm_ray.serve.refusals import Refused
from xlstm_ray.state import RecurrentState

Status = Literal["queued", "reading", "ready", "cancelled", "parked", "failed"]
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


class Record(BaseModel):
    """What is known of a document besides its state. prompt: until it was read. base: the document before it.

    ttl: seconds without use after which it goes. created: in seconds since 1970.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    format: Literal["xlstm-ray document 1"] = "xlstm-ray document 1"
    name: str
    tenant: str = ""
    created: float = Field(default_factory=time)
    ttl: float | None = None
    status: Status = "queued"
    base: str | None = None
    prompt: str | list[int] | None = None
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
        prompt = None if status == "ready" else self.prompt
        tokens = self.tokens if tokens is None else tokens
        return self.model_copy(update={"status": status, "error": error, "tokens": tokens, "prompt": prompt})

    @property
    def file(self) -> str:
        """The beginning of its files' names: a hash, so no name of a caller is a path."""
        return hashlib.sha256(json.dumps([self.tenant, self.name]).encode()).hexdigest()[:32]


class Shelf:
    """A folder of documents. Raises OutputError or UsageError where it cannot be used."""

    def __init__(self, folder: Path):
        self._folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._lock = FileLock(folder / "documents.lock", mode=0o600, fallback_to_soft=False)
            self._lock.acquire(timeout=0)
        except Timeout:  # an OSError, too
            raise UsageError(f"{folder}: another service keeps its documents there; give another `cache_dir`") from None
        except OSError as err:
            raise OutputError(f"{folder}: documents cannot be kept there ({err.strerror})") from None

    def close(self) -> None:
        self._lock.release()

    def read(self) -> list[Record]:
        """What is there, the oldest first. What is none of ours is left alone."""
        found = []
        for path in self._folder.glob("*.json"):
            try:
                record = Record.model_validate_json(path.read_bytes())
            except (ValidationError, OSError):
                continue
            if path.stem == record.file:
                found.append(record)
        return sorted(found, key=lambda record: record.created)

    def write(self, record: Record, state: RecurrentState | None) -> None:
        """Both, each whole or not at all; the state first. Raises StateError and OutputError."""
        if state is not None:
            state.save(self._path(record, "state"))
        try:
            write_whole(self._path(record, "json"), record.model_dump_json().encode())
        except OSError as err:
            raise OutputError(f"{self._folder}: a document cannot be kept there ({err.strerror})") from None

    def has_state(self, record: Record) -> bool:
        return self._path(record, "state").exists()

    def load(self, record: Record) -> RecurrentState:
        """Its state, checked. Raises StateError."""
        return named(RecurrentState.load(self._path(record, "state")), record)

    def remove(self, record: Record) -> None:
        for kind in ("json", "state"):
            with suppress(OSError):
                self._path(record, kind).unlink()

    def _path(self, record: Record, kind: str) -> Path:
        return self._folder / f"{record.file}.{kind}"


def named(state: RecurrentState, record: Record) -> RecurrentState:
    """The state under its document's name, for errors."""
    state.name = f"the state {record.name!r}"
    return state
