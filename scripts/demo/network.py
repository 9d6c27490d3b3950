"""The project's model, whole and differentiable: train.py trains it and evaluate.py evaluates it.

Its mathematics is xlstm_ray.model with xlstm_ray.kernels.chunkwise, unchanged. Only the way from tensors to weights is
different: xlstm_ray.checkpoint copies slices out of files, and no gradient passes through that.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from xlstm_ray.checkpoint import Checkpoint
from xlstm_ray.config import ModelConfig
from xlstm_ray.kernels.chunkwise import mlstm_chunkwise
from xlstm_ray.kernels.native import State
from xlstm_ray.layout import make_layout
from xlstm_ray.model import BandShape, BlockWeights, EndWeights, ffn, logits, mlstm_mixer, whole_block
from xlstm_ray.tensors import EMBEDDING, HEAD, OUT_NORM


@dataclass(frozen=True)
class Model:
    """All blocks and heads in one place."""

    config: ModelConfig
    blocks: list[BlockWeights]
    ends: EndWeights

    @classmethod
    def of_tensors(cls, tensors: dict[str, Tensor], config: ModelConfig, dtype: torch.dtype) -> "Model":
        """From tensors under Hugging Face names, differentiably: rounded to bfloat16 as stored, then `dtype`."""
        stored = {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}

        def weights(n: int) -> BlockWeights:
            at, layer = f"backbone.blocks.{n}.", "mlstm_layer."
            w = {name.removeprefix(at): tensor for name, tensor in stored.items() if name.startswith(at)}
            return BlockWeights(
                mixer_norm=w["norm_mlstm.weight"].to(dtype),
                mixer_norm_bias=None,
                qkvo=torch.cat([w[f"{layer}{part}.weight"] for part in ("q", "k", "v", "ogate_preact")]).to(dtype),
                qkvo_bias=None,
                gates=torch.cat([w[f"{layer}{part}gate_preact.weight"] for part in "if"]).float(),
                gates_bias=torch.cat([w[f"{layer}{part}gate_preact.bias"] for part in "if"]).float(),
                head_norm=w[f"{layer}multihead_norm.weight"].to(dtype),
                head_norm_bias=None,
                out=w[f"{layer}out_proj.weight"].to(dtype),
                out_bias=None,
                ffn_norm=w["norm_ffn.weight"].to(dtype),
                ffn_norm_bias=None,
                up=torch.cat([w["ffn.proj_up_gate.weight"], w["ffn.proj_up.weight"]]).to(dtype),
                up_bias=None,
                down=w["ffn.proj_down.weight"].to(dtype),
                down_bias=None,
            )

        ends = EndWeights(*(stored[name].to(dtype) for name in (EMBEDDING, OUT_NORM, HEAD)))
        return cls(config, [weights(n) for n in range(config.num_blocks)], ends)

    @classmethod
    def read(cls, folder: Path, dtype: torch.dtype, device: torch.device) -> "Model":
        config = ModelConfig.from_file(folder / "config.json")
        [[shard]] = make_layout(config, heads_per_band=config.num_heads)
        return cls(config, *Checkpoint(folder, config).load(shard, dtype=dtype, device=device))

    def fresh_state(self, batch: int) -> list[State]:
        c, device = self.config, self.blocks[0].qkvo.device
        shapes = [(batch, c.num_heads, c.dhqk, c.dhhv), (batch, c.num_heads, c.dhqk), (batch, c.num_heads, 1)]
        return [tuple(torch.zeros(shape, device=device) for shape in shapes) for _ in self.blocks]

    def hidden(
        self, tokens: Tensor, lengths: Tensor | None = None, state: list[State] | None = None, drop: float = 0.0
    ) -> tuple[Tensor, list[State]]:
        """tokens (B, T), of which `lengths` (B,) count -> residual stream (B, T, D) and state after each row's end.

        T need not be a multiple of the chunk. `drop`: dropout of what each block adds to the residual stream.
        """
        B, T = tokens.shape
        chunk = self.config.chunk_size
        cell = partial(mlstm_chunkwise, chunk_size=chunk)
        shape = BandShape.of(self.config, self.config.num_heads)
        block = whole_block(
            lambda x, w, state, start, end: mlstm_mixer(x, w, state, start, end, shape, cell),
            lambda x, w: ffn(x, w, shape),
        )
        start = torch.zeros(B, dtype=torch.int64, device=tokens.device)
        end = torch.full_like(start, T) if lengths is None else lengths
        x = F.embedding(F.pad(tokens, (0, -T % chunk)), self.ends.embedding)
        after = []
        for weights, before in zip(self.blocks, state or self.fresh_state(B), strict=True):
            y, new = block(x, weights, before, start, end)
            x = x + F.dropout(y - x, drop) if drop else y
            after.append(new)
        return x[:, :T], after

    def logits(self, x: Tensor) -> Tensor:
        return logits(x, self.ends, self.config)
