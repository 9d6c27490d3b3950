"""A run's figures as Ray's metrics, which Prometheus reads with `ray_` before each name.

deploy/grafana-dashboard.json draws these names. All are gauges, even counts and the histogram: Ray's agent forgets a
gauge 20 s after its run, but keeps a counter as long as the head lives.
"""

from collections import Counter
from typing import Any, Literal

TILE_SECONDS = [0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100]  # bounds of the histogram's buckets


class GridMetrics:
    """Made after Ray is connected. Every figure has the run's name as a tag."""

    def __init__(self, run: str):
        from ray.util.metrics import Gauge

        def make(name: str, help: str, *tags: str) -> Any:
            metric = Gauge(f"xlstm_ray_{name}", description=help, tag_keys=("run", *tags))
            metric.set_default_tags({"run": run})
            return metric

        self._counted: Counter[tuple[Any, ...]] = Counter()
        self._tiles = make("tiles_total", "Tiles done.")
        self._tokens = make("tokens_total", "Tokens done, over all rows of a batch and all prompts.")
        self._prompt = make("prompt_tokens", "New tokens of the prompt that is read, over all rows of a batch.")
        self._left = make("prompt_tokens_left", "Of these, the tokens left to read.")
        self._rate = make("tokens_per_second", "Rate of the last tile.")
        self._buckets = make("tile_seconds_bucket", "Tiles by the time between two results.", "le")
        self._depth = make("queue_depth", "Tiles under way.")
        self._memory = make("actor_memory_bytes", "Memory of an actor, or of the working process.", "actor", "kind")
        self._restarts = make("restarts_total", "Actors that were replaced.")
        self._limits = make("memory_events_total", "Memory limits that were met.", "limit")

    def tile(self, tokens: int, seconds: float, under_way: int) -> None:
        """A tile's result has come."""
        self._count(self._tiles)
        if tokens:
            self._count(self._tokens, tokens)
            self._rate.set(tokens / seconds if seconds > 0 else 0.0)
        for bound in (*TILE_SECONDS, float("inf")):
            self._count(self._buckets, int(seconds <= bound), le="+Inf" if bound == float("inf") else str(bound))
        self._depth.set(under_way)

    def progress(self, done: int, total: int) -> None:
        """Part of the prompt's new tokens has been read."""
        self._prompt.set(total)
        self._left.set(total - done)

    def memory(self, actor: str, process_bytes: int, device_bytes: int) -> None:
        """A sample of an actor."""
        self._memory.set(process_bytes, tags={"actor": actor, "kind": "process"})
        self._memory.set(device_bytes, tags={"actor": actor, "kind": "device"})

    def restarts(self, count: int) -> None:
        """Actors have been replaced."""
        self._count(self._restarts, count)

    def limit(self, level: Literal["soft", "hard"]) -> None:
        """An actor or a node has met a memory limit."""
        self._count(self._limits, limit=level)

    def _count(self, gauge: Any, more: int = 1, **tags: str) -> None:
        key = gauge, *tags.items()
        self._counted[key] += more
        gauge.set(self._counted[key], tags=tags)
