"""What a model's blocks have to do for a token, and how long a stage of them takes on a device; for `plan`.

A tile's time is

    max(max(products, weights) + traffic, calls)
    products  operations of the matrix products / (the device's rate x the share of it that is reached)
    weights   bytes of the weights, read once a tile, / bandwidth
    traffic   bytes through memory between the products: activations, and the states of every chunk,
              / (bandwidth x the share of it that is reached)
    calls     the host's time to launch a block's work on a GPU, for any tile size

The shares were measured: on an H100 with a 7B model (docs/figures.md), and on two CPU cores.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from xlstm_ray.config import ModelConfig
from xlstm_ray.engine.windows import plan_windows
from xlstm_ray.measure.devices import GB, SHARES, Device
from xlstm_ray.memory.need import BlockTensors
from xlstm_ray.plan import OnPaper
from xlstm_ray.tensors import HEAD, OUT_NORM, Sizes, expected_tensors, sizes_of, stored_tensors

LINK = 1.25 * GB  # bytes a second between machines: an assumed 10 Gbit/s
SLSTM_STEP_S = 10e-6  # assumed: one token's step of an sLSTM block; each waits for the one before


@dataclass(frozen=True)
class Model:
    """A model's sizes, known without reading weights; in bytes, in the dtype of the run."""

    path: Path
    config: ModelConfig
    dtype: torch.dtype
    sizes: Sizes
    largest_tensor: int
    known_from: str


def read_model(paper: OnPaper) -> Model:
    """The sizes of a model, with or without its weights."""
    config, dtype, checkpoint = paper.config, paper.dtype, paper.checkpoint
    shapes = expected_tensors(config)
    known_from = f"config.json alone, as if stored in {str(paper.stored).removeprefix('torch.')}"
    largest = 0
    if checkpoint is not None:
        known_from = "config.json and the weights' headers"
        shapes, largest = checkpoint.shapes, checkpoint.largest_tensor_bytes
    else:
        shapes[OUT_NORM] = (config.hidden_size,)
        if not config.tie_word_embeddings:
            shapes[HEAD] = (config.vocab_size, config.hidden_size)
        shapes = stored_tensors(config, shapes)
    largest = largest or max(torch.Size(shape).numel() for shape in shapes.values()) * paper.stored.itemsize
    return Model(paper.model, config, dtype, sizes_of(config, shapes, dtype), largest, known_from)


@dataclass(frozen=True)
class Work:
    """A block's work for a token with chunks of L tokens: operations of its products, bytes between them."""

    flops: float
    traffic: float

    @classmethod
    def of(cls, config: ModelConfig, block: int, chunk: int, itemsize: int) -> "Work":
        c, L, s = config, chunk, itemsize
        D, NH, K, V, F, qk, v = c.hidden_size, c.num_heads, c.dhqk, c.dhhv, c.ffn_dim, c.qk_dim, c.v_dim
        parts = BlockTensors.of(c, chunk=L, itemsize=s)
        ffn_flops = 2 * 3 * D * F
        ffn_traffic = 5 * parts.residual + 2 * parts.ffn  # norm and residual; columns written and read
        if block in c.slstm_at:
            return cls(ffn_flops + 2 * 8 * D * c.dh, ffn_traffic + 5 * parts.residual + 2 * 5 * D * 4)
        products = 2 * (D * (2 * qk + 2 * v) + D * v + 2 * NH * D)
        cell = NH * (2 * L * K + 2 * L * V + 4 * K * V)  # scores, their products with v; with and into the state
        mixer = parts.columns + parts.states + parts.scores + parts.output + parts.output32
        return cls(ffn_flops + products + cell, ffn_traffic + 5 * parts.residual + 2 * mixer)


def stage_seconds(model: Model, device: Device, stage: range, T: int, chunk: int) -> float:
    """The time of a window of T tokens in a stage."""
    c, shares = model.config, SHARES[device.kind]
    # Between products a CPU computes in float32 and is bound by it: bfloat16 is not faster there.
    work = [Work.of(c, b, chunk, 4 if device.kind == "cpu" else model.dtype.itemsize) for b in stage]
    products = T * sum(w.flops for w in work) / (device.rate(model.dtype) * shares.products)
    weights = sum(model.sizes.blocks[b] for b in stage) / device.bandwidth
    traffic = T * sum(w.traffic for w in work) / (device.bandwidth * shares.traffic)
    steps = T * SLSTM_STEP_S * sum(b in c.slstm_at for b in stage)
    return max(max(products, weights) + traffic + steps, len(stage) * shares.call_s)


def prefill_seconds(model: Model, stages: Sequence[tuple[Device, range]], tokens: int, tile: int, chunk: int) -> float:
    """The time of a prefill's windows. Stages work on different tiles at once, so the slowest sets the pace."""

    def seconds(T: int) -> tuple[float, float]:
        """(between two such windows, until the first is through)"""
        each = [stage_seconds(model, device, stage, T, chunk) for device, stage in stages]
        sending = T * model.config.hidden_size * model.dtype.itemsize / LINK
        return max([*each, sending if len(stages) > 1 else 0.0]), sum(each) + sending * (len(stages) - 1)

    whole = max(0, tokens // tile - 1)  # these are alike; the last tile and the tail are planned as in the driver
    last = plan_windows([0], [tokens - whole * tile], tile_size=tile, chunk_size=chunk)
    windows = [window.size for window in last]
    return whole * seconds(tile)[0] + sum(seconds(T)[0] for T in windows[1:]) + seconds(windows[0])[1]
