"""One token of a few rows through a stage as one CUDA graph: embedding, blocks, logits, the choice of the next token.

A graph has the addresses of what it reads and writes. So the states of rows that decode lie in seats, which never move:
a state is copied into a free seat before its first step in place, and stays there until nobody has it any more.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from xlstm_ray.errors import KernelError
from xlstm_ray.model import AnyState
from xlstm_ray.runtime.executor import Step
from xlstm_ray.runtime.folded import FoldedWeights
from xlstm_ray.runtime.worker import Worker
from xlstm_ray.sampling.sampler import Sampler

WARMING = -2  # the number of a state that only warms up


class Outcome(NamedTuple):
    """What a token's step leaves: the residual stream (B, 1, D), and of the last stage logits (B, vocabulary) and, if
    they are chosen there, tokens (B,)."""

    x: Tensor
    logits: Tensor | None = None
    tokens: Tensor | None = None


class Seat:
    """States of up to `rows` rows that never move, and the graphs that step them."""

    def __init__(self, worker: Worker, rows: int):
        self.rows, self.owner = rows, -1
        self.parts = [worker.fresh_state(n, rows) for n in range(len(worker.blocks))]
        self.graphs: dict[tuple, Captured] = {}
        self.given: dict[int, Tensor] = {}  # by the number of rows, (4, B) int64: tokens, start, end, slots

    def views(self, batch: int) -> list[AnyState]:
        """The states of the first rows."""
        return [tuple(part[:batch] for part in state) for state in self.parts]  # type: ignore[misc]


class Captured(NamedTuple):
    """A graph with the tensors that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    x: Tensor | None  # (B, 1, D), if this is not the first stage
    outcome: Outcome
    run: Callable[[], Outcome]  # what was captured: it has the other tensors, which must live as long as the graph


class Graphs:
    """A token of each row through a stage, in place, by a worker that has all heads.

    capture: as graphs, on seats; else the same kernels are launched one by one, on the states as they lie, to the same
    bits. Only one thread uses it, in one stream.
    """

    def __init__(self, worker: Worker, *, capture: bool):
        self._worker, self.captures = worker, capture
        self._seats: list[Seat] = []
        self._pool = torch.cuda.graph_pool_handle() if capture else None  # one: graphs never run at once

    def warm_up(self, batch: int) -> None:
        """Compile, and capture, a step of `batch` rows, on a state of its own."""
        worker, start = self._worker, torch.zeros(batch, dtype=torch.long)
        worker.load(WARMING, None, batch)
        x = start.unsqueeze(-1)
        if worker.shard.blocks.start > 0:
            x = torch.zeros(batch, 1, worker.config.hidden_size, dtype=worker.dtype, device=worker.device)
        self.step(WARMING, x, Step(x, start, start, 1, logits="last", in_place=True))
        worker.free(WARMING)

    def step(self, number: int, x: Tensor, step: Step) -> Outcome:
        """A step of the state `number`. x: tokens (B, 1) on the CPU in the first stage, else (B, 1, D).

        step.in_place: only such a state gets a seat.
        """
        B, first, choice, head = x.shape[0], x.ndim == 2, step.choice, step.logits != "none"
        sampler = choice.sampler if choice is not None else None
        rest = [step.start, step.end, choice.slots if choice is not None else torch.zeros_like(step.start)]
        given = torch.stack([x[:, 0] if first else step.start, *rest])
        if not (self.captures and step.in_place):
            states = [state for state in self._worker.states[number] if state is not None]
            stream = None if first else x.to(self._worker.device, self._worker.dtype)
            return self._whole(states, given.to(self._worker.device), stream, sampler, head=head)()
        seat = self._seated(number, B)
        key = B, first, head, sampler and (id(sampler), sampler.needs)
        if key not in seat.graphs:
            seat.graphs[key] = self._capture(seat, B, sampler, first=first, head=head)
        captured = seat.graphs[key]
        if step.follows:
            seat.given[B][1:].copy_(given[1:], non_blocking=True)
        else:
            seat.given[B].copy_(given, non_blocking=True)
        if captured.x is not None:
            captured.x.copy_(x, non_blocking=True)
        captured.graph.replay()
        # Copies: the next step, whose results may be asked for later, writes over these.
        stream, *others = captured.outcome
        return Outcome(stream.clone(), *(None if part is None else part.clone() for part in others))

    # ------------------------------------------------------------------------------------------------------------------
    def _seated(self, number: int, batch: int) -> Seat:
        """The seat of a state, into which it is copied if it has none."""
        state = self._worker.states[number]
        for seat in self._seats:
            if self._sits(seat, number):
                return seat
        free = [seat for seat in self._seats if not self._sits(seat, seat.owner)]
        large = [seat for seat in free if seat.rows >= batch]
        if not large:
            for small in free:  # before a larger one is made
                self._seats.remove(small)
            del free
            large = [Seat(self._worker, batch)]
            self._seats += large
        seat = large[0]
        views = seat.views(batch)
        for view, parts in zip(views, state, strict=True):
            assert parts is not None
            for to, part in zip(view, parts, strict=True):
                to.copy_(part)
        self._worker.states[number], seat.owner = list(views), number
        return seat

    def _sits(self, seat: Seat, number: int) -> bool:
        """Whether this state exists, and is in this seat."""
        state = self._worker.states.get(number)
        return seat.owner == number and state is not None and state[0] is not None and _same(state[0], seat.parts[0])

    def _capture(self, seat: Seat, B: int, sampler: Sampler | None, *, first: bool, head: bool) -> Captured:
        worker = self._worker
        given = seat.given.setdefault(B, torch.zeros(4, B, dtype=torch.long, device=worker.device))
        before, x = given.clone(), None
        if not first:
            x = torch.zeros(B, 1, worker.config.hidden_size, dtype=worker.dtype, device=worker.device)
        given.zero_()  # compiles; start = end, so that no state changes, and the idle slot is nobody's
        if sampler is not None:
            given[3] = sampler.idle
        run = self._whole(seat.views(B), given, x, sampler, head=head)
        try:
            for _ in range(2):
                run()
            torch.cuda.synchronize(worker.device)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                outcome = run()
        except RuntimeError as err:
            line = str(err).strip().splitlines()[0] if str(err).strip() else "no message"
            raise KernelError(
                f"decoding {B} row(s) cannot be captured as a CUDA graph: {line}; `cuda_graphs=False` decodes without"
            ) from err
        given.copy_(before)
        return Captured(graph, x, outcome, run)

    def _whole(
        self, states: list[AnyState], given: Tensor, x: Tensor | None, sampler: Sampler | None, *, head: bool
    ) -> Callable[[], Outcome]:
        """A step on these tensors."""
        worker, (tokens, start, end, slots) = self._worker, given
        folded = isinstance(worker.blocks[0], FoldedWeights)
        blocks = _folded(worker, states, len(tokens)) if folded else _copied(worker, states)

        def run() -> Outcome:
            outcome = blocks(x, tokens, (start, end), head and worker.ends.head is not None)
            if sampler is None or outcome.logits is None:
                return outcome
            chosen = sampler.choose(outcome.logits, slots)
            tokens.copy_(chosen)  # for a step that follows
            return outcome._replace(tokens=chosen)

        return run


