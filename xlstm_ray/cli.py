"""The command line. torch is imported only inside commands, so that --help answers at once."""

import errno
import inspect
import io
import json
import math
import os
import shlex
import shutil
import signal
import stat
import sys
import threading
import time
from codecs import BOM_UTF8, BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import psutil
import typer

from xlstm_ray import __version__, files, keeper
from xlstm_ray.errors import GridLost, Interrupted, OutputError, ParityError, StateError, UsageError, XlstmRayError
from xlstm_ray.files import Input, Output, check_outputs, require_writable, shown_bytes
from xlstm_ray.reporter import ProgressKind, Reporter
from xlstm_ray.settings import (
    JOURNAL_FILE,
    Setting,
    Settings,
    given_variables,
    refuse_unknown,
    table,
    unknown_variables,
)

if TYPE_CHECKING:
    from xlstm_ray.engine import Engine, Generation, PrefillResult, Statistics
    from xlstm_ray.state import RecurrentState

app = typer.Typer(
    name="xlstm-ray",
    help="Prefill prompts of any length through xLSTM language models, in flat memory.",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
RUN, RAY, MACHINE = "Run a model", "Ray heads", "Look and measure"  # panels of the commands' list
PROMPT, SAMPLING, STATE, OUTPUT = "Prompt", "Sampling", "State", "Output"  # panels of the commands' own options

JSONL_KEYS = "prompt", "id"
PROMPT_OPTIONS = "--prompt", "-p", "--prompt-file", "-f"


def _plain(text: str) -> str:
    """A text in which rich reads no markup."""
    return text.replace("[", r"\[")


PromptOption = Annotated[
    str | None,
    typer.Option("--prompt", "-p", help="The prompt's text, '-' for standard input.", rich_help_panel=PROMPT),
]
PromptFileOption = Annotated[
    str | None,
    typer.Option(
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
        help="The file has a prompt a line: a JSON string or an object with a 'prompt' key.",
        rich_help_panel=PROMPT,
    ),
]
StateInOption = Annotated[
    Path | None,
    typer.Option(
        "--state-in",
        help="Go on from this saved state; settings not given are taken from it.",
        rich_help_panel=STATE,
    ),
]
AppendOption = Annotated[
    str | None,
    typer.Option("--append", help="Only what is new after the text of --state-in.", rich_help_panel=STATE),
]
AppendFileOption = Annotated[
    str | None,
    typer.Option(
        "--append-file",
        help="The same from a file, '-' for standard input; with --jsonl a text a line, all after one state.",
        rich_help_panel=STATE,
    ),
]
ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config",
        help=_plain(
            "A TOML file with settings; flags and environment go before it. A setting's key is its option's name "
            "with _ for -, its variable XLSTM_ and the key in capitals where no [env: NAME] says otherwise."
        ),
        rich_help_panel="Settings",
    ),
]
StateOutOption = Annotated[
    Path | None, typer.Option("--state-out", "-o", help="Write the state to this file.", rich_help_panel=STATE)
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


def takes(names: str = "") -> Callable[[Callable], Callable]:
    """A command that takes these settings (all, where none is named) after its own options, and --config.

    What was given arrives as the keyword argument `asked`, for Settings.make; None stands for what was not.
    """
    rows = [table()[name] for name in names.split()] or list(table().values())
    options = {"config": ConfigOption} | {row.name: _option(row) for row in rows if row.flags}

    def decorate(command: Callable) -> Callable:
        def run(**given: Any) -> None:
            for note in unknown_variables():
                _err(f"note: {note}")
            command(**{name: v for name, v in given.items() if name not in options}, asked=_only(options, given))

        own = inspect.signature(command)
        parameters = [p for p in own.parameters.values() if p.name != "asked"]
        parameters += [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
            for name, annotation in options.items()
        ]
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
    kind = str if row.kind is tuple else row.kind
    words = f"{row.help}{env} [default: {shown}]"
    flags = [row.flags, *filter(None, [row.short])]
    return Annotated[kind | None, typer.Option(*flags, help=_plain(words), rich_help_panel=row.panel)]  # type: ignore


def _examples(*lines: str) -> str:
    """The end of a command's help: a line each."""
    return "\b\n" + "\n".join(["Examples:", *(f"  {_plain(line)}" for line in lines)])


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


@app.command(
    rich_help_panel=RUN,
    epilog=_examples(
        'xlstm-ray prefill -p "The capital of France is"',
        "xlstm-ray prefill -m DIR -f book.txt -o book.state",
        "cat book.txt | xlstm-ray prefill -m DIR --json",
    ),
)
@takes()
def prefill(
    prompt: PromptOption = None,
    prompt_file: PromptFileOption = None,
    jsonl: JsonlOption = False,
    state_in: StateInOption = None,
    append: AppendOption = None,
    append_file: AppendFileOption = None,
    state_out: StateOutOption = None,
    json_output: JsonOption = False,
    progress: ProgressOption = "auto",
    *,
    asked: dict[str, Any],
) -> None:
    """Compute a prompt's state and the likeliest next tokens."""
    _run_under_keeper(asked)
    given, names, a_line_each = _given(prompt, prompt_file, append, append_file, jsonl, state_in or asked["resume"])
    settings = _settings(asked, prompt_file or append_file, state_in, state_out)
    with _opened(settings, state_in, state_out, asked, progress, _count(given)) as (start, engine, report):
        a_line_each = a_line_each or ("state" in start and start["state"].batch > 1)

        def ready(b: int, of_row: "PrefillResult") -> None:
            _json_line({**(names[b] if names else {"index": b}), **_summary(engine, of_row, state_out, None)})

        with _stop_on_signals(report.at_once, lambda: _rescued(engine, state_out, settings)) as stop, report:
            on_ready = ready if a_line_each else None
            result = engine.prefill(
                **given,
                **start,
                on_progress=report.tile,
                on_ready=on_ready,
                should_stop=stop,
                on_snapshot=_keeping(engine, state_out),
            )
        _require_some(result, stop)
        saved = _save(engine, result.state, state_out, settings, needed=not result.complete)
        engine.close(keep_journal=True)  # the state is safe; memory and devices are free for others from now on
        if not result.complete:
            raise _interrupted(result, saved, stop)
        if given.get("prompt") is None and "append" not in given and a_line_each:  # a state as it is
            for b in range(result.state.batch):
                ready(b, result.row(b))
        if not a_line_each:
            _print_results(engine, result, saved.asked, saved.digest, json_output=json_output)
        _finish(engine, saved)


@app.command(
    rich_help_panel=RUN,
    epilog=_examples(
        'xlstm-ray generate -p "The capital of France is" -n 8',
        'xlstm-ray generate -m DIR --state-in book.state --append "Who is the heir?"',
        "xlstm-ray generate -m DIR -f prompts.jsonl --jsonl > answers.jsonl",
    ),
)
@takes()
def generate(
    prompt: PromptOption = None,
    prompt_file: PromptFileOption = None,
    jsonl: JsonlOption = False,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", "-n", help="Stop after this many tokens.", rich_help_panel=SAMPLING)
    ] = 64,
    temperature: Annotated[
        float | None,
        typer.Option(
            "--temperature",
            help=_plain(
                "0 is greedy. [default: the state's, then the model's, else 0; 1 with --top-p, --top-k or --seed]"
            ),
            rich_help_panel=SAMPLING,
        ),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option("--top-p", help="Sample from the likeliest tokens of this mass.", rich_help_panel=SAMPLING),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(
            "--top-k", help=_plain("Sample from so many likeliest tokens. [default: all]"), rich_help_panel=SAMPLING
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", help=_plain("Seed of the sampling. [default: 0]"), rich_help_panel=SAMPLING)
    ] = None,
    state_in: StateInOption = None,
    append: AppendOption = None,
    append_file: AppendFileOption = None,
    state_out: StateOutOption = None,
    json_output: JsonOption = False,
    progress: ProgressOption = "auto",
    *,
    asked: dict[str, Any],
) -> None:
    """Prefill, then stream the text that the model makes of it."""
    _run_under_keeper(asked)
    given, names, a_line_each = _given(prompt, prompt_file, append, append_file, jsonl, state_in or asked["resume"])
    settings = _settings(asked, prompt_file or append_file, state_in, state_out)
    _check_generation(max_new_tokens, temperature, top_p, top_k, seed)
    with _opened(settings, state_in, state_out, asked, progress, _count(given)) as (start, engine, report):
        a_line_each = a_line_each or ("state" in start and start["state"].batch > 1)
        streams = not (json_output or a_line_each)
        printed: set[int] = set()

        def answers(rows: Iterable[int]) -> None:
            """A line for each of these rows that has none yet."""
            new = [b for b in rows if b not in printed]
            for b, answer in zip(new, _answers(engine, generation, new, state_out, None) if new else (), strict=True):
                printed.add(b)
                _json_line({**(names[b] if names else {"index": b}), **answer})

        with _stop_on_signals(report.at_once, lambda: _rescued(engine, state_out, settings)) as stop, report:
            generation = engine.generate(
                **given,
                **start,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_p=top_p,
                top_k=top_k,
                seed=seed,
                last=state_out is None,
                on_progress=report.tile,
                should_stop=stop,
                on_snapshot=_keeping(engine, state_out),
            )
            if streams:
                report.close()  # the text says how far it is
            else:
                report.phase("decoding")
            stop.at = "token"
            with _prompts_state_kept(engine, generation.prefill, state_out):
                for pieces in generation.rows():
                    if streams:
                        _out(pieces[0], end="")
                    if a_line_each:
                        answers(generation.ready)
                if a_line_each:
                    answers(generation.ready)
        result = generation.prefill
        _require_some(result, stop)
        ended = bool(stop.signals)
        needed = ended or not result.complete
        with _prompts_state_kept(engine, result, state_out):
            state = generation.state() if needed or state_out else result.state
        saved = _save(engine, state, state_out, settings, needed=needed)
        engine.close(keep_journal=True)
        if not result.complete:
            raise _interrupted(result, saved, stop)
        state_out, digest = saved.asked, saved.digest
        if streams:
            reasons, stops = generation.finish_reasons, generation.stop_tokens
            _out("")
            summary = _summary(engine, result, state_out, digest)
            made = len(generation.tokens[0])
            _err(
                f"prefill {summary['prompt_tokens'] - summary['resumed_tokens']} tokens"
                f"{_resumed(summary)} in {summary['prefill_s']:.3f} s{_rate(summary['prefill_tok_s'])}; "
                f"decode {made} tokens in {generation.decode_s:.3f} s{_rate(generation.decode_tok_s)}; "
                f"ended by {_ending(reasons[0], stops[0])}; "
                f"load {summary['load_s']:.1f} s; compile {summary['compile_s'] + generation.compile_s:.1f} s; "
                f"whole command {_first_token(summary)}{summary['total_s']:.1f} s in all"
            )
            if state_out:
                _err(f"state {state_out} (digest {digest})")
        elif a_line_each:
            answers(range(result.state.batch))  # those that were stopped
        else:
            _json_line(next(_answers(engine, generation, [0], state_out, digest)))
        if ended:
            engine.discard_journal()
            go_on = saved.go_on(without=(*PROMPT_OPTIONS, "--jsonl"), before="; ")
            raise _stopped(f"stopped after {sum(map(len, generation.tokens))} new tokens; {saved.said}{go_on}", stop)
        _finish(engine, saved)


@app.command(
    rich_help_panel=RUN,
    epilog=_examples(
        "xlstm-ray download NX-AI/xLSTM-7b",
        "xlstm-ray download NX-AI/xLSTM-7b@main --cache-dir DIR",
        "xlstm-ray download NX-AI/xLSTM-7b --offline",
    ),
)
def download(
    name: Annotated[str, typer.Argument(metavar="OWNER/NAME[@REVISION]", help="A repository of the Hugging Face hub.")],
    cache_dir: Annotated[
        Path | None,
        typer.Option("--cache-dir", help=_plain("Where models are kept. [default: the hub's own cache, see HF_HOME]")),
    ] = None,
    offline: Annotated[
        bool, typer.Option("--offline", help="Take what is in the cache, and ask nobody.", show_default=False)
    ] = False,
) -> None:
    """Fetch a model from the Hugging Face hub; the directory to give to --model is printed."""
    repo, at, revision = name.partition("@")
    if at and not revision:
        raise UsageError(f"{name!r} names no revision after the @; give a branch, tag or commit, or leave the @ out")
    with Reporter("none" if sys.stderr.isatty() else "auto") as report, _leave_at_once():  # on a terminal a bar a file
        report.phase(f"downloading {name}")
        from xlstm_ray import hub

        directory = hub.download(repo, revision=revision or None, cache=cache_dir, offline=offline)
    _out(str(directory))
    _err(f"to use it: {_program()} generate --model {shlex.quote(str(directory))} --prompt 'The capital of France is'")


@app.command(rich_help_panel=MACHINE)
@takes("model device dtype chunkwise_backend tile_size chunk_size heads_per_band t_inner profile")
def doctor(
    kernels: Annotated[
        bool, typer.Option("--kernels", help="On mps: the Metal kernels of a model, without running any.")
    ] = False,
    json_output: JsonOption = False,
    *,
    asked: dict[str, Any],
) -> None:
    """Show what this machine has, and with --kernels what a model's kernels take on Apple's GPU."""
    settings = Settings.make(**asked)
    from xlstm_ray.doctor import kernel_report, machine

    facts: dict[str, Any] = {"machine": machine()}
    lines = [f"{name:<22} {value}" for name, value in facts["machine"].items()]
    if kernels:
        facts["kernels"], more = kernel_report(settings)
        lines += ["", *more]
    if json_output:
        _json_line(facts)
    else:
        print("\n".join(lines), flush=True)


def _words() -> list[str]:
    """The command line; `--autoscale again` is a flag with a word of its own, which the parser does not know."""
    words = sys.argv[1:]
    for n in range(len(words) - 1):
        if words[n : n + 2] == ["--autoscale", "again"]:
            return [*words[: n + 1], "--autoscale-again", *words[n + 2 :]]
    return words


def main() -> None:
    """Entry point. The project's own errors become one line and their exit code; anything else is a bug and shows."""
    _open_standard_files()
    try:
        code = app(args=_words() or ["--help"], prog_name="xlstm-ray", standalone_mode=False)
        if code == 130:  # typer's answer to a Ctrl-C that nothing else took
            _err("interrupted")
        sys.exit(code)
    except typer.TyperException as err:  # an unknown option, a word where a number is due
        _err(f"error: {_usage_text(err)}; see xlstm-ray --help")
        sys.exit(2)
    except XlstmRayError as err:
        _err(f"{'' if isinstance(err, Interrupted) else 'error: '}{err}")
        sys.exit(err.exit_code)
    except BrokenPipeError:
        _drop_stdout()  # its reader has gone
        sys.exit(1)


def _usage_text(err: typer.TyperException) -> str:
    """What the parser says, and what it was given."""
    text = err.format_message().replace("Value error, ", "").removesuffix(".")
    cause: Any = err.__cause__
    if hasattr(cause, "errors"):  # pydantic's
        text += f" (given: {str(cause.errors()[0]['input'])[:80]!r})"
    return text


def _open_standard_files() -> None:
    """Where the caller closed standard input, output or error, open nothing in its place, before another file does."""
    while (opened := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(opened)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))
    if sys.stderr.isatty():
        raw = io.BufferedWriter(_Terminal(2, "w", closefd=False))
        sys.stderr = io.TextIOWrapper(raw, sys.stderr.encoding, "backslashreplace", line_buffering=True)


