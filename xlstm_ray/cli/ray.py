"""The commands about Ray heads: up, status, down."""

from typing import Annotated, Any

import typer

from xlstm_ray.cli.flags import in_flags
from xlstm_ray.cli.options import RAY, JsonOption, bare, takes
from xlstm_ray.cli.output import json_line, show, tell
from xlstm_ray.settings import Settings

commands = typer.Typer()


@commands.command(rich_help_panel=RAY)
@takes("ray_dashboard ray_dashboard_port ray_state_dir ray_temp_dir")
def up(
    ray_port: Annotated[
        int | None, typer.Option("--ray-port", help=bare("The port of the head's address. [default: a free one]"))
    ] = None,
    ray_metrics_port: Annotated[
        int | None,
        typer.Option("--ray-metrics-port", help=bare("The port that Prometheus reads. [default: a free one]")),
    ] = None,
    *,
    asked: dict[str, Any],
) -> None:
    """Start a Ray head that stays."""
    settings = Settings.make(**asked)
    from xlstm_ray.directories import default_state_dir
    from xlstm_ray.supervisor import start
    from xlstm_ray.supervisor.mode import ray_mode
    from xlstm_ray.supervisor.records import stays_lines
    from xlstm_ray.supervisor.start import HeadOptions

    port = settings.ray_dashboard_port
    ray_mode(local_mode=False, dashboard=settings.ray_dashboard, dashboard_port=port)
    head = start.up(
        HeadOptions(
            state_dir=settings.ray_state_dir or default_state_dir(),
            temp_dir=settings.ray_temp_dir,
            stays=True,
            dashboard=settings.ray_dashboard,
            dashboard_port=port,
            port=ray_port,
            metrics_port=ray_metrics_port,
        )
    )
    show(in_flags("\n".join(stays_lines(head))))


@commands.command(rich_help_panel=RAY)
@takes("ray_state_dir")
def status(json_output: JsonOption = False, *, asked: dict[str, Any]) -> None:
    """Show the Ray heads of this project with their actors and memory, and Ray sessions that are not ours."""
    settings = Settings.make(**asked)
    from xlstm_ray.directories import default_state_dir
    from xlstm_ray.supervisor.status import status as heads_and_strangers

    report = heads_and_strangers(settings.ray_state_dir or default_state_dir())
    if json_output:
        json_line(report.to_json())
    else:
        show("\n".join(report.lines()))


@commands.command(rich_help_panel=RAY)
@takes("ray_state_dir")
def down(
    head: Annotated[
        str | None,
        typer.Argument(help=bare("Stop only this head, even if its run is alive. [default: all heads without a run]")),
    ] = None,
    *,
    asked: dict[str, Any],
) -> None:
    """Stop the Ray heads of this project, and nothing else."""
    settings = Settings.make(**asked)
    from xlstm_ray.directories import default_state_dir
    from xlstm_ray.supervisor import stop
    from xlstm_ray.supervisor.status import status as heads_and_strangers

    state_dir = settings.ray_state_dir or default_state_dir()
    stopped = stop.down(state_dir, head)
    for gone in stopped:
        show(f"stopped head {gone.id}")
    left = heads_and_strangers(state_dir).heads if head is None else []
    if not stopped and not left:
        show("there is no Ray head of this project to stop")
    for item in left:
        if item.state != "elsewhere":
            tell(
                f"left head {item.head.id}: its run (pid {item.head.driver.pid}) is alive; end that run, or stop the "
                f"head under it with xlstm-ray down {item.head.id}"
            )
