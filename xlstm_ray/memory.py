"""What memory is in use, as the operating system and the device count it, and what of it may be used."""

import ctypes
import os
import resource
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import astuple, dataclass, fields
from math import prod
from threading import Event, Lock, Thread
from time import perf_counter
from typing import TYPE_CHECKING, Literal

import psutil

from xlstm_ray.config import ModelConfig
from xlstm_ray.container import machine_bytes
from xlstm_ray.csvlog import CsvLog
from xlstm_ray.errors import UsageError
from xlstm_ray.settings import MIB, Settings

if TYPE_CHECKING:
    import torch

Level = Literal["soft", "hard"]
LEVELS: tuple[Level | None, ...] = None, "soft", "hard"
# glibc keeps freed blocks of up to 32 MiB, and where bands have threads, in a pool of each thread: measured on Linux,
# peaks are then 1.9 to 2.7 times what is alive.
KEPT_BY_THREADS = 2.2
WIDENED_HEAD = 2 * MIB  # the part of a bfloat16 head that is in float32 while it is multiplied
COMPILED_CODE = 60 * MIB  # what compiling leaves behind, beyond the compiler's own modules
_LIBC = ctypes.CDLL(None, use_errno=True)
_START = perf_counter()


@dataclass(frozen=True)
class Sample:
    """What is in use at one moment, in bytes.

    process_bytes: the process as the system counts it (`process_bytes`). device_allocated_bytes: its tensors on the
    device; device_driver_bytes: what is held for them there, cache included; on the CPU both are 0. available_bytes,
    total_bytes: of the machine, or of the container that bounds it.
    """

    seconds: float  # since this module was imported
    process_bytes: int
    device_allocated_bytes: int
    device_driver_bytes: int
    available_bytes: int
    total_bytes: int


def take_sample(device: "torch.device | None" = None, pid: int | None = None) -> Sample:
    """One sample of this process, or of process `pid`, of whose share of a device torch here knows nothing.

    Raises psutil.NoSuchProcess where there is no such process any more.
    """
    allocated = driver = 0
    if pid in (None, os.getpid()) and device is not None:
        allocated, driver = _device_bytes(device)
    available, total = machine_bytes()
    return Sample(perf_counter() - _START, process_bytes(pid), allocated, driver, available, total)


@dataclass(frozen=True)
class Limits:
    """Soft and hard limits in bytes: of a process, and of a device that has memory of its own (else None)."""

    soft: int
    hard: int
    device_soft: int | None = None
    device_hard: int | None = None

    @classmethod
    def make(cls, settings: Settings, total_bytes: int, device_total_bytes: int | None = None) -> "Limits":
        """From MiB where they are set, else from fractions of the total. Raises UsageError where soft is over hard.

        A soft limit that nobody asked for keeps its distance from a lower hard one.
        """
        soft_asked = any(settings.source(f"mem_soft_{of}").kind != "default" for of in ("mb", "pct"))

        def limit(which: str, total: int) -> int:
            mb = getattr(settings, f"mem_{which}_mb")
            value = int(getattr(settings, f"mem_{which}_pct") * total) if mb is None else mb * MIB
            if which == "soft" and not soft_asked:
                hard = limit("hard", total)
                return min(value, int(hard * settings.mem_soft_pct / max(settings.mem_hard_pct, settings.mem_soft_pct)))
            return value

        def named(which: str) -> str:
            of = "pct" if getattr(settings, f"mem_{which}_mb") is None else "mb"
            return f"{settings.named(f'mem_{which}_{of}')} {getattr(settings, f'mem_{which}_{of}')}"

        for total in (total_bytes, device_total_bytes):
            if total is not None and limit("soft", total) > limit("hard", total):
                raise UsageError(
                    f"the soft limit of memory ({named('soft')}: {limit('soft', total) / MIB:,.0f} MiB) is over the "
                    f"hard one ({named('hard')}: {limit('hard', total) / MIB:,.0f} MiB); give a smaller soft limit"
                )
        own = [None if device_total_bytes is None else limit(which, device_total_bytes) for which in ("soft", "hard")]
        return cls(limit("soft", total_bytes), limit("hard", total_bytes), *own)

    def exceeded(self, sample: Sample) -> Level | None:
        """The limit that the sample is over, or None."""
        checks: list[tuple[Level, int, int | None]] = [
            ("hard", self.hard, self.device_hard),
            ("soft", self.soft, self.device_soft),
        ]
        for level, process, device in checks:
            if sample.process_bytes > process or (device is not None and sample.device_driver_bytes > device):
                return level
        return None


