"""The command `score`: how likely texts are."""

from collections.abc import Callable, Sequence
from functools import reduce
from operator import add
from typing import TYPE_CHECKING, Annotated, Any

import typer

from xlstm_ray.cli.input import readable, source_of, text_file
from xlstm_ray.cli.keep import Saved, finish, keeping, require_some, save_state, snapshot_kept
from xlstm_ray.cli.options import PROMPT, RUN, JsonOption, ProgressOption, StateInOption, examples, takes
from xlstm_ray.cli.output import json_line, show
from xlstm_ray.cli.session import open_engine, require_places, run_under_keeper
from xlstm_ray.cli.signals import Stop, stop_on_signals, stopped_by
from xlstm_ray.errors import UsageError, XlstmRayError
from xlstm_ray.settings import Settings

if TYPE_CHECKING:
    from xlstm_ray.engine.score import Score
    from xlstm_ray.state import RecurrentState

commands = typer.Typer()

# All of a text is read, whatever a cache has of it.
WITHOUT = "cache_dir cache_memory_mb cache_disk_mb cache_every cache_match"
COLUMNS = {  # and their widths
    "tokens": 12,
    "words": 12,
    "bytes": 14,
    "log-likelihood": 18,
    "ppl/token": 10,
    "ppl/word": 10,
    "bits/byte": 9,
}


@commands.command(
    rich_help_panel=RUN,
    epilog=examples(
        "xlstm-ray score -m DIR --file book.txt",
        "xlstm-ray score -m DIR -f a.txt -f b.txt --json",
        "cat book.txt | xlstm-ray score -m DIR -f -",
    ),
)
@takes(without=WITHOUT)
def score(
    file: Annotated[
        list[str] | None,
        typer.Option(
            "--file",
            "-f",
            help="A UTF-8 text, '-' for standard input. Repeat it for more texts.",
            rich_help_panel=PROMPT,
        ),
    ] = None,
    state_in: StateInOption = None,
    json_output: JsonOption = False,
    progress: ProgressOption = "auto",
    *,
    asked: dict[str, Any],
) -> None:
    """Log-likelihood, perplexity and bits per byte of texts."""
    settings = Settings.make(**asked)
    files = file or []
    if not files:
        raise UsageError("there is no text; give --file FILE ('-' for standard input)")
    if "" in files:
        raise UsageError("--file was given as ''; a path is not empty")
    for option, given in (("--journal", settings.journal), ("--resume", settings.resume)):
        if given is not None and len(files) > 1:
            raise UsageError(f"{option} is of one text, and {len(files)} were given; give each a command of its own")
    if files.count("-") > 1:
        raise UsageError("--file - was given twice, and standard input is one text")
    run_under_keeper(settings)
    for name in files:
        require_places(settings, asked["config"], name, state_in, None)
        if name != "-":
            readable(name).close()
    done: dict[str, Score] = {}
    with open_engine(settings, state_in, None, asked, progress, 1) as (start, engine, report), report, snapshot_kept():
        state = start.pop("state", None)
        for n, name in enumerate(files):
            # A run that was stopped goes on with its own text, the first one; any other state comes before each text.
            before = state if n == 0 or (state is not None and state.complete) else None

            def kept(reached: "RecurrentState", left: Sequence[str] = files[n:]) -> str:
                """Keep the state, and say how to go on."""
                saved = save_state(engine, reached, None, settings, needed=True)
                words = [word for one in left for word in ("--file", one)]
                again = saved._replace(start=(*words, *saved.start)) if saved.start else saved
                return f"{saved.said}{again.go_on(without=('--file', '-f'))}"

            def rescued(kept: "Callable[[RecurrentState], str]" = kept) -> str:
                last = engine.last_state()
                return "" if last is None else f" after {sum(last.tokens)} tokens; {kept(last)}"

            with stop_on_signals(report.at_once, rescued) as stop:
                text = text_file(name)
                if not len(text):
                    raise UsageError(f"{source_of(name)}: is empty; a score needs at least one token")
                found = engine.score(
                    text,
                    state=before,
                    on_progress=report.tile,
                    should_stop=stop,
                    on_snapshot=keeping(engine, None),
                    **start,
                )
            if not found.complete:
                report.close()
                _print(done, json_output=json_output)
                raise _stopped(found, stop, kept)
            done[name] = found
        report.close()
        _print(done, json_output=json_output)
        finish(engine, Saved((), ""))


def _stopped(found: "Score", stop: Stop, kept: "Callable[[RecurrentState], str]") -> XlstmRayError:
    """What ended a run early, with what is kept."""
    result = found.result
    assert result is not None
    require_some(result, stop)
    text = f"stopped after {sum(result.state.tokens)} of {result.stats.prompt_tokens} tokens; {kept(result.state)}"
    if result.ended_by is not None:
        return type(result.ended_by)(f"{result.ended_by}; {text}")
    return stopped_by(text, stop)


def _print(done: "dict[str, Score]", *, json_output: bool) -> None:
    """A line of JSON for each text; or a table, with all of them together if there are several."""
    if json_output:
        for name, found in done.items():
            result = found.result
            assert result is not None
            json_line(
                {
                    "file": name,
                    **found.to_json(),
                    "resumed_tokens": result.stats.resumed_tokens,
                    "prefill_s": result.stats.prefill_s,
                    "prefill_tok_s": result.stats.prefill_tok_s,
                    "peak_process_bytes": result.stats.peak_process_bytes,
                }
            )
        return
    if not done:
        return
    rows = [*done.items()]
    if len(rows) > 1:
        rows.append(("all", reduce(add, done.values())))
    width = max(4, *(len(name) for name, _ in rows))
    show(f"{'text':<{width}}  " + "  ".join(f"{title:>{wide}}" for title, wide in COLUMNS.items()))
    for name, found in rows:
        values = (
            f"{found.tokens:,}",
            f"{found.words:,}",
            f"{found.bytes:,}",
            f"{found.logprob:,.3f}",
            *(
                "-" if value is None else f"{value:,.4g}"
                for value in map(found.perplexity, (found.tokens, found.words))
            ),
            f"{found.bits_per_byte:.4f}",
        )
        cells = zip(values, COLUMNS.values(), strict=True)
        show(f"{name:<{width}}  " + "  ".join(f"{value:>{wide}}" for value, wide in cells))
