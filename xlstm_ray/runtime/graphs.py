"""One token of a few rows through a stage as one CUDA graph: embedding, blocks, logits, the choice of the next token.

A graph has the addresses of what it reads and writes. So the states of rows that decode lie in seats, which never move:
a state is copied into a free seat before its first step in place, and stays there until nobody has it any more.

A seat has two halves, and a step goes from one to the other. So the step after may run ahead, while the host reads the
tokens of this one; if the host then wants something else, what ran ahead is dropped, and nothing has changed.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from xlstm_ray.model import AnyState
from xlstm_ray.runtime.executor import Step
from xlstm_ray.runtime.folded import FoldedWeights
from xlstm_ray.runtime.tile_graphs import TileGraphs, capturing
from xlstm_ray.runtime.worker import Move, Worker
from xlstm_ray.sampling.sampler import Needs, Sampler

NOT_FINITE = -1  # in place of a token whose logits are not finite
WARMING = -2  # the number of a state that only warms up
States = list[AnyState]  # one for each block


class Outcome(NamedTuple):
    """What a token's step leaves: the residual stream (B, 1, D), and of the last stage logits (B, vocabulary) and, if
    they are chosen there, tokens (B,)."""

    x: Tensor
    logits: Tensor | None = None
    tokens: Tensor | None = None


class Seat:
    """States of up to `rows` rows that never move, in two halves, and the graphs that step them."""

    def __init__(self, worker: Worker, rows: int):
        self.rows, self.owner, self.half = rows, -1, 0  # the half in which the state is now
        self.last = -1  # the state of the last step
        self._parts = [[worker.fresh_state(n, rows) for n in range(len(worker.blocks))] for _ in range(2)]
        self._views: dict[tuple[int, int], States] = {}
        self.graphs: dict[tuple, Captured] = {}
        self.given: dict[int, Tensor] = {}  # by the number of rows, (4, B) int64: tokens, start, end, slots

    def views(self, batch: int, half: int) -> States:
        """The states of the first rows. Never change the list."""
        if (batch, half) not in self._views:
            views = [tuple(part[:batch] for part in state) for state in self._parts[half]]
            self._views[batch, half] = views  # type: ignore[assignment]
        return self._views[batch, half]

    def has(self, state: AnyState) -> bool:
        """Whether the first block's state is here."""
        return state[0].data_ptr() == self._parts[self.half][0][0].data_ptr()


