"""Prompts in files: the answer is that to their text, and nothing of them is in memory."""

import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Ran
from engines import OPTIONS
from tiny import LONG_WORDS, make_model_of_words

import xlstm_ray
from xlstm_ray import Request, Sampling
from xlstm_ray.cli.input import prompt_in


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


def test_the_command_says_the_same_of_a_file_and_of_words(model, tmp_path, run: Callable[..., Ran]):
    (tmp_path / "text").write_text(text(90) + "\n")
    words = "generate -m", model, "--device cpu --chunkwise-backend native --tile-size 32 --chunk-size 16 -n 9"
    ask = [*words[0].split(), words[1], *words[2].split(), "--repetition-penalty", 1.5]
    assert run(*ask, "-f", tmp_path / "text").out == run(*ask, "-p", text(90)).out
