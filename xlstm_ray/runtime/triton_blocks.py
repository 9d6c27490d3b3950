"""A block's functions by the Triton kernels, with folded weights: for tiles, and for a token of a few rows.

x (B, T, D) bfloat16 is overwritten by a whole block. A state is made beside the old one; `step_block`, which a CUDA
graph captures, writes it wherever it is told to.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from xlstm_ray.kernels.native import State
from xlstm_ray.kernels.triton_cell import HEAD_SCALE, CellShape, cell, gate_columns, gate_parts
from xlstm_ray.kernels.triton_decode import Rows, Scratch, enter, skinny, step
from xlstm_ray.kernels.triton_products import add_product8, glu, product8, quantized
from xlstm_ray.model import BandShape
from xlstm_ray.runtime.folded import FoldedWeights


def cell_shape(s: BandShape, hidden: int, chunk: int) -> CellShape:
    """The sizes that the kernels want of a band."""
    assert s.gate_soft_cap is not None, "the table of sizes refuses it"
    return CellShape(hidden, s.heads, s.dhqk, s.dhhv, chunk, s.eps, s.norm_eps, s.gate_soft_cap)


class TileBlock(NamedTuple):
    """The functions of a block for tiles, whole chunks."""

    shape: BandShape
    chunk: int

    def block(self, x: Tensor, w: FoldedWeights, state: State, start: Tensor, end: Tensor) -> tuple[Tensor, State]:
        """Overwrites x (B, T, D) with the new residual stream, and returns it and the new state."""
        made = _beside(state)
        self.tile_block(x.flatten(0, 1), w, (state, made), (start, end))
        return x, made

    def mixer(self, x: Tensor, w: FoldedWeights, state: State, start: Tensor, end: Tensor) -> tuple[Tensor, State]:
        """This band's share of the mixer's output (B, T, D), and the new state."""
        made = _beside(state)
        y = self._cell(x.flatten(0, 1), w, (state, made), (start, end))
        return self._mixed(y, w).view_as(x), made

    def ffn(self, x: Tensor, w: FoldedWeights) -> Tensor:
        """This band's share of the feed-forward's output (B, T, D)."""
        flat = x.flatten(0, 1)
        if w.up_scale is None:
            return torch.mm(self._activated(flat, w), w.down.t()).view_as(x)
        assert w.down_scale is not None
        act = self._activated8(quantized(flat, norm_eps=self.shape.norm_eps), w)
        return product8(act, (w.down, w.down_scale)).view_as(x)

    def tile_block(
        self, x: Tensor, w: FoldedWeights, states: tuple[State, State] | Tensor, tokens: tuple[Tensor, Tensor]
    ) -> None:
        """A tile of x (B T, D), which is overwritten. states: the old one, and where the new one is written; or the
        addresses of their six tensors, as in `cell`."""
        y = self._cell(x, w, states, tokens)
        if w.out_scale is None:
            x.addmm_(y, w.out.t())
            x.addmm_(self._activated(x, w), w.down.t())
        else:
            self._added(x, self._mixed(y, w), w)

    def _cell(
        self, x: Tensor, w: FoldedWeights, states: tuple[State, State] | Tensor, tokens: tuple[Tensor, Tensor]
    ) -> Tensor:
        """x (B T, D) -> gated heads (B T, nh V)."""
        gates, shape = gate_parts(x, w.gates), cell_shape(self.shape, x.shape[1], self.chunk)
        if w.qkvo_scale is None:
            qkvo = torch.mm(x, w.qkvo.t())
        else:
            qkvo = product8(quantized(x, norm_eps=self.shape.norm_eps), (w.qkvo, w.qkvo_scale))
        normed = w.qkvo_scale is not None
        return cell(gates, w.gates_bias, qkvo, states, tokens, shape, normed=normed)

    def _mixed(self, y: Tensor, w: FoldedWeights) -> Tensor:
        if w.out_scale is None:
            return torch.mm(y, w.out.t())
        scale = torch.full((len(y), 1), 1 / HEAD_SCALE.value, device=y.device)
        return product8((y, scale), (w.out, w.out_scale))

    def _activated(self, x: Tensor, w: FoldedWeights) -> Tensor:
        return glu(x, w.up, eps=self.shape.norm_eps)

    def _added(self, x: Tensor, y: Tensor, w: FoldedWeights) -> None:
        """x += y, then x += feed-forward of x, in float8."""
        assert w.down_scale is not None
        normed = quantized(x, y, norm_eps=self.shape.norm_eps)
        add_product8(x, self._activated8(normed, w), (w.down, w.down_scale))

    @staticmethod
    def _activated8(x: tuple[Tensor, Tensor], w: FoldedWeights) -> tuple[Tensor, Tensor]:
        assert w.up_scale is not None
        x8, scale = x
        return quantized(glu(x8, w.up, (scale, w.up_scale), eps=0.0))


class StepBlock(NamedTuple):
    """The functions of a block for one token of B rows."""

    shape: BandShape

    def scratch(self, x: Tensor) -> Scratch:
        """For x (B, 1, D)."""
        return Scratch(x.shape[0], x.shape[2], self.shape.heads, self.shape.dhhv, x.device)

    def block(self, x: Tensor, w: FoldedWeights, state: State, start: Tensor, end: Tensor) -> tuple[Tensor, State]:
        """Overwrites x (B, 1, D) with the new residual stream, and returns it and the new state."""
        made, rows, scratch = _beside(state), x.view(x.shape[0], -1), self.scratch(x)
        enter(rows, scratch)
        self.step_block(rows, w, (state, made), (start, end), scratch)
        return x, made

    def mixer(self, x: Tensor, w: FoldedWeights, state: State, start: Tensor, end: Tensor) -> tuple[Tensor, State]:
        """This band's share of the mixer's output (B, 1, D), and the new state."""
        made, rows, scratch, sum_ = _beside(state), x.view(x.shape[0], -1), self.scratch(x), torch.zeros_like(x)
        enter(rows, scratch)
        y = self._cell(rows, w, (state, made), (start, end), scratch)
        skinny("out", y, Rows(w.out, w.out_scale), sum_.view_as(rows), scratch)
        return sum_, made

    def ffn(self, x: Tensor, w: FoldedWeights) -> Tensor:
        """This band's share of the feed-forward's output (B, 1, D)."""
        rows, scratch, sum_ = x.view(x.shape[0], -1), self.scratch(x), torch.zeros_like(x)
        enter(rows, scratch)
        self._fed(rows, w, sum_.view_as(rows), scratch)
        return sum_

    def step_block(
        self, x: Tensor, w: FoldedWeights, states: tuple[State, State], tokens: tuple[Tensor, Tensor], scratch: Scratch
    ) -> None:
        """A token of x (B, D), which `enter` or the block before made, and which is overwritten.

        states: the old one, and where the new one is written, which may be the same place.
        """
        y = self._cell(x, w, states, tokens, scratch)
        skinny("out", y, Rows(w.out, w.out_scale), x, scratch)
        self._fed(x, w, x, scratch)

    def _cell(
        self, x: Tensor, w: FoldedWeights, states: tuple[State, State], tokens: tuple[Tensor, Tensor], scratch: Scratch
    ) -> Tensor:
        B, N, eps = x.shape[0], w.qkvo.shape[0], self.shape.norm_eps
        if w.together is not None:
            qkvo = torch.empty(B, w.together.shape[0], dtype=torch.float32, device=x.device)
            skinny("qkvo", x, Rows(w.together), qkvo, scratch, norm_eps=eps)
        else:
            qkvo = torch.empty(B, N + 3 * gate_columns(self.shape.heads), dtype=torch.float32, device=x.device)
            skinny("qkvo", x, Rows(w.qkvo, w.qkvo_scale), qkvo[:, :N], scratch, norm_eps=eps)
            skinny("gates", x, Rows(w.gates.flatten(0, 1)), qkvo[:, N:], scratch, norm_eps=eps)
        return step(qkvo, w.gates_bias, states, tokens, cell_shape(self.shape, x.shape[1], 1), scratch)

    def _fed(self, x: Tensor, w: FoldedWeights, out: Tensor, scratch: Scratch) -> None:
        act = torch.empty(x.shape[0], w.down.shape[1], dtype=torch.bfloat16, device=x.device)
        skinny("up", x, Rows(w.up, w.up_scale), act, scratch, norm_eps=self.shape.norm_eps)
        skinny("down", act, Rows(w.down, w.down_scale), out, scratch)


def _beside(state: State) -> State:
    """Room for a new state."""
    C, n, m = state
    return torch.empty_like(C), torch.empty_like(n), torch.empty_like(m)
