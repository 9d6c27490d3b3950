"""Weights of 8- and 4-bit integers, in groups of columns with a scale each, and their products.

8 bits: w = scale q, q from -127 to 127. 4 bits: w = scale (q - 8) + zero, q from 0 to 15. Few rows of x (decoding) are
bound by reading weights, so integers become numbers inside the product. Many rows (prefill) are bound by the product:
numbers in x's dtype are made for this product alone. On the CPU these are some rows of the matrix at a time, which stay
in the cache; on devices the whole matrix or, uncompiled, some rows of it.

Time beside the plain product in bfloat16 (below 1: faster), 2048 x 2048, groups of 32, one Zen 4 core of a machine at
work, torch 2.13, medians of 15 in turn (`python scripts/bench_quantized.py --size 2048`). FEW is chosen by it.

    rows of x                            1     2     4     8    16    32    64   512
    8 bits, inside                    0.80  1.05  1.16  1.59  3.38
    4 bits, inside                    0.81  1.20  1.38  1.64  2.52
    4 bits, torch's own for the CPU   0.33  0.46  0.56  0.89  1.31  1.72  2.06  3.43
    8 bits, by blocks                 3.06  3.54  3.43  5.18  2.56  2.01  1.64  1.14
    4 bits, by blocks                 4.44  5.31 10.11  8.26  3.46  2.54  1.94  1.22
    8 bits, whole, on devices         2.56  2.87  2.89  6.67  2.19  1.76  1.49  1.16
    4 bits, whole, on devices         2.82  3.16  3.34  6.86  2.44  1.81  1.55  1.14
    8 bits, torch's own, not used     0.56  0.74  0.81  1.12  1.55  1.95  2.27  2.93   (it takes one scale a row)

A matrix of 2048 x 2048 stays in the cache; where it does not, making it whole takes longer (docs/figures.md).
"""

from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 64  # rows of a weight that lie together: consecutive in memory for each column
MIDDLE = 8  # of the 4-bit integers
AT_ONCE = 8  # blocks that become numbers at a time on the CPU
PART = 1 << 19  # elements that become numbers at a time where nothing is compiled: their float32 stay in a core's cache

SHARES = 1.0, 0.95, 0.9, 0.85, 0.8, 0.75  # of a group's range


class Few(NamedTuple):
    """Up to how many rows of x the integers stay integers."""

    compiled: int
    packed: int  # by torch's own product for the CPU


FEW = Few(compiled=8, packed=32)


