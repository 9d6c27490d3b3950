"""The command line with --device mps, in this process: the CPU's next tokens, and nothing silently leaves the GPU."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Ran
from tiny import make_model

import xlstm_ray
from xlstm_ray.choose import DEMO_MODEL
from xlstm_ray.config import ModelConfig, Quantization
from xlstm_ray.kernels.metal import Fit
from xlstm_ray.quantize import quantize_model
from xlstm_ray.runtime.canaries import require_sound

from .operators import operators_with_mps_kernels
from .simulator import Simulator

TEXT = "The quick brown fox jumps over the lazy dog, and the dog does not mind it at all. " * 2

# Everything that may run on mps besides the Metal kernels made for the model, and why it does. On a Mac these are
# kernels of torch's own; the simulated device runs them on the CPU. What is not here fails the tests below.
OUT_NORM = "out norm and soft cap of the last token's logits, not compiled: once a prompt and once a new token"
CHECKS = "weights, once they are loaded, are checked for values that are not finite"
OPERATORS = {
    "aten::mm.out": "the projections: MPS's matrix products",
    "aten::bmm.out": "the products within chunks and over their states",
    "aten::cumsum.out": "Inductor makes no scan on Metal",
    "aten::index_select": "the embedding",
    "aten::cat.out": "the outputs of unrolled steps, once a tile",
    "aten::add.out": "the sum over bands, and the residual around it; the out norm's eps",
    "aten::index.Tensor_out": "each row's last token, once a tile",
    "aten::arange.start_out": "the rows of that index",
    "aten::where.self": "the last hidden state of rows that end in this tile",
    "aten::zero_": "a fresh state",
    "aten::pow.Tensor_Scalar_out": OUT_NORM,
    "aten::mean.out": OUT_NORM,
    "aten::rsqrt.out": OUT_NORM,
    "aten::mul.out": OUT_NORM,
    "aten::div.out": OUT_NORM,
    "aten::tanh.out": OUT_NORM,
    "aten::sum.IntList_out": CHECKS,
    "aten::abs.out": CHECKS,
    "aten::eq.Tensor_out": CHECKS,
    "aten::ne.Scalar_out": CHECKS,
    "aten::_local_scalar_dense": CHECKS + "; constants, folded while Inductor compiles",
    "aten::fill_.Scalar": "constants, folded while Inductor compiles",
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny")
    make_model(directory)
    return directory


@pytest.mark.parametrize(
    ("model", "backend", "heads_per_band"),
    [
        ("tiny", "queued_compiled_chunks", 4),
        ("tiny", "queued_compiled_steps", 2),
        ("demo", "queued_compiled_chunks", 4),
    ],
)
def test_same_tokens_as_on_the_cpu(
    simulator: Simulator,
    tiny: Path,
    monkeypatch: pytest.MonkeyPatch,
    run: Callable[..., Ran],
    model: str,
    backend: str,
    heads_per_band: int,
) -> None:
    monkeypatch.setenv("XLSTM_T_INNER", "4")  # quicker to compile than 8
    directory = tiny if model == "tiny" else DEMO_MODEL
    asked = "--model", directory, "--prompt", TEXT, "--dtype", "float32", "--tile-size", 64, "--json"
    want = run("prefill", *asked, "--device", "cpu", "--chunkwise-backend", "native").row
    generate = "generate", *asked, "--max-new-tokens", 6
    text = run(*generate, "--device", "cpu", "--chunkwise-backend", "native").row["text"]

    on_mps = "--device", "mps", "--chunkwise-backend", backend, "--heads-per-band", heads_per_band
    config = ModelConfig.from_file(directory / "config.json")
    require_sound(torch.device("mps"), config)  # once a process, and not a part of what is counted here
    simulator.clear_counts()
    got = run("prefill", *asked, *on_mps).row
    assert (got["device"], got["backend"], got["bands"]) == ("mps", backend, 4 // heads_per_band)
    assert [t["id"] for t in got["next_tokens"]] == [t["id"] for t in want["next_tokens"]]
    for g, w in zip(got["next_tokens"], want["next_tokens"], strict=True):
        assert g["logprob"] == pytest.approx(w["logprob"], abs=2e-5)

    assert simulator.launches()
    assert set(simulator.operators()) <= set(OPERATORS)
    _, to_host = simulator.bytes_moved()
    state = config.num_blocks * config.num_heads * (config.dhqk * config.dhhv + config.dhqk + 1) * 4
    assert to_host <= state + 2 * config.vocab_size * 4  # the state once, and the logits

    assert run(*generate, *on_mps).row["text"] == text
    assert set(simulator.operators()) <= set(OPERATORS)


def test_a_lowered_t_inner_is_said(
    mps: torch.device, tiny: Path, monkeypatch: pytest.MonkeyPatch, run: Callable[..., Ran]
) -> None:
    asked = "prefill", "--model", tiny, "--prompt", TEXT[:40], "--dtype", "float32", "--tile-size", 64, "--json"
    want = run(*asked, "--device", "cpu", "--chunkwise-backend", "native").row
    note = "T_inner 20 needs kernels with more than 31 buffers"
    monkeypatch.setattr("xlstm_ray.kernels.metal.fit_t_inner", lambda asked, **_: Fit(3, 31, f"{note} ({asked})"))
    monkeypatch.setenv("XLSTM_T_INNER", "20")
    ran = run(*asked, "--device", "mps", "--chunkwise-backend", "queued_compiled_steps")
    assert f"note: {note} (20)" in ran.err
    got = ran.row
    assert (got["t_inner"], got["chunk_size"]) == (3, want["chunk_size"])
    assert [t["id"] for t in got["next_tokens"]] == [t["id"] for t in want["next_tokens"]]


def test_doctor_shows_the_kernels(simulator: Simulator, tiny: Path, run: Callable[..., Ran]) -> None:
    report = run("doctor", "--kernels", "--model", tiny, "--tile-size", 16, "--json").row
    assert report["machine"]["torch"] == torch.__version__
    assert "Simulated" in report["machine"]["mps"]
    assert [window["tokens"] for window in report["kernels"]["windows"]] == [16, 1]
    for window in report["kernels"]["windows"]:
        assert 0 < window["most_buffers"] <= 31
        assert window["launches_per_token"] > 0
        assert window["bytes_per_token"] > 0
    assert not simulator.launches()

    refused = run("doctor", "--kernels", "--device", "cpu").error
    assert "--kernels shows Metal kernels, and the device is cpu; it needs --device mps" in refused


def test_doctor_shows_the_kernels_of_integers(
    simulator: Simulator, tiny: Path, run: Callable[..., Ran], tmp_path: Path
) -> None:
    """A token reads the weights, and little else."""
    read = {}
    for bits in (16, 8, 4):
        model = tiny
        if bits < 16:
            model = tmp_path / str(bits)
            list(quantize_model(tiny, model, Quantization(bits=bits, group_size=64)))
        words = "doctor", "--kernels", "--model", model, "--tile-size", 16, "--dtype", "bfloat16", "--json"
        token = run(*words).row["kernels"]["windows"][-1]
        assert token["tokens"] == 1
        assert 0 < token["most_buffers"] <= 31
        read[bits] = token["bytes_per_token"]
    assert read[8] < 0.6 * read[16]
    assert read[4] < 0.75 * read[8]  # scales and zeros are a larger share


def test_every_operator_used_has_an_mps_kernel(mps: torch.device) -> None:
    assert set(OPERATORS) <= operators_with_mps_kernels()


def test_cpu_fallback_is_refused(
    mps: torch.device, tiny: Path, monkeypatch: pytest.MonkeyPatch, run: Callable[..., Ran]
) -> None:
    monkeypatch.setenv("PYTORCH_ENABLE_MPS_FALLBACK", "1")
    ran = run("prefill", "--model", tiny, "--prompt", "x", "--device", "mps")
    assert ran.code == 1
    assert "PYTORCH_ENABLE_MPS_FALLBACK is on, which lets operators leave the GPU silently" in ran.error


# What is launched is counted twice: by reading the code that was generated, and by the device.
@pytest.mark.parametrize("backend", ["queued_compiled_chunks", "queued_compiled_steps"])
def test_launches_are_those_of_the_device(
    simulator: Simulator, tiny: Path, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    monkeypatch.setenv("XLSTM_T_INNER", "4")
    asked = {"device": "mps", "dtype": "float32", "chunkwise_backend": backend, "tile_size": 32, "heads_per_band": 2}
    with xlstm_ray.load(tiny, **asked) as lm:
        first = lm.prefill(TEXT[:80]).stats  # two tiles and a tail
        simulator.clear_counts()
        again = lm.prefill(TEXT[:80]).stats
    products = simulator.operators()
    inside = sum(products[name] for name in ("aten::mm.out", "aten::bmm.out", "aten::cumsum.out"))
    head = 1  # the last token's logits are a product outside compiled code
    assert first.launches == again.launches == len(simulator.launches()) + inside - head
    assert again.tiles == len(again.tile_tokens) == 3
    assert again.peak_device_bytes is not None
    with xlstm_ray.load(tiny, **asked) as lm:  # whose code is compiled already
        assert lm.prefill(TEXT[:80]).stats.launches == again.launches
