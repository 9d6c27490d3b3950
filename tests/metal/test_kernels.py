"""Every compiled kernel on mps, in both dtypes and for one and two rows, against the steps of native.py in float64."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from xlstm_ray.config import ModelConfig
from xlstm_ray.kernels import CHUNKWISE_BACKENDS, sequence_kernel, slstm_kernel, step_kernel
from xlstm_ray.kernels.chunkwise import mlstm_chunkwise
from xlstm_ray.kernels.compiled import compile_each
from xlstm_ray.kernels.native import State, log_sigmoid, mlstm_sequence, slstm_sequence
from xlstm_ray.kernels.quantized import Quantized, packed, quantize, unpacked
from xlstm_ray.layout import Shard
from xlstm_ray.model import BlockWeights, EndWeights, SlstmWeights, Weights, few_rows_product
from xlstm_ray.runtime.blocks import Kernels
from xlstm_ray.runtime.worker import Move, Worker

from . import shaders
from .simulator import Simulator

NH, K, V = 2, 16, 24
DTYPES = (torch.float32, torch.bfloat16)
BATCHES = (1, 2)

# ||out - ref|| / ||ref||. bfloat16: inputs are rounded before both sides see them, what is left is the operands' and
# the output's own rounding (2^-9 each); the state of the step kernels is float32 throughout.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 6e-3}

both_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=("float32", "bfloat16"))
both_batches = pytest.mark.parametrize("batch", BATCHES)


def draw(dtype: torch.dtype, batch: int, T: int) -> tuple[dict[str, Tensor], State]:
    """Inputs q, k, v (B, NH, T, .) in `dtype`, i, f (B, NH, T) up to their cap of 15, and a state, on the CPU.

    q, k and n are positive: a denominator near zero would magnify the rounding of inputs beyond any tolerance.
    """
    g = torch.Generator().manual_seed(T)
    shapes = {"q": (T, K), "k": (T, K), "v": (T, V), "i": (T,), "f": (T,)}
    inputs = {name: torch.randn(batch, NH, *shape, generator=g) for name, shape in shapes.items()}
    inputs |= {"q": inputs["q"].abs().to(dtype), "k": inputs["k"].abs().to(dtype), "v": inputs["v"].to(dtype)}
    inputs["i"] = 15 * torch.tanh(inputs["i"] / 3)
    inputs["f"] = 15 * torch.tanh((inputs["f"] * 5 + 5) / 15)
    shapes = {"C": (K, V), "n": (K,), "m": (1,)}
    C, n, m = (torch.randn(batch, NH, *shape, generator=g) for shape in shapes.values())
    return inputs, (C, n.abs(), m)


def reference(inputs: dict[str, Tensor], state: State) -> list[Tensor]:
    """h, C, n, m of the float64 steps."""
    wide = {name: x.double() for name, x in inputs.items()}
    C, n, m = (x.double() for x in state)
    h, state = mlstm_sequence(wide["q"], wide["k"], wide["v"], i=wide["i"], f=wide["f"], state=(C, n, m))
    return [h, *state]


def error(got: Tensor, want: Tensor) -> float:
    return ((got.cpu().double() - want).norm() / want.norm()).item()


def assert_close(got: tuple[Tensor, State], want: list[Tensor], dtype: torch.dtype, *, state: float) -> None:
    """`state` is the tolerance of the state after the last token, always float32."""
    h, (C, n, m) = got
    assert h.dtype == dtype
    assert C.dtype == n.dtype == m.dtype == torch.float32
    errors = {name: error(x, y) for name, x, y in zip("hCnm", (h, C, n, m), want, strict=True)}
    allowed = {"h": TOLERANCE[dtype], "C": state, "n": state, "m": 1e-6}
    assert all(errors[name] <= allowed[name] for name in errors), errors


def to_mps(inputs: dict[str, Tensor], state: State) -> tuple[dict[str, Tensor], State]:
    C, n, m = (x.to("mps") for x in state)
    return {name: x.to("mps") for name, x in inputs.items()}, (C, n, m)


@both_dtypes
@both_batches
def test_step(simulator: Simulator, dtype: torch.dtype, batch: int) -> None:
    inputs, state = draw(dtype, batch, 1)
    want = reference(inputs, state)
    x, on_mps = to_mps({name: value[:, :, 0] for name, value in inputs.items()}, state)
    kernel = step_kernel("metal")
    for order in shaders.ORDERS:
        with simulator.order(order):
            h, new = kernel(x["q"], x["k"], x["v"], i=x["i"], f=x["f"], state=on_mps)
        assert_close((h.unsqueeze(2), new), want, dtype, state=TOLERANCE[torch.float32])
    assert len(simulator.launches()) <= 2 * 4


@both_dtypes
@both_batches
def test_unrolled_steps(simulator: Simulator, dtype: torch.dtype, batch: int) -> None:
    inputs, state = draw(dtype, batch, 7)
    want = reference(inputs, state)
    x, on_mps = to_mps(inputs, state)
    kernel = sequence_kernel("native_sequence__metal", t_inner=2)  # the last part is shorter than T_inner
    for order in shaders.ORDERS:
        with simulator.order(order):
            got = kernel(x["q"], x["k"], x["v"], i=x["i"], f=x["f"], state=on_mps, eps=1e-6)
        assert_close(got, want, dtype, state=TOLERANCE[torch.float32])


@both_dtypes
@both_batches
def test_chunks(simulator: Simulator, dtype: torch.dtype, batch: int) -> None:
    inputs, state = draw(dtype, batch, 48)
    want = reference(inputs, state)
    x, on_mps = to_mps(inputs, state)
    kernel = compile_each(mlstm_chunkwise, "mlstm_chunks")
    for order in shaders.ORDERS:
        with simulator.order(order):
            got = kernel(x["q"], x["k"], x["v"], i=x["i"], f=x["f"], state=on_mps, chunk_size=16)
        # What a chunk adds to the state is a product of operands in the model's dtype.
        assert_close(got, want, dtype, state=TOLERANCE[dtype])


@both_batches
def test_slstm(simulator: Simulator, batch: int) -> None:
    """Gates and state are float32 whatever the model's dtype."""
    T, DH = 7, 12
    g = torch.Generator().manual_seed(batch)
    x = 2 * torch.randn(batch, NH, T, 4, DH, generator=g)
    recurrent = torch.randn(NH, DH, 4 * DH, generator=g) * DH**-0.5
    token = torch.ones(batch, 1, T, dtype=torch.bool)
    token[-1, :, 5:] = False
    token[0, :, 0] = False
    h, c, n, m = torch.randn(4, batch, NH, DH, generator=g)
    for state in ((torch.tanh(h), c, 1 + n.abs(), m), tuple(torch.zeros_like(part) for part in (h, c, n, m))):
        wide = [part.double() for part in state]
        want_h, want = slstm_sequence(x.double(), recurrent=recurrent.double(), token=token, state=tuple(wide))  # type: ignore[arg-type]
        kernel = slstm_kernel("native_compiled", t_inner=2)  # 2, 2, 2 and 1
        for order in shaders.ORDERS:
            simulator.clear_counts()
            with simulator.order(order):
                got_h, got = kernel(
                    x.to("mps"), recurrent=recurrent.to("mps"), token=token.to("mps"),
                    state=tuple(part.to("mps") for part in state),
                )  # fmt: skip
            real = token.transpose(1, 2).unsqueeze(1).expand(-1, NH, -1, -1).expand_as(want_h)
            assert error(got_h.cpu()[real], want_h[real]) < TOLERANCE[torch.float32]
            for a, b in zip(got, want, strict=True):
                assert error(a, b) < TOLERANCE[torch.float32]
            # A Metal kernel a step, and the first run's products; the second of two runs hands its h on.
            assert len(simulator.launches()) <= T
            assert simulator.operators()["aten::bmm.out"] == T
            assert max(len(kernel.parameters) for kernel in simulator.launches()) <= shaders.MAX_BUFFERS


