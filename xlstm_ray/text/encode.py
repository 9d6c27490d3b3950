"""A text to tokens, piece by piece: a long text needs only the memory of its tokens, four bytes each, and a text in a
file not even that, where they are taken piece by piece too.

Pieces overlap. A piece begins at a word of the piece before. Two pieces are joined at a word from which both have the
same tokens at the same places, up to the overlap's last quarter: their tokens can differ only near a piece's ends. The
joined tokens are those of the whole text, because

- a tokenizer cuts words from left to right and does not look back beyond its last cut. So after a common cut both
  pieces have the same cuts, and words are encoded independently;
- if it cuts no words (byte pair encoding of a whole text, or of one endless word), a common token is enough: tokens are
  the encoding of their text exactly if every two neighbours are the encoding of theirs, and every pair of neighbours is
  inside one of the pieces.

If no such place is found, the piece is doubled, in the end to the whole text. A tokenizer that drops unknown characters
also gets the whole text at once: it does not report the places of its tokens.
"""

import json
from array import array
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from functools import lru_cache
from itertools import accumulate
from typing import TypeVar

from tokenizers import Encoding, Tokenizer

from xlstm_ray.text.ondisk import TextFile

PIECE = 1 << 16  # characters
KEPT = 32  # pieces that are kept, some 300 KB each, for texts that begin as one before
OVERLAP = 1 << 12  # characters; a tokenizer is assumed to look at fewer to cut a word
AGREE = 8  # tokens, at least, or half of an overlap
IDS = "I"  # unsigned, as in the library: an id may be outside the vocabulary, which the caller reports


T = TypeVar("T")


class _Whole(Exception):
    """This text must be cut at once."""


class Led:
    """A text in a file, after a few characters that the file does not have."""

    def __init__(self, lead: str, text: TextFile):
        self._lead, self._text = lead, text

    def __len__(self) -> int:
        return len(self._lead) + len(self._text)

    def __getitem__(self, part: slice) -> str:
        start, stop, _ = part.indices(len(self))
        before = len(self._lead)
        return self._lead[start:stop] + self._text[max(0, start - before) : max(0, stop - before)]


Given = str | TextFile | Led


