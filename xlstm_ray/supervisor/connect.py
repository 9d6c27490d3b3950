"""Connect this process to a head, with its token. The only module here that imports Ray."""

import importlib.util
import logging
import os
import signal
import site
import socket
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from xlstm_ray.errors import RayError, pip_install
from xlstm_ray.supervisor.ports import LOOPBACK, PROBE_S, is_loopback, listens, split
from xlstm_ray.supervisor.processes import GRACE_S
from xlstm_ray.supervisor.ray_inside import forget_shutdown_at_exit, job_config, print_messages_with
from xlstm_ray.supervisor.records import Head, all_heads, is_here, session_of

NAMESPACE = "xlstm-ray"
CLUSTER = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"  # "0" makes GCS, raylet and metrics listen on loopback, on Linux too


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

    target: one of our heads, or HOST:PORT. The token is in `token_path`. Without it, the token is found by the address
    in the records of `state_dir`, or where Ray itself looks (RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH, ~/.ray/auth_token).
    Do not import Ray before: Ray reads its authentication from the environment once, at import, so the environment
    stays set. Raises RayError within seconds if nobody answers, the token is refused, or the head needs no token.
    """
    require_ray()
    if (there := connected_to()) is not None:
        yield from _shared(there, target)
        return
    if isinstance(target, str) and state_dir is not None and token_path is None:
        here = f"{LOOPBACK}:{split(target)[1]}" if is_loopback(target) else target
        target = next((h for h in all_heads(state_dir) if h.address == here and is_here(h)), target)
    if isinstance(target, Head):
        address, token_path = target.address, target.token_path
        if address is None or not listens(session_of(target), split(address)[1]):
            raise RayError(f"head {target.id} is gone or not up yet: see `xlstm-ray status`")
    else:
        address = target
        _probe(address, _token(token_path))
    ray = import_ray(address, token_path)
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
        if main:  # ray.init sets its own handler, which would end the run between two tiles without a state
            signal.signal(signal.SIGTERM, handler)
    global _users, _given
    mine, _users, _given = os.getpid(), 1, address
    try:
        yield ray
    finally:
        if os.getpid() == mine:
            _leave(ray)


def job_metadata(model: Path, stages: object) -> dict[str, str]:
    """What Ray's dashboard shows about this program, besides its command line."""
    figures = "metrics ray_xlstm_ray_tokens_total, _prompt_tokens, _prompt_tokens_left, _tokens_per_second"
    name = model.resolve().name
    return {"job_name": f"xlstm-ray {name}", "model": name, "stages": str(stages), "progress": figures}


_users, _given = 0, ""  # who uses our connection, and the address that the first one gave: Ray makes an IP of it


def _leave(ray: ModuleType) -> None:
    global _users
    _users -= 1
    if _users == 0:  # the last user; an engine may outlive the one that made the connection
        _disconnect(ray)


def connected_to() -> str | None:
    """The address that this process is connected to already: by an engine, or by the program itself."""
    ray = sys.modules.get("ray")
    return ray.get_runtime_context().gcs_address if ray is not None and ray.is_initialized() else None


def _shared(there: str, target: Head | str) -> Iterator[ModuleType]:
    """Use this process's existing connection and do not change it. Raises RayError if it is to another head."""
    global _users
    address = target.address if isinstance(target, Head) else target
    assert address is not None
    same = _users > 0 and address == _given
    if not same and (
        split(address)[1] != split(there)[1] or not (is_loopback(address) or split(address)[0] == split(there)[0])
    ):
        raise RayError(one_connection(there))
    if not same and _asks_for_token(there, None) is False:
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


def one_connection(there: str) -> str:
    return (
        f"this program is connected to Ray at {there} already, and Ray allows a process one connection: give that "
        "address (`ray_address`), or close what made it first"
    )


def _disconnect(ray: ModuleType) -> None:
    """Disconnect in bounded time: a head that does not answer must not delay the printed result."""
    if sys.is_finalizing():  # an engine was left open: Ray disconnects at exit, and no thread can start any more
        return
    closing = threading.Thread(target=ray.shutdown, name="ray.shutdown", daemon=True)
    closing.start()
    closing.join(2 * GRACE_S)
    if closing.is_alive():
        forget_shutdown_at_exit()  # it would wait again


def require_ray() -> None:
    spec = importlib.util.find_spec("ray")
    if spec is None or spec.origin is None:  # a folder named ray that is not a package has no origin
        raise RayError(f"Ray is not installed; {pip_install('ray')} installs it, or stay in local mode")


