"""Memory in use, as the operating system and the device count it."""

import ctypes
import os
import resource
import sys
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING

import psutil

from xlstm_ray.container import machine_bytes

if TYPE_CHECKING:
    import torch


_LIBC = ctypes.CDLL(None, use_errno=True)
_START = perf_counter()


@dataclass(frozen=True)
class Sample:
    """Memory in use at one moment, in bytes.

    process_bytes: the process as the system counts it (`process_bytes`). device_allocated_bytes: its tensors on the
    device; device_driver_bytes: what the driver holds there, cache included; on the CPU both are 0. available_bytes,
    total_bytes: of the machine, or of the container that bounds it.
    """

    seconds: float  # since this module was imported
    process_bytes: int
    device_allocated_bytes: int
    device_driver_bytes: int
    available_bytes: int
    total_bytes: int


def take_sample(device: "torch.device | None" = None, pid: int | None = None) -> Sample:
    """One sample of this process, or of process `pid` (then without figures of a device).

    Raises psutil.NoSuchProcess if that process has ended.
    """
    allocated = driver = 0
    if pid in (None, os.getpid()) and device is not None:
        allocated, driver = _device_bytes(device)
    available, total = machine_bytes()
    return Sample(perf_counter() - _START, process_bytes(pid), allocated, driver, available, total)


def process_bytes(pid: int | None = None) -> int:
    """The memory of a process as its system counts it when memory runs out.

    macOS: the physical footprint, which includes the GPU's share and compressed pages; the resident size has neither.
    Linux: the resident size with shared and file pages, as the out-of-memory killer and the peak count. The
    proportional size would be fairer for shared pages, but needs a walk over all pages.
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
    """Bytes of this process's tensors on the device, and bytes that the driver holds for it."""
    import torch

    if device.type == "mps":
        return torch.mps.current_allocated_memory(), torch.mps.driver_allocated_memory()
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
    return 0, 0


def device_total_bytes(device: "torch.device") -> int | None:
    """The device's own memory in bytes; None on the CPU and for unified memory."""
    import torch

    return torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else None


def peak_process_bytes() -> int:
    """The largest resident size of this process so far, in bytes."""
    if sys.platform == "linux":
        # ru_maxrss survives exec: a small program that a large one starts would report the large one's peak.
        with open("/proc/self/status") as status:
            (peak,) = (line.split()[1] for line in status if line.startswith("VmHWM:"))
        return int(peak) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, other systems KiB


def peak_device_bytes(device: "torch.device") -> int:
    """The peak of the memory that matters for `device`, in bytes.

    cuda: the allocator's peak. mps: what the driver holds for this process, in addition to the process's own memory.
    cpu: the process's largest resident size.
    """
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    return peak_process_bytes()


def empty_cache(device: "torch.device | None") -> None:
    """Free what the device's allocator keeps for later; on the CPU, what the C library keeps."""
    import torch

    if device is not None and device.type == "mps":
        torch.mps.empty_cache()
    elif device is not None and device.type == "cuda":
        torch.cuda.empty_cache()
    else:
        trim()


def trim() -> None:
    """Give back what the C library keeps of freed memory, where it is glibc."""
    if hasattr(_LIBC, "malloc_trim"):
        _LIBC.malloc_trim(0)
