"""A model's tokenizer.json. Each of its failures becomes an error of one line."""

import os
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile, gettempdir
from threading import RLock
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE
from torch import Tensor

from xlstm_ray.config import ModelConfig, read_json
from xlstm_ray.errors import CheckpointError, OutputError, UsageError, one_line
from xlstm_ray.text.detokenize import Detokenizer, TextEnd, TextStream
from xlstm_ray.text.encode import Led, TextEncoder, joined
from xlstm_ray.text.ondisk import TextFile, TokenFile
from xlstm_ray.text.prompt import Given, Prompt, require_text, token_ids

HEAD = 1 << 10  # characters of a text, by which it is decided what comes before it
_STDERR = RLock()
T = TypeVar("T")


class NextToken(NamedTuple):
    id: int
    text: str
    logprob: float


class Text:
    """A model's texts to tokens and back. Raises CheckpointError for an unusable tokenizer.json.

    between: called between two pieces of a long text with the finished and total number of characters; it may raise.
    """

    def __init__(
        self, model: Path, config: ModelConfig, between: Callable[[int, int], object] = lambda done, characters: None
    ):
        self._file, self._config, self._between = model / "tokenizer.json", config, between
        self.tokenizer = load_tokenizer(self._file)
        calling = partial(tokenizing, self._file)
        self._encoder = TextEncoder(self.tokenizer, calling=calling)
        self._detokenizer = Detokenizer(self.tokenizer, calling=calling)

    @property
    def vocabulary(self) -> int:
        """How many tokens the model knows."""
        return self._config.vocab_size

    def tokens(self, prompt: Given, after: Sequence[int] | None = None, tenant: str = "") -> Tensor:
        """A prompt's tokens (T,) int32, with the begin token if the model's configuration asks for it.

        after: of a text that follows these tokens, as with `more`. tenant: only of his texts some tokens are known
        already. Raises UsageError for an empty prompt or a token outside the vocabulary.
        """
        ids = self._taken(prompt, joined, after, tenant) if isinstance(prompt, str | TextFile) else token_ids(prompt)
        return self._checked(prompt, ids)

    def on_disk(self, prompt: TextFile | TokenFile, after: Sequence[int] | None = None) -> TokenFile:
        """The same of a prompt that is a file, in a file: only some of the tokens are in memory at once.

        after: of a text that follows these tokens, as with `more`. Raises OutputError where the file cannot be written.
        """
        if isinstance(prompt, TokenFile):
            for ids in prompt.pieces():
                self._checked(prompt, ids)
            return prompt

        def write(pieces: "Iterable[array[int]]") -> TokenFile:
            return TokenFile.of((ids for ids in pieces if len(self._checked(prompt, ids))), prompt.folder)

        try:
            return self._taken(prompt, write, after)  # nothing of a file is kept
        except OSError as err:
            where = prompt.folder or gettempdir()
            raise OutputError(f"{where}: the prompt's tokens cannot be kept there ({err.strerror})") from None

    def more(self, more: Prompt, after: Sequence[int] = (), tenant: str = "") -> list[int]:
        """The tokens of a text that follows the tokens `after`: without a begin token or other tokens around a text.

        Some tokenizers put a space before a text's first word; here it is avoided if possible.
        """
        return self.tokens(more, after, tenant).tolist()

    def conversation(self, rendered: str) -> list[int]:
        """The tokens of what a chat template made, which writes special tokens itself."""
        return self._config.begun(self.more(rendered))

    def likeliest(self, logits: Tensor, count: int) -> list[NextToken]:
        """The likeliest next tokens: logits (vocabulary,) -> id, text, log probability. Equal ones are in the order of
        their ids, as in greedy decoding."""
        best = logits.sort(descending=True, stable=True).indices[:count]
        chances = torch.log_softmax(logits.double(), -1)[best]
        return [NextToken(i, self.text_of([i]), p) for p, i in zip(chances.tolist(), best.tolist(), strict=True)]

    def text_of(self, tokens: Sequence[int]) -> str:
        """The text of tokens, also of special ones. Raises UsageError for one outside the vocabulary."""
        ids = self._checked(tokens, token_ids(tokens)).tolist() if tokens else []
        with tokenizing(self._file):
            return self.tokenizer.decode(ids, skip_special_tokens=False)

    def stream(self, end: TextEnd) -> TextStream:
        """A stream that turns tokens into pieces of text, after a text with this end."""
        return self._detokenizer.stream(end)

    def end_of(self, tokens: Sequence[int], before: TextEnd | None = None) -> TextEnd:
        """As Detokenizer.end_of."""
        return self._detokenizer.end_of(tokens, before)

    def _lead(self, more: str | TextFile, after: Sequence[int]) -> str:
        """What is to come before a text that follows these tokens, so that no space does, if that can be. Only the
        text's beginning is looked at."""
        if not after:
            return ""
        head = more[:HEAD]
        head = head.rstrip() or head if len(more) > HEAD else head  # some tokenizers drop a space at an end
        before = self._detokenizer.decode(after)
        for lead in "", "\n", ".", "a":
            ids = self._encoder.encode(lead + head, special=False, skip=len(lead))
            if self._detokenizer.decode([*after, *ids]) == before + head:
                return lead
        return ""

    def _taken(
        self,
        prompt: str | TextFile,
        take: "Callable[[Iterable[array[int]]], T]",
        after: Sequence[int] | None,
        tenant: str = "",
    ) -> T:
        """What `take` makes of a text's tokens, which come some at a time. after: what it follows; None: a prompt."""
        if isinstance(prompt, str):
            require_text(prompt)

        whole, before = after is None, "" if after is None else self._lead(prompt, after)

        def between(done: int) -> None:
            self._between(done - len(before), len(prompt))
            if isinstance(prompt, TextFile):
                prompt.on_piece(done - len(before), len(prompt))

        def begun(pieces: "Iterable[array[int]]") -> "Iterator[array[int]]":
            forced = whole and self._config.force_bos_token_insert
            bos, began = self._config.bos_token_id if forced else None, False
            for ids in pieces:
                if ids:
                    if not began and bos not in (None, ids[0]):
                        yield array("I", [bos or 0])
                    yield ids
                    began = True
            if len(prompt) and not began:
                raise CheckpointError(f"{self._file}: makes no tokens of the prompt")

        text = before + prompt if isinstance(prompt, str) else Led(before, prompt) if before else prompt
        skip = len(before)
        return self._encoder.taken_by(
            lambda pieces: take(begun(pieces)), text, between, special=whole, skip=skip, tenant=tenant
        )

    def _checked(self, prompt: Given, ids: "array[int]") -> Tensor:
        """The prompt's tokens, int32, if all are in the vocabulary."""
        if not ids:
            raise UsageError("the prompt is empty; give at least one token")
        vocabulary, found = self.vocabulary, np.frombuffer(ids, ids.typecode)
        odd = next((t for t in (int(found.min()), int(found.max())) if not 0 <= t < vocabulary), None)
        if odd is not None and isinstance(prompt, str | TextFile):
            raise CheckpointError(
                f"{self._file}: makes token {odd} of the prompt, but config.json says vocab_size {vocabulary}"
            )
        if odd is not None:
            raise UsageError(f"token {odd} is outside the model's vocabulary of {vocabulary}")
        return torch.from_numpy(found.view(np.int32) if found.itemsize == 4 else found.astype(np.int32))


