"""Each choice of a run, from settings and a model's configuration. Only this module chooses what was not asked for.

Only the functions that need torch import it: errors in a model's directory or the settings are reported before torch is
loaded.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from xlstm_ray import hub
from xlstm_ray.choose_stages import Asked, choose_stages, refuse_bands
from xlstm_ray.config import ModelConfig
from xlstm_ray.container import cores, share_of_cpus
from xlstm_ray.directories import default_state_dir
from xlstm_ray.errors import ConfigError, UsageError
from xlstm_ray.files import check_outputs
from xlstm_ray.kernels import CHUNKWISE_BACKENDS, Backend, chunkwise_backend
from xlstm_ray.settings import DEFAULT_BACKEND, Settings, table
from xlstm_ray.split import Reserved
from xlstm_ray.supervisor.mode import Mode, ray_mode
from xlstm_ray.supervisor.ports import is_loopback

if TYPE_CHECKING:
    import torch

    from xlstm_ray.kernels.metal import Fit
    from xlstm_ray.supervisor.start import HeadOptions

DEMO_MODEL = Path(__file__).parent / "demo"


class Address(NamedTuple):
    """The address of somebody's Ray head, and the token for it."""

    address: str
    token_path: Path | None
    state_dir: Path


class JournalFolder(NamedTuple):
    """The directory of a run's snapshots. named: its name in errors. resumes: the run continues the journal in it."""

    path: Path
    named: str
    resumes: bool


class Setup(NamedTuple):
    """The model of a run and the place of its work. settings: only for choose and plan, for choices that need torch."""

    settings: Settings
    model: Path
    config: ModelConfig
    backend: Backend
    mode: Mode
    stages: Asked
    head: Address | None  # in attached mode
    journal: JournalFolder | None

    def require_places(self) -> None:
        """Raise OutputError unless every output file may be written to its place."""
        check_outputs(self.settings.outputs(), self.settings.inputs(), overwrite=self.settings.overwrite)

    def require_weights(self) -> None:
        """Download the model's weights, if it was given by its name on the hub."""
        require_weights(self.settings)

    def device(self) -> "torch.device":
        """The device of a run in this process."""
        return choose_device(self.settings)


class Cluster(NamedTuple):
    """A cluster's total resources, and the CPUs of each node."""

    resources: Mapping[str, float]
    cpus: Sequence[float]


def setup_of(**asked: Any) -> Setup:
    """`choose_setup` for settings by name; None: not asked for."""
    return choose_setup(Settings.make(**asked))


def choose_setup(settings: Settings) -> Setup:
    """All choices that need no torch. Raises an error for what cannot work on any device."""
    model = choose_model(settings)
    config_file = model / "config.json"
    config = ModelConfig.from_file(config_file)
    backend = choose_backend(settings, config, config_file)
    mode = choose_mode(settings, backend)
    journal = choose_journal(settings)
    if settings.journal_every is not None and mode is Mode.LOCAL and journal is None:
        raise UsageError(
            f"{settings.named('journal_every')} has no effect in one process without `journal` or `resume`; "
            "leave it out"
        )
    if not settings.warmup and settings.source("warmup").kind == "flag" and not backend.compiled:
        raise UsageError(
            f"{settings.named('warmup')} has no effect: {backend.name} is not compiled; leave it out, or use another "
            "`chunkwise_backend`"
        )
    stages = choose_stages(settings, config, mode)
    refused = None
    for kind in ("cuda", "mps", "cpu") if settings.device == "auto" else (settings.device,):
        try:
            choose_sizes(settings, config, kind)
            break
        except UsageError as err:
            refused = err
    else:
        assert refused is not None
        raise refused
    head = None
    if mode is Mode.ATTACHED and settings.ray_address is not None:
        head = Address(settings.ray_address, settings.ray_token_path, settings.ray_state_dir or default_state_dir())
    return Setup(settings, model, config, backend, mode, stages, head, journal)


def choose_journal(settings: Settings) -> JournalFolder | None:
    """The journal to begin or to continue."""
    if settings.journal is not None and settings.resume is not None:
        both = f"{settings.named('journal')} and {settings.named('resume')}"
        raise UsageError(f"{both} were both given; a resumed run goes on in its own journal")
    name = "journal" if settings.journal is not None else "resume"
    path = getattr(settings, name)
    return None if path is None else JournalFolder(path, settings.named(name), settings.resume is not None)


def choose_model(settings: Settings) -> Path:
    """The directory of the requested model, or of the demo model; of a hub's model, all but its weights is there."""
    return hub.directory_of(settings.model or DEMO_MODEL)


