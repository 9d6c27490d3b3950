"""Autoscale measures, reports and remembers its choice for a model and machine, and never overrides a given setting."""

import json
import sys
import time
from pathlib import Path

import pytest
from tiny import make_model

import xlstm_ray
from xlstm_ray import autoscale
from xlstm_ray.cli.app import command_words
from xlstm_ray.engine.engine import Engine
from xlstm_ray.errors import UsageError


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    make_model(directory, hidden_size=64, num_hidden_layers=2, num_heads=4)
    return directory


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "xlstm-ray" / "autoscale.json"


def picked(engine: Engine) -> tuple[int, int, int]:
    return engine.numerics.tile_size, engine.numerics.heads_per_band, engine.workers


def test_a_choice_is_measured_said_and_remembered(model, cache, monkeypatch):
    options = {"device": "cpu", "dtype": "float32", "autoscale": True}
    first = xlstm_ray.load(model, **options)
    assert first.note.startswith(f"autoscale: tiles of {first.numerics.tile_size}, ")
    assert "choices timed on one block" in first.note
    assert first.numerics.tile_size % first.numerics.chunk_size == 0
    (key,) = json.loads(cache.read_text())
    for part in (first.fingerprint, "cpu", "torch 2.", "xlstm-ray", "compiled_chunks float32"):
        assert part in key
    again = xlstm_ray.load(model, **options)
    assert f"remembered in {cache}" in again.note
    assert picked(again) == picked(first)
    assert (again.plan.picked.values["tile_size"], again.plan.picked.where) == (again.numerics.tile_size, str(cache))
    assert [path.name for path in cache.parent.iterdir()] == [cache.name]
    # Bands and workers that were asked for stay; the choice of the rest is another one, and is remembered beside it.
    asked = xlstm_ray.load(model, **options, heads_per_band=1, workers=2)
    assert picked(asked)[1:] == (1, 2)
    assert len(json.loads(cache.read_text())) == 2
    # With nothing left to pick, a variable (it is for other runs, too) times nothing, and an argument is refused.
    given = {"device": "cpu", "dtype": "float32", "heads_per_band": 2, "workers": 1, "tile_size": 64}
    with pytest.raises(UsageError, match="^`autoscale` has no effect beside `tile_size`, `heads_per_band`, `workers`"):
        xlstm_ray.load(model, **given, autoscale=True)
    monkeypatch.setenv("XLSTM_MPS_AUTOSCALE", "1")
    engine = xlstm_ray.load(model, **given)
    assert (picked(engine), "nothing to pick" in engine.note) == ((64, 2, 1), True)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"a": {"tile_size": 0}}', b"\xff"])
def test_a_damaged_memory_is_said_and_written_anew(content, model, cache):
    cache.parent.mkdir()
    cache.write_bytes(content)
    engine = xlstm_ray.load(model, device="cpu", autoscale=True, tile_size=16)
    assert f"{cache} could not be read and is written again" in engine.note
    assert len(json.loads(cache.read_text())) == 1


def test_a_cache_that_cannot_be_written_costs_only_the_memory(model, cache):
    cache.parent.parent.joinpath("xlstm-ray").write_text("a file where the directory should be")
    engine = xlstm_ray.load(model, device="cpu", autoscale=True, tile_size=16)
    assert "not remembered" in engine.note
    assert engine.prefill("abc").complete


def test_a_memory_has_an_age_and_can_be_asked_to_go(model, cache):
    options = {"device": "cpu", "autoscale": True, "tile_size": 16, "heads_per_band": 4}
    xlstm_ray.load(model, **options)
    (key, kept), *_ = json.loads(cache.read_text()).items()
    assert 0 < kept["until"] - time.time() <= autoscale.HOLDS_S
    assert "remembered in" in xlstm_ray.load(model, **options).note
    assert "choices timed" in xlstm_ray.load(model, **options, autoscale_again=True).note
    for until in (time.time() - 1, None):  # None: of a version that kept no time
        entry = {**kept, "until": until} if until else {name: v for name, v in kept.items() if name != "until"}
        cache.write_text(json.dumps({key: entry}))
        assert "choices timed" in xlstm_ray.load(model, **options).note
        assert json.loads(cache.read_text())[key]["until"] > time.time()


def test_again_is_a_word_of_the_flag(monkeypatch):
    for words, said in (
        (["prefill", "--autoscale", "again", "--prompt", "x"], ["--autoscale", "--autoscale-again", "--prompt", "x"]),
        (["prefill", "--prompt", "again", "--autoscale"], ["--prompt", "again", "--autoscale"]),
    ):
        monkeypatch.setattr(sys, "argv", ["xlstm-ray", *words])
        assert command_words() == ["prefill", *said]


@pytest.mark.parametrize(
    ("usual", "other", "gain", "busy"),
    [
        ([100, 101, 99], [150, 151, 149], 1.5, False),
        ([100, 101, 99], [102, 102, 102], None, False),  # less than what counts
        (
            [100, 140, 90],
            [120, 150, 130],
            None,
            True,
        ),  # one round of the usual choice was as fast as one of the other
        ([50, 100, 60], [200, 210, 205], 205 / 60, True),
        ([100, 100, 100], [100, 100, 100], None, False),
    ],
)
def test_no_gain_is_claimed_from_noise(usual, other, gain, busy):
    assert autoscale.compare(usual, other) == (gain, busy)


def test_it_is_refused_for_actors_and_off_unless_asked_for(model, cache):
    with pytest.raises(UsageError, match="^`autoscale` probes this process's device"):
        xlstm_ray.load(model, autoscale=True, chunkwise_backend="ray_compiled_chunks", ray_local_mode=False)
    xlstm_ray.load(model, device="cpu", chunkwise_backend="native")
    assert not cache.exists()
