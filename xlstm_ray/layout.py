"""The split of a model over workers: stages of blocks, bands of heads."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from xlstm_ray.config import ModelConfig


@dataclass(frozen=True)
class Shard:
    """What one worker has of the model: blocks, heads, and columns of the feed-forward."""

    blocks: range
    heads: range
    ffn: range


def partition(count: int, parts: int) -> list[range]:
    """Split 0..count into `parts` contiguous ranges whose sizes differ by at most one."""
    edges = [count * part // parts for part in range(parts + 1)]
    return [range(a, b) for a, b in zip(edges, edges[1:], strict=False)]


def ranges(counts: Iterable[int]) -> list[range]:
    """Contiguous ranges of these lengths, from 0 on."""
    edges = [0, *accumulate(counts)]
    return [range(a, b) for a, b in pairwise(edges)]


def make_layout(config: ModelConfig, *, heads_per_band: int, stages: int | Sequence[int] = 1) -> list[list[Shard]]:
    """The shards, [stage][band]: every block and head once. The last band may have fewer heads.

    stages: their number, or the number of blocks of each.
    """
    starts = range(0, config.num_heads, heads_per_band)
    heads = [range(a, min(a + heads_per_band, config.num_heads)) for a in starts]
    ffn = [
        range(config.ffn_dim * r.start // config.num_heads, config.ffn_dim * r.stop // config.num_heads) for r in heads
    ]
    return [
        [Shard(blocks, h, f) for h, f in zip(heads, ffn, strict=True)]
        for blocks in (partition(config.num_blocks, stages) if isinstance(stages, int) else ranges(stages))
    ]


def join_bands(bands: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Join the tensors of a stage's bands: heads are dimension 1 of each."""
    first, *others = bands
    return {name: torch.cat([part, *(o[name] for o in others)], 1) for name, part in first.items()}
