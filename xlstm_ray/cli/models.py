"""The commands that look after models: download, models, quantize."""

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import typer

from xlstm_ray import hub
from xlstm_ray.cli.keep import program
from xlstm_ray.cli.options import RUN, GivenPath, JsonOption, ProgressOption, bare, examples, given_path, path_option
from xlstm_ray.cli.output import json_line, show, tell
from xlstm_ray.cli.reporter import ProgressKind, Reporter
from xlstm_ray.cli.signals import leave_at_once, stop_on_signals, stopped_by
from xlstm_ray.config import ModelConfig, Quantization
from xlstm_ray.errors import ConfigError
from xlstm_ray.files import shown_bytes
from xlstm_ray.settings import Settings

commands = typer.Typer()

HubCacheOption = Annotated[
    GivenPath | None,
    path_option("--hub-cache", help=bare("The directory of models. [default: the hub's own cache, see HF_HOME]")),
]


@contextmanager
def _downloading(name: object, progress: ProgressKind = "auto") -> Iterator[bool]:
    """Reports that it goes on; yields whether the hub is to draw bars, as it does on a terminal."""
    bars = sys.stderr.isatty() and progress in ("auto", "bar")
    with Reporter("none" if bars else progress) as report, leave_at_once():
        report.phase(f"downloading {name}")
        yield bars


def fetch_weights(settings: Settings, progress: ProgressKind = "auto") -> None:
    """Download the weights of a model that is given by its name on the hub."""
    from xlstm_ray.choose import require_weights

    with _downloading(settings.model, progress) as bars:
        require_weights(settings, bars=bars)


@commands.command(
    rich_help_panel=RUN,
    epilog=examples(
        "xlstm-ray download NX-AI/xLSTM-7b",
        "xlstm-ray download NX-AI/xLSTM-7b@main --hub-cache DIR",
        "xlstm-ray download NX-AI/xLSTM-7b --offline",
    ),
)
def download(
    name: Annotated[str, typer.Argument(metavar="OWNER/NAME[@REVISION]", help="A repository of the Hugging Face hub.")],
    hub_cache: HubCacheOption = None,
    offline: Annotated[
        bool, typer.Option("--offline", help="Use only what is in the cache.", show_default=False)
    ] = False,
) -> None:
    """Download a model from the Hugging Face hub, and print its directory."""
    repo, revision = hub.split(name)
    with _downloading(name) as bars:
        directory = hub.download(repo, revision=revision, cache=hub_cache, offline=offline, bars=bars)
    show(str(directory))
    model = name if hub_cache is None else str(directory)
    tell(f"to use it: {program()} generate --model {shlex.quote(model)} --prompt 'The capital of France is'")


@commands.command(
    rich_help_panel=RUN,
    epilog=examples(
        "xlstm-ray quantize NX-AI/xLSTM-7b xlstm-7b-4bit --bits 4 --group-size 32",
        "xlstm-ray quantize DIR OUT --bits 8 --head --embedding",
    ),
)
def quantize(
    model: Annotated[
        Path, typer.Argument(parser=given_path, metavar="MODEL", help="A model directory, or owner/name of the hub.")
    ],
    out: Annotated[Path, typer.Argument(parser=given_path, metavar="OUT", help="The new directory.")],
    bits: Annotated[Literal["8", "4"], typer.Option("--bits", help="Bits of a weight.", show_default=False)],
    group_size: Annotated[
        Literal["32", "64", "128"], typer.Option("--group-size", help="Columns of a matrix that share a scale.")
    ] = "32",
    embedding: Annotated[
        bool, typer.Option("--embedding/--no-embedding", help=bare("The embedding, too. [default: off]"))
    ] = False,
    head: Annotated[bool, typer.Option("--head/--no-head", help=bare("The head, too. [default: off]"))] = False,
    progress: ProgressOption = "auto",
) -> None:
    """Write a copy of a model with weights of 8 or 4 bits. Run again after an interruption, it goes on."""
    directory = hub.directory_of(model)
    with _downloading(model, progress) as bars:
        hub.require_weights(model, bars=bars)
    with Reporter(progress) as report:
        with leave_at_once():
            report.phase("loading torch")
            from xlstm_ray.quantize import quantize_model
        asked = Quantization.model_validate(
            {"bits": int(bits), "group_size": int(group_size), "embedding": embedding, "head": head}
        )
        with stop_on_signals() as stop:
            try:
                for done, total in quantize_model(directory, out, asked):
                    report.parts(done, total)
            except KeyboardInterrupt:
                raise stopped_by("interrupted; run it again for the rest", stop) from None
    show(str(out))


@commands.command(rich_help_panel=RUN, epilog=examples("xlstm-ray models"))
def models(hub_cache: HubCacheOption = None, json_output: JsonOption = False) -> None:
    """List the hub's models that are on this machine, by the names that --model takes."""
    rows = [
        {
            "name": model.name,
            "revision": model.commit,
            "bytes": model.bytes,
            "whole": hub.is_whole(model, hub_cache),
            "xlstm": _runs(model.directory),
            "directory": str(model.directory),
        }
        for model in hub.cached(hub_cache)
    ]
    if json_output:
        json_line({"models": rows})
        return
    width = max([4, *(len(str(row["name"])) for row in rows)])
    show(f"{'name':<{width}}  {'revision':<12}  {'size':>10}  model")
    for row in rows:
        broken = "" if row["whole"] else ", not whole: download it again"
        kind = "xLSTM" if row["xlstm"] else "does not run here"
        size = shown_bytes(int(str(row["bytes"])))
        show(f"{row['name']:<{width}}  {str(row['revision'])[:12]:<12}  {size:>10}  {kind}{broken}")


def _runs(directory: Path) -> bool:
    """Whether config.json is of an xLSTM that runs here."""
    try:
        ModelConfig.from_file(directory / "config.json")
    except ConfigError:
        return False
    return True
