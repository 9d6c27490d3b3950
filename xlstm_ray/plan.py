"""RunPlan: every choice of a run, made once from the settings and the model, before any weight is read."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch

from xlstm_ray.checkpoint import Checkpoint
from xlstm_ray.choose import (
    ActorPlan,
    Cluster,
    Dtype,
    RunSizes,
    Setup,
    choose_actors,
    choose_device,
    choose_dtype,
    choose_head,
    choose_model,
    choose_sizes,
    choose_steps,
    choose_streams,
    choose_workers,
)
from xlstm_ray.choose_kernels import choose_graphs, choose_kernels
from xlstm_ray.config import ModelConfig
from xlstm_ray.declare import Source
from xlstm_ray.errors import UsageError
from xlstm_ray.files import MIB
from xlstm_ray.kernels import Backend
from xlstm_ray.kernels.fit import KERNEL, LEAST_CHUNK
from xlstm_ray.kernels.inductor import switched_off
from xlstm_ray.kernels.metal import Fit
from xlstm_ray.kernels.quantized import rows_at_once
from xlstm_ray.layout import Shard, make_layout
from xlstm_ray.memory.need import (
    DASHBOARD,
    HEAD,
    HELD_ROWS,
    PROGRAM,
    WATCHDOG,
    Loaded,
    activation_bytes,
    state_bytes,
)
from xlstm_ray.memory.room import Room, actor_bytes
from xlstm_ray.memory.sample import device_total_bytes, take_sample
from xlstm_ray.memory.watchdog import Limit, Limits
from xlstm_ray.settings import Settings
from xlstm_ray.split import Blocks, Measured, Reserved, Stage, split
from xlstm_ray.state import Numerics
from xlstm_ray.supervisor.mode import Mode
from xlstm_ray.supervisor.ports import is_loopback
from xlstm_ray.supervisor.start import HeadOptions
from xlstm_ray.tensors import sizes_of, whole_bytes

CACHE_MEMORY_MB = 256  # besides a directory, if nothing else is given


class AskedLimits(NamedTuple):
    """The memory limits from the settings: the first arguments of `Limits.make`."""

    soft: Limit
    hard: Limit
    soft_asked: bool


def choose_limits(settings: Settings) -> AskedLimits:
    """Limits in MiB if they are given, else fractions."""

    def limit(which: str) -> Limit:
        mb, share = getattr(settings, f"mem_{which}_mb"), getattr(settings, f"mem_{which}_pct")
        name, value = (f"mem_{which}_pct", share) if mb is None else (f"mem_{which}_mb", mb)
        return Limit(mb, share, f"{settings.named(name)} {value}")

    asked = any(settings.source(f"mem_soft_{of}").kind != "default" for of in ("mb", "pct"))
    return AskedLimits(limit("soft"), limit("hard"), asked)


class Watch(NamedTuple):
    """How memory is watched, and what a soft limit does."""

    limits: AskedLimits
    every_s: float
    actions: tuple[str, ...]
    shrinks: bool
    least_chunk: int


class LogFile(NamedTuple):
    """A file that a prefill writes. named: its name in errors."""

    path: Path
    named: str
    overwrite: bool


class CachePlan(NamedTuple):
    """Where states are kept for prompts to come, and how many. every: tiles between two; None: by the prompt."""

    folder: Path | None
    memory_bytes: int
    disk_bytes: int
    every: int | None
    exact: bool


class Search(NamedTuple):
    """The settings that a measurement may choose: those that were not given. again: ignore kept results."""

    free: tuple[str, ...]
    again: bool


class Picked(NamedTuple):
    """The settings that a measurement chose, and the file that keeps them."""

    values: dict[str, int]
    where: str


@dataclass(frozen=True)
class RunPlan:
    """Everything that is chosen for a run. `mode` says where the workers are; only launch reads it."""

    model: Path
    config: ModelConfig
    backend: Backend
    mode: Mode
    device: torch.device
    misfit: str | None  # why the Triton kernels do not take it, on cuda, where no backend was named
    uncaptured: str | None  # why decoding is not in CUDA graphs; None: it is
    dtype: torch.dtype  # of the residual stream
    dtype_reason: str | None  # if it was measured
    numerics: Numerics
    layout: list[list[Shard]]  # [stage][band]
    workers: int  # threads that work on bands
    streams: int  # on cuda, shared by these threads
    threads: int | None  # torch's own threads of each worker; None: an equal share of the cores
    steps: Fit
    warms_up: bool
    journal_every: int | None  # windows between two snapshots; None: no snapshots
    actors: ActorPlan | None  # None: the workers are in this process
    head: HeadOptions | None  # the head to start; None: no head is started
    watch: Watch | None  # None: memory is not watched
    logs: dict[str, LogFile]
    room: Room
    search: Search | None  # what a measurement may choose instead
    picked: Picked | None  # what it chose
    cache: CachePlan | None = None  # of states; None: there is none
    measures: bool = False  # the nodes come before the stages: `divide` is to be called with what they are like
    split: list[Stage] | None = None  # the stages that it made, and why
    spans: int = 1  # actors of each shard, to which a prompt's tiles go in turn

    @property
    def eager_note(self) -> str | None:
        """That compiled kernels are not compiled, for people."""
        note = f"{switched_off()}=1: {self.backend.name} is not compiled: slower, and other bits"
        return note if self.numerics.eager else None

    @property
    def split_note(self) -> str | None:
        """The stages by measured speed, for people."""
        return None if self.split is None else f"stages: {', '.join(map(str, self.split))}"

    @property
    def bands(self) -> int:
        return len(self.layout[0])

    @property
    def stages(self) -> int:
        return len(self.layout)

    @property
    def own_device(self) -> torch.device | None:
        """The device that this process works on; None if actors do the work."""
        return self.device if self.actors is None else None


def choose_search(settings: Settings, config: ModelConfig) -> Search | None:
    """The settings to probe this machine for; None: no probe. Raises UsageError if nothing is left to choose."""
    if not (settings.autoscale or settings.autoscale_again):
        return None
    names = "tile_size", "heads_per_band", "workers"
    free = tuple(name for name in names if settings.source(name).kind in ("default", "model", "autoscale"))
    asked = next((name for name in ("autoscale", "autoscale_again") if name in settings.flags()), None)
    if asked and not free:
        given = ", ".join(settings.named(name) for name in names)
        raise UsageError(f"{settings.named(asked)} has no effect beside {given}; leave one of them out")
    if asked and len(config.slstm_at) == config.num_blocks:
        raise UsageError(
            f"{settings.named(asked)} has no effect: all blocks are sLSTM, which run the same however they are cut; "
            "leave it out"
        )
    return Search(free, settings.autoscale_again)


def choose_cache(settings: Settings) -> CachePlan | None:
    """Whether states are kept for prompts to come: where a directory or room in memory is given."""
    if settings.cache_dir is None and settings.cache_memory_mb is None:
        return None
    memory, disk = settings.cache_memory_mb or CACHE_MEMORY_MB, settings.cache_disk_mb
    return CachePlan(
        settings.cache_dir, memory * MIB, disk * MIB, settings.cache_every, settings.cache_match == "exact"
    )


def choose_plan(
    setup: Setup,
    checkpoint: Checkpoint | None,
    *,
    base: Callable[[], int] = lambda: PROGRAM,
    cluster: Cluster | None = None,
    picked: Picked | None = None,
    dtype: Dtype | None = None,
) -> RunPlan:
    """checkpoint: its headers say what is stored; None: only config.json exists. base: bytes of this process before a
    model is loaded. cluster: the one that the run is attached to. picked: what a search chose, starting from the plan
    without it; dtype: the dtype of that earlier plan, which was chosen for its sizes.
    """
    settings, config, mode = setup.settings, setup.config, setup.mode
    if picked is not None:
        sources = {**settings.sources, **dict.fromkeys(picked.values, Source("autoscale", picked.where))}
        settings = settings.model_copy(update={**picked.values, "sources": sources})
    device = choose_device(settings, cluster)
    sizes = choose_sizes(settings, config, device.type)
    measures = setup.stages == "auto"  # then `divide` makes the stages
    layout = make_layout(config, heads_per_band=sizes.heads, stages=1 if setup.stages == "auto" else setup.stages)
    backend, misfit = choose_kernels(setup, device, [len(band.ffn) for band in layout[0]], sizes.chunk)
    least_chunk = LEAST_CHUNK if backend.kernel == KERNEL else 1
    workers, limits = choose_workers(settings, config, sizes.heads), choose_limits(settings)
    actors = len(layout) * len(layout[0]) * settings.spans
    head, local = choose_head(settings, mode, actors, device), mode is Mode.LOCAL
    own_memory = device_total_bytes(device) if local else None
    bounds = Limits.make(*limits, take_sample().total_bytes, own_memory) if settings.mem_watchdog else None
    cache = choose_cache(settings)
    here = mode is Mode.MANAGED or (setup.head is not None and is_loopback(setup.head.address))

    def room(dtype: torch.dtype) -> Room:
        return Room(
            Loaded(
                config,
                device=device.type,
                itemsize=dtype.itemsize,
                compiled=backend.compiled,
                # On cuda the device's memory counts. Its context is not part of the free memory.
                base=base() if local and device.type != "cuda" else 0,
                weights=checkpoint.weight_bytes(dtype, float8=settings.dtype == "float8") if checkpoint else 0,
                largest_tensor=checkpoint.largest_tensor_bytes if checkpoint else 0,
                whole_matrix=whole_bytes(config, dtype, rows_at_once(device.type, compiled=backend.compiled)),
                tile=sizes.tile,
                chunk=sizes.chunk,
                heads_per_band=sizes.heads,
                workers=workers,
                stages=len(layout),
                spans=settings.spans,
                cache=cache.memory_bytes if cache else 0,
                documents=(settings.states_mb or 0) * MIB,
                triton=backend.kernel == KERNEL,
            ),
            device=device,
            where="process" if local else "grid" if here else "elsewhere",
            limits=bounds,
            hard_name=limits.hard.name,
            force=settings.force,
            head=HEAD + DASHBOARD * settings.ray_dashboard if mode is Mode.MANAGED else 0,
            watchdog=WATCHDOG if settings.mem_watchdog else 0,
        )

    def fits(dtype: torch.dtype) -> bool:
        """Whether the model fits in this dtype; on other machines this is not known."""
        return checkpoint is None or mode is Mode.ATTACHED or room(dtype).fits

    found = dtype or choose_dtype(settings, device, _stored(config, checkpoint), fits)
    there = cluster.cpus if cluster else [float(head.num_cpus or 0)] if head else []
    keeps = not local or setup.journal is not None
    # On two H200 a snapshot costs 60 ms, and 64 tiles are computed again in 3 s.
    every = settings.journal_every or (64 if device.type == "cuda" else 16)
    action = settings.mem_action
    least = max(settings.min_chunk, least_chunk)
    watch = Watch(limits, settings.mem_poll_ms / 1000, action, settings.shrink_on_soft, least)
    return RunPlan(
        setup.model,
        config,
        backend,
        mode,
        device,
        misfit=misfit,
        uncaptured=choose_graphs(settings, backend, device, len(layout[0])),
        dtype=found.dtype,
        dtype_reason=found.reason,
        numerics=Numerics(
            kernel=backend.kernel,
            tile_size=sizes.tile,
            chunk_size=sizes.chunk,
            heads_per_band=sizes.heads,
            dtype=found.name,
            eager=backend.compiled and switched_off() is not None,
        ),
        layout=layout,
        workers=workers,
        streams=choose_streams(settings, workers, device) if local else 1,
        threads=settings.threads,
        steps=choose_steps(settings, backend, config, sizes.heads, found.dtype, device),
        warms_up=settings.warmup and backend.compiled,
        journal_every=every if keeps else None,
        actors=None if local else choose_actors(settings, device, actors, there),
        head=head,
        watch=watch if settings.mem_watchdog else None,
        logs={
            name: LogFile(path, settings.named(name), settings.overwrite)
            for name, path in (("stats_log", settings.stats_log), ("mem_log", settings.mem_log))
            if path is not None and (name != "mem_log" or settings.mem_watchdog)
        },
        room=room(found.dtype),
        search=choose_search(settings, config),
        picked=picked,
        cache=cache,
        measures=measures,
        spans=settings.spans,
    )


def divide(plan: RunPlan, checkpoint: Checkpoint, measured: Measured) -> RunPlan:
    """A plan with `stages=auto`, and now stages in these places. Raises UsageError if the model does not fit there."""
    config, loaded, bands, on_host = plan.config, plan.room.loaded, plan.bands, plan.device.type != "cuda"
    assert plan.actors is not None
    weights = sizes_of(config, checkpoint.shapes, plan.dtype, float8=plan.numerics.dtype == "float8")
    state = (2 + HELD_ROWS) * state_bytes(config) // config.num_blocks  # of one prompt
    tile = activation_bytes(replace(loaded, workers=1), rows=1, tokens=loaded.tile) + loaded.whole_matrix
    kinds = ["sLSTM" if n in config.slstm_at else "mLSTM" for n in range(config.num_blocks)]
    needs = Blocks(
        kinds,
        [size + state for size in weights.blocks],
        weights.first,
        weights.of_last if len(measured.places) > 1 else weights.last,
        bands * (tile + (actor_bytes() if on_host else 0)),
    )
    stages = split(measured.places, needs)
    layout = make_layout(config, heads_per_band=loaded.heads_per_band, stages=[len(s.blocks) for s in stages])
    on_cpu = plan.device.type == "cpu"
    actors = plan.actors._replace(
        threads=measured.threads,
        # Half of what its threads are: so a stage of a lost node finds room on another one.
        cpus=measured.threads / 2 if on_cpu else plan.actors.cpus,
        places=tuple(Reserved(s.place.node, -(-s.need // bands) if on_host else 0) for s in stages),
    )
    room = replace(plan.room, loaded=replace(loaded, stages=len(stages)), head=0)  # a head runs already
    return replace(plan, layout=layout, actors=actors, room=room, split=stages, measures=False)


class OnPaper(NamedTuple):
    """A run on a device of which only the kind is known."""

    model: Path
    config: ModelConfig
    checkpoint: Checkpoint | None  # None: only config.json exists
    stored: torch.dtype  # the weights' dtype, or the configuration's
    dtype: torch.dtype
    sizes: RunSizes
    tile_asked: bool  # it was given, so no other is tried
    workers: int
    share: float  # the part of the device's memory that may be used
    documents: int  # bytes of a service's documents
    spans: int  # actors with all blocks
    spans_named: str  # its name in errors


def choose_on_paper(settings: Settings, kind: str) -> OnPaper:
    """The choices for a kind of device: cpu, cuda or mps. Reads config.json and the headers of the weights."""
    model = choose_model(settings)
    config = ModelConfig.from_file(model / "config.json")
    checkpoint = Checkpoint(model, config) if any(model.glob("*.safetensors")) else None
    sizes, stored = choose_sizes(settings, config, kind), _stored(config, checkpoint)
    return OnPaper(
        model,
        config,
        checkpoint,
        stored,
        dtype=choose_dtype(settings, torch.device(kind), stored, lambda _: True).dtype,
        sizes=sizes,
        tile_asked=settings.tile_size is not None,
        workers=choose_workers(settings, config, sizes.heads),
        share=settings.mem_hard_pct,
        documents=(settings.states_mb or 0) * MIB,
        spans=settings.spans,
        spans_named=settings.named("spans"),
    )


def _stored(config: ModelConfig, checkpoint: Checkpoint | None) -> torch.dtype:
    """The dtype of the weights, or the configuration's if there are no weights."""
    return checkpoint.dtype if checkpoint else getattr(torch, config.dtype or "bfloat16")
