"""Whose turn it is: an engine holds one state, so one call at a time may use it, of any thread."""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar
from weakref import ReferenceType, ref

from xlstm_ray.errors import UsageError

# A call: those that it is part of.
WITHIN = {"prefill": ("generate",), "warm_up": ("generate", "prefill", "state", "step")}
LOOK_S = 1.0  # a thread that ends without a word is noticed after this


class Turn:
    """Hands an engine to one call at a time. A thread waits for another's call, and for its generation to end.

    A call from inside another one of the same thread would wait for itself, and in a forked child neither torch's
    threads nor Ray's connection are there: both are refused with UsageError.
    """

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._changed = threading.Condition(threading.RLock())
        self._calls: list[str] = []  # that run: the outermost first
        self._thread: threading.Thread | None = None  # theirs
        self._generation: ReferenceType[Any] | None = None  # one that has not ended
        self._generating: threading.Thread | None = None  # the thread that it was last used in

    @contextmanager
    def of(self, call: str, generation: object | None = None) -> Iterator[None]:
        """The engine is this thread's while the block runs. generation: which one's call it is."""
        if os.getpid() != self._pid:
            raise UsageError(
                f"this engine was loaded by process {self._pid}, of which this one is a fork: load the model in this "
                "process, or start it by multiprocessing's spawn or forkserver"
            )
        me = threading.current_thread()
        with self._changed:
            if self._thread is me:
                if self._calls[-1] not in WITHIN.get(call, ()):
                    raise UsageError(
                        f"{call} was called from inside this engine's {self._calls[-1]}, which would wait for itself; "
                        "call it after that, or load a second engine"
                    )
            else:
                while not self._is_free(me, call, generation):
                    self._changed.wait(LOOK_S)
                self._thread = me
                if generation is not None and self._generation is not None and self._generation() is generation:
                    self._generating = me
            self._calls.append(call)
        try:
            yield
        finally:
            with self._changed:
                self._calls.pop()
                if not self._calls:
                    self._thread = None
                    self._changed.notify_all()

    def begin(self, generation: object) -> None:
        """Other threads wait from now on until `end`, or until nothing refers to the generation any more."""
        with self._changed:
            self._generation, self._generating = ref(generation, self._forget), threading.current_thread()

    def end(self, generation: object) -> None:
        """Nobody waits for this generation any more."""
        with self._changed:
            if self._generation is not None and self._generation() is generation:
                self._forget(self._generation)

    def _forget(self, gone: "ReferenceType[Any]") -> None:
        with self._changed:
            if self._generation is gone:
                self._generation = self._generating = None
                self._changed.notify_all()

    def _is_free(self, me: threading.Thread, call: str, generation: object | None) -> bool:
        if self._calls:
            return False
        held = self._generation() if self._generation is not None else None
        if held is None or held is generation or call == "close":
            return True
        # This thread may begin something else: then its own generation says that it cannot go on.
        return self._generating is me or not (self._generating and self._generating.is_alive())


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
