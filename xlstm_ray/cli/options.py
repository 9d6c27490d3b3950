"""Options of commands: the commands' own, and those made from the table of settings."""

import inspect
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import BeforeValidator

from xlstm_ray.cli.flags import in_flags, know
from xlstm_ray.cli.output import note
from xlstm_ray.cli.reporter import ProgressKind
from xlstm_ray.declare import Setting
from xlstm_ray.settings import table, unknown_variables

RUN, RAY, MACHINE = "Run a model", "Ray heads", "Look and measure"  # panels of the commands' list
PROMPT, SAMPLING, STATE, OUTPUT = "Prompt", "Sampling", "State", "Output"  # panels of the commands' own options
SERVICE = "Service"


def bare(text: str) -> str:
    """A text without markup for rich."""
    return text.replace("[", r"\[")


def _given(text: Any) -> Any:
    """Path("") would be the current directory, and a file that cannot be read has no name in the error."""
    if text == "":
        raise ValueError("a path is not empty")
    return text


GivenPath = Annotated[Path, BeforeValidator(_given)]
GivenFile = Annotated[str, BeforeValidator(_given)]  # or '-' for standard input
path_option = partial(typer.Option, metavar="<path>")  # typer would show the validator
file_option = partial(typer.Option, metavar="<str>")


def given_path(text: str) -> Path:
    """A GivenPath of an argument, by its `parser`: typer takes no validator there."""
    return Path(_given(text))


PromptOption = Annotated[
    str | None,
    typer.Option("--prompt", "-p", help="The prompt's text, '-' for standard input.", rich_help_panel=PROMPT),
]
PromptFileOption = Annotated[
    GivenFile | None,
    file_option(
        "--prompt-file",
        "-f",
        help="A UTF-8 file with the prompt, '-' for standard input; one last newline is dropped.",
        rich_help_panel=PROMPT,
    ),
]
JsonlOption = Annotated[
    bool,
    typer.Option(
        "--jsonl",
        help="The file has a prompt on each line: a JSON string or an object with a 'prompt' key.",
        rich_help_panel=PROMPT,
    ),
]
StateInOption = Annotated[
    GivenPath | None,
    path_option(
        "--state-in",
        help="Go on from this saved state; settings not given are taken from it.",
        rich_help_panel=STATE,
    ),
]
AppendOption = Annotated[
    str | None,
    typer.Option("--append", help="The text that follows the text of --state-in.", rich_help_panel=STATE),
]
AppendFileOption = Annotated[
    GivenFile | None,
    file_option(
        "--append-file",
        help="The same from a file, '-' for standard input; with --jsonl a text on each line, all after one state.",
        rich_help_panel=STATE,
    ),
]
ConfigOption = Annotated[
    GivenPath | None,
    path_option(
        "--config",
        help=bare(
            "A TOML file with settings; flags and environment variables override it. A setting's key is its "
            "option with _ for -; its variable is XLSTM_ and the key in capitals, unless [env: NAME] is shown."
        ),
        rich_help_panel="Settings",
    ),
]
StateOutOption = Annotated[
    GivenPath | None, path_option("--state-out", "-o", help="Write the state to this file.", rich_help_panel=STATE)
]
PromptLogprobsOption = Annotated[
    int | None,
    typer.Option(
        "--prompt-logprobs",
        help="Log-probabilities of the prompt's tokens, and of this many likeliest ones. With --json and --jsonl.",
        rich_help_panel=OUTPUT,
    ),
]
ChatOption = Annotated[
    bool,
    typer.Option(
        "--chat", help="The prompt is a message of a user; a chat template makes it text.", rich_help_panel=PROMPT
    ),
]
MessagesOption = Annotated[
    GivenFile | None,
    file_option(
        "--messages",
        help="A JSON file with a conversation to answer: objects with role and content; '-' for standard input.",
        rich_help_panel=PROMPT,
    ),
]
SystemOption = Annotated[
    str | None,
    typer.Option("--system", help="A message of the system, before all others.", rich_help_panel=PROMPT),
]
ChatTemplateOption = Annotated[
    GivenPath | None,
    path_option(
        "--chat-template",
        help=bare("The template that makes messages text, a jinja file. [default: the model's own]"),
        rich_help_panel=PROMPT,
    ),
]
OrderedOption = Annotated[
    bool,
    typer.Option(
        "--ordered",
        help="Print the results of --jsonl in the order of its lines, not as they end.",
        rich_help_panel=OUTPUT,
    ),
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on standard output.", rich_help_panel=OUTPUT)
]
ProgressOption = Annotated[
    ProgressKind,
    typer.Option(
        "--progress",
        help="On standard error: a bar, JSON lines, or nothing; auto is a bar on a terminal.",
        rich_help_panel=OUTPUT,
    ),
]
SlotsOption = Annotated[
    int | None,
    typer.Option(
        "--slots",
        help=bare("Requests at once. [default: 16, or as many as fit]"),
        min=1,
        max=1024,
        rich_help_panel=SERVICE,
    ),
]
DeterministicOption = Annotated[
    bool,
    typer.Option(
        "--deterministic",
        help="An answer's bits do not depend on other requests; a lone one takes longer.",
        rich_help_panel=SERVICE,
    ),
]


def takes(names: str = "", *, without: str = "") -> Callable[[Callable], Callable]:
    """Decorates a command that takes these settings (all, if none is named) after its own options, and --config.

    without: settings that are left out. All arrive as the keyword argument `asked`, for Settings.make; None: not given.
    """
    rows = [row for name, row in table().items() if name in (names.split() or table()) and name not in without.split()]
    options = {"config": ConfigOption} | {row.name: _option(row) for row in rows if row.flags}

    def decorate(command: Callable) -> Callable:
        def run(**given: Any) -> None:
            for line in unknown_variables():
                note(line)
            command(**{name: v for name, v in given.items() if name not in options}, asked=_only(options, given))

        own = inspect.signature(command)
        parameters = [p for p in own.parameters.values() if p.name != "asked"]
        parameters += [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
            for name, annotation in options.items()
        ]
        know(parameters)
        run.__name__, run.__doc__ = command.__name__, command.__doc__
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        run.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
        return run

    return decorate


def _only(options: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    return {name: given[name] for name in options}


def _option(row: Setting) -> Any:
    """A setting as typer declares it."""
    shown = row.shown or (",".join(row.default) if row.kind is tuple else row.default)
    if row.kind is bool:
        shown = "on" if row.default else "off"
    env = "" if row.env == f"XLSTM_{row.name.upper()}" else f" [env: {row.env}]"
    kind = str if row.kind in (tuple, Path) else row.kind  # a Path of an empty text is the current directory
    metavar = "<path>" if row.kind is Path else None
    words = f"{in_flags(row.help)}{env} [default: {shown}]"
    flags = [row.flags, *filter(None, [row.short])]
    option = typer.Option(*flags, help=bare(words), metavar=metavar, rich_help_panel=row.panel)
    return Annotated[kind | None, option]  # type: ignore


def examples(*lines: str) -> str:
    """Examples at the end of a command's help, one on each line."""
    return "\b\n" + "\n".join(["Examples:", *(f"  {bare(line)}" for line in lines)])
