"""The worker of one shard: its weights and states, and the functions that run its blocks."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from xlstm_ray.checkpoint import Checkpoint
from xlstm_ray.config import ModelConfig
from xlstm_ray.kernels.fit import KERNEL
from xlstm_ray.kernels.quantized import Quantized
from xlstm_ray.layout import Shard
from xlstm_ray.memory.sample import trim
from xlstm_ray.model import AnyState, BandShape, EndWeights, Weights, logits
from xlstm_ray.runtime.blocks import BlockFunctions, Kernels
from xlstm_ray.runtime.executor import Following
from xlstm_ray.runtime.folded import FoldedWeights, fold, fold_ends
from xlstm_ray.runtime.moves import copy_all, side_by_side, upload
from xlstm_ray.sampling.logprobs import Logprobs, score


class Move(NamedTuple):
    """A step as a block sees it: it makes state `dst` from state `src`. Both may be the same."""

    src: int
    dst: int
    start: Tensor  # (B,) int64, on the worker's device, as in Step
    end: Tensor
    chunk_size: int


class Worker:
    """Weights and states of one (stage, band), blocks of either kind. Plain torch: knows neither threads nor Ray.

    With all heads in one band, `run_block` does a whole block in one call. With several bands, `run_mixer` and
    `run_ffn` return this band's partial sums of x (B, T, D), and the executor adds them up. A block makes a new state
    from an old one and never writes into the old one: holding a state is keeping it.
    """

    def __init__(
        self,
        config: ModelConfig,
        shard: Shard,
        blocks: Sequence[Weights | FoldedWeights],
        ends: EndWeights,
        kernels: Kernels,
    ):
        self.config, self.shard, self.blocks, self.ends, self.kernels = config, shard, blocks, ends, kernels
        self.shape = BandShape.of(config, len(shard.heads))
        self.device, self.dtype = blocks[0].up.device, blocks[0].up.dtype
        if self.dtype == torch.float8_e4m3fn:  # of matrices alone
            self.dtype = torch.bfloat16
        self._functions: dict[
            tuple[int, int, int, int], BlockFunctions
        ] = {}  # (block, rows, tokens, chunk size) -> its
        self.states: dict[int, list[AnyState | None]] = {}  # by number: a state for each block, None if not made yet

    def fresh_state(self, n: int, batch: int) -> AnyState:
        """The state of this stage's n-th block before the first token: all zeros, in the order of its names."""
        return tuple(torch.zeros(batch, *shape, device=self.device) for shape in self.shapes(n).values())  # type: ignore[return-value]

    def room(self, batch: int, made: Callable[..., Tensor] = torch.empty) -> list[AnyState | None]:
        """Tensors for a state of all blocks, side by side. made: torch.zeros or torch.empty."""
        each = [[(batch, *shape) for shape in self.shapes(n).values()] for n in range(len(self.blocks))]
        parts = iter(side_by_side([shape for shapes in each for shape in shapes], made, self.device))
        return [tuple(islice(parts, len(shapes))) for shapes in each]  # type: ignore[misc]

    def shapes(self, n: int) -> dict[str, tuple[int, ...]]:
        """The shapes of the n-th block's state, by their names, without the rows."""
        return self.config.state_shapes(self.shard.blocks[n], len(self.shard.heads))

    def load(self, number: int, tensors: Mapping[str, Tensor] | None, batch: int) -> None:
        """Make a state from these tensors of all heads, named as in RecurrentState. None: a fresh state.

        The tensors are copied: the kernels are compiled for fixed strides.
        """
        state = self.room(batch, torch.zeros if tensors is None else torch.empty)
        if tensors is not None:
            heads = slice(self.shard.heads.start, self.shard.heads.stop)
            here = self.named(state)
            copy_all([*here.values()], [tensors[name][:, heads] for name in here])
        self.states[number] = state

    def take(self, number: int, rows: Sequence[tuple[int, int] | None]) -> None:
        """Make a state from copies of these rows, each (state, row). None: a fresh row."""
        made: list[AnyState | None] = []
        for n in range(len(self.blocks)):
            empty = self.fresh_state(n, 1) if None in rows else ()
            parts = []
            for i in range(len(self.shapes(n))):
                each = [empty[i] if row is None else self._block(row[0], n)[i][row[1] : row[1] + 1] for row in rows]
                parts.append(torch.cat(each))
            made.append(tuple(parts))  # type: ignore[arg-type]
        self.states[number] = made

    def save(self, number: int) -> dict[str, Tensor]:
        """This band's tensors of a state, without a copy, named as in RecurrentState."""
        return self.named(self.states[number])

    def named(self, state: Sequence[AnyState | None]) -> dict[str, Tensor]:
        """The tensors of a state (one entry for each block), by their names in RecurrentState."""
        return {
            f"blocks.{self.shard.blocks[n]}.{name}": part
            for n, parts in enumerate(state)
            for name, part in zip(self.shapes(n), parts or (), strict=True)
        }

    def free(self, number: int, n: int | None = None) -> None:
        """Free a state, if it exists; with n, only the state of the n-th block."""
        if n is None or len(self.blocks) == 1:
            self.states.pop(number, None)
        elif number in self.states:
            self.states[number][n] = None
            if not any(self.states[number]):
                del self.states[number]

    def _block(self, number: int, n: int) -> AnyState:
        state = self.states[number][n]
        assert state is not None
        return state

    def put(self, number: int, n: int, state: AnyState) -> None:
        """Make this the n-th block's part of a state."""
        self.states.setdefault(number, [None] * len(self.blocks))[n] = state

    def warm_up(self, batch: int, tokens: int, chunk_size: int, *, one_band: bool) -> None:
        """Compile for windows (batch, tokens) by running a block of each kind on zeros; the states stay as they are.

        `Kernels.wait` then waits for the C++ compiler.
        """
        x = torch.zeros(batch, tokens, self.config.hidden_size, dtype=self.dtype, device=self.device)
        start = torch.zeros(batch, dtype=torch.long, device=self.device)
        for n in {type(w): n for n, w in enumerate(self.blocks)}.values():
            w, functions = self.blocks[n], self.functions(n, x, chunk_size)
            args = (x, w, self.fresh_state(n, batch), start, start + tokens)
            with self.kernels.ahead(self.device):
                if one_band:
                    functions.block(*args)
                else:
                    functions.mixer(*args)
                    functions.ffn(x, w)

    def warm_up_logits(self, batch: int) -> None:
        """Compile the logits of `batch` rows, if this worker has the head; as `warm_up`."""
        if self.ends.head is not None:
            with self.kernels.ahead(self.device):
                self.logits(torch.zeros(batch, self.config.hidden_size, dtype=self.dtype, device=self.device))

    def embed(self, tokens: Tensor) -> Tensor:
        """tokens (B, T) int64 -> residual stream (B, T, D) on this worker's device."""
        assert self.ends.embedding is not None
        tokens = upload(tokens, self.device)
        if isinstance(self.ends.embedding, Quantized):
            return self.ends.embedding.embed(tokens)
        return F.embedding(tokens, self.ends.embedding)

    def logits(self, x: Tensor) -> Tensor:
        """x (..., D) after the last block -> (..., vocabulary) float32."""
        return logits(x.to(self.device), self.ends, self.config, self.kernels.head)

    def logprobs(self, x: Tensor, following: Following) -> Logprobs:
        """x (B, T, D) after the last block -> (B, T) and (B, T, likeliest), here. Few logits are held at a time."""

        def head(rows: Tensor) -> Tensor:  # not compiled: the last piece has any number of rows
            return logits(rows, self.ends, self.config)

        tokens, likeliest = following
        tokens = upload(tokens, self.device)
        return score(x.to(self.device), tokens, likeliest, head=head, vocabulary=self.config.vocab_size)

    def run_block(self, n: int, x: Tensor, move: Move) -> Tensor:
        """Run this stage's n-th block, if this band has all heads."""
        state = self._block(move.src, n)
        x, state = self.functions(n, x, move.chunk_size).block(x, self.blocks[n], state, move.start, move.end)
        self.put(move.dst, n, state)
        return x

    def run_blocks(self, x: Tensor, move: Move) -> Tensor:
        """Run all blocks of this stage, if this band has all heads."""
        for n in range(len(self.blocks)):
            x = self.run_block(n, x, move)
        return x

    def run_mixer(self, n: int, x: Tensor, move: Move) -> Tensor:
        """This band's share of block n's mixer (mLSTM or sLSTM)."""
        state = self._block(move.src, n)
        y, state = self.functions(n, x, move.chunk_size).mixer(x, self.blocks[n], state, move.start, move.end)
        self.put(move.dst, n, state)
        return y

    def run_ffn(self, n: int, x: Tensor, move: Move) -> Tensor:
        """This band's share of block n's feed-forward."""
        return self.functions(n, x, move.chunk_size).ffn(x, self.blocks[n])

    def functions(self, n: int, x: Tensor, chunk_size: int) -> BlockFunctions:
        key = n, x.shape[0], x.shape[1], chunk_size
        if key not in self._functions:  # to compare the shapes of all weights takes longer than a small block's call
            made = self.kernels.functions(self.shape, self.blocks[n], (x.shape[0], x.shape[1]), chunk_size)
            self._functions.setdefault(key, made)
        return self._functions[key]


def build_worker(
    checkpoint: Checkpoint,
    kernels: Kernels,
    shard: Shard,
    *,
    dtype: torch.dtype,
    device: torch.device,
    float8: bool = False,
) -> Worker:
    """The worker of a shard, with its slice of the checkpoint. float8: of the large matrices, by the Triton kernels."""
    if kernels.backend.kernel != KERNEL:
        blocks, ends = checkpoint.load(shard, dtype=dtype, device=device)
    else:
        blocks, unfolded = checkpoint.load(shard, dtype=dtype, device=device, made=partial(fold, float8=float8))
        ends = fold_ends(unfolded)
    trim()  # what was freed of rows and scales lies between weights that stay: 4 to 10 MiB a block of 7B's widths
    return Worker(checkpoint.config, shard, blocks, ends, kernels)
