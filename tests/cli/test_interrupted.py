"""Runs that end early, and files that cannot be written: results are printed, work is kept, exit codes are right."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import programs
import pytest
from conftest import Ran
from programs import PROGRAM
from tiny import model

import xlstm_ray
from xlstm_ray import RecurrentState
from xlstm_ray.cli.keeper import _watch
from xlstm_ray.engine.driver import Progress
from xlstm_ray.engine.journal import LOCK_FILE, Journal
from xlstm_ray.errors import GridLost, OutputError, StateError
from xlstm_ray.files import STATE

__all__ = ["model"]

LONG = "To talk of many things: of shoes and ships and sealing-wax. " * 60  # 56 tiles
PLAIN: dict[str, Any] = {"device": "cpu", "chunkwise_backend": "native", "tile_size": 64, "chunk_size": 16}


@pytest.fixture(scope="module")
def words(model: Path) -> tuple[str, ...]:
    options = "--device cpu --chunkwise-backend native --tile-size 64 --chunk-size 16"
    return ("--model", str(model), *options.split())


@pytest.fixture(scope="module")
def digest(model: Path) -> str:
    """The digest of LONG without a stop."""
    return xlstm_ray.load(model, **PLAIN).prefill(LONG).state.digest()


@pytest.fixture
def home(tmp_path: Path) -> dict[str, str]:
    """An environment with an empty cache directory."""
    path = f"{PROGRAM.parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"), "PATH": path}


@contextmanager
def started(*command: object, **how: Any) -> Iterator[subprocess.Popen[str]]:
    with programs.Popen(
        [PROGRAM, *map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **how
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def tiles_of(process: subprocess.Popen[str], count: int) -> list[dict[str, Any]]:
    assert process.stderr is not None
    found: list[dict[str, Any]] = []
    while len(found) < count:
        row = json.loads(process.stderr.readline())
        found += [row] if row["event"] == "tile" else []
    return found


def go_on(said: str, env: dict[str, str]) -> Ran:
    """Run the command that a run has printed."""
    (command,) = re.findall(r"^to go on: (.*)$", said, re.MULTILINE)
    again = programs.run_line(command, env)
    return Ran(again.returncode, again.stdout, again.stderr)


# -- Ctrl-C and SIGTERM ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_without_state_out_the_work_is_kept_and_goes_on(number, code, words, digest, home, tmp_path):
    (tmp_path / "prompt").write_text(LONG)
    command = ("prefill", *words, "--json", "--prompt-file", tmp_path / "prompt", "--progress", "ndjson")
    with started(*command, env={**home, "XLSTM_MEM_POLL_MS": "77"}) as process:
        tiles_of(process, 3)
        process.send_signal(number)
        out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (code, "")
    stopping = [json.loads(line) for line in err.splitlines() if '"stopping"' in line]
    assert [row["text"] for row in stopping] == ["stopping after this tile; Ctrl-C again: now"]
    (kept,) = (tmp_path / "cache" / "xlstm-ray" / "states").iterdir()
    state = RecurrentState.load(kept)
    assert 64 * 3 <= state.tokens[0] < len(LONG)
    said = err.splitlines()[-2]
    assert re.fullmatch(
        rf"stopped after {state.tokens[0]} of {len(LONG)} tokens; the state \([\d.]+ KiB\) is kept in {kept}", said
    )
    assert "to go on: XLSTM_MEM_POLL_MS=77 xlstm-ray prefill" in err
    again = go_on(err, home)
    assert again.code == 0, again
    row = json.loads(again.out)
    assert (row["resumed_tokens"], row["state_digest"]) == (state.tokens[0], digest)
    # Progress counts from where the first run stopped, and the speed counts only new tokens.
    first = next(row for row in map(json.loads, again.err.splitlines()) if row["event"] == "tile")
    assert first["tokens_done"] == state.tokens[0] + 64
    assert first["tokens_total"] == len(LONG)
    assert Progress(3_064, 10_000, 1, 2.0, 2.0, 3_000).tokens_per_s == 32


def test_a_second_interrupt_leaves_the_last_whole_tile(words, home, tmp_path):
    (tmp_path / "prompt").write_text(LONG * 60)
    big = ("prefill", *words, "--tile-size", 4096, "--prompt-file", tmp_path / "prompt", "--progress", "ndjson")
    with started(*big, env=home) as process:
        (first,) = tiles_of(process, 1)
        time.sleep(first["tile_s"] / 4)  # into the second tile
        process.send_signal(signal.SIGINT)
        done = first["tiles_done"]
        while "stopping after this tile" not in (line := process.stderr.readline()):  # said while the tile is worked on
            done = json.loads(line)["tiles_done"]  # on a busy machine that tile had ended before
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (130, "")
    assert "tiles_done" not in err  # it did not wait for the tile
    (kept,) = (tmp_path / "cache" / "xlstm-ray" / "states").iterdir()
    state = RecurrentState.load(kept)
    assert (state.tokens, state.complete) == ([4096 * done], False)
    assert f"interrupted after {4096 * done} tokens; the state (" in err
    assert f"--state-in {kept}" in err


def test_what_an_interrupt_leaves_is_the_state_of_that_tile(model, digest):
    """From Python: after any end of a prefill, the engine has the last state."""
    lm = xlstm_ray.load(model, **PLAIN, heads_per_band=1)
    seen = 0

    def interrupt(_progress: object) -> None:
        nonlocal seen
        seen += 1
        if seen == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lm.prefill(LONG, on_progress=interrupt)
    state = lm.last_state()
    assert state.tokens == [5 * 64]
    assert (
        lm.prefill(LONG, state=state).state.digest()
        == xlstm_ray.load(model, **PLAIN, heads_per_band=1).prefill(LONG).state.digest()
    )
    assert lm.last_state() is None


def test_an_interrupted_generation_is_kept_too(words, home, tmp_path):
    with started("generate", *words, "--prompt", "It was", "--max-new-tokens", 100_000, env=home) as process:
        assert process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "stopping after this token" in err
    (kept,) = (tmp_path / "cache" / "xlstm-ray" / "states").iterdir()
    made = RecurrentState.load(kept).tokens[0] - len("It was")
    assert f"stopped after {made} new tokens; the state (" in err
    (command,) = re.findall(r"; to go on: (.*)$", err, re.MULTILINE)
    assert "It was" not in command
    more = programs.run_line(f"{command} --max-new-tokens 3 --json", home)
    assert json.loads(more.stdout)["resumed_tokens"] == made + len("It was")


def test_kept_states_are_one_a_model_and_few(model, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    state = xlstm_ray.load(model, **PLAIN).prefill("abc").state
    for n in range(7):
        state.model = f"{n:032x}"
        path = state.keep()
        assert state.keep() == path
        os.utime(path, (n + 1, n + 1))
    kept = sorted(path.stem for path in path.parent.iterdir())
    assert kept == [f"{n:032x}" for n in range(3, 7)]


# -- files that cannot be written --------------------------------------------------------------------------------------
LIMITED = """
    import resource, sys
    from xlstm_ray.cli.app import main
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv.pop(1)),) * 2)
    main()
