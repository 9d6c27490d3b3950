"""The grid on real Ray: same bits as in process, faults with real signals, journals, a node that is lost.

Nothing here connects in pytest's own process: Ray fixes its authentication at import, for every test file. Scripts run
beside a head of ours and print a JSON line for each thing they saw.
"""

import importlib.util
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections import ChainMap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from containers import container, needs_containers
from safetensors.torch import load_file
from slstm import CASES, write_model
from tiny import make_model

import xlstm_ray
from xlstm_ray import RecurrentState
from xlstm_ray.actors.shard import BandActor, WorkerSpec
from xlstm_ray.choose import share_of_cpus
from xlstm_ray.config import ModelConfig
from xlstm_ray.errors import CheckpointError, StateError, UsageError
from xlstm_ray.layout import Band
from xlstm_ray.supervisor.records import Head, all_heads, session_of
from xlstm_ray.supervisor.start import HeadOptions, start_head
from xlstm_ray.supervisor.stop import down, stop_head

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None and os.environ.get("CI") != "true", reason="Ray is not installed"
)
ROOT = Path(xlstm_ray.__file__).parents[1]
TILE, CHUNK = 32, 16
SIZES = ["--device", "cpu", "--threads", "1", "--tile-size", str(TILE), "--chunk-size", str(CHUNK)]
PROMPT = "".join(chr(97 + i * i % 26) for i in range(47 * TILE))  # a byte is a token; whole tiles: one shape to compile


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four heads, three blocks: two stages leave unequal parts."""
    directory = tmp_path_factory.mktemp("model")
    make_model(directory, seed=5, hidden_size=64, num_hidden_layers=3)
    return directory


@pytest.fixture(scope="module")
def models(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """By heads a band: the model, and one with an sLSTM block, which bands of three heads cut unequally."""
    return {4: model, 3: write_model(tmp_path_factory.mktemp("hybrid"), **CASES["hybrid"])}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def head(home: Path) -> Iterator[Head]:
    """A head with room for eight actors of one thread, however few cores there are."""
    state_dir = home / ".local" / "state" / "xlstm-ray"
    options = HeadOptions(state_dir=state_dir, stays=True, num_cpus=8, object_store_bytes=100 << 20)
    started = start_head(options)
    yield started
    stop_head(started, state_dir)


def environment(home: Path) -> dict[str, str]:
    return {**os.environ, "HOME": str(home), "PYTHONPATH": str(ROOT), "XLSTM_RAY_LOCAL_MODE": "0"}


def script(home: Path, text: str, *arguments: object) -> list[Any]:
    """What a fresh Python says: the JSON lines that it prints."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(text), *map(str, arguments)],
        env=environment(home),
        stdout=subprocess.PIPE,
        text=True,
        timeout=240,
        check=True,
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


def command(home: Path, *words: object) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, "-c", "from xlstm_ray.cli.app import main; main()", *map(str, words)]
    return subprocess.run(program, env=environment(home), capture_output=True, text=True, timeout=240)


@pytest.fixture(scope="module")
def in_process(models: dict[int, Path]) -> dict[int, dict[str, Any]]:
    """The queued backend's results by heads a band, compiled with one thread as the actors are."""
    found = {}
    for heads, model in models.items():
        lm = xlstm_ray.load(
            model, device="cpu", threads=1, workers=1, tile_size=TILE, chunk_size=CHUNK, heads_per_band=heads
        )
        result = lm.prefill(PROMPT)
        found[heads] = {"digest": result.state.digest(), "tensors": result.state.tensors}
        generation = lm.generate(PROMPT[:96], max_new_tokens=9)
        found[heads] |= {"text": "".join(generation), "after": generation.state().digest()}
        found[heads]["all"] = torch.cat(lm.prefill(PROMPT[:96], all_logits=True).all_logits).double().sum().item()
        if heads == 4:
            found[heads]["batch"] = lm.prefill([PROMPT[:77], PROMPT[:320]]).state.digest()
    torch.set_num_threads(os.cpu_count() or 1)
    return found


GRID = """
    import dataclasses, json, os, random, signal, sys, threading, time
    import torch
    import xlstm_ray
    from xlstm_ray.errors import XlstmRayError

    def say(**row): print(json.dumps(row), flush=True)
    model, address, stages, heads, prompt = sys.argv[1:6]
    all_faults = heads == "4"
    lm = xlstm_ray.load(model, chunkwise_backend="ray_compiled_chunks", ray_address=address, stages=int(stages),
        heads_per_band=int(heads), device="cpu", threads=1, tile_size=32, chunk_size=16, journal_every=3)
    executor = lm.executor
    def options(**changes):
        for part in (executor.placement, executor.recovery):
            part.options = dataclasses.replace(part.options, **changes)
    options(least_deadline_s=4.0, answer_timeout_s=2.0)
"""


