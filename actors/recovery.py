"""Work that survives the death of an actor: what made each state, and what makes it again on other actors.

Actors are never restarted by Ray: a fresh one would go on with no state. When one dies or hangs, another takes its
place, and all that made the states that somebody still has is done again from what the host has, to the same bits.
"""

import re
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from statistics import median
from time import perf_counter
from typing import Any

from torch import Tensor

from xlstm_ray.actors.lineage import Lineage, Made
from xlstm_ray.actors.link import Link
from xlstm_ray.actors.options import GridOptions
from xlstm_ray.actors.pipeline import Pending, Pipeline
from xlstm_ray.actors.placement import Placement
from xlstm_ray.actors.watch import Watch
from xlstm_ray.errors import GridLost, GridOutOfMemory, one_line
from xlstm_ray.runtime.executor import StepResult

PRUNE_EVERY = 64  # what was made between two looks at what of it is still needed


class Recovery:
    """Has actors do what they are asked for, and do it again where one of them is lost on the way.

    Every method raises GridLost where what is lost cannot be replaced.
    """

    def __init__(self, link: Link, placement: Placement, pipeline: Pipeline, watch: Watch, options: GridOptions):
        self._link, self._placement, self._pipeline, self._watch = link, placement, pipeline, watch
        self.options = options
        self._warm: list[tuple[int, int, int]] = []  # (batch, size, chunk) of windows that actors have compiled for
        self._lineage = Lineage()
        self._states: set[int] = set()  # that somebody has
        self._freed: deque[int] = deque()  # that nobody has any more, from any thread
        self._untold: set[int] = set()  # of these, what actors have not been told to drop
        self._waiting: deque[Made] = deque()  # that actors have not been asked for, or not again
        self._under_way: deque[Pending] = deque()
        self._ready: deque[StepResult] = deque()  # that nobody has asked for
        self._orders = 0
        self._next_result = 0  # the order of the first step whose result has not come; of those before none is wanted
        self._before = 0.0  # when the last result came, or the first step under way was asked for
        self._times: deque[float] = deque(maxlen=32)
        self._failures = 0  # since the last new result
        self._lost: GridLost | None = None

    # -- what is made --------------------------------------------------------------------------------------------------
    def make(self, made: Made) -> None:
        """Ask for a state. What it is made of was asked for before."""
        made = replace(made, order=self._orders)
        self._orders += 1
        self._states.add(made.state)
        self._lineage.add(made)
        if self._orders % PRUNE_EVERY == 0:
            self._take_freed()
            self._lineage.prune(self._states, self._next_result)
        self._waiting.append(made)
        self._ask_for_waiting()

    def free(self, state: int) -> None:
        """Nobody has this state any more. Any thread may say so, at any moment."""
        self._freed.append(state)

    def depth(self, state: int) -> int:
        """How many steps a fault would cost for this state."""
        return self._lineage.depth(state)

    @property
    def has_room(self) -> bool:
        """Whether another step would keep the actors busy."""
        # A state takes longer to come than a result: one step more, so that nobody runs out of work.
        depth = self._pipeline.depth + bool(self._under_way and self._under_way[0].states)
        return len(self._under_way) + len(self._waiting) + len(self._ready) < depth

    def result(self) -> StepResult:
        """The result of the oldest step whose result nobody has seen."""
        while not self._ready:
            assert self._waiting or self._under_way, "no step is under way"
            self._advance()
        return self._ready.popleft()

    def forget(self) -> None:
        """The results of what has been asked for are not wanted."""
        self._ready.clear()
        self._next_result = self._orders

    def save(self, state: int) -> dict[str, Tensor]:
        """A state's tensors."""

        def calls() -> list[Any]:
            while self._waiting:  # what it is made of
                self._advance()
            return self._pipeline.state(state)

        return self._pipeline.join(self.ask(calls))

    def warm_up(self, batch: int, sizes: list[int], chunk_size: int) -> None:
        """Have all actors, and those that will take their places, compile what windows of these sizes need."""
        self._warm += [(batch, size, chunk_size) for size in sizes]
        # Compiling takes as long as it takes, whatever the tiles before have taken.
        ask = self._placement.each
        self.ask(lambda: ask(self._placement.seats, "warm_up", batch, sizes, chunk_size), self.options.first_deadline_s)

    def ask(self, calls: Callable[[], list[Any]], timeout_s: float | None = None) -> list[Any]:
        """The values of what `calls` returns references to; called again after a recovery where an actor is gone.

        timeout_s: after which an actor is taken for hung; None: by what tiles take.
        """
        while True:
            self._require()
            try:
                if timeout_s is not None:
                    return self._link.get(calls(), timeout_s)
                return self._get_patiently(calls(), self._deadline(self._pipeline.depth + 1))
            except self._link.failure as error:
                self._recover(error)

    def _ask_for_waiting(self) -> None:
        """As much of it as keeps the actors busy."""
        self._require()
        while self._waiting and (self._waiting[0].step is None or len(self._under_way) <= self._pipeline.depth):
            made, *later = self._waiting
            drop = set() if later else self._take_freed() - made.uses  # what is later may still need them
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
        """Take the oldest result under way; recover where it does not come."""
        self._ask_for_waiting()
        if not self._under_way:
            return
        try:
            result = self._result(self._under_way[0], len(self._under_way))
        except self._link.failure as error:
            self._recover(error)
            return
        made, step, _, _ = self._under_way.popleft()
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
            self._ready.append(result)

    def _take_freed(self) -> set[int]:
        """The states that nobody has any more, and that actors have not been told of."""
        while self._freed:
            self._untold.add(self._freed.popleft())
        self._states -= self._untold
        return set(self._untold)

    def _require(self) -> None:
        if self._lost is not None:
            raise self._lost

    # -- waiting -------------------------------------------------------------------------------------------------------
    def _result(self, pending: Pending, under_way: int) -> StepResult:
        get = self._get_patiently if pending.states else self._link.get
        return self._pipeline.result(pending, get([pending.result, *pending.states], self._deadline(under_way)))

    def _get_patiently(self, refs: list[Any], timeout_s: float) -> list[Any]:
        """As Link.get, but waits for late results while nobody hangs: a batch's state may take a network minutes."""
        try:
            return self._link.get(refs, timeout_s)
        except self._link.ray.exceptions.GetTimeoutError:
            if self._placement.lost(self._longest_call_s):
                raise
        return self._link.get(refs, self.options.first_deadline_s)

    def _deadline(self, under_way: int) -> float:
        """Seconds after which a tile that has not come means that an actor hangs."""
        if not self._times:
            return self.options.first_deadline_s
        return max(self.options.least_deadline_s, 20 * under_way * median(self._times))

    @property
    def _longest_call_s(self) -> float:
        """After a result that was late: an actor that is in one call for longer hangs in it."""
        return self._deadline(1) / 2

    # -- faults --------------------------------------------------------------------------------------------------------
    def _recover(self, error: Exception) -> None:
        """Replace what is dead or hangs, and begin again with what is needed. GridLost where that cannot be."""
        try:
            self._begin_again(error)
        except GridLost as lost:
            self._lost = lost
            raise

    def _begin_again(self, error: Exception) -> None:
        while True:
            self._link.require_head()
            if isinstance(error, self._link.ray.exceptions.OutOfMemoryError):
                # What an actor takes does not grow with the prompt: another in its place would meet the same end.
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
                self._link.get(self._pipeline.reset(), self.options.first_deadline_s)
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
        """Other actors for those that are dead or hang, that have compiled what those had."""
        timed_out = isinstance(error, self._link.ray.exceptions.GetTimeoutError)
        lost = self._placement.lost(self._longest_call_s if timed_out else None)
        if timed_out and not lost:  # all answer and none works: what they wait for will not come
            lost = self._placement.seats
        if not lost:  # the error was of one that has been replaced already
            return
        self._watch.metrics.restarts(len(lost))
        self._placement.replace(lost)
        self._watch.place()
        for batch, size, chunk_size in self._warm:
            refs = self._placement.each(lost, "warm_up", batch, [size], chunk_size)
            self._link.get(refs, self.options.first_deadline_s)


def _out_of_memory(error: Exception) -> str:
    """Of Ray's long text, what was used of what there is."""
    text = one_line(error)
    found = re.search(r"Memory on the node .*? was ([\d.]+GB / [\d.]+GB)", str(error).replace("\n", " "))
    return f"{found[1]} used" if found else text
