"""The dtype if none is given: by the model, and by what this CPU computes faster."""

import json
import sys
from pathlib import Path

import programs
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import make_model

import xlstm_ray
from xlstm_ray.checkpoint import Checkpoint
from xlstm_ray.choose import DEMO_MODEL
from xlstm_ray.config import ModelConfig
from xlstm_ray.errors import ConfigError
from xlstm_ray.files import MIB
from xlstm_ray.runtime.products import bfloat16_cost

NATIVE = {"device": "cpu", "chunkwise_backend": "native", "tile_size": 16, "chunk_size": 16}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "tiny"
    make_model(directory, num_hidden_layers=1)
    return directory


@pytest.fixture
def cost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """An empty cache directory; a call writes a remembered measurement into it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "cache" / "xlstm-ray" / "products.json"

    def remember(value: float) -> None:
        bfloat16_cost()
        (key,) = json.loads(path.read_text())
        path.write_text(json.dumps({key: value}))

    remember.path = path  # type: ignore[attr-defined]
    return remember


def variant(tiny: Path, to: Path, narrow: str, config: dict[str, object]) -> Path:
    """The model, with bfloat16 for tensors whose name contains `narrow`, and with these keys in config.json."""
    to.mkdir()
    tensors = {n: t.bfloat16() if narrow in n else t for n, t in load_file(tiny / "model.safetensors").items()}
    save_file(tensors, to / "model.safetensors", {"format": "pt"})
    keys = json.loads((tiny / "config.json").read_text())
    keys.pop("dtype", None)
    (to / "config.json").write_text(json.dumps(keys | config))
    (to / "tokenizer.json").write_bytes((tiny / "tokenizer.json").read_bytes())
    return to


# -- what the model says -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("narrow", "config", "dtype"),
    [
        ("embeddings", {"dtype": "float32"}, torch.float32),
        ("embeddings", {}, torch.float32),
        ("norm", {}, torch.float32),
        ("", {}, torch.bfloat16),
        ("", {"torch_dtype": "bfloat16"}, torch.bfloat16),
        ("", {"dtype": "float32", "torch_dtype": "bfloat16"}, torch.float32),
        ("", {"torch_dtype": "torch.float32"}, torch.float32),
        ("none", {"dtype": "bfloat16"}, torch.float32),  # no stored digit is lost unasked
        ("", {"dtype": None}, torch.bfloat16),
    ],
)
def test_a_models_dtype_is_what_it_is_meant_for_and_mostly_stored_in(tiny, tmp_path, narrow, config, dtype):
    model = variant(tiny, tmp_path / "model", narrow, config)
    assert Checkpoint(model, ModelConfig.from_file(model / "config.json")).dtype == dtype


def test_one_tensor_in_bfloat16_costs_the_others_no_digits(tiny, tmp_path):
    model = variant(tiny, tmp_path / "model", "embeddings", {})
    ids = list(range(40))
    exact = variant(tiny, tmp_path / "exact", "none", {"dtype": "float32"})
    tensors = load_file(model / "model.safetensors")
    save_file({n: t.float() for n, t in tensors.items()}, exact / "model.safetensors", {"format": "pt"})
    mine, theirs = (xlstm_ray.load(path, **NATIVE).prefill(ids).logits for path in (model, exact))
    assert torch.equal(mine, theirs)


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_a_dtype_that_does_not_exist_is_refused(key):
    config = json.loads((DEMO_MODEL / "config.json").read_text())
    del config["dtype"]
    with pytest.raises(ConfigError, match=r"dtype: allowed: float32, bfloat16, float16, float64 \(given: 'int4'\)"):
        ModelConfig.from_dict(config | {key: "int4"})


def test_the_dtype_is_no_part_of_a_models_identity(tiny, tmp_path):
    paths = [variant(tiny, tmp_path / str(n), "none", config) for n, config in enumerate(({}, {"dtype": "float32"}))]
    first, second = (Checkpoint(path, ModelConfig.from_file(path / "config.json")).fingerprint() for path in paths)
    assert first == second


# -- what this CPU computes faster -------------------------------------------------------------------------------------
def test_products_are_timed_once_and_remembered(cost):
    found = bfloat16_cost()
    assert 0.01 < found < 1000
    assert list(json.loads(cost.path.read_text()).values()) == [found] == [bfloat16_cost()]
    again = "from xlstm_ray.runtime.products import bfloat16_cost; print(repr(bfloat16_cost()))"
    out = programs.run([sys.executable, "-c", again], capture_output=True, text=True, check=True).stdout
    assert float(out) == found
    assert torch.get_num_threads() >= 1


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'{"a": "x"}', b'{"a": -1}', b"\xff\xfe\x00", b'{"a": NaN}'])
def test_a_damaged_memory_is_written_anew(cost, content):
    cost.path.parent.mkdir(parents=True)
    cost.path.write_bytes(content)
    found = bfloat16_cost()
    assert list(json.loads(cost.path.read_text()).values()) == [found]
    assert list(cost.path.parent.iterdir()) == [cost.path]


def test_a_cache_directory_that_cannot_be_is_done_without(cost, tmp_path):
    (tmp_path / "cache").write_text("a file")
    assert bfloat16_cost() > 0


@pytest.mark.parametrize(("value", "dtype"), [(3.0, "float32"), (1.05, "bfloat16"), (0.5, "bfloat16")])
def test_a_bfloat16_model_runs_in_what_is_faster_here_and_says_so(cost, run, value, dtype):
    cost(value)
    options = ["--device", "cpu", "--chunkwise-backend", "native", "--tile-size", "16", "--chunk-size", "16"]
    row = run("prefill", "--prompt", "Once upon", "--json", *options).row
    reason = f"bfloat16 products take {value:.2g} x as long here"
    assert (row["dtype"], row["dtype_reason"]) == (dtype, reason)
    asked = run("prefill", "--prompt", "Once upon", "--json", *options, "--dtype", dtype).row
    assert (asked["state_digest"], asked["dtype_reason"]) == (row["state_digest"], None)
    assert f"cpu ({dtype}: {reason})" in run("prefill", "--prompt", "Once upon", *options).out
    shown = json.loads(run("config", "--json", "--device", "cpu").out)["dtype"]
    assert (shown["value"], shown["source"], shown["where"]) == (dtype, "measured", reason)


def test_nothing_is_timed_for_a_float32_model_or_a_dtype_that_is_asked_for(cost, tiny):
    assert xlstm_ray.load(tiny, **NATIVE).dtype == torch.float32
    assert xlstm_ray.load(dtype="bfloat16", **NATIVE).dtype == torch.bfloat16
    assert not cost.path.exists()


def test_a_states_dtype_is_kept_whatever_is_faster(cost, run, tmp_path):
    options = ["--device", "cpu", "--chunkwise-backend", "native", "--tile-size", "16", "--chunk-size", "16"]
    for value, dtype in ((3.0, "bfloat16"), (0.5, "float32")):
        cost(value)
        state = tmp_path / f"{dtype}.state"
        run("prefill", "--prompt", "Once", "--dtype", dtype, "--state-out", state, "--json", *options)
        assert run("prefill", "--state-in", state, "--json", "--device", "cpu").row["dtype"] == dtype


def test_float32_is_not_taken_where_only_bfloat16_fits(cost):
    cost(3.0)
    big = {"device": "cpu", "chunkwise_backend": "native", "tile_size": 1 << 16, "chunk_size": 64}
    needs = [xlstm_ray.load(dtype=dtype, **big).need(1).total for dtype in ("bfloat16", "float32")]
    assert needs[1] > 1.1 * needs[0]
    limit = sum(needs) // 2 // MIB
    lm = xlstm_ray.load(mem_soft_mb=limit, mem_hard_mb=limit, **big)
    assert lm.dtype == torch.bfloat16
    assert lm.dtype_reason == "bfloat16 products take 3 x as long here, but float32 does not fit in memory"
