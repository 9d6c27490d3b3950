"""A run's figures as Ray's metrics, which Prometheus reads with `ray_` before each name.

deploy/grafana-dashboard.json draws these names. All are gauges, even counts and the histogram: Ray's agent forgets a
gauge 20 s after its run, but keeps a counter as long as the head lives.
"""

from bisect import bisect_left
from collections import Counter
from itertools import accumulate
from time import monotonic
from typing import Any, Literal

TILE_SECONDS = [0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100]  # bounds of the histogram's buckets
SHOWN_S = 0.1  # steps of tokens are shown so seldom: each would take a tenth of the driver's time for it


class GridMetrics:
    """Made after Ray is connected. Every figure has the run's name as a tag."""

    def __init__(self, run: str):
        from ray.util.metrics import Gauge

        def make(name: str, help: str, *tags: str) -> Any:
            metric = Gauge(f"xlstm_ray_{name}", description=help, tag_keys=("run", *tags))
            metric.set_default_tags({"run": run})
            return metric

        self._counted: Counter[tuple[Any, ...]] = Counter()
        self._done = [0] * (len(TILE_SECONDS) + 1)  # tiles by bucket
        self._tokens_done = 0
        self._shown = 0.0  # monotonic time
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

    def tile(self, tokens: int, seconds: float, under_way: int, *, one_of_many: bool = False) -> None:
        """A tile's result has come. one_of_many: shown within SHOWN_S, or when none is under way; else at once."""
        self._done[bisect_left(TILE_SECONDS, seconds)] += 1
        self._tokens_done += tokens
        now = monotonic()
        if one_of_many and under_way and now - self._shown < SHOWN_S:
            return
        self._shown = now
        self._tiles.set(sum(self._done))
        if tokens:
            self._tokens.set(self._tokens_done)
            self._rate.set(tokens / seconds if seconds > 0 else 0.0)
        for bound, count in zip((*map(str, TILE_SECONDS), "+Inf"), accumulate(self._done), strict=True):
            self._buckets.set(count, tags={"le": bound})
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
