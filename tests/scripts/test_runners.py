"""The Apple guide's commands word for word, and models from a hub: a local server of a repository's layout."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import programs
import pytest
from hub import COMMIT, CUT_AT, FILES, REPO, SHARDS, Hub, fetched, publish, serving
from tiny import make_model

import xlstm_ray

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    make_model(directory, hidden_size=64, num_hidden_layers=2, num_heads=4, eos_token_id=None)
    return directory


def run(script: str, *words: object, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPTS / script), *map(str, words)]
    env = {**os.environ, "PYTORCH_ENABLE_MPS_FALLBACK": "0", "XLSTM_CHUNKWISE_BACKEND": "native", **variables}
    return programs.run(command, capture_output=True, text=True, timeout=120, env=env)


# -- a local checkpoint ------------------------------------------------------------------------------------------------
def test_the_guides_quick_start(model):
    words = ["--model_path", model, "--prompt", "The capital of France is", "--max_new_tokens", "5"]
    done = run("run_local_xlstm_mps.py", *words, "--workers", "6", "--heads-per-band", "4")
    assert done.returncode == 0, done.stderr
    assert "decode 5 tokens" in done.stderr
    assert re.search(r"^total \d+\.\d s$", done.stderr, re.MULTILINE)
    lm = xlstm_ray.load(model, device="cpu", chunkwise_backend="native", heads_per_band=4)
    assert done.stdout == "".join(lm.generate("The capital of France is", max_new_tokens=5)) + "\n"


def test_the_guides_high_memory_run(model):
    words = ["--model_path", model, "--chunkwise-backend", "ray_compiled_steps", "--chunk-size", "64"]
    words += ["--heads-per-band", "4", "--prompt", "…", "--max_new_tokens", "2", "--mem-soft-mb", "215000"]
    words += ["--mem-hard-mb", "235000", "--mem-action", "warn", "--no-mem-shrink", "--json"]
    done = run("run_local_xlstm_mps.py", *words, XLSTM_T_INNER="1")  # compiles sooner
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout)
    assert (row["backend"], row["chunk_size"], row["new_tokens"]) == ("ray_compiled_steps", 64, 2)


def test_a_mistake_is_one_line(model):
    done = run("run_local_xlstm_mps.py", "--model_path", model, "--prompt", "a", "--workers", "0")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines() == ["error: --workers is 0; allowed: a whole number from 1 to 256"]


# -- a hub -------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository's files. Clients write 10 MiB at a time, so the second shard is larger."""
    directory = tmp_path_factory.mktemp("published")
    publish(directory, 768)
    assert (directory / SHARDS[1]).stat().st_size > CUT_AT
    return directory


@pytest.fixture
def hub(published: Path) -> Iterator[Hub]:
    with serving(published) as server:
        yield server


def fetch(hub: Hub, home: Path, *words: object) -> subprocess.CompletedProcess[str]:
    words = "--repo", REPO, "--max_new_tokens", "3", "--json", *words
    return run("run_hf_xlstm_metal.py", *words, HF_ENDPOINT=hub.url, HF_HOME=str(home))


def have(hub: Hub, home: Path, *, offline: bool) -> Path:
    """Only the download, in its own process: huggingface_hub reads its environment once."""
    code = f"from xlstm_ray.hub import download; print(download({REPO!r}, offline={offline}))"
    env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(home)}
    done = programs.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=env)
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip())


def test_a_broken_connection_is_taken_up_where_it_broke(hub, published, tmp_path):
    hub.cuts = SHARDS[1]
    done = fetch(hub, tmp_path)
    assert done.returncode == 0, done.stderr
    (where,) = [where for name, where in fetched(hub) if where]
    assert 0 < int(where.removeprefix("bytes=").removesuffix("-")) <= CUT_AT
    row = json.loads(done.stdout)
    assert row["prompt_tokens"] == len("The capital of France is")
    model = Path(row["model"])
    assert model.is_relative_to(tmp_path)
    assert model.name == COMMIT
    assert sorted(path.name for path in model.iterdir()) == FILES
    for name in FILES:
        assert (model / name).read_bytes() == (published / name).read_bytes()

    hub.asked.clear()
    assert have(hub, tmp_path, offline=True) == model
    assert not hub.asked


def test_after_a_download_that_failed_the_next_fetches_only_the_rest(hub, tmp_path):
    hub.cuts, hub.refuses = SHARDS[1], True
    broken = fetch(hub, tmp_path)
    assert (broken.returncode, broken.stdout) == (1, "")
    last = broken.stderr.splitlines()[-1]
    assert last.startswith(f"error: {REPO} could not be fetched: ")
    assert last.endswith("run it again for the rest")
    assert "Traceback" not in broken.stderr
    # What has arrived is not taken for the whole.
    assert "not whole in the cache" in fetch(hub, tmp_path, "--offline").stderr
    hub.cuts = None
    hub.asked.clear()
    have(hub, tmp_path, offline=False)
    assert fetched(hub) == [(SHARDS[1], "")]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--revision", "no-such"), ("no revision 'no-such'", "branch, tag or commit")),
        (("--repo", "someone/other"), ("someone/other is not there", "hf auth login")),
        (("--repo", "a b/c"), ("'a b/c' is not the name of a repository",)),
        (("--offline",), ("not whole in the cache",)),
    ],
    ids=["revision", "repository", "name", "offline"],
)
def test_what_cannot_be_fetched_is_said_in_one_line(words, said, hub, tmp_path):
    done = fetch(hub, tmp_path, *words)
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = [line for line in done.stderr.splitlines() if line.strip()]
    for part in said:
        assert part in line


def test_a_hub_that_does_not_answer(published, tmp_path):
    with Hub(published) as silent:
        pass  # its port is closed again
    line = fetch(silent, tmp_path).stderr.splitlines()[-1]
    assert line.startswith(f"error: {REPO} is not whole in the cache, and the hub does not answer")
