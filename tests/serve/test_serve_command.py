"""The service as a program: what it prints, who may come in, how it starts and ends."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading

import programs
import pytest
from services import WORDS, Client, model, serving, serving_here
from test_documents import until

from xlstm_ray.errors import GridLost, UsageError
from xlstm_ray.serve.desk import Desk
from xlstm_ray.serve.options import Key, Options
from xlstm_ray.serve.server import Server

__all__ = ["model"]

KEYS = "first-key-of-somebody", "second-key-of-another"


def test_what_it_prints_can_be_pasted_and_sigterm_lets_requests_end(model):
    with serving("--model", model, "--served-name", "it's tiny", *WORDS) as service:
        _, curl, python = [line.strip() for line in service.said]
        for line in (curl, python.replace("python", sys.executable, 1)):
            done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=60)
            assert done.returncode == 0, done.stderr
            assert done.stdout
        service.ask("/v1/completions?key=secret", b"secret {")
        alone = service.complete("a secret", max_tokens=300).json["choices"]
        connection = service.send("/v1/completions", {"prompt": "a secret", "max_tokens": 300, "temperature": 0})
        stream = service.send("/v1/completions", {"prompt": "b", "max_tokens": 300, "stream": True})
        assert stream.recv(15) == b"HTTP/1.1 200 OK"
        service.process.send_signal(signal.SIGTERM)
        refused = service.complete("b")
        while refused.status == 200:
            refused = service.complete("b")
        assert (refused.status, refused.error["code"], refused.headers["retry-after"]) == (503, "draining", "5")
        assert service.ask("/health").status == 503
        whole = b"".join(iter(lambda: connection.recv(1 << 16), b""))
        assert json.loads(whole.partition(b"\r\n\r\n")[2])["choices"] == alone
        assert b"".join(iter(lambda: stream.recv(1 << 16), b"")).count(b"[DONE]") == 1
        assert service.process.wait(60) == 0
        assert service.process.stdout is not None
        assert "secret" not in "".join([*service.said, service.process.stdout.read(), *service.errors])


def test_garbage_collections_pass_over_what_was_there_before_it_serves(model, tmp_path):
    """Else a full one looks at all objects of torch while all answers wait. A signal asks the process itself."""
    (tmp_path / "sitecustomize.py").write_text(
        "import gc, signal, sys\n"
        "def tell(*_):\n"
        "    print('frozen', gc.get_freeze_count(), 'others', len(gc.get_objects()), file=sys.stderr, flush=True)\n"
        "signal.signal(signal.SIGUSR1, tell)\n"
    )
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    with serving("--model", model, *WORDS, start=subprocess.Popen, PYTHONPATH=path) as service:
        for _ in range(5):
            assert service.complete("a", max_tokens=20).status == 200
        service.process.send_signal(signal.SIGUSR1)
        until(lambda: any(line.startswith("frozen ") for line in service.errors))
        (line,) = [line.split() for line in service.errors if line.startswith("frozen ")]
    frozen, others = int(line[1]), int(line[3])
    assert frozen > 100_000
    assert others < frozen / 10


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_while_it_compiles_a_signal_ends_it_at_once(model, tmp_path, number):
    """What is compiled holds up whoever wants to stop it: here the compiler never ends."""
    compiler = tmp_path / "g++"
    compiler.write_text('#!/bin/sh\ntouch "$(dirname "$0")/began"\nexec sleep 600\n')
    compiler.chmod(0o755)
    env = {**os.environ, "CXX": str(compiler), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "kernels")}
    command = [sys.executable, "-m", "xlstm_ray", "serve", "--port", "0", "--model", str(model)]
    with programs.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        until((tmp_path / "began").exists)
        process.send_signal(number)
        said, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert (said, errors.strip().splitlines()[-1]) == ("", "interrupted")


def test_a_second_signal_ends_requests_with_an_error_that_says_why(model):
    with serving("--model", model, *WORDS) as service:
        stream = service.send("/v1/completions", {"prompt": "b", "max_tokens": 4000, "stream": True})
        assert stream.recv(15) == b"HTTP/1.1 200 OK"
        service.process.send_signal(signal.SIGINT)
        while service.ask("/health").status == 200:
            pass
        service.process.send_signal(signal.SIGINT)
        said = b"".join(iter(lambda: stream.recv(1 << 16), b""))
        assert b'"code":"draining"' in said
        assert service.process.wait(60) == 130


def test_after_its_time_a_drain_ends_what_is_left(model):
    with serving_here(model, drain_s=0.3) as service:
        stream = service.send("/v1/completions", {"prompt": "b", "max_tokens": 4000, "stream": True})
        assert stream.recv(15) == b"HTTP/1.1 200 OK"
        assert not service.server.drain(threading.Event())
        service.server.close()
        assert b'"code":"draining"' in b"".join(iter(lambda: stream.recv(1 << 16), b""))


def test_a_fault_under_the_engine_is_told_to_callers_and_probes(model, monkeypatch):
    with serving_here(model) as service:
        assert service.complete("a").status == 200
        plain, calls = service.engine.executor.result, []

        def result():
            calls.append(1)
            if len(calls) == 5:
                raise GridLost("the grid is gone")
            return plain()

        monkeypatch.setattr(service.engine.executor, "result", result)
        got = service.complete("a" * 500)
        assert (got.status, got.error["message"], got.error["type"]) == (500, "the grid is gone", "server_error")
        for got in (service.ask("/health"), service.complete("a")):
            assert (got.status, got.error["code"]) == (503, "failed")
        assert isinstance(service.engine.failed, GridLost)


def test_until_the_model_is_there_it_answers_503(model):
    server = Server(Options(port=0), threading.Event())
    try:
        for path in ("/health", "/v1/models"):
            with socket.create_connection(("127.0.0.1", server.port)) as connection:
                connection.sendall(f"GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n".encode())
                said = b"".join(iter(lambda: connection.recv(1 << 16), b""))
            assert said.startswith(b"HTTP/1.1 503" if path == "/health" else b"HTTP/1.1 200")
            assert (b"retry-after: 5" in said) == (path == "/health")
    finally:
        server.close()


def test_a_port_that_is_taken_and_a_wrong_model_are_one_line(run, model, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"--port {port}" in run("serve", "--model", model, "--port", port, *WORDS).error
    assert "is not a directory" in run("serve", "--model", tmp_path / "none", "--port", 0).error


def test_beyond_this_machine_it_needs_a_key(run, tmp_path):
    error = run("serve", "--host", "0.0.0.0").error
    assert "--api-key-file" in error
    keys = tmp_path / "keys"
    for text, says in (("", "the file is not a key"), ("short\n", "key 1 is not"), ("a" * 16 + "\nb b" * 9, "key 2")):
        keys.write_text(text)
        assert says in run("serve", "--api-key-file", keys).error
    assert "cannot be read" in run("serve", "--api-key-file", tmp_path / "none").error
    for host in ("0.0.0.0", "::", "192.168.1.2", "example.org"):
        with pytest.raises(UsageError, match="no key was given"):
            Options(host=host)
    assert Options(host="0.0.0.0", keys=tuple(map(Key, KEYS))).url == "http://127.0.0.1:8000"
    assert {Options(host=host).url for host in ("localhost", "::1")} == {"http://localhost:8000", "http://[::1]:8000"}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--prefill-replicas 1", "--prefill-replicas and --decode-replicas belong together"),
        ("--replicas 1 --prefill-replicas 1 --decode-replicas 1", "--replicas do both"),
        ("--max-replicas 2", "--max-replicas needs --replicas"),
        ("--replicas 3 --max-replicas 2", "--max-replicas is 2, fewer"),
        ("--replicas 2 --chunkwise-backend ray_compiled_steps", "--chunkwise-backend"),
        ("--replicas 2 --stages 2", "--stages"),
        ("--replicas 2 --ray-token-path token", "--ray-token-path"),
        ("--replicas 2 --ray-temp-dir t --ray-address 127.0.0.1:1", "--ray-temp-dir is for a head of this run"),
        ("--replicas 2 --no-ray-local-mode", "--ray-local-mode"),
        ("--replicas 0", "--replicas"),
    ],
)
def test_replicas_that_cannot_be_are_one_line(run, words, says):
    assert says in run("serve", "--port", 0, *words.split()).err


def test_replicas_take_the_folder_of_their_heads_records(model, tmp_path):
    words = ["--model", model, *WORDS, "--replicas", 2, "--ray-state-dir", tmp_path, "--ray-address", "127.0.0.1:1"]
    command = [sys.executable, "-m", "xlstm_ray", "serve", "--port", "0", *map(str, words)]
    ran = programs.run(command, capture_output=True, text=True)
    assert ran.returncode == 1
    assert ran.stderr.startswith("error: nothing answers at --ray-address 127.0.0.1:1")


def test_only_those_with_a_key_come_in_and_tenants_share_nothing(model):
    with serving_here(model, keys=KEYS, settings={"cache_memory_mb": 64}) as service:
        assert service.ask("/health").status == 200
        for headers in ({}, {"authorization": "Bearer nonsense"}, {"authorization": f"Basic {KEYS[0]}"}):
            got = service.ask("/v1/models", **headers)
            assert (got.status, got.error["code"], got.headers["www-authenticate"]) == (
                401,
                "invalid_api_key",
                "Bearer",
            )
        texts = []
        for key, word in ((KEYS[0], "miss"), (KEYS[0], "hit"), (KEYS[1], "miss")):
            body = {"prompt": "a prompt " * 20, "temperature": 0}
            got = service.ask("/v1/completions", body, authorization=f"Bearer {key}")
            assert got.headers["x-xlstm-cache"].startswith(word)
            texts.append(got.json["choices"])
        assert texts[0] == texts[1] == texts[2]


def test_a_service_that_loads_says_so_and_takes_nothing():
    server = Server(Options(port=0), threading.Event())
    try:
        client = Client(f"http://127.0.0.1:{server.port}")
        load = client.ask("/load")
        assert (load.status, load.json["status"], load.json["documents"]) == (200, "loading", None)
        for path, body in (("/health", None), ("/v1/completions", {"prompt": "a"}), ("/v1/states", None)):
            got = client.ask(path, body)
            assert (got.status, got.error["code"]) == (503, "loading")
            assert int(got.headers["retry-after"]) > 0
        assert client.ask("/").status == client.ask("/metrics").status == 200
    finally:
        server.close()


def test_strange_names_and_pages_are_kept_out(model):
    with serving_here(model, hosts=("models.lan",)) as service:
        for host in ("localhost", "127.0.0.1:99", "[::1]:80", "LOCALHOST:1", "models.lan:8000"):
            assert service.ask("/v1/models", host=host).status == 200
        for host in ("evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.nip.io", ""):
            assert service.ask("/v1/models", host=host).status == 403
        assert service.ask("/v1/models", origin="http://evil.example").status == 403
        assert service.ask("/v1/models", origin=service.url).status == 200
        assert service.ask("/v1/models", origin="null").status == 403


def test_the_desk_knows_what_it_has_room_for() -> None:
    desk = Desk(Options(queue=2))
    desk.slots = 1
    desk.admit(3)
    desk.release(2)
    desk.admit(2)
    assert desk.under_way == 3


def test_the_help_needs_neither_torch_nor_fastapi() -> None:
    code = (
        "import sys; sys.argv = ['xlstm-ray', 'serve', '--help']\n"
        "from xlstm_ray.cli.app import main\n"
        "try: main()\n"
        "finally: print({'torch', 'fastapi', 'uvicorn', 'jinja2', 'prometheus_client'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert done.stdout.splitlines()[-1] == "set()"


def test_what_others_ask_changes_no_bit_of_an_answer(model):
    """By its log-probabilities: a call with more rows sums in another order."""
    with serving("--model", model, "--deterministic", "--slots", 4, *WORDS) as service:
        asked = {"max_tokens": 12, "logprobs": 5}
        alone = service.complete("a secret", **asked).json["choices"]
        streams = [
            service.send("/v1/completions", {"prompt": str(n), "max_tokens": 900, "stream": True}) for n in "123"
        ]
        for stream in streams:
            assert stream.recv(15) == b"HTTP/1.1 200 OK"
        assert service.complete("a secret", **asked).json["choices"] == alone
        for stream in streams:
            stream.close()
