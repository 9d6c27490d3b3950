"""A text to tokens, piece by piece: memory for a long text is that of its tokens, four bytes each.

Pieces overlap. A piece begins where a word of the one before begins, and is joined to it where from some word on both
have the same tokens at the same places up to the end of the overlap, but for its last quarter: only what a tokenizer
sees close to a piece's ends can make them differ. That is the encoding of the whole because

- a tokenizer cuts words from left to right and looks no further back than to where it cut last, so after a common cut
  both go on alike, and words are encoded apart from each other;
- where it cuts no words (byte pair encoding of a whole text, or of one endless word) a common token is enough: a row of
  tokens is the encoding of its text exactly where every two neighbours are that of theirs, and each pair is one in
  either piece.

Where no such place is found, the piece is doubled: at last it is the whole text. So is a tokenizer's that drops the
characters which it does not know: it does not say where its tokens are.
"""

import json
from array import array
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from itertools import accumulate

from tokenizers import Encoding, Tokenizer

PIECE = 1 << 16  # characters
OVERLAP = 1 << 12  # characters: what a tokenizer looks at to cut a word is taken to be shorter
AGREE = 8  # tokens, at least
IDS = "I"  # as the library counts them, without a sign: an id may be beyond every vocabulary, and the caller says so


class TextEncoder:
    """Encodes texts as `tokenizer.encode` does. The sizes of a piece and of an overlap are in characters.

    calling: what every call of the tokenizers library is made in.
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

    def encode(self, text: str, on_piece: Callable[[int], object] = lambda done: None) -> "array[int]":
        """The token ids of the text. on_piece is told after every piece how many characters are done.

        Raises what the tokenizers library raises.
        """
        if len(text) <= self._piece:
            return self._at_once(text)
        if self._plain is None:
            with self._calling():
                parts = json.loads(self._whole.to_str())
                # It changes offsets, and adds tokens at the ends of a text, which pieces are not.
                self._plain = Tokenizer.from_str(json.dumps(parts | {"post_processor": None}))
            self._joins_within_words = _joins_within_words(parts)
            self._knows_places = _knows_places(parts)
        if not self._knows_places:
            return self._at_once(text)
        before, after = self._added()
        ids = array(IDS, before)
        at, size = 0, self._piece
        piece = self._piece_of(text, at, size)
        while piece.end < len(text):
            following, join = self._next(text, piece)
            if join is None:  # this piece again, twice as long
                size *= 2
                longer = self._piece_of(text, at, size)
                if not longer.begins_as(piece):
                    return self._at_once(text)
                piece = longer
                continue
            first, second = join
            ids.extend(piece.ids[piece.first : first])
            following.first = second
            piece, at, size = following, following.start, self._piece
            on_piece(at)
        ids.extend(piece.ids[piece.first :])
        on_piece(len(text))
        ids.extend(after)
        return ids

    def _at_once(self, text: str) -> "array[int]":
        with self._calling():
            return array(IDS, self._whole.encode(text).ids)

    def _piece_of(self, text: str, start: int, size: int) -> "_Piece":
        """text[start:start + size], encoded."""
        assert self._plain is not None
        with self._calling():
            encoding = self._plain.encode(text[start : start + size], add_special_tokens=False)
            return _Piece(encoding, start, min(start + size, len(text)))

    def _next(self, text: str, piece: "_Piece") -> "tuple[_Piece, tuple[int, int] | None]":
        """The piece after this one, and where they join: the place of the same token in both."""
        within = [False, True] if self._joins_within_words else [False]
        for anywhere in within:
            cut = piece.last_cut(piece.end - self._overlap, anywhere)
            if cut is not None:
                following = self._piece_of(text, cut, self._piece)
                join = _join(piece, following, piece.end - self._overlap // 4, anywhere)
                if join is not None:
                    return following, join
        return piece, None

    def _added(self) -> tuple[list[int], list[int]]:
        """The ids that are added before and after a text."""
        with self._calling():
            encoding = self._whole.encode("a")
        own = [n for n, sequence in enumerate(encoding.sequence_ids) if sequence is not None]
        if not own:
            return [], []
        return encoding.ids[: own[0]], encoding.ids[own[-1] + 1 :]


class _Piece:
    """The encoding of text[start:end], with places in the whole text."""

    def __init__(self, encoding: Encoding, start: int, end: int):
        self.start, self.end = start, end
        self.first = 0  # the tokens before it are those of the piece before
        self.ids = array(IDS, encoding.ids)
        self.begin = array("q", (start + b for b, _ in encoding.offsets))
        ends = [start + e for _, e in encoding.offsets]
        reach = array("q", accumulate(ends, max))
        words = encoding.word_ids
        count = len(self.ids)
        # Whether the text can be cut before a token, and whether a word begins there.
        self.cuts = bytearray(
            n == 0 or (reach[n - 1] <= self.begin[n] and self.begin[n - 1] < self.begin[n]) for n in range(count)
        )
        self.word_begins = bytearray(
            bool(self.cuts[n]) and (n == 0 or words[n] is None or words[n] != words[n - 1]) for n in range(count)
        )

    def begins_as(self, shorter: "_Piece") -> bool:
        """Whether the first token that counts in `shorter` is in this piece too: it is where this one counts from."""
        n = self.first = shorter.first
        return n == 0 or (self.ids[: n + 1] == shorter.ids[: n + 1] and self.begin[: n + 1] == shorter.begin[: n + 1])

    def last_cut(self, before: int, anywhere: bool) -> int | None:
        """The last place up to `before` where a word begins, or a token where it may be anywhere; not the first one."""
        can = self.cuts if anywhere else self.word_begins
        found = (n for n in range(len(self.ids) - 1, self.first, -1) if can[n] and self.begin[n] <= before)
        n = next(found, None)
        return None if n is None or self.begin[n] <= self.start else self.begin[n]


def _join(one: _Piece, two: _Piece, upto: int, anywhere: bool) -> tuple[int, int] | None:
    """The first token of `two` from which both have the same up to `upto`, as its place in either; None: nowhere."""
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
        if good and same >= AGREE:
            found = a, b
        a, b = a - 1, b - 1
    return found


def _knows_places(parts: dict) -> bool:
    """Whether the offsets of a tokenizer (its JSON) are right: the library's are not after a character was dropped."""
    model = parts["model"]
    return (
        model["type"] != "BPE"
        or model.get("unk_token") is not None
        or any(_has(parts[key], "ByteLevel") for key in ("pre_tokenizer", "normalizer"))
    )


def _has(part: dict | None, kind: str) -> bool:
    return json.dumps({"type": kind})[1:-1] in json.dumps(part)


def _joins_within_words(parts: dict) -> bool:
    """Whether a word may be cut at any token of it: only where merges alone decide, and a word's rest is a word's rest.

    parts: a tokenizer's JSON.
    """
    model, cutter = parts["model"], parts["pre_tokenizer"]
    cutters = cutter.get("pretokenizers", [cutter]) if cutter else []
    return (
        model["type"] == "BPE"
        and not any(model.get(key) for key in ("continuing_subword_prefix", "end_of_word_suffix", "ignore_merges"))
        and all(one["type"] in ("ByteLevel", "Metaspace", "Whitespace", "WhitespaceSplit") for one in cutters)
    )
