"""/v1/completions: what the engine says, in OpenAI's form; every field is honoured or refused by its name."""

import re
import threading
import time
from typing import Any

import pytest
from services import Here, model, service, serving_here

from xlstm_ray.config import Quantization
from xlstm_ray.quantize import quantize_model
from xlstm_ray.serve.fields import NEUTRAL

__all__ = ["model", "service"]

TEXT = "Once upon a time there was a state. "
LONG = TEXT * 600  # some seconds of work


def said(here: Here, prompt: Any, **sampling: Any) -> tuple[str, list[int], str]:
    """What the engine itself answers."""
    generation = here.engine.generate(prompt, sampling={"max_new_tokens": 12, "temperature": 0, **sampling})
    return "".join(generation), generation.tokens[0], generation.finishes[0].reason


def until(true: Any, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("prompt", [TEXT, [1, 2, 3, 200], [TEXT, "And then?"], [[1, 2, 3], [4, 5]]])
def test_answers_are_those_of_the_engine(service, prompt):
    many = (
        prompt if isinstance(prompt[0], list) or isinstance(prompt, list) and isinstance(prompt[0], str) else [prompt]
    )
    got = service.complete(prompt, max_tokens=12).json
    assert (got["object"], got["model"]) == ("text_completion", "tiny")
    assert [choice["index"] for choice in got["choices"]] == list(range(len(many)))
    for one, choice in zip(many, got["choices"], strict=True):
        text, _, reason = said(service, one)
        assert (choice["text"], choice["finish_reason"]) == (text, reason)
    read = sum(len(service.engine.encode(one)) for one in many)
    usage = got["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (read, 12 * len(many))
    assert usage["total_tokens"] == read + 12 * len(many)


def test_a_model_of_integers_is_served(model, tmp_path):
    list(quantize_model(model, tmp_path / "q", Quantization(bits=4, group_size=32, embedding=True, head=True)))
    with serving_here(tmp_path / "q") as here:
        text, _, reason = said(here, TEXT)
        (choice,) = here.complete(TEXT, max_tokens=12).json["choices"]
    assert (choice["text"], choice["finish_reason"]) == (text, reason)


@pytest.mark.parametrize(
    ("fields", "sampling"),
    [
        ({"temperature": 0.8, "seed": 5, "top_p": 0.9}, {"temperature": 0.8, "seed": 5, "top_p": 0.9}),
        ({"seed": 7, "temperature": None}, {"seed": 7, "temperature": 1.0}),
        ({"seed": -1, "temperature": 1}, {"seed": (1 << 63) - 1, "temperature": 1.0}),
        (
            {"top_k": 5, "min_p": 0.1, "seed": 1, "temperature": 2},
            {"top_k": 5, "min_p": 0.1, "seed": 1, "temperature": 2.0},
        ),
        ({"seed": 3, "top_p": 0.5, "top_k": -1}, {}),  # at temperature 0
        ({"repetition_penalty": 1.5}, {"repetition_penalty": 1.5}),
        ({"presence_penalty": 1, "frequency_penalty": 0.5}, {"presence_penalty": 1.0, "frequency_penalty": 0.5}),
        ({"logit_bias": {"65": 100}}, {"logit_bias": {65: 100.0}}),
        ({"ignore_eos": True, "min_tokens": 3}, {"ignore_eos": True, "min_tokens": 3}),
    ],
)
def test_fields_of_sampling_are_honoured(service, fields, sampling):
    text, _, _ = said(service, TEXT, **sampling)
    got = service.complete(TEXT, max_tokens=12, **fields).json
    assert got["choices"][0]["text"] == text


def test_a_stop_text_ends_the_answer_before_it(service):
    text, _, _ = said(service, TEXT)
    stop = text[4:6]
    for given in (stop, [stop, "never said"]):
        (choice,) = service.complete(TEXT, max_tokens=12, stop=given).json["choices"]
        assert (choice["text"], choice["finish_reason"]) == (text[: text.index(stop)], "stop")


def test_several_answers_have_seeds_of_their_own_and_read_the_prompt_once(service):
    prompt = TEXT + "n"
    for penalty in (1.0, 1.3):
        fields = {"temperature": 1.0, "seed": 9, "repetition_penalty": penalty}
        got = service.complete(prompt, n=3, max_tokens=12, **fields).json
        one_by_one = [said(service, prompt, **{**fields, "seed": 9 + i})[0] for i in range(3)]
        assert [choice["text"] for choice in got["choices"]] == one_by_one
        assert len(set(one_by_one)) == 3
        assert got["usage"]["prompt_tokens"] == len(service.engine.encode(prompt))


def test_without_a_seed_answers_differ(service):
    assert len({service.complete(TEXT, temperature=1.5).json["choices"][0]["text"] for _ in range(4)}) > 1


def test_log_probabilities_are_the_engines(service):
    generation = service.engine.generate(TEXT, max_new_tokens=4, sampling={"logprobs": 3})
    list(generation)
    (choice,) = service.complete(TEXT, max_tokens=4, logprobs=3).json["choices"]
    found = choice["logprobs"]
    made = generation.logprobs(0)
    assert found["token_logprobs"] == [own.logprob for own, _ in made]
    assert found["tokens"] == [own.text for own, _ in made]
    for chosen, top, (own, likeliest) in zip(found["tokens"], found["top_logprobs"], made, strict=True):
        assert top[chosen] == own.logprob == max(top.values())
        assert set(top) == {one.text for one in likeliest}
    assert found["text_offset"] == [sum(map(len, found["tokens"][:n])) for n in range(4)]


@pytest.mark.parametrize("prompt", [TEXT, [65, 1, 257, 200], "é"])
def test_an_echo_has_the_prompt_and_its_log_probabilities(service, prompt):
    ids = service.engine.encode(prompt)
    (rows,) = service.engine.prefill(prompt, all_logits=True).all_logits
    chances = rows.double().log_softmax(-1)
    shown = prompt if isinstance(prompt, str) else service.engine.decode(prompt)
    text, tokens, _ = said(service, prompt, max_new_tokens=3)
    for most in (0, 3):
        (choice,) = service.complete(prompt, echo=True, logprobs=2, max_tokens=most).json["choices"]
        assert (choice["text"], choice["finish_reason"]) == (shown + (text if most else ""), "length")
        found = choice["logprobs"]
        assert found["tokens"] == [service.engine.decode([token]) for token in [*ids, *tokens[:most]]]
        assert (found["token_logprobs"][0], found["top_logprobs"][0], found["text_offset"][0]) == (None, None, 0)
        for n in range(1, len(ids)):
            own, top = found["token_logprobs"][n], found["top_logprobs"][n]
            assert own == pytest.approx(float(chances[n - 1, ids[n]]), abs=1e-4)
            assert max(top.values()) == pytest.approx(float(chances[n - 1].max()), abs=1e-4)
            assert (own == max(top.values())) == (int(chances[n - 1].argmax()) == ids[n])
        assert {len(values) for values in found.values()} == {len(ids) + most}
    bare = service.complete(prompt, echo=True, max_tokens=3, stream=True, n=2).events
    for n in (0, 1):
        parts = [c["text"] for chunk in bare for c in chunk["choices"] if c["index"] == n]
        assert (parts[0], "".join(parts)) == (shown, shown + text)


def test_a_stream_has_the_pieces_of_the_whole(service):
    whole = service.complete([TEXT, "Or?"], n=2, max_tokens=9, logprobs=1, temperature=1, seed=1).json
    got = service.complete(
        [TEXT, "Or?"],
        n=2,
        max_tokens=9,
        logprobs=1,
        temperature=1,
        seed=1,
        stream=True,
        stream_options={"include_usage": True},
    )
    assert got.headers["content-type"].startswith("text/event-stream")
    *chunks, last = got.events
    assert len({chunk["id"] for chunk in [*chunks, last]}) == 1
    assert (last["choices"], last["usage"]["completion_tokens"]) == ([], 36)
    assert {chunk["usage"] for chunk in chunks} == {None}
    texts, logprobs, reasons = [""] * 4, [[] for _ in range(4)], [None] * 4
    for chunk in chunks:
        (choice,) = chunk["choices"]
        n = choice["index"]
        assert reasons[n] is None
        texts[n] += choice["text"]
        logprobs[n] += choice["logprobs"]["token_logprobs"] if choice["logprobs"] else []
        reasons[n] = choice["finish_reason"]
    assert texts == [choice["text"] for choice in whole["choices"]]
    assert logprobs == [choice["logprobs"]["token_logprobs"] for choice in whole["choices"]]
    assert reasons == ["length"] * 4


def test_progress_is_told_to_those_who_ask_and_comments_keep_others_connected(service):
    asked = service.complete(LONG[:1500], stream=True, max_tokens=2, stream_options={"include_progress": True})
    told = [chunk["progress"] for chunk in asked.events if "progress" in chunk]
    assert told[0]["phase"] == "queued"
    done = [one["tokens_done"] for one in told[1:]]
    assert done == sorted(done)
    assert (done[-1], told[-1]["tokens_total"]) == (1500, 1500)
    got = service.complete(LONG[1:1501], stream=True, max_tokens=2)
    assert b"\n: prefill " in b"\n" + got.body
    assert not [chunk for chunk in got.events if not chunk["choices"]]
    counted = service.complete(TEXT, stream=True, max_tokens=3, stream_options={"continuous_usage_stats": True}).events
    assert [chunk["usage"]["completion_tokens"] for chunk in counted][-1] == 3


def test_the_reply_says_hit_or_miss_and_why(service):
    prompt = "An unseen beginning. " * 12
    first = service.complete(prompt)
    size = len(prompt)
    assert first.headers["x-xlstm-cache"] == f'miss tokens=0 of={size} reason="none seen"'
    again = service.complete(prompt)
    assert again.headers["x-xlstm-cache"] == f"hit tokens={size} of={size} tier=host"
    assert again.json["usage"]["prompt_tokens_details"] == {"cached_tokens": size}
    assert again.json["choices"] == first.json["choices"]
    other = service.complete(prompt, cache_salt="of somebody else")
    assert other.headers["x-xlstm-cache"].startswith("miss ")
    edited = service.complete(prompt[:200] + "X" * 52)
    assert edited.headers["x-xlstm-cache"] == f'hit tokens=192 of={size} tier=host reason="diverged at 192"'
    twice = service.complete([f"Two at once. {prompt}"] * 2)  # the second one's turn comes when the first one was read
    size += len("Two at once. ")
    assert twice.headers["x-xlstm-cache"] == f'hit tokens={size} of={2 * size} tier=host reason="none seen"'
    assert twice.json["usage"]["prompt_tokens_details"] == {"cached_tokens": size}


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"prompt": None}, "prompt", "a text, token ids"),
        ({"prompt": []}, "prompt", "a text, token ids"),
        ({"prompt": [True]}, "prompt", "a text, token ids"),
        ({"prompt": [[]]}, "prompt", "a text, token ids"),
        ({"prompt": ["a", 1]}, "prompt", "a text, token ids"),
        ({"prompt": ""}, None, "empty"),
        ({"prompt": [259]}, None, "outside the model's vocabulary"),
        ({"prompt": [10**30]}, None, "outside the model's vocabulary"),
        ({"prompt": "a", "temprature": 1}, "temprature", "is not a field here"),
        ({"prompt": "a", "stream_options": {"usage": True}, "stream": True}, "stream_options", "stream_options.usage"),
        ({"prompt": "a", "stream_options": {"include_usage": True}}, "stream_options", "without `stream`"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens", "1 or more"),
        ({"prompt": "a", "max_tokens": 1.5}, "max_tokens", "integer"),
        ({"prompt": "a", "max_tokens": 1 << 40}, "max_tokens", "up to 4096"),
        ({"prompt": "a", "min_tokens": 99}, "min_tokens", "up to `max_tokens`"),
        ({"prompt": "a", "temperature": -1}, "temperature", "0 (greedy) to 100"),
        ({"prompt": "a", "n": 0}, "n", "1 to 128"),
        ({"prompt": "a", "n": 13}, "n", "room for 12"),
        ({"prompt": "a", "best_of": 2}, "best_of", "as many as `n`"),
        ({"prompt": "a", "logprobs": True}, "logprobs", "integer"),
        ({"prompt": "a", "logprobs": 21}, "logprobs", "20"),
        ({"prompt": "a", "stop": [""]}, "stop", "not empty"),
        ({"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias", "token ids"),
        ({"prompt": "a", "logit_bias": {"999": 1}}, "logit_bias", "outside the model's vocabulary"),
        ({"prompt": "a", "echo": 1}, "echo", "boolean"),
        ({"prompt": "a", "prompt_logprobs": 1, "stream": True}, "prompt_logprobs", "is not streamed"),
        ({"prompt": "a", "echo": True, "max_tokens": 0, "n": 2}, "n", "there is no answer"),
        ({"prompt": "a", "echo": True, "max_tokens": 0, "top_p": 2}, "top_p", "up to 1"),
        ({"prompt": "a", "prompt_logprobs": 1, "echo": True, "logprobs": 2}, "prompt_logprobs", "differ"),
        ({"prompt": "a", "tools": [{}]}, "tools", "not served here"),
        ({"prompt": "a", "model": "gpt"}, "model", "no model 'gpt'"),
        ({"prompt": "a", "priority": 11}, "priority", "less than or equal to 10"),
    ],
)
def test_what_is_not_served_is_refused_by_its_name(service, fields, param, says):
    got = service.ask("/v1/completions", {key: value for key, value in fields.items() if value is not None})
    assert got.status == (404 if param == "model" else 400)
    assert says in got.error["message"]
    assert got.error["param"] == param
    assert got.error["type"] == "invalid_request_error"
    assert "\n" not in got.error["message"]


