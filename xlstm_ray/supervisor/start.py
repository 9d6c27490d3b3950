"""Start a Ray head, and wait until it answers."""

import json
import os
import platform
import re
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from filelock import FileLock

from xlstm_ray.container import cores, machine_bytes
from xlstm_ray.errors import RayError
from xlstm_ray.supervisor.connect import (
    CLUSTER,
    connected_to,
    import_ray,
    imported_before,
    missing_variables,
    one_connection,
    require_ray,
)
from xlstm_ray.supervisor.guard import GUARD, VITAL
from xlstm_ray.supervisor.ports import DASHBOARD_PORT, LOOPBACK, free_port, is_free, require_loopback
from xlstm_ray.supervisor.processes import POLL_S, identify, this_machine
from xlstm_ray.supervisor.records import (
    Head,
    all_heads,
    ended_by_itself,
    make_private_directory,
    own_token,
    read_record,
    record_path,
    session_of,
    state_of,
    write_record,
    writing,
)
from xlstm_ray.supervisor.stop import child_guards, stop_head

MIN_OBJECT_STORE = 75 << 20  # bytes; Ray refuses less
START_TRIES = 3  # each with other ports; all within start_timeout_s
LEAST_START_S = 60.0  # but each try has at least this time
SPACE = 64 << 20  # bytes that Ray's logs and sockets need
# The longest socket path of the system, minus what Ray appends to the folder.
LONGEST_FOLDER = (103 if platform.system() == "Darwin" else 107) - len(
    "/123456/session_2026-01-01_00-00-00_000000_1234567/sockets/plasma_store"
)


@dataclass(frozen=True, kw_only=True)
class HeadOptions:
    """Options of a head. A port of None becomes a free port; the object store is always bounded."""

    state_dir: Path
    temp_dir: Path | None = None  # the parent of the head's folder; None: xr-UID in /tmp
    stays: bool = False
    dashboard: bool = False
    dashboard_port: int | None = None
    port: int | None = None
    client_port: int | None = None  # `ray start` cannot leave Ray Client's server out
    metrics_port: int | None = None
    object_store_bytes: int | None = None  # None: by the available memory
    num_cpus: int | None = None
    num_gpus: int | None = None
    resources: dict[str, float] = field(default_factory=dict)
    start_timeout_s: float = 120.0


def start_head(options: HeadOptions) -> Head:
    """Start a head on loopback, wait until it answers, and return its record.

    Unless `options.stays`, it ends when this process ends. Takes 4 to 10 s. A free port may be taken before Ray binds
    it, so a failed start is tried again with other ports, unless it fails twice for the same reason. Raises RayError,
    with nothing left behind, if Ray is missing, a port is busy, a folder has no space, or Ray does not answer within
    `options.start_timeout_s`.
    """
    require_ray()
    require_loopback()
    _check_options(options)
    make_private_directory(options.state_dir)
    token_path = own_token(options.state_dir)
    # Under /tmp because Ray's socket paths must fit in 103 bytes on macOS. Ray's own folders have mode 0777 and its
    # sockets need no token, so our folder above them has mode 0700 to keep other users out.
    root = options.temp_dir or Path("/tmp") / f"xr-{os.getuid()}"
    if len(os.fsencode(root)) > LONGEST_FOLDER:
        raise RayError(
            f"`ray_temp_dir` {root}: the paths of Ray's sockets are too long in there; give a folder whose path has "
            f"{LONGEST_FOLDER} bytes at most"
        )
    make_private_directory(root)
    _require_space(root)
    deadline = time.monotonic() + options.start_timeout_s
    reasons: list[str] = []
    while True:
        try:
            return _try_to_start(options, root, token_path, deadline, first=not reasons)
        except _StartFailed as failed:
            reasons.append(failed.reason)
            if failed.reason in reasons[:-1] or len(reasons) == START_TRIES or time.monotonic() > deadline:
                tries = f" in {len(reasons)} tries" if len(reasons) > 1 else ""
                said = "; ".join(dict.fromkeys([failed.what, *reasons]))
                raise RayError(f"Ray's head did not start{tries}: {said}; its output is in {failed.kept}") from None
            _check_options(options)  # a requested port may have been taken in the meantime
            deadline = max(deadline, time.monotonic() + LEAST_START_S)


