"""What a state knows of the text and the tokens that it has seen: hashes of a fixed size, never the text itself.

They tell whether a prompt goes on from there, and where it differs if not. Hashes at 64 places at most, evenly spaced,
narrow that down.
"""

import hashlib
from collections.abc import Iterable
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field

from xlstm_ray.text.detokenize import TextEnd

EMPTY_PROMPT = hashlib.blake2b(b"xlstm-ray prompt", digest_size=16).hexdigest()
PLACES = 64
_PRIME = (1 << 128) - 159

Hash = Annotated[str, Field(pattern="^[0-9a-f]{32}$")]


def extend_prompt_hash(prompt_hash: str, tokens: Iterable[int]) -> str:
    """The hash of a prompt lengthened by `tokens`. A chain, so that a saved state can go on without its prompt."""
    link = bytes.fromhex(prompt_hash)
    for token in tokens:
        link = hashlib.blake2b(link + token.to_bytes(8, "little"), digest_size=16).digest()
    return link.hex()


def extend_text_hash(text_hash: str, text: bytes) -> str:
    """The hash of a text lengthened by `text`: the number that its bytes are, modulo a prime.

    The same for any cut into pieces, fast in bulk. It only words errors; tokens are what a state is accepted by.
    """
    value = int(text_hash, 16) * pow(256, len(text), _PRIME) + int.from_bytes(text, "big")
    return f"{value % _PRIME:032x}"


class Trail(BaseModel):
    """The hash of a sequence, and those of its beginnings at every step-th place (8 digits each)."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    length: Annotated[int, Field(ge=0)] = 0
    hash: Hash = ""
    step: Annotated[int, Field(gt=0)] = 1
    places: Annotated[str, Field(pattern="^([0-9a-f]{8}){0,64}$")] = ""

    @staticmethod
    def lengthened(before: str, units: Any) -> str:
        """The hash of a sequence whose hash was `before`, with `units` behind it."""
        raise NotImplementedError

    def extend(self, units: Any) -> Self:
        """The trail of this sequence, lengthened."""
        length, step, places = self.length + len(units), self.step, self.places
        while length // step > PLACES:
            step *= 2
            places = "".join(places[n : n + 8] for n in range(8, len(places), 16))
        value, done = self.hash, self.length
        for place in range((done // step + 1) * step, length + 1, step):
            value, done = self.lengthened(value, units[done - self.length : place - self.length]), place
            places += value[-8:]
        value = self.lengthened(value, units[done - self.length :])
        return self.model_copy(update={"length": length, "hash": value, "step": step, "places": places})

    def difference(self, units: Any) -> tuple[int, int] | None:
        """None where `units` begins with this sequence; or (a, b): they are alike to a, and no longer at b."""
        value, alike = type(self)().hash, 0
        for n in range(0, len(self.places), 8):
            place = alike + self.step
            if place > len(units):
                break
            value = self.lengthened(value, units[alike:place])
            if value[-8:] != self.places[n : n + 8]:
                return alike, place
            alike = place
        if len(units) < self.length:
            return alike, len(units)
        same = self.lengthened(value, units[alike : self.length]) == self.hash
        return None if same else (alike, self.length)


class TokenTrail(Trail):
    """Of token ids."""

    hash: Hash = EMPTY_PROMPT

    @staticmethod
    def lengthened(before: str, units: Any) -> str:
        return extend_prompt_hash(before, units)


class TextTrail(Trail):
    """Of a text's bytes in UTF-8."""

    hash: Hash = "0" * 32

    @staticmethod
    def lengthened(before: str, units: Any) -> str:
        return extend_text_hash(before, units)


class Row(BaseModel):
    """What a state knows of one of its rows, beside the tensors.

    tokens: those that it has seen. text: what they were given as and printed as; None where they were given as ids, or
    the prefill has not ended. end: where the text goes on. appended_to: the tokens before those that were appended,
    while not all of these have been seen; text and end are then those before them too.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    tokens: TokenTrail = TokenTrail()
    text: TextTrail | None = None
    end: TextEnd = TextEnd()
    appended_to: TokenTrail | None = None


class Place(BaseModel):
    """Where a kept state belongs in the tree of states (engine/tree.py): hashes of a tenant and of its prompt.

    key: of the tokens seen. after: of those of the kept state before it; "" where there is none. rows, tiles: the
    calls that made it; tiles -1: it is the state of no prefill from the first token on. machine: what else decides
    the bits of such a state, beside its numerics.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    root: Hash
    key: Hash
    after: Annotated[str, Field(pattern="^([0-9a-f]{32})?$")] = ""
    rows: Annotated[int, Field(ge=1)] = 1
    tiles: Annotated[int, Field(ge=-1)] = 0
    machine: Annotated[str, Field(max_length=300)] = ""
