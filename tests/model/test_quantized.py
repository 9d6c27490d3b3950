"""Weights of 8 and 4 bits: products, whole models against transformers with the same numbers, the command, files."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import programs
import pytest
import torch
from safetensors.torch import load_file, save_file
from slstm import CASES as SLSTM_CASES
from slstm import write_model
from tiny import make_model
from torch import Tensor
from transformers import xLSTMForCausalLM

import xlstm_ray
import xlstm_ray.quantize
from xlstm_ray.actors.shard import ShardWork, WorkerSpec
from xlstm_ray.checkpoint import Checkpoint
from xlstm_ray.choose import DEMO_MODEL
from xlstm_ray.config import ModelConfig, Quantization
from xlstm_ray.errors import OutputError, UsageError, XlstmRayError
from xlstm_ray.files import write_whole
from xlstm_ray.kernels.quantized import FEW, Quantized, packed, quantize, unpacked
from xlstm_ray.layout import make_layout
from xlstm_ray.quantize import quantize_model

TOKENS = 77
MATRICES = (
    "q",
    "k",
    "v",
    "ogate_preact",
    "qkv_opreact",
    "out_proj",
    "proj_up_gate",
    "proj_up",
    "proj_up_gate_z",
    "proj_down",
)


def plainly(stored: np.ndarray, scale: np.ndarray, zero: np.ndarray | None, group: int, columns: int) -> np.ndarray:
    """The numbers that a file's integers stand for, one column after the other."""
    made = np.empty((len(stored), columns))
    for k in range(columns):
        if zero is None:
            made[:, k] = stored[:, k].astype(float) * scale[:, k // group]
        else:
            q = stored[:, k // 2] >> 4 if k % 2 else stored[:, k // 2] & 15
            made[:, k] = (q.astype(float) - 8) * scale[:, k // group] + zero[:, k // group]
    return made


# -- products ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", [(70, 100), (64, 128), (200, 64), (1, 33)])
def test_integers_are_the_nearest(bits, shape):
    """As stored, each is within half a step of its weight; groups of zeros are exact."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)).bfloat16().float()
    weight[-1, :32] = 0.0
    weight[0, :32] = 0.5
    values, scale, zero = quantize(weight, bits=bits, group=32)
    of = [None if x is None else x.double().numpy() for x in (scale, zero)]
    made = torch.from_numpy(plainly(packed(values, bits=bits).numpy(), *of, 32, shape[1]))
    steps = scale.double().repeat_interleave(32, 1)[:, : shape[1]]
    inside = torch.ones_like(values) if bits == 8 else (values > 0) & (values < 15)  # what is beyond is at the end
    assert ((made - weight).abs() <= torch.where(inside.bool(), 0.5, 4) * steps * 1.01 + 1e-12).all()
    if bits == 4:  # not worse than the whole range of each group, by numpy
        worst = 0.0
        for row in weight.double().numpy():
            for group in np.split(row, range(32, len(row), 32)):
                step = max((group.max() - group.min()) / 15, 1e-12)
                worst += np.square(np.round((group - group.min()) / step) * step + group.min() - group).sum()
        assert (made - weight).square().sum() <= worst * 1.02 + 1e-3
    assert len(weight) == 1 or not made[-1, :32].any()
    assert (made[0, :32] - 0.5).abs().max() <= 0.5 * 2**-9 + (0 if bits == 4 else steps[0, 0] / 2)
    assert torch.equal(unpacked(packed(values, bits=bits), bits=bits, group=32)[:, : shape[1]], values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("group", [32, 128])
def test_every_form_of_a_product(bits, group, dtype):
    """Few rows and many, torch's own product and ours, a range of columns, and the rows of an embedding."""
    rows, K, first, last = 100, 300, 45, 211
    g = torch.Generator().manual_seed(2)
    values, scale, zero = quantize(torch.randn(rows, K, generator=g), bits=bits, group=group)
    of = [None if x is None else x.double().numpy() for x in (scale, zero)]
    weight = torch.from_numpy(plainly(packed(values, bits=bits).numpy(), *of, group, K))
    groups = slice(first // group, -(-last // group))
    part = unpacked(packed(values[:, groups.start * group : groups.stop * group], bits=bits), bits=bits, group=group)
    bias = torch.randn(rows, generator=g)
    limit = 1e-6 if dtype == torch.float32 else 6e-3
    for own in (False, True):
        made = Quantized.make(
            part,
            scale[:, groups].to(dtype),
            None if zero is None else zero[:, groups].to(dtype),
            before=first - groups.start * group,
            packed=own,
        )
        assert made.packed == (own and bits == 4)
        for count in (1, 3, FEW.compiled + 1, FEW.packed + 1):
            x = torch.randn(2, count, last - first, generator=g).to(dtype)
            want = x.double() @ weight[:, first:last].T
            assert error(made.linear(x), want) < limit
            assert error(made.linear(x, bias), want + bias) < limit
    embedding = Quantized.make(
        unpacked(packed(values, bits=bits), bits=bits, group=group),
        *[None if x is None else x.to(dtype) for x in (scale, zero)],
        before=0,
        packed=False,
    )
    tokens = torch.randint(0, rows, (2, 7), generator=g)
    assert error(embedding.embed(tokens)[..., :K], weight[tokens]) < limit
    parts = [part.linear(torch.eye(K)[:20]) for part in embedding.parts(64 * 384)]
    assert [p.shape[1] for p in parts] == [64, 36]
    assert error(torch.cat(parts, 1), weight.T[:20]) < 1e-6


def error(got: Tensor, want: Tensor) -> float:
    assert got.shape == want.shape
    return ((got.double() - want).norm() / want.norm()).item()


# -- whole models ------------------------------------------------------------------------------------------------------
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "8 bits": ({}, {"bits": 8, "group_size": 32}),
    "4 bits": ({}, {"bits": 4, "group_size": 32}),
    "8 bits, all": ({"use_bias": True}, {"bits": 8, "group_size": 64, "embedding": True, "head": True}),
    "4 bits, all": (
        {"use_bias": True, "vocab_size": 307},
        {"bits": 4, "group_size": 64, "embedding": True, "head": True},
    ),
    "tied": ({"tie_word_embeddings": True}, {"bits": 4, "group_size": 32, "embedding": True, "head": True}),
    "odd": (
        {"ffn_proj_factor": 1.37, "ffn_round_up_to_multiple_of": 7, "v_dim_factor": 0.5},
        {"bits": 4, "group_size": 32},
    ),
    "three heads": ({"hidden_size": 384, "num_heads": 3, "num_hidden_layers": 2}, {"bits": 8, "group_size": 128}),
}


def quantized(source: Path, out: Path, **asked: Any) -> Path:
    list(quantize_model(source, out, Quantization.model_validate(asked)))
    return out


def widened(directory: Path, out: Path) -> Path:
    """The same model with float32 numbers in place of integers, by `plainly`."""
    config = json.loads((directory / "config.json").read_text())
    group, bits = config["quantization"]["group_size"], config.pop("quantization")["bits"]
    stored: dict[str, Tensor] = {}
    for path in directory.glob("*.safetensors"):
        stored |= load_file(path)
    made = {
        name: t.float()
        for name, t in stored.items()
        if t.is_floating_point() and not name.endswith(("_scale", "_zero"))
    }
    for name, integers in ((n, t) for n, t in stored.items() if not t.is_floating_point()):
        scale, zero = (stored.get(name + kind) for kind in ("_scale", "_zero"))
        assert scale is not None
        assert (zero is not None) == (bits == 4)
        columns = integers.shape[1] * 8 // bits
        of = [None if x is None else x.double().numpy() for x in (scale, zero)]
        made[name] = torch.from_numpy(plainly(integers.numpy(), *of, group, columns)).float()
    out.mkdir()
    for name in (name for name in made if name.endswith("proj_down.weight")):
        # An odd number of columns: the last one of a byte is filling.
        made[name] = made[name][:, : ModelConfig.from_dict(config).ffn_dim].contiguous()
    save_file(made, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))
    shutil.copy(directory / "tokenizer.json", out)
    return out


@pytest.mark.parametrize("case", CASES)
def test_a_quantized_model_is_transformers_model_of_the_same_numbers(case, tmp_path):
    """Logits of every position and the state, in one band and in several; and what the files have is what was asked."""
    config, asked = CASES[case]
    make_model(tmp_path / "plain", seed=7, **config)
    directory = quantized(tmp_path / "plain", tmp_path / "quantized", **asked)
    theirs = xLSTMForCausalLM.from_pretrained(widened(directory, tmp_path / "wide")).float().eval()
    ids = torch.randint(0, theirs.config.vocab_size, (TOKENS,), generator=torch.Generator().manual_seed(3)).tolist()
    with torch.no_grad():
        out = theirs(torch.tensor([ids]), use_cache=True)
    for heads in {theirs.config.num_heads, 1}:
        options = {
            "device": "cpu",
            "dtype": "float32",
            "chunkwise_backend": "native",
            "tile_size": 32,
            "chunk_size": 16,
        }
        with xlstm_ray.load(directory, heads_per_band=heads, **options) as lm:
            result = lm.prefill(ids, all_logits=True)
            assert error(result.all_logits[0], out.logits[0].double()) < 1e-4
            for n in range(lm.config.num_blocks):
                for name, want in zip("Cnm", out.cache_params.rnn_state[n], strict=True):
                    assert error(result.state.tensors[f"blocks.{n}.{name}"], want.double()) < 1e-4
    stored = {name: t for path in directory.glob("*.safetensors") for name, t in load_file(path).items()}
    for name, tensor in stored.items():
        ends = {"backbone.embeddings.weight": asked.get("embedding"), "lm_head.weight": asked.get("head")}
        is_matrix = ends.get(name, name.endswith(tuple(f".{m}.weight" for m in MATRICES)))
        if not name.endswith(("_scale", "_zero")):
            assert tensor.dtype == ({8: torch.int8, 4: torch.uint8}[asked["bits"]] if is_matrix else torch.float32), (
                name
            )


@pytest.mark.parametrize("case", SLSTM_CASES)
def test_an_slstm_keeps_its_layers_in_float32(case, tmp_path):
    """Hybrid models, one of them fused, against this program's own plain weights of the same numbers."""
    write_model(tmp_path / "plain", **SLSTM_CASES[case])
    directory = quantized(tmp_path / "plain", tmp_path / "quantized", bits=4, group_size=32)
    wide = widened(directory, tmp_path / "wide")
    made = []
    for model, heads in ((directory, None), (directory, 1), (wide, None)):
        options = {"device": "cpu", "dtype": "float32", "chunkwise_backend": "native", "heads_per_band": heads}
        with xlstm_ray.load(model, **options) as lm:
            made.append(lm.prefill(list(range(50)), all_logits=True).all_logits[0])
    assert error(made[0], made[2].double()) < 1e-4
    assert error(made[1], made[2].double()) < 1e-4
    stored = {name: t.dtype for path in directory.glob("*.safetensors") for name, t in load_file(path).items()}
    assert {dtype for name, dtype in stored.items() if ".slstm_layer." in name} == {torch.float32}


@pytest.mark.parametrize(("bits", "dtype"), [(8, "bfloat16"), (4, "bfloat16"), (4, "float32")])
def test_compiled_is_as_the_reference(bits, dtype, tmp_path):
    make_model(tmp_path / "plain", seed=9, num_hidden_layers=1)
    model = quantized(tmp_path / "plain", tmp_path / "q", bits=bits, group_size=32, embedding=True, head=True)
    made = []
    for backend, kind in (("queued_compiled_chunks", dtype), ("native", "float32")):
        with xlstm_ray.load(model, device="cpu", dtype=kind, chunkwise_backend=backend, tile_size=128) as lm:
            generation = lm.generate(list(range(130)), max_new_tokens=2, temperature=0)
            list(generation.rows())
            made.append((generation.prefill.logits, generation.state().tensors["logits"]))
    for mine, theirs in zip(*made, strict=True):
        assert error(mine, theirs.double()) < (1e-4 if dtype == "float32" else 5e-2)


def test_quality_of_the_demo_model(tmp_path):
    """Bits of glosses that it was not trained on (of WordNet 3.0; xlstm_ray/demo/LICENSE.WordNet)."""
    texts = (Path(__file__).parent / "glosses.txt").read_text().splitlines()

    def bits_of(model: Path) -> float:
        with xlstm_ray.load(model, device="cpu", dtype="bfloat16", chunkwise_backend="native") as lm:
            prompts = [[0, *lm.encode(text), 0] for text in texts]  # 0 is between documents
            scores = lm.prefill(prompts, prompt_logprobs=0).prompt_logprobs
        return -sum(entry.logprob for row in scores for entry in row if entry is not None)

    original = bits_of(DEMO_MODEL)
    for bits, most in ((8, 1.005), (4, 1.03)):
        model = quantized(DEMO_MODEL, tmp_path / str(bits), bits=bits, group_size=32)
        assert bits_of(model) / original < most


def test_a_bands_actor_reads_its_own_rows(tmp_path):
    """What an actor on another machine reads is compared with the driver's digests."""
    make_model(tmp_path / "plain")
    model = quantized(tmp_path / "plain", tmp_path / "q", bits=4, group_size=32)
    config = ModelConfig.from_file(model / "config.json")
    stored = Checkpoint(model, config).stored()
    ((_, shard, *_),) = make_layout(config, heads_per_band=1)
    spec = WorkerSpec(model, config, stored, "native", "cpu", torch.bfloat16, 8, None, 1)
    work = ShardWork(spec, shard, "a", one_band=False)
    work.load()
    assert work.worker.blocks[0].qkvo.rows == 2 * config.dhqk + 2 * config.dhhv
    path = next(model.glob("model-00002-*"))
    tensors = load_file(path)
    tensors["backbone.blocks.0.ffn.proj_down.weight"][3] ^= 1
    save_file(tensors, path)
    with pytest.raises(XlstmRayError, match="has another model there than the driver"):
        ShardWork(spec, shard, "a", one_band=False).load()


def test_memory_is_what_was_computed(tmp_path):
    make_model(tmp_path / "plain", vocab_size=256)
    for bits in (8, 4):
        model = quantized(tmp_path / "plain", tmp_path / str(bits), bits=bits, group_size=32, head=True)
        config = ModelConfig.from_file(model / "config.json")
        checkpoint = Checkpoint(model, config)
        ((shard,),) = make_layout(config, heads_per_band=config.num_heads)
        blocks, ends = checkpoint.load(shard, dtype=torch.bfloat16, device=torch.device("cpu"))
        leaves = [t for t in torch.utils._pytree.tree_leaves((blocks, ends)) if isinstance(t, Tensor)]
        loaded = sum(t.nbytes for t in leaves)
        # All sizes are whole blocks but the feed-forward's. Norms are float32, which counts little.
        assert checkpoint.weight_bytes(torch.bfloat16) == pytest.approx(loaded, rel=0.02)


# -- the command -------------------------------------------------------------------------------------------------------
def command(*words: object) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "xlstm_ray", "quantize", *map(str, words)]
    return programs.run(line, capture_output=True, text=True, timeout=120)


def test_a_broken_run_goes_on_and_nothing_half_written_is_there(tmp_path):
    make_model(tmp_path / "plain", num_hidden_layers=12, hidden_size=256)
    out, parts = tmp_path / "out", tmp_path / ".out.parts"
    words = [tmp_path / "plain", out, "--bits", "4"]
    line = [sys.executable, "-m", "xlstm_ray", "quantize", *map(str, words)]
    with programs.Popen(line, stderr=subprocess.PIPE) as process:
        while len(list(parts.glob("*.safetensors"))) < 3:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
    assert not out.exists()
    made = {path.name: path.stat().st_mtime_ns for path in parts.glob("*.safetensors")}
    assert 3 <= len(made) < 14
    other = command(tmp_path / "plain", out, "--bits", "8")
    assert other.returncode == 1
    assert other.stderr.startswith(f"error: {parts}: has parts of another model or of other options; remove it")
    done = command(*words, "--progress", "ndjson")
    assert (done.returncode, done.stdout) == (0, f"{out}\n"), done.stderr
    rows = [json.loads(line) for line in done.stderr.splitlines()]
    assert [row["parts_done"] for row in rows] == list(range(len(made), 15))
    assert {name: (out / name).stat().st_mtime_ns for name in made} == made
    assert not parts.exists()
    whole = quantized(tmp_path / "plain", tmp_path / "at once", bits=4, group_size=32)
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in whole.iterdir())
    for path in whole.iterdir():
        assert path.read_bytes() == (out / path.name).read_bytes()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_says_how_it_goes_on(number, code, run, tmp_path, monkeypatch):
    """The signal comes while the third part is written."""
    make_model(tmp_path / "plain", num_hidden_layers=3, hidden_size=64)
    calls = iter(range(100))

    def write(path: Path, data: bytes) -> None:
        if path.suffix == ".safetensors" and next(calls) == 2:
            os.kill(os.getpid(), number)
        write_whole(path, data)

    monkeypatch.setattr(xlstm_ray.quantize, "write_whole", write)
    words = "quantize", tmp_path / "plain", tmp_path / "out", "--bits", 8
    ran = run(*words)
    assert (ran.code, ran.out, ran.err.splitlines()[-1]) == (code, "", "interrupted; run it again for the rest")
    assert not (tmp_path / "out").exists()
    assert len(list((tmp_path / ".out.parts").glob("*.safetensors"))) == 2
    assert run(*words).code == 0
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 5
    assert not (tmp_path / ".out.parts").exists()


