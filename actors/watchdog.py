"""The watchdog of one node: samples its actors' memory, empties caches at a soft limit, reports to the driver.

Watch places one on each node that has actors. Actors answer in their own concurrency group, so busy actors answer
too. The driver acts on a hard limit: it stops between two tiles. Nothing here imports torch.
"""

import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from time import time
from typing import Any, NamedTuple

import psutil

from xlstm_ray.memory.sample import Sample
from xlstm_ray.memory.watchdog import Event, Level, Limits, Seen
from xlstm_ray.supervisor.processes import Machine, Process

MOST_SEEN = 1 << 14


class ActorSample(NamedTuple):
    """An actor's answer about itself. busy_s: seconds since its present call began, None between calls."""

    process: Process
    machine: Machine  # the machine of the process
    node: str  # Ray's id of the node
    busy_s: float | None
    peak_bytes: int
    memory: Sample
    device_total_bytes: int | None  # None without a device with its own memory


class Report(NamedTuple):
    """A watchdog's report since the one before: the last sample of each actor; events, and all it has seen, in order.

    seen: empty unless it was asked for.
    """

    samples: dict[str, Sample]
    events: list[Event]
    seen: list[Seen]


class NodeWatchdog:
    """Samples every poll_s seconds until it is killed.

    limits: makes limits from the memory of the node and of an actor's device (None if it has none), in bytes. They
    bound each actor, and the sum of a node's actors: together these are like one process of local mode.
    logs: keep all samples for the next report, at most the last MOST_SEEN.
    """

    def __init__(
        self, node: str, limits: Callable[[int, int | None], Limits], poll_s: float, *, empty_cache: bool, logs: bool
    ):
        self.node, self.limits, self.poll_s, self.empty_cache = node, limits, poll_s, empty_cache
        self._seen: deque[Seen] = deque(maxlen=MOST_SEEN if logs else 0)
        self._actors: dict[str, Any] = {}
        self._over: dict[str, Level | None] = {}
        self._samples: dict[str, Sample] = {}
        self._events: list[Event] = []
        self._lock = threading.Lock()
        threading.Thread(target=self._loop, name="watchdog", daemon=True).start()

    def __repr__(self) -> str:
        return f"NodeWatchdog({self.node})"

    def watch(self, actors: dict[str, Any]) -> None:
        """Watch these actors from now on, by name, and no others."""
        with self._lock:
            self._actors = dict(actors)
            self._samples, self._over = {}, {}

    def report(self) -> Report:
        """What happened since the last report."""
        with self._lock:
            report = Report(dict(self._samples), self._events, list(self._seen))
            self._events = []
            self._seen.clear()
        return report

    def _loop(self) -> None:
        import ray  # imported here: actors import this module and need no Ray

        pause = threading.Event()
        while not pause.wait(self.poll_s):
            actors = self._actors
            samples = {}
            asked = {name: h.sample.options(concurrency_group="control").remote() for name, h in actors.items()}
            for name, ref in asked.items():
                # A dead or stopped actor has no sample; the driver notices it by its tiles.
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
        if memory.total_bytes < psutil.virtual_memory().total:  # in a container, all used memory counts as the run's
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
        """The exceeded limit or None; adds an event if that is new."""
        level = limits.exceeded(sample)
        with self._lock:
            self._seen.append(Seen(who, time(), sample, level))
            known, self._over[who] = self._over.get(who), level
            if level is not None and level != known:
                self._events.append(Event(who, level, sample, limits, container))
        return level
