"""Rows are sampled as transformers and OpenAI define it, and each row as if it were alone."""

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from xlstm_ray.errors import UsageError
from xlstm_ray.sampling import Sampling, sampler
from xlstm_ray.sampling.sampler import Sampler, drawn, key_of, needs_of, part_of, random_bits

V = 61


def logits_of(n: int, vocabulary: int = V, *, seed: int = 0, ties: bool = False) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return (
        torch.randint(-3, 3, (n, vocabulary), generator=g).float()
        if ties
        else torch.randn(n, vocabulary, generator=g) * 3
    )


def one(sampling: Sampling, *, vocabulary: int = V, position: int = 0, **row: Any) -> Sampler:
    """A sampler with one row, in slot 0."""
    made = Sampler(1, vocabulary, ends=row.pop("ends", ()))
    made.put(0, sampling, position=position, **row)
    return made


def choose(made: Sampler, logits: Tensor, slots: list[int] | None = None) -> list[int]:
    return made.choose(logits, torch.tensor(slots or [0] * len(logits))).tolist()


# -- what is chosen from -----------------------------------------------------------------------------------------------
PROMPT, MADE, ENDS = [3, 4, 4, 9], [4, 7, 7, 7], [5, 6]
PROCESSORS = {
    "repetition": ({"repetition_penalty": 1.7}, lambda: RepetitionPenaltyLogitsProcessor(1.7)),
    "repetition that rewards": ({"repetition_penalty": 0.6}, lambda: RepetitionPenaltyLogitsProcessor(0.6)),
    "bias": ({"logit_bias": {2: 5, 7: -4.5}}, lambda: SequenceBiasLogitsProcessor([[[2], 5.0], [[7], -4.5]])),
    "least": ({"min_tokens": 5}, lambda: MinNewTokensLengthLogitsProcessor(len(PROMPT), 5, ENDS, "cpu")),
    "least reached": ({"min_tokens": 4}, lambda: MinNewTokensLengthLogitsProcessor(len(PROMPT), 4, ENDS, "cpu")),
}


@pytest.mark.parametrize("names", [[name] for name in PROCESSORS] + [["bias", "repetition", "least"]], ids=str)
def test_scores_are_those_of_transformers(names):
    logits = logits_of(1)
    options: dict[str, Any] = {}
    theirs = LogitsProcessorList()
    for name in names:  # in the order in which transformers has them
        options |= PROCESSORS[name][0]
        theirs.append(PROCESSORS[name][1]())
    expected = theirs(torch.tensor([PROMPT + MADE]), logits.clone())
    row = one(Sampling(**options), prompt=PROMPT, made=MADE, ends=ENDS)
    assert torch.equal(row.scores(logits, torch.tensor([0])), expected)


def test_presence_and_frequency_are_openais_formula_over_the_answer():
    logits, counts = logits_of(1), Counter(MADE)
    row = one(Sampling(presence_penalty=0.7, frequency_penalty=-0.3), prompt=PROMPT, made=MADE)
    found = row.scores(logits, torch.tensor([0]))[0]
    for token in range(V):
        c = counts[token]
        assert found[token].item() == pytest.approx(logits[0, token].item() - c * -0.3 - (c > 0) * 0.7, abs=1e-6)


@pytest.mark.parametrize("penalty", [5e-324, 1e-308, 1e-38, 1e-20])
@pytest.mark.parametrize("drawn_by", [{}, {"temperature": 1.0}, {"temperature": 5e-324, "top_p": 5e-324, "min_p": 1.0}])
def test_a_penalty_near_0_makes_the_likeliest_seen_token_certain(penalty, drawn_by):
    logits = logits_of(1)
    logits[0, 9] = 4.0  # of the tokens that were seen, the only one so likely
    row = one(Sampling(repetition_penalty=penalty, presence_penalty=2.0, **drawn_by), prompt=PROMPT, made=[3])
    assert choose(row, logits) == [9]


def test_tokens_that_are_chosen_are_counted():
    sampling = Sampling(repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.4, min_tokens=3)
    logits = logits_of(1)
    row, made = one(sampling, prompt=PROMPT, ends=ENDS), []
    for _ in range(12):
        now = one(sampling, prompt=PROMPT, made=made, ends=ENDS)
        assert torch.equal(row.scores(logits, torch.tensor([0])), now.scores(logits, torch.tensor([0])))
        made += choose(row, logits)
    assert len(set(made)) > 2  # the penalties change which token is likeliest


def test_end_tokens_may_come_where_they_end_nothing():
    logits = torch.zeros(1, V)
    logits[0, 5] = 9.0
    assert choose(one(Sampling(min_tokens=2), ends=ENDS), logits) != [5]
    assert choose(one(Sampling(min_tokens=2, ignore_eos=True), ends=ENDS), logits) == [5]


