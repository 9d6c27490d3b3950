"""The commands that look after models: download, models."""

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from xlstm_ray import hub
from xlstm_ray.cli.keep import program
from xlstm_ray.cli.options import RUN, JsonOption, bare, examples
from xlstm_ray.cli.output import json_line, show, tell
from xlstm_ray.cli.reporter import ProgressKind, Reporter
from xlstm_ray.cli.signals import leave_at_once
from xlstm_ray.config import ModelConfig
from xlstm_ray.errors import ConfigError
from xlstm_ray.files import shown_bytes
from xlstm_ray.settings import Settings

commands = typer.Typer()

CacheDirOption = Annotated[
    Path | None,
    typer.Option("--cache-dir", help=bare("The directory of models. [default: the hub's own cache, see HF_HOME]")),
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
        "xlstm-ray download NX-AI/xLSTM-7b@main --cache-dir DIR",
        "xlstm-ray download NX-AI/xLSTM-7b --offline",
    ),
)
def download(
    name: Annotated[str, typer.Argument(metavar="OWNER/NAME[@REVISION]", help="A repository of the Hugging Face hub.")],
    cache_dir: CacheDirOption = None,
    offline: Annotated[
        bool, typer.Option("--offline", help="Use only what is in the cache.", show_default=False)
    ] = False,
) -> None:
    """Download a model from the Hugging Face hub, and print its directory."""
    repo, revision = hub.split(name)
    with _downloading(name) as bars:
        directory = hub.download(repo, revision=revision, cache=cache_dir, offline=offline, bars=bars)
    show(str(directory))
    model = name if cache_dir is None else str(directory)
    tell(f"to use it: {program()} generate --model {shlex.quote(model)} --prompt 'The capital of France is'")


@commands.command(rich_help_panel=RUN, epilog=examples("xlstm-ray models"))
def models(cache_dir: CacheDirOption = None, json_output: JsonOption = False) -> None:
    """List the hub's models that are on this machine, by the names that --model takes."""
    rows = [
        {
            "name": model.name,
            "revision": model.commit,
            "bytes": model.bytes,
            "whole": hub.is_whole(model, cache_dir),
            "xlstm": _runs(model.directory),
            "directory": str(model.directory),
        }
        for model in hub.cached(cache_dir)
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
