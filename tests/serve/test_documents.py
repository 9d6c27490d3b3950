"""Documents: read once under a name, asked many times, whatever happens in between."""

import json
import os
import signal
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from errno import ENOSPC
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from services import WORDS, Client, Here, model, serving, serving_here

from xlstm_ray import RecurrentState
from xlstm_ray.errors import UsageError
from xlstm_ray.serve.shelf import Shelf
from xlstm_ray.text.template import Template

__all__ = ["model"]

BOOK = "In the beginning there was a state of one size. " * 8
LONG = BOOK * 30  # half a minute of work
QUESTION = "Who is the heir?"


@pytest.fixture(scope="module")
def service(model):
    template = Template("{% for m in messages %}{{ m.content }}{% endfor %}", "test", {})
    with serving_here(model, template=template, body_bytes=1 << 20) as here:
        yield here


def add(service: Client, **fields: Any) -> dict[str, Any]:
    """Read a document to its end."""
    got = service.ask("/v1/states", fields)
    assert got.status == 202, got.body
    assert got.json["status"] == "queued"
    return ready(service, got.json["id"])


def names(service: Client) -> list[str]:
    return [info["id"] for info in service.ask("/v1/states").json["data"]]


def ready(service: Client, name: str) -> dict[str, Any]:
    info = told(service, name)[-1]
    assert info["status"] == "ready", info
    return info


def told(service: Client, name: str) -> list[dict[str, Any]]:
    """What the stream of events says until it ends."""
    body = service.ask(f"/v1/states/{name}/events").body.decode()
    return [json.loads(part[6:]) for part in body.split("\n\n") if part.startswith("data: ")]


