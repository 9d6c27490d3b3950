"""Answers in the forms of OpenAI's replies, whole and in pieces."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import getrandbits
from time import time
from typing import Any

from xlstm_ray.engine.decode import Made
from xlstm_ray.engine.request import End, Piece
from xlstm_ray.engine.scores import Scores

TextOf = Callable[[Sequence[int]], str]
Scored = tuple[int, Made | None]  # a token; nothing comes before a prompt's first one


@dataclass
class Answer:
    """What was said so far of one answer. at: characters of its tokens so far. begun: whether a piece was sent.

    last: of its end token, where the form tells that one.
    """

    text: list[str] = field(default_factory=list)
    made: list[Scored] = field(default_factory=list)
    last: Made | None = None
    scores: Scores | None = None  # of the prompt
    ids: list[int] = field(default_factory=list)  # of the answer's tokens
    sent: int = 0  # of these, in pieces
    at: int = 0
    begun: bool = False
    reason: str | None = None


class Completions:
    """The form of /v1/completions. text_of: the text of tokens.

    As in vLLM its log-probabilities have the end token: lm-eval leaves the last token out, whatever it is.
    """

    prefix, whole, part, tells_end = "cmpl", "text_completion", "text_completion", True

    def __init__(self, text_of: TextOf):
        self.text_of = text_of

    def choice(self, number: int, said: Answer) -> dict[str, Any]:
        return self.piece(number, said, "".join(said.text), said.made)

    def piece(self, number: int, said: Answer, text: str, made: Sequence[Scored]) -> dict[str, Any]:
        return {"index": number, "text": text, "logprobs": self._logprobs(said, made), "finish_reason": said.reason}

    def _logprobs(self, said: Answer, made: Sequence[Scored]) -> dict[str, Any] | None:
        if not made:
            return None
        tokens = [self.text_of([token]) for token, _ in made]
        offsets = []
        for text in tokens:
            offsets.append(said.at)
            said.at += len(text)
        return {
            "tokens": tokens,
            "token_logprobs": [one and one.logprob for _, one in made],
            "top_logprobs": [one and self._top(text, one) for text, (_, one) in zip(tokens, made, strict=True)],
            "text_offset": offsets,
        }

    def _top(self, chosen: str, made: Made) -> dict[str, float]:
        """The likeliest by their texts, and the chosen one; of tokens with one text the likeliest counts."""
        top: dict[str, float] = {}
        for token, logprob in made.likeliest:
            top.setdefault(self.text_of([token]), logprob)
        top.setdefault(chosen, made.logprob)
        return top


class Chats:
    """The form of /v1/chat/completions."""

    prefix, whole, part, tells_end = "chatcmpl", "chat.completion", "chat.completion.chunk", False

    def __init__(self, text_of: TextOf):
        self.text_of = text_of

    def choice(self, number: int, said: Answer) -> dict[str, Any]:
        message = {"role": "assistant", "content": "".join(said.text), "refusal": None}
        logprobs = self._logprobs(said.made)
        return {"index": number, "message": message, "logprobs": logprobs, "finish_reason": said.reason}

    def piece(self, number: int, said: Answer, text: str, made: Sequence[Scored]) -> dict[str, Any]:
        delta = {} if said.begun else {"role": "assistant"}
        if text or not said.begun:
            delta["content"] = text
        return {"index": number, "delta": delta, "logprobs": self._logprobs(made), "finish_reason": said.reason}

    def _logprobs(self, made: Sequence[Scored]) -> dict[str, Any] | None:
        if not made:
            return None
        rows = []
        for token, one in made:
            if one is None:
                continue
            top = [self._token(other, logprob) for other, logprob in one.likeliest]
            rows.append({**self._token(token, one.logprob), "top_logprobs": top})
        return {"content": rows, "refusal": None}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        text = self.text_of([token])
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


Form = Completions | Chats


class Reply:
    """One reply: its id and time, and its answers as they come, n to each prompt. echo: what they begin with.

    ids: the tokens of the prompts, where those and the answers' are told. echoes: whether log-probabilities begin with
    the prompt's. scores_prompts: whether a whole reply has vLLM's `prompt_logprobs`.
    """

    ids: Sequence[Sequence[int]] | None = None
    echoes = scores_prompts = False

    def __init__(self, form: Form, model: str, echo: Sequence[str], n: int):
        self._form, self._model, self.n = form, model, n
        self.answers = [Answer([text] if text else []) for text in echo for _ in range(n)]
        self.id, self._created = f"{form.prefix}-{getrandbits(96):024x}", int(time())

    def take(self, number: int, piece: Piece) -> None:
        """For the whole reply."""
        said = self.answers[number]
        said.text.append(piece.text)
        self._note_token(said, piece)
        said.made += self._made(said, piece)

    def end_of(self, number: int, end: End) -> None:
        """An answer has ended, or a prompt to which there is none was read."""
        said = self.answers[number]
        said.scores = end.prompt_logprobs
        said.reason = end.finish.reason if end.usage.answer_tokens or end.finish.by is not None else "length"
        if said.last is not None and isinstance(end.finish.by, int):
            said.made.append((end.finish.by, said.last))

    def echo(self, number: int, scores: Scores | None = None) -> dict[str, Any]:
        """A chunk with the prompt that an answer begins with, and its log-probabilities."""
        made = [] if scores is None else list(zip(scores.tokens, scores, strict=True))
        return self._chunk(number, "".join(self.answers[number].text), made)

    def whole(self, usage: dict[str, Any]) -> dict[str, Any]:
        choices = []
        for n, said in enumerate(self.answers):
            if said.scores is not None and self.echoes:
                said.made[:0] = zip(said.scores.tokens, said.scores, strict=True)
            choices.append({**self._form.choice(n, said), **self._tokens(n)})
            if self.scores_prompts:
                choices[-1]["prompt_logprobs"] = self._prompt_logprobs(said)
        return {**self._head(self._form.whole), "choices": choices, "usage": usage}

    def piece(self, number: int, piece: Piece) -> dict[str, Any] | None:
        """A chunk with what this adds; None: there is nothing to show."""
        made = self._made(self.answers[number], piece)
        self._note_token(self.answers[number], piece)
        if not piece.text and not made and (self.ids is None or piece.token is None):
            return None
        return self._chunk(number, piece.text, made)

    def end(self, number: int) -> dict[str, Any]:
        """The last chunk of an answer, with the reason of its end."""
        return self._chunk(number, "", self.answers[number].made)  # of a stream, the end token's alone

    def _made(self, said: Answer, piece: Piece) -> list[Scored]:
        """A piece's token with its log-probabilities; those of an end token wait for its name."""
        if piece.made is None:
            return []
        if piece.token is None:
            said.last = piece.made if self._form.tells_end else None
            return []
        return [(piece.token, piece.made)]

    def note(self, **more: Any) -> dict[str, Any]:
        """A chunk without an answer."""
        return {**self._head(self._form.part), "choices": [], **more}

    def _chunk(self, number: int, text: str, made: Sequence[Scored]) -> dict[str, Any]:
        said = self.answers[number]
        choice = {**self._form.piece(number, said, text, made), **self._tokens(number)}
        said.begun = True
        return {**self._head(self._form.part), "choices": [choice]}

    def _note_token(self, said: Answer, piece: Piece) -> None:
        if self.ids is not None and piece.token is not None:
            said.ids.append(piece.token)

    def _tokens(self, number: int) -> dict[str, Any]:
        """What was not told yet of an answer's tokens; the prompt's with the first of them. vLLM's names."""
        if self.ids is None:
            return {}
        said = self.answers[number]
        told: dict[str, Any] = {"token_ids": said.ids[said.sent :]}
        if not said.begun:
            told["prompt_token_ids"] = list(self.ids[number // self.n])
        said.sent = len(said.ids)
        return told

    def _prompt_logprobs(self, said: Answer) -> list[dict[str, Any] | None]:
        """As vLLM has them: by token ids, the likeliest and the prompt's own. rank: null beyond the likeliest."""
        rows: list[dict[str, Any] | None] = []
        for token, one in [] if said.scores is None else zip(said.scores.tokens, said.scores, strict=True):
            if one is None:
                rows.append(None)
                continue
            ranks = {other: (rank, logprob) for rank, (other, logprob) in enumerate(one.likeliest, 1)}
            ranks.setdefault(token, (None, one.logprob))  # type: ignore[arg-type]
            rows.append(
                {
                    str(other): {"logprob": logprob, "rank": rank, "decoded_token": self._form.text_of([other])}
                    for other, (rank, logprob) in ranks.items()
                }
            )
        return rows

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self._created, "model": self._model}
