"""What an engine has done for requests, and what its cache keeps: values that a replica tells of itself."""

from bisect import bisect_left
from collections.abc import Mapping
from typing import Literal, NamedTuple, get_args

StepKind = Literal["prefill", "decode", "stall", "snapshot", "park"]
BOUNDS = 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5  # seconds


class Spread(NamedTuple):
    """How long something took, each time. counts: how often up to each bound, and over the one before; the last: longer

    than all. seconds: in all.
    """

    counts: tuple[int, ...]
    seconds: float


class KeptStates(NamedTuple):
    """What a cache keeps. bytes, evicted: by tier; evicted: states that have made room for others. unwritten: states on
    their way to files."""

    states: int
    bytes: Mapping[str, int]
    evicted: Mapping[str, int]
    unwritten: int


class Figures(NamedTuple):
    """Of one engine since it serves. steps: by kind; a `stall` is what rows that decode have waited for other work

    between two of their tokens. kept: None where there is no cache.
    """

    steps: Mapping[StepKind, Spread]
    kept: KeptStates | None


class Steps:
    """Counts steps; one thread adds, and any may ask."""

    def __init__(self) -> None:
        self._counts = {kind: [0] * (len(BOUNDS) + 1) for kind in get_args(StepKind)}
        self._seconds = dict.fromkeys(self._counts, 0.0)

    def add(self, kind: StepKind, seconds: float) -> None:
        """One was made."""
        self._counts[kind][bisect_left(BOUNDS, seconds)] += 1
        self._seconds[kind] += seconds

    def spreads(self) -> dict[StepKind, Spread]:
        """All of them, up to now."""
        return {kind: Spread(tuple(counts), self._seconds[kind]) for kind, counts in self._counts.items()}
