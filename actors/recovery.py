"""Work that survives the death of an actor: the last snapshot, the tiles since, and what brings all back to them.

Actors are never restarted by Ray: a fresh one would go on with an empty state. When one dies or hangs, another takes
its place, all actors are set back to the last snapshot, and the tiles since are played again, to the same bits.
"""

import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from statistics import median
from time import perf_counter
from typing import Any

from torch import Tensor

from xlstm_ray.actors.link import Link
from xlstm_ray.actors.options import GridOptions
from xlstm_ray.actors.pipeline import Pending, Pipeline, Step
from xlstm_ray.actors.placement import Placement
from xlstm_ray.actors.watch import Watch
from xlstm_ray.errors import GridLost, GridOutOfMemory, one_line
from xlstm_ray.runtime.executor import TileResult


class Recovery:
    """Has actors do what they are asked for, and do it again where one of them is lost on the way.

    Every method raises GridLost where what is lost cannot be replaced.
    """

    def __init__(self, link: Link, placement: Placement, pipeline: Pipeline, watch: Watch, options: GridOptions):
        self._link, self._placement, self._pipeline, self._watch = link, placement, pipeline, watch
        self.options = options
        self._warm: list[tuple[int, int]] = []  # (batch, size) of windows that actors have compiled for
        self._snapshot: tuple[dict[str, Tensor] | None, int] = (None, 1)  # tensors of all heads, batch
        self._log: deque[Step] = deque()  # since the snapshot
        self._behind = False  # whether the actors are at the snapshot, with the log still to be played
        self._last_seen = -1  # number of the last step whose result was handed out
        self._times: deque[float] = deque(maxlen=32)
        self._failures = 0  # since the last new result

    @property
    def steps_since_snapshot(self) -> int:
        """How many steps a fault would cost now."""
        return len(self._log)

    def warm_up(self, batch: int, sizes: list[int]) -> None:
        """Have all actors, and those that will take their places, compile what windows of these sizes need."""
        self._warm += [(batch, size) for size in sizes]
        # Compiling takes as long as it takes, whatever the tiles before have taken.
        ask = self._placement.each
        self.ask(lambda: ask(self._placement.seats, "warm_up", batch, sizes), self.options.first_deadline_s)

    def set_state(self, tensors: dict[str, Tensor] | None, batch: int) -> None:
        """Begin anew from these tensors of all heads, or from a fresh state."""
        self._snapshot = (tensors, batch)
        self._log.clear()
        self.ask(self._restore)

    def ask(self, calls: Callable[[], list[Any]], timeout_s: float | None = None) -> list[Any]:
        """The values of what `calls` returns references to; called again after a recovery where an actor is gone.

        timeout_s: after which an actor is taken for hung; None: by what tiles take.
        """
        while True:
            try:
                if timeout_s is not None:
                    return self._link.get(calls(), timeout_s)
                return self._get_patiently(calls(), self._deadline(self._pipeline.depth + 1))
            except self._link.failure as error:
                self._recover(error)

    def play(self, steps: Iterable[Step]) -> Iterator[TileResult]:
        """Plays steps again that the actors have forgotten, then new ones, and recovers on the way.

        Yields the results that nobody has seen. Between two of them another call may have had to recover.
        """
        new = iter(steps)
        waiting: deque[Step] = deque()
        under_way: deque[Pending] = deque()
        before = perf_counter()
        while True:
            if self._behind:
                self._behind = False
                under_way.clear()
                waiting = deque(self._log)
                before = perf_counter()
            try:
                # A state takes longer to come than a tile's result: one tile more, so that nobody runs out of work.
                while len(under_way) < self._pipeline.depth + bool(under_way and under_way[0].states):
                    step = waiting.popleft() if waiting else next(new, None)
                    if step is None:
                        break
                    if not self._log or step.number > self._log[-1].number:
                        self._log.append(step)
                    under_way.append(self._pipeline.submit(step))
                if not under_way:
                    return
                result = self._result(under_way[0], len(under_way))
            except self._link.failure as error:
                self._recover(error)
                continue
            step = under_way.popleft().step
            now = perf_counter()
            result, before = result._replace(seconds=now - before), now
            self._times.append(result.seconds)
            self._watch.tile(step.tile, result.seconds, len(under_way))
            if result.state is not None:
                self._snapshot = result.state, self._snapshot[1]
                while self._log and self._log[0].number <= step.number:
                    self._log.popleft()
            if step.number > self._last_seen:
                self._last_seen = step.number
                self._failures = 0
                yield result

    def _restore(self) -> list[Any]:
        """References, one a seat: all actors at the snapshot."""
        return self._pipeline.restore(*self._snapshot)

    # -- waiting -------------------------------------------------------------------------------------------------------
    def _result(self, pending: Pending, under_way: int) -> TileResult:
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
        """Replace what is dead or hangs, and set all actors back to the snapshot. GridLost where that cannot be."""
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
                where = f"tile {self._log[0].tile.number}" if self._log else "a snapshot"
                raise GridLost(
                    f"the grid failed {self._failures} times in a row from {where} on; the last time: {one_line(error)}"
                ) from error
            try:
                self._replace(error)
                self._link.get(self._restore(), self.options.first_deadline_s)
                self._behind = True
                return
            except self._link.failure as again:
                error = again

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
        for batch, size in self._warm:
            self._link.get(self._placement.each(lost, "warm_up", batch, [size]), self.options.first_deadline_s)


def _out_of_memory(error: Exception) -> str:
    """Of Ray's long text, what was used of what there is."""
    text = one_line(error)
    found = re.search(r"Memory on the node .*? was ([\d.]+GB / [\d.]+GB)", str(error).replace("\n", " "))
    return f"{found[1]} used" if found else text
