"""The command `chat`: a conversation in the terminal, or by the lines of standard input."""

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import typer

from xlstm_ray.cli.options import (
    RUN,
    ChatTemplateOption,
    JsonOption,
    ProgressOption,
    StateInOption,
    StateOutOption,
    SystemOption,
    examples,
    takes,
)
from xlstm_ray.cli.output import json_line, leave_terminal, show, tell
from xlstm_ray.cli.report import ending_text
from xlstm_ray.cli.reporter import ProgressKind, Reporter
from xlstm_ray.cli.sampled import MORE, samples
from xlstm_ray.cli.session import (
    check_generation,
    chosen_template,
    open_engine,
    require_places,
    require_use_of_cache,
    run_under_keeper,
)
from xlstm_ray.cli.signals import Stop, handling, stop_on_signals, stopped_by
from xlstm_ray.errors import OutputError, StateError, UsageError
from xlstm_ray.settings import Settings

if TYPE_CHECKING:
    from xlstm_ray.engine.chat import Chat
    from xlstm_ray.engine.engine import Engine

commands = typer.Typer()

# A journal and logs are of one prefill.
WITHOUT = "journal journal_every resume stats_log mem_log"
PROMPT = "> "
MAX_NEW_TOKENS = 512
LONG = 4096  # characters of a text whose reading is shown by a bar
HELP = """\
/save FILE     write the conversation to a file (for /load and --state-in)
/load FILE     go on with a saved conversation, or after another saved state
/fork NAME     a second conversation goes on from here under this name; the present one stays as it is
/switch NAME   go to another conversation; the first is main; without NAME: list all
/reset         begin this conversation again
/help          show this
/exit          leave; so does Ctrl-D
Ctrl-C stops an answer; what was said of it stays in the conversation. Ctrl-C again, at the prompt, leaves.
A line that ends with \\ goes on in the next one. A line that begins with // is said, with one /."""


@commands.command(
    rich_help_panel=RUN,
    epilog=examples(
        "xlstm-ray chat -m DIR --system 'Be brief.' --temperature 0.7",
        "xlstm-ray chat -m DIR --state-in book.state",
        "xlstm-ray chat -m DIR --json < questions.txt > answers.jsonl",
    ),
)
@takes(without=WITHOUT)
@partial(samples, more={**MORE, "max_new_tokens": f"[default: {MAX_NEW_TOKENS}]"}, without=("n", "logprobs"))
def chat(
    system: SystemOption = None,
    chat_template: ChatTemplateOption = None,
    sampling: Any = None,
    state_in: StateInOption = None,
    state_out: StateOutOption = None,
    json_output: JsonOption = False,
    progress: ProgressOption = "auto",
    *,
    asked: dict[str, Any],
) -> None:
    """Talk with a model; /help lists what else can be said. Each line of standard input is a turn."""
    settings = Settings.make(**asked)
    require_use_of_cache(settings)
    sampling = {"max_new_tokens": MAX_NEW_TOKENS, **sampling}
    check_generation(sampling, [], printed=False)
    run_under_keeper(settings)
    require_places(settings, asked["config"], None, state_in, state_out, later=True)
    template = chosen_template(settings, chat_template)
    with open_engine(settings, state_in, state_out, asked, progress, 1) as (start, engine, report):
        begin = partial(engine.chat, template=template.template, sampling=sampling)
        first = begin(start.get("state"), system=system)
        with report:
            engine.warm_up(1, [1, engine.numerics.chunk_size])
        session = Session(engine, first, begin, Shown(json_output, progress), overwrite=settings.overwrite)
        if session.terminal:
            tell(f"{engine.model_path.name or engine.model_path}: /help shows what can be said; Ctrl-D leaves")
        if template.note:
            tell(f"note: {template.note}")
        stop = session.run()
        if state_out is not None:
            digest = session.chat.save(state_out, overwrite=settings.overwrite)
            tell(f"state {state_out} (digest {digest})")
        if stop is not None:
            raise stopped_by("the conversation was left", stop)


class Shown(NamedTuple):
    """How answers and progress are printed."""

    json_output: bool
    progress: ProgressKind


