"""Batches: which rows go together, what is compiled for them, and that each row has its own result."""

import json
import shutil
import signal
import subprocess
import threading
from itertools import count
from pathlib import Path
from typing import Any

import programs
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import make_model
from transformers import xLSTMForCausalLM

import xlstm_ray
from xlstm_ray import RecurrentState
from xlstm_ray.engine.windows import GROUP_SIZES, plan_groups, plan_windows
from xlstm_ray.errors import GridLost
from xlstm_ray.runtime.executor import StateRef, Step

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
    # At most four times what the rows need alone: a call is half full, and its shortest row half as long.
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


def test_snapshots_come_as_often_as_asked_and_a_grid_lost_at_one_leaves_the_one_before(oracle, lm, tmp_path):
    """A row is a group here, of one window. Neither a group nor a run ends with a snapshot of its own."""
    rows, seen = [prompt(TILE, seed) for seed in range(5)], []

    def kept(name: str, rows: Any, failing: int = 0) -> xlstm_ray.PrefillResult:
        """failing: the copy to the host, from 1 on, at which the grid is lost."""
        seen.clear()
        own = {"journal": tmp_path / name, "journal_every": 2, "tile_size": TILE, "chunk_size": CHUNK}
        with xlstm_ray.load(oracle[0], device="cpu", chunkwise_backend="native", **own) as engine:
            plain, copies = engine.executor.save, count(1)

            def save(state: StateRef) -> dict[str, torch.Tensor]:
                if next(copies) == failing:
                    raise GridLost("gone")
                return plain(state)

            engine.executor.save = save
            return engine.prefill(rows, on_snapshot=lambda state: seen.append(state.tokens))

    kept("one", prompt(5 * TILE))
    assert seen == [[2 * TILE], [4 * TILE]]
    whole = kept("many", rows)
    assert seen == [[TILE] * done + [0] * (5 - done) for done in (2, 4)]
    part = kept("lost", rows, failing=6)  # the first snapshot takes four: of two rows, for the look and for the file
    assert (str(part.ended_by), part.state.tokens, part.complete) == ("gone", seen[0], False)
    part.state.save(tmp_path / "state")
    resumed = lm.prefill(rows, state=RecurrentState.load(tmp_path / "state"))
    assert resumed.state.digest() == whole.state.digest()


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


# -- decoding ----------------------------------------------------------------------------------------------------------
QUESTIONS = [prompt(4 + b, seed=b) for b in range(20)]


@pytest.fixture(scope="module")
def answers(oracle) -> list[list[int]]:
    """Nine greedy tokens of transformers for each of QUESTIONS."""

    def answer(made: list[int], n: int) -> list[int]:
        for _ in range(n):
            with torch.no_grad():
                made = [*made, int(oracle[1](torch.tensor([made])).logits[0, -1].argmax())]
        return made[-n:]

    return [answer(question, 9) for question in QUESTIONS]


@pytest.fixture
def ends(lm, answers, monkeypatch) -> tuple[int, ...]:
    """End tokens with which the first 16 answers end at different steps, except two."""
    tokens = tuple({made[2 + b % 5] for b, made in enumerate(answers[:16]) if b not in (3, 11)})
    monkeypatch.setattr(lm, "end_tokens", tokens)
    return tokens


