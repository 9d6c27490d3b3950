"""Ray's life cycle: start a head of our own, connect to one, say what is there, and stop exactly what we started.

A managed head is three layers, all in one POSIX session of their own:

    guard (this file, a few lines of Python)  ->  ray start --head  ->  Ray's processes and the workers

The guard's pid is the session's id, so "ours" is a question to the kernel and not a search for names. `ray start` ends
when all run; the guard then watches GCS and raylet, without which no run can be, and notes which helpers have gone. It
watches the driver by pid and start time; when the driver is gone, however it ended, the guard takes the session down. A
head that stays (`up`, or a run with keep-alive) has the same guard, which then waits for `stop_head` or `down` instead.
What was started is recorded in `<state_dir>/heads/<id>.json`, written whole or not at all, before anything runs.
A record says on which machine its pids are, by the machine's own identity: its name is shown and never compared.

Only `connect` imports Ray. This module reads no settings; it passes the environment on to Ray, with token
authentication switched on and every listener on loopback.
"""

import atexit
import fcntl
import http.client
import importlib.util
import json
import logging
import os
import platform
import re
import secrets
import shutil
import signal
import site
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import psutil
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from xlstm_ray.container import cores, machine_bytes
from xlstm_ray.errors import RayError, UsageError, pip_install
from xlstm_ray.files import write_whole

LOOPBACK = "127.0.0.1"
NAMESPACE = "xlstm-ray"
State = Literal["starting", "alive", "orphaned", "dead", "elsewhere"]
DASHBOARD_PORT = 8265  # where people look for it; else the next free one, or any once a start has failed
MIN_OBJECT_STORE = 75 << 20  # bytes; Ray refuses less
POLL_S = 0.1
GRACE_S = 5.0  # what each group of processes gets between SIGTERM and SIGKILL; Ray's dashboard takes 3
PROBE_S = 3.0
START_TRIES = 3  # each with other ports, in start_timeout_s together
LEAST_START_S = 60.0  # but with so much for each, where the first has taken long
SPACE = 64 << 20  # bytes that Ray's logs and sockets want at least
# What a system takes as a socket's path, less what Ray puts behind the folder.
LONGEST_FOLDER = (103 if platform.system() == "Darwin" else 107) - len(
    "/123456/session_2026-01-01_00-00-00_000000_1234567/sockets/plasma_store"
)


class Mode(StrEnum):
    """Where the actors live: in this process, on a head of our own, or on somebody's head."""

    LOCAL = "local"
    MANAGED = "managed"
    ATTACHED = "attached"


class Process(BaseModel):
    """A process beyond doubt: pids are reused, a pid with its start time is not."""

    model_config = ConfigDict(frozen=True)

    pid: int
    started: float  # seconds since boot: a corrected wall clock does not move it


class Machine(BaseModel):
    """What pids are of: a machine since it was booted, and in it a container's own table of processes."""

    model_config = ConfigDict(frozen=True)

    id: str  # stays when the machine is renamed or booted; containers may share it
    boot: str
    processes: str  # the pid namespace; empty where there is none


class Head(BaseModel):
    """The record of one head. Only its guard writes it, once `start_head` has laid it down.

    `mode` "run" goes with its driver, "up" stays until it is stopped. `address`, `members` and `dashboard_url` are
    empty until the head answers. `lost` names helpers that ended while the head goes on. `error` says why it ended.
    """

    model_config = ConfigDict(frozen=True)

    id: str
    host: str  # to show
    machine: Machine
    mode: Literal["run", "up"]
    created: float  # seconds since the epoch, to show
    driver: Process
    guard: Process | None = None
    members: tuple[Process, ...] = ()
    command: tuple[str, ...]
    address: str | None = None
    dashboard_port: int | None = None
    client_port: int
    metrics_port: int
    token_path: Path
    folder: Path  # Ray's sockets, logs and spilled objects
    lost: tuple[str, ...] = ()
    error: str | None = None

    @property
    def pid(self) -> int | None:
        """The guard's pid, which is the session's id."""
        return self.guard.pid if self.guard else None

    @property
    def dashboard_url(self) -> str | None:
        """Where the dashboard is, or None without one. It asks for the token; no token is part of an address."""
        return f"http://{LOOPBACK}:{self.dashboard_port}" if self.dashboard_port else None

    @property
    def metrics_url(self) -> str:
        """What Prometheus scrapes. Ray does not authenticate it; it listens on loopback only."""
        return f"http://{LOOPBACK}:{self.metrics_port}/metrics"


@dataclass(frozen=True, kw_only=True)
class HeadOptions:
    """What a head of ours is to be. Ports left None are chosen free; the object store is bounded in any case."""

    state_dir: Path
    temp_dir: Path | None = None  # above the head's folder; None: xr-UID in /tmp
    stays: bool = False
    dashboard: bool = False
    dashboard_port: int | None = None
    port: int | None = None
    client_port: int | None = None  # `ray start` cannot leave Ray Client's server out
    metrics_port: int | None = None
    object_store_bytes: int | None = None  # None: by what memory there is
    num_cpus: int | None = None
    num_gpus: int | None = None
    resources: dict[str, float] = field(default_factory=dict)
    start_timeout_s: float = 120.0


@dataclass(frozen=True)
class Actor:
    """A Ray worker of ours. Without a dashboard only its pid is known, and for its name what it is doing."""

    name: str
    class_name: str
    state: str
    pid: int
    namespace: str
    rss_bytes: int


@dataclass(frozen=True)
class HeadStatus:
    """A head of ours.

    starting; alive; orphaned (runs on though its driver is gone); dead (only the record is left);
    elsewhere (on another machine, or in another container, that shares the state directory)."""

    head: Head
    state: State
    processes: int
    rss_bytes: int  # summed over processes, so pages that they share count more than once
    actors: tuple[Actor, ...]


@dataclass(frozen=True)
class Stranger:
    """A Ray session on this machine that this project's records do not know. It is never touched."""

    session: str
    address: str
    user: str
    pids: tuple[int, ...]


