"""--max-stall-ms: a size of tile that does not stall answers for longer, or a refusal with what was measured."""

import pytest
from services import WORDS, model

import xlstm_ray
from xlstm_ray.cli import serve
from xlstm_ray.engine import pace
from xlstm_ray.errors import UsageError
from xlstm_ray.settings import Settings

__all__ = ["model"]

SIZES = {"device": "cpu", "chunk_size": 16, "chunkwise_backend": "native"}


@pytest.mark.parametrize(("most", "size"), [(1000, 256), (256, 256), (255.9, 128), (64, 64), (16, 16)])
def test_the_largest_half_that_fits_is_taken(most, size):
    assert pace.fitting_tile(256, 16, most, lambda tokens: tokens / 1000, given=False) == size


def test_what_cannot_be_kept_is_refused_with_what_was_measured():
    for tile, given, says in (
        (256, False, "`max_stall_ms` is 10, and the smallest tile, of 16 tokens, takes 16 ms here"),
        (48, False, "the smallest tile, of 48 tokens, takes 48 ms"),  # its half is not whole chunks
        (256, True, "`tile_size=256` takes 256 ms here; allow more than that, or leave the tile's size out"),
    ):
        with pytest.raises(UsageError) as refused:
            pace.fitting_tile(tile, 16, 10, lambda tokens: tokens / 1000, given=given)
        assert says in str(refused.value)


def test_windows_are_timed_and_leave_the_engine_as_it_was(model):
    with xlstm_ray.load(model, tile_size=32, **SIZES) as engine, xlstm_ray.load(model, tile_size=32, **SIZES) as other:
        assert all(0 < pace.window_seconds(engine, size) < 60 for size in (32, 16))
        assert engine.prefill("a" * 100).state.digest() == other.prefill("a" * 100).state.digest()


def test_an_engine_is_opened_again_with_the_tile_that_fits(model, monkeypatch, capsys):
    monkeypatch.setattr(pace, "window_seconds", lambda engine, size: size / 1000)
    asked = {"model": model, "config": None, **SIZES}
    settings = Settings.make(**asked)
    with serve._paced(settings, asked, "none", None) as (engine, _):
        usual = engine.numerics.tile_size
    capsys.readouterr()
    with serve._paced(settings, asked, "none", usual / 4) as (engine, _):
        assert engine.numerics.tile_size == usual // 4
        assert engine.prefill("a" * 100).state.tokens == [100]
    assert f"tiles of {usual // 4} tokens, not {usual}, keep --max-stall-ms" in capsys.readouterr().err


def test_the_command_refuses_what_no_tile_keeps(run, model):
    words = ("serve", "--model", model, "--port", 0, "--max-stall-ms", "0.001")
    assert "--tile-size 32 takes" in run(*words, *WORDS).error
    error = run(
        *words, "--device", "cpu", "--chunkwise-backend", "native", "--tile-size", "16", "--chunk-size", "16"
    ).error
    assert "--max-stall-ms is 0.001" in error
