"""scripts/serve_goals.py on a tiny model: each goal gets its number, whatever the machine's speed."""

import os
import re
import subprocess
import sys
from pathlib import Path

import programs
from tiny import make_model

ROOT = Path(__file__).parents[2]
SETTINGS = {"DEVICE": "cpu", "CHUNK_SIZE": "16", "CHUNKWISE_BACKEND": "native"}
SIZES = "--tile-size 32 --document 256 --prompt 128 --answer 4 --questions 2 --rounds 1 --pairs 2 --slots 2"


def goals(model: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    env = {**os.environ, "XLSTM_MODEL": str(model), **{f"XLSTM_{name}": value for name, value in SETTINGS.items()}}
    command = [sys.executable, ROOT / "scripts" / "serve_goals.py", *SIZES.split(), "--cache-mb", "64", *words]
    return programs.run(command, env=env, capture_output=True, text=True, timeout=200)


def test_every_goal_has_a_number(tmp_path):
    make_model(tmp_path, hidden_size=32, num_hidden_layers=1, num_heads=2, eos_token_id=None)
    done = goals(tmp_path)
    table = done.stdout.partition("| goal |")[2]
    rows = re.findall(r"^\| (\d) \| (.*?) \| .* \| (yes|NO) \|$", table, re.MULTILINE)
    assert {int(number) for number, _, _ in rows} == {*range(1, 9)}, done.stdout + done.stderr
    slow = {what for _, what, met in rows if met == "NO"}
    of_times = r"TTFT|streams|beside|free again|first hits|HTTP|at once|never repeat"
    assert not [what for what in slow if not re.search(of_times, what)], table
    assert done.returncode == bool(slow)


def test_a_run_ends_in_time(tmp_path):
    make_model(tmp_path, hidden_size=32, num_hidden_layers=1, num_heads=2, eos_token_id=None)
    done = goals(tmp_path, "--most-s", "1")
    assert done.returncode == 1
    assert "-- 1 s have passed" in done.stdout
    assert done.stdout.splitlines()[-1].endswith("not measured: 1, 2, 3, 4, 5, 6, 7, 8")