def until(true: Any, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def reading(service: Client, name: str) -> None:
    """Until some of it was read."""
    until(lambda: service.ask(f"/v1/states/{name}").json["tokens_done"] > 100)


def answer(service: Here, prompt: str | None, state: RecurrentState) -> str:
    given = {} if prompt is None else {"append": prompt}
    return "".join(service.engine.generate(**given, state=state, max_new_tokens=12, temperature=0))


def test_a_document_is_read_once_and_asked_many_times(service):
    info = add(service, id="book", prompt=BOOK)
    assert (info["tokens_done"], info["tokens_total"]) == (len(BOOK), len(BOOK))
    state = service.engine.prefill(BOOK).state
    for _ in range(2):
        got = service.complete(QUESTION, state="book", max_tokens=12)
        assert got.json["choices"][0]["text"] == answer(service, QUESTION, state)
        size = len(BOOK) + len(QUESTION)
        assert got.headers["x-xlstm-cache"] == f"state tokens={len(BOOK)} of={size}"
        assert got.json["usage"]["prompt_tokens_details"] == {"cached_tokens": len(BOOK)}
    several = service.complete([QUESTION, "Why?"], state="book", max_tokens=12, n=2).json["choices"]
    expected = [answer(service, text, state) for text in (QUESTION, QUESTION, "Why?", "Why?")]
    assert [choice["text"] for choice in several] == expected
    bare = service.ask("/v1/completions", {"state": "book", "temperature": 0, "max_tokens": 12}).json
    assert bare["choices"][0]["text"] == answer(service, None, state)
    body = {"messages": [{"role": "user", "content": QUESTION}], "state": "book", "temperature": 0, "max_tokens": 12}
    chat = service.ask("/v1/chat/completions", body).json["choices"][0]["message"]["content"]
    assert chat == answer(service, QUESTION, state)


def test_who_sends_it_may_leave_and_hears_of_its_progress(service):
    connection = service.send("/v1/states", {"id": "left", "prompt": BOOK * 3})
    until(lambda: service.ask("/v1/states/left").status == 200)
    connection.close()
    reading(service, "left")
    assert service.complete("meanwhile", max_tokens=2).status == 200
    events = told(service, "left")
    done = [event["tokens_done"] for event in events]
    assert done == sorted(done)
    assert len(set(done)) > 2
    assert any(event["tokens_per_s"] and event["seconds_left"] > 0 for event in events)
    assert events[-1]["status"] == "ready"
    assert (events[-1]["tokens_per_s"], events[-1]["seconds_left"]) == (None, None)


def test_a_file_of_text_and_a_state_are_uploaded_as_they_are(service, tmp_path):
    got = service.ask("/v1/states/file?ttl=60", b"\xef\xbb\xbf" + BOOK.encode() + b"\r\n", "PUT")
    assert (got.status, got.json["ttl"]) == (202, 60.0)
    ready(service, "file")
    path = tmp_path / "book.state"
    service.engine.prefill(BOOK).state.save(path)
    down = service.ask("/v1/states/file/file")
    assert down.headers["content-disposition"] == 'attachment; filename="file.state"'
    assert parts(down.body) == parts(path.read_bytes())  # the very file of --state-out
    up = service.ask("/v1/states/again", down.body, "PUT")
    assert (up.status, up.json["status"], up.json["tokens_done"]) == (201, "ready", len(BOOK))
    first, second = (service.complete(QUESTION, state=name).json["choices"] for name in ("file", "again"))
    assert first == second


def test_ends_of_lines_inside_a_file_stay_as_they_are(service):
    """The prompt of the same file with `--prompt-file`."""
    text = f"{BOOK[:20]}\r\n{BOOK[20:40]}"
    service.ask("/v1/states/lines", text.encode() + b"\r\n", "PUT")
    ready(service, "lines")
    assert parts(service.ask("/v1/states/lines/file").body) == parts(saved(service.engine.prefill(text).state))


def test_an_upload_of_any_size_goes_to_the_disk_piece_by_piece(service):
    size = 24 << 20  # more than a body may have
    head = f"PUT /v1/states/huge HTTP/1.1\r\nhost: localhost\r\ncontent-length: {size}\r\nconnection: close\r\n\r\n"
    with service.connect() as connection:
        connection.sendall(head.encode())
        for _ in range(24):
            connection.sendall(bytes(1 << 20)[:-1] + b"\xff")
        said = b"".join(iter(lambda: connection.recv(1 << 16), b""))
    assert said.startswith(b"HTTP/1.1 400 ")
    assert b"is not UTF-8 text" in said


def test_a_state_is_forked(service):
    add(service, id="base", prompt=BOOK)
    add(service, id="one", state="base", prompt=" First.")
    add(service, id="two", state="base", prompt=" Second.")
    base = service.engine.prefill(BOOK).state
    for name, text in (("one", " First."), ("two", " Second.")):
        state = service.engine.prefill(append=text, state=base).state
        assert parts(service.ask(f"/v1/states/{name}/file").body) == parts(saved(state))
        (choice,) = service.complete(QUESTION, state=name, max_tokens=12).json["choices"]
        assert choice["text"] == answer(service, QUESTION, state)
    assert parts(service.ask("/v1/states/base/file").body) == parts(saved(base))


def saved(state: RecurrentState) -> bytes:
    """The bytes of its file."""
    with TemporaryDirectory() as folder:
        state.save(Path(folder) / "state")
        return (Path(folder) / "state").read_bytes()


def parts(data: bytes) -> tuple[Any, bytes]:
    """What a state's file says of itself, whose order is a library's chance, and its tensors."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def test_what_is_cancelled_keeps_what_was_computed_and_can_go_on(service):
    text = BOOK * 6
    service.ask("/v1/states", {"id": "stopped", "prompt": text})
    reading(service, "stopped")
    info = service.ask("/v1/states/stopped/cancel", {}).json
    assert info["status"] == "cancelled"
    assert 100 < info["tokens_done"] < len(text)
    got = service.complete(QUESTION, state="stopped")
    assert (got.status, got.error["code"]) == (409, "state_not_ready")
    done = info["tokens_done"]
    resumed = service.ask("/v1/states/stopped/resume", {})
    assert resumed.status == 202
    assert all(event["tokens_done"] >= done for event in told(service, "stopped"))
    ready(service, "stopped")
    assert parts(service.ask("/v1/states/stopped/file").body) == parts(saved(service.engine.prefill(text).state))
    assert service.ask("/v1/states/stopped/resume", {}).error["code"] == "state_not_stopped"
    assert service.ask("/v1/states/stopped/cancel", {}).json["status"] == "ready"


def test_documents_are_listed_and_deleted_even_while_they_are_read(service):
    service.ask("/v1/states", {"id": "gone", "prompt": LONG})
    reading(service, "gone")
    got = service.complete("a", state="gone")
    assert (got.status, got.error["code"], got.headers["retry-after"]) == (409, "state_not_ready", "2")
    assert "gone" in names(service)
    assert service.ask("/v1/states/gone", method="DELETE").json == {"id": "gone", "object": "state", "deleted": True}
    assert "gone" not in names(service)
    until(lambda: service.desk.under_way == 0)
    for path, method in (("", "GET"), ("", "DELETE"), ("/events", "GET"), ("/file", "GET"), ("/cancel", "POST")):
        got = service.ask(f"/v1/states/gone{path}", method=method)
        assert (got.status, got.error["code"]) == (404, "state_not_found")
    assert service.complete("a", state="gone").status == 404


def test_a_document_goes_after_its_time_without_use(service):
    def goes_at(name: str) -> float:
        timer = service.server.documents._all["", name].timer
        assert timer is not None
        return float(timer.when())

    add(service, id="used", prompt="a", ttl=600)
    for path, body in (("/v1/states/used", None), ("/v1/completions", {"state": "used", "max_tokens": 1})):
        before = goes_at("used")
        time.sleep(0.01)  # uvloop's clock has milliseconds
        assert service.ask(path, body).status == 200
        assert goes_at("used") > before
    service.ask("/v1/states", {"id": "long", "prompt": LONG, "ttl": 0.1})
    service.ask("/v1/states", {"id": "short", "prompt": "a", "ttl": 0.1})
    until(lambda: "short" not in names(service))  # a list is no use
    assert service.ask("/v1/states/short").status == 404
    assert service.ask("/v1/states/long").json["status"] == "reading"  # and this is one
    assert service.ask("/v1/states/long/cancel", {}).json["status"] == "cancelled"
    until(lambda: "long" not in names(service))


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({}, "a text or token ids"),
        ({"prompt": []}, "a text or token ids"),
        ({"prompt": [[1]]}, "a text or token ids"),
        ({"prompt": "a", "id": "../../etc/passwd"}, "letters and digits"),
        ({"prompt": "a", "id": ".hidden"}, "letters and digits"),
        ({"prompt": "a", "id": ""}, "letters and digits"),
        ({"prompt": "a", "id": "a\n"}, "letters and digits"),
        ({"prompt": "a", "ttl": 0}, "greater than 0"),
        ({"prompt": "a", "name": "b"}, "not a field"),
        ({"prompt": "a", "state": "none"}, "no state 'none'"),
        ({"prompt": "a", "id": "own", "state": "own"}, "no state 'own'"),
        ({"prompt": "a", "model": "other"}, "no model"),
    ],
)
def test_what_cannot_be_a_document_is_refused(service, fields, says):
    before = len(service.ask("/v1/states").json["data"])
    got = service.ask("/v1/states", fields)
    assert 400 <= got.status < 500
    assert says in got.error["message"]
    assert (len(service.ask("/v1/states").json["data"]), service.desk.under_way) == (before, 0)


def test_what_is_found_wrong_later_is_told_as_failed(service):
    service.ask("/v1/states", {"id": "odd", "prompt": [1, 999]})
    info = told(service, "odd")[-1]
    assert info["status"] == "failed"
    assert "outside the model's vocabulary" in info["error"]


def test_uploads_that_are_no_states_of_this_model_are_refused(service, tmp_path):
    state = service.engine.prefill(["ab", "cd"]).state
    state.save(tmp_path / "two")
    two = (tmp_path / "two").read_bytes()
    one = saved(service.engine.prefill("ab").state)
    damaged = one[:-1] + bytes([one[-1] ^ 1])
    for data, says in (
        (two, "of 2 prompts"),
        (damaged, "is damaged"),
        (one[: len(one) // 2], "is not a whole state file"),
        (b"", "is empty"),
        (b"\xff\xfe", "is not UTF-8"),
    ):
        got = service.ask("/v1/states/wrong", data, "PUT")
        assert got.status == 400
        assert says in got.error["message"]
        assert "/tmp" not in got.error["message"]
    assert service.ask("/v1/states/a%2Fb", b"x", "PUT").status in (400, 404)
    assert service.ask("/v1/states/a?key=1", b"x", "PUT").error["param"] == "key"
    assert service.ask("/v1/states/a?ttl=x", b"x", "PUT").error["param"] == "ttl"
    assert service.ask("/v1/states/wrong").status == 404
    add(service, id="right", prompt="a")
    assert service.ask("/v1/states/right", b"x", "PUT").error["code"] == "state_exists"
    got = service.complete("a", state="right", repetition_penalty=1.2)
    assert (got.status, got.error["param"]) == (400, "repetition_penalty")


def test_states_take_no_more_than_they_may(model):
    with serving_here(model, states_bytes=1) as service:
        got = service.ask("/v1/states", {"prompt": "a"})
        assert (got.status, got.error["code"]) == (400, "states_full")


def test_tenants_do_not_see_each_others_documents(model):
    keys = "first-key-of-somebody", "second-key-of-another"
    with serving_here(model, keys=keys) as service:
        mine, theirs = ({"authorization": f"Bearer {key}"} for key in keys)
        assert service.ask("/v1/states", {"id": "secret", "prompt": "a"}, **mine).status == 202
        assert service.ask("/v1/states", **theirs).json["data"] == []
        for path in ("", "/events", "/file"):
            assert service.ask(f"/v1/states/secret{path}", **theirs).status == 404
        assert service.ask("/v1/completions", {"state": "secret", "prompt": "a"}, **theirs).status == 404
        assert service.ask("/v1/states", {"id": "secret", "prompt": "b"}, **theirs).status == 202
        assert service.ask("/v1/states/secret", method="DELETE", **theirs).status == 200
        assert service.ask("/v1/states/secret", **mine).status == 200


def test_a_new_service_goes_on_where_the_last_one_was_ended(model, tmp_path):
    text = BOOK * 8
    words = ["--model", model, *WORDS, "--cache-dir", tmp_path / "cache", "--cache-every", 4]
    with serving(*words) as service:
        add(service, id="whole", prompt=BOOK)
        before = service.complete(QUESTION, state="whole").json["choices"]
        service.ask("/v1/states", {"id": "begun", "prompt": text})
        add(service, id="first", prompt="a")
        service.ask("/v1/states", {"id": "second", "prompt": QUESTION, "state": "first"})
        assert service.ask("/v1/states/first", method="DELETE").status == 200  # the second one needs it no more
        until(lambda: service.ask("/v1/states/begun").json["tokens_done"] > 600)
        assert service.end(signal.SIGKILL) == -signal.SIGKILL
    with serving(*words) as service:
        assert service.complete(QUESTION, state="whole").json["choices"] == before
        until(lambda: service.ask("/v1/states/begun").json["tokens_total"])
        assert service.ask("/v1/states/begun").json["tokens_done"] >= 512  # from the cache
        until(lambda: service.ask("/v1/states/begun").json["tokens_done"] > 1000)
        assert service.end() == 0
    with serving(*words) as service:
        events = told(service, "begun")
        assert events[-1]["status"] == "ready"
        assert all(event["tokens_done"] > 1000 for event in events)  # from its own state
        ready(service, "second")
        file, second = (service.ask(f"/v1/states/{name}/file").body for name in ("begun", "second"))
        for name in ("whole", "second"):
            assert service.ask(f"/v1/states/{name}", method="DELETE").status == 200
    with serving_here(model) as here:
        assert parts(file) == parts(saved(here.engine.prefill(text).state))
        first = here.engine.prefill("a").state
        assert parts(second) == parts(saved(here.engine.prefill(append=QUESTION, state=first).state))
    files = [name for name in os.listdir(tmp_path / "cache" / "documents") if name != "documents.lock"]
    assert sorted(Path(name).suffix for name in files) == [".json", ".state"]


def test_a_folder_has_one_service_at_a_time_and_names_do_not_leave_it(tmp_path, run, model):
    shelf = Shelf(tmp_path / "cache" / "documents")
    with pytest.raises(UsageError, match="another service"):
        Shelf(tmp_path / "cache" / "documents")
    assert "another service" in run("serve", "--model", model, "--cache-dir", tmp_path / "cache", "--port", 0).error
    shelf.close()
    (tmp_path / "cache" / "documents" / "note.json").write_text("not ours")
    assert Shelf(tmp_path / "cache" / "documents").read() == []


class Held:
    """Calls of a function wait until they are let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str):
        plain, self._begun, self._go = getattr(owner, name), threading.Semaphore(0), threading.Event()

        def call(*args: Any) -> Any:
            self._begun.release()
            assert self._go.wait(60)
            return plain(*args)

        monkeypatch.setattr(owner, name, call)

    def until_begun(self) -> None:
        assert self._begun.acquire(timeout=60)

    def let_go(self) -> None:
        self._go.set()


