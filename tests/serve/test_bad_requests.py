"""Whatever is sent: an answer, or a 4xx with a reason; never a 5xx, a hang or a traceback."""

import hashlib
import json
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from services import Here, model, serving_here
from xxhash import xxh3_128

from xlstm_ray.serve.fields import NEUTRAL, Chat, Completion, Detokenize, Tokenize
from xlstm_ray.serve.states import NewState
from xlstm_ray.state import RecurrentState, pieces
from xlstm_ray.text.template import Template

__all__ = ["model"]

PATHS = {
    "/v1/completions": Completion,
    "/v1/chat/completions": Chat,
    "/tokenize": Tokenize,
    "/detokenize": Detokenize,
    "/v1/states": NewState,
}
GOOD = {
    "/v1/completions": {"prompt": "a"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}]},
    "/tokenize": {"prompt": "a"},
    "/detokenize": {"tokens": [1]},
    "/v1/states": {"prompt": "a"},
}
ODD = [
    0,
    -1,
    1,
    2,
    1.5,
    1e308,
    -0.0,
    10**400,
    1 << 63,
    True,
    False,
    None,
    "",
    "a",
    "é\u0000\U0001f600",
    [],
    {},
    [None],
    "1",
]
TEXTS = st.one_of(st.text(max_size=12), st.sampled_from(["tiny", "system", "user", "text", "book", "{{ 1 }}"]))
JSON = st.recursive(
    st.one_of(st.sampled_from(ODD), TEXTS, st.integers(-300, 300), st.floats(allow_nan=False, allow_infinity=False)),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(TEXTS, inner, max_size=3)),
    max_leaves=8,
)
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant", "tool", 1])},
    optional={
        "content": st.one_of(TEXTS, JSON, st.just([{"type": "text", "text": "a"}])),
        "name": JSON,
        "tool_calls": JSON,
    },
)
LIKELY = {  # values that are often right
    "prompt": st.one_of(st.text(min_size=1, max_size=20), st.lists(st.integers(0, 258), min_size=1, max_size=9), JSON),
    "messages": st.one_of(st.lists(MESSAGE, max_size=3), JSON),
    "tokens": st.one_of(st.lists(st.integers(-1, 300), max_size=9), JSON),
    "max_tokens": st.one_of(st.integers(0, 5), JSON),
    "n": st.one_of(st.integers(0, 3), JSON),
    "stop": st.one_of(TEXTS, st.lists(TEXTS, max_size=2), JSON),
    "logit_bias": st.one_of(st.dictionaries(st.sampled_from(["1", "65", "300", "x"]), st.floats(-101, 101)), JSON),
    "stream_options": st.one_of(st.fixed_dictionaries({}, optional={"include_usage": st.booleans()}), JSON),
    "seed": st.one_of(st.integers(), JSON),
    "temperature": st.one_of(st.floats(-1, 3), JSON),
    "top_p": st.one_of(st.floats(-0.5, 1.5), JSON),
    "repetition_penalty": st.one_of(st.floats(-1, 101), st.floats(0, 1e-37), JSON),
    "stream": st.one_of(st.booleans(), JSON),
    "chat_template_kwargs": st.one_of(st.dictionaries(TEXTS, JSON, max_size=2), JSON),
}


def body_of(path: str) -> st.SearchStrategy[dict[str, Any]]:
    """Objects with some of an endpoint's fields, and sometimes others."""
    names = [*PATHS[path].model_fields]
    needed = {name: LIKELY[name] for name in ("prompt", "messages", "tokens") if name in names}
    if path == "/tokenize":  # one of them
        del needed["messages"]
    some = {name: LIKELY.get(name, JSON) for name in names if name not in needed}
    other = {name: JSON for name in [*list(NEUTRAL)[:6], "nonsense"]}
    return st.fixed_dictionaries(needed, optional=some).flatmap(
        lambda body: st.one_of(
            st.just(body), st.fixed_dictionaries({}, optional=other).map(lambda more: {**body, **more})
        )
    )


@pytest.fixture(scope="module")
def service(model):
    template = Template("{% for m in messages %}{{ m.role }}{{ m.content }}{{ more }}{% endfor %}", "test", {})
    with serving_here(model, answer_tokens=4, template=template, body_bytes=1 << 16, drain_s=5) as here:
        yield here


def require_calm(service: Here, status: int, body: bytes) -> None:
    if status >= 400:
        error = json.loads(body)["error"]
        assert status < 500, error
        assert error["message"]
        assert "Traceback" not in error["message"]