# -- without Ray -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("heads", [4, 3])
def test_local_mode_needs_no_ray_and_gives_the_queued_backends_bits(heads, models, in_process, tmp_path):
    (found,) = script(
        tmp_path,
        """
        import json, os, sys
        os.environ.pop("XLSTM_RAY_LOCAL_MODE")
        sys.modules["ray"] = None  # an import of it would raise
        import xlstm_ray
        model, heads, prompt = sys.argv[1:]
        lm = xlstm_ray.load(model, chunkwise_backend="ray_compiled_chunks", stages=2, heads_per_band=int(heads),
            device="cpu", threads=1, workers=1, tile_size=32, chunk_size=16)
        print(json.dumps({"digest": lm.prefill(prompt).state.digest(), "text": "".join(lm.generate(prompt[:96],
            max_new_tokens=9))}))
        """,
        models[heads],
        heads,
        PROMPT,
    )
    assert found == {name: in_process[heads][name] for name in ("digest", "text")}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"stages": 2}, "--stages is of the ray_ backends"),
        ({"ray_address": "127.0.0.1:1"}, "--ray-address is of the ray_ backends"),
        ({"chunkwise_backend": "ray_compiled_chunks", "ray_dashboard": True}, "local mode"),
        ({"chunkwise_backend": "ray_compiled_chunks", "ray_keep_alive": True}, "local mode"),
        ({"chunkwise_backend": "ray_compiled_chunks", "ray_temp_dir": Path("/tmp/x")}, "no effect in local mode"),
        ({"ray_state_dir": Path("/tmp/x")}, "no effect in local mode"),
        ({"chunkwise_backend": "ray_compiled_chunks", "actors_per_device": 2}, "no effect in local mode"),
        ({"journal_every": 3}, "no effect in one process without --journal"),
        ({"chunkwise_backend": "ray_compiled_chunks", "ray_local_mode": False, "workers": 2}, "--workers is for one"),
        (
            {"chunkwise_backend": "ray_compiled_chunks", "ray_local_mode": False, "actors_per_device": 2},
            "--actors-per-device is for GPUs",
        ),
        ({"chunkwise_backend": "ray_compiled_chunks", "stages": 9}, "but the model has 3 blocks"),
        (
            {"chunkwise_backend": "ray_compiled_chunks", "ray_address": "10.0.0.1:1", "force": True},
            "--force has no effect on other machines",
        ),
    ],
)
def test_what_has_no_effect_is_refused(options, said, model, monkeypatch):
    monkeypatch.delenv("XLSTM_RAY_LOCAL_MODE", raising=False)
    with pytest.raises(UsageError, match=said):
        xlstm_ray.load(model, device="cpu", **options)


def test_an_actor_refuses_another_model_than_the_drivers(model):
    config = ModelConfig.from_file(model / "config.json")
    spec = WorkerSpec(model, config, {}, "ray_compiled_chunks", "cpu", torch.float32, CHUNK, 8, None, 1)
    with pytest.raises(CheckpointError, match="has another model there than the driver"):
        BandActor(spec, Band(range(3), range(4), range(10)), "a", alone=True).load()


