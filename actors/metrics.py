"""A run's figures as Ray's metrics, which Prometheus reads with `ray_` before each name and `_total` after counts.

deploy/grafana-dashboard.json draws these names.
"""

from typing import Any, Literal

TILE_SECONDS = [0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100]  # bounds of the histogram's buckets


class GridMetrics:
    """Made after Ray is connected; every figure carries the run's name as a tag."""

    def __init__(self, run: str):
        from ray.util import metrics as kinds

        self._run = {"run": run}

        def make(kind: type, name: str, help: str, *tags: str, **more: object) -> Any:
            metric = kind(f"xlstm_ray_{name}", description=help, tag_keys=("run", *tags), **more)
            metric.set_default_tags(self._run)
            return metric

        self._tiles = make(kinds.Counter, "tiles", "Tiles done.")
        self._tokens = make(kinds.Counter, "tokens", "Tokens done, over all rows of a batch.")
        self._rate = make(kinds.Gauge, "tokens_per_second", "Of the last tile.")
        self._seconds = make(kinds.Histogram, "tile_seconds", "Between two tiles' results.", boundaries=TILE_SECONDS)
        self._depth = make(kinds.Gauge, "queue_depth", "Tiles under way.")
        self._memory = make(kinds.Gauge, "actor_memory_bytes", "What an actor holds.", "actor", "kind")
        self._restarts = make(kinds.Counter, "restarts", "Actors that were replaced.")
        self._limits = make(kinds.Counter, "memory_events", "Memory limits that were met.", "limit")

    def tile(self, tokens: int, seconds: float, under_way: int) -> None:
        """A tile's result has come."""
        self._tiles.inc()
        if tokens:
            self._tokens.inc(tokens)
            self._rate.set(tokens / seconds if seconds > 0 else 0.0)
        self._seconds.observe(seconds)
        self._depth.set(under_way)

    def memory(self, actor: str, process_bytes: int, device_bytes: int) -> None:
        """A sample of an actor."""
        self._memory.set(process_bytes, tags={"actor": actor, "kind": "process"})
        self._memory.set(device_bytes, tags={"actor": actor, "kind": "device"})

    def restarts(self, count: int) -> None:
        """Actors have been replaced."""
        self._restarts.inc(count)

    def limit(self, level: Literal["soft", "hard"]) -> None:
        """An actor or a node has met a memory limit."""
        self._limits.inc(tags={"limit": level})
