"""The executor of the grid: an actor per (stage, band), and tiles in flight between them.

A tile goes RayExecutor.stream -> Recovery.play -> Pipeline.submit -> BandActor.run (or mix, feed) -> Pipeline.result.
"""

from collections.abc import Iterable, Iterator
from itertools import count
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from xlstm_ray.actors.link import Link
from xlstm_ray.actors.options import GridOptions
from xlstm_ray.actors.pipeline import Pipeline, Step
from xlstm_ray.actors.placement import Placement
from xlstm_ray.actors.recovery import Recovery
from xlstm_ray.actors.shard import WorkerSpec
from xlstm_ray.actors.watch import Watch
from xlstm_ray.actors.wire import from_wire
from xlstm_ray.errors import GridLost, one_line
from xlstm_ray.layout import Band
from xlstm_ray.runtime.executor import Tile, TileResult

DECODE_KEEP = 256  # tokens between two snapshots while decoding


class RayExecutor:
    """`Executor` over actors. `ray` is the connected module; bands [stage][band] is the grid.

    Raises UsageError where the cluster has no room for the grid, and what the actors raise while they load.
    """

    def __init__(self, ray: ModuleType, spec: WorkerSpec, bands: list[list[Band]], options: GridOptions):
        link = Link(ray)
        self.placement = Placement(link, spec, bands, options)
        self._pipeline = Pipeline(link, self.placement)
        self._watch = Watch(link, self.placement.seats, options)
        self.recovery = Recovery(link, self.placement, self._pipeline, self._watch, options)
        self.metrics = self._watch.metrics
        self._numbers = count()
        try:
            self.placement.open()
            self._watch.place()
        except BaseException as error:  # Ctrl-C too: actors and their places must not stay
            self.close()
            if isinstance(error, link.failure):
                raise GridLost(f"the grid did not start: {one_line(error)}") from error
            raise

    def warm_up(self, batch: int, sizes: Iterable[int]) -> None:
        self.recovery.warm_up(batch, list(sizes))

    def set_state(self, tensors: dict[str, Tensor] | None, batch: int) -> None:
        self.recovery.set_state(tensors, batch)

    def get_state(self) -> dict[str, Tensor]:
        def ask() -> list[Any]:
            for _ in self.recovery.play(()):  # after a recovery: what is in the log, again
                pass
            return self._pipeline.state()

        return self._pipeline.join(self.recovery.ask(ask))

    def stream(self, tiles: Iterable[Tile], *, all_logits: bool = False) -> Iterator[TileResult]:
        return self.recovery.play(Step(next(self._numbers), tile, all_logits) for tile in tiles)

    def logits(self, hidden: Tensor) -> Tensor:
        (logits,) = self.recovery.ask(lambda: self._pipeline.logits(hidden))
        return from_wire(logits, torch.float32).clone()

    def decode(self, tokens: Tensor, active: Tensor) -> Tensor:
        keep = self.recovery.steps_since_snapshot + 1 >= DECODE_KEEP
        tile = Tile(0, tokens.unsqueeze(1), torch.zeros_like(tokens), active.long(), keep)
        (result,) = self.stream([tile])
        return self.logits(result.hidden)

    def close(self) -> None:
        """End the watchdogs and the actors, and only then give their places back: device memory is free on return.

        Bounded in time whatever has become of Ray, and never an error: what is computed is computed.
        """
        self._watch.close()
        self._pipeline.close()
        self.placement.close()

    @property
    def peak_memory_bytes(self) -> int:
        """Summed over the actors that answer, each at its own peak."""
        try:
            return sum(sample.peak_bytes for sample in self.placement.samples(patient=False).values())
        except GridLost:  # a figure is no reason to lose a result
            return 0

    @property
    def restarts(self) -> int:
        return self.placement.restarts
