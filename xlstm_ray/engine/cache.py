"""The states that an engine keeps for later prompts: in memory and, if it has a folder, in files.

The tree knows which states are kept; this module stores, loads and evicts them. `Writes` writes files beside that. All
else is done by the thread whose turn it is.
"""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

from xlstm_ray.cachefiles import Folder, KeptFile
from xlstm_ray.engine.driver import Start
from xlstm_ray.engine.held import States
from xlstm_ray.engine.result import Use
from xlstm_ray.engine.tree import DISK, MEMORY, Chain, Entry, Found, Run, Tree, root_of
from xlstm_ray.engine.writes import Room, Writes
from xlstm_ray.errors import StateError
from xlstm_ray.plan import CachePlan
from xlstm_ray.state import Numerics, RecurrentState
from xlstm_ray.text.history import LaterTrail, Place, Row, TokenTrail
from xlstm_ray.text.ondisk import TokenFile

COMPARED = 4  # states of earlier processes with which a prompt is compared, to find where they part


class Maker(NamedTuple):
    """What decides a state's bits besides its tokens: the model's fingerprint, the numerics, and the machine."""

    model: str
    numerics: Numerics
    machine: str


@dataclass
class Hit:
    """The state found for a prompt, leased until `Cache.release`. points: positions whose states its run must keep.
    likely: some of these, as in Tree.likely."""

    use: Use
    chain: Chain
    run: Run
    start: Start | None
    exact: bool  # whether a cold run has the same bits
    points: set[int]
    likely: set[int]
    entry: Entry | None


@dataclass
class _What:
    """An entry's state if it is in memory, and the trail of its tokens if an earlier process wrote it."""

    start: Start | None = None
    trail: TokenTrail | None = None


@dataclass
class Counts:
    """The cache's counts so far."""

    queries: int = 0
    hit_tokens: Counter[str] = field(default_factory=Counter)  # by tier
    reasons: Counter[str] = field(default_factory=Counter)  # why a hit was not longer
    refused: int = 0  # files that were damaged, or had the name of another state
    unwritten: int = 0  # states that could not be written


