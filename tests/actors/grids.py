"""Helpers for tests on real Ray: sizes, a prompt, programs in their own processes, fixtures.

Kernels run as plain torch where a test is not about them: an actor that compiles takes twice as long to be there.
test_grid.py has compiled ones.
"""

import json
import os
import subprocess
import sys
import textwrap
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import programs
import psutil
import pytest
import torch
from slstm import CASES, write_model
from tiny import make_model

import xlstm_ray
from xlstm_ray import PrefillResult, RecurrentState
from xlstm_ray.supervisor.records import Head
from xlstm_ray.supervisor.start import HeadOptions, start_head
from xlstm_ray.supervisor.stop import stop_head

ROOT = Path(xlstm_ray.__file__).parents[1]
TILE, CHUNK = 16, 16  # those of tests/model/test_slstm.py: what is compiled there is found by the compiled grid
SIZES = ["--device", "cpu", "--threads", "1", "--tile-size", str(TILE), "--chunk-size", str(CHUNK)]
PROMPT = "".join(chr(97 + i * i % 26) for i in range(47 * TILE))  # a byte is a token; whole tiles: one shape to compile


EAGER = {"TORCHDYNAMO_DISABLE": "1"}  # torch's own variable: torch.compile gives the function as it is


def environment(home: Path) -> dict[str, str]:
    return {**os.environ, **EAGER, "HOME": str(home), "PYTHONPATH": str(ROOT), "XLSTM_RAY_LOCAL_MODE": "0"}


@contextmanager
def as_in_actors() -> Iterator[None]:
    """For what is computed or started in this process: kernels as plain torch, if they are so in actors."""

    with pytest.MonkeyPatch.context() as patch:
        for name, value in EAGER.items():
            patch.setenv(name, value)
        yield


