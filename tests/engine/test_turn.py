"""Calls of several threads go on together, each as if it were alone; a call inside another of its thread is refused."""

import csv
import multiprocessing
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from engines import OPTIONS, lm, model

import xlstm_ray
from xlstm_ray.engine.driver import Progress
from xlstm_ray.engine.request import Piece, Request
from xlstm_ray.errors import UsageError
from xlstm_ray.sampling import Sampling

__all__ = ["lm", "model"]

PROMPTS = [bytes(range(32 + n, 120)).decode() * 4 for n in range(4)]


def test_prefills_of_several_threads_give_what_each_gives_alone(lm):
    alone = [lm.prefill(p).state.digest() for p in PROMPTS]
    assert len(set(alone)) == len(PROMPTS)
    start = threading.Barrier(len(PROMPTS))

    def prefill(prompt):
        start.wait()
        return lm.prefill(prompt).state.digest()

    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        for _ in range(3):
            assert list(pool.map(prefill, PROMPTS)) == alone


def test_generations_of_several_threads_give_what_each_gives_alone(lm):
    alone = ["".join(lm.generate(p, max_new_tokens=8)) for p in PROMPTS]
    start = threading.Barrier(len(PROMPTS))

    def generate(prompt):
        start.wait()
        return "".join(lm.generate(prompt, max_new_tokens=8))

    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        assert list(pool.map(generate, PROMPTS)) == alone


@pytest.mark.parametrize("thread", ["this one", "another one"])
def test_a_prefill_between_the_steps_of_a_generation_leaves_both_as_each_is_alone(lm, thread):
    alone = lm.prefill(PROMPTS[1]).state.digest()
    text = "".join(lm.generate(PROMPTS[0], max_new_tokens=6))
    generation = lm.generate(PROMPTS[0], max_new_tokens=6)
    pieces, digests = [], []
    with ThreadPoolExecutor(1) as pool:
        for piece in generation:
            pieces.append(piece)
            if thread == "this one":
                digests.append(lm.prefill(PROMPTS[1]).state.digest())
            else:
                digests.append(pool.submit(lambda: lm.prefill(PROMPTS[1]).state.digest()).result(60))
    assert "".join(pieces) == text
    assert digests == [alone] * len(pieces)


@pytest.mark.parametrize("batch", [False, True])
def test_all_other_calls_begin_and_end_between_two_windows_of_a_prefill(lm, batch):
    lm.serve(slots=4, buckets=(4,))
    long = [PROMPTS[0] * 4, *PROMPTS[1:]] if batch else PROMPTS[0] * 4
    ask = Request(PROMPTS[3], sampling=Sampling(max_new_tokens=6), keep=True)

    def others() -> list[Any]:
        with ThreadPoolExecutor(4) as pool:  # all at once
            futures = [
                pool.submit(lambda: lm.prefill(PROMPTS[1]).state.digest()),
                pool.submit(lambda: lm.prefill(PROMPTS[:2]).state.digest()),
                pool.submit(lambda: "".join(lm.generate(PROMPTS[2], max_new_tokens=6))),
                pool.submit(lambda: lm.submit(ask).result(60).state.digest()),
            ]
            return [future.result(60) for future in futures]

    alone, there = lm.prefill(long).state.digest(), others()
    seen: list[Any] = []

    def between(p: Progress) -> None:
        if p.tiles_done in (1, 5):
            seen.append(others())

    assert lm.prefill(long, on_progress=between).state.digest() == alone
    assert seen == [there] * 2


def test_two_prefills_and_an_answer_keep_step_with_each_other(lm):
    """Each prefill waits for the other one, and for a token, after every window: none can be done as a whole first."""
    lm.serve(slots=2, buckets=(1,))
    long = [text * 3 for text in PROMPTS[:2]]
    answer = Request(PROMPTS[2], sampling=Sampling(max_new_tokens=12))
    alone = [lm.prefill(text).state.digest() for text in long], lm.submit(answer).result(60).text
    step = threading.Barrier(2)

    def prefill(text: str) -> str:
        pieces = (event for event in lm.submit(answer) if isinstance(event, Piece))
        said = []

        def keep_step(_progress: Progress) -> None:
            if len(said) < 8:
                said.append(next(pieces).text)
                step.wait(60)

        digest = lm.prefill(text, on_progress=keep_step).state.digest()
        assert "".join([*said, *(piece.text for piece in pieces)]) == alone[1]
        return digest

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(prefill, long)) == alone[0]


