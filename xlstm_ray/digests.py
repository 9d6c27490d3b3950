"""Digests of weights, kept on disk by a file's size and times, so that unchanged files are not read again for them."""

from collections.abc import Mapping
from pathlib import Path
from time import time_ns

from pydantic import TypeAdapter
from xxhash import xxh3_128_hexdigest

from xlstm_ray.directories import cache_dir
from xlstm_ray.files import MIB, write_whole

KEPT_FROM = 64 * MIB  # digests of smaller files are faster to compute than to look up
KEPT_FILES = 64
SETTLED_NS = 2_000_000_000  # a file that changed more recently may change again without a new time stamp
_KEPT: TypeAdapter[tuple[tuple[int, ...], dict[str, str]]] = TypeAdapter(tuple[tuple[int, ...], dict[str, str]])


def stat(path: Path) -> tuple[int, ...]:
    """Figures that change when the file changes: size, times in ns, inode."""
    found = path.stat()
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino, found.st_dev


def recall(path: Path, now: tuple[int, ...]) -> dict[str, bytes]:
    """The kept digests by tensor name, if they are of the file in its present state (`now`); else an empty dict."""
    try:
        then, kept = _KEPT.validate_json(_place(path).read_bytes())
        units = {name: bytes.fromhex(digits) for name, digits in kept.items()}
    except (OSError, ValueError):  # pydantic's too
        return {}  # they are computed and written again
    return units if then == now else {}


def remember(path: Path, before: tuple[int, ...], units: Mapping[str, bytes]) -> None:
    """Keep these digests of a file. before: its `stat` before it was read."""
    settled = time_ns() - max(before[1], before[2]) > SETTLED_NS
    if before[0] < KEPT_FROM or not settled or stat(path) != before:
        return
    place = _place(path)
    data = _KEPT.dump_json((before, {name: digest.hex() for name, digest in units.items()}))
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        write_whole(place, data)
        for old in sorted(place.parent.glob("*.json"), key=lambda p: p.stat().st_mtime)[:-KEPT_FILES]:
            old.unlink()
    except OSError:
        return  # only the time to compute them again is lost


def _place(path: Path) -> Path:
    return cache_dir() / "digests" / f"{xxh3_128_hexdigest(str(path.resolve()).encode())}.json"
