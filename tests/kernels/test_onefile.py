"""All C++ kernels of a graph in one file, in a process of its own with an empty cache; torch says what is right."""

import os
import shutil
import sys
import textwrap
from pathlib import Path

import programs

PROGRAM = """
    import os
    import sys
    import threading

    import torch
    from torch._inductor import config

    from xlstm_ray.errors import KernelError
    from xlstm_ray.kernels.compiled import compile_strict
    from xlstm_ray.kernels.onefile import ahead

    def around(x, w):  # a kernel before the product, and one after it
        return (x.sin() @ w).cos()

    def tried(rows, pending=None):
        x, w = torch.randn(rows, 32), torch.randn(32, 16)
        compiled = compile_strict(around, f"around_{rows}")
        if pending is not None:
            with ahead(pending):
                compiled(x, w)
            assert len(pending) == 1
            again = threading.Thread(target=lambda: torch.testing.assert_close(compiled(x, w), around(x, w)))
            again.start()  # a thread that is not ahead waits
            again.join()
            pending.pop().wait()
        torch.testing.assert_close(compiled(x, w), around(x, w))

    tried(8)
    tried(24, [] if "ahead" in sys.argv else None)
    print("right")
    if "broken" in sys.argv:
        os.environ["PYTEST_BROKEN"] = "yes"
        pending = []
        try:  # the compiler may have failed before the first kernel is called, or after it
            with ahead(pending):
                compile_strict(around, "broken")(torch.randn(40, 32), torch.randn(32, 16))
            pending.pop().wait()
        except KernelError as err:
            print(err)
"""
COMPILER = """#!/bin/sh
case "$PYTEST_BROKEN $*" in
  yes*main.cpp*) echo "kernel.cpp:1:1: error: no such luck" >&2; exit 1 ;;
esac
exec {compiler} "$@"
"""


def test_a_graph_is_one_file_that_is_found_again_and_may_come_later(tmp_path):
    compiler, cache = tmp_path / "bin" / "g++", tmp_path / "cache"
    compiler.parent.mkdir()
    compiler.write_text(COMPILER.format(compiler=shutil.which("g++")))
    compiler.chmod(0o755)

    def run(*words: str, broken: str = "", cache: Path = cache, **more: str) -> list[str]:
        command = [sys.executable, "-c", textwrap.dedent(PROGRAM), *words]
        path = f"{compiler.parent}:{os.environ['PATH']}"
        env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache), "PATH": path, "PYTEST_BROKEN": broken, **more}
        env.pop("CXX", None)
        done = programs.run(command, capture_output=True, text=True, timeout=300, env=env)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    right, said = run("ahead", "broken")
    assert right == "right"
    shapes = "(40, 32) float32, (32, 16) float32 on cpu"
    assert said.startswith(f"kernel broken does not compile for {shapes}: CppCompileError:")
    assert "error: no such luck" in said
    assert len(list(cache.rglob("*.main.so"))) == 2  # two graphs, each of two kernels
    assert run(broken="yes") == ["right"]  # with a compiler that compiles nothing
    alone = {"TORCHINDUCTOR_COMPILE_THREADS": "1"}  # as in actors: nothing compiles beside the caller
    assert run(cache=tmp_path / "another", **alone) == ["right"]
