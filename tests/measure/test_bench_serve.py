"""`xlstm-ray bench serve` against a real service of ours, and against one that knows nothing of us."""

import json
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest

from xlstm_ray.measure import workloads

sys.path.append(str(Path(__file__).parents[1] / "serve"))

from services import model, serving_here

__all__ = ["model"]

SMALL = {"PREFIXES": 2, "PREFIX": 96, "SUFFIX": 16, "QUESTION": 8, "TURNS": 3}
WORDS = "--prompt-tokens 160 --document-tokens 256 --answer-tokens 4 --questions 2 --streams 3 --rounds 2".split()
READ_S, STEP_S = 0.02, 0.005
FIELDS = {"model", "messages", "prompt", "max_tokens", "temperature", "stream", "stream_options"}  # that OpenAI has


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SMALL.items():
        monkeypatch.setattr(workloads, name, value)


class Other:
    """A service made of the standard library alone. It answers 0, 1, 2; a token is a word; its cache is endless.

    chats_only: it lacks /v1/completions. counts: its answers have token counts. fields: that its bodies may have.
    """

    def __init__(self, *, chats_only: bool = False, counts: bool = True, fields: set[str] = FIELDS):
        self.chats_only, self.counts, self.fields = chats_only, counts, fields
        self.seen: list[list[str]] = []
        self.asked: list[str] = []
        self.most = self.now = 0
        self.lock = threading.Lock()

    def known(self, words: list[str]) -> int:
        with self.lock:
            found = [
                len(list(takewhile(lambda pair: pair[0] == pair[1], zip(words, old, strict=False))))
                for old in self.seen
            ]
            self.seen.append(words)
        return max(found, default=0)

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        body = json.loads(request.rfile.read(int(request.headers["content-length"])))
        chat = request.path == "/v1/chat/completions"
        self.asked.append(request.path)
        if request.path not in ("/v1/chat/completions", "/v1/completions") or (self.chats_only and not chat):
            self.say(request, 404, {"error": {"message": "no such thing"}})
        elif odd := set(body) - self.fields:
            self.say(request, 400, {"error": {"message": f"Unknown parameter: {odd}"}})
        else:
            text = " ".join(m["content"] for m in body["messages"]) if chat else body["prompt"]
            self.stream(request, text.split(), body, chat=chat)

    def stream(self, request: BaseHTTPRequestHandler, words: list[str], body: dict[str, Any], *, chat: bool) -> None:
        cached, count = self.known(words), body.get("max_tokens") or body["max_completion_tokens"]
        usage = {
            "prompt_tokens": len(words),
            "completion_tokens": count,
            "prompt_tokens_details": {"cached_tokens": cached},
        }
        if not body.get("stream"):
            self.say(request, 200, {"choices": [{"text": "0"}], "usage": usage if self.counts else None})
            return
        request.send_response(200)
        request.send_header("content-type", "text/event-stream")
        request.end_headers()
        with self.lock:
            self.now += 1
            self.most = max(self.most, self.now)
        time.sleep(READ_S)
        for number in range(count):
            text = f"{number} "
            self.event(request, {"choices": [{"delta": {"content": text}} if chat else {"text": text}]})
            time.sleep(STEP_S)
        with self.lock:
            self.now -= 1
        if self.counts and body["stream_options"]["include_usage"]:
            self.event(request, {"choices": [], "usage": usage})
        request.wfile.write(b"data: [DONE]\n\n")

    def event(self, request: BaseHTTPRequestHandler, event: Any) -> None:
        request.wfile.write(f": alive\n\ndata: {json.dumps(event)}\n\n".encode())

    def say(self, request: BaseHTTPRequestHandler, status: int, body: Any) -> None:
        data = json.dumps(body).encode()
        request.send_response(status)
        request.send_header("content-length", str(len(data)))
        request.end_headers()
        request.wfile.write(data)


@contextmanager
def running(other: Other) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            other.answer(self)

        def do_GET(self) -> None:
            models = {"data": [{"id": "words"}]}
            other.say(self, *((200, models) if self.path == "/v1/models" else (404, {"detail": "Not Found"})))

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/v1"
        server.shutdown()


def table(rows: list[dict[str, Any]]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(row["workload"], row["what"]): row for row in rows}


