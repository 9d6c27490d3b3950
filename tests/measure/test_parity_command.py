"""`xlstm-ray parity` compares every name of the registry, and names a wrong kernel with exit code 1."""

import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Ran
from metal.simulator import Simulator
from slstm import CASES, write_model
from tiny import make_model
from torch import Tensor

from xlstm_ray import kernels
from xlstm_ray.config import Quantization
from xlstm_ray.kernels import quantized
from xlstm_ray.kernels.compiled import compile_strict
from xlstm_ray.kernels.native import mlstm_sequence, mlstm_step, slstm_sequence
from xlstm_ray.kernels.quantized import Quantized, by_blocks, torch_has_this_layout
from xlstm_ray.quantize import quantize_model

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def parity(run: Callable[..., Ran]) -> Callable[..., Ran]:
    """The command in this process, through the entry point."""
    return partial(run, "parity")


def rows(ran: Ran) -> list[dict[str, Any]]:
    (line,) = ran.out.splitlines()
    return json.loads(line)["rows"]


def test_every_kernel_and_backend_is_compared(parity, eager):
    ran = parity("mlstm", "--device", "cpu", "--json")
    assert ran.code == 0, ran
    names = [f"step {name}" for name in kernels.STEP_KERNELS]
    names += [*kernels.SEQUENCE_KERNELS, *(name for name in kernels.CHUNKWISE_BACKENDS if "triton" not in name)]
    found = [(row["name"], row["dtype"]) for row in rows(ran)]
    assert found == [(name, dtype) for dtype in ("float32", "bfloat16") for name in names]
    assert all(0 < row["outputs"] < row["tolerance"] and 0 < row["state"] < row["tolerance"] for row in rows(ran))


def test_a_hybrid_model_goes_through_every_backend_of_this_process(parity, tmp_path, eager):
    write_model(tmp_path, **CASES["hybrid"])
    ran = parity("model", "--model", tmp_path, "--device", "cpu")
    assert ran.code == 0, ran
    header, *lines = ran.out.splitlines()
    assert header.split() == ["part", "kernel", "or", "backend", "dtype", "outputs", "state", "tolerance"]
    backends = [backend for backend in kernels.CHUNKWISE_BACKENDS.values() if backend.runs_on("cpu")]
    queued = [backend.name for backend in backends if backend.executor == "queued"]
    assert len(lines) == 2 * 2 * len(queued)
    assert all(line.endswith("  ok") for line in lines)
    assert sum("two bands" in line for line in lines) == 2 * len(queued)


def test_every_product_of_integers_is_compared(parity, eager):
    ran = parity("weights", "--device", "cpu", "--json")
    assert ran.code == 0, ran
    found = rows(ran)
    own = [f"4 bits, {name}, torch's own" for name in ("few rows", "many rows")] if torch_has_this_layout() else []
    names = {f"{bits} bits, {name}" for bits in (8, 4) for name in ("few rows", "many rows", "embedding")} | set(own)
    assert sorted((row["name"], row["dtype"]) for row in found) == sorted(product(names, ("float32", "bfloat16")))
    assert all(row["outputs"] <= row["tolerance"] and row["state"] is None and row["good"] for row in found)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantized_model_goes_through_every_backend_of_this_process(bits, parity, tmp_path, eager):
    make_model(tmp_path / "plain", hidden_size=64, num_hidden_layers=2, ffn_proj_factor=2.0)
    asked = Quantization(bits=bits, group_size=32, embedding=bits == 4, head=bits == 4)
    list(quantize_model(tmp_path / "plain", tmp_path / "q", asked))
    ran = parity("model", "--model", tmp_path / "q", "--device", "cpu", "--json")
    assert ran.code == 0, ran
    backends = [backend for backend in kernels.CHUNKWISE_BACKENDS.values() if backend.runs_on("cpu")]
    queued = [backend.name for backend in backends if backend.executor == "queued"]
    assert len(rows(ran)) == 2 * 2 * len(queued)  # dtypes, bands
    assert all(0 < row["outputs"] <= row["tolerance"] and 0 < row["state"] <= row["tolerance"] for row in rows(ran))


def test_the_script_compiles_and_compares_in_a_process_of_its_own():
    command = [sys.executable, SCRIPTS / "test_slstm_parity.py", "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert [line.split()[:3] for line in done.stdout.splitlines()[1:]] == [
        ["slstm", "vanilla", "float32"],
        ["slstm", "native_compiled", "float32"],
    ]


def test_compiled_for_the_simulated_metal_device(parity, simulator: Simulator):
    ran = parity("slstm", "--device", "mps", "--json")
    assert ran.code == 0, ran
    assert [row["good"] for row in rows(ran)] == [True, True]
    assert simulator.launches()


# -- what is wrong is found --------------------------------------------------------------------------------------------
def swapped(x: Tensor, **rest: Any) -> Any:
    """An sLSTM with exchanged input and forget gates."""
    return slstm_sequence(x[..., [1, 0, 2, 3], :], **rest)


