"""scripts/check_on_mac, as it would run on a Mac."""

import os
import re
import subprocess
import sys
from pathlib import Path

from xlstm_ray.runtime.canaries import CANARIES

from .plugin import require_simulator

ROOT = Path(__file__).parents[2]


def test_check_on_mac_prints_its_report() -> None:
    require_simulator()
    command = [sys.executable, "-m", "metal", "scripts/check_on_mac.py", "--lengths", "192", "--tile-size", "64"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests"), "XLSTM_T_INNER": "2"}
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=900)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    block = ran.stdout.strip()
    assert block.startswith("```\nxlstm-ray on a Mac\n")
    assert block.endswith("all well\n```")
    assert "WRONG" not in block
    right, tried = map(int, re.search(r"(\d+) of (\d+) right", block).groups())
    assert right == tried == len(CANARIES)
    assert len(re.findall(r"log probabilities within \S+  ok", block)) == 6
    for bits in (8, 4):
        assert re.search(rf"bfloat16 +{bits} bits +log probabilities within \S+  ok", block)
    assert len(re.findall(r"\d+ tokens: .* tokens/s, first token in .* peak .* MiB", block)) == 1
    assert re.search(r"block_1x64 .* of 31 ", block)
