"""A prompt's own log-probabilities: against transformers and float64, on every way through an engine."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import OPTIONS
from tiny import make_model
from transformers import xLSTMForCausalLM

from xlstm_ray import Engine, Request, Sampling, load
from xlstm_ray.engine import driver
from xlstm_ray.engine.driver import Each, Hooks, Sizes, Snapshot
from xlstm_ray.engine.held import HeldRows
from xlstm_ray.engine.request import Reading
from xlstm_ray.engine.scores import AT_ONCE, Scores
from xlstm_ray.engine.tokens import Tail
from xlstm_ray.errors import GridLost, UsageError
from xlstm_ray.sampling.logprobs import Logprobs

TEXT = "".join(chr(33 + i * i % 90) for i in range(150))  # four tiles of 32, a chunk of 16, and six tokens
CUTS = [(), (1,), (32,), (40, 41), (150,)]


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, xLSTMForCausalLM]:
    directory = tmp_path_factory.mktemp("model")
    return directory, make_model(directory, hidden_size=128, num_hidden_layers=2, num_heads=2, eos_token_id=None)


@pytest.fixture(scope="module")
def lm(oracle: tuple[Path, xLSTMForCausalLM]):
    with load(oracle[0], **OPTIONS, dtype="float32") as engine:
        engine.serve(slots=4, buckets=(4,))
        yield engine


@pytest.fixture(scope="module")
def exact(oracle: tuple[Path, xLSTMForCausalLM], lm: Engine) -> torch.Tensor:
    """(tokens, vocabulary) float64: after each token of TEXT, by transformers."""
    with torch.no_grad():
        logits = oracle[1](torch.tensor([lm.encode(TEXT)]), use_cache=False).logits[0]
    return torch.log_softmax(logits.double(), -1)


def require_exact(scores: Any, exact: torch.Tensor, ids: list[int], *, likeliest: int = 3) -> None:
    """All scores of a text from its first token on."""
    first, *rest = scores
    assert first is None
    assert len(rest) == len(ids) - 1
    chosen = exact[range(len(ids) - 1), ids[1:]]
    assert [made.logprob for made in rest] == pytest.approx(chosen.tolist(), abs=1e-3)
    for made, token, row in zip(rest, ids[1:], exact, strict=False):
        assert [logprob for _, logprob in made.likeliest] == pytest.approx(
            row.topk(likeliest).values.tolist(), abs=1e-3
        )
        assert dict(made.likeliest).get(token, made.logprob) == made.logprob  # the very same number


def found(scores: Any) -> list[Any]:
    return [made and (made.logprob, made.likeliest) for made in scores]


@pytest.mark.parametrize("cuts", CUTS)
def test_scores_equal_transformers_also_of_a_text_that_is_read_in_parts(lm, exact, cuts):
    ids = lm.encode(TEXT)
    by_prefill, by_request, tokens = [], [], []
    state = asked = None
    for start, end in zip((0, *cuts), (*cuts, None), strict=True):
        part = ids[start:end]
        if part:
            given = {"prompt": part} if state is None else {"append": part}
            result = lm.prefill(**given, state=state, prompt_logprobs=3)
            end_of = lm.submit(Request(**given, state=asked, prompt_logprobs=3, keep=True)).result(60)
            state, asked = result.state, end_of.state
            assert end_of.prompt_logprobs.tokens == result.prompt_logprobs[0].tokens == part
            by_prefill += result.prompt_logprobs[0]
            by_request += end_of.prompt_logprobs
            tokens += result.prompt_logprobs[0].tokens
    assert tokens == ids
    assert found(by_request) == found(by_prefill)
    require_exact(by_prefill, exact, ids)
    nothing = lm.prefill(state=state, prompt_logprobs=3).prompt_logprobs
    assert [list(row) for row in nothing] == [[]]
    assert list(lm.submit(Request(state=state, prompt_logprobs=3)).result(60).prompt_logprobs) == []


def test_rows_of_a_batch_have_their_own_also_as_each_is_ready_and_beside_all_logits(lm, exact):
    lengths = 150, 3, 1, 40, 42, 2
    rows = [lm.encode(TEXT)[:n] for n in lengths]
    ready: dict[int, Any] = {}
    result = lm.prefill(rows, prompt_logprobs=3, all_logits=True, on_ready=lambda b, row: ready.setdefault(b, row))
    for b, ids in enumerate(rows):
        require_exact(result.prompt_logprobs[b], exact, ids)
        assert len(result.all_logits[b]) == len(ids)
        (own,) = ready[b].prompt_logprobs
        assert found(own) == found(result.row(b).prompt_logprobs[0]) == found(result.prompt_logprobs[b])
    assert lm.prefill(rows).prompt_logprobs == []


def test_what_a_stopped_prefill_has_scored_goes_on_where_it_is_resumed(lm, exact):
    asked = iter([False, False, True])
    stopped = lm.prefill(TEXT, prompt_logprobs=2, should_stop=lambda: next(asked))
    assert stopped.state.tokens == [64]
    rest = lm.prefill(TEXT, state=stopped.state, prompt_logprobs=2)
    both = [*stopped.prompt_logprobs[0], *rest.prompt_logprobs[0]]
    require_exact(both, exact, lm.encode(TEXT), likeliest=2)
    handle = lm.submit(Request(TEXT * 4, prompt_logprobs=2, keep=True))
    for event in handle:
        if isinstance(event, Reading):
            handle.cancel()
    end = handle.result(60)
    assert 0 < len(end.prompt_logprobs) == end.state.tokens[0] < len(TEXT) * 4


def test_scores_end_with_the_snapshot_that_a_lost_grid_leaves(lm, monkeypatch):
    plain, calls = lm.executor.result, []

    def result():
        calls.append(1)
        if len(calls) == 4:
            raise GridLost("gone")
        return plain()

    monkeypatch.setattr(lm.executor, "result", result)
    start = Snapshot([0], torch.zeros(1, 259), HeldRows([None]))
    with lm._core.turn.of("prefill"):
        outcome = driver.prefill(
            lm._core.states,
            [torch.tensor(lm.encode(TEXT))],
            start=start,
            sizes=Sizes(32, 16),
            each=Each(likeliest=1),
            hooks=Hooks(keep_every=2, on_snapshot=lambda snapshot: None),
        )
    assert outcome.lost is not None
    assert (outcome.end.consumed, len(outcome.scores[0])) == ([64], 64)
    whole = lm.prefill(TEXT, prompt_logprobs=1).prompt_logprobs[0]
    assert found(outcome.scores[0]) == found(whole[:64])


def test_answers_come_with_their_prompts_scores_and_without_a_cache(lm, oracle, exact):
    ids = lm.encode(TEXT)
    sampling = Sampling(max_new_tokens=3, temperature=1.0, n=3)
    for handle in lm.submit_n(Request(TEXT, sampling=sampling, prompt_logprobs=3)):
        require_exact(handle.result(60).prompt_logprobs, exact, ids)
    assert lm.submit(Request(TEXT)).result(60).prompt_logprobs is None
    generation = lm.generate(TEXT, max_new_tokens=2, prompt_logprobs=3)
    assert len("".join(generation)) > 0
    require_exact(generation.prefill.prompt_logprobs[0], exact, ids)
    with load(oracle[0], **OPTIONS, dtype="float32", cache_memory_mb=64) as kept:
        for _ in range(2):
            kept.prefill(TEXT)
            result = kept.prefill(TEXT, prompt_logprobs=3)
            assert (result.stats.cache(0).reason, result.stats.resumed_tokens) == ("off", 0)
            end = kept.submit(Request(TEXT, prompt_logprobs=3)).result(60)
            assert (end.usage.cache.reason, end.usage.resumed_tokens) == ("off", 0)
            require_exact(end.prompt_logprobs, exact, ids)


@pytest.mark.parametrize("count", [-1, 21, 1.5, True])
def test_a_wrong_number_is_refused(lm, count):
    for ask in (
        lambda: lm.submit(Request("a", prompt_logprobs=count)),
        lambda: lm.prefill("a", prompt_logprobs=count),
        lambda: lm.generate("a", prompt_logprobs=count),
    ):
        with pytest.raises(UsageError, match=f"`prompt_logprobs` is {count}; allowed: 0 to 20"):
            ask()


def test_scores_are_a_sequence_however_long_and_however_they_are_asked_for():
    length = AT_ONCE + 77
    tokens = torch.arange(3, 3 + length, dtype=torch.int32)
    scores = Scores(Tail(tokens, 5), 5, torch.zeros(8), 2)
    chosen = torch.rand(1, length)
    likeliest = torch.stack([chosen[0], chosen[0] - 1], -1)[None]
    for start in range(0, length, 100):
        end = min(start + 100, length)
        part = Logprobs(
            chosen[:, start:end], torch.zeros(1, end - start, 2, dtype=torch.int64), likeliest[:, start:end]
        )
        scores.add(part, 0, 0, end - start)
    assert len(scores) == length
    assert scores.tokens == tokens.tolist()
    values = [made.logprob for made in scores]
    assert values[1:] == chosen[0, :-1].tolist()
    assert [scores[n].logprob for n in (0, 1, -1)] == [values[0], values[1], values[-1]]
    assert [made.logprob for made in scores[2:9:3]] == values[2:9:3]
    with pytest.raises(IndexError):
        scores[length]
    scores.cut(10)
    assert [made.logprob for made in scores] == values[:10]


# -- memory ------------------------------------------------------------------------------------------------------------
PEAK = """
import resource, sys
from dataclasses import replace
import xlstm_ray
numerics = {"chunkwise_backend": "native", "tile_size": 512, "chunk_size": 64, "dtype": "float32"}
lm = xlstm_ray.load(sys.argv[1], device="cpu", **numerics)
ids = [(i * 7919) % 50304 for i in range(1024)]
lm.prefill(ids[:512]), lm.prefill(ids[:64], prompt_logprobs=5)
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << (0 if sys.platform == "darwin" else 10)
before = peak()
result = lm.prefill(ids, prompt_logprobs=5)
needs = [lm.plan.room.need(1, [(1, 512)], scored=scored).tile for scored in (False, True)]
room = replace(lm.plan.room, where="grid", loaded=replace(lm.plan.room.loaded, stages=3))
of_grid = [room.grid_need(1, 512, scored=scored).tiles for scored in (False, True)]
print(peak() - before, len(result.prompt_logprobs[0]), *needs, *of_grid)
"""


def test_scoring_holds_a_few_logits_at_a_time_as_counted(tmp_path):
    """All logits of these tokens are 206 MB, and their scores took three times as much."""
    make_model(tmp_path, hidden_size=64, num_hidden_layers=1, num_heads=1, vocab_size=50304)
    done = subprocess.run([sys.executable, "-c", PEAK, tmp_path], capture_output=True, text=True, check=True)
    grown, count, plain, scored, of_actors, of_actors_scored = map(int, done.stdout.split())
    assert count == 1024
    assert grown < scored < plain + (200 << 20)
    assert of_actors_scored == of_actors // 3 * 2 + scored  # one of the three actors does this work


# -- the command line --------------------------------------------------------------------------------------------------
def test_the_command_line_prints_them(oracle, lm, exact, run, tmp_path):
    options = "--device cpu --chunkwise-backend native --tile-size 32 --chunk-size 16 --dtype float32".split()
    words = ["--model", oracle[0], *options, "--prompt-logprobs", 3]
    ids = lm.encode(TEXT)

    def require(row: dict[str, Any], n: int) -> None:
        said = row["prompt_logprobs"]
        assert [token["id"] for token in said] == ids[:n]
        assert "".join(token["text"] for token in said) == TEXT[:n]
        assert (said[0]["logprob"], said[0]["top"]) == (None, [])
        chosen = exact[range(n - 1), ids[1:n]].tolist()
        assert [token["logprob"] for token in said[1:]] == pytest.approx(chosen, abs=1e-3)
        assert all([set(best) for best in token["top"]] == [{"id", "text", "logprob"}] * 3 for token in said[1:])

    for command in (["prefill"], ["generate", "-n", 2]):
        require(run(*command, *words, "--prompt", TEXT, "--json").row, 150)
        (tmp_path / "lines").write_text("".join(json.dumps(TEXT[:n]) + "\n" for n in (5, 40)))
        ran = run(*command, *words, "-f", tmp_path / "lines", "--jsonl")
        rows = sorted(map(json.loads, ran.out.splitlines()), key=lambda row: row["index"])
        require(rows[0], 5)
        require(rows[1], 40)
        assert "--prompt-logprobs are printed with --json" in run(*command, *words, "--prompt", "a").error
        assert (
            "--prompt-logprobs is 21; allowed: 0 to 20"
            in run(*command, *words[:-1], 21, "--prompt", "a", "--json").error
        )
