"""Compiled kernels in actors give the bits of one process with them, also in an actor that took another's place."""

import importlib.util
import os
from collections import ChainMap
from collections.abc import Iterator
from pathlib import Path

import grids
import pytest
from grids import PROMPT, InProcess, head, home, in_process, model, models, script

from xlstm_ray.supervisor.records import Head

__all__ = ["head", "home", "in_process", "model", "models"]

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None and os.environ.get("CI") != "true", reason="Ray is not installed"
)


@pytest.fixture(scope="module", autouse=True)
def compiled() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grids, "EAGER", {})
        yield


@pytest.mark.parametrize("heads", [4, 3], ids=["one band", "hybrid, 2 bands"])  # whole blocks, and their parts
def test_a_compiled_grid_gives_the_bits_of_one_compiled_process(
    heads: int, home: Path, head: Head, models: dict[int, Path], in_process: InProcess
) -> None:
    said = script(
        home,
        """
        import json, sys
        import xlstm_ray

        def say(**row): print(json.dumps(row), flush=True)
        model, address, heads, prompt = sys.argv[1:]
        lm = xlstm_ray.load(model, chunkwise_backend="ray_compiled_chunks", ray_address=address,
            heads_per_band=int(heads), device="cpu", threads=1, tile_size=16, chunk_size=16, journal_every=3)
        say(digest=lm.prefill(prompt).state.digest())
        generation = lm.generate(prompt[:96], max_new_tokens=9)
        say(text="".join(generation), after=generation.state().digest())
        say(scores=[made and [made.logprob, made.likeliest] for made in
            lm.prefill(prompt[:96], prompt_logprobs=2).prompt_logprobs[0]])

        def kill(p):
            if p.tiles_done == 7:
                lm.executor.placement.seats[-1].process.kill()
        if heads == "4":
            say(again=lm.prefill(prompt, on_progress=kill).state.digest(), restarts=lm.executor.restarts)
        lm.close()
        """,
        models[heads],
        head.address,
        heads,
        PROMPT,
    )
    found, expected = dict(ChainMap(*said)), in_process[heads]
    for name in ("digest", "text", "after", "scores"):
        assert found[name] == expected[name], name
    if heads == 4:
        assert found["again"] == expected["digest"]
        assert found["restarts"] >= 1
