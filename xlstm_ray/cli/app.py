"""The program: its commands, its entry point, and how errors become one line and an exit code."""

import sys
from typing import Annotated, Any

import typer

from xlstm_ray import __version__
from xlstm_ray.cli import bench, cache, chat, client, models, ray, run, score, serve, tools, warm
from xlstm_ray.cli.options import MACHINE, RUN
from xlstm_ray.cli.output import drop_stdout, open_standard_files, tell
from xlstm_ray.errors import Interrupted, XlstmRayError
from xlstm_ray.threads import collect_seldom

app = typer.Typer(
    name="xlstm-ray",
    help="Prefill prompts of any length through xLSTM language models, in flat memory.",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

for room in (run, chat, score, models, serve, warm, tools, ray):  # in the order of the help
    app.add_typer(room.commands)
app.add_typer(client.commands, name="client", rich_help_panel=RUN)
app.add_typer(bench.commands, name="bench", rich_help_panel=MACHINE)
app.add_typer(cache.commands, name="cache", rich_help_panel=MACHINE)


def _show_version(asked: bool) -> None:
    if asked:
        print(f"xlstm-ray {__version__}")
        raise typer.Exit


@app.callback()
def _xlstm_ray(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    pass


def command_words() -> list[str]:
    """The command line's words. `--autoscale again` becomes two flags: the parser has no flag with an optional word."""
    words = sys.argv[1:]
    for n in range(len(words) - 1):
        if words[n : n + 2] == ["--autoscale", "again"]:
            return [*words[: n + 1], "--autoscale-again", *words[n + 2 :]]
    return words


def main() -> None:
    """Entry point. The project's own errors become one line and an exit code; anything else is a bug and shows."""
    open_standard_files()
    collect_seldom()
    try:
        code = app(args=command_words() or ["--help"], prog_name="xlstm-ray", standalone_mode=False)
        if code == 130:  # typer's exit code for a Ctrl-C that nothing else handled
            tell("interrupted")
        sys.exit(code)
    except typer.TyperException as err:  # an unknown option, a word where a number is due
        place = getattr(err, "ctx", None)  # the command whose words are wrong
        tell(f"error: {_usage_text(err)}; see {place.command_path if place else 'xlstm-ray'} --help")
        sys.exit(2)
    except XlstmRayError as err:
        tell(f"{'' if isinstance(err, Interrupted) else 'error: '}{err}")
        sys.exit(err.exit_code)
    except BrokenPipeError:
        drop_stdout()  # its reader has ended
        sys.exit(1)


def _usage_text(err: typer.TyperException) -> str:
    """The parser's message, with the word that was given."""
    text = " ".join(err.format_message().split()).replace("Value error, ", "").removesuffix(".")
    cause: Any = err.__cause__
    if hasattr(cause, "errors"):  # a pydantic error
        text += f" (given: {str(cause.errors()[0]['input'])[:80]!r})"
    return text
