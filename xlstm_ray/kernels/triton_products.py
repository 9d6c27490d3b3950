# mypy: ignore-errors
# (Triton's language is not Python's)
"""Products of a tile whose epilogue does what else is a pass of its own, and float8 operands. Hopper GPUs.

cuBLAS has the other products: a residual sum is its beta, `x.addmm_`.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

FP8, FP8_MAX = torch.float8_e4m3fn, tl.constexpr(448.0)


@triton.jit
def _product(
    a, b, out, squares, row_scale, column_scale, M, N, K, eps,
    ADD: tl.constexpr, QUANT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    PROGRAMS: tl.constexpr,
):  # fmt: skip
    """Of a (M, K) b (N, K)^T, whose columns are g and u in turn: silu(g) u (M, N / 2). ADD: onto out (M, N).

    QUANT: a and b are float8 with scales; else rows of a are to be normed, by their sums of squares. A fixed number of
    programs walks the tiles.
    """
    rows, cols, steps = tl.cdiv(M, BM), tl.cdiv(N, BN), tl.cdiv(K, BK)
    for tile in tl.range(tl.program_id(0), rows * cols, PROGRAMS, flatten=True):
        first = tile // (GROUP * cols) * GROUP
        height = min(rows - first, GROUP)
        tm, tn = first + tile % (GROUP * cols) % height, tile % (GROUP * cols) // height
        acc = tl.zeros((BM, BN), tl.float32)
        for k in range(steps):
            acc = tl.dot(a.load([tm * BM, k * BK]), b.load([tn * BN, k * BK]).T, acc)
        row = tm * BM + tl.arange(0, BM)
        if QUANT:
            column = tn * BN + tl.arange(0, BN)
            acc *= tl.load(row_scale + row, row < M, 0.0)[:, None]
            acc *= tl.load(column_scale + column, column < N, 0.0)[None, :]
        else:
            acc *= tl.rsqrt(tl.load(squares + row, row < M, 0.0) / K + eps)[:, None]
        if ADD:
            left, right = tl.split(tl.permute(tl.reshape(acc, (BM, 2, BN // 2)), (0, 2, 1)))
            left += out.load([tm * BM, tn * BN]).to(tl.float32)
            right += out.load([tm * BM, tn * BN + BN // 2]).to(tl.float32)
            out.store([tm * BM, tn * BN], left.to(tl.bfloat16))
            out.store([tm * BM, tn * BN + BN // 2], right.to(tl.bfloat16))
        else:
            gate, up = tl.split(tl.reshape(acc, (BM, BN // 2, 2)))
            out.store([tm * BM, tn * (BN // 2)], (gate * tl.sigmoid(gate) * up).to(tl.bfloat16))


@triton.jit
def _row_squares(x, squares, D: tl.constexpr, BD: tl.constexpr):
    row, d = tl.program_id(0).to(tl.int64), tl.arange(0, BD)
    xt = tl.load(x + row * D + d, d < D, 0.0).to(tl.float32)
    tl.store(squares + row, tl.sum(xt * xt, 0))


@triton.jit
def _quantized(x, y, out, scale, eps, D: tl.constexpr, BD: tl.constexpr, ADD: tl.constexpr, NORM: tl.constexpr):
    """x += y (ADD); x in float8, scale max|x| / 448, times r = 1 / rms(x) (NORM): then it stands for the normed x."""
    row, d = tl.program_id(0).to(tl.int64), tl.arange(0, BD)
    at, ok = row * D + d, d < D
    xf = tl.load(x + at, ok, 0.0).to(tl.float32)
    if ADD:
        xf = (xf + tl.load(y + at, ok, 0.0).to(tl.float32)).to(tl.bfloat16).to(tl.float32)
        tl.store(x + at, xf.to(tl.bfloat16), ok)
    largest = tl.maximum(tl.max(tl.abs(xf), 0), 1e-12)
    factor = largest / FP8_MAX
    if NORM:
        factor *= tl.rsqrt(tl.sum(xf * xf, 0) / D + eps)
    tl.store(scale + row, factor)
    tl.store(out + at, (xf * (FP8_MAX / largest)).to(tl.float8e4nv), ok)


@cache
def _programs(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def glu(x: Tensor, up: Tensor, scales: tuple[Tensor, Tensor] | None = None, *, eps: float) -> Tensor:
    """x (M, D), up (2 F, D) with the gate's and the up projection's rows in turn -> silu(gate) up (M, F) bf16.

    x is bf16 and not normed yet; or x and up are float8 with scales (M, 1) and (1, 2 F), and x's are of the normed x.
    """
    (M, K), N = x.shape, up.shape[0]
    squares = None
    if scales is None:
        squares = torch.empty(M, dtype=torch.float32, device=x.device)
        _row_squares[(M,)](x, squares, K, triton.next_power_of_2(K), num_warps=4)
    out = torch.empty(M, N // 2, dtype=torch.bfloat16, device=x.device)
    _run(x, up, out, squares, scales, eps)
    return out


def add_product8(out: Tensor, x: tuple[Tensor, Tensor], w: tuple[Tensor, Tensor]) -> None:
    """out (M, N) bf16 += x w^T, of float8 operands as in product8: cuBLAS has no sum with float8 products."""
    _run(x[0], w[0], out, None, (x[1], w[1]), None)


def _run(
    x: Tensor, w: Tensor, out: Tensor, squares: Tensor | None, scales: tuple[Tensor, Tensor] | None, eps: float | None
) -> None:
    """eps None: onto out."""
    (M, K), N = x.shape, w.shape[0]
    BM, BN, BK = 128, 256, 64 if scales is None else 128
    a, b = TensorDescriptor.from_tensor(x, [BM, BK]), TensorDescriptor.from_tensor(w, [BN, BK])
    programs = _programs(x.device)
    _product[(programs,)](
        a, b, TensorDescriptor.from_tensor(out, [BM, BN // 2]), squares, *(scales or (None, None)), M, N, K, eps or 0.0,
        eps is None, scales is not None, BM, BN, BK, 8, programs, num_warps=8, num_stages=3,
    )  # fmt: skip


def quantized(x: Tensor, added: Tensor | None = None, *, norm_eps: float | None = None) -> tuple[Tensor, Tensor]:
    """x (M, D) bf16, plus `added` in place -> float8 (M, D), scales (M, 1). norm_eps: they stand for the normed x."""
    M, D = x.shape
    out, scale = torch.empty(M, D, dtype=FP8, device=x.device), torch.empty(M, 1, dtype=torch.float32, device=x.device)
    _quantized[(M,)](
        x, added, out, scale, norm_eps or 0.0, D, triton.next_power_of_2(D), added is not None, norm_eps is not None,
        num_warps=8 if D > 8192 else 4,
    )  # fmt: skip
    return out, scale


def quantized_rows(w: Tensor) -> tuple[Tensor, Tensor]:
    """Weights (N, K) -> float8 and a scale for each row (1, N)."""
    scale = w.float().abs().amax(1, keepdim=True).clamp(min=1e-12) / FP8_MAX.value
    return (w.float() / scale).to(FP8), scale.t().contiguous()


def product8(x: tuple[Tensor, Tensor], w: tuple[Tensor, Tensor]) -> Tensor:
    """x (M, K) with scales (M, 1), w (N, K) with scales (1, N), all float8 -> x w^T (M, N) bf16."""
    (x8, x_scale), (w8, w_scale) = x, w
    if hasattr(torch.nn.functional, "scaled_mm"):  # torch 2.13's name of it
        from torch.nn.functional import ScalingType, scaled_mm

        by_row = ScalingType.RowWise
        return scaled_mm(x8, w8.t(), x_scale, by_row, w_scale, by_row, output_dtype=torch.bfloat16, use_fast_accum=True)
    return torch._scaled_mm(x8, w8.t(), x_scale, w_scale, out_dtype=torch.bfloat16, use_fast_accum=True)
