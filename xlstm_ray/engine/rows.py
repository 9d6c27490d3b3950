"""Rows of several requests that decode together, in states that are stepped in place."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from xlstm_ray.engine.decode import finite
from xlstm_ray.engine.figures import StepKind
from xlstm_ray.engine.task import Task
from xlstm_ray.runtime.executor import Choice, Executor, RowRef, StateRef, StepResult, decoding_step


class Flight(NamedTuple):
    """A step under way. since: perf_counter time when it was submitted. take: what takes its result."""

    kind: StepKind
    since: float
    take: Callable[[StepResult], None]


class Batch:
    """Rows in one state. A place without a task is idle. buckets: the allowed numbers of rows of a call."""

    def __init__(self, executor: Executor, buckets: Sequence[int]):
        self._executor, self._buckets = executor, sorted(buckets)
        self.state: StateRef | None = None
        self.places: list[Task | None] = []
        self.joining: list[Task] = []
        self.under_way = False  # a step of it is in flight

    @property
    def most(self) -> int:
        """The most rows of a call."""
        return self._buckets[-1]

    @property
    def tasks(self) -> list[Task]:
        return [task for task in (*self.places, *self.joining) if task is not None]

    def size_for(self, rows: int) -> int:
        """The size of the smallest call for this many rows."""
        return next(bucket for bucket in self._buckets if bucket >= rows)

    def has(self, task: Task) -> bool:
        return any(there is task for there in self.tasks)

    def arrange(self) -> int | None:
        """Give new rows their places, in the smallest call for all rows. Returns its size, if it changed."""
        tasks = self.tasks
        size = self.size_for(len(tasks))
        if not self.joining and self.state is not None and size == len(self.places):
            return None
        rows = [self._row(task) for task in tasks]
        idle: list[None] = [None] * (size - len(tasks))
        self.state = self._executor.take([*rows, *idle])
        self.places, self.joining = [*tasks, *idle], []
        for task in tasks:
            task.state = None
        return size

    def step(self, choice: Choice | None) -> None:
        """Submit a step with every row's last token. choice: of the next ones, where the executor chooses."""
        assert self.state is not None
        answers = [None if task is None else task.answer for task in self.places]
        last = [None if answer is None else answer.tokens[-1] for answer in answers]
        self._executor.submit(self.state, decoding_step(last, in_place=True, choice=choice))
        self.under_way = True

    def unfit(self, result: StepResult) -> list[Task]:
        """The tasks for which a step made logits that are not finite: no token can be chosen from them."""
        if result.tokens is not None:
            fits = result.tokens >= 0
        else:
            assert result.logits is not None
            fits = finite(result.logits)
        return [task for task, fit in zip(self.places, fits.tolist(), strict=False) if task is not None and not fit]

    def remove(self, task: Task, *, keep: bool) -> None:
        """Remove the task's row; keep: give the task its own state."""
        for n, there in enumerate(self.places):
            if there is task:
                if keep:
                    task.state = self._executor.take([self._row(task)])
                self.places[n] = None
        self.joining = [other for other in self.joining if other is not task]
        if not self.tasks:
            self.state, self.places = None, []

    def _row(self, task: Task) -> RowRef:
        place = next((n for n, there in enumerate(self.places) if there is task), None)
        if place is not None and self.state is not None:
            return RowRef(self.state, place)
        assert task.state is not None
        return RowRef(task.state, 0)


def must_wait(batches: Sequence[Batch], together: bool) -> bool:
    """Whether steps under way must end before the next ones. together: all batches go at once, as while prompts are
    read, so that none waits for two windows; else each goes by itself."""
    if together:
        return any(batch.under_way for batch in batches)
    active = [batch.under_way for batch in batches if batch.tasks]
    return bool(active) and all(active)
