# mypy: ignore-errors
# (Triton's language is not Python's)
"""The mLSTM over a tile of tokens on Hopper GPUs, in Triton: gates, and chunkwise.py's closed form in four kernels.

(a) scan of the gates, and keys weighted once; (b) the state through all chunks, in registers; (c) the weights P of a
chunk's own tokens; (d) h = factor (old q C + P v), with the head norm and the output gate. With u = i - b,
b = cumsum(log f), a row's stabiliser is b + max(m, running maximum of u): known beforehand, so nothing is rescaled.

A norm before a product is a factor r of each row (its weight is folded into the product's weights): r is found with the
gates and applied by the kernels that read the product. M = B T rows.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from xlstm_ray.kernels.native import State

PAD_I = tl.constexpr(-1e4)  # as in native.py; a padded token's log forget gate is 0
NEAR_1 = tl.constexpr(-1 / 128)  # as in native.py
# A layer-normed head times a sigmoid is at most sqrt(V), 22.6 for V = 512: its float8 scale needs no row's maximum.
HEAD_SCALE = tl.constexpr(16.0)


class CellShape(NamedTuple):
    """The sizes of a band's cell: D, heads, DHQK, DHHV, tokens of a chunk; epsilons and the cap of the gates."""

    hidden: int
    heads: int
    K: int
    V: int
    chunk: int
    eps: float
    norm_eps: float
    cap: float


@triton.jit
def log_sigmoid(f):
    x = tl.exp(-tl.abs(f))
    u = 1 + x  # log1p(x) = log(u) x / (u - 1), u as rounded: as in native.py
    d = u - 1
    return tl.minimum(f, 0.0) - tl.where(d == 0, x, tl.log(u) * (x / tl.where(d == 0, 1.0, d)))


@triton.jit
def soft_cap(x, cap):
    return cap - 2 * cap / (tl.exp(2 * x / cap) + 1)


@triton.jit
def decay(d):
    """exp(d) as base + rest for old base + (old rest + new), d up to 0: `decayed` of native.py."""
    x = tl.maximum(d, NEAR_1)
    near = d > NEAR_1
    return tl.where(near, 1.0, 0.0), tl.where(near, ((x / 6 + 0.5) * x + 1) * x, tl.exp(d))


@triton.jit
def _max(a, b):
    return tl.maximum(a, b)


