"""The log-probabilities of a prompt's own tokens, each after those before it."""

from collections.abc import Iterator, Sequence
from math import isnan
from typing import overload

import torch
from torch import Tensor
from torch.nn.functional import pad

from xlstm_ray.engine.decode import Made
from xlstm_ray.engine.tokens import Tokens
from xlstm_ray.engine.windows import Window
from xlstm_ray.runtime.executor import Following
from xlstm_ray.sampling.logprobs import Logprobs, logprobs
from xlstm_ray.text.history import Scored

AT_ONCE = 1024  # tokens whose numbers become objects at once


class _Row:
    """The tokens of a row, from `begin` on, and where they lie in windows. likeliest: how many of each place."""

    def __init__(self, tokens: Tokens, begin: int, likeliest: int):
        self._tokens, self._begin, self.likeliest = tokens, begin, likeliest

    def first(self, before: Tensor) -> Logprobs:
        """Of the first of them, from the logits (vocabulary,) before it; NaN if nothing is before it."""
        first = self._tokens[self._begin : self._begin + 1].long() if self._begin else torch.empty(0)
        known = first if len(first) else torch.tensor([-1])
        return logprobs(before.cpu().unsqueeze(0), known, self.likeliest)

    def following(self, window: Window) -> tuple[int, Tensor]:
        """Where the row's tokens begin in a window, and the tokens (T,) that follow each of them; -1: there is none."""
        start, end = window.part(self._begin, len(self._tokens))
        after = self._tokens[window.start + start + 1 : window.start + end + 1].long()
        return start, pad(after, (0, end - start - len(after)), value=-1)


class Sums(_Row):
    """The sum of the log-probabilities of the tokens that a run has read. before, so_far: of the given state."""

    def __init__(self, tokens: Tokens, begin: int, before: Tensor, so_far: Scored | None):
        super().__init__(tokens, begin, 0)
        self._seen, self._scored, self._sum = begin, 0, 0.0
        self._next = self.first(before).chosen.item()  # of the token that is read next
        if so_far is not None and so_far.seen == begin:
            self._scored, self._sum = so_far.tokens, so_far.logprob
            if so_far.following is not None and tokens[begin : begin + 1].tolist() == [so_far.following[0]]:
                self._next = so_far.following[1]  # to the bit what it was in its window

    def add(self, found: Logprobs, b: int, start: int, end: int) -> None:
        """Of the tokens that follow those of a window: row b, whose tokens are start <= t < end."""
        after = found.chosen[b, start:end].tolist()
        for logprob in (self._next, *after[:-1]):
            if not isnan(logprob):  # a prompt's first token
                self._sum, self._scored = self._sum + logprob, self._scored + 1
        self._next, self._seen = after[-1], self._seen + len(after)

    @property
    def so_far(self) -> Scored:
        """Of the tokens that were read."""
        token = self._tokens[self._seen : self._seen + 1].tolist()
        following = None if not token or isnan(self._next) else (token[0], self._next)
        return Scored(seen=self._seen, tokens=self._scored, logprob=self._sum, following=following)


class Scores(_Row, Sequence[Made | None]):
    """Of each token that a run has read, in order; None for a prompt's first token, since nothing comes before it.

    A text that is read in parts, each from the state of the one before, has the parts' scores one after the other.
    They stay tensors, of 4 + 12 x likeliest bytes a token, and become objects one by one. tokens: the row's, of which
    those from `begin` on are read. before: (vocabulary,) the logits of the given state. likeliest: how many.
    """

    def __init__(self, tokens: Tokens, begin: int, before: Tensor, likeliest: int):
        super().__init__(tokens, begin, likeliest)
        self._parts = [self.first(before)]

    def add(self, found: Logprobs, b: int, start: int, end: int) -> None:
        """Of the tokens that follow those of a window: row b, whose tokens are start <= t < end."""
        self._parts.append(Logprobs(*(part[b, start:end] for part in found)))

    def cut(self, length: int) -> None:
        """So many tokens are read after all: the state may be that of an earlier window."""
        if length < len(self):
            self._parts = [Logprobs(*(part[: length + 1] for part in self._all))]

    @property
    def tokens(self) -> list[int]:
        """The tokens that these are of."""
        return self._tokens[self._begin : self._begin + len(self)].tolist()

    def __len__(self) -> int:
        return sum(len(part.chosen) for part in self._parts) - 1  # what follows the last one is not read yet

    @overload
    def __getitem__(self, at: int) -> Made | None: ...
    @overload
    def __getitem__(self, at: slice) -> list[Made | None]: ...
    def __getitem__(self, at: int | slice) -> "Made | None | list[Made | None]":
        if isinstance(at, slice):
            return [self[n] for n in range(*at.indices(len(self)))]
        if not -len(self) <= at < len(self):
            raise IndexError(at)
        n = at % len(self)
        return self._made(n, n + 1)[0]

    def __iter__(self) -> Iterator[Made | None]:
        for n in range(0, len(self), AT_ONCE):
            yield from self._made(n, min(n + AT_ONCE, len(self)))

    @property
    def _all(self) -> Logprobs:
        if len(self._parts) > 1:
            self._parts = [Logprobs(*map(torch.cat, zip(*self._parts, strict=True)))]
        return self._parts[0]

    def _made(self, start: int, end: int) -> list[Made | None]:
        rows = zip(*(part[start:end].tolist() for part in self._all), strict=True)
        return [None if isnan(own) else Made(own, list(zip(ids, top, strict=True))) for own, ids, top in rows]


def following(window: Window, rows: Sequence[Scores] | Sequence[Sums]) -> Following:
    """The tokens that follow those of a window, of all rows; as many likeliest ones of each."""
    tokens = torch.full((len(rows), window.size), -1)
    for b, row in enumerate(rows):
        start, after = row.following(window)
        tokens[b, start : start + len(after)] = after
    return Following(tokens, rows[0].likeliest)
