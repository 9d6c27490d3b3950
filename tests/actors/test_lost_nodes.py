"""Lost nodes, networks and Ray processes, with real signals and name spaces."""

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
from pathlib import Path

import pytest
from grids import (
    PROMPT,
    SIZES,
    TILE,
    after_tiles,
    as_in_actors,
    command,
    environment,
    in_process,
    model,
    models,
    resumed,
    script,
)

from xlstm_ray import RecurrentState
from xlstm_ray.supervisor.records import all_heads, session_of
from xlstm_ray.supervisor.start import HeadOptions, start_head
from xlstm_ray.supervisor.stop import down, stop_head

__all__ = ["in_process", "model", "models"]

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None and os.environ.get("CI") != "true", reason="Ray is not installed"
)

LOSS = """
    import json, os, sys, threading
    # Ray reads these when it is imported, for the nodes that are started here as for the run that attaches to them.
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": sys.argv[2]}
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    os.environ["RAY_health_check_period_ms"] = "1000"  # of a node that is gone each look fails at once
    from ray.cluster_utils import Cluster
    import xlstm_ray

    model, token, prompt, kept = sys.argv[1:]
    node = {"num_cpus": 1, "object_store_memory": 80 << 20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=node)
    other = cluster.add_node(num_cpus=1, object_store_memory=80 << 20)
    lm = xlstm_ray.load(model, chunkwise_backend="ray_compiled_chunks", ray_address=cluster.address, stages=2,
        ray_token_path=token, device="cpu", threads=1, tile_size=16, chunk_size=16, journal_every=3)
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
    for thread in threading.enumerate():  # an engine waits 10 s for Ray to disconnect, which may take longer
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
    assert resumed(model, state).state.digest() == in_process[4]["digest"]


# Two machines: networks, names and pids of their own. The driver's has hundreds of bystanders, and its host name is the
# other one's too.
FAR = """
    import json, os, subprocess, sys, threading, time
    from pathlib import Path
    model, token, prompt = sys.argv[1:]
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": token}
    bystanders = [subprocess.Popen(["sleep", "600"]) for _ in range(400)]
    start = [sys.executable, "-m", "ray.scripts.scripts", "start", "--address=10.231.77.1:6379", "--num-cpus=1"]
    start += ["--node-ip-address=10.231.77.2", "--object-store-memory=83886080", "--disable-usage-stats"]
    subprocess.run(start, stdout=subprocess.DEVNULL, check=True)
    import xlstm_ray
    from xlstm_ray.supervisor.connect import connect
    early = connect("near.test:6379", token_path=Path(token))  # as a command does, while it imports torch
    early.__enter__()
    lm = xlstm_ray.load(model, chunkwise_backend="ray_compiled_chunks", ray_address="near.test:6379", stages=2,
        ray_token_path=token, device="cpu", threads=1, tile_size=16, chunk_size=16, journal_every=3)
    early.__exit__(None, None, None)
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
    """The other node's actor has the pid of a process here; the link is down for 8 s during the run."""
    name = f"xr{os.getpid()}"
    if subprocess.run(["ip", "netns", "add", name + "a"], capture_output=True).returncode:
        pytest.skip("`ip netns add` is not permitted here: it takes Linux and root")
    token = tmp_path / "token"
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    hosts = tmp_path / "hosts"
    hosts.write_text("127.0.0.1 localhost\n10.231.77.1 near.test\n")
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
            f'mount -t tmpfs tmpfs {temporary} && mount --bind {hosts} /etc/hosts && exec "$@"',
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
        assert pids.count(None) == 1  # the other machine's actor cannot get a signal from here
        assert alive == 400
    finally:
        near.kill()
        near.wait()
        for end in "ab":
            subprocess.run(["ip", "netns", "del", name + end], capture_output=True)
        shutil.rmtree(temporary, ignore_errors=True)


@pytest.mark.parametrize(
    ("name", "number", "code"), [("raylet", signal.SIGKILL, 4), ("gcs_server", signal.SIGSTOP, 0)], ids=str
)
def test_what_is_kept_when_ray_itself_is_gone(name, number, code, model, in_process, tmp_path):
    """If the raylet dies, Ray ends the run's process; if the GCS hangs, the result must still come."""
    state_dir, kept = tmp_path / ".local" / "state" / "xlstm-ray", tmp_path / "kept.state"
    words = [
        "prefill", "--model", model, *SIZES, "--chunkwise-backend", "ray_compiled_chunks", "--stages", 2, "--json",
        "--prompt", PROMPT, "--state-out", kept, "--journal-every", 3,
    ]  # fmt: skip

    def signal_it(_run: object) -> None:
        (head,) = all_heads(state_dir)
        (process,) = [p for p in session_of(head) if p.name() == name]
        process.send_signal(number)

    done = after_tiles(8, signal_it, tmp_path, *words)
    assert done.returncode == code, done.stderr
    assert kept.exists(), done.stderr
    digest = resumed(model, RecurrentState.load(kept)).state.digest()
    assert digest == in_process[4]["digest"]
    if code == 0:
        assert json.loads(done.stdout)["state_digest"] == digest
    else:
        assert done.stdout == ""
        error = done.stderr
        assert "error: " in error
        assert "Traceback" not in error
        assert f"state in {kept}" in error
        assert f"--state-in {kept}" in error  # the command that goes on
    assert not list(tmp_path.glob(".*.kept"))
    down(state_dir)


