"""xLSTM-Large, top to bottom: norms, the mLSTM layer, the feed-forward, and the Worker that owns one (stage, band).

A block: x += mLSTM(norm(x)); x += feed_forward(norm(x)). A head band holds a contiguous range of heads, with their rows
of q, k, v, gates and output gate and their columns of the output projection, and a share of the feed-forward's columns;
its two halves of a block return partial sums, which add up over the bands.

B batch, T tokens, D hidden size, nh heads of the band, K = DHQK, V = DHHV, F the band's feed-forward columns.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from xlstm_ray.config import ModelConfig
from xlstm_ray.kernels import Backend, Cell
from xlstm_ray.kernels.compiled import Compiler, compile_strict
from xlstm_ray.kernels.native import PAD_F, PAD_I, State

STATE_PARTS = "C", "n", "m"
ONEDNN = torch.backends.mkldnn.is_available()


class BlockWeights(NamedTuple):
    """One block's weights, sliced to a band. Biases are None where the model has none."""

    mix_norm: Tensor  # (D,)
    mix_norm_bias: Tensor | None
    qkvo: Tensor  # (2 nh K + 2 nh V, D): the rows of q, k, v and the output gate, one matrix product
    qkvo_bias: Tensor | None
    gates: Tensor  # (2 nh, D) float32: the rows of i and f; small, and exp() follows, so kept exact
    gates_bias: Tensor  # (2 nh,) float32
    head_norm: Tensor  # (nh V,)
    head_norm_bias: Tensor | None
    out: Tensor  # (D, nh V)
    out_bias: Tensor | None  # only in the first band: partial sums add up
    feed_norm: Tensor  # (D,)
    feed_norm_bias: Tensor | None
    up: Tensor  # (2 F, D): the rows of the gate, then of the up projection
    up_bias: Tensor | None
    down: Tensor  # (D, F)
    down_bias: Tensor | None  # only in the first band


class EndWeights(NamedTuple):
    """What stands before the first block and after the last."""

    embedding: Tensor | None  # (vocabulary, D), first stage
    out_norm: Tensor | None  # (D,), last stage
    head: Tensor | None  # (vocabulary, D), last stage


class BandShape(NamedTuple):
    """The sizes that a block's code is specialised to."""

    heads: int
    dhqk: int
    dhhv: int
    norm_eps: float
    eps: float
    gate_soft_cap: float | None

    @classmethod
    def of(cls, config: ModelConfig, heads: int) -> "BandShape":
        return cls(heads, config.dhqk, config.dhhv, config.norm_eps, config.eps, config.gate_soft_cap)


def soft_cap(x: Tensor, cap: float | None) -> Tensor:
    """cap tanh(x / cap), or x itself without a cap."""
    return x if cap is None else cap * torch.tanh(x / cap)


