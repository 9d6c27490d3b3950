"""A run's outputs never replace files of other programs, and leave no temporary files."""

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Ran
from tiny import make_model

import xlstm_ray
from xlstm_ray import RecurrentState
from xlstm_ray.engine.logs import TILE_COLUMNS
from xlstm_ray.errors import OutputError
from xlstm_ray.files import LOG, PICTURE, STALE_S, write_whole
from xlstm_ray.memory.watchdog import LOG_COLUMNS

PROMPT = "The quick brown fox"
OUTPUTS = {"--state-out": "state", "--stats-log": "tiles.csv", "--mem-log": "memory.csv"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    make_model(directory, hidden_size=32, num_hidden_layers=2, num_heads=2, eos_token_id=None)
    return directory


@pytest.fixture(scope="module")
def options(model: Path) -> tuple[str, ...]:
    words = "--device cpu --chunkwise-backend native --tile-size 16 --chunk-size 16"
    return ("--model", str(model), *words.split())


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("option", OUTPUTS)
@pytest.mark.parametrize("name", ["notes.txt", "model.safetensors", "config.json", "table.csv", "picture.png"])
def test_what_this_program_did_not_write_is_not_replaced(option, name, run, options, model, tmp_path):
    there = {
        "notes.txt": b"my only copy\n",
        "model.safetensors": (model / "model.safetensors").read_bytes(),
        "config.json": (model / "config.json").read_bytes(),
        "table.csv": b"time,tokens\n1,2\n",
        "picture.png": b"\x89PNG\r\n\x1a\nnot of ours",
    }[name]
    (tmp_path / name).write_bytes(there)
    error = run("prefill", *options, "--prompt", PROMPT, option, tmp_path / name).error
    for part in (option, name, "is not replaced", "--overwrite"):
        assert part in error
    assert contents(tmp_path) == {name: there}
    assert run("prefill", *options, "--prompt", PROMPT, option, tmp_path / name, "--overwrite").code == 0
    assert (tmp_path / name).read_bytes() != there


def test_outputs_of_ours_and_empty_files_are_replaced(run, options, tmp_path):
    words = [word for option, name in OUTPUTS.items() for word in (option, tmp_path / name)]
    for name in OUTPUTS.values():
        (tmp_path / name).touch()
    for prompt in (PROMPT, PROMPT * 3):
        assert run("prefill", *options, "--prompt", prompt, *words).code == 0
        assert sorted(contents(tmp_path)) == sorted(OUTPUTS.values())
    assert RecurrentState.load(tmp_path / "state").tokens == [3 * len(PROMPT)]
    for columns in (TILE_COLUMNS, LOG_COLUMNS):
        assert LOG.ours(",".join(["time", *columns]).encode())


@pytest.mark.parametrize("flag", [(), ("--overwrite",)])
def test_what_a_run_reads_is_never_its_output(flag, run, options, model, tmp_path):
    own = tmp_path / "m"
    shutil.copytree(model, own)
    (tmp_path / "book.txt").write_text(PROMPT)
    (tmp_path / "settings.toml").write_text("workers = 1\n")
    os.link(tmp_path / "book.txt", tmp_path / "another name")
    assert run("prefill", *options, "--prompt", PROMPT, "--state-out", tmp_path / "s").code == 0
    before = contents(tmp_path)
    words = (*options, "--model", own, "--prompt-file", tmp_path / "book.txt", "--config", tmp_path / "settings.toml")
    cases: list[tuple[str, Path]] = [
        ("--state-out", tmp_path / "book.txt"),
        ("--state-out", tmp_path / "another name"),
        ("--stats-log", tmp_path / "m" / ".." / "book.txt"),
        ("--mem-log", tmp_path / "settings.toml"),
        ("--state-out", own / "model.safetensors"),
        ("--state-out", own / "model.safetensors.index.json"),  # not there, but the model's all the same
        ("--stats-log", own / "tokenizer.json"),
    ]
    for option, path in cases:
        error = run("prefill", *words, option, path, *flag).error
        assert option in error
        assert str(path) in error
    error = run("prefill", *options, "--state-in", tmp_path / "s", "--stats-log", tmp_path / "s", *flag).error
    assert "--state-in" in error
    assert contents(tmp_path) == before
    # A run's output may replace the state that it goes on from.
    grown = (*options, "--prompt", PROMPT * 2, "--state-in", tmp_path / "s", "--state-out", tmp_path / "s")
    assert run("prefill", *grown).code == 0


def test_two_outputs_take_two_files(run, options, tmp_path):
    for a, b in (("--state-out", "--stats-log"), ("--stats-log", "--mem-log"), ("--mem-log", "--state-out")):
        error = run("prefill", *options, "--prompt", PROMPT, a, tmp_path / "x", b, tmp_path / "." / "x").error
        assert a in error
        assert b in error
    journal = tmp_path / "j" / "prefill.state"
    error = run("prefill", *options, "--prompt", PROMPT, "--journal", journal.parent, "--state-out", journal).error
    assert "--journal" in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("option", [*OUTPUTS, "--journal"])
@pytest.mark.parametrize("place", ["link", "dangling link", "pipe", "device", "standard output", "directory"])
def test_an_output_is_a_file(option, place, run, options, tmp_path):
    path = {"device": Path("/dev/null"), "standard output": Path("/dev/stdout")}.get(place, tmp_path / "j" / place)
    if option == "--journal":
        if not path.is_relative_to(tmp_path):
            return  # the journal is a directory of its own
        path = path.with_name("prefill.state")
    path.parent.mkdir(exist_ok=True)
    if "link" in place:
        path.symlink_to(tmp_path / "target")
    elif place == "pipe":
        os.mkfifo(path)
    elif place == "directory":
        path.mkdir()
    if place == "link":
        (tmp_path / "target").write_text("kept")
    before = contents(tmp_path)
    given = path.parent if option == "--journal" else path
    for more in ((), ("--overwrite",)):
        error = run("prefill", *options, "--prompt", PROMPT, option, given, *more).error
        assert str(path) in error
        assert "is a link" in error or "is not a file" in error
    assert contents(tmp_path) == before


def test_from_python_the_same_holds(model, tmp_path):
    plain = {"device": "cpu", "chunkwise_backend": "native", "tile_size": 16, "chunk_size": 16}
    (tmp_path / "notes").write_text("my only copy")
    with pytest.raises(OutputError, match="`stats_log` .*notes: is there and is not a log of this program"):
        xlstm_ray.load(model, **plain, stats_log=tmp_path / "notes")
    own = shutil.copytree(model, tmp_path / "m")
    with pytest.raises(OutputError, match="is what `model` reads"):
        xlstm_ray.load(own, **plain, mem_log=own / "config.json", overwrite=True)
    state = xlstm_ray.load(model, **plain).prefill(PROMPT).state
    state.save(tmp_path / "notes", overwrite=True)
    assert RecurrentState.load(tmp_path / "notes").digest() == state.digest()


def test_a_picture_of_ours_is_known_by_what_is_in_it(tmp_path):
    pytest.importorskip("matplotlib")
    from xlstm_ray.measure.bench import Row, draw

    rows = [Row(512, "native", "cpu", "float32", [1.0], 1 << 20, 1 << 20, None)]
    for _ in range(2):
        draw(rows, tmp_path / "b.png")
    assert PICTURE.ours((tmp_path / "b.png").read_bytes()[:4096])
    from matplotlib import pyplot

    pyplot.figure().savefig(tmp_path / "b.png")
    theirs = (tmp_path / "b.png").read_bytes()
    with pytest.raises(OutputError, match="b.png: is there and is not a picture of this program"):
        draw(rows, tmp_path / "b.png")
    assert (tmp_path / "b.png").read_bytes() == theirs
    draw(rows, tmp_path / "b.png", overwrite=True)


# -- temporary files ---------------------------------------------------------------------------------------------------
def test_temporary_files_of_killed_writers_go_and_no_others(run, options, tmp_path, somebody_elses: Callable):
    old = time.time() - 2 * STALE_S
    ours = [tmp_path / f".xlstm-ray.{n:016x}.tmp" for n in range(5)]
    for path in (*ours, tmp_path / ".xlstm-ray.tmp", tmp_path / "a.tmp", tmp_path / ".xlstm-ray.00.tmp.txt"):
        path.write_bytes(b"half")
        os.utime(path, (old, old))
    os.utime(ours[1])  # somebody writes to it
    ours[2].unlink()
    ours[2].symlink_to(tmp_path / "a.tmp")
    os.utime(ours[2], (old, old), follow_symlinks=False)
    stay = {ours[1], ours[2], tmp_path / ".xlstm-ray.tmp", tmp_path / "a.tmp", tmp_path / ".xlstm-ray.00.tmp.txt"}
    if somebody_elses(ours[3]):
        stay.add(ours[3])
    write_whole(tmp_path / "file", b"data")
    assert set(tmp_path.iterdir()) == stay | {tmp_path / "file"}


@pytest.fixture
def somebody_elses() -> Callable[[Path], bool]:
    """Give a file to another user, if that is permitted."""

    def give(path: Path) -> bool:
        if os.geteuid() != 0:
            return False
        os.chown(path, 65534, 65534)
        return True

    return give


def test_a_state_sweeps_the_place_it_goes_to(run: Callable[..., Ran], options, tmp_path):
    left = tmp_path / ".xlstm-ray.0123456789abcdef.tmp"
    left.write_bytes(b"half a state")
    os.utime(left, (0, 0))
    assert run("prefill", *options, "--prompt", PROMPT, "--state-out", tmp_path / "s").code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["s"]