@dataclass(frozen=True)
class StatusReport:
    """All Ray sessions of this machine: ours, and those that are not."""

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


def default_state_dir() -> Path:
    """Where records and the token live unless told otherwise. Raises RayError where this user has no home."""
    try:
        return Path.home() / ".local" / "state" / "xlstm-ray"
    except RuntimeError:
        raise RayError(
            "this user has no home directory for Ray's records: give a folder with --ray-state-dir "
            "(XLSTM_RAY_STATE_DIR), or set HOME"
        ) from None


def choose_mode(
    *,
    local_mode: bool,
    address: str | None = None,
    dashboard: bool = False,
    dashboard_port: int | None = None,
    keep_alive: bool = False,
) -> Mode:
    """The one place that decides where actors live. Raises UsageError for options that cannot be honoured together."""
    if dashboard_port is not None and not dashboard:
        raise UsageError(f"--ray-dashboard-port {dashboard_port} without a dashboard: add --ray-dashboard")
    if address is not None:
        if dashboard or keep_alive:
            flag = "--ray-dashboard" if dashboard else "--ray-keep-alive"
            raise UsageError(f"{flag} with --ray-address {address}: that head is not ours to configure; leave one out")
        return Mode.ATTACHED
    if not local_mode:
        return Mode.MANAGED
    if dashboard:
        raise UsageError(
            "--ray-dashboard in local mode: everything runs in this process and there is no Ray to look at; "
            "set XLSTM_RAY_LOCAL_MODE=0, or leave the dashboard out"
        )
    if keep_alive:
        raise UsageError(
            "--ray-keep-alive in local mode: there is no Ray head to keep; set XLSTM_RAY_LOCAL_MODE=0, or leave it out"
        )
    return Mode.LOCAL


# Starting


def start_head(options: HeadOptions) -> Head:
    """Start a head on loopback, wait until it answers, and return its record.

    Unless `options.stays`, it goes when this process goes. Takes 4 to 10 s. What is free when ports are chosen may be
    taken when Ray binds them, so a start that fails is tried again with other ports, unless it fails twice for one
    reason. Raises RayError, with nothing left behind, when Ray is missing, a port is busy, a folder has no room, or Ray
    does not come up within `options.start_timeout_s`.
    """
    _require_ray()
    _require_loopback()
    _check_options(options)
    _private_directory(options.state_dir)
    token_path = _own_token(options.state_dir)
    # Under /tmp because the paths of Ray's sockets must fit in 103 bytes on macOS. Ray makes its own folders 0777 and
    # its sockets know no token, so it is our 0700 above them that keeps other users out.
    root = options.temp_dir or Path("/tmp") / f"xr-{os.getuid()}"
    if len(os.fsencode(root)) > LONGEST_FOLDER:
        raise RayError(
            f"--ray-temp-dir {root}: the paths of Ray's sockets are too long in there; give a folder whose path has "
            f"{LONGEST_FOLDER} bytes at most"
        )
    _private_directory(root)
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
            _check_options(options)  # a port that was asked for may have been taken meanwhile
            deadline = max(deadline, time.monotonic() + LEAST_START_S)


