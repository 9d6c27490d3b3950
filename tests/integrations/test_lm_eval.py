"""lm-eval with our model class: a local task by its own program, and numbers that are those computed directly."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from lm_eval.api.instance import Instance
from tiny import make_model
from transformers import xLSTMForCausalLM

from xlstm_ray import Request
from xlstm_ray.errors import UsageError
from xlstm_ray.integrations.lm_eval import XlstmRay, main

DEMO = Path(__file__).parents[2] / "xlstm_ray" / "demo"
ROWS = [
    {"question": "The capital of France is", "choices": ["Paris", "London", "a cheese"], "answer": 0},
    {"question": "She was born in the year", "choices": ["1905", "of the", "Beijing."], "answer": 0},
]


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, xLSTMForCausalLM]:
    directory = tmp_path_factory.mktemp("model")
    return directory, make_model(directory, hidden_size=128, num_hidden_layers=2, num_heads=2).double()


@pytest.fixture(scope="module")
def lm(oracle):
    made = XlstmRay.create_from_arg_string(
        f"model={oracle[0]},chunkwise_backend=native,tile_size=32,chunk_size=16,dtype=float32",
        {"device": "cpu", "batch_size": 1, "max_batch_size": None},
    )
    yield made
    made.engine.close()


def asked(kind: str, *each: tuple) -> list[Instance]:
    return [Instance(kind, {}, arguments, n) for n, arguments in enumerate(each)]


def exact(oracle, context: list[int], more: list[int]) -> tuple[float, bool]:
    with torch.no_grad():
        scores = oracle[1](torch.tensor([[*context, *more]]), use_cache=False).logits[0].double().log_softmax(-1)
    after = scores[len(context) - 1 : -1]
    return after[range(len(more)), more].sum().item(), after.argmax(-1).tolist() == more


def test_log_likelihoods_are_those_of_transformers_in_any_order(lm, oracle):
    shots = "Q: how many? A: two.\n" * 4  # more than a tile, which contexts share
    context = shots + "Q: and why? A:"
    greedy = lm.engine.decode(lm.engine.generate(context, max_new_tokens=3, temperature=0).prefill.logits.argmax(-1))
    pairs = [(context, " so."), ("", "alone"), (shots + "Q: é", "?"), (context, " no"), (context, greedy), ("a ", "b")]
    found = lm.loglikelihood(asked("loglikelihood", *pairs), disable_tqdm=True)
    for (before, more), (logprob, is_greedy) in zip(pairs, found, strict=True):
        spaces = len(before) - len(before.rstrip())
        first, rest = before[: len(before) - spaces], before[len(before) - spaces :] + more
        tokens = lm.tok_encode(first) or [lm.prefix_token_id]
        want, best = exact(oracle, tokens, lm.tok_encode(rest))
        assert logprob == pytest.approx(want, abs=1e-3)
        assert is_greedy == best
    assert found[4][1]
    hits = lm.engine.submit(Request(lm.tok_encode(context))).result().usage.cache
    assert hits.hit_tokens == len(lm.tok_encode(context))  # it was read for the three, and is kept


def test_rolling_likelihoods_are_of_whole_texts(lm, oracle):
    texts = ["To talk of many things. " * 9, "é", ""]
    found = lm.loglikelihood_rolling(asked("loglikelihood_rolling", *((text,) for text in texts)), disable_tqdm=True)
    for text, logprob in zip(texts[:2], found, strict=False):
        assert logprob == pytest.approx(exact(oracle, [257], lm.tok_encode(text))[0], rel=1e-5)
    assert found[2] == 0.0


def test_answers_end_where_the_task_says(lm):
    context, generate = "Once upon", lm.engine.generate
    plain = "".join(generate(context, max_new_tokens=9, temperature=0))
    hot = "".join(generate(context, max_new_tokens=9, temperature=1.5, sampling={"seed": 3}))
    cut = plain[: plain.index(plain[4])]
    cases = [
        ({"until": ["never said"], "max_gen_toks": 9}, plain),
        ({"until": plain[4], "max_gen_toks": 9, "do_sample": False, "temperature": 1.0}, cut),
        ({"until": [], "max_gen_toks": 9, "do_sample": True, "temperature": 1.5, "seed": 3}, hot),
    ]
    requests = asked("generate_until", *((context, fields) for fields, _ in cases))
    assert lm.generate_until(requests, disable_tqdm=True) == [text for _, text in cases]
    with pytest.raises(UsageError, match="num_beams, which is not served"):
        lm.generate_until(asked("generate_until", (context, {"num_beams": 4})), disable_tqdm=True)


def test_templates_and_batches(lm, oracle, tmp_path):
    talk = [{"role": "user", "content": "Who?"}]
    with pytest.raises(UsageError, match="has no chat template"):
        lm.apply_chat_template(talk)
    with pytest.raises(UsageError, match="batch_size has no effect"):
        XlstmRay(str(oracle[0]), batch_size=8)
    (tmp_path / "own.jinja").write_text("{{ messages[0].content }}!")
    words = {"chunkwise_backend": "native", "device": "cpu", "chat_template": str(tmp_path / "own.jinja")}
    other = XlstmRay(str(oracle[0]), **words)
    assert other.apply_chat_template(talk) == "Who?!"
    other.engine.close()


def test_its_own_program_evaluates_a_local_task(tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}}}
    task = {"task": "choose", "output_type": "multiple_choice", "test_split": "test", "doc_to_text": "{{question}}"}
    task |= {"doc_to_choice": "{{choices}}", "doc_to_target": "{{answer}}", "metric_list": [{"metric": "acc"}], **data}
    (tmp_path / "choose.yaml").write_text(yaml.safe_dump(task))
    at = f"model={DEMO},chunkwise_backend=native,dtype=float32"
    words = "--include_path", tmp_path, "--tasks", "choose", "--output_path", tmp_path / "out", "--log_samples"
    command = [
        sys.executable,
        "-m",
        "xlstm_ray.integrations.lm_eval",
        "run",
        "--model",
        "xlstm-ray",
        "--model_args",
        at,
    ]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")}
    done = subprocess.run([*map(str, (*command, *words))], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (file,) = (tmp_path / "out").rglob("samples_choose_*.jsonl")
    (results,) = (tmp_path / "out").rglob("results_*.json")
    direct = DEMO, xLSTMForCausalLM.from_pretrained(DEMO, dtype=torch.float32).double().eval()
    right = []
    lm = XlstmRay(str(DEMO), chunkwise_backend="native", dtype="float32")
    for line in file.read_text().splitlines():
        sample, likelihoods = json.loads(line), []
        for pair, ((found, greedy),) in zip(sample["arguments"].values(), sample["resps"], strict=True):
            context, more = lm._encode_pair(pair["arg_0"], pair["arg_1"])
            want, best = exact(direct, context, more)
            assert float(found) == pytest.approx(want, abs=1e-4)
            assert (greedy == "True") == best
            likelihoods.append(want)
        right.append(max(range(3), key=likelihoods.__getitem__) == sample["doc"]["answer"])
    lm.engine.close()
    assert json.loads(results.read_text())["results"]["choose"]["acc,none"] == sum(right) / 2


def test_a_mistake_of_its_program_is_one_line(tmp_path, monkeypatch, capsys):
    """Of lm-eval's program only the call of the class: it looks at all tasks that there are, first."""
    none = tmp_path / "none"
    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", lambda: XlstmRay.create_from_arg_string(f"model={none}"))
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 1
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(f"error: {none}: is not a directory")
