"""The one place where the driver asks Ray for what may not come: it knows time limits, and what "gone" means.

A head that is away, or a raylet that is stopped, leaves Ray's own calls without an answer, a minute long or for ever.
So each is made on a thread of its own, which is left there when it does not come back. GridLost is for a head or a
raylet that is gone; errors of actors, nodes and objects are Ray's RayError and for Recovery to deal with.
Results of calls are waited for here too: a wait that looks at the head while it lasts.
"""

import shutil
import socket
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from threading import Thread
from time import monotonic
from types import ModuleType
from typing import Any

import psutil

from xlstm_ray.errors import GridLost, XlstmRayError, one_line
from xlstm_ray.files import MIB
from xlstm_ray.supervisor.ray_inside import session_dir

LOOK_S = 2.0  # between two looks at the head while something is waited for
LEAST_DISK = 64 * MIB  # with less left, Ray's processes end when they cannot write
PATIENCE_S = 60.0  # what Ray itself waits for a head that is away; networks come back


class Link:
    """This process's connection to its head. `ray` is the connected module."""

    def __init__(self, ray: ModuleType, patience_s: float = PATIENCE_S):
        self.ray, self._patience_s = ray, patience_s
        self.head: str = ray.get_runtime_context().gcs_address
        self._host, _, port = self.head.rpartition(":")
        self._port = int(port)
        self._asked: SimpleQueue[tuple[Future[Any], Callable[[], Any]]] | None = None
        self._silent: tuple[float, float] | None = None  # since when the head has not answered, and the last look
        self.gone: str | None = None  # why, once it is

    def ask(self, call: Callable[..., Any], *args: Any, timeout_s: float | None = None, **options: Any) -> Any:
        """What a call to Ray returns or raises. GridLost where it does not answer in timeout_s, or the patience."""
        if self.gone:
            raise GridLost(self.gone)
        if self._asked is None:
            self._asked = SimpleQueue()
            Thread(target=_answer, args=(self._asked,), name="ray", daemon=True).start()
        answer: Future[Any] = Future()
        self._asked.put((answer, lambda: call(*args, **options)))
        until = monotonic() + (timeout_s if timeout_s is not None else self._patience_s)
        while not answer.done():
            try:
                answer.exception(max(0.0, min(LOOK_S, until - monotonic())))
            except TimeoutError:
                self._asked_in_vain(answer, until)
        error = answer.exception()
        if error is None:
            return answer.result()
        if isinstance(error, (self.ray.exceptions.RayError, XlstmRayError)):
            raise error
        # What Ray's clients raise where the other end is not there, or has forgotten this job with its raylet.
        if isinstance(error, (OSError, RuntimeError)) or type(error) is Exception:
            why = f"Ray's head at {self.head} or this machine's raylet is gone ({one_line(error)})"
            raise self._lost(why) from error
        raise error

    @property
    def failure(self) -> type[Exception]:
        """What says that an actor, its process, its node or what it held is gone, or that it does not answer.

        All that Ray raises of its own; `get` turns what an actor's code raises into that.
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
        """Results of actors' calls, or the actor's own error as it was raised there. GridLost where the head is gone.

        Raises GetTimeoutError after timeout_s.
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
            return self.ask(self.ray.get, refs)
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
            self._asked = None
            raise
        if monotonic() >= until:
            self._asked = None  # its thread stays with the call
            raise self._lost(f"Ray's head at {self.head} or this machine's raylet does not answer")

    def require_head(self) -> None:
        """Raise GridLost where the head is known to be gone, or has been silent for as long as Ray itself would wait.

        Known is what this machine's own kernel says of one of its own addresses: nothing listens there any more.
        """
        if self.gone:
            raise GridLost(self.gone)
        try:
            socket.create_connection((self._host, self._port), timeout=LOOK_S).close()
        except OSError as error:
            now = monotonic()
            if self._silent is None or now - self._silent[1] > 5 * LOOK_S:  # nobody has looked in between
                self._silent = now, now
            since = self._silent[0]
            self._silent = since, now
            known = isinstance(error, ConnectionRefusedError) and _is_own(self._host)
            if known or now - since >= self._patience_s:
                raise self._lost(f"Ray's head at {self.head} is gone ({error.strerror or error})") from None
        else:
            self._silent = None

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


def _is_own(host: str) -> bool:
    return any(a.address == host for addresses in psutil.net_if_addrs().values() for a in addresses)
