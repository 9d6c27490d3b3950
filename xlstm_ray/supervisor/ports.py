"""Ports and addresses of this machine, and who listens there."""

import socket

import psutil

from xlstm_ray.errors import RayError

LOOPBACK = "127.0.0.1"
DASHBOARD_PORT = 8265  # Ray's usual port; else the next free one, or any free one after a failed start
PROBE_S = 3.0


def require_loopback() -> None:
    try:
        with socket.create_server((LOOPBACK, 0)) as server:
            socket.create_connection(server.getsockname()[:2], timeout=PROBE_S).close()
    except OSError as error:
        raise RayError(
            f"this machine cannot reach itself at {LOOPBACK} ({error.strerror or error}), where all of Ray would "
            "listen: bring its loopback interface up (ip link set lo up)"
        ) from None


def is_free(port: int) -> bool:
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # else a port closed a minute ago looks busy
        try:
            server.bind((LOOPBACK, port))
        except OSError:
            return False
    return not port_answers(port)  # macOS allows binding although a listener is on all addresses


def port_answers(port: int) -> bool:
    with socket.socket() as client:
        client.settimeout(PROBE_S)
        return client.connect_ex((LOOPBACK, port)) == 0


def free_port(first: int | None = None) -> int:
    """`first` or the next free port after it; any free one without `first`."""
    if first is None:
        with socket.socket() as server:
            server.bind((LOOPBACK, 0))
            return server.getsockname()[1]
    return next(port for port in range(first, 65536) if is_free(port))


def listens(processes: list[psutil.Process], port: int) -> bool:
    """Whether one of these processes holds the port."""
    for process in processes:
        try:
            connections = process.net_connections("tcp")
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        if any(c.laddr and c.laddr.port == port and c.status == psutil.CONN_LISTEN for c in connections):
            return True
    return False


def split(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise RayError(f"`ray_address` {address}: give HOST:PORT, as `xlstm-ray up` and `xlstm-ray status` print it")
    return host.strip("[]"), int(port)


def is_loopback(address: str) -> bool:
    host = split(address)[0]
    return host in ("localhost", "::1") or host.startswith("127.")
