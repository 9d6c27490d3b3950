"""The executor of the grid: an actor per (stage, band), or several with all blocks, and steps in flight between them.

A step goes RayExecutor.submit -> Recovery.make -> Pipeline.make -> ShardWork.run (with several bands run_mixer and
run_ffn) -> Pipeline.result.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

from xlstm_ray.actors.lineage import Made
from xlstm_ray.actors.link import Link
from xlstm_ray.actors.options import GridOptions
from xlstm_ray.actors.pipeline import Pipeline
from xlstm_ray.actors.placement import END_S, Placement
from xlstm_ray.actors.recovery import Recovery
from xlstm_ray.actors.shard import WorkerSpec
from xlstm_ray.actors.spans import Spans
from xlstm_ray.actors.watch import Watch
from xlstm_ray.actors.wire import from_wire
from xlstm_ray.errors import GridLost, one_line
from xlstm_ray.layout import Shard
from xlstm_ray.memory.need import state_bytes
from xlstm_ray.runtime.executor import Names, RowRef, StateRef, Step, StepResult


class RayExecutor:
    """`Executor` over actors. `ray` is the connected module; layout: [stage][band].

    Raises UsageError if the grid does not fit on the cluster, and errors of actors that load.
    """

    local = on_host = False
    logits_on = torch.device("cpu")

    def __init__(self, ray: ModuleType, spec: WorkerSpec, layout: list[list[Shard]], options: GridOptions):
        link = self._link = Link(ray)
        self.placement = Placement(link, spec, layout, options)
        self._pipeline = (Spans if options.spans > 1 else Pipeline)(link, self.placement)
        self.watch = Watch(link, self.placement.seats, options)
        self.recovery = Recovery(link, self.placement, self._pipeline, self.watch, options)
        self.metrics = self.watch.metrics
        cuda = spec.device == "cuda"
        self.parallel = self.placement.token_depth if cuda else len(layout)
        one_band = len(layout[0]) == 1
        self.chooses: Literal["no", "here", "there"] = "there" if one_band and (spec.graphs or not cuda) else "no"
        self._names, self._row = Names(self.recovery.free), state_bytes(spec.config)
        try:
            self.placement.open()
            self.watch.place()
        except BaseException as error:  # Ctrl-C too: actors and their placement group must not stay
            self.close()
            if isinstance(error, link.failure):
                raise GridLost(f"the grid did not start: {one_line(error)}{link.why()}") from error
            raise

    def warm_up(self, batch: int, sizes: Iterable[int], chunk_size: int) -> None:
        self.recovery.warm_up(batch, list(sizes), chunk_size)

    def load(self, tensors: dict[str, Tensor] | None, batch: int) -> StateRef:
        state = self._names.new(batch)
        self.recovery.make(Made(state.number, batch, source=tensors))
        return state

    def take(self, rows: Sequence[RowRef | None]) -> StateRef:
        state = self._names.new(len(rows))
        places = [None if row is None else (row.state.number, row.row) for row in rows]
        self.recovery.make(Made(state.number, len(rows), rows=places))
        return state

    def save(self, state: StateRef) -> Callable[[], dict[str, Tensor]]:
        tensors = self.recovery.save(state.number)
        return lambda: tensors

    @property
    def has_room(self) -> bool:
        return self.recovery.has_room

    def submit(self, state: StateRef, step: Step) -> StateRef:
        src, state = state, state if step.in_place else self._names.new(state.batch)
        keep = step.keep or self.recovery.is_due(src.number, src.batch * self._row)
        self.recovery.make(Made(state.number, state.batch, step=step._replace(keep=keep), src=src.number))
        return state

    def result(self) -> StepResult:
        (state, step), result = self.recovery.result()
        if step.choice is not None and result.tokens is not None:
            choice, active = step.choice, step.start < step.end
            choice.sampler.count(choice.slots[active], result.tokens[active].clamp(min=0))
            there = partial(self.recovery.last_logits, state)
            result = result._replace(
                logits=None, logits_of=there if result.logits is None else result.logits.__getitem__
            )
        return result

    def forget(self) -> None:
        self.recovery.forget()

    def logits(self, hidden: Tensor) -> Callable[[], Tensor]:
        (wire,) = self.recovery.ask(lambda: self._pipeline.logits(hidden))
        logits = from_wire(wire, torch.float32).clone()
        return lambda: logits

    def close(self) -> None:
        """End the watchdogs and actors, and then free their placement group: device memory is free on return.

        Returns in bounded time in any state of Ray and raises nothing: the results are already there.
        """
        self.watch.close()
        with suppress(GridLost, self._link.failure):  # what was begun still adds references
            self._link.ask(lambda: None, timeout_s=END_S)
        self._pipeline.close()
        self.placement.close()

    @property
    def peak_memory_bytes(self) -> int:
        """The sum of the peaks of all actors that answer."""
        try:
            return sum(sample.peak_bytes for sample in self.placement.samples(patient=False).values())
        except GridLost:  # a result must not be lost for a figure
            return 0

    @property
    def restarts(self) -> int:
        return self.placement.restarts
