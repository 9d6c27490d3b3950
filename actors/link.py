"""All calls of the driver to Ray that may block: with time limits, and with a test for a head that is gone.

If a head is unreachable or a raylet is stopped, Ray's own calls do not return for a minute or for ever. So each call
runs on another thread, which is abandoned if the call does not return. GridLost means that a head or raylet is gone.
Errors of actors, nodes and objects are Ray's RayError, and Recovery handles them.
Waiting for results is done here too: it checks the head from time to time.
"""

import shutil
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from queue import SimpleQueue
from threading import Thread
from time import monotonic
from types import ModuleType
from typing import Any

from xlstm_ray.errors import GridLost, XlstmRayError, one_line
from xlstm_ray.files import MIB
from xlstm_ray.supervisor.presence import LOOK_S, PATIENCE_S, Presence
from xlstm_ray.supervisor.ray_inside import session_dir

CALLS, RESULTS = "calls", "results"  # lanes
LEAST_DISK = 64 * MIB  # with less left, Ray's processes end when they cannot write


class Link:
    """This process's connection to its head. `ray` is the connected module."""

    def __init__(self, ray: ModuleType, patience_s: float = PATIENCE_S):
        self.ray, self._patience_s = ray, patience_s
        self.head: str = ray.get_runtime_context().gcs_address
        self._presence = Presence(self.head, patience_s)
        self._lanes: dict[str, SimpleQueue[tuple[Future[Any], Callable[[], Any]]]] = {}  # of a thread each
        self.gone: str | None = None  # the reason, if it is gone

    def ask(self, call: Callable[..., Any], *args: Any, timeout_s: float | None = None, **options: Any) -> Any:
        """Call Ray; return its result or raise its error. GridLost if it takes over timeout_s (None: patience_s)."""
        return self.answer(self.begin(lambda: call(*args, **options)), timeout_s)

    def begin(self, call: Callable[[], Any], lane: str = CALLS) -> "Future[Any]":
        """Call Ray after all calls of this lane before, not waiting: most of a call's time, Python is free."""
        if self.gone:
            raise GridLost(self.gone)
        if lane not in self._lanes:
            self._lanes[lane] = SimpleQueue()
            Thread(target=_answer, args=(self._lanes[lane],), name=f"ray {lane}", daemon=True).start()
        answer: Future[Any] = Future()
        self._lanes[lane].put((answer, call))
        return answer

    def answer(self, begun: "Future[Any]", timeout_s: float | None = None) -> Any:
        """The result of what was begun, or its error, as `ask`."""
        until = monotonic() + (timeout_s if timeout_s is not None else self._patience_s)
        while not begun.done():
            try:
                begun.exception(max(0.0, min(LOOK_S, until - monotonic())))
            except TimeoutError:
                self._asked_in_vain(begun, until)
        error = begun.exception()
        if error is None:
            return begun.result()
        if isinstance(error, (self.ray.exceptions.RayError, XlstmRayError)):
            raise error
        # Ray's clients raise these if the other end is gone, or forgot this job when its raylet ended.
        if isinstance(error, (OSError, RuntimeError)) or type(error) is Exception:
            why = f"Ray's head at {self.head} or this machine's raylet is gone ({one_line(error)})"
            raise self._lost(why) from error
        raise error

    @property
    def failure(self) -> type[Exception]:
        """The error class for an actor, process, node or object that is gone or does not answer.

        These are Ray's own errors; `get` raises errors of an actor's code as they are.
        """
        return self.ray.exceptions.RayError

    def why(self) -> str:
        """What on this machine may have made the grid fail, to end an error with; empty where nothing shows."""
        folder = session_dir()
        if folder is None or not folder.exists():
            return ""
        free = shutil.disk_usage(folder).free
        if free >= LEAST_DISK:
            return ""
        return f"; the disk of Ray's folder {folder} has {free / MIB:,.0f} MiB free: make room there"

    def get(self, refs: list[Any], timeout_s: float | None = None) -> list[Any]:
        """Results of actors' calls. Raises an actor's own error as it was raised there, GridLost if the head is gone,
        and GetTimeoutError after timeout_s.
        """
        until = monotonic() + timeout_s if timeout_s is not None else None
        while True:
            left = LOOK_S if until is None else min(LOOK_S, max(0.0, until - monotonic()))
            _, missing = self.ray.wait(refs, num_returns=len(refs), timeout=left)
            if not missing:
                break
            self.require_head()
            if until is not None and monotonic() >= until:
                raise self.ray.exceptions.GetTimeoutError(f"no answer in {timeout_s:.0f} s")
        try:
            return self.answer(self.begin(partial(self.ray.get, refs), RESULTS))  # they are there: not behind calls
        except self.ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, XlstmRayError):
                raise error.cause from None
            if isinstance(error, self.ray.exceptions.RayError) and isinstance(error.cause, self.failure):
                raise
            raise error.cause from error  # a bug, as it was raised there

    def _asked_in_vain(self, answer: "Future[Any]", until: float) -> None:
        if answer.done():
            return
        try:
            self.require_head()
        except GridLost:
            self._lanes.clear()
            raise
        if monotonic() >= until:
            self._lanes.clear()  # their threads are abandoned with the call
            raise self._lost(f"Ray's head at {self.head} or this machine's raylet does not answer")

    def require_head(self) -> None:
        """Raise GridLost if the head is known to be gone."""
        if self.gone:
            raise GridLost(self.gone)
        if (why := self._presence.gone()) is not None:
            raise self._lost(why)

    def _lost(self, text: str) -> GridLost:
        self.gone = self.gone or text
        return GridLost(self.gone)


def _answer(asked: "SimpleQueue[tuple[Future[Any], Callable[[], Any]]]") -> None:
    while True:
        answer, call = asked.get()
        try:
            answer.set_result(call())
        except BaseException as error:  # noqa: BLE001  it is raised where it was asked
            answer.set_exception(error)
        del answer, call
