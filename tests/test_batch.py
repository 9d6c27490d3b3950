"""Batches: which rows go together, what is compiled for them, and that a row's result is its own."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import make_model
from transformers import xLSTMForCausalLM

import xlstm_ray
from xlstm_ray import RecurrentState
from xlstm_ray.prefill.plan import GROUP_SIZES, plan_groups, plan_windows

TILE, CHUNK = 128, 16


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, xLSTMForCausalLM]:
    directory = tmp_path_factory.mktemp("model")
    return directory, make_model(directory, seed=3, num_hidden_layers=2)


@pytest.fixture(scope="module")
def lm(oracle) -> xlstm_ray.Engine:
    return xlstm_ray.load(oracle[0], device="cpu", chunkwise_backend="native", tile_size=TILE, chunk_size=CHUNK)


def prompt(n: int, seed: int = 0) -> list[int]:
    return torch.randint(0, 256, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


# -- which rows go together --------------------------------------------------------------------------------------------
@given(
    rows=st.lists(st.tuples(st.integers(0, 300), st.integers(0, 700)), min_size=1, max_size=60),
    tile=st.sampled_from([CHUNK, 2 * CHUNK, 8 * CHUNK, 32 * CHUNK]),
)
@settings(max_examples=200, deadline=None)
def test_every_row_is_in_one_group_whose_calls_are_of_few_sizes_and_well_filled(rows, tile):
    begin, end = [b for b, _ in rows], [b + n for b, n in rows]
    sizes = {"tile_size": tile, "chunk_size": CHUNK}

    def computed(places: list[int]) -> int:
        return sum(w.size for w in plan_windows([begin[b] for b in places], [end[b] for b in places], **sizes))

    groups = plan_groups(begin, end, **sizes)
    assert sorted(b for places, _ in groups for b in places) == list(range(len(rows)))
    for places, size in groups:
        assert size in GROUP_SIZES
        assert size / 2 <= len(places) <= size
        windows = plan_windows([begin[b] for b in places], [end[b] for b in places], **sizes)
        assert all(size == 1 or size * w.size <= GROUP_SIZES[-1] * CHUNK for w in windows)
    # Not more than four times what the rows need alone: half full, and half as long.
    assert sum(size * computed(places) for places, size in groups) <= 4 * sum(computed([b]) for b in range(len(rows)))


def test_rows_of_one_length_keep_their_order():
    groups = plan_groups([0] * 35, [10] * 35, tile_size=TILE, chunk_size=CHUNK)
    assert [b for places, _ in groups for b in places] == list(range(35))
    assert [size for _, size in groups] == [4, 16, 16]


# -- results -----------------------------------------------------------------------------------------------------------
def test_rows_of_a_mixed_batch_are_those_of_transformers(lm, oracle):
    lengths = [700, 3, 40, 41, 39, 1, 16, 17, 33, 130, 128]
    rows = [prompt(n, seed=n) for n in lengths]
    ready: list[int] = []
    result = lm.prefill(rows, on_ready=lambda b, _: ready.append(b))
    assert result.state.tokens == lengths
    assert sorted(ready) == list(range(len(rows)))
    assert ready[-1] == 0  # the longest
    for b, row in enumerate(rows):
        with torch.no_grad():
            want = oracle[1](torch.tensor([row])).logits[0, -1]
        torch.testing.assert_close(result.logits[b], want, atol=2e-3, rtol=2e-3)
        assert result.row(b).stats.prompt_tokens == lengths[b]
    assert all(0 < s <= result.stats.prefill_s for s in result.stats.row_prefill_s)
    assert result.stats.row_ttft_s[ready[0]] < result.stats.row_ttft_s[0] == result.stats.ttft_s


def test_short_rows_beside_a_long_one_add_a_window_not_a_row_to_each(lm):
    seen: list[int] = []
    lm.prefill([prompt(5 * TILE), *(prompt(CHUNK, seed) for seed in range(7))], on_progress=lambda p: seen.append(1))
    assert len(seen) == 5 + 2  # 4 + 3 rows of one chunk


def test_two_thousand_prompts_need_what_their_windows_take(oracle, tmp_path, run):
    path = tmp_path / "prompts"
    path.write_text("".join(json.dumps(f"number {i}") + "\n" for i in range(2000)))
    words = "prefill", "--model", oracle[0], "--device", "cpu", "--chunkwise-backend", "native", "--jsonl"
    # With tiles for all rows, 2,000 x 65,536 tokens would need some 500 GiB.
    ran = run(*words, "--prompt-file", path, "--tile-size", 65536, "--chunk-size", CHUNK)
    assert ran.code == 0, ran.err
    rows = [json.loads(line) for line in ran.out.splitlines()]
    assert [row["index"] for row in rows] == list(range(2000))
    assert {row["prompt_tokens"] for row in rows} == {8, 9, 10, 11}


def test_a_row_has_its_index_and_the_id_that_was_given(oracle, tmp_path, run):
    path = tmp_path / "prompts"
    path.write_text('{"id": "long", "prompt": "' + "a" * 300 + '"}\n\n"b"\n{"id": 7, "prompt": "c"}\n')
    words = "--model", oracle[0], "--device", "cpu", "--chunkwise-backend", "native", "--jsonl", "--prompt-file", path
    for command in (["prefill"], ["generate", "--max-new-tokens", 2]):
        rows = [json.loads(line) for line in run(*command, *words).out.splitlines()]
        named = {row["index"]: (row.get("id"), row["prompt_tokens"]) for row in rows}
        assert named == {0: ("long", 300), 1: (None, 1), 2: (7, 1)}
    path.write_text('{"id": ["x"], "prompt": "a"}\n')
    assert "line 1: the id is \"['x']\"" in run("prefill", *words).error


def test_compiled_shapes_are_few_whatever_the_number_of_rows(oracle, eager):
    lm = xlstm_ray.load(oracle[0], device="cpu", tile_size=TILE, chunk_size=CHUNK)
    for rows in (1, 2, 3, 5, 11, 18, 40):
        lm.prefill([prompt(5 + b % 60) for b in range(rows)])
    assert {shape[:2] for shape in lm._warm} <= {(size, CHUNK) for size in GROUP_SIZES}


# -- stopped and resumed -----------------------------------------------------------------------------------------------
def test_a_stopped_batch_has_rows_that_have_not_begun_and_goes_on_to_the_same_bits(lm, tmp_path):
    rows = [prompt(n, seed=n) for n in (300, 5, 40, 7, 9, 41)]
    whole = lm.prefill(rows)
    asked = iter([False, False, False, True])
    stopped = lm.prefill(rows, should_stop=lambda: next(asked)).state
    assert not stopped.complete
    assert 0 in stopped.tokens
    stopped.save(tmp_path / "state")
    ready: list[int] = []
    resumed = lm.prefill(rows, state=RecurrentState.load(tmp_path / "state"), on_ready=lambda b, _: ready.append(b))
    assert resumed.state.digest() == whole.state.digest()
    assert sorted(ready) == list(range(len(rows)))


def test_questions_to_one_book_go_together_and_resume_to_the_same_bits(lm, tmp_path):
    book = prompt(2 * TILE)
    read = lm.prefill([book] * 9).state
    questions = [book + prompt(4 + b, seed=b) for b in range(9)]
    tiles: list[int] = []
    whole = lm.prefill(questions, state=read, on_progress=lambda p: tiles.append(1))
    assert len(tiles) == 1  # one window for all
    longer = [question + prompt(5 * CHUNK, seed=b) for b, question in enumerate(questions)]
    whole = lm.prefill(longer, state=read)
    asked = iter([False, False, True])
    stopped = lm.prefill(longer, state=read, should_stop=lambda: next(asked)).state
    stopped.save(tmp_path / "state")
    resumed = lm.prefill(longer, state=RecurrentState.load(tmp_path / "state"))
    assert resumed.state.digest() == whole.state.digest()
