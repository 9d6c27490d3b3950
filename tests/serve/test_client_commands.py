"""`xlstm-ray client` against a real service: the program, its lines, its exit codes."""

import http.server
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import programs
import pytest
from services import WORDS, model, reading_line, serving, serving_here
from test_documents import BOOK, LONG, QUESTION, parts, saved, until

from xlstm_ray.client import service as http_client
from xlstm_ray.text.template import Template

__all__ = ["model"]

KEY = "the-key-of-this-test"


@pytest.fixture(scope="module")
def service(model):
    template = Template("{% for m in messages %}{{ m.content }}{% endfor %}", "test", {})
    with serving_here(model, template=template, keys=(KEY,)) as here:
        yield here


@pytest.fixture
def client(run, service, monkeypatch):
    """The program's `client` commands, with the service's address and key."""
    monkeypatch.setenv("XLSTM_RAY_API_KEY", KEY)
    return lambda *words: run("client", *words, "--url", service.url)


def answer(service: Any, prompt: str | None, **more: Any) -> str:
    more.setdefault("sampling", {})
    return "".join(service.engine.generate(prompt, max_new_tokens=9, temperature=0, **more))


@pytest.mark.parametrize("how", ["text", "file", "standard input"])
def test_a_document_is_read_and_asked(client, service, tmp_path, how, monkeypatch):
    (tmp_path / "book.txt").write_bytes(b"\xef\xbb\xbf" + BOOK.encode() + b"\r\n")
    name = f"read-{how[:4]}"
    with open(tmp_path / "book.txt", "rb") as file, monkeypatch.context() as context:
        context.setattr(sys, "stdin", io.TextIOWrapper(file))
        words = {"text": ("-p", BOOK), "file": ("-f", tmp_path / "book.txt"), "standard input": ("-f", "-")}[how]
        done = client("prefill", *words, "--name", name, "--ttl", 60)
    assert (done.code, done.out) == (0, f"{name}\n")
    assert done.err.startswith(f"{len(BOOK):,} tokens, ready after ")
    assert f"client ask --state {name} --url {service.url} --prompt TEXT" in done.err
    state = service.engine.prefill(BOOK).state
    asked = client("ask", "--state", name, "-p", QUESTION, "-n", 9, "--temperature", 0)
    assert asked.out == answer(service, None, append=QUESTION, state=state) + "\n"
    assert asked.err.startswith(f"prompt {len(BOOK + QUESTION):,} tokens ({len(BOOK):,} of them were known); answer 9 ")
    chat = client("ask", "--state", name, "-p", QUESTION, "-n", 9, "--temperature", 0, "--chat")
    assert chat.out == asked.out
    assert client("states", "show", name, "--json").row["ttl"] == 60


def test_a_question_alone_from_a_pipe_and_answers_as_json(client, service, tmp_path, monkeypatch):
    (tmp_path / "question").write_text(QUESTION)
    with open(tmp_path / "question", "rb") as file, monkeypatch.context() as context:
        context.setattr(sys, "stdin", io.TextIOWrapper(file))
        row = client(
            "ask", "-p", "-", "-n", 9, "--temperature", 0, "--json", "--logprobs", 2, "--logit-bias", "1=-2"
        ).row
    assert row["choices"][0]["text"] == answer(service, QUESTION, sampling={"logit_bias": {1: -2.0}})
    assert len(row["choices"][0]["logprobs"]["tokens"]) == 9
    assert row["usage"]["completion_tokens"] == 9
    several = client("ask", "-p", QUESTION, "-n", 9, "--temperature", 0, "--n", 2)
    assert [json.loads(line)["text"] for line in several.out.splitlines()] == [answer(service, QUESTION)] * 2


def test_documents_are_listed_copied_forked_stopped_and_deleted(client, service, tmp_path, monkeypatch):
    assert client("prefill", "-p", BOOK, "--name", "root").code == 0
    state = service.engine.prefill(BOOK).state
    file = tmp_path / "root.state"
    assert client("states", "download", "root", file).code == 0
    assert parts(file.read_bytes()) == parts(saved(state))  # the very file of --state-out
    assert client("states", "upload", file, "--name", "copy").out == "copy\n"
    (tmp_path / "more").write_text("More of it.\n")
    assert client("states", "fork", "copy", "forked", "--append-file", tmp_path / "more").out == "forked\n"
    with open(tmp_path / "more", "rb") as more, monkeypatch.context() as context:
        context.setattr(sys, "stdin", io.TextIOWrapper(more))
        assert client("states", "fork", "copy", "piped", "--append", "-").out == "piped\n"
    forks = [service.ask(f"/v1/states/{name}/file", authorization=f"Bearer {KEY}").body for name in ("forked", "piped")]
    assert parts(forks[0]) == parts(forks[1])
    forked = service.ask("/v1/states/forked/file", authorization=f"Bearer {KEY}").body
    assert parts(forked) == parts(saved(service.engine.prefill(append="More of it.", state=state).state))
    assert "is a state and not a text" in client("states", "fork", "copy", "odd", "--append-file", file).error
    odd = service.ask("/v1/states/odd?state=copy", file.read_bytes(), "PUT", authorization=f"Bearer {KEY}")
    assert (odd.status, odd.error["param"]) == (400, "state")
    assert client("prefill", "-p", LONG, "--name", "long", "--no-wait").out == "long\n"
    stopped = client("states", "cancel", "long", "--json").row
    assert stopped["status"] == "cancelled"
    listed = client("states", "list").out
    assert all(f"\n{name} " in listed for name in ("root", "copy", "forked", "long"))
    assert {info["id"] for info in client("states", "list", "--json").row["states"]} >= {"root", "copy", "forked"}
    assert client("states", "resume", "long", "--no-wait").out == "long\n"
    assert "tokens     " in client("states", "show", "long").out
    for name in ("root", "copy", "forked", "piped", "long"):
        assert client("states", "delete", name).err == f"{name} is deleted\n"
    assert client("states", "show", "root").error.endswith("there is no state 'root' here")


