"""What replies tell of tokens: their ids, and log-probabilities of prompts, whole and streamed."""

from pathlib import Path

import pytest
from services import Here, model, serving_here

from xlstm_ray.text.encode import TextEncoder
from xlstm_ray.text.pieces import Piece
from xlstm_ray.text.template import Template

__all__ = ["model"]

TEXT = "The quick brown fox jumps over the lazy dog. é"
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"


@pytest.fixture(scope="module")
def service(model: Path):
    with serving_here(model, template=Template(TEMPLATE, "test", {}), settings={"cache_memory_mb": 16}) as here:
        yield here


def streamed(service: Here, prompt, **fields):
    """The choices of a stream's chunks."""
    got = service.complete(prompt, stream=True, **fields)
    assert got.status == 200, got.body
    return [choice for event in got.events for choice in event["choices"]]


@pytest.mark.parametrize("prompt", [TEXT, [65, 1, 257, 200]])
@pytest.mark.parametrize("most", [0, 4])
@pytest.mark.parametrize("n", [1, 2])
def test_a_streamed_echo_has_the_log_probabilities_of_the_whole_one(service, prompt, most, n):
    if n > 1 and not most:
        return
    fields = {"echo": True, "logprobs": 2, "max_tokens": most, "n": n, "temperature": 0}
    whole = service.complete(prompt, **fields).json["choices"]
    pieces = streamed(service, prompt, **fields)
    for choice in whole:
        own = [piece for piece in pieces if piece["index"] == choice["index"]]
        assert "".join(piece["text"] for piece in own) == choice["text"]
        for name, values in choice["logprobs"].items():
            assert [v for piece in own if piece["logprobs"] for v in piece["logprobs"][name]] == values, name
        assert own[0]["logprobs"]["token_logprobs"][0] is None  # the prompt comes first, with its own
        assert own[-1]["finish_reason"] == choice["finish_reason"]


def test_a_prompt_is_scored_by_token_ids(service):
    ids = service.engine.encode(TEXT)
    (rows,) = service.engine.prefill(TEXT, all_logits=True).all_logits
    chances = rows.double().log_softmax(-1)
    (choice,) = service.complete(TEXT, prompt_logprobs=2, max_tokens=1).json["choices"]
    assert choice["logprobs"] is None
    first, *found = choice["prompt_logprobs"]
    assert first is None
    assert len(found) == len(ids) - 1
    for at, (token, row) in enumerate(zip(ids[1:], found, strict=True)):
        likeliest = chances[at].topk(2).indices.tolist()
        assert set(row) == {str(other) for other in (*likeliest, token)}
        for other, told in row.items():
            assert told["logprob"] == pytest.approx(float(chances[at][int(other)]), abs=1e-4)
            assert told["rank"] == (likeliest.index(int(other)) + 1 if int(other) in likeliest else None)
            assert told["decoded_token"] == service.engine.decode([int(other)])


def test_replies_tell_tokens_to_those_who_ask(service):
    ids = service.engine.encode(TEXT)
    generation = service.engine.generate(TEXT, max_new_tokens=6)
    list(generation)
    tokens = generation.tokens[0]
    fields = {"max_tokens": 6, "ignore_eos": True, "return_token_ids": True}
    for prompt in (TEXT, ids):
        (choice,) = service.complete(prompt, **fields).json["choices"]
        assert (choice["prompt_token_ids"], choice["token_ids"]) == (ids, tokens)
    pieces = streamed(service, TEXT, **fields)
    assert [token for piece in pieces for token in piece["token_ids"]] == tokens
    assert [piece["prompt_token_ids"] for piece in pieces if "prompt_token_ids" in piece] == [ids]
    (plain,) = service.complete(TEXT, max_tokens=6, return_token_ids=False).json["choices"]
    assert not {"token_ids", "prompt_token_ids"} & set(plain)
    both = service.complete([TEXT, "b"], n=2, **fields).json["choices"]
    assert [choice["prompt_token_ids"] for choice in both] == [ids] * 2 + [service.engine.encode("b")] * 2


def test_chats_and_what_comes_after_a_document_tell_tokens_too(service):
    body = {
        "messages": [{"role": "user", "content": "hi"}],
        "max_tokens": 3,
        "return_token_ids": True,
        "temperature": 0,
    }
    (choice,) = service.ask("/v1/chat/completions", body).json["choices"]
    text = "<user>hi<assistant>"
    assert choice["prompt_token_ids"] == service.engine.encode_more(text)
    assert service.engine.decode(choice["token_ids"]) == choice["message"]["content"]
    service.ask("/v1/states", {"id": "d", "prompt": TEXT})
    while service.ask("/v1/states/d").json["status"] != "ready":
        pass
    for got in (
        service.ask("/v1/chat/completions", {**body, "state": "d"}),
        service.complete(text, state="d", max_tokens=3, return_token_ids=True),
    ):
        (choice,) = got.json["choices"]
        assert choice["prompt_token_ids"] == service.engine.encode_more(text)
        assert len(choice["token_ids"]) == 3


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/completions", {"prompt": "a word " * 90, "max_tokens": 1}),
        ("/v1/completions", {"prompt": "a word " * 90, "max_tokens": 1, "add_special_tokens": False}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a word " * 90}], "max_tokens": 1}),
        ("/tokenize", {"prompt": "a word " * 90}),
        ("/tokenize", {"messages": [{"role": "user", "content": "a word " * 90}]}),
    ],
)
def test_how_fast_a_text_is_cut_tells_nobody_what_another_has_sent(path, fields, model, monkeypatch):
    """What is known of its beginning is of one key and one salt."""
    encoded: list[int] = []
    plain = TextEncoder._encoded

    def counted(self: TextEncoder, part: str, start: int) -> Piece:
        encoded.append(len(part))
        return plain(self, part, start)

    monkeypatch.setattr(TextEncoder, "_encoded", counted)
    for size, characters in (("piece", 256), ("overlap", 64)):
        monkeypatch.setitem(TextEncoder.__init__.__kwdefaults__, size, characters)
    with serving_here(model, template=Template(TEMPLATE, "test", {}), keys=["first", "other"]) as service:

        def cut(key: str, **more: str) -> int:
            encoded.clear()
            assert service.ask(path, {**fields, **more}, authorization=f"Bearer {key}").status == 200
            return sum(encoded)

        assert cut("first") >= 630 > cut("first")
        assert cut("other") >= 630 > cut("other")
        if path != "/tokenize":
            assert cut("other", cache_salt="mine") >= 630 > cut("other", cache_salt="mine")