def _try_to_start(options: HeadOptions, root: Path, token_path: Path, deadline: float, *, first: bool) -> Head:
    identity = secrets.token_hex(3)
    folder = root / identity
    client_port = options.client_port or _free_port()
    metrics_port = options.metrics_port or _free_port()
    near = DASHBOARD_PORT if first else None  # where other heads that start just now look too
    dashboard_port = (options.dashboard_port or _free_port(near)) if options.dashboard else None
    head = Head(
        id=identity,
        host=platform.node(),
        machine=this_machine(),
        mode="up" if options.stays else "run",
        created=time.time(),
        driver=_identify(psutil.Process()),
        command=_ray_start(options, folder, client_port, metrics_port, dashboard_port),
        dashboard_port=dashboard_port,
        client_port=client_port,
        metrics_port=metrics_port,
        token_path=token_path,
        folder=folder,
    )
    record = _record(options.state_dir, identity)
    _private_directory(record.parent)
    try:
        with _writing(folder):
            folder.mkdir(mode=0o700)
            log = open(folder / "start.log", "ab")
        with log:
            with _writing(record):
                _write(record, head)
            guard = subprocess.Popen(
                [sys.executable, "-P", "-c", _GUARD, "xlstm-ray-guard", str(Path(__file__).parents[1]), str(record)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env=_environment(token_path),
            )
        _guards[identity] = guard
        return _await_ready(record, head, guard, deadline)
    except BaseException:  # Ctrl-C too: a head that nobody was told of must not stay
        stop_head(head, options.state_dir)
        raise


@contextmanager
def managed(options: HeadOptions) -> Iterator[Head]:
    """A head for as long as the block runs; with `options.stays` it is left running. Raises as `start_head`.

    When Ray ended by itself, its record and logs stay, for `status` to tell and `down` to clear.
    """
    if (there := _connected()) is not None:
        raise RayError(_one_connection(there))
    _require_ray()
    token_path = options.state_dir / "auth_token"
    if "ray" in sys.modules and (missing := _missing(f"{LOOPBACK}:1", token_path)):
        raise RayError(_imported_before("a head of our own", missing))
    with ThreadPoolExecutor(1) as beside:  # the import takes a second, and so do the processes that are waited for
        imported = beside.submit(_import_ray, f"{LOOPBACK}:1", token_path)
        head, mine = start_head(options), os.getpid()
    try:
        imported.result()
        yield head
    finally:  # not in a fork, which ends what it has copied; nor as the interpreter ends: then its guard stops it
        if os.getpid() == mine and not options.stays and not sys.is_finalizing():
            if ended_by_itself(head, options.state_dir) is None:
                stop_head(head, options.state_dir)


def ended_by_itself(head: Head, state_dir: Path) -> str | None:
    """Why a head is gone that nobody of ours stopped, with where its logs are; None while it runs."""
    now = _read(_record(state_dir, head.id))
    return f"{now.error}; logs in {now.folder}" if now and now.error else None


def lost_helpers(head: Head, state_dir: Path) -> tuple[str, ...]:
    """Ray's helpers that have ended while the head goes on: no run needs them."""
    now = _read(_record(state_dir, head.id))
    return now.lost if now else ()


def up(options: HeadOptions) -> Head:
    """`xlstm-ray up`: one head that stays across runs, however many ask for it at once.

    Raises RayError when there is one already.
    """
    _private_directory(options.state_dir)
    with _writing(options.state_dir):
        lock = open(options.state_dir / "up.lock", "ab")
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the kernel lets go of it, however this process ends
        for head in _heads(options.state_dir):
            if head.mode == "up" and _state(head, _session(head)) in ("alive", "starting"):
                raise RayError(
                    f"head {head.id} is up already at {head.address}: use it with --ray-address {head.address}, "
                    f"or stop it with `xlstm-ray down {head.id}`"
                )
        return start_head(options)


def dashboard_line(head: Head) -> str:
    """Where a head's dashboard is, and what it asks for."""
    return f"dashboard: {head.dashboard_url} (it asks for a token: paste what is in {head.token_path})"


def stays_lines(head: Head) -> list[str]:
    """What to print when a head stays: where it is, how to log in, and how to stop it. The token is not shown."""
    out = [f"Ray's head stays: use it with --ray-address {head.address}"]
    if head.dashboard_url:
        out.append(dashboard_line(head))
    return [*out, f"stop it with: xlstm-ray down {head.id}"]


# Connecting


@contextmanager
def connect(
    target: Head | str,
    *,
    state_dir: Path | None = None,
    token_path: Path | None = None,
    namespace: str = NAMESPACE,
    log_to_driver: bool = False,
    metadata: Mapping[str, str] | None = None,
) -> Iterator[ModuleType]:
    """Connect this process to a head and yield the `ray` module; disconnects at the end.

    `target` is a head of ours or HOST:PORT. The token is in `token_path`; where that is not given, it is known of an
    address in the records of `state_dir`, or is where Ray itself looks (RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH,
    ~/.ray/auth_token).
    Import nothing that imports Ray before: Ray reads its authentication from the environment at import, once, and the
    environment stays set for that reason. Raises RayError within seconds when nobody answers, when the token is
    refused, or when the head would let anybody in.
    """
    _require_ray()
    if (there := _connected()) is not None:
        yield from _shared(there, target)
        return
    if isinstance(target, str) and state_dir is not None and token_path is None:
        here = f"{LOOPBACK}:{_split(target)[1]}" if is_loopback(target) else target
        target = next((h for h in _heads(state_dir) if h.address == here and _is_here(h)), target)
    if isinstance(target, Head):
        address, token_path = target.address, target.token_path
        if address is None or not _listens(_session(target), _split(address)[1]):
            raise RayError(f"head {target.id} is gone or not up yet: see `xlstm-ray status`")
    else:
        address = target
        _probe(address, _token(token_path))
    ray = _import_ray(address, token_path)
    main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(
            address=address,
            namespace=namespace,
            log_to_driver=log_to_driver,
            logging_level=logging.WARNING,
            job_config=_job(ray, metadata or {}),
        )
    except (ConnectionError, RuntimeError, ray.exceptions.RayError) as error:
        raise RayError(f"the head at {address} did not accept this process: {_first_line(error)}") from error
    finally:
        if main:  # ray.init puts its own in its place, which would end the run between two tiles without a state
            signal.signal(signal.SIGTERM, handler)
    global _users
    mine, _users = os.getpid(), 1
    try:
        yield ray
    finally:
        if os.getpid() == mine:
            _leave(ray)


_users = 0  # engines on a connection of ours


def _leave(ray: ModuleType) -> None:
    global _users
    _users -= 1
    if _users == 0:  # the last one; an engine that shares it may live longer than the one that made it
        _disconnect(ray)


def _connected() -> str | None:
    """The address that this process is connected to already: by an engine, or by the program itself."""
    ray = sys.modules.get("ray")
    return ray.get_runtime_context().gcs_address if ray is not None and ray.is_initialized() else None


def _shared(there: str, target: Head | str) -> Iterator[ModuleType]:
    """This process's own connection, which is left as it is. Raises RayError where it is another one than is wanted."""
    global _users
    address = target.address if isinstance(target, Head) else target
    assert address is not None
    if _split(address)[1] != _split(there)[1] or not (is_loopback(address) or _split(address)[0] == _split(there)[0]):
        raise RayError(_one_connection(there))
    if _asks_for_token(there, None) is False:
        raise RayError(
            f"this program is connected to the head at {there}, which lets anybody in: connect it to one that was "
            "started with RAY_AUTH_MODE=token and a token, such as that of `xlstm-ray up`"
        )
    ray, mine, an_engines = sys.modules["ray"], os.getpid(), _users > 0
    _users += an_engines
    try:
        yield ray
    finally:
        if an_engines and os.getpid() == mine:
            _leave(ray)


def _one_connection(there: str) -> str:
    return (
        f"this program is connected to Ray at {there} already, and Ray allows a process one connection: give that "
        "address (ray_address, --ray-address), or close what made it first"
    )


def _disconnect(ray: ModuleType) -> None:
    """Bounded in time: a head that does not answer must not keep a result from being printed."""
    if sys.is_finalizing():  # a program that left its engine open: Ray has gone at exit, and no thread starts any more
        return
    closing = threading.Thread(target=ray.shutdown, name="ray.shutdown", daemon=True)
    closing.start()
    closing.join(2 * GRACE_S)
    if closing.is_alive():
        from ray._private import worker

        atexit.unregister(worker.shutdown)  # which would wait again


def _require_ray() -> None:
    spec = importlib.util.find_spec("ray")
    if spec is None or spec.origin is None:  # a folder that is merely called ray has no origin
        raise RayError(f"Ray is not installed; {pip_install('ray')} installs it, or stay in local mode")


def _import_ray(address: str, token_path: Path | None) -> ModuleType:
    """Ray, imported with authentication on. Raises RayError where it was imported before in another way."""
    # Results that nobody asks for any more, of tiles that are played again, may be errors.
    os.environ["RAY_IGNORE_UNHANDLED_ERRORS"] = "1"
    # After this Ray ends the process whose head is away; the executor gives up before, and keeps what there is.
    os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", "300")
    wanted, missing = _wanted(address, token_path), _missing(address, token_path)
    if missing and "ray" in sys.modules:
        raise RayError(_imported_before(address, missing))
    os.environ.update(wanted)
    if token_path is not None:
        os.environ.pop("RAY_AUTH_TOKEN", None)  # it would go before the file
    hook = sys.excepthook
    import ray
    from ray._private import worker

    sys.excepthook = hook  # Ray's own asks the head before it shows an error, and waits where there is none
    # Ray writes the cluster's error messages to this program's standard output, whatever log_to_driver says, and has no
    # switch for it. The run says itself what an actor's death means; --json must be JSON.
    worker.print_to_stdstream = _note_message
    return ray


def _wanted(address: str, token_path: Path | None) -> dict[str, str]:
    """What the environment must say when Ray is imported."""
    # Off loopback Ray must not think that this machine's address is 127.0.0.1, which it does on macOS by default.
    wanted = {"RAY_AUTH_MODE": "token", _CLUSTER: "0" if is_loopback(address) else "1"}
    return wanted | ({} if token_path is None else {"RAY_AUTH_TOKEN_PATH": str(token_path)})


def _missing(address: str, token_path: Path | None) -> list[str]:
    missing = [name for name, value in _wanted(address, token_path).items() if os.environ.get(name) != value]
    return missing + (["RAY_AUTH_TOKEN"] if token_path is not None and "RAY_AUTH_TOKEN" in os.environ else [])


def _imported_before(what: str, missing: list[str]) -> str:
    return (
        f"ray was imported before the connection to {what}, with other {', '.join(missing)}: load the model before "
        "anything imports ray, set these as they should be before it, or connect to a head with a token and give its "
        "address"
    )


def _job(ray: ModuleType, metadata: Mapping[str, str]) -> Any:
    """This process as a job: its workers import what it imports, wherever it was started.

    Ray puts the current folder before all others on its workers' paths, so that a torch.py there would be taken for
    torch; a job of Ray's client is spared that. A checkout that is only on this process's path is on theirs instead.
    """
    root = str(Path(__file__).parents[1])
    installed = root in (*site.getsitepackages(), site.getusersitepackages())
    return ray.job_config.JobConfig(
        metadata=dict(metadata), _client_job=True, _py_driver_sys_path=[] if installed else [root]
    )


def _note_message(data: dict[str, Any], ignore_prefix: bool) -> None:
    logging.getLogger("xlstm_ray.ray").info("%s", " ".join(data["lines"]))


def _probe(address: str, token: str | None) -> None:
    """Refuse at once what Ray would wait for: a dead address, a wrong token, a head without authentication."""
    host, port = _split(address)
    try:
        socket.create_connection((host, port), timeout=PROBE_S).close()
    except OSError as error:
        raise RayError(
            f"nothing answers at --ray-address {address} ({error.strerror or error}): "
            "start a head with `xlstm-ray up`, or see `xlstm-ray status` for the right address"
        ) from None
    if _asks_for_token(address, None) is False:
        raise RayError(
            f"the head at {address} lets anybody in: stop it, and start it with RAY_AUTH_MODE=token and a token"
        )
    if token is None:
        raise RayError(f"the head at {address} asks for a token: say where it is with --ray-token-path")
    if _asks_for_token(address, token):
        raise RayError(
            f"the head at {address} refuses the token: --ray-token-path must name the file it was started with"
        )


def _asks_for_token(address: str, token: str | None) -> bool:
    """Whether the head turns this token away. Raises RayError where no Ray head answers."""
    import grpc

    metadata = [("authorization", f"Bearer {token}")] if token else None
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            channel.unary_unary("/ray.rpc.NodeInfoGcsService/GetClusterId")(b"", timeout=PROBE_S, metadata=metadata)
        except grpc.RpcError as error:
            if error.code() in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
                return True
            raise RayError(
                f"what answers at {address} is not a Ray head ({error.code().name.lower()}): "
                "give the port of the head itself, not of the dashboard or the client; TLS is not supported"
            ) from None
    return False


def _token(token_path: Path | None) -> str | None:
    """The token for a head that is not ours, from where Ray itself would take it. None when there is none."""
    if token_path is None:
        if "RAY_AUTH_TOKEN" in os.environ:
            return os.environ["RAY_AUTH_TOKEN"].strip()
        token_path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH", Path.home() / ".ray" / "auth_token"))
        if not token_path.exists():
            return None
    try:
        return token_path.read_text().strip()
    except OSError as error:
        raise RayError(f"the token file {token_path} cannot be read: {error.strerror}") from None


# Watching


def status(state_dir: Path) -> StatusReport:
    """Every Ray session on this machine: heads of ours with their actors and memory, and sessions that are not ours."""
    heads = []
    ours: set[int] = set()
    for head in _heads(state_dir):
        processes = _session(head)
        ours.update(p.pid for p in processes)
        state = _state(head, processes)
        heads.append(
            HeadStatus(
                head=head,
                state=state,
                processes=len(processes),
                rss_bytes=sum(_rss(p) for p in processes),
                actors=_actors(head, processes) if state in ("alive", "orphaned") else (),
            )
        )
    return StatusReport(tuple(heads), _strangers(ours))


def _state(head: Head, processes: list[psutil.Process]) -> State:
    if not _is_here(head):  # a home directory that several machines share, or a boot that is over
        return "dead" if _was_here(head) else "elsewhere"
    driven = find(head.driver) is not None
    if head.error:
        return "dead"
    if not processes:
        return "starting" if driven and head.guard is None else "dead"
    if not driven and (head.mode == "run" or head.address is None):
        return "orphaned"
    return "alive" if head.address else "starting"


def _actors(head: Head, processes: list[psutil.Process]) -> tuple[Actor, ...]:
    """From Ray's State API where there is a dashboard, else from the titles that Ray gives its workers."""
    rss = {p.pid: _rss(p) for p in processes}
    # The token goes only to a port that a process of ours holds.
    if head.dashboard_port and _listens(processes, head.dashboard_port):
        try:
            found = _state_api(head, "actors")
        except (
            OSError,
            ValueError,
            http.client.HTTPException,
        ):  # a dashboard that hangs or is dying: the titles remain
            pass
        else:
            return tuple(
                Actor(
                    name=a["name"] or a["class_name"],
                    class_name=a["class_name"],
                    state=a["state"],
                    pid=a["pid"] or 0,  # none while it is pending
                    namespace=a["ray_namespace"],
                    rss_bytes=rss.get(a["pid"], 0),
                )
                for a in found
            )
    out = []
    for process in processes:
        title = re.match(r"ray::((\w+).*?) *$", _title(process))
        if title and title[2] not in ("IDLE", "DashboardAgent", "RuntimeEnvAgent"):
            out.append(Actor(title[1], "", "RUNNING", process.pid, "", rss[process.pid]))
    return tuple(out)


def _state_api(head: Head, what: str) -> list[dict[str, Any]]:
    """One question to Ray's State API over HTTP, which works whether or not this process ever imported Ray."""
    query = urllib.parse.urlencode(
        {"limit": 1000, "filter_keys": "state", "filter_predicates": "!=", "filter_values": "DEAD"}
    )
    request = urllib.request.Request(f"{head.dashboard_url}/api/v0/{what}?{query}")
    request.add_header("Authorization", f"Bearer {head.token_path.read_text()}")
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy must not see the token
    with opener.open(request, timeout=PROBE_S) as answer:
        return json.load(answer)["data"]["result"]["result"]


def _strangers(ours: set[int]) -> tuple[Stranger, ...]:
    """Ray sessions by their programs' names, which is good enough for a list and never a reason to stop anything."""
    found: dict[str, dict[str, Any]] = {}
    for process in psutil.process_iter():
        try:
            if process.pid in ours or process.name() not in ("gcs_server", "raylet"):
                continue
            user = process.username()
            arguments = process.cmdline()
        except psutil.NoSuchProcess:
            continue
        except psutil.AccessDenied:  # another user's, on macOS
            user, arguments = "another user", []
        flags = dict(a[2:].split("=", 1) for a in arguments if a.startswith("--") and "=" in a)
        session = flags.get("session-name", f"Ray process {process.pid}")
        entry = found.setdefault(session, {"address": "unknown", "user": user, "pids": []})
        entry["pids"].append(process.pid)
        if "gcs-address" in flags:
            entry["address"] = flags["gcs-address"]
    return tuple(Stranger(name, e["address"], e["user"], tuple(e["pids"])) for name, e in sorted(found.items()))


# Stopping


def down(state_dir: Path, head_id: str | None = None) -> list[Head]:
    """Stop heads of ours and clear their records; returns those heads.

    Without `head_id`: heads that stay, orphans, and records of dead ones. A head whose run is alive is left to that
    run, unless it is named. Raises RayError for an unknown id, or when a process does not end.
    """
    heads = [h for h in _heads(state_dir) if _is_here(h) or _was_here(h)]
    if head_id is not None:
        known = ", ".join(h.id for h in heads) or "none"
        heads = [h for h in heads if h.id == head_id]
        if not heads:
            raise RayError(f"no head {head_id} of ours on this machine; there are: {known}")
    stopped = []
    for head in heads:
        if head_id is None and head.mode == "run" and _is_here(head) and find(head.driver) is not None:
            continue
        stop_head(head, state_dir)
        stopped.append(head)
    return stopped


def stop_head(head: Head, state_dir: Path) -> None:
    """Stop one head of ours and remove its record and folder; one that is gone already is no error.

    Takes 2 to 5 s. Only processes of the recorded session are signalled. Raises RayError when one of them survives.
    """
    record = _record(state_dir, head.id)
    head = _read(record) or head  # what the guard has learnt since
    guard = find(head.guard) if head.guard and _is_here(head) else None
    if guard is not None:
        _signal([guard], signal.SIGTERM)
        wait_for_end([guard], 4 * GRACE_S)
    child = _guards.pop(head.id, None)
    if child is not None and head.guard is None:  # it has not got as far as its record
        child.terminate()
    left = _end(lambda: _session(head))
    if child is not None:
        child.wait(4 * GRACE_S)  # ours to reap
    if left:
        raise RayError(f"head {head.id}: processes {', '.join(str(p.pid) for p in left)} do not end; stop them by hand")
    _remove(record, head)


def _end(find: Callable[[], Iterable[psutil.Process]]) -> list[psutil.Process]:
    """End processes in the order that Ray can bear; returns those that survive even SIGKILL."""
    known: set[psutil.Process] = set()  # children that made a session of their own are lost once their parents are gone

    def left(chosen: Callable[[str], bool] = lambda name: True) -> list[psutil.Process]:
        known.update(find())
        return [p for p in known if _running(p) and chosen(_name(p))]

    # The raylet first, so that it does not restart workers; the GCS last, so that nobody misses it.
    for chosen in (lambda name: name == "raylet", lambda name: name != "gcs_server", lambda name: True):
        group = left(chosen)
        _signal(group, signal.SIGTERM)
        wait_for_end(group, GRACE_S)
    for _ in range(3):  # a worker may be born while others die
        group = left()
        if not group:
            break
        _signal(group, signal.SIGKILL)
        wait_for_end(group, GRACE_S)
    return left()


def _remove(record: Path, head: Head) -> None:
    try:
        shutil.rmtree(head.folder)
    except FileNotFoundError:  # somebody else stops it too
        pass
    record.unlink(missing_ok=True)


# The guard

_GUARD = """
import sys
sys.path.insert(0, sys.argv[2])
from xlstm_ray.supervisor import _guard
_guard(sys.argv[3])
"""
HOSTS_OWN = "pid:[4026531836]"  # the first pid namespace of a Linux machine has this number
VITAL = {"gcs_server": "GCS", "raylet": "raylet"}  # without these there is no head
DASHBOARD = "dashboard"
HELPERS = {  # by a part of their command lines: no run needs them
    "/dashboard/dashboard.py": DASHBOARD,
    "/log_monitor.py": "log monitor",
    "/_private/monitor.py": "autoscaler's monitor",
    "ray.util.client.server": "client server",
}
_CLUSTER = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"  # "0" makes GCS, raylet and metrics listen on loopback, on Linux too
_guards: dict[str, subprocess.Popen[bytes]] = {}  # this process's children, to be reaped


def _guard(path: str) -> None:
    """The session's leader: runs Ray, completes the record, and ends the session when told to or left alone."""
    stopping = False

    def stop(signum: int, frame: object) -> None:
        nonlocal stopping
        stopping = True

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    record = Path(path)
    head = _read(record)
    if head is None:  # stopped before it began
        return
    me = psutil.Process()
    head = head.model_copy(update={"guard": _identify(me)})
    _write(record, head)
    ray = subprocess.Popen(head.command, stdin=subprocess.DEVNULL, process_group=0)
    vital: dict[str, psutil.Process] = {}
    helpers: dict[str, psutil.Process] = {}
    next_look = 0.0
    try:
        while not stopping:
            error = None
            if ray.poll():
                error = f"`ray start` ended with code {ray.returncode}"
            if gone := [name for name, process in vital.items() if not _running(process)]:
                error = f"Ray's {' and '.join(gone)} was ended from outside, or ended by itself"
            lost = tuple(name for name, process in helpers.items() if not _running(process))
            if head.address is None and not error and (address := _announced(head.folder)):
                members = _members(me.pid)
                if not vital:
                    vital = {VITAL[name]: p for p in members if (name := _name(p)) in VITAL}
                    helpers = {label: p for p in members for part, label in HELPERS.items() if part in _title(p)}
                if all(_listens(members, port) for port in _promised(head, address)):
                    head = head.model_copy(update={"address": address, "members": _identify_all(members)})
                    _write(record, head)
                elif lost:
                    error = f"its {lost[0]} ended at once"
            if head.address is None and not error and time.monotonic() > next_look:
                next_look = time.monotonic() + 1
                error = _taken(head, me.pid)  # the program that has no port would be waited for half a minute
            if error or lost != head.lost:
                head = head.model_copy(update={"error": error, "lost": lost})
                with suppress(OSError):  # a full disk is no reason to end a head
                    _write(record, head)
            if error or (head.mode == "run" or head.address is None) and find(head.driver) is None:
                break
            time.sleep(POLL_S)
    finally:  # a bug here or a full disk must not leave a head that nobody watches
        if ray.poll() is None:
            ray.kill()
            ray.wait()
        _end(lambda: [p for p in _members(me.pid) if p.pid != me.pid])
    if not head.error:
        _remove(record, head)


def _promised(head: Head, address: str) -> list[int]:
    """The ports that people are told of."""
    ports = [_split(address)[1], *([head.client_port, head.metrics_port] if head.mode == "up" else [])]
    return ports + ([head.dashboard_port] if head.dashboard_port else [])


def _taken(head: Head, session: int) -> str | None:
    """The port of ours that another program holds by now, if there is one, in a sentence."""
    for port in (head.client_port, head.metrics_port, head.dashboard_port):
        if port is not None and _answers(port) and not _listens(_members(session), port):
            return f"another program took port {port} before Ray did"
    return None


def _announced(folder: Path) -> str | None:
    """The address that `ray start` writes as its last act, once everything answers."""
    try:
        text = (folder / "ray_current_cluster").read_text()
    except FileNotFoundError:
        return None
    return text if re.fullmatch(r"127\.0\.0\.1:\d+", text) else None


class _StartFailed(Exception):
    """A start that came to nothing: what was seen, Ray's own reason, and the file with all that Ray said."""

    def __init__(self, what: str, reason: str, kept: Path):
        self.what, self.reason, self.kept = what, reason, kept


def _await_ready(record: Path, started: Head, guard: subprocess.Popen[bytes], deadline: float) -> Head:
    """The completed record. Raises _StartFailed, with what Ray said, when it does not come."""
    what = f"no answer within {deadline - time.monotonic():.0f} s"
    while time.monotonic() < deadline:
        ended = guard.poll() is not None
        head = _read(record)
        if head is None or head.error or ended:
            what = head.error if head and head.error else "it ended at once"
            break
        if head.address:
            return head
        time.sleep(POLL_S)
    # The folder goes with the head; what Ray said must stay.
    kept = record.parent.parent / "failed-start.log"
    said = _said(started.folder)
    with _writing(kept):
        kept.write_text("".join(f"== {name}\n{text}\n" for name, text in said.items()))
    raise _StartFailed(what, _reason(said) or what, kept)


def _said(folder: Path) -> dict[str, str]:
    """The last of all that Ray's programs wrote, by file: `ray start` first, then GCS and raylet."""
    logs = sorted((folder / "session_latest" / "logs").glob("*.*"), key=lambda p: (p.stem not in VITAL, p.name))
    said = {}
    for path in [folder / "start.log", *(p for p in logs if p.suffix in (".err", ".out", ".log"))]:
        try:
            with open(path, "rb") as file:
                file.seek(max(0, path.stat().st_size - (64 << 10)))
                said[path.name] = file.read().decode(errors="replace")
        except FileNotFoundError:  # it is being taken away
            continue
    return said


def _reason(said: dict[str, str]) -> str | None:
    """The first line that tells of a failure, of the program that comes first; without times and places."""
    sign = re.compile(r"No space left|(ddress|ort)\b.* in use|Read-only|Check failed|\w+Error\b|^Error|^Usage: ")
    for text in said.values():
        for line in reversed(text.splitlines()):
            if sign.search(line):
                return re.sub(r"^(.*(?=Check failed)|\[[^]]*\]\s*(\([^)]*\)\s*)?(\S+:\d+: )?)", "", line.strip())[:300]
    return None


def _object_store() -> int:
    """A quarter of what memory can be had, at most 1 GiB: it is taken only as it is used, and spills to the disk."""
    return max(MIN_OBJECT_STORE, min(1 << 30, machine_bytes()[0] // 4))


def _ray_start(
    options: HeadOptions, folder: Path, client_port: int, metrics_port: int, dashboard_port: int | None
) -> tuple[str, ...]:
    resources = dict(options.resources)
    if platform.system() == "Darwin" and platform.machine() == "arm64":
        resources.setdefault("mps", 1.0)  # one GPU a Mac
    command = [sys.executable, "-P", "-m", "ray.scripts.scripts", "start", "--head"]
    command += [f"--node-ip-address={LOOPBACK}", f"--port={options.port or 0}", f"--temp-dir={folder}"]
    # Ray's own defaults are fixed numbers, which a second head on the machine would meet.
    command += ["--min-worker-port=0", "--max-worker-port=0", "--dashboard-agent-listen-port=0"]
    command += [f"--ray-client-server-port={client_port}", f"--metrics-export-port={metrics_port}"]
    command += [f"--include-dashboard={'true' if dashboard_port else 'false'}", f"--dashboard-host={LOOPBACK}"]
    if dashboard_port:
        command.append(f"--dashboard-port={dashboard_port}")
    if not (options.stays or dashboard_port):  # two processes that nobody asks in a run
        command += ["--no-monitor", "--include-log-monitor=false"]
    command.append(
        f"--num-cpus={cores() if options.num_cpus is None else options.num_cpus}"
    )  # Ray counts half a CPU as none
    if options.num_gpus is not None:
        command.append(f"--num-gpus={options.num_gpus}")
    command += [
        f"--object-store-memory={options.object_store_bytes or _object_store()}",
        f"--resources={json.dumps(resources)}",
    ]
    return (*command, "--disable-usage-stats", "--log-color=false")


def _environment(token_path: Path) -> dict[str, str]:
    """Ours, with what Ray must know; the token itself is in no environment and no argument, only its file's path."""
    kept = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "RAY_AUTH_TOKEN")}
    # Ray makes its workers nicer than other programs (15): beside one that works they would hardly be given a core.
    kept.setdefault("RAY_worker_niceness", "0")
    return kept | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token_path), _CLUSTER: "0"}


