#!/usr/bin/env python
"""What becomes of a run on Ray when something under it dies, hangs or is ended: exit code, state, digest on resuming.

    python scripts/chaos_ray.py                          # every fault once, a table in Markdown
    python scripts/chaos_ray.py --repeats 10             # ten times each, at random moments
    python scripts/chaos_ray.py --faults raylet-killed,gcs-frozen --seed 7

Each run is a process with a Ray head of its own, a small random model and `--state-out`. After some tiles one fault is
made, with real signals to this head's own processes. Good is: exit 0 with the digest of an undisturbed run; or the exit
code that RUNBOOK names, with a state from which a run in one process comes to that digest.
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
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

TILE = 32
SIZES = ["--device", "cpu", "--threads", "1", "--tile-size", str(TILE), "--chunk-size", "16"]
PROGRAM = [sys.executable, "-c", "from xlstm_ray.cli import main; main()"]
KILL, TERM, STOP = signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP


@dataclass(frozen=True)
class Fault:
    """A signal to those of the head's processes whose title or command line has one of these parts."""

    parts: tuple[str, ...]
    number: int
    codes: tuple[int, ...]  # that are right
    flags: tuple[str, ...] = ()
    once: bool = False  # the first such process only


RAYLET, GCS = "/raylet/raylet", "/gcs/gcs_server"
ALL = ("ray/", "ray::", "ray.util", "ray-dashboard")
FAULTS = {
    "raylet killed": Fault((RAYLET,), KILL, (4,)),
    "raylet terminated": Fault((RAYLET,), TERM, (4,)),
    "raylet frozen": Fault((RAYLET,), STOP, (0, 4)),  # small tiles do not need it
    "GCS killed": Fault((GCS,), KILL, (0, 4)),  # the last tiles may come without it
    "GCS terminated": Fault((GCS,), TERM, (0, 4)),
    "GCS frozen": Fault((GCS,), STOP, (0, 4)),  # tiles do not need it
    "raylet and GCS killed": Fault((RAYLET, GCS), KILL, (4,)),
    "all terminated as by ray stop": Fault(ALL, TERM, (4,)),
    "all killed as by ray stop --force": Fault(ALL, KILL, (4,)),
    "node's agent killed": Fault(("ray::DashboardAgent",), KILL, (0, 4)),  # the raylet goes with it
    "runtime environment's agent killed": Fault(("ray::RuntimeEnvAgent",), KILL, (0, 4)),
    "an actor killed": Fault(("ray::BandActor",), KILL, (0,), once=True),
    "an actor frozen": Fault(("ray::BandActor",), STOP, (0,), once=True),
    "all actors killed": Fault(("ray::BandActor",), KILL, (0,)),
    "watchdog killed": Fault(("ray::Watchdog",), KILL, (0,)),
    "log monitor killed": Fault(("/log_monitor.py",), KILL, (0,)),
    "client server killed": Fault(("ray.util.client.server",), KILL, (0,)),
    "autoscaler's monitor killed": Fault(("/_private/monitor.py",), KILL, (0,)),
    "dashboard killed": Fault(("/dashboard/dashboard.py", "ray-dashboard"), KILL, (0,), ("--ray-dashboard",)),
    "guard killed": Fault(("xlstm-ray-guard",), KILL, (0,)),
}


def command(home: Path, *words: object) -> "subprocess.Popen[str]":
    environment = {**os.environ, "HOME": str(home), "PYTHONPATH": str(ROOT)}
    environment.pop("XLSTM_RAY_LOCAL_MODE", None)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*PROGRAM, *map(str, words)], env=environment, **pipes)


def strike(state_dir: Path, fault: Fault, rng: random.Random) -> int:
    """Returns how many processes were hit."""
    from xlstm_ray import supervisor

    (head,) = supervisor._heads(state_dir)
    found = [p for p in supervisor._session(head) if any(part in supervisor._title(p) for part in fault.parts)]
    found = [p for p in found if fault.parts == ("xlstm-ray-guard",) or p.pid != head.pid]
    if fault.once and found:
        found = [rng.choice(found)]
    supervisor._signal(found, signal.Signals(fault.number))
    return len(found)


