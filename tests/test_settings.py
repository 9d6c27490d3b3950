"""Settings: which source wins (flag, variable, file, profile, default), and the errors for wrong values."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import programs
import pytest
import torch
from programs import PROGRAM
from tiny import make_model

from xlstm_ray import load
from xlstm_ray.choose import DEMO_MODEL, setup_of
from xlstm_ray.declare import Setting, Source
from xlstm_ray.errors import UsageError
from xlstm_ray.explain import explain
from xlstm_ray.plan import RunPlan, choose_plan
from xlstm_ray.settings import Settings, table

# The Apple guide's variables: name -> setting, default, another value as text, that value.
VARIABLES = {
    "XLSTM_MPS_WORKERS": ("workers", 6, "3", 3),
    "XLSTM_MPS_HEADS_PER_BAND": ("heads_per_band", None, "2", 2),
    "XLSTM_MPS_STREAMS": ("streams", None, "2", 2),
    "XLSTM_MPS_AUTOSCALE": ("autoscale", False, "1", True),
    "XLSTM_MPS_WARMUP": ("warmup", True, "0", False),
    "XLSTM_MEM_WATCHDOG": ("mem_watchdog", True, "0", False),
    "XLSTM_MEM_SOFT_PCT": ("mem_soft_pct", 0.85, "0.5", 0.5),
    "XLSTM_MEM_HARD_PCT": ("mem_hard_pct", 0.92, "1", 1.0),
    "XLSTM_MEM_SOFT_MB": ("mem_soft_mb", None, "215000", 215_000),
    "XLSTM_MEM_HARD_MB": ("mem_hard_mb", None, "235000", 235_000),
    "XLSTM_MEM_POLL_MS": ("mem_poll_ms", 200, "50", 50),
    "XLSTM_MEM_ACTION": ("mem_action", ("warn", "empty_cache"), "warn", ("warn",)),
    "XLSTM_MIN_CHUNK": ("min_chunk", 8, "16", 16),
    "XLSTM_SHRINK_ON_SOFT": ("shrink_on_soft", True, "0", False),
    "XLSTM_CHUNKWISE_BACKEND": ("chunkwise_backend", None, "native", "native"),
    "XLSTM_T_INNER": ("t_inner", 8, "4", 4),
    "XLSTM_RAY_LOCAL_MODE": ("ray_local_mode", True, "0", False),
    "XLSTM_RAY_AUTOSHUTDOWN": ("ray_autoshutdown", True, "0", False),
    "XLSTM_RAY_DASHBOARD": ("ray_dashboard", False, "1", True),
    "XLSTM_RAY_DASHBOARD_PORT": ("ray_dashboard_port", None, "8265", 8265),
    "PYTORCH_ENABLE_MPS_FALLBACK": ("enable_mps_fallback", False, "1", True),
}
FLAGS = (
    "--workers --heads-per-band --chunkwise-backend --chunk-size --tile-size --t-inner --mem-soft-mb --mem-hard-mb "
    "--mem-soft-pct --mem-hard-pct --mem-action --no-mem-shrink --mem-poll-ms --no-mem-watchdog --min-chunk --mem-log "
    "--autoscale --no-warmup --profile --force --stats-log --config --stages --threads --ray-local-mode "
    "--no-ray-local-mode --ray-dashboard --ray-dashboard-port --ray-keep-alive --ray-address --ray-token-path "
    "--actors-per-device --journal --journal-every --resume"
).split()


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)


def program(*words: object, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [PROGRAM, *map(str, words)]
    env = {**os.environ, "COLUMNS": "200", **variables}
    return programs.run(command, capture_output=True, text=True, timeout=60, env=env)


@pytest.mark.parametrize("variable", VARIABLES)
def test_every_variable_of_the_guide_has_its_default_and_is_read(variable, monkeypatch):
    name, default, text, value = VARIABLES[variable]
    assert getattr(Settings.make(), name) == default
    assert Settings.make().source(name).kind == "default"
    monkeypatch.setenv(variable, text)
    settings = Settings.make()
    assert getattr(settings, name) == value
    assert settings.source(name) == ("environment", variable)


@pytest.mark.parametrize("command", ["prefill", "generate", "config"])
def test_every_flag_is_an_option_of_the_command(command):
    words = program(command, "--help").stdout.replace("/", " ").split()
    assert not set(FLAGS) - set(words)


def test_each_source_wins_over_the_next(tmp_path, monkeypatch):
    file = tmp_path / "settings.toml"
    file.write_text('profile = "high-memory-256gb"\nmem_soft_mb = 300\nmem_poll_ms = 30\nt_inner = 3\n')
    monkeypatch.setenv("XLSTM_MEM_POLL_MS", "20")
    monkeypatch.setenv("XLSTM_T_INNER", "2")
    settings = Settings.make(config=file, t_inner=1)
    found = {name: (getattr(settings, name), settings.source(name).kind) for name in table()}
    assert found["t_inner"] == (1, "flag")
    assert found["mem_poll_ms"] == (20, "environment")
    assert found["mem_soft_mb"] == (300, "file")
    assert found["mem_hard_mb"] == (235_000, "profile")
    assert found["mem_action"] == (("warn",), "profile")
    assert found["shrink_on_soft"] == (False, "profile")
    assert found["chunk_size"] == (64, "profile")
    assert found["heads_per_band"] == (4, "profile")
    assert found["min_chunk"] == (8, "default")


def test_a_state_goes_before_the_environment_and_after_flags(monkeypatch):
    monkeypatch.setenv("XLSTM_MPS_HEADS_PER_BAND", "1")
    settings = Settings.make(state=("book.state", {"heads_per_band": 2, "tile_size": 64}), tile_size=32)
    assert (settings.heads_per_band, settings.source("heads_per_band")) == (2, ("state", "book.state"))
    assert (settings.tile_size, settings.source("tile_size").kind) == (32, "flag")


def test_config_prints_values_and_where_they_came_from(tmp_path):
    file = tmp_path / "settings.toml"
    file.write_text('mem_log = "log.csv"\nmem_action = ["warn"]\n')
    words = ("config", "--json", "--config", file, "--device", "cpu", "--tile-size", 128, "--no-warmup")
    done = program(*words, "--heads-per-band", 2, XLSTM_MPS_WORKERS="2")
    rows = json.loads(done.stdout)
    assert list(rows) == list(table())
    found = {name: (row["value"], row["source"], row["where"]) for name, row in rows.items()}
    assert found["tile_size"] == (128, "flag", "--tile-size")
    assert found["warmup"] == (False, "flag", "--no-warmup")
    assert found["workers"] == (2, "environment", "XLSTM_MPS_WORKERS")
    assert found["mem_log"] == (str(tmp_path / "log.csv"), "file", str(file))  # relative to the file
    assert found["mem_action"] == (["warn"], "file", str(file))
    assert found["chunk_size"][:2] == (64, "model")
    assert found["chunkwise_backend"][:2] == ("queued_compiled_chunks", "default")
    assert (found["t_inner"][0], found["t_inner"][1]) == (None, "default")
    lines = program("config", "--tile-size", 128).stdout.splitlines()
    assert len(lines) == len(rows)
    assert ["tile_size", "128", "flag", "--tile-size"] in [line.split() for line in lines]


def test_config_shows_the_plan_that_a_run_uses_and_why(tmp_path, monkeypatch):
    asked = {"device": "cpu", "chunkwise_backend": "native", "dtype": "float32"}
    for more in ({}, {"heads_per_band": 2}, {"heads_per_band": 1, "workers": 3}, {"journal": tmp_path / "j"}):
        shown = explain(setup_of(**asked, **more))
        with load(**asked, **more) as lm:
            used = {name: shown[name][0] for name in ("workers", "tile_size", "chunk_size", "heads_per_band", "dtype")}
            sizes = lm.numerics.tile_size, lm.numerics.chunk_size, lm.numerics.heads_per_band
            assert tuple(used.values()) == (lm.workers, *sizes, lm.numerics.dtype)
            assert shown["threads"][0] == max(1, torch.get_num_threads() // lm.workers)
    value, source = explain(setup_of(**asked))["workers"]
    assert (value, source) == (1, ("default", "at most one for each band: 6, but 1 band(s)"))
    assert explain(setup_of(**asked, journal=tmp_path / "k"))["journal_every"] == (
        16,
        ("default", "by device, cpu"),
    )
    others = explain(setup_of(**asked, cache_dir=tmp_path / "c", mem_hard_mb=9000, shrink_on_soft=False))
    assert {name: others[name][0] for name in ("cache_memory_mb", "cache_disk_mb", "mem_hard_pct", "min_chunk")} == {
        "cache_memory_mb": 256,
        "cache_disk_mb": 4096,
        "mem_hard_pct": None,
        "min_chunk": None,
    }
    bare = explain(setup_of(**asked, mem_watchdog=False))
    assert {name: bare[name][0] for name in ("mem_soft_pct", "mem_action", "cache_match", "warmup")} == {
        "mem_soft_pct": None,
        "mem_action": None,
        "cache_match": None,
        "warmup": False,
    }
    assert not [
        name
        for name, (_, source) in bare.items()
        if getattr(setup_of(**asked).settings, name) is None and not source.where
    ]
    assert bare["tile_size"][1] == ("default", "by device")
    monkeypatch.setenv("XLSTM_RAY_LOCAL_MODE", "0")
    on_ray = explain(setup_of(**asked | {"chunkwise_backend": "ray_compiled_chunks"}, stages=2, threads=1))
    assert {name: on_ray[name][0] for name in ("workers", "threads", "journal_every", "shrink_on_soft")} == {
        "workers": None,
        "threads": 1,
        "journal_every": 16,
        "shrink_on_soft": True,
    }


def test_config_shows_why_kernels_are_not_the_fast_ones_and_that_they_are_not_compiled(monkeypatch):
    """On a GPU both may be so; here a plan of one stands in."""
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    misfit = "the chunk size is 32; the Triton kernels take 64, 128 or 256"

    def on_gpu(*args: Any, **more: Any) -> RunPlan:
        return replace(choose_plan(*args, **more), misfit=misfit)

    monkeypatch.setattr("xlstm_ray.explain.choose_plan", on_gpu)
    _, source = explain(setup_of(device="cpu", chunkwise_backend="queued_compiled_chunks"))["chunkwise_backend"]
    assert f"{misfit}; TORCHDYNAMO_DISABLE=1: queued_compiled_chunks is not compiled" in source.where


def test_a_switch_of_a_file_can_be_undone_by_a_flag(tmp_path):
    file = tmp_path / "settings.toml"
    file.write_text("force = true\n")
    row = json.loads(program("config", "--json", "--config", file, "--no-force").stdout)["force"]
    assert (row["value"], row["source"], row["where"]) == (False, "flag", "--no-force")


# Another value of every setting that the guide has no variable for, as text, and what it means.
OTHERS = {
    "model": ("a/b/c", Path("a/b/c")),  # a/b is a name on the hub
    "device": ("cpu", "cpu"),
    "dtype": ("float32", "float32"),
    "tile_size": ("64", 64),
    "chunk_size": ("32", 32),
    "mem_log": ("m.csv", Path("m.csv")),
    "force": ("1", True),
    "stats_log": ("s.csv", Path("s.csv")),
    "profile": ("high-memory-256gb", "high-memory-256gb"),
    "stages": ("2", 2),
    "threads": ("2", 2),
    "ray_keep_alive": ("true", True),
    "ray_address": ("h:1", "h:1"),
    "ray_token_path": ("t", Path("t")),
    "actors_per_device": ("2", 2),
    "journal": ("j", Path("j")),
    "journal_every": ("2", 2),
    "resume": ("j", Path("j")),
}


def another(row: Setting) -> tuple[str, Any]:
    """A value for a setting that is not in OTHERS."""
    if row.kind is str:
        *_, word = row.allowed.split(", ")
        return word, word
    return {bool: (str(int(not row.default)), not row.default), int: ("2", 2), Path: ("f", Path("f"))}[row.kind]


@pytest.mark.parametrize("name", [name for name, row in table().items() if row.env not in VARIABLES])
def test_every_setting_has_a_variable_and_a_key(name, tmp_path, monkeypatch):
    text, value = OTHERS[name] if name in OTHERS else another(table()[name])
    monkeypatch.setenv(f"XLSTM_{name.upper()}", text)
    settings = Settings.make()
    assert getattr(settings, name) == value
    assert settings.source(name) == ("environment", f"XLSTM_{name.upper()}")
    monkeypatch.delenv(f"XLSTM_{name.upper()}")
    plain = str(value) if isinstance(value, Path) else value
    (tmp_path / "s.toml").write_text(f"{name} = {json.dumps(plain)}\n")
    from_file = Settings.make(config=tmp_path / "s.toml")
    assert getattr(from_file, name) == (tmp_path / value if isinstance(value, Path) else value)


def test_no_setting_is_without_a_variable():
    assert len({row.env for row in table().values() if row.env}) == len(table())


NOT_OURS = {
    "XLSTM_WORKERS": "did you mean XLSTM_MPS_WORKERS",
    "XLSTM_MEM_SOFT_PERCENT": "did you mean XLSTM_MEM_SOFT_PCT",
    "XLSTM_QQQ": "xlstm-ray config --json lists the names",
}


@pytest.mark.parametrize("variable", NOT_OURS)
def test_a_variable_that_is_not_ours_is_told_once(variable):
    done = program("config", "--json", **{variable: "3"})
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"note: the variable {variable} has no effect")
    assert NOT_OURS[variable] in line
    assert (done.returncode, json.loads(done.stdout)["workers"]["source"]) == (0, "default")


def test_a_python_program_is_told_of_each_variable_once():
    code = "import xlstm_ray; xlstm_ray.load(device='cpu', chunkwise_backend='native')"
    env = {**os.environ, **dict.fromkeys(NOT_OURS, "3")}
    python = programs.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=env)
    for variable in NOT_OURS:
        assert python.stderr.count(f"the variable {variable} has no effect") == 1


def test_an_empty_variable_is_not_a_path(monkeypatch):
    monkeypatch.setenv("XLSTM_MODEL", "")
    with pytest.raises(UsageError, match="^XLSTM_MODEL is ''; allowed: a text that is not empty"):
        Settings.make()


def test_only_the_variables_of_the_table_are_read(monkeypatch):
    for variable in ("workers", "WORKERS", "device", "DEVICE", "sources", "xlstm_mps_workers"):
        monkeypatch.setenv(variable, "3")
    assert Settings.make() == Settings()
    assert not Settings.make().sources


def test_what_the_model_says_is_shown_as_the_models(tmp_path):
    # The demo model's configuration, with a backend of ours in it.
    demo = DEMO_MODEL / "config.json"
    config = {**json.loads(demo.read_text()), "chunkwise_kernel": "chunkwise--queued_compiled_steps"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = explain(setup_of(model=tmp_path, device="cpu", tile_size=64))
    assert found["chunkwise_backend"] == ("queued_compiled_steps", ("model", str(tmp_path / "config.json")))
    assert found["heads_per_band"] == (config["num_heads"], ("default", "all; 4 on mps"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("tile_sizes = 64", ("'tile_sizes'", "tile_size?")),
        ("mem-log = 'a'", ("'mem-log'", "did you mean mem_log")),
        ("Tile_Size = 64", ("'Tile_Size'", "did you mean tile_size")),
        ("XLSTM_MPS_WORKERS = 2", ("'XLSTM_MPS_WORKERS'", "there are: model")),
        ("sources = {}", ("'sources'",)),
        ("model = ''", ("model is ''", "not empty")),
        ("profile = []", ("profile is []",)),
        ("nonsense = 1", ("'nonsense'", "there are: model, device")),
        ("enable_mps_fallback = true", ("'enable_mps_fallback'",)),  # torch reads the variable itself
        ("tile_size = '64'", ("tile_size", "'64'", "whole number from 1 to 65536")),
        ("tile_size = 64.0", ("tile_size", "64.0", "whole number")),
        ("tile_size = true", ("tile_size", "True", "whole number")),
        ("warmup = 1", ("warmup", "1", "true or false")),
        ("mem_soft_pct = 85", ("mem_soft_pct", "85", "0.85 is 85 %")),
        ("mem_action = ['shout']", ("mem_action", "shout", "warn, empty_cache")),
        ("mem_action = []", ("mem_action", "one or more of")),
        ("[model]\npath = 'a'", ("model", "a text")),
        ("profile = 'huge'", ("profile", "huge", "high-memory-256gb")),
        ("tile_size = \n", ("is not TOML", "line 1")),
        ("a = 1\na = 2", ("is not TOML",)),
        ("\xff", ("is not TOML",)),
        ("a = " + "[" * 10_000, ("is not TOML",)),
    ],
)
def test_a_wrong_file_is_refused_with_its_name_and_key(text, said, tmp_path):
    file = tmp_path / "settings.toml"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(UsageError) as refused:
        Settings.make(config=file)
    assert str(file) in str(refused.value)
    assert "\n" not in str(refused.value)
    for part in said:
        assert part in str(refused.value)


def test_a_file_that_cannot_be_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, why in ((tmp_path / "none.toml", "No such file"), (tmp_path, "directory"), (tmp_path / "pipe", "pipe")):
        with pytest.raises(UsageError, match=why):
            Settings.make(config=path)


@pytest.mark.parametrize(
    ("variable", "text"),
    [
        ("XLSTM_MPS_WARMUP", "perhaps"),
        ("XLSTM_MEM_SOFT_PCT", "0"),
        ("XLSTM_MEM_SOFT_PCT", "nan"),
        ("XLSTM_MEM_HARD_PCT", "1.01"),
        ("XLSTM_MEM_ACTION", ""),
        ("XLSTM_MEM_ACTION", "warn,,empty_cache"),
        ("XLSTM_MEM_POLL_MS", "0"),
        ("XLSTM_RAY_DASHBOARD_PORT", "65536"),
        ("XLSTM_CHUNKWISE_BACKEND", ""),
        ("XLSTM_T_INNER", "1e3"),
        ("XLSTM_MEM_POLL_MS", "1e3"),
        ("XLSTM_MPS_STREAMS", "null"),
    ],
)
def test_a_wrong_variable_is_refused_by_its_name_with_what_is_allowed(variable, text, monkeypatch):
    monkeypatch.setenv(variable, text)
    with pytest.raises(UsageError, match=f"^{variable} is {text!r}; allowed: "):
        Settings.make()


def test_a_value_that_only_the_model_shows_to_be_wrong_is_named_by_its_source(monkeypatch, tmp_path):
    monkeypatch.setenv("XLSTM_MPS_HEADS_PER_BAND", "64")
    with pytest.raises(UsageError, match="^XLSTM_MPS_HEADS_PER_BAND is 64, but the model has"):
        load(device="cpu")
    monkeypatch.delenv("XLSTM_MPS_HEADS_PER_BAND")
    file = tmp_path / "settings.toml"
    file.write_text("tile_size = 100")
    with pytest.raises(
        UsageError, match="settings.toml: tile_size is 100, which is not a multiple of the chunk size 64"
    ):
        explain(setup_of(config=file, device="cpu"))
    monkeypatch.setenv("XLSTM_CHUNKWISE_BACKEND", "eager")
    with pytest.raises(UsageError, match="^XLSTM_CHUNKWISE_BACKEND is 'eager'; there are: queued_"):
        load(device="cpu")


def test_streams_are_refused_where_there_are_none(monkeypatch):
    monkeypatch.setenv("XLSTM_MPS_STREAMS", "2")
    with pytest.raises(UsageError, match="^XLSTM_MPS_STREAMS is 2, but torch has streams on cuda only, not on cpu"):
        load(device="cpu", chunkwise_backend="native")


def test_what_is_for_gpus_is_refused_elsewhere():
    why = "the Triton kernels are for cuda, and the device is cpu"
    with pytest.raises(UsageError, match=f"^`chunkwise_backend` is 'queued_triton_chunks', but {why}"):
        load(device="cpu", chunkwise_backend="queued_triton_chunks")
    with pytest.raises(UsageError, match=f"^`dtype` is 'float8', but {why}; use bfloat16"):
        load(device="cpu", dtype="float8")
    with pytest.raises(UsageError, match="^`cuda_graphs=False` has no effect: the device is cpu; leave it out"):
        load(device="cpu", cuda_graphs=False)
    assert explain(setup_of(device="cpu"))["cuda_graphs"] == (False, Source("default", "the device is cpu"))


def test_unrolling_is_refused_where_nothing_is_unrolled(monkeypatch):
    with pytest.raises(UsageError, match="^`t_inner` is 4, but queued_compiled_chunks unrolls no steps of this model"):
        load(device="cpu", t_inner=4, chunkwise_backend="queued_compiled_chunks")
    monkeypatch.setenv("XLSTM_T_INNER", "4")  # a shell's own setting may stay there
    assert load(device="cpu", chunkwise_backend="native").t_inner == 4


def test_options_of_the_watchdog_without_it(monkeypatch):
    monkeypatch.setenv("XLSTM_MEM_WATCHDOG", "0")
    with pytest.raises(UsageError, match="^`mem_log` has no effect without the watchdog"):
        Settings.make(mem_log="a.csv")
    for name in ({"shrink_on_soft": True}, {"min_chunk": 16}):
        with pytest.raises(UsageError, match="^`(shrink_on_soft|min_chunk)` has no effect without the watchdog"):
            Settings.make(**name)
    monkeypatch.setenv("XLSTM_MEM_SOFT_PCT", "0.5")  # a shell's own setting may stay there
    monkeypatch.setenv("XLSTM_MIN_CHUNK", "16")
    assert not Settings.make().mem_watchdog


def test_the_least_chunk_is_refused_where_nothing_shrinks():
    with pytest.raises(UsageError, match="^`min_chunk` has no effect if nothing shrinks .`shrink_on_soft=False`"):
        Settings.make(shrink_on_soft=False, min_chunk=16)


def test_doctor_refuses_what_only_its_table_of_kernels_uses():
    done = program("doctor", "--tile-size", 128)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: --tile-size is for the table of kernels: add --kernels")


def test_without_warm_up_kernels_compile_on_first_use(tmp_path):
    make_model(tmp_path, v_dim_factor=2.0, use_bias=True)  # of sizes that test_parity.py compiles too
    cold = load(tmp_path, device="cpu", heads_per_band=3, tile_size=16, warmup=False).prefill("Once upon a time")
    warm = load(tmp_path, device="cpu", heads_per_band=3, tile_size=16).prefill("Once upon a time")
    assert cold.stats.compile_s == 0
    assert warm.stats.compile_s > 0
    assert cold.state.digest() == warm.state.digest()


@pytest.mark.skipif(sys.platform != "linux", reason="torch has another OpenMP there")
@pytest.mark.parametrize(
    ("given", "first", "said"),
    [
        ({}, "xlstm_ray", "GOMP_SPINCOUNT = '10000'"),
        ({"GOMP_SPINCOUNT": "77"}, "xlstm_ray", "GOMP_SPINCOUNT = '77'"),
        ({"OMP_WAIT_POLICY": "active"}, "xlstm_ray", "OMP_WAIT_POLICY = 'ACTIVE'"),
        ({}, "xlstm_ray.actors.actor", "GOMP_SPINCOUNT = '10000'"),  # what Ray's worker imports
        ({}, "torch, xlstm_ray", "GOMP_SPINCOUNT = '300000'"),  # too late: docs/using.md says so
    ],
)
def test_threads_that_wait_for_each_other_sleep_soon(given, first, said):
    """The variables that OpenMP reports to have read."""
    env = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    env |= {"OMP_DISPLAY_ENV": "verbose"} | given
    code = f"import {first}; import torch"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=env)
    assert said in done.stderr


def test_a_command_looks_for_garbage_seldom():
    code = "import atexit, gc; from xlstm_ray.cli.app import main; "
    code += "atexit.register(lambda: print(gc.get_threshold()[0] > 10_000)); main()"
    done = subprocess.run([sys.executable, "-c", code, "--version"], capture_output=True, text=True, timeout=60)
    assert done.stdout.endswith("\nTrue\n"), done


def test_torchs_own_variables_are_passed_on():
    code = (
        "import xlstm_ray; xlstm_ray.load(device='cpu', chunkwise_backend='native'); import torch._dynamo.config as c; "
    )
    code += "import logging; print(c.verbose, logging.getLogger('torch._dynamo').level)"
    env = {**os.environ, "TORCH_LOGS": "+dynamo", "TORCHDYNAMO_VERBOSE": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=env)
    assert done.stdout.split() == ["True", "10"], done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become a user without a name")
def test_a_user_without_a_name_and_a_home_has_caches():
    code = "import os; from xlstm_ray.directories import cache_dir, compile_cache_dir; os.setuid(12345); "
    code += "print(cache_dir()); print(compile_cache_dir())"
    env = {name: value for name, value in os.environ.items() if name in ("PATH", "PYTHONPATH")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=env)
    assert done.returncode == 0, done.stderr
    first, second = map(Path, done.stdout.split())
    assert first.name == "xlstm-ray-12345"
    assert second.name == "torchinductor_uid_12345"