def kept_of(options: dict[str, Any], logits: Tensor) -> set[int]:
    """The tokens that can be drawn: try a random number inside each token's share of the mass."""
    found: set[int] = set()

    def all_of(weights: Tensor, bits: object) -> Tensor:
        found.update(weights[0].nonzero().flatten().tolist())
        return drawn(weights, bits)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampler, "drawn", all_of)
        choose(one(Sampling(**options), vocabulary=logits.shape[-1]), logits)
    return found


WARPERS = {
    "temperature": lambda v: TemperatureLogitsWarper(v),
    "top_k": lambda v: TopKLogitsWarper(v),
    "top_p": lambda v: TopPLogitsWarper(v),
    "min_p": lambda v: MinPLogitsWarper(v),
}


@given(
    st.integers(0, 10_000),
    st.fixed_dictionaries(
        {"temperature": st.floats(0.75, 3.0)},  # colder, the last ones are less than 2^-40 of the best: never drawn
        optional={"top_k": st.integers(1, V + 4), "top_p": st.floats(0.05, 0.99), "min_p": st.floats(0.001, 0.9)},
    ),
)
@settings(max_examples=150)
def test_the_tokens_that_may_be_drawn_are_those_of_transformers(seed, options):
    logits = logits_of(1, seed=seed)
    theirs = LogitsProcessorList([make(options[name]) for name, make in WARPERS.items() if name in options])
    expected = theirs(torch.tensor([PROMPT]), logits.clone())[0].isfinite()
    wide = theirs(torch.tensor([PROMPT]), logits.double())[0].isfinite()
    if torch.equal(expected, wide):  # otherwise a token is at a limit within float32's rounding
        assert kept_of(options, logits) == set(expected.nonzero().flatten().tolist())


def test_of_equals_the_lowest_ids_stay():
    logits = logits_of(1, ties=True)
    best = [i for i in range(V) if logits[0, i] == logits.max()]
    assert len(best) > 3
    assert choose(one(Sampling()), logits) == best[:1]
    assert kept_of({"temperature": 1.0, "top_k": 3}, logits) == set(best[:3])
    assert kept_of({"temperature": 1.0, "top_p": 1e-9}, logits) == set(best[:1])
    assert kept_of({"temperature": 1e-30, "min_p": 0.5}, logits) == set(best)


# -- what is drawn -----------------------------------------------------------------------------------------------------
def test_draws_follow_the_probabilities():
    """A chi-square test against the softmax in float64, of 200,000 positions."""
    logits, n = logits_of(1, 12), 200_000
    made = Sampler(n, 12)
    made._numbers[:, 0] = 0.7  # a row a position; putting them one by one takes a minute
    made._wholes[:, 1] = torch.arange(n + 1)
    made.needs = needs_of(Sampling(temperature=0.7), 12)
    tokens = made.choose(logits.expand(n, -1), torch.arange(n))
    expected = torch.softmax(logits[0].double() / 0.7, -1) * n
    found = torch.bincount(tokens, minlength=12)
    chi = ((found - expected) ** 2 / expected)[expected > 5].sum().item()
    assert chi < 35  # 11 degrees of freedom: beyond it once in 4,000 seeds


@given(st.integers(0, (1 << 63) - 1), st.integers(0, 1 << 40))
@settings(max_examples=100)
def test_random_bits_are_those_of_splitmix64(seed, position):
    def mixed(x: int) -> int:
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % (1 << 64)
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % (1 << 64)
        return x ^ (x >> 31)

    key = mixed((seed + 0x9E3779B97F4A7C15) % (1 << 64))
    x = mixed((key + (position + 1) * 0x9E3779B97F4A7C15) % (1 << 64))
    assert key_of(seed) % (1 << 64) == key
    high, low = random_bits(torch.tensor([key_of(seed)]), torch.tensor([position]))
    assert (high.item(), low.item()) == (x >> 33, x % (1 << 31))


def test_splitmix64_is_the_published_one():
    """The first numbers of seed 1234567, as its reference program in C prints them."""
    high, _ = random_bits(torch.tensor([1234567] * 3), torch.arange(3))
    assert high.tolist() == [n >> 33 for n in (6457827717110365317, 3203168211198807973, 9817491932198370423)]


@given(st.integers(0, (1 << 62) - 1), st.integers(0, (1 << 31) - 1), st.integers(0, (1 << 31) - 1))
@settings(max_examples=200)
def test_a_part_of_a_whole_is_exact(whole, high, low):
    found = part_of(*(torch.tensor([n]) for n in (whole, high, low)))
    assert found.item() == whole * (high * (1 << 31) + low) >> 62
    assert part_of(torch.tensor([whole]), torch.tensor([1 << 31]), 0).item() == whole


