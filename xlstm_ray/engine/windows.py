"""Plans which rows go together, and which tokens go into which window. Integers only: no torch, no device.

Windows lie on an absolute grid: a full window starts at a multiple of tile_size, a tail window at a multiple of
chunk_size. So there are at most two window sizes, and a prefill that is stopped at a window's end and resumed goes
through the same windows as an uninterrupted one. Rows of a batch share windows; a row's places before its first new
token or after its last are padding.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

GROUP_SIZES = 1, 4, 16  # rows of a call: code is compiled for each of these numbers


class Window(NamedTuple):
    """The tokens start <= t < start + size of every row."""

    number: int
    start: int
    size: int

    def part(self, begin: int, end: int) -> tuple[int, int]:
        """Which of this window's tokens start <= t < end are new in a row with new tokens begin..end; may be empty."""
        start = min(max(begin - self.start, 0), self.size)
        return start, min(max(end - self.start, start), self.size)


def plan_windows(begin: Sequence[int], end: Sequence[int], *, tile_size: int, chunk_size: int) -> Iterator[Window]:
    """The windows for rows whose tokens begin..end are new, in time order.

    A rest that is shorter than a tile takes chunk windows. A rest of more than 3/4 of a tile takes one padded tile,
    which costs less than many small calls.
    """
    assert tile_size % chunk_size == 0
    rows = [(b, e) for b, e in zip(begin, end, strict=True) if b < e]
    position, number = 0, 0
    while rows := [(b, e) for b, e in rows if position < e]:
        # No window without a token: it is skipped, as a run that resumes here would skip it.
        position = max(position, min(b for b, _ in rows) // chunk_size * chunk_size)
        rest = max(e for _, e in rows) - position
        size = tile_size if position % tile_size == 0 and rest * 4 > tile_size * 3 else chunk_size
        yield Window(number, position, size)
        position, number = position + size, number + 1


def window_sizes(begin: Sequence[int], end: Sequence[int], *, tile_size: int, chunk_size: int) -> list[int]:
    """The sizes of the planned windows, at most two: these have to be compiled."""
    sizes: set[int] = set()
    for window in plan_windows(begin, end, tile_size=tile_size, chunk_size=chunk_size):
        sizes.add(window.size)
        if len(sizes) == len({tile_size, chunk_size}):
            break
    return sorted(sizes, reverse=True)


def window_calls(
    groups: "Sequence[Group]", begin: Sequence[int], end: Sequence[int], *, tile_size: int, chunk_size: int
) -> list[tuple[int, int]]:
    """The shapes (rows, tokens) of all windows of these groups."""
    return [
        (group.size, window)
        for group in groups
        for window in window_sizes(
            [begin[b] for b in group.rows], [end[b] for b in group.rows], tile_size=tile_size, chunk_size=chunk_size
        )
    ] or [(1, chunk_size)]


class Group(NamedTuple):
    """Rows of a batch that share their windows, in a call for `size` rows: missing rows are empty."""

    rows: list[int]
    size: int


def group_size(rows: int) -> int:
    """The size of a call for this many rows: the smallest that holds all, or else the largest."""
    return next((size for size in GROUP_SIZES if size >= rows), GROUP_SIZES[-1])


def plan_groups(begin: Sequence[int], end: Sequence[int], *, tile_size: int, chunk_size: int) -> list[Group]:
    """Put every row, with new tokens begin..end, into one group. The shortest rows come first.

    A row that fills tiles gains nothing from other rows and goes alone. Of rows that take only chunk windows, up to 16
    go together if they begin in the same chunk and the shortest takes at least half as many windows as the longest. A
    call is at least half full.
    """

    def windows(b: int) -> list[int]:
        plan = plan_windows([begin[b]], [end[b]], tile_size=tile_size, chunk_size=chunk_size)
        return [window.size for window in plan]

    plans = [windows(b) for b in range(len(begin))]
    order = sorted(range(len(begin)), key=lambda b: (sum(plans[b]), begin[b] // chunk_size))
    groups = []
    while order:
        longest = order[-1]
        most_tokens = GROUP_SIZES[-1] * chunk_size
        most = max(size for size in GROUP_SIZES if size == 1 or size * max(plans[longest], default=1) <= most_tokens)
        near = [
            b
            for b in order[-most:]
            if sum(plans[b]) * 2 >= sum(plans[longest]) and begin[b] // chunk_size == begin[longest] // chunk_size
        ]
        size = max(size for size in GROUP_SIZES if size <= most and size <= len(near) * 2)
        groups.append(Group(near[-size:], size))
        order = [b for b in order if b not in groups[-1].rows]
    return groups[::-1]
