"""xLSTM-Large, top to bottom: norms, mLSTM and sLSTM layers, the feed-forward, logits.

A block: x += mixer(norm(x)), an mLSTM or sLSTM; x += ffn(norm(x)). A band has a contiguous range of heads: their
rows of q, k, v, gates and output gate, their columns of the output projection, and a share of the feed-forward's
columns. For each half of a block a band returns a partial sum; the sum over the bands is the half's output.

B batch, T tokens, D hidden size, nh heads of the band, K = DHQK, V = DHHV, DH = D / all heads, F the band's
feed-forward columns.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from xlstm_ray.config import ModelConfig
from xlstm_ray.kernels import Cell, SlstmCell
from xlstm_ray.kernels.native import PAD_F, PAD_I, SlstmState, State
from xlstm_ray.kernels.quantized import Quantized

SLSTM_NORM_EPS = 1e-5  # of the sLSTM's head norm; the configuration sets only the others
ONEDNN = torch.backends.mkldnn.is_available()
HEAD_PART = 1 << 19  # elements of the head that are upcast at a time: 2 MiB of float32 stay in a core's cache
FEW_ROWS = 8  # the compiled product is faster up to this number of rows


class BlockWeights(NamedTuple):
    """An mLSTM block's weights, sliced to a band. A bias is None if the model has none."""

    mixer_norm: Tensor  # (D,)
    mixer_norm_bias: Tensor | None
    qkvo: Tensor | Quantized  # (2 nh K + 2 nh V, D): the rows of q, k, v and the output gate, one matrix product
    qkvo_bias: Tensor | None
    gates: Tensor  # (2 nh, D) float32: the rows of i and f; small, and exp() follows, so they stay exact
    gates_bias: Tensor  # (2 nh,) float32
    head_norm: Tensor  # (nh V,)
    head_norm_bias: Tensor | None
    out: Tensor | Quantized  # (D, nh V)
    out_bias: Tensor | None  # only in the first band: partial sums add up
    ffn_norm: Tensor  # (D,)
    ffn_norm_bias: Tensor | None
    up: Tensor | Quantized  # (2 F, D): the rows of the gate, then of the up projection
    up_bias: Tensor | None
    down: Tensor | Quantized  # (D, F)
    down_bias: Tensor | None  # only in the first band


class SlstmWeights(NamedTuple):
    """An sLSTM block's weights, sliced to a band. There is no output projection: a head writes to its own channels."""

    mixer_norm: Tensor  # (D,)
    mixer_norm_bias: Tensor | None
    gates: Tensor  # (nh, 4 DH, DH) float32: i, f, z and o of each head, which sees only its own channels
    recurrent: Tensor  # (nh, DH, 4 DH) float32: what a head's last output adds to its gates
    gates_bias: Tensor  # (nh, 4 DH) float32
    head_norm: Tensor  # (nh DH,) float32
    channel: Tensor  # () int64: the band's first channel; a tensor, so that bands of one size share code
    ffn_norm: Tensor  # (D,) from here on as in BlockWeights
    ffn_norm_bias: Tensor | None
    up: Tensor | Quantized  # (2 F, D)
    up_bias: Tensor | None
    down: Tensor | Quantized  # (D, F)
    down_bias: Tensor | None


Weights = BlockWeights | SlstmWeights
AnyState = State | SlstmState


class EndWeights(NamedTuple):
    """The weights before the first block and after the last."""

    embedding: Tensor | Quantized | None  # (vocabulary, D), first stage
    out_norm: Tensor | None  # (D,), last stage
    head: Tensor | Quantized | None  # (vocabulary, D), last stage


class BandShape(NamedTuple):
    """The sizes that a block's code is compiled for."""

    heads: int
    dhqk: int
    dhhv: int
    dh: int
    norm_eps: float
    eps: float
    gate_soft_cap: float | None

    @classmethod
    def of(cls, config: ModelConfig, heads: int) -> "BandShape":
        c = config
        return cls(heads, c.dhqk, c.dhhv, c.dh, c.norm_eps, c.eps, c.gate_soft_cap)


def soft_cap(x: Tensor, cap: float | None) -> Tensor:
    """cap tanh(x / cap), or x itself without a cap."""
    return x if cap is None else cap * torch.tanh(x / cap)


def upcast(x: Tensor) -> Tensor:
    """x in float32; float64 stays, for references."""
    return x if x.dtype == torch.float64 else x.float()


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """float32 x @ weight^T + bias on the CPU, by oneDNN.

    For float32 torch uses MKL, which reaches 170 to 200 GFLOP/s on two Zen 4 cores. oneDNN reaches 200 to 220; the peak
    is 225.
    """
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


# In compiled code it is an operator of its own, because Inductor lowers oneDNN's only for constant weights. Elsewhere
# it is not: the first call of such an operator loads torch's compiler, 170 MiB.
linear_f32 = torch.library.custom_op("xlstm_ray::linear_f32", onednn_linear, mutates_args=())


