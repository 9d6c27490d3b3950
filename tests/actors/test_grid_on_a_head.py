"""Runs on a head of ours: places, faults, deadlines, memory limits, connections, journals, full disks."""

import csv
import importlib.util
import json
import os
import re
import subprocess
import sys
import textwrap
import time
from collections import ChainMap
from itertools import pairwise

import programs
import pytest
import torch
from containers import container, needs_containers
from grids import (
    CHAOS,
    GRID,
    PROMPT,
    SIZES,
    TILE,
    after_tiles,
    as_in_actors,
    asked,
    command,
    environment,
    head,
    home,
    in_process,
    model,
    models,
    program,
    resumed,
    script,
)
from safetensors.torch import load_file

import xlstm_ray
from xlstm_ray import RecurrentState
from xlstm_ray.config import Quantization
from xlstm_ray.errors import StateError
from xlstm_ray.quantize import quantize_model

__all__ = ["head", "home", "in_process", "model", "models"]

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None and os.environ.get("CI") != "true", reason="Ray is not installed"
)


def test_an_actor_that_never_finishes_loading_ends_the_run_with_its_reason(home, head, model, in_process, tmp_path):
    """The actor is suspended just before it loads: at the start of a grid, and as the replacement of a dead one."""
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
            def _load(self, seats):
                if self.stop:  # only then: on a busy machine a healthy actor may need longer
                    self.options = dataclasses.replace(self.options, load_timeout_s=4.0, answer_timeout_s=2.0)
                    stopped.append(seats[-1].process)
                    stopped[-1].suspend()
                super()._load(seats)

        grid.Placement, stopped = Stopped, []
        model, address, prompt, kept = sys.argv[1:]
        def load():
            return xlstm_ray.load(model, chunkwise_backend="ray_compiled_chunks", ray_address=address, stages=2,
                device="cpu", threads=1, tile_size=16, chunk_size=16, journal_every=3)
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
    assert resumed(model, state).state.digest() == in_process[4]["digest"]


