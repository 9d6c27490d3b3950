"""The g++ of the tests (tests/compiler/g++) makes what the system's makes, with headers that it compiles once."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from caches import COMPILER

pytestmark = pytest.mark.skipif("TESTS_HEADERS" not in os.environ, reason="there is no g++, or it is not used here")

SOURCE = """#include <cmath>
#include <sstream>
#define kernel kernel_0
#include <cmath>
extern "C" void kernel(const float* x, float* y) {{ for (int n = 0; n < 999; n++) y[n] = std::exp(x[n]) * {factor}; }}
"""


def test_the_code_is_the_same_and_headers_are_compiled_once(tmp_path: Path) -> None:
    source, out, headers = tmp_path / "a.main.cpp", tmp_path / "a.main.so", tmp_path / "headers"
    ours, *others = subprocess.run(["which", "-a", "g++"], capture_output=True, text=True, check=True).stdout.split()
    assert Path(ours) == COMPILER
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / "g++").write_text(f'#!/bin/sh\nexec {shutil.which("g++")} "$@"\n')
    (tmp_path / "first" / "g++").chmod(0o755)
    before = f"{tmp_path / 'first'}{os.pathsep}{os.environ['PATH']}"  # a third one, as some tests have

    def compiled(compiler: str, flag: str = "-O3", path: str = os.environ["PATH"]) -> tuple[int, bytes, str]:
        out.unlink(missing_ok=True)
        words = [compiler, str(source), flag, "-shared", "-fPIC", "-H", "-march=native", "-o", str(out)]
        words += ["-lgomp", f"-L{tmp_path}", f"-Wl,-rpath={tmp_path}"]
        env = {**os.environ, "PATH": path, "TESTS_HEADERS": str(headers)}
        done = subprocess.run(words, capture_output=True, text=True, env=env, timeout=120)
        return done.returncode, out.read_bytes() if out.exists() else b"", done.stderr

    found = []
    for factor in ("0.5f", "0.25f"):
        source.write_text(SOURCE.format(factor=factor))
        want = compiled(next(place for place in others if Path(place) != COMPILER))
        for path in (os.environ["PATH"], before):
            code, made, said = compiled("g++", path=path)
            assert (code, made) == want[:2]
            (header,) = headers.glob("*/all.h.gch")
            assert f"! {header}" in said  # -H: it was read
        found.append(made)
    assert found[0] != found[1]
    assert compiled("g++", "-O1")[1] not in (b"", *found)
    assert len(list(headers.glob("*/all.h.gch"))) == 2
    source.write_text(SOURCE.format(factor="nothing"))
    code, _, said = compiled("g++")
    assert code == 1
    assert "error: " in said
