"""Helpers for tests of an engine: a tiny model, and an engine without a compiler."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny import make_model

import xlstm_ray

SIZES: dict[str, Any] = {"device": "cpu", "tile_size": 32, "chunk_size": 16}
OPTIONS: dict[str, Any] = {**SIZES, "chunkwise_backend": "native"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    make_model(directory, hidden_size=64, num_hidden_layers=2, num_heads=2, eos_token_id=None)
    return directory


@pytest.fixture
def lm(model: Path) -> Iterator[xlstm_ray.Engine]:
    with xlstm_ray.load(model, **OPTIONS) as engine:
        yield engine
