"""Fixtures of the tests of the grid. A file has one head: an idle one, too, takes a part of a core."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from grids import CHUNK, PROMPT, TILE
from slstm import CASES, write_model
from tiny import make_model

import xlstm_ray
from xlstm_ray.supervisor.records import Head
from xlstm_ray.supervisor.start import HeadOptions, start_head
from xlstm_ray.supervisor.stop import stop_head


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four heads, three blocks: two stages leave unequal parts."""
    directory = tmp_path_factory.mktemp("model")
    make_model(directory, seed=5, hidden_size=64, num_hidden_layers=3)
    return directory


@pytest.fixture(scope="session")
def models(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """By heads a band: the model, and one with an sLSTM block, which bands of three heads cut unequally."""
    return {4: model, 3: write_model(tmp_path_factory.mktemp("hybrid"), **CASES["hybrid"])}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def head(home: Path) -> Iterator[Head]:
    """A head with room for eight actors of one thread, however few cores there are."""
    state_dir = home / ".local" / "state" / "xlstm-ray"
    options = HeadOptions(state_dir=state_dir, stays=True, num_cpus=8, object_store_bytes=100 << 20)
    started = start_head(options)
    yield started
    stop_head(started, state_dir)


@pytest.fixture(scope="session")
def in_process(models: dict[int, Path]) -> dict[int, dict[str, Any]]:
    """The queued backend's results by heads a band, compiled with one thread as the actors are."""
    found = {}
    for heads, model in models.items():
        lm = xlstm_ray.load(
            model, device="cpu", threads=1, workers=1, tile_size=TILE, chunk_size=CHUNK, heads_per_band=heads
        )
        result = lm.prefill(PROMPT)
        found[heads] = {"digest": result.state.digest(), "tensors": result.state.tensors}
        generation = lm.generate(PROMPT[:96], max_new_tokens=9)
        found[heads] |= {"text": "".join(generation), "after": generation.state().digest()}
        found[heads]["all"] = torch.cat(lm.prefill(PROMPT[:96], all_logits=True).all_logits).double().sum().item()
        if heads == 4:
            found[heads]["batch"] = lm.prefill([PROMPT[:77], PROMPT[:320]]).state.digest()
    torch.set_num_threads(os.cpu_count() or 1)
    return found
