"""Prompts in files: the answer is that to their text, and nothing of them is in memory."""

import tracemalloc
from array import array
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Ran
from engines import OPTIONS
from tiny import LONG_WORDS, make_model_of_words

import xlstm_ray
from xlstm_ray import Request, Sampling
from xlstm_ray.cli.input import prompt_in
from xlstm_ray.text.ondisk import TokenFile


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("words")
    make_model_of_words(directory, hidden_size=64, num_hidden_layers=1, num_heads=1)
    return directory


def text(tokens: int) -> str:
    return " ".join(LONG_WORDS[n * n % 113] for n in range(tokens))


@pytest.mark.parametrize("drawn", [False, True])
@pytest.mark.parametrize("sampling", [{}, {"repetition_penalty": 1.5}])
def test_an_answer_to_a_file_is_that_to_its_text(sampling, drawn, model, tmp_path):
    (tmp_path / "text").write_text(text(200))
    asked = {"temperature": 2.0, "seed": 7, **sampling} if drawn else sampling
    with xlstm_ray.load(model, **OPTIONS) as lm:
        texts = [
            "".join(lm.generate(prompt, max_new_tokens=30, sampling=asked))
            for prompt in (text(200), prompt_in(str(tmp_path / "text")))
        ]
        assert texts[0] == texts[1]
        prompts = text(200), prompt_in(str(tmp_path / "text"))
        drawing = Sampling(max_new_tokens=30, **asked)
        tokens = [lm.submit(Request(prompt, sampling=drawing)).result().tokens for prompt in prompts]
        assert tokens[0] == tokens[1]


def test_an_answer_to_a_large_file_holds_nothing_of_it(model, tmp_path):
    large = text(100_000)
    (tmp_path / "text").write_text(large)
    with xlstm_ray.load(model, **OPTIONS) as lm:
        for sampling in ({}, {"repetition_penalty": 1.5}):
            prompt = prompt_in(str(tmp_path / "text"))
            tracemalloc.start()
            answer = lm.generate(prompt, sampling=sampling, should_stop=lambda: True)
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert (answer.prefill.state.tokens, answer.prefill.stats.prompt_tokens) == ([0], 100_000)  # all was cut
            assert peak < len(large) / 2


def test_what_a_file_appends_is_what_its_text_does(model, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")  # 30 times as fast as native, and nothing is compiled
    (tmp_path / "text").write_text(text(9000))  # it is cut in several pieces
    asked = iter([False] * 2 + [True] * 9)
    with xlstm_ray.load(model, **OPTIONS | {"chunkwise_backend": "queued_compiled_chunks"}) as lm:
        book = lm.prefill(text(50)).state
        file = prompt_in(str(tmp_path / "text"))
        whole, of_file = (lm.prefill(append=more, state=book).state for more in (text(9000), file))
        assert (of_file.digest(), of_file.rows) == (whole.digest(), whole.rows)
        part = lm.prefill(append=file, state=book, should_stop=lambda: next(asked)).state
        assert 50 < part.tokens[0] < of_file.tokens[0]
        assert lm.prefill(append=file, state=part).state.rows == whole.rows


@pytest.mark.parametrize("sampling", [{}, {"repetition_penalty": 1.5}])
def test_what_follows_a_file_is_what_follows_its_text(sampling, model, tmp_path):
    with xlstm_ray.load(model, **OPTIONS) as lm:
        book = lm.prefill(text(50)).state
        (tmp_path / "short").write_text(text(200))
        givens = text(200), prompt_in(str(tmp_path / "short"))
        texts = ["".join(lm.generate(append=more, state=book, max_new_tokens=30, sampling=sampling)) for more in givens]
        assert texts[0] == texts[1]
        drawing = Sampling(max_new_tokens=30, **sampling)
        ends = [lm.submit(Request(append=more, state=book, sampling=drawing)).result() for more in givens]
        assert ends[0].tokens == ends[1].tokens


def test_a_large_file_is_appended_without_holding_it(model, tmp_path):
    large = text(100_000)
    (tmp_path / "text").write_text(large)
    with xlstm_ray.load(model, **OPTIONS) as lm:
        book = lm.prefill(text(50)).state
        for given in (prompt_in(str(tmp_path / "text")), TokenFile.of([array("i", lm.encode(large))])):
            tracemalloc.start()
            result = lm.prefill(append=given, state=book, should_stop=lambda: True)
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert (result.state.tokens, result.stats.prompt_tokens) == ([50], 100_050)  # all was cut
            assert peak < len(large) / 2


def test_the_command_says_the_same_of_a_file_and_of_words(model, tmp_path, run: Callable[..., Ran]):
    (tmp_path / "text").write_text(text(90) + "\n")
    words = "generate -m", model, "--device cpu --chunkwise-backend native --tile-size 32 --chunk-size 16 -n 9"
    ask = [*words[0].split(), words[1], *words[2].split(), "--repetition-penalty", 1.5]
    assert run(*ask, "-f", tmp_path / "text").out == run(*ask, "-p", text(90)).out
    kept = [*ask[:-4], "--state-in", tmp_path / "book"]
    assert run("prefill", *kept[1:-2], "-p", text(9), "-o", tmp_path / "book").code == 0
    appended = run(*kept, "--append-file", tmp_path / "text", "-n", 9).out
    assert appended == run(*kept, "--append", text(90), "-n", 9).out != ""