@pytest.mark.parametrize("depth", [1, 2])  # steps in flight: on the CPU, and as on a device
def test_a_call_that_is_interrupted_leaves_the_others_their_results_and_its_own_last_state(lm, monkeypatch, depth):
    monkeypatch.setattr(lm.executor, "_depth", depth)
    alone = {text: lm.prefill(text * 2).state.digest() for text in PROMPTS}
    plain, mine = lm.executor.submit, threading.local()

    def submit(state, step):
        after = plain(state, step)
        mine.left = getattr(mine, "left", 99) - 1
        if mine.left == 0:
            raise KeyboardInterrupt
        return after

    monkeypatch.setattr(lm.executor, "submit", submit)
    for stop in (2, 5):
        with ThreadPoolExecutor(3) as pool:
            others = [pool.submit(lambda text=text: lm.prefill(text * 2).state.digest()) for text in PROMPTS[1:]]
            mine.left = stop
            with pytest.raises(KeyboardInterrupt):
                lm.prefill(PROMPTS[0] * 2)
            state = lm.last_state()
            assert (state is None) == (stop <= depth)
            assert [other.result(60) for other in others] == [alone[text] for text in PROMPTS[1:]]
        assert lm.prefill(PROMPTS[0] * 2, state=state).state.digest() == alone[PROMPTS[0]]
        assert not lm.executor._pending


def test_prefills_that_write_a_log_wait_for_each_other(model, tmp_path):
    with xlstm_ray.load(model, **OPTIONS, stats_log=tmp_path / "log.csv") as lm:
        for _ in range(2):
            with ThreadPoolExecutor(3) as pool:
                list(pool.map(lm.prefill, PROMPTS[:1] * 3))
    rows = [int(row["tile"]) for row in csv.DictReader((tmp_path / "log.csv").read_text().splitlines())]
    assert rows == [*range(1, rows.index(1, 1) + 1)] * 6


def test_a_call_from_inside_another_one_is_refused_by_name(lm):
    alone = lm.prefill(PROMPTS[0]).state.digest()
    refused = []

    def call(_progress):
        for inner in (lambda: lm.prefill("abc"), lambda: lm.generate("abc"), lm.close):
            with pytest.raises(UsageError, match="called from inside this engine's prefill") as error:
                inner()
            refused.append(str(error.value).split()[0])

    assert lm.prefill(PROMPTS[0], on_progress=call).state.digest() == alone
    assert refused[:3] == ["prefill", "generate", "close"]


def test_close_waits_for_the_call_that_runs_and_ends_a_generation(model):
    lm = xlstm_ray.load(model, **OPTIONS)
    alone = lm.prefill(PROMPTS[0]).state.digest()
    began, closed = threading.Event(), threading.Event()

    def close():
        began.wait()
        lm.close()
        closed.set()

    thread = threading.Thread(target=close)
    thread.start()

    def progress(_progress):
        began.set()
        assert not closed.wait(0.05)

    assert lm.prefill(PROMPTS[0], on_progress=progress).state.digest() == alone
    thread.join(60)
    assert closed.is_set()

    lm = xlstm_ray.load(model, **OPTIONS)
    pieces = iter(lm.generate(PROMPTS[0], max_new_tokens=4))
    next(pieces)
    lm.close()
    with pytest.raises(UsageError, match="closed"):
        next(pieces)


def _use(lm: xlstm_ray.Engine, said: Any) -> None:
    calls = [lambda: lm.prefill("abc"), lambda: lm.generate("abc"), lambda: lm.warm_up(1, [16]), lm.serve]
    for call in (*calls, lambda: lm.submit(Request("abc")).result(30), lm.close):
        try:
            call()
        except UsageError as error:
            said.put(str(error))


def test_a_forked_child_is_told_and_its_parents_engine_goes_on(lm):
    alone = lm.prefill(PROMPTS[0]).state.digest()
    fork = multiprocessing.get_context("fork")
    said = fork.Queue()
    child = fork.Process(target=_use, args=(lm, said))
    child.start()
    try:
        lines = [said.get(timeout=60) for _ in range(6)]
    finally:
        child.kill()
        child.join()
    assert all("this one is a fork of it" in line for line in lines)
    assert lm.prefill(PROMPTS[0]).state.digest() == alone
