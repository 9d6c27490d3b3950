"""The watchdog of one node: samples its actors' memory, empties caches at a soft limit, reports to the driver.

Watch places one on each node that has actors. Actors answer through a concurrency group of their own, so that a
busy one answers too. What a hard limit means, the driver decides: it stops between two tiles. Nothing here imports
torch.
"""

import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any, NamedTuple

import psutil

from xlstm_ray.memory.sample import Sample
from xlstm_ray.memory.watchdog import Event, Level, Limits
from xlstm_ray.supervisor.processes import Machine, Process


class ActorSample(NamedTuple):
    """An actor's answer about itself. busy_s: seconds in the call that runs, None between calls."""

    process: Process
    machine: Machine  # of whose processes it is one
    node: str  # Ray's id of the node
    busy_s: float | None
    peak_bytes: int
    memory: Sample
    device_total_bytes: int | None  # of a device with memory of its own


class Report(NamedTuple):
    """What a node's watchdog saw since it was last asked: the last sample of each actor, and events in order."""

    samples: dict[str, Sample]
    events: list[Event]


class NodeWatchdog:
    """Looks every poll_s seconds until it is ended.

    limits: from the node's memory and an actor's device's (None without one of its own), in bytes. They bound each
    actor, and the sum of a node's actors: what local mode has in one process is here in several.
    """

    def __init__(self, node: str, limits: Callable[[int, int | None], Limits], poll_s: float, *, empty_cache: bool):
        self.node, self.limits, self.poll_s, self.empty_cache = node, limits, poll_s, empty_cache
        self._actors: dict[str, Any] = {}
        self._over: dict[str, Level | None] = {}
        self._samples: dict[str, Sample] = {}
        self._events: list[Event] = []
        self._lock = threading.Lock()
        threading.Thread(target=self._loop, name="watchdog", daemon=True).start()

    def __repr__(self) -> str:
        return f"NodeWatchdog({self.node})"

    def watch(self, actors: dict[str, Any]) -> None:
        """The actors to look at from now on, by name, instead of those before."""
        with self._lock:
            self._actors = dict(actors)
            self._samples, self._over = {}, {}

    def report(self) -> Report:
        """What was seen since the last report."""
        with self._lock:
            report = Report(dict(self._samples), self._events)
            self._events = []
        return report

    def _loop(self) -> None:
        import ray  # actors import this module for what they answer, and they do without Ray

        pause = threading.Event()
        while not pause.wait(self.poll_s):
            actors = self._actors
            samples = {}
            asked = {name: h.sample.options(concurrency_group="control").remote() for name, h in actors.items()}
            for name, ref in asked.items():
                # One that is dead or stopped has no sample; that is for the driver to find, by its tiles.
                with suppress(ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):
                    samples[name] = ray.get(ref, timeout=max(1.0, self.poll_s))
            if samples and actors is self._actors:
                self._judge(samples, actors)

    def _judge(self, samples: dict[str, ActorSample], actors: dict[str, Any]) -> None:
        for name, sample in samples.items():
            limits = self.limits(sample.memory.total_bytes, sample.device_total_bytes)
            if self._note(name, sample.memory, limits) and self.empty_cache:
                actors[name].empty_cache.options(concurrency_group="control").remote()
        together = sum(sample.memory.process_bytes for sample in samples.values())
        memory = replace(sample.memory, process_bytes=together, device_allocated_bytes=0, device_driver_bytes=0)
        self._note(f"all actors of {self.node}", memory, self.limits(memory.total_bytes, None))
        if memory.total_bytes < psutil.virtual_memory().total:  # in a container: what is used there is a run's
            used = memory.total_bytes - memory.available_bytes
            self._note(
                f"the container of {self.node}",
                replace(memory, process_bytes=used),
                self.limits(memory.total_bytes, None),
                container=True,
            )
        with self._lock:
            self._samples = {name: sample.memory for name, sample in samples.items()}

    def _note(self, who: str, sample: Sample, limits: Limits, *, container: bool = False) -> Level | None:
        """The limit that is exceeded; an event where that is new."""
        level = limits.exceeded(sample)
        with self._lock:
            known, self._over[who] = self._over.get(who), level
            if level is not None and level != known:
                self._events.append(Event(who, level, sample, limits, container))
        return level