class Quantized(NamedTuple):
    """A weight (N, K) of integers in blocks of 64 rows. All are padded: N to whole blocks, K to whole groups.

    With torch's own 4-bit product for the CPU, `scale` is (G, N, 2), scale and zero, and `zero` is None.
    """

    # 8 bits: (N / 64, K, 64) int8. 4 bits: (N / 64, K, 32) uint8; a byte has row j and, high, row j + 32.
    q: Tensor
    scale: Tensor  # (G, N) for G groups of columns, in the dtype of the run
    zero: Tensor | None  # (G, N), 4 bits
    rows: int  # of the weight, without padding
    before: int  # columns of the first group that belong to another band

    @classmethod
    def make(cls, values: Tensor, scale: Tensor, zero: Tensor | None, *, before: int, packed: bool) -> "Quantized":
        """From rows in order.

        values (N, K) int8 or, 4 bits, uint8 up to 15, K whole groups; scale and zero (N, G) in the dtype of the run.
        packed: for torch's own product, which rounds to that dtype, if there is one for the device.
        """
        rows, K = values.shape
        more = -rows % BLOCK
        values = _padded(values, (0, 0, 0, more)).view(-1, BLOCK, K)
        scale = _padded(scale, (0, 0, 0, more)).T
        if zero is None:
            return cls(values.transpose(1, 2).contiguous(), scale.contiguous(), None, rows, before)
        zero = _padded(zero, (0, 0, 0, more)).T
        low, high = values[:, : BLOCK // 2], values[:, BLOCK // 2 :]
        q = (low | (high << 4)).transpose(1, 2).contiguous()
        if packed and scale.dtype != torch.float64 and torch_has_this_layout():
            return cls(q, torch.stack([scale, zero], -1).contiguous(), None, rows, before)
        return cls(q, scale.contiguous(), zero.contiguous(), rows, before)

    @property
    def device(self) -> torch.device:
        return self.q.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the run."""
        return self.scale.dtype

    @property
    def packed(self) -> bool:
        """Whether torch's own 4-bit product for the CPU takes it."""
        return self.scale.ndim == 3

    def to(self, device: torch.device) -> "Quantized":
        zero = None if self.zero is None else self.zero.to(device)
        return self._replace(q=self.q.to(device), scale=self.scale.to(device), zero=zero)

    def parts(self, elements: int) -> "list[Quantized]":
        """Ranges of rows, of about so many elements each."""
        each = max(1, elements // (BLOCK * self.q.shape[1]))
        found = []
        for n, q in enumerate(self.q.split(each)):
            at = slice(n * each * BLOCK, (n * each + len(q)) * BLOCK)
            zero = None if self.zero is None else self.zero[:, at]
            found.append(Quantized(q, self.scale[:, at], zero, min(self.rows, at.stop) - at.start, self.before))
        return found

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x (..., columns) times the weight, transposed, plus bias (N,) -> (..., N) in x's dtype."""
        dtype, shape, K = x.dtype, x.shape[:-1], self.q.shape[1]
        x = x.flatten(0, -2)
        if x.shape[-1] < K:
            x = F.pad(x, (self.before, K - self.before - x.shape[-1]))
        if self.packed and len(x) <= FEW.packed:
            N, group = self.scale.shape[1], K // self.scale.shape[0]
            y = torch._weight_int4pack_mm_for_cpu(x, self.q.view(N, K // 2), group, self.scale)
        elif not self.packed and len(x) <= FEW.compiled:
            y = self._inside(_wide(x))
        elif x.device.type == "cpu":
            y = (product if torch.compiler.is_compiling() else by_blocks)(x, self.q, *self._planes())
        elif torch.compiler.is_compiling():
            y = self._whole(x)
        else:  # nothing is fused: each step of making numbers would be a matrix of its own
            y = torch.cat([part._whole(x) for part in self.parts(PART)], -1)
        y = y[:, : self.rows].unflatten(0, shape)
        return y.to(dtype) if bias is None else (_wide(y) + bias).to(dtype)

    def embed(self, tokens: Tensor) -> Tensor:
        """The rows of these tokens (B, T) -> (B, T, columns) in the dtype of the run."""
        block, row = tokens // BLOCK, tokens % BLOCK
        scale, zero = self._planes()
        q = self.q[block, :, row if zero is None else row % (BLOCK // 2)]  # (B, T, K)
        if zero is not None:
            q = (q >> (row // (BLOCK // 2) * 4).unsqueeze(-1).to(torch.uint8)) & 15
        of = _wide(scale.T[tokens]).unsqueeze(-1)  # (B, T, G, 1)
        parts = q.unflatten(-1, (len(scale), -1)).to(of.dtype)
        whole = parts * of if zero is None else (parts - MIDDLE) * of + zero.T[tokens].unsqueeze(-1)
        return whole.flatten(-2).to(self.dtype)

    def _planes(self) -> tuple[Tensor, Tensor | None]:
        """Scale and zero, (G, N) each."""
        if self.packed:
            scale, zero = (planes_apart if torch.compiler.is_compiling() else planes)(self.scale).unbind()
            return scale, zero
        return self.scale, self.zero

    def _halves(self) -> list[tuple[Tensor, Tensor, Tensor | None]]:
        """Blocks whose rows are consecutive: q (N / 64, G, K / G, R), scale and zero (N / 64, G, 1, R), float32 (in
        references float64).

        8 bits: one with R = 64. 4 bits: two with R = 32, the rows of the low halves and those of the high ones.
        """
        scale, zero = self._planes()
        G = len(scale)
        q = self.q.unflatten(1, (G, -1))
        parts = [q] if zero is None else [q & 15, q >> 4]
        found = []
        for n, part in enumerate(parts):
            of = [
                None
                if s is None
                else _wide(s.unflatten(1, (-1, len(parts), 1, part.shape[-1]))[:, :, n].transpose(0, 1))
                for s in (scale, zero)
            ]
            assert of[0] is not None
            found.append((part.to(of[0].dtype), of[0], of[1]))
        return found

    def _inside(self, x: Tensor) -> Tensor:
        """Few rows x (M, K) float32 -> (M, N), in one pass over the integers."""
        halves = self._halves()
        G = halves[0][0].shape[1]
        rows = []
        for row in x.unbind():
            by_group = row.view(1, G, -1, 1)
            sums = by_group.sum(2)
            parts = []
            for q, scale, zero in halves:
                if zero is None:
                    parts.append((q * scale * by_group).sum((1, 2)))
                else:  # a group's zero is constant: what it adds is a product of the group's sum of x
                    parts.append(((q - MIDDLE) * scale * by_group).sum((1, 2)) + (zero[:, :, 0] * sums).sum(1))
            rows.append(torch.stack(parts, 1).flatten())
        return torch.stack(rows)

    def _whole(self, x: Tensor) -> Tensor:
        """Many rows x (M, K) -> (M, N), by a matrix that is made for this product."""
        products = []
        for q, scale, zero in self._halves():
            whole = q * scale if zero is None else (q - MIDDLE) * scale + zero
            matrix = whole.to(x.dtype).permute(1, 2, 0, 3).reshape(x.shape[1], -1)
            products.append((x @ matrix).unflatten(-1, (len(q), -1)))
        return torch.stack(products, 2).flatten(1)


def rows_at_once(device: str, *, compiled: bool) -> int | None:
    """How many rows of a weight take memory as numbers for a product; None: all; 0: so few that they do not count."""
    if device == "cpu":
        return AT_ONCE * BLOCK
    return None if compiled else 0


def plain(weight: Tensor | Quantized) -> Tensor:
    """A weight for kernels that take no integers: who chose them has refused those."""
    assert isinstance(weight, Tensor)
    return weight


def planes(pairs: Tensor) -> Tensor:
    """(G, N, 2) -> (2, G, N), contiguous."""
    return pairs.movedim(-1, 0).contiguous()


# In compiled code an operator of its own: fused, every element of a matrix would gather. Elsewhere its first call would
# load torch's compiler, 170 MiB.
planes_apart = torch.library.custom_op("xlstm_ray::planes", planes, mutates_args=())


@planes_apart.register_fake
def _(pairs: Tensor) -> Tensor:
    return pairs.new_empty(2, *pairs.shape[:2])


def by_blocks(x: Tensor, q: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    """Many rows x (M, K) -> (M, N), on the CPU; q, scale and zero as a `Quantized` has them.

    Some blocks at a time become numbers, which stay in the cores' cache until their product.
    """
    G, K = len(scale), q.shape[1]
    y = x.new_empty(len(x), scale.shape[1])
    numbers = x.new_empty(K * AT_ONCE * BLOCK)  # once: made for each part, malloc may leave a hole each time
    for n in range(0, len(q), AT_ONCE):
        part = q[n : n + AT_ONCE].unflatten(1, (G, -1)).permute(1, 2, 0, 3)  # (G, K / G, blocks, rows of a block)
        columns = slice(n * BLOCK, (n + part.shape[2]) * BLOCK)
        s = scale[:, columns].to(x.dtype).view(G, 1, -1, BLOCK)
        # Exact but for one rounding, in bfloat16 too: an integer is, and addcmul rounds once.
        made = numbers[: K * part.shape[2] * BLOCK].view(*part.shape[:-1], BLOCK)
        if zero is None:
            made.copy_(part).mul_(s)
        else:
            made[..., : BLOCK // 2] = ((part & 15) - MIDDLE).view(torch.int8)
            made[..., BLOCK // 2 :] = ((part >> 4) - MIDDLE).view(torch.int8)
            torch.addcmul(zero[:, columns].to(x.dtype).view(G, 1, -1, BLOCK), made, s, out=made)
        torch.mm(x, made.view(K, -1), out=y[:, columns])
    return y


# In compiled code an operator of its own, since Inductor has no loops: a matrix would be made whole, in memory.
product = torch.library.custom_op("xlstm_ray::product_of_integers", by_blocks, mutates_args=())


@product.register_fake
def _(x: Tensor, q: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    return x.new_empty(len(x), scale.shape[1])


@cache
def torch_has_this_layout() -> bool:
    """Whether torch's own 4-bit product for this CPU takes the layout of `Quantized`: it differs between CPUs."""
    values = torch.arange(BLOCK * 64, dtype=torch.int32).view(BLOCK, 64).mul(7) % 16
    ours = values[: BLOCK // 2] | (values[BLOCK // 2 :] << 4)
    theirs = torch._convert_weight_to_int4pack_for_cpu(values, 1)
    return torch.equal(ours.T.contiguous().to(torch.uint8).flatten(), theirs.flatten())


def quantize(weight: Tensor, *, bits: int, group: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """weight (N, K) -> integers (N, K) int8 or, 4 bits, uint8 up to 15; scale and, 4 bits, zero (N, G) bfloat16.

    The last group may be short. The integers are rounded to nearest with the scales as they are stored. With 4 bits, a
    group's range is the whole or the SHARES of it that gives the least squared error: what is beyond it is its end.
    """
    N, K = weight.shape
    missing = -K % group
    x = F.pad(weight.float(), (0, missing), value=torch.nan).view(N, -1, group)
    low, high = x, x
    if missing:
        low, high = x.nan_to_num(torch.inf), x.nan_to_num(-torch.inf)
    low, high = low.amin(-1), high.amax(-1)
    if bits == 8:
        scale = (torch.maximum(low.abs(), high.abs()) / 127).bfloat16()
        q = (x / _divisor(scale)).round_().clamp_(-127, 127)
        return q.flatten(1)[:, :K].to(torch.int8), scale, None
    best: list[Tensor] = []
    for share in SHARES:
        scale = ((high - low) * (share / 15)).bfloat16()
        zero = ((high + low + scale.float()) / 2).bfloat16()
        off = _steps(x, scale, zero).mul_(scale.float().unsqueeze(-1)).add_(zero.float().unsqueeze(-1)).sub_(x)
        if missing:
            off.nan_to_num_(0)
        now = [torch.linalg.vecdot(off, off), scale, zero]
        if best:
            less = now[0] < best[0]
            now = [torch.where(less, new, old) for new, old in zip(now, best, strict=True)]
        best = now
    _, scale, zero = best
    return (_steps(x, scale, zero) + MIDDLE).flatten(1)[:, :K].to(torch.uint8), scale, zero


def _steps(x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """The 4-bit integers of x (N, G, K / G), from -8 to 7, in float32."""
    return (x - zero.float().unsqueeze(-1)).div_(_divisor(scale)).round_().clamp_(-MIDDLE, MIDDLE - 1)


def packed(values: Tensor, *, bits: int) -> Tensor:
    """Integers (N, K) as they are stored: two of 4 bits in a byte, the first in its low half."""
    if bits == 8:
        return values
    pairs = F.pad(values, (0, values.shape[1] % 2)).unflatten(1, (-1, 2))
    return pairs[..., 0] | (pairs[..., 1] << 4)


def unpacked(stored: Tensor, *, bits: int, group: int) -> Tensor:
    """The integers of whole groups, from `packed`; zeros fill the last group."""
    values = stored if bits == 8 else torch.stack([stored & 15, stored >> 4], -1).flatten(1)
    return _padded(values, (0, -values.shape[1] % group))


def dequantized(values: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    """The numbers that integers stand for, float64: the reference of all products.

    values (N, K), K whole groups; scale and, 4 bits, zero (N, G).
    """
    by_group = values.double().unflatten(1, (scale.shape[1], -1))
    scale = scale.double().unsqueeze(-1)
    made = by_group * scale if zero is None else (by_group - MIDDLE) * scale + zero.double().unsqueeze(-1)
    return made.flatten(1)


def _padded(x: Tensor, by: tuple[int, ...]) -> Tensor:
    """F.pad, without a copy where nothing is added."""
    return F.pad(x, by) if any(by) else x


def _wide(x: Tensor) -> Tensor:
    """x in float32; float64 stays, for references."""
    return x if x.dtype == torch.float64 else x.float()


def _divisor(scale: Tensor) -> Tensor:
    """The scales (N, G, 1) in float32, 1 where all weights of a group are equal."""
    return torch.where(scale == 0, 1, scale).float().unsqueeze(-1)
