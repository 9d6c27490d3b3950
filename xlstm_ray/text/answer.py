"""One row's answer: turns its tokens into shown text, and decides where and why it ends."""

from collections.abc import Collection
from typing import Literal, NamedTuple

from xlstm_ray.sampling import Sampling
from xlstm_ray.text.detokenize import TextStream
from xlstm_ray.text.stop import StopMatcher


class Finish(NamedTuple):
    """Why an answer ended; for `stop`, which end token or stop text ended it."""

    reason: Literal["stop", "length", "cancelled", "error"]
    by: int | str | None = None


class Answer:
    """Takes an answer's tokens one after the other.

    ends: the end tokens. stream: turns tokens into text. last: no later call goes on from here, so a character that the
    limit cuts shows as U+FFFD; if False, its bytes wait in `stream`.
    `tokens` has no end token. `text` is the shown text, and `said` is the text of all tokens: the shown text and the
    stop text that ended it. `finish` is None until the answer has ended.
    """

    def __init__(self, sampling: Sampling, ends: Collection[int], stream: TextStream, *, last: bool = True):
        self.sampling, self.stream = sampling, stream
        self._ends = () if sampling.ignore_eos else ends
        self._stops, self._last = StopMatcher(sampling.stop), last
        self.tokens: list[int] = []
        self.text = self.said = ""
        self.finish: Finish | None = None

    def step(self, token: int) -> str:
        """The text to show after this token. `finish` is set if it was the last token."""
        assert self.finish is None
        if token in self._ends:
            return self._end(Finish("stop", token), flush=True)
        self.tokens.append(token)
        piece = self._show(self.stream.step(token))
        if self._stops.found is not None:
            return piece + self._end(Finish("stop", self._stops.found))
        if len(self.tokens) == self.sampling.max_new_tokens:
            return piece + self._end(Finish("length"), flush=self._last)
        return piece

    def end(self, reason: Literal["cancelled", "error"]) -> str:
        """End the answer without another token; returns the text that was held back."""
        return self._end(Finish(reason), flush=self._last) if self.finish is None else ""

    def _end(self, finish: Finish, *, flush: bool = False) -> str:
        piece = self._show(self.stream.finish()) if flush else ""
        if self._stops.found is not None:
            finish = Finish("stop", self._stops.found)
        held = self._stops.finish()
        self.text += held
        self.finish = finish
        return piece + held

    def _show(self, said: str) -> str:
        self.said += said
        # As in vLLM: a stop text that is complete within the first min_tokens tokens does not end the answer.
        shown = self._stops.feed(said, may_stop=len(self.tokens) > self.sampling.min_tokens)
        self.text += shown
        return shown
