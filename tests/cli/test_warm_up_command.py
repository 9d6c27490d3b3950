"""xlstm-ray warm-up: what it compiles is found by other commands; its file serves machines of one kind alone."""

import json
import os
import re
import shutil
import subprocess
import zipfile
from pathlib import Path

import programs
import pytest
from programs import PROGRAM, run
from tiny import make_model

# The sizes of the grids' tests: what a usual run here compiles is found where they have compiled it.
OPTIONS = "--device", "cpu", "--dtype", "float32", "--tile-size", "16", "--chunk-size", "16", "--threads", "1"
COMPILER = """#!/bin/sh
case "$*" in
  *.cpp*) echo "called" >> "$PYTEST_COMPILED"; [ -z "$PYTEST_BROKEN" ] || exit 1 ;;
esac
exec {compiler} "$@"
"""


class Machine:
    """An empty compile cache, and a C++ compiler that counts the files that it is given. works: whether it does."""

    def __init__(self, place: Path, *, works: bool = False):
        self.log, self.cache, compiler = place / "log", place / "cache", place / "bin" / "g++"
        compiler.parent.mkdir(parents=True)
        compiler.write_text(COMPILER.format(compiler=shutil.which("g++")))
        compiler.chmod(0o755)
        path = f"{compiler.parent}:{os.environ['PATH']}"
        self.env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(self.cache), "PATH": path}
        self.env |= {"PYTEST_COMPILED": str(self.log), "PYTEST_BROKEN": "" if works else "yes"}
        self.env.pop("CXX", None)

    @property
    def compiled(self) -> int:
        return len(self.log.read_text().splitlines()) if self.log.exists() else 0

    def run(self, *words: object, ok: bool = True) -> subprocess.CompletedProcess:
        done = run([PROGRAM, *map(str, words)], capture_output=True, text=True, timeout=600, env=self.env)
        assert (done.returncode == 0) == ok, done.stderr
        return done


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    make_model(directory, hidden_size=64, ffn_proj_factor=2.0, ffn_round_up_to_multiple_of=8)
    return directory


@pytest.fixture(scope="module")
def made(model, tmp_path_factory) -> tuple[Path, dict]:
    """A file of --cache-out, and what the command said."""
    place = tmp_path_factory.mktemp("made")
    machine = Machine(place / "machine", works=True)
    file = place / "code.zip"
    done = machine.run("warm-up", "-m", model, *OPTIONS, "--slots", 1, "--cache-out", file, "--json")
    assert machine.compiled > 0
    assert not list(machine.cache.rglob("*.so"))  # this machine's own cache is as it was
    return file, json.loads(done.stdout)


def test_a_file_of_code_leaves_nothing_to_compile(made, model, tmp_path):
    file, said = made
    assert [(call["rows"], call["sizes"]) for call in said["calls"]] == [(1, [16, 16]), (1, [1])]
    assert said["compiled"] > 0
    other = Machine(tmp_path / "other")
    taken = json.loads(other.run("warm-up", "-m", model, *OPTIONS, "--slots", 1, "--cache-in", file, "--json").stdout)
    assert (taken["compiled"], taken["found"]) == (0, said["compiled"] + said["found"])
    prompt = "word " * 10  # some tiles and a tail
    answer = ["generate", "-m", model, *OPTIONS, "-p", prompt, "-n", 3, "--json"]
    found = json.loads(other.run(*answer).stdout)
    assert other.compiled == 0
    usual = json.loads(run([PROGRAM, *map(str, answer)], capture_output=True).stdout)
    assert found["text"] == usual["text"]
    assert found["state_digest"] == usual["state_digest"]


def _changed(file: Path, change: str, by: str, to: Path) -> Path:
    """A copy of the file with another header."""
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(to, "w") as new:
        for entry in old.infolist():
            content = old.read(entry)
            if entry.filename == "about.json":
                assert re.search(change, content.decode())
                content = re.sub(change, by, content.decode(), count=1).encode()
            new.writestr(entry.filename, content)
    return to


