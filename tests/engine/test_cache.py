"""States that an engine keeps for prompts to come: a hit has the bits of a cold run, whatever holds it."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import make_model

import xlstm_ray
from xlstm_ray import Engine
from xlstm_ray.engine.tree import DISK, MEMORY

TILE, CHUNK = 32, 16
OPTIONS: dict[str, Any] = {"device": "cpu", "tile_size": TILE, "chunk_size": CHUNK}
BACKENDS = {
    "native": {"chunkwise_backend": "native"},
    "chunks": {"chunkwise_backend": "queued_compiled_chunks"},
    "chunks, two bands": {"chunkwise_backend": "queued_compiled_chunks", "heads_per_band": 1},
}
_random = random.Random(5)
BOOK = [_random.randrange(256) for _ in range(400)]
OTHER = [_random.randrange(256) for _ in range(400)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    make_model(directory, hidden_size=64, num_hidden_layers=2, num_heads=2, eos_token_id=None)
    return directory


@pytest.fixture(params=BACKENDS)
def load(request: pytest.FixtureRequest, model: Path, eager: None) -> Callable[..., Engine]:
    def made(**more: Any) -> Engine:
        return xlstm_ray.load(model, **{**OPTIONS, **BACKENDS[request.param], **more})

    return made


@pytest.fixture
def plain(model: Path, eager: None) -> Callable[..., Engine]:
    """The reference backend alone, for what does not depend on it."""

    def made(**more: Any) -> Engine:
        return xlstm_ray.load(model, **{**OPTIONS, "chunkwise_backend": "native", **more})

    return made


def hits(result: Any) -> list[tuple[int, str | None]]:
    return [use[:2] for use in result.stats.row_cache]


EDITS = {
    "the same": (BOOK[:150], 150),
    "longer": (BOOK[:250], 128),
    "shorter": (BOOK[:100], 96),
    "edited": ([*BOOK[:70], *OTHER[70:150]], 64),
    "another": (OTHER[:150], 0),
}


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("tier", ["host", "disk", "disk, after a restart"])
def test_a_hit_has_the_bits_of_a_cold_run(edit, tier, load, tmp_path):
    prompt, length = EDITS[edit]
    with load() as cold:
        digest, text = cold.prefill(prompt).state.digest(), "".join(cold.generate(prompt, max_new_tokens=5))
    cache: dict[str, Any] = {"cache_memory_mb": 64}
    if tier != "host":
        cache["cache_dir"] = tmp_path / "cache"
    lm = load(**cache)
    lm.prefill(BOOK[:150])
    if tier == "disk, after a restart":
        lm.close()
        lm = load(**cache)
    elif tier == "disk":
        forget_memory(lm)
    with lm:
        again = lm.prefill(prompt)
        assert hits(again) == [(length, tier.partition(",")[0] if length else None)]
        assert again.state.digest() == digest
        assert again.stats.tiles == 0 or length < len(prompt)
        assert "".join(lm.generate(prompt, max_new_tokens=5)) == text


def forget_memory(lm: Engine) -> None:
    """As if other prompts had taken the room in memory; what is written is on the disk alone."""
    cache = lm._core.cache
    assert cache is not None
    for _, future in cache._writes:
        future.result()
    cache._settle()
    for entry in list(cache._tree.entries):
        assert DISK in entry.tiers
        if MEMORY in entry.tiers:
            cache._tree.drop(entry, MEMORY)
            entry.what.start = None
