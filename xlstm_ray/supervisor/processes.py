"""Identify processes by machine, pid and start time; find, signal and await them."""

import os
import platform
import re
import signal
import subprocess
import time
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import psutil
from pydantic import BaseModel, ConfigDict

POLL_S = 0.1
GRACE_S = 5.0  # between SIGTERM and SIGKILL for each group of processes; Ray's dashboard needs 3


class Process(BaseModel):
    """A process by pid and start time: pids alone are reused."""

    model_config = ConfigDict(frozen=True)

    pid: int
    started: float  # seconds since boot, which a corrected wall clock does not change


class Machine(BaseModel):
    """The scope of pids: a boot of a machine, and a container's table of processes."""

    model_config = ConfigDict(frozen=True)

    id: str  # survives renaming and booting; containers may share it
    boot: str
    processes: str  # the pid namespace; empty where there is none


@cache
def this_machine() -> Machine:
    """This machine, its boot, and this container's table of processes."""
    if platform.system() == "Darwin":
        uuid = re.search(
            r'"IOPlatformUUID" = "([^"]+)"', _said_by("/usr/sbin/ioreg", "-rd1", "-c", "IOPlatformExpertDevice")
        )
        boot = _said_by("/usr/sbin/sysctl", "-n", "kern.bootsessionuuid").strip()
        return Machine(id=uuid[1] if uuid else "", boot=boot, processes="")
    machine = Path("/etc/machine-id")  # a container may have none
    return Machine(
        id=machine.read_text().strip() if machine.exists() else "",
        boot=Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        processes=os.readlink("/proc/self/ns/pid"),
    )


def _said_by(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def identify(process: psutil.Process) -> Process:
    return Process(pid=process.pid, started=_since_boot(process))


@cache
def this_process() -> Process:
    """This process. Not for one that is about to fork."""
    return identify(psutil.Process())


def identify_all(processes: Iterable[psutil.Process]) -> tuple[Process, ...]:
    found = []
    for process in processes:
        try:
            found.append(identify(process))
        except psutil.NoSuchProcess:
            continue
    return tuple(found)


def _since_boot(process: psutil.Process) -> float:
    return round(process.create_time() - psutil.boot_time(), 2)


def find(wanted: Process) -> psutil.Process | None:
    """The process, or None if it is gone, is a zombie, or its pid was reused."""
    try:
        process = psutil.Process(wanted.pid)
        same = abs(_since_boot(process) - wanted.started) < 0.05  # the clock ticks in 0.01 s
        return process if same and process.status() != psutil.STATUS_ZOMBIE else None
    except psutil.NoSuchProcess:
        return None


def members_of(session: int) -> list[psutil.Process]:
    """The session's processes and their descendants (jobs have their own sessions), without zombies."""
    found: dict[int, psutil.Process] = {}
    children: dict[int, list[psutil.Process]] = {}
    for process in psutil.process_iter():
        try:
            children.setdefault(process.ppid(), []).append(process)
        except psutil.NoSuchProcess:
            continue
        if session_id(process.pid) == session:
            found[process.pid] = process
    queue = list(found)
    while queue:
        for child in children.get(queue.pop(), ()):
            if child.pid not in found:
                found[child.pid] = child
                queue.append(child.pid)
    return [p for p in found.values() if is_running(p)]


def session_id(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except (ProcessLookupError, PermissionError):
        return None


def is_running(process: psutil.Process) -> bool:
    """Alive, the same process as when it was found, and not a zombie."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def name_of(process: psutil.Process) -> str:
    try:
        return process.name()
    except psutil.NoSuchProcess:
        return ""


def title_of(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return ""


def rss_of(process: psutil.Process) -> int:
    try:
        return process.memory_info().rss
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return 0


def send_signal(processes: Iterable[psutil.Process], number: signal.Signals) -> None:
    """Signal a process. psutil compares the start time first, so a reused pid is safe."""
    for process in processes:
        try:
            process.send_signal(number)
        except psutil.NoSuchProcess:
            continue


def wait_for_end(processes: list[psutil.Process], timeout_s: float) -> None:
    """Wait until all are gone or zombies (psutil.wait_procs would wait for zombies that no parent reaps)."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline and any(is_running(p) for p in processes):
        time.sleep(POLL_S / 2)
