"""What a model's blocks have to do for a token, how long a stage of them takes on a device, and its memory; for `plan`.

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
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import torch

from xlstm_ray.config import ModelConfig
from xlstm_ray.engine.windows import plan_windows
from xlstm_ray.layout import partition
from xlstm_ray.measure.devices import GB, SHARES, Device
from xlstm_ray.memory.need import BlockTensors, Call, Loaded, Need, computed_need
from xlstm_ray.plan import OnPaper
from xlstm_ray.tensors import HEAD, OUT_NORM, Sizes, expected_tensors, sizes_of, stored_tensors

LINK_GBIT = 10.0  # between machines, assumed
HOP_S = 1.5e-3  # assumed: the calls for what goes from one machine to the next, besides the sending
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


def need(loaded: Loaded, model: Model, machines: int) -> Need:
    """The memory need of the machine that needs the most."""
    stages = partition(model.config.num_blocks, machines)
    needs = need_of(loaded, model, stages)
    return replace(needs[0], weights=max(n.weights for n in needs), state=max(n.state for n in needs))


def need_of(loaded: Loaded, model: Model, stages: Sequence[range]) -> list[Need]:
    """The memory need of the machine of each stage. On GPUs it leaves results where the next stage reads them, in a
    place for each step in flight (three a stage), and two more."""
    whole = computed_need(loaded, Call(1, 1, loaded.tile))
    if loaded.device == "cuda" and len(stages) > 1:
        result = loaded.tile * loaded.config.hidden_size * loaded.itemsize
        whole = replace(whole, tile=whole.tile + (3 * len(stages) + 2) * result)
    weights = [sum(model.sizes.blocks[b] for b in stage) for stage in stages]
    weights[0] += model.sizes.first
    weights[-1] += model.sizes.of_last if len(stages) > 1 else model.sizes.last
    shares = [len(stage) / model.config.num_blocks for stage in stages]
    return [replace(whole, weights=w, state=int(whole.state * s)) for w, s in zip(weights, shares, strict=True)]


def need_of_span(loaded: Loaded) -> Need:
    """The memory need of an actor with all blocks: that of a process, and states on their way to it and from it.

    It leaves a state where the next actor reads it, in places (one a block, and one more) of the largest block's size.
    Smaller places stay, if a smaller block came first. A block's state that arrives is there twice.
    """
    c, alone = loaded.config, computed_need(loaded, Call(1, 1, loaded.tile))
    kinds = {sum(map(prod, c.state_shapes(n, c.num_heads).values())) * 4 for n in range(c.num_blocks)}
    return replace(alone, state=alone.state + (c.num_blocks + 1) * sum(kinds) + 2 * max(kinds))


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


def prefill_seconds(
    model: Model,
    stages: Sequence[tuple[Device, range]],
    tokens: int,
    tile: int,
    chunk: int,
    *,
    link_gbit: float = LINK_GBIT,
) -> float:
    """The time of a prefill's windows. Stages work on different tiles at once, so the slowest sets the pace."""

    def seconds(T: int) -> tuple[float, float]:
        """(between two such windows, until the first is through)"""
        each = [stage_seconds(model, device, stage, T, chunk) for device, stage in stages]
        sending = T * model.config.hidden_size * model.dtype.itemsize / _link(link_gbit)
        return max([*each, sending if len(stages) > 1 else 0.0]), sum(each) + (sending + HOP_S) * (len(stages) - 1)

    whole, windows = _windows(tokens, tile, chunk)
    return whole * seconds(tile)[0] + sum(seconds(T)[0] for T in windows[1:]) + seconds(windows[0])[1]


def in_turn_seconds(
    model: Model, device: Device, spans: int, tokens: int, tile: int, chunk: int, *, link_gbit: float = LINK_GBIT
) -> float:
    """The time of a prefill whose tiles go in turn to as many actors with all blocks; docs/scaling.md has the formula.

    An actor begins a tile a block and a hop behind the one before. A round of all actors takes as long as a tile, or as
    its states are on their way, or as all these hops, if that is longer. The tail's windows follow, on one actor.
    """
    blocks = range(model.config.num_blocks)
    sent = [4 * sum(map(prod, model.config.state_shapes(b, model.config.num_heads).values())) for b in blocks]
    sending = [size / _link(link_gbit) for size in sent]
    alone = stage_seconds(model, device, blocks, tile, chunk)
    behind = max(stage_seconds(model, device, range(b, b + 1), tile, chunk) + sending[b] for b in blocks) + HOP_S
    fetched = max(alone, sum(sending))
    whole, windows = _windows(tokens, tile, chunk)
    in_turn = [size for size in windows if size >= min(tile, 2 * chunk)]
    tail = sum(stage_seconds(model, device, blocks, size, chunk) for size in windows[len(in_turn) :])
    tiles = whole + len(in_turn)
    if tiles < 2:
        return tiles * alone + tail
    rounds, last = divmod(tiles - 1, spans)
    return rounds * max(fetched, spans * behind) + last * behind + fetched + tail


def _link(gbit: float) -> float:
    """Bytes a second."""
    return gbit * GB / 8


def _windows(tokens: int, tile: int, chunk: int) -> tuple[int, list[int]]:
    """Whole tiles, which are alike, and the sizes of the windows that follow, at least one: as in the driver."""
    whole = max(0, tokens // tile - 1)
    last = plan_windows([0], [tokens - whole * tile], tile_size=tile, chunk_size=chunk)
    return whole, [window.size for window in last]