def load_tokenizer(path: Path) -> Tokenizer:
    read_json(path, CheckpointError)
    with tokenizing(path), held_stderr():
        tokenizer = Tokenizer.from_file(str(path))
        # A file may ask for these, and a prompt would silently be cut, padded or changed at random.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        if isinstance(tokenizer.model, BPE):
            tokenizer.model.dropout = None
        # Panics happen here, before anything is loaded; some need a longer text without digits. A character that the
        # vocabulary lacks is not an error.
        for text in ("A word, 1 \u00e9\u8a9e\n", "Once upon a time there were some more words in a row. " * 4):
            with suppress(Exception):
                tokenizer.decode(tokenizer.encode(text).ids)
    return tokenizer


@contextmanager
def tokenizing(path: Path) -> Iterator[None]:
    """Turn every failure of the tokenizers library into a CheckpointError; it raises nothing narrower than Exception.

    This includes panics of its Rust code: they are a BaseException whose class cannot be imported.
    """
    try:
        yield
    except BaseException as err:
        if not isinstance(err, Exception) and type(err).__name__ != "PanicException":
            raise
        raise CheckpointError(f"{path}: the tokenizers library cannot work with it: {one_line(err)}") from None


@contextmanager
def held_stderr() -> Iterator[None]:
    """Hold back output to file descriptor 2, and drop it after an exception: a panic prints its backtrace.

    It affects the whole process, so it is used only while a model is loaded.
    """
    with _STDERR, TemporaryFile() as held:
        try:
            kept = os.dup(2)
        except OSError:  # closed: nothing to hold back
            yield
            return
        os.dup2(held.fileno(), 2)
        try:
            yield
            held.seek(0)
            os.write(kept, held.read())  # output of other threads
        finally:
            os.dup2(kept, 2)
            os.close(kept)
