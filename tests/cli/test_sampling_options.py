"""The options of sampling, and lines of prompts that have their own."""

import json

import pytest
from tiny import make_model

PROMPT = "The capital of France is"


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    directory = tmp_path_factory.mktemp("model")
    make_model(directory, seed=9, hidden_size=128, num_hidden_layers=1, eos_token_id=None)
    numerics = "--chunkwise-backend native --tile-size 8 --chunk-size 8 --dtype float32 --device cpu".split()
    return ["generate", "--model", directory, *numerics, "--prompt", PROMPT]


def test_each_option_reaches_the_answer(run, words):
    whole = run(*words, "-n", 12, "--json").row["text"]
    assert run(*words, "-n", 6, "--json", "--logit-bias", "32=100", "--logit-bias=33=-100").row["text"] == "AAAAAA"
    bias = "--logit-bias", "32=100", "--json", "-n", 12
    assert set(run(*words, *bias, "--presence-penalty", 2, "--frequency-penalty", 2).row["text"]) == {"A"}
    row = run(*words, *bias, "--stop", "B", "--stop", "AAA").row
    assert (row["text"], row["finish_reason"], row["stop_text"], row["new_tokens"]) == ("", "stop", "AAA", 3)
    row = run(*words, *bias, "--stop", "AAA", "--min-tokens", 5).row
    assert (row["text"], row["new_tokens"]) == ("AAA", 6)
    nearly = [[*words, "-n", 12, "--json", "--logit-bias", f"32={bias}"] for bias in (4, 5, 6, 7, 8, 9, 10)]
    plain = [run(*some).row["text"] for some in nearly]
    for option in (["--repetition-penalty", 2], ["--presence-penalty", 2], ["--frequency-penalty", 2]):
        assert [run(*some, *option).row["text"] for some in nearly] != plain  # somewhere A is only just the best
    hot = ["--temperature", 3.0, "--seed", 1, "-n", 12, "--json"]
    assert run(*words, *hot).row["text"] != whole
    assert run(*words, *hot, "--min-p", 1.0).row["text"] == whole
    ran = run(*words, "-n", 12, "--stop", whole[2:4])
    assert ran.out == whole[:2] + "\n"
    assert f"ended by the stop text {whole[2:4]!r}" in ran.err
    row = run(*words, "-n", 4, "--json", "--logprobs", 2).row
    assert [len(one["top"]) for one in row["logprobs"]] == [2] * 4
    assert row["logprobs"][0]["top"][0] == {name: row["logprobs"][0][name] for name in ("id", "text", "logprob")}
    assert row["logprobs"][0]["logprob"] == pytest.approx(row["next_tokens"][0]["logprob"], abs=1e-5)


def test_lines_may_have_their_own_sampling(run, words, tmp_path):
    lines = [
        {"prompt": PROMPT, "id": "a", "max_new_tokens": 3, "ignore_eos": True},
        {"prompt": PROMPT, "temperature": 0.9, "seed": 3, "stop": ["zz"], "logprobs": 1},
        PROMPT,
        {"prompt": PROMPT, "logit_bias": {"32": 100}, "top_k": None},
    ]
    (tmp_path / "lines").write_text("\n".join(map(json.dumps, lines)))
    ran = run(*words[:-2], "--prompt-file", tmp_path / "lines", "--jsonl", "-n", 5, "--presence-penalty", 0.5)
    assert ran.code == 0, ran
    first, second, third, fourth = map(json.loads, ran.out.splitlines())
    assert [row["index"] for row in (first, second, third, fourth)] == [0, 1, 2, 3]
    assert (first["id"], first["new_tokens"]) == ("a", 3)
    alone = ["-n", 5, "--json", "--presence-penalty", 0.5]
    assert second["text"] == run(*words, *alone, "--temperature", 0.9, "--seed", 3).row["text"]
    assert third["text"] == run(*words, *alone).row["text"]
    assert first["text"] == third["text"][: len(first["text"])]
    assert fourth["text"] == "AAAAA"
    assert ["logprobs" in row for row in (first, second, third, fourth)] == [False, True, False, False]
    assert not {"max_new_tokens", "stop", "logit_bias", "temperature"} & {*first, *second, *fourth}