@both_batches
def test_the_head_of_few_rows(simulator: Simulator, batch: int) -> None:
    """bfloat16 operands, a float32 result: one pass over the head."""
    g = torch.Generator().manual_seed(4)
    x, head = (torch.randn(n, 300, generator=g).bfloat16() for n in (batch, 70))
    kernel = compile_each(few_rows_product, "head")
    for order in shaders.ORDERS:
        simulator.clear_counts()
        with simulator.order(order):
            got = kernel(x.to("mps"), head.to("mps"))
        assert got.dtype == torch.float32
        assert error(got, x.double() @ head.double().T) < TOLERANCE[torch.float32]
        assert len(simulator.launches()) <= batch + 1


# ---- whole blocks, as prefill and decoding call them

CONFIG = ModelConfig.from_dict(
    {
        "model_type": "xlstm", "vocab_size": 64, "hidden_size": 48, "num_blocks": 1, "num_heads": NH,
        "qk_dim_factor": 2 * K / 48, "v_dim_factor": 1.0, "ffn_round_up_to_multiple_of": 8, "chunk_size": 16,
    }
)  # fmt: skip


def random_weights(dtype: torch.dtype) -> BlockWeights:
    g = torch.Generator().manual_seed(1)
    D, F = CONFIG.hidden_size, CONFIG.ffn_dim
    shapes = {
        "mixer_norm": (D,), "qkvo": (2 * NH * (K + V), D), "gates": (2 * NH, D), "gates_bias": (2 * NH,),
        "head_norm": (NH * V,), "out": (D, NH * V), "ffn_norm": (D,), "up": (2 * F, D), "down": (D, F),
    }  # fmt: skip
    weights = {}
    for name, shape in shapes.items():
        w = torch.randn(shape, generator=g) * (1.0 if len(shape) == 1 else shape[1] ** -0.5) + name.endswith("norm")
        weights[name] = w if name.startswith("gates") else w.to(dtype)
    weights["gates_bias"] += torch.tensor([-2.0] * NH + [4.0] * NH)  # gates that remember
    biases = dict.fromkeys(name for name in BlockWeights._fields if name not in weights)
    return BlockWeights(**weights, **biases)  # type: ignore[arg-type]


