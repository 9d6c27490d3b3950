"""`--cache-dir` on the command line: a second run computes nothing, an edited prompt begins at a common state."""

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import Ran
from tiny import make_model

from xlstm_ray.state import RecurrentState

BOOK = "".join(chr(33 + n * n % 90) for n in range(200))
EDITED = f"{BOOK[:100]}an edit{BOOK[107:]}"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    make_model(directory, hidden_size=32, num_hidden_layers=2, num_heads=2, eos_token_id=None)
    return directory


@pytest.fixture
def ask(model: Path, run: Callable[..., Ran]) -> Callable[..., Ran]:
    words = "--device cpu --chunkwise-backend native --tile-size 16 --chunk-size 16 --progress none"

    def call(command: str, *more: object) -> Ran:
        return run(command, "--model", model, *words.split(), *more)

    return call


def test_a_second_run_is_instant_and_an_edited_one_starts_at_the_last_common_state(ask, tmp_path):
    plain = ask("prefill", "-p", BOOK, "--json").row
    assert plain["cache"] == {"hit_tokens": 0, "tier": None, "reason": "off"}
    cache = "--cache-dir", tmp_path, "--json"
    first = ask("prefill", "-p", BOOK, *cache).row
    assert first["cache"] == {"hit_tokens": 0, "tier": None, "reason": "none seen"}
    second = ask("prefill", "-p", BOOK, *cache).row
    assert second["cache"] == {"hit_tokens": 200, "tier": "disk", "reason": None}
    assert (first["tiles"] > 10, second["tiles"]) == (True, 0)
    assert plain["state_digest"] == first["state_digest"] == second["state_digest"]

    cold = ask("generate", "-p", EDITED, "--json", "-n", 5, "-o", tmp_path / "cold.state").row
    warm = ask("generate", "-p", EDITED, *cache, "-n", 5, "-o", tmp_path / "warm.state").row
    assert (warm["cache"]["hit_tokens"], warm["cache"]["tier"]) == (96, "disk")
    assert 96 <= int(warm["cache"]["reason"].removeprefix("diverged at ")) <= 100
    assert (warm["text"], warm["state_digest"]) == (cold["text"], cold["state_digest"])
    assert "from the cache" in ask("generate", "-p", EDITED, *cache[:2], "-n", 5).err


def test_each_line_says_what_the_cache_was_to_it(ask, tmp_path):
    lines = tmp_path / "prompts.jsonl"
    lines.write_text("\n".join(json.dumps(text) for text in (BOOK, EDITED[:150], "short")))
    for reasons in ([0, 0, 0], [200, 150, 5]):
        out = ask("prefill", "-f", lines, "--jsonl", "--cache-dir", tmp_path / "cache").out
        rows = sorted((json.loads(line) for line in out.splitlines()), key=lambda row: row["index"])
        assert [row["cache"]["hit_tokens"] for row in rows] == reasons


def test_the_directory_is_looked_after(ask, run, tmp_path):
    ask("prefill", "-p", BOOK, "--cache-dir", tmp_path)
    ask("prefill", "-p", "short", "--cache-dir", tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    states = sorted(tmp_path.glob("*.state"))
    listed = run("cache", "list", tmp_path, "--json").row
    assert {row["file"] for row in listed["states"]} == {path.name for path in states}
    assert listed["states"][0]["tokens"] == 5
    assert listed["bytes"] == sum(path.stat().st_size for path in states)
    out = run("cache", "list", tmp_path).out
    assert f"{len(states)} state(s)" in out
    assert "tiles of 16" in out

    states[0].write_bytes(states[0].read_bytes()[:-1])
    assert "1 damaged" in run("cache", "list", tmp_path).out
    assert run("cache", "prune", tmp_path, "--json").row["removed"] == [states[0].name]
    assert run("cache", "prune", tmp_path, "--json").row["removed"] == []
    assert len(run("cache", "prune", tmp_path, "--max-mb", 0, "--json").row["removed"]) == len(states) - 1
    ask("prefill", "-p", BOOK, "--cache-dir", tmp_path)
    assert len(run("cache", "clear", tmp_path, "--json").row["removed"]) > 3
    assert not list(tmp_path.glob("*.state"))
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_an_edit_is_found_between_the_states_that_another_process_has_kept(ask, tmp_path):
    long = BOOK * 4
    cache = "--cache-dir", tmp_path, "--json"
    ask("prefill", "-p", long, *cache)
    for place in (700, 444, 130, 100):
        row = ask("prefill", "-p", f"{long[:place]}~~~{long[place + 3 :]}", *cache).row["cache"]
        assert place - 64 < row["hit_tokens"] + 64 <= place + 64
        assert place - 16 < int(row["reason"].removeprefix("diverged at ")) <= place


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system, which can be made read only."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True).returncode != 0:
        pytest.skip("only root may mount a file system")
    yield disk
    subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("damage", [None, "torn", "flipped"])
def test_a_directory_that_cannot_be_written_serves_what_is_whole(damage, ask, run, disk):
    cache = "--cache-dir", disk, "--json"
    first = ask("prefill", "-p", BOOK, *cache).row
    (longest,) = [path for path in disk.glob("*.state") if RecurrentState.load(path).tokens == [200]]
    whole = longest.read_bytes()
    if damage is not None:
        longest.write_bytes(whole[:300] if damage == "torn" else whole[:-100] + bytes([whole[-100] ^ 1]) + whole[-99:])
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    again = ask("prefill", "-p", BOOK, *cache)
    assert again.row["state_digest"] == first["state_digest"]
    assert again.row["cache"]["hit_tokens"] == (200 if damage is None else 192)
    assert (f"does not use {longest.name}, and cannot remove it (Read-only" in again.err) == (damage is not None)
    for words in (["prune", disk, "--max-mb", 0], ["clear", disk]):
        said = f"error: {disk}: cannot be changed (Read-only file system); nothing more is removed"
        assert run("cache", *words).error == said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["cache", "list", "nowhere"], "nowhere: the cache cannot be used"),
        (["prefill", "-p", "x", "--cache-dir", ""], "--cache-dir is ''"),
        (["prefill", "-p", "x", "--journal", ""], "--journal is ''"),
        (["prefill", "-p", "x", "--cache-every", "3"], "--cache-every has no effect without a cache"),
        (["prefill", "-p", "x", "--cache-disk-mb", "3", "--cache-memory-mb", "1"], "add --cache-dir"),
        (["prefill", "-p", "x", "--cache-dir", "/dev/null"], "/dev/null: the cache cannot be used"),
        (["prefill", "-p", "x", "--cache-dir", "d", "--cache-match", "fuzzy"], "exact, nearest"),
    ],
)
def test_a_mistake_is_one_line(words, said, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert said in run(*words).error
