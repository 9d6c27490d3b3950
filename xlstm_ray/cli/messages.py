"""Messages of `generate`: a chat template makes the prompt of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from xlstm_ray.cli.input import read_text
from xlstm_ray.cli.session import chosen_template
from xlstm_ray.errors import UsageError
from xlstm_ray.settings import Settings
from xlstm_ray.text.ondisk import TextFile

if TYPE_CHECKING:
    from xlstm_ray.engine.engine import Engine
    from xlstm_ray.state import RecurrentState

ROLES = "system", "developer", "user", "assistant"
FORM = 'a list of objects with "role" and "content"'


class Asked(NamedTuple):
    """The options about messages. chat: the prompt is one. messages: of a file; system: the first one."""

    chat: bool
    file: str | None
    system: str | None
    template: Path | None

    @property
    def any(self) -> bool:
        return self.chat or self.file is not None

    def check(self, others: Sequence[object]) -> None:
        """Raise UsageError for options that have no effect. others: where else a prompt may come from."""
        for option, given in (("--system", self.system), ("--chat-template", self.template)):
            if given is not None and not self.any:
                raise UsageError(f"{option} is for messages; add --chat (the prompt is one) or --messages FILE")
        if self.file is not None and any(others):
            raise UsageError("--messages and a prompt were both given; the file has all messages: give one")
        if self.file is not None and self.chat:
            raise UsageError("--chat has no effect beside --messages, whose file says who says what; leave it out")

    def messages(self) -> list[dict[str, str]]:
        """Those of the file. Raises UsageError."""
        from xlstm_ray.config import parse_json

        assert self.file is not None
        source, text = read_text(self.file)
        try:
            found = parse_json(text.encode())
        except (ValueError, RecursionError) as err:
            raise UsageError(f"{source}: is not JSON ({err})") from None
        found = found.get("messages") if isinstance(found, dict) else found
        if not isinstance(found, list) or not found:
            raise UsageError(f"{source}: is not {FORM}")
        for n, message in enumerate(found, 1):
            if not isinstance(message, dict) or set(message) != {"role", "content"}:
                raise UsageError(f"{source}, message {n}: is not an object with 'role' and 'content' alone")
            if message["role"] not in ROLES:
                role = str(message["role"])[:80]
                raise UsageError(f"{source}, message {n}: the role is {role!r}; allowed: {', '.join(ROLES)}")
            if not isinstance(message["content"], str):
                raise UsageError(f"{source}, message {n}: the content is not a text")
        return found


class Talk:
    """What makes messages text. Raises UsageError if the model has no template."""

    def __init__(self, settings: Settings, asked: Asked):
        chosen = chosen_template(settings, asked.template)
        if chosen.note is not None:
            raise UsageError("this model has no chat template; give --chat-template FILE, or a plain prompt")
        self._template = chosen.template
        self._first = [] if asked.system is None else [{"role": "system", "content": asked.system}]

    def given(self, engine: "Engine", given: dict[str, Any], state: "RecurrentState | None") -> dict[str, Any]:
        """Arguments of generate, with text in place of messages: a text is one of a user, a list of dicts is many.

        Those of a file follow a state, unless it is of a run with the same messages that was stopped.
        """
        ((kind, asked),) = given.items()
        if asked is None:
            raise UsageError("--chat makes the prompt a message, and there is none; give --prompt or --append")
        if isinstance(asked, TextFile):
            asked = asked[:]  # a template wants it whole
        if isinstance(asked[0], dict) and state is not None:
            kind = "append" if state.complete or state.rows[0].appended_to is not None else "prompt"

        def made(one: Any) -> Any:
            messages = [{"role": "user", "content": one}] if isinstance(one, str) else one
            text = self._template.render([*self._first, *messages])
            return text if kind == "append" else engine.text.conversation(text)

        alone = isinstance(asked, str) or isinstance(asked[0], dict)
        return {kind: made(asked) if alone else [made(one) for one in asked]}