def test_values_that_ask_for_nothing_pass(service):
    nothing = {name: values[0] if values else None for name, values in NEUTRAL.items()}
    nulls = dict.fromkeys(["stop", "seed", "logprobs", "max_tokens", "logit_bias", "stream_options", "top_k"])
    plain = service.complete(TEXT).json["choices"]
    assert service.complete(TEXT, **nothing, **nulls, best_of=1, n=1, model="tiny", user="me").json["choices"] == plain


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"\xff",
        b'{"prompt": "a", "prompt": "b"}',
        b'{"prompt": "\\ud800"}',
        b'{"temperature": NaN}',
        b"[" * 99999,
    ],
)
def test_a_body_that_is_no_object_of_json_is_refused(service, body):
    got = service.ask("/v1/completions", body)
    assert (got.status, got.error["type"]) == (400, "invalid_request_error")


def test_a_body_over_the_limit_is_refused(service):
    got = service.complete("x" * (1 << 20))
    assert got.status == 413
    assert "1,048,576 bytes" in got.error["message"]
    head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\n"
    piece = b"10000\r\n" + b" " * 65536 + b"\r\n"
    with service.connect() as connection:  # without a Content-Length
        connection.sendall(head + b"transfer-encoding: chunked\r\n\r\n" + 17 * piece + b"0\r\n\r\n")
        assert connection.recv(64).startswith(b"HTTP/1.1 413 ")
    with service.connect() as connection:  # one that is not worth waiting for
        connection.sendall(head + b"content-length: 99999999999\r\n\r\n")
        assert connection.recv(64).startswith(b"HTTP/1.1 413 ")


