"""What `xlstm-ray serve` is told, checked. No torch, no fastapi."""

import hashlib
import hmac
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path

from xlstm_ray.errors import UsageError
from xlstm_ray.files import MIB

LEAST_KEY = 16  # characters
LOOPBACK = "localhost", "127.0.0.1", "[::1]"


@dataclass(frozen=True)
class Options:
    """Of one service. Raises UsageError where it would be open to strangers.

    keys: callers give one of them; none: nobody has to. hosts: more names that callers may use for this machine. queue:
    answers that may wait besides those in slots. body_bytes: the largest body. answer_tokens: the most of an answer.
    ping_s: seconds without an event after which a stream gets a comment. drain_s: seconds that requests have to end.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    keys: tuple[str, ...] = field(default=(), repr=False)
    hosts: tuple[str, ...] = ()
    name: str = "demo"
    queue: int = 256
    body_bytes: int = 32 * MIB
    answer_tokens: int = 4096
    ping_s: float = 5.0
    drain_s: float = 25.0
    folder: Path | None = None  # of documents that outlive the process
    states_bytes: int = 4096 * MIB  # that documents may take
    metrics: tuple[str, ...] = ("xlstm",)  # what the names of figures begin with

    def __post_init__(self) -> None:
        if not self.loopback and not self.keys:
            raise UsageError(
                f"`host` is {self.host}, which other machines reach, and no key was given; give `api_key_file` with a "
                "line for each key, or leave the host out"
            )

    @property
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

    def tenant(self, given: str) -> str | None:
        """Whose request it is, by the key that was given; None: it is not one of ours. One key alone has no tenants."""
        if not self.keys:
            return ""
        same = [hmac.compare_digest(given.encode(errors="replace"), key.encode()) for key in self.keys]  # all of them
        if not any(same):
            return None
        return "" if len(self.keys) == 1 else hashlib.sha256(given.encode()).hexdigest()[:32]


def read_keys(path: Path) -> tuple[str, ...]:
    """The keys of a file, one on each line. Raises UsageError."""
    try:
        lines = path.read_text("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as err:
        why = err.strerror if isinstance(err, OSError) else "it is not UTF-8 text"
        raise UsageError(f"`api_key_file` {path}: cannot be read ({why})") from None
    keys = tuple(dict.fromkeys(line.strip() for line in lines if line.strip()))
    short = next((n for n, key in enumerate(keys, 1) if len(key) < LEAST_KEY or not key.isascii() or " " in key), None)
    if not keys or short is not None:
        what = f"key {short}" if keys else "the file"
        raise UsageError(
            f"`api_key_file` {path}: {what} is not a key of {LEAST_KEY} or more letters and digits; "
            "`openssl rand -hex 24` makes one"
        )
    return keys