@pytest.mark.parametrize(
    ("change", "by", "reason"),
    [
        (r'"torch": "\d', '"torch": "1', "was made for another torch"),
        (r'"processor": "', '"processor": "VAX ', "was made for another processor"),
        (r'"threads": "', '"threads": "7', "was made for another threads"),
        (r'"format": "xlstm', '"format": "ylstm', "is not compiled code of this program"),
        (r'": "[0-9a-f]{64}"', '": "00"', "is not what it was"),
        (r'"files": {"', '"files": {"../', "is not compiled code of this program"),
    ],
)
def test_foreign_and_damaged_files_are_one_line(made, model, tmp_path, change, by, reason):
    file = _changed(made[0], change, by, tmp_path / "changed.zip")
    other = Machine(tmp_path / "other")
    said = other.run("warm-up", "-m", model, *OPTIONS, "--cache-in", file, ok=False).stderr.strip()
    assert said.startswith(f"error: {file}: ")
    assert reason in said
    assert "\n" not in said
    assert not list(tmp_path.rglob("*.so"))


def test_who_may_write_a_file_is_trusted_or_its_digest_is(made, model, tmp_path):
    file = tmp_path / "code.zip"
    shutil.copy(made[0], file)
    file.chmod(0o666)
    other = Machine(tmp_path / "other")
    words = "warm-up", "-m", model, *OPTIONS, "--cache-in", file
    said = other.run(*words, ok=False).stderr
    assert "others may have written it" in said
    assert "give --cache-digest" in said
    assert "has not the digest" in other.run(*words, "--cache-digest", "0" * 64, ok=False).stderr
    digest = made[1]["digest"]
    good = other.run(*words, "--slots", 1, "--cache-digest", digest, "--json")
    assert json.loads(good.stdout)["compiled"] == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--cache-in", "a", "--cache-out", "b"), "were both given"),
        (("--cache-digest", "00"), "is of the file of --cache-in"),
        (("--cache-in", "nothing-there"), "cannot be read"),
        (("--cache-out", "no/such/place"), "its directory does not exist"),
        (("--chunkwise-backend", "native"), "is not compiled"),
        (("--chunkwise-backend", "ray_compiled_chunks", "--no-ray-local-mode", "--cache-out", "b"), "actors compile"),
    ],
)
def test_mistakes(model, tmp_path, words, said):
    done = Machine(tmp_path / "m").run("warm-up", "-m", model, "--device", "cpu", *words, ok=False)
    assert said in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("switch", ["TORCHDYNAMO_DISABLE", "TORCH_COMPILE_DISABLE"])
def test_nothing_is_compiled_where_torch_is_told_so(model, tmp_path, switch):
    """By a variable of torch's own; runs go on, and tell it."""
    machine = Machine(tmp_path / "m")
    machine.env[switch] = "1"
    programs.keep_warm(machine.env)
    words = "-m", model, *OPTIONS
    assert switch in machine.run("warm-up", *words, ok=False).stderr
    assert switch in machine.run("parity", ok=False).stderr
    assert "queued_compiled_chunks is not compiled" in machine.run("prefill", *words, "--prompt", "a").stderr
    assert "queued_compiled_chunks is not compiled" in machine.run("config", *words).stdout
    native = machine.run("prefill", *words, "--prompt", "a", "--chunkwise-backend", "native")
    assert "not compiled" not in native.stderr
    assert machine.compiled == 0


def test_a_state_of_kernels_that_were_not_compiled_is_not_taken_for_one_of_compiled_ones(model, tmp_path):
    """Their bits differ: it goes on where torch is told the same, and nowhere else."""
    machine, state = Machine(tmp_path / "m"), tmp_path / "a.state"
    words = "prefill", "-m", model, *OPTIONS
    machine.env["TORCHDYNAMO_DISABLE"] = "1"
    machine.run(*words, "--prompt", "a prompt", "--state-out", state)
    more = *words, "--state-in", state, "--append", " and more", "--json"
    assert not json.loads(machine.run(*more).stdout)["mixed_numerics"]
    del machine.env["TORCHDYNAMO_DISABLE"]
    refused = machine.run(*more, ok=False)
    assert "other numerics (eager True, not False)" in refused.stderr
    assert "set TORCHDYNAMO_DISABLE=1, as there" in refused.stderr
    assert machine.compiled == 0
