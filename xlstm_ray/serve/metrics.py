"""Figures for Prometheus, by vLLM's names behind a prefix of ours."""

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from time import perf_counter

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.utils import floatToGoString

from xlstm_ray.engine.figures import BOUNDS, Figures, KeptStates, Spread, StepKind
from xlstm_ray.engine.request import End, Event, Piece, Queued, Reading
from xlstm_ray.serve.limits import Account

LONG_S = *BOUNDS, 10, 20, 40, 80, 160, 320, 640, 1280, 2560
COUNT = 1, 2, 5, 10, 20, 50, 100, 200, 500, *(n * 10**e for e in (3, 4, 5, 6) for n in (1, 2, 5))
HISTOGRAMS = {  # name -> what it has, and its bounds
    "time_to_first_token_seconds": ("From a request's arrival to its first token.", LONG_S),
    "inter_token_latency_seconds": ("Between two tokens of an answer.", BOUNDS),
    "e2e_request_latency_seconds": ("From a request's arrival to its end.", LONG_S),
    "request_queue_time_seconds": ("From a request's arrival to its first window.", LONG_S),
    "request_prefill_time_seconds": ("From a request's first window to its first token.", LONG_S),
    "request_decode_time_seconds": ("From a request's first token to its end.", LONG_S),
    "request_inference_time_seconds": ("From a request's first window to its end.", LONG_S),
    "request_prompt_tokens": ("Tokens of a request's prompt.", COUNT),
    "request_generation_tokens": ("Tokens of an answer.", COUNT),
    "request_max_num_generation_tokens": ("The most tokens that an answer might have had.", COUNT),
}
COUNTS = {
    "prompt_tokens": "Tokens of prompts.",
    "prompt_tokens_cached": "Tokens of prompts that were in a state already.",
    "generation_tokens": "Tokens of answers.",
    "prefix_cache_queries": "Tokens of prompts that were looked up in the cache.",
    "prefix_cache_hits": "Tokens that the cache had.",
}
LABELLED = {
    "request_success": ("Answers that ended.", "finished_reason"),
    "prompt_tokens_by_source": ("Tokens of prompts by where their state came from.", "source"),
    "prefix_cache_miss": ("Prompts of which the cache did not have all.", "reason"),
    "cancelled": ("Requests that were given up.", "phase"),
}
ALSO = {  # what vLLM's own dashboards call these
    "vllm": {"inter_token_latency_seconds": "time_per_output_token_seconds", "parked": "num_preemptions"},
}
SPREADS: dict[str, tuple[str, tuple[StepKind, ...]]] = {  # of an engine: name -> what it has, and its kinds of steps
    "step_seconds": ("Of a step of the engine.", ("prefill", "decode")),
    "stall_seconds": ("What answers wait for other work between two of their tokens.", ("stall",)),
    "snapshot_seconds": ("To keep the state at a window's end.", ("snapshot",)),
}
Gauge = tuple[str, str, float]  # name, text, value
Family = GaugeMetricFamily | CounterMetricFamily | HistogramMetricFamily


