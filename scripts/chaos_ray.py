#!/usr/bin/env python
"""A run on Ray when something under it dies, hangs or is ended: its exit code, state, and digest after resuming.

    python scripts/chaos_ray.py                          # every fault once, a table in Markdown
    python scripts/chaos_ray.py --repeats 10             # ten times each, at random moments
    python scripts/chaos_ray.py --faults raylet-killed,gcs-frozen --seed 7
    python scripts/chaos_ray.py --repeats 10 --at-once 8 # eight runs side by side, each on an eighth of the CPUs
    python scripts/chaos_ray.py --soak 50 --load 8       # fifty runs without a fault, with eight busy loops

Each run is a process with its own Ray head, a small random model and `--state-out`. After some tiles, one fault is
made with real signals to this head's processes. A run is good if it exits with 0 and the digest of an undisturbed run;
or with the exit code that RUNBOOK names and a state from which a run in one process reaches that digest. In both cases
there must be no traceback and nothing left over: no record, no folder of Ray, no process that was started in the run's
folder. After a fault, `xlstm-ray down` cleans up before this check; after a run of the soak, nothing does.
"""

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
from arguments import positive, whole

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

TILE = 32
SIZES = ["--device", "cpu", "--threads", "1", "--tile-size", str(TILE), "--chunk-size", "16"]
RUNNER = ["--chunkwise-backend", "ray_compiled_chunks"]
PROGRAM = [sys.executable, "-c", "from xlstm_ray.cli.app import main; main()"]
KILL, TERM, STOP = signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP


@dataclass(frozen=True)
class Fault:
    """A signal to those of the head's processes whose title or command line has one of these parts."""

    parts: tuple[str, ...]
    number: int
    codes: tuple[int, ...]  # the right exit codes
    flags: tuple[str, ...] = ()
    once: bool = False  # only the first such process


RAYLET, GCS = "/raylet/raylet", "/gcs/gcs_server"
ALL = ("ray/", "ray::", "ray.util", "ray-dashboard")
DASHBOARD = ("--ray-dashboard",)
FAULTS = {
    "raylet killed": Fault((RAYLET,), KILL, (0, 4)),  # a run that is through before it is missed has its result
    "raylet terminated": Fault((RAYLET,), TERM, (0, 4)),
    "raylet frozen": Fault((RAYLET,), STOP, (0, 4)),  # small tiles do not need it
    "GCS killed": Fault((GCS,), KILL, (0, 4)),  # the last tiles may come without it
    "GCS terminated": Fault((GCS,), TERM, (0, 4)),
    "GCS frozen": Fault((GCS,), STOP, (0, 4)),  # tiles do not need it
    "raylet and GCS killed": Fault((RAYLET, GCS), KILL, (0, 4)),
    "all terminated as by ray stop": Fault(ALL, TERM, (4,)),
    "all killed as by ray stop --force": Fault(ALL, KILL, (4,)),
    "node's agent killed": Fault(("ray::DashboardAgent",), KILL, (0, 4)),  # the raylet goes with it
    "runtime environment's agent killed": Fault(("ray::RuntimeEnvAgent",), KILL, (0, 4)),
    "an actor killed": Fault(("ray::ShardActor",), KILL, (0,), once=True),
    "an actor frozen": Fault(("ray::ShardActor",), STOP, (0,), once=True),
    "all actors killed": Fault(("ray::ShardActor",), KILL, (0,)),
    "watchdog killed": Fault(("ray::NodeWatchdog",), KILL, (0,)),
    "log monitor killed": Fault(("/log_monitor.py",), KILL, (0,), DASHBOARD),  # only runs with a dashboard have it
    "client server killed": Fault(("ray.util.client.server",), KILL, (0,)),
    "autoscaler's monitor killed": Fault(("/_private/monitor.py",), KILL, (0,), DASHBOARD),
    "dashboard killed": Fault(("/dashboard/dashboard.py", "ray-dashboard"), KILL, (0,), DASHBOARD),
    "guard killed": Fault(("xlstm-ray-guard",), KILL, (0,)),
}
SOAK = {"none": Fault((), TERM, (0,))}


def command(home: Path, *words: object) -> "subprocess.Popen[str]":
    environment = {**os.environ, "HOME": str(home), "XDG_STATE_HOME": "", "PYTHONPATH": str(ROOT)}
    environment.pop("XLSTM_RAY_LOCAL_MODE", None)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*PROGRAM, *map(str, words)], env=environment, cwd=home, **pipes)