def test_a_grid_without_room_is_refused_within_seconds(home, head, model):
    began = time.monotonic()
    done = command(
        home, "prefill", "--model", model, *SIZES, "--threads", 8, "--ray-address", head.address, "--prompt", "abc",
        "--chunkwise-backend", "ray_compiled_chunks", "--stages", 2,
    )  # fmt: skip
    assert time.monotonic() - began < 60  # the wait is 10 s; the rest is Python on a busy machine
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
    # The two actors together are over the limit, and this process alone is not.
    done = command(
        home, "prefill", "--model", model, *SIZES, "--ray-address", head.address, "--prompt", PROMPT * 40,
        "--chunkwise-backend", "ray_compiled_chunks", "--stages", 2, "--mem-soft-mb", 100, "--mem-hard-mb", 550,
        "--mem-poll-ms", 50, "--no-mem-shrink", "--state-out", tmp_path / "kept.state",
        "--mem-log", tmp_path / "memory.csv", "--stats-log", tmp_path / "tiles.csv",
    )  # fmt: skip
    assert done.returncode == 3, done.stderr
    error = next(line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert "memory: all actors of" in error
    assert "over the hard limit of 550 MiB" in error
    assert "note: memory: xlstm-ray" in done.stderr  # each actor was over the soft limit first
    (kept,) = RecurrentState.load(tmp_path / "kept.state").tokens
    assert kept % TILE == 0
    assert 0 < kept < 40 * len(PROMPT)
    # The logs have the actors' memory, and that of a node's actors together, which ended the run.
    samples = list(csv.DictReader(open(tmp_path / "memory.csv", newline="")))
    most = {row["who"]: 0 for row in samples}
    for row in samples:
        most[row["who"]] = max(most[row["who"]], int(row["process_bytes"]))
    own, (together,) = most.pop("this process"), [most.pop(who) for who in [*most] if who.startswith("all actors of ")]
    for who in [who for who in most if who.startswith("the container of ")]:
        del most[who]
    assert sorted(who[-len("stage 0, blocks 0-0, heads 0-3") :] for who in most) == [
        "stage 0, blocks 0-0, heads 0-3",
        "stage 1, blocks 1-2, heads 0-3",
    ]
    assert together > 550 << 20 > max(own, *most.values()) > 100 << 20
    assert {row["level"] for row in samples if row["who"].startswith("all actors of ")} >= {"hard"}
    tiles = list(csv.DictReader(open(tmp_path / "tiles.csv", newline="")))
    used = [int(row["process_bytes"]) for row in tiles if row["process_bytes"]]
    assert used
    assert max(used) <= sum(most.values())
    assert max(used) > max(most.values())


def test_a_soft_limit_makes_the_tiles_of_a_grid_smaller(home, head, model):
    """The actors are over the limit from the start; the watchdog reports it, and the driver halves the tile."""
    (said,) = script(
        home,
        """
        import json, sys
        import xlstm_ray
        model, address, prompt = sys.argv[1:]
        seen = []
        with xlstm_ray.load(model, chunkwise_backend="ray_compiled_chunks", ray_address=address, device="cpu",
                threads=1, tile_size=32, chunk_size=16, mem_soft_mb=64, mem_hard_mb=20000, mem_poll_ms=20) as lm:
            lm.on_note = seen.append
            result = lm.prefill(prompt)
            state = result.state.numerics
            print(json.dumps([seen, result.complete, state.mixed, state.tile_size, result.logits[0].tolist()]))
        """,
        model,
        head.address,
        PROMPT * 4,
    )
    notes, complete, mixed, tile, logits = said
    with as_in_actors(), xlstm_ray.load(model, device="cpu", tile_size=32, chunk_size=TILE) as lm:
        want = lm.prefill(PROMPT * 4).logits[0]
    assert any("tiles of 16 tokens" in note for note in notes)
    assert (complete, mixed) == (True, True)
    assert tile < 32
    assert torch.tensor(logits) == pytest.approx(want, abs=1e-4 * want.abs().max().item())


OURS = ("actors", "band", "executor", "engine", "xlstm", "watchdog", "metrics", "state", "settings", "errors", "model")
THEIRS = ("torch", "numpy", "ray", "safetensors", "tokenizers", "psutil", "pydantic", "json", "typing", "logging")


def test_modules_beside_a_program_and_in_the_current_folder_are_not_taken_for_others(
    home, head, model, in_process, tmp_path
):
    for name in (*OURS, *THEIRS):  # where a command is run, a folder may hold anything
        (tmp_path / "here" / name).mkdir(parents=True)
        (tmp_path / "here" / name / "__init__.py").write_text(f"raise ImportError('{name} of the current folder')")
    (tmp_path / "beside").mkdir()
    for name in OURS:  # beside a program: only names that its libraries do not have
        (tmp_path / "beside" / f"{name}.py").write_text(f"raise ImportError('{name} beside the program')")
    beside = tmp_path / "beside" / "program.py"
    beside.write_text(
        "import sys, xlstm_ray\n"
        "lm = xlstm_ray.load(sys.argv[1], ray_address=sys.argv[2], chunkwise_backend='ray_compiled_chunks',\n"
        "    device='cpu', threads=1, tile_size=16, chunk_size=16)\n"
        "print(lm.prefill(sys.argv[3]).state.digest())\n"
    )
    by_command = [
        "-P", "-c", "from xlstm_ray.cli.app import main; main()", "prefill", "--model", model, *SIZES,
        "--ray-address", head.address, "--chunkwise-backend", "ray_compiled_chunks", "--prompt", PROMPT, "--json",
    ]  # fmt: skip
    for words in (by_command, [beside, model, head.address, PROMPT]):
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
            "prefill", "--model", model, *SIZES[:2], *SIZES[4:], "--chunkwise-backend", "ray_compiled_chunks",
            "--stages", 2, "--json", "--prompt", PROMPT,
        ]  # fmt: skip
        done = subprocess.run(
            [*prefix, *program(*words)], env=environment(home), capture_output=True, text=True, timeout=400
        )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["state_digest"] == in_process[4]["digest"]


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
        options = {"chunkwise_backend": "ray_compiled_chunks", "device": "cpu", "threads": 1, "tile_size": 16,
            "chunk_size": 16}
        def refused(**where):
            try:
                xlstm_ray.load(model, **options, **where)
            except RayError as error:
                print(json.dumps({"said": str(error), "head_started": child_guards != {}}), flush=True)
        with xlstm_ray.load(model, ray_address=address, **options) as first:
            with xlstm_ray.load(model, ray_address=address, **options) as second:
                pass
            digests = [first.prefill(prompt).state.digest()]
            refused(ray_local_mode=False)
        assert not ray.is_initialized()
        ray.init(address=address, log_to_driver=False)
        with xlstm_ray.load(model, ray_address=address, **options) as lm:
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