def process_bytes(pid: int | None = None) -> int:
    """What the process uses as its system counts it when memory runs out.

    macOS: the physical footprint, which has the GPU's share and compressed pages; the resident size has neither.
    Linux: the resident size with its shared and file pages, which is what the out-of-memory killer counts and what the
    peak is kept of; the proportional size would be fairer to sharers, but takes a walk over all pages.
    """
    if sys.platform == "darwin":
        return _footprint(os.getpid() if pid is None else pid)
    return psutil.Process(pid).memory_info().rss


class _RusageInfo(ctypes.Structure):
    """struct rusage_info_v0 of <sys/resource.h> on macOS."""

    _fields_ = [
        ("ri_uuid", ctypes.c_uint8 * 16),
        ("ri_user_time", ctypes.c_uint64),
        ("ri_system_time", ctypes.c_uint64),
        ("ri_pkg_idle_wkups", ctypes.c_uint64),
        ("ri_interrupt_wkups", ctypes.c_uint64),
        ("ri_pageins", ctypes.c_uint64),
        ("ri_wired_size", ctypes.c_uint64),
        ("ri_resident_size", ctypes.c_uint64),
        ("ri_phys_footprint", ctypes.c_uint64),
        ("ri_proc_start_abstime", ctypes.c_uint64),
        ("ri_proc_exit_abstime", ctypes.c_uint64),
    ]


def _footprint(pid: int) -> int:
    info = _RusageInfo()
    if _LIBC.proc_pid_rusage(pid, 0, ctypes.byref(info)) != 0:
        if not psutil.pid_exists(pid):
            raise psutil.NoSuchProcess(pid)
        raise psutil.AccessDenied(pid, msg=f"proc_pid_rusage: {os.strerror(ctypes.get_errno())}")
    return info.ri_phys_footprint


def _device_bytes(device: "torch.device") -> tuple[int, int]:
    """What this process's tensors take on the device, and what is held for them."""
    import torch

    if device.type == "mps":
        return torch.mps.current_allocated_memory(), torch.mps.driver_allocated_memory()
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
    return 0, 0


def device_total_bytes(device: "torch.device") -> int | None:
    """The memory that the device has of its own; None on the CPU and where memory is unified."""
    import torch

    return torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else None


def peak_process_bytes() -> int:
    """The largest resident size this process has had, in bytes."""
    if sys.platform == "linux":
        # ru_maxrss survives exec: a small program started by a large one would report the large one's.
        with open("/proc/self/status") as status:
            (peak,) = (line.split()[1] for line in status if line.startswith("VmHWM:"))
        return int(peak) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, other systems KiB


def peak_device_bytes(device: "torch.device") -> int:
    """The largest use of memory of the kind that matters for `device`, in bytes.

    cuda: the allocator's peak. mps: what the driver holds for this process, on unified memory beside the process's own.
    cpu: the process's largest resident size.
    """
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    return peak_process_bytes()


LOG_COLUMNS = *(f.name for f in fields(Sample)), "level"