def _check_options(options: HeadOptions) -> None:
    if options.object_store_bytes is not None and options.object_store_bytes < MIN_OBJECT_STORE:
        raise RayError(f"an object store of {options.object_store_bytes} bytes: Ray needs at least {MIN_OBJECT_STORE}")
    ports = {
        "--ray-dashboard-port": options.dashboard_port,
        "port": options.port,
        "client_port": options.client_port,
        "--ray-metrics-port": options.metrics_port,
    }
    for name, port in ports.items():
        if port is None:
            continue
        if not 1024 <= port <= 65535:
            raise RayError(f"{name} {port}: a port is a number from 1024 to 65535")
        if not _is_free(port):
            raise RayError(f"{name} {port} is in use on this machine: give another one, or leave it out for a free one")


# Machine, ports, files, processes


@cache
def this_machine() -> Machine:
    """This machine since its boot, and this container's processes in it."""
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


def _is_here(head: Head) -> bool:
    """Whether the record's pids are of the processes that this program can see."""
    now = this_machine()
    return (head.machine.boot, head.machine.processes) == (now.boot, now.processes)


def _was_here(head: Head) -> bool:
    """Whether the record is of this very machine before it was booted: containers may share a machine's id."""
    now, then = this_machine(), head.machine
    alone = now.processes in ("", HOSTS_OWN) and now.processes == then.processes
    return alone and now.id != "" and now.id == then.id and now.boot != then.boot


