"""Prompts as a caller may give them: a text or token ids, one or a batch."""

from collections.abc import Sequence
from operator import index

from xlstm_ray.errors import UsageError

Prompt = str | Sequence[int]


def as_batch(prompt: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompt, str):
        return [prompt]
    if not isinstance(prompt, Sequence) or isinstance(prompt, (bytes, bytearray)):
        raise UsageError(f"a prompt is a text or a list of token ids, not {type(prompt).__name__}")
    if not prompt:
        raise UsageError("the prompt is empty; give at least one token")
    return list(prompt) if isinstance(prompt[0], (str, Sequence)) else [prompt]  # type: ignore[list-item, arg-type]


def require_text(prompt: str) -> None:
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as err:  # command-line bytes that are not text, or half a surrogate pair in JSON
        raise UsageError(f"the prompt is not Unicode text ({err.reason} at character {err.start})") from None


def token_ids(prompt: Sequence[int]) -> list[int]:
    try:
        return [index(token) for token in prompt]
    except TypeError:
        raise UsageError(f"a prompt is a text or a list of token ids, not {repr(prompt)[:80]}") from None