# -- signals -----------------------------------------------------------------------------------------------------------
class _Stop:
    """Whether Ctrl-C, SIGTERM or SIGHUP has come: prefill asks between tiles, decoding between tokens.

    The first says at once what it does. A second Ctrl-C interrupts at once, and so does the first before anything was
    asked: compiling takes long, and there is nothing to keep yet.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.signals: list[int] = []
        self.asked = False
        self.at = "tile"
        self._say = say

    def __call__(self) -> bool:
        self.asked = True
        return bool(self.signals)

    def handle(self, number: int, _frame: object) -> None:
        self.signals.append(number)
        if number == signal.SIGHUP:
            _leave_terminal()
        if not self.asked or (len(self.signals) > 1 and number == signal.SIGINT):
            raise KeyboardInterrupt
        if len(self.signals) == 1:
            self._say(f"stopping after this {self.at}; Ctrl-C again: now")


@contextmanager
def _handling(handler: Any, *numbers: int) -> Iterator[None]:
    """These signals go to the handler for a while; only the main thread may arrange that."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    kept = {n for n in numbers if n == signal.SIGHUP and signal.getsignal(n) is signal.SIG_IGN}  # under nohup
    before = {number: signal.signal(number, handler) for number in numbers if number not in kept}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


class _Terminal(io.FileIO):
    """Standard error on a terminal. After it was closed, what is written goes nowhere: the signal may come later."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data) or 0
        except OSError as err:
            if err.errno != errno.EIO:
                raise
            _leave_terminal()
            return len(data)


def _leave_terminal() -> None:
    """A terminal that is closed cannot be written to: what is said from now on goes nowhere, and work is kept."""
    for handle in (1, 2):
        if stat.S_ISCHR(os.fstat(handle).st_mode):
            os.dup2(os.open(os.devnull, os.O_WRONLY), handle)


@contextmanager
def _stop_on_signals(
    say: Callable[[str], None] = lambda text: None, rescued: Callable[[], str] = str
) -> Iterator[_Stop]:
    """say: from the signal's handler. rescued: keeps what an interrupted run has done, and says where."""
    stop = _Stop(say)
    with _handling(stop.handle, signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        try:
            yield stop
        except KeyboardInterrupt:
            raise _stopped(f"interrupted{rescued() if stop.asked else ''}", stop) from None


@contextmanager
def _leave_at_once() -> Iterator[None]:
    """Ctrl-C ends the process here and now: libraries that are being imported may swallow an exception."""

    def leave(_number: int, _frame: object) -> None:
        os.write(2, b"\x1b[?25hinterrupted\n" if os.isatty(2) else b"interrupted\n")  # a bar hides the cursor
        os._exit(130)

    with _handling(leave, signal.SIGINT):
        yield


# -- input -------------------------------------------------------------------------------------------------------------
def _given(
    prompt: str | None,
    prompt_file: str | None,
    append: str | None,
    append_file: str | None,
    jsonl: bool,
    start: Path | None,
) -> tuple[dict[str, Any], list[dict[str, Any]], bool]:
    """The prompt, or what to append, as arguments of prefill and generate; start: the state to go on from.

    And what names a row in the results (none where rows have no names), and whether each is a line.
    """
    if append is None and append_file is None:
        prompts, names = _prompts(prompt, prompt_file, jsonl, start)
        return {"prompt": prompts}, names, jsonl
    if append is not None and append_file is not None:
        raise UsageError("--append and --append-file were both given; give one")
    if prompt is not None or prompt_file is not None:
        raise UsageError("a prompt and --append were both given; --append is what is new after --state-in: give one")
    if start is None:
        raise UsageError("--append is what is new after a saved state, and none was given; give --state-in FILE")
    if append_file is None and jsonl:
        raise UsageError("--jsonl describes an --append-file, and --append was given")
    if append == "":
        raise UsageError("--append is empty; give at least one token")
    if append == "-":
        append, append_file = None, "-"
    texts, names = (append, []) if append_file is None else _texts(append_file, jsonl)
    return {"append": texts}, names, jsonl


def _ending(reason: str, token: tuple[int, str] | None) -> str:
    """Why an answer ended, for a person."""
    return f"the end token {token[1]!r} ({token[0]})" if token else {"length": "--max-new-tokens"}.get(reason, reason)


def _prompts(
    prompt: str | None, prompt_file: str | None, jsonl: bool, state_in: Path | None
) -> tuple[Any, list[dict[str, Any]]]:
    """The text, or a list of texts with --jsonl, or None where a state is to be taken as it is.

    And what names a row in the results: its `index` from 0, and the `id` that was given.
    """
    if prompt is not None and prompt_file is not None:
        raise UsageError("--prompt and --prompt-file were both given; give one")
    if prompt == "-":
        prompt, prompt_file = None, "-"
    if prompt is None and prompt_file is None and state_in is None and _piped():
        prompt_file = "-"
        _err("note: the prompt is read from standard input")
    if jsonl and prompt_file is None and (prompt is not None or state_in is None):
        raise UsageError("--jsonl describes a --prompt-file, and none was given")
    if prompt_file != "-" and _piped():
        _err("note: standard input has a text that is not read; --prompt-file - makes it the prompt")
    if prompt == "":
        raise UsageError("the prompt is empty; give at least one token")
    if prompt is not None:
        return prompt, []
    if prompt_file is None:
        if state_in is None:
            raise UsageError(
                "there is no prompt; give --prompt TEXT, --prompt-file FILE ('-' for standard input) or --state-in FILE"
            )
        return None, []
    return _texts(prompt_file, jsonl)


def _texts(file: str, jsonl: bool) -> tuple[Any, list[dict[str, Any]]]:
    """The file's text, or those of its lines and their names."""
    source, text = _read_text(file)
    if not jsonl:
        text = text.removesuffix("\n").removesuffix("\r")
        if not text:
            raise UsageError(f"{source}: is empty; give at least one token")
        return text, []
    rows = [
        _jsonl_row(line, f"{source}, line {number}")
        for number, line in enumerate(text.split("\n"), 1)  # not splitlines: JSON may hold U+2028 as it is
        if line.strip()
    ]
    if not rows:
        raise UsageError(f"{source}: is empty; it has no prompts")
    names = [{"index": n, **row} for n, row in enumerate(rows)]
    return [name.pop("prompt") for name in names], names


def _piped() -> bool:
    """Whether a pipe or a file is at standard input, with something in it that can be read now."""
    mode = os.fstat(0).st_mode
    if stat.S_ISREG(mode):
        return os.lseek(0, 0, os.SEEK_CUR) < os.fstat(0).st_size
    if not stat.S_ISFIFO(mode):
        return False
    from fcntl import ioctl
    from termios import FIONREAD

    return int.from_bytes(ioctl(0, FIONREAD, bytes(4)), sys.byteorder) > 0


def _read_text(name: str) -> tuple[str, str]:
    """What errors call the file ('-' is standard input), and its text without a byte order mark."""
    source = "standard input" if name == "-" else name
    try:
        data = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
        return source, data.removeprefix(BOM_UTF8).decode("utf-8")
    except OSError as err:
        raise UsageError(f"{source}: cannot be read ({err.strerror})") from None
    except UnicodeDecodeError as err:
        at = err.start + len(data) - len(err.object)
        line = data.count(b"\n", 0, at) + 1
        why = f"{err.reason} at byte {at}"
        if data.startswith((BOM_UTF16_LE, BOM_UTF16_BE)):
            why = "it begins with the byte order mark of UTF-16; save it as UTF-8"
        raise UsageError(f"{source}, line {line}: is not UTF-8 text ({why})") from None


def _jsonl_row(line: str, place: str) -> dict[str, Any]:
    """A line of JSON: its prompt, and its id where it has one. Raises UsageError that begins with its place."""
    from xlstm_ray.config import parse_json

    try:
        row = parse_json(line.encode())
    except (ValueError, RecursionError) as err:
        raise UsageError(f"{place}: is not JSON ({err})") from None
    row = row if isinstance(row, dict) else {"prompt": row}
    refuse_unknown(row, JSONL_KEYS, f"{place}: ", "key")
    prompt = row.get("prompt")
    if not isinstance(prompt, str):
        raise UsageError(f"{place}: is neither a text nor an object with a 'prompt' text")
    if not isinstance(row.get("id", ""), str | int | float):
        raise UsageError(f"{place}: the id is {str(row['id'])[:80]!r}; allowed: a text or a number")
    if not prompt:
        raise UsageError(f"{place}: the prompt is empty; give at least one token")
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as err:
        raise UsageError(f"{place}: the prompt is not Unicode text ({err.reason} at character {err.start})") from None
    return row


def _settings(
    asked: dict[str, Any], prompt_file: str | None, state_in: Path | None, state_out: Path | None
) -> Settings:
    """The settings, and whether every output has its place: both are found out before torch is loaded."""
    settings = Settings.make(**asked)
    outputs = [Output("--state-out", state_out, files.STATE)] if state_out is not None else []
    inputs = settings.inputs()
    if prompt_file not in (None, "-"):
        inputs.append(Input("--prompt-file", Path(str(prompt_file))))
    if asked["config"] is not None:
        inputs.append(Input("--config", asked["config"]))
    if state_in is not None:
        inputs.append(Input("--state-in", state_in, files.STATE))
    check_outputs([*outputs, *settings.outputs()], inputs, overwrite=settings.overwrite)
    return settings


def _count(given: dict[str, Any]) -> int:
    """Rows of a batch; 0 where there is no prompt."""
    prompts = given.get("prompt") if given.get("prompt") is not None else given.get("append")
    return len(prompts) if isinstance(prompts, list) else int(prompts is not None)


def _check_generation(
    max_new_tokens: int, temperature: float | None, top_p: float | None, top_k: int | None, seed: int | None
) -> None:
    """Find out before a model is read that it cannot be asked this."""
    from xlstm_ray.sampling import Sampling

    Sampling.make(temperature, top_p, seed, top_k)
    if max_new_tokens < 1:
        raise UsageError(f"--max-new-tokens is {max_new_tokens}; allowed: 1 or more")


@contextmanager
def _opened(
    settings: Settings,
    state_in: Path | None,
    state_out: Path | None,
    asked: dict[str, Any],
    progress: ProgressKind,
    rows: int,
) -> "Iterator[tuple[dict[str, Any], Engine, Reporter]]":
    """What to go on from, as keyword arguments of prefill and generate; the model; and who says how far it is.

    What was not asked for is taken from the state, so that grids agree. At the end the model is let go of, actors and
    head too; a head that stays says where it is. rows: how many prompts; 0 where a state is taken as it is.
    """
    from xlstm_ray.choose import choose_model, choose_setup
    from xlstm_ray.config import ModelConfig

    if settings.resume is not None:
        for other, given in (("--state-in", state_in), ("--journal", settings.journal)):
            if given is not None:
                raise UsageError(f"{other} and --resume were both given; a resumed run goes on in its own journal")
        state_in = settings.resume / JOURNAL_FILE
        if not state_in.is_file():
            raise StateError(f"{settings.resume}: has no journal of a run that did not end ({JOURNAL_FILE})")
    if state_in is None:
        config = choose_setup(settings).config
    elif not os.path.exists(state_in):
        raise StateError(f"{state_in}: there is no such state file")
    else:  # what was not asked for is taken from the state
        config = ModelConfig.from_file(choose_model(settings) / "config.json")
    if state_out is not None:
        before = state_in.stat().st_size if state_in else 0  # what is appended to a state of several rows is one text
        size = max(before, config.state_file_bytes(max(1, rows)))
        if keeper.current is not None and settings.journal is None and settings.resume is None:
            size *= 2  # a snapshot is held beside the file while the next one is written
        require_writable(state_out, option="--state-out", size=size)
    with Reporter(progress) as report:
        start: dict[str, Any] = {}
        with _leave_at_once():
            report.phase("loading torch")
            from xlstm_ray.engine import Engine
            from xlstm_ray.state import RecurrentState

            if state_in is not None:
                state = start["state"] = RecurrentState.load(state_in)
                grid = {**state.grid.model_dump(), "chunkwise_backend": _backend_of(state.grid.kernel)}
                del grid["kernel"], grid["mixed"]
                settings = Settings.make(**asked, state=(str(state_in), grid))
        # In this process nothing is lost by leaving at once; a head that is being started must be taken down again.
        leaving: Any = _leave_at_once if settings.ray_local_mode and not settings.ray_address else _stop_on_signals
        with leaving():
            engine = Engine(settings, on_phase=report.phase, on_note=lambda text: _err(f"note: {text}"))
        try:
            if engine.note:
                _err(f"note: {engine.note}")
            if settings.resume is not None:
                start["any_grid"] = True
                if not start["state"].grid.goes_on_as(engine.grid):
                    differences = start["state"].grid.differences(engine.grid)
                    _err(
                        f"note: the journal is of another grid ({differences}): the result will be that of an "
                        "uninterrupted run within rounding, not to the bit"
                    )
            yield start, engine, report
        finally:
            engine.close()
            if engine.stays is not None:
                from xlstm_ray.supervisor import stays_lines

                _err("\n".join(stays_lines(engine.stays)))


def _backend_of(kernel: str) -> str:
    from xlstm_ray.kernels import CHUNKWISE_BACKENDS

    return next(name for name, backend in CHUNKWISE_BACKENDS.items() if backend.kernel == kernel)


def _stopped(text: str, stop: _Stop) -> Interrupted:
    error = Interrupted(text)
    if signal.SIGTERM in stop.signals:
        error.exit_code = 128 + signal.SIGTERM
    elif signal.SIGHUP in stop.signals:
        error.exit_code = 128 + signal.SIGHUP
    return error


class _Saved(NamedTuple):
    """Where a run's state is now."""

    start: tuple[str, ...]  # the options that go on from it; none: it is nowhere
    said: str
    asked: Path | None = None  # the file that was asked for, where it could be written
    digest: str | None = None
    failure: str | None = None  # why it could not

    def go_on(self, *, without: Sequence[str] = (), before: str = "\n") -> str:
        """The command that goes on, on a line of its own."""
        return f"{before}to go on: {_resume_command(list(self.start), without=without)}" if self.start else ""


def _save(
    engine: "Engine", state: "RecurrentState", state_out: Path | None, settings: Settings, *, needed: bool
) -> _Saved:
    """Write the state to where it was asked for. needed: the run ended early, so that it has to be somewhere.

    What has no place of its own is kept in the cache directory; so is what the place that was asked for cannot take.
    """
    failure: str | None = None
    start: tuple[str, ...] = ()
    if state_out is not None:
        try:
            digest = state.save(state_out, overwrite=settings.overwrite)
            return _Saved(("--state-in", str(state_out)), f"state in {state_out}", state_out, digest)
        except StateError as err:
            failure = str(err)
    journal = engine.journal_file
    if needed and not state.complete and journal is not None and not engine.failures:
        said = f"journal in {journal.parent}"
        return _Saved(("--resume", str(journal.parent)), f"{failure}; {said}" if failure else said, failure=failure)
    if not needed and failure is None:
        return _Saved((), "")
    try:
        kept = state.keep()
        start, said = ("--state-in", str(kept)), f"the state ({shown_bytes(kept.stat().st_size)}) is kept in {kept}"
    except StateError as err:
        said = f"its state is lost: {err}; with --state-out FILE it would be kept there"
    failure = None if failure is None else f"{failure}; {said}"
    return _Saved(start, failure or said, failure=failure)


def _rescued(engine: "Engine", state_out: Path | None, settings: Settings) -> str:
    """Keep what a run that is interrupted in the middle of a window had done before it; says where."""
    state = engine.last_state()
    if state is None:
        return ""
    saved = _save(engine, state, state_out, settings, needed=True)
    return f" after {sum(state.tokens)} tokens; {saved.said}{saved.go_on()}"


def _interrupted(result: "PrefillResult", saved: _Saved, stop: _Stop) -> XlstmRayError:
    """Why the run ended early, what is kept, and how to go on."""
    text = f"stopped after {sum(result.state.tokens)} of {result.stats.prompt_tokens} tokens; {saved.said}"
    text += saved.go_on()
    if result.ended_by is not None:
        return type(result.ended_by)(f"{result.ended_by}; {text}")
    return _stopped(text, stop)


def _way_on(engine: "Engine", state_out: Path | None) -> str:
    """Where the state is, and the command that goes on from it."""
    if engine.journal_file is not None:
        text = f"; journal in {engine.journal_file.parent}"
        words = ["--resume", str(engine.journal_file.parent)]
    elif state_out is not None:
        text = f"; state in {state_out}"
        words = ["--state-in", str(state_out)]
    else:
        return "; with --state-out FILE the run could be resumed"
    return f"{text}\nto go on: {_resume_command(words)}"


# -- runs on Ray -------------------------------------------------------------------------------------------------------
def _run_under_keeper(asked: dict[str, Any]) -> None:
    """A run that connects to Ray is a process of its own: Ray may end it at any moment."""
    settings = Settings.make(**asked)
    on_ray = "ray_" in (settings.chunkwise_backend or "ray_") and (
        settings.ray_address is not None or not settings.ray_local_mode
    )
    if on_ray and keeper.current is None:
        sys.exit(keeper.start())


def _keeping(engine: "Engine", state_out: Path | None) -> "Callable[[RecurrentState], None] | None":
    """What a run on Ray does with each snapshot, so that it outlives this process; a journal does so by itself."""
    run = keeper.current
    if run is None:
        return None
    place = state_out if engine.journal_file is None else None
    missing = False

    def keep(state: "RecurrentState") -> None:
        nonlocal missing
        if place is not None:
            try:
                state.save(run.hold(place))
            except StateError as err:  # the one before stays, and what was said of it
                if not missing:
                    _err(f"note: a snapshot is missing: {err}; the run goes on without it")
                missing = True
                return
            missing = False
        run.kept(f"stopped after {sum(state.tokens)} tokens{_way_on(engine, state_out)}", place)

    return keep


@contextmanager
def _prompts_state_kept(engine: "Engine", result: "PrefillResult", state_out: Path | None) -> Iterator[None]:
    """A grid that is lost after the prompt leaves the prompt's state."""
    if result.complete and (keep := _keeping(engine, state_out)):
        keep(result.state)
    try:
        yield
    except GridLost as lost:
        way_on = _way_on(engine, state_out)
        if state_out is not None:
            saved = _save(engine, result.state, state_out, engine.settings, needed=True)
            way_on = f"; {saved.said}{saved.go_on()}"
        raise GridLost(f"{lost}; the state is the prompt's, without an answer{way_on}") from None


def _finish(engine: "Engine", saved: _Saved) -> None:
    """After the results are out. Raises OutputError where a file that was asked for is not there or not whole."""
    failures = [*([saved.failure] if saved.failure else []), *engine.failures]
    engine.discard_journal()
    if failures:
        raise OutputError("; ".join(failures))


def _resume_command(start: list[str], without: Sequence[str] = ()) -> str:
    """This very command with its environment, but going on from there, and without these options."""
    replaced = "--state-in", "--resume", "--journal", *without
    words, skip = [], False
    for word in sys.argv[1:]:
        if skip or word.startswith(tuple(f"{r}=" for r in replaced)) or word in replaced:
            skip = word in replaced and word != "--jsonl" and not skip
            continue
        words.append(word)
    variables = "".join(f"{name}={shlex.quote(value)} " for name, value in given_variables().items())
    words = [*words[:1], *start, *words[1:]] if without else [*words, *start]
    return f"{variables}{_program()} {shlex.join(words)}"


def _program() -> str:
    """What starts this program in a shell: without its directory, where that is found."""
    if Path(sys.argv[0]).name == "__main__.py":
        return shlex.join([sys.executable, "-m", "xlstm_ray"])
    found = shutil.which("xlstm-ray")
    same = found is not None and os.path.realpath(found) == os.path.realpath(sys.argv[0])
    return "xlstm-ray" if same else shlex.quote(sys.argv[0])


def _require_some(result: "PrefillResult", stop: _Stop) -> None:
    if sum(result.state.tokens) == 0:
        if result.ended_by is not None:
            raise result.ended_by
        raise _stopped("stopped before the first tile; there is nothing to save", stop)


# -- output ------------------------------------------------------------------------------------------------------------
def _err(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _out(text: str, *, end: str = "\n") -> None:
    """Write to standard output at once, with escapes for what its encoding lacks."""
    encoding = sys.stdout.encoding or "utf-8"
    try:
        sys.stdout.write((text + end).encode(encoding, "backslashreplace").decode(encoding))
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as err:
        _drop_stdout()
        raise UsageError(f"standard output cannot be written ({err.strerror})") from None


def _drop_stdout() -> None:
    """Point standard output elsewhere, so that the interpreter's last flush is quiet."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _json_line(row: dict[str, Any]) -> None:
    _out(json.dumps(row))


def _rate(tokens_per_s: float | None) -> str:
    return f" ({tokens_per_s:,.0f} tokens/s)" if tokens_per_s else ""


def _resumed(summary: dict[str, Any]) -> str:
    return f" (and {summary['resumed_tokens']} from the state)" if summary["resumed_tokens"] else ""


def _summary(engine: "Engine", result: "PrefillResult", state_out: Path | None, digest: str | None) -> dict[str, Any]:
    """What --json prints. digest: the state's, where it is known."""
    stats, state = result.stats, result.state
    return {
        "model": str(engine.model_path),
        "device": str(engine.device),
        "dtype": engine.grid.dtype,
        "dtype_reason": engine.dtype_reason,
        "backend": engine.backend.name,
        "prompt_tokens": stats.prompt_tokens,
        "resumed_tokens": stats.resumed_tokens,
        "tile_size": engine.grid.tile_size,
        "chunk_size": engine.grid.chunk_size,
        "t_inner": engine.t_inner if engine.backend.kernel == "compiled_steps" else None,
        "mixed_grid": state.grid.mixed,
        "bands": engine.bands,
        "stages": engine.stages,
        "workers": engine.workers,
        "load_s": engine.load_s,
        "compile_s": stats.compile_s,
        "total_s": _since_start(time.time()),
        "tiles": stats.tiles,
        "tail_windows": stats.tail_windows,
        "launches": stats.launches,
        "ttft_s": stats.ttft_s,
        "ttft_command_s": None if stats.first_token_at is None else _since_start(stats.first_token_at),
        "prefill_s": stats.prefill_s,
        "prefill_tok_s": stats.prefill_tok_s,
        "tile_tok_s_median": stats.tile_tok_s_median,
        "tile_tok_s_p99": stats.tile_tok_s_p99,
        "peak_memory_bytes": stats.peak_memory_bytes,
        "peak_process_bytes": stats.peak_process_bytes,
        "peak_device_bytes": stats.peak_device_bytes,
        "restarts": stats.restarts,
        "state_path": None if state_out is None else str(state_out),
        "state_digest": digest or state.digest(),
        "next_tokens": [token._asdict() for token in engine.next_tokens(result.logits[0])],
    }


def _answers(
    engine: "Engine", generation: "Generation", rows: Iterable[int], state_out: Path | None, digest: str | None
) -> Iterator[dict[str, Any]]:
    """What --json prints of these rows' answers; digest as for `_summary`."""
    result, texts, tokens = generation.prefill, generation.texts, generation.tokens
    reasons, stops = generation.finish_reasons, generation.stop_tokens
    for b in rows:
        row = _summary(engine, result.row(b) if result.state.batch > 1 else result, state_out, digest)
        row["compile_s"] += generation.compile_s
        yield {
            **row,
            "text": texts[b],
            "new_tokens": len(tokens[b]),
            "finish_reason": reasons[b],
            "stop_token": None if (token := stops[b]) is None else {"id": token[0], "text": token[1]},
            **generation.speed(b),
        }


def _print_results(
    engine: "Engine",
    result: "PrefillResult",
    state_out: Path | None,
    digest: str | None,
    *,
    json_output: bool,
) -> None:
    summary, stats = _summary(engine, result, state_out, digest), result.stats
    if json_output:
        _json_line(summary)
        return
    s = summary
    lines = [
        f"device          {s['device']} ({': '.join(filter(None, (s['dtype'], s['dtype_reason'])))})",
        f"backend         {s['backend']}, tiles of {s['tile_size']}, chunks of {s['chunk_size']}, "
        f"{s['stages']} stage(s) x {s['bands']} band(s)",
        f"prompt tokens   {s['prompt_tokens']}{_resumed(s).replace('and ', '')}",
        f"first token in  {s['ttft_s']:.3f} s{_rate(s['prefill_tok_s'])}",
        f"whole command   {_first_token(s)}{s['total_s']:.1f} s in all",
        f"load time       {s['load_s']:.1f} s",
        f"compile time    {s['compile_s']:.1f} s",
        *_tile_line(stats),
        f"peak memory     {s['peak_memory_bytes'] / 2**20:,.0f} MiB",
        f"state           {s['state_path'] or 'not written'} (digest {s['state_digest'][:16]}...)",
        "next tokens",
        *(f"  {math.exp(t['logprob']):6.1%}  {t['text']!r} ({t['id']})" for t in s["next_tokens"]),
    ]
    _out("\n".join(lines))


def _since_start(moment: float) -> float:
    """Seconds from this process's start to that time of the clock."""
    return moment - psutil.Process().create_time()


def _first_token(summary: dict[str, Any]) -> str:
    seconds = summary["ttft_command_s"]
    return "" if seconds is None else f"{seconds:.1f} s to the first token, "


def _tile_line(stats: "Statistics") -> list[str]:
    """Of more than one tile, how fast each was; and the launches where they are known."""
    if stats.tiles < 2 or stats.tile_tok_s_median is None:
        return []
    tail = f", {stats.tail_windows} of them the tail's" if stats.tail_windows else ""
    line = f"tiles           {stats.tiles}{tail}: median {stats.tile_tok_s_median:,.0f} tokens/s"
    line += f", 99 % reach {stats.tile_tok_s_p99:,.0f}"
    return [line + (f"; {stats.launches:,} launches" if stats.launches is not None else "")]


# -- settings ----------------------------------------------------------------------------------------------------------
@app.command(rich_help_panel=MACHINE, epilog=_examples("xlstm-ray config -m DIR --config settings.toml"))
@takes()
def config(json_output: JsonOption = False, *, asked: dict[str, Any]) -> None:
    """Show every setting, its value and where it came from."""
    settings = Settings.make(**asked)
    from xlstm_ray.choose import choose_setup, explain

    choose_setup(settings)
    with _leave_at_once():
        import torch  # noqa: F401
    rows = {}
    for name, (value, source) in explain(settings).items():
        row = table()[name]
        plain = str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value
        rows[name] = {"value": plain, "source": source.kind, "where": source.where, "flag": row.flags, "env": row.env}
    if json_output:
        _json_line(rows)
        return
    for name, found in rows.items():
        value = found["value"]
        text = ",".join(value) if isinstance(value, list) else "-" if value is None else str(value)
        _out(f"{name:<20} {text:<24} {found['source']} {found['where']}".rstrip())


# -- Ray ---------------------------------------------------------------------------------------------------------------
@app.command(rich_help_panel=RAY)
@takes("ray_dashboard ray_dashboard_port ray_state_dir ray_temp_dir")
def up(
    ray_port: Annotated[
        int | None, typer.Option("--ray-port", help=_plain("The port of the head's address. [default: a free one]"))
    ] = None,
    ray_metrics_port: Annotated[
        int | None,
        typer.Option("--ray-metrics-port", help=_plain("The port that Prometheus reads. [default: a free one]")),
    ] = None,
    *,
    asked: dict[str, Any],
) -> None:
    """Start a Ray head that stays."""
    settings = Settings.make(**asked)
    from xlstm_ray import supervisor

    port = settings.ray_dashboard_port
    supervisor.choose_mode(local_mode=False, dashboard=settings.ray_dashboard, dashboard_port=port)
    head = supervisor.up(
        supervisor.HeadOptions(
            state_dir=settings.ray_state_dir or supervisor.default_state_dir(),
            temp_dir=settings.ray_temp_dir,
            stays=True,
            dashboard=settings.ray_dashboard,
            dashboard_port=port,
            port=ray_port,
            metrics_port=ray_metrics_port,
        )
    )
    _out("\n".join(supervisor.stays_lines(head)))


@app.command(rich_help_panel=RAY)
@takes("ray_state_dir")
def status(json_output: JsonOption = False, *, asked: dict[str, Any]) -> None:
    """Show the Ray heads of this project with their actors and memory, and Ray sessions that are not ours."""
    settings = Settings.make(**asked)
    from xlstm_ray import supervisor

    report = supervisor.status(settings.ray_state_dir or supervisor.default_state_dir())
    if json_output:
        _json_line(report.to_json())
    else:
        _out("\n".join(report.lines()))


@app.command(rich_help_panel=RAY)
@takes("ray_state_dir")
def down(
    head: Annotated[
        str | None,
        typer.Argument(help=_plain("Stop this head only, also when its run is alive. [default: all without a run]")),
    ] = None,
    *,
    asked: dict[str, Any],
) -> None:
    """Stop the Ray heads of this project, and nothing else."""
    settings = Settings.make(**asked)
    from xlstm_ray import supervisor

    state_dir = settings.ray_state_dir or supervisor.default_state_dir()
    stopped = supervisor.down(state_dir, head)
    for gone in stopped:
        _out(f"stopped head {gone.id}")
    left = supervisor.status(state_dir).heads if head is None else []
    if not stopped and not left:
        _out("there is no Ray head of this project to stop")
    for item in left:
        if item.state != "elsewhere":
            _err(
                f"left head {item.head.id}: its run (pid {item.head.driver.pid}) is alive; end that run, or stop the "
                f"head under it with xlstm-ray down {item.head.id}"
            )


@app.command(rich_help_panel=MACHINE, epilog=_examples("xlstm-ray parity mlstm --device cpu"))
@takes("model device")
def parity(
    part: Annotated[str | None, typer.Argument(help=_plain("mlstm, slstm or model. [default: all three]"))] = None,
    json_output: JsonOption = False,
    *,
    asked: dict[str, Any],
) -> None:
    """Compare every kernel and backend with the reference; exit code 1 where one is over its tolerance."""
    settings = Settings.make(**asked)
    if part in ("mlstm", "slstm") and asked["model"]:
        raise UsageError(f"--model is of parity's part 'model', and {part!r} compares kernels alone; leave it out")
    from xlstm_ray.parity import HEADER, compare

    rows: list[Any] = []
    for row in compare(part, settings):
        if not rows and not json_output:
            _out(HEADER)
        rows.append(row)
        if not json_output:
            _out(row.line)
    if json_output:
        _json_line({"rows": [{**row._asdict(), "good": row.good} for row in rows]})
    over = [f"{row.part} {row.name} {row.dtype}" for row in rows if not row.good]
    if over:
        raise ParityError(f"{len(over)} of {len(rows)} are over their tolerance: {', '.join(over)}")


@app.command(
    rich_help_panel=MACHINE,
    epilog=_examples("xlstm-ray bench --lengths 512,2048,8192", "xlstm-ray bench -m DIR --rounds 7 --json"),
)
@takes("model device dtype tile_size chunk_size heads_per_band workers threads overwrite")
def bench(
    lengths: Annotated[
        str, typer.Option("--lengths", help="Prompt lengths in tokens, with commas between.")
    ] = "512,2048,8192",
    backends: Annotated[
        str, typer.Option("--backends", help="Backends, with commas between; native is slow.")
    ] = "queued_compiled_chunks,queued_compiled_steps",
    rounds: Annotated[int, typer.Option("--rounds", help="Runs of each pair, of which the median counts.")] = 3,
    png: Annotated[
        Path | None, typer.Option("--png", help="Draw speed and memory to this file; needs matplotlib.")
    ] = None,
    json_output: JsonOption = False,
    *,
    asked: dict[str, Any],
) -> None:
    """Measure prefill on this machine: tokens/s and memory of prompt lengths x backends."""
    settings = Settings.make(**asked)
    from xlstm_ray.bench import HEADER, draw, measure, parse

    rows: list[Any] = []
    with _stop_on_signals():
        for row in measure(*parse(lengths, backends, rounds, png, overwrite=settings.overwrite), rounds, asked):
            if not rows and not json_output:
                _out(HEADER)
            rows.append(row)
            if not json_output:
                _out(row.line)
    if png is not None:
        draw(rows, png, overwrite=settings.overwrite)
    if json_output:
        _json_line({"rows": [row.to_json() for row in rows], "png": None if png is None else str(png)})


@app.command(
    rich_help_panel=MACHINE,
    epilog=_examples(
        "xlstm-ray plan -m DIR --device m2-ultra --prompt-tokens 65536",
        "xlstm-ray plan -m DIR --device this --prompt-tokens 4096 --check",
    ),
)
@takes("model dtype tile_size chunk_size heads_per_band")
def plan(
    device: Annotated[str, typer.Option("--device", help="m1 to m4-max, h100, h200, or this: this machine's CPU.")],
    prompt_tokens: Annotated[int, typer.Option("--prompt-tokens", help="The prompt's length.")],
    machines: Annotated[int, typer.Option("--machines", help="So many of the device, a stage of the blocks each.")] = 1,
    check: Annotated[
        bool, typer.Option("--check", help="With --device this: run it too; exit code 1 beyond a factor of 1.5.")
    ] = False,
    json_output: JsonOption = False,
    *,
    asked: dict[str, Any],
) -> None:
    """Estimate a prefill's memory and time on a device; of the model, config.json is enough."""
    settings = Settings.make(**asked)
    if check and (device != "this" or machines != 1):
        raise UsageError("--check runs on this machine: give --device this, and no --machines")
    from xlstm_ray import estimate

    found = estimate.plan(settings, device, prompt_tokens, machines)
    if json_output:
        _json_line(found.to_json())
    else:
        _out("\n".join(found.lines))
    if check:
        with _stop_on_signals():
            line = estimate.check(found)
        (_err if json_output else _out)(line)