# -- faults ------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def faults(home, head, model, tmp_path_factory):
    """What a grid of two stages printed, whose actors die and hang. One of compiled actors is in test_grid.py."""
    text = (
        GRID
        + CHAOS
        + """
    # The last stage's actor is killed when a snapshot's tile is here, its logits are not, and more tiles are under way.
    plain, seen = executor.logits, []
    def logits(hidden):
        executor.logits = plain
        os.kill(executor.placement.seats[-1].process.pid, signal.SIGKILL)
        return plain(hidden)
    executor.logits = logits
    result = lm.prefill(prompt, on_progress=lambda p: seen.append(p.tiles_done))
    say(between=result.state.digest(), between_restarts=executor.restarts, between_tiles=seen)

    # An actor is suspended, so it hangs.
    pids = [s.process.pid for s in executor.placement.seats]
    def hang(p):
        if p.tiles_done == 7 and pids:
            os.kill(pids.pop(), signal.SIGSTOP)
    say(hung=lm.prefill(prompt, on_progress=hang).state.digest(), hang_restarts=executor.restarts)

    # An actor is killed between two tokens of two answers, while a third state is kept.
    kept = lm.prefill(prompt[:96])
    turns = [lm.generate(prompt[:96], max_new_tokens=9), lm.generate(prompt[3:64], max_new_tokens=9)]
    pieces = []
    for pair in zip(*turns):
        pieces.append(pair)
        if len(pieces) == 4:
            os.kill(executor.placement.seats[0].process.pid, signal.SIGKILL)
    again, other = ["".join(texts) for texts in zip(*pieces)]
    say(text_again=again, after_again=turns[0].state().digest(), kept_again=kept.state.digest())
    say(other_again=other, other_after_again=turns[1].state().digest())

    # An actor is killed while many requests are served.
    from xlstm_ray.sampling import Sampling
    lm.serve(slots=4, buckets=(4,))
    def ask(n):
        return lm.submit(Request(prompt[n:90 + 7 * n], sampling=Sampling(max_new_tokens=5 + n)))
    say(requests=[ask(n).result(120).text for n in range(8)])
    handles, before = [ask(n) for n in range(8)], executor.restarts
    handles[1].result(120)
    os.kill(executor.placement.seats[1].process.pid, signal.SIGKILL)
    say(requests_again=[handle.result(120).text for handle in handles], requests_lost=executor.restarts - before)

    # The first stage's actor dies each time, before it has done anything new.
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
    result.state.save(sys.argv[7])
    say(lost=str(result.ended_by), code=result.ended_by.exit_code, complete=result.complete, left=result.state.tokens)
    lm.close()
    """
    )
    lost = tmp_path_factory.mktemp("lost") / "state"
    return dict(ChainMap({"lost_state": lost}, *script(home, text, model, head.address, 2, 4, PROMPT, 2, lost)))


def test_actors_killed_at_random_moments_change_no_bit(faults, in_process):
    assert faults["killed"] == 2
    assert faults["chaos_restarts"] >= 2
    assert faults["chaos"] == [in_process[4]["digest"]]


def test_an_actor_killed_between_a_tile_and_its_logits_changes_no_bit_and_loses_no_tile(faults, in_process):
    assert faults["between"] == in_process[4]["digest"]
    assert faults["between_restarts"] > faults["chaos_restarts"]
    assert faults["between_tiles"] == [n + 1 for n in range(47)]


