"""`score`: its table and JSON, runs that are stopped and killed, and mistakes."""

import json
import os
import re
import shlex
import signal
import subprocess
from pathlib import Path
from typing import Any

import programs
import pytest
from programs import PROGRAM
from tiny import make_model

import xlstm_ray

OPTIONS: dict[str, Any] = {"device": "cpu", "chunkwise_backend": "native", "tile_size": 32, "chunk_size": 16}
TEXT = "To talk of many things: of shoes and ships and sealing-wax. é\n" * 12
SUMS = "log_likelihood", "tokens", "words", "bytes", "bits_per_byte"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    make_model(directory, hidden_size=64, num_hidden_layers=2, num_heads=2)
    return directory


@pytest.fixture(scope="module")
def words(model: Path) -> tuple[object, ...]:
    options = "--device cpu --chunkwise-backend native --tile-size 32 --chunk-size 16"
    return ("score", "--model", model, *options.split())


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "a text").write_text(TEXT)
    return tmp_path / "a text"


@pytest.fixture(scope="module")
def whole(model: Path) -> dict[str, Any]:
    """Of TEXT, without a stop."""
    with xlstm_ray.load(model, **OPTIONS) as lm:
        return {name: lm.score(TEXT).to_json()[name] for name in SUMS}


def sums(row: dict[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in SUMS}


def test_files_pipes_and_several_texts(run, words, text, whole, tmp_path):
    assert sums(run(*words, "-f", text, "--json").row) == whole
    (tmp_path / "other").write_bytes(b"\xef\xbb\xbfone two")
    lines = run(*words, "-f", tmp_path / "other", "-f", text, "--json").out.splitlines()
    first, second = map(json.loads, lines)
    assert (first["file"], first["tokens"], first["words"], first["bytes"]) == (str(tmp_path / "other"), 7, 2, 7)
    assert sums(second) == whole
    head, *rows = run(*words, "-f", tmp_path / "other", "-f", text).out.splitlines()
    assert head.split() == "text tokens words bytes log-likelihood ppl/token ppl/word bits/byte".split()
    assert [row.split()[-1] for row in rows] == [
        f"{bits:.4f}"
        for bits in (
            first["bits_per_byte"],
            whole["bits_per_byte"],
            (first["bits_per_byte"] * 7 + whole["bits_per_byte"] * whole["bytes"]) / (7 + whole["bytes"]),
        )
    ]


def test_a_pipe_is_a_text(words, whole):
    done = programs.run([*map(str, (PROGRAM, *words, "-f", "-", "--json"))], input=TEXT.encode(), capture_output=True)
    assert sums(json.loads(done.stdout)) == whole


def after(process: "subprocess.Popen[str]", tiles: int) -> None:
    assert process.stderr is not None
    while tiles:
        tiles -= json.loads(process.stderr.readline())["event"] == "tile"


@pytest.mark.parametrize("journal", [False, True])
def test_a_score_that_was_stopped_or_killed_goes_on_to_the_same_sums(words, run, text, whole, tmp_path, journal):
    """By Ctrl-C, with the command that is printed; or by SIGKILL, from the journal."""
    more = ("--journal", tmp_path / "journal", "--journal-every", 1) if journal else ()
    (tmp_path / "other").write_text("one two")
    files = ("-f", text) if journal else ("-f", tmp_path / "other", "-f", text)
    command = [*map(str, (PROGRAM, *words, *files, "--json", "--progress", "ndjson", *more))]
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"), "PATH": f"{PROGRAM.parent}:/usr/bin:/bin"}
    with programs.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env) as process:
        after(process, 5)
        process.send_signal(signal.SIGKILL if journal else signal.SIGINT)
        out, err = process.communicate(timeout=100)
    if journal:
        row = run(*words, "-f", text, "--json", "--resume", tmp_path / "journal").row
        assert not (tmp_path / "journal" / "prefill.state").exists()
    else:
        assert process.returncode == 130
        assert json.loads(out)["tokens"] == 7  # what was whole is printed
        (again,) = re.findall(r"^to go on: (.*)$", err, re.MULTILINE)
        assert shlex.split(again)[2:4] == ["--file", str(text)]
        row = json.loads(programs.run_line(again, env).stdout)
    assert sums(row) == whole
    assert 3 * 32 <= row["resumed_tokens"] < row["tokens"]


@pytest.mark.parametrize(
    ("more", "error"),
    [
        ((), "there is no text; give --file FILE"),
        (("-f", "no-such"), "no-such: cannot be read (No such file or directory)"),
        (("-f", "{tmp}"), "cannot be read (Is a directory)"),
        (("-f", "{tmp}/empty"), "empty: is empty; a score needs at least one token"),
        (("-f", "{tmp}/bytes"), "bytes, line 2: is not UTF-8 text (invalid start byte at byte 3)"),
        (("-f", "-", "-f", "-"), "--file - was given twice"),
        (("-f", "a", "-f", "b", "--journal", "j"), "--journal is of one text, and 2 were given"),
        (("-f", "{tmp}/ok", "--state-in", "no-such"), "no-such: there is no such state file"),
        (("-f", "{tmp}/ok", "--state-in", "{tmp}/part.state"), "has no sums of log-probabilities"),
    ],
)
def test_a_mistake_is_one_line(run, words, model, tmp_path, more, error):
    for name, data in (("empty", b""), ("bytes", b"ok\n\xff"), ("ok", b"ok")):
        (tmp_path / name).write_bytes(data)
    if "part" in str(more):
        with xlstm_ray.load(model, **OPTIONS) as lm:
            asked = iter([False, True])
            lm.prefill(TEXT, should_stop=lambda: next(asked)).state.save(tmp_path / "part.state")
    assert error in run(*words, *(word.format(tmp=tmp_path) for word in more)).error
