"""The memory and CPUs that the machine, or a container, gives this process."""

import os
import sys
from collections.abc import Sequence
from functools import cache
from math import ceil, floor
from pathlib import Path

import psutil

ROOT = Path("/sys/fs/cgroup")


def control_groups(controller: str) -> list[tuple[Path, bool]]:
    """The control groups of this process, innermost first: folder, and whether it is version 1.

    A group may lack the controller's files. Empty if the system has no control groups.
    """
    if sys.platform != "linux":
        return []
    found = []
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        first = controller in controllers.split(",")
        if not first and controllers:
            continue
        base = ROOT / controller if first else ROOT
        # In a container the path may be the host's and not exist here: then the root group counts.
        folder = base / path.lstrip("/")
        groups = [folder, *folder.parents] if folder.is_dir() else [base]
        found += [(group, first) for group in groups if group.is_relative_to(base)]
    return found


def cores() -> int:
    """The CPUs that this process may use, by its affinity and its container: rounded up, at least 1."""
    count = float(len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1)
    for group, first in control_groups("cpu"):
        names = ("cpu.cfs_quota_us", "cpu.cfs_period_us") if first else ("cpu.max",)
        files = [group / name for name in names]
        if all(file.is_file() for file in files):
            quota, period = " ".join(file.read_text() for file in files).split()
            if quota not in ("max", "-1"):
                count = min(count, int(quota) / int(period))
    return max(1, ceil(count))


def machine_bytes() -> tuple[int, int]:
    """Available and total memory in bytes: the machine's, or the container's if that is smaller."""
    machine = psutil.virtual_memory()
    available, total = machine.available, machine.total
    for limit, usage, statistics, cached in _containers(total):
        rows = dict(row.split() for row in statistics.read_text().splitlines())
        used = int(usage.read_text()) - int(rows.get(cached, 0))  # the file cache is dropped when memory is needed
        available, total = min(available, max(0, limit - used)), min(total, limit)
    return available, total


@cache
def _containers(machine_bytes: int) -> tuple[tuple[int, Path, Path, str], ...]:
    """Control groups whose limit is below the machine's memory: limit in bytes, the files with usage and statistics,
    and the name of the cache statistic."""
    found = []
    for group, first in control_groups("memory"):
        names, cached = (("max", "current"), "inactive_file")
        if first:
            names, cached = ("limit_in_bytes", "usage_in_bytes"), "total_inactive_file"
        limit, usage = (group / f"memory.{name}" for name in names)
        text = limit.read_text().strip() if limit.is_file() else "max"  # a group may lack the controller
        if text != "max" and int(text) < machine_bytes:
            found.append((int(text), usage, group / "memory.stat", cached))
    return tuple(found)


def share_of_cpus(nodes: Sequence[float], actors: int) -> float | None:
    """The largest share of a CPU, at most 1, with which all actors fit on these nodes (CPUs of each), or None.

    Ray counts CPUs in steps of 0.0001.
    """
    ways = {floor(n / k * 10_000) / 10_000 for n in nodes for k in range(1, actors + 1)}
    fit = [s for s in ways if 0 < s <= 1 and sum(int(n / s + 1e-6) for n in nodes) >= actors]
    return max(fit, default=None)
