"""Memory: samples against what the system says, limits, the watchdog on real allocations, the computed need."""

import subprocess
import sys

import psutil
import pytest

from xlstm_ray.errors import UsageError
from xlstm_ray.memory import MIB, Limits, Sample, take_sample
from xlstm_ray.settings import Settings


def sample(process: int = 0, driver: int = 0) -> Sample:
    return Sample(0.0, process, 0, driver, 1 << 40, 1 << 40)


# -- samples and limits ------------------------------------------------------------------------------------------------
def test_a_sample_follows_what_a_process_allocates_and_frees():
    code = "import sys; wait = sys.stdin.readline; wait(); x = bytearray(b'1') * (200 << 20); print(flush=True); wait()"
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with child:
        before = take_sample(pid=child.pid)
        child.stdin.write("\n")
        child.stdin.flush()
        child.stdout.readline()
        after = take_sample(pid=child.pid)
        child.stdin.write("\n")
    assert 200 * MIB <= after.process_bytes - before.process_bytes < 240 * MIB
    assert after.seconds > before.seconds
    assert 0 < after.available_bytes < after.total_bytes <= psutil.virtual_memory().total
    with pytest.raises(psutil.NoSuchProcess):
        take_sample(pid=child.pid)


def test_limits_are_mib_where_given_and_fractions_else():
    limits = Limits.make(Settings.make(), 1000 * MIB)
    assert limits == Limits(850 * MIB, 920 * MIB)
    assert Limits.make(Settings.make(mem_soft_mb=100, mem_hard_pct=0.5), 1000 * MIB) == Limits(100 * MIB, 500 * MIB)
    assert [limits.exceeded(sample(mb * MIB)) for mb in (850, 851, 920, 921)] == [None, "soft", "soft", "hard"]
    assert limits.exceeded(sample(0, 2000 * MIB)) is None  # memory that the device shares is in the process's figure
    own = Limits.make(Settings.make(), 1000 * MIB, 100 * MIB)
    assert [own.exceeded(sample(0, mb * MIB)) for mb in (85, 86, 92, 93)] == [None, "soft", "soft", "hard"]


def test_a_soft_limit_over_the_hard_one_is_refused_with_both():
    with pytest.raises(UsageError, match=r"soft.*--mem-soft-mb 990: 990 MiB.*--mem-hard-pct 0.92: 920 MiB"):
        Limits.make(Settings.make(mem_soft_mb=990), 1000 * MIB)
