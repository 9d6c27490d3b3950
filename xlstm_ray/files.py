"""Files that this program writes: whole or not at all, never over another program's file, none left behind."""

import os
import re
import shutil
import stat
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from secrets import token_hex
from time import time
from typing import NamedTuple

from xlstm_ray.errors import OutputError

MIB = 1 << 20
JOURNAL_FILE = "prefill.state"  # in the directory of --journal

TEMPORARY = re.compile(r"\.xlstm-ray\.[0-9a-f]{16}\.tmp")
STALE_S = 3600.0  # a temporary file that is older than this has lost its writer
HEAD_BYTES = 4096
LFS_POINTER = b"version https://git-lfs.github.com/spec/"


class Kind(NamedTuple):
    """A kind of output: its name in errors, and a test of a file's first bytes: did this program write it?"""

    name: str
    ours: Callable[[bytes], bool]


STATE = Kind(
    "a state of this program",
    lambda head: head[8:26] == b'{"__metadata__":{"' and b'\\"format\\":\\"xlstm-ray state ' in head,
)
LOGS = b"tile,tokens_done,", b"index,id,answer,", b"seconds,process_bytes,"  # of tiles, answers, memory
LOG = Kind("a log of this program", lambda head: head.removeprefix(b"time,").startswith(LOGS))
CODE = Kind("compiled code of this program", lambda head: head.startswith(b"PK") and b"xlstm-ray compiled code" in head)
PICTURE = Kind("a picture of this program", lambda head: head.startswith(b"\x89PNG") and b"xlstm-ray" in head)


class Output(NamedTuple):
    """A file that a run was asked to write. makes_directory: a missing directory is made."""

    option: str
    path: Path
    kind: Kind
    makes_directory: bool = False


class Input(NamedTuple):
    """A file that a run reads; an output of the same kind may take its place."""

    option: str
    path: Path
    kind: Kind | None = None


def check_outputs(outputs: Sequence[Output], inputs: Sequence[Input], *, overwrite: bool) -> None:
    """Check before the work that every output may be written to its place. Raises OutputError."""
    for n, output in enumerate(outputs):
        for read in inputs:
            if _same(output.path, read.path) and read.kind is not output.kind:
                raise OutputError(
                    f"{output.option} {output.path}: is what {read.option} reads; give the output another name"
                )
        for other in outputs[:n]:
            if _same(output.path, other.path):
                raise OutputError(
                    f"{other.option} and {output.option} both name {output.path}; each output takes a file of its own"
                )
    for output in outputs:
        require_replaceable(output.path, output.kind, overwrite=overwrite, option=output.option)
        require_writable(output.path, option=output.option, makes_directory=output.makes_directory)


def require_replaceable(path: Path, kind: Kind, *, overwrite: bool = False, option: str = "") -> None:
    """Raise OutputError unless an output may be written here: nothing is there, or an empty file, or one of its kind.

    overwrite: any regular file may be replaced. A link is always refused: its target would be replaced.
    """
    named = f"{option} {path}".lstrip()
    try:
        info = path.lstat()
        if stat.S_ISLNK(info.st_mode):
            raise OutputError(f"{named}: is a link, and nothing is written through one; name the file it leads to")
        if not stat.S_ISREG(info.st_mode):
            raise OutputError(f"{named}: is not a file, so {kind.name} cannot be written there")
        if overwrite or info.st_size == 0:
            return
        with open(path, "rb") as file:
            ours = kind.ours(file.read(HEAD_BYTES))
    except FileNotFoundError:
        return
    except (OSError, ValueError) as err:
        raise OutputError(f"{named}: cannot be written ({_why(err)})") from None
    if not ours:
        raise OutputError(
            f"{named}: is there and is not {kind.name}, so it is not replaced; give another name, or `overwrite=True`"
        )


def require_writable(path: Path, *, option: str = "", makes_directory: bool = False, size: int = 0) -> None:
    """Raise OutputError if no file can be made in the directory of `path`, or `size` bytes do not fit on the disk.

    Temporary files of killed writers are removed first, because they take space.
    """
    named, directory = f"{option} {path}".lstrip(), path.absolute().parent
    while makes_directory and not directory.exists() and directory != directory.parent:
        directory = directory.parent
    if not directory.is_dir():
        what = "is not one" if directory.exists() else "does not exist"
        raise OutputError(f"{named}: its directory {what} ({directory})")
    temporary = directory / f".xlstm-ray.{token_hex(8)}.tmp"
    try:
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        temporary.unlink()
        with suppress(FileNotFoundError):
            path.lstat()  # a name that no file can have
    except (OSError, ValueError) as err:
        raise OutputError(f"{named}: cannot be written ({_why(err)})") from None
    sweep(directory)
    disk = shutil.disk_usage(directory)
    if disk.free < size and disk.total:  # some network file systems do not tell
        raise OutputError(
            f"{named}: {shown_bytes(size)} are needed there, and {shown_bytes(disk.free)} are free; make room, or give "
            "another place"
        )


def write_whole(path: Path, data: bytes | Iterable[bytes | memoryview], *, lasting: bool = True) -> None:
    """Write all of the data, in one or in pieces, or leave the file as it was. Raises OSError.

    Temporary file, fsync, rename. Files that killed writers left in the directory are removed too. lasting: False for
    a file that the machine may lose when its power fails, and whose reader sees damage: no fsync.
    """
    sweep(path.parent)
    temporary = path.with_name(f".xlstm-ray.{token_hex(8)}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.writelines([data] if isinstance(data, bytes) else data)
            if lasting:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
        if lasting:
            _sync_directory(path.parent)
    finally:  # also after Ctrl-C
        with suppress(OSError):
            temporary.unlink()


def sweep(directory: Path) -> None:
    """Remove this program's temporary files that have lost their writer: this user's, and an hour old."""
    with suppress(OSError), os.scandir(directory) as entries:
        for entry in entries:
            if TEMPORARY.fullmatch(entry.name):
                with suppress(OSError):  # another run sweeps too
                    info = entry.stat(follow_symlinks=False)
                    old = time() - info.st_mtime > STALE_S
                    if old and info.st_uid == os.getuid() and stat.S_ISREG(info.st_mode):
                        os.unlink(entry.path)


def is_lfs_pointer(path: Path) -> bool:
    """Whether the file is a git-lfs pointer: a few lines of text in place of the content."""
    try:
        with open(path, "rb") as file:
            return file.read(len(LFS_POINTER)) == LFS_POINTER
    except OSError:
        return False


def lfs_advice(path: Path) -> str:
    """What to do about a pointer."""
    return f"{path}: is a git-lfs pointer and not the file itself; fetch it with `git lfs pull` in that directory"


def shown_bytes(size: int) -> str:
    """A size for people."""
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if size >= unit:
            return f"{size / unit:,.1f} {name}"
    return f"{size} bytes"


def _same(a: Path, b: Path) -> bool:
    try:
        return os.path.samefile(a, b)
    except (OSError, ValueError):  # at least one does not exist: compare names
        return os.path.realpath(a) == os.path.realpath(b)


def _why(err: OSError | ValueError) -> str:
    return err.strerror or str(err) if isinstance(err, OSError) else str(err)


def _sync_directory(directory: Path) -> None:
    """Make the rename itself durable."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