@pytest.mark.parametrize("path", PATHS)
def test_bodies_are_answered_or_refused_with_a_reason(service, path):
    assert service.ask(path, GOOD[path]).status in (200, 202)
    assert service.ask(path, {}).status == 400

    @settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
    @given(body_of(path))
    def ask(body: dict[str, Any]) -> None:
        got = service.ask(path, body)
        require_calm(service, got.status, got.body)
        if got.status == 200 and got.headers["content-type"].startswith("text/event-stream"):
            assert b'"error"' not in got.body
        for info in service.ask("/v1/states").json["data"]:
            service.ask(f"/v1/states/{info['id']}", method="DELETE")

    ask()
    assert service.ask("/health").status == 200


def test_bytes_are_refused_with_a_reason(service):
    @settings(max_examples=60)
    @given(st.sampled_from([*PATHS]), st.one_of(st.binary(max_size=80), st.text(max_size=40).map(str.encode)))
    def ask(path: str, body: bytes) -> None:
        got = service.ask(path, body)
        assert 400 <= got.status < 500
        require_calm(service, got.status, got.body)

    ask()


def _rows(**fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda header: header["rows"][0].update(fields)


def _tokens(count: int) -> Callable[[dict[str, Any]], None]:
    def change(header: dict[str, Any]) -> None:
        header["tokens"] = [count]
        header["rows"][0]["tokens"]["length"] = count

    return change


HEADERS = {
    "more tokens than int64 has": _tokens((1 << 63) - 1),
    "more than any number has": _tokens(10**40),
    "a token below 0": _rows(end={"tokens": [-1], "printed": ""}),
    "a token of 64 bits": _rows(end={"tokens": [1 << 63], "printed": ""}),
    "a text without an end": _rows(text={"length": 10**40, "hash": "0" * 32, "step": 1, "places": ""}),
    "more before than there is": lambda header: header.update(complete=False, begun=[10**40]),
    "a place beyond all": lambda header: header.update(
        place={"root": "0" * 32, "key": "0" * 32, "rows": 10**40, "tiles": 10**40}
    ),
}


def upload(state: RecurrentState, change: Callable[[dict[str, Any]], None]) -> bytes:
    """A state's file with another header, and checksums that are right: who sends a file can compute them."""
    data = state.to_bytes()
    header = json.loads(json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]["xlstm_ray"])
    change(header)
    shown = SimpleNamespace(tensors=state.tensors, tokens=header["tokens"], prompt_hash=header["prompt_hash"])
    text = json.dumps({**header, "sum": RecurrentState._hashed(shown, xxh3_128())}, separators=(",", ":"))
    return b"".join(pieces(state.tensors, {"xlstm_ray": text, "check": hashlib.sha256(text.encode()).hexdigest()}))


def test_states_that_nobody_made_are_refused_or_answered(service):
    state = service.engine.prefill("a book").state
    assert service.ask("/v1/states/same", upload(state, lambda header: None), method="PUT").status == 201
    service.ask("/v1/states/same", method="DELETE")
    for what, change in HEADERS.items():
        got = service.ask("/v1/states/odd", upload(state, change), method="PUT")
        assert got.status == 400, what
        assert "the header's" in got.error["message"], what
    assert service.complete("a").status == 200


HEADER = st.tuples(
    st.sampled_from(
        ["host", "content-length", "transfer-encoding", "authorization", "origin", "expect", "x-a", "connection"]
    ),
    st.binary(max_size=20).map(lambda value: value.replace(b"\n", b"").replace(b"\r", b"")),
)


def test_a_field_in_an_address_that_is_unknown_or_there_twice_is_refused_everywhere(service):
    """Else it would have no effect, in silence; the same goes for a key of an object."""
    paths = service.ask("/openapi.json").json["paths"]
    places = [(path, method.upper()) for path, methods in paths.items() for method in methods]
    assert {("/v1/states/{name}", "PUT"), ("/v1/completions", "POST"), ("/metrics", "GET")} <= {*places}
    for path, method in [*places, ("/", "GET")]:
        body = None if method == "GET" else b"A text."
        for query in ("state=a&ttl=60&state=b", "state=a&st%61te=a"):
            got = service.ask(f"{path.format(name='a')}?{query}", body, method, content_type="text/plain")
            assert (got.status, got.error["param"]) == (400, "state"), (path, method)
        got = service.ask(f"{path.format(name='a')}?stat=a", body, method, content_type="text/plain")
        assert (got.status, got.error["param"]) == (400, "stat"), (path, method)
    for query in ("id=a", "state=a", "ttl=60"):  # beside a body of JSON, where they belong
        got = service.ask(f"/v1/states?{query}", {"prompt": "A text."})
        assert (got.status, got.error["param"]) == (400, query.partition("=")[0])
    assert service.ask("/v1/states").json["data"] == []
    assert service.ask("/v1/states/a?ttl=60", b"A text.", "PUT").status == 202
    assert service.ask("/v1/states/a", method="DELETE").status == 200