# -- on a head ---------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module", params=[(2, 4), (2, 3)], ids=["2 stages", "hybrid, 2 stages x 2 bands"])
def grid(request: pytest.FixtureRequest, home: Path, head: Head, models: dict[int, Path]) -> tuple[int, dict[str, Any]]:
    """Everything that one grid does: (heads a band, what it said). Most faults on the first grid only, for time."""
    stages, heads = request.param
    text = (
        GRID
        + """
    say(nice=[seat.process.nice() for seat in executor.placement.seats])
    result = lm.prefill(prompt)
    say(digest=result.state.digest(), peak=result.stats.peak_memory_bytes, restarts=result.stats.restarts)
    if heads == "4":
        say(batch=lm.prefill([prompt[:77], prompt[:320]]).state.digest())
    generation = lm.generate(prompt[:96], max_new_tokens=9)
    say(text="".join(generation), after=generation.state().digest(), rate=generation.decode_tok_s)
    say(all=torch.cat(lm.prefill(prompt[:96], all_logits=True).all_logits).double().sum().item())

    from concurrent.futures import ThreadPoolExecutor
    with ThreadPoolExecutor(2) as pool:
        say(threads=[result.state.digest() for result in pool.map(lm.prefill, [prompt, prompt])])

    from xlstm_ray.memory.sample import peak_process_bytes
    lm.prefill(prompt * 4)
    before = peak_process_bytes()
    lm.prefill(prompt * 8)
    say(growth=peak_process_bytes() - before)

    # Actors are killed at random moments, each time after some progress.
    stop, progress, killed, rounds = threading.Event(), threading.Event(), [], []
    def killer():
        while len(killed) < 2 and not stop.is_set():
            if progress.wait(0.05):
                time.sleep(random.uniform(0, 0.3))
                process = random.choice([s.process for s in executor.placement.seats])
                if process is not None and process.pid not in killed and process.is_running():  # a zombie runs, too
                    process.kill()
                    killed.append(process.pid)
                    progress.clear()
    threading.Thread(target=killer, daemon=True).start()
    digests = set()
    while len(killed) < 2 and len(rounds) < 20:  # the prompt again and again: as long as it takes
        rounds.append(1)
        digests.add(lm.prefill(prompt, on_progress=lambda p: progress.set()).state.digest())
    digests.add(lm.prefill(prompt).state.digest())  # the last kill may have come between two prefills
    say(chaos=sorted(digests), killed=len(killed), chaos_restarts=executor.restarts)
    stop.set()
    if not all_faults:
        lm.close()
        sys.exit()

    # The last stage's is killed when a snapshot's tile has come and its logits have not, with more tiles on their way.
    plain, seen = executor.logits, []
    def logits(hidden):
        executor.logits = plain
        os.kill(executor.placement.seats[-1].process.pid, signal.SIGKILL)
        return plain(hidden)
    executor.logits = logits
    result = lm.prefill(prompt, on_progress=lambda p: seen.append(p.tiles_done))
    say(between=result.state.digest(), between_restarts=executor.restarts, between_tiles=seen)

    # One is stopped, and hangs.
    pids = [s.process.pid for s in executor.placement.seats]
    def hang(p):
        if p.tiles_done == 7 and pids:
            os.kill(pids.pop(), signal.SIGSTOP)
    say(hung=lm.prefill(prompt, on_progress=hang).state.digest(), hang_restarts=executor.restarts)

    # One is killed between two tokens.
    generation = lm.generate(prompt[:96], max_new_tokens=9)
    pieces = []
    for piece in generation:
        pieces.append(piece)
        if len(pieces) == 4:
            os.kill(executor.placement.seats[0].process.pid, signal.SIGKILL)
    say(text_again="".join(pieces), after_again=generation.state().digest())

    # One dies each time, before anything new is done.
    done = threading.Event()
    def always():
        while not done.is_set():
            process = executor.placement.seats[0].process
            if process is not None and process.is_running():
                process.kill()
            time.sleep(0.02)
    def begin(p):
        if p.tiles_done == 7:
            threading.Thread(target=always, daemon=True).start()
    options(retries=1)
    result = lm.prefill(prompt, on_progress=begin)
    done.set()
    result.state.save(sys.argv[6])
    say(lost=str(result.ended_by), code=result.ended_by.exit_code, complete=result.complete, kept=result.state.tokens)
    lm.close()
    """
    )
    lost = home / f"lost-{heads}.state"
    said = script(home, text, models[heads], head.address, stages, heads, PROMPT, lost)
    return heads, dict(ChainMap({"lost_state": lost}, *said))


def test_a_grid_gives_the_bits_of_one_process(grid, in_process):
    heads, found = grid
    assert found["digest"] == in_process[heads]["digest"]
    assert found.get("batch") == in_process[heads].get("batch")
    assert found["restarts"] == 0
    assert found["threads"] == [found["digest"]] * 2


def test_actors_are_not_nicer_than_other_programs(grid):
    _, found = grid
    assert set(found["nice"]) == {0}


def test_decoding_in_the_grid_gives_the_same_text_and_state(grid, in_process):
    heads, found = grid
    assert (found["text"], found["after"]) == (in_process[heads]["text"], in_process[heads]["after"])
    assert found["rate"] > 0


def test_all_logits_come_from_the_last_stage(grid, in_process):
    heads, found = grid
    assert found["all"] == in_process[heads]["all"]


def test_the_drivers_memory_does_not_grow_with_the_prompt(grid):
    _, found = grid
    assert found["growth"] < 16 << 20  # after 376 tiles instead of 188; Ray's own buffers fill slowly


def test_actors_killed_at_random_moments_change_no_bit(grid, in_process):
    heads, found = grid
    assert found["killed"] == 2
    assert found["chaos_restarts"] >= found["killed"]
    assert found["chaos"] == [in_process[heads]["digest"]]


@pytest.mark.parametrize("grid", [(2, 4)], indirect=True, ids=["2 stages"])
def test_an_actor_killed_between_a_tile_and_its_logits_changes_no_bit_and_loses_no_tile(grid, in_process):
    heads, found = grid
    assert found["between"] == in_process[heads]["digest"]
    assert found["between_restarts"] > found["chaos_restarts"]
    assert found["between_tiles"] == [n + 1 for n in range(47)]


@pytest.mark.parametrize("grid", [(2, 4)], indirect=True, ids=["2 stages"])
def test_a_hung_actor_is_found_and_replaced(grid, in_process):
    heads, found = grid
    assert found["hung"] == in_process[heads]["digest"]
    assert found["hang_restarts"] > found["between_restarts"]


@pytest.mark.parametrize("grid", [(2, 4)], indirect=True, ids=["2 stages"])
def test_an_actor_killed_while_decoding_changes_no_token(grid, in_process):
    heads, found = grid
    assert (found["text_again"], found["after_again"]) == (in_process[heads]["text"], in_process[heads]["after"])


