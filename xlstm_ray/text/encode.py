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

Pieces are kept for texts to come. What follows a text changes its tokens only near its end, be it nothing or another
text. So where a piece begins as a kept one, the rest and an overlap are encoded, and joined with that one's tokens.
"""

import json
from array import array
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from itertools import groupby
from typing import TypeVar

from tokenizers import Tokenizer
from tokenizers.models import BPE

from xlstm_ray.text.ondisk import TextFile
from xlstm_ray.text.pieces import IDS, Kept, Piece, join

PIECE = 1 << 16  # characters
OVERLAP = 1 << 12  # characters; a tokenizer is assumed to look at fewer to cut a word


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
        self._kept = Kept()

    def encode(
        self,
        text: Given,
        on_piece: Callable[[int], object] = lambda done: None,
        *,
        special: bool = True,
        skip: int = 0,
        tenant: str = "",
    ) -> "array[int]":
        """The token ids of the text. on_piece is called after every piece with the number of finished characters.

        special: with the tokens that the tokenizer adds around a text. skip: without those that begin before so many
        characters; it is not for special ones. tenant: whose texts it may go on from. Raises the errors of the
        tokenizers library.
        """
        return self.taken_by(joined, text, on_piece, special=special, skip=skip, tenant=tenant)

    def taken_by(
        self,
        take: "Callable[[Iterable[array[int]]], T]",
        text: Given,
        on_piece: Callable[[int], object],
        *,
        special: bool = True,
        skip: int = 0,
        tenant: str = "",
    ) -> T:
        """What `take` makes of the ids, which come some at a time. It is called once more if that does not work out."""
        assert not (special and skip)
        try:
            return take(self._pieces(text, on_piece, special, skip, tenant))
        except _Whole:
            return take([self._at_once(text, special, skip)])

    def _pieces(
        self, text: Given, on_piece: Callable[[int], object], special: bool, skip: int, tenant: str
    ) -> "Iterator[array[int]]":
        if len(text) <= min(self._piece, 2 * self._overlap):  # to go on from another saves nothing
            raise _Whole
        if self._plain is None:
            whole = self._whole
            with self._calling():
                plain = _plain(whole)
                self._added = _added(whole)
                self._strips = any(token.lstrip for token in whole.get_added_tokens_decoder().values())
                self._joins_within_words = _joins_within_words(whole)
                self._knows_places = _knows_places(whole)
            self._plain = plain  # at last: other threads look whether it is there
        if not self._knows_places:
            raise _Whole
        before, after = self._added if special else ([], [])
        yield array(IDS, before)
        piece_of = partial(self._piece_of, text, tenant)
        at, size = 0, self._piece
        piece = piece_of(at, size)
        piece.first = _after(skip, piece.begin)
        while piece.end < len(text):
            following, place = self._next(piece, lambda cut: piece_of(cut, self._piece))
            if place is None:  # repeat this piece with twice the length
                size *= 2
                longer = piece_of(at, size)
                if not longer.begins_as(piece):
                    raise _Whole
                piece = longer
                continue
            first, second = place
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

    def _piece_of(self, text: Given, tenant: str, start: int, size: int) -> Piece:
        """text[start:start + size], encoded. A file's are not kept: it takes no memory, and comes once."""
        part = text[start : start + size]
        if not isinstance(text, str):
            return self._encoded(part, start)
        like, alike = self._kept.like(part, start, tenant)
        piece = None
        if like is not None and like.text == part:
            piece = like
        # A longer piece is made where a join was not found, and would not be found here.
        elif like is not None and alike > 2 * self._overlap and size == self._piece:
            piece = self._continued(like, alike, part)
        if piece is None:
            piece = self._encoded(part, start)
        # It takes the place of one that has little else: many questions to one text keep it once.
        instead = like if like is not None and len(like.text) <= alike + self._overlap else None
        self._kept.keep(piece, instead, tenant)
        return replace(piece)  # `first` is its user's

    def _continued(self, like: Piece, alike: int, part: str) -> Piece | None:
        """The piece of a text whose first `alike` characters are those of another piece; None if they do not join."""
        begun = replace(like, sure=like.start + self._sure(part[:alike]))
        following, place = self._next(begun, lambda cut: self._encoded(part[cut - like.start :], cut))
        return None if place is None else begun.joined(following, *place, part)

    def _encoded(self, part: str, start: int) -> Piece:
        assert self._plain is not None
        with self._calling():
            encoding = self._plain.encode(part, add_special_tokens=False)
        return Piece.of(encoding, part, start, start + self._sure(part))

    def _sure(self, part: str) -> int:
        """How many characters what follows this text cannot change, but for those near it."""
        return len(part.rstrip() if self._strips else part)

    def _next(self, piece: Piece, piece_at: Callable[[int], Piece]) -> tuple[Piece, tuple[int, int] | None]:
        """The next piece, and the place of their join: the index of the same token in both."""
        within = [False, True] if self._joins_within_words else [False]
        for anywhere in within:
            cut = piece.last_cut(piece.sure - self._overlap, anywhere)
            if cut is not None:
                following = piece_at(cut)
                upto = piece.sure - self._overlap // 4
                place = join(piece, following, upto, upto - self._overlap // 2, anywhere)
                if place is not None:
                    return following, place
        return piece, None


def _plain(tokenizer: Tokenizer) -> Tokenizer:
    """A tokenizer with the same model, and no post-processor: that one changes offsets, and adds tokens at a text's
    ends, but pieces are inside of one."""
    plain = Tokenizer(tokenizer.model)
    plain.normalizer, plain.pre_tokenizer = tokenizer.normalizer, tokenizer.pre_tokenizer
    plain.encode_special_tokens = tokenizer.encode_special_tokens
    added = tokenizer.get_added_tokens_decoder()
    for special, tokens in groupby((added[n] for n in sorted(added)), key=lambda token: token.special):
        (plain.add_special_tokens if special else plain.add_tokens)(list(tokens))
    assert repr(plain.get_added_tokens_decoder()) == repr(added)
    return plain


def _added(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """The ids that a tokenizer adds before and after a text."""
    encoding = tokenizer.encode("a")
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


def _knows_places(tokenizer: Tokenizer) -> bool:
    """Whether a tokenizer has right offsets: the library's are wrong after a dropped character."""
    model, parts = tokenizer.model, (tokenizer.pre_tokenizer, tokenizer.normalizer)
    return (
        not isinstance(model, BPE)
        or model.unk_token is not None
        or any(b'"type":"ByteLevel"' in part.__getstate__() for part in parts if part is not None)
    )


def _joins_within_words(tokenizer: Tokenizer) -> bool:
    """Whether a word may be cut at any of its tokens: only if nothing but merges decides its tokens."""
    model, cutter = tokenizer.model, tokenizer.pre_tokenizer
    parts = None if cutter is None else json.loads(cutter.__getstate__())
    cutters = parts.get("pretokenizers", [parts]) if parts else []
    return (
        isinstance(model, BPE)
        and not (model.continuing_subword_prefix or model.end_of_word_suffix or model.ignore_merges)
        and all(one["type"] in ("ByteLevel", "Metaspace", "Whitespace", "WhitespaceSplit") for one in cutters)
    )
