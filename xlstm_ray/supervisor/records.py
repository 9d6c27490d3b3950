"""Records of our heads: `<state_dir>/heads/<id>.json` and the token, written whole or not at all."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import psutil
from pydantic import BaseModel, ConfigDict, ValidationError

from xlstm_ray.errors import RayError
from xlstm_ray.files import write_whole
from xlstm_ray.supervisor.ports import LOOPBACK
from xlstm_ray.supervisor.processes import Machine, Process, find, members_of, session_id, this_machine

State = Literal["starting", "alive", "orphaned", "dead", "elsewhere"]
HOSTS_OWN = "pid:[4026531836]"  # the first pid namespace of a Linux machine has this number


class Head(BaseModel):
    """The record of one head. After `start_head` has made it, only its guard writes it.

    `mode`: "run" ends with its driver, "up" stays until it is stopped. `address`, `members` and `dashboard_url` are
    empty until the head answers. `lost`: helpers that ended while the head goes on. `error`: why the head ended.
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
        """The dashboard's address, or None. It asks for the token; an address never has a token."""
        return f"http://{LOOPBACK}:{self.dashboard_port}" if self.dashboard_port else None

    @property
    def metrics_url(self) -> str:
        """The address for Prometheus. It needs no token and listens only on loopback."""
        return f"http://{LOOPBACK}:{self.metrics_port}/metrics"


def ended_by_itself(head: Head, state_dir: Path) -> str | None:
    """Why a head ended that we did not stop, and the folder of its logs; None while it runs."""
    now = read_record(record_path(state_dir, head.id))
    return f"{now.error}; logs in {now.folder}" if now and now.error else None


def lost_helpers(head: Head, state_dir: Path) -> tuple[str, ...]:
    """Ray's helpers that have ended while the head goes on; runs do not need them."""
    now = read_record(record_path(state_dir, head.id))
    return now.lost if now else ()


def dashboard_line(head: Head) -> str:
    """A line with the dashboard's address and the place of its token."""
    return f"dashboard: {head.dashboard_url} (it asks for a token: paste what is in {head.token_path})"


def stays_lines(head: Head) -> list[str]:
    """Lines for a head that stays: its address, how to log in, how to stop it. The token is not shown."""
    out = [f"Ray's head stays: use it with `ray_address={head.address}`"]
    if head.dashboard_url:
        out.append(dashboard_line(head))
    return [*out, f"stop it with: xlstm-ray down {head.id}"]


def state_of(head: Head, processes: list[psutil.Process]) -> State:
    if not is_here(head):  # recorded by another machine that shares the home directory, or before a boot
        return "dead" if was_here(head) else "elsewhere"
    driven = find(head.driver) is not None
    if head.error:
        return "dead"
    if not processes:
        return "starting" if driven and head.guard is None else "dead"
    if not driven and (head.mode == "run" or head.address is None):
        return "orphaned"
    return "alive" if head.address else "starting"


def is_here(head: Head) -> bool:
    """Whether the record's pids are of processes that this program can see."""
    now = this_machine()
    return (head.machine.boot, head.machine.processes) == (now.boot, now.processes)


def was_here(head: Head) -> bool:
    """Whether the record is of this machine before its last boot; containers may share a machine's id."""
    now, then = this_machine(), head.machine
    alone = now.processes in ("", HOSTS_OWN) and now.processes == then.processes
    return alone and now.id != "" and now.id == then.id and now.boot != then.boot


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a failed write (a full disk) into an error of one line."""
    try:
        yield
    except OSError as error:
        raise RayError(f"{path} cannot be written: {error.strerror or error}") from None


def make_private_directory(path: Path) -> None:
    """Make a folder with mode 0700. Raises RayError if it exists and others may enter, or somebody else made it."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise RayError(
            f"the folder {path} cannot be made: {error.strerror}; `ray_state_dir` and `ray_temp_dir` choose others"
        ) from None
    found = path.lstat()
    if path.is_symlink() or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise RayError(f"{path} must be a folder of yours that nobody else may enter: chmod 700 it, or remove it")


def own_token(state_dir: Path) -> Path:
    """The token's file; made at first use with 256 random bits and mode 0600. Raises RayError if others can read it."""
    path = state_dir / "auth_token"
    if not path.exists():
        temporary = path.with_name(f".auth_token.{secrets.token_hex(8)}")
        with writing(path):
            try:
                temporary.touch(mode=0o600, exist_ok=False)
                temporary.write_text(secrets.token_hex(32))
                os.link(temporary, path)  # whole, and never over a token that another process made
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


def record_path(state_dir: Path, head_id: str) -> Path:
    return state_dir / "heads" / f"{head_id}.json"


def all_heads(state_dir: Path) -> list[Head]:
    found = (read_record(path) for path in sorted((state_dir / "heads").glob("*.json")))
    return sorted((head for head in found if head is not None), key=lambda head: head.created)


def read_record(record: Path) -> Head | None:
    """Read a record; None if it does not exist. Raises RayError for a damaged record: nothing is stopped on a guess."""
    try:
        return Head.model_validate_json(record.read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError as error:
        raise RayError(
            f"the record {record} is damaged ({error.error_count()} errors): look for its processes by hand, "
            "then remove it"
        ) from None


def write_record(record: Path, head: Head) -> None:
    """Whole or not at all."""
    write_whole(record, head.model_dump_json(indent=1).encode())


def session_of(head: Head) -> list[psutil.Process]:
    """Every process of the head. Empty unless a recorded process is still in its session.

    A session's id is not reused while the session has members. So one recorded member proves that the session is ours;
    without one it may be somebody else's.
    """
    if head.guard is None or not is_here(head):
        return []
    known = (head.guard, *head.members)
    if not any(find(p) is not None and session_id(p.pid) == head.guard.pid for p in known):
        return []
    return members_of(head.guard.pid)