def test_a_name_is_free_when_its_files_have_gone(model, tmp_path, monkeypatch):
    with serving_here(model, folder=tmp_path) as service, ThreadPoolExecutor(4) as at_once:
        ask, paths = service.ask, lambda: [path.suffix for path in tmp_path.iterdir() if path.suffix != ".lock"]
        add(service, id="book", prompt=BOOK)
        removal = Held(monkeypatch, Shelf, "remove")
        deleted = at_once.submit(ask, "/v1/states/book", method="DELETE")
        removal.until_begun()
        assert ask("/v1/states/book", method="DELETE").status == 404  # of two at once, one deletes it
        assert ask("/v1/states/book").status == 404
        assert names(service) == []
        assert ask("/v1/states", {"id": "book", "prompt": "b"}).error["code"] == "state_exists"
        removal.let_go()
        assert deleted.result().status == 200
        assert paths() == []
        add(service, id="book", prompt="b")
        assert sorted(paths()) == [".json", ".state"]
        state = ask("/v1/states/book/file").body
        writing = Held(monkeypatch, Shelf, "write")
        sent = at_once.submit(ask, "/v1/states/up", state, "PUT")
        writing.until_begun()
        deleted = at_once.submit(ask, "/v1/states/up", method="DELETE")
        until(lambda: ask("/v1/states/up").status == 404)
        writing.let_go()
        assert (sent.result().status, deleted.result().status) == (201, 200)
        assert sorted(paths()) == [".json", ".state"]  # those of `book`
        assert service.desk.under_way == 0


