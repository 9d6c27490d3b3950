"""Executor: where weights and states are, and what makes one state of another."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import count
from typing import Literal, NamedTuple, Protocol

from torch import Tensor


class StateRef:
    """The name of a state of `batch` rows, whose tensors are with an executor's workers.

    A state is a value: a step makes another one of it. Whoever has the name keeps the state; when nobody has it any
    more, the workers let go of the tensors.
    """

    __slots__ = ("_free", "batch", "number")

    def __init__(self, number: int, batch: int, free: Callable[[int], object]):
        self.number, self.batch, self._free = number, batch, free

    def __del__(self) -> None:
        self._free(self.number)

    def __repr__(self) -> str:
        return f"StateRef({self.number}, {self.batch} rows)"


class RowRef(NamedTuple):
    """A row of a state."""

    state: StateRef
    row: int


def rows_of(state: StateRef) -> list[RowRef]:
    """All rows of a state, in order."""
    return [RowRef(state, b) for b in range(state.batch)]


class Names:
    """Makes the names of an executor's states, no number twice; free: told of a number that nobody has any more."""

    def __init__(self, free: Callable[[int], object]):
        self._numbers, self._free = count(), free

    def new(self, batch: int) -> StateRef:
        return StateRef(next(self._numbers), batch, self._free)


Wanted = Literal["none", "last", "all"]  # logits: of each row's last token, or of all


class Step(NamedTuple):
    """A window of tokens for all rows of a state: a tile or a tail's window of prefill, or one token in decoding."""

    tokens: Tensor  # (B, T) int64, on the CPU; 0 where a row has none
    start: Tensor  # (B,) int64: row b's tokens are start[b] <= t < end[b], the others are padding
    end: Tensor  # (B,) int64
    chunk_size: int  # tokens; of the closed form
    number: int = 0  # of the window, for people: in names of tasks, and in errors
    logits: Wanted = "none"
    keep: bool = False  # whether the state after it is to come with the result
    in_place: bool = False  # the state after it takes the name of the one before: where nobody else goes on from that


class StepResult(NamedTuple):
    """What a step leaves beside its state."""

    hidden: Tensor  # (B, D) residual stream after the last block, of each row's last token in the window
    logits: Tensor | None  # float32, where they were wanted: (B, vocabulary) of that token, or (B, T, vocabulary)
    seconds: float  # since the result before, or since the step was submitted where nothing was under way
    state: dict[str, Tensor] | None = None  # after the step, on the CPU, where it was to be kept


class Executor(Protocol):
    """What an engine needs of the place where weights and states are. One thread uses it.

    Every method but `close` raises GridLost where what holds the states is gone and cannot be replaced.
    """

    local: bool  # whether the states are in this process, so that saving one is a copy
    on_host: bool  # whether they are in this process's own memory, so that one is as well there as anywhere

    parallel: int  # how many steps of different states its workers can do at once

    def warm_up(self, batch: int, sizes: Iterable[int], chunk_size: int) -> None:
        """Compile what windows of these sizes need, for `batch` rows; size 1 is decoding."""

    def load(self, tensors: dict[str, Tensor] | None, batch: int) -> StateRef:
        """A state of these tensors (named as in RecurrentState, on the CPU; not to be written to), or a fresh one."""

    def take(self, rows: Sequence[RowRef | None]) -> StateRef:
        """A state of copies of these rows: how rows join, leave and fork. None: a fresh row."""

    def save(self, state: StateRef) -> dict[str, Tensor]:
        """A copy of a state's tensors, on the CPU."""

    @property
    def has_room(self) -> bool:
        """Whether another step would keep the workers busy; else it is time for a result. True where none is due."""

    def submit(self, state: StateRef, step: Step) -> StateRef:
        """Begin a step from a state; returns the state after it, which can be used at once."""

    def result(self) -> StepResult:
        """The result of the oldest step that has not been asked for. Waits for it."""

    def forget(self) -> None:
        """The results of steps that have been submitted are not wanted."""

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden (B, D) -> logits (B, vocabulary) float32, on the CPU."""

    @property
    def peak_memory_bytes(self) -> int:
        """The largest use of memory so far, of the kind that matters for the device; summed over processes."""

    @property
    def restarts(self) -> int:
        """How many times a worker had to be replaced."""

    def close(self) -> None:
        """Let go of threads, weights and states."""


def run(executor: Executor, state: StateRef, steps: Iterable[Step]) -> Iterator[tuple[Step, StateRef, StepResult]]:
    """Steps one after the other from a state on: pull them as there is room, yield each with the state after it."""
    under_way: deque[tuple[Step, StateRef]] = deque()
    try:
        for step in steps:
            state = executor.submit(state, step)
            under_way.append((step, state))
            while under_way and not executor.has_room:
                yield *under_way.popleft(), executor.result()
        while under_way:
            yield *under_way.popleft(), executor.result()
    finally:
        executor.forget()
