"""A conversation: turns, forks and files, with nothing computed twice."""

from functools import partial

import pytest
import torch
from engines import OPTIONS, lm, model

import xlstm_ray
from xlstm_ray.errors import StateError, UsageError
from xlstm_ray.state import EMPTY_PROMPT, RecurrentState, extend_prompt_hash
from xlstm_ray.text.template import PLAIN, Template

__all__ = ["lm", "model"]

TURNS = ["How do you do? ", "And what is this? ", "Well, then. "]
LIMIT = {"max_new_tokens": 6}


def by_hand(lm: xlstm_ray.Engine, turns: list[str]) -> tuple[list[str], str]:
    """The same turns, by generate without chat."""
    state, answers = None, []
    for turn in turns:
        given = {"prompt": turn} if state is None else {"append": turn, "state": state}
        generation = lm.generate(**given, sampling=LIMIT, last=False)
        answers.append("".join(generation))
        state = generation.state()
    assert state is not None
    return answers, state.digest()


def test_turns_are_those_of_generate_and_each_reads_only_what_is_new(lm, monkeypatch):
    answers, digest = by_hand(lm, TURNS)
    seen: list[int] = []
    submit = lm.executor.submit

    def counted(state, step):
        seen.append(int((step.end - step.start).sum()))
        return submit(state, step)

    monkeypatch.setattr(lm.executor, "submit", counted)
    chat = lm.chat(sampling=LIMIT)
    assert ["".join(chat.say(turn)) for turn in TURNS] == answers
    assert chat.state.digest() == digest
    assert sum(seen) == sum(len(turn) + 6 for turn in TURNS)  # a byte is a token; no token is seen twice


def test_a_fork_and_what_it_came_from_are_each_as_alone(lm):
    chat = lm.chat(sampling=LIMIT)
    "".join(chat.say(TURNS[0]))
    fork = chat.fork()
    assert "".join(fork.say(TURNS[1])) == by_hand(lm, TURNS[:2])[0][1]
    assert "".join(chat.say(TURNS[2])) == by_hand(lm, [TURNS[0], TURNS[2]])[0][1]
    assert fork.state.digest() == by_hand(lm, TURNS[:2])[1]


def test_a_saved_conversation_goes_on_in_another_engine(lm, model, tmp_path):
    answers, digest = by_hand(lm, TURNS)
    chat = lm.chat(sampling=LIMIT)
    for turn in TURNS[:2]:
        list(chat.say(turn))
    chat.save(tmp_path / "chat.state")
    with xlstm_ray.load(model, **OPTIONS) as other:
        again = other.chat(tmp_path / "chat.state", sampling=LIMIT)
        assert "".join(again.say(TURNS[2])) == answers[2]
        assert again.state.digest() == digest


def test_an_answer_that_is_cut_short_is_part_of_the_conversation_as_far_as_it_went(lm):
    chat = lm.chat(sampling={"max_new_tokens": 50})
    answer = chat.say(TURNS[0])
    for _ in range(4):
        next(answer)
    answer.close()
    assert chat.state.tokens == [len(TURNS[0]) + 4]


@pytest.mark.parametrize("read", [0, 1, 4])
def test_what_is_said_before_an_answer_was_read_follows_what_was_made_of_it(lm, read):
    chat = lm.chat(sampling={"max_new_tokens": 50})
    left = chat.say(TURNS[0])
    for _ in range(read):
        next(left)
    assert chat.fork().state.tokens == [len(TURNS[0]) + read]
    answer = "".join(chat.say(TURNS[1], max_new_tokens=6))
    now = chat.state.digest()
    left.close()
    del left
    assert chat.state.digest() == now

    other = lm.chat()
    list(other.say(TURNS[0], max_new_tokens=read)) if read else other.say(TURNS[0])
    assert "".join(other.say(TURNS[1], max_new_tokens=6)) == answer
    assert other.state.digest() == now


def test_nothing_said_is_no_state(lm):
    with pytest.raises(UsageError, match="nothing has been said"):
        _ = lm.chat().state


# -- messages by a template --------------------------------------------------------------------------------------------
MARKS = Template(
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}",
    "test",
    {},
)
TRIMS = Template(MARKS.source.replace("m.content", "m.content | trim"), "test", {})


def render(template: Template, messages: list[tuple[str, str]], *, answer: bool = True) -> str:
    return template.render([{"role": role, "content": content} for role, content in messages], answer=answer)


