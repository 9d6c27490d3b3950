"""Turns: calls of several threads are under way together, and their work on the executor takes turns."""

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Concatenate, ParamSpec, Protocol, TypeVar

from xlstm_ray.errors import UsageError

# For each call: the calls that may contain it.
WITHIN = {"prefill": ("generate",), "warm_up": ("generate", "prefill", "state", "step")}


class Turn:
    """Gives an engine's executor to one thread at a time: to the one that has waited longest.

    Raises UsageError for a call from inside another call of the same thread, and in a forked child, which has neither
    torch's threads nor Ray's connection.
    """

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._changed = threading.Condition()
        self._threads: deque[int] = deque()  # the first one has the executor, the others wait
        self._calls = self._closing = 0  # calls under way; those of `close`, with those that wait
        self._own = threading.local()  # `calls`: this thread's, the outermost first

    @contextmanager
    def executor(self) -> Iterator[None]:
        """This thread has the executor while the block runs; a block inside may take it again."""
        self.require_own_process()
        me = threading.get_ident()
        if self._threads and self._threads[0] == me:
            yield
            return
        try:
            with self._changed:
                self._threads.append(me)
                self._changed.wait_for(lambda: self._threads[0] == me)
            yield
        finally:  # after Ctrl-C in the wait, too
            with self._changed:
                if me in self._threads:
                    self._threads.remove(me)
                self._changed.notify_all()

    @property
    def wanted(self) -> bool:
        """Whether another thread waits for the executor."""
        return len(self._threads) > 1

    @contextmanager
    def of(self, call: str) -> Iterator[None]:
        """A call is under way while the block runs. `close` waits for all others but `serve`, which it ends itself."""
        self.require_own_process()
        calls = self._own.__dict__.setdefault("calls", [])
        if calls and calls[-1] not in WITHIN.get(call, ()):
            raise UsageError(
                f"{call} was called from inside this engine's {calls[-1]}; call it after that, or load a second engine"
            )
        counts = not calls and call != "serve"
        if counts:
            self._begin(closes=call == "close")
        calls.append(call)
        try:
            yield
        finally:
            calls.pop()
            if counts:
                self._end(closes=call == "close")

    def _begin(self, *, closes: bool) -> None:
        with self._changed:
            self._closing += closes
            try:  # nothing begins before what is to close has closed
                self._changed.wait_for(lambda: not (self._calls if closes else self._closing))
            except BaseException:
                self._closing -= closes
                self._changed.notify_all()
                raise
            self._calls += 1

    def _end(self, *, closes: bool) -> None:
        with self._changed:
            self._calls -= 1
            self._closing -= closes
            self._changed.notify_all()

    def require_own_process(self) -> None:
        """Raise UsageError in a forked child."""
        if os.getpid() != self._pid:
            raise UsageError(
                f"this engine was loaded by process {self._pid}, and this one is a fork of it: load the model in this "
                "process, or start it by multiprocessing's spawn or forkserver"
            )


class HasTurn(Protocol):
    _turn: Turn


P = ParamSpec("P")
R = TypeVar("R")
E = TypeVar("E", bound=HasTurn)


def a_call(method: Callable[Concatenate[E, P], R]) -> Callable[Concatenate[E, P], R]:
    """Decorates a method of an engine that is a call."""

    @wraps(method)
    def run(self: E, *args: P.args, **kwargs: P.kwargs) -> R:
        with self._turn.of(method.__name__):
            return method(self, *args, **kwargs)

    return run