def test_a_service_of_others_is_measured(run, tmp_path):
    other = Other()
    with running(other) as url:
        found = run("bench", "serve", "--url", url, *WORDS, "--json", "--png", tmp_path / "a.png", "--seed", 3).row
    assert (found["model"], found["documents"], found["seed"]) == ("words", False, 3)
    rows = table(found["rows"])
    assert len(rows) == 14
    for row in rows.values():
        assert row["ttft_p99_s"] >= row["ttft_p50_s"] >= READ_S
        assert row["answer_tokens"] % row["requests"] == 0
        if row["what"] != "the document":
            assert row["itl_p99_s"] >= row["itl_p50_s"] >= 0.5 * STEP_S
    again, new = rows["edited", "the same again"], rows["edited", "new"]
    assert (new["cached_tokens"], again["cached_tokens"]) == (0, again["prompt_tokens"])
    assert new["prompt_tokens"] == 2 * 160  # a word is a token
    changed = rows["edited", "changed at 80 %"]
    assert 0.7 < changed["cached_tokens"] / changed["prompt_tokens"] < 0.85
    seen, first = rows["prefix", "prefix was seen"], rows["prefix", "first of its prefix"]
    assert (first["cached_tokens"], seen["cached_tokens"]) == (0, 4 * 96)
    assert rows["document", "unseen with each question"]["cached_tokens"] == 0
    assert rows["document", "sent again with another"]["cached_tokens"] == 256
    assert rows["unique", "20 to 160 tokens"]["cached_tokens"] == 0
    turns = rows["chat", "turns 2 to 3"]
    assert turns["cached_tokens"] == (8 + 8) + (8 + 8 + 4 + 8)  # all but the last answer and message
    assert rows["mixed", "3 streams"]["answer_tokens"] == 3 * 16
    assert other.most >= 3  # at once
    assert set(other.asked) == {"/v1/completions", "/v1/chat/completions"}
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"


NEWEST = {"chats_only": True, "fields": FIELDS - {"max_tokens", "temperature"} | {"max_completion_tokens"}}


@pytest.mark.parametrize(
    ("kind", "path"),
    [
        ({"chats_only": True}, "/v1/chat/completions"),
        (NEWEST, "/v1/chat/completions"),
        ({"counts": False}, "/v1/completions"),
        ({"counts": False, "fields": FIELDS - {"stream_options"}}, "/v1/completions"),
    ],
)
def test_it_makes_do_with_what_there_is(run, kind, path):
    other = Other(**kind)
    with running(other) as url:
        words = "--workloads", "unique,mixed", "--model", "any"
        found = run("bench", "serve", "--url", url, *WORDS, *words, "--json").row
        shown = run("bench", "serve", "--url", url, *WORDS, *words).out.splitlines()
    assert found["model"] == "any"
    assert other.asked[-1] == path
    for row in found["rows"]:
        assert row["answer_tokens"] in (8 * 4, 3 * 16, 1)
        assert (row["cached_tokens"] is None) == (not other.counts)
    assert len(shown) == 2 + len(found["rows"])
    assert len({len(line) for line in shown[1:]}) == 1  # columns


def test_our_own_service_is_measured_and_left_as_it_was(run, model):
    with serving_here(model, settings={"cache_memory_mb": 64}) as service:
        found = run("bench", "serve", "--url", service.url, *WORDS, "--json").row
        assert service.ask("/v1/states").json["data"] == []
    assert found["documents"]
    rows = table(found["rows"])
    read, asked = rows["document", "read under a name"], rows["document", "questions to the name"]
    assert asked["cached_tokens"] == 2 * read["prompt_tokens"]
    assert 0.5 < read["prompt_tokens"] / 256 < 1.5  # a token is a byte here
    again = rows["edited", "the same again"]
    assert again["cached_tokens"] == again["prompt_tokens"]
    assert rows["document", "unseen with each question"]["cached_tokens"] == 0
    assert ("chat as text", "first turn") in rows  # this model has no template
    assert all(row["answer_tokens"] for row in rows.values() if row["what"] != "read under a name")


def test_what_cannot_be_measured_is_one_line(run, tmp_path):
    with running(Other(chats_only=True)) as url:
        assert "there are: prefix, document" in run("bench", "serve", "--url", url, "--workloads", "x").error
        (tmp_path / "text").write_text("of somebody")
        assert "--png" in run("bench", "serve", "--url", url, "--png", tmp_path / "text").error
    assert "no service answers there" in run("bench", "serve", "--url", url).error
    assert "--rounds has no effect before 'serve'" in run("bench", "--rounds", 2, "serve", "--url", url).error