class TextEncoder:
    """Encodes texts as `tokenizer.encode` does. The sizes of a piece and of an overlap are in characters.

    calling: a context around every call of the tokenizers library.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        calling: Callable[[], AbstractContextManager] = nullcontext,
        piece: int = PIECE,
        overlap: int = OVERLAP,
    ):
        self._whole, self._calling, self._piece, self._overlap = tokenizer, calling, piece, overlap
        self._plain: Tokenizer | None = None
        self._kept = lru_cache(KEPT)(self._encoded)

    def encode(
        self,
        text: Given,
        on_piece: Callable[[int], object] = lambda done: None,
        *,
        special: bool = True,
        skip: int = 0,
    ) -> "array[int]":
        """The token ids of the text. on_piece is called after every piece with the number of finished characters.

        special: with the tokens that the tokenizer adds around a text. skip: without those that begin before so many
        characters; it is not for special ones. Raises the errors of the tokenizers library.
        """
        return self.taken_by(joined, text, on_piece, special=special, skip=skip)

    def taken_by(
        self,
        take: "Callable[[Iterable[array[int]]], T]",
        text: Given,
        on_piece: Callable[[int], object],
        *,
        special: bool = True,
        skip: int = 0,
    ) -> T:
        """What `take` makes of the ids, which come some at a time. It is called once more if that does not work out."""
        assert not (special and skip)
        try:
            return take(self._pieces(text, on_piece, special, skip))
        except _Whole:
            return take([self._at_once(text, special, skip)])

    def _pieces(
        self, text: Given, on_piece: Callable[[int], object], special: bool, skip: int
    ) -> "Iterator[array[int]]":
        if len(text) <= self._piece:
            raise _Whole
        if self._plain is None:
            with self._calling():
                parts = json.loads(self._whole.to_str())
                # Off: it changes offsets and adds tokens at the ends of a text, but pieces are inside of one.
                self._plain = Tokenizer.from_str(json.dumps(parts | {"post_processor": None}))
            self._strips = any(token["lstrip"] for token in parts["added_tokens"])
            self._joins_within_words = _joins_within_words(parts)
            self._knows_places = _knows_places(parts)
        if not self._knows_places:
            raise _Whole
        before, after = self._added() if special else ([], [])
        yield array(IDS, before)
        at, size = 0, self._piece
        piece = self._piece_of(text, at, size)
        piece.first = _after(skip, piece.begin)
        while piece.end < len(text):
            following, join = self._next(text, piece)
            if join is None:  # repeat this piece with twice the length
                size *= 2
                longer = self._piece_of(text, at, size)
                if not longer.begins_as(piece):
                    raise _Whole
                piece = longer
                continue
            first, second = join
            yield piece.ids[piece.first : first]
            following.first = second
            piece, at, size = following, following.start, self._piece
            on_piece(at)
        yield piece.ids[piece.first :]
        on_piece(len(text))
        yield array(IDS, after)

    def _at_once(self, text: Given, special: bool, skip: int) -> "array[int]":
        with self._calling():
            encoding = self._whole.encode(text[:], add_special_tokens=special)
            first = _after(skip, (start for start, _ in encoding.offsets)) if skip else 0
            return array(IDS, encoding.ids[first:])

    def _piece_of(self, text: Given, start: int, size: int) -> "_Piece":
        """text[start:start + size], encoded. A file's are not kept: it takes no memory, and comes once."""
        part = text[start : start + size]
        return copy(self._kept(part, start)) if isinstance(text, str) else self._encoded(part, start)

    def _encoded(self, part: str, start: int) -> "_Piece":
        assert self._plain is not None
        sure = part.rstrip() if self._strips else part
        with self._calling():
            encoding = self._plain.encode(part, add_special_tokens=False)
        return _Piece(encoding, start, start + len(part), start + len(sure))

    def _next(self, text: Given, piece: "_Piece") -> "tuple[_Piece, tuple[int, int] | None]":
        """The next piece, and the place of their join: the index of the same token in both."""
        within = [False, True] if self._joins_within_words else [False]
        for anywhere in within:
            cut = piece.last_cut(piece.sure - self._overlap, anywhere)
            if cut is not None:
                following = self._piece_of(text, cut, self._piece)
                upto = piece.sure - self._overlap // 4
                join = _join(piece, following, upto, upto - self._overlap // 2, anywhere)
                if join is not None:
                    return following, join
        return piece, None

    def _added(self) -> tuple[list[int], list[int]]:
        """The ids that the tokenizer adds before and after a text."""
        with self._calling():
            encoding = self._whole.encode("a")
        own = [n for n, sequence in enumerate(encoding.sequence_ids) if sequence is not None]
        if not own:
            return [], []
        return encoding.ids[: own[0]], encoding.ids[own[-1] + 1 :]


def _after(skip: int, begins: Iterable[int]) -> int:
    """The index of the first token that begins at this character or later; the number of all if there is none."""
    n = -1
    for n, begin in enumerate(begins):
        if begin >= skip:
            return n
    return n + 1


def joined(pieces: "Iterable[array[int]]") -> "array[int]":
    """All ids together."""
    ids = array(IDS)
    for some in pieces:
        ids.extend(some)
    return ids


class _Piece:
    """The encoding of text[start:end], with places in the whole text.

    sure: what comes after may change tokens near it; of white space at the end, an added token may take all.
    """

    def __init__(self, encoding: Encoding, start: int, end: int, sure: int):
        self.start, self.end, self.sure = start, end, sure
        self.first = 0  # tokens before it belong to the piece before
        self.ids = array(IDS, encoding.ids)
        self.begin = array("q", (start + b for b, _ in encoding.offsets))
        ends = [start + e for _, e in encoding.offsets]
        reach = array("q", accumulate(ends, max))
        words = encoding.word_ids
        count = len(self.ids)
        # For each token: can the text be cut before it, and does a word begin there.
        self.cuts = bytearray(
            n == 0 or (reach[n - 1] <= self.begin[n] and self.begin[n - 1] < self.begin[n]) for n in range(count)
        )
        self.word_begins = bytearray(
            bool(self.cuts[n]) and (n == 0 or words[n] is None or words[n] != words[n - 1]) for n in range(count)
        )

    def begins_as(self, shorter: "_Piece") -> bool:
        """Whether this piece has the first used token of `shorter` too; if so, this piece is used from there."""
        n = self.first = shorter.first
        return n == 0 or (self.ids[: n + 1] == shorter.ids[: n + 1] and self.begin[: n + 1] == shorter.begin[: n + 1])

    def last_cut(self, before: int, anywhere: bool) -> int | None:
        """The last place up to `before` where a word begins (any token, if cuts may be anywhere); never the first."""
        can = self.cuts if anywhere else self.word_begins
        found = (n for n in range(len(self.ids) - 1, self.first, -1) if can[n] and self.begin[n] <= before)
        n = next(found, None)
        return None if n is None or self.begin[n] <= self.start else self.begin[n]


def _join(one: _Piece, two: _Piece, upto: int, enough: int, anywhere: bool) -> tuple[int, int] | None:
    """The index, in each piece, of the first token from which both agree up to `upto`; None if there is none.

    They agree in AGREE tokens or from the character `enough` on: there may be fewer tokens, of long words.
    """
    a = next((n for n in range(len(one.ids) - 1, -1, -1) if one.begin[n] < upto), None)
    b = next((n for n in range(len(two.ids) - 1, -1, -1) if two.begin[n] < upto), None)
    if a is None or b is None:
        return None
    same, found = 0, None
    while a >= one.first and b >= 0 and one.ids[a] == two.ids[b] and one.begin[a] == two.begin[b]:
        if one.word_begins[a] != two.word_begins[b] and b > 0:
            break
        same += 1
        good = one.cuts[a] and two.cuts[b] if anywhere else one.word_begins[a] and two.word_begins[b]
        if good and (same >= AGREE or one.begin[a] <= enough):
            found = a, b
        a, b = a - 1, b - 1
    return found


def _knows_places(parts: dict) -> bool:
    """Whether a tokenizer (its JSON) has right offsets: the library's are wrong after a dropped character."""
    model = parts["model"]
    return (
        model["type"] != "BPE"
        or model.get("unk_token") is not None
        or any(_has(parts[key], "ByteLevel") for key in ("pre_tokenizer", "normalizer"))
    )


def _has(part: dict | None, kind: str) -> bool:
    return json.dumps({"type": kind})[1:-1] in json.dumps(part)


def _joins_within_words(parts: dict) -> bool:
    """Whether a word may be cut at any of its tokens: only if nothing but merges decides its tokens.

    parts: a tokenizer's JSON.
    """
    model, cutter = parts["model"], parts["pre_tokenizer"]
    cutters = cutter.get("pretokenizers", [cutter]) if cutter else []
    return (
        model["type"] == "BPE"
        and not any(model.get(key) for key in ("continuing_subword_prefix", "end_of_word_suffix", "ignore_merges"))
        and all(one["type"] in ("ByteLevel", "Metaspace", "Whitespace", "WhitespaceSplit") for one in cutters)
    )
