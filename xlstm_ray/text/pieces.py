"""Encoded pieces of a text: where they can be cut and joined, and those that are kept for texts to come."""

from array import array
from dataclasses import dataclass
from itertools import chain
from threading import Lock

import numpy as np
from tokenizers import Encoding

AGREE = 8  # tokens, at least, or half of an overlap
IDS = "I"  # unsigned, as in the library: an id may be outside the vocabulary, which the caller reports
MOST = 1 << 21  # characters of pieces that are kept, of English with some 4 bytes each


@dataclass(eq=False)
class Piece:
    """The encoding of a part of a text that begins at `start`, with places in the whole text. Arrays have an element
    for each token.

    sure: what comes after may change tokens near it; of white space at the end, an added token may take all. cuts:
    whether the text can be cut before a token. word_begins: whether a word begins there, too. first: tokens before it
    belong to the piece before.
    """

    text: str
    start: int
    sure: int
    ids: "array[int]"
    begin: np.ndarray  # int64
    cuts: np.ndarray  # bool
    word_begins: np.ndarray  # bool
    first: int = 0

    @classmethod
    def of(cls, encoding: Encoding, text: str, start: int, sure: int) -> "Piece":
        ids = array(IDS, encoding.ids)
        places = np.fromiter(chain.from_iterable(encoding.offsets), np.int64, 2 * len(ids)).reshape(-1, 2) + start
        begin, reach = places[:, 0].copy(), np.maximum.accumulate(places[:, 1])
        words = np.array(encoding.word_ids, np.float64)  # None becomes NaN, which is not equal to itself
        cuts = np.ones(len(ids), bool)
        cuts[1:] = (reach[:-1] <= begin[1:]) & (begin[:-1] < begin[1:])
        word_begins = cuts.copy()
        word_begins[1:] &= words[1:] != words[:-1]
        return cls(text, start, sure, ids, begin, cuts, word_begins)

    @property
    def end(self) -> int:
        return self.start + len(self.text)

    def joined(self, following: "Piece", first: int, second: int, text: str) -> "Piece":
        """The piece of `text`: this one's tokens before `first`, and the following's from `second` on."""

        def both(one: np.ndarray, two: np.ndarray) -> np.ndarray:
            return np.concatenate([one[: first + 1], two[second + 1 :]])

        ids = self.ids[:first] + following.ids[second:]
        begin, cuts = both(self.begin, following.begin), both(self.cuts, following.cuts)
        return Piece(text, self.start, following.sure, ids, begin, cuts, both(self.word_begins, following.word_begins))

    def begins_as(self, shorter: "Piece") -> bool:
        """Whether this piece has the first used token of `shorter` too; if so, this piece is used from there."""
        n = self.first = shorter.first
        same = self.ids[: n + 1] == shorter.ids[: n + 1]
        return n == 0 or (same and np.array_equal(self.begin[: n + 1], shorter.begin[: n + 1]))

    def last_cut(self, before: int, anywhere: bool) -> int | None:
        """The last place up to `before` where a word begins (any token, if cuts may be anywhere); never the first."""
        can = (self.cuts if anywhere else self.word_begins) & (self.begin <= before)
        n = _last(can)
        return None if n <= self.first or self.begin[n] <= self.start else int(self.begin[n])

    def before(self, place: int) -> int:
        """The index of the last token that begins before a place; -1 if there is none."""
        return _last(self.begin < place)


def _last(marks: np.ndarray) -> int:
    """The index of the last True; -1 if there is none."""
    found = np.flatnonzero(marks)
    return int(found[-1]) if len(found) else -1


class Kept:
    """The pieces that were used last, up to MOST characters. For any threads. Tenants do not share them: from the time
    that a text takes, one could tell what another has."""

    def __init__(self) -> None:
        self._pieces: list[tuple[str, Piece]] = []  # with their tenants; the one that was used last comes last
        self._lock = Lock()

    def like(self, text: str, start: int, tenant: str) -> tuple[Piece | None, int]:
        """The piece with the longest beginning of a text, and how many characters that has."""
        with self._lock:
            pieces = [piece for owner, piece in self._pieces if piece.start == start and owner == tenant]
        best, most = None, 0
        for piece in pieces:
            if piece.text == text:
                return piece, len(text)
            alike = _alike(piece.text, text)
            if alike > most:
                best, most = piece, alike
        return best, most

    def keep(self, piece: Piece, instead: Piece | None, tenant: str) -> None:
        """Keep a piece that is used now, `instead` of another."""

        def same(owner: str, other: Piece) -> bool:
            return owner == tenant and other.start == piece.start and other.text == piece.text

        with self._lock:
            others = [(owner, one) for owner, one in self._pieces if one is not instead and not same(owner, one)]
            free, kept = MOST, []
            for owner, one in [(tenant, piece), *reversed(others)]:
                if len(one.text) <= free:
                    kept.append((owner, one))
                    free -= len(one.text)
            self._pieces = kept[::-1]


def _alike(one: str, two: str) -> int:
    """How many characters both texts begin with."""
    alike, apart = 0, min(len(one), len(two)) + 1
    while alike < apart - 1:
        place = (alike + apart) // 2
        if one[alike:place] == two[alike:place]:
            alike = place
        else:
            apart = place
    return alike


def join(one: Piece, two: Piece, upto: int, enough: int, anywhere: bool) -> tuple[int, int] | None:
    """The index, in each piece, of the first token from which both agree up to `upto`; None if there is none.

    They agree in AGREE tokens or from the character `enough` on: there may be fewer tokens, of long words.
    """
    a, b = one.before(upto) + 1, two.before(upto) + 1
    count = min(a - one.first, b)
    if count <= 0:
        return None
    of_one, of_two = slice(a - count, a), slice(b - count, b)
    begin, words, other_words = one.begin[of_one], one.word_begins[of_one], two.word_begins[of_two]
    ids, other_ids = np.frombuffer(one.ids, np.uint32)[of_one], np.frombuffer(two.ids, np.uint32)[of_two]
    same = words == other_words
    if b == count:  # at its first token, a piece seems to begin a word
        same[0] = True
    same &= (ids == other_ids) & (begin == two.begin[of_two])
    good = one.cuts[of_one] & two.cuts[of_two] if anywhere else words & other_words
    good &= (np.arange(count, 0, -1) >= AGREE) | (begin <= enough)
    good[: _last(~same) + 1] = False
    found = np.flatnonzero(good)
    return (a - count + int(found[0]), b - count + int(found[0])) if len(found) else None
