"""Every option has an effect or is refused: each setting alone, beside each other one, and in every kind of run.

What a run does is its Setup and its RunPlan. A setting that leaves both as they were has no effect.
"""

from collections.abc import Callable
from dataclasses import fields
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from conftest import Ran
from tiny import make_model

from xlstm_ray.choose import Cluster, setup_of
from xlstm_ray.errors import UsageError
from xlstm_ray.explain import explain
from xlstm_ray.plan import RunPlan, choose_plan
from xlstm_ray.settings import table

# Another value of each setting than the one that a run has without it.
VALUES: dict[str, Any] = {
    "device": "cuda", "dtype": "bfloat16", "chunkwise_backend": "queued_compiled_steps", "tile_size": 64,
    "chunk_size": 8, "heads_per_band": 2, "workers": 3, "streams": 1, "t_inner": 4, "autoscale": True,
    "autoscale_again": True, "warmup": False, "cuda_graphs": False,
    "enable_mps_fallback": True, "mem_watchdog": False, "mem_soft_pct": 0.5,
    "mem_hard_pct": 0.95, "mem_soft_mb": 99_000, "mem_hard_mb": 99_500, "mem_poll_ms": 7, "mem_action": "empty_cache",
    "shrink_on_soft": False, "min_chunk": 4, "mem_log": Path("m.csv"), "force": True, "stats_log": Path("s.csv"),
    "overwrite": True, "profile": "high-memory-256gb", "stages": 2, "spans": 2, "threads": 1, "ray_local_mode": False,
    "ray_autoshutdown": False, "ray_dashboard": True, "ray_dashboard_port": 9999, "ray_keep_alive": True,
    "ray_address": "10.0.0.1:1", "ray_token_path": Path("token"), "ray_state_dir": Path("heads"),
    "ray_temp_dir": Path("/t"), "actors_per_device": 2, "gpu_direct": False, "journal": Path("j"), "journal_every": 3,
    "resume": Path("r"), "cache_dir": Path("c"), "cache_memory_mb": 9, "cache_disk_mb": 9, "cache_every": 3,
    "cache_match": "nearest", "states_mb": 5,
}  # fmt: skip
RAY = {"chunkwise_backend": "ray_compiled_steps", "ray_local_mode": False}
RUNS: dict[str, dict[str, Any]] = {
    "the reference": {"chunkwise_backend": "native"},
    "bands in this process": {"chunkwise_backend": "queued_compiled_steps", "heads_per_band": 1},
    "a head of its own": RAY,
    "somebody's head": {"chunkwise_backend": "ray_compiled_steps", "ray_address": "10.0.0.2:2"},
}
SAME = {  # pairs of which one says what the other one says already, and both are right
    frozenset({"autoscale", "autoscale_again"}): "again is more",
    frozenset({"profile", "shrink_on_soft"}): "a value that the profile has too",
    frozenset({"ray_address", "ray_local_mode"}): "not in this process",
    frozenset({"ray_autoshutdown", "ray_keep_alive"}): "an older name",
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two models; only their configuration is read."""
    directories = [tmp_path_factory.mktemp("model") for _ in range(2)]
    for n, directory in enumerate(directories):
        make_model(directory, hidden_size=32, num_hidden_layers=2 + n, num_heads=4, chunk_size=16)
    return directories


def run_of(**asked: Any) -> tuple[Any, ...] | None:
    """What a run with these settings does; None: it is refused."""
    try:
        setup = setup_of(**asked)
        setup.settings.require_output()
        cluster = Cluster({"GPU": 1.0}, [4.0]) if setup.head else None
        plan: RunPlan = choose_plan(setup, None, base=lambda: 0, cluster=cluster)
    except UsageError:
        return None
    return *setup._replace(settings=None)[1:], *(getattr(plan, field.name) for field in fields(plan))  # type: ignore


def test_there_is_a_value_for_every_setting() -> None:
    assert [*VALUES] == [name for name in table() if name != "model"]


@pytest.mark.parametrize("run", RUNS)
def test_a_setting_changes_the_run_or_is_refused(run: str, models: list[Path]) -> None:
    base = {"model": models[0], "device": "cpu", "dtype": "float32", **RUNS[run]}
    values = {**VALUES, "model": models[1]}
    plain = run_of(**base)
    assert plain is not None
    alone = {name: run_of(**{**base, name: value}) for name, value in values.items() if base.get(name) != value}
    silent = [name for name, made in alone.items() if made == plain]
    assert [name for name in silent if not any(name in pair and pair & {*base} for pair in SAME)] == []
    assert sum(made is not None for made in alone.values()) > len(alone) / 2
    for one, other in combinations((name for name, made in alone.items() if made not in (None, plain)), 2):
        both = run_of(**{**base, one: values[one], other: values[other]})
        if frozenset({one, other}) not in SAME and both is not None:
            silent += [f"{one} beside {other}" for made in [alone[other]] if both == made]
            silent += [f"{other} beside {one}" for made in [alone[one]] if both == made]
    assert [name for name in silent if " " in name] == []


@pytest.mark.parametrize("run", RUNS)
def test_each_form_of_stages_changes_the_run_or_is_refused(run: str, models: list[Path]) -> None:
    """By number, by the blocks of each, and by measured speed; of a model with three blocks."""
    base = {"model": models[1], "device": "cpu", "dtype": "float32", **RUNS[run]}
    forms = [run_of(**base), *(run_of(**base, stages=stages) for stages in (2, (2, 1), (1, 2), "auto"))]
    if "ray" in base["chunkwise_backend"]:
        assert None not in forms
        assert not any(one == other for one, other in combinations(forms, 2))
    else:
        assert forms[1:] == [None] * 4


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        ("4,4", "`stages` is 4,4, which is 8 blocks, but the model has 3"),
        ("9", "`stages` is 9, but the model has 3 blocks"),
        ("auto", "`stages` is auto, which measures the nodes of a grid, but all work is in this process"),
        ("2,", "`stages` is '2,'; allowed: a whole number from 1 to 65536, the blocks of each stage with commas"),
    ],
)
def test_stages_that_cannot_be_are_refused(stages: str, said: str, models: list[Path]) -> None:
    with pytest.raises(UsageError) as refused:
        setup_of(model=models[1], chunkwise_backend="ray_compiled_steps", ray_local_mode=True, stages=stages)
    assert said in str(refused.value)


def test_config_says_when_and_by_what_auto_is_decided(models: list[Path]) -> None:
    rows = explain(setup_of(model=models[1], device="cpu", **RUNS["a head of its own"], stages="auto"))
    assert rows["stages"] == ("auto", ("flag", "`stages`; by each node's measured speed and memory, when a run begins"))
    by_hand = explain(setup_of(model=models[1], device="cpu", **RUNS["a head of its own"], stages="2,1"))
    assert by_hand["stages"] == ((2, 1), ("flag", "`stages`"))


# Beside what the plan shows: options of commands, and settings that a command has no use for.
REFUSED = {
    "prefill -p a --overwrite": "--overwrite has no effect without an output",
    "generate -p a --overwrite": "--overwrite has no effect without an output",
    "bench --overwrite": "--overwrite has no effect without an output",
    "prefill -f lines --jsonl --json": "--json has no effect beside --jsonl",
    "generate -f lines --jsonl --json": "--json has no effect beside --jsonl",
    "generate -f lines --jsonl --no-mem-shrink": "--no-mem-shrink has no effect with --jsonl",
    "generate -f lines --jsonl --min-chunk 8": "--min-chunk has no effect with --jsonl",
    "generate -f lines --jsonl --ordered -o s": "--ordered has no effect on lines that end in one state",
    "prefill -p a --cache-memory-mb 9": "--cache-memory-mb has no effect without --cache-dir here",
    "prefill -f lines --jsonl --cache-memory-mb 9": "--cache-memory-mb has no effect without --cache-dir here",
    "generate -p a --cache-memory-mb 9": "--cache-memory-mb has no effect without --cache-dir here",
    "generate -f lines --jsonl --cache-memory-mb 9 -o s": "--cache-memory-mb has no effect without --cache-dir here",
    "prefill -p a --states-mb 9": "--states-mb has no effect here: only `xlstm-ray serve` has documents",
    "generate -f lines --jsonl --states-mb 9": "--states-mb has no effect here",
    "prefill -p a --no-mem-watchdog --no-mem-shrink": "--no-mem-shrink has no effect without the watchdog",
    "prefill -p a --device cpu --workers 2": "--workers is 2, but 4 of 4 heads a band make 1 band(s)",
    "bench --lengths 8 --backends native --device cpu --workers 2": "--workers is 2, but 4 of 4 heads a band",
    "prefill -p a --journal j --resume j": "--journal and --resume were both given",
    "prefill -p a --ray-local-mode --ray-address h:1": "--ray-local-mode has no effect beside --ray-address",
}


@pytest.mark.parametrize("words", REFUSED)
def test_an_option_of_a_command_is_refused(
    words: str, run: Callable[..., Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("lines").write_text('"a"\n')
    assert REFUSED[words] in run(*words.split()).error
