"""The bodies of requests: every field is honoured, or refused by its name. Values that ask for nothing pass."""

import json
import random
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, model_validator

from xlstm_ray.errors import UsageError, one_line
from xlstm_ray.generation_config import GenerationConfig
from xlstm_ray.sampling import Sampling
from xlstm_ray.sampling.params import DRAWING
from xlstm_ray.serve.refusals import Refused
from xlstm_ray.text.prompt import Prompt

# Fields that other services have, with the values that change nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "suffix": ("",),
    "use_beam_search": (False,),
    "length_penalty": (1,),
    "early_stopping": (False,),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "stop_token_ids": ([],),
    "truncate_prompt_tokens": (),
    "allowed_token_ids": (),
    "bad_words": ([],),
    "return_tokens_as_token_ids": (False,),
    "response_format": ({"type": "text"},),
    "store": (False,),
    "metadata": ({},),
    "service_tier": ("auto", "default"),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "prediction": (),
    "audio": (),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
}
# Fields of Sampling that have its names here too.
SAME = (
    *("temperature", "top_p", "top_k", "min_p", "seed", "presence_penalty", "frequency_penalty"),
    *("repetition_penalty", "logit_bias", "stop", "ignore_eos", "min_tokens", "n"),
)
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
COMPLETION_TOKENS = 16  # of an answer whose length is not given, as OpenAI has it


class StreamOptions(BaseModel):
    """include_usage: tokens, in a last chunk. continuous_usage_stats: in every one. include_progress: of the prompt."""

    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_progress: bool = False


class Body(BaseModel):
    """What both endpoints take. The bounds are those of Sampling, which the values become."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str | None = None
    max_tokens: int | None = None
    temperature: FiniteFloat | None = None
    top_p: FiniteFloat | None = None
    top_k: int | None = None
    min_p: FiniteFloat | None = None
    n: int = 1
    best_of: int | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    presence_penalty: FiniteFloat | None = None
    frequency_penalty: FiniteFloat | None = None
    repetition_penalty: FiniteFloat | None = None
    logit_bias: dict[str, FiniteFloat] | None = None
    ignore_eos: bool = False
    min_tokens: int | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    state: str | None = None  # a document, after which the prompt comes
    return_token_ids: bool = False  # vLLM's: answers and prompts as tokens, too
    prompt_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None  # vLLM's: of a prompt's own tokens
    user: str | None = None  # for the caller's own records
    cache_salt: str = Field("", max_length=256)  # who has the same shares kept states
    priority: int = Field(0, ge=-10, le=10)  # as in vLLM: the lowest goes first

    def logprobs_asked(self) -> int | None:
        """How many of the likeliest tokens are wanted at each place; None: no log-probabilities."""
        raise NotImplementedError

    def answer_tokens(self, most: int) -> tuple[str, int]:
        """The name of the field that says how long the answer may be, and its value."""
        raise NotImplementedError

    def scores_asked(self) -> int | None:
        """How many of the likeliest tokens are wanted at each place of the prompt; None: no log-probabilities of it."""
        if self.prompt_logprobs is not None and self.stream:
            text = "`prompt_logprobs` is not streamed; leave `stream` out, or take `echo` with `logprobs`"
            raise Refused(400, text, param="prompt_logprobs")
        return self.prompt_logprobs

    def options(self) -> StreamOptions:
        """What a stream is to have. Raises Refused where nothing is streamed."""
        if self.stream_options is not None and not self.stream:
            raise Refused(400, "`stream_options` has no effect without `stream`; leave it out", param="stream_options")
        return self.stream_options or StreamOptions()

    def sampling(self, published: GenerationConfig | None, most: int) -> Sampling | None:
        """How answers are made, None: only the prompt is wanted; most: the most tokens of one. Raises Refused.

        What is not given is as the model's generation_config.json has it, else as OpenAI: temperature 1, another seed
        each time. At temperature 0 the other fields of drawing mean nothing, and are left out.
        """
        name, length = self.answer_tokens(most)
        if length > most:
            raise Refused(400, f"`{name}` is {length}; this service allows up to {most}", param=name)
        if self.best_of is not None and self.best_of != self.n:
            raise Refused(400, f"`best_of` is {self.best_of}; allowed: as many as `n`, {self.n}", param="best_of")
        given = {key: getattr(self, key) for key in SAME}
        given |= {"max_new_tokens": length, "logprobs": self.logprobs_asked()}
        if given["top_k"] == -1:  # vLLM's word for all tokens
            given["top_k"] = None
        if given["temperature"] is None:
            given["temperature"] = 1.0 if published is None or published.temperature is None else published.temperature
        if isinstance(given["stop"], list) and not given["stop"]:
            given["stop"] = None
        try:
            given["seed"] = random.getrandbits(63) if self.seed is None else self.seed % (1 << 63)
            if given["temperature"] == 0:
                Sampling(**{key: value for key, value in given.items() if value is not None})  # they are checked
                given |= dict.fromkeys(DRAWING[1:])
            return Sampling.make(given, published=published)
        except UsageError as err:
            raise Refused.of(err, {"max_new_tokens": name}) from None


class Completion(Body):
    """The body of /v1/completions. prompt: a text, texts, token ids, or lists of them."""

    prompt: Any = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool = False  # the answer begins with the prompt; with logprobs, with the prompt's too
    add_special_tokens: bool = True

    def logprobs_asked(self) -> int | None:
        return self.logprobs

    def scores_asked(self) -> int | None:
        own = self.logprobs if self.echo else None
        given = {count for count in (super().scores_asked(), own) if count is not None}
        if len(given) > 1:
            text = "`prompt_logprobs` and `logprobs` differ, and `echo` asks for both of the prompt; give one"
            raise Refused(400, text, param="prompt_logprobs")
        return next(iter(given), None)

    def answer_tokens(self, most: int) -> tuple[str, int]:
        return "max_tokens", min(COMPLETION_TOKENS, most) if self.max_tokens is None else self.max_tokens

    def sampling(self, published: GenerationConfig | None, most: int) -> Sampling | None:
        if not self.echo or self.max_tokens != 0:
            return super().sampling(published, most)
        if self.n > 1:
            raise Refused(400, f"`n` is {self.n}, and with `max_tokens` 0 there is no answer", param="n")
        self.model_copy(update={"max_tokens": 1, "min_tokens": None}).sampling(
            published, most
        )  # the rest is checked too
        return None

    def prompts(self) -> Sequence[Prompt | None]:
        """One or more prompts; None: nothing comes after the state. Raises Refused."""
        given = self.prompt
        if given is None and self.state is not None:
            return [None]
        if isinstance(given, str):
            return [given]
        if isinstance(given, list) and given:
            if _are_tokens(given):
                return [given]
            if all(isinstance(text, str) for text in given):
                return list(given)
            if all(map(_are_tokens, given)):
                return list(given)
        raise Refused(
            400, "`prompt` is a text, token ids, or a list of texts or of lists of token ids, not empty", param="prompt"
        )


class Part(BaseModel):
    """A part of a message; here only texts."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One message of a conversation."""

    model_config = ConfigDict(extra="forbid", strict=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]
    name: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, data: Any) -> Any:
        """Clients send an answer back with all the fields that it had."""
        return {k: v for k, v in data.items() if v is not None} if isinstance(data, dict) else data

    def plain(self) -> dict[str, str]:
        """As templates know it: the content is one text."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role, "content": content, **({} if self.name is None else {"name": self.name})}


class Chat(Body):
    """The body of /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Any] | None = None

    def logprobs_asked(self) -> int | None:
        if self.top_logprobs is not None and not self.logprobs:
            raise Refused(400, "`top_logprobs` has no effect without `logprobs`; leave it out", param="top_logprobs")
        return (self.top_logprobs or 0) if self.logprobs else None

    def answer_tokens(self, most: int) -> tuple[str, int]:
        given = {n: v for n in ("max_completion_tokens", "max_tokens") if (v := getattr(self, n)) is not None}
        if len(set(given.values())) > 1:
            raise Refused(400, "`max_tokens` and `max_completion_tokens` differ; give one", param="max_tokens")
        return next(iter(given.items()), ("max_tokens", most))

    def plain(self) -> list[dict[str, str]]:
        """The conversation, as templates know it."""
        return [message.plain() for message in self.messages]


