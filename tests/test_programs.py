"""Programs that are forks of one process (tests/programs.py) do as those that Python starts, and are so far apart."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import programs
import psutil
import pytest
from programs import PROGRAM

pytestmark = pytest.mark.skipif(not programs.WARM, reason="all programs are started as usual here")

FACTS = """
import json, os, signal, sys
print(json.dumps({
    "argv": sys.argv, "path": sys.path, "cwd": os.getcwd(), "env": dict(os.environ), "name": __name__,
    "session": os.getsid(0) == os.getpid(), "files": sorted(os.listdir("/proc/self/fd"))[:-1],
    "streams": [(f.fileno(), f.encoding, f.errors, f.line_buffering, f.write_through, f.isatty())
        for f in (sys.stdin, sys.stdout, sys.stderr)],
    "handlers": {s.name: str(signal.getsignal(s)).partition(" at ")[0] for s in signal.Signals},
    "masked": str(signal.pthread_sigmask(signal.SIG_BLOCK, [])), "read": sys.stdin.read(),
}))
print("an error, \\u00e4", file=sys.stderr)
sys.exit(7)
"""


def both(args: list[Any], **how: Any) -> list[subprocess.CompletedProcess[str]]:
    """Started by Python, and as a fork."""
    return [run(args, capture_output=True, text=True, timeout=60, **how) for run in (subprocess.run, programs.run)]


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("form", ["-c", "a file"])
def test_a_fork_has_what_a_new_process_has(form: str, unbuffered: str, tmp_path: Path) -> None:
    (tmp_path / "facts.py").write_text(FACTS)
    words = ["-c", FACTS] if form == "-c" else [str(tmp_path / "facts.py")]
    variables = {"HOME": str(tmp_path), "PYTHONUNBUFFERED": unbuffered, "PYTHONPATH": programs.CHECKOUT[1]}
    env = {**os.environ, **variables}
    how = {"input": "some text", "cwd": tmp_path, "env": env, "start_new_session": True}
    started, forked = both([sys.executable, *words, "two words", "\u00e4"], **how)
    assert json.loads(forked.stdout) == json.loads(started.stdout)
    assert (started.returncode, started.stderr) == (forked.returncode, forked.stderr) == (7, "an error, \u00e4\n")


@pytest.mark.parametrize(
    "args",
    [
        [PROGRAM, "--version"],
        [PROGRAM, "prefill", "--prompt", "a", "--tile-size", "0"],
        [PROGRAM, "nope"],
        [sys.executable, "-m", "xlstm_ray", "config", "--json"],
        [
            sys.executable,
            "-c",
            "import os, sys; sys.stdout.write('said'); import atexit; atexit.register(print, 'end')",
        ],
        [sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGTERM)"],
        [sys.executable, "-c", "import os; print('lost'); os._exit(3)"],
    ],
    ids=lambda args: " ".join(map(str, args[1:3])),
)
def test_output_and_exit_code_are_the_same(args: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONUNBUFFERED", "")
    started, forked = both(args)
    assert (forked.returncode, forked.stdout, forked.stderr) == (started.returncode, started.stdout, started.stderr)


def test_signals_arrive_and_what_is_told_of_the_process_is_right() -> None:
    args = [sys.executable, "-c", "print('ready', flush=True)\ntry: input()\nexcept KeyboardInterrupt: exit(5)"]
    for number, code in ((signal.SIGINT, 5), (signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, -signal.SIGTERM)):
        with programs.Popen(args, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            assert process.poll() is None
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(0.01)
            assert psutil.Process(process.pid).is_running()
            process.send_signal(number)
            assert process.wait(60) == process.poll() == code
        assert not psutil.pid_exists(process.pid)


def test_a_fork_comes_with_torch_and_with_nothing_that_reads_its_own_variables() -> None:
    code = "import sys; print(*sorted({'torch', 'numpy', 'torch._inductor.graph', %r} & set(sys.modules)))"
    for name in ("huggingface_hub", "grpc", "ray", "rich", "transformers"):
        done = programs.run([sys.executable, "-c", code % name], capture_output=True, text=True, check=True)
        assert done.stdout == "numpy torch torch._inductor.graph\n"


def test_torch_reads_its_variables_in_the_fork(tmp_path: Path) -> None:
    code = "import torch, torch._inductor.runtime.cache_dir_utils as c; print(c.cache_dir()); f = lambda x: x; "
    code += "print(torch.compile(f, fullgraph=True)(torch.ones(2)).sum().item(), torch._dynamo.utils.counters['stats'])"
    for switch, graphs in (("", "'unique_graphs': 1"), ("1", "Counter()")):
        env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "TORCHDYNAMO_DISABLE": switch}
        done = programs.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
        assert done.stdout.startswith(f"{tmp_path}\n2.0 Counter(")
        assert graphs in done.stdout


def test_what_a_program_made_is_taken_apart_at_its_end() -> None:
    code = "import atexit\nclass A:\n  def __del__(self): print('freed')\na = A(); atexit.register(print, 'at exit')"
    done = programs.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "at exit\nfreed\n"


def test_what_a_library_sets_ends_with_its_test(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_LIBRARYS_OWN", "1")
    monkeypatch.delenv("OMP_WAIT_POLICY")
    monkeypatch.setenv("XLSTM_TILE_SIZE", "8")
    assert programs.forget_leftovers() == {"A_LIBRARYS_OWN": "1", "OMP_WAIT_POLICY": None}
    assert "A_LIBRARYS_OWN" not in os.environ
    assert os.environ["OMP_WAIT_POLICY"] == programs.AT_START["OMP_WAIT_POLICY"]
    assert os.environ["XLSTM_TILE_SIZE"] == "8"


def test_other_variables_of_libraries_start_a_process_as_usual() -> None:
    code = "import sys; print('torch' in sys.modules)"
    for name in ("OMP_NUM_THREADS", "TORCH_LOGS", "PYTHONPATH", "LD_PRELOAD", "TMPDIR", "LC_ALL"):
        env = {**os.environ, name: ""}
        done = programs.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
        assert done.stdout == "False\n", name


def test_they_are_forks_too_where_a_process_with_them_is_kept() -> None:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    programs.keep_warm(env)
    code = "import os, sys; print('torch' in sys.modules, os.environ['OMP_NUM_THREADS']); "
    args = [sys.executable, "-c", code + "import torch; print(torch.get_num_threads())"]
    for more in ({}, {"HOME": "/nowhere"}):
        done = programs.run(args, capture_output=True, text=True, env={**env, **more})
        assert done.stdout == "True 1\n1\n", done.stderr