@pytest.mark.parametrize("grid", [(2, 4)], indirect=True, ids=["2 stages"])
def test_an_actor_that_always_dies_ends_the_run_with_a_state_to_go_on_from(grid, in_process, model):
    heads, found = grid
    assert found["code"] == 4
    assert not found["complete"]
    (kept,) = found["kept"]
    assert f"failed 2 times in a row from tile {kept // TILE} on" in found["lost"]
    assert 6 * TILE <= kept < len(PROMPT)
    lm = xlstm_ray.load(
        model, device="cpu", threads=1, workers=1, tile_size=TILE, chunk_size=CHUNK, heads_per_band=heads
    )
    resumed = lm.prefill(PROMPT, state=RecurrentState.load(found["lost_state"]))
    torch.set_num_threads(os.cpu_count() or 1)
    assert resumed.state.digest() == in_process[heads]["digest"]
    assert resumed.stats.resumed_tokens == kept


def test_an_actor_that_never_finishes_loading_ends_the_run_with_its_reason(home, head, model, in_process, tmp_path):
    """It is stopped when it is about to load: at the start of a grid, and where it is to replace a dead one."""
    said = script(
        home,
        """
        import dataclasses, json, sys
        import xlstm_ray
        from xlstm_ray.actors import grid
        from xlstm_ray.errors import GridLost
        from xlstm_ray.supervisor.processes import is_running

        class Stopped(grid.Placement):
            stop = True
            def __init__(self, link, spec, bands, options):
                options = dataclasses.replace(options, load_timeout_s=4.0, answer_timeout_s=2.0)
                super().__init__(link, spec, bands, options)
            def each(self, seats, method, *args):
                if method == "load" and self.stop:
                    stopped.append(seats[-1].process)
                    stopped[-1].suspend()
                return super().each(seats, method, *args)

        grid.Placement, stopped = Stopped, []
        model, address, prompt, kept = sys.argv[1:]
        def load():
            return xlstm_ray.load(model, chunkwise_backend="ray_compiled_chunks", ray_address=address, stages=2,
                device="cpu", threads=1, tile_size=32, chunk_size=16, journal_every=3)
        try:
            load()
        except GridLost as error:
            print(json.dumps([str(error), error.exit_code, is_running(stopped[0])]), flush=True)

        Stopped.stop = False
        with load() as lm:
            def kill(p):
                if p.tiles_done == 7:
                    Stopped.stop = True
                    lm.executor.placement.seats[0].process.kill()
            result = lm.prefill(prompt, on_progress=kill)
        result.state.save(kept)
        print(json.dumps([str(result.ended_by), result.ended_by.exit_code, is_running(stopped[1])]), flush=True)
        """,
        model,
        head.address,
        PROMPT,
        tmp_path / "kept.state",
    )
    for (error, code, runs), where in zip(said, ("stage 1, blocks 1-2", "stage 0, blocks 0-0"), strict=True):
        assert f"{where}, heads 0-3 on {os.uname().nodename}: the weights are not loaded after 4 s" in error
        assert str(model) in error
        assert code == 4
        assert not runs
    state = RecurrentState.load(tmp_path / "kept.state")
    assert 6 * TILE <= sum(state.tokens) < len(PROMPT)
    lm = xlstm_ray.load(model, device="cpu", threads=1, workers=1, tile_size=TILE, chunk_size=CHUNK)
    digest = lm.prefill(PROMPT, state=state).state.digest()
    torch.set_num_threads(os.cpu_count() or 1)
    assert digest == in_process[4]["digest"]


def test_actors_are_gone_when_a_run_has_ended(grid, head):
    titles = [" ".join(p.cmdline()) for p in psutil.process_iter() if os.getsid(p.pid) == head.pid]
    assert titles
    assert not [title for title in titles if "BandActor" in title or "Watchdog" in title]


def test_a_grid_without_room_is_refused_within_seconds(home, head, model):
    began = time.monotonic()
    done = command(
        home, "prefill", "--model", model, *SIZES, "--threads", 8, "--ray-address", head.address, "--prompt", "abc",
        "--chunkwise-backend", "ray_compiled_chunks", "--stages", 2,
    )  # fmt: skip
    assert time.monotonic() - began < 60  # ten of them are the wait; the rest is Python on a busy machine
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "2 actors of CPU 8 each; the cluster's 1 node(s) have CPU 8 in all" in line
    assert "use fewer --stages" in line


def test_a_device_that_no_node_has_is_refused(home, head, model):
    done = command(
        home, "prefill", "--model", model, "--ray-address", head.address, "--prompt", "abc", "--device", "mps",
        "--chunkwise-backend", "ray_compiled_chunks",
    )  # fmt: skip
    assert done.returncode == 1
    assert "1 actors of CPU 1, mps 1 each" in done.stderr


