"""A tokenizer.json, loaded and called so that each of its failures is one line."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile
from threading import RLock

from tokenizers import Tokenizer
from tokenizers.models import BPE

from xlstm_ray.config import read_json
from xlstm_ray.errors import CheckpointError, one_line

_STDERR = RLock()


def load_tokenizer(path: Path) -> Tokenizer:
    read_json(path, CheckpointError)
    with tokenizing(path), held_stderr():
        tokenizer = Tokenizer.from_file(str(path))
        # A file may ask for these, and a prompt would be cut, filled up or changed at random without a word.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        if isinstance(tokenizer.model, BPE):
            tokenizer.model.dropout = None
        # Panics come here, before anything is loaded; a character that the vocabulary lacks is no reason to refuse.
        with suppress(Exception):
            tokenizer.decode(tokenizer.encode("A word, 1 \u00e9\u8a9e\n").ids)
    return tokenizer


@contextmanager
def tokenizing(path: Path) -> Iterator[None]:
    """Every failure of the tokenizers library becomes a CheckpointError; it raises nothing narrower than Exception.

    A panic of its Rust code, which arrives as a BaseException whose class cannot be imported, is one of them.
    """
    try:
        yield
    except BaseException as err:
        if not isinstance(err, Exception) and type(err).__name__ != "PanicException":
            raise
        raise CheckpointError(f"{path}: the tokenizers library cannot work with it: {one_line(err)}") from None


@contextmanager
def held_stderr() -> Iterator[None]:
    """Hold back what is written to file descriptor 2 and drop it after an exception: a panic prints its backtrace."""
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
            os.write(kept, held.read())  # of other threads
        finally:
            os.dup2(kept, 2)
            os.close(kept)
