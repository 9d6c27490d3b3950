"""/v1/chat/completions and its template; /tokenize and its kin; /metrics."""

import json

import pytest
from prometheus_client.parser import text_string_to_metric_families
from services import WORDS, model, serving_here
from transformers import PreTrainedTokenizerFast

from xlstm_ray.errors import ConfigError, UsageError
from xlstm_ray.text.template import Template, find_template

__all__ = ["model"]

TEMPLATE = (
    "{%- for m in messages %}"
    "{% if m.role == 'system' and not loop.first %}{{ raise_exception('late system') }}{% endif %}"
    "<{{ m.role }}>{{ m.content | trim }}\n{% endfor %}"
    "{%- if add_generation_prompt %}<assistant>{{ mood | default('') }}{% endif %}"
)
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "Who "}, {"type": "text", "text": "are you? "}]},
]
TEXT = "<system>Be brief.\n<user>Who are you?\n<assistant>"


@pytest.fixture(scope="module")
def chats(model):
    with serving_here(model, template=Template(TEMPLATE, "test", {}), metrics=("xlstm", "vllm")) as here:
        yield here


def test_an_answer_is_that_to_the_templates_text(chats):
    generation = chats.engine.generate(chats.engine.encode_more(TEXT), max_new_tokens=9, sampling={"logprobs": 2})
    text = "".join(generation)
    fields = {"messages": TALK, "temperature": 0, "max_completion_tokens": 9, "logprobs": True, "top_logprobs": 2}
    got = chats.ask("/v1/chat/completions", fields).json
    assert got["object"] == "chat.completion"
    (choice,) = got["choices"]
    assert choice["message"] == {"role": "assistant", "content": text, "refusal": None}
    assert choice["finish_reason"] == "length"
    for row, (own, top) in zip(choice["logprobs"]["content"], generation.logprobs(0), strict=True):
        assert (row["token"], row["logprob"], bytes(row["bytes"])) == (own.text, own.logprob, own.text.encode())
        assert [(one["token"], one["logprob"]) for one in row["top_logprobs"]] == [(t.text, t.logprob) for t in top]
    chunks = chats.ask("/v1/chat/completions", {**fields, "stream": True, "n": 2}).events
    for n in (0, 1):
        deltas = [c["delta"] for chunk in chunks for c in chunk["choices"] if c["index"] == n]
        assert deltas[0]["role"] == "assistant"
        assert deltas[0]["content"]  # the role comes with the first token, not before it
        assert not [delta for delta in deltas[1:] if "role" in delta]
        assert "".join(delta.get("content", "") for delta in deltas) == text


def test_a_conversation_goes_on_with_an_answer_as_it_was_sent_back(chats):
    first = chats.ask("/v1/chat/completions", {"messages": TALK, "max_tokens": 4, "temperature": 0}).json
    sent = {**first["choices"][0]["message"], "tool_calls": None, "audio": None}
    more = [*TALK, sent, {"role": "user", "content": "And?"}]
    assert chats.ask("/v1/chat/completions", {"messages": more, "max_tokens": 4}).status == 200


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({}, "messages", "required"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "messages", "messages.0.role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}, "messages", "type"),
        ({"messages": [{"role": "user", "content": "a", "tool_calls": [{}]}]}, "messages", "messages.0.tool_calls"),
        ({"messages": [*TALK, TALK[0]]}, "messages", "late system"),
        ({"messages": TALK, "top_logprobs": 2}, "top_logprobs", "without `logprobs`"),
        ({"messages": TALK, "max_tokens": 2, "max_completion_tokens": 3}, "max_tokens", "differ"),
        ({"messages": TALK, "max_completion_tokens": 0}, "max_completion_tokens", "1 or more"),
        ({"messages": TALK, "tools": [{"type": "function"}]}, "tools", "not served"),
        ({"messages": TALK, "response_format": {"type": "json_object"}}, "response_format", "not served"),
        ({"messages": TALK, "chat_template_kwargs": {"messages": []}}, "chat_template_kwargs", "may not set"),
        ({"messages": TALK, "prompt": "a"}, "prompt", "not a field"),
    ],
)
def test_what_is_not_served_is_refused_by_its_name(chats, fields, param, says):
    got = chats.ask("/v1/chat/completions", fields)
    assert (got.status, got.error["param"]) == (400, param)
    assert says in got.error["message"]


def test_without_a_template_another_endpoint_is_named(model):
    with serving_here(model) as plain:
        got = plain.ask("/v1/chat/completions", {"messages": TALK})
        assert (got.status, got.error["code"]) == (400, "no_chat_template")
        assert "/v1/completions" in got.error["message"]


