"""Texts that end an answer, found across pieces: what may be the beginning of one is held back."""

from collections.abc import Sequence


class StopMatcher:
    """Takes an answer's text piece by piece, and gives what may be shown: all before the first stop text, and no more.

    The first is the one that is complete first, and of those that end at one place the longest: so it hangs on the
    text alone, not on how it was cut. `found` is that text, or None.
    """

    def __init__(self, stops: Sequence[str] = ()):
        self._stops = stops
        self._held = ""  # the longest end of the text so far that begins a stop text
        self._early = 0  # characters of it before which no stop text may end
        self.found: str | None = None

    def feed(self, piece: str, *, may_stop: bool = True) -> str:
        """What this piece lets be shown. may_stop: False for a piece in which no stop text may end."""
        if self.found is not None:
            return ""
        text = self._held + piece
        if not may_stop:
            self._early = len(text)
        ends = []
        for stop in self._stops:
            start = text.find(stop, max(0, self._early - len(stop) + 1))
            if start >= 0:
                ends.append((start + len(stop), start, stop))
        if ends:
            _, start, self.found = min(ends)
            self._held = ""
            return text[:start]
        held = max((self._begun(text, stop) for stop in self._stops), default=0)
        shown = text[: len(text) - held]
        self._held, self._early = text[len(shown) :], max(0, self._early - len(shown))
        return shown

    def finish(self) -> str:
        """What was held back: nothing follows."""
        held, self._held = self._held, ""
        return held

    @staticmethod
    def _begun(text: str, stop: str) -> int:
        """How many of the text's last characters begin this stop text."""
        return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
