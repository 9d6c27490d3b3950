"""What `xlstm-ray config` shows: every setting with the value that a run here would use, and why."""

from typing import Any

import torch

from xlstm_ray.checkpoint import Checkpoint
from xlstm_ray.choose import Cluster, Setup, own_backend
from xlstm_ray.declare import Source
from xlstm_ray.files import MIB
from xlstm_ray.plan import RunPlan, choose_plan
from xlstm_ray.settings import Settings, table


def explain(setup: Setup) -> dict[str, tuple[Any, Source]]:
    """Every setting with the value that a run here would use, and the source of the value or the reason for it.

    Reads config.json and the headers of the weights. Does not ask a cluster.
    """
    settings = setup.settings
    there = any(setup.model.glob("*.safetensors"))
    checkpoint = Checkpoint(setup.model, setup.config) if there else None
    cluster = Cluster({}, [1.0]) if setup.head else None
    plan = choose_plan(setup, checkpoint, cluster=cluster)
    values = {name: (getattr(settings, name), settings.source(name)) for name in table()}
    values["model"] = plan.model, settings.source("model")
    chosen = plan.numerics.model_dump() | {"chunkwise_backend": plan.backend.name}
    from_model = {"chunkwise_backend": plan.backend.name == own_backend(plan.config), "chunk_size": True}
    for name in ("chunkwise_backend", "tile_size", "chunk_size", "heads_per_band"):
        source = values[name][1]
        if (
            source.kind == "default"
            and from_model.get(name)
            and getattr(plan.config, name, chosen[name]) == chosen[name]
        ):
            source = Source("model", str(plan.model / "config.json"))
        values[name] = chosen[name], source
    if settings.device == "auto" and not setup.head:
        values["device"] = plan.device.type, values["device"][1]
    if settings.dtype == "auto" and not setup.head:
        source = Source("measured", plan.dtype_reason) if plan.dtype_reason else values["dtype"][1]
        values["dtype"] = plan.numerics.dtype, source
    for name, (value, reason) in _used(settings, plan, known=setup.head is None).items():
        kind, where = settings.source(name)
        values[name] = value, Source(kind, f"{where}; {reason}" if where else reason)
    for name, (value, source) in values.items():
        if source == Source("default") and getattr(settings, name) in (None, "auto"):
            values[name] = value, Source("default", table()[name].shown)
    return values


def _used(settings: Settings, plan: RunPlan, *, known: bool) -> dict[str, tuple[Any, str]]:
    """The values that differ from the settings, and why. known: no cluster decides them."""
    used: dict[str, tuple[Any, str]] = {}
    actors = plan.stages * plan.bands * plan.spans
    if plan.actors is not None:
        used["workers"] = None, "each band has an actor"
        if plan.measures:
            used["stages"] = "auto", "by each node's measured speed and memory, when a run begins"
        elif settings.threads is None and known:
            used["threads"] = plan.actors.threads, f"an equal share of the cores for {actors} actor(s)"
    else:
        if plan.workers != settings.workers:
            used["workers"] = plan.workers, f"at most one for each band: {settings.workers}, but {plan.bands} band(s)"
        if settings.threads is None:
            share = plan.workers if plan.bands > 1 else 1
            used["threads"] = (
                max(1, torch.get_num_threads() // share),
                f"an equal share of the cores for {share} worker(s)",
            )
        if settings.streams is None and plan.device.type == "cuda" and plan.bands > 1:
            used["streams"] = plan.streams, "one a thread"
    if not plan.backend.unrolls(slstm=bool(plan.config.slstm_at)):
        used["t_inner"] = None, f"{plan.backend.name} unrolls no steps of this model"
    elif plan.steps.t_inner != settings.t_inner:
        used["t_inner"] = plan.steps.t_inner, plan.steps.note or "Metal's limits"
    if reasons := [why for why in (plan.misfit if known else None, plan.eager_note) if why is not None]:
        used["chunkwise_backend"] = plan.backend.name, "; ".join(reasons)
    if plan.uncaptured is not None and settings.cuda_graphs:
        used["cuda_graphs"] = False, plan.uncaptured
    if settings.journal_every is None and plan.journal_every is not None and known:
        used["journal_every"] = plan.journal_every, f"by device, {plan.device.type}"
    if not plan.backend.compiled:
        used["warmup"] = False, f"{plan.backend.name} is not compiled"
    if plan.watch is None:
        used["shrink_on_soft"] = False, "there is no watchdog"
        limits = (f"mem_{level}_{unit}" for level in ("soft", "hard") for unit in ("pct", "mb"))
        used |= {name: (None, "there is no watchdog") for name in (*limits, "mem_poll_ms", "mem_action", "min_chunk")}
    else:
        for level in ("soft", "hard"):
            if getattr(settings, f"mem_{level}_mb") is not None:
                used[f"mem_{level}_pct"] = None, f"`mem_{level}_mb` is given"
        if plan.watch.least_chunk != settings.min_chunk:
            used["min_chunk"] = plan.watch.least_chunk, f"{plan.backend.name} has no smaller chunks"
        if not plan.watch.shrinks:
            used["min_chunk"] = None, "nothing shrinks"
    if settings.states_mb is None and known:
        used["states_mb"] = plan.room.for_documents(1) // MIB, "a quarter of what a service leaves here, up to 4096"
    if plan.cache is None:
        used |= {name: (None, "there is no cache") for name in ("cache_disk_mb", "cache_every", "cache_match")}
    else:
        used["cache_memory_mb"] = plan.cache.memory_bytes // MIB, "of kept states"
        if plan.cache.folder is None:
            used["cache_disk_mb"] = None, "there is no `cache_dir`"
    return used
