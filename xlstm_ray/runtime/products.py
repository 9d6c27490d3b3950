"""The cost of bfloat16 matrix products relative to float32 on this CPU: timed once for a machine and torch version.

The CPU's flags do not tell it: without bfloat16 instructions the products take 8 to 26 times as long as in float32,
with them from a third to twice as long.
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

SHAPES = (512, 256, 1024), (128, 1024, 1024)  # rows, in, out: a tile of a small model, and of a larger one
SECONDS, ROUNDS = 0.05, (3, 20)  # time in all, and the least and most rounds
_FILE = TypeAdapter(dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]])


def bfloat16_cost() -> float:
    """Time of bfloat16 products divided by the time of the same products in float32: below 1 if bfloat16 is faster.

    Kept in the cache directory, so that every run on this machine uses the same figure. If its file is damaged or
    cannot be written, the products are timed again.
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
    """The ratio of the best rounds, on one core.

    Measured in the thread's CPU time, which stands still while others have the core: load hardly changes the result.
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
    """The CPU's name, its flags, and the number of cores that this process may use."""
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
    """The kept figures; empty if the file is damaged."""
    try:
        return _FILE.validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return {}
