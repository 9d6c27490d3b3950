"""The work of an actor that has all blocks and takes its turn at a prompt's tiles (`spans`).

A block of a tile needs only that block's state after the tile before, which another actor makes. So an actor begins a
tile while the one before is still under way elsewhere: it fetches each block's state when it comes to the block. The
state comes as a stream of Ray's, from the actor that makes it, and ends with an error if that actor dies.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from math import prod
from threading import Condition, get_ident
from time import monotonic
from typing import Any

import torch
from torch import Tensor

from xlstm_ray.actors.call import Call, Done
from xlstm_ray.actors.copies import Fence
from xlstm_ray.actors.ring import Spot
from xlstm_ray.actors.shard import ShardWork
from xlstm_ray.actors.wire import Wire, to_wire
from xlstm_ray.model import AnyState

Given = Wire | Spot  # a block's state on its way: the elements of its tensors, one after the other


class _Void(Exception):
    """A state will not come: the step that makes it failed, or an epoch has begun."""


class SpanWork(ShardWork):
    """As ShardWork, of all blocks; states come from other actors of its kind."""

    whole = False

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._news = Condition()
        # By epoch and state, since a call of an epoch before may still be under way.
        self._made: dict[tuple[int, int], dict[int, Fence]] = {}  # a block is there when its fence has passed
        self._failed: set[tuple[int, int]] = set()  # they will never be whole
        self._me = 0
        self._others: list[Any] = []
        self._halted = False

    # -- control -------------------------------------------------------------------------------------------------------
    def meet(self, me: int, others: list[Any]) -> None:
        """The handles of all actors, and which of them this one is. If that changes, states are void until a reset."""
        with self._news:
            self._halted = bool(self._others)
            self._me, self._others = me, others
            self._news.notify_all()

    # -- compute -------------------------------------------------------------------------------------------------------
    def reset(self, epoch: int) -> None:
        super().reset(epoch)
        with self._news:
            self._made.clear()
            self._failed.clear()
            self._halted = False
            self._news.notify_all()

    def hand_over(self, places: int) -> None:
        """Leave states in this GPU's memory for the next actor, which reads them there. places: as in ShardWork."""
        super().hand_over(places and len(self.shard.blocks) + 1)  # one state at a time; one more of an epoch before

    def load_state(self, epoch: int, number: int, *more: Any) -> None:
        super().load_state(epoch, number, *more)
        self._tell(epoch, number)

    def take(self, epoch: int, number: int, *more: Any) -> None:
        super().take(epoch, number, *more)
        self._tell(epoch, number)

    def gather(
        self, epoch: int, number: int, rows: list[tuple[int, int] | None], homes: Mapping[int, int], *_after: None
    ) -> None:
        """As `take`, of states of which others have some. homes: by state, who has it."""
        if epoch != self.epoch:
            return
        with suppress(_Void), self._whole(epoch, number):
            for state, home in homes.items():
                self.worker.states[state] = list(self._compute(self._all_of, state, home))
            self.take(epoch, number, rows, ())
        self._drop(tuple(homes))

    def drop(self, epoch: int, number: int, *_after: None) -> None:
        """Free a state."""
        if epoch == self.epoch:
            self._drop((number,))

    # -- give: a thread for each other actor ---------------------------------------------------------------------------
    def give(self, epoch: int, number: int, to: int) -> Iterator[Given]:
        """A state's blocks, each as soon as it is there; fewer, if the others will not come."""
        self._threads()
        ring = self._ring if to == (self._me + 1) % len(self._others) else None
        with suppress(_Void):
            for n in range(len(self.shard.blocks)):
                state, fence = self._wait(epoch, number, n)
                with self._copies.beside(fence, f"to {to}"):
                    if ring is not None:
                        given: Given = ring.join(state)
                    else:
                        given = to_wire(torch.cat([part.reshape(-1) for part in state]))
                self._copies.settle(f"to {to}")
                yield given

    # ------------------------------------------------------------------------------------------------------------------
    def _run(self, call: Call, x: Wire | Spot) -> None:
        with suppress(_Void):
            super()._run(call, x)

    def _stepped(self, call: Call, x: Wire | Spot) -> Done:
        done = super()._stepped(call, x)
        self._tell(call.epoch, call.dst)  # a graph does not go block by block
        return done

    def _through(self, call: Call, x: Wire | Spot) -> Tensor:
        hidden, move = self._enter(x), self._move(call)
        blocks = None if call.home is None else self._fetch(call.src, call.home)
        with self._whole(call.epoch, call.dst):
            for n in range(len(self.shard.blocks)):
                if blocks is None:
                    hidden = self.worker.run_block(n, hidden, move)
                else:
                    self.worker.put(call.src, n, next(blocks))
                    hidden = self.worker.run_block(n, hidden, move)
                    self.worker.free(call.src, n)
                with self._news:
                    self._made.setdefault((call.epoch, call.dst), {})[n] = self._copies.fence()
                    self._news.notify_all()
        return hidden

    @contextmanager
    def _whole(self, epoch: int, number: int) -> Iterator[None]:
        """Whoever waits for this state hears of it if the work within does not come to its end."""
        done = False
        try:
            yield
            done = True
        finally:
            if not done:
                with self._news:
                    self._failed.add((epoch, number))
                    self._news.notify_all()

    def _tell(self, epoch: int, number: int) -> None:
        """This state has all blocks."""
        if epoch == self.epoch:
            with self._news:
                self._made[epoch, number] = dict.fromkeys(range(len(self.shard.blocks)), self._copies.fence())
                self._news.notify_all()

    def _wait(self, epoch: int, number: int, n: int) -> tuple[AnyState, Fence]:
        """The state of the n-th block, and when it is there."""

        def void() -> bool:
            return self._halted or epoch != self.epoch or (epoch, number) in self._failed

        with self._news:
            self._news.wait_for(lambda: void() or n in self._made.get((epoch, number), ()))
            if void():
                raise _Void
            state = self.worker.states[number][n]
            assert state is not None
            return state, self._made[epoch, number][n]

    def _all_of(self, number: int, home: int) -> list[AnyState]:
        return [state for state, _ in zip(self._fetch(number, home), self.shard.blocks, strict=False)]

    def _fetch(self, number: int, home: int) -> Iterator[AnyState]:
        """The states of all blocks, from who has them. Raises _Void, and Ray's error if that one is gone."""
        import ray

        ask = self._others[home].give.options(name="give a state", num_returns="streaming", concurrency_group="give")
        stream = iter(ask.remote(self.epoch, number, self._me))
        for n, _ in enumerate(self.shard.blocks):
            self._calls.pop(get_ident())  # to wait for another actor is not to hang
            try:
                given = next((ray.get(ref) for ref in stream), None)
            finally:
                self._calls[get_ident()] = monotonic()
            if given is None:
                raise _Void
            yield self._arrived(n, given)

    def _arrived(self, n: int, given: Given) -> AnyState:
        """A block's state on this device."""
        flat, shapes = self._copies.enter(given), [*self.worker.shapes(n).values()]
        self._copies.settle()
        rows = len(flat) // sum(prod(shape) for shape in shapes)
        parts = flat.split([rows * prod(shape) for shape in shapes])
        made = [part.view(rows, *shape).clone() for part, shape in zip(parts, shapes, strict=True)]
        return tuple(made)  # type: ignore[return-value]

    def _drop(self, states: tuple[int, ...], n: int | None = None) -> None:
        super()._drop(states, n)
        for number in states:
            self._made.pop((self.epoch, number), None)
