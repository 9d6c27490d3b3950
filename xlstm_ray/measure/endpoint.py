"""An endpoint of OpenAI's API, whoever made it: what it can do, and answers with the times of their tokens."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

from xlstm_ray.client.service import Service, state_path
from xlstm_ray.errors import ServiceError

COMPLETIONS, CHATS, STATES = "/v1/completions", "/v1/chat/completions", "/v1/states"
CANNOT = 400, 404, 405, 422, 501  # an endpoint says that it has no such thing, or does not know a field
SAMPLE = 256  # words, of which the tokens are counted
# How an answer's length is told, with what goes beside it; OpenAI's newer models know the second way alone.
LENGTHS: tuple[tuple[str, dict[str, Any]], ...] = ("max_tokens", {"temperature": 0}), ("max_completion_tokens", {})
USAGE = {"stream_options": {"include_usage": True}}


@dataclass
class Answer:
    """One answer. began, ended: perf_counter's seconds. times: of each piece of text. None: the service did not say.

    prompt, cached, tokens: tokens of the prompt, those of them that were known already, and those of the answer.
    """

    began: float
    ended: float = 0.0
    times: list[float] = field(default_factory=list)
    text: str = ""
    prompt: int | None = None
    cached: int | None = None
    tokens: int = 0

    @property
    def ttft(self) -> float:
        """Seconds to the first piece of text; to the end where there was none."""
        return (self.times[0] if self.times else self.ended) - self.began

    @property
    def gaps(self) -> list[float]:
        """Seconds between two pieces."""
        return [after - before for before, after in zip(self.times, self.times[1:], strict=False)]


class Endpoint:
    """Asks a service, each request by its own connection; any thread may. Raises ServiceError.

    model: the one to ask; None: the first of its list. words_a_token: how many words of a text are a token.
    """

    def __init__(self, service: Service, model: str | None, sample: Callable[[int], str]):
        self.service = service
        self.model = model or self._first_model()
        self._more: dict[str, Any] = {}
        self._lengths = dict.fromkeys((COMPLETIONS, CHATS), LENGTHS[0])
        self._usage: dict[str, Any] = USAGE
        self.completes = self._takes(COMPLETIONS, {"prompt": "a"})
        self.chats = self._takes(CHATS, {"messages": [{"role": "user", "content": "a"}]})
        if not (self.completes or self.chats):
            raise ServiceError(f"{service.url}: the model {self.model!r} takes neither completions nor chats there")
        fixed = {"ignore_eos": True}  # answers of one length; many know this, though it is not OpenAI's
        known = self._can(COMPLETIONS, {"prompt": "a", **fixed}) if self.completes else False
        self._more = fixed if known else {}
        self.documents = self._keeps_documents()
        try:
            counted = self.ask(sample(SAMPLE), 1).prompt
        except ServiceError as err:
            if err.status not in CANNOT:
                raise
            self._usage = {}  # it does not count tokens of a stream
            counted = self.ask(sample(SAMPLE), 1).prompt
        self.words_a_token = SAMPLE / counted if counted else 0.75

    def ask(self, text: str, tokens: int, state: str | None = None) -> Answer:
        """An answer of so many tokens to a text. state: the document that it comes after."""
        after = {} if state is None else {"state": state}
        if not self.completes:
            return self.chat([{"role": "user", "content": text}], tokens)
        return self._streamed(COMPLETIONS, {"prompt": text, **after}, tokens)

    def chat(self, messages: Sequence[Mapping[str, str]], tokens: int) -> Answer:
        """The next message of a conversation; where there are no chats, of its text."""
        if self.chats:
            return self._streamed(CHATS, {"messages": messages}, tokens)
        text = "".join(f"{message['role']}: {message['content']}\n" for message in messages)
        return self.ask(f"{text}assistant:", tokens)

    def read(self, name: str, text: str) -> Answer:
        """Let it read a document, and wait until it was read: as an answer without tokens."""
        seen = Answer(perf_counter())
        info = self.service.post(STATES, {"id": name, "prompt": text})
        for now in self.service.events(state_path(name, "/events")):
            info = now
        seen.ended = perf_counter()
        if info["status"] != "ready":
            raise ServiceError(f"{self.service.url}: the document is {info['status']} ({info['error']})")
        seen.prompt = info["tokens_total"]
        return seen

    def forget(self, name: str) -> None:
        """A document goes."""
        self.service.delete(state_path(name))

    # ------------------------------------------------------------------------------------------------------------------
    def _streamed(self, path: str, body: dict[str, Any], tokens: int) -> Answer:
        asked = {**self._asked(path, tokens), "stream": True, **self._usage, **self._more}
        seen = Answer(perf_counter())
        usage: dict[str, Any] = {}
        for event in self.service.events(path, {**asked, **body}):
            now = perf_counter()
            usage = event.get("usage") or usage
            for choice in event.get("choices") or []:
                text = choice.get("text") or (choice.get("delta") or {}).get("content") or ""
                if text:
                    seen.times.append(now)
                    seen.text += text
        seen.ended = perf_counter()
        seen.prompt = usage.get("prompt_tokens")
        seen.cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
        seen.tokens = usage.get("completion_tokens") or len(seen.times)
        return seen

    def _first_model(self) -> str:
        found = self.service.get("/v1/models").get("data") or []
        if not found:
            raise ServiceError(f"{self.service.url}: its list of models is empty; `model` names one")
        return str(found[0]["id"])

    def _asked(self, path: str, tokens: int) -> dict[str, Any]:
        """What every body of this address has. tokens: of the answer."""
        name, beside = self._lengths[path]
        return {"model": self.model, name: tokens, **beside}

    def _takes(self, path: str, body: dict[str, Any]) -> bool:
        """Whether it answers this, in any of the ways to tell an answer's length: the one is kept."""
        for self._lengths[path] in LENGTHS:
            if self._can(path, body):
                return True
        return False

    def _can(self, path: str, body: dict[str, Any]) -> bool:
        """Whether it answers this."""
        try:
            self.service.post(path, {**self._asked(path, 1), **body})
        except ServiceError as err:
            if err.status not in CANNOT or err.code == "model_not_found":
                raise
            return False
        return True

    def _keeps_documents(self) -> bool:
        with suppress(ServiceError):
            return isinstance(self.service.get(STATES).get("data"), list) and self.completes
        return False
