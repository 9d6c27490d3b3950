"""A window of one row through a stage's blocks as one CUDA graph, for each length that was warmed up.

Launched one by one, the kernels of a block take the host half a millisecond; a window of 256 tokens takes the GPU a
third of that, and with 1,024 tokens any other thread of the process slows it down. A graph has the addresses of what it
reads and writes, and a state must not move while somebody holds it: so the addresses of the old and of the new state
are data, which the cell's kernel reads.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from xlstm_ray.errors import KernelError
from xlstm_ray.model import AnyState
from xlstm_ray.runtime.folded import FoldedWeights
from xlstm_ray.runtime.worker import Move, Worker


class _Captured(NamedTuple):
    """A graph with the tensors that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    x: Tensor  # (1, T, D), overwritten
    tokens: Tensor  # (2, 1) int64: start and end
    places: Tensor  # (blocks, 6) int64: the addresses of each block's old and new state


class TileGraphs:
    """The graphs of a worker that has all heads and folded weights. One thread at a time uses it, in one stream."""

    def __init__(self, worker: Worker):
        self._worker = worker
        self._graphs: dict[tuple[int, int], _Captured] = {}  # by tokens and chunk
        self._pool = torch.cuda.graph_pool_handle()  # one: they never run at once, and nothing in it outlives a run
        self.bytes = 0  # of the pool, which the allocator's peak does not have

    def capture(self, tokens: int, chunk_size: int) -> None:
        """Capture windows of so many tokens."""
        if (tokens, chunk_size) in self._graphs:
            return
        from xlstm_ray.runtime.triton_blocks import TileBlock  # here: it imports triton

        worker, block = self._worker, TileBlock(self._worker.shape, chunk_size)
        x = torch.zeros(1, tokens, worker.config.hidden_size, dtype=worker.dtype, device=worker.device)
        active = torch.zeros(2, 1, dtype=torch.long, device=worker.device)
        states = [worker.fresh_state(0, 1) for _ in range(2)]
        places = _addresses([states[0]], [states[1]]).to(worker.device).repeat(len(worker.blocks), 1)
        rows, start, end = x.flatten(0, 1), *active
        weights = [w for w in worker.blocks if isinstance(w, FoldedWeights)]
        with capturing(f"a window of {tokens} tokens"):
            block.tile_block(rows, weights[0], places[0], (start, end))  # compiles
            torch.cuda.synchronize(worker.device)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                before = torch.cuda.memory_reserved(worker.device)
                for n, w in enumerate(weights):
                    block.tile_block(rows, w, places[n], (start, end))
                self.bytes += torch.cuda.memory_reserved(worker.device) - before
        self._graphs[tokens, chunk_size] = _Captured(graph, x, active, places)

    def run(self, x: Tensor, move: Move) -> Tensor | None:
        """x (1, T, D) -> the same after all blocks, in a tensor of its own; makes the state `move.dst`. None if no such
        window was captured."""
        captured = self._graphs.get((x.shape[1], move.chunk_size)) if len(x) == 1 else None
        if captured is None:
            return None
        new = self._worker.room(1)
        captured.places.copy_(_addresses(self._worker.states[move.src], new), non_blocking=True)
        captured.x.copy_(x)
        captured.tokens[0].copy_(move.start)
        captured.tokens[1].copy_(move.end)
        captured.graph.replay()
        self._worker.states[move.dst] = new
        return captured.x.clone()


@contextmanager
def capturing(what: str) -> Iterator[None]:
    """What is captured within it. Raises KernelError, with the library's reason, where that cannot be."""
    try:
        yield
    except RuntimeError as err:
        line = str(err).strip().splitlines()[0] if str(err).strip() else "no message"
        raise KernelError(
            f"{what} cannot be captured as a CUDA graph: {line}; `cuda_graphs=False` does without"
        ) from err


def _addresses(old: Sequence[AnyState | None], new: Sequence[AnyState | None]) -> Tensor:
    """(blocks, 6) int64, in pinned memory."""
    rows = [[part.data_ptr() for part in (*(a or ()), *(b or ()))] for a, b in zip(old, new, strict=True)]
    return torch.tensor(rows, pin_memory=True)
