"""A command's input: prompts from words, files, JSON lines and standard input."""

import os
import stat
import sys
from codecs import BOM_UTF8
from pathlib import Path
from shutil import copyfileobj
from tempfile import TemporaryFile
from typing import IO, Any
from weakref import finalize

from xlstm_ray.cli.output import tell
from xlstm_ray.declare import refuse_unknown
from xlstm_ray.errors import UsageError
from xlstm_ray.sampling import Sampling
from xlstm_ray.text.ondisk import TextFile
from xlstm_ray.text.prompt import decoded, whole_prompt

JSONL_KEYS = "prompt", "id"
PROMPT_OPTIONS = "--prompt", "-p", "--prompt-file", "-f", "--chat", "--messages", "--system", "--chat-template"
MANY = 1 << 30  # tokens


def given_text(
    prompt: str | None,
    prompt_file: str | None,
    append: str | None,
    append_file: str | None,
    jsonl: bool,
    start: Path | None,
    *,
    keys: tuple[str, ...] = (),
) -> tuple[dict[str, Any], list[dict[str, Any]], bool]:
    """The prompt, or the text to append, as arguments of prefill and generate; start: the state to go on from.

    keys: the fields of sampling that a line may have; they are added to its names. Also returns the names of each row
    in the results (none if rows have no names), and whether each row is a line.
    """
    if append is None and append_file is None:
        prompts, names = _prompts(prompt, prompt_file, jsonl, start, keys)
        return {"prompt": prompts}, names, jsonl
    if append is not None and append_file is not None:
        raise UsageError("--append and --append-file were both given; give one")
    if prompt is not None or prompt_file is not None:
        raise UsageError("a prompt and --append were both given; --append is what is new after --state-in: give one")
    if start is None:
        raise UsageError("--append is what is new after a saved state, and none was given; give --state-in FILE")
    if append_file is None and jsonl:
        raise UsageError("--jsonl describes an --append-file, and --append was given")
    if append == "":
        raise UsageError("--append is empty; give at least one token")
    if append == "-":
        append, append_file = None, "-"
    if append_file is None:
        return {"append": append}, [], jsonl
    texts, names = read_texts(append_file, jsonl, keys) if jsonl else (prompt_in(append_file), [])
    return {"append": texts}, names, jsonl


def _prompts(
    prompt: str | None, prompt_file: str | None, jsonl: bool, state_in: Path | None, keys: tuple[str, ...]
) -> tuple[Any, list[dict[str, Any]]]:
    """The text (of a file: where it is), or a list of texts with --jsonl, or None if only a state is given.

    Also returns the names of each row in the results: its `index` from 0, and the given `id`.
    """
    if prompt is not None and prompt_file is not None:
        raise UsageError("--prompt and --prompt-file were both given; give one")
    if prompt == "-":
        prompt, prompt_file = None, "-"
    if prompt is None and prompt_file is None and state_in is None and piped():
        prompt_file = "-"
        tell("note: the prompt is read from standard input")
    if jsonl and prompt_file is None and (prompt is not None or state_in is None):
        raise UsageError("--jsonl describes a --prompt-file, and none was given")
    if prompt_file != "-" and piped():
        tell("note: standard input has a text that is not read; --prompt-file - makes it the prompt")
    if prompt == "":
        raise UsageError("the prompt is empty; give at least one token")
    if prompt is not None:
        return prompt, []
    if prompt_file is None:
        if state_in is None:
            raise UsageError(
                "there is no prompt; give --prompt TEXT, --prompt-file FILE ('-' for standard input) or --state-in FILE"
            )
        return None, []
    return read_texts(prompt_file, jsonl, keys) if jsonl else (prompt_in(prompt_file), [])


def read_texts(file: str, jsonl: bool, keys: tuple[str, ...] = ()) -> tuple[Any, list[dict[str, Any]]]:
    """The file's text; or the texts of its lines, and their names."""
    source, text = read_text(file)
    if not jsonl:
        return whole_prompt(text, source), []
    rows = [
        _jsonl_row(line, f"{source}, line {number}", keys)
        for number, line in enumerate(text.split("\n"), 1)  # not splitlines: JSON may have an unescaped U+2028
        if line.strip()
    ]
    if not rows:
        raise UsageError(f"{source}: is empty; it has no prompts")
    names = [{"index": n, **row} for n, row in enumerate(rows)]
    return [name.pop("prompt") for name in names], names