def test_a_hung_actor_is_found_and_replaced(faults, in_process):
    assert faults["hung"] == in_process[4]["digest"]
    assert faults["hang_restarts"] > faults["between_restarts"]


def test_an_actor_killed_while_decoding_changes_no_token(faults, in_process):
    expected = in_process[4]
    assert (faults["text_again"], faults["after_again"]) == (expected["text"], expected["after"])
    assert (faults["other_again"], faults["other_after_again"]) == (expected["other"], expected["other_after"])
    assert faults["kept_again"] == expected["kept"]


def test_an_actor_killed_while_requests_are_served_changes_no_token_of_any(faults):
    assert faults["requests_lost"] > 0
    assert faults["requests_again"] == faults["requests"]


def test_an_actor_that_always_dies_ends_the_run_with_a_state_to_go_on_from(faults, in_process, model):
    assert faults["code"] == 4
    assert not faults["complete"]
    (kept,) = faults["left"]
    assert f"failed 2 times in a row from tile {kept // TILE} on" in faults["lost"]
    assert 6 * TILE <= kept < len(PROMPT)
    rest = resumed(model, RecurrentState.load(faults["lost_state"]))
    assert rest.state.digest() == in_process[4]["digest"]
    assert rest.stats.resumed_tokens == kept


# -- journal -----------------------------------------------------------------------------------------------------------
def test_a_killed_drivers_journal_is_resumed_to_the_same_bits(home, head, model, in_process, tmp_path):
    journal = tmp_path / "journal"
    words = [
        "prefill", "--model", model, *SIZES, "--ray-address", head.address, "--journal-every", 2,
        "--chunkwise-backend", "ray_compiled_chunks", "--stages", 2, "--prompt", PROMPT, "--json",
    ]  # fmt: skip
    after_tiles(5, subprocess.Popen.kill, home, *words, "--journal", journal)  # some time after the first snapshots
    kept = RecurrentState.load(journal / "prefill.state")
    assert 0 < sum(kept.tokens) < len(PROMPT)

    other = tmp_path / "other"  # the same journal with other numerics: in this process, other tiles
    other.mkdir()
    (other / "prefill.state").write_bytes((journal / "prefill.state").read_bytes())
    elsewhere = command(
        home, "prefill", "--model", model, *SIZES[:4], "--chunkwise-backend", "queued_compiled_chunks",
        "--tile-size", 32, "--resume", other, "--prompt", PROMPT, "--state-out", tmp_path / "other.state",
    )  # fmt: skip
    assert elsewhere.returncode == 0, elsewhere.stderr
    assert "the journal was made with other numerics (tile_size 16, not 32)" in elsewhere.stderr
    for name, tensor in load_file(tmp_path / "other.state").items():
        expected = in_process[4]["tensors"][name]
        assert (tensor - expected).norm() / expected.norm() < 1e-4, name

    whole = command(home, *words, "--resume", journal)
    assert whole.returncode == 0, whole.stderr
    found = json.loads(whole.stdout)
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
    with pytest.raises(StateError, match="has the journal of a run that did not end: go on from it with `resume="):
        lm.prefill(PROMPT)
    home, words = tmp_path, ("prefill", "--model", model, "--prompt", "abc", "--resume", tmp_path)
    assert "has no journal of a run that did not end" in command(home, *words).stderr
    both = command(home, *words, "--state-in", tmp_path / "a" / "journal" / "prefill.state")
    assert "--state-in and --resume were both given" in both.stderr
    assert both.returncode == 1


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
        ]  # fmt: skip

        def fill(_run: object) -> None:
            assert list(disk.iterdir())
            subprocess.run(["dd", "if=/dev/zero", f"of={disk / 'fill'}", "bs=4k"], capture_output=True)

        done = after_tiles(8, fill, home, *words, XDG_CACHE_HOME=tmp_path / "cache")
        said, found = done.stderr.splitlines(), json.loads(done.stdout)
        assert done.returncode == 1, said
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


