"""Damaged and hostile files: config.json, index, weights, tokenizer and states are corrupted in every way we know.

Each corruption must be refused with one of the project's own errors, in one printable line that names the file, or be
harmless: the results are those of the whole files, to the bit. A few (marked MAY_DIFFER) turn a file into another valid
one, with nothing to tell it by: a digit of norm_eps, a letter of the vocabulary. Then the model must own up to being
another one: its fingerprint or its tokens differ, and its results are finite.

Everything is generated in a fixed order; nothing is random.
"""

import hashlib
import json
import os
import pickle
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file
from tiny import make_model
from torch import Tensor

import xlstm_ray
from xlstm_ray import RecurrentState
from xlstm_ray.config import ModelConfig
from xlstm_ray.errors import CheckpointError, ConfigError, StateError, UsageError, XlstmRayError
from xlstm_ray.headers import INDEX_FILE, SINGLE_FILE
from xlstm_ray.state import Numerics

CONFIG, TOKENIZER, STATE = "config.json", "tokenizer.json", "prompt.state"
PROMPT = "Of cabbages and kings: \u00e9\u8a9e."
SECONDS = 20  # a corruption that takes longer hangs; the whole files take 0.05 s

# A corruption must be refused (REFUSE) or change nothing (HARMLESS); EITHER: its place decides which.
REFUSE, HARMLESS, EITHER, MAY_DIFFER = "refuse", "harmless", "either", "may differ"


@dataclass(frozen=True)
class Corruption:
    name: str
    file: str  # what is damaged, and what the error must name
    damage: Callable[[Path], None]  # gets the model directory
    outcome: str = REFUSE
    key: str | None = None  # what the error must name beside the file
    model: str = "single"


class Results(NamedTuple):
    config: ModelConfig
    tokens: list[int]
    fingerprint: str
    logits: Tensor
    digest: str
    next_tokens: list[tuple]


@contextmanager
def no_hang() -> Iterator[None]:
    def give_up(_number: int, _frame: object) -> None:
        raise TimeoutError(f"no answer within {SECONDS} s")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def load(directory: Path) -> xlstm_ray.Engine:
    return xlstm_ray.load(directory, device="cpu", chunkwise_backend="native", tile_size=64)


def results(directory: Path) -> Results:
    lm = load(directory)
    result = lm.prefill(PROMPT)
    tops = [tuple(token) for token in lm.next_tokens(result.logits[0])]
    return Results(lm.config, lm.encode(PROMPT), lm.fingerprint, result.logits, result.state.digest(), tops)


def outcome(action: Callable[[], Any]) -> Any:
    """The action's result, or the project's error; other exceptions are raised."""
    try:
        with no_hang():
            return action()
    except XlstmRayError as err:
        return err


def check_message(error: XlstmRayError, *named: str) -> None:
    """The error is one printable line of at most a screen, and has all these texts."""
    text = str(error)
    assert text
    assert text.isprintable(), repr(text)
    assert len(text) < 700, len(text)
    for name in named:
        assert name in text, f"{name} is not named in: {text}"


# -- the whole files ---------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model in one file and in three shards, and another model. No setting is the default: a lost one shows."""
    root = tmp_path_factory.mktemp("models")
    single, sharded, other = root / "single", root / "sharded", root / "other"
    settings: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_heads": 2,
        "gate_soft_cap": 10.0,
        "output_logit_soft_cap": 20.0,
        "norm_eps": 1e-5,
        "eps": 1e-5,
        "ffn_round_up_to_multiple_of": 32,
    }
    make_model(single, **settings)
    make_model(other, seed=1, **settings)
    (single / "generation_config.json").unlink()
    sharded.mkdir()
    for name in (CONFIG, TOKENIZER):
        shutil.copy(single / name, sharded)
    tensors = load_file(single / SINGLE_FILE)
    names = sorted(tensors)
    shards = {f"model-{n + 1:05}-of-00003.safetensors": names[n::3] for n in range(3)}
    for file, own in shards.items():
        save_file({name: tensors[name] for name in own}, sharded / file)
    weight_map = {name: file for file, own in shards.items() for name in own}
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (sharded / INDEX_FILE).write_text(json.dumps(index, indent=1))
    return {"single": single, "sharded": sharded, "other": other}


@pytest.fixture
def scratch() -> Iterator[Path]:
    """A directory that is removed after the test: pytest would keep hundreds of copies of the model."""
    with tempfile.TemporaryDirectory() as directory:
        yield Path(directory)


@pytest.fixture(scope="module")
def whole(models: dict[str, Path]) -> Results:
    """The results of the whole files, which one file and shards share."""
    expected = results(models["single"])
    assert same(results(models["sharded"]), expected)
    assert not same(results(models["other"]), expected)
    return expected


def same(a: Results, b: Results) -> bool:
    return a[:3] == b[:3] and a[4:] == b[4:] and torch.equal(a.logits, b.logits)