class Tokenize(BaseModel):
    """The body of /tokenize: a text, or a conversation that the chat template makes one."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = Field(None, min_length=1)
    add_special_tokens: bool = True
    add_generation_prompt: bool = True


class Detokenize(BaseModel):
    """The body of /detokenize."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str | None = None
    tokens: list[int]


def _are_tokens(given: Any) -> bool:
    return isinstance(given, list) and set(map(type, given)) == {int}


def one_prompt(given: Any) -> str | list[int]:
    """A text or token ids. Raises Refused."""
    if (isinstance(given, str) and given) or _are_tokens(given):
        return given
    raise Refused(400, "`prompt` is a text or token ids, not empty", param="prompt")


B = TypeVar("B", bound=BaseModel)


def read(kind: type[B], data: bytes, neutral: Mapping[str, Sequence[Any]] = NEUTRAL) -> B:
    """A body as one of these. neutral: fields that it does not have, with the values that change nothing."""
    fields = parse(data)
    for name in [name for name, value in fields.items() if value is None]:
        del fields[name]
    for name in [name for name in fields if name in neutral and name not in kind.model_fields]:
        value = fields.pop(name)
        if not any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in neutral[name]):
            raise Refused(400, f"`{name}` is not served here; leave it out", param=name, code="unsupported_field")
    try:
        return kind.model_validate(fields)
    except ValidationError as err:
        first = err.errors()[0]
        name = str(first["loc"][0])
        where = ".".join(part for part in map(str, first["loc"]) if part != "str" and "[" not in part)
        if first["type"] == "extra_forbidden":
            there = f"; there are: {', '.join(kind.model_fields)}" if len(first["loc"]) == 1 else ""
            raise Refused(400, f"`{where}` is not a field here{there}", param=name, code="unknown_field") from None
        given = f" (given: {one_line(repr(first['input']))[:80]})"
        raise Refused(400, f"`{where}`: {one_line(first['msg'])}{given}", param=name) from None


def parse(data: bytes) -> dict[str, Any]:
    """The object of JSON in a body. Raises Refused."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) < len(pairs):
            raise ValueError("an object has a key twice")
        return made

    def constant(text: str) -> float:
        raise ValueError(f"{text} is not a number")

    try:
        found = json.loads(data.decode("utf-8"), object_pairs_hook=unique, parse_constant=constant)
        if SURROGATE.search(data):
            json.dumps(found, ensure_ascii=False).encode("utf-8")  # half a surrogate pair is not a text
    except (ValueError, RecursionError) as err:
        raise Refused(400, f"the body is not JSON ({one_line(err)})") from None
    if not isinstance(found, dict):
        raise Refused(400, "the body is not a JSON object")
    return found
