"""What bfloat16's matrix products cost beside float32's on this CPU: timed once a machine and torch version.

The CPU's flags do not tell: without such instructions they take 8 to 26 times as long, with them a third to twice.
"""

import hashlib
import os
import platform
from contextlib import suppress
from pathlib import Path
from time import perf_counter, thread_time
from typing import Annotated

import torch
from pydantic import Field, TypeAdapter, ValidationError

from xlstm_ray.directories import cache_dir
from xlstm_ray.files import write_whole
from xlstm_ray.model import linear

SHAPES = (512, 256, 1024), (128, 1024, 1024)  # rows, in, out: of a small model's tile, and of a larger one's
SECONDS, ROUNDS = 0.05, (3, 20)  # for so long in all, in so many rounds
_FILE = TypeAdapter(dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]])


def bfloat16_cost() -> float:
    """Seconds of bfloat16 products over those of the same products in float32: below 1 where bfloat16 is faster.

    Remembered in the cache directory, so that every run on this machine finds the same; a file there that is not ours
    or cannot be written costs a fresh measurement.
    """
    path, key = cache_dir() / "products.json", f"{_machine()}, torch {torch.__version__}"
    remembered = _read(path)
    if key not in remembered:
        remembered[key] = _measured()
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, _FILE.dump_json(_read(path) | remembered, indent=1))
    return remembered[key]


def _measured() -> float:
    """The quickest of several rounds of each, on one core.

    In the thread's own time, which does not pass while others have the core: a busy machine finds about the same.
    """
    sides = {
        dtype: [(torch.ones(rows, n, dtype=dtype), torch.ones(out, n, dtype=dtype)) for rows, n, out in SHAPES]
        for dtype in (torch.float32, torch.bfloat16)
    }
    best = {dtype: [float("inf")] * len(SHAPES) for dtype in sides}
    began, (least, most), threads = perf_counter(), ROUNDS, torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            for round_ in range(most):
                if round_ >= least and perf_counter() - began > SECONDS:
                    break
                for n in range(len(SHAPES)):
                    for dtype, operands in sides.items():
                        started = thread_time()
                        linear(*operands[n], None)
                        best[dtype][n] = min(best[dtype][n], thread_time() - started)
    finally:
        torch.set_num_threads(threads)
    return sum(best[torch.bfloat16]) / sum(best[torch.float32])


def _machine() -> str:
    """The CPU's name, what it can do, and how many cores of it this process may use."""
    about = platform.processor() or platform.machine()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().partition("\n\n")[0].splitlines()
        of_cpu = dict(line.partition(":")[::2] for line in lines)
        facts = {name.strip(): value.strip() for name, value in of_cpu.items()}
        flags = facts.get("flags") or facts.get("Features") or ""
        about = f"{facts.get('model name', about)}, flags {hashlib.sha256(flags.encode()).hexdigest()[:8]}"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{about}, {cores} cores"


def _read(path: Path) -> dict[str, float]:
    """What is remembered; nothing of a file that is not whole."""
    try:
        return _FILE.validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return {}