@contextmanager
def within(seconds: float, process: "subprocess.Popen[str]") -> Iterator[None]:
    """Wait for a process; one that hangs is killed, as its exit code shows."""
    timer = threading.Timer(seconds, process.kill)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def strike(head, fault: Fault, rng: random.Random) -> int:
    """Returns how many processes were hit."""
    from xlstm_ray.supervisor.processes import send_signal, title_of
    from xlstm_ray.supervisor.records import session_of

    found = [p for p in session_of(head) if any(part in title_of(p) for part in fault.parts)]
    found = [p for p in found if fault.parts == ("xlstm-ray-guard",) or p.pid != head.pid]
    if fault.once and found:
        found = [rng.choice(found)]
    send_signal(found, signal.Signals(fault.number))
    return len(found)


def processes_in(folder: Path) -> list[str]:
    """Processes that run in a folder: a process keeps its folder, even if its title, parent and session change."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.cwd() == str(folder) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(f"{process.pid} {' '.join(process.cmdline())[:60]}")
    return found


def one(name: str, fault: Fault, args: argparse.Namespace, number: int, work: Path, expected: str) -> dict:
    """A run with this fault, and its resume; returns the outcome."""
    from xlstm_ray.supervisor.records import all_heads

    rng = random.Random(f"{args.seed} {name} {number}")
    home = Path(tempfile.mkdtemp(dir=work))
    records = home / ".local" / "state" / "xlstm-ray"
    state, prompt, at = home / "run.state", work / "prompt", rng.randrange(10, args.tiles // 2)
    base = ["prefill", "--model", work / "model", *SIZES, *RUNNER, "--prompt-file", prompt]
    words = [*base, "--stages", 2, "--no-ray-local-mode", "--journal-every", 4, "--state-out", state, "--json"]
    process = command(home, *words, "--progress", "ndjson", *fault.flags)
    assert process.stdout is not None
    assert process.stderr is not None
    said, hit, struck, folder, ran = [], 0, 0.0, home / "none", 0
    with within(args.limit_s, process):
        for line in process.stderr:
            if not line.startswith("{"):
                said.append(line.rstrip())
            elif not struck and json.loads(line).get("tiles_done", 0) >= at:
                (head,) = all_heads(records)
                folder, ran = head.folder, len(processes_in(home))
                hit = strike(head, fault, rng)
                if hit or not fault.parts:  # else try again after the next tile: a title may just have changed
                    struck = time.monotonic()
        out = process.stdout.read()
        code = process.wait()
    took = time.monotonic() - struck if struck else 0.0
    digest = json.loads(out)["state_digest"] if code == 0 else None
    if code != 0 and state.exists():
        resume = command(home, *base, "--state-in", state, "--json")
        with within(args.limit_s, resume):
            out, err = resume.communicate()
        digest = json.loads(out)["state_digest"] if resume.returncode == 0 else err.strip()[-200:]
    if fault.parts:
        stopped = command(home, "down")
        with within(args.limit_s, stopped):
            said += stopped.communicate()[1].splitlines()
    left = [*map(str, (records / "heads").iterdir()), *processes_in(home), *([str(folder)] if folder.exists() else [])]
    row = {
        "fault": name, "hit": hit, "code": code, "state": state.exists(), "right": digest == expected, "seconds": took,
        "tile": at, "processes": ran, "tracebacks": sum("Traceback" in line for line in said), "left": left,
        "said": said,
    }  # fmt: skip
    done = code in fault.codes and row["right"] and row["state"] and (hit > 0) == bool(fault.parts) and ran > 0
    return row | {"good": bool(done and not row["tracebacks"] and not left)}


def table(rows: list[dict]) -> str:
    lines = ["| fault | runs | exit codes | state | right digest | end after (median, most) | good |"]
    lines.append("| --- | --- | --- | --- | --- | --- | --- |")
    for name in dict.fromkeys(row["fault"] for row in rows):
        mine = [row for row in rows if row["fault"] == name]
        codes = [str(row["code"]) for row in mine]
        seconds, n = [row["seconds"] for row in mine], len(mine)
        lines.append(
            f"| {name} | {n} | {', '.join(f'{c} x{codes.count(c)}' for c in sorted(set(codes)))} | "
            f"{sum(r['state'] for r in mine)}/{n} | {sum(r['right'] for r in mine)}/{n} | "
            f"{statistics.median(seconds):.0f} s, {max(seconds):.0f} s | {sum(r['good'] for r in mine)}/{n} |"
        )
    return "\n".join([*lines, "", f"good: {sum(r['good'] for r in rows)} of {len(rows)}"])


def slots(n: int) -> Iterator[set[int]]:
    """The CPUs in n parts, so that each run is as on a small machine; all CPUs for each if there are fewer than n."""
    cpus = sorted(os.sched_getaffinity(0))
    each = len(cpus) // n
    yield from ({*cpus[i * each : (i + 1) * each]} or {*cpus} for i in range(n))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=positive, default=1)
    parser.add_argument("--faults", help="names with commas between; '-' may stand for a space")
    parser.add_argument("--soak", type=positive, metavar="RUNS", help="this many runs without a fault, instead")
    parser.add_argument("--at-once", type=positive, default=1, metavar="RUNS")
    parser.add_argument("--load", type=whole, default=0, metavar="LOOPS", help="busy loops during the runs")
    parser.add_argument("--tiles", type=positive, default=400)
    parser.add_argument("--seed", type=whole, default=0)
    parser.add_argument("--limit-s", type=float, default=300.0, help="for each run: then it is killed, and is bad")
    parser.add_argument("--time-s", type=float, default=float("inf"), help="begin no run after this time")
    parser.add_argument("--json", type=Path, help="write a JSON line a run to this file")
    args = parser.parse_args()
    chosen = [n.replace("-", " ") for n in args.faults.split(",")] if args.faults else []

    faults = {n: f for n, f in FAULTS.items() if not chosen or n.replace("-", " ").lower() in map(str.lower, chosen)}
    if not faults:
        parser.error(f"no such fault; there are: {', '.join(FAULTS)}")
    if args.soak:
        faults, args.repeats = SOAK, args.soak
    from tiny import make_model

    began, rows, shared = time.monotonic(), [], Path("/dev/shm")
    before = {*shared.iterdir()} if shared.exists() else set()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        make_model(work / "model", seed=5, hidden_size=64, num_hidden_layers=3)
        (work / "prompt").write_text("".join(chr(97 + i * i % 26) for i in range(args.tiles * TILE)))
        words = ["--model", work / "model", *SIZES, *RUNNER, "--prompt-file", work / "prompt", "--json"]
        out, err = command(work, "prefill", *words).communicate()  # which also warms the compile cache
        expected = json.loads(out)["state_digest"] if out else sys.exit(err)

        def run(name: str, fault: Fault, number: int) -> dict | None:
            return one(name, fault, args, number, work, expected) if time.monotonic() - began < args.time_s else None

        parts = slots(args.at_once) if sys.platform == "linux" else None
        pin = (lambda: os.sched_setaffinity(0, next(parts))) if parts else None  # of a thread, and of what it starts
        load = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(args.load)]
        with ThreadPoolExecutor(args.at_once, initializer=pin) as pool:
            futures = {pool.submit(run, n, f, i): n for i in range(args.repeats) for n, f in faults.items()}
            for future in as_completed(futures):
                if (bug := future.exception()) is not None:  # the table must not be lost
                    row = {"fault": futures[future], "code": type(bug).__name__, "said": [str(bug)], "good": False}
                    row |= {"state": False, "right": False, "seconds": 0.0, "left": []}
                elif (row := future.result()) is None:
                    continue
                rows.append(row)
                mark = "good" if row["good"] else "BAD "
                print(f"{mark} {row['fault']}: exit {row['code']} after {row['seconds']:.0f} s", file=sys.stderr)
                if not row["good"]:
                    print("     " + "\n     ".join([*row["said"][-12:], *row["left"]]), file=sys.stderr, flush=True)
                if args.json:
                    with open(args.json, "a") as file:
                        file.write(json.dumps(row) + "\n")
        for process in load:
            process.kill()
            process.wait()
    print(table(rows))
    new = sorted(map(str, {*shared.iterdir()} - before)) if shared.exists() else []
    if new:
        print(f"left in {shared}: {', '.join(new)}")
    return 0 if all(row["good"] for row in rows) and not new else 1


if __name__ == "__main__":
    sys.exit(main())