"""


def limited(size: int, *command: object, env: dict[str, str]) -> Ran:
    """Run the program with a limit of `size` bytes for each file, which the file system does not show."""
    program = [sys.executable, "-c", textwrap.dedent(LIMITED), str(size), *map(str, command)]
    done = programs.run(program, capture_output=True, text=True, timeout=120, env=env)
    return Ran(done.returncode, done.stdout, done.stderr)


@pytest.mark.parametrize("command", ["prefill", "generate"])
def test_results_come_out_though_the_state_cannot_be_written(command, words, home, tmp_path):
    state = tmp_path / "s"
    ran = limited(2000, command, *words, "--prompt", "It was", "--json", "--state-out", state, env=home)
    assert ran.code == 1
    row = json.loads(ran.out)
    assert row["state_path"] is None
    assert row["next_tokens"]
    assert f"{state}: the state cannot be written (File too large)" in ran.err.splitlines()[-1]
    assert ran.err.splitlines()[-1].startswith("error: ")
    assert not state.exists()


def test_results_come_out_though_a_log_is_not_whole(words, home, tmp_path):
    log = tmp_path / "tiles.csv"
    ran = limited(300, "prefill", *words, "--prompt", LONG, "--json", "--stats-log", log, env=home)
    assert ran.code == 1
    assert json.loads(ran.out)["prompt_tokens"] == len(LONG)
    assert f"--stats-log {log}: is not whole (File too large)" in ran.err.splitlines()[-1]


def test_a_run_goes_on_without_snapshots_that_cannot_be_written(words, home, digest, tmp_path):
    command = ("prefill", *words, "--prompt", LONG, "--json", "--journal", tmp_path / "j", "--journal-every", 1)
    ran = limited(2000, *command, env=home)
    assert ran.code == 1
    assert json.loads(ran.out)["state_digest"] == digest
    notes = [line for line in ran.err.splitlines() if line.startswith("note: ")]
    assert len(notes) == 1
    assert "a snapshot is missing" in notes[0]
    assert "--journal" in ran.err.splitlines()[-1]
    assert list((tmp_path / "j").iterdir()) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 12 KiB, which is smaller than a state of the model."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12k", "tmpfs", disk], capture_output=True).returncode != 0:
        pytest.skip("only root may mount a file system")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_room_is_looked_for_before_the_work(words, small_disk, home, run, model):
    path = small_disk / "s"
    for option, given in (("--state-out", path), ("--journal", small_disk / "j")):
        error = run("prefill", *words, "--prompt", LONG, option, given).error
        assert option in error
        assert re.search(r"[\d.]+ KiB are needed there, and [\d.]+ KiB are free", error)
        assert not list(small_disk.rglob("*.state"))
    # What a killed writer has left there does not count.
    left = small_disk / ".xlstm-ray.0123456789abcdef.tmp"
    left.write_bytes(bytes(8_000))
    os.utime(left, (0, 0))
    run("prefill", *words, "--prompt", LONG, "--state-out", path)
    assert not left.exists()


def test_the_size_of_a_state_is_known_before(model, tmp_path):
    lm = xlstm_ray.load(model, **PLAIN)
    for rows in (1, 3):
        lm.prefill(["abc"] * rows).state.save(tmp_path / "s")
        size = (tmp_path / "s").stat().st_size
        assert size <= lm.config.state_file_bytes(rows) < 1.3 * size + 8192
    assert STATE.ours((tmp_path / "s").read_bytes()[:4096])


# -- one journal, one run ----------------------------------------------------------------------------------------------
def test_two_runs_do_not_share_a_journal(words, home, digest, tmp_path):
    (tmp_path / "prompt").write_text(LONG)
    journal = tmp_path / "j"
    command = ("prefill", *words, "--prompt-file", tmp_path / "prompt", "--journal-every", 1, "--progress", "ndjson")
    with started(*command, "--journal", journal, env=home) as first:
        tiles_of(first, 2)
        first.send_signal(signal.SIGSTOP)  # it must not end before the others have seen it
        for option in ("--journal", "--resume"):
            second = programs.run(
                [PROGRAM, *map(str, command), option, journal], env=home, capture_output=True, text=True, timeout=120
            )
            assert second.returncode == 1
            assert f"another run (pid {first.pid} on " in second.stderr
        first.kill()
        first.wait()
    assert (journal / LOCK_FILE).exists()  # the killed run's lock blocks nobody
    resumed = programs.run(
        [PROGRAM, *map(str, command), "--resume", journal, "--json"],
        env=home,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert json.loads(resumed.stdout)["state_digest"] == digest
    assert list(journal.iterdir()) == []


def test_a_journal_in_this_process_is_one_engines(model, tmp_path):
    held = Journal(tmp_path / "j", option="--journal", resumes=False, note=lambda text: None)
    with pytest.raises(StateError, match="another run .pid .* writes its journal there"):
        xlstm_ray.load(model, **PLAIN, journal=tmp_path / "j")
    held.close()
    with xlstm_ray.load(model, **PLAIN, journal=tmp_path / "j") as lm:
        assert lm.prefill("abc").complete
    assert not (tmp_path / "j" / LOCK_FILE).exists()
    (tmp_path / "k").write_text("a file")
    with pytest.raises((OutputError, StateError), match="k"):
        xlstm_ray.load(model, **PLAIN, journal=tmp_path / "k")


def test_a_run_that_is_killed_before_it_reads_a_signal_ends_with_a_line():
    ours, theirs = socket.socketpair()
    with ours:
        run = [sys.executable, "-c", "import time; time.sleep(60)"]
        with theirs, subprocess.Popen(run, pass_fds=[theirs.fileno()]) as child:
            theirs.close()
            ours.send(bytes([signal.SIGTERM]))
            child.terminate()
            with pytest.raises(GridLost, match=r"this run's process was killed \(SIGTERM\)") as lost:
                _watch(child, ours)
    assert lost.value.exit_code == 128 + signal.SIGTERM
