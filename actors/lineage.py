"""Lineage: how each state was made, so that other actors can make every state again that somebody still has.

It has only numbers, and tensors that are also held elsewhere. Nothing here computes or waits.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from xlstm_ray.runtime.executor import Step

Row = tuple[int, int] | None  # of a state, by its number; None: a fresh one
KEEP = 256  # steps, at least, until a state is brought to the host
RATE, SHARE = 750e6, 0.05  # bytes a second of a state on its way, as measured; how much of the time it may take


def steps_until_kept(size: int, step_s: float) -> int:
    """After how many steps of `step_s` seconds a state of `size` bytes is brought to the host; a fault repeats them.

    16 rows of 7B are 2 GiB: 3 s, where a step of a stage takes a GPU 3 ms.
    """
    return max(KEEP, math.ceil(size / RATE / SHARE / max(step_s, 1e-6)))


@dataclass(frozen=True)
class Made:
    """How a state was made: from tensors on the host (`source` None: fresh), from rows of other states, or by a step.

    order counts requests; results of steps come in this order.
    """

    state: int  # its number
    batch: int
    order: int = -1
    source: dict[str, Tensor] | None = None
    rows: Sequence[Row] = ()
    step: Step | None = None
    src: int = -1  # the state before the step; the same state, if the step was in place
    drop: tuple[int, ...] = ()  # states to free before this one is made

    @property
    def uses(self) -> set[int]:
        """The states that it was made from."""
        return {self.src} if self.step is not None else {row[0] for row in self.rows if row is not None}


class Lineage:
    """All states in the order they were made, as far back as needed. A state on the host needs nothing before it."""

    def __init__(self) -> None:
        self._made: list[Made] = []
        self._depth: dict[int, int] = {}  # by state: steps since the last state on the host

    def add(self, made: Made) -> None:
        """Append the next one."""
        self._made.append(made)
        self._depth[made.state] = max([self._depth.get(n, 0) for n in made.uses], default=0) + (made.step is not None)

    def depth(self, state: int) -> int:
        """The number of steps that would be repeated to make this state again."""
        return self._depth.get(state, 0)

    def kept(self, order: int, tensors: dict[str, Tensor]) -> None:
        """Note that the host has the state with this order."""
        before, self._made, self._depth = self._made, [], {}
        for made in before:
            self.add(made if made.order != order else replace(made, step=None, src=-1, source=tensors))

    def needed(self, states: Collection[int], results: int) -> list[Made]:
        """What must be made again for these states, and for the results of steps from the order `results` on.

        `drop` of each: states that may be freed before it, since no later one uses them and `states` lacks them.
        """
        return _with_drops(self._left(states, results), set(states))

    def _left(self, states: Collection[int], results: int) -> list[Made]:
        left, wanted = [], set(states)
        for made in reversed(self._made):
            if made.state in wanted or (made.step is not None and made.order >= results):
                wanted.discard(made.state)
                wanted |= made.uses
                left.append(made)
        return left[::-1]

    def prune(self, states: Collection[int], results: int) -> None:
        """Forget everything that is no longer needed."""
        self._made = self._left(states, results)
        alive = {made.state for made in self._made}
        self._depth = {state: depth for state, depth in self._depth.items() if state in alive}

    def __len__(self) -> int:
        return len(self._made)


def _with_drops(all_made: list[Made], stay: set[int]) -> list[Made]:
    last: dict[int, int] = {}
    for n, made in enumerate(all_made):
        last |= dict.fromkeys({made.state, *made.uses}, n)
    drops: dict[int, list[int]] = {}
    for state, n in last.items():
        if state not in stay:
            drops.setdefault(n + 1, []).append(state)
    return [replace(made, drop=tuple(drops.get(n, ()))) for n, made in enumerate(all_made)]
