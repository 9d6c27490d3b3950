"""The guard of a head: the leader of its session. It runs Ray and ends the session."""

import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import psutil

from xlstm_ray.supervisor.ports import listens, port_answers, split
from xlstm_ray.supervisor.processes import (
    GRACE_S,
    POLL_S,
    find,
    identify,
    identify_all,
    is_running,
    members_of,
    name_of,
    send_signal,
    title_of,
    wait_for_end,
)
from xlstm_ray.supervisor.records import Head, read_record, write_record

GUARD = """
import sys
sys.path.insert(0, sys.argv[2])
from xlstm_ray.supervisor.guard import run_guard
run_guard(sys.argv[3])
"""
VITAL = {"gcs_server": "GCS", "raylet": "raylet"}  # without these there is no head
DASHBOARD = "dashboard"
HELPERS = {  # by a part of their command lines; runs go on without them
    "/dashboard/dashboard.py": DASHBOARD,
    "/log_monitor.py": "log monitor",
    "/_private/monitor.py": "autoscaler's monitor",
    "ray.util.client.server": "client server",
}


def end_processes(find: Callable[[], Iterable[psutil.Process]]) -> list[psutil.Process]:
    """End processes in an order that suits Ray; returns those that survive SIGKILL."""
    known: set[psutil.Process] = set()  # children with their own session cannot be found once their parents are gone

    def left(chosen: Callable[[str], bool] = lambda name: True) -> list[psutil.Process]:
        known.update(find())
        return [p for p in known if is_running(p) and chosen(name_of(p))]

    # The raylet first, so that it does not restart workers; the GCS last, because all others need it.
    for chosen in (lambda name: name == "raylet", lambda name: name != "gcs_server", lambda name: True):
        group = left(chosen)
        send_signal(group, signal.SIGTERM)
        wait_for_end(group, GRACE_S)
    for _ in range(3):  # a worker may start while others end
        group = left()
        if not group:
            break
        send_signal(group, signal.SIGKILL)
        wait_for_end(group, GRACE_S)
    return left()


def remove_head(record: Path, head: Head) -> None:
    try:
        shutil.rmtree(head.folder)
    except FileNotFoundError:  # another process stops it too
        pass
    record.unlink(missing_ok=True)


def run_guard(path: str) -> None:
    """The session's leader: runs Ray, completes the record, and ends the session on request or after its driver."""
    stopping = False

    def stop(signum: int, frame: object) -> None:
        nonlocal stopping
        stopping = True

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    record = Path(path)
    head = read_record(record)
    if head is None:  # stopped before it began
        return
    me = psutil.Process()
    head = head.model_copy(update={"guard": identify(me)})
    write_record(record, head)
    ray = subprocess.Popen(head.command, stdin=subprocess.DEVNULL, process_group=0)
    vital: dict[str, psutil.Process] = {}
    helpers: dict[str, psutil.Process] = {}
    next_look = 0.0
    try:
        while not stopping:
            error = None
            if ray.poll():
                error = f"`ray start` ended with code {ray.returncode}"
            if gone := [name for name, process in vital.items() if not is_running(process)]:
                error = f"Ray's {' and '.join(gone)} was ended from outside, or ended by itself"
            lost = tuple(name for name, process in helpers.items() if not is_running(process))
            if head.address is None and not error and (address := _announced(head.folder)):
                members = members_of(me.pid)
                if not vital:
                    vital = {VITAL[name]: p for p in members if (name := name_of(p)) in VITAL}
                    helpers = {label: p for p in members for part, label in HELPERS.items() if part in title_of(p)}
                if all(listens(members, port) for port in _promised(head, address)):
                    head = head.model_copy(update={"address": address, "members": identify_all(members)})
                    write_record(record, head)
                elif lost:
                    error = f"its {lost[0]} ended at once"
            if head.address is None and not error and time.monotonic() > next_look:
                next_look = time.monotonic() + 1
                error = _taken(head, me.pid)  # Ray would wait half a minute for the program without a port
            if error or lost != head.lost:
                head = head.model_copy(update={"error": error, "lost": lost})
                with suppress(OSError):  # a head goes on with a full disk
                    write_record(record, head)
            if error or (head.mode == "run" or head.address is None) and find(head.driver) is None:
                break
            time.sleep(POLL_S)
    finally:  # a bug or a full disk must not leave a head without a guard
        if ray.poll() is None:
            ray.kill()
            ray.wait()
        end_processes(lambda: [p for p in members_of(me.pid) if p.pid != me.pid])
    if not head.error:
        remove_head(record, head)


def _promised(head: Head, address: str) -> list[int]:
    """The ports that are shown to people."""
    ports = [split(address)[1], *([head.client_port, head.metrics_port] if head.mode == "up" else [])]
    return ports + ([head.dashboard_port] if head.dashboard_port else [])


def _taken(head: Head, session: int) -> str | None:
    """A sentence about a port of ours that another program took, if there is one."""
    for port in (head.client_port, head.metrics_port, head.dashboard_port):
        if port is not None and port_answers(port) and not listens(members_of(session), port):
            return f"another program took port {port} before Ray did"
    return None


def _announced(folder: Path) -> str | None:
    """The address that `ray start` writes at its end, when everything answers."""
    try:
        text = (folder / "ray_current_cluster").read_text()
    except FileNotFoundError:
        return None
    return text if re.fullmatch(r"127\.0\.0\.1:\d+", text) else None
