"""What the kernels take on Metal at the shapes of xLSTM-7B, and T_inner within the limit. Code generation only."""

from functools import partial

import pytest
import torch

from xlstm_ray.config import ModelConfig
from xlstm_ray.kernels import CHUNKWISE_BACKENDS
from xlstm_ray.kernels import metal as kernel_probe
from xlstm_ray.kernels.chunkwise import mlstm_chunkwise
from xlstm_ray.kernels.metal import Fit, Generated, fit_t_inner, generate
from xlstm_ray.kernels.native import mlstm_sequence, mlstm_step, slstm_sequence
from xlstm_ray.measure.doctor import WindowKernels, kernel_lines, metal_kernels
from xlstm_ray.state import Numerics

from . import shaders
from .simulator import Simulator

XLSTM_7B = ModelConfig.from_dict(
    {"model_type": "xlstm", "vocab_size": 50304, "hidden_size": 4096, "num_blocks": 32, "num_heads": 8}
)
B, NH, K, V = 1, 4, 256, 512  # a band of 4 heads


def cell(fn: str, T: int) -> Generated:
    """The cell on its own, for T tokens."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with torch.no_grad(), FakeTensorMode():

        def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.empty(B, NH, *shape, dtype=dtype, device="mps")

        state = empty(K, V), empty(K), empty(1)
        time = () if fn == "step" else (T,)
        qkv = [empty(*time, size, dtype=torch.bfloat16) for size in (K, K, V)]
        gates = {"i": empty(*time), "f": empty(*time)}
        if fn == "step":
            return generate(mlstm_step, fn, *qkv, **gates, state=state)
        if fn == "steps":
            return generate(mlstm_sequence, fn, *qkv, **gates, state=state)
        return generate(mlstm_chunkwise, fn, *qkv, **gates, state=state, chunk_size=64)


# Launches a token: Metal kernels made here, and torch's own (matrix products, cumsum).
@pytest.mark.parametrize(("fn", "T", "ceiling"), [("step", 1, 4), ("steps", 8, 1), ("chunks", 512, 0.05)])
def test_cells_of_7b(simulator: Simulator, fn: str, T: int, ceiling: float) -> None:
    generated = cell(fn, T)
    assert 1 <= generated.most_buffers <= shaders.MAX_BUFFERS
    assert 1 <= generated.all_launches <= ceiling * T
    assert set(generated.library_calls) <= {"bmm", "cumsum"}
    assert generated.bytes > 2 * 4 * NH * K * V  # the state is read and written
    assert not simulator.launches()


# h feeds the gates, so a token takes one product and one kernel after it, and no unrolling makes them fewer; it saves
# the calls from Python.
def test_the_slstm_cell_at_the_sizes_of_7b(simulator: Simulator) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with torch.no_grad(), FakeTensorMode():
        empty = partial(torch.empty, device="mps")
        T, dh = 8, XLSTM_7B.dh
        state = tuple(empty(B, NH, dh) for _ in range(4))
        token = empty(B, 1, T, dtype=torch.bool)
        x, recurrent = empty(B, NH, T, 4, dh), empty(NH, dh, 4 * dh)
        generated = generate(slstm_sequence, f"slstm_{T}", x, recurrent=recurrent, token=token, state=state)
    assert 1 <= generated.most_buffers <= 20 < shaders.MAX_BUFFERS  # also of more steps: each has a kernel of its own
    assert generated.library_calls == {"bmm": T}
    assert generated.all_launches == 2 * T


def whole(backend: str, tokens: int, config: ModelConfig = XLSTM_7B) -> WindowKernels:
    """Of the last kind of block that the model has."""
    *_, window = metal_kernels(
        config,
        of := CHUNKWISE_BACKENDS[backend],
        Numerics(kernel=of.kernel, tile_size=tokens, chunk_size=64, heads_per_band=NH, dtype="bfloat16"),
        t_inner=8,
        windows=[tokens],
        batch=B,
    )
    return window


# Of one block and band, all of it: norms, projections, cell and feed-forward.
@pytest.mark.parametrize(
    ("backend", "tokens", "ceiling"),
    [("queued_compiled_chunks", 512, 0.07), ("queued_compiled_chunks", 1, 11), ("queued_compiled_steps", 64, 1.1)],
)
def test_blocks_of_7b(simulator: Simulator, backend: str, tokens: int, ceiling: float) -> None:
    window = whole(backend, tokens)
    assert window.most_buffers <= shaders.MAX_BUFFERS
    assert window.launches_per_token <= ceiling
    assert not simulator.launches()
    lines = kernel_lines(window, bands=2)
    assert len(lines) == 3 + len(window.functions)
    if backend == "queued_compiled_steps":
        assert [f.calls for f in window.functions] == [1, 8, 1, 1]
        assert window.calls_per_token == 11 / 64
        assert f" {2 * 32 * 11 / 64:.2f} calls of compiled code" in lines[-1]


@pytest.mark.parametrize(("tokens", "ceiling"), [(64, 2.3), (1, 13)])
def test_slstm_blocks_of_a_hybrid_of_that_size(simulator: Simulator, tokens: int, ceiling: float) -> None:
    hybrid = XLSTM_7B.model_copy(update={"slstm_at": (3, 20), "num_blocks": 24})
    window = whole("queued_compiled_chunks", tokens, hybrid)
    assert (window.kind, window.blocks) == ("sLSTM", 2)
    assert window.most_buffers <= shaders.MAX_BUFFERS
    assert window.launches_per_token <= ceiling
    if tokens > 1:
        assert [(f.name, f.calls) for f in window.functions] == [
            (f"slstm_in_1x{tokens}", 1),
            ("slstm_steps_8", tokens // 8),
            (f"slstm_out_1x{tokens}", 1),
            (f"slstm_ffn_1x{tokens}", 1),
        ]
    assert f"2 sLSTM blocks x 2 band(s): {4 * window.launches_per_token:.2f} launches" in kernel_lines(window, 2)[-1]


def test_t_inner_is_lowered_to_what_metal_launches(simulator: Simulator) -> None:
    sizes = {"batch": 1, "heads": 2, "dhqk": 8, "dhhv": 8, "dtype": torch.float32, "device": torch.device("mps")}
    assert fit_t_inner(2, **sizes) == Fit(2)  # type: ignore[arg-type]
    fit = fit_t_inner(24, **sizes)  # type: ignore[arg-type]
    assert 8 <= fit.t_inner <= 16
    assert fit.note is not None
    said = f"T_inner 24 needs kernels with more than 31 buffers, which Metal does not allow; {fit.t_inner} is"
    assert said in fit.note
    assert not simulator.launches()


@pytest.mark.parametrize(("limited_launches", "chosen"), [(20, Fit(8)), (7, Fit(9, kernel_probe.MAX_BUFFERS))])
def test_inductors_fusion_limit_where_it_serves_better(
    mps: torch.device, monkeypatch: pytest.MonkeyPatch, limited_launches: int, chosen: Fit
) -> None:
    def generated(fn: object, name: str, *qkv: torch.Tensor, fusion_limit: int | None, **_: object) -> Generated:
        T = qkv[0].shape[2]
        buffers, launches = (3 * T + 7, T) if fusion_limit is None else (fusion_limit, limited_launches)
        return Generated(name, {"kernel": buffers}, launches, {}, 0)

    monkeypatch.setattr(kernel_probe, "generate", generated)
    fit_t_inner.cache_clear()
    fit = fit_t_inner(20, batch=1, heads=1, dhqk=4, dhhv=4, dtype=torch.float32, device=mps)
    assert (fit.t_inner, fit.fusion_limit) == (chosen.t_inner, chosen.fusion_limit)
    assert fit.note is not None
    fit_t_inner.cache_clear()