class Cache:
    """The cache of one engine. check: raises StateError for a state of another model. size: at least the bytes of a
    state of one row. note: called with remarks for people."""

    def __init__(
        self,
        plan: CachePlan,
        states: States,
        maker: Maker,
        *,
        size: int,
        check: Callable[[RecurrentState], None],
        note: Callable[[str], None],
    ):
        self.plan, self.counts = plan, Counts()
        self._states, self._maker, self._size = states, maker, size
        self.turn = states.turn  # whoever uses the cache has it
        self._check, self._note = check, note
        self._numerics = _named(maker.numerics.model_dump(), maker.machine)
        self._tree = Tree({MEMORY: plan.memory_bytes, DISK: plan.disk_bytes})
        self._folder: Folder | None = None
        self._writes: Writes | None = None
        if plan.folder is not None:
            self._folder = Folder(plan.folder)
            self._folder.tidy()
            self._writes = Writes(self._folder)
        self.kept = 0  # states so far
        self._looked: int | None = None  # the folder's time when it was last read
        self._look()

    # -- for a prompt --------------------------------------------------------------------------------------------------
    def find(
        self,
        tokens: memoryview | TokenFile,
        run: Run,
        *,
        salt: str = "",
        after: int = 0,
        whole: bool = True,
        asked: Iterable[int] = (),
        begun: Chain | None = None,
    ) -> Hit:
        """Find the longest state to go on from, and lease it. begun: the chain of an earlier look-up.

        tokens: int32. salt: the tenant. after, whole: as in Tree.longest. asked: positions whose states must be kept.
        """
        self._settle()
        self._look()
        chain = Chain(root_of(self._maker.model, salt), tokens, begun)
        while True:
            found = self._tree.longest(chain, run, self._numerics, exact=self.plan.exact, after=after, whole=whole)
            tier, start = (None, None) if found.entry is None else self._start_of(found.entry)
            if found.entry is None or start is not None:
                break
        if (found.reason or "").startswith(("none seen", "diverged")):
            found = self._compared(found, start, chain.root, tokens)
        points = self._tree.points(run, found, every=self.plan.every, asked=asked)
        likely = self._tree.likely(run, found, asked)
        self._tree.see(chain)
        use = Use(found.length, tier, found.reason)
        exact = found.entry is None or found.entry.tiles == run.tiles(found.length)
        if found.entry is not None:
            found.entry.leases += 1
            found.entry.likely = True  # again
        return Hit(use, chain, run, start, exact, points, likely, found.entry)

    def _compared(self, found: Found, start: Start | None, root: bytes, tokens: memoryview | TokenFile) -> Found:
        """Add where a prompt parts from prompts of earlier processes: of these, the tree has only the kept states."""
        others = [e for e in self._tree.next_after(found, root) if e.what.trail]
        best, parted = found.known, False
        for entry in others[-COMPARED:]:
            both = start.trail.made() if start is not None and entry.parent is found.entry else None
            apart = entry.what.trail.difference(tokens, both)
            if apart is not None and apart[0] > best:
                best, parted = apart[0], apart[1] < len(tokens)
        return found._replace(known=best, reason=f"diverged at {best}" if parted else found.reason)

    def count(self, hit: Hit) -> None:
        """Count a hit that is used."""
        self.counts.queries += 1
        if hit.use.tier is not None:
            self.counts.hit_tokens[hit.use.tier] += hit.use.hit_tokens
        if hit.use.reason is not None:
            self.counts.reasons[hit.use.reason.partition(" at ")[0]] += 1

    def release(self, hit: Hit) -> None:
        """End the lease of a hit; its run has ended."""
        if (entry := hit.entry) is not None:
            hit.entry, entry.leases = None, entry.leases - 1
            self._tree.drop(entry)  # if it is in no tier any more
            self._fit()

    def keep(self, hit: Hit, length: int, start: Start, *, cold: bool = True, slight: bool = False) -> None:
        """Keep the state after `length` tokens of a prompt. cold: a cold run has its windows. slight: saves little."""
        likely = length in hit.likely or not cold
        if (not cold and self.plan.exact) or (self._states.crowded and (slight or not likely)):  # nobody waits for it
            return
        self._settle()
        tiles = None if cold else -1
        entry = self._tree.add(hit.chain, hit.run, self._numerics, length, size=self._size, tiles=tiles)
        if entry.tiers or entry.leases:
            return
        self.kept += 1
        entry.what, entry.likely = _What(), entry.likely or likely
        on_host = self._states.executor().on_host
        held = start.rows[0].held if start.rows[0] is not None else None
        rows = start.rows
        if held is None or held.batch > 1:
            rows = self._states.rows(self._states.copy_of(rows), 1)
        start = start._replace(rows=rows)
        for row in filter(None, rows):
            if on_host:
                row.held.evict()  # tensors fit any layout, and here they are not copied
            elif self._folder is not None:
                row.held.send()
        self._put(entry, start)
        if self._writes is not None:
            self._write(self._writes, entry, start)
        if entry.tiers or entry.leases:
            if not on_host:
                self._states.evict(but=rows)
        else:
            self._tree.drop(entry)

    def lend(self, tokens: memoryview, run: Run, salt: str) -> RecurrentState | None:
        """The longest state of a prompt, for another cache; None: there is none."""
        chain = Chain(root_of(self._maker.model, salt), tokens)
        entry = self._tree.longest(chain, run, self._numerics, exact=self.plan.exact).entry
        start = None if entry is None else self._start_of(entry)[1]
        return None if entry is None or start is None else self._state_of(entry, start)

    def borrow(self, state: RecurrentState) -> None:
        """Keep in memory what another cache has lent. Raises StateError for a state of another model or numerics."""
        self._check(state)
        place, maker = state.place, self._maker
        if place is None or place.machine != maker.machine or state.numerics != maker.numerics:
            raise StateError(f"{state.name} has not the numerics of this cache")
        key, root, (length,) = bytes.fromhex(place.key), bytes.fromhex(place.root), state.tokens
        entry = Entry(key, root, length, self._numerics, place.rows, place.tiles, self._size)
        parent = self._tree.nearest(bytes.fromhex(place.after), entry.numerics) if place.after else None
        entry = self._tree.insert(entry, parent)
        if not entry.tiers and not entry.leases:
            entry.what = _What()
            self._put(entry, self._start(state))
            self._tree.drop(entry)  # if there is no room

    @property
    def used(self) -> Mapping[str, int]:
        """Bytes of the kept states, by tier."""
        return self._tree.used

    @property
    def evicted(self) -> Mapping[str, int]:
        """How many states have made room for others, by tier."""
        return self._tree.evicted

    def __len__(self) -> int:
        return len(self._tree.entries)

    @property
    def unwritten(self) -> int:
        """How many states are still to be written to files."""
        return 0 if self._writes is None else len(self._writes)

    def close(self) -> None:
        """Wait until all states are written, and drop everything."""
        if self._writes is not None:
            self._writes.close()
        self._settle()
        for entry in self._tree.entries:
            entry.what = None

    # -- memory --------------------------------------------------------------------------------------------------------
    def _start_of(self, entry: Entry) -> tuple[str | None, Start | None]:
        """An entry's tier and state. None: it cannot be used, and was dropped from the tree."""
        if MEMORY not in entry.tiers:
            start = self._load(entry)
            if start is not None:
                entry.leases += 1
                self._put(entry, start)
                entry.leases -= 1
            return DISK, start
        start = entry.what.start
        held = start.rows[0].held
        if held.lost:  # together with its actors
            self._tree.drop(entry, MEMORY)
            return None, None
        return "device" if held.ref is not None and not self._states.executor().on_host else "host", start

    def _put(self, entry: Entry, start: Start) -> None:
        """Put a state into memory, if there is room."""
        if self._fit(entry.size):
            entry.what.start = start
            self._tree.put(entry, MEMORY)

    def _fit(self, new: int = 0) -> bool:
        """Make room for this many bytes in memory; False if that is not possible."""
        if new > self.plan.memory_bytes:
            return False
        for entry in self._tree.fit(MEMORY, new):
            entry.what.start = None
            if self._writes is not None:
                self._writes.drop(entry)
        return self._tree.used[MEMORY] + new <= self.plan.memory_bytes

    # -- disk ----------------------------------------------------------------------------------------------------------
    def _look(self) -> None:
        """Update the tree with files that other or earlier processes have written or removed."""
        if self._folder is None:
            return
        try:
            now = self._folder.time()
            if now == self._looked:
                return
            self._looked = now
            own = {f"{e.name}.state" for e in self._tree.entries if DISK in e.tiers}
            new, refused, there = self._folder.read(own)
        except OSError:  # the folder was removed; a failed write will report it
            new, refused, there = [], [], ()
        for name in refused:
            self._refuse(name, "is not a whole state of a cache")
        made: list[tuple[Entry, KeptFile]] = []
        for kept in sorted(new, key=lambda kept: kept.used):
            place = kept.place
            key, root = bytes.fromhex(place.key), bytes.fromhex(place.root)
            entry = Entry(
                key, root, kept.tokens.length, _named(kept.numerics, place.machine), place.rows, place.tiles, kept.size
            )
            if f"{entry.name}.state" != kept.name:
                self._refuse(kept.name, "has the name of another state")
                continue
            entry = self._tree.insert(entry, None)
            entry.what = entry.what or _What(trail=kept.tokens)
            self._tree.put(entry, DISK)
            made.append((entry, kept))
        for entry, kept in made:
            parent = self._tree.nearest(bytes.fromhex(kept.place.after), entry.numerics) if kept.place.after else None
            if parent is not None and entry.parent is None and parent.length < entry.length:
                self._tree.adopt(parent, entry)
        for entry in [e for e in self._tree.entries if DISK in e.tiers and f"{e.name}.state" not in there]:
            self._tree.drop(entry, DISK)

    def _load(self, entry: Entry) -> Start | None:
        assert self._folder is not None
        path = self._folder.file(f"{entry.name}.state")
        try:
            state = RecurrentState.load(path)
            self._check(state)
            place = state.place
            same = place is not None and place.key == entry.key.hex() and place.machine == self._maker.machine
            if not same or state.numerics != self._maker.numerics or state.tokens != [entry.length]:
                raise StateError(f"{path}: has the name of another state")
        except StateError as err:
            self._tree.drop(entry, DISK)
            if os.path.lexists(path):  # another process may have removed it
                self._refuse(path.name, str(err))
            return None
        with suppress(OSError):
            os.utime(path)  # the time of its last use
        return self._start(state)

    def _start(self, state: RecurrentState) -> Start:
        tensors = {key: tensor for key, tensor in state.tensors.items() if key != "logits"}
        return Start(self._states.rows(None, 1, tensors), state.logits[0], LaterTrail(state.rows[0].tokens))

    def _refuse(self, name: str, why: str) -> None:
        assert self._folder is not None
        self.counts.refused += 1
        said = f"has removed {name}"
        try:
            self._folder.remove([name])
        except OSError as err:  # another user's file, or a disk that is read only
            said = f"does not use {name}, and cannot remove it ({err.strerror})"
        self._note(f"the cache {said}: {why}")

    def _write(self, writes: Writes, entry: Entry, start: Start) -> None:
        order = [f"{e.name}.state" for e in self._tree.lowest(DISK)]
        spare = {f"{e.name}.state" for e in self._tree.entries if e.leases}
        writes.add(entry, partial(self._state_of, entry, start), Room(self.plan.disk_bytes, order, spare))
        if MEMORY not in entry.tiers:  # there was no room: it is nowhere else, and not many such states may wait
            entry.leases += 1
            writes.finish()
            self._settle()
            entry.leases -= 1

    def _state_of(self, entry: Entry, start: Start) -> RecurrentState:
        """An entry's state, with its place in the tree."""
        after = entry.parent.key.hex() if entry.parent else ""
        trail = start.trail.made()
        return RecurrentState(
            {},
            tokens=[entry.length],
            prompt_hash=[trail.hash],
            rows=[Row(tokens=trail)],
            model=self._maker.model,
            numerics=self._maker.numerics,
            complete=True,
            elsewhere=start,
            place=Place(
                root=entry.root.hex(),
                key=entry.key.hex(),
                after=after,
                rows=entry.rows,
                tiles=entry.tiles,
                machine=self._maker.machine,
            ),
        )

    def _settle(self) -> None:
        """Update the tree with the writes that are done."""
        for entry, (gone, failure) in () if self._writes is None else self._writes.done():
            if failure is None:
                if entry not in self._tree.entries:  # memory has dropped it meanwhile
                    entry = self._tree.insert(entry, entry.parent if entry.parent in self._tree.entries else None)
                self._tree.put(entry, DISK)
            else:
                self.counts.unwritten += 1
                if self.counts.unwritten == 1:
                    self._note(f"the cache has not written a state: {failure}; the run goes on without it")
            names = {*gone}
            self._tree.evicted[DISK] += len(names)
            for other in [e for e in self._tree.entries if DISK in e.tiers and f"{e.name}.state" in names]:
                self._tree.drop(other, DISK)
            self._tree.drop(entry)


def _named(numerics: dict[str, object], machine: str) -> str:
    return json.dumps([numerics, machine], sort_keys=True)
