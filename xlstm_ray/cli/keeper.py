"""The parent process of a run on Ray: if Ray kills the run, the parent saves the last snapshot and reports the end.

Ray kills a process whose raylet is gone, in the middle of any call and without a message. So the command line starts a
run on Ray in a child process. After every snapshot, the child tells its parent where it is, with a text for people; at
its end it sends a last message. If that message does not come, the parent moves the last snapshot to its place.

The terminal's signals go to both processes. The child ignores SIGINT and SIGHUP; the parent passes each on once.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

from xlstm_ray.errors import GridLost

LAST_S = 15.0  # time that a run has to end after its last message
PASSED_ON = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
RAY_GONE = "Ray ended this run's process: its head, or this machine's raylet, is gone"

current: "Run | None" = None  # in the run's process: the connection to the parent

_RUN = """
import sys
_, path, handle, *sys.argv = sys.argv
sys.path.insert(0, path)
from xlstm_ray.cli import keeper
from xlstm_ray.cli.app import main
with keeper.run(int(handle)):
    main()
"""


def start() -> int:
    """Run this command again as a child process; returns its exit code.

    Raises GridLost if the child ended without its last message; the error says what is kept and how to resume.
    """
    ours, theirs = socket.socketpair()
    with ours, theirs:
        child = subprocess.Popen(
            [sys.executable, "-P", "-c", _RUN, str(Path(__file__).parents[2]), str(theirs.fileno()), *sys.argv],
            pass_fds=[theirs.fileno()],
        )
        theirs.close()

        def pass_on(number: int, _frame: object) -> None:
            with suppress(OSError):  # it has ended already
                ours.send(bytes([number]))

        before = {n: signal.signal(n, pass_on) for n in PASSED_ON if signal.getsignal(n) is not signal.SIG_IGN}
        try:
            return _watch(child, ours)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _watch(child: "subprocess.Popen[bytes]", ours: socket.socket) -> int:
    kept: dict[str, Any] = {}
    with ours.makefile("rb") as lines, suppress(ConnectionResetError):  # it was killed before it had read a signal
        for line in lines:
            said = json.loads(line)
            if "code" in said:
                try:
                    code = child.wait(LAST_S)
                except subprocess.TimeoutExpired:  # its result is printed, but Ray does not let it end
                    child.kill()
                    child.wait()
                    return said["code"]
                return code if code >= 0 else 128 - code
            kept = said
    code = child.wait()
    text = kept.get("text", "nothing was kept yet")
    if kept.get("held"):
        text = _moved(Path(kept["held"]), Path(kept["place"]), text)
    lost = GridLost(f"{RAY_GONE}; {text}")
    if code in (-signal.SIGKILL, -signal.SIGTERM):
        lost = GridLost(f"this run's process was killed ({signal.Signals(-code).name}); {text}")
        lost.exit_code = 128 - code
    raise lost


def _moved(held: Path, place: Path, text: str) -> str:
    """Move a snapshot to its place; returns the text, and where the snapshot is if it cannot be moved."""
    try:
        os.replace(held, place)
    except FileNotFoundError:  # the run moved it just before it was killed
        return text
    except OSError as error:
        return f"{text}\n{place}: cannot be written ({error.strerror}); the state is in {held}"
    return text


class Run:
    """The run's side."""

    def __init__(self, parent: socket.socket):
        self._parent = parent
        self._signals: deque[int] = deque()
        self._held: Path | None = None
        self._last: tuple[str, Path | None] | None = None  # of the last snapshot: its text, and its place if it is held
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGHUP})  # the parent sends each once
        signal.signal(signal.SIGUSR1, self._handle)
        threading.Thread(target=self._listen, name="keeper", daemon=True).start()

    def hold(self, place: Path) -> Path:
        """A file for snapshots in the directory of `place`; the parent moves it there if this process is killed."""
        self._held = place.with_name(f".{place.name}.{os.getpid()}.kept")
        return self._held

    def kept(self, text: str, place: Path | None) -> None:
        """Report a snapshot, in the file that `hold` gave for `place` if one is given; the text is for people."""
        self._last = text, place
        self._say({"text": text, "held": str(self._held) if place else None, "place": str(place)})

    def settle(self) -> None:
        """Note that the run's state is where it belongs, so that no snapshot is needed any more."""
        self._last = None

    def put_in_place(self) -> str | None:
        """Move the last snapshot to its place, unless none is needed; returns its text."""
        if self._last is None:
            return None
        (text, place), self._last = self._last, None
        if place is None or self._held is None:
            return text
        held, self._held = self._held, None
        return _moved(held, place, text)

    def ended(self, code: int) -> None:
        """Send the last message."""
        if self._held is not None:
            self._held.unlink(missing_ok=True)
        self._say({"code": code})

    def _say(self, message: dict[str, Any]) -> None:
        self._parent.sendall(json.dumps(message).encode() + b"\n")

    def _listen(self) -> NoReturn:
        main = threading.main_thread().ident
        assert main is not None
        while numbers := self._parent.recv(16):
            self._signals.extend(numbers)
            signal.pthread_kill(main, signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGKILL)  # the parent was killed, so the run ends in the same way
        raise AssertionError

    def _handle(self, _number: int, frame: Any) -> None:
        while self._signals:
            number = self._signals.popleft()
            handler = signal.getsignal(number)
            if callable(handler):
                handler(number, frame)
            elif handler is not signal.SIG_IGN:
                os._exit(128 + number)


@contextmanager
def run(handle: int) -> Iterator[None]:
    """In the run's process: the `with` block is the run."""
    global current
    os.set_inheritable(handle, False)
    current = Run(socket.socket(fileno=handle))
    code = 1
    try:
        yield
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else int(left.code is not None)
        raise
    finally:
        current.ended(code)
