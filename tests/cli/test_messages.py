"""Messages of `generate`: --chat, --system, --chat-template, --messages."""

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import make_model

import xlstm_ray
from xlstm_ray import RecurrentState
from xlstm_ray.text.template import Template

OPTIONS: dict[str, Any] = {"device": "cpu", "chunkwise_backend": "native", "tile_size": 32, "chunk_size": 16}
MARKS = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}{{ '<bot>' if add_generation_prompt }}"
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Who?"},
    {"role": "assistant", "content": "Me."},
    {"role": "user", "content": "Why?"},
]


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory):
    directory = tmp_path_factory.mktemp("model")
    make_model(directory, hidden_size=64, num_hidden_layers=2, num_heads=2, eos_token_id=None)
    (directory / "chat_template.jinja").write_text(MARKS)
    with xlstm_ray.load(directory, **OPTIONS) as engine:
        yield engine


@pytest.fixture
def words(lm) -> tuple[object, ...]:
    options = "--device cpu --chunkwise-backend native --tile-size 32 --chunk-size 16 -n 6"
    return ("generate", "--model", lm.model_path, *options.split())


def answer(lm, messages: list[dict[str, str]], template: str = MARKS, **given: Any) -> str:
    text = Template(template, "test", {}).render(messages)
    given = {"append": text, **given} if given else {"prompt": lm.encode_more(text)}
    return "".join(lm.generate(**given, max_new_tokens=6, temperature=0))


def test_a_prompt_is_a_message(run, words, lm, tmp_path):
    who = [{"role": "user", "content": "Who?"}]
    assert run(*words, "--chat", "-p", "Who?", "--json").row["text"] == answer(lm, who)
    (tmp_path / "own.jinja").write_text("{{ messages[-1].content }}!")
    own = ("--chat-template", tmp_path / "own.jinja")
    assert run(*words, "--chat", "-p", "Who?", *own).out == answer(lm, who, "{{ messages[-1].content }}!") + "\n"
    row = run(*words, "--chat", "--system", "Be brief.", "-p", "Who?", "--json").row
    assert row["text"] == answer(lm, TALK[:2])
    assert row["prompt_tokens"] == len("<system>Be brief.</s><user>Who?</s><bot>")
    (tmp_path / "lines").write_text('"Who?"\n{"prompt": "Why?", "id": 7}\n')
    lines = run(*words, "--chat", "-f", tmp_path / "lines", "--jsonl", "--ordered").out.splitlines()
    assert [json.loads(line)["text"] for line in lines] == [answer(lm, who), answer(lm, TALK[3:])]


def test_a_file_of_messages_and_a_book_before_it(run, words, lm, tmp_path):
    for name, talk in (("list", TALK), ("object", {"messages": TALK})):
        (tmp_path / name).write_text(json.dumps(talk))
        assert run(*words, "--messages", tmp_path / name, "--json").row["text"] == answer(lm, TALK)
    book = tmp_path / "book.state"
    lm.prefill("A long book. ").state.save(book)
    after = answer(lm, TALK, state=RecurrentState.load(book))
    assert run(*words, "--messages", tmp_path / "list", "--state-in", book, "--json").row["text"] == after
    after = answer(lm, TALK[3:], state=RecurrentState.load(book))
    assert run(*words, "--chat", "--append", "Why?", "--state-in", book, "--json").row["text"] == after


def test_a_stopped_run_goes_on_with_the_same_messages(run, words, lm, tmp_path):
    (tmp_path / "list").write_text(json.dumps(TALK * 3))
    text, asked = Template(MARKS, "test", {}).render(TALK * 3), iter([False, True])
    lm.prefill(lm.encode_more(text), should_stop=lambda: next(asked)).state.save(tmp_path / "part.state")
    row = run(*words, "--messages", tmp_path / "list", "--state-in", tmp_path / "part.state", "--json").row
    assert (row["text"], row["resumed_tokens"]) == (answer(lm, TALK * 3), 32)


@pytest.mark.parametrize(
    ("data", "more", "error"),
    [
        (None, ["-p", "a", "--system", "b"], "--system is for messages; add --chat"),
        (None, ["-p", "a", "--chat-template", "b"], "--chat-template is for messages; add --chat"),
        (None, ["-p", "a", "--chat", "--chat-template", "no.jinja"], "no.jinja: the chat template cannot be read"),
        (TALK, ["-p", "a"], "--messages and a prompt were both given"),
        (TALK, ["--chat"], "--chat has no effect beside --messages"),
        ("{", [], "is not JSON"),
        ([], [], "is not a list of objects with"),
        ({"message": TALK}, [], "is not a list of objects with"),
        ([{"role": "user"}], [], "message 1: is not an object with 'role' and 'content' alone"),
        ([*TALK, {"role": "tool", "content": "a"}], [], "message 5: the role is 'tool'; allowed: system, developer,"),
        ([{"role": "user", "content": 1}], [], "message 1: the content is not a text"),
    ],
)
def test_a_mistake_is_one_line(run, words, tmp_path, data, more, error):
    path = tmp_path / "messages.json"
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    assert error in run(*words, *([] if data is None else ["--messages", path]), *more).error


def test_without_a_template_one_is_asked_for(run, words, lm, tmp_path):
    for file in Path(lm.model_path).iterdir():
        if file.name != "chat_template.jinja":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    error = run("generate", "--model", tmp_path, *words[3:], "--chat", "-p", "a").error
    assert "this model has no chat template; give --chat-template FILE, or a plain prompt" in error