def _copied(worker: Worker, states: list[AnyState]) -> Callable[..., Outcome]:
    """A step by the functions that make a state beside the old one."""

    def blocks(x: Tensor | None, tokens: Tensor, active: tuple[Tensor, Tensor], head: bool) -> Outcome:
        stream = x if x is not None else worker.embed(tokens.unsqueeze(-1))
        for n, state in enumerate(states):
            stream, made = worker.functions(n, stream, 1).block(stream, worker.blocks[n], state, *active)
            for old, new in zip(state, made, strict=True):
                old.copy_(new)
        return Outcome(stream, worker.logits(stream[:, 0]) if head else None)

    return blocks


def _folded(worker: Worker, states: list[AnyState], B: int) -> Callable[..., Outcome]:
    """A step by the Triton kernels, in place; 64 rows at a time, if there are more."""
    from xlstm_ray.kernels.quantized import plain
    from xlstm_ray.kernels.triton_decode import MOST_ROWS, Rows, Scratch, enter, skinny
    from xlstm_ray.runtime.triton_blocks import StepBlock

    shape, config, ends = worker.shape, worker.config, worker.ends
    step, tied = StepBlock(shape), ends.head is ends.embedding and ends.out_norm is not None
    pieces = [slice(first, min(first + MOST_ROWS, B)) for first in range(0, B, MOST_ROWS)]
    scratches = [Scratch(p.stop - p.start, config.hidden_size, shape.heads, shape.dhhv, worker.device) for p in pieces]
    stream = torch.empty(B, config.hidden_size, dtype=worker.dtype, device=worker.device)

    def blocks(x: Tensor | None, tokens: Tensor, active: tuple[Tensor, Tensor], head: bool) -> Outcome:
        logits = torch.empty(B, config.vocab_size, device=worker.device) if head else None
        for piece, scratch in zip(pieces, scratches, strict=True):
            rows = stream[piece]
            if x is None:
                enter(rows, scratch, tokens[piece], None if ends.embedding is None else plain(ends.embedding))
            else:
                rows.copy_(x[piece, 0])
                enter(rows, scratch)
            live = active[0][piece], active[1][piece]
            for w, state in zip(worker.blocks, states, strict=True):
                assert isinstance(w, FoldedWeights)
                C, n, m = (part[piece] for part in state)
                step.step_block(rows, w, (C, n, m), live, scratch)
            if logits is not None and ends.head is not None and not tied:
                eps = None if ends.out_norm is None else config.norm_eps
                cap = config.output_logit_soft_cap or 0.0
                skinny("head", rows, Rows(plain(ends.head)), logits[piece], scratch, norm_eps=eps, cap=cap)
        if head and tied:
            logits = worker.logits(stream)
        return Outcome(stream.unsqueeze(1), logits)

    return blocks


def _same(a: AnyState, b: AnyState) -> bool:
    """Whether two states begin at the same place."""
    return a[0].data_ptr() == b[0].data_ptr()
