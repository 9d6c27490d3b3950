"""Prompts as a caller may give them: a text or token ids, one or a batch."""

from array import array
from codecs import BOM_UTF8, BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Sequence

from xlstm_ray.errors import UsageError
from xlstm_ray.text.ondisk import TextFile

Prompt = str | Sequence[int]
Given = Prompt | TextFile  # a prompt may be in a file, too


def as_batch(prompt: Given | Sequence[Given]) -> list[Given]:
    if isinstance(prompt, str | TextFile):
        return [prompt]
    if not isinstance(prompt, Sequence) or isinstance(prompt, (bytes, bytearray)):
        raise UsageError(f"a prompt is a text or a list of token ids, not {type(prompt).__name__}")
    if not prompt:
        raise UsageError("the prompt is empty; give at least one token")
    first = prompt[0]
    if isinstance(first, int):  # sooner than to ask whether it is a Sequence, which takes longer than all else here
        return [prompt]  # type: ignore[list-item]
    return list(prompt) if isinstance(first, (str, Sequence, TextFile)) else [prompt]  # type: ignore[list-item, arg-type]


def decoded(data: bytes, source: str) -> str:
    """A file's text without a byte order mark. Raises UsageError; source: the file's name there."""
    try:
        return data.removeprefix(BOM_UTF8).decode("utf-8")
    except UnicodeDecodeError as err:
        at = err.start + len(data) - len(err.object)
        line = data.count(b"\n", 0, at) + 1
        why = f"{err.reason} at byte {at}"
        if data.startswith((BOM_UTF16_LE, BOM_UTF16_BE)):
            why = "it begins with the byte order mark of UTF-16; save it as UTF-8"
        raise UsageError(f"{source}, line {line}: is not UTF-8 text ({why})") from None


def whole_prompt(text: str, source: str) -> str:
    """The prompt that a file's text is: without one newline at its end. Raises UsageError for an empty one."""
    text = text.removesuffix("\n").removesuffix("\r")
    if not text:
        raise UsageError(f"{source}: is empty; give at least one token")
    return text


def require_text(prompt: str) -> None:
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as err:  # command-line bytes that are not text, or half a surrogate pair in JSON
        raise UsageError(f"the prompt is not Unicode text ({err.reason} at character {err.start})") from None


def token_ids(prompt: Sequence[int]) -> "array[int]":
    """int64; int32 of an array of these. Raises UsageError for what is not a list of whole numbers."""
    try:
        return array("i" if isinstance(prompt, array) and prompt.typecode == "i" else "q", prompt)
    except OverflowError:
        odd = next(token for token in prompt if not -1 << 63 <= token < 1 << 63)
        raise UsageError(f"token {odd} is outside the model's vocabulary") from None
    except TypeError:
        raise UsageError(f"a prompt is a text or a list of token ids, not {repr(prompt)[:80]}") from None
