"""Recovery: work that survives the death of actors.

Ray never restarts actors: a restarted one would have no state. If an actor dies or hangs, another takes its place, and
the states that somebody still has are made again from the host's snapshots, to the same bits.
"""

import re
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from xlstm_ray.actors.lineage import Lineage, Made, steps_until_kept
from xlstm_ray.actors.link import Link
from xlstm_ray.actors.options import GridOptions
from xlstm_ray.actors.pipeline import Pending, Pipeline
from xlstm_ray.actors.placement import Placement
from xlstm_ray.actors.watch import Watch
from xlstm_ray.actors.wire import from_wire
from xlstm_ray.errors import GridLost, GridOutOfMemory, one_line
from xlstm_ray.runtime.executor import Step, StepResult

PRUNED = 64  # states made since the lineage was pruned, before it is again: these, and as many as it had then


class Recovery:
    """Has actors do the work, and repeats it if an actor is lost.

    Every method raises GridLost if a lost actor cannot be replaced.
    """

    def __init__(self, link: Link, placement: Placement, pipeline: Pipeline, watch: Watch, options: GridOptions):
        self._link, self._placement, self._pipeline, self._watch = link, placement, pipeline, watch
        self.options = options
        self._warm: list[tuple[int, int, int]] = []  # (batch, size, chunk) of the windows that actors have compiled
        self._lineage, self._prune_at = Lineage(), PRUNED
        self._states: set[int] = set()  # states that somebody has
        self._freed: deque[int] = deque()  # states that nobody has any more; filled from any thread
        self._untold: set[int] = set()  # freed states that actors were not told to drop yet
        self._waiting: deque[Made] = deque()  # requests that actors have not got yet, or not again
        self._under_way: deque[Pending] = deque()
        self._ready: deque[tuple[tuple[int, Step], StepResult]] = deque()  # results that nobody has fetched
        self._orders = 0
        self._next_result = 0  # the order of the first step without a result; earlier ones are not wanted
        self._before = 0.0  # time of the last result, or of the request of the first step in flight
        self._times: deque[float] = deque(maxlen=32)
        self._failures = 0  # failures since the last new result
        self._lost: GridLost | None = None

    # -- what is made --------------------------------------------------------------------------------------------------
    def make(self, made: Made) -> None:
        """Request a state. The states that it is made from were requested before."""
        made = replace(made, order=self._orders)
        self._orders += 1
        self._states.add(made.state)
        self._lineage.add(made)
        if len(self._lineage) >= self._prune_at:
            self._take_freed()
            self._lineage.prune(self._states, self._next_result)
            self._prune_at = 2 * len(self._lineage) + PRUNED
        self._waiting.append(made)
        self._ask_for_waiting()

    def free(self, state: int) -> None:
        """Note that nobody has this state any more. Any thread may call this at any time."""
        self._freed.append(state)

    def is_due(self, state: int, size: int) -> bool:
        """Whether the state after the next step of this one, of `size` bytes, should be brought here."""
        steps = self._lineage.depth(state) + 1
        return bool(self._times) and steps >= steps_until_kept(size, median(self._times))

    @property
    def has_room(self) -> bool:
        """Whether another step would keep the actors busy."""
        # Fetching a state is slower than a result: keep one more step in flight.
        depth = self._depth + bool(self._under_way and self._under_way[0].step.keep)
        return len(self._under_way) + len(self._waiting) + len(self._ready) < depth

    @property
    def _depth(self) -> int:
        """Steps in flight that keep the actors busy."""
        reads = any(pending.step.chunk_size > 1 for pending in self._under_way)
        return self._placement.depth if reads else self._placement.token_depth

    def result(self) -> tuple[tuple[int, Step], StepResult]:
        """The oldest step that was not fetched yet, with the number of the state after it; and its result."""
        while not self._ready:
            assert self._waiting or self._under_way, "no step is in flight"
            self._advance()
        return self._ready.popleft()

    def forget(self) -> None:
        """Drop the results of all requested steps."""
        self._ready.clear()
        self._next_result = self._orders

    def save(self, state: int) -> dict[str, Tensor]:
        """A state's tensors."""

        return self._pipeline.join(self._of_state(lambda: self._pipeline.state(state)))

    def last_logits(self, state: int, row: int) -> Tensor:
        """Logits (vocabulary,) of a row of this state's last step, whose tokens the last stage chose."""
        (logits,) = self._of_state(lambda: self._pipeline.last_logits(state, row))
        return from_wire(logits, torch.float32).clone()

    def _of_state(self, ask: Callable[[], list[Any]]) -> list[Any]:
        def calls() -> list[Any]:
            while self._waiting:  # the states that it is made from
                self._advance()
            return self._link.ask(ask)

        return self.ask(calls)

    def warm_up(self, batch: int, sizes: list[int], chunk_size: int) -> None:
        """Have all actors, and later their replacements, compile for windows of these sizes."""
        self._warm += [(batch, size, chunk_size) for size in sizes]
        # No deadline from earlier tiles: compiling may take much longer.
        ask = self._placement.each
        self.ask(lambda: ask(self._placement.seats, "warm_up", batch, sizes, chunk_size), self.options.first_deadline_s)

    def ask(self, calls: Callable[[], list[Any]], timeout_s: float | None = None) -> list[Any]:
        """The values of the references that `calls` returns. After a lost actor and recovery, `calls` is called again.

        timeout_s: after it, an actor counts as hung; None: a deadline from the time of tiles.
        """
        while True:
            self._require()
            try:
                if timeout_s is not None:
                    return self._link.get(calls(), timeout_s)
                return self._get_patiently(calls(), self._deadline(self._depth + 1))
            except self._link.failure as error:
                self._recover(error)

    def _ask_for_waiting(self) -> None:
        """Submit waiting requests until the actors are busy."""
        self._require()
        while self._waiting and (self._waiting[0].step is None or len(self._under_way) <= self._depth):
            made, *later = self._waiting
            drop = set() if later else self._take_freed() - made.uses  # later requests may still need them
            if not self._under_way:
                self._before = perf_counter()
            try:
                pending = self._pipeline.make(made, drop)
            except self._link.failure as error:
                self._recover(error)
                continue
            self._untold -= drop
            self._waiting.popleft()
            if pending is not None:
                self._under_way.append(pending)

    def _advance(self) -> None:
        """Fetch the oldest result in flight; recover if it does not come."""
        self._ask_for_waiting()
        if not self._under_way:
            return
        try:
            result = self._result(self._under_way[0], len(self._under_way))
        except self._link.failure as error:
            self._recover(error)
            return
        made, step, _ = self._under_way.popleft()
        now = perf_counter()
        result, self._before = result._replace(seconds=now - self._before), now
        self._times.append(result.seconds)
        self._watch.tile(step, result.seconds, len(self._under_way))
        if result.state is not None:
            self._lineage.kept(made.order, result.state)
            self._lineage.prune(self._states, self._next_result)
        if made.order >= self._next_result:
            self._next_result = made.order + 1
            self._failures = 0
            self._ready.append(((made.state, step), result))

    def _take_freed(self) -> set[int]:
        """The states that nobody has any more, and that actors still have."""
        while self._freed:
            self._untold.add(self._freed.popleft())
        self._states -= self._untold
        return set(self._untold)

    def _require(self) -> None:
        if self._lost is not None:
            raise self._lost

    # -- waiting -------------------------------------------------------------------------------------------------------
    def _result(self, pending: Pending, under_way: int) -> StepResult:
        get = self._get_patiently if pending.step.keep else self._link.get
        return self._pipeline.result(pending, get(self._link.answer(pending.refs), self._deadline(under_way)))

    def _get_patiently(self, refs: list[Any], timeout_s: float) -> list[Any]:
        """Link.get, but it waits longer while no actor hangs: a batch's state may take minutes over a network."""
        try:
            return self._link.get(refs, timeout_s)
        except self._link.ray.exceptions.GetTimeoutError:
            if self._placement.lost(self._longest_call_s):
                raise
        return self._link.get(refs, self.options.first_deadline_s)

    def _deadline(self, under_way: int) -> float:
        """The deadline of a tile in seconds: after it, an actor may hang."""
        if not self._times:
            return self.options.first_deadline_s
        return max(self.options.least_deadline_s, 20 * under_way * self._pipeline.usual(self._times))

    @property
    def _longest_call_s(self) -> float:
        """After a late result: an actor that is in one call for longer than this hangs."""
        return self._deadline(1) / 2

    # -- faults --------------------------------------------------------------------------------------------------------
    def _recover(self, error: Exception) -> None:
        """Replace dead and hung actors, and request again what is needed. Raises GridLost if that fails."""
        try:
            self._begin_again(error)
        except GridLost as lost:
            self._lost = lost
            raise

    def _begin_again(self, error: Exception) -> None:
        while True:
            self._link.require_head()
            if isinstance(error, self._link.ray.exceptions.OutOfMemoryError):
                # An actor's memory does not grow with the prompt, so a replacement would run out of memory too.
                raise GridOutOfMemory(
                    f"a node ran out of memory, and Ray ended an actor there: {_out_of_memory(error)}; free memory, or "
                    "use a smaller `tile_size`, fewer `stages` on that node, or more nodes"
                ) from error
            self._failures += 1
            if self._failures > self.options.retries:
                steps = (made.step for made in self._lineage.needed((), self._next_result))  # of what is waited for
                first = next(filter(None, steps), None)
                where = f"tile {first.number}" if first else "a state"
                raise GridLost(
                    f"the grid failed {self._failures} times in a row from {where} on; the last time: "
                    f"{one_line(error)}{self._link.why()}"
                ) from error
            try:
                self._replace(error)
                self._link.get(self._link.ask(self._pipeline.reset), self.options.first_deadline_s)
            except self._link.failure as again:
                error = again
                continue
            self._under_way.clear()
            self._take_freed()
            self._waiting = deque(self._lineage.needed(self._states, self._next_result))
            made = {one.state for one in self._waiting}
            self._untold = made - self._states - {n for one in self._waiting for n in one.drop}
            return

    def _replace(self, error: Exception) -> None:
        """Replace dead and hung actors; the new ones compile the same windows."""
        timed_out = isinstance(error, self._link.ray.exceptions.GetTimeoutError)
        lost = self._placement.lost(self._longest_call_s if timed_out else None)
        if timed_out and not lost:  # all answer and none works: their inputs are lost
            lost = self._placement.seats
        if not lost:  # the error came from an actor that was replaced already
            return
        self._watch.metrics.restarts(len(lost))
        self._placement.replace(lost)
        self._watch.place()
        for batch, size, chunk_size in self._warm:
            refs = self._placement.each(lost, "warm_up", batch, [size], chunk_size)
            self._link.get(refs, self.options.first_deadline_s)


def _out_of_memory(error: Exception) -> str:
    """The used and total memory from Ray's long message."""
    text = one_line(error)
    found = re.search(r"Memory on the node .*? was ([\d.]+GB / [\d.]+GB)", str(error).replace("\n", " "))
    return f"{found[1]} used" if found else text
