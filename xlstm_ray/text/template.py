"""Chat templates: a conversation becomes the text that a model was trained on. In a sandbox: a template is not ours."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from xlstm_ray.config import read_json
from xlstm_ray.errors import ConfigError, UsageError, one_line

FILE, CONFIG = "chat_template.jinja", "tokenizer_config.json"
OWN = "messages", "add_generation_prompt", "bos_token", "eos_token", "tools", "documents"


class Template:
    """A template, as transformers renders it. special: texts of special tokens. Raises UsageError if it is none."""

    def __init__(self, source: str, name: str, special: Mapping[str, str]):
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals |= {"raise_exception": _refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as err:
            raise UsageError(f"{name}: is not a template of chats: {one_line(err)}") from None
        self.source, self._special = source, special

    def render(
        self, messages: Sequence[Mapping[str, Any]], *, answer: bool = True, more: Mapping[str, Any] | None = None
    ) -> str:
        """The text of a conversation. answer: it ends where the model's answer begins. more: the template's own words.

        Raises UsageError where the template does not take these messages.
        """
        words = {"tools": None, "documents": None, **self._special, **(more or {})}
        try:
            return self._template.render(messages=messages, add_generation_prompt=answer, **words)
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError, RecursionError) as err:
            raise UsageError(f"the chat template does not take these messages: {one_line(err)}") from None


def find_template(model: Path, given: Path | None) -> Template | None:
    """The template of a file that was named, else of the model's directory; None: there is none. Raises UsageError."""
    config: Any = read_json(model / CONFIG, ConfigError) if (model / CONFIG).exists() else {}
    config = config if isinstance(config, dict) else {}
    special = {name: _content(config.get(name)) for name in ("bos_token", "eos_token")}
    named = config.get("chat_template")
    if isinstance(named, list):  # several, by name
        named = next(
            (one.get("template") for one in named if isinstance(one, dict) and one.get("name") == "default"), None
        )
    for path in (given, model / FILE):
        if path is not None and (path is given or path.exists()):
            try:
                return Template(path.read_text("utf-8"), str(path), special)
            except (OSError, UnicodeDecodeError) as err:
                why = err.strerror if isinstance(err, OSError) else "it is not UTF-8 text"
                raise UsageError(f"{path}: the chat template cannot be read ({why})") from None
    return Template(named, str(model / CONFIG), special) if isinstance(named, str) else None


def _content(token: Any) -> str:
    """A special token is written as a text, or as an object with its content."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else ""


def _to_json(value: Any, indent: int | None = None, **_more: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(text: str) -> NoReturn:
    raise jinja2.TemplateError(text)


# What is said as it is, each line of a person on a line of its own: for models that only go on with a text.
PLAIN = Template(
    "{% for m in messages %}{% if not loop.first and m.role != 'assistant' %}{{ '\\n' }}{% endif %}"
    "{{ m.content }}{% endfor %}",
    "plain",
    {},
)