class Metrics:
    """Of one service. prefixes: of the names. gauges: what is to be told when it is read, by the requests that run.

    engines: their figures, by the name of the replica; "" is the one in this process.
    """

    def __init__(
        self,
        model: str,
        prefixes: Iterable[str],
        gauges: Callable[[int], Iterable[Gauge]],
        engines: Callable[[], Mapping[str, Figures]],
    ):
        self.registry = CollectorRegistry()
        self.waiting = self.running = 0
        # Counted here: by prometheus-client's own classes it takes ten times as long, for each token.
        self._tallies = {name: _Tally(bounds) for name, (_, bounds) in HISTOGRAMS.items()}
        self._counts = dict.fromkeys(COUNTS, 0.0)
        self._labelled: dict[str, defaultdict[str, float]] = {name: defaultdict(float) for name in LABELLED}
        self._prefixes, self._model = list(prefixes), model
        self._gauges, self._engines = gauges, engines
        self.registry.register(self)

    def text(self) -> bytes:
        """In Prometheus' format."""
        return generate_latest(self.registry)

    def collect(self) -> Iterator[Family]:
        """What is asked for when it is read."""
        requests = {"num_requests_running": self.running, "num_requests_waiting": self.waiting}
        own = [(name, "Requests now.", float(value)) for name, value in requests.items()]
        for prefix in self._prefixes:
            for name, text, value in [*own, *self._gauges(self.running)]:
                family = GaugeMetricFamily(f"{prefix}:{name}", text, labels=["model_name"])
                family.add_metric([self._model], value)
                yield family
            yield from self._own(prefix)
            yield from _Engines(prefix, self._model, self._engines()).families()

    def _own(self, prefix: str) -> Iterator[Family]:
        """What was counted here: some have another name, too."""

        def named(name: str) -> list[str]:
            return [f"{prefix}:{one}" for one in (name, ALSO.get(prefix, {}).get(name)) if one]

        for kind, (text, bounds) in HISTOGRAMS.items():
            for name in named(kind):
                times = HistogramMetricFamily(name, text, labels=["model_name"])
                tally = self._tallies[kind]
                times.add_metric([self._model], *_buckets(Spread(tuple(tally.counts), tally.sum), bounds))
                yield times
        for kind, text in COUNTS.items():
            for name in named(kind):
                counter = CounterMetricFamily(name, text, labels=["model_name"])
                counter.add_metric([self._model], self._counts[kind])
                yield counter
        for kind, (text, label) in LABELLED.items():
            for name in named(kind):
                counter = CounterMetricFamily(name, text, labels=["model_name", label])
                for value, amount in list(self._labelled[kind].items()):
                    counter.add_metric([self._model, value], amount)
                yield counter

    def count(self, name: str, amount: float = 1, **labels: str) -> None:
        if labels:
            (value,) = labels.values()
            self._labelled[name][value] += amount
        else:
            self._counts[name] += amount

    def observe(self, name: str, value: float) -> None:
        self._tallies[name].add(max(0.0, value))


class _Tally:
    """How often there were values up to each bound, and over the one before; the last: larger ones."""

    def __init__(self, bounds: Sequence[float]):
        self._bounds, self.counts, self.sum = bounds, [0] * (len(bounds) + 1), 0.0

    def add(self, value: float) -> None:
        self.counts[bisect_left(self._bounds, value)] += 1
        self.sum += value


class _Engines:
    """Figures of engines in Prometheus' form, by replica where there are some."""

    def __init__(self, prefix: str, model: str, engines: Mapping[str, Figures]):
        self._prefix, self._also, self._engines = prefix, ALSO.get(prefix, {}), engines
        alone = engines.keys() <= {""}
        self._labels = ["model_name"] if alone else ["model_name", "replica"]
        self._values = {name: [model] if alone else [model, name] for name in engines}

    def families(self) -> Iterator[Family]:
        for name, (text, kinds) in SPREADS.items():
            labels = [*self._labels, *(["kind"] if len(kinds) > 1 else [])]
            times = HistogramMetricFamily(f"{self._prefix}:{name}", text, labels=labels)
            for replica, figures in self._engines.items():
                for kind in kinds:
                    values = [*self._values[replica], kind][: len(labels)]
                    times.add_metric(values, *_buckets(figures.steps[kind]))
            yield times
        parked = {replica: sum(figures.steps["park"].counts) for replica, figures in self._engines.items()}
        for name in filter(None, ["parked", self._also.get("parked")]):
            text = "Answers whose slot went to a more important one."
            family = CounterMetricFamily(f"{self._prefix}:{name}", text, labels=self._labels)
            for replica, count in parked.items():
                family.add_metric(self._values[replica], count)
            yield family
        kept = {replica: figures.kept for replica, figures in self._engines.items() if figures.kept is not None}
        if kept:
            yield from self._of_caches(kept)

    def _of_caches(self, kept: Mapping[str, KeptStates]) -> Iterator[Family]:
        states = GaugeMetricFamily(f"{self._prefix}:snapshots", "Kept states.", labels=self._labels)
        text = "Kept states on their way to files."
        unwritten = GaugeMetricFamily(f"{self._prefix}:snapshots_unwritten", text, labels=self._labels)
        tiers = [*self._labels, "tier"]
        size = GaugeMetricFamily(f"{self._prefix}:snapshot_bytes", "What kept states take.", labels=tiers)
        made_room = CounterMetricFamily(f"{self._prefix}:evictions", "States that made room for others.", labels=tiers)
        for replica, cache in kept.items():
            values = self._values[replica]
            states.add_metric(values, cache.states)
            unwritten.add_metric(values, cache.unwritten)
            for tier, used in cache.bytes.items():
                size.add_metric([*values, tier], used)
            for tier, count in cache.evicted.items():
                made_room.add_metric([*values, tier], count)
        yield from (states, unwritten, size, made_room)


