"""A directory of 8- or 4-bit weights where any model may be: states, commands, a list of models."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Ran
from engines import OPTIONS
from tiny import make_model

import xlstm_ray
from xlstm_ray import RecurrentState
from xlstm_ray.checkpoint import Checkpoint
from xlstm_ray.config import ModelConfig, Quantization
from xlstm_ray.errors import StateError
from xlstm_ray.quantize import quantize_model

IDS = [(n * n) % 256 for n in range(110)]
NATIVE = "--chunkwise-backend", "native", "--device", "cpu", "--dtype", "float32"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """By bits: heads of 16 columns, of which groups of 32 have two; and 16 bits, the model that they are of."""
    folder = tmp_path_factory.mktemp("models")
    found = {16: folder / "plain"}
    make_model(found[16], seed=5, hidden_size=64, num_hidden_layers=2, eos_token_id=None)
    for bits in (8, 4):
        found[bits] = folder / f"{bits} bits"
        asked = Quantization(bits=bits, group_size=32, embedding=bits == 4, head=bits == 4)
        list(quantize_model(found[16], found[bits], asked))
    return found


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("heads", [4, 2])
def test_a_state_goes_on_to_the_same_bits_and_only_with_its_own_weights(bits, dtype, heads, models, tmp_path):
    options = {**OPTIONS, "dtype": dtype, "heads_per_band": heads}
    with xlstm_ray.load(models[bits], **options) as lm:
        whole = lm.prefill(IDS)
        text = "".join(lm.generate(state=whole.state, max_new_tokens=5))
        lm.prefill(IDS[:64]).state.save(tmp_path / "half.state")
    half = RecurrentState.load(tmp_path / "half.state")
    with xlstm_ray.load(models[bits], **options) as lm:
        rest = lm.prefill(IDS, state=half)
        assert rest.state.digest() == whole.state.digest()
        assert torch.equal(rest.logits, whole.logits)
        assert "".join(lm.generate(state=rest.state, max_new_tokens=5)) == text
    for other in {16, 8, 4} - {bits}:
        with (
            xlstm_ray.load(models[other], **options) as lm,
            pytest.raises(StateError, match="belongs to another model"),
        ):
            lm.prefill(IDS, state=half)


@pytest.mark.parametrize("bits", [8, 4])
def test_commands_take_it_as_any_other_model(bits, models, run: Callable[..., Ran], tmp_path):
    model, kept = models[bits], tmp_path / "kept.state"
    row = run("prefill", "--model", model, "--prompt", "Once upon a", *NATIVE, "--state-out", kept, "--json").row
    assert row["prompt_tokens"] == 11
    with xlstm_ray.load(model, chunkwise_backend="native", device="cpu", dtype="float32") as lm:
        expected = "".join(lm.generate("Once upon a", max_new_tokens=4))
    words = "generate", "--model", model, "--max-new-tokens", 4, *NATIVE, "--json"
    assert run(*words, "--prompt", "Once upon a").row["text"] == expected
    assert run(*words, "--state-in", kept).row["text"] == expected
    sizes = run("plan", "--model", model, "--device", "m1", "--prompt-tokens", 100, "--json").row
    checkpoint = Checkpoint(model, ModelConfig.from_file(model / "config.json"))
    assert sizes["need_bytes"]["weights"] == checkpoint.weight_bytes(getattr(torch, sizes["dtype"]))
    assert run("config", "--model", model, *NATIVE, "--json").code == 0


def test_it_is_listed_among_the_models_of_the_hub(models, run: Callable[..., Ran], tmp_path):
    commit = "0" * 40
    snapshot = tmp_path / "models--someone--four-bits" / "snapshots" / commit
    snapshot.parent.mkdir(parents=True)
    shutil.copytree(models[4], snapshot)
    (row,) = json.loads(run("models", "--hub-cache", tmp_path, "--json").out)["models"]
    assert (row["name"], row["xlstm"]) == (f"someone/four-bits@{commit}", True)
