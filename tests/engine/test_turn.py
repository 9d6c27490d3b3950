"""An engine does one call at a time: threads wait for each other, and a call inside another is refused."""

import multiprocessing
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from engines import OPTIONS, lm, model

import xlstm_ray
from xlstm_ray.errors import UsageError

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
    for call in (lambda: lm.prefill("abc"), lambda: lm.generate("abc"), lambda: lm.warm_up(1, [16]), lm.close):
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
        lines = [said.get(timeout=60) for _ in range(4)]
    finally:
        child.kill()
        child.join()
    assert all("this one is a fork of it" in line for line in lines)
    assert lm.prefill(PROMPTS[0]).state.digest() == alone
