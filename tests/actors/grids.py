"""What the tests of the grid on real Ray share: sizes, a prompt, and programs in processes of their own."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import xlstm_ray

ROOT = Path(xlstm_ray.__file__).parents[1]
TILE, CHUNK = 32, 16
SIZES = ["--device", "cpu", "--threads", "1", "--tile-size", str(TILE), "--chunk-size", str(CHUNK)]
PROMPT = "".join(chr(97 + i * i % 26) for i in range(47 * TILE))  # a byte is a token; whole tiles: one shape to compile


def environment(home: Path) -> dict[str, str]:
    return {**os.environ, "HOME": str(home), "PYTHONPATH": str(ROOT), "XLSTM_RAY_LOCAL_MODE": "0"}


def script(home: Path, text: str, *arguments: object) -> list[Any]:
    """What a fresh Python says: the JSON lines that it prints."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(text), *map(str, arguments)],
        env=environment(home),
        stdout=subprocess.PIPE,
        text=True,
        timeout=240,
        check=True,
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


def command(home: Path, *words: object) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, "-c", "from xlstm_ray.cli.app import main; main()", *map(str, words)]
    return subprocess.run(program, env=environment(home), capture_output=True, text=True, timeout=240)
