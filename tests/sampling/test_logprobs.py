"""Log-probabilities equal float64, do not depend on other rows, and never need all logits in memory."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xlstm_ray.sampling.logprobs import PIECE, logprobs, score


def test_they_are_float64s_and_the_likeliest_are_in_order():
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5, 700, generator=g) * 4
    tokens = torch.randint(700, (3, 5), generator=g)
    found = logprobs(logits, tokens, 6)
    exact = torch.log_softmax(logits.double(), -1)
    assert torch.allclose(found.chosen.double(), exact.gather(-1, tokens.unsqueeze(-1)).squeeze(-1), atol=1e-5)
    values, ids = exact.sort(dim=-1, descending=True, stable=True)
    assert torch.equal(found.ids, ids[..., :6])
    assert torch.allclose(found.top.double(), values[..., :6], atol=1e-5)
    # A token that is among the likeliest has the very same number there: lm-eval compares them.
    best = logprobs(logits, logits.argmax(-1), 1)
    assert torch.equal(best.chosen, best.top[..., 0])


def test_equals_have_one_order_and_none_is_nan():
    logits = torch.tensor([[0.0, 2.0, -0.0, 2.0, 0.0, -1.0, -torch.inf, -1.0]])
    found = logprobs(logits, torch.tensor([-1]), 20)
    assert found.ids.tolist() == [[1, 3, 0, 2, 4, 5, 7, 6]]
    assert found.chosen.isnan().all()
    assert logprobs(logits, torch.tensor([6]), 0).chosen.tolist() == [-torch.inf]
    assert logprobs(logits, torch.tensor([6]), 0).ids.shape == (1, 0)


@given(st.integers(1, 40), st.sampled_from([61, 1000, 5003]), st.integers(0, 100))
@settings(max_examples=30)
def test_a_rows_numbers_are_those_that_it_has_alone(rows, vocabulary, seed):
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, vocabulary, generator=g) * 4
    tokens = torch.randint(vocabulary, (rows,), generator=g)
    together = logprobs(logits, tokens, 4)
    for b in range(rows):
        alone = logprobs(logits[b : b + 1], tokens[b : b + 1], 4)
        assert all(torch.equal(whole[b : b + 1], part) for whole, part in zip(together, alone, strict=True))


@pytest.mark.parametrize("shape", [(), (1,), (2, 33), (0,)])
def test_pieces_are_put_together(shape):
    g = torch.Generator().manual_seed(1)
    vocabulary = PIECE // 16  # 16 rows a piece
    hidden, weights = torch.randn(*shape, 4, generator=g), torch.randn(vocabulary, 4, generator=g)
    tokens = torch.randint(vocabulary, shape, generator=g)
    asked = []

    def head(x):
        asked.append(len(x))
        return x @ weights.T

    found = score(hidden, tokens, 3, head=head, vocabulary=vocabulary)
    assert max(asked, default=0) <= 16
    exact = torch.log_softmax(hidden.double() @ weights.double().T, -1)
    assert (found.chosen.shape, found.ids.shape) == (shape, (*shape, 3))
    assert torch.allclose(found.chosen.double(), exact.gather(-1, tokens.unsqueeze(-1)).squeeze(-1), atol=1e-4)
    assert torch.allclose(found.top.double(), exact.topk(3).values, atol=1e-4)


PEAK = """
import resource, sys, torch
from xlstm_ray.sampling.logprobs import score
torch.set_num_threads(1)
D, V, T = 16, 50_304, 8_192
head = torch.randn(V, D)
hidden, tokens = torch.randn(1, T, D), torch.randint(V, (1, T))
score(hidden[:, :64], tokens[:, :64], 5, head=lambda x: x @ head.T, vocabulary=V)  # what the first call loads
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
found = score(hidden, tokens, 5, head=lambda x: x @ head.T, vocabulary=V)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print((peak - before) << (0 if sys.platform == "darwin" else 10), bool(found.chosen.isfinite().all()))
"""


def test_scoring_8k_tokens_of_a_50k_vocabulary_holds_a_piece():
    """All logits are 1.6 GB."""
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True)
    grown, finite = done.stdout.split()
    assert finite == "True"
    assert int(grown) < 300 << 20
