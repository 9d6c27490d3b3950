"""Clients that nobody here wrote, each as its own program: llm, litellm, and lm-eval with a task of this test."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from services import serving_here
from transformers import xLSTMForCausalLM

from xlstm_ray.text.template import Template

KEY = "the-key-of-this-test"
DEMO = Path(__file__).parents[2] / "xlstm_ray" / "demo"
STORY = "Once upon a time"


@pytest.fixture(scope="module")
def service():
    template = Template("{% for m in messages %}{{ m.content }}{% endfor %}", "test", {})
    settings = {"dtype": "float32", "cache_memory_mb": 64}
    with serving_here(DEMO, keys=(KEY,), template=template, settings=settings) as here:
        yield here


def program(folder: Path, *words: object) -> str:
    """The output of a program of this environment, which has the key and cannot ask strangers."""
    alone = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    homes = {"HF_HOME": str(folder / "hub"), "LLM_USER_PATH": str(folder / "llm")}
    env = {**os.environ, **alone, **homes, "OPENAI_API_KEY": KEY}
    done = subprocess.run([*map(str, words)], cwd=folder, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def answer(service: Any) -> str:
    return "".join(service.engine.generate(STORY, max_new_tokens=6, temperature=0))


def test_llm_streams_completions_and_chats(service, tmp_path):
    (tmp_path / "llm").mkdir()
    model = {"model_name": "tiny", "api_base": f"{service.url}/v1", "api_key_name": "ours"}
    models = [{**model, "model_id": "text", "completion": True}, {**model, "model_id": "talk"}]
    (tmp_path / "llm" / "extra-openai-models.yaml").write_text(yaml.safe_dump(models))
    (tmp_path / "llm" / "keys.json").write_text(json.dumps({"ours": KEY}))
    llm = Path(sys.executable).with_name("llm")
    for name in ("text", "talk"):
        said = program(tmp_path, llm, "-m", name, STORY, "-o", "max_tokens", 6, "-o", "temperature", 0)
        assert said == answer(service) + "\n"
    rows = json.loads(program(tmp_path, llm, "logs", "--json"))
    (talk,) = [row for row in rows if row["model"] == "talk"]  # it asks for no figures of completions
    assert (talk["input_tokens"], talk["output_tokens"]) == (len(service.engine.encode(STORY)), 6)


LITELLM = """
import json, sys, litellm
url, key, story = sys.argv[1:]
to = {"api_base": url + "/v1", "api_key": key, "max_tokens": 6, "temperature": 0, "num_retries": 0}
talk = [{"role": "user", "content": story}]
text = litellm.text_completion(model="text-completion-openai/tiny", prompt=story, **to)
chat = litellm.completion(model="openai/tiny", messages=talk, **to)
counted = {"stream": True, "stream_options": {"include_usage": True}}
chunks = list(litellm.completion(model="openai/tiny", messages=talk, **counted, **to))
wrong = []
for more in ({"temperature": 200}, {"api_key": "nobody"}, {"model": "openai/other"}):
    try:
        litellm.completion(**{"model": "openai/tiny", "messages": talk, **to, **more})
    except Exception as error:
        wrong.append(type(error).__name__)
print(json.dumps([
    text.choices[0].text, chat.choices[0].message.content,
    "".join(c.choices[0].delta.content or "" for c in chunks if c.choices),
    chunks[-1].usage.completion_tokens, wrong]))
"""


def test_litellm_completes_chats_streams_and_knows_errors(service, tmp_path):
    said = program(tmp_path, sys.executable, "-c", LITELLM, service.url, KEY, STORY)
    *texts, tokens, wrong = json.loads(said.splitlines()[-1])
    assert texts == [answer(service)] * 3
    assert tokens == 6
    assert wrong == ["BadRequestError", "AuthenticationError", "NotFoundError"]


def test_lm_evals_log_likelihoods_are_those_computed_directly(service, tmp_path):
    rows = [
        {"question": "The capital of France is", "choices": ["Paris", "London", "a cheese"], "answer": 0},
        {"question": "She was born in the year", "choices": ["1905", "of the", "Beijing."], "answer": 0},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}}}
    task = {"task": "choose", "output_type": "multiple_choice", "test_split": "test", "doc_to_text": "{{question}}"}
    task |= {"doc_to_choice": "{{choices}}", "doc_to_target": "{{answer}}", "metric_list": [{"metric": "acc"}], **data}
    (tmp_path / "choose.yaml").write_text(yaml.safe_dump(task))
    at = f"base_url={service.url}/v1/completions,model=tiny,num_concurrent=2,max_retries=1,auth_token={KEY}"
    words = "--include_path", tmp_path, "--tasks", "choose", "--output_path", tmp_path / "out", "--log_samples"
    program(
        tmp_path, sys.executable, "-m", "lm_eval", "run", "--model", "local-completions", "--model_args", at, *words
    )
    (file,) = (tmp_path / "out").rglob("samples_choose_*.jsonl")
    asked = []
    for line in file.read_text().splitlines():
        sample = json.loads(line)
        for pair, ((found, greedy),) in zip(sample["arguments"].values(), sample["resps"], strict=True):
            asked.append((pair["arg_0"], pair["arg_1"], float(found), greedy == "True"))
    assert len(asked) == 6
    model = xLSTMForCausalLM.from_pretrained(DEMO, dtype=torch.float32).double().eval()
    encode = service.engine.encode_more
    for context, more, found, greedy in asked:
        tokens, begun = encode(context + more), len(encode(context))
        with torch.no_grad():
            scores = model(torch.tensor([tokens]), use_cache=False).logits[0].double().log_softmax(-1)
        own = [scores[place - 1, tokens[place]].item() for place in range(begun, len(tokens))]
        assert found == pytest.approx(sum(own), abs=1e-4)
        assert greedy == all(scores[p - 1].argmax() == tokens[p] for p in range(begun, len(tokens)))
        _, scored = tokens, service.engine.prefill(tokens, prompt_logprobs=1).prompt_logprobs
        assert found == pytest.approx(sum(one.logprob for one in list(scored[0])[begun:]), abs=1e-4)


def test_an_end_token_is_among_the_log_probabilities(service):
    """lm-eval leaves the last token out, which it asked for: an end token counts as one."""
    body = {"prompt": STORY, "logit_bias": {"0": 100}, "max_tokens": 5, "logprobs": 1, "temperature": 0}
    headers = {"authorization": f"Bearer {KEY}"}
    (choice,) = service.ask("/v1/completions", body, **headers).json["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("", "stop")
    assert len(choice["logprobs"]["token_logprobs"]) == 1
    events = service.ask("/v1/completions", {**body, "stream": True}, **headers).events
    assert [c["logprobs"] for event in events for c in event["choices"]] == [choice["logprobs"]]
    talk = {**body, "messages": [{"role": "user", "content": STORY}], "logprobs": True}
    del talk["prompt"]
    (choice,) = service.ask("/v1/chat/completions", talk, **headers).json["choices"]
    assert not choice["logprobs"]  # as OpenAI's chats
