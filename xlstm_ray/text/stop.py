"""Stop texts, found across pieces: text that may begin a stop text is held back."""

from collections.abc import Sequence


class StopMatcher:
    """Takes an answer's text piece by piece, and returns what may be shown: all text before the first stop text.

    The first stop text is the one that is complete first; of several that end at one place, the longest. So it depends
    only on the text, not on the pieces. `found` is the stop text, or None.
    """

    def __init__(self, stops: Sequence[str] = ()):
        self._stops = stops
        self._held = ""  # the longest end of the text that is the beginning of a stop text
        self._early = 0  # no stop text may end within this many characters of it
        self.found: str | None = None

    def feed(self, piece: str, *, may_stop: bool = True) -> str:
        """The text that may be shown after this piece. may_stop: False if no stop text may end in it."""
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
        """The text that was held back; call it when no piece follows."""
        held, self._held = self._held, ""
        return held

    @staticmethod
    def _begun(text: str, stop: str) -> int:
        """The number of the text's last characters that are the beginning of this stop text."""
        return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
