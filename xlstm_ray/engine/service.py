"""Many requests in one engine: any thread submits them, and one thread works on all of them."""

import atexit
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import count
from queue import Empty, SimpleQueue

from xlstm_ray.engine.core import Core
from xlstm_ray.engine.figures import Steps
from xlstm_ray.engine.guard import MemoryGuard
from xlstm_ray.engine.logs import RunLogs
from xlstm_ray.engine.request import Handle, Request
from xlstm_ray.engine.task import Task
from xlstm_ray.engine.windows import GROUP_SIZES
from xlstm_ray.engine.work import Work
from xlstm_ray.errors import MemoryLimitError, UsageError, XlstmRayError
from xlstm_ray.supervisor.presence import LOOK_S


class Service:
    """Serves requests of any thread.

    slots: the most states on the device at once; None: as many as a call has rows, or as fit in memory. buckets: the
    numbers of rows that a call may have; with only one, the bits of a row do not depend on how many others there are.
    ends: end tokens. Raises MemoryLimitError for slots that do not fit.
    """

    def __init__(
        self,
        core: Core,
        ends: Sequence[int],
        slots: int | None = None,
        buckets: Sequence[int] = GROUP_SIZES,
        fills_per_decode: int = 1,
    ):
        _ = core.running.executor  # the engine may have been closed
        at_once = [1 if slots is None else slots]
        asked = {"slots": at_once, "buckets": buckets, "fills_per_decode": [fills_per_decode]}
        for name, numbers in asked.items():
            if not numbers or any(type(n) is not int or n < 1 for n in numbers):
                raise UsageError(f"`{name}`: {', '.join(map(repr, numbers)) or 'none'} was given; allowed: 1 and more")
        given, slots = slots, core.plan.room.slots(slots or max(buckets))
        if given is not None and slots < given:
            raise MemoryLimitError(
                f"`slots` is {given}, and {slots} fit in memory; give fewer, or start all the same with `force=True`"
            )
        self._core, self.slots = core, slots
        self._work = Work(core, ends=ends, slots=slots, buckets=buckets, fills_per_decode=fills_per_decode)
        self._inbox: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._numbers = count()
        self._failed: XlstmRayError | None = None
        self._closed = False
        self._gate = threading.Lock()
        self._open = ExitStack()
        core.rows.append(slots)
        logs = {name: log for name, log in core.plan.logs.items() if name == "mem_log"}  # tiles are a prefill's
        self._logs = self._work.logs = self._open.enter_context(RunLogs(logs, core.logs, core.kept.failed))
        calls = [(max(buckets), 1)]
        self._work.guard = MemoryGuard.of(
            core, self._open, batch=slots, left=lambda sizes: [*calls, (1, sizes.tile)], log=self._logs.memory
        )
        self._thread = threading.Thread(target=self._run, name="requests", daemon=True)
        self._thread.start()
        atexit.register(self.close)  # a thread in the middle of a step would abort the program's end

    def submit(self, request: Request) -> Handle:
        """Begin a request; its text is cut into tokens here. Raises UsageError or StateError for a wrong request."""
        if request.sampling is not None and request.sampling.n > 1:
            raise UsageError(f"`n` is {request.sampling.n}, and submit is for one answer; call submit_n")
        task = self._task(request)
        self._put(task)
        return task.handle

    def submit_n(self, request: Request) -> list[Handle]:
        """Begin the `n` answers that a request's sampling asks for; their prompt is read once. Returns the handles."""
        sampling = request.sampling
        if sampling is None or sampling.n == 1:
            return [self.submit(request)]
        reader = self._task(replace(request, sampling=None, keep=False))
        for one in sampling.one_by_one():
            number, handle = self._new()
            reader.answer_of(number, replace(request, sampling=one), handle)
        handles = [answer.handle for answer in reader.answers]
        self._put(reader)
        return handles

    @property
    def steps(self) -> Steps:
        """What it counts."""
        return self._work.steps

    def close(self) -> None:
        """Cancel all requests and end the thread."""
        atexit.unregister(self.close)
        self._inbox.put(None)
        self._thread.join()

    def _task(self, request: Request) -> Task:
        self._require_open()
        if request.sampling is not None:
            request.sampling.require_vocabulary(self._core.plan.config.vocab_size)
        return Task.of(self._core, request, *self._new())

    def _new(self) -> tuple[int, Handle]:
        """A new request's number and handle."""
        number = next(self._numbers)
        return number, Handle(lambda: self._inbox.put(lambda: self._work.cancel(number)))

    def _put(self, task: Task) -> None:
        with self._gate:  # nothing may be put in after `_end` has emptied it
            self._require_open()
            self._inbox.put(lambda: self._work.arrive(task, closed=self._closed))

    @property
    def failed(self) -> XlstmRayError | None:
        """The error that ended the service; None after `close`, too."""
        return self._failed

    def _require_open(self) -> None:
        if self._closed:
            raise self._failed or UsageError("this engine has been closed; load the model again")

    # -- the thread ----------------------------------------------------------------------------------------------------
    def _run(self) -> None:
        open_, work, turn = True, self._work, self._core.turn
        try:
            with turn.of("serve"):
                while open_:
                    if not work.left:
                        open_ = self._take_in(wait=True)
                    with turn.executor():
                        while open_ and work.left:
                            work.step()
                            open_ = self._take_in(wait=False)
                            if turn.wanted and not work.owes_tokens:
                                break
        except XlstmRayError as error:
            self._failed = error
        except BaseException:  # a bug: callers must not wait for ever
            self._failed = XlstmRayError(
                "the engine's thread has ended by a fault of this program; its traceback is above"
            )
            raise
        finally:
            self._end()

    def _take_in(self, *, wait: bool) -> bool:
        """Take in what callers have sent. Returns False if the service must end."""
        while True:
            try:
                call = self._inbox.get(block=wait, timeout=LOOK_S)
            except Empty:
                if not wait:
                    return True
                self._core.running.require_head()  # else only the next request would find that it is gone
                continue
            if call is None:
                return False
            call()
            wait = False

    def _end(self) -> None:
        """Refuse new requests, end those that are left, and close the logs."""
        with self._gate:
            self._closed = True
        while not self._inbox.empty():
            call = self._inbox.get()
            if call is not None:
                call()
        with self._core.turn.executor():
            self._work.end_all(self._failed)
            self._logs.seen(self._core.running.seen(at_end=self._logs.memory is not None and self._failed is None))
        self._open.close()
