"""Sampling: checked parameters for how tokens are chosen and where an answer ends. No torch here."""

from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, Protocol, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    model_validator,
)

from xlstm_ray.errors import UsageError

DRAWING = "temperature", "top_k", "top_p", "min_p", "seed"  # no effect on a greedy choice
LIKELIEST = 20  # log-probabilities at a place, at most
SHAPING = "repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias"


class Published(Protocol):
    """The sampling parameters that were published with a model."""

    def sampling(self, asked: bool) -> "Sampling": ...


def option(default: Any, help: str, allowed: str, **bounds: Any) -> Any:
    """A field of Sampling. allowed: the allowed values, for errors."""
    return Field(default, description=help, json_schema_extra={"allowed": allowed}, **bounds)


def _texts(value: Any) -> Any:
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value


def _pairs(value: Any) -> Any:
    """A bias is given as {id: bias} (JSON writes ids as texts) and kept as pairs in the order of the ids."""
    if isinstance(value, Mapping):
        value = [(int(k) if isinstance(k, str) and k.isdecimal() else k, bias) for k, bias in value.items()]
    return tuple(map(_texts, value)) if isinstance(value, list | tuple) else value


def _sorted(pairs: tuple[tuple[int, float], ...]) -> tuple[tuple[int, float], ...]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a token is there twice")
    return tuple(sorted(pairs))


Token = Annotated[int, Field(ge=0, lt=1 << 31)]
Bias = Annotated[float, Field(ge=-100, le=100)]


