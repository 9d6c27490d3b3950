"""The Triton kernels against float64: tiles and steps, padding, bands, gates at their caps, float8, equal bits.

On a machine without a GPU they run in Triton's interpreter, which is slow and rounds to bfloat16 towards zero.
"""

from functools import cache, partial

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")  # it has no wheel for macOS

from interpreter import DEVICE  # makes the interpreter right about bfloat16, so before the kernels
from tiny import make_model

from xlstm_ray.checkpoint import Checkpoint
from xlstm_ray.config import ModelConfig
from xlstm_ray.kernels import CHUNKWISE_BACKENDS
from xlstm_ray.kernels.fit import TABLE, Asked, misfit
from xlstm_ray.kernels.native import mlstm_sequence
from xlstm_ray.kernels.triton_decode import ROWS, Rows, Scratch, enter, skinny
from xlstm_ray.kernels.triton_products import add_product8, glu, product8, quantized, quantized_rows
from xlstm_ray.layout import make_layout
from xlstm_ray.model import BandShape, BlockWeights, ffn, mlstm_mixer, whole_block
from xlstm_ray.runtime.blocks import Kernels
from xlstm_ray.runtime.executor import decoding_step
from xlstm_ray.runtime.folded import fold
from xlstm_ray.runtime.graphs import Graphs
from xlstm_ray.runtime.triton_blocks import StepBlock, TileBlock
from xlstm_ray.runtime.worker import Move, Worker, build_worker

D, NH, K, V, F, L = 64, 2, 32, 64, 96, 64
S = BandShape(NH, K, V, 0, 1e-6, 1e-6, 15.0)
TIMES = 100 if DEVICE.type == "cuda" else 2  # the same bits so many times
BF16 = torch.bfloat16


