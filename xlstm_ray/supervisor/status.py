"""What runs on this machine: our heads with their actors and memory, and other Ray sessions."""

import http.client
import json
import re
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from pydantic import TypeAdapter

from xlstm_ray.supervisor.guard import DASHBOARD
from xlstm_ray.supervisor.ports import PROBE_S, listens
from xlstm_ray.supervisor.processes import rss_of, title_of
from xlstm_ray.supervisor.records import Head, State, all_heads, session_of, state_of


@dataclass(frozen=True)
class Actor:
    """A worker of one of our heads. Without a dashboard, only its pid and its present work (as its name) are known."""

    name: str
    class_name: str
    state: str
    pid: int
    namespace: str
    rss_bytes: int


@dataclass(frozen=True)
class HeadStatus:
    """One of our heads.

    state: starting; alive; orphaned (it runs, but its driver is gone); dead (only the record is left);
    elsewhere (on another machine or in another container that shares the state directory)."""

    head: Head
    state: State
    processes: int
    rss_bytes: int  # summed over processes: shared pages count several times
    actors: tuple[Actor, ...]


@dataclass(frozen=True)
class Stranger:
    """A Ray session on this machine without a record of ours. It is never touched."""

    session: str
    address: str
    user: str
    pids: tuple[int, ...]


@dataclass(frozen=True)
class StatusReport:
    """All Ray sessions of this machine: ours and others."""

    heads: tuple[HeadStatus, ...]
    strangers: tuple[Stranger, ...]

    def lines(self) -> list[str]:
        """The report for a terminal."""
        out = []
        for item in self.heads:
            head = item.head
            kind = f"of the run with pid {head.driver.pid}" if head.mode == "run" else "stays until `xlstm-ray down`"
            out.append(f"head {head.id}: {item.state}, {kind}")
            if item.state == "elsewhere":
                out.append(f"  on another machine or in another container: {head.host}; ask there")
                continue
            if item.state == "dead":
                out.append(f"  {head.error or 'nothing of it runs'}; logs in {head.folder}; `xlstm-ray down` clears it")
                continue
            out.append(f"  address {head.address or 'not yet known'}, metrics {head.metrics_url}")
            if head.dashboard_url and DASHBOARD not in head.lost:
                out.append(f"  dashboard {head.dashboard_url}; log in with the token in {head.token_path}")
            if head.lost:
                out.append(f"  without its {', '.join(head.lost)}: ended, and no run needs it; logs in {head.folder}")
            out.append(f"  {item.processes} processes, {item.rss_bytes / 2**20:.0f} MiB")
            for a in item.actors:
                what = f"{a.name} ({a.class_name})" if a.class_name else a.name
                out.append(f"  actor {what} {a.state}, pid {a.pid}, {a.rss_bytes / 2**20:.0f} MiB")
            if item.state == "orphaned":
                out.append("  its driver is gone: `xlstm-ray down` stops it")
        out.extend(
            f"not ours: {s.session} of {s.user}, address {s.address}, pids {', '.join(map(str, s.pids))}"
            for s in self.strangers
        )
        return out or ["no Ray head runs on this machine"]

    def to_json(self) -> dict[str, Any]:
        """The report for programs; like `lines` it has the token's path and not the token."""
        return TypeAdapter(StatusReport).dump_python(self, mode="json")


def status(state_dir: Path) -> StatusReport:
    """Every Ray session on this machine: our heads with their actors and memory, and other sessions."""
    heads = []
    ours: set[int] = set()
    for head in all_heads(state_dir):
        processes = session_of(head)
        ours.update(p.pid for p in processes)
        state = state_of(head, processes)
        heads.append(
            HeadStatus(
                head=head,
                state=state,
                processes=len(processes),
                rss_bytes=sum(rss_of(p) for p in processes),
                actors=actors_of(head, processes) if state in ("alive", "orphaned") else (),
            )
        )
    return StatusReport(tuple(heads), _strangers(ours))


def actors_of(head: Head, processes: list[psutil.Process]) -> tuple[Actor, ...]:
    """From Ray's State API if there is a dashboard, else from the titles of Ray's workers."""
    rss = {p.pid: rss_of(p) for p in processes}
    # The token goes only to a port that a process of ours holds.
    if head.dashboard_port and listens(processes, head.dashboard_port):
        try:
            found = _state_api(head, "actors")
        except (
            OSError,
            ValueError,
            http.client.HTTPException,
        ):  # the dashboard hangs or ends: use the titles
            pass
        else:
            return tuple(
                Actor(
                    name=a["name"] or a["class_name"],
                    class_name=a["class_name"],
                    state=a["state"],
                    pid=a["pid"] or 0,  # pending actors have no pid
                    namespace=a["ray_namespace"],
                    rss_bytes=rss.get(a["pid"], 0),
                )
                for a in found
            )
    out = []
    for process in processes:
        title = re.match(r"ray::((\w+).*?) *$", title_of(process))
        if title and title[2] not in ("IDLE", "DashboardAgent", "RuntimeEnvAgent"):
            out.append(Actor(title[1], "", "RUNNING", process.pid, "", rss[process.pid]))
    return tuple(out)


def _state_api(head: Head, what: str) -> list[dict[str, Any]]:
    """Ask Ray's State API over HTTP, which works without importing Ray."""
    query = urllib.parse.urlencode(
        {"limit": 1000, "filter_keys": "state", "filter_predicates": "!=", "filter_values": "DEAD"}
    )
    request = urllib.request.Request(f"{head.dashboard_url}/api/v0/{what}?{query}")
    request.add_header("Authorization", f"Bearer {head.token_path.read_text()}")
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy must not see the token
    with opener.open(request, timeout=PROBE_S) as answer:
        return json.load(answer)["data"]["result"]["result"]


def _strangers(ours: set[int]) -> tuple[Stranger, ...]:
    """Ray sessions found by program names: good enough for a list, but nothing is ever stopped by it."""
    found: dict[str, dict[str, Any]] = {}
    for process in psutil.process_iter():
        try:
            if process.pid in ours or process.name() not in ("gcs_server", "raylet"):
                continue
            user = process.username()
            arguments = process.cmdline()
        except psutil.NoSuchProcess:
            continue
        except psutil.AccessDenied:  # another user's process on macOS
            user, arguments = "another user", []
        flags = dict(a[2:].split("=", 1) for a in arguments if a.startswith("--") and "=" in a)
        session = flags.get("session-name", f"Ray process {process.pid}")
        entry = found.setdefault(session, {"address": "unknown", "user": user, "pids": []})
        entry["pids"].append(process.pid)
        if "gcs-address" in flags:
            entry["address"] = flags["gcs-address"]
    return tuple(Stranger(name, e["address"], e["user"], tuple(e["pids"])) for name, e in sorted(found.items()))