def test_headers_and_addresses_are_refused_without_harm(service):
    @settings(max_examples=100)
    @given(
        st.lists(HEADER, max_size=4),
        st.binary(max_size=30),
        st.sampled_from([b"GET", b"POST", b"PUT", b"DELETE", b"X"]),
    )
    def ask(headers: list[tuple[str, bytes]], path: bytes, method: bytes) -> None:
        lines = [name.encode() + b": " + value for name, value in headers]
        address = b"/v1/" + path.replace(b"\n", b"").replace(b"\r", b"")
        text = b"\r\n".join([method + b" " + address + b" HTTP/1.1", *lines, b"connection: close", b"", b""])
        with service.connect() as connection:
            connection.sendall(text)
            connection.shutdown(socket.SHUT_WR)
            said = connection.recv(1 << 16)
        assert not said or said.startswith((b"HTTP/1.1 4", b"HTTP/1.1 2", b"HTTP/1.1 3", b"HTTP/1.1 100")), said

    ask()
    assert service.ask("/health").status == 200
    assert service.desk.under_way == 0


HEAD = b"POST /tokenize HTTP/1.1\r\nhost: localhost\r\n"
CLOSE = b"connection: close\r\n"
CHUNKED = HEAD + CLOSE + b"transfer-encoding: chunked\r\n\r\n"
LONG = b"y" * (4 << 20)


def replied(service: Here, *parts: bytes) -> bytes:
    """What comes back until the service closes the connection."""
    said = b""
    with service.connect() as connection, suppress(ConnectionError):
        with suppress(ConnectionError):  # it may refuse before all was sent
            for part in parts:
                connection.sendall(part)
        while part := connection.recv(1 << 16):
            said += part
    return said


@pytest.mark.parametrize(
    "parts",
    [
        (HEAD, b"x: ", LONG),
        (HEAD, *(b"x-%d: %s\r\n" % (n, LONG[:1000]) for n in range(4000))),
        (CHUNKED, b"2\r\n{}\r\n0\r\nx: ", LONG),
        (CHUNKED, b"2\r\n{}\r\n0\r\n", *(b"x-%d: %s\r\n" % (n, LONG[:1000]) for n in range(4000))),
    ],
    ids=["a header", "headers", "a trailer", "trailers"],
)
def test_a_head_without_an_end_is_refused_and_takes_no_memory(service, parts, caplog):
    said = replied(service, *parts)
    assert not said or (said.startswith(b"HTTP/1.1 400") and b"65,536 bytes besides its body" in said)
    assert service.ask("/health").status == 200
    assert not caplog.records


def test_a_body_may_be_larger_than_a_head_in_one_part_or_in_many(service):
    body = json.dumps({"prompt": "a" * 60_000}).encode()
    length = b"content-length: %d\r\n\r\n" % len(body)
    last = HEAD + CLOSE + length + body
    many = b"".join(b"1\r\n%c\r\n" % byte for byte in body)
    for parts in (
        [last],
        [(HEAD + length + body) * 4 + last],
        [CHUNKED, many, b"0\r\n\r\n"],
        [CHUNKED + many + b"0\r\n\r\n"],
    ):
        said = replied(service, *parts)
        assert said.startswith(b"HTTP/1.1 200")
        assert said.count(b'"count":60') == max(1, parts[0].count(HEAD))


def test_a_method_that_no_server_of_ours_has_leaves_no_traceback(service, caplog):
    for lines in (b"CONNECT a:1 HTTP/1.1", b"CONNECT localhost:80 HTTP/1.1", b"PRI * HTTP/2.0"):
        assert replied(service, lines + b"\r\nhost: localhost\r\n\r\n").startswith(b"HTTP/1.1 4")
    assert service.ask("/health").status == 200
    assert not caplog.records


def test_half_a_body_does_not_hold_up_the_end(model, caplog):
    with serving_here(model, drain_s=30) as here:
        starts = (
            HEAD + b"content-length: 50\r\n\r\n{",
            HEAD + b"transfer-encoding: chunked\r\n\r\n1\r\n{\r\n",
            b"PUT /v1/states/a HTTP/1.1\r\nhost: localhost\r\ncontent-length: 5000000\r\n\r\n" + b"a" * 60_000,
        )  # so much is read at once: a connection that is closed with unread bytes may lose its reply
        halves = [here.connect() for _ in starts]
        for half, start in zip(halves, starts, strict=True):
            half.sendall(start)
        assert here.ask("/health").status == 200  # after those
        here.server.drain(threading.Event())
        here.server.close()
        for half in halves:
            with half:
                said = half.makefile("rb").read()
            assert said.startswith(b"HTTP/1.1 503")
            assert b"this service is stopping" in said
    assert not caplog.records
