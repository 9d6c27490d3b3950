"""What a state knows of its text and tokens: hashes of a fixed size, and the text only of a conversation.

They show whether a prompt continues the state, and where it differs if not: there are hashes at up to 64 evenly spaced
places.
"""

import hashlib
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field

from xlstm_ray.text.detokenize import TextEnd

EMPTY_PROMPT = hashlib.blake2b(b"xlstm-ray prompt", digest_size=16).hexdigest()
PLACES = 64
_PRIME = (1 << 128) - 159

Hash = Annotated[str, Field(pattern="^[0-9a-f]{32}$")]
Count = Annotated[int, Field(ge=0, le=1 << 48)]  # of tokens or bytes: sums of them fit int64


def extend_prompt_hash(prompt_hash: str, tokens: Iterable[int]) -> str:
    """The hash of a prompt with `tokens` appended. It is a chain, so a saved state can go on without its prompt."""
    link = bytes.fromhex(prompt_hash)
    for token in tokens:
        link = hashlib.blake2b(link + token.to_bytes(8, "little"), digest_size=16).digest()
    return link.hex()


def extend_text_hash(text_hash: str, text: bytes) -> str:
    """The hash of a text with `text` appended: its bytes as one number, modulo a prime.

    It is the same for any split into pieces, and fast. It is used only in error messages: tokens decide whether a state
    fits.
    """
    value = int(text_hash, 16) * pow(256, len(text), _PRIME) + int.from_bytes(text, "big")
    return f"{value % _PRIME:032x}"


class Trail(BaseModel):
    """The hash of a sequence, and hashes of its beginnings at every step-th place (8 digits each)."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    length: Count = 0
    hash: Hash = ""
    step: Annotated[Count, Field(gt=0)] = 1
    places: Annotated[str, Field(pattern="^([0-9a-f]{8}){0,64}$")] = ""

    @staticmethod
    def lengthened(before: str, units: Any) -> str:
        """The hash of a sequence with hash `before`, with `units` appended."""
        raise NotImplementedError

    def extend(self, units: Any) -> Self:
        """The trail of this sequence with `units` appended."""
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

    def difference(self, units: Any, both: Self | None = None) -> tuple[int, int] | None:
        """None if `units` begins with this sequence; else (a, b): they agree up to a, and differ before b.

        both: the trail of a beginning that is known to be that of both, and is not compared again.
        """
        both = both or type(self)()
        value, alike = both.hash, both.length
        for place in range((alike // self.step + 1) * self.step, self.step * len(self.places) // 8 + 1, self.step):
            if place > len(units):
                break
            value, n = self.lengthened(value, units[alike:place]), place // self.step * 8
            if value[-8:] != self.places[n - 8 : n]:
                return alike, place
            alike = place
        if len(units) < self.length:
            return alike, len(units)
        same = self.lengthened(value, units[alike : self.length]) == self.hash
        return None if same else (alike, self.length)


class TokenTrail(Trail):
    """The trail of token ids."""

    hash: Hash = EMPTY_PROMPT

    @staticmethod
    def lengthened(before: str, units: Any) -> str:
        return extend_prompt_hash(before, units)


class LaterTrail:
    """The trail of token ids whose hashes are made when somebody asks for them.

    They take half a microsecond a token, and most states that are kept on the way of a prompt are never asked.
    """

    def __init__(self, before: "TokenTrail | LaterTrail", more: Sequence[int] = ()):
        self.length: int = before.length + len(more)
        # One pair, replaced whole: another thread may ask for the same trail meanwhile.
        self._parts: tuple[TokenTrail | LaterTrail, Sequence[int]] = before, more

    def made(self) -> TokenTrail:
        """The trail itself."""
        chain = [self]  # a loop, since a conversation may be of any length
        while isinstance(before := chain[-1]._parts[0], LaterTrail):
            chain.append(before)
        for one in reversed(chain):
            before, more = one._parts
            trail = before.made() if isinstance(before, LaterTrail) else before
            if more:
                trail = trail.extend(more)
            one._parts = trail, ()
        return trail


class TextTrail(Trail):
    """The trail of a text's bytes in UTF-8."""

    hash: Hash = "0" * 32

    @staticmethod
    def lengthened(before: str, units: Any) -> str:
        return extend_text_hash(before, units)


class Message(BaseModel):
    """A message of a conversation, as chat templates know it."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    role: str
    content: str


class Conversation(BaseModel):
    """What a saved conversation needs to go on.

    text: what the state has seen of it, from the first message on. alone: the state has seen nothing before that.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    messages: list[Message] = []
    text: str = ""
    alone: bool = True


class Scored(BaseModel):
    """The sums of a text's log-probabilities so far, where the row has `seen` so many tokens.

    tokens: how many were scored. logprob: their sum in nats, added one after the other in float64. following: the token
    that comes next, and its log-probability.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    seen: Count
    tokens: Count = 0
    logprob: float = 0.0
    following: tuple[int, float] | None = None


class Row(BaseModel):
    """What a state knows of one of its rows, besides the tensors.

    tokens: the tokens that it has seen. text: their text; None if ids were given or the prefill has not ended. end: the
    end of the text. appended_to: while appended tokens are only partly seen, the tokens before them; text and end are
    then also those before them. conversation: of a saved one; the only text itself in a state. scored: of a run that
    scores its text, and was stopped.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    tokens: TokenTrail = TokenTrail()
    text: TextTrail | None = None
    end: TextEnd = TextEnd()
    appended_to: TokenTrail | None = None
    conversation: Conversation | None = None
    scored: Scored | None = None


class Place(BaseModel):
    """Where a kept state belongs in the tree of states (engine/tree.py): hashes of a tenant and of its prompt.

    key: of the tokens seen. after: of those of the kept state before it; "" where there is none. rows, tiles: the
    calls that made it; tiles -1: it is the state of no prefill from the first token on. machine: what else decides
    the bits of such a state, besides its numerics.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    root: Hash
    key: Hash
    after: Annotated[str, Field(pattern="^([0-9a-f]{32})?$")] = ""
    rows: Annotated[int, Field(ge=1, le=1 << 16)] = 1
    tiles: Annotated[int, Field(ge=-1, le=1 << 48)] = 0
    machine: Annotated[str, Field(max_length=300)] = ""
