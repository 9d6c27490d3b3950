"""A block's weights as the Triton kernels want them: norms folded into products, gate and up in turn, float8.

rms_norm(x) W^T = r (x (w W)^T) with one number r a row: x is exact in bfloat16, and r is applied by whoever reads the
product.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from xlstm_ray.kernels.quantized import plain
from xlstm_ray.model import HEAD_PART, BlockWeights, EndWeights

PADDING = 64  # rows of the product of q, k, v, o and the gates are a multiple of it


class FoldedWeights(NamedTuple):
    """An mLSTM block's weights, sliced to a band. N = 2 nh K + 2 nh V; NG columns of gates, the last ones zeros.

    In float8 the four matrices have scales, one a row; else the scales are None.
    """

    qkvo: Tensor  # (N, D), with the mixer's norm
    qkvo_scale: Tensor | None  # (1, N) float32
    gates: Tensor  # (3, NG, D) bf16, with the mixer's norm: their sum is the float32 weights to the last bits
    gates_bias: Tensor  # (2 nh,) float32
    together: Tensor | None  # qkvo, then gates, then zeros: one product in decoding; None in float8
    out: Tensor  # (D, nh V), with the head norm
    out_scale: Tensor | None
    up: Tensor  # (2 F, D): the rows of the gate and the up projection in turn, with the feed-forward's norm
    up_scale: Tensor | None
    down: Tensor  # (D, F)
    down_scale: Tensor | None


def fold(w: BlockWeights, *, float8: bool = False) -> FoldedWeights:
    """Fold a bfloat16 block without biases of products. float8: quantize its matrices."""
    from xlstm_ray.kernels.triton_cell import gate_columns

    assert w.qkvo_bias is w.out_bias is w.up_bias is w.down_bias is None, "the table of sizes refuses them"
    qkvo_, out_, up_, down_ = (plain(weight) for weight in (w.qkvo, w.out, w.up, w.down))
    heads, hidden = w.gates_bias.shape[0] // 2, qkvo_.shape[1]
    gates = w.gates.new_zeros(gate_columns(heads), hidden)
    gates[: 2 * heads] = w.gates * w.mixer_norm.float()
    high = gates.bfloat16()
    middle = (gates - high.float()).bfloat16()
    low = (gates - high.float() - middle.float()).bfloat16()
    qkvo = _scaled(qkvo_, w.mixer_norm)
    out = _scaled(out_, w.head_norm)
    up = _scaled(up_, w.ffn_norm).unflatten(0, (2, -1)).transpose(0, 1).flatten(0, 1).contiguous()
    if float8:
        from xlstm_ray.kernels.triton_products import quantized_rows

        parts = torch.stack([high, middle, low])
        eight = [part for each in (out, up, down_) for part in quantized_rows(each)]
        return FoldedWeights(*quantized_rows(qkvo), parts, w.gates_bias, None, *eight)
    rows = len(qkvo) + 3 * len(high)
    together = torch.cat([qkvo, high, middle, low, qkvo.new_zeros(-rows % PADDING, hidden)])
    del qkvo
    N = qkvo_.shape[0]
    parts = together[N:rows].view(3, -1, hidden)
    return FoldedWeights(together[:N], None, parts, w.gates_bias, together, out, None, up, None, down_, None)


def fold_ends(ends: EndWeights) -> EndWeights:
    """Fold the out norm into the head, in place, unless the head is the embedding too. A norm of ones stays."""
    if ends.head is None or ends.out_norm is None or ends.head is ends.embedding:
        return ends
    head = plain(ends.head)
    for rows in head.split(max(1, 64 * HEAD_PART // head.shape[1])):
        rows.copy_(_scaled(rows, ends.out_norm))
    return ends._replace(out_norm=torch.ones_like(ends.out_norm))


def _scaled(weight: Tensor, columns: Tensor) -> Tensor:
    """weight (N, D) times a factor of each column, in weight's dtype."""
    return (weight.float() * columns.float()).to(weight.dtype)
