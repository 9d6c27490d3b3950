"""The grid on real Ray gives the bits of one process, also when actors die or hang.

Nothing here connects in pytest's own process: Ray fixes its authentication at import, for every test file. Scripts run
beside a head of ours and print a JSON line for each thing they saw.
"""

import contextlib
import importlib.util
import os
from collections import ChainMap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grids
import psutil
import pytest
import torch
from grids import ANSWERS, CHAOS, GRID, PROMPT, head, home, in_process, model, models, script

import xlstm_ray
from xlstm_ray.actors.shard import ShardWork, WorkerSpec
from xlstm_ray.choose import share_of_cpus
from xlstm_ray.config import ModelConfig
from xlstm_ray.errors import CheckpointError, UsageError
from xlstm_ray.layout import Shard
from xlstm_ray.supervisor.records import Head

__all__ = ["head", "home", "in_process", "model", "models"]

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None and os.environ.get("CI") != "true", reason="Ray is not installed"
)


@pytest.fixture(scope="module", autouse=True)
def compiled() -> Iterator[None]:
    """Kernels are compiled in actors and in this process: here all is about the bits."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grids, "EAGER", {})
        yield


# -- without Ray -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("heads", [4, 3])
def test_local_mode_needs_no_ray_and_gives_the_queued_backends_bits(heads, models, in_process, tmp_path):
    expected = {name: in_process[heads][name] for name in ("digest", "text")}
    (found,) = script(
        tmp_path,
        """
        import json, os, sys
        os.environ.pop("XLSTM_RAY_LOCAL_MODE")
        sys.modules["ray"] = None  # an import of it would raise
        import xlstm_ray
        model, heads, prompt = sys.argv[1:]
        lm = xlstm_ray.load(model, chunkwise_backend="ray_compiled_chunks", stages=2, heads_per_band=int(heads),
            device="cpu", threads=1, workers=1, tile_size=16, chunk_size=16)
        print(json.dumps({"digest": lm.prefill(prompt).state.digest(), "text": "".join(lm.generate(prompt[:96],
            max_new_tokens=9))}))
        """,
        models[heads],
        heads,
        PROMPT,
    )
    assert found == expected


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"stages": 2}, "`stages` is for the ray_ backends"),
        ({"ray_address": "127.0.0.1:1"}, "`ray_address` is for the ray_ backends"),
        ({"chunkwise_backend": "ray_compiled_chunks", "ray_dashboard": True}, "local mode"),
        ({"chunkwise_backend": "ray_compiled_chunks", "ray_keep_alive": True}, "local mode"),
        ({"chunkwise_backend": "ray_compiled_chunks", "ray_temp_dir": Path("/tmp/x")}, "no effect in local mode"),
        ({"ray_state_dir": Path("/tmp/x")}, "no effect in local mode"),
        ({"chunkwise_backend": "ray_compiled_chunks", "actors_per_device": 2}, "no effect in local mode"),
        ({"journal_every": 3}, "no effect in one process without `journal`"),
        ({"chunkwise_backend": "ray_compiled_chunks", "ray_local_mode": False, "workers": 2}, "`workers` is for one"),
        (
            {"chunkwise_backend": "ray_compiled_chunks", "ray_local_mode": False, "actors_per_device": 2},
            "`actors_per_device` is for GPUs",
        ),
        ({"chunkwise_backend": "ray_compiled_chunks", "stages": 9}, "but the model has 3 blocks"),
        (
            {"chunkwise_backend": "ray_compiled_chunks", "ray_address": "10.0.0.1:1", "force": True},
            "`force` has no effect on other machines",
        ),
    ],
)
def test_what_has_no_effect_is_refused(options, said, model, monkeypatch):
    monkeypatch.delenv("XLSTM_RAY_LOCAL_MODE", raising=False)
    with pytest.raises(UsageError, match=said):
        xlstm_ray.load(model, device="cpu", **options)


def test_an_actor_refuses_another_model_than_the_drivers(model):
    config = ModelConfig.from_file(model / "config.json")
    spec = WorkerSpec(model, config, {}, "ray_compiled_chunks", "cpu", torch.float32, 8, None, 1)
    with pytest.raises(CheckpointError, match="has another model there than the driver"):
        ShardWork(spec, Shard(range(3), range(4), range(10)), "a", one_band=True).load()


@pytest.mark.parametrize("eager", [True, False])
def test_an_actor_whose_torch_compiles_other_than_the_drivers_is_refused(model, monkeypatch, eager):
    """On somebody's head, whose variables are not those of the driver: the bits would be other than the state says."""
    config = ModelConfig.from_file(model / "config.json")
    spec = WorkerSpec(model, config, {}, "ray_compiled_chunks", "cpu", torch.float32, 8, None, 1, eager=eager)
    if not eager:
        monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    who = "the driver, but not for node " if eager else f"node {os.uname().nodename}, but not for the driver"
    with pytest.raises(UsageError, match=rf"TORCHDYNAMO_DISABLE=1\) for {who}.*, which gives other bits"):
        ShardWork(spec, Shard(range(3), range(4), range(10)), "a", one_band=True).load()


