"""Where there is no GPU, the Triton kernels run on the CPU, in Triton's interpreter: conftest.py's variable says so."""

import numpy as np
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _wide(x: TensorHandle) -> np.ndarray:
    """The interpreter stores bfloat16 as plain 16-bit integers."""
    if x.dtype.scalar == tl.bfloat16:
        return (x.data.astype(np.uint32) << 16).view(np.float32)
    return x.data


_dot = InterpreterBuilder.create_dot


def _dot_of_wide(self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, d: TensorHandle, *rest: object):
    """The interpreter multiplies the bits of bfloat16, as if they were integers (Triton 3.6 to 3.9)."""
    if a.dtype.scalar == tl.bfloat16:
        return TensorHandle(np.matmul(_wide(a), _wide(b), dtype=np.float32) + d.data, d.dtype.scalar)
    return _dot(self, a, b, d, *rest)


InterpreterBuilder.create_dot = _dot_of_wide