def test_several_answers_to_a_prompt_are_lines_with_their_place(run, words, tmp_path):
    hot = ["-n", 6, "--temperature", 2.0, "--seed", 4]
    ran = run(*words, *hot, "--n", 3)
    rows = [json.loads(line) for line in ran.out.splitlines()]
    assert [(row["index"], row["answer"]) for row in rows] == [(0, 0), (0, 1), (0, 2)]
    alone = [run(*words, *hot, "--seed", seed, "--json").row["text"] for seed in (4, 5, 6)]
    assert [row["text"] for row in rows] == alone
    assert len(run(*words, *hot, "--n", 3, "--json", "--state-out", tmp_path / "state").out.splitlines()) == 3
    more = run("generate", *words[1:-2], "--state-in", tmp_path / "state", "-n", 1)
    assert [json.loads(line)["prompt_tokens"] for line in more.out.splitlines()] == [len(PROMPT) + 6] * 3
    (tmp_path / "lines").write_text('{"prompt": "' + PROMPT + '", "id": "a", "n": 2}\n"' + PROMPT + '"\n')
    ran = run(*words[:-2], "--prompt-file", tmp_path / "lines", "--jsonl", *hot)
    lines = sorted(map(json.loads, ran.out.splitlines()), key=lambda row: (row["index"], row["answer"]))
    assert [(row["index"], row.get("id"), row["answer"]) for row in lines] == [(0, "a", 0), (0, "a", 1), (1, None, 0)]
    assert [row["text"] for row in lines] == [alone[0], alone[1], alone[0]]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"prompt": "a", "temperature": 1000}', "line 1: temperature is 1000; allowed: 0 (greedy) to 100"),
        ('{"prompt": "a", "temperature": "hot"}', "line 1: temperature is hot; allowed"),
        ('{"prompt": "a", "n": 0}', "line 1: n is 0; allowed: 1 to 128"),
        ('{"prompt": "a", "temprature": 1}', "line 1: 'temprature' is not a key; did you mean temperature?"),
        ('{"prompt": "a", "stop": [""]}', "line 1: stop is ['']; allowed: texts that are not empty"),
        ('{"prompt": "a", "min_tokens": 99}', "line of index 0: --min-tokens is 99; allowed: up to --max-new-tokens"),
    ],
)
def test_a_mistake_in_a_line_names_the_line(run, words, tmp_path, line, said):
    (tmp_path / "lines").write_text(line)
    assert said in run(*words[:-2], "--prompt-file", tmp_path / "lines", "--jsonl").error


def test_a_lines_least_tokens_may_be_as_many_as_the_command_allows(run, words, tmp_path):
    (tmp_path / "lines").write_text(json.dumps({"prompt": PROMPT, "min_tokens": 66}))
    row = json.loads(run(*words[:-2], "--prompt-file", tmp_path / "lines", "--jsonl", "-n", 66).out)
    assert row["new_tokens"] == 66


def test_a_greedy_line_among_sampled_ones(run, words, tmp_path):
    lines = [{"prompt": PROMPT}, {"prompt": PROMPT, "temperature": 0}]
    (tmp_path / "lines").write_text("\n".join(map(json.dumps, lines)))
    ran = run(*words[:-2], "--prompt-file", tmp_path / "lines", "--jsonl", "-n", 6, "--seed", 2, "--top-p", 0.9)
    hot, greedy = map(json.loads, ran.out.splitlines())
    assert greedy["text"] == run(*words, "-n", 6, "--json").row["text"] != hot["text"]


def test_a_prefill_chooses_no_tokens(run, words, tmp_path):
    (tmp_path / "lines").write_text('{"prompt": "a", "temperature": 1}')
    ran = run("prefill", *words[1:-2], "--prompt-file", tmp_path / "lines", "--jsonl")
    assert "'temperature' is not a key; there are: prompt, id" in ran.error


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--min-p", "1.5"], ("--min-p is 1.5", "0 (all tokens) to 1")),
        (["--repetition-penalty", "0"], ("--repetition-penalty is 0", "above 0")),
        (["--presence-penalty", "3"], ("--presence-penalty is 3", "-2 to 2")),
        (["--frequency-penalty", "nan"], ("--frequency-penalty is nan", "-2 to 2")),
        (["--logit-bias", "32"], ("--logit-bias", "'32'", "ID=NUMBER")),
        (["--logit-bias", "A=1"], ("--logit-bias", "'A=1'", "ID=NUMBER")),
        (["--logit-bias", "32=1", "--logit-bias", "32=2"], ("--logit-bias", "((32, 1.0), (32, 2.0))", "each once")),
        (["--logit-bias", "999=1"], ("--logit-bias", "token 999", "vocabulary of 259")),
        (["--stop", ""], ("--stop", "not empty")),
        (["--n", "0"], ("--n is 0", "1 to 128")),
        (["--min-tokens", "9", "-n", "8"], ("--min-tokens is 9", "--max-new-tokens", "8")),
        (["--logprobs", "3"], ("--logprobs", "--json")),
        (["--logprobs", "21", "--json"], ("--logprobs is 21", "0 to 20")),
        (["--temperature", "0", "--min-p", "0.5"], ("--min-p", "no effect")),
    ],
)
def test_a_mistake_names_the_option(run, words, options, said):
    error = run(*words, *options).error
    for text in said:
        assert text in error
