"""Whether a head is still there, seen from outside: Ray's own calls wait for minutes once it is gone."""

import socket
from time import monotonic

import psutil

from xlstm_ray.supervisor.ports import split

LOOK_S = 2.0  # between two looks
PATIENCE_S = 60.0  # as long as Ray itself waits for an unreachable head; networks come back


class Presence:
    """Of the head at this address. patience_s: a head that is silent for so long is gone."""

    def __init__(self, address: str, patience_s: float = PATIENCE_S):
        self.address, self._patience_s = address, patience_s
        self._silent: tuple[float, float] | None = None  # time of the first look without an answer, and of the last

    def gone(self) -> str | None:
        """Why the head is known to be gone; None while it may be there. Takes up to LOOK_S.

        It is known to be gone if this machine's kernel refuses a connection to one of its own addresses, or if it has
        been silent for the patience, look after look.
        """
        host, port = split(self.address)
        try:
            socket.create_connection((host, port), timeout=LOOK_S).close()
        except OSError as error:
            now = monotonic()
            if self._silent is None or now - self._silent[1] > 5 * LOOK_S:  # nobody looked in between
                self._silent = now, now
            since = self._silent[0]
            self._silent = since, now
            known = isinstance(error, ConnectionRefusedError) and _is_own(host)
            if known or now - since >= self._patience_s:
                return f"Ray's head at {self.address} is gone ({error.strerror or error})"
        else:
            self._silent = None
        return None


def _is_own(host: str) -> bool:
    return any(a.address == host for addresses in psutil.net_if_addrs().values() for a in addresses)
