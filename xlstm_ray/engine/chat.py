"""A conversation: a state that grows turn by turn, and can be forked, saved and resumed."""

from collections.abc import Callable, Iterator, Mapping
from copy import copy
from pathlib import Path
from typing import Any, NamedTuple

from xlstm_ray.engine.driver import Progress
from xlstm_ray.engine.generation import Generation
from xlstm_ray.errors import UsageError
from xlstm_ray.state import RecurrentState
from xlstm_ray.text.history import Conversation, Message
from xlstm_ray.text.template import PLAIN, Template


class _Place(NamedTuple):
    """A state of the conversation, and the part of its text that the state has seen. None: it has seen nothing."""

    text: str
    state: RecurrentState | None


class _Known(NamedTuple):
    """A conversation. places: where it can go on from, the longest text first."""

    places: tuple[_Place, ...]
    messages: tuple[Message, ...]


class _Answer(NamedTuple):
    """An answer that may not have been read to its end. whole: the text before it."""

    generation: Generation
    whole: str
    messages: tuple[Message, ...]


class Chat:
    """Keeps the state on the device between turns: nothing is computed twice.

    generate: Engine.generate. tokens: Text.conversation. state: to begin from; it does not change. A saved conversation
    goes on; after another state, the conversation begins. sampling: fields of `Sampling` by name, for all answers.
    template: makes messages the text, of which only what the state has not seen is read. Where it shows the last answer
    otherwise than it was said (without a stop text, trimmed), the answer is read again. Without a template, texts are
    not changed: the caller writes a model's marks of roles and turns. system: the first message.
    """

    def __init__(
        self,
        generate: Callable[..., Generation],
        tokens: Callable[[str], list[int]],
        *,
        state: RecurrentState | None = None,
        sampling: Mapping[str, Any] | None = None,
        template: Template | None = None,
        system: str | None = None,
    ):
        if state is not None and state.batch > 1:
            raise UsageError(f"{state.name} has {state.batch} prompts; a conversation goes on from one")
        if system is not None and template is None:
            raise UsageError("`system` is a message, and without a template there are none; give one")
        begun = state.rows[0].conversation if state is not None and template is not None else None
        if system is not None and begun is not None and state is not None:
            raise UsageError(f"`system` begins a conversation, and {state.name} has begun already; leave it out")
        self._generate, self._tokens, self._template = generate, tokens, template
        self._sampling = dict(sampling or {})
        first = [] if system is None else [Message(role="system", content=system)]
        here = _Place("" if begun is None else begun.text, state)
        self._alone = state is None if begun is None else begun.alone
        places = (here,) if begun is None or not self._alone else (here, _Place("", None))
        # Replaced, never changed: forks share it.
        self._known = _Known(places, tuple(first if begun is None else begun.messages))
        self._answer: _Answer | None = None  # until it was read to its end
        self.generation: Generation | None = None  # of the last turn

    @property
    def state(self) -> RecurrentState:
        """The state after everything that was said. Raises UsageError before the first turn."""
        state = self._now.places[0].state
        if state is None:
            raise UsageError("nothing has been said in this conversation yet, so it has no state")
        return state

    @property
    def messages(self) -> list[Message]:
        """All that was said, where there is a template."""
        return list(self._now.messages)

    def say(
        self,
        text: str,
        *,
        should_stop: Callable[[], bool] = lambda: False,
        on_progress: Callable[[Progress], None] | None = None,
        **sampling: Any,
    ) -> Iterator[str]:
        """Say something, which is read at once, and iterate over the pieces of the answer.

        sampling: for this answer, over the conversation's. An answer that is not read to its end, or stopped, is part
        of the conversation as far as it was made. If `should_stop` ends it before the text is read, nothing was said.
        """
        now = self._now
        messages = (*now.messages, Message(role="user", content=text))
        if self._template is None:
            whole = now.places[0].text + text
        else:
            whole = self._template.render([message.model_dump() for message in messages])
        place = next((p for p in now.places if whole.startswith(p.text) and len(whole) > len(p.text)), None)
        if place is None:
            raise UsageError(
                "the chat template does not go on from what was said: it makes no text of the messages, or is not the "
                "one that the conversation began with"
            )
        new = whole[len(place.text) :]
        if place.state is not None:
            given: dict[str, Any] = {"append": new, "state": place.state}
        else:
            given = {"prompt": new if self._template in (None, PLAIN) else self._tokens(new)}
        generation = self.generation = self._generate(
            **given,
            sampling={**self._sampling, **sampling},
            last=False,
            should_stop=should_stop,
            on_progress=on_progress,
        )
        self._known, self._answer = now, None
        if not generation.prefill.complete:
            return iter(())
        self._answer = _Answer(generation, whole, messages)
        return self._pieces(self._answer)

    def _pieces(self, answer: _Answer) -> Iterator[str]:
        try:
            yield from answer.generation
        finally:
            if self._answer is answer:  # else something more was said before it was read to its end
                self._known, self._answer = self._now, None

    @property
    def _now(self) -> _Known:
        """With what was made of an answer that has not been read to its end."""
        if self._answer is None:
            return self._known
        (generation, whole, messages), places = self._answer, self._known.places
        said = _Place(whole + generation.said[0], generation.state())
        before = () if self._template is None else (_Place(whole, generation.prefill.state),)
        message = Message(role="assistant", content=generation.texts[0])
        return _Known((said, *before, places[-1]), (*messages, message))

    def fork(self) -> "Chat":
        """Another conversation that goes on from here; they do not affect each other."""
        other = copy(self)
        other._known, other._answer = self._now, None
        return other

    def save(self, path: str | Path, *, overwrite: bool = False) -> str:
        """Write its state, like `--state-out`, with its messages where there is a template; returns the digest."""
        (places, messages), place = self._now, _Place("", self.state)
        if self._template is not None:  # the state from which the next turn goes on
            whole = self._template.render([message.model_dump() for message in messages], answer=False)
            place = next((p for p in places if p.state and whole.startswith(p.text)), places[0])
        assert place.state is not None
        state = copy(place.state)
        if self._template is not None:
            known = Conversation(messages=list(messages), text=place.text, alone=self._alone)
            state.rows = [state.rows[0].model_copy(update={"conversation": known})]
        return state.save(path, overwrite=overwrite)