class Captured(NamedTuple):
    """A graph with the tensors that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    x: Tensor | None  # (B, 1, D), if this is not the first stage
    outcome: Outcome
    run: Callable[[], Outcome]  # what was captured: it has the other tensors, which must live as long as the graph


class Ahead(NamedTuple):
    """A step that ran ahead of the host, for the state `number`: like `step`, with the tokens that that one chose."""

    number: int
    step: Step
    needs: Needs  # the sampler's
    taken: Tensor  # (B,) int64, pinned: these tokens
    known: torch.cuda.Event  # when they are
    outcome: Outcome

    def serves(self, number: int, step: Step) -> list[int] | None:
        """None if another step is wanted now; else the rows that have no token any more, which it has moved on."""
        mine, other = self.step, step
        if number != self.number or mine.choice is None or other.choice is None or mine.logits != other.logits:
            return None
        sampler = other.choice.sampler
        if sampler is not mine.choice.sampler or sampler.needs != self.needs:
            return None
        self.known.synchronize()
        before, now = mine.start < mine.end, other.start < other.end
        alike = (self.taken == other.tokens[:, 0]) & (mine.choice.slots == other.choice.slots) & before
        return torch.nonzero(before & ~now)[:, 0].tolist() if bool((alike | ~now).all()) else None


class Graphs:
    """A token of each row through a stage, in place, by a worker that has all heads.

    capture: as graphs, on seats; else the same kernels are launched one by one, on the states as they lie, to the same
    bits. tiles: windows of prompts are captured too, where the kernels can be. One thread at a time uses it, in one
    stream.
    """

    def __init__(self, worker: Worker, *, capture: bool, tiles: bool = True):
        self._worker, self.captures = worker, capture
        folded = all(isinstance(w, FoldedWeights) for w in worker.blocks)
        self._tiles = TileGraphs(worker) if capture and tiles and folded else None
        self._seats: list[Seat] = []
        self._pool = torch.cuda.graph_pool_handle() if capture else None  # one: graphs never run at once
        self._ahead: Ahead | None = None
        self._in_turn = 0  # steps of one state, one after the other

    @property
    def bytes(self) -> int:
        """Memory of the device that the allocator's peak does not have."""
        return self._tiles.bytes if self._tiles is not None else 0

    def tile(self, x: Tensor, move: Move) -> Tensor:
        """A window of prompts, x (B, T, D), through all blocks; makes the state `move.dst`."""
        done = self._tiles.run(x, move) if self._tiles is not None else None
        return done if done is not None else self._worker.run_blocks(x, move)

    def warm_up(self, batch: int, tokens: int, chunk_size: int) -> None:
        """Compile windows of so many tokens for `batch` rows. Captured are those of one token, on a state of its own,
        and of one row."""
        worker = self._worker
        if tokens > 1:
            if self._tiles is not None and batch == 1:
                self._tiles.capture(tokens, chunk_size)
            else:
                worker.warm_up(batch, tokens, chunk_size, one_band=True)
            return
        start = torch.zeros(batch, dtype=torch.long)
        worker.load(WARMING, None, batch)
        x = start.unsqueeze(-1)
        if worker.shard.blocks.start > 0:
            x = torch.zeros(batch, 1, worker.config.hidden_size, dtype=worker.dtype, device=worker.device)
        self.step(WARMING, x, Step(x, start, start, 1, logits="last", in_place=True))
        worker.free(WARMING)

    def step(self, number: int, x: Tensor, step: Step) -> Outcome:
        """A step of the state `number`. x: tokens (B, 1) on the CPU in the first stage, else (B, 1, D).

        step.in_place: only such a state gets a seat. Tokens are on their way to pinned memory.
        """
        choice, first = step.choice, x.ndim == 2
        slots = choice.slots if choice is not None else torch.zeros_like(step.start)
        given = torch.stack([x[:, 0] if first else step.start, step.start, step.end, slots])
        if not (self.captures and step.in_place):
            assert choice is None, "only a captured step chooses"
            states = [state for state in self._worker.states[number] if state is not None]
            stream = None if first else x.to(self._worker.device, self._worker.dtype)
            head = step.logits != "none"
            return self._whole((states, states), given.to(self._worker.device), stream, None, head=head)()
        seat = self._seated(number, len(x))
        self._in_turn = self._in_turn + 1 if seat.last == number else 0
        seat.last, ahead, self._ahead = number, self._ahead, None
        gone = None if ahead is None else ahead.serves(number, step)
        if ahead is not None and gone is not None:
            outcome = ahead.outcome
            for old, new in zip(seat.views(len(x), seat.half), seat.views(len(x), 1 - seat.half), strict=True):
                for row in gone:
                    for to, part in zip(new, old, strict=True):
                        to[row].copy_(part[row])
            if gone:
                seat.given[len(x)][1:].copy_(given[1:], non_blocking=True)
        else:
            captured = self._graph(seat, step, len(x), first=first)
            seat.given[len(x)].copy_(given, non_blocking=True)
            if captured.x is not None:
                captured.x.copy_(x, non_blocking=True)
            outcome = _replayed(captured)
        seat.half = 1 - seat.half
        self._worker.states[number] = list(seat.views(len(x), seat.half))
        if choice is not None and outcome.tokens is not None:
            # What the graph chose last is given to the next one.
            choice.sampler.count(seat.given[len(x)][3], seat.given[len(x)][0])
        return outcome

    def run_ahead(self, number: int, step: Step, outcome: Outcome) -> None:
        """Begin the step after this one with the tokens that it has chosen, as if the host had asked for it."""
        if step.choice is None or outcome.tokens is None or not (self.captures and step.in_place):
            return
        if not self._in_turn:  # a state's first step: while prompts are read, rows join after each one
            return
        seat, B = self._seated(number, len(step.tokens)), len(step.tokens)
        known = torch.cuda.current_stream(self._worker.device).record_event()
        made = _replayed(self._graph(seat, step, B, first=True))
        self._ahead = Ahead(number, step, step.choice.sampler.needs, outcome.tokens, known, made)

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
        views = seat.views(batch, seat.half)
        for view, parts in zip(views, state, strict=True):
            assert parts is not None
            for to, part in zip(view, parts, strict=True):
                to.copy_(part)
        self._worker.states[number], seat.owner = list(views), number
        return seat

    def _sits(self, seat: Seat, number: int) -> bool:
        """Whether this state exists, and is in this seat."""
        state = self._worker.states.get(number)
        return seat.owner == number and state is not None and state[0] is not None and seat.has(state[0])

    def _graph(self, seat: Seat, step: Step, B: int, *, first: bool) -> Captured:
        """The graph of such a step, out of the half in which the state is."""
        sampler, head = step.choice.sampler if step.choice is not None else None, step.logits != "none"
        key = B, seat.half, first, head, sampler and (id(sampler), sampler.needs)
        if key not in seat.graphs:
            seat.graphs[key] = self._capture(seat, B, sampler, first=first, head=head)
        return seat.graphs[key]

    def _capture(self, seat: Seat, B: int, sampler: Sampler | None, *, first: bool, head: bool) -> Captured:
        worker = self._worker
        given = seat.given.setdefault(B, torch.zeros(4, B, dtype=torch.long, device=worker.device))
        before, x = given.clone(), None
        if not first:
            x = torch.zeros(B, 1, worker.config.hidden_size, dtype=worker.dtype, device=worker.device)
        given.zero_()
        if sampler is not None:
            given[3] = sampler.idle
        states = seat.views(B, seat.half), seat.views(B, 1 - seat.half)
        run = self._whole(states, given, x, sampler, head=head)
        with capturing(f"decoding {B} row(s)"):
            for _ in range(2):  # compiles; the half that it writes to has nothing yet
                run()
            torch.cuda.synchronize(worker.device)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                outcome = run()
        given.copy_(before)
        return Captured(graph, x, outcome, run)

    def _whole(
        self, states: tuple[States, States], given: Tensor, x: Tensor | None, sampler: Sampler | None, *, head: bool
    ) -> Callable[[], Outcome]:
        """A step on these tensors. states: the old ones, and where the new ones are written."""
        worker, (tokens, start, end, slots) = self._worker, given
        folded = isinstance(worker.blocks[0], FoldedWeights)
        blocks = _folded(worker, states, len(tokens)) if folded else _copied(worker, states)

        def run() -> Outcome:
            outcome = blocks(x, tokens, (start, end), head and worker.ends.head is not None)
            if sampler is None or outcome.logits is None:
                return outcome
            chosen = sampler.pick(outcome.logits, slots)
            tokens.copy_(chosen)  # for the next step
            return outcome._replace(tokens=of_finite(chosen, outcome.logits))

        return run


