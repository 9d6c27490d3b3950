"""The commands that measure speed: bench, in this process' children, and bench serve, of a service that runs."""

import secrets
from typing import Annotated, Any

import typer

from xlstm_ray.cli.documents import DEFAULT_URL, KeyOption, UrlOption, connected
from xlstm_ray.cli.models import fetch_weights
from xlstm_ray.cli.options import GivenPath, JsonOption, bare, examples, path_option, takes
from xlstm_ray.cli.output import json_line, note, show
from xlstm_ray.cli.signals import stop_on_signals
from xlstm_ray.errors import UsageError
from xlstm_ray.files import PICTURE, Output, check_outputs
from xlstm_ray.settings import Settings

commands = typer.Typer(invoke_without_command=True)

MOST = 1 << 24  # tokens


@commands.callback(
    epilog=examples(
        "xlstm-ray bench --lengths 512,2048,8192",
        "xlstm-ray bench -m DIR --rounds 7 --json",
        "xlstm-ray bench serve --url http://127.0.0.1:8000",
    )
)
@takes("model device dtype tile_size chunk_size heads_per_band workers threads overwrite")
def bench(
    context: typer.Context,
    lengths: Annotated[
        str, typer.Option("--lengths", help="Prompt lengths in tokens, with commas between.")
    ] = "512,2048,8192",
    backends: Annotated[
        str, typer.Option("--backends", help="Backends, with commas between; auto: the one that a run takes.")
    ] = "auto",
    rounds: Annotated[int, typer.Option("--rounds", help="Runs of each pair; the median counts.")] = 3,
    png: Annotated[
        GivenPath | None, path_option("--png", help="Draw speed and memory to this file; needs matplotlib.")
    ] = None,
    json_output: JsonOption = False,
    *,
    asked: dict[str, Any],
) -> None:
    """Measure prefill on this machine: tokens/s and memory of prompt lengths x backends."""
    if context.invoked_subcommand is not None:
        _require_no_options(context)
        return
    settings = Settings.make(**asked)
    settings.require_output(png)
    from xlstm_ray.measure.bench import HEADER, draw, measure, parse

    rows: list[Any] = []
    fetch_weights(settings)
    with stop_on_signals():
        for row in measure(*parse(lengths, backends, rounds, png, overwrite=settings.overwrite), rounds, asked, note):
            if not rows and not json_output:
                show(HEADER)
            rows.append(row)
            if not json_output:
                show(row.line)
    if png is not None:
        draw(rows, png, overwrite=settings.overwrite)
    if json_output:
        json_line({"rows": [row.to_json() for row in rows], "png": None if png is None else str(png)})


@commands.command(
    epilog=examples(
        "xlstm-ray bench serve --png service.png",
        "xlstm-ray bench serve --url http://10.0.0.5:8080 --model NAME --workloads document,mixed",
    )
)
def serve(
    url: UrlOption = DEFAULT_URL,
    model: Annotated[
        str | None, typer.Option("--model", help=bare("Its name there. [default: the first of its list]"))
    ] = None,
    api_key_file: KeyOption = None,
    workloads: Annotated[
        str, typer.Option("--workloads", help="What callers do, with commas between.")
    ] = "prefix,document,chat,edited,unique,mixed",
    prompt_tokens: Annotated[int, typer.Option("--prompt-tokens", help="Of a long prompt.", min=64, max=MOST)] = 4096,
    document_tokens: Annotated[int, typer.Option("--document-tokens", help="Of a document.", min=64, max=MOST)] = 65536,
    answer_tokens: Annotated[int, typer.Option("--answer-tokens", help="Of an answer.", min=1, max=4096)] = 64,
    questions: Annotated[int, typer.Option("--questions", help="To a document.", min=1, max=1000)] = 8,
    streams: Annotated[int, typer.Option("--streams", help="Answers at once.", min=1, max=1000)] = 15,
    rounds: Annotated[int, typer.Option("--rounds", help="Repeats of prompts.", min=1, max=1000)] = 3,
    seed: Annotated[
        int | None, typer.Option("--seed", help=bare("Of the texts. [default: new texts each time]"))
    ] = None,
    png: Annotated[GivenPath | None, path_option("--png", help="Draw times to this file; needs matplotlib.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file of others.")] = False,
    json_output: JsonOption = False,
) -> None:
    """Measure a service, of whoever made it, by OpenAI's API: times to the first token and between tokens."""
    from xlstm_ray.measure.picture import pyplot
    from xlstm_ray.measure.workloads import HEADER, Callers, Sizes, chosen, draw

    names = chosen(workloads)
    if png is not None:
        check_outputs([Output("`png`", png, PICTURE)], [], overwrite=overwrite)
        pyplot()
    seed = secrets.randbits(32) if seed is None else seed
    sizes = Sizes(prompt_tokens, document_tokens, answer_tokens, questions, streams, rounds)
    callers = Callers(connected(url, api_key_file), model, sizes, seed)
    about = f"{callers.endpoint.model} at {callers.endpoint.service.url}"
    rows = []
    if not json_output:
        show(f"{about}\n{HEADER}")
    for name in names:
        for row in callers.run(name):
            rows.append(row)
            if not json_output:
                show(row.line)
    if png is not None:
        draw(rows, about, png, overwrite=overwrite)
    if json_output:
        found = {"url": url, "model": callers.endpoint.model, "seed": seed, "documents": callers.endpoint.documents}
        json_line({**found, "rows": [row.to_json() for row in rows], "png": None if png is None else str(png)})


def _require_no_options(context: typer.Context) -> None:
    """Raise UsageError if an option of `bench` itself was given before another command's name."""
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        if source is not None and source.name == "COMMANDLINE":
            word = context.invoked_subcommand
            raise UsageError(f"{parameter.opts[0]} has no effect before {word!r}; give what {word!r} takes after it")
