"""A state's model: models differ by any bit of a weight, by the configuration and by the tokenizer."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import make_model

import xlstm_ray
from xlstm_ray import checkpoint, digests
from xlstm_ray.actors.shard import ShardWork, WorkerSpec
from xlstm_ray.checkpoint import Checkpoint
from xlstm_ray.config import ModelConfig
from xlstm_ray.errors import CheckpointError, StateError
from xlstm_ray.layout import Shard, make_layout
from xlstm_ray.state import RecurrentState

PLAIN = {"device": "cpu", "chunkwise_backend": "native", "tile_size": 16, "chunk_size": 16}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    make_model(directory, hidden_size=64, num_hidden_layers=2, num_heads=4, eos_token_id=None)
    return directory


@pytest.fixture(scope="module")
def names(model: Path) -> list[str]:
    return sorted(load_file(model / "model.safetensors"))


@pytest.fixture(scope="module")
def state(model: Path) -> RecurrentState:
    return xlstm_ray.load(model, **PLAIN).prefill("a prompt").state


def edited(model: Path, to: Path, name: str, at: int) -> Path:
    """A copy with another value at one place of a tensor: the sign of a tiny number."""
    shutil.copytree(model, to)
    tensors = load_file(to / "model.safetensors")
    bits = tensors[name].view(-1).view(torch.int32)
    bits[at] ^= 1
    save_file(tensors, to / "model.safetensors", {"format": "pt"})
    return to


def test_one_bit_of_any_tensor_makes_another_model(model, names, state, tmp_path):
    assert len(names) > 30
    seen = {state.model}
    for n, name in enumerate(names):
        other = edited(model, tmp_path / str(n), name, -1 - n % 3)
        seen.add(Checkpoint(other, ModelConfig.from_file(other / "config.json")).fingerprint())
    assert len(seen) == 1 + len(names)
    lm = xlstm_ray.load(tmp_path / str(names.index("backbone.blocks.1.mlstm_layer.v.weight")), **PLAIN)
    with pytest.raises(StateError, match="belongs to another model"):
        lm.prefill("a prompt and more", state=state)


def test_another_tokenizer_makes_another_model(model, state, tmp_path):
    shutil.copytree(model, tmp_path / "m")
    file = tmp_path / "m" / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["p"], vocab["q"] = vocab["q"], vocab["p"]
    file.write_text(json.dumps(tokenizer))
    with pytest.raises(StateError, match="belongs to another model"):
        xlstm_ray.load(tmp_path / "m", **PLAIN).prefill("a prompt and more", state=state)


def test_what_was_read_on_the_way_is_what_a_reading_for_it_alone_finds(model, state):
    """Bands load slices; without loaded weights, all tensors are read."""
    config = ModelConfig.from_file(model / "config.json")
    for heads in (1, 3, 4):
        loaded = Checkpoint(model, config)
        for stage in make_layout(config, heads_per_band=heads, stages=2):
            for shard in stage:
                loaded.load(shard, dtype=torch.float32, device=torch.device("cpu"))
        assert not any(None in units for units in loaded._units.values())
        assert loaded.fingerprint() == state.model
    assert Checkpoint(model, config).fingerprint() == state.model


def test_a_state_of_an_earlier_version_says_so(state, tmp_path, monkeypatch):
    monkeypatch.setattr("xlstm_ray.state.FORMAT", "xlstm-ray state 1")
    state.save(tmp_path / "old")
    monkeypatch.undo()
    with pytest.raises(StateError, match="earlier version.*make it again"):
        RecurrentState.load(tmp_path / "old")
    state.save(tmp_path / "old")  # an old state is a state, and may be replaced


# -- a band's share ----------------------------------------------------------------------------------------------------
@pytest.fixture
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small units of digests, since tensors of real models have many units."""
    monkeypatch.setattr(checkpoint, "UNIT", 1024)


