"""A block's functions for a backend, compiled once for each size."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from xlstm_ray.kernels import Backend
from xlstm_ray.kernels.compiled import Compiler, compile_strict
from xlstm_ray.kernels.inductor import switched_off
from xlstm_ray.kernels.native import SlstmState, State
from xlstm_ray.kernels.quantized import Quantized
from xlstm_ray.model import (
    FEW_ROWS,
    AnyState,
    BandShape,
    BlockWeights,
    SlstmWeights,
    Weights,
    few_rows_product,
    ffn,
    head_product,
    mlstm_in,
    mlstm_mixer,
    mlstm_out,
    slstm_in,
    slstm_mixer,
    slstm_out,
    whole_block,
)
from xlstm_ray.runtime.folded import FoldedWeights

if TYPE_CHECKING:
    from xlstm_ray.kernels.onefile import Pending


class BlockFunctions(NamedTuple):
    """The functions of a block for one window shape (B, T), compiled unless the backend is the reference."""

    block: Callable[..., tuple[Tensor, AnyState]]  # (x, w, state, start, end) -> x, state; one band only
    mixer: Callable[..., tuple[Tensor, AnyState]]  # (x, w, state, start, end) -> partial sum, state
    ffn: Callable[..., Tensor]  # (x, w) -> partial sum


class Kernels:
    """The compiled functions of one backend, shared by all workers of a process.

    Each combination of window shape and weight shapes is compiled once, on first use. Nothing is recompiled silently.
    """

    def __init__(self, backend: Backend, *, t_inner: int, compiler: Compiler = compile_strict):
        self.backend, self.t_inner, self.compiler = backend, t_inner, compiler
        self.built: dict[tuple, BlockFunctions] = {}
        self.heads: dict[tuple, Callable[[Tensor, Any], Tensor]] = {}
        self._pending: list[Pending] = []

    def ahead(self, device: torch.device) -> AbstractContextManager[None]:
        """Within it, this thread compiles and does not wait for the C++ compiler: the results mean nothing."""
        if not self.backend.compiled or device.type != "cpu" or switched_off():
            return nullcontext()
        from xlstm_ray.kernels.onefile import ahead  # here: it imports the compiler, which an eager run does without

        return ahead(self._pending)

    def wait(self) -> None:
        """Wait for what was compiled ahead. Raises KernelError if it does not compile."""
        while self._pending:
            self._pending.pop(0).wait()

    def head(self, x: Tensor, head: Tensor | Quantized) -> Tensor:
        """head_product; compiled for few rows of integers, or if torch has no such product."""
        integers = isinstance(head, Quantized)
        theirs = not integers and (head.dtype.itemsize > 2 or head.device.type == "cuda")
        if not self.backend.compiled or theirs or len(x) > FEW_ROWS:
            return head_product(x, head)
        key = x.shape, *_shapes(head)
        if key not in self.heads:
            product = head_product if integers else few_rows_product
            self.heads.setdefault(key, self.compiler(product, f"head_{len(x)}"))
        return self.heads[key](x, head)

    def functions(
        self, s: BandShape, w: Weights | FoldedWeights, window: tuple[int, int], chunk_size: int
    ) -> BlockFunctions:
        """The functions for windows (B, T), a band of sizes `s`, and weights of w's kind and shapes."""
        shapes = _shapes(w)
        key = (s, type(w), window, min(chunk_size, window[1]), *shapes)  # one token needs no chunks
        if key not in self.built:
            if isinstance(w, FoldedWeights):
                made = self._triton(s, window[1], chunk_size)
            else:
                made = self._slstm(s, *window) if isinstance(w, SlstmWeights) else self._mlstm(s, *window, chunk_size)
            self.built.setdefault(key, made)  # all threads get the same one
        return self.built[key]

    @staticmethod
    def _triton(s: BandShape, T: int, chunk_size: int) -> BlockFunctions:
        from xlstm_ray.runtime.triton_blocks import StepBlock, TileBlock

        made = StepBlock(s) if T == 1 else TileBlock(s, chunk_size)
        return BlockFunctions(made.block, made.mixer, made.ffn)

    def _build(self, B: int, T: int, prefix: str = "") -> Callable[[str, Callable], Callable]:
        """Compiles a part of a block, by its name, for windows (B, T)."""
        return lambda name, fn: self.compiler(fn, f"{prefix}{name}_{B}x{T}") if self.backend.compiled else fn

    def _mlstm(self, s: BandShape, B: int, T: int, chunk_size: int) -> BlockFunctions:
        build, inside = self._build(B, T), self.backend.cell_inside(T)
        cell = self.backend.cell(T, chunk_size=chunk_size, t_inner=self.t_inner, compiler=self.compiler)
        if inside:

            def mixer(x: Tensor, w: BlockWeights, state: State, start: Tensor, end: Tensor) -> tuple[Tensor, State]:
                return mlstm_mixer(x, w, state, start, end, s, cell)

        else:
            before = build("mlstm_in", lambda x, w, start, end: mlstm_in(x, w, start, end, s))
            after = build("mlstm_out", lambda h, o, w: mlstm_out(h, o, w, s))

            def mixer(x: Tensor, w: BlockWeights, state: State, start: Tensor, end: Tensor) -> tuple[Tensor, State]:
                q, k, v, o, i, f = before(x, w, start, end)
                h, state = cell(q, k, v, i=i, f=f, state=state, eps=s.eps)
                return after(h, o, w), state

        return _around(mixer, s, build, inside=inside)

    def _slstm(self, s: BandShape, B: int, T: int) -> BlockFunctions:
        build, inside = self._build(B, T, "slstm_"), T == 1  # one step is compiled with the block around it
        cell = self.backend.slstm_cell(T, t_inner=self.t_inner, compiler=self.compiler)
        if inside:

            def mixer(
                x: Tensor, w: SlstmWeights, state: SlstmState, start: Tensor, end: Tensor
            ) -> tuple[Tensor, SlstmState]:
                return slstm_mixer(x, w, state, start, end, s, cell)

        else:
            before = build("in", lambda x, w, start, end: slstm_in(x, w, start, end, s))
            after = build("out", lambda h, w, like: slstm_out(h, w, like, s))

            def mixer(
                x: Tensor, w: SlstmWeights, state: SlstmState, start: Tensor, end: Tensor
            ) -> tuple[Tensor, SlstmState]:
                gates, token = before(x, w, start, end)
                h, state = cell(gates, recurrent=w.recurrent, token=token, state=state)
                return after(h, w, x), state

        return _around(mixer, s, build, inside=inside)


def _shapes(weights: object) -> list[object]:
    """What code is compiled for: shapes and dtypes of tensors, and the numbers beside them."""
    return [(leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else leaf for leaf in tree_leaves(weights)]


def _around(
    mixer: Callable[..., tuple[Tensor, Any]], s: BandShape, build: Callable[[str, Callable], Callable], *, inside: bool
) -> BlockFunctions:
    """A block's functions around its mixer. inside: the mixer is compiled as a whole, else its parts are compiled."""

    def own_ffn(x: Tensor, w: Weights) -> Tensor:
        return ffn(x, w, s)

    ffn_call = build("ffn", own_ffn)
    if inside:
        return BlockFunctions(build("block", whole_block(mixer, own_ffn)), build("mixer", mixer), ffn_call)
    return BlockFunctions(whole_block(mixer, ffn_call), mixer, ffn_call)
