"""What made each state: enough to make again, on other actors, every state that somebody still has.

Numbers and tensors that are held elsewhere only: nothing here computes or waits.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from xlstm_ray.runtime.executor import Step

Row = tuple[int, int] | None  # of a state, by its number; None: a fresh one


@dataclass(frozen=True)
class Made:
    """How a state came to be: from tensors on the host (`source` None: a fresh one), from rows of others, or by a step.

    order counts what was asked for, and a step's result goes by it.
    """

    state: int  # its number
    batch: int
    order: int = -1
    source: dict[str, Tensor] | None = None
    rows: Sequence[Row] = ()
    step: Step | None = None
    src: int = -1  # that the step was from; the state itself, where it was in place
    drop: tuple[int, ...] = ()  # states that nobody needs once what was asked for before this has been done

    @property
    def uses(self) -> set[int]:
        """The states that it is made of."""
        return {self.src} if self.step is not None else {row[0] for row in self.rows if row is not None}


class Lineage:
    """All that was made, in order, as far back as it may be needed. A state on the host needs nothing before it."""

    def __init__(self) -> None:
        self._made: list[Made] = []
        self._depth: dict[int, int] = {}  # by state: how many steps since the host had what it is made of

    def add(self, made: Made) -> None:
        """The next in order."""
        self._made.append(made)
        self._depth[made.state] = max([self._depth.get(n, 0) for n in made.uses], default=0) + (made.step is not None)

    def depth(self, state: int) -> int:
        """How many steps would have to be taken again to have this state."""
        return self._depth.get(state, 0)

    def kept(self, order: int, tensors: dict[str, Tensor]) -> None:
        """The host has the state that was made then."""
        before, self._made, self._depth = self._made, [], {}
        for made in before:
            self.add(made if made.order != order else replace(made, step=None, src=-1, source=tensors))

    def needed(self, states: Collection[int], results: int) -> list[Made]:
        """What has to be done again for these states, and for the results of steps from the order `results` on.

        Each names what may be dropped before it: what no later one uses and is not among `states`.
        """
        left, wanted = [], set(states)
        for made in reversed(self._made):
            if made.state in wanted or (made.step is not None and made.order >= results):
                wanted = (wanted - {made.state}) | made.uses
                left.append(made)
        return _with_drops(left[::-1], set(states))

    def prune(self, states: Collection[int], results: int) -> None:
        """Forget what is not needed any more."""
        self._made = [replace(made, drop=()) for made in self.needed(states, results)]
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
