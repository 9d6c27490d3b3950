"""What the benchmarks' arguments may be: a wrong one is told in a line before anything is made or measured."""

import argparse
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # xlstm_ray, where it is not installed


def positive(text: str) -> int:
    """A number of at least 1."""
    if (number := whole(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return number


def whole(text: str) -> int:
    """A number of at least 0."""
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 0")
    return int(text)


def positives(text: str) -> list[int]:
    """Numbers of at least 1, with commas between."""
    return [positive(word) for word in text.split(",")]


def device(text: str) -> str:
    """The type of a device that this machine has, or auto."""
    if text in ("auto", "cpu"):
        return text
    import xlstm_ray  # noqa: F401, I001  before torch: it sets what OpenMP reads
    import torch

    there = ["auto", "cpu", *(name for name in ("cuda", "mps") if getattr(torch, name).is_available())]
    if text not in there:
        raise argparse.ArgumentTypeError(f"{text!r} is not on this machine; there are: {', '.join(there)}")
    return text


def contestants(kinds: Collection[str]) -> Callable[[str], str]:
    """kind:dtype, with commas between."""

    def checked(text: str) -> str:
        for word in text.split(","):
            kind, colon, dtype = word.partition(":")
            if kind not in kinds or not (colon and dtype):
                raise argparse.ArgumentTypeError(f"{word!r} is not KIND:DTYPE; kinds are: {', '.join(kinds)}")
        return text

    return checked


@contextmanager
def plainly() -> Iterator[None]:
    """End the program with the line of an error that its user has made."""
    from xlstm_ray.errors import XlstmRayError

    try:
        yield
    except XlstmRayError as err:
        sys.exit(f"error: {err}")
