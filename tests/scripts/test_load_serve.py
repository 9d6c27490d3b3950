"""scripts/load_serve.py on a tiny model."""

import os
import subprocess
import sys
from pathlib import Path

from tiny import make_model

ROOT = Path(__file__).parents[2]
SETTINGS = {"DEVICE": "cpu", "TILE_SIZE": "32", "CHUNK_SIZE": "16", "CHUNKWISE_BACKEND": "native"}


def test_a_small_load_is_answered_rightly_and_drained(tmp_path):
    make_model(tmp_path, hidden_size=32, num_hidden_layers=1, num_heads=2, eos_token_id=None)
    env = {**os.environ, "XLSTM_MODEL": str(tmp_path), **{f"XLSTM_{name}": value for name, value in SETTINGS.items()}}
    command = [
        sys.executable,
        ROOT / "scripts" / "load_serve.py",
        "--clients",
        "6",
        "--seconds",
        "2",
        "--questions",
        "3",
    ]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    seen = {line.rsplit(None, 1)[0] for line in done.stdout.splitlines()[:-2]}
    assert {"whole, right", "stream, right"} <= seen
    assert "exit code 0; 0 callers hang" in done.stdout