# -- on a head ---------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module", params=[(2, 4), (2, 3)], ids=["2 stages", "hybrid, 2 stages x 2 bands"])
def grid(request: pytest.FixtureRequest, home: Path, head: Head, models: dict[int, Path]) -> tuple[int, dict[str, Any]]:
    """All runs of one grid: (heads a band, what it printed). All faults but a kill are in test_grid_on_a_head.py."""
    stages, heads = request.param
    text = (
        GRID
        + f"    code = {{}}\n    exec({ANSWERS!r}, code)\n"
        + """
    say(nice=[seat.process.nice() for seat in executor.placement.seats])
    result = lm.prefill(prompt)
    say(digest=result.state.digest(), peak=result.stats.peak_memory_bytes, restarts=result.stats.restarts)
    if heads == "4":
        say(batch=lm.prefill([prompt[:77], prompt[:320]]).state.digest())
    generation = lm.generate(prompt[:96], max_new_tokens=9)
    say(text="".join(generation), after=generation.state().digest(), rate=generation.decode_tok_s)
    say(all=torch.cat(lm.prefill(prompt[:96], all_logits=True).all_logits).double().sum().item())
    lm.serve(slots=4, buckets=(4,))
    asked = lm.prefill(prompt[:96], prompt_logprobs=2).prompt_logprobs[0]
    served = lm.submit(Request(prompt[:96], prompt_logprobs=2)).result(120).prompt_logprobs
    say(scores=[[made and [made.logprob, made.likeliest] for made in each] for each in (asked, served)])
    if heads == "4":
        say(mixed=code["all_answers"](lm, prompt))

    # Two states take turns, a third one is kept, and the prefill of a fourth is stopped.
    kept = lm.prefill(prompt[:96])
    turns = [lm.generate(prompt[:96], max_new_tokens=9), lm.generate(prompt[3:64], max_new_tokens=9)]
    pieces = [list(pair) for pair in zip(*turns)]
    say(turns=["".join(texts) for texts in zip(*pieces)], turns_after=[turn.state().digest() for turn in turns])
    lm.prefill(prompt, should_stop=lambda: True)
    say(answers=["".join(lm.generate(state=kept.state, max_new_tokens=9)) for _ in range(2)])
    list(lm.generate(state=kept.state, max_new_tokens=50))
    say(kept=kept.state.digest())
    del kept, turns

    from concurrent.futures import ThreadPoolExecutor
    with ThreadPoolExecutor(2) as pool:
        say(threads=[result.state.digest() for result in pool.map(lm.prefill, [prompt, prompt])])

    if heads == "4":
        from xlstm_ray.memory.sample import peak_process_bytes
        lm.prefill(prompt * 4)
        before = peak_process_bytes()
        lm.prefill(prompt * 8)
        say(growth=peak_process_bytes() - before)
    actor = executor.placement.seats[0].process
    beside = [p for p in actor.parent().children() if "NodeWatchdog" in " ".join(p.cmdline())]
    say(watchdogs=[p.memory_info().rss / actor.memory_info().rss for p in beside])

    """
        + (CHAOS if heads == 3 else "")
        + "\n    lm.close()\n"
    )
    said = script(home, text, models[heads], head.address, stages, heads, PROMPT, 1)
    return heads, dict(ChainMap(*said))


