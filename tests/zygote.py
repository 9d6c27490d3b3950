"""A process that has imported torch, its compiler and the command line, and forks programs (tests/programs.py).

    python zygote.py FD

It runs nothing itself: torch, where it is used first, starts its threads in the fork. A request comes over the socket
FD as five files: where to tell the program's pid and exit status, the request in JSON, and its standard files. Between
this process and the program is a fork that waits for it and tells.
"""

import atexit
import ctypes
import gc
import io
import json
import os
import runpy
import signal
import socket
import sys
from pathlib import Path
from types import ModuleType
from typing import Any


def serve(control: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """Returns in each program's process, with its request and its standard files."""
    while True:
        data, files, _, _ = socket.recv_fds(control, 1, 5)
        if not data:  # the tests have ended
            os._exit(0)
        if not os.fork():
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            control.close()
            told, asked, *standard = files
            with open(asked, "rb") as file:
                request = json.load(file)
            program = os.fork()
            if not program:
                os.close(told)
                return request, standard
            for file in standard:
                os.close(file)
            os.write(told, b"%d" % program)
            os.write(told, b"%d" % os.waitpid(program, 0)[1])
            os._exit(0)
        for file in files:
            os.close(file)


def become(request: dict[str, Any], standard: list[int]) -> None:
    """All that a new process has of its own."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if request["session"]:
        os.setsid()
    for place, file in enumerate(standard):
        os.dup2(file, place)
        os.close(file)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    buffered = not os.environ.get("PYTHONUNBUFFERED")
    for place, name in enumerate(("stdin", "stdout", "stderr")):  # as Python's own create_stdio
        old = getattr(sys, name)
        raw: Any = open(place, "wb" if place else "rb", buffering=-1 if buffered or not place else 0, closefd=False)
        lines = buffered and (raw.isatty() or place == 2)
        how = {"encoding": old.encoding, "errors": old.errors, "line_buffering": lines, "write_through": not buffered}
        file = io.TextIOWrapper(raw, **how)
        setattr(sys, name, file)
        setattr(sys, f"__{name}__", file)


def run(words: list[str]) -> None:
    """As Python does by these words, in this process."""
    sys.path[:0] = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    if words[0] == "-c":
        sys.argv, sys.path[:0] = ["-c", *words[2:]], [""]
        main = sys.modules["__main__"] = ModuleType("__main__")
        exec(compile(words[1], "<string>", "exec"), main.__dict__)
    elif words[0] == "-m":
        sys.argv, sys.path[:0] = words[1:], [os.getcwd()]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[:0] = words, [str(Path(words[0]).parent)]
        runpy.run_path(words[0], run_name="__main__")


def set_apart(shared: dict[str, ModuleType]) -> None:
    """At its end a program takes apart only the modules of its own: of those that it shares, that makes a copy."""
    for name in shared.keys() - {"sys", "builtins", "__main__"}:
        sys.modules.pop(name, None)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C on the tests' terminal ends them, and then this
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the forks that tell
    del sys.path[0]  # this folder
    shared: dict[str, ModuleType] = {}
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(shared))
    atexit.register(set_apart, shared)  # what is registered first is called last
    gc.disable()  # collections took a quarter of the imports
    import xlstm_ray.cli.app  # before torch, as everywhere
    import xlstm_ray.engine.engine
    import xlstm_ray.launch  # noqa: F401

    if os.environ.get("CXX") != "false":  # the fast tests compile nothing
        import torch._inductor.compile_fx  # noqa: F401
        from torch._inductor.codecache import CacheBase, torch_key

        torch_key(), CacheBase.get_system()  # torch keeps these, hashes of its files and Triton's: half a second

    shared.update(sys.modules)
    gc.freeze()  # or collections in the forks copy what they share
    gc.enable()
    request, standard = serve(socket.socket(fileno=int(sys.argv[1])))
    become(request, standard)
    run(request["words"])
