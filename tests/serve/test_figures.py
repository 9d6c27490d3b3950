"""The figures of a service: all that is asked for is there, and they are those of what was done."""

import json
import re
import time
from collections import defaultdict
from pathlib import Path

import promql_parser
import pytest
from prometheus_client.parser import text_string_to_metric_families
from services import Here, model, serving_here

__all__ = ["model"]

DASHBOARD = Path(__file__).parents[2] / "deploy" / "grafana-dashboard.json"
RUNBOOK = DASHBOARD.with_name("RUNBOOK.md")
# What vLLM's own dashboards ask for, besides caches of a kind that is not here.
VLLMS = """
    e2e_request_latency_seconds_bucket e2e_request_latency_seconds_sum prompt_tokens_total generation_tokens_total
    inter_token_latency_seconds_bucket time_per_output_token_seconds_bucket num_requests_running num_requests_waiting
    time_to_first_token_seconds_bucket kv_cache_usage_perc request_prompt_tokens_bucket request_success_total
    request_generation_tokens_bucket request_queue_time_seconds_sum request_prefill_time_seconds_sum
    request_decode_time_seconds_sum request_inference_time_seconds_bucket request_max_num_generation_tokens_sum
    prefix_cache_queries_total prefix_cache_hits_total prompt_tokens_cached_total prompt_tokens_by_source_total
    num_preemptions_total
"""


@pytest.fixture(scope="module")
def service(model: Path):
    """It has done everything that is counted: an answer is parked for another one, a cancel, evictions."""
    settings = {"cache_memory_mb": 1, "cache_every": 1}  # room for some hundred states
    with serving_here(model, slots=1, metrics=("xlstm", "vllm"), settings=settings) as here:
        low = here.send("/v1/completions", {"prompt": "a", "max_tokens": 4000, "stream": True, "ignore_eos": True})
        while not value(here, "xlstm:generation_tokens_total"):
            time.sleep(0.01)
        assert here.complete("b" * 90, max_tokens=5, n=2, priority=-5).status == 200  # the lowest goes first
        low.close()
        here.complete("b" * 90 + "c" * 50, max_tokens=2)
        for word in "de":
            here.complete(word * 3000, max_tokens=1)
        while here.desk.under_way:
            time.sleep(0.01)
        yield here


def samples(service: Here) -> dict[str, list[tuple[dict[str, str], float]]]:
    found = defaultdict(list)
    for family in text_string_to_metric_families(service.ask("/metrics").body.decode()):
        for sample in family.samples:
            found[sample.name].append((sample.labels, sample.value))
    return found


def value(service: Here, name: str, **labels: str) -> float:
    """The sum of the samples with these labels."""
    return sum(v for have, v in samples(service)[name] if labels.items() <= have.items())


def test_every_figure_of_the_dashboard_is_in_a_services_answer(service):
    found, asked = samples(service), {}
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        for target in panel.get("targets", []):
            text = target["expr"].replace("$__rate_interval", "1m")
            promql_parser.parse(text)
            names = re.findall(r"xlstm:\w+", text)
            groups = re.findall(r"by \(([\w, ]+)\)", text)
            asked |= {name: {word.strip() for group in groups for word in group.split(",")} for name in names}
    assert len(asked) > 15
    for name, labels in asked.items():
        assert found[name], name
        assert labels | {"model_name"} <= set(found[name][0][0]), name
        assert all(have["model_name"] == "tiny" for have, _ in found[name])


def test_every_figure_of_the_runbook_is_in_a_services_answer(service):
    found = samples(service)
    families = {re.sub("_(bucket|sum|count)$", "", name) for name in found}
    named = set(re.findall(r"`(xlstm:\w+)`", RUNBOOK.read_text()))
    assert len(named) > 12
    assert named <= families


def test_what_dashboards_made_for_vllm_ask_for_is_there(service):
    found = samples(service)
    assert [name for name in VLLMS.split() if f"vllm:{name}" not in found] == []
    for name in ("generation_tokens_total", "request_success_total"):
        assert value(service, f"vllm:{name}") == value(service, f"xlstm:{name}")
    assert value(service, "vllm:num_preemptions_total") == value(service, "xlstm:parked_total")


def test_figures_are_those_of_what_was_done(service):
    assert value(service, "xlstm:parked_total") >= 1
    assert value(service, "xlstm:cancelled_total", phase="decode") == 1
    by_source = {labels["source"]: v for labels, v in samples(service)["xlstm:prompt_tokens_by_source_total"]}
    assert sum(by_source.values()) == value(service, "xlstm:prompt_tokens_total") == 1 + 90 + 140 + 2 * 3000
    assert by_source["computed"] + value(service, "xlstm:prompt_tokens_cached_total") == sum(by_source.values())
    assert value(service, "xlstm:prefix_cache_hits_total") == value(service, "xlstm:prompt_tokens_cached_total") > 0
    made = value(service, "xlstm:request_generation_tokens_sum")
    assert made == 5 + 5 + 2 + 1 + 1
    assert value(service, "xlstm:request_max_num_generation_tokens_sum") == made - 5  # of two of 5, one counts
    decoded = value(service, "xlstm:step_seconds_count", kind="decode")
    assert decoded > 2 * 4
    assert value(service, "xlstm:step_seconds_count", kind="prefill") >= 2 * 3000 // 32
    assert 0 < value(service, "xlstm:stall_seconds_count") < decoded
    assert value(service, "xlstm:snapshot_seconds_count") > 5
    assert value(service, "xlstm:evictions_total", tier="memory") == service.engine.cache.evicted["memory"] > 0
    assert value(service, "xlstm:slots_used") == 0
    assert value(service, "xlstm:slots_total") == 1


def test_a_stall_is_what_answers_wait_for_a_prompt(model):
    with serving_here(model) as here:
        here.complete("a", max_tokens=50, ignore_eos=True)
        calm = value(here, "xlstm:stall_seconds_sum") / value(here, "xlstm:stall_seconds_count")
        stream = here.send("/v1/completions", {"prompt": "a", "max_tokens": 4000, "stream": True, "ignore_eos": True})
        before = value(here, "xlstm:stall_seconds_sum"), value(here, "xlstm:stall_seconds_count")
        here.complete("b" * 3200, max_tokens=1)
        stream.close()
        after = value(here, "xlstm:stall_seconds_sum"), value(here, "xlstm:stall_seconds_count")
        beside = (after[0] - before[0]) / max(1, after[1] - before[1])
        assert beside > 3 * calm  # each token waited for a window of the prompt, where before there was none
        windows_s = value(here, "xlstm:step_seconds_sum", kind="prefill")
        assert windows_s > 0.1 * value(here, "xlstm:request_prefill_time_seconds_sum")  # the rest is others' steps
