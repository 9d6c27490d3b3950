"""The work of the service's thread: it reads the prompts of many requests and decodes their rows together."""

from collections import deque
from collections.abc import Sequence
from functools import partial
from time import perf_counter

import torch
from torch import Tensor

from xlstm_ray.engine.core import Core
from xlstm_ray.engine.decode import Made, finite
from xlstm_ray.engine.driver import Sizes, Snapshot
from xlstm_ray.engine.figures import Steps
from xlstm_ray.engine.guard import MemoryGuard, Stop
from xlstm_ray.engine.held import HeldRows
from xlstm_ray.engine.logs import RunLogs
from xlstm_ray.engine.request import Piece, Reading
from xlstm_ray.engine.rows import Batch, Flight, must_wait
from xlstm_ray.engine.scheduler import Decode, Fill, Park, Resume, Scheduler
from xlstm_ray.engine.slots import Slots
from xlstm_ray.engine.task import Task
from xlstm_ray.errors import XlstmRayError
from xlstm_ray.runtime.executor import StepResult, decoding_step
from xlstm_ray.state import RecurrentState
from xlstm_ray.text.answer import Answer, Finish
from xlstm_ray.text.history import Row


class Work:
    """Works on the requests of a service. Only the service's thread calls it. Arguments as in Service."""

    def __init__(self, core: Core, *, ends: Sequence[int], slots: int, buckets: Sequence[int], fills_per_decode: int):
        self._core, self._ends = core, tuple(ends)
        self._scheduler = Scheduler(slots, fills_per_decode)
        self._tasks: dict[int, Task] = {}
        executor = self._executor = core.lane()
        self._parallel = executor.parallel
        batches = max(self._parallel, -(-slots // max(buckets)))
        self._batches = [Batch(executor, buckets) for _ in range(batches)]
        self._under_way: deque[Flight] = deque()  # in order
        self._taken = 0.0  # perf_counter time of the last result
        self._decoded_at: float | None = None  # of the last decoding step, if its rows go on
        self.steps = Steps()
        self._held: Decode | Park | None = None  # the action that waits for a step in flight
        self._slots = Slots(slots, core.plan.config.vocab_size, self._ends, executor.logits_on)
        self.guard: MemoryGuard | None = None
        self.logs: RunLogs | None = None
        self._looked = 0.0  # perf_counter time of the last look at memory and helpers

    @property
    def under_way(self) -> bool:
        """Whether steps are in flight."""
        return bool(self._under_way)

    @property
    def left(self) -> bool:
        """Whether a request is left, or a step is in flight."""
        return self.under_way or bool(len(self._scheduler))

    @property
    def owes_tokens(self) -> bool:
        """Whether a decoding step must come before a window of anybody else."""
        return self._scheduler.owes_tokens

    def step(self) -> None:
        """Submit steps until the executor has no room, then take one result."""
        try:
            self._look()
            self._act()
        except BaseException:
            self._executor.forget()
            raise

    def _act(self) -> None:
        while self._executor.has_room:
            action = self._held or self._scheduler.next()
            self._held = None
            match action:
                case Fill(number):
                    self._fill(self._tasks[number])
                case Decode() | Park() if must_wait(self._batches, isinstance(action, Park) or self._scheduler.reads):
                    self._held = action
                    break
                case Decode():
                    self._decode()
                case Park(number):
                    while number in self._tasks and self._reads(self._tasks[number]):
                        self._take_result()
                    if number in self._tasks:  # the last step may have ended it
                        self._park(self._tasks[number])
                case Resume(number):
                    self._resume(self._tasks[number])
                case None:
                    break
        if self._under_way:
            self._take_result()

    def _look(self) -> None:
        """Check memory and Ray's helpers now and then. Over the hard limit of memory, all requests end with its error.

        The service goes on. It does not make tiles smaller: a request's bits would depend on when it came.
        """
        if self.guard is None or perf_counter() - self._looked < self.guard.watch.every_s:
            return
        self._looked, numerics = perf_counter(), self._core.plan.numerics
        for text in self._core.running.helpers_lost():
            self._core.on_note(text)
        if self.logs is not None:
            self.logs.seen(self._core.running.seen())
        verdict = self.guard.next(Sizes(numerics.tile_size, numerics.chunk_size))
        if isinstance(verdict, Stop):
            self.end_all(verdict.error)

    def _take_result(self) -> None:
        """Wait for the oldest result under way."""
        result = self._executor.result()
        kind, since, take = self._under_way.popleft()
        now = perf_counter()
        seconds = now - max(since, self._taken)  # a step begins when the one before has ended
        self.steps.add(kind, seconds)
        if kind == "decode" and self._decoded_at is not None:
            self.steps.add("stall", max(0.0, now - self._decoded_at - seconds))
        self._taken = now
        take(result)
        if kind == "decode":
            self._decoded_at = now if any(batch.tasks for batch in self._batches) else None

    def _drain(self) -> None:
        """Take all results in flight."""
        while self._under_way:
            self._take_result()

    # -- arrivals ------------------------------------------------------------------------------------------------------
    def arrive(self, task: Task, *, closed: bool = False) -> None:
        """Take a task in. closed: only so that it is ended with the others."""
        self._tasks |= {one.number: one for one in (task, *task.answers)}  # ended with the others, whatever happens
        if closed:
            return
        task.look_up(self._core)
        filled = task.read == task.total
        self._scheduler.arrive(task.number, priority=task.request.priority, filled=filled)
        for answer in task.answers:
            self._scheduler.arrive(answer.number, priority=task.request.priority, behind=True)
        task.tell(task.queued(self._scheduler.place(task.number)))
        if filled and task.request.sampling is None:  # it only wants its given state back
            self._prompt_read(task)

    def cancel(self, number: int) -> None:
        task = self._tasks.get(number)
        if task is None or task.cancelled:
            return
        task.cancelled = True
        if task.reader is not None:
            task.reader.answers.remove(task)
            if not task.reader.answers:  # nobody waits for it any more
                self.cancel(task.reader.number)
        reads = self._reads(task) and task.request.keep  # else what is under way ends as nobody's
        if not reads and not any(batch.under_way and batch.has(task) for batch in self._batches):
            self._finish(task, Finish("cancelled"))

    @staticmethod
    def _reads(task: Task) -> bool:
        """Whether windows of its prompt are under way."""
        return task.windows is not None and task.windows.under_way

    # -- prompts -------------------------------------------------------------------------------------------------------
    def _fill(self, task: Task) -> None:
        """Submit the next window of the task's prompt."""
        core = self._core
        if task.began is None:
            task.look_up(core)
            if task.read == task.total:  # somebody has read the whole prompt meanwhile
                self._scheduler.filled(task.number)
                self._resume(task)
                return
        windows = task.windows
        assert windows is not None
        if windows.last or task.cancelled:  # only results are left to take
            self._take_result()
            return
        task.began = task.began or perf_counter()
        if task.state is None:
            task.state = core.states.state_of(task.rows)
        step = windows.step()
        assert step is not None
        core.warm_up(1, [step.tokens.shape[1]])
        read, last, began = windows.read, windows.last, perf_counter()  # `submit` may compute, in this process
        state = task.state = self._executor.submit(task.state, step._replace(logits="last" if last else "none"))

        def take(result: StepResult) -> None:
            wanted, here = windows.take(result).wanted, None
            if result.logits is not None:
                task.logits = result.logits[0]
            if wanted:
                ref, tensors = (state, None) if result.state is None else (None, result.state)
                here = windows.snapshot(core.states.rows(ref, 1, tensors))
            if task.number in self._tasks:  # not cancelled: else only what is kept counts
                task.tell(Reading(read, task.total, task.scores if last else None))
                if task.cancelled and not windows.under_way:
                    self._finish(task, Finish("cancelled"))
                elif last and not task.cancelled:
                    self._scheduler.filled(task.number)
                    self._prompt_read(task)
            if here is not None:  # after the first token was told: on a GPU this takes milliseconds
                began = perf_counter()
                task.keep(here if result.logits is None else Snapshot([read], result.logits.cpu(), here.rows))
                self.steps.add("snapshot", perf_counter() - began)

        self._under_way.append(Flight("prefill", began, take))

    def _prompt_read(self, task: Task) -> None:
        """Go on after the whole prompt was read: choose the first token, or end a task that only reads."""
        assert task.logits is not None
        if not finite(task.logits):
            return self._unfit(task)
        for answer in task.answers:
            answer.follow(task, self._rows_of(task))
            self._scheduler.follow(answer.number)
        sampling = task.request.sampling
        if sampling is None:
            self._finish(task, Finish("stop"))
            return
        end = task.going.end(self._core.text)  # not `known`: hashes of all tokens, which only a kept state needs
        task.answer = Answer(sampling, self._ends, self._core.text.stream(end), last=not task.request.keep)
        self._slots.take(task)
        self._choose(task.logits.unsqueeze(0), [task])
        if task.answer.finish is None:
            self._join(task)

    def _join(self, task: Task) -> None:
        """Add the task to a batch: to the one with the fewest tasks of those that keep all stages busy."""
        free = [batch for batch in self._batches if len(batch.tasks) < batch.most]
        min(free[: self._parallel], key=lambda batch: len(batch.tasks)).joining.append(task)

    # -- decoding ------------------------------------------------------------------------------------------------------
    def _decode(self) -> None:
        """Submit a step of every batch that has none under way: each row gets one more token."""
        for batch in self._batches:
            if batch.tasks and not batch.under_way:
                size = batch.arrange()
                if size is not None:
                    self._core.warm_up(size, [1])
                chooses = self._executor.chooses
                choice = None if chooses == "no" else self._slots.choice(batch.places, there=chooses == "there")
                began = perf_counter()
                batch.step(choice)
                self._under_way.append(Flight("decode", began, partial(self._decoded, batch)))

    def _decoded(self, batch: Batch, result: StepResult) -> None:
        batch.under_way = False
        for task in batch.unfit(result):
            self._unfit(task)
        active = [(n, task) for n, task in enumerate(batch.places) if task is not None]
        if not active:
            return
        logits, tasks, there = result.logits, [task for _, task in active], [n for n, _ in active]
        chosen = None if result.tokens is None else result.tokens[there]
        if chosen is not None and result.logits_of is not None:
            for n, task in active:
                task.logits, task.fetch = None, partial(result.logits_of, n)
            return self._go_on(tasks, chosen.tolist(), [None] * len(tasks))
        assert logits is not None
        if chosen is not None:
            # The step after this one is under way already: nothing here may wait for the device.
            rows = [logits[n] for n in there]
            for task, row in zip(tasks, rows, strict=True):
                task.logits = row
            self._go_on(tasks, *self._slots.chosen(chosen, rows, tasks))
            return
        if len(active) < len(batch.places):
            logits = logits[torch.tensor(there, device=logits.device)]
        for task, row in zip(tasks, logits, strict=True):
            task.logits = row
        self._choose(logits, tasks)

    def _choose(self, logits: Tensor, tasks: list[Task]) -> None:
        """Choose the next token of these tasks from their logits (rows, vocabulary)."""
        self._go_on(tasks, *self._slots.choose(logits, tasks))

    def _go_on(self, tasks: list[Task], tokens: list[int], made_of_all: list[Made | None]) -> None:
        """These tasks have these tokens more."""
        for task, token, made in zip(tasks, tokens, made_of_all, strict=True):
            answer = task.answer
            assert answer is not None
            if task.first_token is None:
                task.first_token = perf_counter()
            before = len(answer.tokens)
            text = answer.step(token)
            new = len(answer.tokens) > before  # an end token is not among them
            if new or text or made is not None:
                task.handle.tell(Piece(text, token if new else None, made))
            if task.cancelled and answer.finish is None:
                answer.end("cancelled")
            if answer.finish is not None:
                self._finish(task, answer.finish)

    # -- leaving -------------------------------------------------------------------------------------------------------
    def _park(self, task: Task) -> None:
        """Move the task's state to the host and free its slot."""
        began = perf_counter()
        task.fetch_logits()
        self._take_out(task)
        assert task.state is not None
        task.rows, task.state = self._core.states.rows(task.state, 1), None
        if not self._executor.on_host:
            for row in task.rows:
                if row is not None:
                    row.held.evict()
        self.steps.add("park", perf_counter() - began)

    def _resume(self, task: Task) -> None:
        task.began = task.began or perf_counter()
        task.state = self._core.states.copy_of(task.rows)
        if task.answer is None:  # it began with a whole state, whose logits choose the first token
            self._prompt_read(task)
            return
        self._slots.take(task)
        self._join(task)

    def _take_out(self, task: Task, *, keep: bool = True) -> None:
        """Take the task out of its batch and free its slot. keep: the task gets its row as a state of its own."""
        for batch in self._batches:
            batch.remove(task, keep=keep)
        self._slots.give_back(task)

    def _finish(self, task: Task, finish: Finish) -> None:
        """End a task with its last event, and forget it."""
        self._forget(task)
        keep = task.request.keep
        if keep or task.fed > 0:
            task.fetch_logits()
        self._take_out(task, keep=keep or task.fed > 0)
        task.keep_answer(self._core)
        state, answer = self._state_of(task) if keep else None, task.answer
        if answer is not None and answer.finish is None:
            text = answer.end("cancelled")
            if text:
                task.handle.tell(Piece(text, None))
        task.end(finish, logits=None if task.logits is None else task.logits.cpu(), state=state)

    def _unfit(self, task: Task) -> None:
        """End a task from whose logits no token can be chosen. Others go on: it may be of what this caller has sent."""
        for one in (*task.answers, task):
            self._drop(one, Finish("error"), task.not_finite())

    def _drop(self, task: Task, finish: Finish, error: XlstmRayError | None) -> None:
        """End a task, and keep nothing of it."""
        self._forget(task)
        self._take_out(task, keep=False)
        task.end(finish, error=error)

    def _forget(self, task: Task) -> None:
        del self._tasks[task.number]
        self._scheduler.leave(task.number)
        task.release()

    def _rows_of(self, task: Task) -> HeldRows:
        """The task's state, with the executor or not."""
        return self._core.states.rows(task.state, 1) if task.state is not None else task.rows

    def _state_of(self, task: Task) -> RecurrentState | None:
        """The state after everything the task has read and made. The last token of the answer is fed first."""
        core, executor, answer = self._core, self._executor, task.answer
        if task.began is None and not task.found:  # nothing was computed
            return task.request.state
        self._drain()
        if task.logits is None:
            assert task.windows is not None
            task.logits = task.windows.snapshot(task.rows).logits[0]
        complete, known = task.read == task.total, task.known(core.text)
        if answer is not None and answer.tokens:
            if not (answer.finish is not None and isinstance(answer.finish.by, int)):  # its last token was not fed
                state = task.state or core.states.state_of(task.rows)
                core.warm_up(1, [1])
                task.state = executor.submit(state, decoding_step(answer.tokens[-1:]))
                result = executor.result()
                assert result.logits is not None
                task.logits = result.logits[0]
            seen = None if known.text is None else known.text.extend(answer.said.encode())
            known = Row(tokens=known.tokens.extend(answer.tokens), text=seen, end=answer.stream.end())
        snapshot = Snapshot([known.tokens.length], task.logits.unsqueeze(0).cpu(), self._rows_of(task))
        sampling = None if answer is None else answer.sampling.lasting()
        made = core.state(snapshot, [known], task.numerics(core), sampling, complete=complete)
        if not complete:
            made.begun = [task.begun]
        return made

    def end_all(self, error: XlstmRayError | None) -> None:
        """End all requests: as cancelled, or with this error."""
        finish = Finish("error" if error else "cancelled")
        for task in list(self._tasks.values()):
            self._drop(task, finish, error)
        self._under_way.clear()
        self._held = None
        for batch in self._batches:
            batch.under_way = False
        self._executor.forget()
