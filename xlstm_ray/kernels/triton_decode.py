# mypy: ignore-errors
# (Triton's language is not Python's)
"""One token of a few rows on Hopper GPUs, in Triton: products that read each weight once, the cell's step in place.

A step is bound by the memory's bandwidth: B = 1 multiplies and adds, more rows go through the matrix units, with the
weights as the left side. Norms, SwiGLU, residual sums and the logits' cap are inside the products.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from xlstm_ray.kernels.triton_cell import PAD_I, CellShape, decay, gate_columns, log_sigmoid, soft_cap

MOST_ROWS = 64  # of a call
SPLITS = 4  # programs that share a row's sum, at most
HINT = "evict_first"  # states go by once a step, and should leave the cache to what the kernels hand over
ADDED_ROWS = 64  # columns of a program in products that end in a residual sum


class Blocks(NamedTuple):
    """Block sizes of a product: columns and terms of a program, its warps and stages, programs that share a sum."""

    BN: int
    BK: int
    warps: int
    stages: int
    split: int = 1


# The fastest at 7B's widths. Several rows: `out` has few columns, `down` long sums, and programs share them.
ONE_ROW = dict.fromkeys(("qkvo", "out", "down", "head", "gates"), Blocks(8, 512, 4, 4)) | {"up": Blocks(4, 512, 4, 4)}
ROWS = {
    "qkvo": Blocks(64, 128, 4, 4),
    "out": Blocks(64, 128, 4, 4, 2),
    "up": Blocks(64, 128, 4, 3),
    "down": Blocks(64, 128, 4, 3, 4),
    "head": Blocks(64, 128, 4, 3),
    "gates": Blocks(16, 128, 4, 4),
}


@triton.jit
def _tile(w, row, k, kk, K: tl.constexpr, BK: tl.constexpr):
    if K % BK:
        return tl.load(w + row + (k + kk)[None, :], (k + kk < K)[None, :], 0.0)
    else:
        return tl.load(w + row + (k + kk)[None, :])


@triton.jit
def _skinny(
    x, w, scale, out, residual, squares, parts, counter, B, N, LD, eps, cap,
    K: tl.constexpr, NORM: tl.constexpr, ADD: tl.constexpr, GLU: tl.constexpr, CAP: tl.constexpr, DOT: tl.constexpr,
    SCALED: tl.constexpr, SPLIT: tl.constexpr, SQUARES: tl.constexpr, PARTS: tl.constexpr,
    BP: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out (B, N), rows LD apart, = f(norm(x) w^T): x (B, K), w (N, K). The weights are the product's left side.

    NORM: rows over their root mean square. ADD: + residual. GLU: w has 2 N rows, g and u in turn, and the result is
    silu(g) u. SCALED: w is float8, with a scale a row. DOT: by the matrix units, else multiply and add (B = 1).
    squares (SQUARES, B): parts of the sums of the squares of x's rows, written with ADD and read with NORM and DOT. (To
    sum them up here as well makes Triton keep a buffer too few of x's tiles; the result is then wrong now and then.)
    SPLIT: so many programs share a row's sum; the last to come adds up their parts, always in one order, and leaves
    the counter at zero.
    """
    pn, ps = tl.program_id(0), tl.program_id(1)
    n = pn * BN + tl.arange(0, BN)
    p = tl.arange(0, BP)
    W: tl.constexpr = 2 * BN if GLU else BN
    rows = 2 * N if GLU else N
    row = tl.minimum(pn * W + tl.arange(0, W), rows - 1)
    at_row = row[:, None].to(tl.int64) * K
    kk = tl.arange(0, BK)
    RUN: tl.constexpr = ((K + BK - 1) // BK + SPLIT - 1) // SPLIT * BK
    if PDL:
        tl.extra.cuda.gdc_wait()
    if DOT:
        acc = tl.zeros((W, BP), tl.float32)
        if NORM:
            part = tl.arange(0, PARTS)[:, None]
            total = tl.load(squares + part * B + p[None, :], (p < B)[None, :] & (part < SQUARES), 0.0)
            r = tl.rsqrt(tl.sum(total, 0) / K + eps)[None, :]
        for k in tl.range(ps * RUN, min(ps * RUN + RUN, K), BK, num_stages=STAGES):
            xt = tl.load(x + p[None, :] * K + (k + kk)[:, None], (p < B)[None, :] & (k + kk < K)[:, None], 0.0)
            acc = tl.dot(_tile(w, at_row, k, kk, K, BK).to(tl.bfloat16), xt, acc)
        if NORM:
            acc *= r
    else:
        sums = tl.zeros((W, BK), tl.float32)
        squares1 = tl.zeros((BK,), tl.float32)
        for k in tl.range(ps * RUN, min(ps * RUN + RUN, K), BK, num_stages=STAGES):
            xf = tl.load(x + k + kk, k + kk < K, 0.0).to(tl.float32)
            sums += _tile(w, at_row, k, kk, K, BK).to(tl.float32) * xf[None, :]
            if NORM:
                squares1 += xf * xf
        acc = tl.sum(sums, 1)[:, None]
        if NORM:
            acc *= tl.rsqrt(tl.sum(squares1, 0) / K + eps)
    if PDL:  # not earlier: programs of the next kernel would take their places where there is room, not evenly
        tl.extra.cuda.gdc_launch_dependents()
    at = p[None, :] * N + n[:, None]
    ok = (p < B)[None, :] & (n < N)[:, None]
    if SPLIT > 1:
        tl.store(parts + ps * B * N + at, acc, ok)
        tl.debug_barrier()
        mine = tl.atomic_add(counter + pn, 1, sem="acq_rel") == SPLIT - 1
        if mine:
            acc = tl.zeros((BN, BP), tl.float32)
            for j in tl.static_range(SPLIT):
                acc += tl.load(parts + j * B * N + at, ok, 0.0, cache_modifier=".cg")
            tl.store(counter + pn, 0)
        ok &= mine
    if SCALED:
        acc *= tl.load(scale + row)[:, None]
    if GLU:
        gate, up = tl.split(tl.permute(tl.reshape(acc, (BN, 2, BP)), (0, 2, 1)))
        acc = gate * tl.sigmoid(gate) * up
    if CAP:
        acc = soft_cap(acc, cap)
    if ADD:
        acc = (acc + tl.load(residual + at, ok, 0.0).to(tl.float32)).to(out.dtype.element_ty)
        if DOT:
            # In float64 the sum of a part is exact, so it has the same bits in any order: in a stage's beginning too.
            af = tl.where(ok, acc.to(tl.float32), 0.0).to(tl.float64)
            mask = p < B
            if SPLIT > 1:
                mask &= mine
            tl.store(squares + pn * B + p, tl.sum(af * af, 0).to(tl.float32), mask)
    tl.store(out + p[None, :] * LD + n[:, None], acc.to(out.dtype.element_ty), ok)


@triton.jit
def _step(
    qkvo, bias, C_old, n_old, m_old, C_new, n_new, m_new, n_part, m_part, h, counter, out, start, end,
    eps, norm_eps, cap,
    NH: tl.constexpr, K: tl.constexpr, V: tl.constexpr, NG: tl.constexpr, LD: tl.constexpr, BV: tl.constexpr,
    HINT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One token of a row and head, BV columns of its state: read once, written once; both may be at the same place.

    qkvo (B, LD) float32, normed: q, k, v, o, then three parts of the gates, each NG wide. A row's token is there if
    start < end; else the row keeps its state. The last program of a head to come does the head norm and the output
    gate, and lets n and m move on, which the others have read by then.
    """
    bh, vb = tl.program_id(0), tl.program_id(1)
    b, head = bh // NH, bh % NH
    kk, vv = tl.arange(0, K), vb * BV + tl.arange(0, BV)
    piece = bh.to(tl.int64) * K * V + kk[:, None] * V + vv[None, :]
    if PDL:
        tl.extra.cuda.gdc_wait()
    C = tl.load(C_old + piece, eviction_policy=HINT)  # first of all: the rest is done while it is on its way
    row = qkvo + b * LD
    i = tl.load(bias + head)
    f = tl.load(bias + NH + head)
    for j in tl.static_range(3):
        i += tl.load(row + 2 * NH * (K + V) + j * NG + head)
        f += tl.load(row + 2 * NH * (K + V) + j * NG + NH + head)
    on = tl.load(start + b) < tl.load(end + b)
    i = tl.where(on, soft_cap(i, cap), PAD_I)
    logf = tl.where(on, log_sigmoid(soft_cap(f, cap)), 0.0)
    m = tl.load(m_old + bh)
    new = tl.maximum(logf + m, i)
    base, rest = decay(logf + (m - new))
    q = tl.load(row + head * K + kk) * K**-0.5
    k = tl.load(row + NH * K + head * K + kk) * tl.exp(i - new)
    n = tl.load(n_old + bh * K + kk)
    n = n * base + (n * rest + k)
    factor = 1 / (tl.maximum(tl.abs(tl.sum(q * n, 0)), tl.exp(-new)) + eps)
    if vb == 0:
        tl.store(n_part + bh * K + kk, n)
        tl.store(m_part + bh, new)
    C = C * base + (C * rest + k[:, None] * tl.load(row + 2 * NH * K + head * V + vv)[None, :])
    tl.store(C_new + piece, C, eviction_policy=HINT)
    tl.store(h + bh * V + vv, tl.sum(C * q[:, None], 0) * factor)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    tl.debug_barrier()
    if tl.atomic_add(counter + bh, 1, sem="acq_rel") == V // BV - 1:
        all_v = tl.arange(0, V)
        y = tl.load(h + bh * V + all_v, cache_modifier=".cg")
        y -= tl.sum(y, 0) / V
        y *= tl.rsqrt(tl.sum(y * y, 0) / V + norm_eps)
        o = tl.load(row + 2 * NH * K + NH * V + head * V + all_v)
        tl.store(out + bh * V + all_v, (y * tl.sigmoid(o)).to(tl.bfloat16))
        tl.store(n_new + bh * K + kk, tl.load(n_part + bh * K + kk, cache_modifier=".cg"))
        tl.store(m_new + bh, tl.load(m_part + bh, cache_modifier=".cg"))
        tl.store(counter + bh, 0)


@triton.jit
def _enter(tokens, embedding, x, squares, B, D: tl.constexpr, BD: tl.constexpr, SQUARES: tl.constexpr,
           PARTS: tl.constexpr, EMBED: tl.constexpr):  # fmt: skip
    """The rows of the tokens' embedding into x (EMBED), and the squares of x's rows, in the parts of _skinny's ADD."""
    b, d, j = tl.program_id(0), tl.arange(0, BD), tl.arange(0, PARTS)
    if EMBED:
        xt = tl.load(embedding + tl.load(tokens + b).to(tl.int64) * D + d, d < D, 0.0)
        tl.store(x + b * D + d, xt, d < D)
    else:
        xt = tl.load(x + b * D + d, d < D, 0.0)
    xf = xt.to(tl.float64)
    parts = tl.sum(tl.reshape(xf * xf, (PARTS, BD // PARTS)), 1).to(tl.float32)
    tl.store(squares + j * B + b, parts, j < SQUARES)


class Scratch:
    """What the kernels of one call leave to each other, for B rows. Several calls in one stream may share it."""

    def __init__(self, B: int, hidden: int, heads: int, V: int, device: torch.device):
        def empty(*shape: int) -> Tensor:
            return torch.empty(*shape, dtype=torch.float32, device=device)

        self.B, self.pdl = B, device.type == "cuda"
        self.squares = empty(hidden // ADDED_ROWS, B)
        self.parts = empty(SPLITS, B, hidden)
        self.counter = torch.zeros(max(hidden // ADDED_ROWS, B * heads), dtype=torch.int32, device=device)
        self.h = empty(B, heads * V)


class Rows(NamedTuple):
    """A product's weights: w (N, K) bf16; or float8 with a scale a row (1, N)."""

    w: Tensor
    scale: Tensor | None = None


def enter(x: Tensor, scratch: Scratch, tokens: Tensor | None = None, embedding: Tensor | None = None) -> None:
    """Begin a step with x (B, D), or with the embedding of tokens (B,), which is written into x."""
    (B, D), squares = x.shape, scratch.squares
    _enter[(B,)](
        tokens, embedding, x, squares, B, D, triton.next_power_of_2(D), squares.shape[0],
        triton.next_power_of_2(squares.shape[0]), tokens is not None, num_warps=4,
    )  # fmt: skip


def skinny(
    name: str, x: Tensor, rows: Rows, out: Tensor, scratch: Scratch, *, norm_eps: float | None = None, cap: float = 0.0
) -> None:
    """out (B, N) = x (B, K) by rows.w (N, K), by its name in ROWS. norm_eps: x is to be normed. cap: of the logits.

    `out` and `down` are added onto out, a residual stream; `up` has a gate's and an up projection's rows in turn.
    """
    (B, K), glu, add = x.shape, name == "up", name in ("out", "down")
    N = rows.w.shape[0] // (1 + glu)
    BN, BK, warps, stages, split = (ONE_ROW if B == 1 else ROWS)[name]
    squares = scratch.squares.shape[0]
    assert B <= MOST_ROWS
    assert not add or N % ADDED_ROWS == 0
    _skinny[(triton.cdiv(N, BN), split)](
        x, rows.w, rows.scale, out, out, scratch.squares, scratch.parts, scratch.counter, B, N, out.stride(0),
        norm_eps or 0.0, cap or 1.0,
        K, norm_eps is not None, add, glu, cap > 0, B > 1, rows.scale is not None, split, squares,
        triton.next_power_of_2(squares), max(16, triton.next_power_of_2(B)) if B > 1 else 1, BN, BK, stages,
        scratch.pdl, num_warps=warps, **_launch(scratch),
    )  # fmt: skip


def step(
    qkvo: Tensor,
    bias: Tensor,
    states: tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]],
    tokens: tuple[Tensor, Tensor],
    s: CellShape,
    scratch: Scratch,
) -> Tensor:
    """A token of each row. states: the old ones, and where the new ones are written, which may be the same.

    qkvo (B, LD) float32: normed q, k, v, o, and three parts of the gates   tokens: start and end (B,) int64, as in Step
    -> y (B, NH V) bf16: normed heads times output gates, without the head norm's weight.
    """
    (old, new), (start, end) = states, tokens
    B, NH, K, V = old[0].shape
    BV, warps = (min(32, V), 4) if B == 1 else (min(64, V), 8)
    out = torch.empty(B, NH * V, dtype=torch.bfloat16, device=qkvo.device)
    parts = torch.empty_like(old[1]), torch.empty_like(old[2])
    _step[(B * NH, V // BV)](
        qkvo, bias, *old, *new, *parts, scratch.h, scratch.counter, out, start, end, s.eps, s.norm_eps, s.cap,
        NH, K, V, gate_columns(NH), qkvo.stride(0), BV, HINT, scratch.pdl, num_warps=warps,
        **_launch(scratch),
    )  # fmt: skip
    return out


def _launch(scratch: Scratch) -> dict[str, bool]:
    return {"launch_pdl": True} if scratch.pdl else {}