def of_finite(chosen: Tensor, logits: Tensor) -> Tensor:
    """The tokens chosen (B,); NOT_FINITE where a row's logits (B, vocabulary) are not."""
    return torch.where(logits.sum(-1).isfinite(), chosen, NOT_FINITE)  # a sum keeps NaN and infinity


def _replayed(captured: Captured) -> Outcome:
    """Run a graph. Copies of its results: the next step, before theirs are asked for, writes over them."""
    captured.graph.replay()
    x, logits, tokens = captured.outcome
    if tokens is not None:  # begun now: later, the copy would wait for the steps submitted meanwhile
        tokens = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True).copy_(tokens, non_blocking=True)
    return Outcome(x.clone(), None if logits is None else logits.clone(), tokens)


def _copied(worker: Worker, states: tuple[States, States]) -> Callable[..., Outcome]:
    """A step by the functions that make a state beside the old one."""

    def blocks(x: Tensor | None, tokens: Tensor, active: tuple[Tensor, Tensor], head: bool) -> Outcome:
        stream = x if x is not None else worker.embed(tokens.unsqueeze(-1))
        for n, (old, new) in enumerate(zip(*states, strict=True)):
            stream, made = worker.functions(n, stream, 1).block(stream, worker.blocks[n], old, *active)
            for to, part in zip(new, made, strict=True):
                to.copy_(part)
        return Outcome(stream, worker.logits(stream[:, 0]) if head else None)

    return blocks


def _folded(worker: Worker, states: tuple[States, States], B: int) -> Callable[..., Outcome]:
    """A step by the Triton kernels; 64 rows at a time, if there are more."""
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
            for w, old, new in zip(worker.blocks, *states, strict=True):
                assert isinstance(w, FoldedWeights)
                pair = tuple(tuple(part[piece] for part in state) for state in (old, new))
                step.step_block(rows, w, pair, live, scratch)  # type: ignore[arg-type]
            if logits is not None and ends.head is not None and not tied:
                eps = None if ends.out_norm is None else config.norm_eps
                cap = config.output_logit_soft_cap or 0.0
                skinny("head", rows, Rows(plain(ends.head)), logits[piece], scratch, norm_eps=eps, cap=cap)
        if head and tied:
            logits = worker.logits(stream)
        return Outcome(stream.unsqueeze(1), logits)

    return blocks