def random_slstm_weights(dtype: torch.dtype, head: int | None = None) -> SlstmWeights:
    """A block's functions for all heads, or for a band of one head."""
    g = torch.Generator().manual_seed(3)
    D, DH, heads = CONFIG.hidden_size, CONFIG.dh, slice(head, None if head is None else head + 1)
    shared = random_weights(dtype)
    bias = torch.randn(NH, 4, DH, generator=g)
    bias[:, 1] += 3
    return SlstmWeights(
        mixer_norm=shared.mixer_norm,
        mixer_norm_bias=None,
        gates=(2 * torch.randn(NH, 4 * DH, DH, generator=g) * DH**-0.5)[heads],
        recurrent=(torch.randn(NH, DH, 4 * DH, generator=g) * DH**-0.5)[heads],
        gates_bias=bias.flatten(1)[heads],
        head_norm=(1 + 0.5 * torch.randn(NH, D // NH, generator=g))[heads].flatten(),
        channel=torch.tensor(0 if head is None else head * DH),
        **{name: getattr(shared, name) for name in SlstmWeights._fields if name.startswith(("ffn", "up", "down"))},
    )


def cast(weights: Weights, to: torch.dtype | str) -> Weights:
    """Move to a device or dtype; the sLSTM's offset keeps its dtype, since it is not a weight."""
    parts = (w if w is None or isinstance(to, torch.dtype) and w.dtype == torch.long else w.to(to) for w in weights)
    return type(weights)._make(parts)


def worker_of(backend: str, weights: Weights, head: int | None = None) -> Worker:
    """head: where the weights are of a band of this head only; then all of the feed-forward is this band's."""
    config = CONFIG.model_copy(update={"slstm_at": (0,)}) if isinstance(weights, SlstmWeights) else CONFIG
    heads = range(NH) if head is None else range(head, head + 1)
    shard = Shard(range(1), heads, range(CONFIG.ffn_dim))
    kernels = Kernels(CHUNKWISE_BACKENDS[backend], t_inner=4)
    return Worker(config, shard, [weights], EndWeights(None, None, None), kernels)


def run_block(
    worker: Worker, x: Tensor, state: tuple[Tensor, ...], rows: list[slice], *, one_band: bool
) -> list[Tensor]:
    """The residual stream after a block and the state, on the CPU in float64; rows[b]: row b's tokens without padding.

    A worker compiles each shape once.
    """
    names = "hcnm" if isinstance(worker.blocks[0], SlstmWeights) else "Cnm"
    worker.load(0, {f"blocks.0.{name}": part for name, part in zip(names, state, strict=True)}, x.shape[0])
    parts = [torch.tensor(ends, device=x.device) for ends in ([r.start for r in rows], [r.stop for r in rows])]
    move = Move(0, 1, *parts, CONFIG.chunk_size)
    if one_band:
        x = worker.run_block(0, x, move)
    else:
        x = x + worker.run_mixer(0, x, move)
        x = x + worker.run_ffn(0, x, move)
    return [y.cpu().double() for y in (x, *worker.save(1).values())]


@both_dtypes
@both_batches
@pytest.mark.parametrize(
    ("backend", "T"), [("queued_compiled_chunks", 32), ("queued_compiled_chunks", 1), ("queued_compiled_steps", 8)]
)
def test_block(simulator: Simulator, backend: str, T: int, batch: int, dtype: torch.dtype) -> None:
    weights = random_weights(dtype)
    g = torch.Generator().manual_seed(2)
    x = torch.randn(batch, T, CONFIG.hidden_size, generator=g).to(dtype)
    _, state = draw(dtype, batch, 1)
    rows = [slice(0, T), slice(2, T - 1)][:batch] if T > 1 else [slice(0, 1), slice(0, 0)][:batch]
    # The reference in float32: what is left is float32's own error, and that of the dtype under test.
    want = run_block(worker_of("native", cast(weights, torch.float32)), x.float(), state, rows, one_band=True)
    worker = worker_of(backend, cast(weights, "mps"))
    for order in shaders.ORDERS:
        with simulator.order(order):
            got = run_block(worker, x.to("mps"), state, rows, one_band=batch == 1)
        for b, row in enumerate(rows):
            if row.start < row.stop:
                assert error(got[0][b, row], want[0][b, row]) < (2e-6 if dtype == torch.float32 else 2e-2)
        for g_, w_ in zip(got[1:], want[1:], strict=True):
            assert error(g_, w_) < (3e-6 if dtype == torch.float32 else 2e-2)
    assert max(len(kernel.parameters) for kernel in simulator.launches()) <= shaders.MAX_BUFFERS
    # In Inductor's Welford reduction for Metal each thread reads the whole row.
    assert not any("= c10::metal::threadgroup_welford" in library.cpp for library in simulator.libraries)


@pytest.mark.parametrize(
    ("T", "batch", "head", "dtype"),
    [
        (8, 2, None, torch.bfloat16),
        (8, 2, 1, torch.float32),
        (1, 2, None, torch.float32),
        (1, 2, None, torch.bfloat16),
        (1, 1, 0, torch.bfloat16),
    ],
)
def test_slstm_block(simulator: Simulator, T: int, batch: int, head: int | None, dtype: torch.dtype) -> None:
    """All heads in one call, or one head: its own channels, and 0 in the other ones."""
    weights = random_slstm_weights(dtype, head)
    g = torch.Generator().manual_seed(2)
    x = torch.randn(batch, T, CONFIG.hidden_size, generator=g).to(dtype)
    h, c, n, m = torch.randn(4, batch, NH, CONFIG.dh, generator=g)
    state = torch.tanh(h), c, 1 + n.abs(), m
    rows = [slice(0, T), slice(2, T - 1)][:batch] if T > 1 else [slice(0, 1), slice(0, 0)][:batch]
    reference = worker_of("native", cast(weights, torch.float32), head)
    want = run_block(reference, x.float(), state, rows, one_band=head is None)
    worker = worker_of("queued_compiled_chunks", cast(weights, "mps"), head)
    for order in shaders.ORDERS:
        with simulator.order(order):
            got = run_block(worker, x.to("mps"), state, rows, one_band=head is None)
        for b, row in enumerate(rows):
            if row.start < row.stop:
                assert error(got[0][b, row], want[0][b, row]) < (2e-6 if dtype == torch.float32 else 2e-2)
        for g_, w_ in zip(got[1:], want[1:], strict=True):
            assert error(g_, w_) < (3e-6 if dtype == torch.float32 else 2e-2)
    assert max(len(kernel.parameters) for kernel in simulator.launches()) <= shaders.MAX_BUFFERS


# ---- the forget gate at its cap, where a token forgets 3e-7

TOKENS = 24_576  # a factor that is off by 3e-8 each time makes 7e-4 of them


def state_after(kernel: str, f: Tensor) -> tuple[list[Tensor], State]:
    """The state after TOKENS tokens with forget gates f, as the float64 closed form has it, and as the kernel on mps.

    One head of 4 x 4.
    """
    g = torch.Generator().manual_seed(5)
    q, k, v = (torch.randn(1, 1, TOKENS, 4, generator=g) for _ in range(3))
    i = torch.randn(1, 1, TOKENS, generator=g)
    fresh = torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 4), torch.zeros(1, 1, 1)
    wide = (x.double() for x in (q, k, v))
    C, n, m = (x.double() for x in fresh)
    _, want = mlstm_chunkwise(*wide, i=i.double(), f=f.double(), state=(C, n, m), chunk_size=512)

    chunks = compile_each(mlstm_chunkwise, "mlstm_chunks")
    steps = sequence_kernel("native_sequence__metal", t_inner=8)
    C, n, m = (x.to("mps") for x in fresh)
    state = C, n, m
    for t in range(0, TOKENS, 2048):
        part = slice(t, t + 2048)
        window = [x[:, :, part].contiguous().to("mps") for x in (q, k, v, i, f)]
        if kernel == "chunks":
            _, state = chunks(*window[:3], i=window[3], f=window[4], state=state, chunk_size=64)
        else:
            _, state = steps(*window[:3], i=window[3], f=window[4], state=state, eps=1e-6)
    return list(want), state


# The limit of float32: a factor exp(-3e-7) a token, rounded next to 1, would be off by up to 3e-8 each time.
# m itself is rounded at every step; the decay is taken from the rounded one, so that C exp(m) does not see it.
@pytest.mark.parametrize(("kernel", "of_m"), [("chunks", 1e-5), ("steps", 2e-3)])
def test_many_tokens_at_the_cap(simulator: Simulator, kernel: str, of_m: float) -> None:
    f = torch.full((1, 1, TOKENS), 15.0)
    (C, n, m), (C_got, n_got, m_got) = state_after(kernel, f)
    scale = torch.exp(m_got.cpu().double() - m)  # m may differ: C exp(m) and n exp(m) are what is stored
    assert (m_got.cpu() - m).abs().max() < of_m
    assert error(C_got.cpu() * scale.unsqueeze(-1), C) < 1e-5
    assert error(n_got.cpu() * scale, n) < 1e-5


def test_log_sigmoid_is_accurate_up_to_the_cap(simulator: Simulator) -> None:
    """Inductor writes log1p(x) as log(1 + x) on Metal, which is off by 20 % at f = 15; the kernels' form is not."""
    f = torch.cat([torch.linspace(-15, 15, 100_001), torch.full((64,), 15.0)])
    want = -torch.log1p(torch.exp(-f.double()))

    def largest_error(form: Callable[[Tensor], Tensor]) -> float:
        got = torch.compile(form, fullgraph=True, dynamic=False)(f.to("mps")).cpu().double()
        return ((got - want) / want).abs().max().item()

    assert largest_error(log_sigmoid) < 4e-7
    assert largest_error(torch.nn.functional.logsigmoid) > 0.1  # when this fails, torch's own log_sigmoid can be used


@pytest.mark.parametrize(
    ("bits", "T", "dtype"),
    [(8, 32, torch.bfloat16), (8, 1, torch.float32), (4, 32, torch.float32), (4, 1, torch.bfloat16)],
)
def test_block_of_integers(simulator: Simulator, bits: int, T: int, dtype: torch.dtype) -> None:
    """A tile and a token through a block of quantized matrices, against the same integers in float32 on the CPU."""

    def integers(weight: Tensor, to: torch.dtype) -> Quantized:
        values, *of_groups = quantize(weight, bits=bits, group=32)
        scale, zero = (None if part is None else part.to(to) for part in of_groups)
        assert scale is not None
        values = unpacked(packed(values, bits=bits), bits=bits, group=32)
        return Quantized.make(values, scale, zero, before=0, packed=False)

    plain = random_weights(torch.float32)

    def quantized(to: torch.dtype) -> BlockWeights:
        return plain._replace(**{name: integers(getattr(plain, name), to) for name in ("qkvo", "out", "up", "down")})

    x = torch.randn(1, T, CONFIG.hidden_size, generator=torch.Generator().manual_seed(2)).to(dtype)
    _, state = draw(dtype, 1, 1)
    rows = [slice(0, T)]
    want = run_block(worker_of("native", quantized(torch.float32)), x.float(), state, rows, one_band=True)
    worker = worker_of("queued_compiled_chunks", cast(quantized(dtype), "mps"))
    for order in shaders.ORDERS:
        with simulator.order(order):
            got = run_block(worker, x.to("mps"), state, rows, one_band=True)
        for mine, theirs in zip(got, want, strict=True):
            assert error(mine, theirs) < (3e-6 if dtype == torch.float32 else 2e-2)
    assert max(len(kernel.parameters) for kernel in simulator.launches()) <= shaders.MAX_BUFFERS
