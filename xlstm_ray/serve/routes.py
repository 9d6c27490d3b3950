"""Which replica a prompt goes to: the one that has read its longest beginning, unless that one is much busier.

Integers and hashes alone: no torch, no Ray, no clock.
"""

from collections import OrderedDict
from collections.abc import Sequence
from threading import Lock
from typing import NamedTuple, Protocol

from xlstm_ray.engine.tree import Chain, root_of
from xlstm_ray.text.ondisk import TokenFile

MARKS = 1 << 16  # beginnings that are remembered
NEWEST = 0.3  # weight of the newest figure in a mean
MOVE_S = 0.01  # seconds that a state takes from one replica to another besides its bytes
BYTE_S = 1e-9  # seconds a byte, until a state was moved

Mark = tuple[int, bytes]  # so many tokens of a prompt, and their hash


def marks_of(tokens: memoryview | TokenFile, *, tile: int, chunk: int, salt: str) -> list[Mark]:
    """The beginnings of a prompt whose states others may use: its whole tiles, the chunks of its tail, all of it.

    tokens: int32, or in a file. salt: whose prompt it is; tenants share nothing.
    """
    chain = Chain(root_of("", salt), tokens)
    length, tail = chain.length, chain.length // tile * tile
    places = {*range(tile, tail + 1, tile), *range(tail + chunk, length, chunk), length} - {0}
    return [(place, chain.at(place)) for place in sorted(places)]


def mark_of_state(tokens: int, prompt: str, salt: str) -> Mark:
    """The same for a state that a caller goes on from. prompt: the hash of what it has seen."""
    return tokens, root_of(f"state {prompt}", salt)


class Choice(NamedTuple):
    """order: the replicas, the best first. known: tokens of the prompt that it has read. source: who has so many more

    that its state is worth moving; None: nobody.
    """

    order: list[str]
    known: int
    source: str | None = None


class Routes:
    """What was sent where. For any threads. It may be wrong about what a replica still keeps: that costs time alone.

    slack: a replica may have so many requests more than the least busy one, and still gets a prompt that it knows.
    state_bytes: of a state.
    """

    def __init__(self, *, slack: int, state_bytes: int):
        self._slack, self._bytes = slack, state_bytes
        self._holders: OrderedDict[bytes, set[str]] = OrderedDict()
        self._busy: dict[str, int] = {}
        self._turn: dict[str, int] = {}  # when each was last sent to
        self._sent = 0
        self._token_s: float | None = None
        self._byte_s = BYTE_S
        self._lock = Lock()

    @property
    def busy(self) -> dict[str, int]:
        """The requests under way, by replica."""
        return dict(self._busy)

    def choose(self, marks: Sequence[Mark], replicas: Sequence[str]) -> Choice:
        """Where a prompt goes; there is at least one replica."""
        with self._lock:
            known = dict.fromkeys(replicas, 0)
            for tokens, key in marks:
                for name in self._holders.get(key, ()):
                    if name in known:
                        known[name] = tokens
            busy = {name: self._busy.get(name, 0) for name in replicas}
            least = min(busy.values())
            near = [name for name in replicas if busy[name] <= least + self._slack]
            best = max(near, key=lambda name: (known[name], -busy[name], -self._turn.get(name, -1)))
            rest = sorted((name for name in replicas if name != best), key=lambda name: (busy[name], -known[name]))
            holder = max(replicas, key=known.__getitem__)
            more = known[holder] - known[best]
            return Choice([best, *rest], known[best], holder if self._worth_moving(more) else None)

    def sent(self, marks: Sequence[Mark], replica: str) -> None:
        """A prompt went there."""
        with self._lock:
            self._sent += 1
            self._turn[replica] = self._sent
            self._busy[replica] = self._busy.get(replica, 0) + 1
            for _, key in marks:
                self._holders.setdefault(key, set()).add(replica)
                self._holders.move_to_end(key)
            while len(self._holders) > MARKS:
                self._holders.popitem(last=False)

    def ended(self, replica: str) -> None:
        """A request there has ended."""
        with self._lock:
            if replica in self._busy:
                self._busy[replica] -= 1

    def gone(self, replica: str) -> None:
        """It has ended, with all that it had read."""
        with self._lock:
            self._busy.pop(replica, None)
            self._turn.pop(replica, None)
            for key in [key for key, names in self._holders.items() if replica in names]:
                self._holders[key].discard(replica)
                if not self._holders[key]:
                    del self._holders[key]

    def read(self, tokens: int, seconds: float) -> None:
        """So many tokens of a prompt were computed in this time."""
        if tokens > 0 and seconds > 0:
            now = seconds / tokens
            with self._lock:
                self._token_s = now if self._token_s is None else self._token_s + NEWEST * (now - self._token_s)

    def moved(self, size: int, seconds: float) -> None:
        """A state of so many bytes was moved in this time."""
        if size > 0:
            with self._lock:
                self._byte_s += NEWEST * (max(0.0, seconds - MOVE_S) / size - self._byte_s)

    def _worth_moving(self, tokens: int) -> bool:
        """Whether to fetch a state takes less time than to compute so many tokens again."""
        if self._token_s is None:
            return False
        computed_s = tokens * self._token_s
        worth = computed_s > MOVE_S + self._bytes * self._byte_s
        if not worth and computed_s > MOVE_S + self._bytes * BYTE_S:  # in time it is tried again: it was slow by chance
            self._byte_s += NEWEST * (BYTE_S - self._byte_s)
        return worth


class Goes(Protocol):
    """A call: the replica whose state of the prompt is to be fetched for it."""

    source: str | None


class Route:
    """Where one call goes: told by the router, which may ask again after a refusal."""

    def __init__(self, routes: Routes, marks: Sequence[Mark]):
        self._routes, self._marks = routes, marks
        self.call: Goes | None = None
        self.moves = False  # whether a state may be fetched for it
        self.replica: str | None = None

    def order(self, replicas: list[str]) -> list[str]:
        choice = self._routes.choose(self._marks, replicas)
        self.sent(choice.order[0])
        if self.call is not None:
            self.call.source = choice.source if self.moves else None
        return choice.order

    def sent(self, replica: str) -> None:
        if replica != self.replica:
            self.end()
            self.replica = replica
            self._routes.sent(self._marks, replica)

    def end(self) -> None:
        if self.replica is not None:
            self._routes.ended(self.replica)
            self.replica = None