def test_a_grid_of_integers_gives_the_bits_of_one_process(home, head, model, tmp_path):
    """Two stages of two bands: each actor reads its own rows, and its columns of groups that bands share."""
    list(quantize_model(model, tmp_path / "q", Quantization(bits=4, group_size=64, embedding=True, head=True)))
    sizes = {"heads_per_band": 2, "device": "cpu", "threads": 1, "tile_size": TILE, "chunk_size": TILE}
    (found,) = script(
        home,
        """
        import json, sys
        import xlstm_ray
        model, address, sizes, prompt = sys.argv[1:]
        with xlstm_ray.load(model, chunkwise_backend="ray_compiled_chunks", ray_address=address, stages=2,
            **json.loads(sizes)) as lm:
            state = lm.prefill(prompt).state
            text = "".join(lm.generate(state=state, max_new_tokens=9))
            print(json.dumps([state.digest(), text, len(lm.executor.placement.seats)]))
        """,
        tmp_path / "q",
        head.address,
        json.dumps(sizes),
        PROMPT,
    )
    with as_in_actors(), xlstm_ray.load(tmp_path / "q", workers=1, **sizes) as lm:
        torch.set_num_threads(1)
        state = lm.prefill(PROMPT).state
        expected = [state.digest(), "".join(lm.generate(state=state, max_new_tokens=9)), 4]
    torch.set_num_threads(os.cpu_count() or 1)
    assert found == expected


ANSWERS = """
    import json, sys
    import xlstm_ray
    from xlstm_ray import Request, Sampling
    with xlstm_ray.load(sys.argv[1], device="cpu", chunkwise_backend="ray_compiled_chunks", ray_address=sys.argv[2],
            stages=2, threads=1, tile_size=32, chunk_size=16) as lm:
        lm.serve(slots=3, buckets=(1,))
        submit, order = lm.executor.submit, []
        def noted(state, step):
            order.append("window" if step.chunk_size > 1 else state.number)
            return submit(state, step)
        lm.executor.submit = noted
        def ask(first, length, tokens):
            prompt = [first, *(n % 90 for n in range(length - 1))]
            return lm.submit(Request(prompt, sampling=Sampling(max_new_tokens=tokens)))
        answers = [ask(first, 64, 60) for first in range(2)]
        for answer in answers:
            next(event for event in answer if type(event).__name__ == "Piece")
        ask(2, 640, 1).result()
        for answer in answers:
            answer.result()
        print(json.dumps(order), flush=True)
        sys.stdin.readline()
"""


def test_batches_step_once_between_two_windows_and_all_steps_are_counted(home, head, model):
    """Two answers and a long prompt. Steps of tokens are shown ten times a second: the last ones, too."""
    program = [sys.executable, "-c", textwrap.dedent(ANSWERS), str(model), head.address]
    env = {**environment(home), "RAY_metrics_report_interval_ms": "1000"}
    process = programs.Popen(program, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        order = json.loads(process.stdout.readline())
        windows = [n for n, what in enumerate(order) if what == "window"]
        assert (len(windows), len(order)) == (2 + 2 + 20, 2 + 2 + 20 + 2 * 59)
        for first, second in pairwise(windows[-20:]):
            between = order[first + 1 : second]
            assert len(between) == len(set(between)) == 2
        deadline = time.monotonic() + 60
        while not (
            found := re.search(
                rf'tiles_total{{.*run="(\w+)".*}} {len(order)}\.0$', figures := asked(head.metrics_url, head), re.M
            )
        ):
            assert time.monotonic() < deadline, [line for line in figures.splitlines() if "_tiles_total{" in line]
            time.sleep(0.5)
        mine = [line for line in figures.splitlines() if f'run="{found[1]}"' in line]  # runs before leave after 20 s
        tokens = [line.split()[-1] for line in mine if line.startswith("ray_xlstm_ray_tokens_total")]
        assert tokens == [f"{64 + 64 + 640 + 2 * 59}.0"]
        buckets = re.findall(r'tile_seconds_bucket{.*le="(.*?)".*} (\S+)$', "\n".join(mine), re.MULTILINE)
        counts = [float(count) for _, count in sorted(buckets, key=lambda bucket: float(bucket[0]))]
        assert counts == sorted(counts)
        assert counts[-1] == len(order)
    finally:
        process.kill()
        process.wait()
