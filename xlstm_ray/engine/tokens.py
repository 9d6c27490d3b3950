"""Rows of tokens, in memory or in a file, and the part of them that is in a window."""

from array import array
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from xlstm_ray.engine.windows import Window
from xlstm_ray.text.ondisk import TokenFile


class Tail:
    """A row's tokens from position `start` on; the tokens before are already in a state. Indices are positions."""

    def __init__(self, tokens: "Tensor | Stored", start: int):
        self.tokens, self._start = tokens, start

    def __len__(self) -> int:
        return self._start + len(self.tokens)

    def __getitem__(self, part: slice) -> Tensor:
        start, stop, _ = part.indices(len(self))
        if start >= stop:  # a row without tokens in a window
            return self.tokens[:0]
        assert start >= self._start
        return self.tokens[start - self._start : stop - self._start]


class Stored:
    """A row's tokens in a file. A slice is read when it is asked for."""

    def __init__(self, file: TokenFile):
        self.file = file

    def __len__(self) -> int:
        return len(self.file)

    def __getitem__(self, part: slice) -> Tensor:
        return torch.tensor(array("i", self.file[part].tobytes()), dtype=torch.int32)


Tokens = Tensor | Tail | Stored


def ids(tokens: Tokens, part: slice = slice(None)) -> memoryview | TokenFile:
    """Token ids (int32) of a row whose tokens are all here, without making Python integers of all of them."""
    if isinstance(tokens, Stored):
        return tokens.file[part]
    return (tokens[part].numpy() if isinstance(tokens, Tail) else tokens.numpy()[part]).data


class Part(NamedTuple):
    """The tokens of all rows in a window."""

    tokens: Tensor  # (B, T) int64; 0 is padding
    start: Tensor  # (B,) int64: row b's tokens are start[b] <= t < end[b]
    end: Tensor


def make_part(window: Window, rows: Sequence[Tokens], begin: Sequence[int]) -> Part:
    """The tokens of a window. rows: int64 prompts. begin: for each row, its first token that the state has not seen."""
    tokens = torch.zeros(len(rows), window.size, dtype=torch.long)
    parts = [window.part(b, len(row)) for b, row in zip(begin, rows, strict=True)]
    for b, (start, end) in enumerate(parts):
        tokens[b, start:end] = rows[b][window.start + start : window.start + end]
    starts, ends = zip(*parts, strict=True)
    return Part(tokens, torch.tensor(starts), torch.tensor(ends))
