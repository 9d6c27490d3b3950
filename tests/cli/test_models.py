"""Models of a hub by their names, from a local server of a repository's layout: --model, download, models."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import programs
import pytest
from hub import COMMIT, FILES, REPO, SHARDS, Hub, fetched, publish, serving
from tiny import make_model

import xlstm_ray
from xlstm_ray.actors.shard import ShardWork, WorkerSpec
from xlstm_ray.config import ModelConfig
from xlstm_ray.errors import CheckpointError
from xlstm_ray.layout import Shard

WEIGHTS = [*SHARDS, "model.safetensors.index.json"]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("published")
    publish(directory, 64)
    return directory


@pytest.fixture
def hub(published: Path) -> Iterator[Hub]:
    with serving(published) as server:
        yield server


def environment(hub: Hub, home: Path, **variables: str) -> dict[str, str]:
    own = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "XLSTM_CHUNKWISE_BACKEND": "native", "XLSTM_DEVICE": "cpu"}
    return {**os.environ, **own, **variables}


def program(
    hub: Hub, home: Path, *words: object, cwd: Path | None = None, **variables: str
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "xlstm_ray", *map(str, words)]
    env = environment(hub, home, **variables)
    return programs.run(command, capture_output=True, text=True, timeout=120, env=env, cwd=cwd)


def test_a_model_by_its_name(hub, published, tmp_path):
    """Its sizes need no weights; a run fetches the rest, once; then it needs no network."""
    home = tmp_path / "home"
    home.mkdir()
    (home / "token").write_text("hf_of_this_user")
    plan = program(hub, home, "plan", "--model", REPO, "--device", "m1", "--prompt-tokens", 100, "--json")
    assert plan.returncode == 0, plan.stderr
    assert json.loads(plan.stdout)["known_from"].startswith("config.json alone")
    assert sorted(name for name, _ in fetched(hub)) == [name for name in FILES if name not in WEIGHTS]
    assert "Bearer hf_of_this_user" in hub.tokens  # from the library's own place

    hub.asked.clear()
    words = "generate", "--prompt", "The capital", "-n", "3", "--json"
    done = program(hub, home, *words, "--model", REPO)
    assert done.returncode == 0, done.stderr
    assert sorted(name for name, _ in fetched(hub)) == WEIGHTS
    row = json.loads(done.stdout)
    assert Path(row["model"]).is_relative_to(home)
    with xlstm_ray.load(published, device="cpu", chunkwise_backend="native") as lm:
        assert row["text"] == "".join(lm.generate("The capital", max_new_tokens=3))

    hub.asked.clear()
    code = (
        f"import xlstm_ray; print(''.join(xlstm_ray.load('{REPO}@{COMMIT}').generate('The capital', max_new_tokens=3)))"
    )
    env = environment(hub, home, HF_HUB_OFFLINE="1")
    python = programs.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=env)
    assert python.stdout == row["text"] + "\n", python.stderr
    assert not hub.asked


def test_a_directory_of_that_name_wins(hub, tmp_path):
    make_model(tmp_path / REPO, hidden_size=64, num_hidden_layers=1, num_heads=2)
    done = program(hub, tmp_path / "home", "config", "--model", REPO, "--json", cwd=tmp_path)
    assert json.loads(done.stdout)["model"]["value"] == REPO
    shutil.rmtree(tmp_path / REPO)  # what a local directory lacks is not looked for elsewhere
    missing = program(hub, tmp_path / "home", "config", "--model", REPO, cwd=tmp_path)
    assert missing.returncode == 1
    assert missing.stderr.startswith(f"error: {REPO}: is not a directory; --model takes one with config.json")
    assert not hub.asked


def test_a_name_in_a_file_of_settings(hub, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "settings.toml").write_text(f'model = "{REPO}"\n')
    done = program(hub, tmp_path / "home", "config", "--config", tmp_path / "folder" / "settings.toml", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["model"]["value"].endswith(COMMIT)


@pytest.mark.parametrize(
    ("name", "said", "variables"),
    [
        ("someone/other", "someone/other is not there", {}),
        (f"{REPO}@no-such", "no revision 'no-such'", {}),
        (REPO, "HF_HUB_OFFLINE is set", {"HF_HUB_OFFLINE": "1"}),
        (REPO, "the hub does not answer", {"HF_ENDPOINT": "http://127.0.0.1:9"}),
    ],
    ids=["other", "revision", "offline", "silent"],
)
def test_a_name_that_cannot_be_fetched_is_one_line(name, said, variables, hub, tmp_path):
    done = program(hub, tmp_path, "prefill", "--model", name, "--prompt", "a", **variables)
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {name}: is not a directory here, and on the hub: ")
    assert said in line


def test_a_name_is_enough_to_be_wrong_in_an_option(hub, tmp_path):
    """A mistake in another option costs no download of weights."""
    done = program(hub, tmp_path, "prefill", "--model", REPO, "--prompt", "a", "--heads-per-band", "99")
    assert done.returncode == 1
    assert done.stderr == "error: --heads-per-band is 99, but the model has 4 heads\n"
    assert not {name for name, _ in fetched(hub)} & set(WEIGHTS)


# -- download, models --------------------------------------------------------------------------------------------------
def test_download_says_how_the_model_is_used(hub, tmp_path):
    name = f"{REPO}@{COMMIT}"
    done = program(hub, tmp_path, "download", name)
    assert done.returncode == 0, done.stderr
    model = Path(done.stdout.strip())
    assert sorted(path.name for path in model.iterdir()) == FILES
    use = next(line for line in done.stderr.splitlines() if line.startswith("to use it: "))
    words = shlex.split(use.removeprefix("to use it: "))
    assert words[:3] == [sys.executable, "-m", "xlstm_ray"]
    hub.asked.clear()
    row = json.loads(program(hub, tmp_path, *words[3:], "-n", "2", "--json").stdout)
    assert (row["model"], row["new_tokens"]) == (str(model), 2)
    again = program(hub, tmp_path, "download", name, "--offline")
    assert again.stdout == done.stdout
    assert not hub.asked


def test_the_hubs_cache_is_another_option_than_the_cache_of_states(hub, tmp_path):
    done = program(hub, tmp_path, "download", REPO, "--hub-cache", tmp_path / "models")
    assert Path(done.stdout.strip()).is_relative_to(tmp_path / "models")
    (row,) = json.loads(program(hub, tmp_path, "models", "--hub-cache", tmp_path / "models", "--json").stdout)["models"]
    assert (row["name"], row["directory"]) == (REPO, done.stdout.strip())
    for command in (["download", REPO], ["models"]):
        assert (
            "--cache-dir (Possible options: --hub-cache)" in program(hub, tmp_path, *command, "--cache-dir", "x").stderr
        )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("someone/other",), "someone/other is not there"),
        ((f"{REPO}@no-such",), "no revision 'no-such'"),
        ((f"{REPO}@",), "names no revision after the @"),
        (("a b/c",), "'a b/c' is not the name of a repository"),
        ((REPO, "--offline"), "not whole in the cache"),
    ],
)
def test_what_the_command_cannot_fetch_is_one_line(words, said, hub, tmp_path):
    done = program(hub, tmp_path, "download", *words)
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = [line for line in done.stderr.splitlines() if line.strip()]
    assert said in line


def test_a_download_without_a_terminal_says_that_it_goes_on(hub, tmp_path):
    code = "import sys; from xlstm_ray.cli import reporter; reporter.EVERY_S = 0.02; "
    code += f"from xlstm_ray.cli.app import main; sys.argv = ['xlstm-ray', 'download', {REPO!r}]; main()"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=environment(hub, tmp_path)
    )
    assert done.returncode == 0, done.stderr
    assert re.search(rf"^\S+ downloading {REPO}: 0:00:\d\d so far$", done.stderr, re.MULTILINE)


def test_the_list_of_models(hub, tmp_path):
    assert json.loads(program(hub, tmp_path, "models", "--json").stdout) == {"models": []}
    program(hub, tmp_path, "config", "--model", REPO)  # all but the weights
    (row,) = json.loads(program(hub, tmp_path, "models", "--json").stdout)["models"]
    assert (row["name"], row["revision"], row["whole"], row["xlstm"]) == (REPO, COMMIT, False, True)
    assert "not whole" in program(hub, tmp_path, "models").stdout.splitlines()[1]

    directory = Path(program(hub, tmp_path, "download", REPO).stdout.strip())
    other = tmp_path / "hub" / "models--another--kind" / "snapshots" / COMMIT
    other.mkdir(parents=True)
    (other / "config.json").write_text(json.dumps({"model_type": "another"}))
    hub.asked.clear()
    kind, model = json.loads(program(hub, tmp_path, "models", "--json").stdout)["models"]
    assert (kind["name"], kind["xlstm"]) == (f"another/kind@{COMMIT}", False)
    size = sum(file.stat().st_size for file in directory.iterdir())
    assert model == {**row, "whole": True, "bytes": size, "directory": str(directory)}
    _, first, second = program(hub, tmp_path, "models").stdout.splitlines()
    assert "does not run here" in first
    assert re.match(rf"{REPO} +{COMMIT[:12]} +\S+ \S+  xLSTM$", second)
    assert not hub.asked


def test_a_node_without_the_model_is_told_how_to_get_it(published, tmp_path):
    config = ModelConfig.from_file(published / "config.json")
    cached = tmp_path / "models--someone--tiny-xlstm" / "snapshots" / COMMIT
    for directory, said in (
        (cached, f"`xlstm-ray download {REPO}@{COMMIT}` with the same HF_HOME"),
        (tmp_path / "elsewhere", "a copy, or a mount of the same files,"),
    ):
        spec = WorkerSpec(directory, config, {}, "native", "cpu", None, 8, None, 1)
        with pytest.raises(CheckpointError, match=r"has no such directory") as err:
            ShardWork(spec, Shard(range(1), range(4), range(10)), "a", one_band=True).load()
        assert said in str(err.value)


EMPTY = """
quantize '' out --bits 8
quantize in '' --bits 8
models --hub-cache ''
download a/b --hub-cache ''
prefill --prompt-file ''
prefill --prompt a --state-in ''
prefill --prompt a --state-out ''
prefill --prompt a --config ''
generate --messages ''
generate --append-file ''
generate --chat --chat-template '' --prompt a
chat --state-in ''
serve --chat-template ''
serve --access-log ''
cache list ''
client states download a ''
client ask --prompt a --api-key-file ''
bench --png ''
warm-up --cache-out ''
warm-up --cache-in ''
"""


@pytest.mark.parametrize("words", EMPTY.strip().splitlines())
def test_an_empty_path_is_not_this_directory(words: str, run, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    ran = run(*shlex.split(words))
    assert (ran.code, ran.out) == (2, "")
    (said,) = ran.err.splitlines()
    assert "a path is not empty (given: '')" in said
    assert not any(tmp_path.iterdir())


def test_score_takes_no_empty_path(run) -> None:  # typer validates no lists
    ran = run("score", "--file", "a", "--file", "")
    assert (ran.code, ran.err) == (1, "error: --file was given as ''; a path is not empty\n")


def test_a_missing_choice_is_one_line(run) -> None:
    ran = run("quantize", "in", "out")
    assert (ran.code, ran.err) == (
        2,
        "error: Missing option '--bits'. Choose from: 8, 4; see xlstm-ray quantize --help\n",
    )


@pytest.mark.parametrize("more", [(), ("--json",)])
def test_a_hub_cache_that_is_a_file_is_refused(more, run, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    ran = run("models", "--hub-cache", tmp_path / "file", *more)
    assert (ran.code, ran.out, ran.err) == (1, "", f"error: {tmp_path / 'file'}: is not a directory\n")
