"""What memory is in use, as the operating system and the device count it, and what of it may be used."""

import ctypes
import os
import resource
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Literal

import psutil

from xlstm_ray.errors import UsageError
from xlstm_ray.settings import MIB, Settings

if TYPE_CHECKING:
    import torch

Level = Literal["soft", "hard"]
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
    available, total = _machine_bytes()
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
        """From MiB where they are set, else from fractions of the total. Raises UsageError where soft is over hard."""

        def limit(which: str, total: int) -> int:
            mb = getattr(settings, f"mem_{which}_mb")
            return int(getattr(settings, f"mem_{which}_pct") * total) if mb is None else mb * MIB

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
    if ctypes.CDLL(None, use_errno=True).proc_pid_rusage(pid, 0, ctypes.byref(info)) != 0:
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


def _machine_bytes() -> tuple[int, int]:
    """Available and total memory of the machine, or of the container around this process where that is less."""
    machine = psutil.virtual_memory()
    available, total = machine.available, machine.total
    for limit, used in _cgroup_limits():
        if limit < total:
            available, total = min(available, max(0, limit - used)), limit
    return available, total


def _cgroup_limits() -> Iterator[tuple[int, int]]:
    """(limit, what is used of it) in bytes, of each control group around this process that says so."""
    if sys.platform != "linux":
        return
    root = Path("/sys/fs/cgroup")
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "memory":
            base, names = root / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        elif not controllers:
            base, names = root, ("memory.max", "memory.current", "inactive_file")
        else:
            continue
        # In a container the path may be that of the host, which is not there: then what is at the root counts.
        folder = base / path.lstrip("/")
        for group in [folder, *folder.parents] if folder.is_dir() else [base]:
            if not (group / names[0]).is_file():
                break
            limit = (group / names[0]).read_text().strip()
            if limit != "max":
                rows = dict(row.split() for row in (group / "memory.stat").read_text().splitlines())
                used = int((group / names[1]).read_text()) - int(rows.get(names[2], 0))  # file cache goes when needed
                yield int(limit), used


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
