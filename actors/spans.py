"""The path of a prompt's tiles through actors that have all blocks each: to one after the other, in turn.

A tile is one call, and so is a token. The state stays with the actor that made it, its home. The next tile's actor
fetches it from there, block by block, while it is made (span.py). Everything else that is done with a state is done at
its home; rows of states with different homes come together at one of these.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Any, NamedTuple

from xlstm_ray.actors.lineage import Made
from xlstm_ray.actors.link import Link
from xlstm_ray.actors.pipeline import Pipeline
from xlstm_ray.actors.placement import Placement, Seat
from xlstm_ray.runtime.executor import Step


class Home(NamedTuple):
    """Who has a state. of_tile: a tile made it, so another actor may make the next one beside it."""

    seat: Seat
    of_tile: bool


class Spans(Pipeline):
    """As Pipeline, but each seat has all blocks, and a step is of one seat."""

    def __init__(self, link: Link, placement: Placement):
        super().__init__(link, placement)
        self._seats, self._stages = placement.seats, placement.stages[:1]
        self._homes: dict[int, Home] = {}  # by state
        self._readers: dict[int, list[Any]] = defaultdict(list)  # by state: tiles elsewhere that begin from it
        self._turn = 0  # whose turn it is to get a new state

    def reset(self) -> list[Any]:
        self._homes.clear()
        self._readers.clear()
        return super().reset()

    @staticmethod
    def usual(times: Iterable[float]) -> float:
        """As many results as there are actors come nearly at once, and the next ones a tile's time later."""
        return max(times)

    @staticmethod
    def _where(stage: int, seat: Seat) -> str:
        return f"span {seat.index}"

    def state(self, number: int) -> list[Any]:
        seat = self._homes[number].seat
        return [self._placement.call(seat, "save", "state")(self._epoch, number, *self._before(seat))]

    def last_logits(self, number: int, row: int) -> list[Any]:
        seat = self._homes[number].seat
        ask = self._placement.call(seat, "last_logits", "logits of a row")
        return [ask(self._epoch, number, row, *self._before(seat))]

    def close(self) -> None:
        super().close()
        self._readers.clear()

    # ------------------------------------------------------------------------------------------------------------------
    def _make(self, made: Made, drop: tuple[int, ...]) -> list[Any]:
        for number in drop:
            self._drop(number)
        if made.step is not None:
            return self._step(made, made.step)
        if made.rows:
            self._take(made)
            return []
        seat = self._new_home(made.state, self._next())
        self._last_call(seat, "load_state", made.state, self._stored(made.source), made.batch, ())
        return []

    def _step(self, made: Made, step: Step) -> list[Any]:
        home = self._homes[made.src]
        is_tile = step.tokens.shape[1] >= self._placement.options.least_span and not step.in_place
        if not is_tile or not home.of_tile:
            if step.in_place and made.src in self._readers:
                self._last_call(home.seat, "drop", -1, *self._readers.pop(made.src))  # no state: it waits for them
            self._homes[made.state] = Home(home.seat, is_tile)
            return self._submit(made, step, (), [[home.seat]])
        seat = self._seats[(home.seat.index + 1) % len(self._seats)]
        self._homes[made.state] = Home(seat, is_tile)
        refs = self._submit(made, step, (), [[seat]], home.seat.index)
        self._readers[made.src].append(self._last[seat.index, 0])
        return refs

    def _take(self, made: Made) -> None:
        """Make a state of rows at the home of most of them."""
        rows = list(made.rows)
        homes = {row[0]: self._homes[row[0]].seat for row in rows if row is not None}
        most = Counter(homes[row[0]].index for row in rows if row is not None).most_common(1)
        seat = self._new_home(made.state, self._seats[most[0][0]] if most else self._next())
        there = {state: home for state, home in homes.items() if home is not seat}
        if not there:
            self._last_call(seat, "take", made.state, rows, ())
            return
        homes_of = {state: home.index for state, home in there.items()}
        before = [ref for home in {home.index: home for home in there.values()}.values() for ref in self._before(home)]
        ref = self._last_call(seat, "gather", made.state, rows, homes_of, *before)
        for state, home in there.items():  # what is done with the state from now on waits for it
            self._tokens.setdefault(home.index, {})[state] = ref

    def _drop(self, number: int) -> None:
        home = self._homes.pop(number, None)
        if home is not None:
            drop = self._placement.call(home.seat, "drop", "drop a state")
            drop(self._epoch, number, *self._before(home.seat), *self._readers.pop(number, ()))

    def _last_call(self, seat: Seat, method: str, *args: Any) -> Any:
        """A call that waits for all earlier ones of the seat, and all later ones wait for it."""
        call = self._placement.call(seat, method, method.replace("_", " "))
        ref = self._last[seat.index, 0] = call(self._epoch, *args, *self._before(seat))
        self._tokens.pop(seat.index, None)
        return ref

    def _new_home(self, number: int, seat: Seat) -> Seat:
        self._homes[number] = Home(seat, False)
        return seat

    def _next(self) -> Seat:
        self._turn += 1
        return self._seats[(self._turn - 1) % len(self._seats)]
