"""Turns: an engine's executor does one thing at a time, so only one call at a time may use it, from any thread."""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Concatenate, ParamSpec, Protocol, TypeVar

from xlstm_ray.errors import UsageError

# For each call: the calls that may contain it.
WITHIN = {
    "prefill": ("generate",),
    "warm_up": ("generate", "prefill", "state", "step"),
    "bring": ("generate", "prefill", "state", "step", "serve", "close", "bring"),
}


class Turn:
    """Gives an engine to one call at a time; other threads wait.

    Raises UsageError for a call from inside another call of the same thread, which would wait for itself, and for a
    call in a forked child, which has neither torch's threads nor Ray's connection.
    """

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.RLock()
        self._calls: list[str] = []  # running calls, the outermost first
        self.wanted = 0  # the number of waiting threads

    @contextmanager
    def of(self, call: str) -> Iterator[None]:
        """This thread has the engine while the block runs."""
        if os.getpid() != self._pid:
            raise UsageError(
                f"this engine was loaded by process {self._pid}, and this one is a fork of it: load the model in this "
                "process, or start it by multiprocessing's spawn or forkserver"
            )
        self.wanted += 1
        self._lock.acquire()
        self.wanted -= 1
        try:
            if self._calls and self._calls[-1] not in WITHIN.get(call, ()):
                raise UsageError(
                    f"{call} was called from inside this engine's {self._calls[-1]}, which would wait for itself; "
                    "call it after that, or load a second engine"
                )
            self._calls.append(call)
            try:
                yield
            finally:
                self._calls.pop()
        finally:
            self._lock.release()


class HasTurn(Protocol):
    _turn: Turn


P = ParamSpec("P")
R = TypeVar("R")
E = TypeVar("E", bound=HasTurn)


def in_turn(method: Callable[Concatenate[E, P], R]) -> Callable[Concatenate[E, P], R]:
    """Decorates a method that has the engine for itself while it runs."""

    @wraps(method)
    def run(self: E, *args: P.args, **kwargs: P.kwargs) -> R:
        with self._turn.of(method.__name__):
            return method(self, *args, **kwargs)

    return run