@triton.jit
def _gate_parts(
    x, w3, parts, squares, M,
    D: tl.constexpr, NG: tl.constexpr, SPLIT: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A part of x w^T for the gates, parts (SPLIT, NG, M), and of each row's sum of squares (SPLIT, M).

    x is bfloat16 and w3 three bfloat16 matrices that add up to the float32 weights, so all products are exact. The sum
    over D is split over programs, or a tile of 4096 rows would keep half of the chip idle.
    """
    rows, part = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1)
    gate, kk = tl.arange(0, NG), tl.arange(0, BK)
    acc = tl.zeros((BM, NG), tl.float32)
    sums = tl.zeros((BM,), tl.float32)
    for k in tl.range(part * (D // SPLIT), (part + 1) * (D // SPLIT), BK, num_stages=STAGES):
        xt = tl.load(x + rows[:, None].to(tl.int64) * D + (k + kk)[None, :])
        # A sum of its own in each step, not one that runs on: xt is read twice, and for such a tile Triton 3.6 to 3.9
        # keep a buffer too few for a product that is still under way when the tile after next arrives.
        step = tl.zeros((BM, NG), tl.float32)
        for j in tl.static_range(3):
            step = tl.dot(xt, tl.load(w3 + j * NG * D + gate[None, :] * D + (k + kk)[:, None]), step)
        acc += step
        xf = xt.to(tl.float32)
        sums += tl.sum(xf * xf, 1)
    tl.store(parts + (part * NG + gate)[None, :].to(tl.int64) * M + rows[:, None], acc)
    tl.store(squares + part * M + rows, sums)


@triton.jit
def _scan_gates(
    parts, squares, bias, start, end, qkvo, r_out, u_out, b_out, peak_out, g_out, top_out, keys, dn, M, T, eps, cap,
    D: tl.constexpr, NG: tl.constexpr, NH: tl.constexpr, K: tl.constexpr, V: tl.constexpr, SPLIT: tl.constexpr,
    L: tl.constexpr, R: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """A chunk of one head: i, log f, b = cumsum(log f), u = i - b, the running maximum of u; g = b_L, top = g + max u.

    keys (B NH T, K) = k exp(u + g - top): what the chunk's tokens add to the state, but for one factor a chunk; dn
    (B NH, NC, K) is their sum. R: q, k and v are not normed yet; keys then has the r of k and that of v.
    """
    bh, c, NC = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    batch, head = bh // NH, bh % NH
    t = c * L + tl.arange(0, L)
    row = batch * T + t
    total = tl.zeros((L,), tl.float32)
    i = tl.zeros((L,), tl.float32)
    f = tl.zeros((L,), tl.float32)
    for j in tl.static_range(SPLIT):
        total += tl.load(squares + j * M + row)
        i += tl.load(parts + (j * NG + head).to(tl.int64) * M + row)
        f += tl.load(parts + (j * NG + NH + head).to(tl.int64) * M + row)
    r = tl.rsqrt(total / D + eps)
    token = (t >= tl.load(start + batch)) & (t < tl.load(end + batch))
    i = tl.where(token, soft_cap(i * r + tl.load(bias + head), cap), PAD_I)
    logf = tl.where(token, log_sigmoid(soft_cap(f * r + tl.load(bias + NH + head), cap)), 0.0)
    b = tl.cumsum(logf, 0)
    u = i - b
    g = tl.sum(tl.where(tl.arange(0, L) == L - 1, b, 0.0), 0)
    top = g + tl.max(u, 0)
    at = bh.to(tl.int64) * T + t
    tl.store(u_out + at, u)
    tl.store(b_out + at, b)
    tl.store(peak_out + at, tl.associative_scan(u, 0, _max))
    tl.store(g_out + bh * NC + c, g)
    tl.store(top_out + bh * NC + c, top)
    if head == 0:
        tl.store(r_out + row, r)
    weight = tl.exp(u + (g - top))
    if R:
        weight *= r
    from_row = qkvo + row[:, None].to(tl.int64) * (2 * NH * (K + V)) + NH * K + head * K
    for s in tl.range(0, K, BK):
        kk = s + tl.arange(0, BK)
        k = tl.load(from_row + kk[None, :]).to(tl.float32) * weight[:, None]
        tl.store(dn + (bh * NC + c) * K + kk, tl.sum(k, 0))
        if R:
            k *= r[:, None]
        tl.store(keys + at[:, None] * K + kk[None, :], k.to(tl.bfloat16))


@triton.jit
def _place(places, n: tl.constexpr):
    return tl.multiple_of(tl.load(places + n).to(tl.pointer_type(tl.float32)), 16)


@triton.jit
def _chunk_states(
    keys, qkvo, dn, g, top, places, C_old, n_old, m_old, C_new, n_new, m_new, Cs, ns, ms, T, NC,
    NH: tl.constexpr, K: tl.constexpr, V: tl.constexpr, L: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, BT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A (BK, BV) piece of a head's state through all chunks of the tile, in float32 registers.

    Cs (B NH, NC, K, V) bf16, ns (B NH, NC, K), ms (B NH, NC): the state before every chunk. One loop over all steps of
    all chunks, so that the loads run on across a chunk's end. places, unless None: the addresses of the six tensors of
    the old and the new state, in place of these.
    """
    if places is not None:
        C_old, n_old, m_old = _place(places, 0), _place(places, 1), _place(places, 2)
        C_new, n_new, m_new = _place(places, 3), _place(places, 4), _place(places, 5)
    kb, vb, bh = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    head, row0 = bh % NH, (bh // NH) * T
    STEPS: tl.constexpr = L // BT
    kk, vv = kb * BK + tl.arange(0, BK), vb * BV + tl.arange(0, BV)
    piece = kk[:, None] * V + vv[None, :]
    C = tl.load(C_old + bh.to(tl.int64) * K * V + piece)
    n = tl.load(n_old + bh * K + kk)
    new = tl.load(m_old + bh)
    dC = tl.zeros((BK, BV), tl.float32)
    base = 1.0
    rest = 0.0
    add = 0.0
    next_g, next_top, next_dn = tl.load(g + bh * NC), tl.load(top + bh * NC), tl.load(dn + bh * NC * K + kk)
    for j in tl.range(NC * STEPS, num_stages=STAGES):
        if j % STEPS == 0:
            c = j // STEPS
            C = C * base + (C * rest + dC * add)
            dC = tl.zeros((BK, BV), tl.float32)
            tl.store(Cs + (bh * NC + c).to(tl.int64) * K * V + piece, C.to(tl.bfloat16))
            m = new
            new = tl.maximum(next_g + m, next_top)
            base, rest = decay(next_g + (m - new))
            add = tl.exp(next_top - new)
            if vb == 0:
                tl.store(ns + (bh * NC + c) * K + kk, n)
                n = n * base + (n * rest + next_dn * add)
                if kb == 0:
                    tl.store(ms + bh * NC + c, m)
            ahead = bh * NC + tl.minimum(c + 1, NC - 1)
            next_g, next_top, next_dn = tl.load(g + ahead), tl.load(top + ahead), tl.load(dn + ahead * K + kk)
        k = keys.load([bh * T + j * BT, kb * BK])
        v = qkvo.load([row0 + j * BT, 2 * NH * K + head * V + vb * BV])
        dC = tl.dot(k.T, v, dC)
    tl.store(C_new + bh.to(tl.int64) * K * V + piece, C * base + (C * rest + dC * add))
    if vb == 0:
        tl.store(n_new + bh * K + kk, n)
        if kb == 0:
            tl.store(m_new + bh, new)


@triton.jit
def _chunk_scores(
    q_rows, k_rows, r, u, b, peak, ns, ms, P, old_out, factor_out, T, NC, eps,
    NH: tl.constexpr, K: tl.constexpr, V: tl.constexpr, L: tl.constexpr, R: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """P (B NH T, L) bf16: the weights of a chunk's own tokens, before the row's factor; the factors of the rows.

    h_t = factor_t (old_t q_t C + sum_s P_ts v_s).
    """
    qb, bh = tl.program_id(0), tl.program_id(1)
    head, row0 = bh % NH, (bh // NH) * T
    c = qb * BM // L
    t = qb * BM + tl.arange(0, BM)
    kk, jj, col = tl.arange(0, K), tl.arange(0, BN), tl.arange(0, 16)
    at = bh.to(tl.int64) * T
    m = tl.load(ms + bh * NC + c)
    mt = tl.maximum(m, tl.load(peak + at + t))  # less b_t
    q = q_rows.load([row0 + qb * BM, head * K])
    # q n by the matrix units: n as a sum of three bfloat16 columns
    n = tl.load(ns + (bh * NC + c) * K + kk)
    high = n.to(tl.bfloat16).to(tl.float32)
    middle = (n - high).to(tl.bfloat16).to(tl.float32)
    low = n - high - middle
    n3 = tl.where(
        col[None, :] == 0,
        high[:, None],
        tl.where(col[None, :] == 1, middle[:, None], tl.where(col[None, :] == 2, low[:, None], 0.0)),
    )
    old = tl.exp(m - mt)
    den = tl.sum(tl.dot(q, n3.to(tl.bfloat16)), 1) * old
    for s in tl.range(c * L, qb * BM + BM, BN):
        ts = s + jj
        us = tl.load(u + at + ts)
        S = tl.dot(q, k_rows.load([row0 + s, NH * K + head * K]).T)
        S *= tl.exp(tl.where(ts[None, :] <= t[:, None], us[None, :] - mt[:, None], float("-inf")))
        if R:
            rs = tl.load(r + row0 + ts)[None, :]
            S *= rs
            den += tl.sum(S, 1)
            S *= rs
        else:
            den += tl.sum(S, 1)
        P.store([bh * T + qb * BM, s - c * L], S.to(tl.bfloat16))
    factor = tl.full((BM,), K**-0.5, tl.float32)
    if R:
        factor *= tl.load(r + row0 + t)
    floor = tl.exp(-(tl.load(b + at + t) + mt))
    tl.store(old_out + at + t, old)
    tl.store(factor_out + at + t, factor / (tl.maximum(tl.abs(den * factor), floor) + eps))


@triton.jit
def _chunk_outputs(
    qkvo, q_rows, v_rows, r, P, old, factor, Cs, out, T, NC, norm_eps,
    NH: tl.constexpr, K: tl.constexpr, V: tl.constexpr, L: tl.constexpr, R: tl.constexpr,
    QUANT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """h = factor (old q C + P v), BM tokens of a head: nothing but products; then head norm and output gate."""
    qb, bh = tl.program_id(0), tl.program_id(1)
    head, row0 = bh % NH, (bh // NH) * T
    c = qb * BM // L
    t = qb * BM + tl.arange(0, BM)
    vv = tl.arange(0, V)
    at = bh.to(tl.int64) * T + t
    acc = tl.zeros((BM, V), tl.float32)
    for s in tl.range(0, K, BN, num_stages=STAGES):
        acc = tl.dot(q_rows.load([row0 + qb * BM, head * K + s]), Cs.load([(bh * NC + c) * K + s, 0]), acc)
    acc *= tl.load(old + at)[:, None]
    for s in tl.range(0, qb * BM + BM - c * L, BN, num_stages=STAGES):
        acc = tl.dot(P.load([bh * T + qb * BM, s]), v_rows.load([row0 + c * L + s, 2 * NH * K + head * V]), acc)
    h = acc * tl.load(factor + at)[:, None]
    row = (row0 + t)[:, None].to(tl.int64)
    h -= (tl.sum(h, 1) / V)[:, None]
    h *= tl.rsqrt(tl.sum(h * h, 1) / V + norm_eps)[:, None]
    o = tl.load(qkvo + row * (2 * NH * (K + V)) + 2 * NH * K + NH * V + head * V + vv[None, :]).to(tl.float32)
    if R:
        o *= tl.load(r + row0 + t)[:, None]
    h *= tl.sigmoid(o)
    to = out + row * (NH * V) + head * V + vv[None, :]
    if QUANT:
        tl.store(to, (h * HEAD_SCALE).to(tl.float8e4nv))
    else:
        tl.store(to, h.to(tl.bfloat16))


def gate_columns(heads: int) -> int:
    """Columns of the gates' product, i of all heads, then f: a power of two that the matrix units take."""
    return max(16, triton.next_power_of_2(2 * heads))


def gate_parts(x: Tensor, w3: Tensor) -> tuple[Tensor, Tensor]:
    """x (M, D) bf16, w3 (3, NG, D) -> parts (SPLIT, NG, M) and squares (SPLIT, M) float32, to be summed over SPLIT."""
    (M, D), NG = x.shape, w3.shape[1]
    split = 4 if D % 256 == 0 else 1
    parts = torch.empty(split, NG, M, dtype=torch.float32, device=x.device)
    squares = torch.empty(split, M, dtype=torch.float32, device=x.device)
    BM, BK = min(64, M), min(64, D // split)
    _gate_parts[(M // BM, split)](x, w3, parts, squares, M, D, NG, split, BM, BK, 4, num_warps=4)
    return parts, squares


def cell(
    gates: tuple[Tensor, Tensor],
    bias: Tensor,
    qkvo: Tensor,
    states: tuple[State, State] | Tensor,
    tokens: tuple[Tensor, Tensor],
    s: CellShape,
    *,
    normed: bool,
) -> Tensor:
    """The cell, head norm and output gate of a tile of T tokens, a multiple of the chunk.

    gates: of gate_parts   bias (2 NH,) float32   qkvo (M, 2 NH (K + V)) bf16   tokens: start and end (B,) int64, as in
    Step
    states: the old one, C (B, NH, K, V), n (B, NH, K), m (B, NH, 1) float32, and where the new one is written; or the
    addresses of these six tensors, (6,) int64 on the device
    normed: qkvo is of normed rows, and the result is float8 for HEAD_SCALE; else it lacks the norm's factor
    -> y (M, NH V) bf16 or float8, without the head norm's weight.
    """
    (parts, squares), (start, end) = gates, tokens
    B, NH, K, V, L, M = start.shape[0], s.heads, s.K, s.V, s.chunk, qkvo.shape[0]
    T, BH = M // B, B * NH
    NC = T // L

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=qkvo.device)

    bf16 = torch.bfloat16
    r, u, b, peak, old, factor = empty(M), *(empty(BH, T) for _ in range(5))
    g, top, keys, dn = empty(BH, NC), empty(BH, NC), empty(BH * T, K, dtype=bf16), empty(BH, NC, K)
    _scan_gates[(BH, NC)](
        parts, squares, bias, start, end, qkvo, r, u, b, peak, g, top, keys, dn, M, T, s.norm_eps, s.cap,
        s.hidden, parts.shape[1], NH, K, V, parts.shape[0], L, not normed, min(64, K), num_warps=4,
    )  # fmt: skip
    Cs, ns, ms = empty(BH, NC, K, V, dtype=bf16), empty(BH, NC, K), empty(BH, NC)
    places = (states, *(None,) * 6) if isinstance(states, Tensor) else (None, *states[0], *states[1])
    BK, BV, BT = min(64, K), min(128, V), min(64, L)
    _chunk_states[(K // BK, V // BV, BH)](
        TensorDescriptor.from_tensor(keys, [BT, BK]), TensorDescriptor.from_tensor(qkvo, [BT, BV]), dn, g, top,
        *places, Cs, ns, ms, T, NC, NH, K, V, L, BK, BV, BT, 6, num_warps=4,
    )  # fmt: skip
    P, BM, BN = empty(BH * T, L, dtype=bf16), min(128, L), min(64, L)
    _chunk_scores[(T // BM, BH)](
        TensorDescriptor.from_tensor(qkvo, [BM, K]), TensorDescriptor.from_tensor(qkvo, [BN, K]), r, u, b, peak, ns,
        ms, TensorDescriptor.from_tensor(P, [BM, BN]), old, factor, T, NC, s.eps, NH, K, V, L, not normed, BM, BN,
        num_warps=8, num_stages=1,
    )  # fmt: skip
    BM, BN = min(64, L), min(64, L, K)
    y = empty(M, NH * V, dtype=torch.float8_e4m3fn if normed else bf16)
    _chunk_outputs[(T // BM, BH)](
        qkvo, TensorDescriptor.from_tensor(qkvo, [BM, BN]), TensorDescriptor.from_tensor(qkvo, [BN, V]), r,
        TensorDescriptor.from_tensor(P, [BM, BN]), old, factor, TensorDescriptor.from_tensor(Cs.view(-1, V), [BN, V]),
        y, T, NC, s.norm_eps, NH, K, V, L, not normed, normed, BM, BN, 3, num_warps=8,
    )  # fmt: skip
    return y
