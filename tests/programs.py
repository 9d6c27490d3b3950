"""Programs of ours in processes of their own, quickly: `Popen` and `run` as those of `subprocess`.

An import of torch takes two seconds of a core, one of its compiler two more, and hundreds of tests start a program. So
one process does the imports (tests/zygote.py), and programs are forks of it. Everything else is a process's own: pid,
signals, files, folder, environment, exit code. Tests of what forks share (imports, start-up, resident memory) use
`subprocess`. A program with other variables that libraries read when they are imported is started as usual, and so are
all of them where the environment has TESTS_WARM=0.
"""

import inspect
import json
import os
import re
import select
import shlex
import socket
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

PROGRAM = Path(sys.executable).with_name("xlstm-ray")
WARM = sys.platform == "linux" and os.environ.get("TESTS_WARM") != "0"
AT_START = dict(os.environ)
STARTS = [AT_START]  # the environments of the processes that programs are forked from
CHECKOUT = "PYTHONPATH", str(Path(__file__).parents[1])  # a fork imports from there too
ZYGOTES: list[subprocess.Popen] = []  # kept, or Python would say that they still run
# Variables that nothing reads before the fork.
FREE = re.compile(
    r"HOME|PATH|COLUMNS|PYTHONUNBUFFERED|TORCHINDUCTOR_CACHE_DIR|TORCHDYNAMO_DISABLE|"
    r"PYTORCH_ENABLE_MPS_FALLBACK|(XLSTM|XDG|HF|RAY|PYTEST)_\w+"
)


def forget_leftovers() -> dict[str, str | None]:
    """Give variables the values of the start that a program cannot be forked with, since libraries set such ones.

    Returns what they were.
    """
    now = dict(os.environ)
    left = {name: now.get(name) for name, _ in now.items() ^ AT_START.items() if not FREE.fullmatch(name)}
    for name in left:
        os.environ.pop(name, None)
    os.environ.update({name: AT_START[name] for name in left if name in AT_START})
    return left


def keep_warm(env: dict[str, str]) -> None:
    """Programs that have these variables are forks too, of a process that was started with them."""
    STARTS.append(env)


@cache
def zygote(start: int) -> socket.socket:
    """A socket to the process that forks programs, with STARTS[start]. The process ends with this one."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    command = [sys.executable, str(Path(__file__).with_name("zygote.py")), str(theirs.fileno())]
    files = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL}
    process = subprocess.Popen(command, env=STARTS[start], pass_fds=[theirs.fileno()], **files)  # type: ignore
    ZYGOTES.append(process)
    theirs.close()
    return ours


def start_of(env: dict[str, str]) -> int | None:
    """Which of STARTS a program with these variables can be forked from."""
    for start, there in enumerate(STARTS):
        if all(FREE.fullmatch(item[0]) or item == CHECKOUT for item in env.items() ^ there.items()):
            return start
    return None


def words_of(args: Any) -> list[str] | None:
    """What comes after `python` on a command line of a program that can be forked."""
    if isinstance(args, str | bytes):
        return None
    first, *rest = map(os.fsdecode, args)
    if first == sys.executable and rest and (rest[0] in ("-c", "-m") or rest[0].endswith(".py")):
        return rest
    return [first, *rest] if first == str(PROGRAM) else None


class Popen(subprocess.Popen):
    """`subprocess.Popen`, whose process may be a fork of the zygote."""

    _told: socket.socket | None = None  # where the fork that waits for the program tells of it

    def _execute_child(self, *given: Any, **named: Any) -> None:  # type: ignore[override]
        how = inspect.signature(subprocess.Popen._execute_child).bind(self, *given, **named).arguments  # type: ignore
        words = words_of(how["args"])
        env = {os.fsdecode(key): os.fsdecode(value) for key, value in (how["env"] or os.environ).items()}
        start = start_of(env)
        plain = not (how["preexec_fn"] or how["pass_fds"] or how["shell"] or how["executable"]) and how["close_fds"]
        if not WARM or words is None or start is None or not plain:
            super()._execute_child(*given, **named)  # type: ignore
            return
        request = {
            "words": words,
            "env": env,
            "cwd": os.path.abspath(how["cwd"] or "."),
            "session": how["start_new_session"],
        }
        asked = os.memfd_create("request")
        os.write(asked, json.dumps(request).encode())
        os.lseek(asked, 0, os.SEEK_SET)
        ends = [how[name] for name in ("p2cread", "c2pwrite", "errwrite")]
        standard = [place if end == -1 else end for place, end in enumerate(ends)]
        self._told, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        socket.send_fds(zygote(start), [b"x"], [theirs.fileno(), asked, *standard])
        theirs.close()
        os.close(asked)
        self.pid = int(self._told.recv(99))
        self._child_created = True
        pipes = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
        self._close_pipe_fds(*(how[name] for name in pipes))  # type: ignore

    def _try_wait(self, wait_flags: int) -> tuple[int, int]:
        if self._told is None:
            return super()._try_wait(wait_flags)  # type: ignore
        if wait_flags & os.WNOHANG and not select.select([self._told], [], [], 0)[0]:
            return 0, 0
        status = int(self._told.recv(99))
        self._told.close()
        return self.pid, status

    def _internal_poll(self, *given: Any, **named: Any) -> int | None:
        if self._told is None:
            return super()._internal_poll(*given, **named)  # type: ignore
        if self.returncode is None and self._waitpid_lock.acquire(False):  # type: ignore
            try:
                if self.returncode is None:
                    pid, status = self._try_wait(os.WNOHANG)
                    if pid:
                        self._handle_exitstatus(status)  # type: ignore
            finally:
                self._waitpid_lock.release()  # type: ignore
        return self.returncode


def run(
    args: Sequence[object],
    *,
    input: Any = None,
    capture_output: bool = False,
    timeout: float | None = None,
    check: bool = False,
    **how: Any,
) -> subprocess.CompletedProcess[Any]:
    """`subprocess.run`, by `Popen` of here."""
    if input is not None:
        how["stdin"] = subprocess.PIPE
    if capture_output:
        how["stdout"] = how["stderr"] = subprocess.PIPE
    with Popen(args, **how) as process:
        try:
            out, err = process.communicate(input, timeout=timeout)
        except BaseException:
            process.kill()
            raise
    done = subprocess.CompletedProcess(process.args, process.returncode, out, err)
    if check:
        done.check_returncode()
    return done


def run_line(line: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """A line that our program has printed, as a shell runs it: variables, and a command of ours."""
    words = shlex.split(line)
    while not words[0].startswith(PROGRAM.name):
        name, given, value = words.pop(0).partition("=")
        assert given, line
        env = {**env, name: value}
    return run([PROGRAM, *words[1:]], env=env, capture_output=True, text=True, timeout=120)