def _try_to_start(options: HeadOptions, root: Path, token_path: Path, deadline: float, *, first: bool) -> Head:
    identity = secrets.token_hex(3)
    folder = root / identity
    client_port = options.client_port or free_port()
    metrics_port = options.metrics_port or free_port()
    near = DASHBOARD_PORT if first else None  # other heads that start now try the same port
    dashboard_port = (options.dashboard_port or free_port(near)) if options.dashboard else None
    head = Head(
        id=identity,
        host=platform.node(),
        machine=this_machine(),
        mode="up" if options.stays else "run",
        created=time.time(),
        driver=identify(psutil.Process()),
        command=_ray_start(options, folder, client_port, metrics_port, dashboard_port),
        dashboard_port=dashboard_port,
        client_port=client_port,
        metrics_port=metrics_port,
        token_path=token_path,
        folder=folder,
    )
    record = record_path(options.state_dir, identity)
    make_private_directory(record.parent)
    try:
        with writing(folder):
            folder.mkdir(mode=0o700)
            log = open(folder / "start.log", "ab")
        with log:
            with writing(record):
                write_record(record, head)
            guard = subprocess.Popen(
                [sys.executable, "-P", "-c", GUARD, "xlstm-ray-guard", str(Path(__file__).parents[2]), str(record)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env=_environment(token_path),
            )
        child_guards[identity] = guard
        return _await_ready(record, head, guard, deadline)
    except BaseException:  # Ctrl-C too: a head that nobody knows must not stay
        stop_head(head, options.state_dir)
        raise


@contextmanager
def managed(options: HeadOptions) -> Iterator[Head]:
    """A head while the block runs; with `options.stays` it runs on. Raises like `start_head`.

    If Ray ended by itself, its record and logs stay: `status` shows them and `down` clears them.
    """
    if (there := connected_to()) is not None:
        raise RayError(one_connection(there))
    require_ray()
    token_path = options.state_dir / "auth_token"
    if "ray" in sys.modules and (missing := missing_variables(f"{LOOPBACK}:1", token_path)):
        raise RayError(imported_before("a head of our own", missing))
    with ThreadPoolExecutor(1) as beside:  # import Ray while its processes start: a second each
        imported = beside.submit(import_ray, f"{LOOPBACK}:1", token_path)
        head, mine = start_head(options), os.getpid()
    try:
        imported.result()
        yield head
    finally:  # not in a fork, and not when the interpreter ends: then the guard stops it
        if os.getpid() == mine and not options.stays and not sys.is_finalizing():
            if ended_by_itself(head, options.state_dir) is None:
                stop_head(head, options.state_dir)


def up(options: HeadOptions) -> Head:
    """`xlstm-ray up`: start a head that stays across runs; only one, even if several processes ask at once.

    Raises RayError if there is one already.
    """
    make_private_directory(options.state_dir)
    with writing(options.state_dir):
        lock = FileLock(options.state_dir / "up.lock", fallback_to_soft=False).acquire()
    with lock:  # the kernel frees it in any case when this process ends
        for head in all_heads(options.state_dir):
            if head.mode == "up" and state_of(head, session_of(head)) in ("alive", "starting"):
                raise RayError(
                    f"head {head.id} is up already at {head.address}: use it with `ray_address={head.address}`, "
                    f"or stop it with `xlstm-ray down {head.id}`"
                )
        return start_head(options)


class _StartFailed(Exception):
    """A failed start: what was seen, Ray's own reason, and the file with all of Ray's output."""

    def __init__(self, what: str, reason: str, kept: Path):
        self.what, self.reason, self.kept = what, reason, kept


def _await_ready(record: Path, started: Head, guard: subprocess.Popen[bytes], deadline: float) -> Head:
    """Wait for the completed record. Raises _StartFailed, with Ray's output, if it does not come."""
    what = f"no answer within {deadline - time.monotonic():.0f} s"
    while time.monotonic() < deadline:
        ended = guard.poll() is not None
        head = read_record(record)
        if head is None or head.error or ended:
            what = head.error if head and head.error else "it ended at once"
            break
        if head.address:
            return head
        time.sleep(POLL_S)
    # The folder is removed with the head; Ray's output must stay.
    kept = record.parent.parent / "failed-start.log"
    said = _said(started.folder)
    with writing(kept):
        kept.write_text("".join(f"== {name}\n{text}\n" for name, text in said.items()))
    raise _StartFailed(what, _reason(said) or what, kept)


def _said(folder: Path) -> dict[str, str]:
    """The last output of Ray's programs, by file: `ray start` first, then GCS and raylet."""
    logs = sorted((folder / "session_latest" / "logs").glob("*.*"), key=lambda p: (p.stem not in VITAL, p.name))
    said = {}
    for path in [folder / "start.log", *(p for p in logs if p.suffix in (".err", ".out", ".log"))]:
        try:
            with open(path, "rb") as file:
                file.seek(max(0, path.stat().st_size - (64 << 10)))
                said[path.name] = file.read().decode(errors="replace")
        except FileNotFoundError:  # it is being removed
            continue
    return said


def _reason(said: dict[str, str]) -> str | None:
    """The first line about a failure, from the first program that has one; without times and places."""
    sign = re.compile(r"No space left|(ddress|ort)\b.* in use|Read-only|Check failed|\w+Error\b|^Error|^Usage: ")
    for text in said.values():
        for line in reversed(text.splitlines()):
            if sign.search(line):
                return re.sub(r"^(.*(?=Check failed)|\[[^]]*\]\s*(\([^)]*\)\s*)?(\S+:\d+: )?)", "", line.strip())[:300]
    return None


def _object_store() -> int:
    """A quarter of the available memory, at most 1 GiB. Memory is taken only when used, and spills to the disk."""
    return max(MIN_OBJECT_STORE, min(1 << 30, machine_bytes()[0] // 4))


def _ray_start(
    options: HeadOptions, folder: Path, client_port: int, metrics_port: int, dashboard_port: int | None
) -> tuple[str, ...]:
    resources = dict(options.resources)
    if platform.system() == "Darwin" and platform.machine() == "arm64":
        resources.setdefault("mps", 1.0)  # a Mac has one GPU
    command = [sys.executable, "-P", "-m", "ray.scripts.scripts", "start", "--head"]
    command += [f"--node-ip-address={LOOPBACK}", f"--port={options.port or 0}", f"--temp-dir={folder}"]
    # Ray's default ports are fixed: a second head on the machine would collide.
    command += ["--min-worker-port=0", "--max-worker-port=0", "--dashboard-agent-listen-port=0"]
    command += [f"--ray-client-server-port={client_port}", f"--metrics-export-port={metrics_port}"]
    command += [f"--include-dashboard={'true' if dashboard_port else 'false'}", f"--dashboard-host={LOOPBACK}"]
    if dashboard_port:
        command.append(f"--dashboard-port={dashboard_port}")
    if not (options.stays or dashboard_port):  # two processes that a run does not need
        command += ["--no-monitor", "--include-log-monitor=false"]
    command.append(
        f"--num-cpus={cores() if options.num_cpus is None else options.num_cpus}"
    )  # Ray rounds half a CPU down to none
    if options.num_gpus is not None:
        command.append(f"--num-gpus={options.num_gpus}")
    command += [
        f"--object-store-memory={options.object_store_bytes or _object_store()}",
        f"--resources={json.dumps(resources)}",
    ]
    return (*command, "--disable-usage-stats", "--log-color=false")


def _environment(token_path: Path) -> dict[str, str]:
    """Our environment, plus Ray's variables. It has only the path of the token's file, never the token itself."""
    kept = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "RAY_AUTH_TOKEN")}
    # Ray gives its workers niceness 15: next to another busy program they would hardly get a core.
    kept.setdefault("RAY_worker_niceness", "0")
    return kept | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token_path), CLUSTER: "0"}