def actor(model: Path, at: Path, heads: range) -> ShardWork:
    config = ModelConfig.from_file(model / "config.json")
    stored = Checkpoint(model, config).stored()
    spec = WorkerSpec(at, config, stored, "ray_compiled_chunks", "cpu", torch.float32, 8, None, 1)
    (shard,) = [shard for shard in make_layout(config, heads_per_band=2)[0] if shard.heads == heads]
    return ShardWork(spec, Shard(range(2), heads, shard.ffn), "a", one_band=False)


@pytest.mark.usefixtures("small_units")
def test_an_actor_refuses_what_it_reads_of_another_model_and_reads_no_more(model, tmp_path):
    name = "backbone.blocks.1.mlstm_layer.v.weight"
    other = edited(model, tmp_path / "m", name, -1)  # of the last head
    actor(model, other, range(0, 2)).load()
    with pytest.raises(CheckpointError, match="has another model there than the driver"):
        actor(model, other, range(2, 4)).load()


@pytest.mark.usefixtures("small_units")
def test_an_actor_checks_columns_too(model, tmp_path):
    other = edited(model, tmp_path / "m", "backbone.blocks.0.mlstm_layer.out_proj.weight", -1)
    with pytest.raises(CheckpointError, match="has another model there than the driver"):
        actor(model, other, range(2, 4)).load()


def test_an_actor_refuses_another_configuration_or_type(model, tmp_path):
    shutil.copytree(model, tmp_path / "c")
    said = json.loads((tmp_path / "c" / "config.json").read_text())
    (tmp_path / "c" / "config.json").write_text(json.dumps({**said, "gate_soft_cap": 14.0}))
    shutil.copytree(model, tmp_path / "t")
    tensors = load_file(tmp_path / "t" / "model.safetensors")
    save_file({n: t.bfloat16() for n, t in tensors.items()}, tmp_path / "t" / "model.safetensors", {"format": "pt"})
    for other in ("c", "t"):
        with pytest.raises(CheckpointError, match="has another model there than the driver"):
            actor(model, tmp_path / other, range(2)).load()


# -- kept digests ------------------------------------------------------------------------------------------------------
@pytest.fixture
def keeping(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep digests of small and new files too."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(digests, "KEPT_FROM", 1)
    monkeypatch.setattr(digests, "SETTLED_NS", 0)
    return tmp_path / "cache" / "xlstm-ray" / "digests"


def fingerprint(directory: Path) -> tuple[str, int]:
    """The fingerprint, and how many tensors were read for it."""
    reader, read = Checkpoint(directory, ModelConfig.from_file(directory / "config.json")), []
    plain = reader._read
    reader._read = lambda name, *where: (read.append(name), plain(name, *where))[1]
    return reader.fingerprint(), len(read)


def test_digests_are_kept_by_what_the_file_system_says(model, names, keeping, tmp_path):
    shutil.copytree(model, tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    first, read = fingerprint(tmp_path / "m")
    assert read == len(names)
    assert len(list(keeping.iterdir())) == 1
    assert fingerprint(tmp_path / "m") == (first, 0)
    # Another value, with the same size, and the time that the file had before.
    times = file.stat()
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    with open(file, "r+b") as raw:
        raw.write(data)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    second, read = fingerprint(tmp_path / "m")
    assert second != first
    assert read == len(names)
    assert fingerprint(tmp_path / "m") == (second, 0)


@pytest.mark.parametrize("damage", [b"", b"{}", b"[[1,2,3,4,5], {}]", b"\xff"])
def test_kept_digests_that_are_damaged_are_taken_anew(damage, model, names, keeping):
    first, _ = fingerprint(model)
    (kept,) = keeping.iterdir()
    kept.write_bytes(damage)
    assert fingerprint(model) == (first, len(names))
    assert fingerprint(model) == (first, 0)


def test_a_file_that_has_just_changed_is_not_kept(model, keeping, tmp_path, monkeypatch):
    monkeypatch.setattr(digests, "SETTLED_NS", 10**12)
    shutil.copytree(model, tmp_path / "m")
    fingerprint(tmp_path / "m")
    assert not keeping.exists()