def one(name: str, fault: Fault, args: argparse.Namespace, model: Path, rng: random.Random, work: Path) -> dict:
    """A run with this fault, and its resume; what came of it."""
    from xlstm_ray import supervisor

    home = Path(tempfile.mkdtemp(dir=work))
    state, prompt, at = home / "run.state", work / "prompt", rng.randrange(10, args.tiles // 2)
    base = ["prefill", "--model", model, *SIZES, "--chunkwise-backend", "ray_compiled_chunks", "--prompt-file", prompt]
    words = [*base, "--stages", 2, "--no-ray-local-mode", "--journal-every", 4, "--state-out", state, "--json"]
    process = command(home, *words, "--progress", "ndjson", *fault.flags)
    assert process.stderr is not None
    said, hit, struck = [], 0, 0.0
    deadline = time.monotonic() + args.limit_s
    for line in process.stderr:
        if not line.startswith("{"):
            said.append(line.rstrip())
        elif not struck and json.loads(line).get("tiles_done", 0) >= at:
            hit = strike(home / ".local" / "state" / "xlstm-ray", fault, rng)
            struck = time.monotonic()
    out = process.stdout.read() if process.stdout else ""
    code = process.wait(max(1.0, deadline - time.monotonic()))
    took = time.monotonic() - struck if struck else 0.0
    digest = json.loads(out)["state_digest"] if code == 0 else None
    if code != 0 and state.exists():
        resume = command(home, *base, "--state-in", state, "--json")
        out, err = resume.communicate(timeout=args.limit_s)
        digest = json.loads(out)["state_digest"] if resume.returncode == 0 else err.strip()[-200:]
    stopped = command(home, "down")
    stopped.communicate(timeout=120)
    left = supervisor.status(home / ".local" / "state" / "xlstm-ray").heads
    return {
        "fault": name, "hit": hit, "code": code, "state": state.exists(), "digest": digest, "seconds": took,
        "tracebacks": sum("Traceback" in line for line in said), "left": len(left), "said": said,
    }  # fmt: skip


def table(rows: list[dict], expected: str) -> str:
    lines = ["| fault | runs | exit codes | state | right digest | end after (median, most) | good |"]
    lines.append("| --- | --- | --- | --- | --- | --- | --- |")
    for name in dict.fromkeys(row["fault"] for row in rows):
        mine = [row for row in rows if row["fault"] == name]
        codes = ", ".join(f"{c} x{sum(r['code'] == c for r in mine)}" for c in sorted({r["code"] for r in mine}))
        seconds = [row["seconds"] for row in mine]
        right, n = sum(row["digest"] == expected for row in mine), len(mine)
        times = f"{statistics.median(seconds):.0f} s, {max(seconds):.0f} s"
        lines.append(
            f"| {name} | {n} | {codes} | {sum(r['state'] for r in mine)}/{n} | {right}/{n} | {times} | "
            f"{sum(good(r, expected) for r in mine)}/{n} |"
        )
    return "\n".join([*lines, "", f"good: {sum(good(r, expected) for r in rows)} of {len(rows)}"])


def good(row: dict, expected: str) -> bool:
    right = row["code"] in FAULTS[row["fault"]].codes and row["digest"] == expected
    return bool(right and row["hit"] and row["state"] and not row["tracebacks"] and not row["left"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--faults", help="names with commas between; '-' may stand for a space")
    parser.add_argument("--tiles", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit-s", type=float, default=300.0, help="for each run")
    parser.add_argument("--time-s", type=float, default=float("inf"), help="begin no run after this time")
    parser.add_argument("--json", type=Path, help="write a JSON line a run to this file")
    args = parser.parse_args()
    chosen = [n.replace("-", " ") for n in args.faults.split(",")] if args.faults else []

    faults = {n: f for n, f in FAULTS.items() if not chosen or n.replace("-", " ").lower() in map(str.lower, chosen)}
    if not faults:
        parser.error(f"no such fault; there are: {', '.join(FAULTS)}")
    from tiny import make_model

    began, rng, rows = time.monotonic(), random.Random(args.seed), []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        make_model(work / "model", seed=5, hidden_size=64, num_hidden_layers=3)
        (work / "prompt").write_text("".join(chr(97 + i * i % 26) for i in range(args.tiles * TILE)))
        words = ["--chunkwise-backend", "ray_compiled_chunks", "--prompt-file", work / "prompt", "--json"]
        out, err = command(work, "prefill", "--model", work / "model", *SIZES, *words).communicate()
        expected = json.loads(out)["state_digest"] if out else sys.exit(err)
        for _ in range(args.repeats):
            for name, fault in faults.items():
                if time.monotonic() - began > args.time_s:
                    break
                row = one(name, fault, args, work / "model", rng, work)
                rows.append(row)
                mark = "good" if good(row, expected) else "BAD "
                print(f"{mark} {name}: exit {row['code']} after {row['seconds']:.0f} s", file=sys.stderr, flush=True)
                if mark != "good":
                    print("     " + "\n     ".join(row["said"][-12:]), file=sys.stderr, flush=True)
                if args.json:
                    with open(args.json, "a") as file:
                        file.write(json.dumps({**row, "good": mark == "good"}) + "\n")
    print(table(rows, expected))
    return 0 if all(good(row, expected) for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
