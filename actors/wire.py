"""Tensors between processes: on the wire one is a numpy array, bfloat16 as int16."""

# Ray sends an actor's signatures, and what they name, with every handle: a watchdog would import torch for them.
from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

Wire = np.ndarray[Any, Any]

warnings.filterwarnings("ignore", message="The given NumPy array is not writable")


def to_wire(x: Tensor) -> Wire:
    """A tensor of any device as an array on the host."""
    if x.device.type == "cuda":
        # By way of pinned memory: a copy to other memory holds up all others of the process, also while it waits.
        host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
        host.copy_(x.detach(), non_blocking=True)
        torch.cuda.current_stream(x.device).synchronize()
        x = host
    x = x.detach().cpu().contiguous()
    return x.view(torch.int16).numpy() if x.dtype == torch.bfloat16 else x.numpy()


def from_wire(array: Wire, dtype: torch.dtype) -> Tensor:
    """The tensor over the array's memory; read-only where the array is."""
    x = torch.from_numpy(array)
    return x.view(dtype) if x.dtype == torch.int16 else x