@linear_f32.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def linear(x: Tensor, weight: Tensor | Quantized, bias: Tensor | None) -> Tensor:
    """x (..., in) @ weight (out, in) transposed + bias (out,)."""
    if isinstance(weight, Quantized):
        return weight.linear(x, bias)
    if _decodes(x, weight):
        return few_rows_linear(x, weight, bias)
    if x.device.type == "cpu" and x.dtype == torch.float32 and ONEDNN and not weight.requires_grad:
        return (linear_f32 if torch.compiler.is_compiling() else onednn_linear)(x, weight, bias)
    return F.linear(x, weight, bias)


def _decodes(x: Tensor, weight: Tensor) -> bool:
    """Whether x (B, T, in) is a token of a few rows, in code that is compiled for the CPU."""
    small = x.ndim == 3 and x.shape[1] == 1 and x.shape[0] <= FEW_ROWS
    return small and x.device.type == "cpu" and torch.compiler.is_compiling() and not weight.requires_grad


def few_rows_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (B, T, in) @ weight^T + bias for few rows, to be compiled for the CPU: one pass over the weights.

    As a sum of the block's own code it reads them as fast as the memory gives them, and costs no call; a library's
    product of one row reaches a third to two thirds of that, and MKL's uses one core.
    """
    rows = upcast(x.flatten(0, -2)).contiguous()
    # A view of memory: without it, Inductor would compute x again for every row of the weights.
    rows = rows.as_strided(rows.shape, rows.stride())
    y = few_rows_product(rows, weight).unflatten(0, x.shape[:-1])
    return (y if bias is None else y + upcast(bias)).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """x (..., D) over its root mean square; statistics in float32, result in float32."""
    x = upcast(x)
    x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * upcast(weight)
    return x if bias is None else x + upcast(bias)


def head_norm(h: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """Layer norm of each head on its own: h (B, T, nh, V) -> (B, T, nh V), float32."""
    # Not F.layer_norm: for its variance, Inductor generates a Metal kernel in which each thread reads the whole row.
    h = upcast(h)
    h = h - h.mean(-1, keepdim=True)
    h = (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)).flatten(-2) * upcast(weight)
    return h if bias is None else h + upcast(bias)


def is_token(T: int, start: Tensor, end: Tensor) -> Tensor:
    """(B, 1, T) bool: row b's tokens are those with start <= t < end; the others are padding."""
    t = torch.arange(T, device=start.device)
    return ((t >= start.unsqueeze(-1)) & (t < end.unsqueeze(-1))).unsqueeze(1)


