"""Standard output and error, even if they are closed or their terminal is gone."""

import errno
import io
import json
import os
import stat
import sys
from typing import Any

from xlstm_ray.cli.flags import in_flags
from xlstm_ray.errors import UsageError


def open_standard_files() -> None:
    """If standard input, output or error is closed, open the null device in its place, before another file takes it."""
    while (opened := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(opened)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))
    if sys.stderr.isatty():
        raw = io.BufferedWriter(_Terminal(2, "w", closefd=False))
        sys.stderr = io.TextIOWrapper(raw, sys.stderr.encoding, "backslashreplace", line_buffering=True)


class _Terminal(io.FileIO):
    """Standard error on a terminal. If the terminal is closed, output is dropped: its signal may come later."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data) or 0
        except OSError as err:
            if err.errno != errno.EIO:
                raise
            leave_terminal()
            return len(data)


def leave_terminal() -> None:
    """The terminal was closed: drop all further output, so that the work can be saved."""
    for handle in (1, 2):
        if stat.S_ISCHR(os.fstat(handle).st_mode):
            os.dup2(os.open(os.devnull, os.O_WRONLY), handle)


def tell(text: str) -> None:
    """Print a line on standard error, with the library's fields as flags."""
    print(in_flags(text), file=sys.stderr, flush=True)


def note(text: str) -> None:
    """Print a remark for people while a run goes on."""
    tell(f"note: {text}")


def show(text: str, *, end: str = "\n") -> None:
    """Write to standard output at once; escape characters that its encoding lacks."""
    encoding = sys.stdout.encoding or "utf-8"
    try:
        sys.stdout.write((text + end).encode(encoding, "backslashreplace").decode(encoding))
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as err:
        drop_stdout()
        raise UsageError(f"standard output cannot be written ({err.strerror})") from None


def drop_stdout() -> None:
    """Redirect standard output, so that the interpreter's last flush raises nothing."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def json_line(row: dict[str, Any]) -> None:
    show(json.dumps(row))