def before(made: list[int], ends: tuple[int, ...]) -> list[int]:
    return made[: next((n for n, token in enumerate(made) if token in ends), len(made))]


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 5}], ids=["greedy", "seeded"])
@pytest.mark.parametrize("batch", [1, 2, 5, 17])
def test_rows_of_a_batch_answer_as_alone(lm, answers, batch, options):
    generation = lm.generate(QUESTIONS[:batch], max_new_tokens=6, **options)
    shown = list(generation.rows())
    assert generation.ready == list(range(batch))
    assert ["".join(pieces) for pieces in zip(*shown, strict=True)] == generation.texts
    if not options:
        assert generation.tokens == [made[:6] for made in answers[:batch]]
        assert generation.finish_reasons == ["length"] * batch
    for b in {0, batch // 2, batch - 1}:
        alone = lm.generate(QUESTIONS[b], max_new_tokens=6, **options)
        assert ("".join(alone), alone.tokens[0]) == (generation.texts[b], generation.tokens[b])
        assert alone.finish_reasons == [generation.finish_reasons[b]]


def test_rows_that_end_leave_and_those_left_go_on_in_a_smaller_call(lm, answers, ends, monkeypatch):
    calls: list[
        tuple[int, int]
    ] = []  # the places of each call, and how many of them belong to rows that have not ended
    submit = lm.executor.submit

    def counted(state: StateRef, step: Step) -> StateRef:
        if step.logits == "last":
            calls.append((len(step.end), int(step.end.sum())))
        return submit(state, step)

    monkeypatch.setattr(lm.executor, "submit", counted)
    generation = lm.generate(QUESTIONS, max_new_tokens=9)
    list(generation.rows())
    want = [before(made, ends) for made in answers]
    assert generation.tokens == want
    assert generation.finish_reasons == ["stop" if len(made) < 9 else "length" for made in want]
    # The token after n is asked of the model for the rows that have so many.
    going = [sum(len(want[b]) >= n for b in group) for group in (range(16), range(16, 20)) for n in range(1, 9)]
    assert calls == [(next(size for size in GROUP_SIZES if size >= rows), rows) for rows in going if rows]
    assert {size for size, _ in calls} == set(GROUP_SIZES)


def test_decoding_is_compiled_for_few_sizes(oracle, eager):
    lm = xlstm_ray.load(oracle[0], device="cpu", tile_size=TILE, chunk_size=CHUNK)
    for batch in (2, 7, 18):
        list(lm.generate([prompt(3, seed=b) for b in range(batch)], max_new_tokens=2).rows())
    assert {rows for rows, tokens, _ in lm._warm if tokens == 1} <= set(GROUP_SIZES)


@pytest.mark.parametrize("steps", [1, 3, 5])
def test_decoding_that_is_stopped_goes_on_to_the_same_bits(lm, ends, tmp_path, steps):
    rows, shown = QUESTIONS[:14], 0
    whole = lm.generate(rows, max_new_tokens=9, last=False)
    list(whole.rows())
    after = whole.state()
    part = lm.generate(rows, max_new_tokens=9, should_stop=lambda: shown == steps, last=False)
    for _ in part.rows():
        shown += 1
    part.state().save(tmp_path / "state")
    more = lm.generate(state=RecurrentState.load(tmp_path / "state"), max_new_tokens=9 - steps, last=False)
    list(more.rows())
    assert [a + b for a, b in zip(part.tokens, more.tokens, strict=True)] == whole.tokens
    assert more.state().digest() == after.digest()


def test_the_state_after_a_batch_has_every_row_and_goes_on(lm, tmp_path):
    rows = QUESTIONS[:17]
    first = lm.generate(rows, max_new_tokens=3, last=False)
    list(first.rows())
    after = first.state()
    assert after.tokens == [len(row) + 3 for row in rows]
    for b in (0, 7, 16):
        for name, tensor in lm.prefill(rows[b] + first.tokens[b]).state.tensors.items():
            torch.testing.assert_close(after.tensors[name][b : b + 1], tensor, atol=1e-3, rtol=1e-3)
    digest = after.digest()
    after.save(tmp_path / "state")
    more = lm.generate(state=RecurrentState.load(tmp_path / "state"), max_new_tokens=3)
    list(more.rows())
    last = more.state().digest()
    whole = lm.generate(rows, max_new_tokens=6)
    steps = whole.rows()
    next(steps), next(steps)
    assert whole.state().tokens == [len(row) + 2 * (b < 16) for b, row in enumerate(rows)]  # asked on the way
    list(steps)
    assert [a + b for a, b in zip(first.tokens, more.tokens, strict=True)] == whole.tokens
    assert whole.state().digest() == last
    assert after.digest() == digest  # earlier results stay as they were


def test_an_answer_is_printed_when_its_group_has_ended(oracle, lm, tmp_path):
    """The lines of sixteen rows are printed while the seventeenth row is still decoded."""
    made = {}
    for text, n in ("a", 20), ("number", 200):
        generation = lm.generate(text, max_new_tokens=n)
        list(generation)
        made[text] = generation.tokens[0]
    end = next(token for token in made["a"] if token not in made["number"])
    model = tmp_path / "model"
    shutil.copytree(oracle[0], model)
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": end}))
    path = tmp_path / "prompts"
    path.write_text('{"id": "short", "prompt": "a"}\n' * 16 + '"number"\n')
    words = "generate", "--model", model, "--device", "cpu", "--chunkwise-backend", "native", "--jsonl", "-f", path
    with programs.Popen([programs.PROGRAM, *words, "-n", str(10**7)], stdout=subprocess.PIPE, text=True) as process:
        rescue = threading.Timer(100, process.kill)  # for comparison: print nothing before all rows have ended
        rescue.start()
        lines = [json.loads(process.stdout.readline()) for _ in range(16)]
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        (stopped,) = map(json.loads, process.stdout)
        rescue.cancel()
    assert [(line["index"], line["id"]) for line in lines] == [(b, "short") for b in range(16)]
    assert {line["finish_reason"] for line in lines} == {"stop"}
    assert {line["decode_steps"] for line in lines} == {made["a"].index(end)}
    assert (stopped["index"], stopped["finish_reason"]) == (16, "cancelled")
