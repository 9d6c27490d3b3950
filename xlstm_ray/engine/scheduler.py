"""Decides which of many requests is next. Integers only: no torch, no device, no clock.

A request waits, is filled (its prompt is read, a window at a time), decodes, and ends. A slot is room for one state on
the device; a request that is filled or decodes has a slot. Such a request can be parked: its state is copied away, and
a more important request gets its slot. One that decodes is resumed later; one that is filled waits again. Several
answers to one prompt are several requests: one more reads the prompt, and the others are behind it until then.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

AGE = 64  # after this many decisions, a waiting request's priority counts one more

Phase = Literal["behind", "waiting", "filling", "decoding", "parked"]


class Fill(NamedTuple):
    """Read the next window of this request's prompt."""

    request: int


class Decode(NamedTuple):
    """Decode one token for each of these requests."""

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
    since: int  # the number of the decision when it began to wait; of a prompt in reading, of its last window
    phase: Phase = "waiting"


@dataclass
class Scheduler:
    """slots: the most states at once. fills_per_decode: the most windows of prompts between two decoding steps.

    The waiting request with the highest priority is first; of equal ones, the oldest. AGE decisions of waiting, also
    for a prompt's next window, count as one more priority. Only a higher priority takes another request's slot.
    """

    slots: int
    fills_per_decode: int = 1
    _entries: dict[int, _Entry] = field(default_factory=dict)
    _decisions: int = 0
    _arrivals: int = 0
    _fills: int = 0  # since the last decoding step

    def arrive(self, request: int, *, priority: int = 0, filled: bool = False, behind: bool = False) -> None:
        """Add a request. filled: its whole prompt has been read, so it can decode at once.

        behind: another request reads its prompt, and it waits for `follow`.
        """
        phase: Phase = "behind" if behind else "parked" if filled else "waiting"
        self._entries[request] = _Entry(request, priority, self._arrivals, self._decisions, phase)
        self._arrivals += 1

    def filled(self, request: int) -> None:
        """Note that its whole prompt has been read; perhaps by windows that were under way when it was parked."""
        entry = self._entries[request]
        entry.phase = "parked" if entry.phase == "waiting" else "decoding"

    def follow(self, request: int) -> None:
        """Note that the request before it has read the prompt, so that it can decode."""
        self._entries[request].phase, self._entries[request].since = "parked", self._decisions

    def leave(self, request: int) -> None:
        """Remove a request that has ended or was cancelled, perhaps before it had arrived."""
        self._entries.pop(request, None)

    def __len__(self) -> int:
        return len(self._entries)

    def phase(self, request: int) -> Phase:
        return self._entries[request].phase

    @property
    def waiting(self) -> int:
        """The number of requests that have not begun."""
        return sum(True for _ in self._of("waiting"))

    def place(self, request: int) -> int:
        """How many waiting requests are before this one."""
        ahead = [entry.request for entry in sorted(self._of("waiting"), key=self._rank)]
        return ahead.index(request) if request in ahead else 0

    @property
    def reads(self) -> bool:
        """Whether a prompt is read, or waits to be."""
        return any(self._of("filling", "waiting"))

    @property
    def owes_tokens(self) -> bool:
        """Whether a window was read since those that decode got a token."""
        return self._fills > 0 and any(self._of("decoding"))

    def next(self) -> Action | None:
        """The next action; None if there is nothing to do."""
        decoding = tuple(entry.request for entry in self._of("decoding"))
        if decoding and self._fills >= self.fills_per_decode:
            return self._decode(decoding)
        wants = next(iter(sorted((*self._of("filling"), *self._of("waiting", "parked")), key=self._rank)), None)
        if wants is not None and wants.phase != "filling" and self._used >= self.slots:
            victim = self._victim(wants)
            if victim is None:  # it must wait; requests with slots go on
                wants = next(iter(sorted(self._of("filling"), key=self._rank)), None)
            else:
                self._decisions += 1
                victim.phase, victim.since = "waiting" if victim.phase == "filling" else "parked", self._decisions
                return Park(victim.request)
        if wants is None:
            return self._decode(decoding) if decoding else None
        self._decisions += 1
        if wants.phase == "parked":
            wants.phase = "decoding"
            return Resume(wants.request)
        wants.phase, wants.since = "filling", self._decisions
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
        """The sort key: the smallest is first."""
        aged = (self._decisions - entry.since) // AGE
        return -(entry.priority + aged), entry.order

    def _victim(self, wants: _Entry) -> _Entry | None:
        """The request that gives its slot up: the one with the least priority; of equal ones, the newest."""
        lower = [entry for entry in self._of("filling", "decoding") if entry.priority < wants.priority]
        return min(lower, key=lambda entry: (entry.priority, -entry.order), default=None)