def test_what_is_wrong_is_one_line(client, run, service, tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        free = f"http://127.0.0.1:{taken.getsockname()[1]}"
    assert "no service answers there" in run("client", "ask", "-p", "a", "--url", free).error
    for url in ("localhost:8000", "ftp://a", "http://", "http://a:port", "http://me:secret@a"):
        assert "--url" in run("client", "states", "list", "--url", url).error
    assert "there is no state 'none'" in client("ask", "--state", "none", "-p", "a").error
    assert "'temperature'" not in client("ask", "-p", "a", "--temperature", 200).error  # it is a flag of ours
    assert "letters and digits" in client("prefill", "-p", "a", "--name", "-a").error
    for name in ("", "a/b"):  # in an address it would be another one
        assert "letters and digits" in client("states", "show", name).error
    assert "there is no document" in client("prefill").error
    assert "there is no question" in client("ask").error
    assert "--logprobs is in the output of --json" in client("ask", "-p", "a", "--logprobs", 1).error
    state = tmp_path / "a.state"
    service.engine.prefill("a").state.save(state)
    assert "states upload" in client("prefill", "-f", state).error
    (tmp_path / "text").write_text("text")
    assert "is not a state" in client("states", "upload", tmp_path / "text").error
    assert "is not a state" in client("states", "download", "none", tmp_path / "text").error
    assert "there is no state" in client("states", "download", "none", tmp_path / "new").error
    assert not (tmp_path / "new").exists()
    (tmp_path / "empty").touch()
    assert "is empty" in client("prefill", "-f", tmp_path / "empty").error
    assert "cannot be read" in client("prefill", "-f", tmp_path / "none").error
    assert "is not UTF-8" in client("prefill", "-f", _odd(tmp_path)).error
    assert "--append" in client("states", "fork", "a", "b").error
    before = {info["id"] for info in client("states", "list", "--json").row["states"]}
    assert client("prefill", "-p", "a", "--name", "root").code == 0
    assert "--append is empty" in client("states", "fork", "root", "none", "--append", "").error
    assert "is empty" in client("states", "fork", "root", "none", "--append-file", tmp_path / "empty").error
    assert "letters and digits" in client("prefill", "-p", "a", "--name", "").error
    assert "letters and digits" in client("states", "upload", state, "--name", "").error
    got = service.ask("/v1/states", {"id": "none", "prompt": "", "state": "root"}, authorization=f"Bearer {KEY}")
    assert (got.status, got.error["param"]) == (400, "prompt")
    assert {info["id"] for info in client("states", "list", "--json").row["states"]} - before == {"root"}
    assert client("states", "delete", "root").code == 0


def _odd(folder: Path) -> Path:
    (folder / "odd").write_bytes(b"\xff" * 10)
    return folder / "odd"


def test_keys_come_from_a_file_or_a_variable_and_are_not_told(run, service, tmp_path, monkeypatch):
    listing = "client", "states", "list", "--url", service.url
    monkeypatch.delenv("XLSTM_RAY_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert "XLSTM_RAY_API_KEY" in run(*listing).error
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    assert run(*listing).code == 0
    monkeypatch.setenv("XLSTM_RAY_API_KEY", "another-secret")
    wrong = run(*listing).error
    assert "--api-key-file" in wrong
    assert "another-secret" not in wrong
    for line in KEY, f"{KEY} name=anna requests=60":  # as in a service's own file
        (tmp_path / "key").write_text(f"\n{line}\n")
        assert run(*listing, "--api-key-file", tmp_path / "key").code == 0
    (tmp_path / "book").write_bytes(b"a" * (24 << 20))  # the service says no before it has all
    refused = run("client", "prefill", "-f", tmp_path / "book", "--url", service.url).error
    assert "give a key of this service" in refused or "cannot be reached" in refused
    for text, says in (("", "is empty"), ("kéy", "is not a key")):
        (tmp_path / "key").write_text(text)
        assert says in run(*listing, "--api-key-file", tmp_path / "key").error
    assert "cannot be read" in run(*listing, "--api-key-file", tmp_path / "none").error
    help_text = run("client", "ask", "--help").out
    assert "--api-key-file" in help_text
    assert "--api-key " not in help_text


def test_where_there_is_no_room_it_waits_and_says_so(run, model, monkeypatch):
    with serving_here(model, slots=1, queue=0, answer_tokens=1 << 30) as service:
        asks = "client", "ask", "-p", "a", "-n", 2, "--temperature", 0, "--url", service.url
        stream = service.send("/v1/completions", {"prompt": "b", "max_tokens": 1 << 30, "stream": True})
        assert stream.recv(15) == b"HTTP/1.1 200 OK"
        waits: list[float] = []
        with monkeypatch.context() as context:
            context.setattr(http_client, "sleep", waits.append)
            failed = run(*asks)
        assert waits == [1.0] * 5
        lines = failed.err.splitlines()
        assert failed.code == 1
        assert lines[0].endswith("answers are under way; try again; trying again in 1 s (1 of 5)")
        assert (len(lines), lines[-1][:7]) == (6, "error: ")

        def leave(seconds: float) -> None:
            """Make room while it waits."""
            stream.close()
            until(lambda: not service.desk.under_way)

        with monkeypatch.context() as context:
            context.setattr(http_client, "sleep", leave)
            patient = run(*asks)
        assert patient.out.strip() == "".join(service.engine.generate("a", max_new_tokens=2, temperature=0)).strip()
        assert "trying again in 1 s (1 of 5)" in patient.err


def process(*words: object) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "xlstm_ray", "client", *map(str, words)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return programs.Popen(command, text=True, **pipes)


def test_an_interrupt_leaves_the_service_reading(service, client):
    with process("prefill", "--name", "left", "--url", service.url, "--progress", "ndjson") as program:
        assert program.stdin is not None
        assert program.stderr is not None
        program.stdin.write(BOOK * 16)  # is read for longer than a signal needs to arrive
        program.stdin.close()
        reading_line(program.stderr, '"event": "document", .*("tokens_total")')
        program.send_signal(signal.SIGINT)
        assert program.wait(30) == 130
        (line,) = [line for line in program.stderr.read().splitlines() if not line.startswith("{")]
    assert line.startswith("interrupted; the service reads left on: ")
    assert f"client states show left --url {service.url}" in line
    end = time.monotonic() + 60
    while (info := client("states", "show", "left", "--json").row)["status"] != "ready":
        assert (info["status"], time.monotonic() < end) == ("reading", True)
        time.sleep(0.1)
    assert info["tokens_total"] == 16 * len(BOOK)


def test_it_waits_on_when_the_service_is_killed_and_comes_again(model, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    words = ["--model", model, *WORDS, "--cache-dir", tmp_path / "cache", "--cache-every", 4, "--port", port]
    with serving(*words) as first:
        program = process("prefill", "-p", BOOK * 6, "--name", "begun", "--url", first.url, "--progress", "ndjson")
        assert program.stderr is not None
        reading_line(program.stderr, '"event": "document", .*("tokens_done": [3-9]..)')
        first.end(signal.SIGKILL)
    with program, serving(*words):
        assert program.wait(60) == 0
        assert program.stdout is not None
        assert program.stdout.read() == "begun\n"
        assert "looking for it again in 3 s (1 of 10)" in program.stderr.read()


@contextmanager
def stranger(status: int, body: bytes, **headers: str) -> Iterator[str]:
    """Somebody else's server, which always says this."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            for name, value in {"content_length": str(len(body)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_servers_of_others_are_told_apart(run, tmp_path):
    listing = "client", "states", "list", "--url"
    with stranger(200, b"<html>It works!</html>") as url:
        assert "is this a service of OpenAI's API?" in run(*listing, url).error
    with stranger(404, b'{"detail": "Not Found"}') as url:
        assert run(*listing, url).error == f"error: {url}: Not Found"
    with stranger(503, b'{"error": {"message": "no"}}', retry_after="3600") as url:
        assert run(*listing, url).error == f"error: {url}: no"  # an hour is not waited for
    with stranger(200, b"half", content_length="8") as url:
        assert "the reply is not whole" in run("client", "states", "download", "a", tmp_path / "a", "--url", url).error
    assert os.listdir(tmp_path) == []


def test_the_commands_need_no_torch(service, tmp_path):
    code = (
        "import sys; sys.argv = ['xlstm-ray', 'client', 'ask', '-p', 'a', '-n', '1', '--url', sys.argv[1]]\n"
        "from xlstm_ray.cli.app import main\n"
        "try: main()\n"
        "finally: print({'torch', 'numpy', 'fastapi', 'ray'} & set(sys.modules))"
    )
    env = {**os.environ, "XLSTM_RAY_API_KEY": KEY}
    command = [sys.executable, "-c", code, service.url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=env)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "set()")
