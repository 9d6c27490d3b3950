"""Watches a run: its metrics, and a watchdog on each node that samples the actors' memory."""

from contextlib import suppress
from time import monotonic
from typing import Any

from xlstm_ray.actors.link import Link
from xlstm_ray.actors.metrics import GridMetrics
from xlstm_ray.actors.options import GridOptions
from xlstm_ray.actors.placement import END_S, Seat
from xlstm_ray.actors.watchdog import NodeWatchdog, Report
from xlstm_ray.errors import GridLost
from xlstm_ray.memory.sample import Sample
from xlstm_ray.runtime.executor import Step


class Watch:
    """Metrics of a run, and a watchdog on every node that has actors in these seats."""

    def __init__(self, link: Link, seats: list[Seat], options: GridOptions):
        self._link, self._ray, self._seats, self._options = link, link.ray, seats, options
        self.metrics = GridMetrics(options.run)
        self._watchdogs: dict[str, Any] = {}  # by node id
        self._reports: dict[str, Any] = {}  # by node id: reports that were requested and have not come
        self._next_look = 0.0
        self.used: dict[str, Sample] = {}  # by actor: its last sample

    def place(self) -> None:
        """Call after actors were started: tells each watchdog which actors are on its node."""
        self._link.ask(self._place)

    def tile(self, step: Step, seconds: float, under_way: int) -> None:
        """Update metrics after a step, with the watchdogs' new reports. Never waits for them."""
        tokens = int((step.end - step.start).sum())
        self.metrics.tile(tokens, seconds, under_way, one_of_many=step.chunk_size == 1)
        for node, ref in list(self._reports.items()):
            ready, _ = self._ray.wait([ref], timeout=0)
            if not ready:
                continue
            del self._reports[node]
            try:
                (report,) = self._link.get([ref])
            except self._link.failure:  # its node is gone, or it was killed: start another
                self._watchdogs.pop(node, None)
                self.place()
                continue
            self._take(report)
        if monotonic() >= self._next_look:
            self._next_look = monotonic() + self._options.watch_every_s
            self._request()

    def require_head(self) -> None:
        """Raise GridLost if the head is known to be gone."""
        self._link.require_head()

    def last_look(self) -> None:
        """Wait, for a short time, for what the watchdogs have seen until now."""
        for _ in range(2 if self._watchdogs else 0):  # a report that was requested before, and one of now
            self._request()
            reports, self._reports = list(self._reports.values()), {}
            with suppress(GridLost, self._link.failure):
                for report in self._link.get(reports, self._options.answer_timeout_s):
                    self._take(report)

    def _request(self) -> None:
        for node, watchdog in self._watchdogs.items():
            if node not in self._reports:
                self._reports[node] = watchdog.report.remote()

    def _take(self, report: Report) -> None:
        for name, sample in report.samples.items():
            self.metrics.memory(name, sample.process_bytes, sample.device_driver_bytes)
        self.used.update(report.samples)
        for event in report.events:
            self.metrics.limit(event.level)
            self._options.on_event(event)
        if self._options.on_seen is not None:
            for seen in report.seen:
                self._options.on_seen(seen)

    def close(self) -> None:
        """End the watchdogs. Returns in bounded time in any state of Ray, and raises nothing."""
        self._reports.clear()
        watchdogs, self._watchdogs = list(self._watchdogs.values()), {}
        with suppress(GridLost, self._ray.exceptions.RayError):
            for watchdog in watchdogs:
                self._link.ask(self._ray.kill, watchdog, timeout_s=END_S)

    def _place(self) -> None:
        if self._options.limits is None:
            return
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        o = self._options
        nodes = {seat.node for seat in self._seats}
        for node in self._watchdogs.keys() - nodes:
            self._ray.kill(self._watchdogs.pop(node))
        for node in sorted(nodes):
            if node not in self._watchdogs:
                self._watchdogs[node] = (
                    self._ray.remote(num_cpus=0)(NodeWatchdog)
                    .options(
                        name=f"xlstm-ray {o.run} watchdog {node[:8]}",
                        scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
                    )
                    .remote(node[:8], o.limits, o.watch_every_s, empty_cache=o.empty_cache, logs=o.on_seen is not None)
                )
            self._watchdogs[node].watch.remote({s.name: s.handle for s in self._seats if s.node == node})