def test_other_addresses_and_methods_are_told(service):
    assert service.ask("/v1/complete").status == 404
    assert service.ask("/v1/completions").error["message"] == "'/v1/completions' takes no GET"
    assert service.ask("/v1/models").json["data"][0]["id"] == "tiny"
    assert service.ask("/v1/models/tiny").json["object"] == "model"
    assert service.ask("/v1/models/other").error["code"] == "model_not_found"
    assert service.ask("/health").json == {"status": "ok"}
    assert set(service.ask("/openapi.json").json["paths"]) >= {"/v1/completions", "/v1/models", "/health"}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("at", ["prompt", "answer"])
def test_who_leaves_is_not_worked_for_any_longer(service, stream, at):
    def given_up() -> int:
        found = service.ask("/metrics").body.decode()
        return sum(int(float(n)) for n in re.findall(r"^xlstm:cancelled_total\{.*\} (\S+)$", found, re.MULTILINE))

    before = given_up()
    body = {"prompt": LONG if at == "prompt" else "a", "max_tokens": 4096, "stream": stream, "temperature": 0}
    connection = service.send("/v1/completions", body)
    until(lambda: service.desk.under_way == 1)
    if stream:
        assert connection.recv(15) == b"HTTP/1.1 200 OK"
    time.sleep(0.1)
    connection.close()
    until(lambda: service.desk.under_way == 0)
    until(lambda: given_up() == before + 1)  # it did not come to its end
    assert service.complete("a").status == 200


