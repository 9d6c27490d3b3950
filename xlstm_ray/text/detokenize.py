"""Tokens to pieces of text, token by token: the joined pieces are the tokenizer's text of all tokens.

Only a short window of the last tokens is decoded, since the end of a text depends on little before it. A piece is the
new text of the window. Text that may still change is held back: the mark of an incomplete character (U+FFFD), and a run
of single-byte tokens, which the tokenizer shows either as characters or only as marks, depending on the whole run.
"""

import json
import re
from codecs import getincrementaldecoder
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from os.path import commonprefix
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MARK = "\ufffd"
KEPT = 8  # visible printed tokens that a window keeps
_HIDDEN = -1
_BYTE = re.compile("<0x([0-9A-Fa-f]{2}|\\+[0-9A-Fa-f])>")  # what the tokenizers library treats as a byte
LEAST = 4  # least characters that they show, so that three bytes of an unfinished character lie within


class TextEnd(BaseModel):
    """The end of a row's text, to go on from: its last visible tokens, and the part of their text that is printed."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    tokens: list[Annotated[int, Field(ge=0, lt=1 << 31)]] = []
    printed: str = ""


class Detokenizer:
    """Decodes a tokenizer's tokens; hidden (special) tokens have no text.

    calling: a context around every call of the tokenizers library.
    """

    def __init__(self, tokenizer: "Tokenizer", *, calling: Callable[[], AbstractContextManager] = nullcontext):
        self._tokenizer, self._calling = tokenizer, calling
        self._special = {added.content for added in tokenizer.get_added_tokens_decoder().values() if added.special}
        decoder = tokenizer.decoder
        self._joins_bytes = decoder is not None and "ByteFallback" in _types(json.loads(decoder.__getstate__()))
        self._kinds: dict[int, int | None] = {}  # kinds of the tokens seen so far: hidden, a byte, or None

    def decode(self, tokens: Sequence[int]) -> str:
        if not tokens:
            return ""
        with self._calling():
            return self._tokenizer.decode(tokens, skip_special_tokens=True)

    def stream(self, end: TextEnd) -> "TextStream":
        return TextStream(self, end)

    def end_of(self, tokens: Sequence[int], before: TextEnd | None = None) -> TextEnd:
        """The end of a text that a person gave or has seen: of `before` and `tokens` together."""
        backwards = self._visible_backwards(tokens, before.tokens if before else [])
        run: list[int] = []
        window: list[int] = []
        for token in backwards:
            if not window and self.byte(token) is not None:
                run.append(token)
                continue
            window.append(token)  # beyond 64 are tokens that show hardly anything
            if len(window) >= 64 or (len(window) >= KEPT and len(self.decode(window[::-1])) >= LEAST):
                break
        window = window[::-1] + self._end_of_run(run[::-1])
        return TextEnd(tokens=window, printed=self.decode(window))

    def hidden(self, token: int) -> bool:
        return self._kind(token) == _HIDDEN

    def byte(self, token: int) -> int | None:
        """The byte of this token, if the tokenizer joins neighbouring byte tokens into characters."""
        kind = self._kind(token)
        return None if kind == _HIDDEN else kind

    def _kind(self, token: int) -> int | None:
        if token not in self._kinds:
            piece = self._tokenizer.id_to_token(token)
            if piece is None or piece in self._special:
                self._kinds[token] = _HIDDEN
            else:
                named = _BYTE.fullmatch(piece) if self._joins_bytes else None
                self._kinds[token] = int(named[1], 16) if named else None
        return self._kinds[token]

    def _visible_backwards(self, *parts: Sequence[int]) -> Iterator[int]:
        return (token for part in parts for token in reversed(part) if not self.hidden(token))

    def _end_of_run(self, run: list[int]) -> list[int]:
        """Shorten a long run of byte tokens to its last characters, or to bytes that turn all of it into marks."""
        data = bytes(self.byte(token) or 0 for token in run)
        if len(data) <= 4 * KEPT:
            return run
        try:
            getincrementaldecoder("utf-8")().decode(data)
        except UnicodeDecodeError as err:  # four bytes from there are not text, whatever follows
            return run[err.start : err.start + 4]
        leads = [n for n, value in enumerate(data) if value & 0xC0 != 0x80]
        return run[leads[-KEPT] :]


class TextStream:
    """Turns one row's tokens into pieces of text."""

    def __init__(self, detokenizer: Detokenizer, end: TextEnd):
        self._of, self._tokens, self._printed = detokenizer, list(end.tokens), end.printed
        self._checked = 2 * KEPT  # the window's size at which it is shortened

    def step(self, token: int) -> str:
        """The text that this token adds and that cannot change any more."""
        if self._of.hidden(token):
            return ""
        self._tokens.append(token)
        if self._of.byte(token) is not None:
            return ""
        text = self._of.decode(self._tokens)
        piece = self._print(text[:-1] if text.endswith(MARK) else text)
        if len(self._tokens) >= self._checked:
            self._shorten(text)
        return piece

    def finish(self) -> str:
        """The text that was held back; call it when no token follows."""
        return self._print(self._of.decode(self._tokens))

    def end(self) -> TextEnd:
        """The end of the text, for a later run."""
        return TextEnd(tokens=self._tokens, printed=self._printed)

    def _print(self, text: str) -> str:
        if self._printed.startswith(text):
            return ""
        piece = text[len(commonprefix([text, self._printed])) :]
        self._printed = text
        return piece

    def _shorten(self, text: str) -> None:
        """Forget tokens that the following text does not depend on."""
        kept = self._tokens[-KEPT:]
        shown = self._of.decode(kept)
        held = len(text) - len(self._printed)
        alike = held == 0 or (held == 1 and shown.endswith(MARK))
        if len(shown) >= LEAST and text.startswith(self._printed) and alike:
            self._tokens, self._printed, self._checked = kept, shown[: len(shown) - held], 2 * KEPT
        else:  # most tokens have no text: check again at twice the size
            self._checked = 2 * len(self._tokens)


def _types(decoder: Any) -> set[str]:
    """The types of a decoder and of the decoders inside it."""
    if isinstance(decoder, list):
        return set().union(*map(_types, decoder)) if decoder else set()
    return {decoder["type"]} | _types(decoder.get("decoders", [])) if isinstance(decoder, dict) else set()
