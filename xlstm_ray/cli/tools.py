"""The commands that look and measure: doctor, config, parity, plan."""

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from xlstm_ray.cli.flags import in_flags
from xlstm_ray.cli.models import fetch_weights
from xlstm_ray.cli.options import MACHINE, JsonOption, bare, examples, takes
from xlstm_ray.cli.output import json_line, note, show, tell
from xlstm_ray.cli.signals import leave_at_once, stop_on_signals
from xlstm_ray.errors import ParityError, UsageError
from xlstm_ray.settings import Settings, table

commands = typer.Typer()


@commands.command(rich_help_panel=MACHINE)
@takes("model device dtype chunkwise_backend tile_size chunk_size heads_per_band t_inner profile")
def doctor(
    kernels: Annotated[
        bool, typer.Option("--kernels", help="On mps: the Metal kernels of a model, without running any.")
    ] = False,
    json_output: JsonOption = False,
    *,
    asked: dict[str, Any],
) -> None:
    """Show this machine's devices and try the known faults of mps; with --kernels, a model's Metal kernels."""
    settings = Settings.make(**asked)
    given = next((name for name, value in asked.items() if value is not None), None)
    if given and not kernels:
        named = settings.named(given) if given in table() else f"`{given}`"
        raise UsageError(f"{named} is for the table of kernels: add --kernels, or leave it out")
    import torch

    from xlstm_ray.choose import choose_device, choose_setup
    from xlstm_ray.measure.doctor import canary_report, kernel_report, machine

    facts: dict[str, Any] = {"machine": machine()}
    lines = [f"{name:<22} {value}" for name, value in facts["machine"].items()]
    if "mps" in facts["machine"]:
        facts["canaries"], more = canary_report(torch.device("mps"))
        lines += ["", *more]
    if kernels:
        if (device := choose_device(settings)).type != "mps":
            raise UsageError(f"--kernels shows Metal kernels, and the device is {device.type}; it needs --device mps")
        from xlstm_ray.plan import choose_plan

        facts["kernels"], more = kernel_report(choose_plan(choose_setup(settings), None))
        lines += ["", *more]
    if json_output:
        json_line(facts)
    else:
        print("\n".join(lines), flush=True)


@commands.command(rich_help_panel=MACHINE, epilog=examples("xlstm-ray config -m DIR --config settings.toml"))
@takes()
def config(json_output: JsonOption = False, *, asked: dict[str, Any]) -> None:
    """Show every setting with its value and its source."""
    from xlstm_ray.choose import setup_of

    setup = setup_of(**asked)
    with leave_at_once():
        from xlstm_ray.explain import explain
    rows = {}
    for name, (value, source) in explain(setup).items():
        row = table()[name]
        plain = str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value
        where = in_flags(source.where)
        rows[name] = {"value": plain, "source": source.kind, "where": where, "flag": row.flags, "env": row.env}
    if json_output:
        json_line(rows)
        return
    for name, found in rows.items():
        value = found["value"]
        text = ",".join(map(str, value)) if isinstance(value, list) else "-" if value is None else str(value)
        show(f"{name:<20} {text:<24} {found['source']} {found['where']}".rstrip())


@commands.command(rich_help_panel=MACHINE, epilog=examples("xlstm-ray parity mlstm --device cpu"))
@takes("model device")
def parity(
    part: Annotated[
        str | None, typer.Argument(help=bare("mlstm, slstm, weights (8 and 4 bits) or model. [default: all]"))
    ] = None,
    json_output: JsonOption = False,
    *,
    asked: dict[str, Any],
) -> None:
    """Compare every kernel and backend with the reference; exit code 1 if one is over its tolerance."""
    settings = Settings.make(**asked)
    only_kernels = part in ("mlstm", "slstm", "weights")
    if only_kernels and asked["model"]:
        raise UsageError(f"--model is for parity's part 'model', and {part!r} compares only kernels; leave it out")
    from xlstm_ray.choose import DEMO_MODEL, choose_device, choose_model
    from xlstm_ray.kernels.inductor import switched_off
    from xlstm_ray.measure.parity import HEADER, compare

    if (switch := switched_off()) is not None:
        raise UsageError(f"{switch} is 1, and what is compared here are compiled kernels; unset it")
    rows: list[Any] = []
    fetch_weights(settings)
    directory = DEMO_MODEL if only_kernels else choose_model(settings)
    for row in compare(part, choose_device(settings), directory):
        if not rows and not json_output:
            show(HEADER)
        rows.append(row._replace(reason=row.reason and in_flags(row.reason)))
        if not json_output:
            show(rows[-1].line)
    if json_output:
        json_line({"rows": [{**row._asdict(), "good": row.good} for row in rows]})
    over = [f"{row.part} {row.name} {row.dtype}" for row in rows if not row.good]
    if over:
        raise ParityError(f"{len(over)} of {len(rows)} are over their tolerance: {', '.join(over)}")


@commands.command(
    rich_help_panel=MACHINE,
    epilog=examples(
        "xlstm-ray plan -m DIR --device m2-ultra --prompt-tokens 65536",
        "xlstm-ray plan -m DIR --device m2 --memory-gb 16 --prompt-tokens 65536",
        "xlstm-ray plan -m DIR --device h200 --spans 4 --link-gbit 2400 --prompt-tokens 65536",
        "xlstm-ray plan -m DIR --device this --prompt-tokens 4096 --check",
    ),
)
@takes("model dtype tile_size chunk_size heads_per_band spans states_mb")
def plan(
    device: Annotated[
        str,
        typer.Option("--device", help="m1 to m4-max, h100, h200, or this: this machine's CPU; several with commas."),
    ],
    prompt_tokens: Annotated[int, typer.Option("--prompt-tokens", help="The prompt's length.")],
    machines: Annotated[int, typer.Option("--machines", help="Machines; each has a stage of the blocks.")] = 1,
    link_gbit: Annotated[
        float | None, typer.Option("--link-gbit", help=bare("Gbit/s between machines, or GPUs. [default: 10]"))
    ] = None,
    memory_gb: Annotated[
        float | None,
        typer.Option("--memory-gb", help=bare("The device's memory. [default: the most that is sold of it]")),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="With --device this: run it too; exit code 1 beyond a factor of 1.5.")
    ] = False,
    json_output: JsonOption = False,
    *,
    asked: dict[str, Any],
) -> None:
    """Estimate a prefill's memory and time on a device; the model's config.json is enough."""
    settings = Settings.make(**asked)
    if check and (device != "this" or machines != 1 or settings.spans > 1):
        raise UsageError("--check runs on this machine: give --device this, no --machines, and no spans")
    from xlstm_ray.measure import estimate
    from xlstm_ray.plan import choose_on_paper

    if check:
        fetch_weights(settings)

    choose = partial(choose_on_paper, settings)
    found = estimate.plan(choose, device, prompt_tokens, machines, memory_gb=memory_gb, link_gbit=link_gbit)
    if json_output:
        json_line(found.to_json())
    else:
        show(in_flags("\n".join(found.lines)))
    if check:
        with stop_on_signals():
            line = estimate.check(found, note)
        (tell if json_output else show)(line)
