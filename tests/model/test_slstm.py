"""sLSTM kernels, and whole models with sLSTM blocks, against float64 loops written here straight from the formulas.

transformers does not run sLSTM blocks, so the oracle of the models is `ask` below; it is compared with transformers
where it can be, on a model without them. Relative error means ||out - reference|| / ||reference||.
"""

import json
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from slstm import CASES, VOCABULARY, write_model
from tiny import make_model
from torch import Tensor

import xlstm_ray
from xlstm_ray import Engine, PrefillResult, RecurrentState
from xlstm_ray.checkpoint import Checkpoint
from xlstm_ray.config import ModelConfig
from xlstm_ray.engine import driver
from xlstm_ray.engine.held import HeldRows, States
from xlstm_ray.errors import CheckpointError, ConfigError, StateError, UsageError
from xlstm_ray.kernels import slstm_kernel
from xlstm_ray.layout import make_layout
from xlstm_ray.runtime.blocks import Kernels
from xlstm_ray.runtime.local import InProcessExecutor
from xlstm_ray.runtime.worker import Worker


def loop(x: Tensor, recurrent: Tensor, state: tuple[Tensor, ...], *, fresh: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The published recurrence in float64: x (B, NH, T, 4, DH) in the order i, f, z, o; recurrent (NH, DH, 4 DH)."""
    x, R = x.double(), recurrent.double()
    h, c, n, m = (part.double() for part in state)
    outputs = []
    for t in range(x.shape[2]):
        from_h = torch.einsum("bhp,hpg->bhg", h, R)
        i, f, z, o = (x[:, :, t, g] + from_h[..., g * h.shape[-1] : (g + 1) * h.shape[-1]] for g in range(4))
        kept = -torch.log1p(torch.exp(-f.clamp(max=15))) + m
        m_new = i if fresh and t == 0 else torch.maximum(i, kept)
        write = torch.exp(i - m_new).clamp(max=1)
        keep = torch.exp(kept - m_new).clamp(max=1)
        c, n, m = keep * c + write * torch.tanh(z), keep * n + write, m_new
        h = torch.sigmoid(o) * c / n
        outputs.append(h)
    return torch.stack(outputs, 2), (h, c, n, m)


class Run(NamedTuple):
    x: Tensor
    recurrent: Tensor
    token: Tensor
    state: tuple[Tensor, Tensor, Tensor, Tensor]


def make_run(B: int, NH: int, T: int, DH: int, *, fresh: bool = False, seed: int = 0) -> Run:
    """Random inputs with the memory layout of the model's projections; a fresh state or a used one."""
    g = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    x = 2 * rand(NH, B, T, 4, DH).transpose(0, 1)
    x[..., 1, :] += 2
    h, c, n, m = torch.tanh(rand(B, NH, DH)), rand(B, NH, DH), 1 + rand(B, NH, DH).abs(), 3 * rand(B, NH, DH)
    if fresh:
        h, c, n, m = (torch.zeros(B, NH, DH) for _ in range(4))
    return Run(x, rand(NH, DH, 4 * DH) * DH**-0.5, torch.ones(B, 1, T, dtype=torch.bool), (h, c, n, m))


def apply(kernel: Callable, run: Run, part: slice = slice(None), state: Any = None) -> tuple[Tensor, tuple]:
    x, token = run.x[:, :, part], run.token[:, :, part]
    return kernel(x, recurrent=run.recurrent, token=token, state=state or run.state)


def relative(out: Tensor, reference: Tensor) -> float:
    assert out.shape == reference.shape
    return ((out.double() - reference.double()).norm() / reference.double().norm()).item()


def assert_close(
    out: tuple[Tensor, tuple], reference: tuple[Tensor, tuple], tolerance: float, stored: float | None = None
) -> None:
    """c and n have the scale exp(m) for any m: compare c exp(m), and m itself loosely.

    stored: the tolerance of these, where it is another than that of the outputs, in which the scale cancels.
    """
    (h, (last, c, n, m)), (h_ref, (last_ref, c_ref, n_ref, m_ref)) = out, reference
    scale = torch.exp(m.double() - m_ref)
    errors = {"outputs": relative(h, h_ref), "h": relative(last, last_ref)}
    assert max(errors.values()) <= tolerance, errors
    errors = {"c": relative(c.double() * scale, c_ref), "n": relative(n.double() * scale, n_ref)}
    assert max(errors.values()) <= (stored or tolerance), errors
    assert (m.double() - m_ref).abs().max() <= 1e-3 * (1 + m_ref.abs().max())


@cache
def kernel(name: str) -> Callable:
    """One kernel for all tests, so that each shape is compiled once; with T_inner 4, 2 of 10 steps are left."""
    return slstm_kernel(name, t_inner=4)


SHAPES = {  # B, NH, T, DH
    "usual": (2, 3, 30, 8),
    "one row, one head": (1, 1, 13, 5),
    "one channel": (2, 2, 9, 1),
    "one token": (3, 2, 1, 4),
    "less than T_inner": (1, 2, 3, 4),
}
KERNELS = ["vanilla", "native_compiled"]


@pytest.mark.parametrize("fresh", [False, True], ids=["some state", "fresh state"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("name", KERNELS)
def test_kernels_equal_float64(name, shape, fresh, eager):
    run = make_run(*shape, fresh=fresh)
    before = [part.clone() for part in run.state]
    out = apply(kernel(name), run)
    assert_close(out, loop(run.x, run.recurrent, run.state, fresh=fresh), 2e-6)
    assert all(torch.equal(a, b) for a, b in zip(run.state, before, strict=True))  # the caller's state is unchanged


def test_the_reference_in_float64_equals_the_published_recurrence():
    run = make_run(2, 3, 60, 8, fresh=True)
    wide = Run(run.x.double(), run.recurrent.double(), run.token, tuple(part.double() for part in run.state))
    out = apply(slstm_kernel("vanilla"), wide)
    assert out[0].dtype == out[1][1].dtype == torch.float64
    assert_close(out, loop(run.x, run.recurrent, run.state, fresh=True), 1e-13)


@pytest.mark.parametrize("shape", [(2, 3, 10, 5), (2, 1, 10, 4)], ids=str)
def test_the_compiled_kernel_equals_float64_and_keeps_padding_out(shape):
    """10 tokens with T_inner 4: kernels of 4 and 2 steps are compiled once each, for fresh and used states."""
    unrolled = kernel("native_compiled")
    for fresh in (False, True):
        run = make_run(*shape, fresh=fresh)
        whole = apply(unrolled, run)
        assert_close(whole, loop(run.x, run.recurrent, run.state, fresh=fresh), 2e-6)
    run.token[:, :, 7:] = False
    run.token[0] = False
    after = apply(unrolled, run)[1]
    for part, before in zip(after, run.state, strict=True):
        assert torch.equal(part[0], before[0])
        assert shape[0] == 1 or not torch.equal(part[1], before[1])


def test_a_run_in_parts_keeps_every_bit(eager):
    run = make_run(2, 3, 24, 4)
    for name in KERNELS:
        h, state = apply(kernel(name), run)
        outputs, after = [], None
        for part in (slice(0, 8), slice(8, 12), slice(12, 24)):
            piece, after = apply(kernel(name), run, part, after)
            outputs.append(piece)
        assert torch.equal(torch.cat(outputs, 2), h)
        assert all(torch.equal(a, b) for a, b in zip(after, state, strict=True))


@pytest.mark.parametrize("padded", [slice(0, 3), slice(3, 10), slice(0, 10)], ids=["before", "after", "all"])
@pytest.mark.parametrize("name", KERNELS)
def test_padding_changes_no_bit_of_the_state_and_makes_nothing_infinite(name, padded, eager):
    """Also before the first token, where n is 0, and with any values in the padding."""
    for fresh in (False, True):
        run = make_run(2, 2, 10, 4, fresh=fresh)
        run.token[1, :, padded] = False
        run.x[1, :, padded] *= 1e4
        h, state = apply(kernel(name), run)
        assert h.isfinite().all()
        tokens = [t for t in range(10) if t not in range(10)[padded]]
        short = Run(run.x[1:, :, tokens], run.recurrent, run.token[1:, :, tokens], tuple(s[1:] for s in run.state))
        h_short, after = apply(kernel(name), short) if tokens else (h[1:, :, tokens], short.state)
        assert relative(h[1:, :, tokens], h_short) < 1e-6 if tokens else True
        for mine, theirs in zip(state, after, strict=True):
            # A product's bits may depend on the batch; a state without new tokens must not change.
            assert torch.equal(mine[1:], theirs) if not tokens else torch.allclose(mine[1:], theirs, rtol=1e-5)


LONG = 20_000


def long_run() -> Run:
    """20,000 tokens, a head for each kind of gates, and a recurrence that is too small to hide them."""
    g = torch.Generator().manual_seed(1)

    def between(a: float, b: float) -> Tensor:
        return a + (b - a) * torch.rand(LONG, generator=g)

    gates = [  # i, f
        (between(14, 15), between(15, 40)),
        (between(-15, 15), between(14, 40)),
        (between(-60, 60), between(-40, 40)),
        (between(80, 100), between(12, 15)),
        (between(-100, -80), between(12, 15)),
        (between(-3, 1), between(5, 15)),
        (between(-1, 1), torch.cat([between(-30, -20)[:9_400], between(14, 16)[9_400:]])),
        (between(-15, 15), between(-15, 15)),
        (torch.cat([between(90, 100)[:100], between(-100, -90)[100:]]), between(10, 12)),  # written early, kept
        (torch.cat([between(-100, -90)[:100], between(90, 100)[100:]]), between(10, 12)),  # nothing, then all
    ]
    x = torch.randn(1, len(gates), LONG, 4, 2, generator=g)
    x[..., 2, :] += 1  # where c is a sum of as many below 0 as above, it is ill-conditioned
    for head, (i, f) in enumerate(gates):
        x[0, head, :, 0] = i.unsqueeze(-1)
        x[0, head, :, 1] = f.unsqueeze(-1)
    recurrent = 0.2 * torch.randn(len(gates), 2, 8, generator=g)
    state = tuple(torch.zeros(1, len(gates), 2) for _ in range(4))
    return Run(x, recurrent, torch.ones(1, 1, LONG, dtype=torch.bool), state)


def test_20_000_tokens_with_extreme_gates_equal_float64():
    run = long_run()
    h, state = loop(run.x, run.recurrent, run.state, fresh=True)
    out, after = apply(slstm_kernel("native_compiled"), run)
    begin = slice(0, 3000)  # the eager reference is the same arithmetic, slower
    out_begin, _ = apply(slstm_kernel("vanilla"), run, begin)
    for head in range(run.x.shape[1]):  # each part by itself, so that a small one's error shows
        at = slice(head, head + 1)
        mine, theirs = (tuple(part[:, at] for part in parts) for parts in (after, state))
        # Each token multiplies by a number that float32 rounds by up to 3e-8 of it, c and n alike.
        assert_close((out[:, at], mine), (h[:, at], theirs), 1e-4, stored=LONG * 3e-8)
        assert relative(out_begin[:, at], h[:, at, begin]) <= 1e-4


@pytest.mark.parametrize("i", [-1e4, -200.0, 200.0, 1e4])
def test_a_first_token_of_any_size_is_all_that_is_stored(i):
    run = make_run(1, 2, 1, 4, fresh=True)
    run.x[..., 0, :] = i
    h, (_, c, n, m) = apply(slstm_kernel("vanilla"), run)
    assert torch.equal(n, torch.ones_like(n))
    assert (m == i).all()
    assert torch.allclose(c, torch.tanh(run.x[:, :, 0, 2]))
    assert torch.allclose(h[:, :, 0], torch.sigmoid(run.x[:, :, 0, 3]) * c)


def test_an_unknown_kernel_lists_the_names_there_are():
    with pytest.raises(UsageError, match="'triton' is not known; there are: vanilla, native_compiled"):
        slstm_kernel("triton")


TILE, CHUNK = 32, 16
IDS: list[int] = torch.randint(0, 256, (200,), generator=torch.Generator().manual_seed(11)).tolist()


def ask(directory: Path, ids: list[int]) -> tuple[Tensor, dict[str, Tensor]]:
    """The model in float64, token by token: logits (T, vocabulary) and the state after the last token."""
    config = json.loads((directory / "config.json").read_text())
    tensors = {name: tensor.double() for name, tensor in load_file(directory / "model.safetensors").items()}
    T, NH = len(ids), config["num_heads"]

    def rms(x: Tensor, name: str) -> Tensor:
        bias = tensors.get(f"{name}.bias", 0)
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * tensors[f"{name}.weight"] + bias

    def per_head_norm(h: Tensor, weight: Tensor, bias: Tensor | float, eps: float) -> Tensor:
        """h (T, NH, size)."""
        h = (h - h.mean(-1, keepdim=True)) / (h.var(-1, keepdim=True, unbiased=False) + eps).sqrt()
        return h.flatten(1) * weight + bias

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ tensors[f"{name}.weight"].T + tensors.get(f"{name}.bias", 0)

    def slstm(x: Tensor, at: str, state: dict[str, Tensor], n: int) -> Tensor:
        heads = x.unflatten(-1, (NH, -1))
        # The cell takes i, f, z, o; the layer hands it these four.
        gates = [
            torch.einsum("thd,hod->tho", heads, tensors[f"{at}.{gate}.weight"])
            for gate in ("fgate", "igate", "zgate", "ogate")
        ]
        bias = tensors[f"{at}.slstm_cell._bias_"].view(NH, 4, -1)
        x = (torch.stack(gates, 2) + bias).movedim(1, 0).unsqueeze(0)  # (1, NH, T, 4, DH)
        zero = torch.zeros_like(x[:, :, 0, 0])
        h, parts = loop(x, tensors[f"{at}.slstm_cell._recurrent_kernel_"], (zero, zero, zero, zero), fresh=True)
        for name, part in zip("hcnm", parts, strict=True):
            state[f"blocks.{n}.{name}"] = part
        return per_head_norm(h[0].transpose(0, 1), 1 + tensors[f"{at}.group_norm.weight"], 0.0, 1e-5)

    def mlstm(x: Tensor, at: str, state: dict[str, Tensor], n: int) -> Tensor:
        if f"{at}.qkv_opreact.weight" in tensors:
            qk, v = x.shape[-1] // 2, tensors[f"{at}.out_proj.weight"].shape[1]
            q, k, v, o = linear(x, f"{at}.qkv_opreact").split([qk, qk, v, v], -1)
            i, f = linear(x, f"{at}.ifgate_preact").chunk(2, -1)
        else:
            names = ("q", "k", "v", "ogate_preact", "igate_preact", "fgate_preact")
            q, k, v, o, i, f = (linear(x, f"{at}.{name}") for name in names)
        i, f = 15 * torch.tanh(i / 15), 15 * torch.tanh(f / 15)
        q, k, v = (y.unflatten(-1, (NH, -1)) for y in (q, k, v))
        C, N, m = x.new_zeros(NH, k.shape[-1], v.shape[-1]), x.new_zeros(NH, k.shape[-1]), x.new_zeros(NH)
        outputs = []
        for t in range(T):
            kept = F.logsigmoid(f[t]) + m
            m = torch.maximum(kept, i[t])
            keep, write = torch.exp(kept - m), torch.exp(i[t] - m)
            C = keep[:, None, None] * C + write[:, None, None] * k[t][:, :, None] * v[t][:, None, :]
            N = keep[:, None] * N + write[:, None] * k[t]
            query = q[t] * q.shape[-1] ** -0.5
            below = torch.maximum((query * N).sum(-1).abs(), torch.exp(-m)) + 1e-6
            outputs.append((query[:, :, None] * C).sum(1) / below[:, None])
        for name, part in (("C", C), ("n", N), ("m", m[:, None])):
            state[f"blocks.{n}.{name}"] = part[None]
        norm = f"{at}.multihead_norm"
        h = per_head_norm(torch.stack(outputs), tensors[f"{norm}.weight"], tensors.get(f"{norm}.bias", 0.0), 1e-6)
        return linear(torch.sigmoid(o) * h, f"{at}.out_proj")

    x, state = tensors["backbone.embeddings.weight"][ids], {}
    for n in range(config.get("num_blocks") or config["num_hidden_layers"]):
        at = f"backbone.blocks.{n}"
        if n in config.get("slstm_at", []):
            x = x + slstm(rms(x, f"{at}.norm_slstm"), f"{at}.slstm_layer", state, n)
        else:
            x = x + mlstm(rms(x, f"{at}.norm_mlstm"), f"{at}.mlstm_layer", state, n)
        y = rms(x, f"{at}.norm_ffn")
        if f"{at}.ffn.proj_up_gate_z.weight" in tensors:
            gate, up = linear(y, f"{at}.ffn.proj_up_gate_z").chunk(2, -1)
        else:
            gate, up = linear(y, f"{at}.ffn.proj_up_gate"), linear(y, f"{at}.ffn.proj_up")
        x = x + linear(F.silu(gate) * up, f"{at}.ffn.proj_down")
    logits = rms(x, "backbone.out_norm") @ tensors["lm_head.weight"].T
    return 30 * torch.tanh(logits / 30), state


@pytest.fixture(scope="session")
def model_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    @cache
    def get(case: str) -> Path:
        return write_model(tmp_path_factory.mktemp("slstm"), seed=list(CASES).index(case), **CASES[case])

    return get


@cache
def asked(directory: Path, length: int) -> tuple[Tensor, dict[str, Tensor]]:
    """The reference for the prompt's first tokens, from the logits of the whole prompt."""
    return ask(directory, IDS[:length])


@cache
def load(directory: Path, **options: Any) -> Engine:
    return xlstm_ray.load(directory, **{"device": "cpu", "tile_size": TILE, "chunk_size": CHUNK, **options})


def assert_equals(tensors: dict[str, Tensor], reference: tuple[Tensor, dict[str, Tensor]]) -> None:
    """Compare the last logits and every tensor of the state, each by itself."""
    logits, state = reference
    assert tensors.keys() == {*state, "logits"}
    errors = {name: relative(tensors[name], part) for name, part in state.items()}
    errors["logits"] = relative(tensors["logits"][0], logits[-1])
    assert max(errors.values()) <= 1e-4, errors


def test_the_oracle_equals_transformers_where_there_is_no_slstm(tmp_path):
    theirs = make_model(tmp_path, hidden_size=128, use_bias=True)
    logits, state = ask(tmp_path, IDS[:40])
    with torch.no_grad():
        out = theirs(torch.tensor([IDS[:40]]), use_cache=True)
    assert relative(out.logits[0], logits) < 1e-4
    for n in range(3):
        for name, part in zip("Cnm", out.cache_params.rnn_state[n], strict=True):
            assert relative(part, state[f"blocks.{n}.{name}"]) < 1e-4


@pytest.mark.parametrize("case", CASES)
def test_the_random_models_are_worth_comparing(case, model_of):
    """The last of 77 tokens still depends on the first, through a state that is neither empty nor full."""
    changed, _ = ask(model_of(case), [(IDS[0] + 1) % 256, *IDS[1:77]])
    assert relative(changed[-1], asked(model_of(case), 77)[0][-1]) > 1e-3


@pytest.mark.parametrize("backend", ["queued_compiled_chunks", "queued_compiled_steps", "native"])
@pytest.mark.parametrize("case", CASES)
def test_every_model_equals_float64(case, backend, model_of, eager):
    result = load(model_of(case), chunkwise_backend=backend).prefill(IDS[:77], all_logits=True)
    logits, state = asked(model_of(case), 77)
    assert relative(result.all_logits[0], logits) <= 1e-4
    assert max(relative(a, b) for a, b in zip(result.all_logits[0], logits, strict=True)) <= 1e-3
    assert_equals(result.state.tensors, (logits, state))


@pytest.mark.parametrize(
    ("case", "heads_per_band", "bands"),
    [("hybrid", 1, 4), ("hybrid", 3, 2), ("all sLSTM", 2, 2), ("three heads, biases", 2, 2), ("odd sizes", 3, 2)],
)
def test_any_band_of_heads_equals_float64(case, heads_per_band, bands, model_of, eager):
    lm = load(model_of(case), heads_per_band=heads_per_band)
    assert lm.bands == bands
    assert_equals(lm.prefill(IDS[:77]).state.tensors, asked(model_of(case), 77))


LENGTHS = st.integers(1, 90)
BACKENDS = st.sampled_from(["native", "queued_compiled_chunks", "queued_compiled_steps"])
NUMERICS = st.fixed_dictionaries(
    {"chunk_size": st.integers(1, 40), "chunks": st.integers(1, 5), "heads_per_band": st.integers(1, 4)}
)


@given(
    lengths=st.lists(st.tuples(LENGTHS, LENGTHS), min_size=1, max_size=3),
    backend=BACKENDS,
    numerics=NUMERICS,
    t_inner=st.integers(1, 9),
)
@settings(max_examples=8, deadline=None)
def test_any_numerics_and_rows_that_grow_from_state_to_state_give_the_same(
    model_of, lengths, backend, numerics, t_inner
):
    with torch.compiler.set_stance("force_eager"):
        lm = xlstm_ray.load(
            model_of("hybrid"),
            device="cpu",
            chunkwise_backend=backend,
            tile_size=numerics["chunk_size"] * numerics["chunks"],
            chunk_size=numerics["chunk_size"],
            heads_per_band=numerics["heads_per_band"],
            t_inner=None if backend == "native" else t_inner,
        )
        result = lm.prefill([IDS[: min(pair)] for pair in lengths])
        result = lm.prefill([IDS[: max(pair)] for pair in lengths], state=result.state)
        for b, pair in enumerate(lengths):
            assert_equals(result.state.row(b).tensors, asked(model_of("hybrid"), max(pair)))


@pytest.mark.parametrize("by_hand", [False, True])
@pytest.mark.parametrize("heads_per_band", [1, 3, 4])
def test_stages_give_the_same_bits(heads_per_band, by_hand, model_of, eager):
    """Of two stages, the first has blocks of one kind, the second of the other."""
    directory = model_of("fused, one head" if heads_per_band == 1 else "hybrid")
    lm = load(directory, heads_per_band=heads_per_band, workers=1)
    checkpoint, cpu = Checkpoint(directory, lm.config), torch.device("cpu")
    kernels, stages = Kernels(lm.backend, t_inner=8), (lm.config.num_blocks - 1, 1) if by_hand else 2
    workers = [
        [Worker(lm.config, shard, *checkpoint.load(shard, dtype=lm.dtype, device=cpu), kernels) for shard in shards]
        for shards in make_layout(lm.config, heads_per_band=heads_per_band, stages=stages)
    ]
    executor = InProcessExecutor(workers, band_threads=1)
    states = States(lambda: executor, nullcontext)
    start = driver.Snapshot([0], torch.zeros(1, VOCABULARY), HeldRows([None]))
    sizes = driver.Sizes(TILE, CHUNK)
    end = driver.prefill(states, [torch.tensor(IDS[:77])], start=start, sizes=sizes).end
    staged = {**end.rows.bring(), "logits": end.logits}
    executor.close()
    plain = lm.prefill(IDS[:77]).state.tensors
    assert staged.keys() == plain.keys()
    assert all(torch.equal(staged[name], tensor) for name, tensor in plain.items())


def assert_stop_and_resume_keep_every_bit(lm: Engine, prompt: Any, path: Path) -> None:
    whole = lm.prefill(prompt).state.digest()
    for tiles in range(3):
        seen: list[object] = []
        stopped = lm.prefill(prompt, on_progress=seen.append, should_stop=lambda seen=seen, n=tiles: len(seen) >= n)
        assert not stopped.complete
        stopped.state.save(path)
        assert lm.prefill(prompt, state=RecurrentState.load(path)).state.digest() == whole


@pytest.mark.parametrize("prompt", [IDS[:93], [IDS[:90], IDS[5:6], IDS[3:60]]], ids=["one", "batch"])
@pytest.mark.parametrize("heads_per_band", [3, 4])
def test_stopped_saved_and_resumed_keeps_every_bit(heads_per_band, prompt, model_of, tmp_path, eager):
    lm = load(model_of("hybrid"), heads_per_band=heads_per_band)
    assert_stop_and_resume_keep_every_bit(lm, prompt, tmp_path / "state")


@pytest.mark.parametrize("options", [{}, {"heads_per_band": 3}, {"chunkwise_backend": "native"}], ids=str)
@pytest.mark.parametrize("case", ["hybrid", "all sLSTM"])
def test_decoding_equals_float64(case, options, model_of, eager):
    lm = load(model_of(case), **options)
    made = lm.generate([IDS[:20], IDS[3:40]], max_new_tokens=6)
    list(made.rows())
    for row, tokens in zip((IDS[:20], IDS[3:40]), made.tokens, strict=True):
        assert len(tokens) == 6
        logits, _ = ask(model_of(case), row + tokens)
        best = logits[len(row) - 1 : -1].topk(2).values
        assert (best[:, 0] - best[:, 1]).min() > 1e-3, "a near tie: choose another seed"
        assert logits[len(row) - 1 : -1].argmax(-1).tolist() == tokens
    state = made.state()
    for b, row in enumerate((IDS[:20], IDS[3:40])):
        assert_equals(state.row(b).tensors, ask(model_of(case), row + made.tokens[b]))


def test_bfloat16_stays_close(model_of, eager):
    """In bfloat16 too, gates and the recurrence are float32: only the residual stream brings rounding to them."""
    lm = load(model_of("all sLSTM"), dtype="bfloat16")
    assert relative(lm.prefill(IDS[:77]).logits[0], asked(model_of("all sLSTM"), 77)[0][-1]) < 0.05


def test_nothing_is_read_that_nobody_wrote(model_of, poisoned, eager):
    lm = xlstm_ray.load(model_of("hybrid"), device="cpu", tile_size=TILE, chunk_size=CHUNK, heads_per_band=3)
    result = lm.prefill([IDS[:77], IDS[:5]], all_logits=True)
    made = lm.generate(state=result.state, max_new_tokens=3)
    list(made.rows())
    assert all(tensor.isfinite().all() for tensor in (*result.all_logits, *made.state().tensors.values()))
    assert_equals(result.state.row(0).tensors, asked(model_of("hybrid"), 77))


def compiled_graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize(
    ("options", "prefill", "decode"),
    [
        # The mLSTM block; before the sLSTM's steps, the steps, after them, its feed-forward. A block each for decoding.
        ({}, 1 + 4, 2),
        # Of each of two bands: mixer and ffn of the mLSTM; in, steps, out, ffn. For decoding mixer and ffn of both.
        # Sizes and threads are those of the grid's tests, which so find these kernels compiled.
        ({"heads_per_band": 3, "threads": 1}, 2 * (2 + 4), 2 * (2 + 2)),
    ],
    ids=["one band", "two bands"],
)
def test_each_kind_of_block_is_compiled_once(options, prefill, decode, model_of, tmp_path):
    directory = model_of("hybrid")
    lm, before = load(directory, tile_size=CHUNK, **options), compiled_graphs()
    assert_equals(lm.prefill(IDS[:77]).state.tensors, asked(directory, 77))
    assert compiled_graphs() - before == prefill
    assert_stop_and_resume_keep_every_bit(lm, IDS[:60], tmp_path / "state")
    made = lm.generate(IDS[:20], max_new_tokens=4)
    list(made)
    assert_equals(made.state().tensors, ask(directory, IDS[:20] + made.tokens[0]))
    again = lm.prefill(IDS[:99])
    assert again.stats.compile_s == 0
    assert compiled_graphs() - before == prefill + decode


@pytest.mark.parametrize(
    ("slstm_at", "message"),
    [
        ([3], "slstm_at names block 3, but there are blocks 0 to 2"),
        ([0, 2, 0], "slstm_at names block 0 twice"),
        ([-1], r"slstm_at.0: Input should be greater than or equal to 0 \(given: -1\)"),
        ([1.0], "slstm_at.0: Input should be a valid integer"),
        ([True], "slstm_at.0: Input should be a valid integer"),
        (["1"], "slstm_at.0: Input should be a valid integer"),
        ("none", "slstm_at: Input should be a valid tuple"),
        (1, "slstm_at: Input should be a valid tuple"),
    ],
    ids=str,
)
def test_block_indices_that_are_wrong_are_refused_in_a_line(slstm_at, message, model_of, tmp_path):
    config = json.loads((model_of("hybrid") / "config.json").read_text()) | {"slstm_at": slstm_at}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=message) as caught:
        xlstm_ray.load(tmp_path, device="cpu")
    assert str(caught.value).startswith(str(tmp_path / "config.json"))
    assert "\n" not in str(caught.value)


def test_all_blocks_and_no_blocks_go_by_their_published_names():
    config = {"model_type": "xlstm", "vocab_size": 9, "hidden_size": 8, "num_heads": 2, "num_blocks": 3}
    assert ModelConfig.from_dict(config | {"slstm_at": "all"}).slstm_at == (0, 1, 2)
    for none in ({"slstm_at": []}, {"slstm_at": None}, {}):
        assert ModelConfig.from_dict(config | none).slstm_at == ()
    odd = {"hidden_size": 10, "num_heads": 4, "qk_dim_factor": 0.4, "v_dim_factor": 0.8}
    with pytest.raises(ConfigError, match="hidden_size 10 cannot be split into num_heads 4, as slstm_at asks"):
        ModelConfig.from_dict(config | odd | {"slstm_at": [0]})


def test_the_weights_size_is_what_they_take_in_memory(model_of):
    for dtype in (torch.float32, torch.bfloat16):
        lm = load(model_of("hybrid"), dtype=str(dtype).removeprefix("torch."))
        worker = lm.executor.stages[0][0]
        tensors = [t for w in (*worker.blocks, worker.ends) for t in w if t is not None and t.dtype != torch.long]
        assert Checkpoint(lm.model_path, lm.config).weight_bytes(dtype) == sum(t.nbytes for t in tensors)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("backbone.blocks.1.slstm_layer.zgate.weight"), r"zgate.weight \(4, 16, 16\).* is missing"),
        (lambda t: t.update({"backbone.blocks.1.slstm_layer.igate.bias": torch.ones(64)}), "igate.bias' is not part"),
        (
            lambda t: t.update({"backbone.blocks.1.slstm_layer.slstm_cell._bias_": torch.zeros(4, 64)}),
            r"_bias_ has shape \(4, 64\), config.json asks for \(256,\)",
        ),
        (
            lambda t: t["backbone.blocks.1.slstm_layer.slstm_cell._recurrent_kernel_"][3, 2].fill_(torch.inf),
            "_recurrent_kernel_ holds values that are not finite",
        ),
    ],
    ids=["missing", "too many", "shape", "infinite"],
)
def test_tensors_that_are_wrong_are_refused_by_name(change, message, model_of, tmp_path):
    directory = write_model(tmp_path, **CASES["hybrid"])
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        xlstm_ray.load(directory, device="cpu", chunkwise_backend="native")


def test_a_state_of_the_other_kind_of_block_is_refused(model_of, eager):
    lm = load(model_of("hybrid"))
    result: PrefillResult = lm.prefill(IDS[:20])
    for name, made in (("blocks.1.C", torch.zeros(1, 4, 8, 16)), ("blocks.0.h", torch.zeros(1, 4, 16))):
        state = result.state.row(0)
        state.tensors[name] = made
        with pytest.raises(StateError, match=f"{name}' is missing or too many"):
            lm.prefill(IDS[:30], state=state)
    state = result.state.row(0)
    state.tensors["blocks.1.m"] = torch.zeros(1, 4, 1)
    with pytest.raises(StateError, match=r"blocks.1.m is \(1, 4, 1\) torch.float32, not \(1, 4, 16\) float32"):
        lm.prefill(IDS[:30], state=state)
