"""The command that compiles ahead of time, and moves what is compiled to other machines of the same kind."""

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from xlstm_ray.cli.options import (
    MACHINE,
    OUTPUT,
    DeterministicOption,
    GivenPath,
    JsonOption,
    ProgressOption,
    SlotsOption,
    bare,
    examples,
    path_option,
    takes,
)
from xlstm_ray.cli.output import json_line, show
from xlstm_ray.cli.session import open_engine, require_places, run_under_keeper
from xlstm_ray.cli.signals import stop_on_signals
from xlstm_ray.directories import fresh_compile_cache
from xlstm_ray.errors import UsageError, one_line
from xlstm_ray.files import CODE, Input, Output, check_outputs
from xlstm_ray.kernels.bundle import machine, pack, read
from xlstm_ray.kernels.inductor import graphs
from xlstm_ray.serve.options import Slots
from xlstm_ray.settings import Settings

if TYPE_CHECKING:
    from xlstm_ray.engine.engine import Engine

commands = typer.Typer()
SETTINGS = """
    model device dtype chunkwise_backend tile_size chunk_size heads_per_band workers threads t_inner autoscale force
    profile stages spans actors_per_device ray_address ray_token_path ray_state_dir ray_temp_dir ray_local_mode
    ray_dashboard ray_dashboard_port ray_keep_alive overwrite
"""


def _file(flag: str, help: str) -> Any:
    return path_option(flag, help=bare(help), rich_help_panel=OUTPUT)


@commands.command(
    "warm-up",
    rich_help_panel=MACHINE,
    epilog=examples(
        "xlstm-ray warm-up -m DIR",
        "xlstm-ray warm-up -m DIR --cache-out code.zip      # in an image, or on one machine of many",
        "xlstm-ray warm-up -m DIR --cache-in code.zip       # on the others: nothing is compiled",
    ),
)
@takes(SETTINGS)
def warm_up(
    slots: SlotsOption = None,
    deterministic: DeterministicOption = False,
    batches: Annotated[bool, typer.Option("--batches", help="Also what prefill --jsonl calls.")] = False,
    cache_out: Annotated[
        GivenPath | None,
        _file("--cache-out", "Compile all anew, and write the code to this file, for machines of this kind."),
    ] = None,
    cache_in: Annotated[
        GivenPath | None,
        _file("--cache-in", "First take the code of this file. It can do anything: trust it as a program."),
    ] = None,
    cache_digest: Annotated[
        str | None,
        typer.Option(
            "--cache-digest",
            help="Of the file of --cache-in, where others than you may write it.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    json_output: JsonOption = False,
    progress: ProgressOption = "auto",
    *,
    asked: dict[str, Any],
) -> None:
    """Compile all that prefill, generate and serve will call with these options."""
    settings = Settings.make(**asked)
    _check(settings, cache_out, cache_in, cache_digest)
    run_under_keeper(settings)
    require_places(settings, asked["config"], None, None, None)
    inputs, code = [], None
    if cache_in is not None:
        inputs, code = [Input("--cache-in", cache_in)], read(cache_in, cache_digest)
    check_outputs(
        [] if cache_out is None else [Output("--cache-out", cache_out, CODE)], inputs, overwrite=settings.overwrite
    )
    from xlstm_ray.kernels.inductor import switched_off

    if (switch := switched_off()) is not None:
        raise UsageError(f"{switch} is 1, and torch compiles nothing then; unset it")
    with open_engine(settings, None, None, asked, progress, 1) as (_, engine, report):
        if not engine.backend.compiled:
            raise UsageError(f"{engine.backend.name} is not compiled: nothing is to warm up; name another one")
        with stop_on_signals():
            import torch

            from xlstm_ray.serve.warm import compile_all

            facts = machine(engine.device, f"{engine.workers} x {engine.plan.threads or torch.get_num_threads()}")
            if code is not None:
                code.install(facts)
            with fresh_compile_cache() if cache_out is not None else nullcontext() as directory:
                made = compile_all(engine, Slots(slots, deterministic), batches=batches, on_done=report.compiled)
                report.close()
                about = _about(engine) | {"calls": [call._asdict() for call in made]}
                digest = pack(directory, cache_out, facts, about) if directory and cache_out else None
        seconds, (compiled, found) = sum(call.seconds for call in made), graphs()
    if json_output:
        row = about | {"compiled": compiled, "found": found, "seconds": seconds}
        json_line(row if digest is None else row | {"cache_out": str(cache_out), "digest": digest})
        return
    for call in made:
        sizes = " and ".join(map(str, call.sizes))
        show(f"{call.rows:3} row(s) of {sizes} token(s)  {call.seconds:6.1f} s")
    show(f"{compiled} graph(s) compiled and {found} found, for {_words(about)}: {seconds:.1f} s")
    if code is not None:
        show(f"{cache_in}: code for {_words(code.about)}")
    if digest is not None:
        show(f"{cache_out}: digest {digest}")


def _check(settings: Settings, cache_out: Path | None, cache_in: Path | None, digest: str | None) -> None:
    """Refuse what has no effect, or no meaning."""
    if cache_out is not None and cache_in is not None:
        raise UsageError("--cache-out and --cache-in were both given; it is made on one machine and taken on others")
    if not settings.warmup:
        raise UsageError(f"{settings.named('warmup')} is off, and this command is nothing else; leave it out")
    if digest is not None and cache_in is None:
        raise UsageError("--cache-digest is of the file of --cache-in; add it, or leave --cache-digest out")
    if cache_out is not None and not settings.ray_local_mode:
        raise UsageError(
            "--cache-out has what this process compiles, and actors compile by themselves; leave out what starts them: "
            "their code is the same for the same options and --threads"
        )


def _about(engine: "Engine") -> dict[str, Any]:
    """What was compiled, for people."""
    numerics = engine.numerics
    return {
        "model": engine.model_path.name,
        "device": engine.device.type,
        "dtype": numerics.dtype,
        "kernel": numerics.kernel,
        "tile_size": numerics.tile_size,
        "chunk_size": numerics.chunk_size,
    }


def _words(about: dict[str, Any]) -> str:
    return one_line(", ".join(f"{name} {value}" for name, value in about.items() if name != "calls"))
