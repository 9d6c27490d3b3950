"""What tests of the service share: the program itself, serving a tiny model, and ways to ask it."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any, NamedTuple

import programs
import pytest
from tiny import make_model

import xlstm_ray
from xlstm_ray.serve.options import Key, Options
from xlstm_ray.serve.server import Server
from xlstm_ray.text.template import Template

WORDS = "--device cpu --tile-size 32 --chunk-size 16 --chunkwise-backend native".split()


class Got(NamedTuple):
    """A reply."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def events(self) -> list[Any]:
        """The objects of a stream; the last one was [DONE]."""
        lines = [line for line in self.body.decode().split("\n\n") if line and not line.startswith(":")]
        assert lines[-1] == "data: [DONE]"
        return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]

    @property
    def error(self) -> dict[str, Any]:
        """What is wrong, in OpenAI's form."""
        error = self.json["error"]
        assert set(error) == {"message", "type", "param", "code"}
        return error


class Client:
    """Asks a service."""

    def __init__(self, url: str, **headers: str):
        self.url, self.port, self._headers = url, int(url.rpartition(":")[2]), headers

    def ask(self, path: str, body: Any = None, method: str | None = None, **headers: str) -> Got:
        """GET, or POST where there is a body: an object is sent as JSON."""
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        names = {name.replace("_", "-"): value for name, value in {**self._headers, **headers}.items()}
        request = urllib.request.Request(self.url + path, data, names, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as reply:
                return Got(reply.status, {k.lower(): v for k, v in reply.headers.items()}, reply.read())
        except urllib.error.HTTPError as err:
            return Got(err.code, {k.lower(): v for k, v in err.headers.items()}, err.read())

    def complete(self, prompt: Any, **fields: Any) -> Got:
        return self.ask("/v1/completions", {"prompt": prompt, "temperature": 0, **fields})

    def connect(self, buffer: int | None = None) -> socket.socket:
        """buffer: bytes that the system may have for this end before it reads."""
        connection = socket.socket()
        if buffer is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        connection.settimeout(60)
        connection.connect(("127.0.0.1", self.port))
        return connection

    def send(self, path: str, body: Any, buffer: int | None = None) -> socket.socket:
        """Send a request and read nothing of its reply."""
        data = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(data)}\r\n\r\n"
        connection = self.connect(buffer)
        connection.sendall(head.encode() + data)
        return connection


class Running(Client):
    """A service in a process of its own."""

    def __init__(self, process: subprocess.Popen[str], url: str, said: list[str], errors: list[str]):
        super().__init__(url)
        self.process, self.said, self.errors = process, said, errors

    def end(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and wait; returns the exit code."""
        self.process.send_signal(number)
        return self.process.wait(60)


def reading_line(stream: IO[str], pattern: str, said: list[str] | None = None) -> str:
    """What the pattern's group is in the first line that has it; said: gets the lines up to it."""
    for line in stream:
        if said is not None:
            said.append(line)
        if found := re.search(pattern, line):
            return found[1]
    raise AssertionError(f"it has ended without {pattern}")


@contextmanager
def serving(*words: object, start: type[subprocess.Popen] = programs.Popen, **variables: str) -> Iterator[Running]:
    """`xlstm-ray serve` at a free port, when it is ready. start: `subprocess.Popen` for tests of resident memory."""
    command = [sys.executable, "-m", "xlstm_ray", "serve", "--port", "0", *map(str, words)]
    env = {**os.environ, "PYTHONUNBUFFERED": "1", **variables}
    process = start(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    errors: list[str] = []
    assert process.stderr is not None
    assert process.stdout is not None
    reader = threading.Thread(target=errors.extend, args=(process.stderr,), daemon=True)
    reader.start()
    said: list[str] = []
    try:
        url = reading_line(process.stdout, r"at (http://\S+)/v1", said)
        said += [process.stdout.readline() for _ in range(2)]
        yield Running(process, url, said, errors)
        assert not [line for line in errors if "Traceback" in line], errors
    finally:
        process.kill()
        process.wait()
        reader.join()
        process.stdout.close()
        process.stderr.close()


def tiny_model(directory: Path) -> Path:
    make_model(directory, hidden_size=64, num_hidden_layers=2, num_heads=2, eos_token_id=None)
    return directory


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("tiny"))


class Here(Client):
    """A service in this process, behind a real socket. engine: what serves."""

    def __init__(self, server: Server, engine: xlstm_ray.Engine):
        super().__init__(f"http://127.0.0.1:{server.port}")
        self.server, self.engine, self.desk = server, engine, server.desk


@contextmanager
def serving_here(
    model: Path,
    *,
    slots: int = 4,
    template: Template | None = None,
    keys: Sequence[str | Key] = (),
    settings: Any = MappingProxyType({}),
    **options: Any,
) -> Iterator[Here]:
    options["keys"] = tuple(key if isinstance(key, Key) else Key(key, f"key {n}") for n, key in enumerate(keys, 1))
    server = Server(Options(**{"port": 0, "name": "tiny", "ping_s": 0.05, **options}), threading.Event(), template)
    sizes = {"device": "cpu", "tile_size": 32, "chunk_size": 16, "chunkwise_backend": "native"}
    try:
        with xlstm_ray.load(model, **{**sizes, **settings}) as engine:
            server.open(engine, engine.serve(slots=slots))
            yield Here(server, engine)
            server.drain(threading.Event())
            server.close()
    finally:
        server.close()


@pytest.fixture(scope="module")
def service(model: Path) -> Iterator[Here]:
    """With a cache, room for 4 answers and 8 that wait, bodies of up to a MiB."""
    with serving_here(model, queue=8, body_bytes=1 << 20, settings={"cache_memory_mb": 64}) as here:
        yield here