# -- a row among others ------------------------------------------------------------------------------------------------
SAMPLING = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.5]),
    top_k=st.sampled_from([0, 0, 1, 5, 40]),
    top_p=st.sampled_from([1.0, 0.2, 0.9]),
    min_p=st.sampled_from([0.0, 0.05]),
    seed=st.integers(0, (1 << 63) - 1),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    presence_penalty=st.sampled_from([0.0, 0.5]),
    frequency_penalty=st.sampled_from([0.0, -0.5]),
    logit_bias=st.sampled_from([(), ((3, 2.0),)]),
    min_tokens=st.sampled_from([0, 3]),
)


@given(
    st.lists(st.tuples(SAMPLING, st.integers(0, 1 << 40)), min_size=1, max_size=17),
    st.sampled_from([61, 1000, 2047]),
    st.integers(0, 1000),
    st.data(),
)
@settings(max_examples=60)
def test_a_rows_tokens_are_those_that_it_has_alone(rows, vocabulary, seed, data):
    together = Sampler(len(rows), vocabulary, ends=ENDS)
    alone = []
    for slot, (sampling, position) in enumerate(rows):
        row = {"position": position, "prompt": PROMPT, "made": MADE[: slot % 3]}
        together.put(slot, sampling, **row)
        alone.append(one(sampling, vocabulary=vocabulary, ends=ENDS, **row))
    for step in range(4):
        going = data.draw(st.lists(st.sampled_from(range(len(rows))), min_size=1, unique=True))
        logits = logits_of(len(rows), vocabulary, seed=seed + step)
        places = [*going, *[together.idle] * data.draw(st.integers(0, 2))]  # empty places of a call
        given_logits = logits[[slot if slot < len(rows) else 0 for slot in places]]
        tokens = choose(together, given_logits, places)
        for slot, token in zip(going, tokens, strict=False):
            assert [token] == choose(alone[slot], logits[slot : slot + 1])


def test_a_row_that_joins_late_or_again_goes_on_as_it_was():
    sampling = Sampling(temperature=1.0, seed=8, frequency_penalty=0.5, repetition_penalty=1.2)
    steps = [logits_of(1, seed=n) for n in range(8)]
    row = one(sampling, prompt=PROMPT, position=4)
    whole = [choose(row, logits)[0] for logits in steps]
    other = Sampler(4, V)
    other.put(2, Sampling(presence_penalty=1.0), position=77, prompt=[1, 2], made=[3])
    choose(other, steps[0], [2])
    other.put(2, sampling, position=4 + 3, prompt=PROMPT, made=whole[:3])
    assert [choose(other, logits, [2])[0] for logits in steps[3:]] == whole[3:]
    other.clear(2)
    assert not any(other.needs)


def test_a_seed_has_its_own_stream():
    logits = torch.zeros(1, 1000)
    streams = []
    for seed in range(4):
        row = one(Sampling(temperature=1.0, seed=seed), vocabulary=1000)
        streams.append([choose(row, logits)[0] for _ in range(50)])
    shared = [
        a == b for i, one_ in enumerate(streams) for other in streams[:i] for a, b in zip(one_, other, strict=True)
    ]
    assert sum(shared) < 5
    # It is not the neighbour's stream of random numbers, one step later.
    assert streams[0][1:] != streams[1][:-1]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_no_step_waits_for_the_device_or_has_a_shape_that_hangs_on_it(device):
    """Fake tensors have no values, so code that reads one raises."""
    everything = Sampling(
        temperature=1.0, top_k=5, top_p=0.9, min_p=0.1, repetition_penalty=1.2, presence_penalty=1, min_tokens=2,
        logit_bias={3: 1},
    )  # fmt: skip
    with FakeTensorMode(allow_non_fake_inputs=True):
        rows = Sampler(4, V, ends=ENDS, device=device)
        rows.needs = needs_of(everything, V)
        rows._made = torch.zeros(5, V, dtype=torch.int32, device=device)
        rows._seen = torch.zeros(5, V, dtype=torch.bool, device=device)
        rows._bias = torch.zeros(5, V, device=device)
        tokens = rows.choose(torch.zeros(3, V, device=device), torch.zeros(3, dtype=torch.long, device=device))
        assert (tokens.shape, tokens.dtype, tokens.device.type) == ((3,), torch.int64, device)
        with pytest.raises(DataDependentOutputException):
            tokens[0].item()


def test_a_bias_of_a_token_that_is_not_there_is_refused():
    with pytest.raises(UsageError, match="`logit_bias` has token 61"):
        one(Sampling(logit_bias={V: 1}))


def test_an_end_token_outside_the_vocabulary_ends_nothing():
    sampler = Sampler(1, 8, ends=(300, 2))
    sampler.put(0, Sampling(min_tokens=2), position=0)
    logits = torch.zeros(1, 8)
    logits[0, 2] = 1
    chosen = [int(sampler.choose(logits, torch.tensor([0]))) for _ in range(3)]
    assert chosen == [0, 0, 2]  # 2 is forbidden for two tokens