def test_a_hard_limit_on_a_node_stops_at_a_tile_boundary_with_a_state(home, head, model, in_process, tmp_path):
    # Two actors together are over it, this process alone is not.
    done = command(
        home, "prefill", "--model", model, *SIZES, "--ray-address", head.address, "--prompt", PROMPT * 40,
        "--chunkwise-backend", "ray_compiled_chunks", "--stages", 2, "--mem-soft-mb", 100, "--mem-hard-mb", 700,
        "--mem-poll-ms", 50, "--state-out", tmp_path / "kept.state",
    )  # fmt: skip
    assert done.returncode == 3, done.stderr
    error = next(line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert "memory: all actors of" in error
    assert "over the hard limit of 700 MiB" in error
    assert "note: memory: xlstm-ray" in done.stderr  # each was over the soft limit before
    (kept,) = RecurrentState.load(tmp_path / "kept.state").tokens
    assert kept % TILE == 0
    assert 0 < kept < 40 * len(PROMPT)


OURS = ("actors", "band", "executor", "engine", "xlstm", "watchdog", "metrics", "state", "settings", "errors", "model")
THEIRS = ("torch", "numpy", "ray", "safetensors", "tokenizers", "psutil", "pydantic", "json", "typing", "logging")


def test_modules_beside_a_program_and_in_the_current_folder_are_not_taken_for_others(
    home, head, model, in_process, tmp_path
):
    for name in (*OURS, *THEIRS):  # where a command is run, a folder may hold anything
        (tmp_path / "here" / name).mkdir(parents=True)
        (tmp_path / "here" / name / "__init__.py").write_text(f"raise ImportError('{name} of the current folder')")
    (tmp_path / "beside").mkdir()
    for name in OURS:  # beside a program, whatever does not name a library that it needs
        (tmp_path / "beside" / f"{name}.py").write_text(f"raise ImportError('{name} beside the program')")
    program = tmp_path / "beside" / "program.py"
    program.write_text(
        "import sys, xlstm_ray\n"
        "lm = xlstm_ray.load(sys.argv[1], ray_address=sys.argv[2], chunkwise_backend='ray_compiled_chunks', stages=2,\n"
        "    device='cpu', threads=1, tile_size=32, chunk_size=16)\n"
        "print(lm.prefill(sys.argv[3]).state.digest())\n"
    )
    by_command = [
        "-P", "-c", "from xlstm_ray.cli.app import main; main()", "prefill", "--model", model, *SIZES, "--stages", 2,
        "--ray-address", head.address, "--chunkwise-backend", "ray_compiled_chunks", "--prompt", PROMPT, "--json",
    ]  # fmt: skip
    for words in (by_command, [program, model, head.address, PROMPT]):
        done = subprocess.run(
            [sys.executable, *map(str, words)],
            cwd=tmp_path / "here",
            env=environment(home),
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, done.stderr
        assert in_process[4]["digest"] in done.stdout


@needs_containers
def test_two_stages_run_where_there_is_less_than_one_cpu(home, model, in_process):
    with container(cpus=0.99) as prefix:
        words = [
            *prefix, sys.executable, "-c", "from xlstm_ray.cli.app import main; main()", "prefill", "--model", model,
            *SIZES[:2], *SIZES[4:], "--chunkwise-backend", "ray_compiled_chunks", "--stages", 2, "--json",
            "--prompt", PROMPT,
        ]  # fmt: skip
        done = subprocess.run(
            [str(word) for word in words], env=environment(home), capture_output=True, text=True, timeout=400
        )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["state_digest"] == in_process[4]["digest"]


@pytest.mark.parametrize(
    ("nodes", "actors", "share"),
    [([1], 2, 0.5), ([1], 3, 0.3333), ([1, 1], 3, 0.5), ([2, 1], 3, 1.0), ([0], 2, None), ([3, 1], 7, 0.5)],
)
def test_cpus_are_shared_where_there_are_fewer_than_actors(nodes, actors, share):
    assert share_of_cpus(nodes, actors) == share


def test_a_programs_own_connection_is_used_and_two_engines_share_one(home, head, model, in_process):
    said = script(
        home,
        """
        import json, os, sys, time
        model, address, token, prompt = sys.argv[1:]
        os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=token, RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0")
        import ray
        import xlstm_ray
        from xlstm_ray.supervisor.stop import child_guards, down, stop_head
        from xlstm_ray.supervisor.records import all_heads, session_of
        from xlstm_ray.supervisor.start import start_head
        from xlstm_ray.errors import RayError
        options = {"chunkwise_backend": "ray_compiled_chunks", "device": "cpu", "threads": 1, "tile_size": 32,
            "chunk_size": 16}
        def refused(**where):
            try:
                xlstm_ray.load(model, **options, **where)
            except RayError as error:
                print(json.dumps({"said": str(error), "head_started": child_guards != {}}), flush=True)
        with xlstm_ray.load(model, ray_address=address, **options) as first:
            with xlstm_ray.load(model, ray_address=address, stages=2, **options) as second:
                pass
            digests = [first.prefill(prompt).state.digest()]
            refused(ray_local_mode=False)
        assert not ray.is_initialized()
        ray.init(address=address, log_to_driver=False)
        with xlstm_ray.load(model, ray_address=address, stages=2, **options) as lm:
            digests.append(lm.prefill(prompt).state.digest())
        assert ray.is_initialized()
        print(json.dumps({"digests": digests}), flush=True)
        refused(ray_local_mode=False)
        refused(ray_address="127.0.0.1:1024")
        """,
        model,
        head.address,
        head.token_path,
        PROMPT,
    )
    by_engine, own, *others = said
    assert own["digests"] == [in_process[4]["digest"]] * 2
    for refusal in (by_engine, *others):
        assert f"connected to Ray at {head.address} already" in refusal["said"]
        assert not refusal["head_started"]


# -- journal -----------------------------------------------------------------------------------------------------------
def test_a_killed_drivers_journal_is_resumed_to_the_same_bits(home, head, model, in_process, tmp_path):
    journal = tmp_path / "journal"
    words = [
        "prefill", "--model", model, *SIZES, "--ray-address", head.address, "--journal-every", 2,
        "--chunkwise-backend", "ray_compiled_chunks", "--stages", 2, "--prompt", PROMPT, "--json",
    ]  # fmt: skip
    program = [sys.executable, "-c", "from xlstm_ray.cli.app import main; main()"]
    run = subprocess.Popen(
        [*program, *map(str, words), "--journal", str(journal), "--progress", "ndjson"],
        env=environment(home),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert run.stderr is not None
    for line in run.stderr:  # killed at some moment after the first snapshots
        if line.startswith("{") and json.loads(line).get("tiles_done", 0) >= 5:
            break
    run.kill()
    run.communicate()
    kept = RecurrentState.load(journal / "prefill.state")
    assert 0 < sum(kept.tokens) < len(PROMPT)

    other = tmp_path / "other"  # the same journal on another grid: in this process, other tiles
    other.mkdir()
    (other / "prefill.state").write_bytes((journal / "prefill.state").read_bytes())
    elsewhere = command(
        home, "prefill", "--model", model, "--device", "cpu", "--chunkwise-backend", "queued_compiled_chunks",
        "--tile-size", 64, "--resume", other, "--prompt", PROMPT, "--state-out", tmp_path / "other.state",
    )  # fmt: skip
    assert elsewhere.returncode == 0, elsewhere.stderr
    assert "the journal is of another grid (tile_size 32, not 64)" in elsewhere.stderr
    for name, tensor in load_file(tmp_path / "other.state").items():
        expected = in_process[4]["tensors"][name]
        assert (tensor - expected).norm() / expected.norm() < 1e-4, name

    resumed = command(home, *words, "--resume", journal)
    assert resumed.returncode == 0, resumed.stderr
    found = json.loads(resumed.stdout)
    assert found["state_digest"] == in_process[4]["digest"]
    assert found["resumed_tokens"] == sum(kept.tokens)
    assert not (journal / "prefill.state").exists()  # the run has ended


def test_journals_are_neither_overwritten_nor_mixed(model, tmp_path):
    lm = xlstm_ray.load(model, device="cpu", chunkwise_backend="native", journal=tmp_path / "a" / "journal")
    asked = 0

    def stop() -> bool:
        nonlocal asked
        asked += 1
        return asked > 2

    result = lm.prefill(PROMPT, should_stop=stop)
    assert not result.complete
    kept = RecurrentState.load(tmp_path / "a" / "journal" / "prefill.state")
    assert kept.digest() == result.state.digest()
    with pytest.raises(StateError, match="has the journal of a run that did not end: go on from it with --resume"):
        lm.prefill(PROMPT)
    home, words = tmp_path, ("prefill", "--model", model, "--prompt", "abc", "--resume", tmp_path)
    assert "has no journal of a run that did not end" in command(home, *words).stderr
    both = command(home, *words, "--state-in", tmp_path / "a" / "journal" / "prefill.state")
    assert "--state-in and --resume were both given" in both.stderr
    assert both.returncode == 1


# -- nodes -------------------------------------------------------------------------------------------------------------
LOSS = """
    import json, os, sys, threading
    # Ray reads these when it is imported, for the nodes that are started here as for the run that attaches to them.
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": sys.argv[2]}
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    from ray.cluster_utils import Cluster
    import xlstm_ray

    model, token, prompt, kept = sys.argv[1:]
    node = {"num_cpus": 1, "object_store_memory": 80 << 20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=node)
    other = cluster.add_node(num_cpus=1, object_store_memory=80 << 20)
    lm = xlstm_ray.load(model, chunkwise_backend="ray_compiled_chunks", ray_address=cluster.address, stages=2,
        ray_token_path=token, device="cpu", threads=1, tile_size=32, chunk_size=16, journal_every=3)
    spare = cluster.add_node(num_cpus=1, object_store_memory=80 << 20)

    def prefill(without):
        nodes = sorted(s.node for s in lm.executor.placement.seats)
        assert without.node_id in nodes and len(set(nodes)) == 2
        def lose(p):
            if p.tiles_done == 7:
                (there,) = [s.process for s in lm.executor.placement.seats if s.node == without.node_id]
                cluster.remove_node(without, allow_graceful=False)  # SIGKILL of its raylet; its worker goes soon after
                there.wait(60)
        result = lm.prefill(prompt, on_progress=lose)
        result.state.save(kept)
        print(json.dumps([result.complete, result.state.digest(), result.stats.restarts, str(result.ended_by),
            result.ended_by and result.ended_by.exit_code]), flush=True)

    prefill(without=other)
    prefill(without=spare)
    lm.close()
    for thread in threading.enumerate():  # an engine waits 10 s for Ray to disconnect; what follows has to wait longer
        if thread.name == "ray.shutdown":
            thread.join()
    cluster.shutdown()
"""


def test_a_lost_node_is_replaced_by_another_or_leaves_a_state_to_go_on_from(model, in_process, tmp_path):
    token, kept = tmp_path / "token", tmp_path / "kept.state"
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    with_spare, without = script(tmp_path, LOSS, model, token, PROMPT, kept)
    complete, digest, restarts, ended_by, _ = with_spare
    assert (complete, digest, ended_by) == (True, in_process[4]["digest"], "None")
    assert restarts >= 1
    complete, _, _, ended_by, code = without
    assert (complete, code) == (False, 4)
    assert "gone, and a grid of 2 stage(s)" in ended_by
    state = RecurrentState.load(kept)
    assert 6 * TILE <= sum(state.tokens) < len(PROMPT)
    lm = xlstm_ray.load(model, device="cpu", threads=1, workers=1, tile_size=TILE, chunk_size=CHUNK)
    digest = lm.prefill(PROMPT, state=state).state.digest()
    torch.set_num_threads(os.cpu_count() or 1)
    assert digest == in_process[4]["digest"]


# Two machines: networks, names and pids of their own. The driver's has hundreds of bystanders, and its host name is the
# other one's too.
FAR = """
    import json, os, subprocess, sys, threading, time
    model, token, prompt = sys.argv[1:]
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": token}
    bystanders = [subprocess.Popen(["sleep", "600"]) for _ in range(400)]
    start = [sys.executable, "-m", "ray.scripts.scripts", "start", "--address=10.231.77.1:6379", "--num-cpus=1"]
    start += ["--node-ip-address=10.231.77.2", "--object-store-memory=83886080", "--disable-usage-stats"]
    subprocess.run(start, stdout=subprocess.DEVNULL, check=True)
    import xlstm_ray
    lm = xlstm_ray.load(model, chunkwise_backend="ray_compiled_chunks", ray_address="10.231.77.1:6379", stages=2,
        ray_token_path=token, device="cpu", threads=1, tile_size=32, chunk_size=16, journal_every=3)
    seats = lm.executor.placement.seats
    assert len({s.node for s in seats}) == 2
    pids = [s.process and s.process.pid for s in seats]

    def away():
        subprocess.run(["ip", "link", "set", "far", "down"], check=True)
        time.sleep(8)
        subprocess.run(["ip", "link", "set", "far", "up"], check=True)
    def lose(p):
        if p.tiles_done == 7:
            threading.Thread(target=away).start()
    result = lm.prefill(prompt, on_progress=lose)
    lm.close()
    time.sleep(1)
    print(json.dumps([result.complete, result.state.digest(), result.stats.restarts, str(result.ended_by),
        pids, sum(b.poll() is None for b in bystanders)]), flush=True)
"""


def test_a_network_that_is_away_costs_nothing_and_a_node_of_the_same_name_is_another_machine(
    model, in_process, tmp_path
):
    """The other node's actor has a pid that a bystander here has; the link is down for 8 s in the middle."""
    name = f"xr{os.getpid()}"
    if subprocess.run(["ip", "netns", "add", name + "a"], capture_output=True).returncode:
        pytest.skip("`ip netns add` is not permitted here: it takes Linux and root")
    token = tmp_path / "token"
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    near = subprocess.Popen(["true"])
    temporary = tempfile.mkdtemp(prefix="n", dir="/tmp")
    other = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
    environment_ = {**environment(tmp_path), "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    environment_.pop("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", None)
    try:
        for line in (
            f"netns add {name}b",
            f"link add near netns {name}a type veth peer name far netns {name}b",
            f"-n {name}a addr add 10.231.77.1/24 dev near",
            f"-n {name}b addr add 10.231.77.2/24 dev far",
            *(
                f"-n {name}{end} link set {device} up"
                for end in "ab"
                for device in ("lo", {"a": "near", "b": "far"}[end])
            ),
        ):
            subprocess.run(["ip", *line.split()], check=True)
        head = "start --head --block --node-ip-address=10.231.77.1 --port=6379 --num-cpus=1 --include-dashboard=false"
        near = subprocess.Popen(
            ["ip", "netns", "exec", name + "a", *other, sys.executable, "-m", "ray.scripts.scripts", *head.split()]
            + [f"--temp-dir={temporary}", "--object-store-memory=83886080", "--disable-usage-stats"],
            env=environment_,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        until = time.monotonic() + 120
        while not (Path(temporary) / "ray_current_cluster").exists():
            assert time.monotonic() < until
            time.sleep(0.1)
        far = [
            "ip",
            "netns",
            "exec",
            name + "b",
            *other,
            "sh",
            "-c",
            f'mount -t tmpfs tmpfs {temporary} && exec "$@"',
            "sh",
        ]
        done = subprocess.run(
            [*far, sys.executable, "-c", textwrap.dedent(FAR), str(model), str(token), PROMPT],
            env=environment_,
            stdout=subprocess.PIPE,
            text=True,
            timeout=240,
            check=True,
        )
        complete, digest, restarts, ended_by, pids, alive = json.loads(done.stdout)
        assert (complete, ended_by, digest) == (True, "None", in_process[4]["digest"])
        assert restarts == 0
        assert pids.count(None) == 1  # the other machine's is not one that could be signalled from here
        assert alive == 400
    finally:
        near.kill()
        near.wait()
        for end in "ab":
            subprocess.run(["ip", "netns", "del", name + end], capture_output=True)
        shutil.rmtree(temporary, ignore_errors=True)


def test_a_disk_that_fills_up_under_the_snapshots_costs_neither_the_run_nor_its_results(
    home, head, model, in_process, tmp_path
):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True).returncode != 0:
        pytest.skip("only root may mount a file system")
    try:
        kept = disk / "kept.state"
        words = [
            "prefill", "--model", model, *SIZES, "--chunkwise-backend", "ray_compiled_chunks", "--stages", 2, "--json",
            "--ray-address", head.address, "--prompt", PROMPT, "--state-out", kept, "--journal-every", 3,
            "--progress", "ndjson",
        ]  # fmt: skip
        run = subprocess.Popen(
            [sys.executable, "-c", "from xlstm_ray.cli.app import main; main()", *map(str, words)],
            env=environment(home) | {"XDG_CACHE_HOME": str(tmp_path / "cache")},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert run.stdout is not None
        assert run.stderr is not None
        said = []
        for line in run.stderr:
            if not line.startswith("{"):
                said.append(line)
            elif json.loads(line).get("tiles_done") == 8:
                assert list(disk.iterdir())
                subprocess.run(["dd", "if=/dev/zero", f"of={disk / 'fill'}", "bs=4k"], capture_output=True)
        found = json.loads(run.stdout.read())
        assert run.wait(60) == 1, said
        assert found["state_digest"] == in_process[4]["digest"]
        assert found["state_path"] is None
        (note,) = [line for line in said if line.startswith("note: a snapshot is missing")]
        assert "No space left on device" in note
        assert f"error: {kept}: the state cannot be written (No space left on device)" in said[-1]
        assert [path.name for path in disk.iterdir()] == ["fill"]
        (rescued,) = (tmp_path / "cache").rglob("*.state")
        assert str(rescued) in said[-1]
        assert RecurrentState.load(rescued).digest() == found["state_digest"]
    finally:
        subprocess.run(["umount", disk], check=True)


# -- what Ray does to the run's process --------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "number", "code"), [("raylet", signal.SIGKILL, 4), ("gcs_server", signal.SIGSTOP, 0)], ids=str
)
def test_what_is_kept_when_ray_itself_is_gone(name, number, code, model, in_process, tmp_path):
    """A raylet that is gone makes Ray end the run's process; a GCS that hangs must not keep the result from us."""
    state_dir, kept = tmp_path / ".local" / "state" / "xlstm-ray", tmp_path / "kept.state"
    words = [
        "prefill", "--model", model, *SIZES, "--chunkwise-backend", "ray_compiled_chunks", "--stages", 2, "--json",
        "--prompt", PROMPT, "--state-out", kept, "--journal-every", 3, "--progress", "ndjson",
    ]  # fmt: skip
    run = subprocess.Popen(
        [sys.executable, "-c", "from xlstm_ray.cli.app import main; main()", *map(str, words)],
        env=environment(tmp_path),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert run.stderr is not None
    said = []
    for line in run.stderr:
        if not line.startswith("{"):
            said.append(line)
        elif json.loads(line).get("tiles_done") == 8:
            (head,) = all_heads(state_dir)
            (process,) = [p for p in session_of(head) if p.name() == name]
            process.send_signal(number)
    assert run.stdout is not None
    out = run.stdout.read()
    assert run.wait(120) == code, said
    lm = xlstm_ray.load(model, device="cpu", threads=1, workers=1, tile_size=TILE, chunk_size=CHUNK)
    digest = lm.prefill(PROMPT, state=RecurrentState.load(kept)).state.digest()
    torch.set_num_threads(os.cpu_count() or 1)
    assert digest == in_process[4]["digest"]
    if code == 0:
        assert json.loads(out)["state_digest"] == digest
    else:
        assert out == ""
        error = "".join(said)
        assert "error: " in error
        assert "Traceback" not in error
        assert f"state in {kept}" in error
        assert f"--state-in {kept}" in error  # the command that goes on
    assert not [path for path in tmp_path.iterdir() if path.suffix == ".kept"]
    down(state_dir)
