"""Executor: the protocol that moves windows of tokens through workers, and the executor of this process."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from time import perf_counter

import torch
from torch import Tensor

from xlstm_ray.layout import join_bands
from xlstm_ray.memory.sample import peak_device_bytes
from xlstm_ray.model import AnyState
from xlstm_ray.runtime.executor import Tile, TileResult
from xlstm_ray.runtime.worker import Worker


class InProcessExecutor:
    """All stages and bands in this process: direct calls with one band, a thread a band with several.

    stages: [stage][band] workers on one device. threads: how many bands work at once. On cuda the bands share so many
    streams (none given: one a thread). cores: how many threads of torch's own each has (none given: what there is,
    shared out).
    """

    restarts = 0

    def __init__(
        self, stages: list[list[Worker]], *, threads: int, streams: int | None = None, cores: int | None = None
    ):
        self.stages = stages
        self.device = stages[0][0].device
        self._bands = len(stages[0])
        self._pool: ThreadPoolExecutor | None = None
        self._streams: list[torch.cuda.Stream] = []
        if self._bands == 1 and cores is not None:
            torch.set_num_threads(cores)
        if self._bands > 1:
            cores = cores or max(1, torch.get_num_threads() // threads)
            self._pool = ThreadPoolExecutor(threads, "band", initializer=torch.set_num_threads, initargs=(cores,))
            if self.device.type == "cuda":
                own = [torch.cuda.Stream(self.device) for _ in range(streams or threads)]
                self._streams = [own[band % len(own)] for band in range(self._bands)]

    def warm_up(self, batch: int, sizes: Iterable[int]) -> None:
        for size in sizes:
            for bands in self.stages:
                # One after the other, but in the pool: the number of threads is compiled in.
                for worker in bands:
                    self._call(worker.warm_up, batch, size, alone=self._bands == 1)
        self.stages[-1][0].warm_up_logits(batch)  # in this thread, where they are computed
        self._synchronize()

    def set_state(self, tensors: dict[str, Tensor] | None, batch: int) -> None:
        for bands in self.stages:
            for worker in bands:
                worker.set_state(tensors, batch)

    def get_state(self) -> dict[str, Tensor]:
        self._synchronize()
        return self._state_of([[worker.state for worker in bands] for bands in self.stages])

    def stream(self, tiles: Iterable[Tile], *, all_logits: bool = False) -> Iterator[TileResult]:
        # A device works while the next tile is prepared, so one tile is under way when another is submitted.
        pending: deque[tuple[TileResult, bool, Callable[[], None]]] = deque()
        before = perf_counter()

        def finish() -> TileResult:
            nonlocal before
            result, keep, wait = pending.popleft()
            wait()
            now = perf_counter()
            state = result.held() if keep and result.held is not None else None
            result, before = result._replace(seconds=now - before, state=state), now
            return result

        for tile in tiles:
            hidden, logits = self._run(tile, all_logits)
            # Blocks replace their states and never write into them, so that holding one is keeping it.
            held = partial(self._state_of, [[list(worker.state) for worker in bands] for bands in self.stages])
            pending.append((TileResult(tile.number, hidden, logits, 0.0, held=held), tile.keep, self._fence()))
            if len(pending) > 1 or self.device.type == "cpu":
                yield finish()
        while pending:
            yield finish()

    def logits(self, hidden: Tensor) -> Tensor:
        return self.stages[-1][0].logits(hidden).cpu()

    def decode(self, tokens: Tensor, active: Tensor) -> Tensor:
        x = self._forward(tokens.unsqueeze(1), torch.zeros_like(tokens), active.long())
        return self.logits(x[:, 0])

    @property
    def peak_memory_bytes(self) -> int:
        return peak_device_bytes(self.device)

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        self.stages = []

    # ------------------------------------------------------------------------------------------------------------------
    def _state_of(self, states: list[list[list[AnyState]]]) -> dict[str, Tensor]:
        """[stage][band] blocks' states -> tensors of all heads."""
        tensors: dict[str, Tensor] = {}
        for bands, of_bands in zip(self.stages, states, strict=True):
            tensors |= join_bands(worker.get_state(state) for worker, state in zip(bands, of_bands, strict=True))
        return {name: tensor.cpu() for name, tensor in tensors.items()}

    def _run(self, tile: Tile, all_logits: bool) -> tuple[Tensor, Tensor | None]:
        x = self._forward(tile.tokens, tile.first, tile.last)
        rows = torch.arange(x.shape[0], device=x.device)
        hidden = x[rows, (tile.last - 1).clamp(min=0).to(x.device)]
        return hidden, self.stages[-1][0].logits(x) if all_logits else None

    def _forward(self, tokens: Tensor, first: Tensor, last: Tensor) -> Tensor:
        """tokens (B, T) -> residual stream (B, T, D) after the last block; the state moves on."""
        x = self.stages[0][0].embed(tokens)
        first, last = first.to(self.device), last.to(self.device)
        for bands in self.stages:
            for n in range(len(bands[0].blocks)):
                if self._bands == 1:
                    x = bands[0].run_block(n, x, first, last)
                else:
                    x = self._add(x, [partial(worker.mix, n, x, first, last) for worker in bands])
                    x = self._add(x, [partial(worker.feed, n, x) for worker in bands])
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
        """A call that waits until the device has done what has been asked of it so far."""
        if self.device.type == "cuda":
            return torch.cuda.current_stream(self.device).record_event().synchronize
        return self._synchronize

    def _synchronize(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
