"""`xlstm-ray bench` on a tiny model, in real processes."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import programs
import psutil
import pytest
from conftest import Ran
from programs import PROGRAM
from tiny import make_model

BACKENDS = ("native", "ray_compiled_chunks")  # the second in local mode


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    make_model(directory, num_hidden_layers=1)  # of sizes that other tests compile too
    return directory


def bench(*words: object, code: int = 0, **environment: str) -> str:
    """Its standard output, or its error line."""
    env = {**os.environ, **environment}
    done = programs.run([PROGRAM, "bench", *map(str, words)], capture_output=True, text=True, timeout=120, env=env)
    assert done.returncode == code, done.stderr
    if code:
        assert done.stdout == ""
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1
    return done.stderr if code else done.stdout


def test_a_row_for_each_pair_and_a_picture(model: Path, tmp_path: Path) -> None:
    PIL = pytest.importorskip("PIL.Image")
    picture = tmp_path / "bench.png"
    words = ("--model", model, "--device", "cpu", "--lengths", "64,32", "--rounds", 2, "--tile-size", 32)
    out = bench(*words, "--backends", "native,chunkwise--ray_compiled_chunks", "--png", picture, "--json")
    found = json.loads(out)
    assert [(row["tokens"], row["backend"]) for row in found["rows"]] == [
        (tokens, backend) for tokens in (64, 32) for backend in BACKENDS
    ]
    for row in found["rows"]:
        assert len(row["seconds"]) == 2
        assert row["tok_s"] == pytest.approx(row["tokens"] / (sum(row["seconds"]) / 2))
        assert row["peak_bytes"] == row["peak_process_bytes"] > 100 << 20  # torch is in it
        assert row["peak_device_bytes"] is None
    peaks = {name: min(row["peak_bytes"] for row in found["rows"] if row["backend"] == name) for name in BACKENDS}
    assert peaks[BACKENDS[0]] < peaks[BACKENDS[1]]  # each has a process of its own, and only one holds a compiler
    with PIL.open(picture) as image:
        assert image.format == "PNG"
        assert image.size == (1320, 540)
        assert len(image.convert("RGB").getcolors(1 << 20)) > 50
    assert not list(tmp_path.glob(".*"))


def test_two_axes_with_a_line_for_each_backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    from xlstm_ray.measure.bench import Row, draw

    about = ("a-model", 3, "a machine")
    rows = [
        Row(n, b, "cpu", "float32", [n / 1000, n / 500], 1 << 20, 1 << 20, None, *about)
        for n in (512, 2048)
        for b in "ab"
    ]
    monkeypatch.setattr(pyplot, "close", lambda figure: None)
    draw(rows, tmp_path / "b.png")
    speed, memory = pyplot.gcf().axes
    pyplot.close("all")
    for axis in (speed, memory):
        assert [line.get_label() for line in axis.lines] == ["a", "b"]
        assert all(list(line.get_xdata()) == [512, 2048] for line in axis.lines)
    assert list(speed.lines[0].get_ydata()) == pytest.approx([512 / 0.768, 2048 / 3.072])
    assert list(memory.lines[0].get_ydata()) == [1, 1]
    edges = sorted(set(speed.collections[0].get_paths()[0].vertices[:, 1]))
    assert (edges[0], edges[-1]) == pytest.approx((500, 1000))  # the range of the rounds
    title = speed.figure.get_suptitle()
    for part in ("a-model", "cpu", "float32", "3 threads", "2 rounds", "a machine", str(datetime.now().year)):
        assert part in title


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--lengths", "512,0"), "--lengths is '512,0'; allowed: whole numbers from 1"),
        (("--lengths", ""), "--lengths is ''"),
        (("--backends", "native,fast"), "--backends names 'fast'; there are: auto, queued_compiled_chunks"),
        (("--rounds", "0"), "--rounds is 0; allowed: 1 or more"),
        (("--png", "no/such/b.png"), "--png no/such/b.png: its directory does not exist"),
        (("--device", "tpu"), "--device is 'tpu'; allowed: auto"),
    ],
)
def test_mistakes_are_one_line(words: tuple[str, ...], says: str, run: Callable[..., Ran]) -> None:
    ran = run("bench", *words)
    assert ran.code == 1
    assert ran.error.startswith(f"error: {says}")


def test_what_a_child_refuses_is_one_line_too(model: Path) -> None:
    error = bench("--model", model, "--tile-size", 40, "--backends", "native", "--lengths", 8, code=1)
    assert error.startswith(
        "error: native at 8 tokens: --tile-size is 40, which is not a multiple of the chunk size 16"
    )


def test_matplotlib_is_missed_only_where_a_picture_is_asked_for(model: Path, tmp_path: Path) -> None:
    (tmp_path / "matplotlib.py").write_text("raise ImportError('not here')")
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    words = ("--model", model, "--device", "cpu", "--lengths", "8", "--rounds", 1)
    error = bench(*words, "--png", tmp_path / "b.png", code=1, PYTHONPATH=path)
    assert (
        f"--png draws with matplotlib, which is not installed; {sys.executable} -m pip install 'matplotlib>=" in error
    )
    header, line = bench(*words, PYTHONPATH=path, XLSTM_CHUNKWISE_BACKEND="native").splitlines()
    assert header.split() == "tokens backend tokens/s range of seconds memory, MiB".split()
    assert line.split()[:2] == ["8", "native"]  # what a run takes here


def test_notes_of_a_child_are_told(model: Path, run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"XLSTM_MEM_SOFT_MB": "1", "XLSTM_MEM_POLL_MS": "1", "XLSTM_SHRINK_ON_SOFT": "0"}.items():
        monkeypatch.setenv(name, value)
    words = ("--model", model, "--device", "cpu", "--lengths", 512, "--rounds", 1, "--backends", "native", "--json")
    ran = run("bench", *words, "--tile-size", 16)
    assert len(ran.row["rows"]) == 1
    assert ran.err.startswith("note: memory: this process uses ")
    assert all(line.startswith("note: memory: ") for line in ran.err.splitlines())


def test_ctrl_c_leaves_no_child(model: Path) -> None:
    words = ["--model", model, "--device", "cpu", "--lengths", "200000", "--backends", "native", "--rounds", "1"]
    process = programs.Popen([PROGRAM, "bench", *map(str, words)], stderr=subprocess.PIPE, text=True)
    watched = psutil.Process(process.pid)
    while not (children := watched.children()):
        assert process.poll() is None
        time.sleep(0.05)
    time.sleep(2)  # the child is loading, or at its first prefill, which takes minutes
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (130, "interrupted\n")
    assert not psutil.wait_procs(children, timeout=10)[1]