def over(common: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Merge the fields of all rows with a row's own, which win; a greedy row drops the fields of DRAWING."""
    own = {name: value for name, value in own.items() if value is not None}
    left_out = DRAWING if own.get("temperature") == 0 else ()
    return {**{name: value for name, value in common.items() if name not in left_out}, **own}


def require_likeliest(count: int | None) -> None:
    """Raise UsageError unless log-probabilities of so many likeliest tokens can be asked for; None: they are not."""
    if count is not None and not (type(count) is int and 0 <= count <= LIKELIEST):
        raise UsageError(f"`prompt_logprobs` is {str(count)[:80]}; allowed: 0 to {LIKELIEST}")


class Sampling(BaseModel):
    """How the next token of a row is chosen, and where its answer ends. Raises UsageError, which names the field.

    The order is that of transformers: logit_bias, the end tokens that min_tokens forbids, repetition_penalty, then (as
    OpenAI and vLLM have them) presence_penalty and frequency_penalty, temperature, top_k, top_p, min_p. Temperature 0
    is greedy. A token's random number depends only on the seed and its position: not on other rows, and not on
    where a run was stopped. Of equal logits, the lowest id comes first.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    max_new_tokens: int = option(64, "Stop after this many tokens.", "1 or more", ge=1, lt=1 << 31)
    temperature: float = option(0.0, "0 is greedy.", "0 (greedy) to 100", ge=0, le=100)
    top_k: int = option(0, "Sample from this many likeliest tokens.", "0 (all tokens) and more", ge=0, lt=1 << 31)
    top_p: float = option(1.0, "Sample from the likeliest tokens of this total mass.", "above 0, up to 1", gt=0, le=1)
    min_p: float = option(
        0.0, "Sample from tokens with this share of the likeliest one's mass.", "0 (all tokens) to 1", ge=0, le=1
    )
    seed: int = option(0, "Seed of the sampling.", "0 to 2^63 - 1", ge=0, lt=1 << 63)
    repetition_penalty: float = option(
        1.0,
        "Above 1, tokens of the prompt and the answer become less likely.",
        "above 0, up to 100 (1 is off)",
        gt=0,
        le=100,
    )
    presence_penalty: float = option(
        0.0, "Subtracted from the logit of each token of the answer.", "-2 to 2", ge=-2, le=2
    )
    frequency_penalty: float = option(0.0, "The same, for each time that the answer has it.", "-2 to 2", ge=-2, le=2)
    logit_bias: Annotated[tuple[tuple[Token, Bias], ...], BeforeValidator(_pairs), AfterValidator(_sorted)] = option(
        (), "Added to a token's logit.", "token ids, each once and with a number from -100 to 100"
    )
    ignore_eos: bool = option(False, "Go on after end tokens.", "true or false")
    min_tokens: int = option(0, "No end token and no stop within this many tokens.", "0 and more", ge=0, lt=1 << 31)
    stop: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], BeforeValidator(_texts)] = option(
        (), "End the answer before this text.", "texts that are not empty"
    )
    n: int = option(1, "The number of answers to a prompt.", "1 to 128", ge=1, le=128)
    logprobs: int | None = option(
        None, "Log-probabilities of the tokens, and of this many likeliest ones.", "0 to 20", ge=0, le=LIKELIEST
    )

    @model_validator(mode="wrap")
    @classmethod
    def _check(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """Turn pydantic's errors into one line: the wrong value, and what is allowed."""
        try:
            made = handler(data)
        except ValidationError as err:
            name = str(next(iter(err.errors()[0]["loc"]), ""))
            if not name:  # not an object at all, in a file's header
                raise
            if name not in cls.model_fields:
                raise UsageError(
                    f"{name!r} is not a field of sampling; there are: {', '.join(cls.model_fields)}"
                ) from None
            allowed: Any = cls.model_fields[name].json_schema_extra
            raise UsageError(f"`{name}` is {str(data[name])[:80]}; allowed: {allowed['allowed']}") from None
        if made.min_tokens > made.max_new_tokens:
            raise UsageError(
                f"`min_tokens` is {made.min_tokens}; allowed: up to `max_new_tokens`, which is {made.max_new_tokens}"
            )
        return made

    @classmethod
    def make(
        cls,
        given: Mapping[str, Any],
        *,
        before: "Sampling | None" = None,
        published: Published | None = None,
    ) -> "Sampling":
        """Greedy by default; a given field of DRAWING turns sampling on, at temperature 1.

        given: fields by name; None: not given. Missing fields come from `before` (the sampling of a state's last
        answer), else from what was published with the model. Fields that end an answer are never taken over. Raises
        UsageError for values out of range.
        """
        given = {name: value for name, value in given.items() if value is not None}
        checked = cls(**given)
        drawn = [name for name in DRAWING[1:] if name in given]
        greedy = "temperature" in given and checked.temperature == 0
        if greedy and drawn:
            names = ", ".join(f"`{name}`" for name in DRAWING[1:-1])
            raise UsageError(f"{names} and `seed` have no effect at `temperature=0` (greedy); leave them out")
        asks = not greedy and ("temperature" in given or bool(drawn))
        usual = published.sampling(asks) if published else _usual(1.0 if asks else 0.0)
        base = usual if before is None else before
        drawing = _usual(0.0) if greedy else usual if asks and base.temperature == 0 else base
        values = {name: getattr(drawing, name) for name in DRAWING} | {name: getattr(base, name) for name in SHAPING}
        return cls(**(values | given))

    def lasting(self) -> "Sampling":
        """The fields that the next answer takes over: how tokens are chosen, but not where the answer ends."""
        return Sampling(**{name: getattr(self, name) for name in (*DRAWING, *SHAPING)})

    def require_vocabulary(self, size: int) -> None:
        """Raise UsageError for a bias of a token outside a vocabulary of this size."""
        odd = next((token for token, _ in self.logit_bias if token >= size), None)
        if odd is not None:
            raise UsageError(f"`logit_bias` has token {odd}, which is outside the model's vocabulary of {size}")

    def one_by_one(self) -> "list[Sampling]":
        """The sampling of each of the n answers; each sampled answer has the next seed, as in vLLM."""
        return [self.model_copy(update={"n": 1, "seed": (self.seed + i) % (1 << 63)}) for i in range(self.n)]


@cache
def _usual(temperature: float) -> Sampling:
    """Where nothing else is known."""
    return Sampling(temperature=temperature)
