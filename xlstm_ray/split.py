"""The split of a model's blocks over places of unlike speed and memory: the slowest stage is as fast as it can be."""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple

from xlstm_ray.errors import UsageError
from xlstm_ray.files import MIB

HELPS = 1.03  # a place counts only if the run would take this much longer without it
ANY_ORDER = 10  # up to so many places, any order of them is tried


class Place(NamedTuple):
    """Where a stage may be, as it was measured: seconds for a tile, bytes."""

    node: str  # Ray's id of the node
    host: str  # the machine's name
    room: int
    block_s: Mapping[str, float]  # of a block, by its kind
    first_s: float = 0.0  # of the embedding
    last_s: float = 0.0  # of the head, for one row


class Measured(NamedTuple):
    """All places of a grid. threads: of each actor there."""

    places: list[Place]
    threads: int


class Blocks(NamedTuple):
    """A model's blocks in their order, and the bytes that they need where they are."""

    kinds: Sequence[str]
    sizes: Sequence[int]  # of each block: weights and states
    first: int  # of the embedding
    last: int  # of the head
    each: int  # of any stage: its programs, and a tile


class Reserved(NamedTuple):
    """The node of a stage, by Ray's id, and the bytes that each of its actors needs there; 0: on its device."""

    node: str
    memory: int


class Stage(NamedTuple):
    """A stage in its place. seconds: for a tile. need: bytes."""

    place: Place
    blocks: range
    seconds: float
    need: int

    def __str__(self) -> str:
        blocks = f"blocks {self.blocks.start}-{self.blocks.stop - 1} on {self.place.host}"
        if not self.place.block_s:
            return f"{blocks}, the only place"
        each = ", ".join(f"{_ms(s)} a tile and {kind} block" for kind, s in self.place.block_s.items())
        room = f"{self.need / MIB:,.0f} of {self.place.room / MIB:,.0f} MiB"
        return f"{blocks} ({each}, {_ms(self.seconds)} in all; {room})"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:,.0f} ms" if seconds >= 0.1 else f"{1e3 * seconds:.3g} ms"


def split(places: Sequence[Place], blocks: Blocks) -> list[Stage]:
    """Stages in their order, at most one for each place: the slowest takes as little time as possible.

    A place that helps too little is left out. Up to ANY_ORDER places in any order, which is exact; more of them from
    the fastest to the slowest. Raises UsageError if the blocks do not fit.
    """
    if len(places) > ANY_ORDER:
        places = sorted(places, key=lambda place: sum(place.block_s.values()))
    seats = [_Seat(place, blocks) for place in places]
    least = _least(seats, len(places))
    if least is None:
        need = sum(blocks.sizes) + blocks.first + blocks.last + blocks.each * len(places)
        rooms = ", ".join(f"{place.room / MIB:,.0f} MiB on {place.host}" for place in places)
        raise UsageError(
            f"`stages` is auto, but the model's {need / MIB:,.0f} MiB in {len(places)} stage(s) do not fit: {rooms}; "
            "add nodes, or give a smaller `tile_size` or `dtype`"
        )
    few = next(n for n in range(1, len(places) + 1) if _fill(seats, HELPS * least, n))
    most = _least(seats, few)
    assert most is not None
    stages, start = [], 0
    for seat, stop in _fill(seats, most, few):
        stages.append(Stage(seat.place, range(start, stop), seat.seconds(start, stop), seat.need(start, stop)))
        start = stop
    return stages


class _Seat:
    """A place, with sums of its times and bytes up to each block."""

    def __init__(self, place: Place, blocks: Blocks):
        self.place, self._blocks, self.count = place, blocks, len(blocks.kinds)
        self._seconds = [0.0, *accumulate(place.block_s.get(kind, 0.0) for kind in blocks.kinds)]
        self._bytes = [0, *accumulate(blocks.sizes)]

    def seconds(self, start: int, stop: int) -> float:
        ends = self.place.first_s * (start == 0) + self.place.last_s * (stop == self.count)
        return self._seconds[stop] - self._seconds[start] + ends

    def need(self, start: int, stop: int) -> int:
        ends = self._blocks.first * (start == 0) + self._blocks.last * (stop == self.count)
        return self._bytes[stop] - self._bytes[start] + ends + self._blocks.each

    def reach(self, start: int, most_s: float) -> int:
        """The block before which a stage from `start` on must end, to take most_s at most and to fit."""
        most_s = most_s * (1 + 1e-9) + self._seconds[start] - self.place.first_s * (start == 0)
        most = self.place.room - self._blocks.each + self._bytes[start] - self._blocks.first * (start == 0)
        stop = min(bisect_right(self._seconds, most_s), bisect_right(self._bytes, most)) - 1
        if stop == self.count and (
            self._seconds[stop] + self.place.last_s > most_s or self._bytes[stop] + self._blocks.last > most
        ):
            stop -= 1
        return max(start, stop)


def _least(seats: Sequence[_Seat], few: int) -> float | None:
    """The least time of the slowest of up to `few` stages; None if nothing fits."""
    count = seats[0].count
    ends = [(a, b) for a in range(count) for b in range(a + 1, count + 1)]
    times = sorted({seat.seconds(a, b) for seat in seats for a, b in ends})
    low, high = 0, len(times)
    while low < high:
        middle = (low + high) // 2
        if _fill(seats, times[middle], few):
            high = middle
        else:
            low = middle + 1
    return times[low] if low < len(times) else None


def _fill(seats: Sequence[_Seat], most_s: float, few: int) -> list[tuple[_Seat, int]]:
    """Up to `few` seats and where the stage of each ends, none over most_s. Empty if there is no such split.

    Of two ways to use the same seats, the one that reaches further is as good or better: what begins at a later block
    ends at a later one, or at the same.
    """
    any_order, count = len(seats) <= ANY_ORDER, seats[0].count
    ways: list[tuple[tuple[int, int], ...]] = [()]  # each: seats by their numbers, and where their stages end
    for _ in range(few):
        best: dict[object, tuple[tuple[int, int], ...]] = {}
        for way in ways:
            used, start = [n for n, _ in way], way[-1][1] if way else 0
            for n in range(used[-1] + 1 if used and not any_order else 0, len(seats)):
                stop = start if n in used else seats[n].reach(start, most_s)
                if stop == count:
                    return [(seats[n], stop) for n, stop in (*way, (n, stop))]
                key = frozenset((*used, n)) if any_order else n
                if stop > start and (key not in best or stop > best[key][-1][1]):
                    best[key] = (*way, (n, stop))
        ways = list(best.values())
    return []
