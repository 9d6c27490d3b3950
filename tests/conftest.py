"""Fixtures for every test."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from metal.plugin import mps, simulator

__all__ = ["mps", "simulator"]

# What Inductor has compiled is kept from one test run to the next: most of a first run is C++ compilation.
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "xlstm-ray" / "tests" / "inductor"
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(CACHE))

logging.getLogger("torch.__trace").propagate = False  # a line for every step of a compilation in each failure's report


@pytest.fixture
def eager() -> Iterator[None]:
    """Compiled kernels run as the plain torch that they are made of: breadth without a compilation a shape."""
    with torch.compiler.set_stance("force_eager"):
        yield