def _require_loopback() -> None:
    try:
        with socket.create_server((LOOPBACK, 0)) as server:
            socket.create_connection(server.getsockname()[:2], timeout=PROBE_S).close()
    except OSError as error:
        raise RayError(
            f"this machine cannot reach itself at {LOOPBACK} ({error.strerror or error}), where all of Ray would "
            "listen: bring its loopback interface up (ip link set lo up)"
        ) from None


def _require_space(root: Path) -> None:
    """Raise RayError where Ray's logs, sockets or shared memory would have no place."""
    free = shutil.disk_usage(root).free
    if free < SPACE:
        raise RayError(
            f"{root} has {free >> 20} MiB left, and Ray's logs and sockets need {SPACE >> 20}: free some, or give "
            "another folder with --ray-temp-dir (XLSTM_RAY_TEMP_DIR)"
        )
    shared = Path("/dev/shm")
    if platform.system() == "Linux" and not os.access(shared, os.W_OK):
        raise RayError(f"{shared} cannot be written, and Ray shares tensors there: mount it for writing")


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """A disk that is full or cannot be written is one line."""
    try:
        yield
    except OSError as error:
        raise RayError(f"{path} cannot be written: {error.strerror or error}") from None


def _is_free(port: int) -> bool:
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # else a port closed a minute ago looks busy
        try:
            server.bind((LOOPBACK, port))
        except OSError:
            return False
    return not _answers(port)  # macOS lets us bind beside a listener on all addresses


