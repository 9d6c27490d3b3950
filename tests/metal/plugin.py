"""pytest fixtures: `mps`, a device to run on wherever the tests run, and `simulator`, the simulated one itself."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from . import build
from .simulator import Simulator
from .simulator import simulator as the_simulator


def require_simulator() -> None:
    """Skips the test where torch has its own mps, or g++ is missing; with CI=true in the environment a missing g++
    fails it instead: there, these tests must run.
    """
    if torch.backends.mps.is_built():
        pytest.skip("this torch is built with MPS: the simulated device is never loaded beside it")
    if reason := build.missing_compiler():
        if os.environ.get("CI") == "true":
            pytest.fail(f"{reason}; with CI=true the tests on the simulated device may not be skipped")
        pytest.skip(reason)


@pytest.fixture
def simulator() -> Iterator[Simulator]:
    """The simulated mps device, installed for this test. Skipped, or failed, as require_simulator() says."""
    require_simulator()
    with the_simulator().installed():
        yield the_simulator()


@pytest.fixture
def mps(request: pytest.FixtureRequest) -> torch.device:
    """torch.device("mps"): a Mac's own GPU, or the simulated device."""
    if not torch.backends.mps.is_built():
        request.getfixturevalue("simulator")
    elif not torch.backends.mps.is_available():
        pytest.skip("this torch is built with MPS, but the machine has no such device")
    return torch.device("mps")
