"""Who has asked, how often, and what is written about it."""

import json
import re
import socket
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest
from services import WORDS, Here, model, serving, serving_here

from xlstm_ray.errors import OutputError, UsageError
from xlstm_ray.serve.access import Access
from xlstm_ray.serve.limits import Bucket
from xlstm_ray.serve.options import Key, Options, read_keys

__all__ = ["model"]

ANNA, BERT = "key-of-anna-0123456789", "key-of-bert-0123456789"
FIELDS = {
    *("time", "id", "method", "path", "status", "seconds", "key", "prompt_tokens", "cached_tokens"),
    *("completion_tokens", "finish_reasons", "left"),
}


def key(secret: str) -> dict[str, str]:
    return {"authorization": f"Bearer {secret}"}


def lines(path: Path, count: int) -> list[dict]:
    """The log, when it has so many lines: a line is written when its reply was sent."""
    end = time.monotonic() + 30
    found: list[str] = []
    while len(found) < count and time.monotonic() < end:
        time.sleep(0.01)
        found = path.read_text().splitlines() if path.exists() else []
    assert len(found) == count
    return [json.loads(line) for line in found]


# -- the log of requests -----------------------------------------------------------------------------------------------
def test_each_request_has_a_line_and_nothing_of_what_it_says(model, tmp_path):
    keys, log = tmp_path / "keys", tmp_path / "access.log"
    keys.write_text(f"{ANNA} name=anna\n{BERT}\n")
    words = ("--api-key-file", keys, "--access-log", log, "--served-name", "tiny", "--cache-memory-mb", 64, *WORDS)
    with serving("--model", model, *words) as service:
        before = datetime.now(UTC)
        body = {"prompt": "a secret word", "max_tokens": 5, "temperature": 0, "ignore_eos": True}
        whole = service.ask("/v1/completions", body, **key(ANNA))
        again = service.ask("/v1/completions", {**body, "n": 2, "stream": True}, x_request_id="mine-1", **key(BERT))
        wrong = service.ask("/v1/completions?word=secret", b"secret", **key(BERT))
        stranger = service.ask("/v1/models", x_request_id="a b", **key("secret-secret-secret"))
        service.ask("/v1/states/secret", b"secret " * 9, method="PUT", **key(ANNA))
        assert (whole.status, again.status, wrong.status, stranger.status) == (200, 200, 400, 401)
        found = lines(log, 5)
        assert all(set(line) == FIELDS for line in found)
        usage = whole.json["usage"]
        told = {name: found[0][name] for name in ("method", "path", "status", "key", "finish_reasons", "left")}
        assert told == {
            "method": "POST",
            "path": "/v1/completions",
            "status": 200,
            "key": "anna",
            "finish_reasons": ["length"],
            "left": False,
        }
        assert (found[0]["prompt_tokens"], found[0]["completion_tokens"]) == (usage["prompt_tokens"], 5)
        assert (found[1]["key"], found[1]["finish_reasons"], found[1]["id"]) == ("key 2", ["length"] * 2, "mine-1")
        assert (found[1]["completion_tokens"], found[1]["cached_tokens"]) == (10, 0)  # tenants share nothing
        assert [line["status"] for line in found] == [200, 200, 400, 401, 202]
        assert [line["key"] for line in found] == ["anna", "key 2", "key 2", None, "anna"]
        for line, reply in zip(found, (whole, again, wrong, stranger), strict=False):
            assert reply.headers["x-request-id"] == line["id"]
            assert 0 <= line["seconds"] < 60
            assert before.timestamp() - 1 < datetime.fromisoformat(line["time"]).timestamp() < time.time() + 1
        assert re.fullmatch("[0-9a-f]{32}", found[0]["id"])
        assert re.fullmatch("[0-9a-f]{32}", found[3]["id"])  # what the caller gave could not stand in a log
        text = log.read_text().replace("/v1/states/secret", "")
        assert "secret" not in text
        assert not {ANNA, BERT} & set(re.findall(r"[\w-]+", text))
        log.rename(tmp_path / "yesterday.log")  # as logrotate does
        service.ask("/health")
        assert [line["path"] for line in lines(log, 1)] == ["/health"]
        assert service.end() == 0


