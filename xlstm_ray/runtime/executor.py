"""Executor: it has the weights and states, and makes new states from old ones."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import count
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from xlstm_ray.sampling.logprobs import Logprobs
from xlstm_ray.sampling.sampler import Rows, Sampler


class StateRef:
    """A reference to a state of `batch` rows, whose tensors an executor's workers have.

    A state is a value: a step makes a new one from it. A state lives as long as somebody has a reference to it; then
    the workers free its tensors.
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
    """Makes an executor's StateRefs; no number is used twice. free: called with the number of a StateRef that ends."""

    def __init__(self, free: Callable[[int], object]):
        self._numbers, self._free = count(), free

    def new(self, batch: int) -> StateRef:
        return StateRef(next(self._numbers), batch, self._free)


Wanted = Literal["none", "last", "all"]  # logits of no token, of each row's last token, or of all tokens


class Following(NamedTuple):
    """The token that follows each token of a window, whose log-probability is wanted.

    likeliest: how many of the likeliest tokens at that place are wanted, too.
    """

    tokens: Tensor  # (B, T) int64, on the CPU; -1 where there is none
    likeliest: int


class Choice(NamedTuple):
    """How the rows' next tokens are chosen where their logits are."""

    sampler: Sampler
    slots: Tensor  # (B,) int64, on the CPU: of each row, the sampler's idle one for no row
    rows: Rows | None = None  # what the sampler has for them, where the choice is made there


class Step(NamedTuple):
    """A window of tokens for all rows of a state: a tile or a tail's window of prefill, or one token in decoding."""

    tokens: Tensor  # (B, T) int64, on the CPU; 0 where a row has none
    start: Tensor  # (B,) int64: row b's tokens are start[b] <= t < end[b], the others are padding
    end: Tensor  # (B,) int64
    chunk_size: int  # tokens a chunk of the closed form
    number: int = 0  # of the window; for people: in names of tasks and in errors
    logits: Wanted = "none"
    keep: bool = False  # return the state after the step with the result
    in_place: bool = False  # write the new state over the old one, which nobody else uses
    following: Following | None = None
    choice: Choice | None = None  # of a decoding step, where the executor chooses
    owner: object = None  # whose step it is, where callers share an executor; the result has it


def decoding_step(tokens: Sequence[int | None], *, in_place: bool = False, choice: Choice | None = None) -> Step:
    """A step of one token for each row, with its logits. None: the row keeps its state, and its logits mean nothing."""
    active = torch.tensor([token is not None for token in tokens], dtype=torch.long)
    ids = torch.tensor([[token or 0] for token in tokens], dtype=torch.long)
    return Step(ids, torch.zeros_like(active), active, chunk_size=1, logits="last", in_place=in_place, choice=choice)


class StepResult(NamedTuple):
    """The results of a step, besides its state."""

    # (B, D) residual stream after the last block, of each row's last token in the window; None if `choice` was set
    hidden: Tensor | None
    logits: Tensor | None  # float32, if requested: (B, vocabulary) of that token, or (B, T, vocabulary) of all
    seconds: float  # since the previous result; since `submit` if no step was in flight
    state: dict[str, Tensor] | None = None  # after the step, on the CPU, if `keep` was set
    logprobs: Logprobs | None = None  # (B, T) and (B, T, likeliest), on the CPU, if `following` was set
    tokens: Tensor | None = None  # (B,) int64, on the CPU, if `choice` was set; -1 if the row's logits are not finite
    # Where tokens came without their logits: a row's logits (vocabulary,), until the next step of this state.
    logits_of: Callable[[int], Tensor] | None = None
    owner: object = None  # the step's


class Executor(Protocol):
    """Runs steps on weights and states, wherever they are. One thread at a time uses it.

    Every method but `close` raises GridLost if workers with states are gone and cannot be replaced.
    """

    @property
    def local(self) -> bool:
        """Whether the states are in this process, so saving one is only a copy."""

    @property
    def on_host(self) -> bool:
        """Whether they are in this process's main memory, so moving one to the host gains nothing."""

    @property
    def parallel(self) -> int:
        """The number of steps (of different states) that its workers can do at once."""

    @property
    def logits_on(self) -> torch.device:
        """The device of the logits of steps."""

    @property
    def chooses(self) -> Literal["no", "here", "there"]:
        """Whether it takes a Choice. here: of any rows, with the sampler itself. there: it takes a copy of the rows
        along, so not of rows that need counts or biases."""

    def warm_up(self, batch: int, sizes: Iterable[int], chunk_size: int) -> None:
        """Compile the functions for windows of these sizes and `batch` rows; size 1 is decoding."""

    def load(self, tensors: dict[str, Tensor] | None, batch: int) -> StateRef:
        """A state from these tensors (names of RecurrentState, on the CPU; never written to). None: a fresh state."""

    def take(self, rows: Sequence[RowRef | None]) -> StateRef:
        """A state from copies of these rows: this is how rows join, leave and fork. None: a fresh row."""

    def save(self, state: StateRef) -> Callable[[], dict[str, Tensor]]:
        """Begin to copy a state's tensors to the host. Call the result once, in any thread: it waits for them."""

    @property
    def has_room(self) -> bool:
        """Whether another step should be submitted to keep the workers busy; else fetch a result first."""

    def submit(self, state: StateRef, step: Step) -> StateRef:
        """Begin a step from a state; returns the state after it, which can be used at once."""

    def result(self) -> StepResult:
        """Wait for the oldest step whose result was not fetched yet, and return its result."""

    def forget(self) -> None:
        """Drop the results of all submitted steps."""

    def logits(self, hidden: Tensor) -> Callable[[], Tensor]:
        """Begin to compute logits (B, vocabulary) float32, on the CPU, of hidden (B, D). The result as of `save`."""

    @property
    def peak_memory_bytes(self) -> int:
        """The peak of the memory that matters for the device, summed over processes."""

    @property
    def restarts(self) -> int:
        """How many workers were replaced so far."""

    def close(self) -> None:
        """Free threads, weights and states."""


def run(executor: Executor, state: StateRef, steps: Iterable[Step]) -> Iterator[tuple[Step, StateRef, StepResult]]:
    """Run steps one after the other from a state. Yields each step with the state after it and its result."""
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