@torch.library.custom_op("xlstm_ray::linear_f32", mutates_args=())
def linear_f32(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """float32 x @ weight^T + bias on the CPU, by oneDNN.

    torch takes MKL for float32, which reaches 170 to 200 GFLOP/s on two Zen 4 cores where oneDNN reaches 200 to 220, of
    a peak of 225. An operator of our own, because Inductor's lowering of oneDNN's wants weights that are constants.
    """
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


@linear_f32.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (..., in) @ weight (out, in) transposed + bias (out,)."""
    if x.device.type == "cpu" and x.dtype == torch.float32 and ONEDNN and not weight.requires_grad:
        return linear_f32(x, weight, bias)
    return F.linear(x, weight, bias)


def rms_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """x (..., D) over its root mean square; statistics in float32, result in float32."""
    x = x.float()
    x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight.float()
    return x if bias is None else x + bias.float()


def head_norm(h: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """Layer norm of each head on its own: h (B, T, nh, V) -> (B, T, nh V), float32."""
    # Not F.layer_norm: of its variance Inductor on Metal makes a kernel in which each thread reads the whole row.
    h = h.float()
    h = h - h.mean(-1, keepdim=True)
    h = (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)).flatten(-2) * weight.float()
    return h if bias is None else h + bias.float()


def mix_in(
    x: Tensor, w: BlockWeights, first: Tensor, last: Tensor, s: BandShape
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Norm and projections: x (B, T, D) -> q, k (B, nh, T, K), v (B, nh, T, V), o (B, T, nh V), i, f (B, nh, T).

    first, last (B,) int64: row b's tokens are those with first <= t < last; the others are padding, which must leave
    the state untouched.
    """
    B, T, _ = x.shape
    y = rms_norm(x, w.mix_norm, w.mix_norm_bias, s.norm_eps)
    qkvo = linear(y.to(x.dtype), w.qkvo, w.qkvo_bias)
    q, k, v, o = qkvo.split([s.heads * s.dhqk, s.heads * s.dhqk, s.heads * s.dhhv, s.heads * s.dhhv], -1)
    i, f = soft_cap(F.linear(y, w.gates, w.gates_bias), s.gate_soft_cap).transpose(1, 2).split(s.heads, 1)
    t = torch.arange(T, device=x.device)
    token = ((t >= first.unsqueeze(-1)) & (t < last.unsqueeze(-1))).unsqueeze(1)  # (B, 1, T)
    i, f = torch.where(token, i, PAD_I), torch.where(token, f, PAD_F)
    q = q.view(B, T, s.heads, s.dhqk).transpose(1, 2)
    k = k.view(B, T, s.heads, s.dhqk).transpose(1, 2)
    v = v.view(B, T, s.heads, s.dhhv).transpose(1, 2)
    return q, k, v, o, i, f


def mix_out(h: Tensor, o: Tensor, w: BlockWeights, s: BandShape) -> Tensor:
    """h (B, nh, T, V), output gate o (B, T, nh V) -> this band's share of the layer's output (B, T, D)."""
    y = head_norm(h.transpose(1, 2), w.head_norm, w.head_norm_bias, s.norm_eps)
    return linear((y * torch.sigmoid(o.float())).to(o.dtype), w.out, w.out_bias)


def feed(x: Tensor, w: BlockWeights, s: BandShape) -> Tensor:
    """Gated feed-forward of x (B, T, D): this band's share of its output (B, T, D)."""
    y = rms_norm(x, w.feed_norm, w.feed_norm_bias, s.norm_eps).to(x.dtype)
    gate, up = linear(y, w.up, w.up_bias).chunk(2, -1)
    return linear((F.silu(gate.float()) * up.float()).to(x.dtype), w.down, w.down_bias)


def mix(
    x: Tensor, w: BlockWeights, state: State, first: Tensor, last: Tensor, s: BandShape, cell: Cell
) -> tuple[Tensor, State]:
    """The mLSTM half of a block: this band's share of its output (B, T, D), and its heads' new state."""
    q, k, v, o, i, f = mix_in(x, w, first, last, s)
    h, state = cell(q, k, v, i=i, f=f, state=state, eps=s.eps)
    return mix_out(h, o, w, s), state


def block(
    x: Tensor, w: BlockWeights, state: State, first: Tensor, last: Tensor, s: BandShape, cell: Cell
) -> tuple[Tensor, State]:
    """A whole block where one band has all heads: the new residual stream (B, T, D) and state."""
    y, state = mix(x, w, state, first, last, s, cell)
    x = x + y
    return x + feed(x, w, s), state


def logits(x: Tensor, ends: EndWeights, config: ModelConfig) -> Tensor:
    """Residual stream (..., D) after the last block -> logits (..., vocabulary), float32."""
    assert ends.head is not None
    if ends.out_norm is not None:
        x = rms_norm(x, ends.out_norm, None, config.norm_eps).to(ends.head.dtype)
    return soft_cap(F.linear(x, ends.head).float(), config.output_logit_soft_cap)


@dataclass(frozen=True)
class Band:
    """Where a worker stands in the grid: its blocks, its heads, its share of the feed-forward's columns."""

    blocks: range
    heads: range
    ffn: range


def partition(count: int, parts: int) -> list[range]:
    """0..count in `parts` contiguous ranges whose sizes differ by one at most."""
    edges = [count * part // parts for part in range(parts + 1)]
    return [range(a, b) for a, b in zip(edges, edges[1:], strict=False)]


def make_grid(config: ModelConfig, *, heads_per_band: int, stages: int = 1) -> list[list[Band]]:
    """[stage][band]: every block and head once. The last band may have fewer heads."""
    starts = range(0, config.num_heads, heads_per_band)
    heads = [range(a, min(a + heads_per_band, config.num_heads)) for a in starts]
    ffn = [
        range(config.ffn_dim * r.start // config.num_heads, config.ffn_dim * r.stop // config.num_heads) for r in heads
    ]
    return [
        [Band(blocks, h, f) for h, f in zip(heads, ffn, strict=True)] for blocks in partition(config.num_blocks, stages)
    ]


class Calls(NamedTuple):
    """The functions of a block for one window shape (B, T), compiled unless the backend is the reference."""

    block: Callable[..., tuple[Tensor, State]]  # (x, w, state, first, last) -> x, state; one band only
    mix: Callable[..., tuple[Tensor, State]]  # (x, w, state, first, last) -> partial sum, state
    feed: Callable[..., Tensor]  # (x, w) -> partial sum


class Kernels:
    """The compiled functions of one backend, shared by all workers of a process.

    Every combination of window shape and weight shapes is compiled once, on first use; nothing compiled is ever
    specialised again behind the caller's back.
    """

    def __init__(self, backend: Backend, *, chunk_size: int, t_inner: int, compiler: Compiler = compile_strict):
        self.backend, self.chunk_size, self.t_inner, self.compiler = backend, chunk_size, t_inner, compiler
        self.built: dict[tuple, Calls] = {}

    def calls(self, s: BandShape, w: BlockWeights, B: int, T: int) -> Calls:
        """The functions for windows (B, T) of a band with sizes `s` and weights shaped like `w`."""
        key = (s, B, T, self.chunk_size, *(None if tensor is None else (tensor.shape, tensor.dtype) for tensor in w))
        if key not in self.built:
            self.built.setdefault(key, self._build(s, B, T))  # the same one for all threads
        return self.built[key]

    def _build(self, s: BandShape, B: int, T: int) -> Calls:
        backend = self.backend
        cell = backend.cell(T, chunk_size=self.chunk_size, t_inner=self.t_inner, compiler=self.compiler)

        def build(name: str, fn: Callable) -> Callable:
            return self.compiler(fn, f"{name}_{B}x{T}") if backend.compiled else fn

        feed_call = build("feed", lambda x, w: feed(x, w, s))
        if backend.cell_inside(T):
            return Calls(
                build("block", lambda x, w, state, first, last: block(x, w, state, first, last, s, cell)),
                build("mix", lambda x, w, state, first, last: mix(x, w, state, first, last, s, cell)),
                feed_call,
            )
        before = build("mix_in", lambda x, w, first, last: mix_in(x, w, first, last, s))
        after = build("mix_out", lambda h, o, w: mix_out(h, o, w, s))

        def mix_call(x: Tensor, w: BlockWeights, state: State, first: Tensor, last: Tensor) -> tuple[Tensor, State]:
            q, k, v, o, i, f = before(x, w, first, last)
            h, state = cell(q, k, v, i=i, f=f, state=state, eps=s.eps)
            return after(h, o, w), state

        def block_call(x: Tensor, w: BlockWeights, state: State, first: Tensor, last: Tensor) -> tuple[Tensor, State]:
            y, state = mix_call(x, w, state, first, last)
            x = x + y
            return x + feed_call(x, w), state

        return Calls(block_call, mix_call, feed_call)


def join_bands(bands: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The bands' tensors of a stage as one: heads are dimension 1 of each."""
    first, *others = bands
    return {name: torch.cat([part, *(o[name] for o in others)], 1) for name, part in first.items()}


class Worker:
    """Weights and state of one (stage, band). Plain torch: knows neither threads nor Ray.

    With all heads in one band, `run_block` does a whole block in one call; with several, `mix` and `feed` return this
    band's partial sums of x (B, T, D), which the executor adds up.
    """

    def __init__(self, config: ModelConfig, band: Band, blocks: list[BlockWeights], ends: EndWeights, kernels: Kernels):
        self.config, self.band, self.blocks, self.ends, self.kernels = config, band, blocks, ends, kernels
        self.shape = BandShape.of(config, len(band.heads))
        self.device, self.dtype = blocks[0].qkvo.device, blocks[0].qkvo.dtype
        self.state: list[State] = []

    def fresh_state(self, batch: int) -> State:
        """One block's state before the first token: all zeros, m too. C (B, nh, K, V), n (B, nh, K), m (B, nh, 1)."""
        nh, K, V = len(self.band.heads), self.config.dhqk, self.config.dhhv
        shapes = (batch, nh, K, V), (batch, nh, K), (batch, nh, 1)
        C, n, m = (torch.zeros(shape, device=self.device) for shape in shapes)
        return C, n, m

    def set_state(self, tensors: Mapping[str, Tensor] | None, batch: int) -> None:
        """Go on from these tensors of all heads, named as in RecurrentState, or forget everything.

        Copied, with the strides that the kernels are compiled for.
        """
        self.state = [self.fresh_state(batch) for _ in self.band.blocks]
        if tensors is not None:
            heads = slice(self.band.heads.start, self.band.heads.stop)
            for n, state in zip(self.band.blocks, self.state, strict=True):
                for part, name in zip(state, STATE_PARTS, strict=True):
                    part.copy_(tensors[f"blocks.{n}.{name}"][:, heads])

    def get_state(self, state: list[State] | None = None) -> dict[str, Tensor]:
        """This band's tensors on the CPU, named as in RecurrentState: of now, or of an earlier `self.state`."""
        blocks = zip(self.band.blocks, state or self.state, strict=True)
        return {
            f"blocks.{n}.{name}": part.cpu()
            for n, parts in blocks
            for part, name in zip(parts, STATE_PARTS, strict=True)
        }

    def warm_up(self, batch: int, tokens: int, *, alone: bool) -> None:
        """Compile for windows (batch, tokens) by running block 0 once on zeros; the state stays as it is."""
        x = torch.zeros(batch, tokens, self.config.hidden_size, dtype=self.dtype, device=self.device)
        first = torch.zeros(batch, dtype=torch.long, device=self.device)
        args = (x, self.blocks[0], self.fresh_state(batch), first, first + tokens)
        calls = self._calls(x)
        if alone:
            calls.block(*args)
        else:
            calls.mix(*args)
            calls.feed(x, self.blocks[0])

    def embed(self, tokens: Tensor) -> Tensor:
        """tokens (B, T) int64 -> residual stream (B, T, D) on this worker's device."""
        assert self.ends.embedding is not None
        return F.embedding(tokens.to(self.device), self.ends.embedding)

    def logits(self, x: Tensor) -> Tensor:
        """x (..., D) after the last block -> (..., vocabulary) float32."""
        return logits(x.to(self.device), self.ends, self.config)

    def run_block(self, n: int, x: Tensor, first: Tensor, last: Tensor) -> Tensor:
        """All of this stage's n-th block, where this band has all heads; its state moves on."""
        x, self.state[n] = self._calls(x).block(x, self.blocks[n], self.state[n], first, last)
        return x

    def mix(self, n: int, x: Tensor, first: Tensor, last: Tensor) -> Tensor:
        """This band's share of the mLSTM half of block n; its state moves on."""
        y, self.state[n] = self._calls(x).mix(x, self.blocks[n], self.state[n], first, last)
        return y

    def feed(self, n: int, x: Tensor) -> Tensor:
        """This band's share of the feed-forward half of block n."""
        return self._calls(x).feed(x, self.blocks[n])

    def _calls(self, x: Tensor) -> Calls:
        return self.kernels.calls(self.shape, self.blocks[0], x.shape[0], x.shape[1])
