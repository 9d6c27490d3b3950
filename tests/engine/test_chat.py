"""A conversation: turns, forks and files, with nothing computed twice."""

import pytest
from engines import OPTIONS, lm, model

import xlstm_ray
from xlstm_ray.errors import UsageError

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