def script(home: Path, text: str, *arguments: object) -> list[Any]:
    """Run a text as a Python program; returns the JSON lines that it prints."""
    done = programs.run(
        [sys.executable, "-c", textwrap.dedent(text), *map(str, arguments)],
        env=environment(home),
        stdout=subprocess.PIPE,
        text=True,
        timeout=240,
        check=True,
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


def program(*words: object) -> list[str]:
    return [sys.executable, "-c", "from xlstm_ray.cli.app import main; main()", *map(str, words)]


def command(home: Path, *words: object, input: str | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
    env = environment(home) | variables
    return programs.run(program(*words), env=env, input=input, capture_output=True, text=True, timeout=240)


def after_tiles(
    tiles: int, act: Callable[[subprocess.Popen[str]], object], home: Path, *words: object, **variables: object
) -> subprocess.CompletedProcess[str]:
    """Run the program, and call `act` with its process after this many tiles. stderr comes without the progress.

    The run stands still during `act`: it may be at its end before the act is.
    """
    run = programs.Popen(
        program(*words, "--progress", "ndjson"),
        env=environment(home) | {name: str(value) for name, value in variables.items()},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert run.stdout is not None
    assert run.stderr is not None
    said, acted = [], False
    for line in run.stderr:
        if not line.startswith("{"):
            said.append(line)
        elif not acted and json.loads(line).get("tiles_done", 0) >= tiles:
            (work,) = psutil.Process(run.pid).children()
            work.suspend()
            act(run)
            work.resume()
            acted = True
    out = run.stdout.read()
    code = run.wait(120)
    assert acted, said
    return subprocess.CompletedProcess(run.args, code, out, "".join(said))


def asked(url: str, head: Head | None = None) -> str:
    """What this address answers, with the head's token if it is given."""
    request = urllib.request.Request(url)
    if head is not None:
        request.add_header("Authorization", f"Bearer {head.token_path.read_text()}")
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=20) as answer:
        return answer.read().decode()


def resumed(model: Path, state: RecurrentState, **more: Any) -> PrefillResult:
    """The rest of PROMPT after this state, in this process with one thread, as in actors."""
    sizes = {"threads": 1, "workers": 1, "tile_size": TILE, "chunk_size": CHUNK}
    with as_in_actors(), xlstm_ray.load(model, device="cpu", **sizes, **more) as lm:
        result = lm.prefill(PROMPT, state=state)
    torch.set_num_threads(os.cpu_count() or 1)
    return result


def scores_of(scores: Any) -> list[Any]:
    """As JSON has them."""
    return json.loads(json.dumps([made and [made.logprob, made.likeliest] for made in scores]))


ANSWERS = """
from xlstm_ray.engine.request import Request
from xlstm_ray.sampling import Sampling

COLD, WARM = {"temperature": 0.8, "seed": 3}, {"temperature": 1.1, "top_k": 20, "top_p": 0.9, "seed": 4}
DRAWN = COLD, WARM, {}, {"min_tokens": 5}
SHAPED = {"repetition_penalty": 1.3, "logit_bias": {5: 2.0}}, {"temperature": 0.7, "seed": 5, "logprobs": 2}

def answers(lm, prompt, given):
    asked = [Sampling(max_new_tokens=9 + 5 * n, **each) for n, each in enumerate(given)]
    handles = [lm.submit(Request(prompt[n:90], sampling=each, keep=n != 2)) for n, each in enumerate(asked)]
    ends = [handle.result(240) for handle in handles]
    return [[end.tokens, end.state and end.state.digest()] for end in ends]

def all_answers(lm, prompt):
    return [answers(lm, prompt, given) for given in (DRAWN, SHAPED, (COLD, WARM, *SHAPED))]
"""


# The beginning of a script: a grid whose faults are found within seconds. CHAOS has the number of kills as an argument.
GRID = """
    import dataclasses, json, os, random, signal, sys, threading, time
    import torch
    import xlstm_ray
    from xlstm_ray.engine.request import Request

    def say(**row): print(json.dumps(row), flush=True)
    model, address, stages, heads, prompt = sys.argv[1:6]
    lm = xlstm_ray.load(model, chunkwise_backend="ray_compiled_chunks", ray_address=address, stages=int(stages),
        heads_per_band=int(heads), device="cpu", threads=1, tile_size=16, chunk_size=16, journal_every=3)
    executor = lm.executor
    def options(**changes):
        for part in (executor.placement, executor.recovery):
            part.options = dataclasses.replace(part.options, **changes)
    options(least_deadline_s=4.0, answer_timeout_s=2.0)
"""
CHAOS = """
    # Actors are killed at random moments, each time after some progress.
    stop, progress, killed, rounds = threading.Event(), threading.Event(), [], []
    kills = int(sys.argv[6])
    def killer():
        while len(killed) < kills and not stop.is_set():
            if progress.wait(0.05):
                time.sleep(random.uniform(0, 0.3))
                process = random.choice([s.process for s in executor.placement.seats])
                if process is not None and process.pid not in killed and process.is_running():  # a zombie runs, too
                    process.kill()
                    killed.append(process.pid)
                    progress.clear()
    threading.Thread(target=killer, daemon=True).start()
    digests = set()
    while len(killed) < kills and len(rounds) < 20:  # the prompt again and again: as long as it takes
        rounds.append(1)
        digests.add(lm.prefill(prompt, on_progress=lambda p: progress.set()).state.digest())
    digests.add(lm.prefill(prompt).state.digest())  # the last kill may have come between two prefills
    say(chaos=sorted(digests), killed=len(killed), chaos_restarts=executor.restarts)
    stop.set()
"""


class InProcess(dict[int, dict[str, Any]]):
    """By heads a band: the queued backend's results, computed on first use, for one thread like actors."""

    def __init__(self, models: dict[int, Path]):
        self.models = models

    def __missing__(self, heads: int) -> dict[str, Any]:
        with as_in_actors():
            return self._compute(heads)

    def _compute(self, heads: int) -> dict[str, Any]:
        torch.set_num_threads(1)  # this thread's too: it computes the logits
        sizes = {"threads": 1, "workers": 1, "tile_size": TILE, "chunk_size": CHUNK}
        lm = xlstm_ray.load(self.models[heads], device="cpu", heads_per_band=heads, **sizes)
        result = lm.prefill(PROMPT)
        found = {"digest": result.state.digest(), "tensors": result.state.tensors}
        generation = lm.generate(PROMPT[:96], max_new_tokens=9)
        found |= {"text": "".join(generation), "after": generation.state().digest()}
        found["all"] = torch.cat(lm.prefill(PROMPT[:96], all_logits=True).all_logits).double().sum().item()
        found["scores"] = scores_of(lm.prefill(PROMPT[:96], prompt_logprobs=2).prompt_logprobs[0])
        other = lm.generate(PROMPT[3:64], max_new_tokens=9)
        found |= {"other": "".join(other), "other_after": other.state().digest()}
        found["kept"] = lm.prefill(PROMPT[:96]).state.digest()
        if heads == 4:
            code: dict[str, Any] = {}
            exec(ANSWERS, code)
            lm.serve(slots=4, buckets=(4,))
            found["mixed"] = code["all_answers"](lm, PROMPT)
            found["batch"] = lm.prefill([PROMPT[:77], PROMPT[:320]]).state.digest()
        torch.set_num_threads(os.cpu_count() or 1)
        self[heads] = found
        return found


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four heads and three blocks, so that two stages are unequal. The blocks have the hybrid's sizes."""
    directory = tmp_path_factory.mktemp("model")
    make_model(directory, seed=5, hidden_size=64, ffn_proj_factor=2.0, ffn_round_up_to_multiple_of=8)
    return directory


@pytest.fixture(scope="module")
def models(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """By heads a band: the model, and one with an sLSTM block, whose bands of three heads are unequal."""
    return {4: model, 3: write_model(tmp_path_factory.mktemp("hybrid"), **CASES["hybrid"])}


@pytest.fixture(scope="module")
def in_process(models: dict[int, Path]) -> InProcess:
    return InProcess(models)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def head(home: Path) -> Iterator[Head]:
    """A head with room for eight actors of one thread, however few cores there are."""
    state_dir = home / ".local" / "state" / "xlstm-ray"
    options = HeadOptions(state_dir=state_dir, num_cpus=8, object_store_bytes=100 << 20)
    with as_in_actors():  # they have the head's environment
        started = start_head(options)
    yield started
    stop_head(started, state_dir)
