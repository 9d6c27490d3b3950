"""The executor of this process."""

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from time import perf_counter
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from xlstm_ray.layout import join_bands
from xlstm_ray.memory.sample import peak_device_bytes
from xlstm_ray.model import AnyState
from xlstm_ray.runtime.executor import Names, RowRef, StateRef, Step, StepResult, rows_of
from xlstm_ray.runtime.folded import FoldedWeights
from xlstm_ray.runtime.graphs import Graphs, Outcome
from xlstm_ray.runtime.moves import Moves, upload
from xlstm_ray.runtime.worker import Move, Worker
from xlstm_ray.sampling.logprobs import Logprobs


class _Pending(NamedTuple):
    """A step that the device is working on. kept: each worker's states of its blocks, to return with the result."""

    result: StepResult
    kept: list[list[AnyState | None]] | None
    wait: Callable[[], None]


class InProcessExecutor:
    """All stages and bands in this process. One band is called directly; several bands run on threads.

    stages: [stage][band] workers on one device. band_threads: how many bands work at once. streams: on cuda, how many
    streams the bands share (None: one a thread). torch_threads: torch's own threads for each band (None: an equal share
    of what torch has). graphs: on cuda with one band, decoding in place is captured, and windows of one prompt are.
    """

    local = True
    parallel = 1
    restarts = 0

    def __init__(
        self,
        stages: list[list[Worker]],
        *,
        band_threads: int,
        streams: int | None = None,
        torch_threads: int | None = None,
        graphs: bool = False,
    ):
        self.stages = stages
        self.chooses: Literal["no", "here", "there"] = "here" if graphs else "no"
        steps = isinstance(stages[0][0].blocks[0], FoldedWeights) and len(stages[0]) == 1
        self._tokens = [Graphs(workers[0], capture=graphs) for workers in stages] if graphs or steps else []
        self.device = self.logits_on = stages[0][0].device
        self.on_host = self.device.type == "cpu"
        self._bands = len(stages[0])
        self._pool: ThreadPoolExecutor | None = None
        self._streams: list[torch.cuda.Stream] = []
        self._names = Names(self._free)
        # A device works while the host prepares the next window: two steps in flight.
        self._depth = 1 if self.device.type == "cpu" else 2
        self._moves = Moves(self.device) if self.device.type == "cuda" else None
        self._made: dict[int, torch.cuda.Event] = {}  # by state that a window has made: when it is there
        self._pending: deque[_Pending] = deque()
        self._before = 0.0  # time of the last result, or when the first pending step was submitted
        if self._bands == 1 and torch_threads is not None:
            torch.set_num_threads(torch_threads)
        if self._bands > 1:
            torch_threads = torch_threads or max(1, torch.get_num_threads() // band_threads)
            self._pool = ThreadPoolExecutor(band_threads, "band", torch.set_num_threads, (torch_threads,))
            if self.device.type == "cuda":
                own = [torch.cuda.Stream(self.device) for _ in range(streams or band_threads)]
                self._streams = [own[band % len(own)] for band in range(self._bands)]

    def warm_up(self, batch: int, sizes: Iterable[int], chunk_size: int) -> None:
        for size in sizes:
            if self._tokens:
                for graphs in self._tokens:
                    self._call(graphs.warm_up, batch, size, chunk_size)
                continue
            # One at a time, but on the pool's threads: torch's thread count is compiled in.
            for worker in self._workers:
                self._call(worker.warm_up, batch, size, chunk_size, one_band=self._bands == 1)
        self.stages[-1][0].warm_up_logits(batch)  # on this thread, which computes logits
        self.stages[0][0].kernels.wait()  # all workers have the same ones
        self._synchronize()

    def load(self, tensors: dict[str, Tensor] | None, batch: int) -> StateRef:
        state = self._names.new(batch)

        def load(tensors: Mapping[str, Tensor] | None) -> None:
            for worker in self._workers:
                worker.load(state.number, tensors, batch)

        if self._moves is None or tensors is None:
            load(tensors)
        else:
            self._moves.to_device(tensors, load)
        return state

    def take(self, rows: Sequence[RowRef | None]) -> StateRef:
        state = self._names.new(len(rows))
        places = [None if row is None else (row.state.number, row.row) for row in rows]
        for worker in self._workers:
            worker.take(state.number, places)
        return state

    def save(self, state: StateRef) -> Callable[[], dict[str, Tensor]]:
        blocks, made = self._blocks(state), self._made.get(state.number)
        if self._moves is not None and made is not None:
            parts = zip(self._workers, blocks, strict=True)
            return self._moves.to_host({k: v for worker, each in parts for k, v in worker.named(each).items()}, made)
        joined = self._joined(blocks)
        if self._moves is not None:
            return self._moves.to_host(joined)
        self._synchronize()
        tensors = {name: tensor.cpu() for name, tensor in joined.items()}
        return lambda: tensors

    @property
    def has_room(self) -> bool:
        return len(self._pending) < self._depth

    def submit(self, state: StateRef, step: Step) -> StateRef:
        if not self._pending:
            self._before = perf_counter()
        if self._tokens and step.chunk_size == 1:
            state = state if step.in_place else self.take(rows_of(state))
            if self._made.pop(state.number, None) is not None and self._moves is not None and step.in_place:
                self._moves.settle()  # it may be on its way to the host, and tokens are written over it
            outcome = self._token(state, step)
            result = StepResult(outcome.x[:, 0], outcome.logits, 0.0, tokens=outcome.tokens, owner=step.owner)
            self._pending.append(_Pending(result, None, self._fence()))
            if len(self._tokens) == 1:
                self._tokens[0].run_ahead(state.number, step, outcome)
            return state
        assert step.choice is None, "only a captured step chooses"
        src, state = state, state if step.in_place else self._names.new(state.batch)
        start, end = upload(step.start, self.device), upload(step.end, self.device)
        x = self._forward(step.tokens, Move(src.number, state.number, start, end, step.chunk_size))
        if self._moves is not None and self._bands == 1:  # several are joined by a copy
            self._made[state.number] = torch.cuda.current_stream(self.device).record_event()
        rows = torch.arange(x.shape[0], device=x.device)
        hidden = x[rows, upload((step.end - 1).clamp(min=0), self.device)]  # on the host: on mps each is a launch
        logits = None
        if step.logits != "none":
            logits = self.stages[-1][0].logits(hidden if step.logits == "last" else x)
        logprobs = self.stages[-1][0].logprobs(x, step.following) if step.following is not None else None
        kept = self._blocks(state) if step.keep else None
        result = StepResult(hidden, logits, 0.0, None, logprobs, owner=step.owner)
        self._pending.append(_Pending(result, kept, self._fence()))
        return state

    def result(self) -> StepResult:
        result, kept, wait = self._pending.popleft()
        wait()
        now = perf_counter()
        seconds, self._before = now - self._before, now
        logprobs = result.logprobs and Logprobs(*(part.cpu() for part in result.logprobs))
        state = {name: tensor.cpu() for name, tensor in self._joined(kept).items()} if kept is not None else None
        return result._replace(seconds=seconds, state=state, logprobs=logprobs)

    def forget(self) -> None:
        self._pending.clear()

    def logits(self, hidden: Tensor) -> Callable[[], Tensor]:
        logits = self.stages[-1][0].logits(hidden)
        if self._moves is None:
            logits = logits.cpu()
            return lambda: logits
        wait = self._moves.to_host({"logits": logits})
        return lambda: wait()["logits"]

    @property
    def peak_memory_bytes(self) -> int:
        return peak_device_bytes(self.device) + sum(graphs.bytes for graphs in self._tokens)

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        self._pending.clear()
        self._tokens = []
        self.stages = []

    # ------------------------------------------------------------------------------------------------------------------
    @property
    def _workers(self) -> list[Worker]:
        return [worker for workers in self.stages for worker in workers]

    def _blocks(self, state: StateRef) -> list[list[AnyState | None]]:
        return [list(worker.states[state.number]) for worker in self._workers]

    def _joined(self, blocks: list[list[AnyState | None]]) -> dict[str, Tensor]:
        """Join the workers' states of their blocks -> tensors of all heads, on the device."""
        tensors: dict[str, Tensor] = {}
        each = iter(blocks)
        for workers in self.stages:
            tensors |= join_bands(worker.named(next(each)) for worker in workers)
        return tensors

    def _free(self, number: int) -> None:
        self._made.pop(number, None)
        for worker in self._workers:
            worker.free(number)

    def _token(self, state: StateRef, step: Step) -> Outcome:
        """A token of each row, in place, by each stage's graph."""
        x, outcome = step.tokens, None
        for graphs in self._tokens:
            outcome = graphs.step(state.number, x, step)
            x = outcome.x
        assert outcome is not None
        return outcome

    def _forward(self, tokens: Tensor, move: Move) -> Tensor:
        """Tokens (B, T) -> residual stream (B, T, D) after the last block, and the state `move.dst`."""
        x = self.stages[0][0].embed(tokens)
        for stage, workers in enumerate(self.stages):
            if self._tokens:
                x = self._tokens[stage].tile(x, move)
            elif self._bands == 1:
                x = workers[0].run_blocks(x, move)
            else:
                for n in range(len(workers[0].blocks)):
                    # Held until all bands have read it: its memory is the main stream's, which would use it again.
                    old = [worker.states[move.src][n] for worker in workers]
                    x = self._add(x, [partial(worker.run_mixer, n, x, move) for worker in workers])
                    del old
                    x = self._add(x, [partial(worker.run_ffn, n, x, move) for worker in workers])
        return x

    def _add(self, x: Tensor, calls: list[Callable[[], Tensor]]) -> Tensor:
        """x plus every band's partial sum, always in the order of the bands."""
        assert self._pool is not None
        if not self._streams:
            for future in [self._pool.submit(call) for call in calls]:
                x = x + future.result()
            return x
        main = torch.cuda.current_stream(self.device)
        ready = main.record_event()

        def on(stream: torch.cuda.Stream, call: Callable[[], Tensor], read: Tensor) -> tuple[Tensor, torch.cuda.Event]:
            with torch.cuda.stream(stream):
                stream.wait_event(ready)
                read.record_stream(stream)
                return call(), stream.record_event()

        for started in [self._pool.submit(on, s, c, x) for s, c in zip(self._streams, calls, strict=True)]:
            part, done = started.result()
            main.wait_event(done)
            part.record_stream(main)
            x = x + part
        return x

    def _call(self, fn: Callable, *args: object, **kwargs: object) -> None:
        if self._pool is None:
            fn(*args, **kwargs)
        else:
            self._pool.submit(fn, *args, **kwargs).result()

    def _fence(self) -> Callable[[], None]:
        """A function that waits until the device has finished all work submitted so far."""
        if self.device.type == "cuda":
            return torch.cuda.current_stream(self.device).record_event().synchronize
        return self._synchronize

    def _synchronize(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
