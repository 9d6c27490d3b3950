"""The likelihood of a text: against transformers in float64, in parts to the same sums, in flat memory."""

import math
import subprocess
import sys
from itertools import chain, repeat
from pathlib import Path
from tempfile import TemporaryFile

import pytest
import torch
from engines import OPTIONS
from tiny import make_model
from transformers import xLSTMForCausalLM

from xlstm_ray import RecurrentState, load
from xlstm_ray.errors import StateError, UsageError
from xlstm_ray.text.ondisk import TextFile

TEXT = "".join(chr(33 + i * i % 90) + " é" * (i % 9 == 0) for i in range(120))  # tiles of 32, chunks of 16, and a rest
BEGIN = 257


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, xLSTMForCausalLM]:
    directory = tmp_path_factory.mktemp("model")
    return directory, make_model(directory, hidden_size=128, num_hidden_layers=2, num_heads=2).double()


@pytest.fixture(scope="module")
def lm(oracle: tuple[Path, xLSTMForCausalLM]):
    with load(oracle[0], **OPTIONS, dtype="float32") as engine:
        yield engine


def likelihood(model: xLSTMForCausalLM, before: list[int], tokens: list[int]) -> float:
    """By transformers, in float64."""
    with torch.no_grad():
        logits = model(torch.tensor([[*before, *tokens]]), use_cache=False).logits[0]
    scores = torch.log_softmax(logits.double(), -1)[len(before) - 1 : -1]
    return scores[range(len(tokens)), tokens].sum().item()


def on_disk(text: str) -> TextFile:
    file = TemporaryFile()
    file.write(text.encode())
    file.flush()
    return TextFile(file)


@pytest.mark.parametrize("form", [str, on_disk])
def test_a_score_is_that_of_transformers_in_float64(lm, oracle, form):
    for text in (TEXT, "a", TEXT[:40]):
        found, tokens = lm.score(form(text)), lm.encode(text)
        exact = likelihood(oracle[1], [BEGIN], tokens)
        assert found.logprob == pytest.approx(exact, rel=1e-5)
        assert (found.tokens, found.bytes, found.words) == (len(tokens), len(text.encode()), len(text.split()))
        assert found.bits_per_byte == pytest.approx(-exact / math.log(2) / len(text.encode()), rel=1e-5)
        assert found.perplexity(found.words) == pytest.approx(math.exp(-exact / len(text.split())), rel=1e-3)
        added = 0.0  # in the order of the tokens
        scored = lm.prefill([BEGIN, *tokens], prompt_logprobs=0).prompt_logprobs[0]
        for made in list(scored)[1:]:
            added += made.logprob
        assert found.logprob == added


def test_a_text_after_a_state_is_scored_from_its_first_token(lm, oracle):
    book = lm.prefill("A long book. ").state
    found = lm.score(TEXT, state=book)
    assert found.logprob == pytest.approx(likelihood(oracle[1], lm.encode("A long book. "), lm.encode(TEXT)), rel=1e-5)
    assert found.tokens == len(lm.encode(TEXT))
    assert lm.score(TEXT, state=book).logprob == found.logprob


@pytest.mark.parametrize("form", [str, on_disk])
@pytest.mark.parametrize("after", [False, True])
def test_a_score_in_parts_has_the_same_sums_to_the_bit(lm, tmp_path, form, after):
    book = lm.prefill("A long book. ").state if after else None
    whole, state, parts = lm.score(form(TEXT), state=book), book, 0
    while parts == 0 or state.rows[0].scored is not None:
        asked = chain([False], repeat(True))  # a window at a time
        found = lm.score(form(TEXT), state=state, should_stop=lambda asked=asked: next(asked))
        assert found.tokens <= whole.tokens
        found.result.state.save(tmp_path / "part.state")
        state, parts = RecurrentState.load(tmp_path / "part.state"), parts + 1
    assert parts > 5
    assert found == whole
    assert found.result.state.digest() == whole.result.state.digest()


def test_what_cannot_go_on_is_refused(lm):
    asked = chain([False], repeat(True))
    part = lm.score(TEXT, should_stop=lambda: next(asked)).result.state
    with pytest.raises(StateError, match="of another prompt"):
        lm.score("another text" * 9, state=part)
    asked = chain([False], repeat(True))
    prefill = lm.prefill([BEGIN, *lm.encode(TEXT)], should_stop=lambda: next(asked)).state
    with pytest.raises(StateError, match="has no sums of log-probabilities"):
        lm.score(TEXT, state=prefill)
    asked = chain([False], repeat(True))
    further = lm.prefill([BEGIN, *lm.encode(TEXT)], state=part, should_stop=lambda: next(asked)).state
    assert further.tokens > part.tokens
    with pytest.raises(StateError, match="has no sums of log-probabilities"):
        lm.score(TEXT, state=further)  # the sums end before what the prefill has read
    with pytest.raises(StateError, match="has 2 prompts"):
        lm.score(TEXT, state=lm.prefill(["a", "b"]).state)
    with pytest.raises(UsageError, match="empty"):
        lm.score("")


def test_words_are_counted_over_the_ends_of_pieces(lm, monkeypatch):
    monkeypatch.setattr("xlstm_ray.engine.score.PIECE", 3)
    for text in ("one two three", "a b c d", " ab  cde ", "abcdefghi", "   "):
        assert lm.score(on_disk(text)).words == len(text.split())


PEAK = """
import resource, sys
import xlstm_ray
from xlstm_ray.text.ondisk import TextFile
numerics = {"chunkwise_backend": "native", "tile_size": 512, "chunk_size": 64, "dtype": "float32"}
lm = xlstm_ray.load(sys.argv[1], device="cpu", **numerics)
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << (0 if sys.platform == "darwin" else 10)
def scored(size):
    with open(sys.argv[2], "wb") as file:
        file.write(b"To talk of many things. " * (size // 23))
    return lm.score(TextFile(open(sys.argv[2], "rb"))).tokens
scored(512)
before = peak()
print(scored(6 * 512), peak() - before)
"""


def test_memory_is_flat(tmp_path):
    """All logits of these tokens are 50 MB."""
    make_model(tmp_path, hidden_size=64, num_hidden_layers=1, num_heads=1, vocab_size=4096)
    done = subprocess.run(
        [sys.executable, "-c", PEAK, tmp_path, tmp_path / "text"], capture_output=True, text=True, check=True
    )
    tokens, grown = map(int, done.stdout.split())
    assert tokens > 5 * 512
    assert grown < 4 << 20
