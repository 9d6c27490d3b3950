"""A block's functions as a backend has them, compiled once for each size."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from xlstm_ray.kernels import Backend
from xlstm_ray.kernels.compiled import Compiler, compile_strict
from xlstm_ray.kernels.native import SlstmState, State
from xlstm_ray.model import (
    FEW_ROWS,
    AnyState,
    BandShape,
    BlockWeights,
    SlstmWeights,
    Weights,
    feed,
    few_rows_product,
    head_product,
    mix,
    mix_in,
    mix_out,
    slstm_in,
    slstm_mix,
    slstm_out,
    whole_block,
)


class Calls(NamedTuple):
    """The functions of a block for one window shape (B, T), compiled unless the backend is the reference."""

    block: Callable[..., tuple[Tensor, AnyState]]  # (x, w, state, first, last) -> x, state; one band only
    mix: Callable[..., tuple[Tensor, AnyState]]  # (x, w, state, first, last) -> partial sum, state
    feed: Callable[..., Tensor]  # (x, w) -> partial sum


class Kernels:
    """The compiled functions of one backend, shared by all workers of a process.

    Every combination of window shape and weight shapes is compiled once, on first use; nothing compiled is ever
    specialised again behind the caller's back.
    """

    def __init__(self, backend: Backend, *, t_inner: int, compiler: Compiler = compile_strict):
        self.backend, self.t_inner, self.compiler = backend, t_inner, compiler
        self.built: dict[tuple, Calls] = {}
        self.heads: dict[tuple, Callable[[Tensor, Tensor], Tensor]] = {}

    def head(self, x: Tensor, head: Tensor) -> Tensor:
        """As head_product; compiled for few rows, where torch has no such product."""
        if not self.backend.compiled or head.dtype.itemsize > 2 or head.device.type == "cuda" or len(x) > FEW_ROWS:
            return head_product(x, head)
        key = x.shape, head.shape, head.dtype
        if key not in self.heads:
            self.heads.setdefault(key, self.compiler(few_rows_product, f"head_{len(x)}"))
        return self.heads[key](x, head)

    def calls(self, s: BandShape, w: Weights, window: tuple[int, int], chunk_size: int) -> Calls:
        """The functions for windows (B, T) of a band with sizes `s` and weights of w's kind and shapes."""
        shapes = (None if tensor is None else (tensor.shape, tensor.dtype) for tensor in w)
        key = (s, type(w), window, min(chunk_size, window[1]), *shapes)  # one token has no chunks
        if key not in self.built:
            made = self._slstm(s, *window) if isinstance(w, SlstmWeights) else self._mlstm(s, *window, chunk_size)
            self.built.setdefault(key, made)  # the same one for all threads
        return self.built[key]

    def _compile(self, name: str, fn: Callable, B: int, T: int) -> Callable:
        return self.compiler(fn, f"{name}_{B}x{T}") if self.backend.compiled else fn

    def _mlstm(self, s: BandShape, B: int, T: int, chunk_size: int) -> Calls:
        cell = self.backend.cell(T, chunk_size=chunk_size, t_inner=self.t_inner, compiler=self.compiler)

        def build(name: str, fn: Callable) -> Callable:
            return self._compile(name, fn, B, T)

        feed_call = build("feed", lambda x, w: feed(x, w, s))
        if self.backend.cell_inside(T):

            def mix_whole(
                x: Tensor, w: BlockWeights, state: State, first: Tensor, last: Tensor
            ) -> tuple[Tensor, State]:
                return mix(x, w, state, first, last, s, cell)

            block = whole_block(mix_whole, lambda x, w: feed(x, w, s))
            return Calls(build("block", block), build("mix", mix_whole), feed_call)
        before = build("mix_in", lambda x, w, first, last: mix_in(x, w, first, last, s))
        after = build("mix_out", lambda h, o, w: mix_out(h, o, w, s))

        def mix_call(x: Tensor, w: BlockWeights, state: State, first: Tensor, last: Tensor) -> tuple[Tensor, State]:
            q, k, v, o, i, f = before(x, w, first, last)
            h, state = cell(q, k, v, i=i, f=f, state=state, eps=s.eps)
            return after(h, o, w), state

        return Calls(whole_block(mix_call, feed_call), mix_call, feed_call)

    def _slstm(self, s: BandShape, B: int, T: int) -> Calls:
        cell = self.backend.slstm_cell(T, t_inner=self.t_inner, compiler=self.compiler)

        def build(name: str, fn: Callable) -> Callable:
            return self._compile(f"slstm_{name}", fn, B, T)

        feed_call = build("feed", lambda x, w: feed(x, w, s))
        if T == 1:  # one step is compiled with the block around it

            def mix_one(
                x: Tensor, w: SlstmWeights, state: SlstmState, first: Tensor, last: Tensor
            ) -> tuple[Tensor, SlstmState]:
                return slstm_mix(x, w, state, first, last, s, cell)

            return Calls(
                build("block", whole_block(mix_one, lambda x, w: feed(x, w, s))), build("mix", mix_one), feed_call
            )
        before = build("in", lambda x, w, first, last: slstm_in(x, w, first, last, s))
        after = build("out", lambda h, w, like: slstm_out(h, w, like, s))

        def mix_call(
            x: Tensor, w: SlstmWeights, state: SlstmState, first: Tensor, last: Tensor
        ) -> tuple[Tensor, SlstmState]:
            gates, token = before(x, w, first, last)
            h, state = cell(gates, recurrent=w.recurrent, token=token, state=state)
            return after(h, w, x), state

        return Calls(whole_block(mix_call, feed_call), mix_call, feed_call)
