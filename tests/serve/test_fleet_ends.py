"""How a service with replicas ends: by signals, by `xlstm-ray down` under it, by kill -9; real heads and processes."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from services import WORDS, Running, model, serving, serving_here

from xlstm_ray import RecurrentState
from xlstm_ray.supervisor.presence import Presence
from xlstm_ray.supervisor.records import Head
from xlstm_ray.supervisor.start import HeadOptions, start_head
from xlstm_ray.supervisor.status import status
from xlstm_ray.supervisor.stop import stop_head

__all__ = ["model"]

STREAM = {"prompt": "a" * 40, "max_tokens": 2000, "ignore_eos": True, "temperature": 0, "stream": True}


def state_dir(home: Path) -> Path:
    return home / ".local" / "state" / "xlstm-ray"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture
def head(home: Path) -> Iterator[Head]:
    """A head that is there already, as `xlstm-ray up` starts it."""
    options = HeadOptions(state_dir=state_dir(home), stays=True, num_cpus=4, object_store_bytes=100 << 20)
    started = start_head(options)
    yield started
    stop_head(started, state_dir(home))


def words(model: Path, *more: object) -> list[object]:
    return ["--model", model, "--served-name", "tiny", *WORDS, "--threads", 1, *more]


def streaming(service: Running) -> socket.socket:
    """An answer that has begun."""
    stream = service.send("/v1/completions", STREAM)
    got = b""
    while b"data: " not in got:
        got += stream.recv(1 << 12)
    return stream


def all_of(stream: socket.socket) -> bytes:
    return b"".join(iter(lambda: stream.recv(1 << 16), b""))


def replicas(home: Path, service: Running) -> list[str]:
    """Those of this service, as `status` shows them."""
    actors = [actor.name for item in status(state_dir(home)).heads for actor in item.actors]
    return [name for name in actors if f"ServeReplica:xlstm-ray-serve-{service.port}-" in name]


def digest(client, name: str, file: Path) -> str:
    while client.ask(f"/v1/states/{name}").json["status"] != "ready":
        time.sleep(0.05)
    file.write_bytes(client.ask(f"/v1/states/{name}/file").body)
    return RecurrentState.load(file).digest()


def test_a_killed_command_leaves_no_replica_on_somebodys_head_and_the_next_one_goes_on(head, home, model, tmp_path):
    text = {"id": "doc", "prompt": "i" * 8_000}
    cache = "--cache-dir", tmp_path / "cache", "--ray-address", head.address
    with serving(*words(model, "--replicas", 1, *cache), HOME=str(home)) as service:
        assert len(replicas(home, service)) == 1
        service.ask("/v1/states", text)
        while not service.ask("/v1/states/doc").json["tokens_done"]:
            time.sleep(0.01)
        service.process.kill()
        service.process.wait()
        killed = service
    with serving(*words(model, "--replicas", 1, *cache), HOME=str(home)) as service:
        again = digest(service, "doc", tmp_path / "again")
        stream = streaming(service)
        service.process.send_signal(signal.SIGTERM)
        assert all_of(stream).count(b"[DONE]") == 1
        assert service.process.wait(60) == 0
        assert not replicas(home, service)
    while replicas(home, killed):
        time.sleep(0.2)
    (item,) = status(state_dir(home)).heads
    assert item.state == "alive"
    with serving_here(model) as here:
        here.ask("/v1/states", text)
        assert digest(here, "doc", tmp_path / "here") == again


def test_down_under_a_service_ends_it_with_a_line(home, model):
    with serving(*words(model, "--replicas", 2, "--max-stall-ms", 60_000), HOME=str(home)) as service:
        (item,) = status(state_dir(home)).heads
        assert len(replicas(home, service)) == 2
        stream = streaming(service)
        command = [sys.executable, "-m", "xlstm_ray", "down"]
        env = {**os.environ, "HOME": str(home)}
        said = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
        assert f"left head {item.head.id}: its run" in said.stderr  # without a name it does no harm
        said = subprocess.run([*command, item.head.id], env=env, capture_output=True, text=True, check=True)
        assert said.stdout == f"stopped head {item.head.id}\n"
        assert all_of(stream)  # it ends, in whatever way
        assert service.process.wait(60) == 4
        error = next(line for line in service.errors if line.startswith("error: "))
        assert f"Ray's head at {item.head.address} is gone" in error or "Ray ended this run's process" in error
        with pytest.raises(ConnectionRefusedError):
            service.connect()
    assert not status(state_dir(home)).heads
    assert not item.head.folder.exists()


def test_a_head_is_gone_when_its_port_is_closed():
    with socket.create_server(("127.0.0.1", 0)) as server:
        presence = Presence(f"127.0.0.1:{server.getsockname()[1]}")
        assert presence.gone() is None
    assert presence.gone() == f"Ray's head at {presence.address} is gone (Connection refused)"