def test_templates_are_found_and_rendered_as_transformers_does(model, tmp_path):
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(model / "tokenizer.json"), bos_token="<s>", eos_token="</s>")
    source = (
        "{{ bos_token }}{% for m in messages %}\n  {% if m.role == 'user' %}\n{{ m.content | tojson }}{{ eos_token }}\n"
    )
    source += "  {% else %}{% continue %}{% endif %}{% endfor %}\n{{ extra }}"
    config = {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "chat_template": source}
    talk = [{"role": "user", "content": "é <&\"'"}, {"role": "assistant", "content": "x"}]
    expected = tokenizer.apply_chat_template(talk, chat_template=source, tokenize=False, extra="more")

    def found(given=None):
        template = find_template(tmp_path, given)
        return None if template is None else template.render(talk, answer=False, more={"extra": "more"})

    assert found() is None
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert found() == expected
    several = {**config, "chat_template": [{"name": "tools", "template": "x"}, {"name": "default", "template": source}]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(several))
    assert found() == expected
    (tmp_path / "chat_template.jinja").write_text("of the file")
    assert found() == "of the file"
    (tmp_path / "own.jinja").write_text("named")
    assert found(tmp_path / "own.jinja") == "named"
    (tmp_path / "own.jinja").write_text("{% for")
    with pytest.raises(UsageError, match="is not a template"):
        found(tmp_path / "own.jinja")
    with pytest.raises(UsageError, match="cannot be read"):
        found(tmp_path / "none.jinja")
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ConfigError, match="is not JSON"):
        found()


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{% for n in range(10 ** 9) %}{% endfor %}",
        "{{ 1 / 0 }}",
        "{{ messages[5].content }}",
        "{{ raise_exception.__globals__.values() }}",
        "{{ cycler.__init__.__globals__.os.environ }}",
        "{% include '/etc/passwd' %}",
        "{{ messages | nothing }}",
    ],
)
def test_a_template_gets_at_nothing_but_the_conversation(source):
    with pytest.raises(UsageError) as refused:
        print(Template(source, "test", {}).render([{"role": "user", "content": "a"}]))
    assert "\n" not in str(refused.value)


def test_the_command_finds_a_template_and_refuses_a_wrong_one(run, model, tmp_path):
    (tmp_path / "bad.jinja").write_text("{{")
    assert (
        "is not a template" in run("serve", "--model", model, "--chat-template", tmp_path / "bad.jinja", *WORDS).error
    )


def test_tokens_and_texts_are_the_engines(chats):
    text = "héllo"
    got = chats.ask("/tokenize", {"prompt": text}).json
    assert got == {"count": 6, "max_model_len": None, "tokens": chats.engine.encode(text)}
    assert chats.ask("/detokenize", {"tokens": got["tokens"]}).json == {"prompt": text}
    assert chats.ask("/tokenize", {"messages": TALK}).json["tokens"] == chats.engine.encode_more(TEXT)
    info = chats.ask("/tokenizer_info").json
    assert set(info) == {"bos_token", "eos_token", "vocab_size", "chat_template"}
    assert info["chat_template"] == TEMPLATE
    for path, body in (
        ("/tokenize", {}),
        ("/tokenize", {"prompt": ""}),
        ("/tokenize", {"prompt": "a", "messages": TALK}),
        ("/detokenize", {"tokens": [999]}),
        ("/detokenize", {"tokens": ["a"]}),
        ("/detokenize", {}),
    ):
        assert chats.ask(path, body).status == 400


def test_a_model_that_wants_a_begin_token_gets_one(model, tmp_path):
    for file in model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "force_bos_token_insert": True}))
    with serving_here(tmp_path, template=Template(TEMPLATE, "test", {})) as here:
        for body, plain in (({"messages": TALK}, TEXT), ({"prompt": "a"}, "a")):
            bare = here.engine.encode_more(plain)
            assert here.ask("/tokenize", body).json["tokens"] == [257, *bare]
        assert here.ask("/tokenize", {"prompt": "a", "add_special_tokens": False}).json["tokens"] == bare


def test_figures_are_counted_under_both_names(model):
    with serving_here(model, metrics=("xlstm", "vllm"), settings={"cache_memory_mb": 64}) as here:

        def figures() -> dict[str, float]:
            got = here.ask("/metrics")
            assert got.headers["content-type"].startswith("text/plain")
            found = {}
            for family in text_string_to_metric_families(got.body.decode()):
                for sample in family.samples:
                    assert sample.labels.pop("model_name") == "tiny"
                    found[" ".join([sample.name, *sample.labels.values()])] = sample.value
            return found

        assert figures()["xlstm:prompt_tokens_total"] == 0
        here.complete("a" * 100, max_tokens=5)
        here.complete("a" * 100, max_tokens=5, n=2, stream=True)
        connection = here.send("/v1/completions", {"prompt": "b" * 9000})
        while figures()["xlstm:num_requests_running"] != 1:
            pass
        connection.close()
        while figures()["xlstm:num_requests_running"]:
            pass
        found = figures()
        for prefix in ("xlstm", "vllm"):
            expected = {
                "prompt_tokens_total": 9200,
                "prompt_tokens_cached_total": 100,
                "generation_tokens_total": 15,
                "prefix_cache_queries_total": 9200,
                "prefix_cache_hits_total": 100,
                "prefix_cache_miss_total none seen": 2,
                "request_success_total length": 3,
                "cancelled_total prefill": 1,
                "time_to_first_token_seconds_count": 3,
                "inter_token_latency_seconds_count": 12,
                "e2e_request_latency_seconds_count": 3,
                "request_decode_time_seconds_count": 3,
                "num_requests_waiting": 0,
                "slots_total": 4,
            }
            assert {name: found[f"{prefix}:{name}"] for name in expected} == expected
        assert found["xlstm:snapshot_bytes memory"] > 0
        assert found["xlstm:time_to_first_token_seconds_sum"] > 0