@pytest.mark.parametrize("template", [MARKS, TRIMS, PLAIN])
def test_a_turn_is_a_run_over_the_whole_conversations_tokens(lm, template):
    """The last answer is trimmed by TRIMS: it was said with spaces, so its state cannot be of use."""
    (space,) = lm.encode(" ")
    sampling = {"max_new_tokens": 5, "logit_bias": {space: 100}}
    chat = lm.chat(template=template, sampling=sampling, system="Be brief.")
    messages, tokens, state, seen = [("system", "Be brief.")], [], None, ""
    for turn in ("Who are you?", "é And what is this?", "Well, then."):
        text = "".join(chat.say(turn))
        messages.append(("user", turn))
        whole = render(template, messages)
        if whole.startswith(seen) and state is not None:
            assert template is not TRIMS
            new = lm.encode_more(whole[len(seen) :], state.rows[0].end.tokens)
            generation = lm.generate(append=whole[len(seen) :], state=state, sampling=sampling, last=False)
        else:
            assert template is TRIMS or state is None
            tokens, new = [], lm.encode(whole)
            begun = chat.generation.prefill
            assert (state is None) == (begun.stats.resumed_tokens == 0)  # up to the answer nothing is read again
            generation = lm.generate(whole, sampling=sampling, last=False)
        assert ("".join(generation), generation.tokens) == (text, [[space] * 5])
        state, seen = generation.state(), whole + generation.said[0]
        tokens += [*new, *generation.tokens[0]]
        messages.append(("assistant", text))
        assert [(one.role, one.content) for one in chat.messages] == messages
        assert chat.state.tokens == [len(tokens)]
        assert chat.state.prompt_hash == [extend_prompt_hash(EMPTY_PROMPT, tokens)]
        if template is not TRIMS:
            assert chat.state.digest() == state.digest()
        at_once = lm.prefill(tokens).state
        assert chat.state.prompt_hash == at_once.prompt_hash
        for name, tensor in at_once.tensors.items():
            assert torch.allclose(chat.state.tensors[name], tensor, rtol=1e-3, atol=1e-4), name


@pytest.mark.parametrize("template", [MARKS, TRIMS, PLAIN])
@pytest.mark.parametrize("document", [False, True])
def test_a_saved_conversation_has_its_messages(lm, template, document, tmp_path):
    (space,) = lm.encode(" ")
    sampling = {"max_new_tokens": 5, "logit_bias": {space: 8}}
    book = lm.prefill("A long book. " * 5).state if document else None
    begin = partial(lm.chat, template=template, sampling=sampling)
    chat = begin(book, system="Be brief.")
    for turn in TURNS[:2]:
        list(chat.say(turn))
    chat.save(tmp_path / "chat.state")
    again = begin(tmp_path / "chat.state")
    assert again.messages == chat.messages
    said = "".join(chat.say(TURNS[2]))
    assert "".join(again.say(TURNS[2])) == said
    assert again.state.digest() == chat.state.digest()
    assert again.state.tokens[0] > (65 if document else 0)
    with pytest.raises(UsageError, match="`system` begins a conversation, and the state .* has begun already"):
        begin(tmp_path / "chat.state", system="Be long.")
    other = lm.chat(tmp_path / "chat.state", template=Template("{{ messages | length }}", "test", {}))
    if document:
        with pytest.raises(UsageError, match="does not go on from what was said"):
            list(other.say("a"))
    plain = "".join(lm.generate(state=RecurrentState.load(tmp_path / "chat.state"), max_new_tokens=3))
    assert len(plain) <= 3  # it is a state like any other


def test_a_turn_that_is_stopped_before_it_is_read_was_not_said(lm):
    chat = lm.chat(sampling=LIMIT, template=MARKS)
    assert "".join(chat.say("a" * 100, should_stop=lambda: True)) == ""
    assert chat.messages == []
    asked = iter([False] * 3 + [True] * 9)
    first = "".join(chat.say(TURNS[0], should_stop=lambda: next(asked)))
    assert chat.generation.finish_reasons == ["cancelled"]
    assert chat.messages[1].content == first
    assert chat.state.tokens == [len(render(MARKS, [("user", TURNS[0])])) + len(chat.generation.tokens[0])]
    before = chat.state.digest()
    assert "".join(chat.say("a" * 100, should_stop=lambda: True)) == ""
    assert chat.state.digest() == before
    assert len("".join(chat.say(TURNS[1]))) > 0


def test_what_is_not_a_conversation_is_refused(lm, model, tmp_path):
    both = lm.prefill(["a", "b"]).state
    with pytest.raises(UsageError, match="has 2 prompts; a conversation goes on from one"):
        lm.chat(both)
    asked = iter([False, True])
    part = lm.prefill("a" * 100, should_stop=lambda: next(asked)).state
    with pytest.raises(StateError, match="was stopped after 32 tokens"):
        lm.chat(part)
    with pytest.raises(UsageError, match="without a template"):
        lm.chat(system="Be brief.")
    with pytest.raises(UsageError, match="makes no text"):
        list(lm.chat(template=Template("", "test", {})).say("a"))
    with pytest.raises(UsageError, match="does not take these messages"):
        list(lm.chat(template=Template("{{ raise_exception('no') }}", "test", {})).say("a"))
