"""A container for a test: control groups (version 1), and a mount namespace that shows them at its root."""

import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

GROUPS = Path("/sys/fs/cgroup")
can_make = (
    os.access(GROUPS / "memory", os.W_OK)
    and (GROUPS / "memory" / "memory.limit_in_bytes").exists()
    and os.geteuid() == 0
)
needs_containers = pytest.mark.skipif(not can_make, reason="only root can make control groups of version 1, if any")


@contextmanager
def container(*, memory_mb: int | None = None, cpus: float | None = None) -> Iterator[list[str]]:
    """Words before a command that run it with this much memory, without swap, and with this many CPUs."""
    name = f"xlstm-ray-test-{os.getpid()}-{os.urandom(3).hex()}"
    groups = []
    try:
        for controller, wanted in (("memory", memory_mb), ("cpu", cpus)):
            if wanted is not None:
                groups.append(GROUPS / controller / name)
                groups[-1].mkdir()
        if memory_mb is not None:
            (GROUPS / "memory" / name / "memory.limit_in_bytes").write_text(str(memory_mb << 20))
        if cpus is not None:
            (GROUPS / "cpu" / name / "cpu.cfs_quota_us").write_text(str(int(cpus * 100_000)))
        steps = [f"echo $$ > {shlex.quote(str(group / 'cgroup.procs'))}" for group in groups]
        steps += [f"mount --bind {shlex.quote(str(group))} {shlex.quote(str(group.parent))}" for group in groups]
        yield ["unshare", "--mount", "sh", "-c", " && ".join([*steps, 'exec "$@"']), "sh"]
    finally:
        for group in groups:
            group.rmdir()  # fails where the test has left a process
