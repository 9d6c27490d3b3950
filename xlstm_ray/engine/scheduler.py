"""Whose turn it is among many requests. Integers only: no torch, no device, no clock.

A request waits, is filled (its prompt is read, a window at a time), decodes, and ends. A slot is room for one state on
the device: whoever is filled or decodes has one. A row that decodes can be parked, its state copied away and its slot
given to a request that is more important; it goes on later from where it was. Of several answers to one prompt, one
request reads it and the others are behind that one, until they go on from its end.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

AGE = 64  # decisions after which a request that waits counts as one step more important

Phase = Literal["behind", "waiting", "filling", "decoding", "parked"]


class Fill(NamedTuple):
    """Read the next window of this request's prompt."""

    request: int


class Decode(NamedTuple):
    """One token more for each of these requests."""

    requests: tuple[int, ...]


class Park(NamedTuple):
    """Copy this request's state away."""

    request: int


class Resume(NamedTuple):
    """Bring this request's state back."""

    request: int


Action = Fill | Decode | Park | Resume


@dataclass
class _Entry:
    request: int
    priority: int
    order: int  # of arrival
    since: int  # the decision at which it began to wait
    phase: Phase = "waiting"


@dataclass
class Scheduler:
    """slots: states at once. fills_per_decode: windows of prompts between two tokens of those that decode, at most.

    Of requests that wait the most important one comes first, of equals the one that came first. AGE decisions of
    waiting make up for one step of priority. Only a higher priority takes another's slot.
    """

    slots: int
    fills_per_decode: int = 1
    _entries: dict[int, _Entry] = field(default_factory=dict)
    _decisions: int = 0
    _arrivals: int = 0
    _fills: int = 0  # since those that decode had a token

    def arrive(self, request: int, *, priority: int = 0, filled: bool = False, behind: bool = False) -> None:
        """A request that waits from now on. filled: nothing of its prompt is left to read, so it can decode at once.

        behind: another one reads its prompt; it waits for `follow`.
        """
        phase: Phase = "behind" if behind else "parked" if filled else "waiting"
        self._entries[request] = _Entry(request, priority, self._arrivals, self._decisions, phase)
        self._arrivals += 1

    def filled(self, request: int) -> None:
        """All of its prompt has been read."""
        self._entries[request].phase = "decoding"

    def follow(self, request: int) -> None:
        """The prompt that it was behind has been read: it can decode."""
        self._entries[request].phase, self._entries[request].since = "parked", self._decisions

    def leave(self, request: int) -> None:
        """It has ended, or nobody wants it any more."""
        del self._entries[request]

    def __len__(self) -> int:
        return len(self._entries)

    def phase(self, request: int) -> Phase:
        return self._entries[request].phase

    @property
    def waiting(self) -> int:
        """How many have not begun."""
        return sum(True for _ in self._of("waiting"))

    def place(self, request: int) -> int:
        """How many will begin before this one, as things are."""
        ahead = [entry.request for entry in sorted(self._of("waiting"), key=self._rank)]
        return ahead.index(request) if request in ahead else 0

    def next(self) -> Action | None:
        """What to do next; None: nothing, until a request comes."""
        decoding = tuple(entry.request for entry in self._of("decoding"))
        if decoding and self._fills >= self.fills_per_decode:
            return self._decode(decoding)
        wants = next(iter(sorted((*self._of("filling"), *self._of("waiting", "parked")), key=self._rank)), None)
        if wants is not None and wants.phase != "filling" and self._used >= self.slots:
            victim = self._victim(wants)
            if victim is None:  # it has to wait; who has a slot goes on
                wants = next(iter(sorted(self._of("filling"), key=self._rank)), None)
            else:
                self._decisions += 1
                victim.phase, victim.since = "parked", self._decisions
                return Park(victim.request)
        if wants is None:
            return self._decode(decoding) if decoding else None
        self._decisions += 1
        if wants.phase == "parked":
            wants.phase = "decoding"
            return Resume(wants.request)
        wants.phase = "filling"
        self._fills += bool(decoding)
        return Fill(wants.request)

    # ------------------------------------------------------------------------------------------------------------------
    def _decode(self, decoding: tuple[int, ...]) -> Decode:
        self._fills = 0
        self._decisions += 1
        return Decode(decoding)

    def _of(self, *phases: Phase) -> Iterator[_Entry]:
        return (entry for entry in self._entries.values() if entry.phase in phases)

    @property
    def _used(self) -> int:
        return sum(True for _ in self._of("filling", "decoding"))

    def _rank(self, entry: _Entry) -> tuple[int, int]:
        """The smallest is first."""
        aged = 0 if entry.phase == "filling" else (self._decisions - entry.since) // AGE
        return -(entry.priority + aged), entry.order

    def _victim(self, wants: _Entry) -> _Entry | None:
        """Who gives its slot up: the least important that decodes, of equals the one that came last."""
        lower = [entry for entry in self._of("decoding") if entry.priority < wants.priority]
        return min(lower, key=lambda entry: (entry.priority, -entry.order), default=None)