def piped() -> bool:
    """Whether standard input is a pipe or a file with data that can be read now."""
    mode = os.fstat(0).st_mode
    if stat.S_ISREG(mode):
        return os.lseek(0, 0, os.SEEK_CUR) < os.fstat(0).st_size
    if not stat.S_ISFIFO(mode):
        return False
    from fcntl import ioctl
    from termios import FIONREAD

    return int.from_bytes(ioctl(0, FIONREAD, bytes(4)), sys.byteorder) > 0


def prompt_in(name: str) -> TextFile:
    """The prompt that a file's text is: without one newline at its end. Nothing of it is in memory."""
    text = text_file(name)
    text.end_before_newline()
    if not len(text):
        raise UsageError(f"{source_of(name)}: is empty; give at least one token")
    return text


def text_file(name: str) -> TextFile:
    """A text; what cannot be read at any place, and what follows a byte order mark, is copied to a temporary file."""
    given, skipped = sys.stdin.buffer if name == "-" else readable(name), 0
    try:
        anywhere = name != "-" and stat.S_ISREG(os.fstat(given.fileno()).st_mode)
        if not anywhere or os.pread(given.fileno(), len(BOM_UTF8), 0) == BOM_UTF8:
            given, skipped = _copied(given)
    except OSError as err:
        raise UsageError(f"{source_of(name)}: cannot be read ({err.strerror})") from None
    text = TextFile(given, source=source_of(name), skipped=skipped)
    finalize(text, given.close)
    return text


def _copied(given: IO[bytes]) -> tuple[IO[bytes], int]:
    """A temporary file with all of this one, without a byte order mark at its beginning; and the mark's bytes."""
    copy: IO[bytes] = TemporaryFile()
    first = given.read(len(BOM_UTF8))
    skipped = len(BOM_UTF8) * (first == BOM_UTF8)
    copy.write(first[skipped:])
    copyfileobj(given, copy)
    copy.flush()
    return copy, skipped


def readable(name: str) -> IO[bytes]:
    """The open file. Raises UsageError."""
    try:
        return open(name, "rb")
    except OSError as err:
        raise UsageError(f"{name}: cannot be read ({err.strerror})") from None


def source_of(name: str) -> str:
    """An input's name in errors."""
    return "standard input" if name == "-" else name


def read_text(name: str) -> tuple[str, str]:
    """The file's name in errors ('-' is standard input), and its text without a byte order mark."""
    source = source_of(name)
    try:
        data = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
    except OSError as err:
        raise UsageError(f"{source}: cannot be read ({err.strerror})") from None
    return source, decoded(data, source)


def _jsonl_row(line: str, place: str, keys: tuple[str, ...]) -> dict[str, Any]:
    """Parse a line of JSON: its prompt, and its id and keys. Raises UsageError, which begins with the line's place."""
    from xlstm_ray.config import parse_json

    try:
        row = parse_json(line.encode())
    except (ValueError, RecursionError) as err:
        raise UsageError(f"{place}: is not JSON ({err})") from None
    row = row if isinstance(row, dict) else {"prompt": row}
    refuse_unknown(row, (*JSONL_KEYS, *keys), f"{place}: ", "key")
    prompt = row.get("prompt")
    if not isinstance(prompt, str):
        raise UsageError(f"{place}: is neither a text nor an object with a 'prompt' text")
    if not isinstance(row.get("id", ""), str | int | float):
        raise UsageError(f"{place}: the id is {str(row['id'])[:80]!r}; allowed: a text or a number")
    if not prompt:
        raise UsageError(f"{place}: the prompt is empty; give at least one token")
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as err:
        raise UsageError(f"{place}: the prompt is not Unicode text ({err.reason} at character {err.start})") from None
    try:
        own = {name: value for name, value in row.items() if name in keys}
        Sampling.make({"max_new_tokens": MANY, **own})  # the command may allow more tokens than the default
    except UsageError as err:
        raise UsageError(f"{place}: {str(err).replace('`', '')}") from None  # a key is not a flag
    return row


def row_count(given: dict[str, Any]) -> int:
    """The number of rows of a batch; 0 without a prompt."""
    prompts = given.get("prompt") if given.get("prompt") is not None else given.get("append")
    return len(prompts) if isinstance(prompts, list) else int(prompts is not None)