def import_ray(address: str, token_path: Path | None) -> ModuleType:
    """Import Ray with authentication on. Raises RayError if it was imported before with other settings."""
    # Results of tiles that are computed again may be errors that nobody fetches.
    os.environ["RAY_IGNORE_UNHANDLED_ERRORS"] = "1"
    # After this time without its head, Ray ends the process; the executor gives up earlier and keeps its snapshot.
    os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", "300")
    wanted, missing = _wanted(address, token_path), missing_variables(address, token_path)
    if missing and "ray" in sys.modules:
        raise RayError(imported_before(address, missing))
    os.environ.update(wanted)
    if token_path is not None:
        os.environ.pop("RAY_AUTH_TOKEN", None)  # it would override the file
    hook = sys.excepthook
    import ray

    sys.excepthook = hook  # Ray's own hook asks the head before it shows an error, and waits if it is gone
    # Ray prints the cluster's error messages to this program's standard output, for any log_to_driver, and has no
    # switch for it. The run reports an actor's death itself, and --json must be JSON.
    print_messages_with(_note_message)
    return ray


def _wanted(address: str, token_path: Path | None) -> dict[str, str]:
    """The environment that Ray needs when it is imported."""
    # Off loopback Ray must not think that this machine's address is 127.0.0.1, which it does on macOS by default.
    wanted = {"RAY_AUTH_MODE": "token", CLUSTER: "0" if is_loopback(address) else "1"}
    return wanted | ({} if token_path is None else {"RAY_AUTH_TOKEN_PATH": str(token_path)})


def missing_variables(address: str, token_path: Path | None) -> list[str]:
    missing = [name for name, value in _wanted(address, token_path).items() if os.environ.get(name) != value]
    return missing + (["RAY_AUTH_TOKEN"] if token_path is not None and "RAY_AUTH_TOKEN" in os.environ else [])


def imported_before(what: str, missing: list[str]) -> str:
    return (
        f"ray was imported before the connection to {what}, with other {', '.join(missing)}: load the model before "
        "anything imports ray, set these as they should be before it, or connect to a head with a token and give its "
        "address"
    )


def _job(ray: ModuleType, metadata: Mapping[str, str]) -> Any:
    """The job's configuration: its workers import the same modules as this process, in any current folder.

    Ray puts the current folder first on its workers' paths, so a torch.py there would hide torch; jobs of Ray's client
    do not get it. A checkout that is only on this process's path is added to theirs.
    """
    root = str(Path(__file__).parents[2])
    installed = root in (*site.getsitepackages(), site.getusersitepackages())
    return job_config(ray, dict(metadata), [] if installed else [root])


def _note_message(data: dict[str, Any], ignore_prefix: bool) -> None:
    logging.getLogger("xlstm_ray.ray").info("%s", " ".join(data["lines"]))


def _probe(address: str, token: str | None) -> None:
    """Refuse at once where Ray would wait: a dead address, a wrong token, a head without authentication."""
    host, port = split(address)
    try:
        socket.create_connection((host, port), timeout=PROBE_S).close()
    except OSError as error:
        raise RayError(
            f"nothing answers at `ray_address` {address} ({error.strerror or error}): "
            "start a head with `xlstm-ray up`, or see `xlstm-ray status` for the right address"
        ) from None
    if _asks_for_token(address, None) is False:
        raise RayError(
            f"the head at {address} lets anybody in: stop it, and start it with RAY_AUTH_MODE=token and a token"
        )
    if token is None:
        raise RayError(f"the head at {address} asks for a token: say where it is with `ray_token_path`")
    if _asks_for_token(address, token):
        raise RayError(
            f"the head at {address} refuses the token: `ray_token_path` must name the file it was started with"
        )


def _asks_for_token(address: str, token: str | None) -> bool:
    """Whether the head refuses this token. Raises RayError if no Ray head answers."""
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
    """The token for somebody's head, from the places where Ray itself looks. None if there is none."""
    if token_path is None:
        if "RAY_AUTH_TOKEN" in os.environ:
            return os.environ["RAY_AUTH_TOKEN"].strip()
        given = os.environ.get("RAY_AUTH_TOKEN_PATH")
        try:
            token_path = Path(given) if given else Path.home() / ".ray" / "auth_token"
        except RuntimeError:  # the user has no home directory, so no token there
            return None
        if not token_path.exists():
            return None
    try:
        return token_path.read_text().strip()
    except OSError as error:
        raise RayError(f"the token file {token_path} cannot be read: {error.strerror}") from None


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