def test_a_grid_gives_the_bits_of_one_process(grid, in_process):
    heads, found = grid
    assert found["digest"] == in_process[heads]["digest"]
    assert found.get("batch") == in_process[heads].get("batch")
    assert found["restarts"] == 0
    assert found["threads"] == [found["digest"]] * 2


def test_actors_are_not_nicer_than_other_programs(grid):
    _, found = grid
    assert set(found["nice"]) == {0}


def test_decoding_in_the_grid_gives_the_same_text_and_state(grid, in_process):
    heads, found = grid
    assert (found["text"], found["after"]) == (in_process[heads]["text"], in_process[heads]["after"])
    assert found["rate"] > 0


@pytest.mark.parametrize("grid", [(2, 4)], indirect=True, ids=["2 stages"])
def test_tokens_that_the_last_stage_chooses_are_those_of_this_process(grid, in_process):
    """With penalties or log-probabilities the driver chooses, since it has the counts and gets the logits."""
    heads, found = grid
    assert found["mixed"] == in_process[heads]["mixed"]
    assert all(digest is not None for answers in found["mixed"] for n, (_, digest) in enumerate(answers) if n != 2)


def test_states_that_are_worked_on_in_turn_equal_each_alone(grid, in_process):
    heads, found = grid
    expected = in_process[heads]
    assert found["turns"] == [expected["text"], expected["other"]]
    assert found["turns_after"] == [expected["after"], expected["other_after"]]
    assert found["answers"] == [expected["text"]] * 2
    assert found["kept"] == expected["kept"]  # 50 steps and an abandoned prefill later


def test_all_logits_come_from_the_last_stage(grid, in_process):
    heads, found = grid
    assert found["all"] == in_process[heads]["all"]


def test_log_probabilities_of_a_prompt_come_from_the_last_stage(grid, in_process):
    """They are reduced there; no logits travel."""
    heads, found = grid
    assert found["scores"] == [in_process[heads]["scores"]] * 2
    assert in_process[heads]["scores"][0] is None
    assert len(in_process[heads]["scores"]) == 96


@pytest.mark.parametrize("grid", [(2, 4)], indirect=True, ids=["2 stages"])
def test_the_drivers_memory_does_not_grow_with_the_prompt(grid):
    _, found = grid
    assert found["growth"] < 16 << 20  # after 376 tiles instead of 188; Ray's own buffers fill slowly


@pytest.mark.parametrize("grid", [(2, 3)], indirect=True, ids=["hybrid, 2 stages x 2 bands"])
def test_an_actor_killed_at_a_random_moment_changes_no_bit(grid, in_process):
    heads, found = grid
    assert found["killed"] == 1
    assert found["chaos_restarts"] >= 1
    assert found["chaos"] == [in_process[heads]["digest"]]


def test_a_watchdog_does_without_torch(grid):
    """It has handles of actors, whose class Ray imports there; torch alone is more than half of an actor here."""
    _, found = grid
    (share,) = found["watchdogs"]
    assert share < 0.4


def test_actors_are_gone_when_a_run_has_ended(grid, head):
    titles = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):  # others' processes end meanwhile
            if os.getsid(process.pid) == head.pid:
                titles.append(" ".join(process.cmdline()))
    assert titles
    assert not [title for title in titles if "ShardActor" in title or "Watchdog" in title]


@pytest.mark.parametrize(
    ("nodes", "actors", "share"),
    [([1], 2, 0.5), ([1], 3, 0.3333), ([1, 1], 3, 0.5), ([2, 1], 3, 1.0), ([0], 2, None), ([3, 1], 7, 0.5)],
)
def test_cpus_are_shared_where_there_are_fewer_than_actors(nodes, actors, share):
    assert share_of_cpus(nodes, actors) == share