def test_on_standard_output_and_of_a_caller_who_has_left(model):
    with serving("--model", model, "--access-log", "-", *WORDS) as service:
        connection = service.send("/v1/completions", {"prompt": "b", "max_tokens": 4000, "stream": True})
        assert connection.recv(15) == b"HTTP/1.1 200 OK"
        connection.shutdown(socket.SHUT_RDWR)
        connection.close()
        assert service.process.stdout is not None
        line = json.loads(service.process.stdout.readline())
        assert (line["left"], line["finish_reasons"], line["key"]) == (True, ["cancelled"], None)
        assert 0 <= line["completion_tokens"] < 4000


def test_a_log_is_no_other_file(run, model, tmp_path):
    other = tmp_path / "notes"
    other.write_text("of mine\n")
    assert (
        "is not a log of requests" in run("serve", "--model", model, "--port", 0, "--access-log", other, *WORDS).error
    )
    assert other.read_text() == "of mine\n"
    error = run("serve", "--model", model, "--port", 0, "--access-log", tmp_path / "none" / "log", *WORDS).error
    assert "--access-log" in error
    assert "cannot be written (No such file or directory)" in error


def test_a_log_that_is_full_is_told_once_and_requests_go_on(model, capsys):
    full = Path("/dev/full")
    if not full.exists():  # macOS has none
        with pytest.raises(OutputError):
            Access(lambda *_: None, full / "log")  # type: ignore[arg-type, return-value]
        return
    with serving_here(model, access_log=full) as service:
        for _ in range(3):
            assert service.ask("/health").status == 200
        assert capsys.readouterr().err.count("no longer logged (No space left on device)") == 1


# -- limits ------------------------------------------------------------------------------------------------------------
def limited(model: Path, **limits: int):
    return serving_here(
        model, keys=(Key(ANNA, "anna", **limits), Key(BERT, "bert")), settings={"cache_memory_mb": 64}
    )  # fmt: skip


def ask(service: Here, secret: str, **fields: object):
    body = {"prompt": "a prompt", "max_tokens": 1, "temperature": 0, "ignore_eos": True, **fields}
    return service.ask("/v1/completions", body, **key(secret))


def test_a_key_has_so_many_requests_a_minute(model):
    with limited(model, requests=3) as service:
        told = []
        for left in (2, 1, 0):
            got = ask(service, ANNA, stream=left == 1)
            told.append(got.headers["x-ratelimit-remaining-requests"])
            assert (got.status, got.headers["x-ratelimit-limit-requests"]) == (200, "3")
            assert 0 < int(got.headers["x-ratelimit-reset-requests"].removesuffix("s")) <= 60
        assert told == ["2", "1", "0"]
        for got in (
            ask(service, ANNA),
            service.ask("/v1/states", {"prompt": "a"}, **key(ANNA)),
            service.ask("/v1/states/a", b"a", method="PUT", **key(ANNA)),
        ):
            assert (got.status, got.error["code"], got.error["type"]) == (
                429,
                "rate_limit_exceeded",
                "rate_limit_error",
            )
            assert 1 <= int(got.headers["retry-after"]) <= 20
            assert "3 requests a minute" in got.error["message"]
        assert service.ask("/v1/states", **key(ANNA)).json["data"] == []  # looking costs nothing
        assert service.ask("/load", **key(ANNA)).status == 200
        free = ask(service, BERT)
        assert free.status == 200
        assert not [name for name in free.headers if name.startswith("x-ratelimit")]


