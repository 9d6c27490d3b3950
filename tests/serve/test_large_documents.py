"""A text of any size is a document: it goes to the disk as it comes, and is read from there in flat memory."""

import http.client
import json
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Ran
from services import WORDS, Running, serving, tiny_model
from test_documents import told, until
from tiny import LONG_WORDS, make_model_of_words

MIB = 1 << 20
LARGE = 32  # MiB
FLAT = 16 * MIB  # of a text of LARGE MiB: threads have pools of memory of their own


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("words")
    make_model_of_words(directory, hidden_size=64, num_hidden_layers=2, num_heads=2)
    return directory


def text(size: int) -> Iterator[bytes]:
    """Words, some at a time."""
    for n in range(size // MIB):
        words = [LONG_WORDS[(n * 7 + m * m) % len(LONG_WORDS)] for m in range(MIB // 120)]
        yield (" ".join(words) + "\n").encode().rjust(MIB)


def send(service: Running, path: str, body: Iterator[bytes], **headers: str) -> tuple[int, Any]:
    """Send a body in chunks, without its length."""
    connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=60)
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request("POST", path, body, {"content-type": "text/plain", **names}, encode_chunked=True)
    reply = connection.getresponse()
    return reply.status, json.loads(reply.read())


def peak(service: Running) -> int:
    """Of the memory of its process, since the last call, in bytes."""
    process = Path(f"/proc/{service.process.pid}")
    lines = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
    (process / "clear_refs").write_text("5")  # the peak is what it is now
    return int(lines["VmHWM"].split()[0]) << 10


def info(service: Running, name: str) -> Any:
    return service.ask(f"/v1/states/{name}").json


def peak_of_a_small_one(service: Running) -> int:
    """The peak of its memory when it has read some of a text that is no large one."""
    status, _ = send(service, "/v1/states?id=small", text(MIB))
    assert status == 202
    until(lambda: info(service, "small")["tokens_done"] > 100)
    service.ask("/v1/states/small", method="DELETE")
    return peak(service)


def test_a_text_of_any_size_takes_no_memory_and_outlives_a_kill(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cache" / "documents"
    words = ["--model", model, *WORDS, "--cache-dir", tmp_path / "cache"]
    with serving(*words, start=subprocess.Popen) as service:
        before = peak_of_a_small_one(service)
        status, said = send(service, "/v1/states?id=large", text(LARGE * MIB))
        assert (status, said["id"], said["status"], said["tokens_total"]) == (202, "large", "queued", None)
        seen = said
        until(lambda: seen.update(info(service, "large")) or seen["characters_done"])
        assert seen["characters_total"] == LARGE * MIB - 1  # without the newline at its end
        assert peak(service) - before < FLAT
        assert service.end(signal.SIGKILL) == -signal.SIGKILL
    assert sorted(path.suffix for path in folder.iterdir()) == [".json", ".lock", ".text"]
    with serving(*words, start=subprocess.Popen) as service:
        until(lambda: info(service, "large")["tokens_done"] > 300)
        found = info(service, "large")
        assert (found["status"], found["characters_done"]) == ("reading", None)
        assert found["tokens_total"] == LARGE * (MIB // 120)
        assert service.ask("/v1/states/large/cancel", {}).json["status"] == "cancelled"
        assert peak(service) - before < FLAT
        assert service.ask("/v1/states/large", method="DELETE").status == 200
        assert [path.name for path in folder.iterdir()] == ["documents.lock"]
        assert service.end() == 0


def test_its_state_is_that_of_the_command(model: Path, tmp_path: Path, run: Callable[..., Ran]) -> None:
    """Of a text that is cut in several pieces, with and without a folder of documents."""
    body = b"".join(text(MIB))[: 80 * 1024] + b"\n"
    (tmp_path / "text").write_bytes(body)
    done = json.loads(run("prefill", "--model", model, *WORDS, "-f", tmp_path / "text", "--json").out)
    for words, method, path in (
        ([], "PUT", "/v1/states/book"),
        (["--cache-dir", tmp_path / "cache"], "POST", "/v1/states?id=book"),
    ):
        with serving("--model", model, *WORDS, *words) as service:
            assert service.ask(path, body, method, content_type="text/plain; charset=utf-8").status == 202
            last = told(service, "book")[-1]
            assert (last["status"], last["tokens_total"]) == ("ready", done["prompt_tokens"])
            assert digest(service.ask("/v1/states/book/file").body) == done["state_digest"]


def test_a_text_of_any_size_follows_a_document_and_takes_no_memory(model: Path, tmp_path: Path) -> None:
    with serving("--model", model, *WORDS, start=subprocess.Popen) as service:
        before = peak_of_a_small_one(service)
        service.ask("/v1/states/book", b"Once upon a time", "PUT", content_type="text/plain")
        assert told(service, "book")[-1]["status"] == "ready"
        known = info(service, "book")["tokens_done"]
        peak(service)
        assert send(service, "/v1/states?id=large&state=book", text(LARGE * MIB))[0] == 202
        until(lambda: info(service, "large")["tokens_done"] > known + 300)
        assert info(service, "large")["tokens_total"] == known + LARGE * (MIB // 120)
        assert peak(service) - before < FLAT


def digest(file: bytes) -> str:
    header = json.loads(file[8 : 8 + int.from_bytes(file[:8], "little")])
    return str(json.loads(header["__metadata__"]["xlstm_ray"])["digest"])


def test_a_long_text_that_is_cut_is_stopped_at_once_and_so_is_one_behind_it(tmp_path: Path) -> None:
    with serving("--model", tiny_model(tmp_path), *WORDS) as service:  # a byte is a token: this takes half a minute
        for name in ("first", "second"):
            assert send(service, f"/v1/states?id={name}", text(24 * MIB))[0] == 202
        seen: dict[str, Any] = {}
        until(lambda: seen.update(info(service, "first")) or seen["characters_done"])
        for name in ("second", "first"):
            stopped = service.ask(f"/v1/states/{name}/cancel", {}).json
            assert (stopped["status"], stopped["tokens_done"], stopped["characters_done"]) == ("cancelled", 0, None)
        assert service.ask("/v1/states/second/resume", {}).status == 202
        until(lambda: seen.update(info(service, "second")) or seen["characters_done"])
        assert service.end() == 0  # it does not wait for the text


def test_what_is_too_large_or_is_no_file_is_refused_before_all_of_it_was_sent(model: Path, tmp_path: Path) -> None:
    words = ["--max-upload-mb", 1, "--max-body-mb", 1, "--cache-dir", tmp_path]
    with serving("--model", model, *WORDS, *words) as service:
        status, said = send(service, "/v1/states?id=a", text(2 * MIB))
        assert (status, said["error"]["message"]) == (
            413,
            "the body has more than 1,048,576 bytes, which is the most that this service takes",
        )
        with service.connect() as connection:  # by the length that it says
            head = f"PUT /v1/states/a HTTP/1.1\r\nhost: localhost\r\ncontent-length: {1 << 40}\r\n\r\n"
            connection.sendall(head.encode())
            assert connection.recv(64).startswith(b"HTTP/1.1 413 ")
        form = b'--x\r\ncontent-disposition: form-data; name="file"\r\n\r\na\r\n--x--\r\n'
        got = service.ask("/v1/states", form, content_type="multipart/form-data; boundary=x")
        assert (got.status, "curl -T FILE" in got.error["message"]) == (415, True)
        got = service.ask("/v1/states", b"Once upon", content_type="application/x-www-form-urlencoded")
        assert (got.status, "sent as text/plain" in got.error["message"]) == (415, True)
        for path, status in (("?id=a&state=nobody", 404), ("?id=a&state=", 404)):
            got = service.ask(f"/v1/states{path}", b"text", content_type="text/plain")
            assert (got.status, got.error["param"]) == (status, "state")
        for path, param in (("?name=a", "name"), ("?id=../a", "id"), ("?id=a&ttl=-1", "ttl"), ("?ttl=nan", "ttl")):
            got = service.ask(f"/v1/states{path}", b"text", content_type="text/plain")
            assert (got.status, got.error["param"]) == (400, param)
        got = service.ask("/v1/states?id=a", b"\x80", content_type="application/octet-stream")
        assert (got.status, "is not UTF-8 text" in got.error["message"]) == (400, True)
        named = service.ask("/v1/states", b"text", content_type="text/plain").json["id"]
        assert named.startswith("state-")
        assert told(service, named)[-1]["status"] == "ready"
        assert service.ask("/v1/states", {"id": "odd", "prompt": [1 << 31]}).error["param"] == "prompt"
        service.ask(f"/v1/states/{named}", method="DELETE")
        folder = tmp_path / "documents"
        until(lambda: [path.name for path in folder.iterdir()] == ["documents.lock"])  # nothing of the others
        half = service.connect()
        half.sendall(head.replace(str(1 << 40), "1000000").encode() + b"half of it")
        until(lambda: any(".tmp" in path.name for path in (tmp_path / "documents").iterdir()))
        assert service.end(signal.SIGKILL) == -signal.SIGKILL
    with serving("--model", model, *WORDS, *words) as service:
        until(lambda: [path.name for path in folder.iterdir()] == ["documents.lock"])
        assert service.end() == 0