def require_weights(settings: Settings, *, bars: bool = False) -> None:
    """Download the weights of a model that is given by its name on the hub. bars: with bars on standard error."""
    hub.require_weights(settings.model or DEMO_MODEL, bars=bars)


def choose_device(settings: Settings, cluster: Cluster | None = None) -> "torch.device":
    """The requested device, else the best one of this machine or of the cluster."""
    import torch

    if cluster is not None:
        best = next((d for d, name in (("mps", "mps"), ("cuda", "GPU")) if cluster.resources.get(name)), "cpu")
        return torch.device(best if settings.device == "auto" else settings.device)
    there = {
        "mps": torch.backends.mps.is_available(),
        "cuda": torch.cuda.is_available(),
        "cpu": True,
    }
    name: str = settings.device
    if name == "auto":
        name = next(n for n, is_there in there.items() if is_there)
    if not there[name]:
        have = ", ".join(n for n, is_there in there.items() if is_there)
        raise UsageError(f"{settings.named('device')} is {name!r}, but this machine has none; available: {have}")
    if name == "mps" and settings.enable_mps_fallback:
        raise UsageError("PYTORCH_ENABLE_MPS_FALLBACK is on, which lets operators leave the GPU silently; set it to 0")
    return torch.device(name)


def choose_backend(settings: Settings, config: ModelConfig, config_file: Path) -> Backend:
    """The requested backend, else the one of the model's configuration, else the default."""
    name = settings.chunkwise_backend
    if name is None:
        own = own_backend(config)
        name = own or DEFAULT_BACKEND
        if name not in CHUNKWISE_BACKENDS:
            known = ", ".join(CHUNKWISE_BACKENDS)
            raise ConfigError(f"{config_file}: chunkwise_kernel is {own!r}; this program has: {known}")
    elif name.removeprefix("chunkwise--") not in CHUNKWISE_BACKENDS:
        known = ", ".join(CHUNKWISE_BACKENDS)
        raise UsageError(f"{settings.named('chunkwise_backend')} is {name!r}; there are: {known}")
    return chunkwise_backend(name)


def own_backend(config: ModelConfig) -> str | None:
    """The backend that the model's configuration names; None if it is another library's."""
    own = config.chunkwise_kernel.removeprefix("chunkwise--")
    return own if own.startswith(("queued_", "ray_")) else None


def choose_mode(settings: Settings, backend: Backend) -> Mode:
    """Where the workers run. Raises UsageError for settings that have no effect there."""
    for_actors = "stages spans ray_address ray_token_path actors_per_device gpu_direct"
    if backend.executor != "ray":
        if not settings.ray_dashboard:  # with a dashboard there is a head, which has these settings
            for_actors += " ray_dashboard_port ray_keep_alive"
            for_actors += " ray_autoshutdown" * ("ray_autoshutdown" in settings.flags())  # variables are for other runs
        for_actors += " ray_local_mode" * ("ray_local_mode" in settings.flags())
        for name in for_actors.split():
            if getattr(settings, name) != table()[name].default:
                raise UsageError(
                    f"{settings.named(name)} is for the ray_ backends, and {backend.name} runs in this process; "
                    "use `chunkwise_backend=ray_compiled_chunks` or ray_compiled_steps, or leave it out"
                )
        _refuse_folders(settings, Mode.LOCAL)
        return Mode.LOCAL
    mode = ray_mode(
        local_mode=settings.ray_local_mode,
        address=settings.ray_address,
        dashboard=settings.ray_dashboard,
        dashboard_port=settings.ray_dashboard_port,
        keep_alive=settings.ray_keep_alive,
    )
    for name, needed in (("ray_token_path", Mode.ATTACHED), ("actors_per_device", None), ("gpu_direct", None)):
        if getattr(settings, name) != table()[name].default and (mode is Mode.LOCAL or needed not in (None, mode)):
            raise UsageError(f"{settings.named(name)} has no effect in {mode} mode; leave it out")
    if mode is not Mode.MANAGED and not settings.ray_autoshutdown and "ray_autoshutdown" in settings.flags():
        raise UsageError(f"{settings.named('ray_autoshutdown')} has no effect in {mode} mode; leave it out")
    _refuse_folders(settings, mode)
    if mode is not Mode.LOCAL and (settings.autoscale or settings.autoscale_again):
        raise UsageError(
            f"{settings.named('autoscale')} probes this process's device, but actors have their own; "
            "leave it out, or stay in local mode"
        )
    for name in ("workers", "streams"):
        if settings.source(name).kind == "flag" and mode is not Mode.LOCAL:
            raise UsageError(f"{settings.named(name)} is for one process, and here actors work; leave it out")
    elsewhere = mode is Mode.ATTACHED and not is_loopback(settings.ray_address or "")
    if elsewhere and settings.force and settings.source("force").kind == "flag":
        raise UsageError(
            f"{settings.named('force')} has no effect on other machines ({settings.named('ray_address')}), whose "
            "memory is not checked before a run; leave it out"
        )
    return mode