def test_a_full_service_says_so_and_when_to_come_back(service):
    connections = [service.send("/v1/completions", {"prompt": LONG, "n": 4}) for _ in range(3)]
    until(lambda: service.desk.under_way == 12)
    got = service.complete("a")
    assert (got.status, got.error["code"], got.headers["retry-after"]) == (503, "full", "1")
    for connection in connections:
        connection.close()
    until(lambda: service.desk.under_way == 0)
    assert service.complete("a").status == 200


def test_a_reader_that_does_not_read_holds_up_nobody(service):
    alone = service.complete(TEXT, max_tokens=40).json["choices"]
    body = {"prompt": "a", "stream": True, "max_tokens": 400, "logprobs": 20}  # half a MiB
    lazy = service.send("/v1/completions", body, buffer=4096)
    until(lambda: service.desk.under_way == 1)
    assert service.complete(TEXT, max_tokens=40).json["choices"] == alone
    until(lambda: service.desk.under_way == 0)  # its answer was made all the same
    read = b""
    while b"[DONE]" not in read[-100:]:
        read += lazy.recv(1 << 20)
    assert read.count(b'"text":') == 401
    lazy.close()


def test_many_callers_get_what_each_gets_alone(service):
    prompts = [f"{n} {TEXT}" for n in range(12)]
    alone = [service.complete(prompt, max_tokens=20).json["choices"][0]["text"] for prompt in prompts]
    together: dict[int, str] = {}

    def ask(n: int) -> None:
        got = service.complete(prompts[n], max_tokens=20, stream=n % 2 == 0)
        choices = [choice for chunk in (got.events if n % 2 == 0 else [got.json]) for choice in chunk["choices"]]
        together[n] = "".join(choice["text"] for choice in choices)

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [together[n] for n in range(12)] == alone
