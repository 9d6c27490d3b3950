"""A step's way through the actors: which calls are made, with what, and what their results are.

A step's calls are a graph of object references: residual streams and partial sums pass between actors and never
through here. Two kinds of order hold whatever happens: a call waits for what it reads, and a block's call waits for
the call of that block before it.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from xlstm_ray.actors.lineage import Made
from xlstm_ray.actors.link import Link
from xlstm_ray.actors.placement import Placement, Seat
from xlstm_ray.actors.shard import Call
from xlstm_ray.actors.wire import from_wire, to_wire
from xlstm_ray.layout import join_bands
from xlstm_ray.runtime.executor import Step, StepResult


class Pending(NamedTuple):
    """A step on its way: references to the last stage's result, and to every seat's state where it is kept."""

    made: Made
    step: Step
    result: Any
    states: list[Any]


class Pipeline:
    """Asks a placement's actors for all that a step, a state or logits take, and joins what they answer.

    Nothing here waits: questions return references, which Link.get makes values of.
    """

    def __init__(self, link: Link, placement: Placement):
        self._link, self._placement, self._stages = link, placement, placement.stages
        self._one_band = len(self._stages[0]) == 1
        # Steps in flight. One more than there are stages: while a result travels, its stage works on the next step.
        self.depth = max(2, len(self._stages) + 1) if self._one_band else 2 * len(self._stages)
        self._epoch = 0
        self._last: dict[tuple[int, int], Any] = {}  # (seat, block): its last call, which the next one waits for

    def reset(self) -> list[Any]:
        """All actors without any state, in a new epoch: what is on its way is void. A reference a seat."""
        self._epoch += 1
        self._last.clear()
        return self._placement.each(self._placement.seats, "reset", self._epoch)

    def make(self, made: Made, drop: Iterable[int]) -> Pending | None:
        """Ask for all that a state takes, and for others to be dropped first; None where it has no result."""
        return self._link.ask(self._make, made, (*made.drop, *drop))

    def state(self, number: int) -> list[Any]:
        """A state as it is after all that was asked for; a reference a seat, for `join`."""
        return [
            self._placement.call(seat, "save", "state")(self._epoch, number, *self._before(seat))
            for seat in self._placement.seats
        ]

    def logits(self, hidden: Tensor) -> list[Any]:
        """hidden (B, D) after the last block -> one reference, to (B, vocabulary) float32 on the wire."""
        return [self._placement.call(self._stages[-1][0], "logits", "logits")(to_wire(hidden))]

    def result(self, pending: Pending, values: list[Any]) -> StepResult:
        """From the values of a step's result and states; its seconds are not known here."""
        (hidden, *logits), *states = values
        return StepResult(
            from_wire(hidden, self._placement.spec.dtype).clone(),
            from_wire(logits[0], torch.float32) if logits else None,
            0.0,
            self.join(states) if states else None,
        )

    def join(self, states: list[dict[str, Any]]) -> dict[str, Tensor]:
        """The seats' states as one, in this process's own memory."""
        tensors: dict[str, Tensor] = {}
        rest = iter(states)
        for seats in self._stages:
            of_stage = [{name: from_wire(a, torch.float32) for name, a in next(rest).items()} for _ in seats]
            tensors |= join_bands(of_stage)
        return tensors

    def close(self) -> None:
        """Hold no reference any more: one that is freed after Ray has disconnected may end this process."""
        self._last.clear()

    def _make(self, made: Made, drop: tuple[int, ...]) -> Pending | None:
        if made.step is not None:
            return self._submit(made, made.step, drop)
        if made.rows:
            self._every_seat("take", made.state, list(made.rows), drop)
            return None
        wires = None if made.source is None else {name: to_wire(tensor) for name, tensor in made.source.items()}
        self._every_seat("load_state", made.state, self._link.ray.put(wires), made.batch, drop)
        return None

    def _every_seat(self, method: str, *args: Any) -> None:
        """Ask all seats for what takes all of their blocks' calls before, and all after wait for."""
        for seat in self._placement.seats:
            done = self._placement.call(seat, method, method.replace("_", " "))
            ref = done(self._epoch, *args, *self._before(seat))
            self._last |= {(seat.index, n): ref for n in range(1 if self._one_band else len(seat.shard.blocks))}

    def _before(self, seat: Seat) -> list[Any]:
        blocks = range(1 if self._one_band else len(seat.shard.blocks))
        return list(dict.fromkeys(self._last[seat.index, n] for n in blocks if (seat.index, n) in self._last))

    def _submit(self, made: Made, step: Step, drop: tuple[int, ...]) -> Pending:
        x: Any = to_wire(step.tokens)
        call = Call(
            self._epoch,
            made.order,
            made.src,
            made.state,
            step.start.tolist(),
            step.end.tolist(),
            step.chunk_size,
            step.keep,
            step.logits,
            drop,
        )
        states = []
        for s, seats in enumerate(self._stages):
            x = self._through_stage(seats[0], s, call, x) if self._one_band else self._through_bands(seats, s, call, x)
            if step.keep:
                for seat in seats:
                    kept = self._placement.call(seat, "kept", f"state after {_tile(made.order)}", "snapshot")
                    last_block = 0 if self._one_band else len(seat.shard.blocks) - 1
                    states.append(kept(call, self._last[seat.index, last_block]))
        return Pending(made, step, x, states)

    def _through_stage(self, seat: Seat, s: int, call: Call, x: Any) -> Any:
        ask, tile = self._placement.call, _tile(call.number)
        done = ask(seat, "run", f"{tile} stage {s}")(call, x, self._last.get((seat.index, 0)))
        self._last[seat.index, 0] = done
        return ask(seat, "output", f"output of {tile} stage {s}", "transfer")(call, done)

    def _through_bands(self, seats: list[Seat], s: int, call: Call, x: Any) -> Any:
        ask, tile = self._placement.call, _tile(call.number)
        if s == 0:
            x = ask(seats[0], "embed", f"embed {tile}")(call, x)
        parts = [x]
        for n, block in enumerate(seats[0].shard.blocks):
            sums = []
            for b, seat in enumerate(seats):
                mixer = ask(seat, "run_mixer", f"mixer {tile} block {block} band {b}", results=2)
                part, self._last[seat.index, n] = mixer(call, n, self._last.get((seat.index, n)), *parts)
                sums.append(part)
            parts = [
                ask(seat, "run_ffn", f"ffn {tile} block {block} band {b}")(call, n, *sums)
                for b, seat in enumerate(seats)
            ]
        return ask(seats[0], "leave", f"output of {tile} stage {s}")(call, *parts)


def _tile(number: int) -> str:
    """A tile in the names of its calls: the last digit of its number, as Ray keeps figures of every name for ever."""
    return f"tile *{number % 10}"
