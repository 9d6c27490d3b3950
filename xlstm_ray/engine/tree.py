"""The tree of states: which states are kept, by the tokens that they have seen. Only hashes and integers, no torch.

The tree stores hashes of prompts' beginnings, so it needs no tokens and never splits a node. A node is a beginning of
some prompt: at every STEP tokens, and where a state is kept. The nodes show where prompts part.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import Any, NamedTuple

from xlstm_ray.engine.windows import Group, plan_windows
from xlstm_ray.text.ondisk import TokenFile

STEP = 64  # tokens: the place where two prompts part is known to this precision
LINKS = 1 << 14  # hashes of a prompt that are kept
READ = 1 << 16  # tokens that are looked at together, some steps
NODES = 1 << 16  # beginnings without a state that are remembered
EVICTED = 256  # evicted states that are remembered
KEPT_A_PROMPT = 8  # the most states that are kept along a long prompt

MEMORY, DISK = "memory", "disk"


def root_of(model: str, salt: str) -> bytes:
    """The first hash of all prompts of a model and tenant: models and tenants share nothing."""
    return hashlib.blake2b(f"xlstm-ray tree {model} {salt}".encode(), digest_size=16).digest()


class Chain:
    """The hashes of a prompt's beginnings. tokens: int32, contiguous, or in a file.

    every: tokens between two hashes that are kept. Of a prompt of more than a million tokens some are left out, so that
    they take no more memory. begun: the chain of a beginning.
    """

    def __init__(self, root: bytes, tokens: memoryview | TokenFile, begun: "Chain | None" = None):
        self.root, self.length, self.every = root, len(tokens), STEP
        while self.length // self.every > LINKS:
            self.every *= 2
        self._tokens = tokens
        self._links: list[bytes] = [root] if begun is None or begun.every != self.every else [*begun._links]
        done, steps = (len(self._links) - 1) * self.every, self.every // STEP
        hashes = self._hashes(self._links[-1], done, self.length // self.every * self.every)
        self._links += islice(hashes, steps - 1, None, steps)

    @property
    def places(self) -> range:
        """The lengths of the beginnings whose hashes are kept."""
        return range(self.every, self.length + 1, self.every)

    def at(self, length: int) -> bytes:
        """The hash of the first `length` tokens."""
        block, rest = divmod(length, self.every)
        value = self._links[block]
        for later in self._hashes(value, length - rest, length):
            value = later
        return value

    def kept(self) -> Iterator[tuple[int, bytes]]:
        """The places, and the hashes there."""
        return zip(self.places, self._links[1:], strict=True)

    def _hashes(self, value: bytes, start: int, end: int) -> Iterator[bytes]:
        """The hashes after each step up to `end`; value: of the first `start` tokens."""
        for begin in range(start, end, READ):
            data = self._tokens[begin : min(end, begin + READ)].tobytes()
            for at in range(0, len(data), 4 * STEP):
                value = hashlib.blake2b(value + data[at : at + 4 * STEP], digest_size=16).digest()
                yield value


class Run(NamedTuple):
    """The windows of a row from its first token on, in calls of `rows` rows. With the numerics they decide its bits."""

    length: int  # tokens
    tile: int
    chunk: int
    tiled: int  # tokens in its windows of a tile's size; smaller windows follow
    rows: int = 1

    @classmethod
    def alone(cls, length: int, *, tile: int, chunk: int) -> "Run":
        """The run of one prompt of this many tokens."""
        return cls.in_group(Group([0], 1), 0, [length], tile=tile, chunk=chunk)

    @classmethod
    def in_group(cls, group: Group, b: int, ends: Sequence[int], *, tile: int, chunk: int) -> "Run":
        """The run of row b of a group whose rows begin at 0. ends: the lengths of all rows of the batch."""
        # A row alone fills its tiles: only the last ones need a plan.
        begin = max(0, ends[b] // tile - 1) * tile if len(group.rows) == 1 else 0
        begins = [begin] * len(group.rows)
        windows = plan_windows(begins, [ends[r] for r in group.rows], tile_size=tile, chunk_size=chunk)
        tiled = max((w.start + w.size for w in windows if w.size == tile), default=begin)
        return cls(ends[b], tile, chunk, tiled, group.size)

    def tiles(self, place: int) -> int | None:
        """The number of windows of a tile's size before this place; None if no window of this run ends there."""
        size = self.tile if place <= self.tiled else self.chunk
        if place > self.length or (place < self.length and place % size):
            return None
        return min(-(-place // self.tile), self.tiled // self.tile)

    def end_before(self, place: int) -> int:
        """The end of the last window that ends at this place or before."""
        place = min(place, self.length)
        if place == self.length or place <= self.tiled:
            return place if place == self.length else place // self.tile * self.tile
        return max(self.tiled, place // self.chunk * self.chunk)


@dataclass(eq=False)
class Entry:
    """A kept state. rows, tiles: the calls that made it, as in Run; tiles is -1 if no cold run makes it.

    saved: the tokens to compute again without it. likely: whether prompts are likely to go on from it; such a state is
    written first. what: the owner's data.
    """

    key: bytes  # the hash of its tokens
    root: bytes
    length: int
    numerics: str
    rows: int
    tiles: int
    size: int  # bytes
    parent: "Entry | None" = None  # the nearest state before it
    children: "set[Entry]" = field(default_factory=set)
    tiers: set[str] = field(default_factory=set)
    leases: int = 0
    used: int = 0
    likely: bool = False
    what: Any = None

    @property
    def saved(self) -> int:
        return self.length - (self.parent.length if self.parent else 0)

    @cached_property
    def name(self) -> str:
        """Its file's name: a hash, so that no salt can make it a path."""
        text = f"{self.key.hex()} {self.length} {self.numerics} {self.rows} {self.tiles}"
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


class Found(NamedTuple):
    """entry: the state to go on from; None: there is none. reason: why it is not longer; None: it is the whole prompt.

    known: the number of tokens that some earlier prompt began with too.
    """

    entry: Entry | None
    known: int
    reason: str | None

    @property
    def length(self) -> int:
        return self.entry.length if self.entry else 0


class _Node:
    """A beginning. next: the tokens of the shortest known beginning that continues it; 0: there is none."""

    __slots__ = ("entries", "next")

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.next = 0


class Tree:
    """The kept states of all tenants. budgets: the bytes of each tier."""

    def __init__(self, budgets: dict[str, int]):
        self.budgets, self.used = budgets, dict.fromkeys(budgets, 0)
        self.entries: set[Entry] = set()
        self.evicted = dict.fromkeys(budgets, 0)  # by tier: how many states have made room for others
        self._nodes: dict[bytes, _Node] = {}
        self._lengths: dict[bytes, Counter[int]] = {}
        self._gone: dict[str, Entry] = {}  # by name, the oldest first
        self._clock = 0

    # -- looking up ----------------------------------------------------------------------------------------------------
    def longest(
        self, chain: Chain, run: Run, numerics: str, *, exact: bool = True, after: int = 0, whole: bool = True
    ) -> Found:
        """The state with the most tokens, more than `after`, from which a prompt can go on.

        exact: only states with the bits of a cold run of this prompt. whole: the state may be that of the whole prompt,
        so that nothing is computed.
        """
        last, other, best = run.length if whole else run.length - 1, False, None
        known = self._known(chain)

        def fits(entry: Entry) -> bool:
            return entry.numerics == numerics and (not exact or _same(entry, run))

        for length in sorted((n for n in self._lengths.get(chain.root, ()) if n <= run.length), reverse=True):
            node = self._nodes.get(chain.at(length))
            if node is None or not node.entries:
                continue
            known = max(known, length)
            found = [e for e in node.entries if fits(e)] if after < length <= last else []
            if found:
                best = max(found, key=lambda e: (MEMORY in e.tiers, e.rows == run.rows))
                self.touch(best)
                break
            other = other or any(e.numerics != numerics or e.rows != run.rows for e in node.entries)
        start = best.length if best else after
        if start >= last:
            return Found(best, known, None)
        if other:
            return Found(best, known, "other numerics")
        gone = (e for e in self._gone.values() if start < e.length <= last and e.root == chain.root and fits(e))
        if any(chain.at(e.length) == e.key for e in gone):
            return Found(best, known, "evicted")
        node = self._nodes.get(chain.at(known))
        parted = known > 0 and node is not None and 0 < node.next <= chain.length
        return Found(best, known, f"diverged at {known}" if parted else "none seen")

    def _known(self, chain: Chain) -> int:
        """The number of tokens, in whole steps, that an earlier prompt began with too."""
        return next((n for n in reversed(chain.places) if chain.at(n) in self._nodes), 0)

    def next_after(self, found: Found, root: bytes) -> list[Entry]:
        """The first states that a prompt has not begun with, of each prompt; those after `found.entry` come last."""
        longer = [e for e in self.entries if e.root == root and e.length > found.known]
        first = [e for e in longer if e.parent is None or e.parent.length <= found.known]
        return sorted(first, key=lambda e: (e.parent is not None and e.parent is found.entry, e.used))

    def see(self, chain: Chain) -> None:
        """Remember this prompt's beginnings: where a later prompt parts from it, a state is worth keeping."""
        before = None
        for place, key in chain.kept():
            node = self._nodes.get(key)
            if node is None or (before is not None and before.next != place):
                node = self._link(before, key, place)
            before = node
        if len(self._nodes) > NODES + len(self.entries):
            free = [key for key, node in self._nodes.items() if not node.entries]
            for key in free[: len(free) - NODES * 3 // 4]:
                del self._nodes[key]

    def points(self, run: Run, found: Found, *, every: int | None = None, asked: Iterable[int] = ()) -> set[int]:
        """The positions where a run that goes on from `found` must keep its state.

        They are: every `every` tiles (None: at most KEPT_A_PROMPT, at places that prompts of all lengths share), and
        those of `likely`.
        """
        if every is None:
            every = 1
            while run.length // (run.tile * every) > KEPT_A_PROMPT:
                every *= 2
        apart = every * run.tile
        places = {*range(apart, run.length + 1, apart), *self.likely(run, found, asked)}
        return {n for n in places if n > found.length and run.tiles(n) is not None}

    @staticmethod
    def likely(run: Run, found: Found, asked: Iterable[int] = ()) -> set[int]:
        """The positions in a run where later prompts are likely to go on: its last whole tile, its end, where it parts
        from an earlier prompt, and where the caller asks (`asked`)."""
        parts = {run.end_before(n) for n in (found.known, found.known // run.tile * run.tile, *asked)}
        return {run.length // run.tile * run.tile, run.length, *parts}

    # -- what is kept --------------------------------------------------------------------------------------------------
    def add(self, chain: Chain, run: Run, numerics: str, length: int, *, size: int, tiles: int | None = None) -> Entry:
        """The entry of the state after `length` tokens of a run; a new entry is in no tier yet.

        tiles: -1 if no cold run has that state.
        """
        made = run.tiles(length) if tiles is None else tiles
        assert made is not None
        entry = Entry(chain.at(length), chain.root, length, numerics, run.rows, made, size)
        shorter = sorted((n for n in self._lengths.get(chain.root, ()) if n < length), reverse=True)
        near = (self._nodes.get(chain.at(n)) for n in shorter)
        parents = (e for node in near if node for e in node.entries if e.numerics == numerics)
        entry = self.insert(entry, next(parents, None))
        if entry.parent is not None:  # it becomes the parent of the entries that follow it
            for child in [c for c in entry.parent.children if length < c.length <= chain.length]:
                if child is not entry and chain.at(child.length) == child.key:
                    self.adopt(entry, child)
        return entry

    def insert(self, entry: Entry, parent: Entry | None) -> Entry:
        """Add an entry to its node; an equal entry that is there already is returned instead."""
        node = self._nodes.setdefault(entry.key, _Node())
        same = [e for e in node.entries if e.name == entry.name]
        if same:
            self.touch(same[0])
            return same[0]
        self._gone.pop(entry.name, None)
        node.entries.append(entry)
        self.entries.add(entry)
        self._lengths.setdefault(entry.root, Counter())[entry.length] += 1
        if parent is not None:
            self.adopt(parent, entry)
        self.touch(entry)
        return entry

    def adopt(self, parent: Entry, child: Entry) -> None:
        """Make one entry the parent of another: the nearest state before it."""
        self._link(self._nodes.get(parent.key), child.key, child.length)
        if child.parent is not None:
            child.parent.children.discard(child)
        child.parent = parent
        parent.children.add(child)

    def nearest(self, key: bytes, numerics: str) -> Entry | None:
        """An entry by the hash of its tokens."""
        node = self._nodes.get(key)
        return next((e for e in node.entries if e.numerics == numerics), None) if node else None

    def touch(self, entry: Entry) -> None:
        """Note that it was used now."""
        self._clock += 1
        entry.used = self._clock

    def put(self, entry: Entry, tier: str) -> None:
        """Note that it is in this tier now."""
        if tier not in entry.tiers:
            entry.tiers.add(tier)
            self.used[tier] += entry.size

    def drop(self, entry: Entry, tier: str = "") -> None:
        """Note that it is no longer in this tier. An entry in no tier is removed, and remembered as evicted."""
        assert not (entry.leases and tier == MEMORY)
        if tier in entry.tiers:
            entry.tiers.remove(tier)
            self.used[tier] -= entry.size
        if entry.tiers or entry not in self.entries or entry.leases:
            return
        self.entries.remove(entry)
        node = self._nodes[entry.key]
        node.entries.remove(entry)
        self._gone[entry.name] = entry
        if len(self._gone) > EVICTED:
            del self._gone[next(iter(self._gone))]
        lengths = self._lengths[entry.root]
        lengths[entry.length] -= 1
        if not lengths[entry.length]:
            del lengths[entry.length]
        if entry.parent is not None:
            entry.parent.children.discard(entry)
        for child in list(entry.children):
            child.parent = entry.parent
            if entry.parent is not None:
                entry.parent.children.add(child)

    def lowest(self, tier: str) -> list[Entry]:
        """The entries that may leave this tier, the least valuable first: saved tokens a byte, over the time since use.

        Leased entries are in use and never among them.
        """
        free = [e for e in self.entries if tier in e.tiers and not e.leases]
        return sorted(free, key=lambda e: e.saved / max(e.size, 1) / (self._clock - e.used + 1))

    def fit(self, tier: str, new: int = 0) -> list[Entry]:
        """Evict the least valuable entries until `new` more bytes are in the budget, or only leased ones are left."""
        gone: list[Entry] = []
        if self.used[tier] + new <= self.budgets[tier]:
            return gone
        for entry in self.lowest(tier):
            if self.used[tier] + new <= self.budgets[tier]:
                break
            self.drop(entry, tier)
            self.evicted[tier] += 1
            gone.append(entry)
        return gone

    # ------------------------------------------------------------------------------------------------------------------
    def _link(self, before: _Node | None, key: bytes, length: int) -> _Node:
        if before is not None:
            before.next = min(before.next or length, length)
        return self._nodes.setdefault(key, _Node())


def _same(entry: Entry, run: Run) -> bool:
    """Whether this run from its first token on makes the same calls as the run that made this state."""
    return entry.rows == run.rows and entry.tiles == run.tiles(entry.length)