# -- the watchdog ------------------------------------------------------------------------------------------------------
class Watchdog:
    """Samples memory on a thread while a block runs. The run asks `check` at its tile boundaries, where it can act.

    actions: what a soft limit does here, "warn" (through `warn`) and "empty_cache". log: takes a row a
    sample, LOG_COLUMNS.
    """

    def __init__(
        self,
        limits: Limits,
        *,
        device: "torch.device | None",
        poll_s: float,
        actions: Collection[str] = (),
        warn: Callable[[str], None] = lambda text: None,
        log: CsvLog | None = None,
    ):
        self.limits, self._device, self._poll_s, self._log = limits, device, poll_s, log
        self._actions, self._warn = actions, warn
        self._lock, self._end = Lock(), Event()
        self._thread = Thread(target=self._watch, name="memory watchdog", daemon=True)
        self._worst: tuple[int, Sample] | None = None  # since the last check
        self._warned = False
        self.peak_bytes = 0  # of process_bytes

    def __enter__(self) -> "Watchdog":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def check(self) -> tuple[Level | None, Sample]:
        """The worst level since the last check and its sample; what a soft limit does is done before it returns."""
        self._sample()
        with self._lock:
            assert self._worst is not None
            (rank, sample), self._worst = self._worst, None
        level = LEVELS[rank]
        if level is None:
            self._warned = False
        elif level == "soft":
            if "warn" in self._actions and not self._warned:
                self._warn(self.text(level, sample))
                self._warned = True
            if "empty_cache" in self._actions:
                empty_cache(self._device)
        return level, sample

    def text(self, level: Level, sample: Sample) -> str:
        """The numbers of a sample that is over a limit."""
        hard = level == "hard"
        limit, own = (
            (self.limits.hard, self.limits.device_hard) if hard else (self.limits.soft, self.limits.device_soft)
        )
        over, used = "this process uses", sample.process_bytes
        if used <= limit and own is not None:
            over, used, limit = "this process holds on the device", sample.device_driver_bytes, own
        over = f"{over} {used / MIB:,.0f} MiB, over the {level} limit of {limit / MIB:,.0f}"
        return (
            f"memory: {over} MiB ({sample.available_bytes / MIB:,.0f} of the machine's "
            f"{sample.total_bytes / MIB:,.0f} MiB are available)"
        )

    def _watch(self) -> None:
        while not self._end.wait(self._poll_s):
            self._sample()

    def _sample(self) -> None:
        with self._lock:  # of both threads, rows of the log are in the order of time
            sample = take_sample(self._device)
            level = self.limits.exceeded(sample)
            found = LEVELS.index(level), sample
            if self._worst is None or (found[0], sample.process_bytes) > (self._worst[0], self._worst[1].process_bytes):
                self._worst = found
            self.peak_bytes = max(self.peak_bytes, sample.process_bytes)
            if self._log is not None:
                self._log.row(*astuple(sample), level or "")


def empty_cache(device: "torch.device | None") -> None:
    """Give back what the device's allocator keeps for later; on the CPU, what the C library keeps."""
    import torch

    if device is not None and device.type == "mps":
        torch.mps.empty_cache()
    elif device is not None and device.type == "cuda":
        torch.cuda.empty_cache()
    elif hasattr(_LIBC, "malloc_trim"):
        _LIBC.malloc_trim(0)


# -- what a run will need ----------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Need:
    """The most memory that a run takes, in bytes, computed before it starts. The prompt's length is no part of it."""

    base: int  # interpreter, torch and compiler
    weights: int
    state: int
    tile: int  # activations of a tile

    @property
    def total(self) -> int:
        return self.base + self.weights + self.state + self.tile

    def __str__(self) -> str:
        parts = {"program": self.base, "weights": self.weights, "state": self.state, "a tile's activations": self.tile}
        sums = " + ".join(f"{name} {size / MIB:,.0f}" for name, size in parts.items())
        return f"{sums} = {self.total / MIB:,.0f} MiB"


