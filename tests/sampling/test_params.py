"""Sampling: each field is checked; fields that are not given come from the state's last answer or the model."""

import json

import pytest
from pydantic import BaseModel, ConfigDict

from xlstm_ray.errors import UsageError
from xlstm_ray.sampling import Sampling

WRONG = {
    "temperature": (-1, 101, float("nan"), "1", True),
    "top_k": (-1, 1 << 31, 1.5),
    "top_p": (0, 1.1, float("nan")),
    "min_p": (-0.1, 1.1),
    "repetition_penalty": (0, -1, float("inf")),
    "presence_penalty": (-2.1, 2.1),
    "frequency_penalty": (-2.1, 2.1, "a"),
    "logit_bias": ({"a": 1}, {1: 101}, {-1: 1}, {1: "x"}, {7: 1, "7": 1}, [[1]], 3),
    "seed": (-1, 1 << 63, 0.5),
    "ignore_eos": (1, "yes"),
    "min_tokens": (-1, 65),
    "stop": ("", ["a", ""], 3, [3]),
    "max_new_tokens": (0, 1.0),
    "n": (0, 129),
    "logprobs": (-1, 21),
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_what_is_out_of_range_is_one_line_that_names_the_field(name, value):
    with pytest.raises(UsageError, match=f"^`{name}` is .*; allowed: ") as refused:
        Sampling(**{name: value})
    assert "\n" not in str(refused.value)
    with pytest.raises(UsageError, match=f"`{name}` is"):
        Sampling.make({name: value})


def test_a_field_that_there_is_not_is_named():
    with pytest.raises(UsageError, match="'tempreature' is not a field of sampling; there are: .*temperature"):
        Sampling.make({"tempreature": 1.0})


@pytest.mark.parametrize("name", ["top_k", "top_p", "min_p", "seed"])
def test_what_has_no_effect_on_a_greedy_choice_is_refused(name):
    with pytest.raises(UsageError, match=f"`{name}`.* no effect at `temperature=0`"):
        Sampling.make({"temperature": 0, name: 1})
    assert Sampling.make({name: 1}).temperature == 1.0


def test_what_is_not_given_is_as_before_but_where_an_answer_ends():
    before = Sampling(temperature=0.5, top_k=3, seed=4, presence_penalty=1.0, stop=("x",), max_new_tokens=3, n=2)
    assert Sampling.make({}, before=before) == Sampling(temperature=0.5, top_k=3, seed=4, presence_penalty=1.0)
    assert Sampling.make({"top_k": 9, "stop": "y"}, before=before) == Sampling(
        temperature=0.5, top_k=9, seed=4, presence_penalty=1.0, stop=("y",)
    )
    assert Sampling.make({"temperature": 0.0}, before=before) == Sampling(presence_penalty=1.0)
    assert before.lasting() == Sampling.make({}, before=before)
    penalised = Sampling(repetition_penalty=1.5)
    assert Sampling.make({"seed": 4}, before=penalised) == Sampling(temperature=1.0, seed=4, repetition_penalty=1.5)


def test_through_json_it_is_the_same():
    class File(BaseModel):
        model_config = ConfigDict(strict=True)
        sampling: Sampling

    given = Sampling(temperature=0.5, logit_bias={"7": -3, 2: 1.5}, stop=["a", "b"], logprobs=2)
    assert given.logit_bias == ((2, 1.5), (7, -3.0))
    assert File.model_validate_json(File(sampling=given).model_dump_json()).sampling == given
    assert hash(given) == hash(Sampling(**json.loads(given.model_dump_json())))
    # As states of this format had it when there were four fields.
    old = '{"sampling": {"temperature": 0.5, "top_p": 1.0, "seed": 3, "top_k": 0}}'
    assert File.model_validate_json(old).sampling == Sampling(temperature=0.5, seed=3)


def test_n_answers_have_a_seed_each():
    assert [s.seed for s in Sampling(temperature=1.0, seed=5, n=3).one_by_one()] == [5, 6, 7]
    assert Sampling(temperature=1.0, seed=5, n=3).one_by_one()[0] == Sampling(temperature=1.0, seed=5)
    assert Sampling(seed=(1 << 63) - 1, n=2).one_by_one()[1].seed == 0


def test_a_bias_must_be_of_a_token_that_there_is():
    Sampling(logit_bias={9: 1}).require_vocabulary(10)
    with pytest.raises(UsageError, match="`logit_bias` has token 10, .*vocabulary of 10"):
        Sampling(logit_bias={10: 1}).require_vocabulary(10)
