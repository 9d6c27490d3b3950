"""Stages by hand and by the nodes' measured speed, on real nodes: one is stopped for most of its measurement."""

import importlib.util
import json
import os
import secrets
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from grids import CHUNK, PROMPT, ROOT, SIZES, TILE, as_in_actors, command, head, home, in_process, model, models, script
from tiny import make_model

import xlstm_ray
from xlstm_ray.actors.shard import WorkerSpec
from xlstm_ray.actors.speed import Speed
from xlstm_ray.checkpoint import Checkpoint
from xlstm_ray.config import ModelConfig
from xlstm_ray.layout import make_layout

__all__ = ["head", "home", "in_process", "model", "models"]

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None and os.environ.get("CI") != "true", reason="Ray is not installed"
)
BLOCKS = 16

UNEVEN = """
    import json, os, sys, threading
    model, token, prompt, root = sys.argv[1:]
    os.environ["RAY_health_check_period_ms"] = "1000"  # of a node that is gone each look fails at once
    sys.path[:0] = [root, root + "/scripts"]
    from bench_uneven import nodes, raylet_of, slowed
    cluster, slow = nodes(token)
    import xlstm_ray
    from xlstm_ray.cli.report import summary_of

    sizes = dict(device="cpu", threads=1, tile_size=32, chunk_size=16)
    with slowed(raylet_of(slow), 0.25, only="Speed.measure"):
        lm = xlstm_ray.load(model, chunkwise_backend="ray_compiled_chunks", ray_address=cluster.address, stages="auto",
            ray_token_path=token, journal_every=3, **sizes)
    seats = lm.executor.placement.seats
    blocks = {seat.node == slow.node_id: len(seat.shard.blocks) for seat in seats}

    def lose(p):
        if p.tiles_done == 7:
            (there,) = [seat.process for seat in seats if seat.node == slow.node_id]
            cluster.remove_node(slow, allow_graceful=False)
            there.wait(60)

    first = lm.prefill(prompt)
    layout = summary_of(lm, first, None, "")["layout"]
    lost = lm.prefill(prompt, on_progress=lose)
    print(json.dumps([blocks, lm.note, layout, [first.state.digest(), lost.state.digest()], lost.complete,
        lost.stats.restarts, len({seat.node for seat in seats})]), flush=True)
    lm.close()
    for thread in threading.enumerate():
        if thread.name == "ray.shutdown":
            thread.join()
    cluster.shutdown()
"""


def test_a_slow_node_has_fewer_blocks_and_when_it_is_lost_the_other_one_takes_them(tmp_path: Path) -> None:
    directory, token = tmp_path / "model", tmp_path / "token"
    make_model(directory, seed=5, hidden_size=64, num_hidden_layers=BLOCKS)
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    ((blocks, note, layout, digests, complete, restarts, nodes),) = script(
        tmp_path, UNEVEN, directory, token, PROMPT, ROOT
    )
    assert blocks["true"] + blocks["false"] == BLOCKS
    assert blocks["true"] < blocks["false"]

    assert [row["blocks"][1] - row["blocks"][0] + 1 for row in layout] == [*blocks.values()]
    assert all(0 < row["need_bytes"] < row["room_bytes"] for row in layout)
    slow = next(row for row, is_slow in zip(layout, blocks, strict=True) if is_slow == "true")
    fast = next(row for row, is_slow in zip(layout, blocks, strict=True) if is_slow == "false")
    assert slow["block_s"]["mLSTM"] > fast["block_s"]["mLSTM"]
    for row in layout:
        start, stop = row["blocks"]
        assert f"blocks {start}-{stop} on {row['node']} ({1e3 * row['block_s']['mLSTM']:.3g} ms a tile" in note

    torch.set_num_threads(1)
    sizes = {"device": "cpu", "threads": 1, "tile_size": 32, "chunk_size": 16}
    with as_in_actors(), xlstm_ray.load(directory, **sizes) as lm:
        want = lm.prefill(PROMPT).state.digest()
    torch.set_num_threads(os.cpu_count() or 1)
    assert digests == [want, want]
    assert complete
    assert restarts >= 1
    assert nodes == 1  # the lost node's stage is where the other one is


@pytest.mark.parametrize(("heads", "stages", "blocks"), [(4, "2,1", [[0, 1], [2, 2]]), (3, "1,2", [[0, 0], [1, 2]])])
def test_stages_by_hand_give_the_same_bits(heads, stages, blocks, home, head, models, in_process) -> None:
    """In one band, and in bands of a model with both kinds of blocks."""
    done = command(
        home, "prefill", "--model", models[heads], *SIZES, "--heads-per-band", heads, "--ray-address", head.address,
        "--chunkwise-backend", "ray_compiled_chunks", "--stages", stages, "--json", "--prompt", PROMPT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout)
    assert row["state_digest"] == in_process[heads]["digest"]
    assert [stage["blocks"] for stage in row["layout"]] == blocks


def test_auto_measures_a_block_of_each_kind_in_bands(home, head, models, in_process) -> None:
    """A node with 8 CPUs, and stages of two bands with two threads each: two places that share it."""
    done = command(
        home, "prefill", "--model", models[3], *SIZES[:2], *SIZES[4:], "--heads-per-band", 3, "--json",
        "--ray-address", head.address, "--chunkwise-backend", "ray_compiled_chunks", "--stages", "auto",
        "--threads", 2, "--prompt", PROMPT[:64],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    layout = json.loads(done.stdout)["layout"]
    assert [{*stage["block_s"]} for stage in layout] == [{"mLSTM", "sLSTM"}] * len(layout)
    assert sum(stage["blocks"][1] - stage["blocks"][0] + 1 for stage in layout) == 3
    assert all(stage["tile_s"] > 0 for stage in layout)


@pytest.mark.parametrize("heads", [4, 3])
def test_the_kernels_that_will_run_are_measured(heads: int, models: dict[int, Path]) -> None:
    """Compiled, in this process: a block of each kind, in one band and in one of several."""
    directory = models[heads]
    config = ModelConfig.from_file(directory / "config.json")
    spec = WorkerSpec(
        model=directory,
        config=config,
        stored=Checkpoint(directory, config).stored(),
        backend="ray_compiled_chunks",
        device="cpu",
        dtype=torch.float32,
        t_inner=8,
        fusion_limit=None,
        threads=1,
    )
    band = make_layout(config, heads_per_band=heads)[0][0]
    kinds = {"sLSTM" if n in config.slstm_at else "mLSTM": n for n in reversed(range(config.num_blocks))}
    shards = {kind: replace(band, blocks=range(n, n + 1)) for kind, n in kinds.items()}
    speed = Speed(spec, shards, TILE, CHUNK, one_band=heads == 4)
    assert speed.prepare() > 0
    blocks, first, last = speed.measure(0.0, 2)
    torch.set_num_threads(os.cpu_count() or 1)
    assert {*blocks} == {*kinds} == ({"mLSTM"} if heads == 4 else {"mLSTM", "sLSTM"})
    assert min(*blocks.values(), first, last) > 0


def test_a_node_with_room_for_one_actor_has_one_stage(home, head, model) -> None:
    words = ["prefill", "--model", model, *SIZES[:2], *SIZES[4:], "--json", "--prompt", PROMPT[:64], "--stages", "auto"]
    grid = "--chunkwise-backend", "ray_compiled_chunks", "--ray-address", head.address, "--threads", 8
    done = command(home, *words, *grid)
    assert done.returncode == 0, done.stderr
    (stage,) = json.loads(done.stdout)["layout"]
    assert stage["blocks"] == [0, 2]
    assert "the only place" in done.stderr
