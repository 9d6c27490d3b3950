"""What memory is in use, as the operating system and the device count it."""

import resource
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


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
