"""Tensors between processes: sent as numpy arrays, bfloat16 as int16, few whole numbers as lists."""

import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

Wire = np.ndarray[Any, Any] | list[Any]
FEW = 64  # tokens of a step of rows; Ray packs a list of them in 2 us, an array in 13

warnings.filterwarnings("ignore", message="The given NumPy array is not writable")


def to_wire(x: Tensor) -> Wire:
    """A tensor on any device -> an array on the host, or a list."""
    if x.device.type == "cuda":
        # Through pinned memory: a copy to pageable memory blocks all other copies of the process, even while it waits.
        host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
        host.copy_(x.detach(), non_blocking=True)
        torch.cuda.current_stream(x.device).synchronize()
        x = host
    x = x.detach().cpu().contiguous()
    if x.dtype == torch.int64 and x.numel() <= FEW:
        return x.tolist()
    return x.view(torch.int16).numpy() if x.dtype == torch.bfloat16 else x.numpy()


def from_wire(array: Wire, dtype: torch.dtype) -> Tensor:
    """A tensor over the array's memory; never write to it if the array is read-only. A list is of int64."""
    if isinstance(array, list):
        return torch.tensor(array, dtype=torch.int64)
    x = torch.from_numpy(array)
    return x.view(dtype) if x.dtype == torch.int16 else x
