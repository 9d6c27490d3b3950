"""Memory limits, and a thread that samples memory during a run."""

import threading
from collections.abc import Callable, Collection
from dataclasses import astuple, dataclass, fields
from time import time
from typing import TYPE_CHECKING, Literal, NamedTuple

from xlstm_ray.csvlog import CsvLog
from xlstm_ray.errors import UsageError
from xlstm_ray.files import MIB
from xlstm_ray.memory.sample import Sample, empty_cache, take_sample

if TYPE_CHECKING:
    import torch


Level = Literal["soft", "hard"]
LEVELS: tuple[Level | None, ...] = None, "soft", "hard"

LOG_COLUMNS = *(f.name for f in fields(Sample)), "level", "who"


class Limit(NamedTuple):
    """A requested limit: in MiB, else a share of the memory. name: its name in errors."""

    mb: int | None
    share: float
    name: str

    def bytes_of(self, total: int) -> int:
        return int(self.share * total) if self.mb is None else self.mb * MIB


@dataclass(frozen=True)
class Limits:
    """Soft and hard limits in bytes: for a process, and for a device with its own memory (else None)."""

    soft: int
    hard: int
    device_soft: int | None = None
    device_hard: int | None = None

    @classmethod
    def make(
        cls, soft: Limit, hard: Limit, soft_asked: bool, total_bytes: int, device_total_bytes: int | None = None
    ) -> "Limits":
        """The limits for this much memory. Raises UsageError if the soft limit is over the hard one.

        A soft limit that was not given keeps its distance from a lower hard limit.
        """

        def both(total: int) -> tuple[int, int]:
            low, high = soft.bytes_of(total), hard.bytes_of(total)
            if not soft_asked:
                low = min(low, int(high * soft.share / max(hard.share, soft.share)))
            if low > high:
                raise UsageError(
                    f"the soft limit of memory ({soft.name}: {low / MIB:,.0f} MiB) is over the "
                    f"hard one ({hard.name}: {high / MIB:,.0f} MiB); give a smaller soft limit"
                )
            return low, high

        return cls(*both(total_bytes), *(both(device_total_bytes) if device_total_bytes is not None else ()))

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


class Seen(NamedTuple):
    """A sample of a process, or of all actors of a node together. at: when it was taken, in seconds since 1970."""

    who: str
    at: float
    sample: Sample
    level: Level | None


def log_sample(log: CsvLog, seen: Seen) -> None:
    """Write a row with LOG_COLUMNS."""
    log.row(*astuple(seen.sample), seen.level or "", seen.who, at=seen.at)


class Event(NamedTuple):
    """An actor, or all actors of a node together, went over a limit."""

    who: str
    level: Level
    sample: Sample
    limits: Limits
    container: bool = False  # the node's container went over it, with everything that runs there

    @property
    def excess(self) -> int:
        """Bytes over the hard limit."""
        host = self.sample.process_bytes - self.limits.hard
        return max(host, self.sample.device_driver_bytes - (self.limits.device_hard or 0)) if host <= 0 else host

    @property
    def text(self) -> str:
        """The numbers as a line for people."""
        own = self.limits.device_hard if self.level == "hard" else self.limits.device_soft
        used, limit, where = (
            self.sample.process_bytes,
            self.limits.hard if self.level == "hard" else self.limits.soft,
            "",
        )
        if used <= limit and own is not None:
            used, limit, where = self.sample.device_driver_bytes, own, " on the device"
        return (
            f"memory: {self.who}: {used / MIB:,.0f} MiB{where}, over the {self.level} limit of {limit / MIB:,.0f} MiB "
            f"({self.sample.available_bytes / MIB:,.0f} of that node's {self.sample.total_bytes / MIB:,.0f} MiB are "
            "available)"
        )


class MemoryWatchdog:
    """Samples memory on a thread while a `with` block runs. The run calls `check` at tile boundaries.

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
        self._lock, self._end = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._watch, name="memory watchdog", daemon=True)
        self._worst: tuple[int, Sample] | None = None  # since the last check
        self._warned = False

    def __enter__(self) -> "MemoryWatchdog":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def check(self) -> tuple[Level | None, Sample]:
        """The worst level since the last check, and its sample. Does the actions of a soft limit before it returns."""
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
        """A line for people with the numbers of a sample that is over a limit."""
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
        with self._lock:  # both threads write the log: its rows stay in order of time
            sample = take_sample(self._device)
            level = self.limits.exceeded(sample)
            found = LEVELS.index(level), sample
            if self._worst is None or (found[0], sample.process_bytes) > (self._worst[0], self._worst[1].process_bytes):
                self._worst = found
            if self._log is not None:
                log_sample(self._log, Seen("this process", time(), sample, level))