def forgets_padding(x: Tensor, *, token: Tensor, **rest: Any) -> Any:
    return slstm_sequence(x, token=torch.ones_like(token), **rest)


def stale(x: Tensor, *, state: Any, **rest: Any) -> Any:
    """The outputs are right, but the state lacks the last token."""
    h, _ = slstm_sequence(x, state=state, **rest)
    rest["token"] = rest["token"].clone()
    rest["token"][:, :, -1] = False
    return h, slstm_sequence(x, state=state, **rest)[1]


def not_a_number(x: Tensor, **rest: Any) -> Any:
    h, state = slstm_sequence(x, **rest)
    return h * torch.nan, state


def breaks_the_graph(x: Tensor, **rest: Any) -> Any:
    return slstm_sequence(-x if x.sum() > 0 else x, **rest)


@pytest.mark.parametrize("wrong", [swapped, forgets_padding, stale, not_a_number], ids=lambda f: f.__name__)
def test_a_wrong_slstm_kernel_is_found_and_named(wrong, parity, monkeypatch):
    monkeypatch.setitem(kernels.SLSTM_KERNELS, "native_compiled", lambda _t_inner: wrong)
    ran = parity("slstm", "--device", "cpu")
    assert ran.code == 1
    assert ran.err == "error: 1 of 2 are over their tolerance: slstm native_compiled float32\n"
    assert [line.split()[-1] for line in ran.out.splitlines()[1:]] == ["ok", "OVER"]


def test_a_kernel_that_does_not_compile_is_a_row_with_its_reason(parity, monkeypatch):
    monkeypatch.setitem(
        kernels.SLSTM_KERNELS, "native_compiled", lambda _t_inner: compile_strict(breaks_the_graph, "broken")
    )
    ran = parity("slstm", "--device", "cpu", "--json")
    assert ran.code == 1
    assert "slstm native_compiled float32" in ran.err
    good, bad = rows(ran)
    assert good["good"]
    assert (bad["good"], bad["outputs"], bad["state"]) == (False, None, None)
    assert "kernel broken does not compile for" in bad["reason"]


def test_a_wrong_step_and_a_wrong_backend_are_found_among_the_others(parity, monkeypatch, eager):
    def careless_step(*args: Any, i: Tensor, **rest: Any) -> Any:
        return mlstm_step(*args, i=i + 1e-3, **rest)

    class Careless(kernels.Backend):
        def cell(self, tokens: int, **_: Any) -> Any:
            return lambda *args, f, **rest: mlstm_sequence(*args, f=f.clamp(max=14), **rest)

    monkeypatch.setitem(kernels.STEP_KERNELS, "metal", lambda: careless_step)
    monkeypatch.setitem(kernels.CHUNKWISE_BACKENDS, "queued_compiled_steps", Careless("x", "queued", "compiled_steps"))
    ran = parity("mlstm", "--device", "cpu", "--json")
    assert ran.code == 1
    bad = {(row["name"], row["dtype"]) for row in rows(ran) if not row["good"]}
    # In bfloat16 the difference is less than what rounding may do.
    assert bad == {("step metal", "float32"), ("queued_compiled_steps", "float32")}


def test_a_wrong_product_of_integers_is_found_and_named(parity, monkeypatch, eager):
    halves = Quantized._halves

    def off(self: Quantized) -> Any:
        return [(q + 1e-3, scale, zero) for q, scale, zero in halves(self)]

    def off_by_blocks(x: Tensor, q: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        return by_blocks(x, q, scale, None if zero is None else zero.float() + 1e-3 * scale)

    monkeypatch.setattr(Quantized, "_halves", off)
    monkeypatch.setattr(quantized, "by_blocks", off_by_blocks)
    ran = parity("weights", "--device", "cpu", "--json")
    assert ran.code == 1
    bad = {(row["name"], row["dtype"]) for row in rows(ran) if not row["good"]}
    assert bad >= {(f"4 bits, {name}", "float32") for name in ("few rows", "many rows")}
    assert not [name for name, _ in bad if "embedding" in name]


# -- input -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tensor"], "part 'tensor' is not known; there are: mlstm, slstm, weights, model"),
        (["slstm", "--device", "tpu"], "--device is 'tpu'"),
        (["slstm", "--device", "cuda"], "--device is 'cuda', but this machine has none"),
        (["weights", "--model", "somewhere"], "--model is for parity's part 'model'"),
        (["slstm", "--model", "somewhere"], "--model is for parity's part 'model'"),
        (["model", "--model", "nowhere", "--device", "cpu"], "nowhere"),
    ],
    ids=str,
)
def test_bad_input_is_refused_in_a_line(arguments, message, parity):
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("this machine has one")
    ran = parity(*arguments)
    assert (ran.code, ran.out) == (1, "")
    (line,) = ran.err.splitlines()
    assert line.startswith("error: ")
    assert message in line
