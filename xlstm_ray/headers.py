"""Which tensors a model directory's safetensors files have, by their headers and their index."""

from collections.abc import Mapping
from pathlib import Path

import torch
from pydantic import TypeAdapter
from safetensors import SafetensorError, safe_open

from xlstm_ray.config import ModelConfig, parse_json, read_json
from xlstm_ray.errors import CheckpointError, one_line
from xlstm_ray.files import is_lfs_pointer, lfs_advice
from xlstm_ray.tensors import HEAD, OUT_NORM, expected_tensors, is_quantized, stored_tensors

SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
FLOATS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
DTYPES = {**FLOATS, "I8": torch.int8, "U8": torch.uint8}  # integers of 8 and of 4 bits


# In a file's metadata: each tensor's digests as it was written, in JSON. Only files that this program wrote have them.
DIGESTS = "xlstm-ray digests 1"


Header = dict[str, tuple[list[int], str]]  # each tensor's shape and dtype
_NOTED: TypeAdapter[dict[str, str]] = TypeAdapter(dict[str, str])


def check(
    directory: Path, config: ModelConfig, files: Mapping[str, Path], header: Header
) -> dict[str, tuple[int, ...]]:
    """Every tensor that config.json asks for is there as it asks, and no other: the shapes before quantization.

    Raises CheckpointError. files: each tensor's file.
    """
    whole = expected_tensors(config)
    if OUT_NORM in files or config.add_out_norm:
        whole[OUT_NORM] = (config.hidden_size,)
    if HEAD in files or not config.tie_word_embeddings:
        whole[HEAD] = (config.vocab_size, config.hidden_size)
    expected = stored_tensors(config, whole)
    for name, path in files.items():
        if name not in header:
            raise CheckpointError(f"{path}: tensor {name!r}, which the index promises, is missing")
        if name not in expected:
            raise CheckpointError(f"{path}: tensor {name!r} is not part of the model that config.json describes")
    for name, shape in expected.items():
        if name not in header:
            raise CheckpointError(
                f"{directory}: tensor {name} {shape}, which config.json asks for, is missing from the weights"
            )
        found, dtype = header[name]
        if tuple(found) != shape:
            raise CheckpointError(
                f"{files[name]}: tensor {name} has shape {tuple(found)}, config.json asks for {shape}"
            )
        allowed = list(FLOATS)
        if config.quantization is not None and is_quantized(config, name):
            allowed = ["I8" if config.quantization.bits == 8 else "U8"]
        if dtype not in allowed:
            raise CheckpointError(f"{files[name]}: tensor {name} is stored as {dtype}; allowed: {', '.join(allowed)}")
    return whole


def locate(directory: Path) -> dict[str, Path]:
    """Which file holds which tensor, from model.safetensors or its index."""
    single, index = directory / SINGLE_FILE, directory / INDEX_FILE
    if not index.is_file():
        if single.is_file():
            return dict.fromkeys(read_header(single), single)
        try:
            beside = sorted(directory.iterdir())
        except OSError as err:
            raise CheckpointError(f"{directory}: cannot be read ({err.strerror})") from None
        pickled = next((p for p in beside if p.suffix in (".bin", ".pt", ".pth", ".ckpt")), None)
        if pickled:
            raise CheckpointError(
                f"{pickled}: pickled weights can run code when opened and are refused; convert them to {SINGLE_FILE}"
            )
        raise CheckpointError(f"{directory}: has neither {SINGLE_FILE} nor {INDEX_FILE}")
    content = read_json(index, CheckpointError)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: weight_map must be an object of tensor names and file names")
    files = {}
    for name, file in weight_map.items():
        # A file name, never a path: a foreign index must not make us read outside the model's directory.
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise CheckpointError(
                f"{index}: tensor {name!r} is said to be in {str(file)[:80]!r}, which is not a .safetensors file name"
            )
        files[name] = directory / file
    if single.is_file() and single not in files.values():
        raise CheckpointError(
            f"{directory}: has two sets of weights, {SINGLE_FILE} and the shards that {INDEX_FILE} names; "
            "move one of them elsewhere"
        )
    for path in sorted(set(files.values())):
        try:
            missing = not path.is_file()
        except OSError:  # a name that no file can have
            missing = True
        if missing:
            raise CheckpointError(f"{directory}: {path.name[:80]!r} is missing, but {INDEX_FILE} names it")
    return files


def read_header(path: Path) -> Header:
    """Every tensor's shape and dtype name; the library checks offsets and the file's length."""
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}
            header = {name: (part.get_shape(), part.get_dtype()) for name, part in slices.items()}
        with path.open("rb") as raw:
            parse_json(raw.read(int.from_bytes(raw.read(8), "little")))  # the library takes the last of equal names
        return header
    except (SafetensorError, OSError, ValueError, RecursionError) as err:
        if is_lfs_pointer(path):
            raise CheckpointError(lfs_advice(path)) from None
        raise CheckpointError(f"{path}: is not a whole safetensors file: {one_line(err)}") from None


def read_digests(path: Path) -> dict[str, bytes]:
    """The digests that a file's writer noted, by tensor; none in files of others."""
    with safe_open(path, framework="pt") as file:
        noted, names = (file.metadata() or {}).get(DIGESTS), set(file.keys())
    if noted is None:
        return {}
    try:
        found = {name: bytes.fromhex(digits) for name, digits in _NOTED.validate_json(noted).items()}
        if found.keys() != names:
            raise ValueError("they are of other tensors")
        return found
    except ValueError as err:  # pydantic's too
        raise CheckpointError(f"{path}: its digests cannot be read: {one_line(err)}") from None
