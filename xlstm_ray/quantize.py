"""A copy of a model whose large matrices are 8- or 4-bit integers: tensor by tensor, whole or absent, resumable.

Each part (the embedding, a block, the head) is a file. Parts are collected in a directory beside the result, which gets
the result's name when all of them are there; a run that was broken off goes on with the parts that are missing.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors.torch import save
from torch import Tensor

from xlstm_ray import hub
from xlstm_ray.checkpoint import Checkpoint, digests_of
from xlstm_ray.config import ModelConfig, Quantization, read_json
from xlstm_ray.errors import ConfigError, OutputError, UsageError
from xlstm_ray.files import TEMPORARY, require_writable, write_whole
from xlstm_ray.headers import DIGESTS, INDEX_FILE, read_header
from xlstm_ray.kernels.quantized import packed, quantize
from xlstm_ray.tensors import EMBEDDING, HEAD, OUT_NORM, SCALE, ZERO, is_quantized, stored_tensors

PART = 1 << 18  # elements of a matrix that are quantized at a time: their 1 MiB of float32 stays in a core's cache
ORDER, LOCK = "quantize.json", ".lock"  # in the directory of parts: what was asked for, and who writes


def quantize_model(source: Path, out: Path, asked: Quantization) -> Iterator[tuple[int, int]]:
    """Write the quantized copy of the model directory `source` to the new directory `out`.

    Yields (parts that are there, parts in all), at first and after each part. Raises OutputError if `out` is there.
    """
    plain = ModelConfig.from_file(source / "config.json")
    if plain.quantization is not None:
        raise UsageError(f"{source}: is quantized already, to {plain.quantization.bits} bits; start from the original")
    if out.exists() or out.is_symlink():
        raise OutputError(f"{out}: is there already; a quantized model is written to a new directory")
    checkpoint = Checkpoint(source, plain)
    raw = read_json(source / "config.json", ConfigError)
    raw |= {"quantization": asked.model_dump(), "dtype": str(checkpoint.dtype).removeprefix("torch.")}
    config = ModelConfig.from_dict(raw, source=str(source / "config.json"))
    parts = list(_parts(config, checkpoint))
    sizes = _sizes(config, checkpoint)
    folder = out.with_name(f".{out.name}.parts")
    done = {name for name, _ in parts if (folder / name).is_file()}
    left = sum(sizes[tensor] for name, tensors in parts if name not in done for tensor in tensors)
    require_writable(folder / ORDER, option="OUT", makes_directory=True, size=left)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / LOCK, timeout=0):
            _begin(folder, source, checkpoint, asked)
            yield len(done), len(parts)
            for name, tensors in parts:
                if name not in done:
                    made = dict(_quantized(checkpoint, config, tensors))
                    digests = json.dumps({name: digests_of(tensor).hex() for name, tensor in made.items()})
                    write_whole(folder / name, save(made, {DIGESTS: digests}))
                    done.add(name)
                    yield len(done), len(parts)
            _finish(folder, source, raw, parts, sum(sizes.values()))
            os.rename(folder, out)
    except Timeout:
        raise OutputError(f"{out}: another process is writing it") from None
    except OSError as err:
        raise OutputError(f"{out}: cannot be written ({err.strerror}); run it again for the rest") from None


def _parts(config: ModelConfig, checkpoint: Checkpoint) -> Iterator[tuple[str, list[str]]]:
    """Each file's name, and the model's tensors in it."""
    names = list(checkpoint.shapes)
    groups = [[EMBEDDING]]
    groups += [[n for n in names if n.startswith(f"backbone.blocks.{b}.")] for b in range(config.num_blocks)]
    groups += [ends] if (ends := [n for n in (OUT_NORM, HEAD) if n in names]) else []
    for n, group in enumerate(groups, 1):
        yield f"model-{n:05}-of-{len(groups):05}.safetensors", sorted(group)


def _sizes(config: ModelConfig, checkpoint: Checkpoint) -> dict[str, int]:
    """Bytes that each tensor of the model takes in the copy."""
    sizes = {}
    for name, shape in checkpoint.shapes.items():
        stored = stored_tensors(config, {name: shape})
        each = 1 if is_quantized(config, name) else 4
        sizes[name] = sum(torch.Size(s).numel() * (each if n == name else 2) for n, s in stored.items())
    return sizes


def _begin(folder: Path, source: Path, checkpoint: Checkpoint, asked: Quantization) -> None:
    """Note what the parts are made of; refuse parts of something else."""
    files = {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in checkpoint.files}
    order = {"source": str(source.resolve()), "files": files, "quantization": asked.model_dump()}
    note = folder / ORDER
    if note.is_file() and read_json(note, OutputError) != order:
        raise OutputError(f"{folder}: has parts of another model or of other options; remove it, and run it again")
    write_whole(note, json.dumps(order, indent=1).encode())


def _quantized(checkpoint: Checkpoint, config: ModelConfig, tensors: list[str]) -> Iterator[tuple[str, Tensor]]:
    """These tensors as they are stored: integers, scales and zeros; all others in float32, but the ends as they are."""
    assert config.quantization is not None
    bits, group = config.quantization.bits, config.quantization.group_size
    for name in tensors:
        weight = checkpoint.read(name)
        if not is_quantized(config, name):
            yield name, weight if name in (EMBEDDING, HEAD) else weight.float()
            continue
        made: list[Any] = [quantize(rows, bits=bits, group=group) for rows in weight.split(_rows(weight))]
        values, scale, zero = ([part[n] for part in made] for n in range(3))
        yield name, packed(torch.cat(values), bits=bits)
        yield name + SCALE, torch.cat(scale)
        if bits == 4:
            yield name + ZERO, torch.cat(zero)


def _rows(weight: Tensor) -> int:
    return max(1, PART // weight.shape[1])


def _finish(folder: Path, source: Path, config: dict[str, Any], parts: list[tuple[str, list[str]]], size: int) -> None:
    """The files beside the parts, and a last look: what is there is a model that can be read."""
    weight_map = {tensor: name for name, _ in parts for tensor in read_header(folder / name)}
    write_whole(folder / INDEX_FILE, json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map}).encode())
    write_whole(folder / "config.json", json.dumps(config, indent=2).encode())
    for name in hub.SMALL:
        if name != "config.json" and (source / name).is_file():
            write_whole(folder / name, (source / name).read_bytes())
    Checkpoint(folder, ModelConfig.from_file(folder / "config.json"))
    for entry in list(folder.iterdir()):
        if entry.name in (ORDER, LOCK) or TEMPORARY.fullmatch(entry.name):
            entry.unlink()
