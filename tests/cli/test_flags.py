"""For the same mistake, a caller from Python reads names of fields, and a person at a terminal reads flags."""

import inspect
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Ran
from test_structure import ROOT, strings, trees
from tiny import make_model

import xlstm_ray
from xlstm_ray.cli.flags import in_flags
from xlstm_ray.errors import FIELD, XlstmRayError
from xlstm_ray.files import JOURNAL_FILE
from xlstm_ray.sampling import Sampling
from xlstm_ray.settings import table

PLAIN: dict[str, Any] = {"device": "cpu", "chunkwise_backend": "native", "tile_size": 16, "chunk_size": 16}
RAY = {"chunkwise_backend": "ray_compiled_chunks"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    make_model(directory, hidden_size=32, num_hidden_layers=2, num_heads=2, eos_token_id=None)
    (directory / "generation_config.json").write_text(json.dumps({"do_sample": True, "temperature": 0.5}))
    return directory


def words(options: dict[str, Any]) -> list[str]:
    """Options of Python as words of a command, by the table of settings and the convention of names."""
    given: list[str] = []
    for name, value in options.items():
        flags = table()[name].flags if name in table() else "--" + name.replace("_", "-")
        yes, _, no = str(flags).partition("/")
        given += [no] if value is False else [yes] if value is True else [yes, str(value)]
    return given


# Settings beside PLAIN; a part of the error that a caller reads, and of the line at a terminal.
LOADING: dict[str, tuple[dict[str, Any], str, str]] = {
    "no multiple": ({"tile_size": 40}, "`tile_size` is 40, which", "--tile-size is 40, which"),
    "bounds": ({"tile_size": 0}, "`tile_size` is 0; allowed", "--tile-size is 0; allowed"),
    "a word": ({"dtype": "int8"}, "`dtype` is 'int8'", "--dtype is 'int8'"),
    "no such backend": (
        {"chunkwise_backend": "fast"},
        "`chunkwise_backend` is 'fast'",
        "--chunkwise-backend is 'fast'",
    ),
    "too many heads": ({"heads_per_band": 9}, "`heads_per_band` is 9", "--heads-per-band is 9"),
    "no model": ({"model": "nowhere"}, "; `model` takes", "; --model takes"),
    "no file": ({"config": Path("no.toml")}, "`config` no.toml: cannot", "--config no.toml: cannot"),
    "of actors": ({"stages": 2}, "use `chunkwise_backend=ray_", "--stages is for the ray_ backends"),
    "no dashboard": ({**RAY, "ray_dashboard_port": 9999}, "add `ray_dashboard=True`", "add --ray-dashboard"),
    "nothing to keep": ({**RAY, "ray_keep_alive": True}, "`ray_keep_alive` in local", "--ray-keep-alive in local"),
    "unrolls nothing": ({"t_inner": 4}, "`chunkwise_backend=queued_", "use --chunkwise-backend queued_"),
    "no journal": ({"journal_every": 3}, "without `journal` or `resume`", "without --journal or --resume"),
    "a switch": ({"shrink_on_soft": False, "min_chunk": 8}, "(`shrink_on_soft=False`)", "(--no-mem-shrink)"),
    "limits": ({"mem_soft_mb": 9, "mem_hard_mb": 8}, "`mem_soft_mb` 9", "--mem-soft-mb 9"),
    "two limits": (
        {"mem_soft_mb": 900, "mem_soft_pct": 0.5},
        "`mem_soft_pct` has no effect beside `mem_soft_mb`",
        "--mem-soft-pct has no effect beside --mem-soft-mb",
    ),
    "nothing to compile": ({"warmup": False}, "`warmup=False` has no effect: native", "--no-warmup has no effect: nat"),
    "no actors": (
        {"ray_local_mode": False},
        "`ray_local_mode=False` is for the ray_ backends",
        "--no-ray-local-mode is for the ray_ backends",
    ),
    "not ours": ({"stats_log": "notes"}, "or `overwrite=True`", "or --overwrite"),
    "two of one name": ({"stats_log": "a", "mem_log": "a"}, "`stats_log` and `mem_log`", "--stats-log and --mem-log"),
}


@pytest.mark.parametrize("mistake", LOADING)
def test_a_mistake_of_a_setting(mistake, model, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("notes").write_text("mine")
    more, field, flag = LOADING[mistake]
    options = {"model": model, **PLAIN, **more}
    with pytest.raises(XlstmRayError) as refused:
        xlstm_ray.load(**options)
    read = str(refused.value)
    assert field in read
    assert "--" not in read
    at_terminal = run("prefill", "--prompt", "abc", *words(options)).error
    assert flag in at_terminal
    assert "`" not in at_terminal


GENERATING: dict[str, tuple[dict[str, Any], str, str]] = {
    "temperature": ({"temperature": -1.0}, "`temperature` is -1.0", "--temperature is -1.0"),
    "top_p": ({"top_p": 2.0}, "`top_p` is 2.0", "--top-p is 2.0"),
    "top_k": ({"top_k": -1}, "`top_k` is -1", "--top-k is -1"),
    "seed": ({"seed": -1}, "`seed` is -1", "--seed is -1"),
    "greedy": ({"seed": 1, "temperature": 0}, "`seed` have no effect at `temperature=0`", "effect at --temperature 0"),
    "length": ({"max_new_tokens": 0}, "`max_new_tokens` is 0", "--max-new-tokens is 0"),
}


@pytest.fixture(scope="module")
def lm(model: Path) -> xlstm_ray.Engine:
    return xlstm_ray.load(model, **PLAIN)


@pytest.mark.parametrize("mistake", GENERATING)
def test_a_mistake_of_an_argument(mistake, lm, model, run):
    options, field, flag = GENERATING[mistake]
    with pytest.raises(XlstmRayError) as refused:
        lm.generate("abc", **options)
    assert field in str(refused.value)
    assert "--" not in str(refused.value)
    assert flag in run("generate", "--model", model, "--prompt", "abc", *words(PLAIN), *words(options)).error


def test_a_mistake_about_a_state(lm, model, run, tmp_path):
    state, file = lm.prefill("Once upon a time").state, tmp_path / "s"
    state.save(file)
    calls: dict[str, Callable[[], object]] = {
        "with `append`": lambda: lm.prefill("Twice", state=state),
        "new text, with `append`": lambda: lm.prefill(["a", "b"], state=state),
        "give `state`, or a `prompt`": lambda: lm.prefill(append="more"),
        "the prompt is empty": lambda: lm.prefill(""),
        "neither a prompt nor a state": lambda: lm.prefill(),
    }
    for said, call in calls.items():
        with pytest.raises(XlstmRayError) as refused:
            call()
        assert said in str(refused.value)
        assert "--" not in str(refused.value)
    error = run("prefill", "--model", model, "--device", "cpu", "--state-in", file, "--prompt", "Twice").error
    assert "with --append TEXT or --append-file FILE" in error


def test_a_journal_that_is_there(lm, model, run, tmp_path):
    lm.prefill("Once upon a time").state.save(tmp_path / JOURNAL_FILE)
    with xlstm_ray.load(model, **PLAIN, journal=tmp_path) as other, pytest.raises(XlstmRayError) as refused:
        other.prefill("Once upon a time")
    assert f"with `resume={tmp_path}`, or" in str(refused.value)
    error = run("prefill", "--model", model, *words(PLAIN), "--journal", tmp_path, "--prompt", "Once").error
    assert f"with --resume {tmp_path}, or" in error


def test_the_need_of_memory(model, run):
    options = {**PLAIN, "model": model, "mem_soft_mb": 9, "mem_hard_mb": 10, "dtype": "float32", "tile_size": 1024}
    with pytest.raises(
        XlstmRayError, match=r"\(`mem_hard_mb` 10\).*; or start all the same with `force=True`$"
    ) as refused:
        xlstm_ray.load(**options)
    assert "--" not in str(refused.value)
    assert run("prefill", "--prompt", "abc", *words(options)).error.endswith("; or start all the same with --force")


def test_notes_are_read_alike(model, run):
    with xlstm_ray.load(model, **PLAIN) as lm, pytest.warns(UserWarning, match="`temperature=0` is greedy"):
        lm.generate("abc", max_new_tokens=1)
    said = run("generate", "--model", model, *words(PLAIN), "--prompt", "abc", "-n", 1).err
    assert "; --temperature 0 is greedy\n" in said


def test_a_setting_without_a_flag_is_told_by_its_variable(model):
    with pytest.raises(XlstmRayError, match="^`streams` is 3, but torch has streams on cuda only") as refused:
        xlstm_ray.load(model, **PLAIN, streams=3)
    assert in_flags(str(refused.value)).startswith("XLSTM_MPS_STREAMS is 3")


OVER_HTTP = r"serve\.(?!options|server).*"  # their texts name fields of requests, for the client


def test_every_field_that_a_text_marks_is_an_option_or_an_argument():
    ours = [tree for name, tree in trees(ROOT).items() if not re.fullmatch(OVER_HTTP, name)]
    marked = {name for tree in ours for text in strings(tree) for name in re.findall(r"`([a-z_]+)[`=]", text)}
    assert len(marked) > 30
    of_python = {*inspect.signature(xlstm_ray.Engine.generate).parameters, *Sampling.model_fields}
    assert {name for name in marked if not re.match("--[a-z]", in_flags(f"`{name}`"))} <= of_python
    assert in_flags("`git` and `lfs pull`") == "`git` and `lfs pull`"  # words of others stay
    assert in_flags("`autoscale_again=True` or `mem_watchdog=False`") == "--autoscale again or --no-mem-watchdog"
    assert FIELD.findall("`a=b c` `d`") == [("a", "b c"), ("d", "")]


def test_what_a_command_prints_has_flags_too(run, model, tmp_path):
    own = shutil.copytree(model, tmp_path / "m")
    row: Ran = run("config", "--json", *words({"model": own, "tile_size": 32, "shrink_on_soft": False}))
    assert (row.row["tile_size"]["where"], row.row["shrink_on_soft"]["where"]) == ("--tile-size", "--no-mem-shrink")
    assert "`" not in run("prefill", "--help").out.replace("`git", "")