def test_what_cannot_be_quantized_is_said_in_one_line(tmp_path):
    make_model(tmp_path / "plain", num_hidden_layers=1, num_heads=1, hidden_size=64)
    once = quantized(tmp_path / "plain", tmp_path / "once", bits=8, group_size=32)
    with pytest.raises(UsageError, match="is quantized already, to 8 bits"):
        quantized(once, tmp_path / "twice", bits=4, group_size=32)
    with pytest.raises(OutputError, match="is there already"):
        quantized(tmp_path / "plain", once, bits=4, group_size=32)
    tensors = load_file(tmp_path / "plain" / "model.safetensors")
    tensors["backbone.blocks.0.ffn.proj_up.weight"][3, 4] = torch.nan
    save_file(tensors, tmp_path / "plain" / "model.safetensors")
    with pytest.raises(XlstmRayError, match=r"proj_up\.weight holds values that are not finite"):
        quantized(tmp_path / "plain", tmp_path / "nan", bits=4, group_size=32)
    assert not (tmp_path / "nan").exists()
    wrong = command(tmp_path / "plain", tmp_path / "x", "--bits", "5")
    assert wrong.returncode == 2
    (said,) = wrong.stderr.splitlines()
    assert "--bits" in said


# -- damaged files -----------------------------------------------------------------------------------------------------
Q = "backbone.blocks.0.ffn.proj_down.weight"


