"""The life of Ray heads, with real heads, processes and signals, beside a real cluster of somebody else.

Nothing here connects in pytest's own process: Ray fixes its authentication at import, for every test file.
"""

import contextlib
import http.client as http_client
import importlib.util
import json
import os
import platform
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import requires
from pathlib import Path

import psutil
import pytest

import xlstm_ray
from xlstm_ray.errors import RayError, UsageError
from xlstm_ray.supervisor.connect import NAMESPACE, connect
from xlstm_ray.supervisor.mode import Mode, ray_mode
from xlstm_ray.supervisor.ports import DASHBOARD_PORT, free_port
from xlstm_ray.supervisor.processes import Process, find, identify, is_running, this_machine
from xlstm_ray.supervisor.records import (
    HOSTS_OWN,
    Head,
    all_heads,
    ended_by_itself,
    lost_helpers,
    make_private_directory,
    own_token,
    read_record,
    record_path,
    stays_lines,
    write_record,
)
from xlstm_ray.supervisor.start import HeadOptions, managed, start_head
from xlstm_ray.supervisor.status import actors_of, status
from xlstm_ray.supervisor.stop import down, stop_head

# On CI a missing Ray is a failure and not a reason to skip.
needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None and os.environ.get("CI") != "true", reason="Ray is not installed"
)
ROOT = str(Path(xlstm_ray.__file__).parents[1])
RAY = next(r.partition(";")[0] for r in requires("xlstm-ray") or [] if r.startswith("ray[default]"))
STORE = 80 << 20  # bytes: the least that Ray takes is 75 MiB
ALIVE = psutil.STATUS_SLEEPING, psutil.STATUS_RUNNING  # a program that has just begun to sleep may still run
HANG_S = 120  # what takes longer hangs: each wait here has an end of a few seconds, and the machine may be busy


def options(state_dir: Path, **changes: object) -> HeadOptions:
    return HeadOptions(state_dir=state_dir, num_cpus=2, object_store_bytes=STORE, **changes)  # type: ignore[arg-type]


def script(text: str, *arguments: object, **environment: str) -> list[str]:
    """The lines that a fresh Python prints."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(text), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": ROOT, **environment},
        stdout=subprocess.PIPE,
        text=True,
        timeout=150,
        check=True,
    )
    return done.stdout.splitlines()


def until(condition: Callable[[], bool], timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def in_session(session: int | None) -> list[psutil.Process]:
    """By the kernel only, without the code under test."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return found


def names_in(session: int) -> set[str]:
    """The names of its processes, without those that end meanwhile."""
    names = set()
    for process in in_session(session):
        with contextlib.suppress(psutil.NoSuchProcess):
            names.add(process.name())
    return names


def gone(head: Head) -> bool:
    return not in_session(head.pid) and not head.folder.exists()


@pytest.fixture(scope="module")
def state_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The directory of records if HOME is three folders up."""
    path = tmp_path_factory.mktemp("home") / ".local" / "state" / "xlstm-ray"
    make_private_directory(path)
    yield path
    for head in all_heads(path):
        stop_head(head, path)


@dataclass
class Other:
    """Somebody else's cluster."""

    address: str
    session: int

    def intact(self) -> bool:
        alive = names_in(self.session)
        with socket.socket() as client:
            host, port = self.address.split(":")
            return {"raylet", "gcs_server"} <= alive and client.connect_ex((host, int(port))) == 0