def test_a_key_has_so_many_computed_tokens_a_minute(model):
    with limited(model, tokens=1000) as service:
        got = service.ask("/v1/states", {"id": "d", "prompt": "b" * 400}, **key(ANNA))
        while service.ask("/v1/states/d", **key(ANNA)).json["status"] != "ready":
            time.sleep(0.01)

        def left() -> int:
            return int(service.desk.account(Key(ANNA).tenant).headers()["x-ratelimit-remaining-tokens"])

        assert 599 <= left() < 700  # some come back while this runs
        before = left()
        got = ask(service, ANNA, prompt="c" * 50, state="d", max_tokens=50)
        assert got.json["usage"]["prompt_tokens"] == 450
        assert before - 100 <= left() < before - 60  # the document's own tokens are not computed again
        before = left()
        prompt = "d" * 2000
        assert ask(service, ANNA, prompt=prompt).status == 200  # it had some left; now it is in debt
        got = ask(service, ANNA)
        assert (got.status, got.error["code"]) == (429, "rate_limit_exceeded")
        assert "1,000 tokens a minute" in got.error["message"]
        assert got.headers["x-ratelimit-remaining-tokens"] == "0"
        debt = 2001 - before
        assert debt * 60 / 1000 - 30 < int(got.headers["retry-after"]) <= debt * 60 / 1000 + 2
        assert ask(service, BERT, prompt=prompt).status == 200


def test_a_key_has_room_for_so_many_states(model):
    with serving_here(model) as service:
        size = service.engine.config.state_file_bytes(1)
    with limited(model, states_bytes=2 * size) as service:
        for name in "ab":
            assert service.ask("/v1/states", {"id": name, "prompt": name}, **key(ANNA)).status == 202
        got = service.ask("/v1/states", {"id": "c", "prompt": "c"}, **key(ANNA))
        assert (got.status, got.error["code"]) == (400, "states_full")
        assert got.error["message"].startswith("this key has 2 states of")
        assert service.ask("/v1/states", {"id": "c", "prompt": "c"}, **key(BERT)).status == 202
        assert service.ask("/v1/states/a", method="DELETE", **key(ANNA)).status == 200
        assert service.ask("/v1/states", {"id": "c", "prompt": "c"}, **key(ANNA)).status == 202


def test_a_bucket_fills_evenly(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("xlstm_ray.serve.limits.monotonic", lambda: now[0])
    bucket = Bucket(60)
    bucket.take(61)
    assert (bucket.left, bucket.seconds_until(1)) == (-1, 2)
    now[0] += 31
    assert bucket.left == 30
    now[0] += 1000
    assert (bucket.left, bucket.seconds_until(60)) == (60, 0)


# -- the file of keys --------------------------------------------------------------------------------------------------
def test_a_line_of_the_key_file_may_say_more(tmp_path):
    path = tmp_path / "keys"
    path.write_text(f"{ANNA} name=anna requests=60 tokens=100000 states-mb=512\n\n  {BERT}  tokens=5\r\n")
    assert read_keys(path) == (Key(ANNA, "anna", 60, 100_000, 512 << 20), Key(BERT, "key 2", tokens=5))
    assert ANNA not in repr(Options(keys=read_keys(path)))


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (f"{BERT} more words", "key 2 has something else after it than fields"),
        (f"{BERT} requests", "key 2 has something else after it"),
        (f"{BERT} requests=1 requests=2", "key 2 has something else after it"),
        (f"{BERT} limit=1", "allowed: name=NAME requests=N tokens=N states-mb=N"),
        (f"{BERT} requests=0", "`requests=0`; allowed: a whole number from 1"),
        (f"{BERT} tokens=-1", "`tokens=-1`"),
        (f"{BERT} states-mb=1.5", "`states-mb=1.5`"),
        (f"{BERT} tokens={'9' * 500}", "allowed: a whole number"),
        (f"{ANNA} requests=1", "key 2 is there twice"),
        (f"{BERT} name=anna", "or its name is"),
    ],
)
def test_a_wrong_line_of_the_key_file_is_named_without_its_key(line, says, tmp_path):
    path = tmp_path / "keys"
    path.write_text(f"{ANNA} name=anna\n{line}\n")
    with pytest.raises(UsageError) as refused:
        read_keys(path)
    assert says in str(refused.value)
    assert ANNA not in str(refused.value)
    assert BERT not in str(refused.value)