# -- ways to damage a file ---------------------------------------------------------------------------------------------
def flip(file: str, numerator: int, denominator: int) -> Callable[[Path], None]:
    """Flip one bit, in the byte at numerator / denominator of the file."""

    def damage(directory: Path) -> None:
        data = bytearray((directory / file).read_bytes())
        data[len(data) * numerator // denominator] ^= 1 << numerator % 8
        (directory / file).write_bytes(data)

    return damage


def cut(file: str, numerator: int, denominator: int) -> Callable[[Path], None]:
    """Keep numerator / denominator of the file, or all but a byte."""

    def damage(directory: Path) -> None:
        size = (directory / file).stat().st_size
        os.truncate(directory / file, min(size * numerator // denominator, size - 1))

    return damage


def write(file: str, data: bytes) -> Callable[[Path], None]:
    return lambda directory: replace(directory / file, data)


def replace(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def edit(file: str, change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """Change the JSON in a file."""

    def damage(directory: Path) -> None:
        value = json.loads((directory / file).read_text())
        change(value)
        (directory / file).write_text(json.dumps(value))

    return damage


def put(file: str, key: str, value: Any) -> Callable[[Path], None]:
    return edit(file, lambda data: data.update({key: value}))


def put_text(file: str, key: str, text: str) -> Callable[[Path], None]:
    """Give a key a value as JSON text: a number that is too large, NaN, a nest that is too deep."""

    def damage(directory: Path) -> None:
        data = json.loads((directory / file).read_text())
        written = json.dumps({**data, key: "@@"})
        assert '"@@"' in written
        (directory / file).write_text(written.replace('"@@"', text))

    return damage


def twice(file: str, key: str, text: str) -> Callable[[Path], None]:
    """Put the key with another value before all other keys."""

    def damage(directory: Path) -> None:
        written = (directory / file).read_text().lstrip()
        assert written.startswith("{")
        (directory / file).write_text(f'{{"{key}": {text},{written[1:]}')

    return damage


def instead(file: str, how: str) -> Callable[[Path], None]:
    """Put something else in the file's place."""

    def damage(directory: Path) -> None:
        path = directory / file
        path.unlink()
        if how == "a directory":
            path.mkdir()
        elif how == "a pipe":  # reading it would wait for ever
            os.mkfifo(path)
        elif how == "a link to itself":
            path.symlink_to(path)
        elif how == "a dangling link":
            path.symlink_to(directory / "nowhere")
        else:
            assert how == "nothing"

    return damage


def read_header(path: Path) -> tuple[dict[str, Any], bytes]:
    """A safetensors file's header and its payload."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def header(file: str, change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """Change a safetensors file's header, and leave its payload."""

    def damage(directory: Path) -> None:
        value, payload = read_header(directory / file)
        change(value)
        text = json.dumps(value).encode()
        (directory / file).write_bytes(len(text).to_bytes(8, "little") + text + payload)

    return damage


def header_text(file: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        value, payload = read_header(directory / file)
        text = change(json.dumps(value).encode())
        (directory / file).write_bytes(len(text).to_bytes(8, "little") + text + payload)

    return damage


def header_size(file: str, lie: Callable[[int], int]) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        data = (directory / file).read_bytes()
        size = lie(int.from_bytes(data[:8], "little")) % (1 << 64)
        (directory / file).write_bytes(size.to_bytes(8, "little") + data[8:])

    return damage


def weights(change: Callable[[dict[str, Tensor]], object], file: str = SINGLE_FILE) -> Callable[[Path], None]:
    """Change the tensors of a file, and write them as a valid file."""

    def damage(directory: Path) -> None:
        tensors = load_file(directory / file)
        change(tensors)
        (directory / file).write_bytes(save({name: t.contiguous() for name, t in tensors.items()}))

    return damage


def with_value(name: str, at: int, value: float) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name].view(-1)[at] = value

    return change


# -- config.json -------------------------------------------------------------------------------------------------------
READ = {
    "sizes": ("vocab_size", "hidden_size", "num_blocks", "num_heads", "ffn_round_up_to_multiple_of", "chunk_size"),
    "factors": ("qk_dim_factor", "v_dim_factor", "ffn_proj_factor"),
    "epsilons": ("norm_eps", "eps"),
    "caps": ("gate_soft_cap", "output_logit_soft_cap"),
    "switches": ("use_bias", "add_out_norm", "tie_word_embeddings", "force_bos_token_insert"),
    "words": ("weight_mode", "model_type", "chunkwise_kernel"),
    "ids": ("bos_token_id", "eos_token_id"),
    "blocks": ("slstm_at",),
}
WRONG = {
    "sizes": ('"64"', "64.5", "true", "[64]", "{}", "0", "-1", "1" + "0" * 30, "NaN", "Infinity", "1e400"),
    "factors": ('"0.5"', "true", "null", "[]", "0", "-0.5", "65", "1e308", "NaN", "Infinity"),
    "epsilons": ('"1e-6"', "true", "null", "{}", "0", "-1e-6", "1", "NaN", "-Infinity", "1e-400"),
    "caps": ('"15"', "false", "[15]", "0", "-15", "1e300", "1e-300", "NaN", "Infinity"),
    "switches": ('"false"', "1", "null", "[]", "0.0"),
    "words": ("null", "7", "true", "[]", '""', '"\\u0000\\n\\u001b[2J"'),
    "ids": ('"257"', "-2", "2.5", "[[1]]", "{}", '[1, "x"]', "true"),
    "blocks": ("0", '"some"', "true", "{}", "[-1]", "[2]", "[0, 0]", "[1.0]", "[true]", '["0"]', "[null]", "[[0]]"),
}
ALLOWED = {("eos_token_id", "[]"), ("chunkwise_kernel", '""'), ("chunkwise_kernel", '"\\u0000\\n\\u001b[2J"')}
REFUSED_CHOICES = {
    "add_qk_norm": True,
    "add_post_norm": True,
    "add_embedding_dropout": True,
    "slstm_at": [1],
    "inference_state_dtype": "bfloat16",
    "norm_reduction_force_float32": False,
    "return_last_states": False,
    "weight_mode": "fused",  # of weights that are not
    "model_type": "llama",
    "num_hidden_layers": 3,  # num_blocks says 2
    "embedding_dim": 64,  # hidden_size says 32
    "vocab_size": 258,
    "num_heads": 7,
    "qk_dim_factor": 0.54,  # 17.28 is not a multiple of 2 heads
    "v_dim_factor": 2.0,
    "ffn_proj_factor": 4.0,
    "use_bias": True,
    "ffn_round_up_to_multiple_of": 2048,
}


def config_corruptions() -> Iterator[Corruption]:
    for kind, keys in READ.items():
        for key in keys:
            for text in WRONG[kind]:
                if (key, text) not in ALLOWED:
                    named = {"num_blocks": "num_", "hidden_size": "hidden_size"}.get(key, key)
                    yield Corruption(f"{key} {text[:12]}", CONFIG, put_text(CONFIG, key, text), key=named)
    for text in ('"int4"', '""', "7", "true", "[]", "{}", '["float32"]'):  # is not part of the model's identity
        yield Corruption(f"dtype {text}", CONFIG, put_text(CONFIG, "dtype", text), key="dtype")
    for key, value in REFUSED_CHOICES.items():
        yield Corruption(f"{key} {value}", CONFIG, put(CONFIG, key, value), outcome=REFUSE)
    for key in ("norm_eps", "gate_soft_cap", "hidden_size", "weight_mode", "use_bias", "slstm_at", "model_type"):
        for depth in (50, 900, 990, 100_000):
            nest = "[" * depth + "]" * depth
            yield Corruption(f"{key} {depth} deep", CONFIG, put_text(CONFIG, key, nest))
    yield Corruption("a foreign key 100,000 deep", CONFIG, put_text(CONFIG, "foreign", "[" * 100_000 + "]" * 100_000))
    yield Corruption("a number of 5,000 digits", CONFIG, put_text(CONFIG, "foreign", "9" * 5000))
    for key, text in (("norm_eps", "1e-3"), ("norm_eps", "1e-05"), ("foreign", "1"), ("vocab_size", "259")):
        damage = [twice(CONFIG, key, text)]
        if key == "foreign":
            damage.insert(0, twice(CONFIG, key, "2"))
        yield Corruption(f"{key} twice ({text})", CONFIG, one_after_the_other(*damage), key=key)
    # A misspelt key would silently mean the default of the right one.
    for key in ("norm_eps", "gate_soft_cap", "eps", "hidden_size", "tie_word_embeddings", "qk_dim_factor"):
        for wrong in (key[:-1], key + "s", key.replace("e", "E", 1), "_" + key, key.replace(key[2], "~", 1)):
            if wrong != key:
                rename = edit(CONFIG, lambda data, key=key, wrong=wrong: data.update({wrong: data.pop(key)}))
                yield Corruption(f"{key} spelt {wrong}", CONFIG, rename, key=key)
    for key in sorted({k for keys in READ.values() for k in keys} - {"num_blocks", "hidden_size"}):
        gone = edit(CONFIG, lambda data, key=key: data.pop(key, None))
        yield Corruption(f"without {key}", CONFIG, gone, MAY_DIFFER)
    for key in ("num_blocks", "num_hidden_layers", "embedding_dim", "hidden_size"):  # the other name is still there
        yield Corruption(f"without {key}", CONFIG, edit(CONFIG, lambda data, key=key: data.pop(key)), HARMLESS)
    for pair in (("num_blocks", "num_hidden_layers"), ("embedding_dim", "hidden_size")):
        gone = edit(CONFIG, lambda data, pair=pair: [data.pop(key) for key in pair])
        yield Corruption(f"without both {pair}", CONFIG, gone, key=pair[0])
    foreign = {"torch_dtype": "float16", "id2label": {"0": "x"}, "\u00fc\n": None, "max_length": 20, "num_beams": 1}
    yield Corruption("foreign keys", CONFIG, edit(CONFIG, lambda data: data.update(foreign)), HARMLESS)
    yield Corruption("a foreign NaN", CONFIG, put_text(CONFIG, "foreign", "NaN"), HARMLESS)
    yield Corruption("tokens that are never made", CONFIG, put(CONFIG, "eos_token_id", [10**12]), MAY_DIFFER)
    begins = edit(CONFIG, lambda data: data.update(force_bos_token_insert=True, bos_token_id=259))
    yield Corruption("a begin token beyond the vocabulary", CONFIG, begins, key="bos_token_id")
    nothing = edit(CONFIG, lambda data: (data.update(force_bos_token_insert=True), data.pop("bos_token_id")))
    yield Corruption("no begin token to insert", CONFIG, nothing, key="bos_token_id")
    yield from text_corruptions(CONFIG)


def one_after_the_other(*damage: Callable[[Path], None]) -> Callable[[Path], None]:
    def both(directory: Path) -> None:
        for each in damage:
            each(directory)

    return both


def text_corruptions(file: str, model: str = "single") -> Iterator[Corruption]:
    """Damages that any JSON file can have."""
    texts = {
        "empty": b"",
        "blank": b" \n\t ",
        "zeros": b"\0" * 64,
        "a list": b"[]",
        "an empty object": b"{}",
        "a number": b"1",
        "a word": b'"xlstm"',
        "null": b"null",
        "not UTF-8": b'{"model_type": "\xff\xfe"}',
        "UTF-16": '{"model_type": "xlstm"}'.encode("utf-16"),
        "YAML": b"model_type: xlstm\n",
        "single quotes": b"{'model_type': 'xlstm'}",
        "HTML": b"<!DOCTYPE html><html><body>404</body></html>",
        "a large file's pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        "brackets": b"[" * 200_000,
        "objects": b'{"a":' * 200_000,
        "half a surrogate pair": b'{"model_type": "\\ud800"}',
        "a pickle": pickle.dumps({"model_type": "xlstm"}),
    }
    for name, data in texts.items():
        yield Corruption(f"{file} {name}", file, write(file, data), model=model)
    for what in ("a directory", "a pipe", "a link to itself", "a dangling link", "nothing"):
        # Without an index there are no weights, and the error names the directory.
        named = "has neither" if file == INDEX_FILE else file
        yield Corruption(f"{file} {what}", named, instead(file, what), model=model)
    for n in range(8):
        yield Corruption(f"{file} cut at {n}/8", file, cut(file, n, 8), model=model)
    yield Corruption(f"{file} without its last byte", file, cut(file, 1, 1), EITHER, model=model)
    trailing = one_after_the_other(lambda directory: replace(directory / file, (directory / file).read_bytes() + b"}"))
    yield Corruption(f"{file} and a bracket", file, trailing, model=model)
    mark = one_after_the_other(
        lambda directory: replace(directory / file, b"\xef\xbb\xbf" + (directory / file).read_bytes())
    )
    yield Corruption(f"{file} after a byte order mark", file, mark, model=model)
    for n in range(64):
        yield Corruption(f"{file} flip {n}/64", file, flip(file, n, 64), MAY_DIFFER, model=model)


# -- the index ---------------------------------------------------------------------------------------------------------
FIRST_SHARD = "model-00001-of-00003.safetensors"
NAMES = {
    "above": "../single/model.safetensors",
    "absolute": "/etc/passwd",
    "absolute weights": "/tmp/model.safetensors",
    "below": "sub/model.safetensors",
    "here": "./model-00001-of-00003.safetensors",
    "two dots": "..",
    "nothing": "",
    "a pickle": "pytorch_model.bin",
    "another ending": "model-00001-of-00003.safetensors.bin",
    "missing": "model-00004-of-00003.safetensors",
    "two lines": "model\n.safetensors",
    "a zero byte": "model\0.safetensors",
    "an escape": "\x1b[2J.safetensors",
    "very long": "m" * 300 + ".safetensors",
    "half a pair": "\ud800.safetensors",
    "a number": 7,
    "null": None,
    "a list": [FIRST_SHARD],
}


def index_corruptions() -> Iterator[Corruption]:
    def weight_map(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
        return edit(INDEX_FILE, lambda index: change(index["weight_map"]))

    embedding, gate = "backbone.embeddings.weight", "backbone.blocks.0.mlstm_layer.igate_preact.weight"
    for name, file in NAMES.items():
        moved = weight_map(lambda files, file=file: files.update({embedding: file}))
        yield Corruption(f"index: {name}", INDEX_FILE, moved, model="sharded")
    cases: dict[str, tuple[Callable[[Path], None], str | None]] = {
        "a tensor less": (weight_map(lambda files: files.pop(gate)), "igate_preact"),
        "a tensor more": (weight_map(lambda files: files.update({"lm_head.bias": FIRST_SHARD})), "lm_head.bias"),
        "another shard": (
            weight_map(lambda files: files.update({gate: next(f for f in files.values() if f != files[gate])})),
            "igate_preact",
        ),
        "all in the first": (weight_map(lambda files: files.update(dict.fromkeys(files, FIRST_SHARD))), None),
        "a name of two lines": (weight_map(lambda files: files.update({"a\nb\0": FIRST_SHARD})), None),
        "an empty map": (put(INDEX_FILE, "weight_map", {}), "weight_map"),
        "a list for a map": (put(INDEX_FILE, "weight_map", []), "weight_map"),
        "no map": (edit(INDEX_FILE, lambda index: index.pop("weight_map")), "weight_map"),
        "two maps": (twice(INDEX_FILE, "weight_map", "{}"), "weight_map"),
    }
    for name, (damage, key) in cases.items():
        yield Corruption(f"index: {name}", "", damage, key=key, model="sharded")
    lies = edit(INDEX_FILE, lambda index: index.update(metadata={"total_size": -1}))
    yield Corruption("index: a wrong total", INDEX_FILE, lies, HARMLESS, model="sharded")
    bare = edit(INDEX_FILE, lambda index: index.pop("metadata"))
    yield Corruption("index: no metadata", INDEX_FILE, bare, HARMLESS, model="sharded")
    yield from text_corruptions(INDEX_FILE, "sharded")
    for what in ("a directory", "a pipe", "a link to itself", "a dangling link", "nothing"):
        yield Corruption(f"shard: {what}", FIRST_SHARD, instead(FIRST_SHARD, what), model="sharded")
    for n in range(4):
        yield Corruption(f"shard: cut at {n}/4", FIRST_SHARD, cut(FIRST_SHARD, n, 4), model="sharded")
    swap = one_after_the_other(
        lambda d: (d / FIRST_SHARD).rename(d / "x"),
        lambda d: (d / FIRST_SHARD.replace("1", "2", 1)).rename(d / FIRST_SHARD),
        lambda d: (d / "x").rename(d / FIRST_SHARD.replace("1", "2", 1)),
    )
    yield Corruption("shards swapped", ".safetensors", swap, model="sharded")


# -- safetensors -------------------------------------------------------------------------------------------------------
DTYPES = "BOOL F4 F6_E2M3 F6_E3M2 U8 I8 F8_E5M2 F8_E4M3 F8_E8M0 I16 U16 F16 BF16 I32 U32 C64 F64 I64 U64 f32".split()
SHAPES = ([], [0], [31], [33], [32, 1], [1, 32], [8, 4], [-32], ["32"], [32.0], [2**63, 2**63], None, 32, [2**64])


def weight_corruptions() -> Iterator[Corruption]:
    q, k = (f"backbone.blocks.1.mlstm_layer.{x}.weight" for x in "qk")
    gate, norm = "backbone.blocks.0.mlstm_layer.fgate_preact.bias", "backbone.blocks.0.norm_ffn.weight"
    file = SINGLE_FILE
    again = f'{{"{q}":{{"dtype":"F32","shape":[1],"data_offsets":[0,4]}},'.encode()

    def entry(name: str, **fields: Any) -> Callable[[Path], None]:
        return header(file, lambda head: head[name].update(fields))

    def offsets(name: str, change: Callable[[int, int], list]) -> Callable[[Path], None]:
        return header(file, lambda head: head[name].update(data_offsets=change(*head[name]["data_offsets"])))

    for dtype in DTYPES:
        yield Corruption(f"dtype {dtype}", file, entry(norm, dtype=dtype))
    for dtype in (torch.int8, torch.int32, torch.int64, torch.float8_e4m3fn, torch.bool, torch.complex64):
        cast = weights(lambda tensors, dtype=dtype: tensors.update({norm: tensors[norm].to(dtype)}))
        yield Corruption(f"a sound file, {dtype}", file, cast, key=norm)
    for shape in SHAPES:
        yield Corruption(f"shape {shape}", file, entry(norm, shape=shape))
    for name, lie in {
        "empty": lambda a, b: [a, a],
        "backwards": lambda a, b: [b, a],
        "one byte on": lambda a, b: [a + 1, b + 1],
        "overlapping": lambda a, b: [a - 4, b],
        "too short": lambda a, b: [a, b - 4],
        "too long": lambda a, b: [a, b + 4],
        "from zero": lambda a, b: [0, b],
        "beyond the file": lambda a, b: [a + 10**9, b + 10**9],
        "huge": lambda a, b: [2**63, 2**64 - 1],
        "too huge": lambda a, b: [a, 2**70],
        "negative": lambda a, b: [-1, b],
        "words": lambda a, b: [str(a), str(b)],
        "three": lambda a, b: [a, b, b],
        "none": lambda a, b: [],
    }.items():
        yield Corruption(f"offsets {name}", file, offsets(q, lie))
    shared = header(file, lambda head: head[k].update(data_offsets=head[q]["data_offsets"]))
    yield Corruption("offsets of two tensors the same", file, shared)
    for name, lie in {
        "zero": lambda n: 0,
        "one": lambda n: 1,
        "one less": lambda n: n - 1,
        "one more": lambda n: n + 1,
        "twice": lambda n: 2 * n,
        "a gigabyte": lambda n: 1 << 30,
        "2^63": lambda n: 1 << 63,
        "minus one": lambda n: -1,
    }.items():
        yield Corruption(f"header length {name}", file, header_size(file, lie))
    for name, change in {
        "not JSON": lambda text: text[:-1] + b"]",
        "a list": lambda text: b"[" + text + b"]",
        "nothing": lambda text: b"",
        "null": lambda text: b"null",
        "no tensors": lambda text: b"{}",
        "not UTF-8": lambda text: text.replace(b"norm", b"n\xffrm", 1),
        "deep": lambda text: text[:-1] + b',"x":' + b"[" * 50_000 + b"]" * 50_000 + b"}",
        "NaN": lambda text: text[:-1] + b',"x":NaN}',
        "a tensor twice": lambda text: again + text[1:],
        "a field twice": lambda text: text.replace(b'"dtype":', b'"dtype": "F32", "dtype":', 1),
        "half a pair": lambda text: text.replace(b"norm", b"\\ud800", 1),
        "numbers for metadata": lambda text: b'{"__metadata__":{"a":1},' + text[1:].split(b"}, ", 1)[1],
    }.items():
        yield Corruption(f"header {name}", file if name != "no tensors" else "", header_text(file, change))
    for name, change in {
        "a tensor renamed": lambda head: head.update({"model." + q: head.pop(q)}),
        "a name of two lines": lambda head: head.update({q + "\n\x1b[2J": head.pop(q)}),
        "an entry without dtype": lambda head: head[q].pop("dtype"),
        "an entry without shape": lambda head: head[q].pop("shape"),
        "an entry without offsets": lambda head: head[q].pop("data_offsets"),
        "an entry that is a list": lambda head: head.update({q: [1, 2]}),
        "an entry that is null": lambda head: head.update({q: None}),
        "an entry less": lambda head: head.pop(q),
    }.items():
        yield Corruption(f"header: {name}", file, header(file, change))
    padding = header_text(file, lambda text: text + b" " * 100)
    yield Corruption("header padded", file, padding, HARMLESS)
    notes = header(file, lambda head: head.update(__metadata__={"format": "tf", "\n": "\0"}))
    yield Corruption("other metadata", file, notes, HARMLESS)
    for name, change, key in (
        ("a tensor less", lambda tensors: tensors.pop(gate), gate),
        ("a tensor more", lambda tensors: tensors.update(extra=torch.zeros(1)), "extra"),
        ("an empty tensor more", lambda tensors: tensors.update(extra=torch.zeros(0)), "extra"),
        ("a bias more", lambda tensors: tensors.update({q.replace("weight", "bias"): torch.zeros(16)}), "q.bias"),
        ("a block more", lambda tensors: tensors.update({q.replace("1", "2"): tensors[q].clone()}), "blocks.2"),
        ("a matrix on its side", lambda tensors: tensors.update({q: tensors[q].T.clone()}), q),
        ("a row less", lambda tensors: tensors.update({q: tensors[q][1:].clone()}), q),
        ("a column less", lambda tensors: tensors.update({q: tensors[q][:, 1:].clone()}), q),
        ("a vector for a matrix", lambda tensors: tensors.update({q: tensors[q].flatten()}), q),
        ("a number for a vector", lambda tensors: tensors.update({norm: torch.tensor(1.0)}), norm),
        ("no embedding", lambda tensors: tensors.pop("backbone.embeddings.weight"), "embeddings"),
        ("no head", lambda tensors: tensors.pop("lm_head.weight"), "lm_head"),
        ("no out norm", lambda tensors: tensors.pop("backbone.out_norm.weight"), "out_norm"),
        ("no tensors at all", lambda tensors: tensors.clear(), "is missing"),
    ):
        where = "" if name.startswith(("no ", "a tensor less")) else file
        yield Corruption(f"weights: {name}", where, weights(change), key=key)
    for name in ("backbone.embeddings.weight", "lm_head.weight", "backbone.out_norm.weight", q, gate, norm):
        for value in (float("nan"), float("inf"), -float("inf")):
            spoilt = weights(with_value(name, -1, value))
            yield Corruption(f"{value} in {name}", file, spoilt, key=name)
    wide = weights(lambda tensors: tensors.update({q: tensors[q].double() * 1e300}))
    yield Corruption("float64 beyond float32", file, wide, key=q)
    # Finite weights whose products are not: only the results can tell, and they name the model's directory.
    large = weights(lambda tensors: tensors[norm].mul_(1e38))
    yield Corruption("products beyond float32", "weights are damaged", large)
    double = weights(lambda tensors: tensors.update({q: tensors[q].double()}))
    yield Corruption("one float64 tensor", file, double, MAY_DIFFER)
    for what in ("a directory", "a pipe", "a link to itself", "a dangling link", "nothing"):
        yield Corruption(f"weights {what}", file, instead(file, what))
    for name, data in {
        "empty": b"",
        "7 bytes": b"\0" * 7,
        "zeros": b"\0" * 4096,
        "text": b"404: Not Found",
        "a zip": b"PK\x03\x04" + b"\0" * 64,
        "GGUF": b"GGUF\x03\0\0\0" + b"\0" * 64,
    }.items():
        yield Corruption(f"weights {name}", file, write(file, data))
    for n in range(16):
        yield Corruption(f"weights cut at {n}/16", file, cut(file, n, 16))
    for n in range(64):
        yield Corruption(f"header length, bit {n}", file, header_size(file, lambda size, n=n: size ^ 1 << n), EITHER)
    for n in range(96):
        bit = header_text(file, lambda text, n=n: flipped(text, n, 96))
        yield Corruption(f"header flip {n}/96", file, bit, EITHER)


def flipped(text: bytes, numerator: int, denominator: int) -> bytes:
    data = bytearray(text)
    data[len(data) * numerator // denominator] ^= 1 << numerator % 8
    return bytes(data)


# -- the tokenizer -----------------------------------------------------------------------------------------------------
def tokenizer_corruptions() -> Iterator[Corruption]:
    def model(**fields: Any) -> Callable[[Path], None]:
        return edit(TOKENIZER, lambda data: data["model"].update(fields))

    def vocabulary(change: Callable[[dict[str, int]], object]) -> Callable[[Path], None]:
        return edit(TOKENIZER, lambda data: change(data["model"]["vocab"]))

    def added(**fields: Any) -> dict[str, Any]:
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
        return {"added_tokens": [{"id": 256, "content": "and", **flags, **fields}]}

    def split(pattern: dict[str, str]) -> dict[str, Any]:
        return {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}

    template = {"type": "TemplateProcessing", "pair": [], "special_tokens": {}}
    short = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst"}
    missing = {"SpecialToken": {"id": "[X]", "type_id": 0}}
    cases: dict[str, tuple[dict[str, Any], str]] = {
        # These make the library's Rust code panic, which arrives as a BaseException and writes a backtrace.
        "panics: a charsmap of nothing": ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": ""}}, REFUSE),
        "panics: a short charsmap": ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}, REFUSE),
        "panics: a wild charsmap": (
            {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "BAAAAP////8="}},
            REFUSE,
        ),
        "panics: a template's token is missing": ({"post_processor": {**template, "single": [missing]}}, REFUSE),
        "panics: pieces of no length": ({"pre_tokenizer": {"type": "FixedLength", "length": 0}}, REFUSE),
        "panics: nothing is replaced": (
            {"normalizer": {"type": "Replace", "pattern": {"String": ""}, "content": "x"}},
            REFUSE,
        ),
        "panics: nothing is prepended": ({"normalizer": {"type": "Prepend", "prepend": ""}}, REFUSE),
        "panics: an expression without end": ({"pre_tokenizer": split({"Regex": "(.|\\s|\\w)+\\d\\d"})}, REFUSE),
        "another version": ({"version": "2.0"}, REFUSE),
        "a normalizer of no kind": ({"normalizer": {"type": "NoSuch"}}, REFUSE),
        "a normalizer that is a list": ({"normalizer": []}, REFUSE),
        "a broken expression": ({"pre_tokenizer": split({"Regex": "("})}, REFUSE),
        "a decoder of no kind": ({"decoder": {"type": "NoSuch"}}, REFUSE),
        "a model that is null": ({"model": None}, REFUSE),
        "a model of no kind": ({"model": {"type": "NoSuch"}}, REFUSE),
        "an empty unigram": ({"model": {"type": "Unigram", "unk_id": None, "vocab": []}}, REFUSE),
        "an unknown token beyond": ({"model": {"type": "Unigram", "unk_id": 7, "vocab": [["a", 0.0]]}}, REFUSE),
        "words, none of them ours": ({"model": {"type": "WordLevel", "unk_token": "[UNK]", "vocab": {"a": 0}}}, REFUSE),
        "an added token beyond the vocabulary": (added(id=300), MAY_DIFFER),
        "an added token of no text": (added(content=""), MAY_DIFFER),
        "an added token with a negative id": (added(id=-1), REFUSE),
        "an added token with an id of 2^32": (added(id=2**32), REFUSE),
        "an added token that is a word": ({"added_tokens": ["and"]}, REFUSE),
        "added tokens that are not a list": ({"added_tokens": 7}, REFUSE),
        "all is stripped": ({"normalizer": {"type": "Replace", "pattern": {"Regex": ".+"}, "content": ""}}, REFUSE),
        "a begin token beyond the vocabulary": (
            {"post_processor": {"type": "BertProcessing", "sep": ["x", 9999], "cls": ["y", 300]}},
            REFUSE,
        ),
        # What a file may ask for and we do not do: a prompt is never cut or filled up.
        "cuts": ({"truncation": {**short, "stride": 0}}, HARMLESS),
        "cuts with a stride": ({"truncation": {**short, "stride": 5}}, HARMLESS),
        "fills up": (
            {
                "padding": {
                    "strategy": {"Fixed": 99},
                    "direction": "Right",
                    "pad_to_multiple_of": 0,
                    "pad_id": 0,
                    "pad_type_id": 0,
                    "pad_token": "x",
                }
            },
            HARMLESS,
        ),
        "an unread key": ({"foreign": [1, {"a": None}]}, EITHER),
    }
    for name, (fields, outcome) in cases.items():
        yield Corruption(f"tokenizer {name}", TOKENIZER, edit(TOKENIZER, lambda d, f=fields: d.update(f)), outcome)
    # "a" is in the prompt and gets an id that the embedding has no row for.
    for n in (259, 300, 2**31, 2**32 - 1):
        beyond = vocabulary(lambda vocab, n=n: vocab.update(a=n))
        yield Corruption(f"tokenizer id {n}", TOKENIZER, beyond, key=str(n))
        unused = vocabulary(lambda vocab, n=n: vocab.update(unused=n))
        yield Corruption(f"tokenizer unused id {n}", TOKENIZER, unused, HARMLESS)
    for n in (-1, 2**32, 1.5, "1", None, [1]):
        yield Corruption(f"tokenizer id {n!r}", TOKENIZER, vocabulary(lambda vocab, n=n: vocab.update(a=n)))
    for name, damage in {
        "merges of unknown tokens": model(merges=["Q\u0120 Q"]),
        "a merge of three": model(merges=["a b c"]),
        "merges that are numbers": model(merges=[1, 2]),
        "merges that are an object": model(merges={"a": "b"}),
        "a vocabulary that is a list": model(vocab=["a", "b"]),
        "no vocabulary": edit(TOKENIZER, lambda data: data["model"].pop("vocab")),
        "no model": edit(TOKENIZER, lambda data: data.pop("model")),
        "two models": twice(TOKENIZER, "model", "null"),
        "dropout of 2": model(dropout=2.0),
        "dropout that is a word": model(dropout="x"),
        "deep": put_text(TOKENIZER, "normalizer", "[" * 100_000 + "]" * 100_000),
        "nested normalizers": put_text(
            TOKENIZER, "normalizer", '{"type":"Sequence","normalizers":[' * 5000 + "]}" * 5000
        ),
    }.items():
        yield Corruption(f"tokenizer {name}", TOKENIZER, damage)
    random_merges = model(merges=[["a", "n"]], dropout=0.5)
    longer = vocabulary(lambda vocab: vocab.update(an=256))
    yield Corruption("tokenizer merges at random", TOKENIZER, one_after_the_other(longer, random_merges), MAY_DIFFER)
    yield Corruption("tokenizer without dropout", TOKENIZER, model(dropout=0.5), HARMLESS)
    yield Corruption("tokenizer with an empty vocabulary", TOKENIZER, model(vocab={}))
    yield from text_corruptions(TOKENIZER)


CORRUPTIONS = [*config_corruptions(), *index_corruptions(), *weight_corruptions(), *tokenizer_corruptions()]


def test_there_are_many_and_no_two_are_the_same():
    names = [c.name for c in CORRUPTIONS]
    assert len(names) == len(set(names))
    assert len(names) > 700
    assert sum(c.outcome == REFUSE for c in CORRUPTIONS) > 400


@pytest.mark.parametrize("corruption", CORRUPTIONS, ids=lambda c: c.name.encode("ascii", "replace").decode())
def test_a_corrupted_model_is_refused_or_gives_the_same_results(corruption, models, whole, scratch, capfd):
    directory = scratch / "model"
    shutil.copytree(models[corruption.model], directory)
    corruption.damage(directory)
    found = outcome(lambda: results(directory))
    assert capfd.readouterr().err == ""  # and no library printed a message of its own
    if isinstance(found, XlstmRayError):
        assert corruption.outcome != HARMLESS, found
        assert isinstance(found, (ConfigError, CheckpointError))
        check_message(found, str(directory), corruption.file, corruption.key or "")
        return
    assert corruption.outcome != REFUSE, f"accepted, with {found}"
    assert found.logits.isfinite().all()
    if (directory / TOKENIZER).read_bytes() != (models[corruption.model] / TOKENIZER).read_bytes():
        assert found.fingerprint != whole.fingerprint  # the tokenizer is part of the model's identity,
        whole = whole._replace(fingerprint=found.fingerprint)  # but all results must be the same
    if corruption.outcome != MAY_DIFFER or found[:3] == whole[:3]:
        assert same(found, whole)
        return
    # Another valid file: its values are used, and states of the undamaged model are refused.
    assert found.config == ModelConfig.from_file(directory / CONFIG)
    if found.config != whole.config:
        assert found.fingerprint != whole.fingerprint
    if corruption.file == CONFIG:
        said = json.loads((directory / CONFIG).read_text())
        for key in ("norm_eps", "eps", "gate_soft_cap", "output_logit_soft_cap", "chunk_size", "qk_dim_factor"):
            assert key not in said or getattr(found.config, key) == said[key]


def test_a_kernel_of_ours_that_there_is_not_is_refused(models, tmp_path):
    shutil.copytree(models["single"], tmp_path / "model")
    put(CONFIG, "chunkwise_kernel", "chunkwise--queued_no_such")(tmp_path / "model")
    with pytest.raises(ConfigError) as caught:
        xlstm_ray.load(tmp_path / "model", device="cpu")
    check_message(caught.value, CONFIG, "chunkwise_kernel", "queued_no_such", "queued_compiled_chunks")


@pytest.mark.parametrize("indexed", ["its shards", "the single file itself"])
def test_two_sets_of_weights_are_named_and_none_is_chosen(indexed, models, tmp_path):
    directory = tmp_path / "model"
    shutil.copytree(models["sharded"], directory)
    tensors = load_file(models["single"] / SINGLE_FILE)
    save_file({name: tensor * 0.5 for name, tensor in tensors.items()}, directory / SINGLE_FILE)
    if indexed == "its shards":
        with pytest.raises(CheckpointError) as caught:
            load(directory)
        check_message(caught.value, str(directory), "two sets of weights", SINGLE_FILE, INDEX_FILE)
    else:
        (directory / INDEX_FILE).write_text(json.dumps({"weight_map": dict.fromkeys(tensors, SINGLE_FILE)}))
        assert load(directory).prefill([1]).complete


# -- pickles -----------------------------------------------------------------------------------------------------------
class Trap:
    """When it is unpickled, it makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "model.pt", "weights.pth", "last.ckpt", SINGLE_FILE, TOKENIZER, CONFIG, INDEX_FILE]
)
@pytest.mark.parametrize("how", ["pickle", "torch"])
def test_pickles_are_refused_and_do_not_run(name, how, models, tmp_path):
    directory, sprung = tmp_path / "model", tmp_path / "sprung"
    shutil.copytree(models["single"], directory)
    if name not in (TOKENIZER, CONFIG):
        (directory / SINGLE_FILE).unlink()
    if how == "pickle":
        (directory / name).write_bytes(pickle.dumps(Trap(sprung)))
    else:
        torch.save({"backbone.embeddings.weight": Trap(sprung)}, directory / name)
    with pytest.raises((CheckpointError, ConfigError)) as caught:
        load(directory)
    check_message(caught.value, str(directory / name))
    if name.endswith((".bin", ".pt", ".pth", ".ckpt")):
        check_message(caught.value, "pickle", "convert", SINGLE_FILE)
    assert not sprung.exists()
    if how == "pickle":
        pickle.loads((directory / name).read_bytes())  # noqa: S301 the trap is a trap
        assert sprung.exists()


def test_a_pickled_state_is_refused_and_does_not_run(tmp_path):
    path, sprung = tmp_path / STATE, tmp_path / "sprung"
    path.write_bytes(pickle.dumps(Trap(sprung)))
    with pytest.raises(StateError) as caught:
        RecurrentState.load(path)
    check_message(caught.value, str(path))
    assert not sprung.exists()


def test_safetensors_beside_a_pickle_are_read(models, whole, tmp_path):
    directory, sprung = tmp_path / "model", tmp_path / "sprung"
    shutil.copytree(models["single"], directory)
    (directory / "pytorch_model.bin").write_bytes(pickle.dumps(Trap(sprung)))
    assert same(results(directory), whole)
    assert not sprung.exists()


# -- files that may not be read ----------------------------------------------------------------------------------------
@contextmanager
def somebody_else() -> Iterator[None]:
    """Permissions do not bind root, so become `nobody` for the test."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("name", [CONFIG, SINGLE_FILE, TOKENIZER, STATE, "the directory", "the directory above"])
def test_files_that_may_not_be_read(name, models):
    with tempfile.TemporaryDirectory() as root:  # pytest's own directories are closed to nobody
        directory = Path(root) / "above" / "model"
        shutil.copytree(models["single"], directory)
        load(directory).prefill("a").state.save(directory / STATE)
        for path in (Path(root), directory.parent, directory):
            path.chmod(0o755)
        for path in directory.iterdir():
            path.chmod(0o644)
        closed = {"the directory": directory, "the directory above": directory.parent}.get(name, directory / name)
        with somebody_else():
            load(directory)
            RecurrentState.load(directory / STATE)
        closed.chmod(0)
        with somebody_else(), pytest.raises(XlstmRayError) as caught:
            RecurrentState.load(directory / STATE) if name == STATE else load(directory)
        check_message(caught.value, str(closed) if closed != directory.parent else str(directory))
        if closed.is_dir():
            with somebody_else(), pytest.raises(StateError) as caught:
                RecurrentState.load(directory / STATE)
            check_message(caught.value, STATE)


@pytest.mark.parametrize("name", ["x" * 300, "x/" * 3000, "no\0name", "", "/dev/null", "/dev/zero"])
def test_names_that_are_no_files(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with no_hang(), pytest.raises((CheckpointError, ConfigError)):
        load(Path(name))
    with no_hang(), pytest.raises(StateError):
        RecurrentState.load(name)


# -- states ------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def lm(models: dict[str, Path]) -> xlstm_ray.Engine:
    return load(models["single"])


@pytest.fixture(scope="module")
def state(lm: xlstm_ray.Engine) -> RecurrentState:
    return lm.prefill(PROMPT).state


@pytest.fixture
def saved(state: RecurrentState, tmp_path: Path) -> Path:
    state.save(tmp_path / STATE)
    return tmp_path / STATE


def regions(data: bytes) -> dict[str, range]:
    """The parts of a state file: byte ranges."""
    size = int.from_bytes(data[:8], "little")
    start = {
        "length": 0,
        "metadata": 8,
        "tensor entries": data.index(b'"blocks.0.C"'),
        "payload": 8 + size,
    }
    edges = [*start.values(), len(data)]
    return {name: range(a, b) for name, a, b in zip(start, edges, edges[1:], strict=False)}


@pytest.mark.parametrize("region", ["length", "metadata", "tensor entries", "payload"])
def test_a_flipped_bit_anywhere_in_a_state_is_found(region, saved, state):
    data = saved.read_bytes()
    places = regions(data)[region]
    if region == "length":
        flips = [(at, bit) for at in places for bit in range(8)]
    elif region == "payload":
        flips = [(at, at % 8) for at in places[:: len(places) // 100]]
    else:
        flips = [(at, at % 8) for at in places]  # every byte
    assert len(flips) >= 64
    for at, bit in flips:
        damaged = bytearray(data)
        damaged[at] ^= 1 << bit
        saved.write_bytes(damaged)
        found = outcome(lambda: RecurrentState.load(saved))
        if isinstance(found, StateError):
            check_message(found, str(saved))
        else:  # a blank of the header's padding
            assert region == "tensor entries", f"byte {at}, bit {bit}"
            assert_same_state(found, state)


def assert_same_state(found: RecurrentState, state: RecurrentState) -> None:
    assert found.digest() == state.digest()
    for name in ("tokens", "prompt_hash", "model", "numerics", "complete"):
        assert getattr(found, name) == getattr(state, name)
    assert found.tensors.keys() == state.tensors.keys()
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in state.tensors.items())


def test_a_cut_state_is_found_wherever_it_is_cut(saved):
    data = saved.read_bytes()
    lengths = {*range(0, 16), *range(16, len(data), len(data) // 100), len(data) - 1}
    for length in sorted(lengths):
        saved.write_bytes(data[:length])
        with no_hang(), pytest.raises(StateError) as caught:
            RecurrentState.load(saved)
        check_message(caught.value, str(saved))
    saved.write_bytes(data + b"\0")
    with pytest.raises(StateError):
        RecurrentState.load(saved)


@pytest.mark.parametrize("what", ["a directory", "a pipe", "a link to itself", "a dangling link", "nothing"])
def test_something_else_in_a_states_place(what, saved):
    instead(STATE, what)(saved.parent)
    with no_hang(), pytest.raises(StateError) as caught:
        RecurrentState.load(saved)
    check_message(caught.value, str(saved))


def test_a_models_weights_are_no_state(models):
    with pytest.raises(StateError) as caught:
        RecurrentState.load(models["single"] / SINGLE_FILE)
    check_message(caught.value, SINGLE_FILE)


def metadata_of(path: Path) -> dict[str, Any]:
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["xlstm_ray"])


def forge(path: Path, tensors: dict[str, Tensor], text: str) -> None:
    """Write a state file with the right check sum of its metadata."""
    path.write_bytes(save(tensors, {"xlstm_ray": text, "check": hashlib.sha256(text.encode()).hexdigest()}))


METADATA: dict[str, Any] = {
    "format": ["xlstm-ray state 2", "", None, 1],
    "model": ["", "0" * 31, "x" * 32, "0" * 32 + "\n", None, 7],
    "numerics": [None, {}, [], "native", {"kernel": "native"}],
    "tokens": [None, [], 5, ["5"], [5.0], [-1], [True], [5, 5], [10**30], "5"],
    "prompt_hash": [None, [], "0" * 32, ["0" * 31], [0], ["0" * 32], ["0" * 32] * 2],
    "complete": [None, 0, 1, "true"],
    "digest": [None, "", "0" * 64, 7],
    "extra": [1],
}


@pytest.mark.parametrize(("key", "n"), [(key, n) for key, values in METADATA.items() for n in range(len(values))])
def test_a_states_metadata_is_checked_though_its_check_sum_is_right(key, n, saved, state):
    data = {**metadata_of(saved), key: METADATA[key][n]}
    forge(saved, state.tensors, json.dumps(data))
    with pytest.raises(StateError) as caught:
        RecurrentState.load(saved)
    check_message(caught.value, str(saved))


NUMERICS: dict[str, Any] = {
    "kernel": ["metal", "", None, "native\n"],
    "tile_size": [0, -1, 1 << 40, "32", 32.0, None, True],
    "chunk_size": [0, 1 << 40, "16"],
    "heads_per_band": [0, -1, None],
    "dtype": ["float16", "f32", None],
    "eager": [1, "true", None],
    "extra": [1],
}


@pytest.mark.parametrize(("key", "n"), [(key, n) for key, values in NUMERICS.items() for n in range(len(values))])
def test_a_states_numerics_are_checked_though_their_check_sum_is_right(key, n, saved, state):
    data = metadata_of(saved)
    data["numerics"][key] = NUMERICS[key][n]
    forge(saved, state.tensors, json.dumps(data))
    with pytest.raises(StateError) as caught:
        RecurrentState.load(saved)
    check_message(caught.value, str(saved), "numerics")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "1", "NaN", "[" * 100_000, '{"format": 1e999}', "\ud800"])
def test_a_states_metadata_is_json(text, saved, state):
    forge_text = text.encode("utf-8", "surrogatepass").decode("utf-8", "replace")
    forge(saved, state.tensors, forge_text)
    with no_hang(), pytest.raises(StateError) as caught:
        RecurrentState.load(saved)
    check_message(caught.value, str(saved))


def without(name: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.pop(name)


def having(name: str, make: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.update({name: make(tensors.get(name, torch.zeros(1, 2)))})


TENSORS: dict[str, Callable[[dict[str, Tensor]], object]] = {
    "C missing": without("blocks.1.C"),
    "m missing": without("blocks.0.m"),
    "logits missing": without("logits"),
    "none at all": lambda tensors: tensors.clear(),
    "a block more": having("blocks.2.C", lambda t: t),
    "a name of two lines": having("a\nb\x1b[2J", lambda t: t),
    "C turned": having("blocks.0.C", lambda t: t.transpose(-1, -2)[..., :1].contiguous()),
    "n flat": having("blocks.0.n", lambda t: t.flatten()),
    "n of two prompts": having("blocks.0.n", lambda t: t.repeat(2, 1, 1)),
    "logits of another vocabulary": having("logits", lambda t: t[:, :-1].contiguous()),
    "no dimensions": having("blocks.0.m", lambda t: t.flatten()[0].clone()),
    "nothing in it": having("blocks.0.m", lambda t: t[..., :0].contiguous()),
    "NaN in C": having("blocks.0.C", lambda t: t * float("nan")),
    "infinity in m": having("blocks.0.m", lambda t: t + float("inf")),
    "NaN in the logits": having("logits", lambda t: t / 0 * 0),
    **{
        str(dtype): having("blocks.0.n", lambda t, dtype=dtype: t.to(dtype))
        for dtype in (torch.float64, torch.bfloat16, torch.int32, torch.int8, torch.bool, torch.complex64)
    },
}


@pytest.mark.parametrize("name", TENSORS)
def test_a_states_tensors_are_checked_though_its_digest_is_right(name, saved, state, lm):
    tensors = dict(state.tensors)
    TENSORS[name](tensors)
    digest = ""
    if all(t.ndim for t in tensors.values()):
        fields = {key: getattr(state, key) for key in ("tokens", "prompt_hash", "model", "numerics", "complete")}
        digest = RecurrentState(tensors, **fields).digest()
    forge(saved, tensors, json.dumps({**metadata_of(saved), "digest": digest or "0" * 64}))
    with pytest.raises(StateError) as caught:
        lm.prefill(state=RecurrentState.load(saved))
    check_message(caught.value, str(saved))
    if digest and all(t.dtype == torch.float32 for t in tensors.values()):
        assert "digest" not in str(caught.value)  # the checksum is right: another check found the fault


def test_a_state_of_another_model_is_refused(saved, models):
    other = load(models["other"])
    with pytest.raises(StateError) as caught:
        other.prefill(PROMPT + " More.", state=RecurrentState.load(saved))
    check_message(caught.value, str(saved), "another model", other.fingerprint)


@pytest.mark.parametrize("option", [{"tile_size": 32}, {"chunk_size": 8}, {"heads_per_band": 1}, {"dtype": "bfloat16"}])
def test_a_state_of_other_numerics_is_refused(option, saved, models):
    options = {"device": "cpu", "chunkwise_backend": "native", "tile_size": 64, **option}
    other = xlstm_ray.load(models["single"], **options)
    with pytest.raises(StateError) as caught:
        other.prefill(PROMPT + " More.", state=RecurrentState.load(saved))
    (name, value), *_ = option.items()
    check_message(caught.value, str(saved), "other numerics", name, str(value))


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        ("Of cabbages and queens, and of much else.", "another prompt"),
        (" " + PROMPT, "another prompt"),
        (PROMPT.swapcase() + " More.", "another prompt"),
        (PROMPT[:-1], "give the same prompt or a longer one"),
        ("O", "give the same prompt or a longer one"),
        ([PROMPT, PROMPT], "has 1 prompts, but 2 were given"),
    ],
)
def test_a_state_of_another_prompt_is_refused(prompt, reason, saved, lm):
    with pytest.raises(StateError) as caught:
        lm.prefill(prompt, state=RecurrentState.load(saved))
    check_message(caught.value, str(saved), reason)


def test_a_sound_state_goes_on(saved, lm):
    longer = PROMPT + " More."
    expected = lm.prefill(longer)
    found = lm.prefill(longer, state=RecurrentState.load(saved))
    assert found.stats.resumed_tokens == len(lm.encode(PROMPT))
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-4)


def test_an_unfinished_state_asks_for_its_prompt(lm, tmp_path):
    part = lm.prefill("x" * 100, should_stop=iter([False, True]).__next__).state
    assert not part.complete
    part.save(tmp_path / STATE)
    for action in (lm.prefill, lm.generate):
        with pytest.raises(StateError) as caught:
            action(state=RecurrentState.load(tmp_path / STATE))
        check_message(caught.value, STATE, "stopped after 64 tokens", "give the same prompt")


@pytest.mark.parametrize("place", ["a directory", "no directory", "a file above", "a pipe", "a long name"])
def test_a_state_that_cannot_be_written_leaves_nothing(place, state, tmp_path):
    (tmp_path / "file").write_text("kept")
    path = {
        "a directory": tmp_path / "directory",
        "no directory": tmp_path / "none" / STATE,
        "a file above": tmp_path / "file" / STATE,
        "a pipe": tmp_path / "pipe",
        "a long name": tmp_path / ("x" * 300),
    }[place]
    (tmp_path / "directory").mkdir()
    os.mkfifo(tmp_path / "pipe")
    before = sorted(tmp_path.iterdir())
    with no_hang(), pytest.raises(StateError) as caught:
        state.save(path)
    check_message(caught.value, str(path))
    assert sorted(tmp_path.iterdir()) == before
    assert (tmp_path / "pipe").is_fifo()


@pytest.mark.parametrize("there", [True, False])
def test_nothing_is_written_through_a_link(there, state, tmp_path):
    target = tmp_path / "target"
    if there:
        state.save(target)
    before = target.read_bytes() if there else None
    (tmp_path / "link").symlink_to(target)
    for overwrite in (False, True):
        with pytest.raises(StateError) as caught:
            state.save(tmp_path / "link", overwrite=overwrite)
        check_message(caught.value, str(tmp_path / "link"), "is a link")
    assert (tmp_path / "link").is_symlink()
    assert (target.read_bytes() if target.exists() else None) == before


# -- prompts from Python -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "prompt",
    ["", [], ["a", ""], "half a pair \ud800", [259], [-1], [10**30], [1.5], ["a", 3], b"bytes", 7, {"a": 1}, [[]]],
)
def test_prompts_that_are_none(prompt, lm):
    with pytest.raises(UsageError) as caught:
        lm.prefill(prompt)
    check_message(caught.value)


def test_numerics_of_odd_values_are_named():
    mine = Numerics(kernel="native", tile_size=32, chunk_size=16, heads_per_band=2, dtype="float32")
    other = mine.model_copy(update={"tile_size": 64, "dtype": "bfloat16"})
    assert mine.differences(other) == "tile_size 32, not 64; dtype float32, not bfloat16"
