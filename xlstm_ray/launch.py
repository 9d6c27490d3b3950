"""Actors and a head for an engine, and the device and compiler that they need."""

import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from math import floor
from pathlib import Path
from secrets import token_hex
from types import ModuleType
from typing import TYPE_CHECKING

import torch

from xlstm_ray.checkpoint import Checkpoint
from xlstm_ray.choose import choose_limits
from xlstm_ray.container import cores
from xlstm_ray.directories import default_state_dir
from xlstm_ray.errors import KernelError
from xlstm_ray.kernels import Backend
from xlstm_ray.kernels.compiled import require_compile_cache
from xlstm_ray.kernels.metal import Fit
from xlstm_ray.layout import Band
from xlstm_ray.memory.watchdog import Limits
from xlstm_ray.settings import Settings
from xlstm_ray.supervisor.connect import connect
from xlstm_ray.supervisor.start import HeadOptions

if TYPE_CHECKING:
    from xlstm_ray.actors.grid import RayExecutor
    from xlstm_ray.engine.engine import Engine


@contextmanager
def attached(settings: Settings, model: Path) -> Iterator[ModuleType]:
    assert settings.ray_address is not None
    state_dir = settings.ray_state_dir or default_state_dir()
    token, metadata = settings.ray_token_path, job_metadata(settings, model)
    with connect(settings.ray_address, state_dir=state_dir, token_path=token, metadata=metadata) as ray:
        yield ray


def job_metadata(settings: Settings, model: Path) -> dict[str, str]:
    """What Ray's dashboard shows of this program beside its command line."""
    figures = "metrics ray_xlstm_ray_tokens_total, _prompt_tokens, _prompt_tokens_left, _tokens_per_second"
    name = model.resolve().name
    return {"job_name": f"xlstm-ray {name}", "model": name, "stages": str(settings.stages), "progress": figures}


def device_of_cluster(settings: Settings, ray: ModuleType) -> torch.device:
    """The device asked for, or the best that the cluster has."""
    if settings.device != "auto":
        return torch.device(settings.device)
    there = ray.cluster_resources()
    return torch.device(next((d for d, name in (("mps", "mps"), ("cuda", "GPU")) if there.get(name)), "cpu"))


def head_options(settings: Settings, actors: int, device: torch.device) -> HeadOptions:
    """A head for one run, or one that stays where it was asked for; it has CPUs for this run's actors in any case."""
    each = (settings.threads or 1) if device.type == "cpu" else 1
    return HeadOptions(
        num_cpus=max(cores(), actors * each) if actors else 0,  # Ray starts a worker for each, before one is wanted
        state_dir=settings.ray_state_dir or default_state_dir(),
        temp_dir=settings.ray_temp_dir,
        stays=settings.ray_keep_alive or not settings.ray_autoshutdown,
        dashboard=settings.ray_dashboard,
        dashboard_port=settings.ray_dashboard_port,
        resources={"mps": 1} if torch.backends.mps.is_available() else {},
    )


def grid_executor(
    ray: ModuleType, engine: "Engine", stages: list[list[Band]], steps: Fit, checkpoint: Checkpoint
) -> "RayExecutor":
    """An actor for each (stage, band) on the cluster that `ray` is connected to."""
    from xlstm_ray.actors.grid import RayExecutor
    from xlstm_ray.actors.options import GridOptions
    from xlstm_ray.actors.shard import WorkerSpec

    settings = engine.settings
    actors, threads, cpus = engine.stages * engine.bands, settings.threads, None
    if threads is None:
        there = [node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"]]
        threads = max(1, int(sum(there)) // actors) if engine.device.type == "cpu" else 1
        if engine.device.type == "cpu" and sum(int(n) for n in there) < actors:
            cpus = share_of_cpus(there, actors)  # they take turns
    spec = WorkerSpec(
        model=engine.model_path.resolve(),
        config=engine.config,
        stored=checkpoint.stored(),
        backend=engine.backend.name,
        device=engine.device.type,
        dtype=engine.dtype,
        chunk_size=engine.grid.chunk_size,
        t_inner=steps.t_inner,
        fusion_limit=steps.fusion_limit,
        threads=threads,
    )
    options = GridOptions(
        run=token_hex(3),
        actors_per_device=settings.actors_per_device,
        cpus=cpus,
        limits=partial(Limits.make, *choose_limits(settings)) if settings.mem_watchdog else None,
        watch_every_s=settings.mem_poll_ms / 1000,
        empty_cache="empty_cache" in settings.mem_action,
        on_event=engine._memory_events.append,
    )
    return RayExecutor(ray, spec, stages, options)


def share_of_cpus(nodes: Sequence[float], actors: int) -> float | None:
    """The largest part of a CPU, at most a whole one, that all actors can have on nodes of so many CPUs each, or None.

    Ray counts CPUs in steps of 0.0001.
    """
    ways = {floor(n / k * 10_000) / 10_000 for n in nodes for k in range(1, actors + 1)}
    fit = [s for s in ways if 0 < s <= 1 and sum(int(n / s + 1e-6) for n in nodes) >= actors]
    return max(fit, default=None)


def require_compiler(backend: Backend, device: torch.device) -> None:
    """Inductor needs its cache, and on the CPU builds C++; say so before anything is loaded where it cannot."""
    if not backend.compiled:
        return
    require_compile_cache()
    if device.type != "cpu":
        return
    # As Inductor looks for it, which takes a second and 70 MiB to import: on Ray, this process does not compile.
    name = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if shutil.which(name) is None:
        raise KernelError(
            f"--chunkwise-backend {backend.name} compiles its kernels and needs a C++ compiler (g++ or clang++, or its "
            "path in CXX), and there is none; install one, or use --chunkwise-backend native, the slow eager reference"
        )