def _buckets(spread: Spread, bounds: Sequence[float] = BOUNDS) -> tuple[list[tuple[str, float]], float]:
    """As Prometheus counts: each with those before it."""
    names = [*map(floatToGoString, bounds), "+Inf"]
    return list(zip(names, map(float, accumulate(spread.counts)), strict=True)), spread.seconds


class Track:
    """Follows one request by its events. since: perf_counter time of its arrival.

    prompt: whether its prompt counts: several answers may have one. answer: whether it makes an answer.
    account: of whoever asks.
    """

    def __init__(self, metrics: Metrics, account: Account, *, since: float, prompt: bool = True, answer: bool = True):
        self._metrics, self._since, self._prompt, self._answer = metrics, since, prompt, answer
        self._account, self._read = account, 0
        self._queued: Queued | None = None
        self._began = False
        self._last: float | None = None  # time of the last token

    def __call__(self, event: Event) -> None:
        """Something has happened now."""
        metrics, now = self._metrics, perf_counter()
        if isinstance(event, Queued):
            metrics.waiting += 1
            self._queued, self._read = event, event.resumed_tokens
            return
        if not self._began:
            self._began = True
            metrics.waiting -= self._queued is not None
            metrics.running += 1
        if isinstance(event, Piece) and event.token is not None:
            if self._last is None:
                metrics.observe("time_to_first_token_seconds", now - self._since)
            else:
                metrics.observe("inter_token_latency_seconds", now - self._last)
            self._last = now
            self._account.charge(1)
            metrics.count("generation_tokens")
        elif isinstance(event, Reading) and self._prompt:
            self._account.charge(event.tokens_done - self._read)
            self._read = event.tokens_done
        elif isinstance(event, End):
            self._ended(event, now)

    def _looked_up(self, found: Queued) -> None:
        metrics, use = self._metrics, found.use
        states = {use.tier or "none": use.hit_tokens, "state": found.resumed_tokens - use.hit_tokens}
        for source, tokens in {**states, "computed": found.prompt_tokens - found.resumed_tokens}.items():
            if tokens > 0:
                metrics.count("prompt_tokens_by_source", tokens, source=source)
        metrics.count("prompt_tokens", found.prompt_tokens)
        metrics.count("prompt_tokens_cached", found.resumed_tokens)
        if use.reason != "off":
            metrics.count("prefix_cache_queries", found.prompt_tokens)
            metrics.count("prefix_cache_hits", use.hit_tokens)
            if use.reason is not None:
                metrics.count("prefix_cache_miss", reason=use.reason.partition(" at ")[0])

    def _ended(self, event: End, now: float) -> None:
        metrics, usage, reason = self._metrics, event.usage, event.finish.reason
        metrics.running -= 1
        if self._prompt and self._queued is not None:
            self._looked_up(self._queued.at_end(usage))
        if reason == "cancelled":
            metrics.count("cancelled", phase="prefill" if self._last is None else "decode")
        if self._answer and reason in ("stop", "length"):
            metrics.count("request_success", finished_reason=reason)
            metrics.observe("e2e_request_latency_seconds", now - self._since)
            first = usage.total_s if usage.first_token_s is None else usage.first_token_s
            metrics.observe("request_generation_tokens", usage.answer_tokens)
            metrics.observe("request_inference_time_seconds", usage.total_s - usage.queued_s)
            if self._prompt:
                metrics.observe("request_prompt_tokens", usage.prompt_tokens)
                metrics.observe("request_queue_time_seconds", usage.queued_s)
                metrics.observe("request_prefill_time_seconds", first - usage.queued_s)
            metrics.observe("request_decode_time_seconds", usage.total_s - first)


def both(track: Track, hear: Callable[[Event], None]) -> Callable[[Event], None]:
    """What hears an event after it was counted."""

    def tell(event: Event) -> None:
        track(event)
        hear(event)

    return tell
