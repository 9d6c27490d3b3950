"""`score` and `chat` on a head of ours: the numbers and words of one process, also after a stop."""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from grids import CHUNK, PROMPT, SIZES, TILE, after_tiles, as_in_actors, environment, head, home, model, program

import xlstm_ray

__all__ = ["head", "home", "model"]

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None and os.environ.get("CI") != "true", reason="Ray is not installed"
)
GRID = *SIZES, "--chunkwise-backend", "ray_compiled_chunks", "--stages", "2"
SUMS = "log_likelihood", "tokens", "words", "bytes"
TURNS = "abc", "d e f", "gh"


@pytest.fixture(scope="module")
def one_process(model):
    """The sums of PROMPT, and the answers of a conversation."""
    sizes = {"threads": 1, "workers": 1, "tile_size": TILE, "chunk_size": CHUNK}
    with as_in_actors(), xlstm_ray.load(model, device="cpu", **sizes) as lm:
        found = lm.score(PROMPT).to_json()
        chat = lm.chat(sampling={"max_new_tokens": 5})
        answers = ["".join(chat.say(turn)) for turn in TURNS]
    torch.set_num_threads(os.cpu_count() or 1)
    return {name: found[name] for name in SUMS}, answers


def test_a_score_that_was_stopped_goes_on_to_the_same_sums(home, head, model, one_process, tmp_path):
    (tmp_path / "text").write_text(PROMPT)
    words = "score", "--model", model, *GRID, "--ray-address", head.address, "--json", "--file", tmp_path / "text"
    cache = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    stopped = after_tiles(5, lambda run: run.send_signal(signal.SIGINT), home, *words, **cache)
    assert (stopped.returncode, stopped.stdout) == (130, ""), stopped.stderr
    (again,) = re.findall(r"^to go on: (.*)$", stopped.stderr, re.MULTILINE)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = {**environment(home), **cache, "PATH": path}
    done = subprocess.run(["bash", "-c", again], env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout)
    assert {name: row[name] for name in SUMS} == one_process[0]
    assert 5 * TILE <= row["resumed_tokens"] < row["tokens"]


def test_a_chat_says_what_it_says_in_one_process(home, head, model, one_process):
    words = "chat", "--model", model, *GRID, "--ray-address", head.address, "--json", "--max-new-tokens", 5
    done = subprocess.run(
        program(*words), env=environment(home), input="\n".join(TURNS), capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert [json.loads(line)["text"] for line in done.stdout.splitlines()] == one_process[1]
