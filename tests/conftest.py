"""Fixtures for every test."""

import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

# Threads that wait by spinning make every small test five times as slow where the cores are shared. Read with torch.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from metal.plugin import mps, simulator

from xlstm_ray.cli.app import main

__all__ = ["mps", "simulator"]

# What Inductor has compiled is kept from one test run to the next: most of a first run is C++ compilation.
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "xlstm-ray" / "tests" / "inductor"
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(CACHE))

# pytest listens to loggers that do not propagate, and torch writes a line for each step of a compilation to a listener.
logging.getLogger("torch.__trace").propagate = True


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first: where files run side by side, none of them is still at work when the others are done."""
    longest = ["test_grid", "test_supervisor"]
    items.sort(key=lambda item: longest.index(item.path.stem) if item.path.stem in longest else len(longest))


class Ran(NamedTuple):
    """What a run of the program left."""

    code: int
    out: str
    err: str

    @property
    def row(self) -> dict[str, Any]:
        """The one JSON object on standard output."""
        assert self.code == 0, self
        (line,) = self.out.splitlines()
        return json.loads(line)

    @property
    def error(self) -> str:
        """The one line that says what is wrong; nothing else was printed."""
        assert self.code != 0, self
        assert self.out == ""
        (line,) = self.err.splitlines()
        assert line.startswith("error: ")
        return line


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """The program, in this process."""

    def call(*words: object) -> Ran:
        monkeypatch.setattr(sys, "argv", ["xlstm-ray", *map(str, words)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as left:
            main()
        out, err = capfd.readouterr()
        return Ran(left.value.code or 0, out, err)

    return call


@pytest.fixture
def eager() -> Iterator[None]:
    """Compiled kernels run as the plain torch that they are made of: breadth without a compilation a shape."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Fresh memory holds NaN, in torch and in compiled code; yields how many buffers the compiled code asked for."""
    asked: list[int] = []
    plain = torch._C._dynamo.guards._empty_strided_cpu

    def empty_strided(size: tuple, stride: tuple, dtype: torch.dtype) -> torch.Tensor:
        out = plain(size, stride, dtype)
        asked.append(out.numel())
        return out.fill_(torch.nan) if out.is_floating_point() else out.fill_(torch.iinfo(dtype).max)

    # Compiled modules take the function by this name when they are loaded, so only kernels compiled here see it.
    monkeypatch.setattr(torch._C._dynamo.guards, "_empty_strided_cpu", empty_strided)
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield asked
    torch.use_deterministic_algorithms(False)
