"""Whose turn it is: an engine's executor does one thing at a time, so one call at a time may use it, of any thread."""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Concatenate, ParamSpec, Protocol, TypeVar

from xlstm_ray.errors import UsageError

# A call: those that it may be part of.
WITHIN = {
    "prefill": ("generate",),
    "warm_up": ("generate", "prefill", "state", "step"),
    "bring": ("generate", "prefill", "state", "step", "serve", "close", "bring"),
}


class Turn:
    """Hands an engine to one call at a time; a thread waits for another's call.

    A call from inside another one of the same thread would wait for itself, and in a forked child neither torch's
    threads nor Ray's connection are there: both are refused with UsageError.
    """

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.RLock()
        self._calls: list[str] = []  # that run: the outermost first
        self.wanted = 0  # how many threads wait

    @contextmanager
    def of(self, call: str) -> Iterator[None]:
        """The engine is this thread's while the block runs."""
        if os.getpid() != self._pid:
            raise UsageError(
                f"this engine was loaded by process {self._pid}, of which this one is a fork: load the model in this "
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
    """A method that has its engine for itself while it runs."""

    @wraps(method)
    def run(self: E, *args: P.args, **kwargs: P.kwargs) -> R:
        with self._turn.of(method.__name__):
            return method(self, *args, **kwargs)

    return run