def _answers(port: int) -> bool:
    with socket.socket() as client:
        client.settimeout(PROBE_S)
        return client.connect_ex((LOOPBACK, port)) == 0


def _free_port(first: int | None = None) -> int:
    """`first` or the next free port after it; any free one without `first`."""
    if first is None:
        with socket.socket() as server:
            server.bind((LOOPBACK, 0))
            return server.getsockname()[1]
    return next(port for port in range(first, 65536) if _is_free(port))


def _listens(processes: list[psutil.Process], port: int) -> bool:
    """Whether one of these processes, and not somebody else's, holds the port."""
    for process in processes:
        try:
            connections = process.net_connections("tcp")
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        if any(c.laddr and c.laddr.port == port and c.status == psutil.CONN_LISTEN for c in connections):
            return True
    return False


def _split(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise RayError(f"--ray-address {address}: give HOST:PORT, as `xlstm-ray up` and `xlstm-ray status` print it")
    return host.strip("[]"), int(port)


def is_loopback(address: str) -> bool:
    host = _split(address)[0]
    return host in ("localhost", "::1") or host.startswith("127.")


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _private_directory(path: Path) -> None:
    """Make it 0700. Raises RayError where it exists and others may enter, or somebody else made it."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise RayError(
            f"the folder {path} cannot be made: {error.strerror}; --ray-state-dir and --ray-temp-dir choose others"
        ) from None
    found = path.lstat()
    if path.is_symlink() or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise RayError(f"{path} must be a folder of yours that nobody else may enter: chmod 700 it, or remove it")


def _own_token(state_dir: Path) -> Path:
    """The token's file, made at first use with 256 random bits, 0600. Raises RayError where others could read it."""
    path = state_dir / "auth_token"
    if not path.exists():
        temporary = path.with_name(f".auth_token.{secrets.token_hex(8)}")
        with _writing(path):
            try:
                temporary.touch(mode=0o600, exist_ok=False)
                temporary.write_text(secrets.token_hex(32))
                os.link(temporary, path)  # whole, and never over a token that another process made just now
            except FileExistsError:
                pass
            finally:
                temporary.unlink(missing_ok=True)
    found = path.stat()
    if found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise RayError(
            f"the token file {path} has mode {found.st_mode & 0o777:04o}, so others may have read it: stop the heads "
            "that use it with `xlstm-ray down`, remove it, and start again"
        )
    return path


def _record(state_dir: Path, head_id: str) -> Path:
    return state_dir / "heads" / f"{head_id}.json"


def _heads(state_dir: Path) -> list[Head]:
    found = (_read(path) for path in sorted((state_dir / "heads").glob("*.json")))
    return sorted((head for head in found if head is not None), key=lambda head: head.created)


def _read(record: Path) -> Head | None:
    """None when it is not there. Raises RayError for a damaged record: nothing is stopped on a guess."""
    try:
        return Head.model_validate_json(record.read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError as error:
        raise RayError(
            f"the record {record} is damaged ({error.error_count()} errors): look for its processes by hand, "
            "then remove it"
        ) from None


def _write(record: Path, head: Head) -> None:
    """Whole or not at all."""
    write_whole(record, head.model_dump_json(indent=1).encode())


def _identify(process: psutil.Process) -> Process:
    return Process(pid=process.pid, started=_since_boot(process))


@cache
def this_process() -> Process:
    """This process. Not for one that is about to fork."""
    return _identify(psutil.Process())


def _identify_all(processes: Iterable[psutil.Process]) -> tuple[Process, ...]:
    found = []
    for process in processes:
        try:
            found.append(_identify(process))
        except psutil.NoSuchProcess:
            continue
    return tuple(found)


def _since_boot(process: psutil.Process) -> float:
    return round(process.create_time() - psutil.boot_time(), 2)


def find(wanted: Process) -> psutil.Process | None:
    """The very process, or None when it is gone, is a zombie, or its pid is somebody else's by now."""
    try:
        process = psutil.Process(wanted.pid)
        same = abs(_since_boot(process) - wanted.started) < 0.05  # the clock ticks in 0.01 s
        return process if same and process.status() != psutil.STATUS_ZOMBIE else None
    except psutil.NoSuchProcess:
        return None


def _session(head: Head) -> list[psutil.Process]:
    """Every process of the head. Empty unless a recorded one still is in that session.

    A session's id is not given to another process while the session has members, so one recorded member proves that
    the id still means our session; without one it may have become a stranger's.
    """
    if head.guard is None or not _is_here(head):
        return []
    known = (head.guard, *head.members)
    if not any(find(p) is not None and _session_id(p.pid) == head.guard.pid for p in known):
        return []
    return _members(head.guard.pid)


def _members(session: int) -> list[psutil.Process]:
    """The session's processes and their descendants (jobs make sessions of their own), without zombies."""
    found: dict[int, psutil.Process] = {}
    children: dict[int, list[psutil.Process]] = {}
    for process in psutil.process_iter():
        try:
            children.setdefault(process.ppid(), []).append(process)
        except psutil.NoSuchProcess:
            continue
        if _session_id(process.pid) == session:
            found[process.pid] = process
    queue = list(found)
    while queue:
        for child in children.get(queue.pop(), ()):
            if child.pid not in found:
                found[child.pid] = child
                queue.append(child.pid)
    return [p for p in found.values() if _running(p)]


def _session_id(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except (ProcessLookupError, PermissionError):
        return None


def _running(process: psutil.Process) -> bool:
    """Alive, the same process as when it was found, and not a zombie."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _name(process: psutil.Process) -> str:
    try:
        return process.name()
    except psutil.NoSuchProcess:
        return ""


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return ""


def _rss(process: psutil.Process) -> int:
    try:
        return process.memory_info().rss
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return 0


def _signal(processes: Iterable[psutil.Process], number: signal.Signals) -> None:
    """psutil compares the start time first, so a pid that was reused meanwhile is not hit."""
    for process in processes:
        try:
            process.send_signal(number)
        except psutil.NoSuchProcess:
            continue


def wait_for_end(processes: list[psutil.Process], timeout_s: float) -> None:
    """Until all are gone or zombies (which psutil.wait_procs would wait for, as their parents may never reap)."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline and any(_running(p) for p in processes):
        time.sleep(POLL_S / 2)
