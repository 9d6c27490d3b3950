"""scripts/bench_scaling.py on a tiny model in one process: a file of runs, and what another command adds to it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import programs

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench_scaling.py"
SIZES = "--hidden 32 --blocks 1 --heads 2 --vocab 512 --chunk-size 16 --stages 1 --answer 0 --dtype float32 --threads 1"


def bench(folder: Path, words: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, SCRIPT, *SIZES.split(), *words.split(), "--out", "runs.jsonl", "--model", "model"]
    env = {**os.environ, "TORCHDYNAMO_DISABLE": "1"}  # kernels as plain torch: all is about the file
    return programs.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=200)


def test_another_command_adds_the_runs_that_are_missing(tmp_path: Path) -> None:
    bench(tmp_path, "--tile-size 32 --tokens 64 --rounds 1").check_returncode()
    settings, first = (tmp_path / "runs.jsonl").read_text().splitlines()
    more = bench(tmp_path, "--tile-size 32 --tokens 64,96 --rounds 2")
    assert "64 tokens, 2 tiles of 32" in more.stdout, more.stderr
    assert "different states of a prompt: [1, 1]" in more.stdout
    lines = (tmp_path / "runs.jsonl").read_text().splitlines()
    assert lines[:2] == [settings, first]
    assert [(row["round"], row["work"]) for row in map(json.loads, lines[1:])] == [(0, 64), (0, 96), (1, 64), (1, 96)]
    refused = bench(tmp_path, "--tile-size 16 --tokens 64 --rounds 1")
    assert refused.returncode == 1
    assert "has runs of other settings" in refused.stderr
