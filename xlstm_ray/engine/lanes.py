"""Lanes: callers in several threads share one executor, and their steps are in flight together."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from xlstm_ray.engine.turn import Turn
from xlstm_ray.runtime.executor import Executor, RowRef, StateRef, Step, StepResult


class _Inbox:
    """A lane's results that nobody has fetched yet. due: how many more will come."""

    def __init__(self) -> None:
        self.results: deque[StepResult] = deque()
        self.due = 0


class Lanes:
    """An executor that several callers share. turn: decides which of them uses it now."""

    def __init__(self, executor: Callable[[], Executor], turn: Turn):
        self._executor, self._turn = executor, turn
        self.inboxes: set[_Inbox] = set()  # of lanes with steps in flight

    def new(self) -> "Lane":
        return Lane(self)

    @property
    def executor(self) -> Executor:
        return self._executor()

    @contextmanager
    def turn(self) -> Iterator[Executor]:
        """Gives this thread the executor while the block runs."""
        with self._turn.executor():
            yield self._executor()

    def hand_out(self, executor: Executor) -> None:
        """Wait for the oldest result and give it to its lane, unless that has called `forget`."""
        result = executor.result()
        inbox = result.owner
        if isinstance(inbox, _Inbox) and inbox in self.inboxes:
            fetch = result.logits_of
            mine = None if fetch is None else partial(self._in_turn, fetch)
            inbox.results.append(result._replace(owner=None, logits_of=mine))
            inbox.due -= 1
            if not inbox.due:
                self.inboxes.remove(inbox)

    def _in_turn(self, fetch: Callable[[int], Tensor], row: int) -> Tensor:
        with self.turn():
            return fetch(row)


class Lane:
    """The executor as one caller sees it: `result` gives the results of this caller's own steps."""

    def __init__(self, lanes: Lanes):
        self._lanes, self._inbox = lanes, _Inbox()

    @property
    def local(self) -> bool:
        return self._lanes.executor.local

    @property
    def on_host(self) -> bool:
        return self._lanes.executor.on_host

    @property
    def parallel(self) -> int:
        return self._lanes.executor.parallel

    @property
    def logits_on(self) -> torch.device:
        return self._lanes.executor.logits_on

    @property
    def chooses(self) -> Literal["no", "here", "there"]:
        return self._lanes.executor.chooses

    def warm_up(self, batch: int, sizes: Iterable[int], chunk_size: int) -> None:
        with self._lanes.turn() as executor:
            executor.warm_up(batch, sizes, chunk_size)

    def load(self, tensors: dict[str, Tensor] | None, batch: int) -> StateRef:
        with self._lanes.turn() as executor:
            return executor.load(tensors, batch)

    def take(self, rows: Sequence[RowRef | None]) -> StateRef:
        with self._lanes.turn() as executor:
            return executor.take(rows)

    def save(self, state: StateRef) -> Callable[[], dict[str, Tensor]]:
        with self._lanes.turn() as executor:
            return executor.save(state)

    @property
    def has_room(self) -> bool:
        return not self._inbox.results and self._lanes.executor.has_room

    def submit(self, state: StateRef, step: Step) -> StateRef:
        """As `Executor.submit`. If that leaves no room, it waits for a result in the same turn."""
        with self._lanes.turn() as executor:
            self._inbox.due += 1
            self._lanes.inboxes.add(self._inbox)
            state = executor.submit(state, step._replace(owner=self._inbox))
            while not executor.has_room and not self._inbox.results:  # these must be taken before an error may come
                self._lanes.hand_out(executor)
        return state

    def result(self) -> StepResult:
        while not self._inbox.results:
            with self._lanes.turn() as executor:
                if not self._inbox.results:  # else it came while this thread waited
                    self._lanes.hand_out(executor)
        return self._inbox.results.popleft()

    def forget(self) -> None:
        before, self._inbox = self._inbox, _Inbox()
        if before.due:
            with self._lanes.turn() as executor:
                self._lanes.inboxes.discard(before)
                if not self._lanes.inboxes:
                    executor.forget()

    def logits(self, hidden: Tensor) -> Callable[[], Tensor]:
        with self._lanes.turn() as executor:
            return executor.logits(hidden)

    @property
    def peak_memory_bytes(self) -> int:
        with self._lanes.turn() as executor:
            return executor.peak_memory_bytes

    @property
    def restarts(self) -> int:
        return self._lanes.executor.restarts

    def close(self) -> None:
        """Does nothing: the engine closes the executor."""
