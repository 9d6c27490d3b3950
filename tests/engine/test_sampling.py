"""How an engine's answers are chosen and end: compared with transformers, and in a batch with a row alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_model
from transformers import xLSTMForCausalLM

from xlstm_ray import Engine, load
from xlstm_ray.errors import UsageError
from xlstm_ray.state import RecurrentState

NUMERICS = {"chunkwise_backend": "native", "tile_size": 8, "chunk_size": 8, "dtype": "float32", "device": "cpu"}
PROMPT = "The capital of France is"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, xLSTMForCausalLM]:
    directory = tmp_path_factory.mktemp("model")
    return directory, make_model(directory, seed=9, num_hidden_layers=1, eos_token_id=None)


@pytest.fixture(scope="module")
def lm(model: tuple[Path, xLSTMForCausalLM]):
    with load(model[0], **NUMERICS) as engine:
        yield engine


def answer(lm: Engine, prompt: Any = PROMPT, n: int = 12, **sampling: Any) -> Any:
    made = lm.generate(prompt, max_new_tokens=n, sampling=sampling)
    list(made.rows())
    return made


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"repetition_penalty": 1.8}, {"repetition_penalty": 1.8}),
        ({"logit_bias": {70: 9.0, 71: -9.0}}, {"sequence_bias": [[[70], 9.0], [[71], -9.0]]}),
        (
            {"repetition_penalty": 1.3, "logit_bias": {70: 4.0}},
            {"repetition_penalty": 1.3, "sequence_bias": [[[70], 4.0]]},
        ),
    ],
    ids=str,
)
def test_greedy_answers_are_those_of_transformers(model, lm, ours, theirs):
    ids = lm.encode(PROMPT)
    with torch.no_grad():
        out = model[1].generate(
            torch.tensor([ids]), max_new_tokens=12, do_sample=False, pad_token_id=256, use_cache=False, **theirs
        )
    made = answer(lm, **ours)
    assert made.tokens == [out[0, len(ids) :].tolist()]
    assert made.tokens != answer(lm).tokens


def test_end_tokens_wait_for_min_tokens_or_are_ignored(lm, monkeypatch):
    said = answer(lm).tokens[0]
    monkeypatch.setattr(lm, "end_tokens", (said[2], said[5]))
    assert answer(lm).tokens == [said[: min(said.index(said[2]), said.index(said[5]))]]
    assert answer(lm, ignore_eos=True).tokens == [said]
    made = answer(lm, min_tokens=9)
    assert not {said[2], said[5]} & set(made.tokens[0][:9])
    assert len(made.tokens[0]) >= 9


def test_a_stop_text_ends_an_answer_and_is_not_shown_and_its_state_goes_on(lm, tmp_path):
    whole = answer(lm)
    text = whole.texts[0]
    start = next(n for n in range(3, 9) if text.find(text[n : n + 3]) == n and text[n : n + 3].isprintable())
    stop = text[start : start + 3]
    made = answer(lm, stop=["never", stop])
    assert made.texts == [text[:start]]
    assert made.finish_reasons == ["stop"]
    assert (made.stop_tokens, made.stop_texts) == ([None], [stop])
    assert made.tokens[0] == whole.tokens[0][: len(made.tokens[0])]
    made.state().save(tmp_path / "state")
    state = RecurrentState.load(tmp_path / "state")
    rest = lm.generate(state=state, max_new_tokens=12 - len(made.tokens[0]))
    assert made.texts[0] + stop + "".join(rest) == text
    # The state's text is exactly that of its tokens.
    before = lm.prefill(PROMPT).state.rows[0].text
    assert before is not None
    assert state.rows[0].text == before.extend((text[:start] + stop).encode())


ROWS = [
    {},
    {"temperature": 0.9, "seed": 4},
    {"temperature": 1.2, "seed": 4, "top_k": 20, "top_p": 0.8, "presence_penalty": 0.5},
    {"max_new_tokens": 3},
    {"repetition_penalty": 1.5, "frequency_penalty": 0.3, "min_tokens": 2},
    {"logprobs": 2, "logit_bias": {65: 3.0}},
]


def test_rows_with_their_own_sampling_answer_as_alone(lm):
    prompts = [PROMPT + "!" * n for n in range(len(ROWS))]
    together = lm.generate(prompts, max_new_tokens=8, own_sampling=ROWS)
    list(together.rows())
    for b, (prompt, fields) in enumerate(zip(prompts, ROWS, strict=True)):
        alone = lm.generate(prompt, sampling={"max_new_tokens": 8, **fields})
        list(alone)
        assert together.tokens[b] == alone.tokens[0]
        assert together.finishes[b] == alone.finishes[0]
    assert [len(tokens) for tokens in together.tokens] == [8, 8, 8, 3, 8, 8]


def test_several_answers_read_their_prompt_once_and_are_those_of_as_many_calls(lm):
    fields = {"max_new_tokens": 6, "temperature": 1.5, "seed": 3}
    prompts = PROMPT, PROMPT + "!"
    together = lm.generate(prompts, sampling=fields, own_sampling=[{"n": 3, "logprobs": 1}, {"n": 2, "seed": 30}])
    pieces = list(together.rows())
    assert together.prefill.stats.row_tokens == [len(prompt) for prompt in prompts]
    assert together.prompts == [0, 0, 0, 1, 1]
    seeds = 3, 4, 5, 30, 31
    for b, seed in enumerate(seeds):
        alone = lm.generate(prompts[together.prompts[b]], sampling={**fields, "seed": seed})
        assert "".join(alone) == together.texts[b] == "".join(row[b] for row in pieces)
        assert together.tokens[b] == alone.tokens[0]
        assert (together.logprobs(b) is None) == (together.prompts[b] == 1)
    assert len(set(together.texts)) == 5
    state = together.state()
    assert state.tokens == [len(prompts[b]) + 6 for b in together.prompts]
    assert [state.rows[b].text for b in (0, 4)] == [
        lm.prefill(prompts[together.prompts[b]] + together.texts[b]).state.rows[0].text for b in (0, 4)
    ]


def test_log_probabilities_are_those_of_the_whole_text_in_float64(lm):
    made = answer(lm, logprobs=3, temperature=1.0, seed=2)
    ids = lm.encode(PROMPT)
    (logits,) = lm.prefill([*ids, *made.tokens[0]], all_logits=True).all_logits
    exact = torch.log_softmax(logits[len(ids) - 1 : -1].double(), -1)
    rows = made.logprobs(0)
    assert [token.id for token, _ in rows] == made.tokens[0]
    for (token, likeliest), row in zip(rows, exact, strict=True):
        assert token.logprob == pytest.approx(row[token.id].item(), abs=1e-4)
        assert [one.logprob for one in likeliest] == pytest.approx(row.topk(3).values.tolist(), abs=1e-4)
        assert [one for one in likeliest if one.id == token.id] in ([], [token])
    assert answer(lm).logprobs(0) is None
    assert [likeliest for _, likeliest in answer(lm, logprobs=0).logprobs(0)] == [[]] * 12


def test_a_state_does_not_know_the_tokens_of_its_prompt_and_it_is_told(lm):
    told: list[str] = []
    note, lm.on_note = lm.on_note, told.append
    try:
        state = lm.prefill(PROMPT).state
        list(lm.generate(state=state, append="?", max_new_tokens=2, sampling={"repetition_penalty": 1.5}))
        assert len(told) == 1
        assert "`repetition_penalty`" in told[0]
        list(lm.generate(PROMPT + "?", state=state, max_new_tokens=2, sampling={"repetition_penalty": 1.5}))
        assert len(told) == 1  # the whole prompt was given
    finally:
        lm.on_note = note


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"sampling": {"logit_bias": {259: 1.0}}}, "`logit_bias` has token 259, .*vocabulary of 259"),
        ({"sampling": {"n": 129}}, "`n` is 129; allowed: 1 to 128"),
        ({"own_sampling": [{}, {}]}, "`own_sampling` is of 2 rows, and there are 1"),
        ({"own_sampling": [{"top_p": 2.0}]}, "`top_p` is 2.0"),
        ({"sampling": {"topp": 2.0}}, "'topp' is not a field"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_the_prefill(lm, options, said):
    with pytest.raises(UsageError, match=said):
        lm.generate(PROMPT, **options, on_progress=lambda p: pytest.fail("it was computed"))