def activation_bytes(
    config: ModelConfig, *, batch: int, tile: int, chunk: int, heads_per_band: int, workers: int, itemsize: int
) -> int:
    """The most that is alive at once while a tile of `tile` tokens, `batch` rows, goes through a block.

    itemsize: bytes of an element of the model's dtype. The residual stream twice, and the larger of two moments: the
    feed-forward has its gate, up and activated columns; the mLSTM has q, k, v, o, ordered copies of q, k, v and
    weighted k, the state's change in each chunk twice and the state before it (float32), the scores and two outputs.
    """
    D, qk, v = config.hidden_size, config.qk_dim, config.v_dim
    bands = -(-config.num_heads // heads_per_band)
    at_once = min(workers, bands) / bands  # this share of the columns
    residual = 2 * D * itemsize + (bands * D * itemsize if bands > 1 else 0)  # beside it every band's share of the sum
    feed = 3 * config.ffn_dim * itemsize
    states = 3 * config.num_heads * config.dhqk * config.dhhv * 4 / chunk
    scores = config.num_heads * chunk * (4 + itemsize)
    mix = (2 * (qk + v) + 3 * qk + v) * itemsize + states + scores + 2 * v * 4
    return int(batch * tile * (residual + at_once * max(feed, mix)))


def computed_need(
    config: ModelConfig,
    *,
    device_type: str,
    compiled: bool,
    base: int,
    weights: int,
    largest_tensor: int,
    batch: int,
    rows: int,
    tile: int,
    chunk: int,
    heads_per_band: int,
    workers: int,
    itemsize: int,
) -> Need:
    """The need of a run in this process; base: what the process takes before anything is loaded. All in bytes.

    batch: prompts; rows: of them in one call, of `tile` tokens each.
    On cuda it is the device's memory that is meant, and base its context.
    """
    row = state_bytes(config) + config.vocab_size * 4  # with its logits
    state = 2 * rows * row  # of now, and as it is handed over
    if batch > rows and device_type != "cuda":  # there they are the host's
        state += batch * row
    tile_bytes = activation_bytes(
        config,
        batch=rows,
        tile=tile,
        chunk=chunk,
        heads_per_band=heads_per_band,
        workers=workers,
        itemsize=itemsize,
    )
    if itemsize == 2 and device_type != "cuda":
        tile_bytes = max(tile_bytes, WIDENED_HEAD)
    if device_type == "cpu" and workers > 1:
        tile_bytes = int(tile_bytes * KEPT_BY_THREADS)
    base += COMPILED_CODE if compiled else 0
    # A tensor is read through a mapping of its file, which counts until it is copied; no tile is alive then.
    return Need(base, weights, state, max(tile_bytes, largest_tensor if device_type != "cuda" else 0))


# What Ray takes beside the work, in proportional set sizes of Ray 2.60 on Linux, rounded up: RUNBOOK
# has them by process. A program is interpreter, torch, Ray and the compiler with what it leaves behind.
HEAD = 330 * MIB
DASHBOARD = 300 * MIB
WATCHDOG = 190 * MIB
RAY_IN_DRIVER = 60 * MIB
ACTOR = 350 * MIB


def advice(ways: Mapping[str, int], excess: int) -> str:
    """What to do about so many bytes too much.

    ways: what can be done, and the bytes that it saves at most. Those are named that are enough, or else all together
    where that is, or else that none is.
    """
    enough = [way for way, saved in ways.items() if saved >= excess]
    if enough:
        return ", or ".join(enough)
    some = {way: saved for way, saved in ways.items() if saved > 0}
    if sum(some.values()) >= excess:
        return " and ".join(some)
    return "no smaller tile, batch or dtype is enough for that: take a machine with more memory"


@dataclass(frozen=True)
class GridNeed:
    """The most memory that a grid takes on the one machine that has all of it, in bytes, computed before it starts."""

    head: int  # 0 where it is there already
    driver: int
    actors: int  # how many
    programs: int  # theirs
    weights: int
    state: int
    tiles: int  # activations
    watchdog: int
    store: int  # what of Ray's object store is used

    @property
    def total(self) -> int:
        parts = self.head, self.driver, self.programs, self.weights, self.state, self.tiles, self.watchdog, self.store
        return sum(parts)

    def __str__(self) -> str:
        parts = {
            "Ray's head": self.head,
            "this program": self.driver,
            f"{self.actors} actor(s)' programs": self.programs,
            "weights": self.weights,
            "state": self.state,
            "tiles' activations": self.tiles,
            "watchdog": self.watchdog,
            "object store": self.store,
        }
        sums = " + ".join(f"{name} {size / MIB:,.0f}" for name, size in parts.items() if size)
        return f"{sums} = {self.total / MIB:,.0f} MiB"


def store_bytes(config: ModelConfig, *, stages: int, bands: int, batch: int, tile: int, itemsize: int) -> int:
    """What a grid has in the object store at once: states as they are handed over, and the tiles under way.

    A tile is a residual stream a stage; with several bands every band's partial sums of two halves of a block too.
    """
    stream = batch * tile * config.hidden_size * itemsize
    each = 2 if bands == 1 else 1 + 4 * bands
    return 2 * batch * state_bytes(config) + 2 * (stages + 1) * each * stream


def state_bytes(config: ModelConfig) -> int:
    """A row's recurrent state of all blocks, float32."""
    shapes = [config.state_shapes(n, config.num_heads) for n in range(config.num_blocks)]
    return sum(prod(shape) for block in shapes for shape in block.values()) * 4
