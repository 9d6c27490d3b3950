"""Helpers for tests of an engine: a tiny model, and an engine without a compiler."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny import model

import xlstm_ray

__all__ = ["model"]

SIZES: dict[str, Any] = {"device": "cpu", "tile_size": 32, "chunk_size": 16}
OPTIONS: dict[str, Any] = {**SIZES, "chunkwise_backend": "native"}


@pytest.fixture
def lm(model: Path) -> Iterator[xlstm_ray.Engine]:
    with xlstm_ray.load(model, **OPTIONS) as engine:
        yield engine
