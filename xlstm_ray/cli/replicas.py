"""The replicas of a service: their options become a fleet on a head of ours or on somebody's."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xlstm_ray.cli.output import note, tell
from xlstm_ray.cli.reporter import ProgressKind, Reporter
from xlstm_ray.cli.signals import leave_at_once, stop_on_signals
from xlstm_ray.errors import UsageError, pip_install
from xlstm_ray.serve.options import Slots
from xlstm_ray.settings import Settings, table

if TYPE_CHECKING:
    from xlstm_ray.serve.remote import Remote

NOT_A_REPLICAS = """
    ray_address ray_token_path ray_state_dir ray_temp_dir ray_local_mode ray_dashboard ray_dashboard_port ray_keep_alive
    states_mb
"""  # of the head, and of this process, which has the documents
FOR_A_GRID = "stages", "spans", "actors_per_device", "journal", "resume"


@dataclass(frozen=True)
class Wanted:
    """The numbers of replicas that were asked for. Raises UsageError where they do not go together."""

    replicas: int | None
    prefill: int | None
    decode: int | None
    most: int | None

    def __post_init__(self) -> None:
        if (self.prefill is None) != (self.decode is None):
            raise UsageError("`prefill_replicas` and `decode_replicas` belong together: give both, or `replicas`")
        if self.replicas is not None and self.prefill is not None:
            raise UsageError("`replicas` do both; give them, or `prefill_replicas` and `decode_replicas`")
        if self.most is not None and not self:
            raise UsageError("`max_replicas` needs `replicas`, the least of them")
        if self.most is not None and self.most < max(self.readers, self.decode or 0):
            raise UsageError(f"`max_replicas` is {self.most}, fewer than the replicas to begin with")

    def __bool__(self) -> bool:
        return self.replicas is not None or self.prefill is not None

    @property
    def readers(self) -> int:
        return self.replicas or self.prefill or 0

    @property
    def all(self) -> int:
        """Those to begin with."""
        return self.readers + (self.decode or 0)

    @property
    def at_most(self) -> int:
        """Those that there may be."""
        kinds = 1 if self.decode is None else 2
        return self.all if self.most is None else self.most * kinds


def require_fleet(settings: Settings) -> None:
    """Raise UsageError for settings that replicas do not have, and where Ray Serve is missing."""
    if "ray_" in (settings.chunkwise_backend or ""):
        raise UsageError(
            f"{settings.named('chunkwise_backend')} spreads one model over actors, and each of `replicas` has a model "
            "in its process; leave one out"
        )
    for name in FOR_A_GRID:
        if getattr(settings, name) != table()[name].default:
            raise UsageError(f"{settings.named(name)} is for a grid of actors, not for `replicas`; leave one out")
    if settings.ray_token_path is not None and settings.ray_address is None:
        raise UsageError(f"{settings.named('ray_token_path')} is for `ray_address`; leave one out, or give both")
    if settings.source("ray_temp_dir").kind == "flag" and settings.ray_address is not None:
        raise UsageError(f"{settings.named('ray_temp_dir')} is for a head of this run, not beside `ray_address`")
    if settings.source("ray_local_mode").kind == "flag":
        raise UsageError("`replicas` are on Ray in any case; leave `ray_local_mode` out")
    if find_spec("grpc_reflection") is None:  # what Serve needs besides Ray
        raise UsageError(f"`replicas` need Ray Serve; {pip_install('ray')} installs it")


def smaller_tiles(fits: int, usual: int) -> str:
    """What is told where `max_stall_ms` has changed the tile."""
    return f"tiles of {fits} tokens, not {usual}, keep --max-stall-ms; --tile-size {fits} takes them at once"


@contextmanager
def open_replicas(
    settings: Settings,
    wanted: Wanted,
    slots: Slots,
    port: int,
    drain_s: float,
    progress: ProgressKind,
    max_stall_ms: float | None,
) -> "Iterator[tuple[Remote, Callable[[], int], Reporter]]":
    """What takes the requests; the number of all its slots; the reporter. port: where the service listens."""
    from xlstm_ray.choose import choose_setup

    usual = {name: table()[name].default for name in NOT_A_REPLICAS.split()}
    others = {name: source for name, source in settings.sources.items() if name not in usual}
    inner = settings.model_copy(update={**usual, "sources": others})
    model = choose_setup(inner).model  # what is wrong is told before anything starts
    with Reporter(progress) as report, ExitStack() as open_:
        with leave_at_once():
            report.phase("loading torch")
            import torch  # noqa: F401
        with stop_on_signals():
            report.phase("starting Ray")
            device, threads = open_.enter_context(_head(settings, wanted, model))
            from xlstm_ray.serve.fleet import SCALED_DRAIN_S, Fleet, measured_tile, running

            needs: dict[str, Any] = {"num_cpus": threads if device == "cpu" else 1}
            if device != "cpu":
                needs |= {"num_gpus": 1} if device == "cuda" else {"resources": {"mps": 1}}
            found = {"device": device, "threads": threads}
            setup = choose_setup(inner.model_copy(update=found))
            if max_stall_ms is not None:
                report.phase("timing a tile where a replica will be")
                tile, fits = measured_tile(setup, needs, max_stall_ms, given=settings.tile_size is not None)
                if fits != tile:
                    tell(smaller_tiles(fits, tile))
                setup = choose_setup(inner.model_copy(update={**found, "tile_size": fits}))
            # At this service's end its requests have ended; only one that is not needed any more still has some.
            end_s = drain_s if wanted.most is None else max(drain_s, SCALED_DRAIN_S)
            fleet = Fleet(setup, slots, wanted.readers, wanted.decode or 0, wanted.most, end_s, needs)
            report.phase(f"starting {wanted.all} replicas, which load the model")
            remote = open_.enter_context(running(fleet, f"xlstm-ray-serve-{port}"))
        yield remote, lambda: remote.slots * wanted.all, report


@contextmanager
def _head(settings: Settings, wanted: Wanted, model: Path) -> Iterator[tuple[str, int | None]]:
    """Connected to a head; yields the replicas' device, and the threads of each."""
    from xlstm_ray.choose import Cluster, choose_device, choose_head
    from xlstm_ray.container import cores
    from xlstm_ray.directories import default_state_dir
    from xlstm_ray.launch import job_metadata
    from xlstm_ray.supervisor.connect import connect
    from xlstm_ray.supervisor.mode import ray_mode
    from xlstm_ray.supervisor.records import dashboard_line, stays_lines
    from xlstm_ray.supervisor.start import managed

    def threads_of(device: str, cpus: int) -> int | None:
        return settings.threads or (max(1, cpus // wanted.at_most) if device == "cpu" else None)

    metadata = job_metadata(model, 1)
    if settings.ray_address is not None:
        state_dir, token = settings.ray_state_dir or default_state_dir(), settings.ray_token_path
        with connect(settings.ray_address, state_dir=state_dir, token_path=token, metadata=metadata) as ray:
            cpus = [node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"]]
            there = choose_device(settings, Cluster(ray.cluster_resources(), cpus))
            yield there.type, threads_of(there.type, int(sum(cpus)))
        return
    here = choose_device(settings)
    threads = threads_of(here.type, cores())
    ours = settings.model_copy(update={"threads": threads})
    names = "dashboard", "dashboard_port", "keep_alive"
    mode = ray_mode(local_mode=False, **{name: getattr(settings, f"ray_{name}") for name in names})
    options = choose_head(ours, mode, wanted.at_most, here)
    assert options is not None
    with managed(options) as head, connect(head, metadata=metadata):
        if head.dashboard_url:
            note(dashboard_line(head))
        if options.stays:
            note("\n".join(stays_lines(head)))
        yield here.type, threads
