"""`score` and `chat` of a model of integers on a head of ours, in stages and in bands: as in one process."""

import importlib.util
import json
import os
import re
import shlex
import signal

import pytest
import torch
from grids import CHUNK, PROMPT, SIZES, TILE, after_tiles, as_in_actors, command, head, home, model

import xlstm_ray
from xlstm_ray.config import Quantization
from xlstm_ray.quantize import quantize_model
from xlstm_ray.text.template import PLAIN

__all__ = ["head", "home", "model"]

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None and os.environ.get("CI") != "true", reason="Ray is not installed"
)
SUMS = "log_likelihood", "tokens", "words", "bytes"
TURNS = "abc", "d e f", "gh"


@pytest.fixture(scope="module")
def integers(model, tmp_path_factory):
    """4 bits; groups of 64 columns, which bands share."""
    directory = tmp_path_factory.mktemp("integers") / "q"
    list(quantize_model(model, directory, Quantization(bits=4, group_size=64)))
    return directory


@pytest.fixture(scope="module", params=[("--stages", 2), ("--heads-per-band", 2)], ids=["stages", "bands"])
def grid(request, head, integers):
    """Words that start a grid of two actors; then the sums of PROMPT and the answers of TURNS, of one process."""
    heads = 2 if "--heads-per-band" in request.param else 4
    sizes = {"threads": 1, "workers": 1, "tile_size": TILE, "chunk_size": CHUNK, "heads_per_band": heads}
    torch.set_num_threads(1)  # this thread's too: it computes the logits
    with as_in_actors(), xlstm_ray.load(integers, device="cpu", **sizes) as lm:
        row = lm.score(PROMPT).to_json()
        chat = lm.chat(template=PLAIN, sampling={"max_new_tokens": 5})
        answers = ["".join(chat.say(turn)) for turn in TURNS]
    torch.set_num_threads(os.cpu_count() or 1)
    where = "--chunkwise-backend", "ray_compiled_chunks", "--ray-address", head.address, "--json"
    return ("--model", integers, *SIZES, *request.param, *where), [row[name] for name in SUMS], answers


def test_a_score_that_was_stopped_goes_on_to_the_same_sums(home, grid, tmp_path):
    (tmp_path / "text").write_text(PROMPT)
    words, sums, _ = grid
    cache = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    stop = ("score", *words, "--file", tmp_path / "text")
    stopped = after_tiles(5, lambda run: run.send_signal(signal.SIGINT), home, *stop, **cache)
    assert (stopped.returncode, stopped.stdout) == (130, ""), stopped.stderr
    (again,) = re.findall(r"^to go on: (.*)$", stopped.stderr, re.MULTILINE)
    rest = shlex.split(again)
    rest = rest[rest.index("score") :]  # before it: a variable, and the program
    done = command(home, *rest, **cache)
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout)
    assert [row[name] for name in SUMS] == sums
    assert 5 * TILE <= row["resumed_tokens"] < row["tokens"]


def test_a_chat_says_what_it_says_in_one_process(home, grid):
    words, _, answers = grid
    done = command(home, "chat", *words, "--max-new-tokens", 5, input="\n".join(TURNS))
    assert done.returncode == 0, done.stderr
    assert [json.loads(line)["text"] for line in done.stdout.splitlines()] == answers
