"""Many requests in one engine: a thread that owns the executor, reads prompts and decodes rows together."""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from itertools import count
from queue import Empty, SimpleQueue
from time import perf_counter, sleep

import torch
from torch import Tensor

from xlstm_ray.engine.core import Core
from xlstm_ray.engine.decode import require_finite
from xlstm_ray.engine.driver import Snapshot, make_part
from xlstm_ray.engine.held import HeldRows
from xlstm_ray.engine.request import End, Handle, Piece, Queued, Reading, Request
from xlstm_ray.engine.resume import unchanged
from xlstm_ray.engine.rows import Batch
from xlstm_ray.engine.scheduler import Decode, Fill, Park, Resume, Scheduler
from xlstm_ray.engine.slots import Slots
from xlstm_ray.engine.task import Task
from xlstm_ray.engine.windows import plan_windows
from xlstm_ray.errors import UsageError, XlstmRayError
from xlstm_ray.runtime.executor import Step, StepResult
from xlstm_ray.state import RecurrentState
from xlstm_ray.text.answer import Answer, Finish
from xlstm_ray.text.history import Row
from xlstm_ray.text.prompt import Prompt

BUCKETS = 1, 4, 16  # rows of a call that decodes: each number is compiled for itself


class Service:
    """Serves requests of any threads. slots: states on the device at once. buckets: rows that a call may have.

    One bucket alone makes a row's bits independent of how many others there are. ends: end tokens.
    """

    def __init__(
        self,
        core: Core,
        *,
        ends: Sequence[int],
        slots: int,
        buckets: Sequence[int] = BUCKETS,
        fills_per_decode: int = 1,
    ):
        self._core, self._ends, self.slots = core, tuple(ends), slots
        self._scheduler = Scheduler(slots, fills_per_decode)
        self._inbox: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._numbers = count()
        self._tasks: dict[int, Task] = {}
        executor = core.running.executor
        self._batches = [Batch(executor, buckets) for _ in range(executor.parallel)]
        self._under_way: deque[Callable[[StepResult], None]] = deque()  # what takes each result
        self._held: Decode | Park | None = None  # decided, and waits for the step before
        self._slots = Slots(slots, core.plan.config.vocab_size, self._ends)
        self._failed: XlstmRayError | None = None
        self._closed = False
        self._gate = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="requests", daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> Handle:
        """Begin a request. Raises UsageError or StateError for what cannot be asked for; its text is cut here."""
        self._require_open()
        core, number = self._core, next(self._numbers)
        handle = Handle(lambda: self._inbox.put(lambda: self._cancel(number)))
        if request.sampling is not None:
            request.sampling.require_vocabulary(core.plan.config.vocab_size)
        state = request.state
        if request.prompt is None and request.append is None and state is not None and state.batch == 1:
            core.require_whole(state)
            going = unchanged(state)
        else:
            (going,), state = core.going_on(_one(request.prompt), _one(request.append), state)
        numerics, seen, end = core.plan.numerics, going.seen, len(going.tokens)
        rows = core.rows_of(state) if state is not None else HeldRows([None])
        task = Task(
            number,
            request,
            handle,
            going,
            rows,
            None if state is None else state.logits[0],
            plan_windows([seen], [end], tile_size=numerics.tile_size, chunk_size=numerics.chunk_size),
            resumed=seen,
            read=seen,
        )
        with self._gate:  # what is put in is taken out
            self._require_open()
            self._inbox.put(lambda: self._arrive(task))
        return handle

    def close(self) -> None:
        """Cancel what there is and end the thread."""
        self._inbox.put(None)
        self._thread.join()

    def _require_open(self) -> None:
        if self._closed:
            raise self._failed or UsageError("this engine has been closed; load the model again")

    # -- the thread ----------------------------------------------------------------------------------------------------
    def _run(self) -> None:
        open_ = True
        try:
            while open_:
                open_ = self._take_in(wait=not self._under_way and not self._busy)
                with self._core.turn.of("serve"):
                    while open_ and (self._busy or self._under_way):
                        self._work()
                        open_ = self._take_in(wait=False)
                        if self._core.turn.wanted and not self._under_way:
                            break
                if self._core.turn.wanted:
                    sleep(0.001)  # a lock is not fair
        except XlstmRayError as error:
            self._failed = error
        except BaseException:  # a bug: nobody may wait for what will not come
            self._failed = XlstmRayError(
                "the engine's thread has ended by a fault of this program; its traceback is above"
            )
            raise
        finally:
            self._end_all()

    @property
    def _busy(self) -> bool:
        return bool(len(self._scheduler))

    def _take_in(self, *, wait: bool) -> bool:
        """What callers have sent; False: the service is to end."""
        while True:
            try:
                call = self._inbox.get(block=wait)
            except Empty:
                return True
            if call is None:
                return False
            call()
            wait = False

    def _work(self) -> None:
        """Ask the executor for as much as keeps it busy, then take a result."""
        executor = self._core.running.executor
        while executor.has_room:
            action = self._held or (None if self._core.turn.wanted else self._scheduler.next())
            self._held = None
            match action:
                case Fill(number):
                    self._fill(self._tasks[number])
                case Decode() | Park() if any(batch.under_way for batch in self._batches):
                    self._held = action
                    break
                case Decode():
                    self._decode()
                case Park(number):
                    self._park(self._tasks[number])
                case Resume(number):
                    self._resume(self._tasks[number])
                case None:
                    break
        if self._under_way:
            self._take_result()

    def _take_result(self) -> None:
        """Wait for the oldest result under way."""
        result = self._core.running.executor.result()
        self._under_way.popleft()(result)

    def _drain(self) -> None:
        """Take all results under way: of those that leave meanwhile, too."""
        while self._under_way:
            self._take_result()

    # -- arrivals ------------------------------------------------------------------------------------------------------
    def _arrive(self, task: Task) -> None:
        self._tasks[task.number] = task
        with self._core.turn.of("bring"):
            task.look_up(self._core)
        filled = task.read == task.total
        self._scheduler.arrive(task.number, priority=task.request.priority, filled=filled)
        task.handle.tell(Queued(self._scheduler.place(task.number)))
        if filled and task.request.sampling is None:  # its state is given, and nothing is wanted but that
            self._prompt_read(task)

    def _cancel(self, number: int) -> None:
        task = self._tasks.get(number)
        if task is None or task.cancelled:
            return
        task.cancelled = True
        if not task.under_way and not any(batch.under_way and batch.has(task) for batch in self._batches):
            self._finish(task, Finish("cancelled"))

    def _began(self, task: Task) -> None:
        if task.began is None:
            task.began = perf_counter()

    # -- prompts -------------------------------------------------------------------------------------------------------
    def _fill(self, task: Task) -> None:
        """Submit the next window of its prompt."""
        core, executor = self._core, self._core.running.executor
        if task.last or task.cancelled:  # its results are still to come
            self._take_result()
            return
        self._began(task)
        if task.state is None:
            task.state = core.states.state_of(task.rows)
        window = next(task.windows)
        part = make_part(window, [task.going.tokens], [task.resumed])
        task.read = min(window.start + window.size, task.total)
        task.last = task.read == task.total
        core.warm_up(1, [window.size])
        wanted = task.wants(window)  # with the result it comes before actors go on
        keep = wanted and not executor.local
        step = Step(*part, core.plan.numerics.chunk_size, window.number, "last" if task.last else "none", keep)
        state = task.state = executor.submit(task.state, step)
        task.under_way += 1
        read, last = task.read, task.last

        def take(result: StepResult) -> None:
            task.under_way -= 1
            task.handle.tell(Reading(read, task.total))
            if result.logits is not None:
                task.logits = result.logits[0]
            task.hidden = result.hidden
            if wanted:
                logits = executor.logits(result.hidden)[0] if result.logits is None else result.logits[0]
                ref, tensors = (state, None) if result.state is None else (None, result.state)
                task.keep(read, core.states.rows(ref, 1, tensors), logits)
            if task.cancelled and not task.under_way:
                self._finish(task, Finish("cancelled"))
            elif last and not task.cancelled:
                self._scheduler.filled(task.number)
                self._prompt_read(task)

        self._under_way.append(take)

    def _prompt_read(self, task: Task) -> None:
        """The state has seen all of the prompt: choose the first token, where one is wanted."""
        assert task.logits is not None
        require_finite(task.logits, self._core.plan.model)
        sampling = task.request.sampling
        if sampling is None:
            self._finish(task, Finish("stop"))
            return
        end = task.known(self._core.text).end
        task.answer = Answer(sampling, self._ends, self._core.text.stream(end), last=not task.request.keep)
        self._slots.take(task)
        self._choose(task.logits.unsqueeze(0), [task])
        if task.answer.finish is None:
            self._join(task)

    def _join(self, task: Task) -> None:
        """It decodes with those that have the fewest beside them."""
        min(self._batches, key=lambda batch: len(batch.tasks)).joining.append(task)

    # -- decoding ------------------------------------------------------------------------------------------------------
    def _decode(self) -> None:
        """A token more for all that decode: submit the steps of all batches."""
        for batch in self._batches:
            if batch.tasks:
                size = batch.arrange()
                if size is not None:
                    self._core.warm_up(size, [1])
                batch.step(self._core.plan.numerics.chunk_size)
                self._under_way.append(partial(self._decoded, batch))

    def _decoded(self, batch: Batch, result: StepResult) -> None:
        batch.under_way = False
        assert result.logits is not None
        active = [(n, task) for n, task in enumerate(batch.places) if task is not None]
        if not active:
            return
        logits = result.logits
        if len(active) < len(batch.places):
            logits = logits[torch.tensor([n for n, _ in active], device=logits.device)]
        require_finite(logits, self._core.plan.model)
        for (_, task), row in zip(active, logits, strict=True):
            task.logits = row
        self._choose(logits, [task for _, task in active])

    def _choose(self, logits: Tensor, tasks: list[Task]) -> None:
        """The next token of these rows, by their logits (rows, vocabulary)."""
        for task, token, made in zip(tasks, *self._slots.choose(logits, tasks), strict=True):
            answer = task.answer
            assert answer is not None
            if task.first_token is None:
                task.first_token = perf_counter()
            before = len(answer.tokens)
            text = answer.step(token)
            new = len(answer.tokens) > before  # an end token is not among them
            if new or text:
                task.handle.tell(Piece(text, token if new else None, made if new else None))
            if task.cancelled and answer.finish is None:
                answer.end("cancelled")
            if answer.finish is not None:
                self._finish(task, answer.finish)

    # -- leaving -------------------------------------------------------------------------------------------------------
    def _park(self, task: Task) -> None:
        """Its state goes where there is room, its slot to another."""
        self._take_out(task)
        assert task.state is not None
        task.rows, task.state = self._core.states.rows(task.state, 1), None
        if not self._core.running.executor.on_host:
            for row in task.rows:
                if row is not None:
                    row.held.evict()

    def _resume(self, task: Task) -> None:
        self._began(task)
        task.state = self._core.states.copy_of(task.rows)
        if task.answer is None:  # its state was given, with the logits to choose from
            self._prompt_read(task)
            return
        self._slots.take(task)
        self._join(task)

    def _take_out(self, task: Task, *, keep: bool = True) -> None:
        """Out of its batch; keep: with a state of its own."""
        for batch in self._batches:
            batch.remove(task, keep=keep)
        self._slots.give_back(task)

    def _finish(self, task: Task, finish: Finish) -> None:
        """Its last event; it is forgotten."""
        del self._tasks[task.number]
        self._scheduler.leave(task.number)
        task.release()
        keep = task.request.keep
        self._take_out(task, keep=keep or task.fed > 0)
        task.keep_answer(self._core)
        state, answer = self._state_of(task) if keep else None, task.answer
        if answer is not None and answer.finish is None:
            text = answer.end("cancelled")
            if text:
                task.handle.tell(Piece(text, None))
        tokens, text = (answer.tokens, answer.text) if answer else ([], "")
        logits = None if task.logits is None else task.logits.cpu()
        task.handle.tell(End(finish, text, tokens, task.usage(), logits, state))

    def _state_of(self, task: Task) -> RecurrentState | None:
        """The state after all that it has seen, the last token of its answer too."""
        core, executor, answer = self._core, self._core.running.executor, task.answer
        if task.state is None and not task.found:  # nothing was computed
            return task.request.state
        self._drain()
        if task.logits is None:
            assert task.hidden is not None
            task.logits = executor.logits(task.hidden)[0]
        complete, known = task.read == task.total, task.known(core.text)
        if answer is not None and answer.tokens:
            if not (answer.finish is not None and isinstance(answer.finish.by, int)):  # its last token was not fed
                assert task.state is not None
                one, none = torch.ones(1, dtype=torch.long), torch.zeros(1, dtype=torch.long)
                core.warm_up(1, [1])
                step = Step(torch.tensor([answer.tokens[-1:]]), none, one, core.plan.numerics.chunk_size, logits="last")
                task.state = executor.submit(task.state, step)
                result = executor.result()
                assert result.logits is not None
                task.logits = result.logits[0]
            seen = None if known.text is None else known.text.extend(answer.said.encode())
            known = Row(tokens=known.tokens.extend(answer.tokens), text=seen, end=answer.stream.end())
        rows = core.states.rows(task.state, 1) if task.state is not None else task.rows
        snapshot = Snapshot([known.tokens.length], task.logits.unsqueeze(0).cpu(), rows)
        sampling = None if answer is None else answer.sampling.lasting()
        made = core.state(snapshot, [known], task.numerics(core), sampling, complete=complete)
        if not complete:
            made.begun = [task.begun]
        return made

    def _end_all(self) -> None:
        """Nothing is done any more: those that are left end, cancelled or by what has failed."""
        with self._gate:
            self._closed = True
        while not self._inbox.empty():
            call = self._inbox.get()
            if call is not None:
                call()
        finish = Finish("error" if self._failed else "cancelled")
        for task in list(self._tasks.values()):
            del self._tasks[task.number]
            self._scheduler.leave(task.number)
            task.release()
            text, tokens = (task.answer.text, task.answer.tokens) if task.answer else ("", [])
            task.handle.tell(End(finish, text, tokens, task.usage(), error=self._failed))
        self._under_way.clear()
        self._batches = []


def _one(prompt: Prompt | None) -> list[Prompt] | None:
    return None if prompt is None else [prompt]
