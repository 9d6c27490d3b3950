"""The path of a step through the actors: its calls, their arguments and their results.

A step's calls are a graph of object references: residual streams and partial sums pass between actors and never
through the driver. Two orders always hold: a call waits for its inputs, and a call of a block waits for that block's
call before.
"""

from collections.abc import Iterable
from concurrent.futures import Future
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

from xlstm_ray.actors.call import Call
from xlstm_ray.actors.lineage import Made
from xlstm_ray.actors.link import Link
from xlstm_ray.actors.placement import Placement, Seat
from xlstm_ray.actors.wire import from_wire, to_wire
from xlstm_ray.layout import join_bands
from xlstm_ray.runtime.executor import Step, StepResult
from xlstm_ray.sampling.logprobs import Logprobs


class Pending(NamedTuple):
    """A step in flight. refs: references to the last stage's result, and to every seat's state if it is kept."""

    made: Made
    step: Step
    refs: "Future[list[Any]]"  # Link.answer has them


class Pipeline:
    """Makes the actor calls for a step, a state or logits, and joins their results.

    Nothing here waits for an actor: calls return references, and Link.get turns references into values. All calls are
    made by the link's thread, in order.
    """

    def __init__(self, link: Link, placement: Placement):
        self._link, self._placement, self._stages = link, placement, placement.stages
        self._one_band = len(self._stages[0]) == 1
        self._token_group = "token" if placement.spec.device == "cuda" else "compute"
        self._epoch = 0
        self._last: dict[tuple[int, int], Any] = {}  # (seat, block): its last call; the next one waits for it
        self._tokens: dict[int, dict[int, Any]] = {}  # by seat and state: calls of tokens since then

    def reset(self) -> list[Any]:
        """Begin an epoch: actors drop all states, calls in flight are void. Returns a reference for each seat."""
        self._epoch += 1
        self._last.clear()
        self._tokens.clear()
        return self._placement.each(self._placement.seats, "reset", self._epoch)

    @staticmethod
    def usual(times: Iterable[float]) -> float:
        """What a step takes, of the last times between two results."""
        return median(times)

    @staticmethod
    def _where(stage: int, seat: Seat) -> str:
        """In the names of calls, which Ray's dashboard shows."""
        return f"stage {stage}"

    def make(self, made: Made, drop: Iterable[int]) -> Pending | None:
        """Make the calls for a state, and first drop others. Returns None if it has no result.

        It does not wait for those of a step: they take a millisecond, in which the next result can be looked at.
        """
        refs = self._link.begin(partial(self._make, made, (*made.drop, *drop)))
        if made.step is not None:
            return Pending(made, made.step, refs)
        self._link.answer(refs)
        return None

    def state(self, number: int) -> list[Any]:
        """A state after all calls so far, as a reference for each seat; `join` takes their values."""
        return [
            self._placement.call(seat, "save", "state")(self._epoch, number, *self._before(seat))
            for seat in self._placement.seats
        ]

    def last_logits(self, number: int, row: int) -> list[Any]:
        """A reference to the logits (vocabulary,) of this state's last step, whose tokens the last stage chose."""
        seat = self._stages[-1][0]
        ask = self._placement.call(seat, "last_logits", "logits of a row")
        return [ask(self._epoch, number, row, *self._before(seat))]

    def logits(self, hidden: Tensor) -> list[Any]:
        """hidden (B, D) after the last block -> a reference to logits (B, vocabulary) float32."""
        return [self._placement.call(self._stages[-1][0], "logits", "logits")(to_wire(hidden))]

    def result(self, pending: Pending, values: list[Any]) -> StepResult:
        """The result of a step, from the values of its references. Its seconds are not known here."""
        (hidden, *more), *states = values
        if pending.step.choice is not None:
            tokens, state = from_wire(hidden, torch.int64).clone(), self.join(states) if states else None
            logits = from_wire(more[0], torch.float32) if more else None
            return StepResult(None, logits, 0.0, state, tokens=tokens, owner=pending.step.owner)
        logits = from_wire(more.pop(0), torch.float32) if pending.step.logits != "none" else None
        return StepResult(
            from_wire(hidden, self._placement.spec.dtype).clone(),
            logits,
            0.0,
            self.join(states) if states else None,
            Logprobs(*(from_wire(part, torch.float32).clone() for part in more)) if more else None,
            owner=pending.step.owner,
        )

    def join(self, states: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Join the seats' states, in this process's own memory."""
        tensors: dict[str, Tensor] = {}
        rest = iter(states)
        for seats in self._stages:
            of_stage = [{name: from_wire(a, torch.float32) for name, a in next(rest).items()} for _ in seats]
            tensors |= join_bands(of_stage)
        return tensors

    def close(self) -> None:
        """Free all references: one that is freed after Ray has disconnected may end this process."""
        self._last.clear()
        self._tokens.clear()

    def _make(self, made: Made, drop: tuple[int, ...]) -> list[Any]:
        """Returns a step's references, as Pending has them."""
        if made.step is not None:
            return self._submit(made, made.step, drop, self._stages)
        if made.rows:
            self._every_seat("take", made.state, list(made.rows), drop)
            return []
        self._every_seat("load_state", made.state, self._stored(made.source), made.batch, drop)
        return []

    def _stored(self, source: dict[str, Tensor] | None) -> Any:
        """A state's tensors in Ray's store, once for all actors."""
        if source is None:  # a fresh state
            return None
        return self._link.ray.put({name: to_wire(tensor) for name, tensor in source.items()})

    def _every_seat(self, method: str, *args: Any) -> None:
        """Call all seats: the call waits for all earlier calls of their blocks, and all later ones wait for it."""
        for seat in self._placement.seats:
            done = self._placement.call(seat, method, method.replace("_", " "))
            ref = done(self._epoch, *args, *self._before(seat))
            self._tokens.pop(seat.index, None)
            self._last |= {(seat.index, n): ref for n in range(1 if self._one_band else len(seat.shard.blocks))}

    def _before(self, seat: Seat) -> list[Any]:
        blocks = range(1 if self._one_band else len(seat.shard.blocks))
        last = dict.fromkeys(self._last[seat.index, n] for n in blocks if (seat.index, n) in self._last)
        return [*last, *self._tokens.get(seat.index, {}).values()]

    def _submit(
        self, made: Made, step: Step, drop: tuple[int, ...], way: list[list[Seat]], home: int | None = None
    ) -> list[Any]:
        """The calls of a step through these stages. home: as in Call."""
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
            step.following and (to_wire(step.following.tokens), step.following.likeliest),
            step.choice and step.choice.rows,
            home,
        )
        through = self._through_bands
        if self._one_band:
            token = step.chunk_size == 1 and step.tokens.shape[1] == 1 and step.following is None
            through = self._token_through if token else self._through_stage
        states = []
        others = call._replace(rows=None)  # only the last stage chooses
        for s, seats in enumerate(way):
            x = through(seats, s, call if seats is way[-1] else others, x)
            if step.keep:
                for seat in seats:
                    kept = self._placement.call(seat, "kept", f"state after {_tile(made.order)}", "snapshot")
                    states.append(kept(call, *self._before(seat)))
        return [x, *states]

    def _through_stage(self, seats: list[Seat], s: int, call: Call, x: Any) -> Any:
        (seat,), ask, tile = seats, self._placement.call, _tile(call.number)
        where = self._where(s, seat)
        done = ask(seat, "run", f"{tile} {where}")(call, x, *self._before(seat))
        self._last[seat.index, 0] = done
        self._tokens.pop(seat.index, None)
        return ask(seat, "output", f"output of {tile} {where}", "transfer")(call, done)

    def _token_through(self, seats: list[Seat], s: int, call: Call, x: Any) -> Any:
        """One call a stage. Steps of different states wait only for other work, so they pass through side by side."""
        (seat,) = seats
        tokens = self._tokens.setdefault(seat.index, {})
        before = self._before(seat)
        if not call.drop:  # what is dropped may be in use by a step of another state
            before = [ref for ref in before if ref not in tokens.values() or ref is tokens.get(call.src)]
        name = f"token {_tile(call.number)} {self._where(s, seat)}"
        ask = self._placement.call(seat, "token", name, self._token_group, results=2)
        result, tokens[call.dst] = ask(call.packed(), x, *before)
        return result

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
    """A tile in the names of its calls: only the last digit, since Ray keeps figures of every name for ever."""
    return f"tile *{number % 10}"
