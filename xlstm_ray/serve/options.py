"""What `xlstm-ray serve` is told, checked. No torch, no fastapi."""

import hashlib
import hmac
from dataclasses import dataclass, field
from functools import cached_property
from ipaddress import ip_address
from pathlib import Path
from typing import NamedTuple

from xlstm_ray.errors import UsageError
from xlstm_ray.files import MIB

LEAST_KEY = 16  # characters
MOST = 10**12  # of any limit
NO_KEY = f"is not a key of {LEAST_KEY} or more letters and digits; `openssl rand -hex 24` makes one"
FIELDS = "name=NAME requests=N tokens=N states-mb=N"  # of a key: the limits are a minute's, and MiB of documents
LOOPBACK = "localhost", "127.0.0.1", "[::1]"


@dataclass(frozen=True)
class Key:
    """Somebody's key. name: what the log calls it. None: no limit. requests, tokens: a minute."""

    secret: str = field(repr=False)
    name: str = "key 1"
    requests: int | None = None
    tokens: int | None = None
    states_bytes: int | None = None

    @property
    def tenant(self) -> str:
        """What its documents and kept states go by."""
        return hashlib.sha256(self.secret.encode()).hexdigest()[:32]


class Slots(NamedTuple):
    """How an engine serves. most: requests at once; None: 16, or as many as fit. deterministic: one number of rows in

    every call, so that the bits of an answer do not depend on the others.
    """

    most: int | None = None
    deterministic: bool = False


@dataclass(frozen=True)
class Options:
    """Of one service. Raises UsageError where it would be open to strangers.

    keys: callers give one of them; none: nobody has to. hosts: more names that callers may use for this machine. queue:
    answers that may wait besides those in slots. body_bytes: the largest body; upload_bytes: of a document's file.
    answer_tokens: the most of an answer. ping_s: seconds without an event after which a stream gets a comment. drain_s:
    seconds that requests have to end.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    keys: tuple[Key, ...] = ()
    hosts: tuple[str, ...] = ()
    name: str = "demo"
    queue: int = 256
    body_bytes: int = 32 * MIB
    upload_bytes: int = 4096 * MIB
    answer_tokens: int = 4096
    ping_s: float = 5.0
    drain_s: float = 25.0
    folder: Path | None = None  # of documents that outlive the process
    states_bytes: int = 4096 * MIB  # that documents may take
    metrics: tuple[str, ...] = ("xlstm",)  # what the names of figures begin with
    access_log: Path | None = None  # of requests; `-` is standard output

    def __post_init__(self) -> None:
        if not self.loopback and not self.keys:
            raise UsageError(
                f"`host` is {self.host}, which other machines reach, and no key was given; give `api_key_file` with a "
                "line for each key, or leave the host out"
            )

    @cached_property
    def loopback(self) -> bool:
        try:
            return ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    @property
    def url(self) -> str:
        """Where this machine's programs reach it."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}"

    def knows_host(self, header: str) -> bool:
        """Whether a Host header names this service: a page of a stranger may have its own name lead to loopback."""
        if not self.loopback and not self.hosts:
            return True  # a key is needed, and no stranger has one
        name = header.rpartition(":")[0] if header.rpartition(":")[2].isdecimal() else header
        return name.lower() in {*LOOPBACK, self.host.lower(), f"[{self.host.lower()}]", *map(str.lower, self.hosts)}

    def key(self, given: str) -> Key | None:
        """The key that was given; None: it is not one of ours."""
        same = [hmac.compare_digest(given.encode(errors="replace"), key.secret.encode()) for key in self.keys]  # all
        return next((key for key, ours in zip(self.keys, same, strict=True) if ours), None)

    def tenant(self, key: Key | None) -> str:
        """Whose documents and kept states a caller sees. One key alone has no tenants."""
        return "" if key is None or len(self.keys) == 1 else key.tenant


def read_keys(path: Path) -> tuple[Key, ...]:
    """The keys of a file, one on each line, with what is set for it. Raises UsageError."""
    try:
        lines = path.read_text("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as err:
        why = err.strerror if isinstance(err, OSError) else "it is not UTF-8 text"
        raise UsageError(f"`api_key_file` {path}: cannot be read ({why})") from None
    keys: list[Key] = []
    for line in dict.fromkeys(line.strip() for line in lines if line.strip()):
        try:
            keys.append(_key(line, len(keys) + 1, keys))
        except ValueError as err:
            raise UsageError(f"`api_key_file` {path}: key {len(keys) + 1} {err}") from None
    if not keys:
        raise UsageError(f"`api_key_file` {path}: the file {NO_KEY}")
    return tuple(keys)


def _key(line: str, number: int, before: list[Key]) -> Key:
    """A line's key. Raises ValueError, without any part of the key."""
    secret, *words = line.split()
    if len(secret) < LEAST_KEY or not secret.isascii():
        raise ValueError(NO_KEY)
    given = dict(word.split("=", 1) for word in words if "=" in word)
    if len(given) < len(words) or not given.keys() <= {"name", "requests", "tokens", "states-mb"}:
        raise ValueError(f"has something else after it than fields, each once; allowed: {FIELDS}")
    name = given.pop("name", f"key {number}")
    if any(secret == key.secret or name == key.name for key in before):
        raise ValueError("is there twice, or its name is; give each key once, with a name of its own")
    numbers: dict[str, int] = {}
    for field_, text in given.items():
        if not (text.isascii() and text.isdecimal() and 0 < int(text[:20]) <= MOST):
            raise ValueError(f"has `{field_}={text[:20]}`; allowed: a whole number from 1 to {MOST}")
        numbers[field_] = int(text)
    megabytes = numbers.get("states-mb")
    states = None if megabytes is None else megabytes * MIB
    return Key(secret, name, numbers.get("requests"), numbers.get("tokens"), states)
