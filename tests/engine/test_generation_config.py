"""generation_config.json is read as transformers reads it, and an answer says why it ended."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from tiny import make_model
from transformers import xLSTMForCausalLM

from xlstm_ray import load
from xlstm_ray.config import ModelConfig
from xlstm_ray.generation_config import GenerationConfig
from xlstm_ray.sampling import Sampling

NUMERICS = {"chunkwise_backend": "native", "tile_size": 8, "chunk_size": 8, "dtype": "float32"}
OPTIONS = "--chunkwise-backend native --tile-size 8 --chunk-size 8 --dtype float32".split()
PROMPT = "The capital of France is"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    make_model(directory, seed=9, hidden_size=128, num_hidden_layers=1, eos_token_id=None)
    (directory / "generation_config.json").unlink()
    return directory


@pytest.fixture(scope="module")
def said(plain: Path) -> list[int]:
    """The model's greedy answer without an end token."""
    with load(plain, **NUMERICS) as lm:
        made = lm.generate(PROMPT, max_new_tokens=10)
        list(made)
    return made.tokens[0]


def with_config(plain: Path, directory: Path, published: object, **config: object) -> Path:
    """The model with this generation_config.json, and these keys of config.json changed."""
    shutil.copytree(plain, directory)
    of_model = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(of_model | config))
    text = published if isinstance(published, str) else json.dumps(published)
    (directory / "generation_config.json").write_text(text)
    return directory


@pytest.mark.parametrize("written", ["a number", "a list", "null"])
@pytest.mark.parametrize("in_config", [True, False])
def test_end_tokens_are_those_of_transformers(plain, said, tmp_path, written, in_config):
    ends = {"a number": said[6], "a list": [258, said[6]], "null": None}[written]
    of_config = said[3] if in_config else None
    model = with_config(plain, tmp_path / "m", {"eos_token_id": ends}, eos_token_id=of_config)
    with load(model, **NUMERICS) as lm:
        ids = lm.encode(PROMPT)
        made = lm.generate(PROMPT, max_new_tokens=10)
        list(made)
    theirs = xLSTMForCausalLM.from_pretrained(model).float().eval()
    with torch.no_grad():
        out = theirs.generate(torch.tensor([ids]), max_new_tokens=10, do_sample=False, pad_token_id=256)
    expected = out[0, len(ids) :].tolist()
    if ends is not None and expected[-1] == said[6]:
        expected = expected[:-1]  # they keep the end token
    assert made.tokens == [expected]


def test_without_the_key_config_json_names_the_end_tokens(plain, said, tmp_path):
    model = with_config(plain, tmp_path / "m", {"temperature": 0.5}, eos_token_id=said[4])
    with load(model, **NUMERICS) as lm:
        list(made := lm.generate(PROMPT, max_new_tokens=10))
    assert made.tokens == [said[: said.index(said[4])]]
    assert GenerationConfig(eos_token_id=-1).end_tokens((7,)) == ()
    assert GenerationConfig(eos_token_id=[-1, 5]).end_tokens((7,)) == (5,)


@pytest.mark.parametrize(
    "published",
    [
        {},
        {"do_sample": True},
        {"do_sample": True, "temperature": 0.5, "top_p": 0.25},
        {"do_sample": True, "top_k": 3},
        {"do_sample": False, "temperature": 0.5},
        {"do_sample": True, "min_p": 0.1, "repetition_penalty": 1.5},
        {"repetition_penalty": 1.5},
    ],
    ids=str,
)
def test_sampling_defaults_are_those_of_transformers(plain, tmp_path, published):
    model = with_config(plain, tmp_path / "m", published)
    config, _ = xLSTMForCausalLM.from_pretrained(model)._prepare_generation_config(None)
    ours = Sampling.make({}, published=GenerationConfig.of(model))
    assert ours.repetition_penalty == (config.repetition_penalty or 1)
    if config.do_sample:
        assert ours.min_p == (config.min_p or 0)
        assert (ours.temperature, ours.top_k, ours.top_p) == (config.temperature, config.top_k, config.top_p)
    else:
        assert ours == Sampling(repetition_penalty=ours.repetition_penalty)


def test_flags_win_over_what_was_published_and_it_is_told(run, plain, tmp_path):
    model = with_config(plain, tmp_path / "m", {"do_sample": True, "temperature": 3.0, "num_beams": 4})
    words = ["generate", "--model", model, *OPTIONS, "--json", "--prompt", PROMPT, "-n", 8]
    ran = run(*words)
    notes = [line for line in ran.err.splitlines() if line.startswith("note: ")]
    assert any("num_beams 4" in line for line in notes)
    assert any("temperature 3" in line and "top_k 50" in line for line in notes)
    hot, greedy = ran.row["text"], run(*words, "--temperature", 0).row["text"]
    assert greedy == run("generate", "--model", plain, *words[3:]).row["text"]
    assert hot != greedy
    seeded = run(*words, "--seed", 4).row["text"]
    explicit = run(*words, "--seed", 4, "--temperature", 3.0, "--top-k", 50, "--top-p", 1.0).row["text"]
    assert seeded == explicit


@pytest.mark.parametrize(
    "text",
    ["{", "[]", '{"eos_token_id": "a"}', '{"eos_token_id": -2}', '{"do_sample": 1}', '{"top_p": 0}', '{"top_k": -1}'],
)
def test_a_broken_file_is_one_line(run, plain, tmp_path, text):
    model = with_config(plain, tmp_path / "m", text)
    assert "generation_config.json" in run("generate", "--model", model, *OPTIONS, "--prompt", "a").error


def test_an_answer_says_why_it_ended(run, plain, said, tmp_path):
    model = with_config(plain, tmp_path / "m", {"eos_token_id": [said[5]]})
    words = ["generate", "--model", model, *OPTIONS, "--prompt", PROMPT]
    cut = said.index(said[5])
    row = run(*words, "--json", "-n", 10).row
    assert (row["finish_reason"], row["new_tokens"]) == ("stop", cut)
    with load(model, **NUMERICS) as lm:
        text = lm.tokenizer.decode([said[5]])
    assert row["stop_token"] == {"id": said[5], "text": text}
    row = run(*words, "--json", "-n", cut).row
    assert (row["finish_reason"], row["stop_token"]) == ("length", None)
    assert f"ended by the end token {text!r} ({said[5]})" in run(*words, "-n", 10).err
    assert "ended by --max-new-tokens" in run(*words, "-n", cut).err
    (tmp_path / "rows").write_text("\n".join(map(json.dumps, [PROMPT, "A"])))
    ran = run(*words[:-2], "--prompt-file", tmp_path / "rows", "--jsonl", "-n", cut + 1)
    first, second = map(json.loads, ran.out.splitlines())
    assert first["finish_reason"] == "stop"
    assert (second["finish_reason"] == "stop") == (second["stop_token"] is not None)


def test_a_cancelled_answer_says_so(plain):
    asked = iter([False] * 5)
    with load(plain, **NUMERICS) as lm:
        list(made := lm.generate(PROMPT, max_new_tokens=50, should_stop=lambda: next(asked, True)))
        assert made.finish_reasons == ["cancelled"]
        assert made.stop_tokens == [None]


def test_config_json_alone_is_enough(plain):
    assert not os.path.exists(plain / "generation_config.json")
    assert GenerationConfig.of(plain) is None
    assert ModelConfig.from_file(plain / "config.json").eos_token_id == ()