def test_a_full_disk_is_told_and_ends_nothing(model, tmp_path, monkeypatch):
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", tmp_path], capture_output=True).returncode:
        pytest.skip("only root may mount a file system")
    try:
        with serving_here(model, folder=tmp_path / "documents") as service:
            add(service, id="book", prompt=BOOK)
            service.ask("/v1/states", {"id": "long", "prompt": LONG * 4})
            reading(service, "long")
            with open(tmp_path / "fill", "wb", buffering=0) as fill, suppress(OSError):
                while True:
                    fill.write(bytes(1 << 12))
            state = service.ask("/v1/states/book/file")
            assert (state.status, len(state.body)) == (200, int(state.headers["content-length"]))  # needs no disk
            for path, body, method in (
                ("/v1/states/text", BOOK.encode() * 9, "PUT"),
                ("/v1/states/state", state.body, "PUT"),
                ("/v1/states", {"id": "json", "prompt": BOOK * 9}, "POST"),
                ("/v1/states", {"id": "fork", "state": "book"}, "POST"),
                ("/v1/states", {"id": "next", "state": "book", "prompt": BOOK * 9}, "POST"),
            ):
                got = service.ask(path, body, method)
                assert (got.status, str(tmp_path) in got.error["message"]) == (507, False), path
                assert "No space left" in got.error["message"]
            assert names(service) == ["book", "long"]
            write, full = Shelf.write, OSError(ENOSPC, "No space left on device")
            monkeypatch.setattr(Shelf, "write", lambda *_: (_ for _ in ()).throw(Shelf._unkept(full)))  # its tokens go
            stopped = service.ask("/v1/states/long/cancel", {}).json  # in memory it is what it should be
            assert (stopped["status"], stopped["tokens_done"] > 100) == ("cancelled", True)
            assert stopped["error"] == "a document cannot be kept (No space left on device)"
            monkeypatch.setattr(Shelf, "write", write)
            assert service.complete(QUESTION, state="book").status == 200
            (tmp_path / "fill").unlink()
            assert service.ask("/v1/states/long/resume", {}).status == 202
            reading(service, "long")
            assert service.ask("/v1/states/long", method="DELETE").status == 200
            assert service.desk.under_way == 0
    finally:
        subprocess.run(["umount", "--lazy", tmp_path], check=True)


def test_a_short_document_does_not_wait_for_the_end_of_a_long_one(model):
    """A document that waits takes a window's turn after some windows of others, where there is a slot."""
    with serving_here(model, slots=2) as service:
        service.ask("/v1/states", {"id": "long", "prompt": [1] * 60_000})
        reading(service, "long")
        add(service, id="short", prompt="a short one" * 20)
        assert service.ask("/v1/states/long").json["status"] == "reading"
        assert service.ask("/v1/states/long", method="DELETE").status == 200


def test_who_asks_goes_before_a_document_that_has_the_only_slot(model):
    text = BOOK * 6
    with serving_here(model, slots=1) as service:
        service.ask("/v1/states", {"id": "long", "prompt": text})
        reading(service, "long")
        assert service.complete(QUESTION, max_tokens=12).json["choices"][0]["text"]
        assert service.ask("/v1/states/long").json["status"] == "reading"  # it did not wait for its end
        ready(service, "long")
        file = service.ask("/v1/states/long/file").body
        assert parts(file) == parts(saved(service.engine.prefill(text).state))