def random(*shape: int, scale: float = 1.0, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def block_weights(heads: range = range(NH)) -> BlockWeights:
    """A band of one random block: gates of the first head never forget, those of the second do."""
    n = len(heads)

    def rows(width: int, seed: int) -> Tensor:
        return random(NH * width, D, scale=D**-0.5, seed=seed)[heads.start * width : heads.stop * width]

    def gate(seed: int, bias: list[float]) -> tuple[Tensor, Tensor]:
        weight = random(NH, D, scale=2 * D**-0.5, seed=seed)[heads.start : heads.stop]
        return weight, torch.tensor(bias)[heads.start : heads.stop]

    (i, i_bias), (f, f_bias) = gate(5, [-30.0, 0.0]), gate(6, [30.0, 2.0])
    columns = slice(F * heads.start // NH, F * heads.stop // NH)
    v = slice(heads.start * V, heads.stop * V)
    gate_rows, up_rows = (random(F, D, scale=D**-0.5, seed=seed)[columns] for seed in (8, 9))
    made = BlockWeights(
        mixer_norm=1 + random(D, scale=0.1, seed=10),
        mixer_norm_bias=None,
        qkvo=torch.cat([rows(K, 1), rows(K, 2), rows(V, 3), rows(V, 4)]),
        qkvo_bias=None,
        gates=torch.cat([i, f]),
        gates_bias=torch.cat([i_bias, f_bias]),
        head_norm=1 + random(NH * V, scale=0.1, seed=11)[v],
        head_norm_bias=None,
        out=random(D, NH * V, scale=(NH * V) ** -0.5, seed=7)[:, v],
        out_bias=None,
        ffn_norm=1 + random(D, scale=0.1, seed=12),
        ffn_norm_bias=None,
        up=torch.cat([gate_rows, up_rows]),
        up_bias=None,
        down=random(D, F, scale=F**-0.5, seed=13)[:, columns],
        down_bias=None,
    )
    assert n * 2 == len(made.gates)
    exact = "gates", "gates_bias"
    return BlockWeights(
        *(None if part is None else part.to(DEVICE, torch.float32 if name in exact else BF16).contiguous()
          for name, part in zip(made._fields, made, strict=True))
    )  # fmt: skip


def double(parts: tuple[Tensor | None, ...]) -> list[Tensor | None]:
    return [None if part is None else part.cpu().double() for part in parts]


def reference(x: Tensor, state: tuple[Tensor, ...], start: Tensor, end: Tensor):
    """A whole block in float64, token by token."""
    block = whole_block(
        lambda *args: mlstm_mixer(*args, S, mlstm_sequence),  # type: ignore[misc]
        lambda x, w: ffn(x, w, S),
    )
    w = BlockWeights(*double(block_weights()))
    return block(x.cpu().double(), w, tuple(double(state)), start.cpu(), end.cpu())


def error(out: Tensor, ref: Tensor) -> float:
    return ((out.cpu().double() - ref).norm() / ref.norm()).item()


def assert_state(state: tuple[Tensor, ...], ref: tuple[Tensor, ...], tolerance: float, m_off: float = 1e-4) -> None:
    (C, n, m), (C_ref, n_ref, m_ref) = double(state), ref
    scale = torch.exp(m - m_ref)
    assert (m - m_ref).abs().max() <= m_off
    assert max(error(C * scale.unsqueeze(-1), C_ref), error(n * scale, n_ref)) <= tolerance


def inputs(B: int, T: int) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor], Tensor, Tensor]:
    """x, a used state, and rows whose first or last tokens are padding."""
    x = random(B, T, D, seed=20).to(DEVICE, BF16)
    state = random(B, NH, K, V, seed=21), random(B, NH, K, seed=22).abs(), random(B, NH, 1, seed=23)
    start = torch.tensor([0, T // 2 + 3, 0, 0][:B]) if T > 1 else torch.zeros(B, dtype=torch.long)
    end = torch.tensor([T, T, T - 5, 0][:B])
    return x, tuple(part.to(DEVICE) for part in state), start.to(DEVICE), end.to(DEVICE)  # type: ignore[return-value]


FLOAT8 = {False: 1.2e-2, True: 0.12}  # of a whole block: bfloat16 rounds by up to 2^-8, e4m3 by 2^-4


@cache
def folded(float8: bool):
    return fold(block_weights(), float8=float8)


@pytest.mark.parametrize("float8", FLOAT8)
def test_a_tile_equals_float64_with_padding_first_and_last(float8):
    x, state, start, end = inputs(2 if float8 else 3, 2 * L)
    ref, ref_state = reference(x, state, start, end)
    kept = [part.clone() for part in state]
    out, made = TileBlock(S, L).block(x.clone(), folded(float8), state, start, end)
    token = (torch.arange(2 * L) >= start.cpu()[:, None]) & (torch.arange(2 * L) < end.cpu()[:, None])
    assert error(out.cpu()[token], ref[token]) <= FLOAT8[float8]
    assert_state(made, ref_state, FLOAT8[float8])
    assert all(torch.equal(part, old) for part, old in zip(state, kept, strict=True)), "the old state is a value"
    assert out.isfinite().all(), "what a block makes of padding goes into the next block"


@pytest.mark.parametrize("float8", FLOAT8)
@pytest.mark.parametrize("B", [1, 4])
def test_a_step_equals_float64_and_a_row_without_a_token_keeps_its_state_to_the_bit(B, float8):
    x, state, start, end = inputs(B, 1)
    end = (torch.arange(B) != 2).long().to(DEVICE)
    ref, ref_state = reference(x, state, start, end)
    out, made = StepBlock(S).block(x.clone(), folded(float8), state, start, end)
    on = end.bool().cpu()
    assert error(out.cpu()[on], ref[on]) <= FLOAT8[float8]
    assert_state(made, ref_state, FLOAT8[float8])
    assert all(torch.equal(new[~on], old[~on]) for new, old in zip(double(made), double(state), strict=True))


def test_a_tile_finds_states_by_their_addresses_too():
    x, state, start, end = inputs(2, L)
    out, made = TileBlock(S, L).block(x.clone(), folded(False), state, start, end)
    written = [torch.full_like(part, torch.nan) for part in made]
    places = torch.tensor([part.data_ptr() for part in (*state, *written)]).to(DEVICE)
    rows = x.clone().flatten(0, 1)
    TileBlock(S, L).tile_block(rows, folded(False), places, (start, end))
    assert torch.equal(rows.view_as(out), out)
    assert all(map(torch.equal, written, made))


@pytest.mark.parametrize("T", [L, 1])
def test_bands_add_up_to_the_whole(T):
    x, state, start, end = inputs(2, T)
    ref, ref_state = reference(x, state, start, end)
    sums, parts = x.clone(), []
    for head in range(NH):
        w, band = fold(block_weights(range(head, head + 1))), S._replace(heads=1)
        functions = TileBlock(band, L) if T > 1 else StepBlock(band)
        y, made = functions.mixer(x, w, tuple(part[:, head : head + 1].contiguous() for part in state), start, end)
        sums, parts = sums + y, [*parts, made]
    assert_state(tuple(torch.cat(each, 1) for each in zip(*parts, strict=True)), ref_state, 1.2e-2)
    out = sums.clone()
    for head in range(NH):
        w, band = fold(block_weights(range(head, head + 1))), S._replace(heads=1)
        functions = TileBlock(band, L) if T > 1 else StepBlock(band)
        out = out + functions.ffn(sums, w)
    rows = [(b, t) for b in range(2) for t in range(T) if start[b] <= t < end[b]]
    assert error(torch.stack([out.cpu()[at] for at in rows]), torch.stack([ref[at] for at in rows])) <= 2e-2


def test_gates_at_their_caps_do_not_drift_over_many_tiles_and_steps():
    """The first head's forget gate is at its cap: what it forgets over 2,000 tokens is 6e-4 of its state."""
    x, state, _, _ = inputs(1, L)
    x = torch.zeros_like(x)
    x[..., 0] = 1e-3  # no input: only the decay changes the state
    start, end = torch.zeros(1, dtype=torch.long, device=DEVICE), torch.full((1,), L, device=DEVICE)
    ref_state: tuple[Tensor, ...] = tuple(double(state))
    tiles, steps = (30, 60) if DEVICE.type == "cuda" else (2, 3)
    for _ in range(tiles):
        _, ref_state = reference(x, ref_state, start, end)
        _, state = TileBlock(S, L).block(x.clone(), folded(False), state, start, end)
    for _ in range(steps):
        _, ref_state = reference(x[:, :1], ref_state, start, start + 1)
        _, state = StepBlock(S).block(x[:, :1].clone(), folded(False), state, start, start + 1)
    (C, n, m), (C_ref, n_ref, m_ref) = double(state), ref_state
    head = slice(0, 1)  # it keeps its beginning; the other head holds only bfloat16 products by now
    scale = torch.exp(m - m_ref)
    assert error((C * scale.unsqueeze(-1))[:, head], C_ref[:, head]) <= 2e-5
    assert error((n * scale)[:, head], n_ref[:, head]) <= 2e-5


@pytest.mark.parametrize("B", [1, 5])
@pytest.mark.parametrize("name", ROWS)
def test_a_product_of_few_rows_equals_float64(name, B):
    """Also with numbers of rows and columns that no block size divides."""
    inner, columns = 88 if name == "down" else D, D if name in ("out", "down") else 70
    x, w = random(B, inner).to(DEVICE, BF16), random((1 + (name == "up")) * columns, inner, seed=1).to(DEVICE, BF16)
    scratch = Scratch(B, D, NH, V, DEVICE)
    norm = None if name in ("out", "down") else 1e-6
    out = random(B, columns, seed=2).to(DEVICE, BF16 if name in ("out", "up", "down") else torch.float32)
    x64, w64, ref = x.cpu().double(), w.cpu().double(), out.cpu().double()
    if norm is not None:
        enter(x, scratch)
        x64 = x64 * torch.rsqrt(x64.pow(2).mean(-1, keepdim=True) + norm)
    y = x64 @ w64.T
    if name == "up":
        y = torch.nn.functional.silu(y[:, ::2]) * y[:, 1::2]
    ref = ref + y if name in ("out", "down") else y
    ref = 30 * torch.tanh(ref / 30) if name == "head" else ref
    skinny(name, x, Rows(w), out, scratch, norm_eps=norm, cap=30.0 if name == "head" else 0.0)
    assert error(out, ref) <= (8e-3 if out.dtype == BF16 else 1e-5)
    if name in ("out", "down") and B > 1:
        assert error(scratch.squares.sum(0), out.cpu().double().pow(2).sum(-1)) <= 1e-5
        other = Scratch(B, D, NH, V, DEVICE)
        enter(out, other)  # as a stage begins: to the same bits
        assert torch.equal(scratch.squares, other.squares)
    assert not scratch.counter.any()


def test_float8_products_equal_what_their_operands_say():
    x, added = random(L, D).to(DEVICE, BF16), random(L, D, seed=1).to(DEVICE, BF16)
    w = random(48, D, seed=2).to(DEVICE, BF16)
    total = (x.float() + added.float()).to(BF16)
    x8, scale = quantized(x, added, norm_eps=1e-6)
    assert error(x, total.cpu().double()) <= 4e-3
    normed = x.cpu().double() * torch.rsqrt(x.cpu().double().pow(2).mean(-1, keepdim=True) + 1e-6)
    assert error(x8.float() * scale, normed) <= 0.05
    w8, w_scale = quantized_rows(w)
    assert error(w8.float() * w_scale.t(), w.cpu().double()) <= 0.05
    exact = (x8.cpu().double() * scale.cpu().double()) @ (w8.cpu().double() * w_scale.cpu().double().t()).t()
    assert error(product8((x8, scale), (w8, w_scale)), exact) <= 5e-3
    ref = torch.nn.functional.silu(exact[:, ::2]) * exact[:, 1::2]
    assert error(glu(x8, w8, (scale, w_scale), eps=0.0), ref) <= 1e-2
    out = random(L, 48, seed=3).to(DEVICE, BF16)
    ref = out.cpu().double() + exact
    add_product8(out, (x8, scale), (w8, w_scale))
    assert error(out, ref) <= 8e-3


@pytest.mark.parametrize("float8", FLOAT8)
def test_the_same_bits_again(float8):
    """An unordered sum, or a tile that is overwritten while it is read, shows only so."""
    for T, functions in ((2 * L if DEVICE.type == "cuda" else L, TileBlock(S, L)), (1, StepBlock(S))):
        x, state, start, end = inputs(3 if DEVICE.type == "cuda" else 2, T)
        run = partial(functions.block, w=folded(float8), state=state, start=start, end=end)
        out, made = run(x.clone())
        for _ in range(TIMES - 1):
            again, state_again = run(x.clone())
            assert torch.equal(out, again)
            assert all(map(torch.equal, made, state_again))


CONFIG = {"hidden_size": 4096, "num_blocks": 32, "num_heads": 8, "vocab_size": 50304}


@pytest.mark.parametrize(
    ("config", "asked", "said"),
    [
        ({}, {}, None),
        ({}, {"dtype": "float8"}, None),
        ({}, {"capability": (8, 9)}, "the GPU's compute capability is 8.9; the Triton kernels take 9.0"),
        ({}, {"capability": None}, "the GPU's compute capability is not known"),
        ({}, {"dtype": "float32"}, "the dtype is float32; the Triton kernels take bfloat16 or float8"),
        ({}, {"chunk": 32}, "the chunk size is 32; the Triton kernels take 64, 128 or 256"),
        ({}, {"columns": [10, 12]}, "a band's feed-forward columns is [10, 12]"),
        ({"num_heads": 4}, {}, "DHQK is 512; the Triton kernels take 32, 64, 128 or 256"),
        ({"qk_dim_factor": 0.375}, {}, "DHQK is 192"),
        ({"use_bias": True}, {}, "use_bias is True; the Triton kernels take false"),
        ({"gate_soft_cap": None}, {}, "gate_soft_cap is None"),
        ({"slstm_at": [1]}, {}, "slstm_at is [1]; the Triton kernels take no sLSTM blocks"),
    ],
)
def test_one_table_says_what_they_take(config, asked, said):
    whole = {"chunk": 256, "dtype": "bfloat16", "capability": (9, 0), "columns": [10944]} | asked
    found = misfit(Asked(ModelConfig.from_dict({"model_type": "xlstm"} | CONFIG | config), **whole))
    assert found is None if said is None else found is not None and found.startswith(said)


def test_each_row_of_the_table_refuses_something():
    assert len({name for name, *_ in TABLE}) == len(TABLE)


def test_a_worker_of_two_blocks_equals_float64_from_tokens_to_logits(tmp_path):
    """Tiles, then tokens in one go through all blocks; the head has the out norm folded in."""
    make_model(tmp_path, hidden_size=D, num_hidden_layers=2, num_heads=2, chunk_size=L, qk_dim_factor=1.0)
    config = ModelConfig.from_file(tmp_path / "config.json")
    assert misfit(Asked(config, [config.ffn_dim], L, "bfloat16", (9, 0))) is None
    ((shard,),) = make_layout(config, heads_per_band=2)
    ids, first = torch.randint(0, 256, (2, L + 2), generator=torch.Generator().manual_seed(2)), torch.zeros(2).long()

    def worker(backend: str, dtype: torch.dtype) -> Worker:
        kernels = Kernels(CHUNKWISE_BACKENDS[backend], t_inner=1)
        device = DEVICE if "triton" in backend else torch.device("cpu")
        made = build_worker(Checkpoint(tmp_path, config), kernels, shard, dtype=dtype, device=device)
        made.load(0, None, 2)
        return made

    plain = worker("native", torch.float64)
    plain.blocks = [type(w)(*double(w)) for w in plain.blocks]  # type: ignore[arg-type]
    plain.states[0] = [tuple(double(state)) for state in plain.states[0]]  # type: ignore[misc, arg-type]
    x, move = plain.embed(ids), Move(0, 0, first, first + L + 2, L)
    for n in range(2):
        x = plain.run_block(n, x, move)
    ref = plain.logits(x[:, L:])
    ours = worker("queued_triton_chunks", BF16)
    x, move = ours.embed(ids[:, :L]), Move(0, 0, first.to(DEVICE), first.to(DEVICE) + L, L)
    for n in range(2):
        x = ours.run_block(n, x, move)
    tokens = Graphs(ours, capture=False)
    for t in (L, L + 1):
        step = decoding_step(ids[:, t].tolist(), in_place=True)
        outcome = tokens.step(0, step.tokens, step)
        assert outcome.logits is not None
        assert error(outcome.logits, ref[:, t - L]) <= 1e-1
    for n, state in enumerate(ours.states[0]):
        assert state is not None
        assert_state(state, plain.states[0][n], 1e-1, m_off=5e-2)  # type: ignore[arg-type]