def tensors(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def damage(model: Path) -> None:
        path = next(model.glob("model-00002-*"))
        found = load_file(path)
        change(found)
        save_file(found, path)
        index = json.loads((model / "model.safetensors.index.json").read_text())
        index["weight_map"] = {n: f for n, f in index["weight_map"].items() if f != path.name or n in found}
        index["weight_map"] |= dict.fromkeys(found, path.name)
        (model / "model.safetensors.index.json").write_text(json.dumps(index))

    return damage


def quantization(**change: Any) -> Callable[[Path], None]:
    def damage(model: Path) -> None:
        config = json.loads((model / "config.json").read_text())
        config["quantization"] |= change
        (model / "config.json").write_text(json.dumps(config))

    return damage


def flipped(name: str, last: bool = False) -> Callable[[Path], None]:
    """A bit of a tensor's first or last byte."""

    def damage(model: Path) -> None:
        path = next(p for p in model.glob("*.safetensors") if name in load_file(p))
        data = bytearray(path.read_bytes())
        begin = 8 + int.from_bytes(data[:8], "little")
        first, end = json.loads(data[8:begin])[name]["data_offsets"]
        data[begin + (end - 1 if last else first)] ^= 1
        path.write_bytes(data)

    return damage


def in_the_digests(place: int) -> Callable[[Path], None]:
    """Another character, so far after the beginning of a tensor's name."""

    def damage(model: Path) -> None:
        path = next(model.glob("model-00002-*"))
        data = path.read_bytes()
        at = data.index(Q.encode(), data.index(b"digests")) + place
        path.write_bytes(data[:at] + (b"x" if data[at : at + 1] != b"x" else b"y") + data[at + 1 :])

    return damage


WRITTEN = "is not as it was written; the file is damaged"
DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "no scale": (tensors(lambda t: t.pop(Q + "_scale")), "proj_down.weight_scale"),
    "no zero": (tensors(lambda t: t.pop(Q + "_zero")), "proj_down.weight_zero"),
    "a scale too many": (
        tensors(lambda t: t.update({"norm_ffn.weight_scale": torch.ones(2)})),
        "norm_ffn.weight_scale",
    ),
    "scales of another group": (
        tensors(lambda t: t.update({Q + "_scale": t[Q + "_scale"][:, ::2].contiguous()})),
        "has shape",
    ),
    "a scale that is no number": (tensors(lambda t: t[Q + "_scale"].fill_(torch.nan)), "not finite"),
    "integers of another kind": (tensors(lambda t: t.update({Q: t[Q].to(torch.int8)})), "is stored as I8; allowed: U8"),
    "numbers in place of integers": (tensors(lambda t: t.update({Q: t[Q].float()})), "is stored as F32; allowed: U8"),
    "scales of integers": (
        tensors(lambda t: t.update({Q + "_scale": t[Q + "_scale"].to(torch.uint8)})),
        "is stored as U8",
    ),
    "rows missing": (tensors(lambda t: t.update({Q: t[Q][1:].contiguous()})), "has shape"),
    "cut": (lambda model: os.truncate(next(model.glob("model-00002-*")), 5000), "is not a whole safetensors file"),
    "a bit of an integer": (flipped(Q), f"{Q} {WRITTEN}"),
    "the last bit of the integers": (flipped(Q, last=True), f"{Q} {WRITTEN}"),
    "a bit of a scale": (flipped(Q + "_scale"), f"{Q}_scale {WRITTEN}"),
    "a bit of a zero": (flipped(Q + "_zero"), f"{Q}_zero {WRITTEN}"),
    "a bit of a norm": (flipped("backbone.blocks.0.norm_ffn.weight"), f"norm_ffn.weight {WRITTEN}"),
    "a bit of the embedding": (flipped("backbone.embeddings.weight"), f"embeddings.weight {WRITTEN}"),
    "a digest": (in_the_digests(len(Q) + 10), "its digests cannot be read"),
    "a name of the digests": (in_the_digests(3), "its digests cannot be read: they are of other tensors"),
    "other bits": (quantization(bits=8), "is not part of the model"),
    "bits that are none": (quantization(bits=3), "quantization.bits"),
    "another group": (quantization(group_size=64), "has shape"),
    "a group that is none": (quantization(group_size=48), "quantization.group_size"),
    "an end that is not": (quantization(head=True), "lm_head.weight"),
    "a key too many": (quantization(method="other"), "quantization.method"),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    make_model(folder / "plain", num_hidden_layers=1, num_heads=2, hidden_size=64)
    return quantized(folder / "plain", folder / "q", bits=4, group_size=32)


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_files_are_refused_in_one_line(name, whole, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(whole, model)
    damage, said = DAMAGE[name]
    damage(model)
    with pytest.raises(XlstmRayError) as refused:
        xlstm_ray.load(model, device="cpu", chunkwise_backend="native").close()
    assert said in str(refused.value)
    assert str(model) in str(refused.value)
    assert "\n" not in str(refused.value)
