"""The commands that look after a directory of kept states: cache list, prune, clear."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from xlstm_ray.cachefiles import Folder, KeptFile
from xlstm_ray.cli.options import JsonOption, bare, examples, given_path
from xlstm_ray.cli.output import json_line, show
from xlstm_ray.errors import OutputError
from xlstm_ray.files import MIB, shown_bytes

commands = typer.Typer(
    help="Look after the states that --cache-dir keeps.",
    epilog=examples("xlstm-ray cache list DIR"),
    no_args_is_help=True,
)

DirectoryArgument = Annotated[
    Path, typer.Argument(parser=given_path, metavar="DIR", help="The directory of --cache-dir.")
]


@commands.command("list")
def list_(directory: DirectoryArgument, json_output: JsonOption = False) -> None:
    """Show the states that are there, the last used one first."""
    states, damaged, _ = Folder(directory, make=False).read()
    states.sort(key=lambda kept: kept.used, reverse=True)
    total = sum(kept.size for kept in states)
    if json_output:
        json_line({"states": [_row(kept) for kept in states], "damaged": damaged, "bytes": total})
        return
    show(f"{'tokens':>10}  {'size':>10}  {'last used':<16}  {'model':<12}  numerics")
    for kept in states:
        n = kept.numerics
        kernel = f"{n.get('kernel')}{' (eager)' if n.get('eager') else ''}"
        sizes = f"{kernel}, tiles of {n.get('tile_size')}, chunks of {n.get('chunk_size')}, {n.get('dtype')}"
        used = datetime.fromtimestamp(kept.used).strftime("%Y-%m-%d %H:%M")
        show(f"{kept.tokens.length:>10,}  {shown_bytes(kept.size):>10}  {used:<16}  {kept.model[:12]:<12}  {sizes}")
    show(f"{len(states)} state(s), {shown_bytes(total)} in all")
    if damaged:
        show(f"{len(damaged)} damaged file(s), which prune removes")


@commands.command()
def prune(
    directory: DirectoryArgument,
    max_mb: Annotated[
        int | None,
        typer.Option(
            "--max-mb",
            min=0,
            help=bare("Remove the longest unused until no more MiB are left. [default: all may stay]"),
        ),
    ] = None,
    json_output: JsonOption = False,
) -> None:
    """Remove what cannot be used, and what has not been used for the longest time."""
    with _changing(directory) as folder:
        folder.tidy()
        _, damaged, _ = folder.read()
        before = folder.bytes()
        folder.remove(damaged)
        gone = [] if max_mb is None else folder.make_room(0, max_mb * MIB)
        freed = before - folder.bytes()
    _removed([*damaged, *gone], freed, json_output=json_output)


@commands.command()
def clear(directory: DirectoryArgument, json_output: JsonOption = False) -> None:
    """Remove all states; files of others stay."""
    with _changing(directory) as folder:
        folder.tidy()
        names = list(folder.entries())
        freed = folder.remove(names)
    _removed(names, freed, json_output=json_output)


@contextmanager
def _changing(directory: Path) -> Iterator[Folder]:
    """The directory, with its lock. Raises OutputError where files cannot be removed from it."""
    folder = Folder(directory, make=False)
    try:
        with folder.lock():
            yield folder
    except OSError as err:
        raise OutputError(f"{directory}: cannot be changed ({err.strerror}); nothing more is removed") from None


def _removed(names: list[str], freed: int, *, json_output: bool) -> None:
    if json_output:
        json_line({"removed": names, "bytes": freed})
    else:
        show(f"removed {len(names)} state(s), {shown_bytes(freed)}")


def _row(kept: KeptFile) -> dict[str, Any]:
    return {
        "file": kept.name,
        "tokens": kept.tokens.length,
        "bytes": kept.size,
        "used": kept.used,
        "model": kept.model,
        "numerics": kept.numerics,
    }