def mlstm_in(
    x: Tensor, w: BlockWeights, start: Tensor, end: Tensor, s: BandShape
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Norm and projections: x (B, T, D) -> q, k (B, nh, T, K), v (B, nh, T, V), o (B, T, nh V), i, f (B, nh, T).

    start, end (B,) int64: row b's tokens are those with start <= t < end; the others are padding and do
    not change the state.
    """
    B, T, _ = x.shape
    y = rms_norm(x, w.mixer_norm, w.mixer_norm_bias, s.norm_eps)
    qkvo = linear(y.to(x.dtype), w.qkvo, w.qkvo_bias)
    q, k, v, o = qkvo.split([s.heads * s.dhqk, s.heads * s.dhqk, s.heads * s.dhhv, s.heads * s.dhhv], -1)
    gates = few_rows_linear if _decodes(y, w.gates) else F.linear
    i, f = soft_cap(gates(y, w.gates, w.gates_bias), s.gate_soft_cap).transpose(1, 2).split(s.heads, 1)
    token = is_token(T, start, end)
    i, f = torch.where(token, i, PAD_I), torch.where(token, f, PAD_F)
    q = q.view(B, T, s.heads, s.dhqk).transpose(1, 2)
    k = k.view(B, T, s.heads, s.dhqk).transpose(1, 2)
    v = v.view(B, T, s.heads, s.dhhv).transpose(1, 2)
    return q, k, v, o, i, f


def mlstm_out(h: Tensor, o: Tensor, w: BlockWeights, s: BandShape) -> Tensor:
    """h (B, nh, T, V), output gate o (B, T, nh V) -> this band's share of the layer's output (B, T, D)."""
    y = head_norm(h.transpose(1, 2), w.head_norm, w.head_norm_bias, s.norm_eps)
    return linear((y * torch.sigmoid(upcast(o))).to(o.dtype), w.out, w.out_bias)


def slstm_in(x: Tensor, w: SlstmWeights, start: Tensor, end: Tensor, s: BandShape) -> tuple[Tensor, Tensor]:
    """Norm and gate projections: x (B, T, D) -> gates (B, nh, T, 4, DH) float32, and is_token (B, 1, T)."""
    B, T, D = x.shape
    y = rms_norm(x, w.mixer_norm, w.mixer_norm_bias, s.norm_eps)
    if s.heads * s.dh < D:
        y = y.index_select(-1, w.channel + torch.arange(s.heads * s.dh, device=x.device))
    y = y.view(B * T, s.heads, s.dh).transpose(0, 1)
    gates = torch.bmm(y, w.gates.transpose(1, 2)) + w.gates_bias.unsqueeze(1)
    return gates.view(s.heads, B, T, 4, s.dh).transpose(0, 1), is_token(T, start, end)


def slstm_out(h: Tensor, w: SlstmWeights, like: Tensor, s: BandShape) -> Tensor:
    """h (B, nh, T, DH) -> the layer's output (B, T, D), 0 in other bands' channels; `like` has its shape and dtype."""
    y = head_norm(h.transpose(1, 2), w.head_norm, None, SLSTM_NORM_EPS).to(like.dtype)
    if y.shape[-1] < like.shape[-1]:
        at = torch.arange(like.shape[-1], device=y.device) - w.channel
        inside = (at >= 0) & (at < y.shape[-1])
        y = torch.where(inside, y.index_select(-1, at.clamp(0, y.shape[-1] - 1)), 0)
    return y


def ffn(x: Tensor, w: Weights, s: BandShape) -> Tensor:
    """Gated feed-forward of x (B, T, D): this band's share of its output (B, T, D)."""
    y = rms_norm(x, w.ffn_norm, w.ffn_norm_bias, s.norm_eps).to(x.dtype)
    gate, up = linear(y, w.up, w.up_bias).chunk(2, -1)
    return linear((F.silu(upcast(gate)) * upcast(up)).to(x.dtype), w.down, w.down_bias)


def mlstm_mixer(
    x: Tensor, w: BlockWeights, state: State, start: Tensor, end: Tensor, s: BandShape, cell: Cell
) -> tuple[Tensor, State]:
    """The mLSTM half of a block: this band's share of its output (B, T, D), and the new state of its heads."""
    q, k, v, o, i, f = mlstm_in(x, w, start, end, s)
    h, state = cell(q, k, v, i=i, f=f, state=state, eps=s.eps)
    return mlstm_out(h, o, w, s), state


def slstm_mixer(
    x: Tensor, w: SlstmWeights, state: SlstmState, start: Tensor, end: Tensor, s: BandShape, cell: SlstmCell
) -> tuple[Tensor, SlstmState]:
    """The sLSTM half of a block: this band's share of its output (B, T, D), and the new state of its heads."""
    gates, token = slstm_in(x, w, start, end, s)
    h, state = cell(gates, recurrent=w.recurrent, token=token, state=state)
    return slstm_out(h, w, x, s), state


def whole_block(mixer: Callable[..., tuple[Tensor, AnyState]], ffn: Callable[..., Tensor]) -> Callable:
    """Both halves of a block, for one band with all heads: (x, w, state, start, end) -> the new residual stream
    (B, T, D) and state. mixer: takes the same arguments; ffn: (x, w)."""

    def block(x: Tensor, w: Weights, state: AnyState, start: Tensor, end: Tensor) -> tuple[Tensor, AnyState]:
        y, state = mixer(x, w, state, start, end)
        x = x + y
        return x + ffn(x, w), state

    return block


def head_product(x: Tensor, head: Tensor | Quantized) -> Tensor:
    """x (rows, D) @ head (vocabulary, D) transposed -> (rows, vocabulary), float32 for any operands.

    In bfloat16 the best two logits would be equal at one position in 50. torch has such a product only on cuda;
    elsewhere a few rows of the head are upcast at a time, which takes little memory.
    """
    if isinstance(head, Quantized):
        return torch.cat([part.linear(upcast(x)) for part in head.parts(HEAD_PART)], -1)
    if head.dtype.itemsize > 2:
        return F.linear(x, head)
    if head.device.type == "cuda":
        return torch.mm(x, head.T, out_dtype=torch.float32)
    rows = max(1, HEAD_PART // head.shape[1])
    return torch.cat([linear(x.float(), part.float(), None) for part in head.split(rows)], -1)


def few_rows_product(x: Tensor, head: Tensor) -> Tensor:
    """head_product for few rows, to be compiled: one pass over the head in its stored dtype."""
    head = head.float()
    return torch.stack([(row * head).sum(-1) for row in x.float().unbind()])


def logits(
    x: Tensor, ends: EndWeights, config: ModelConfig, product: Callable[[Tensor, Any], Tensor] = head_product
) -> Tensor:
    """Residual stream (..., D) after the last block -> logits (..., vocabulary), float32."""
    assert ends.head is not None
    if ends.out_norm is not None:
        x = rms_norm(x, ends.out_norm, None, config.norm_eps).to(ends.head.dtype)
    y = product(x.flatten(0, -2), ends.head).unflatten(0, x.shape[:-1])
    return soft_cap(y, config.output_logit_soft_cap)
