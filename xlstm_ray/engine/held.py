"""The states that an engine holds: with its executor as long as that is useful, else on the host."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from threading import Lock
from typing import NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from xlstm_ray.errors import GridLost
from xlstm_ray.memory.need import HELD_ROWS, MOVERS
from xlstm_ray.runtime.executor import Executor, RowRef, StateRef, rows_of

Tensors = dict[str, Tensor]


class Held:
    """A state: with the executor (`ref`), on its way to the host, or there."""

    def __init__(self, states: "States", ref: StateRef | None, tensors: Tensors | None):
        self._states, self.ref = states, ref
        self._coming: Future[Tensors] | None = None
        self._lost: GridLost | None = None
        if tensors is not None:
            self._coming = Future()
            self._coming.set_result(tensors)
        self.batch = ref.batch if ref is not None else len(next(iter(tensors.values()))) if tensors else 0

    @property
    def lost(self) -> bool:
        """Whether the state was lost with its grid."""
        return self._lost is not None

    def bring(self) -> Tensors:
        """Its tensors on the CPU, named as in RecurrentState; not to be written to. Raises GridLost."""
        coming = self._coming
        if coming is None:  # once it is on its way, nobody has to wait for a turn
            with self._states.turn():  # another thread may evict it
                executor = self._states.executor()
                if self._coming is None and self.ref is not None and executor.on_host:  # do not keep it a second time
                    return executor.save(self.ref)()
                coming = self.send()
        return coming.result()

    def send(self) -> "Future[Tensors]":
        """Begin to copy it to the host, where the executor works elsewhere. Raises GridLost."""
        with self._states.turn():
            if self._lost is not None:
                raise self._lost
            if self._coming is None:
                assert self.ref is not None
                self._coming = self._states.move(self.ref)
            return self._coming

    def evict(self) -> None:
        """Free the state on the executor, once it is on the host. A lost grid's states are lost."""
        with self._states.turn():
            if self.ref is None:
                return
            try:
                self.send()
            except GridLost as lost:
                self._lost = lost
            self.ref = None


class HeldRow(NamedTuple):
    """A row of a state."""

    held: Held
    row: int


class HeldRows(tuple[HeldRow | None, ...]):
    """The rows of a batch, each of some state; None: a fresh row."""

    def pick(self, rows: Sequence[int]) -> "HeldRows":
        return HeldRows(self[b] for b in rows)

    def bring(self) -> Tensors:
        """The tensors of these rows on the CPU, named as in RecurrentState; not to be written to. Raises GridLost."""
        states = {id(row.held): row.held.bring() for row in dict.fromkeys(filter(None, self))}
        parts = [None if row is None else (states[id(row.held)], row.row) for row in self]
        tensors = next(iter(states.values()))
        batch = len(next(iter(tensors.values())))
        if len(states) == 1 and [part and part[1] for part in parts] == list(range(batch)):
            return tensors
        return {
            name: torch.cat([torch.zeros_like(t[:1]) if p is None else p[0][name][p[1] : p[1] + 1] for p in parts])
            for name, t in tensors.items()
        }


class States:
    """All states that an engine holds. turn: the context in which a thread uses the executor."""

    def __init__(self, executor: Callable[[], Executor], turn: Callable[[], AbstractContextManager[object]]):
        self.executor, self.turn = executor, turn
        self._all: WeakValueDictionary[int, Held] = WeakValueDictionary()  # by id, the oldest first
        self._lock = Lock()  # of these: any thread adds some
        # Each waits for a state on its way to the host: to write it into new memory takes longer than a tile.
        self.mover = ThreadPoolExecutor(MOVERS, "states")
        self._under_way: list[Future[Tensors]] = []

    def rows(self, ref: StateRef | None, batch: int, tensors: Tensors | None = None) -> HeldRows:
        """The rows of a state that the executor has (`ref`), or of one with these tensors."""
        held = Held(self, ref, tensors)
        with self._lock:
            self._all[id(held)] = held
        return HeldRows(HeldRow(held, b) for b in range(batch))

    def move(self, ref: StateRef) -> "Future[Tensors]":
        """Begin to copy a state to the host."""
        self._under_way = [one for one in self._under_way if not one.done()]
        self._under_way.append(self.mover.submit(self.executor().save(ref)))
        return self._under_way[-1]

    @property
    def crowded(self) -> bool:
        """Whether so many states are on their way to the host that another one would hold up the executor."""
        return not self.executor().on_host and sum(not one.done() for one in self._under_way) >= MOVERS

    def has(self, rows: HeldRows) -> bool:
        """Whether these rows are of states of this engine."""
        return all(row is None or id(row.held) in self._all for row in rows)

    def state_of(self, rows: HeldRows) -> StateRef:
        """These rows as one state of the executor: their own state if they are all of it, else copies."""
        refs = self._refs(rows)
        first = next(filter(None, refs or ()), None)
        return first.state if first is not None and refs == rows_of(first.state) else self.copy_of(rows)

    def copy_of(self, rows: HeldRows) -> StateRef:
        """Copies of these rows, as a state that nobody else has."""
        refs = self._refs(rows)
        if refs is None:
            return self.executor().load(rows.bring(), len(rows))
        return self.executor().take(refs) if any(refs) else self.executor().load(None, len(rows))

    def evict(self, but: HeldRows) -> None:
        """Move the oldest states to the host, unless the executor works there. HELD_ROWS new rows and `but` stay."""
        if self.executor().on_host:
            return
        stay, room = {id(row.held) for row in but if row is not None}, HELD_ROWS
        with self._lock:
            newest = reversed(list(self._all.items()))
        for name, held in newest:
            if held.ref is not None and name not in stay:
                room -= held.ref.batch
                if room < 0:
                    held.evict()

    def warm_up(self) -> None:
        """Have the memory through which states go to the host and back, where the executor works elsewhere."""
        executor = self.executor()
        if executor.local and not executor.on_host:
            state = executor.load(None, 1)
            for _ in range(MOVERS):
                executor.load(executor.save(state)(), 1)

    def close(self) -> None:
        """Move all states to the host before the executor is closed, for those who still have them."""
        with self._lock:
            all_ = list(self._all.values())
        for held in all_:
            held.evict()
        self.mover.shutdown()

    def _refs(self, rows: HeldRows) -> list[RowRef | None] | None:
        """The executor's references of these rows; None if it lacks at least one of them."""
        refs: list[RowRef | None] = []
        for row in rows:
            ref = None if row is None else row.held.ref
            if row is not None and ref is None:
                return None
            refs.append(None if row is None or ref is None else RowRef(ref, row.row))
        return refs