class Session:
    """Turns and commands, a line after the other. begin: makes a conversation that goes on from a state or a file.

    overwrite: /save may replace files that are not states.
    """

    def __init__(self, engine: "Engine", first: "Chat", begin: "Callable[..., Chat]", shown: Shown, *, overwrite: bool):
        self._engine, self._begin, self._shown, self._overwrite = engine, begin, shown, overwrite
        self._began = first.fork()  # what /reset goes back to
        self._chats, self._name = {"main": first}, "main"
        self.terminal = sys.stdin.isatty()
        self._lines = iter(()) if self.terminal else _piped()
        self._stop = Stop(lambda text: None)  # of signals at the prompt
        self._ways = {
            "/save": self._save,
            "/load": self._load,
            "/fork": self._fork,
            "/switch": self._switch,
            "/reset": self._reset,
            "/help": self._help,
        }

    @property
    def chat(self) -> "Chat":
        """The present conversation."""
        return self._chats[self._name]

    def run(self) -> Stop | None:
        """Until the end of input, /exit or a signal; returns the signal's Stop."""
        with handling(self._signalled, signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            while True:
                try:
                    line = next(self._lines, None) if not self.terminal else self._read()
                    if line is None or line.strip() == "/exit":
                        return None
                    self._stop.signals.clear()
                    ended_by = self._take(line)
                    if ended_by is not None:
                        return ended_by
                except KeyboardInterrupt:
                    show("", end="\n" if self.terminal else "")
                    if not self.terminal or self._stop.signals != [signal.SIGINT]:
                        return self._stop
                    tell("Ctrl-C again, Ctrl-D or /exit leaves")
                except (UsageError, StateError, OutputError) as error:
                    if not self.terminal:
                        raise
                    tell(f"error: {error}")

    def _signalled(self, number: int, _frame: object) -> None:
        if number == signal.SIGHUP:
            leave_terminal()
        self._stop.signals.append(number)
        raise KeyboardInterrupt

    # -- lines ---------------------------------------------------------------------------------------------------------
    def _read(self) -> str | None:
        """What was typed, with the lines that go on; None: the input has ended."""
        lines: list[str] = []
        while not lines or lines[-1].endswith("\\"):
            try:
                lines.append(_ask(PROMPT if not lines else ". "))
            except EOFError:
                show("")
                return None
        return "\n".join([*(line[:-1] for line in lines[:-1]), lines[-1]])

    def _take(self, line: str) -> Stop | None:
        """A turn or a command. Returns what ended a turn if it ends the session, too."""
        word, _, rest = line.strip().partition(" ")
        if not line.strip():
            return None
        if line.startswith("/") and not line.startswith("//"):
            way = self._ways.get(word)
            if way is None:
                raise UsageError(f"{word[:80]!r} is not a command; there are: {', '.join([*self._ways, '/exit'])}")
            way(rest.strip())
            return None
        return self._say(line.removeprefix("/") if line.startswith("//") else line)

    def _say(self, line: str) -> Stop | None:
        chat, plain = self.chat, not self._shown.json_output
        report = Reporter(self._shown.progress if len(line) > LONG else "none")
        with stop_on_signals(report.at_once if len(line) > LONG else lambda text: None) as stop, report:
            stop.asked, stop.at = True, "tile or token"  # also while kernels are compiled, it ends the turn alone
            for piece in chat.say(line, should_stop=stop, on_progress=report.tile):
                report.close()
                if plain:
                    show(piece, end="")
        generation = chat.generation
        assert generation is not None
        read = generation.prefill
        if read.ended_by is not None:
            raise read.ended_by
        if plain:
            show("", end="\n" if read.complete else "")
            if not read.complete:
                tell("(stopped before it was read: nothing was said)")
            elif self.terminal and stop.signals:
                tell("(stopped)")
            elif self.terminal and generation.finish_reasons[0] == "length":
                tell(f"(ended by {ending_text(generation, 0)})")
        else:
            json_line(
                {
                    "chat": self._name,
                    "text": generation.texts[0],
                    "finish_reason": generation.finish_reasons[0],
                    "stop_text": generation.stop_texts[0],
                    "new_tokens": len(generation.tokens[0]),
                    "read_tokens": read.stats.prompt_tokens - read.stats.resumed_tokens,
                    "tokens": chat.state.tokens[0] if read.complete else None,
                    "ttft_s": read.stats.ttft_s,
                    **generation.speed(0),
                }
            )
        if not stop.signals:
            return None
        self._stop.signals.append(signal.SIGINT)
        return None if self.terminal and set(stop.signals) == {signal.SIGINT} else stop

    # -- commands ------------------------------------------------------------------------------------------------------
    def _save(self, file: str) -> None:
        path = Path(_named(file, "/save FILE")).expanduser()
        self.chat.save(path, overwrite=self._overwrite)
        tell(f"saved in {path}")

    def _load(self, file: str) -> None:
        path = Path(_named(file, "/load FILE")).expanduser()
        self._chats[self._name] = self._begin(path)
        tell(f"{self._name} goes on from {path}")

    def _fork(self, name: str) -> None:
        if _named(name, "/fork NAME") in self._chats:
            raise UsageError(f"there is a conversation {name!r} already; give another name, or /switch {name}")
        self._chats[name] = self.chat.fork()
        tell(f"{name} goes on from here; /switch {self._name} goes back to {self._name} as it is now")
        self._name = name

    def _switch(self, name: str) -> None:
        if name and name not in self._chats:
            raise UsageError(f"there is no conversation {name!r}; there are: {', '.join(self._chats)}")
        if name:
            self._name = name
            tell(f"this is {name} now")
        else:
            tell("\n".join(f"{'*' if one == self._name else ' '} {one}" for one in self._chats))

    def _reset(self, rest: str) -> None:
        _nothing(rest, "/reset")
        self._chats[self._name] = self._began.fork()
        tell(f"{self._name} begins again")

    def _help(self, rest: str) -> None:
        _nothing(rest, "/help")
        tell(HELP)


def _named(given: str, form: str) -> str:
    if not given:
        raise UsageError(f"{form.split()[0]} needs a name: {form}")
    return given


def _nothing(given: str, word: str) -> None:
    if given:
        raise UsageError(f"{word} stands alone, and {given[:80]!r} was given after it")


def _ask(prompt: str) -> str:
    """A line from the terminal, with Python's line editing where the answers go to the terminal, too."""
    if not sys.stdout.isatty():
        sys.stderr.write(prompt)
        sys.stderr.flush()
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.removesuffix("\n")
    with suppress(ImportError):  # a Python without it reads plain lines
        import readline  # noqa: F401
    return input(prompt)


def _piped() -> Iterator[str]:
    """The lines of standard input. Raises UsageError for one that is not text."""
    for number, line in enumerate(sys.stdin.buffer, 1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as err:
            raise UsageError(f"standard input, line {number}: is not UTF-8 text ({err.reason})") from None
        yield text.removesuffix("\n").removesuffix("\r")