def _refuse_folders(settings: Settings, mode: Mode) -> None:
    """Refuse folders of heads that this run does not use. Variables are ignored: they are for other commands too."""
    for name, used in (("ray_state_dir", mode is not Mode.LOCAL), ("ray_temp_dir", mode is Mode.MANAGED)):
        if settings.source(name).kind == "flag" and not (used or settings.ray_dashboard):
            raise UsageError(f"{settings.named(name)} has no effect in {mode} mode; leave it out")


class RunSizes(NamedTuple):
    """Tokens of a tile and of a chunk, heads of a band."""

    tile: int
    chunk: int
    heads: int


def choose_sizes(settings: Settings, config: ModelConfig, kind: str) -> RunSizes:
    """The requested sizes, else the defaults for that kind of device."""
    chunk = settings.chunk_size or config.chunk_size
    if settings.chunk_size is None and kind == "cuda" and settings.dtype != "float32":
        # Larger chunks write fewer states: at 7B an H100 reaches 31,300, 36,400, 39,900 tokens/s with 64, 128, 256.
        # Decays are summed over a chunk in float32, so float32 runs keep the model's smaller chunk for precision.
        chunk = max(chunk, 256)
    tile = settings.tile_size
    if tile is None:
        # Long enough for efficient matrix products, short enough to stop and report within seconds: on two CPU cores,
        # 2048 tokens are 5 to 10 % faster than 512 for a small model, but would take minutes for a 7B model.
        flops = 2 * config.num_blocks * config.hidden_size * (2 * config.qk_dim + 3 * (config.v_dim + config.ffn_dim))
        on_cpu = 2048 if flops * 2048 < 2e11 else 1024 if flops * 1024 < 2e11 else 512
        tile = chunk * max(1, {"cuda": 4096, "mps": 1024, "cpu": on_cpu}[kind] // chunk)
    if tile % chunk:
        raise UsageError(
            f"{settings.named('tile_size')} is {tile}, which is not a multiple of the chunk size {chunk}; "
            f"try {-(-tile // chunk) * chunk}"
        )
    heads = settings.heads_per_band
    if heads is not None and heads > config.num_heads:
        raise UsageError(f"{settings.named('heads_per_band')} is {heads}, but the model has {config.num_heads} heads")
    if heads is None:
        heads = min(4, config.num_heads) if kind == "mps" else config.num_heads
    refuse_bands(settings, config, heads)
    return RunSizes(tile, chunk, heads)


WORTH_WIDENING = 1.1  # of bfloat16's time: less is not worth twice the memory


class Dtype(NamedTuple):
    """The dtype to compute in, and the reason if it was measured."""

    dtype: "torch.dtype"  # of the residual stream
    reason: str | None = None
    float8: bool = False  # of the large matrices

    @property
    def name(self) -> str:
        return "float8" if self.float8 else str(self.dtype).removeprefix("torch.")


def choose_dtype(
    settings: Settings, device: "torch.device", stored: "torch.dtype", fits: "Callable[[torch.dtype], bool]"
) -> Dtype:
    """The requested dtype, else bfloat16 on a GPU. On the CPU float32, but bfloat16 if the model is meant for it and it
    is as fast, or if float32 does not fit in memory."""
    import torch

    if settings.dtype == "float8":
        return Dtype(torch.bfloat16, float8=True)
    if settings.dtype != "auto":
        return Dtype(getattr(torch, settings.dtype))
    if device.type != "cpu":
        return Dtype(torch.bfloat16)
    if stored != torch.bfloat16:
        return Dtype(torch.float32)
    from xlstm_ray.runtime.products import bfloat16_cost

    cost = bfloat16_cost()
    found = f"bfloat16 products take {cost:.2g} x as long here"
    if cost < WORTH_WIDENING:
        return Dtype(torch.bfloat16, found)
    if not fits(torch.float32):
        return Dtype(torch.bfloat16, f"{found}, but float32 does not fit in memory")
    return Dtype(torch.float32, found)


def choose_streams(settings: Settings, workers: int, device: "torch.device") -> int:
    """The number of CUDA streams that the bands' threads share."""
    streams, name = settings.streams, settings.named("streams")
    if streams is None:
        return workers
    if device.type != "cuda":
        raise UsageError(f"{name} is {streams}, but torch has streams on cuda only, not on {device.type}; leave it out")
    if streams > workers:
        raise UsageError(f"{name} is {streams}, but {workers} thread(s) work on the bands; allowed: up to {workers}")
    return streams


def choose_workers(settings: Settings, config: ModelConfig, heads: int) -> int:
    """Threads that work on bands of `heads` heads: at most one for each band. Raises UsageError for a flag of more."""
    bands = -(-config.num_heads // heads)
    if settings.workers > bands and "workers" in settings.flags():
        raise UsageError(
            f"{settings.named('workers')} is {settings.workers}, but {heads} of {config.num_heads} heads a band make "
            f"{bands} band(s), each with one thread; allowed: up to {bands}, or a smaller `heads_per_band`"
        )
    return min(settings.workers, bands)


def choose_steps(
    settings: Settings, backend: Backend, config: ModelConfig, heads: int, dtype: "torch.dtype", device: "torch.device"
) -> "Fit":
    """The requested T_inner, or on mps the largest that Metal allows. Raises UsageError if a flag has no effect."""
    from xlstm_ray.kernels.metal import Fit, fit_t_inner

    if not backend.unrolls(slstm=bool(config.slstm_at)) and settings.source("t_inner").kind == "flag":
        raise UsageError(
            f"{settings.named('t_inner')} is {settings.t_inner}, but {backend.name} unrolls no steps of this model; "
            "leave it out, or use `chunkwise_backend=queued_compiled_steps`"
        )
    if device.type != "mps" or backend.kernel != "compiled_steps":
        return Fit(settings.t_inner)
    return fit_t_inner(
        settings.t_inner, batch=1, heads=heads, dhqk=config.dhqk, dhhv=config.dhhv, dtype=dtype, device=device
    )


class ActorPlan(NamedTuple):
    """The resources of each actor."""

    threads: int  # torch's own threads
    cpus: float | None  # its request to Ray; None: a CPU for each thread
    per_device: int
    gpu_direct: bool  # stages of one host pass tensors from GPU to GPU
    places: tuple[Reserved, ...] | None = None  # of each stage; None: where Ray puts it


def choose_actors(settings: Settings, device: "torch.device", actors: int, there: Sequence[float]) -> ActorPlan:
    """there: the CPUs of each node, which `actors` actors share."""
    on_cpu = device.type == "cpu"
    if settings.actors_per_device > 1 and on_cpu:
        named = settings.named("actors_per_device")
        raise UsageError(f"{named} is for GPUs, and the grid's device is the CPU, which actors share; leave it out")
    if not settings.gpu_direct and device.type != "cuda":
        raise UsageError(f"{settings.named('gpu_direct')} is for NVIDIA GPUs; the grid's device is {device.type}")
    threads, cpus = settings.threads, None
    if threads is None:
        threads = max(1, int(sum(there)) // actors) if on_cpu else 1
        if on_cpu and sum(int(n) for n in there) < actors:
            cpus = share_of_cpus(there, actors)  # actors take turns on CPUs
    return ActorPlan(threads, cpus, settings.actors_per_device, settings.gpu_direct)


def choose_head(settings: Settings, mode: Mode, actors: int, device: "torch.device") -> "HeadOptions | None":
    """Options of a head for this run (it stays if that was asked for), with CPUs for its actors; None: no head."""
    import torch

    from xlstm_ray.supervisor.start import HeadOptions

    if mode is Mode.ATTACHED or (mode is Mode.LOCAL and not settings.ray_dashboard):
        return None
    each = (settings.threads or 1) if device.type == "cpu" else 1
    return HeadOptions(
        # Ray starts a worker process for each CPU in advance. If this process does the work, none is needed.
        num_cpus=max(cores(), actors * each) if mode is Mode.MANAGED else 0,
        state_dir=settings.ray_state_dir or default_state_dir(),
        temp_dir=settings.ray_temp_dir,
        stays=settings.ray_keep_alive or not settings.ray_autoshutdown,
        dashboard=settings.ray_dashboard,
        dashboard_port=settings.ray_dashboard_port,
        resources={"mps": 1} if torch.backends.mps.is_available() else {},
    )