@pytest.fixture(scope="module")
def other() -> Iterator[Other]:
    """A head that somebody else started in their own way: no record of ours, no token."""
    folder = Path(tempfile.mkdtemp(prefix="o", dir="/tmp"))
    flags = "--head --block --port=0 --include-dashboard=false --min-worker-port=0 --max-worker-port=0 --num-cpus=1"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        client = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "ray.scripts.scripts", "start", *flags.split(), "--disable-usage-stats"]
        + [f"--temp-dir={folder}", f"--ray-client-server-port={client}", f"--object-store-memory={STORE}"]
        + ["--dashboard-agent-listen-port=0"],
        env={**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    marker = folder / "ray_current_cluster"
    assert until(lambda: marker.exists() and marker.read_text() != "", 150)
    yield Other(marker.read_text(), process.pid)
    for member in in_session(process.pid):
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait()
    shutil.rmtree(folder)


HEAD = """
    import sys
    from pathlib import Path
    from xlstm_ray.supervisor.start import HeadOptions, managed
    with managed(HeadOptions(state_dir=Path(sys.argv[1]), num_cpus=2, object_store_bytes=80 << 20, dashboard=True,
                             dashboard_port=int(sys.argv[2]), stays=True)) as head:
        print(head.model_dump_json())
"""


def cli(state_dir: Path, *arguments: str, before: Sequence[str] = ()) -> tuple[int, str, str]:
    done = subprocess.run(
        [*before, sys.executable, "-c", "from xlstm_ray.cli.app import main; main()", *arguments],
        env={**os.environ, "PYTHONPATH": ROOT, "HOME": str(state_dir.parents[2])},
        capture_output=True,
        text=True,
        timeout=150,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def head(state_dir: Path, other: Other) -> Head:
    """A head with a dashboard that outlives the run that started it."""
    (text,) = script(HEAD, state_dir, free_port(9000))
    return Head.model_validate_json(text)


# Without Ray


def test_importable_without_ray_which_is_named_when_a_head_is_asked_for(tmp_path: Path) -> None:
    out = script(
        """
        import sys
        from pathlib import Path
        sys.modules["ray"] = None
        from xlstm_ray.supervisor.start import HeadOptions, start_head
        from xlstm_ray.errors import RayError
        from xlstm_ray.supervisor.connect import connect
        from xlstm_ray.supervisor.status import status
        print(status(Path(sys.argv[1])).heads)
        for ask in (lambda: start_head(HeadOptions(state_dir=Path(sys.argv[1]))), connect("127.0.0.1:6379").__enter__):
            try:
                ask()
            except RayError as error:
                print(error)
        """,
        tmp_path,
    )
    assert out == [
        "()",
        *2 * [f"Ray is not installed; {sys.executable} -m pip install '{RAY}' installs it, or stay in local mode"],
    ]


def test_mode_follows_from_the_flags() -> None:
    assert ray_mode(local_mode=True) is Mode.LOCAL
    assert ray_mode(local_mode=False, dashboard=True, dashboard_port=8265) is Mode.MANAGED
    assert ray_mode(local_mode=False, keep_alive=True) is Mode.MANAGED
    assert ray_mode(local_mode=True, address="127.0.0.1:6379") is Mode.ATTACHED


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"local_mode": True, "dashboard": True}, "there is no Ray to look at"),
        ({"local_mode": True, "keep_alive": True}, "no Ray head to keep"),
        ({"local_mode": False, "dashboard_port": 8265}, "add `ray_dashboard=True`"),
        ({"local_mode": False, "address": "h:1", "dashboard": True}, "not ours to configure"),
        ({"local_mode": False, "address": "h:1", "keep_alive": True}, "not ours to configure"),
    ],
)
def test_flags_that_contradict_are_refused_with_the_reason(flags: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        ray_mode(**flags)  # type: ignore[arg-type]


def test_record_is_read_back_whole_and_a_damaged_one_is_refused(tmp_path: Path) -> None:
    head = made_up(tmp_path, guard=None)
    record = record_path(tmp_path, head.id)
    assert read_record(record) == head
    record.write_text(record.read_text()[:100])
    with pytest.raises(RayError, match="damaged"):
        status(tmp_path)
    with pytest.raises(RayError, match="damaged"):
        down(tmp_path)


def made_up(state_dir: Path, *, guard: Process | None, **changes: object) -> Head:
    """The record of a head, without the head."""
    folder = Path(tempfile.mkdtemp(dir=state_dir))
    record = record_path(state_dir, "abc123")
    record.parent.mkdir(exist_ok=True)
    head = Head(
        id="abc123",
        host=platform.node(),
        machine=this_machine(),
        mode="run",
        created=0.0,
        driver=Process(pid=2**22 + 1, started=1.0),
        guard=guard,
        command=(),
        address="127.0.0.1:1",
        client_port=2,
        metrics_port=3,
        token_path=state_dir / "auth_token",
        folder=folder,
    ).model_copy(update=changes)
    write_record(record, head)
    return head


@pytest.fixture
def bystander() -> Iterator[psutil.Process]:
    """An unrelated program that leads a session of its own."""
    with subprocess.Popen(["sleep", "600"], start_new_session=True) as process:
        yield psutil.Process(process.pid)
        process.kill()


def test_a_reused_pid_is_not_killed(tmp_path: Path, bystander: psutil.Process) -> None:
    """The bystander has the pid and session id of an earlier head of ours."""
    known = identify(bystander)
    stale = known.model_copy(update={"started": known.started - 60})
    head = made_up(tmp_path, guard=stale, members=(stale,))
    assert [item.state for item in status(tmp_path).heads] == ["dead"]
    assert down(tmp_path) == [head]
    assert bystander.status() in ALIVE
    assert status(tmp_path).heads == ()


def test_a_recorded_process_in_another_session_proves_nothing(tmp_path: Path, bystander: psutil.Process) -> None:
    """The bystander has the id of our old session; a recorded process is alive in another session."""
    stale = Process(pid=bystander.pid, started=1.0)
    made_up(tmp_path, guard=stale, members=(identify(psutil.Process()),))
    down(tmp_path)
    assert bystander.status() in ALIVE


def test_a_head_on_another_machine_is_listed_and_left_alone(tmp_path: Path, bystander: psutil.Process) -> None:
    other = this_machine().model_copy(update={"id": "0" * 32, "boot": "another"})
    made_up(tmp_path, guard=identify(bystander), machine=other)  # of the same name
    (item,) = status(tmp_path).heads
    assert (item.state, item.processes) == ("elsewhere", 0)
    assert down(tmp_path) == []
    assert bystander.status() in ALIVE
    with pytest.raises(RayError, match="this machine has no head abc123 of this project"):
        down(tmp_path, "abc123")


def test_what_was_here_before_the_machine_was_booted_is_dead(tmp_path: Path, bystander: psutil.Process) -> None:
    """Its pids belong to other programs now. Two containers with the same machine id are another case."""
    earlier = this_machine().model_copy(update={"boot": "an earlier one", "processes": HOSTS_OWN})
    head = made_up(tmp_path, guard=identify(bystander), machine=earlier)
    in_container = this_machine().processes not in ("", HOSTS_OWN)
    assert [i.state for i in status(tmp_path).heads] == ["elsewhere" if in_container else "dead"]
    assert down(tmp_path) == ([] if in_container else [head])
    assert bystander.status() in ALIVE


def test_identity_survives_a_corrected_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """On Linux psutil's creation time is the boot time plus ticks, and the boot time moves with the clock."""
    me = identify(psutil.Process())
    moved, boot = psutil.Process.create_time, psutil.boot_time
    monkeypatch.setattr(psutil.Process, "create_time", lambda self: moved(self) + 3600)
    monkeypatch.setattr(psutil, "boot_time", lambda: boot() + 3600)
    assert find(me) is not None


def test_a_folder_or_token_that_others_can_read_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    with pytest.raises(RayError, match="chmod 700"):
        make_private_directory(tmp_path)
    tmp_path.chmod(0o700)
    (tmp_path / "file").touch()
    with pytest.raises(RayError, match="cannot be made"):
        make_private_directory(tmp_path / "file" / "state")
    token = own_token(tmp_path)
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    assert len(token.read_text()) == 64
    assert own_token(tmp_path) == token
    token.chmod(0o644)
    with pytest.raises(RayError, match="mode 0644"):
        own_token(tmp_path)


@needs_ray
def test_impossible_options_are_refused_in_one_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        for changes, words in [
            ({"dashboard": True, "dashboard_port": port}, f"`ray_dashboard_port` {port} is in use"),
            ({"dashboard": True, "dashboard_port": 80}, "from 1024 to 65535"),
            ({"object_store_bytes": 1 << 20}, "at least 78643200"),
        ]:
            with pytest.raises(RayError, match=words) as caught:
                start_head(HeadOptions(state_dir=tmp_path, **changes))  # type: ignore[arg-type]
            assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@needs_ray
def test_a_head_that_does_not_start_says_why_and_leaves_nothing(tmp_path: Path) -> None:
    before = psutil.Process().children()
    with pytest.raises(RayError, match="`CPU` cannot be a custom resource") as caught:
        start_head(options(tmp_path, resources={"CPU": 1.0}))
    assert "\n" not in str(caught.value)
    assert "CPU" in (tmp_path / "failed-start.log").read_text()
    with pytest.raises(RayError, match="no answer within 1 s"):
        start_head(options(tmp_path, start_timeout_s=1.0))
    assert list((tmp_path / "heads").iterdir()) == []
    now = [c for c in psutil.Process().children() if c.status() != psutil.STATUS_ZOMBIE]
    assert [c for c in now if c not in before] == []


def unshared(*flags: str) -> list[str]:
    """Words before a command that run it in its own namespaces."""
    command = ["unshare", *flags]
    if shutil.which("unshare") is None or subprocess.run([*command, "true"], capture_output=True).returncode:
        pytest.skip(f"`{' '.join(command)}` is not permitted here: it takes Linux and root")
    return command


START = """
    import sys
    from pathlib import Path
    from xlstm_ray.supervisor.start import HeadOptions, start_head
    from xlstm_ray.errors import RayError
    try:
        start_head(HeadOptions(state_dir=Path(sys.argv[1]), temp_dir=Path(sys.argv[2])))
        print("started")
    except RayError as error:
        print(error)
"""
FULL = "mount -t tmpfs -o mode=700,size=1m tmpfs {0} && head -c 4m /dev/zero 2>/dev/null >{0}/fill"


@needs_ray
@pytest.mark.parametrize(
    ("flags", "before", "words"),
    [
        (["--net"], "true", "cannot reach itself at 127.0.0.1"),
        (["--mount"], "mount -o remount,bind,ro /dev/shm", "/dev/shm cannot be written"),
        (["--mount"], FULL.format("{temp}"), "has 0 MiB left"),
        (["--mount"], FULL.format("{state}"), "cannot be written: No space left on device"),
        (["--mount"], "mount -t tmpfs -o ro,mode=700 tmpfs {state}", "Read-only file system"),
    ],
)
def test_what_a_head_cannot_do_without_is_named_in_one_line(
    flags: list[str], before: str, words: str, tmp_path: Path
) -> None:
    short = Path(tempfile.mkdtemp(prefix="t", dir="/tmp"))  # its sockets' paths must not be long
    folders = [tmp_path / "state", short]
    folders[0].mkdir(mode=0o700)
    before = before.format(state=folders[0], temp=folders[1])
    done = subprocess.run(
        [*unshared(*flags), "bash", "-c", f'{before}; exec "$0" "$@"', sys.executable, "-c", textwrap.dedent(START)]
        + [str(folder) for folder in folders],
        env={**os.environ, "PYTHONPATH": ROOT},
        capture_output=True,
        text=True,
        timeout=150,
    )
    shutil.rmtree(short)
    assert done.stderr == "" or done.stderr.startswith("head: "), done.stderr
    assert words in done.stdout
    assert done.stdout.count("\n") == 1


def test_a_user_without_a_home_is_told_which_folder_to_give(tmp_path: Path) -> None:
    """A user id that is not in the password file, as in containers."""
    user = ["setpriv", "--reuid=54321", "--regid=54321", "--clear-groups"]
    user += ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search", "env", "-u", "HOME"]
    if shutil.which("setpriv") is None or subprocess.run([*user, "true"], capture_output=True).returncode:
        pytest.skip("`setpriv` is not permitted here: it takes Linux and root")
    code, out, err = cli(tmp_path / "a" / "b" / "c", "status", before=user)
    assert (code, out) == (1, "")
    assert err.startswith(
        "error: this user has no home directory for Ray's records: give a folder with --ray-state-dir"
    )
    assert err.count("\n") == 1
    assert cli(tmp_path / "a" / "b" / "c", "status", "--ray-state-dir", str(tmp_path / "none"), before=user)[0] == 0
    elsewhere = "prefill --prompt a --chunkwise-backend ray_compiled_chunks --ray-address 127.0.0.1:9".split()
    code, out, err = cli(tmp_path / "a", *elsewhere, "--ray-state-dir", str(tmp_path / "none"), before=user)
    assert (code, out) == (1, "")
    assert "127.0.0.1:9" in err
    assert "Traceback" not in err


@needs_ray
def test_a_port_that_is_taken_between_choice_and_use_costs_another_try(tmp_path: Path) -> None:
    """Other programs bind the ports of the first record as soon as it is written, and ports near 8265."""
    taken: dict[int, socket.socket] = {}
    started = threading.Event()

    def thieves() -> None:
        first = None
        while not started.wait(0.001):
            for head in all_heads(tmp_path):
                first = first or head.id
                wanted = {head.client_port, head.metrics_port} if head.id == first else set()
                wanted |= {head.dashboard_port} & set(range(DASHBOARD_PORT, 9000))
                for port in wanted - taken.keys():
                    taken[port] = socket.create_server(("127.0.0.1", port))

    (tmp_path / "heads").mkdir(mode=0o700)
    thread = threading.Thread(target=thieves)
    thread.start()
    try:
        head = start_head(options(tmp_path, stays=True, dashboard=True))
    finally:
        started.set()
    try:
        thread.join()
        ports = {head.client_port, head.metrics_port, head.dashboard_port}
        assert len(taken) == 3
        assert not taken.keys() & ports
        assert ports | {int(str(head.address).split(":")[1])} <= {port for _, port in listeners(head)}
        assert [h.id for h in all_heads(tmp_path)] == [head.id]
    finally:
        stop_head(head, tmp_path)
        for server in taken.values():
            server.close()
    assert gone(head)


@needs_ray
def test_one_head_of_two_that_are_asked_for_at_once_and_its_life_under_another_name(
    other: Other, tmp_path: Path
) -> None:
    """Helpers die that a run does not need; the machine is renamed; `down` under the new name leaves nothing."""
    state_dir = tmp_path / "home" / ".local" / "state" / "xlstm-ray"
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", "from xlstm_ray.cli.app import main; main()", "up", "--ray-dashboard"],
            env={**os.environ, "PYTHONPATH": ROOT, "HOME": str(tmp_path / "home")},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    said = [run.communicate(timeout=150) for run in runs]
    try:
        (head,) = all_heads(state_dir)
        assert sorted(run.returncode for run in runs) == [0, 1], said
        assert [f"head {head.id} is up already at {head.address}" in err for _, err in said].count(True) == 1
        assert {head.dashboard_port, head.client_port, head.metrics_port} <= {port for _, port in listeners(head)}

        parts = {"dashboard.py": "dashboard", "log_monitor.py": "log monitor", "client.server": "client server"}
        for process in in_session(head.pid):
            with contextlib.suppress(psutil.NoSuchProcess):  # some of a head's processes are short
                if any(part in " ".join(process.cmdline()) for part in parts):
                    process.kill()
        assert until(lambda: set(lost_helpers(head, state_dir)) == set(parts.values()), 60)
        time.sleep(3)  # `ray start --block` looked once a second
        (item,) = status(state_dir).heads
        assert (item.state, item.head.error) == ("alive", None)
        text = "\n".join(status(state_dir).lines())
        assert "without its " in text
        assert str(head.dashboard_url) not in text
        connected = """
            import sys
            from pathlib import Path
            from xlstm_ray.supervisor.connect import connect
            with connect(sys.argv[1], state_dir=Path(sys.argv[2])) as ray:
                print(ray.get(ray.remote(num_cpus=0)(lambda: 7).remote()))
        """
        assert script(connected, head.address, state_dir) == ["7"]

        renamed = [*unshared("--uts"), "sh", "-c", 'hostname another && exec "$@"', "sh"]
        assert cli(state_dir, "status", before=renamed)[1].startswith(f"head {head.id}: alive")
        assert f"head {head.id} is up already" in cli(state_dir, "up", before=renamed)[2]
        stranger = unshared("--pid", "--fork", "--mount-proc")  # a container beside us: pids are not ours to read
        assert cli(state_dir, "status", before=stranger)[1].startswith(f"head {head.id}: elsewhere")
        assert cli(state_dir, "down", before=stranger) == (0, "", "")
        assert in_session(head.pid)
        assert cli(state_dir, "down", before=renamed) == (0, f"stopped head {head.id}\n", "")
        assert gone(head)
        assert other.intact()
    finally:
        for left in all_heads(state_dir):
            stop_head(left, state_dir)


@needs_ray
def test_dead_and_wrong_addresses_are_refused_within_seconds() -> None:
    began = time.monotonic()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        for address, words in [
            ("auto", "give HOST:PORT"),
            ("ray://127.0.0.1:10001", "give HOST:PORT"),
            (f"127.0.0.1:{free_port()}", "nothing answers"),
            (f"127.0.0.1:{port}", "not a Ray head"),
        ]:
            with pytest.raises(RayError, match=words), connect(address):
                pass
    assert time.monotonic() - began < HANG_S


# One head for many questions


@needs_ray
def test_a_token_that_is_given_is_used_also_for_a_head_of_ours(head: Head, state_dir: Path, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong"
    wrong.write_text("0" * 64)
    for path, words in [(tmp_path / "none", "none cannot be read"), (wrong, "refuses the token")]:
        with (
            pytest.raises(RayError, match=words),
            connect(head.address, state_dir=state_dir, token_path=path),
        ):
            pass


@needs_ray
def test_a_kept_head_outlives_its_run_and_says_how_to_stop_it(head: Head, state_dir: Path) -> None:
    until = time.monotonic() + 60
    (item,) = status(state_dir).heads
    while item.processes != len(in_session(head.pid)):  # some of them are short
        assert time.monotonic() < until
        (item,) = status(state_dir).heads
    assert (item.state, item.head) == ("alive", head)
    assert item.processes > 10
    assert item.rss_bytes > 100 << 20
    token = head.token_path.read_text()
    for lines in (stays_lines(head), status(state_dir).lines()):
        text = "\n".join(lines)
        assert token not in text
        assert str(head.token_path) in text
        assert str(head.dashboard_url) in text
        assert "xlstm-ray down" in text
        assert str(head.address) in text


@needs_ray
def test_a_second_head_that_stays_is_refused(head: Head, state_dir: Path) -> None:
    code, out, err = cli(state_dir, "up")
    assert (code, out) == (1, "")
    assert err.startswith(f"error: head {head.id} is up already at {head.address}")
    assert err.count("\n") == 1


@needs_ray
def test_status_lists_the_other_cluster_as_not_ours(head: Head, other: Other, state_dir: Path) -> None:
    pids = {p.pid for p in in_session(other.session)}
    (stranger,) = [s for s in status(state_dir).strangers if set(s.pids) <= pids]
    assert len(stranger.pids) == 2
    assert stranger.address == other.address
    ours = {p.pid for p in in_session(head.pid)}
    assert not ours & {pid for s in status(state_dir).strangers for pid in s.pids}
    code, out, _ = cli(state_dir, "status")
    assert code == 0
    assert f"head {head.id}: alive, stays until `xlstm-ray down`" in out
    assert f"not ours: {stranger.session}" in out
    code, out, _ = cli(state_dir, "status", "--json")
    report = json.loads(out)
    assert report["heads"][0]["head"]["id"] == head.id
    assert stranger.session in [s["session"] for s in report["strangers"]]
    assert head.token_path.read_text() not in out


@needs_ray
def test_actors_are_listed_with_name_pid_and_memory(head: Head, state_dir: Path) -> None:
    out = script(
        """
        import os, signal, sys
        from pathlib import Path
        from xlstm_ray.supervisor.connect import connect
        mine = lambda *_: None
        signal.signal(signal.SIGTERM, mine)
        with connect(sys.argv[1].replace("127.0.0.1", "localhost"), state_dir=Path(sys.argv[2])) as ray:
            assert signal.getsignal(signal.SIGTERM) is mine
            @ray.remote(num_cpus=0)
            class Stage:
                def pid(self):
                    return os.getpid()
            stage = Stage.options(name="stage 0", lifetime="detached").remote()
            print(ray.get(stage.pid.remote()), "RAY_AUTH_TOKEN" in os.environ)
        """,
        head.address,
        state_dir,
        RAY_AUTH_TOKEN="0" * 64,  # somebody else's, which must not be used
    )
    pid = int(out[0].split()[0])
    assert out == [f"{pid} False"]
    (item,) = status(state_dir).heads
    (actor,) = item.actors
    assert (actor.name, actor.class_name, actor.state, actor.pid) == ("stage 0", "Stage", "ALIVE", pid)
    assert actor.namespace == NAMESPACE
    assert actor.rss_bytes > 10 << 20
    by_title = actors_of(head.model_copy(update={"dashboard_port": None}), in_session(head.pid))
    assert [(a.name, a.pid) for a in by_title] == [("Stage", pid)]


def listeners(head: Head) -> list[tuple[str, int]]:
    found = []
    for process in in_session(head.pid):
        with contextlib.suppress(psutil.NoSuchProcess):
            for c in process.net_connections("inet"):
                if c.status == psutil.CONN_LISTEN or (c.type == socket.SOCK_DGRAM and not c.raddr):
                    found.append((c.laddr.ip.removeprefix("::ffff:"), c.laddr.port))
    return found


@needs_ray
def test_every_listener_is_on_loopback(head: Head) -> None:
    found = listeners(head)
    ports = {port for _, port in found}
    assert {head.dashboard_port, head.client_port, head.metrics_port, int(str(head.address).split(":")[1])} <= ports
    assert {ip for ip, _ in found} <= {"127.0.0.1", "::1"}


def http(url: str, token: str | None = None, data: bytes | None = None) -> tuple[int, bytes]:
    request = urllib.request.Request(url, data=data, headers={"Authorization": f"Bearer {token}"} if token else {})
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=5) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, b""


@needs_ray
def test_dashboard_and_jobs_refuse_without_the_token(head: Head, tmp_path: Path) -> None:
    for path in ("/api/jobs/", "/api/v0/actors", "/api/version", "/logical/actors", "/api/cluster_status"):
        assert http(f"{head.dashboard_url}{path}")[0] == 401
        assert http(f"{head.dashboard_url}{path}", "0" * 64)[0] == 403
    job = json.dumps({"entrypoint": f"touch {tmp_path}/ran"}).encode()
    assert http(f"{head.dashboard_url}/api/jobs/", data=job)[0] == 401
    code, jobs = http(f"{head.dashboard_url}/api/jobs/", head.token_path.read_text())
    assert code == 200
    assert b"/ran" not in jobs


GRPC = [  # one method of each of Ray's gRPC servers
    "/ray.rpc.NodeInfoGcsService/GetClusterId",
    "/ray.rpc.NodeManagerService/GetSystemConfig",
    "/ray.rpc.ObjectManagerService/Pull",
    "/ray.rpc.ReporterService/HealthCheck",
    "/ray.rpc.CoreWorkerService/GetCoreWorkerStats",
    "/ray.rpc.RayletDriver/ClusterInfo",  # Ray Client
]


def grpc_answers(port: int, token: str | None) -> set[str]:
    import grpc

    codes = set()
    with grpc.insecure_channel(f"127.0.0.1:{port}", options=[("grpc.enable_http_proxy", 0)]) as channel:
        for method in GRPC:
            try:
                channel.unary_unary(method)(
                    b"", timeout=5, metadata=[("authorization", f"Bearer {token}")] if token else None
                )
                codes.add("OK")
            except grpc.RpcError as error:
                codes.add(error.code().name)
    return codes - {"UNIMPLEMENTED"}


@needs_ray
def test_every_port_but_metrics_refuses_without_the_token(head: Head) -> None:
    """All listeners: GCS, raylet, workers, agents, client, dashboard."""
    seen = set()
    for _, port in listeners(head):
        try:
            code, text = http(f"http://127.0.0.1:{port}/api/jobs/")
        except (http_client.HTTPException, OSError):  # not HTTP/1
            assert grpc_answers(port, None) == {"UNAUTHENTICATED"}
            assert grpc_answers(port, "0" * 64) == {"UNAUTHENTICATED"}
            seen.add(port)
            continue
        assert code == 401 or (code == 200 and text.startswith(b"# HELP")), port
        seen.update([port] if code == 401 else [])
    assert {head.dashboard_port, head.client_port, int(str(head.address).split(":")[1])} <= seen
    assert len(seen) >= 8
    assert "OK" in grpc_answers(int(str(head.address).split(":")[1]), head.token_path.read_text())


@needs_ray
def test_a_wrong_token_and_an_open_head_are_refused_at_once(head: Head, other: Other, tmp_path: Path) -> None:
    wrong = tmp_path / "token"
    wrong.write_text("0" * 64)
    began = time.monotonic()
    for address, token_path, words in [
        (str(head.address), wrong, "refuses the token"),
        (str(head.address), tmp_path / "missing", "cannot be read"),
        (f"127.0.0.1:{head.dashboard_port}", head.token_path, "not a Ray head"),
        (other.address, head.token_path, "lets anybody in"),
    ]:
        with pytest.raises(RayError, match=words), connect(address, token_path=token_path):
            pass
    assert time.monotonic() - began < HANG_S


@needs_ray
def test_ray_itself_cannot_connect_without_the_token(head: Head) -> None:
    """A driver without authentication: Ray's own client library gives up or hangs, but never gets in."""
    program = "import ray, sys; ray.init(sys.argv[1]); print('in')"
    addresses = [str(head.address), f"ray://127.0.0.1:{head.client_port}"]
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    tries = [
        subprocess.Popen(
            [sys.executable, "-c", program, address],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        for address in addresses
    ]
    time.sleep(8)  # with the token it takes 1 to 2 s
    for process in tries:
        process.kill()
        assert process.communicate()[0] == b""
        assert process.returncode != 0


@needs_ray
def test_a_process_that_imported_ray_too_early_is_told_so(head: Head, state_dir: Path) -> None:
    out = script(
        """
        import sys
        from pathlib import Path
        import ray
        from xlstm_ray.errors import RayError
        from xlstm_ray.supervisor.connect import connect
        try:
            with connect(sys.argv[1], state_dir=Path(sys.argv[2])):
                print("in")
        except RayError as error:
            print(error)
        """,
        head.address,
        state_dir,
    )
    assert len(out) == 1
    assert "ray was imported before" in out[0]


@needs_ray
def test_the_token_is_in_its_file_and_nowhere_else(head: Head, state_dir: Path) -> None:
    token = head.token_path.read_text()
    assert stat.S_IMODE(head.token_path.stat().st_mode) == 0o600
    assert stat.S_IMODE(state_dir.stat().st_mode) == 0o700
    assert stat.S_IMODE(head.folder.parent.stat().st_mode) == 0o700  # Ray makes its own folders 0777
    for process in in_session(head.pid):
        with contextlib.suppress(psutil.NoSuchProcess):
            assert token not in " ".join(process.cmdline())
        assert token not in str(process.environ())
    files = [p for p in (*head.folder.rglob("*"), *state_dir.rglob("*")) if p.is_file() and p != head.token_path]
    assert len(files) > 10
    assert [p for p in files if token.encode() in p.read_bytes()] == []


@needs_ray
def test_down_ends_jobs_too_and_leaves_the_other_cluster(head: Head, other: Other, state_dir: Path) -> None:
    """The last test that uses this head. A job's program has its own session."""
    job = json.dumps({"entrypoint": "sleep 654321"}).encode()
    assert http(f"{head.dashboard_url}/api/jobs/", head.token_path.read_text(), job)[0] == 200
    jobs: list[psutil.Process] = []

    def started() -> bool:
        jobs[:] = [p for p in psutil.process_iter(["cmdline"]) if p.info["cmdline"] == ["sleep", "654321"]]
        return bool(jobs)

    assert until(started, 30)
    assert os.getsid(jobs[0].pid) != head.pid
    assert cli(state_dir, "down") == (0, f"stopped head {head.id}\n", "")
    assert gone(head)
    assert not is_running(jobs[0])  # a zombie until the first process reaps it
    assert status(state_dir).heads == ()
    assert down(state_dir) == []
    assert other.intact()


# However the driver ends

DRIVER = """
    import os, signal, sys, time
    from pathlib import Path
    from xlstm_ray.supervisor.start import HeadOptions, managed
    from xlstm_ray.supervisor.connect import connect
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job starts with it ignored
    with managed(HeadOptions(state_dir=Path(sys.argv[1]), num_cpus=2, object_store_bytes=80 << 20)) as head:
        with connect(head) as ray:
            @ray.remote(num_cpus=0)
            class Stage:
                def work(self):
                    while True:
                        time.sleep(1)
                def pid(self):
                    return os.getpid()
            stage = Stage.remote()
            print(ray.get(stage.pid.remote()), flush=True)
            stage.work.remote()
            while True:
                time.sleep(1)
"""


@pytest.fixture
def driver(tmp_path: Path) -> Iterator[Callable[[], tuple[subprocess.Popen[str], Head]]]:
    """Runs the driver until its actor is busy."""
    started = []

    def start() -> tuple[subprocess.Popen[str], Head]:
        with open(tmp_path / "driver.log", "w") as log:
            process = subprocess.Popen(
                [sys.executable, "-c", textwrap.dedent(DRIVER), str(tmp_path)],
                env={**os.environ, "PYTHONPATH": ROOT},
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        started.append(process)
        assert process.stdout is not None
        actor = int(process.stdout.readline() or 0)
        assert actor, (tmp_path / "driver.log").read_text()
        (head,) = all_heads(tmp_path)
        assert actor in [p.pid for p in in_session(head.pid)]
        return process, head

    yield start
    for process in started:
        process.kill()
        process.communicate()
    for head in all_heads(tmp_path):
        stop_head(head, tmp_path)


@needs_ray
@pytest.mark.parametrize("how", ["SIGINT", "SIGTERM", "SIGKILL"])
def test_nothing_is_left_when_the_driver_ends(
    how: str, driver: Callable[[], tuple[subprocess.Popen[str], Head]], other: Other, tmp_path: Path
) -> None:
    process, head = driver()
    assert down(tmp_path) == []  # a run that is alive keeps its head
    assert in_session(head.pid)
    process.send_signal(signal.Signals[how])
    process.wait(30)
    assert until(lambda: gone(head), 60)
    assert until(lambda: status(tmp_path).heads == (), 60)
    assert other.intact()


@needs_ray
def test_a_program_that_leaves_all_open_ends_in_silence_and_nothing_of_its_head_is_left(tmp_path: Path) -> None:
    program = """
        import sys
        from contextlib import ExitStack
        from pathlib import Path
        from xlstm_ray.supervisor.start import HeadOptions, managed
        from xlstm_ray.supervisor.connect import connect
        stack = ExitStack()
        options = HeadOptions(state_dir=Path(sys.argv[1]), num_cpus=1, object_store_bytes=80 << 20)
        head = stack.enter_context(managed(options))
        ray = stack.enter_context(connect(head))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": ROOT},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert until(lambda: status(tmp_path).heads == (), 60)


@needs_ray
def test_without_its_guard_an_orphan_is_found_and_removed(
    driver: Callable[[], tuple[subprocess.Popen[str], Head]], other: Other, tmp_path: Path
) -> None:
    process, head = driver()
    os.kill(head.pid or 0, signal.SIGKILL)
    process.kill()
    process.wait()
    time.sleep(1)
    (item,) = status(tmp_path).heads
    assert item.state == "orphaned"
    assert item.processes > 5
    assert any("its driver is gone" in line for line in status(tmp_path).lines())
    assert [h.id for h in down(tmp_path)] == [head.id]
    assert gone(head)
    assert status(tmp_path).heads == ()
    assert other.intact()


@needs_ray
def test_a_head_that_somebody_else_ends_is_recorded_with_its_logs(other: Other, tmp_path: Path) -> None:
    with managed(options(tmp_path)) as head:
        assert ended_by_itself(head, tmp_path) is None
        (raylet,) = [p for p in in_session(head.pid) if p.name() == "raylet"]
        raylet.terminate()  # what somebody's `ray stop` does
        assert until(lambda: not in_session(head.pid), 30)
        assert str(head.folder) in str(ended_by_itself(head, tmp_path))
    (item,) = status(tmp_path).heads
    assert item.state == "dead"
    assert "ended from outside" in str(item.head.error)
    assert (head.folder / "start.log").exists()
    assert [h.id for h in down(tmp_path, head.id)] == [head.id]
    assert gone(head)
    assert other.intact()