# The state of a finished prefill is with the actors until it is saved.
LOST_LATE = """
    import json, os, socket, sys
    from pathlib import Path
    import xlstm_ray
    from xlstm_ray.cli import keeper
    from xlstm_ray.cli.keep import keeping, save_state, snapshot_kept
    from xlstm_ray.errors import GridLost
    from xlstm_ray.settings import Settings
    from xlstm_ray.supervisor.records import all_heads, session_of
    model, prompt, state_dir, kept = *sys.argv[1:4], Path(sys.argv[4])
    parent, ours = socket.socketpair()
    keeper.current = keeper.Run(ours)
    lm = xlstm_ray.load(model, chunkwise_backend="ray_compiled_chunks", stages=2, device="cpu", threads=1, tile_size=16,
        chunk_size=16, journal_every=3)
    try:
        with snapshot_kept():
            result = lm.prefill(prompt, on_snapshot=keeping(lm, kept))
            (head,) = all_heads(Path(state_dir))
            for process in session_of(head):
                if process.name() == "gcs_server":
                    process.kill()
                    process.wait(30)
            for seat in lm.executor.placement.seats:
                seat.process.kill()
                seat.process.wait(30)
            save_state(lm, result.state, kept, Settings(), needed=False)
    except GridLost as lost:
        print(json.dumps([result.complete, str(lost)]), flush=True)
    keeper.current.ended(4)
    os._exit(0)  # Ray's own end takes half a minute without a head
"""


def test_a_grid_that_is_lost_after_the_last_tile_leaves_the_last_snapshot(model, in_process, tmp_path):
    state_dir, kept = tmp_path / ".local" / "state" / "xlstm-ray", tmp_path / "kept.state"
    ((complete, error),) = script(tmp_path, LOST_LATE, model, PROMPT, state_dir, kept)
    assert complete
    assert f"; state in {kept}\nto go on: " in error
    assert f"--state-in {kept}" in error
    state = RecurrentState.load(kept)
    assert sum(state.tokens) == len(PROMPT) - len(PROMPT) % (3 * TILE)  # the last snapshot
    assert resumed(model, state).state.digest() == in_process[4]["digest"]
    assert not list(tmp_path.glob(".*.kept"))
    down(state_dir)


def test_a_full_disk_under_rays_folder_is_named(model, tmp_path):
    """If Ray cannot write, actors end at once; the error gives the reason besides Ray's message."""
    disk, home = Path(tempfile.mkdtemp()), tmp_path  # a short path: Ray's sockets are in it
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=160m,mode=700", "tmpfs", disk], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("only root may mount a file system")
    state_dir = home / ".local" / "state" / "xlstm-ray"
    options = HeadOptions(state_dir=state_dir, temp_dir=disk / "t", stays=True, num_cpus=2, object_store_bytes=75 << 20)
    try:
        with as_in_actors():
            head = start_head(options)
        subprocess.run(["dd", "if=/dev/zero", f"of={disk / 'fill'}", "bs=1M"], capture_output=True)
        done = command(
            home, "prefill", "--model", model, *SIZES, "--prompt", "abc", "--ray-address", head.address,
            "--chunkwise-backend", "ray_compiled_chunks",
        )  # fmt: skip
        (disk / "fill").unlink()
        stop_head(head, state_dir)
    finally:
        subprocess.run(["umount", "-l", disk], check=True)
        disk.rmdir()
    assert done.returncode == 4
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert f"the disk of Ray's folder {disk / 't'}" in line
    assert "0 MiB free: make room there" in line


def test_a_service_that_nobody_asks_ends_with_its_head(model, tmp_path):
    """Else it would say that it is well until the next request, which it could not answer."""
    state_dir = tmp_path / ".local" / "state" / "xlstm-ray"
    with as_in_actors():
        head = start_head(HeadOptions(state_dir=state_dir, stays=True, num_cpus=1, object_store_bytes=75 << 20))
    said = script(
        tmp_path,
        """
        import json, sys, time
        from pathlib import Path
        import xlstm_ray
        from xlstm_ray.supervisor.status import status
        from xlstm_ray.supervisor.stop import stop_head
        model, address, state_dir = sys.argv[1:]
        lm = xlstm_ray.load(model, chunkwise_backend="ray_compiled_chunks", ray_address=address, device="cpu",
            threads=1, tile_size=16, chunk_size=16)
        lm.serve(slots=1)
        time.sleep(5)  # it has looked
        print(json.dumps(lm.failed and str(lm.failed)), flush=True)
        (item,) = status(Path(state_dir)).heads
        stop_head(item.head, Path(state_dir))
        until = time.monotonic() + 60
        while lm.failed is None and time.monotonic() < until:
            time.sleep(0.2)
        print(json.dumps(str(lm.failed)), flush=True)
        lm.close()
        """,
        model, head.address, state_dir,
    )  # fmt: skip
    assert said[0] is None
    assert said[1].startswith(f"Ray's head at {head.address} is gone")