def _check_options(options: HeadOptions) -> None:
    if options.object_store_bytes is not None and options.object_store_bytes < MIN_OBJECT_STORE:
        raise RayError(f"an object store of {options.object_store_bytes} bytes: Ray needs at least {MIN_OBJECT_STORE}")
    ports = {
        "`ray_dashboard_port`": options.dashboard_port,
        "`ray_port`": options.port,
        "client_port": options.client_port,
        "`ray_metrics_port`": options.metrics_port,
    }
    for name, port in ports.items():
        if port is None:
            continue
        if not 1024 <= port <= 65535:
            raise RayError(f"{name} {port}: a port is a number from 1024 to 65535")
        if not is_free(port):
            raise RayError(f"{name} {port} is in use on this machine: give another one, or leave it out for a free one")


def _require_space(root: Path) -> None:
    """Raise RayError if Ray's logs, sockets or shared memory have no space."""
    free = shutil.disk_usage(root).free
    if free < SPACE:
        raise RayError(
            f"{root} has {free >> 20} MiB left, and Ray's logs and sockets need {SPACE >> 20}: free some, or give "
            "another folder with `ray_temp_dir` (XLSTM_RAY_TEMP_DIR)"
        )
    shared = Path("/dev/shm")
    if platform.system() == "Linux" and not os.access(shared, os.W_OK):
        raise RayError(f"{shared} cannot be written, and Ray shares tensors there: mount it for writing")
