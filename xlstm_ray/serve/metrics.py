"""Figures for Prometheus, by vLLM's names behind a prefix of ours."""

from collections.abc import Callable, Iterable, Iterator
from time import perf_counter
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from xlstm_ray.engine.request import End, Event, Piece, Queued, Reading
from xlstm_ray.engine.work import StepKind
from xlstm_ray.serve.limits import Account

SHORT_S = 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5
LONG_S = *SHORT_S, 10, 20, 40, 80, 160, 320, 640, 1280, 2560
COUNT = 1, 2, 5, 10, 20, 50, 100, 200, 500, *(n * 10**e for e in (3, 4, 5, 6) for n in (1, 2, 5))
HISTOGRAMS = {  # name -> what it has, and its bounds
    "time_to_first_token_seconds": ("From a request's arrival to its first token.", LONG_S),
    "inter_token_latency_seconds": ("Between two tokens of an answer.", SHORT_S),
    "e2e_request_latency_seconds": ("From a request's arrival to its end.", LONG_S),
    "request_queue_time_seconds": ("From a request's arrival to its first window.", LONG_S),
    "request_prefill_time_seconds": ("From a request's first window to its first token.", LONG_S),
    "request_decode_time_seconds": ("From a request's first token to its end.", LONG_S),
    "request_inference_time_seconds": ("From a request's first window to its end.", LONG_S),
    "request_prompt_tokens": ("Tokens of a request's prompt.", COUNT),
    "request_generation_tokens": ("Tokens of an answer.", COUNT),
    "request_max_num_generation_tokens": ("The most tokens that an answer might have had.", COUNT),
    "stall_seconds": ("What answers wait for other work between two of their tokens.", SHORT_S),
    "snapshot_seconds": ("To keep the state at a window's end.", SHORT_S),
}
COUNTS = {
    "prompt_tokens": "Tokens of prompts.",
    "prompt_tokens_cached": "Tokens of prompts that were in a state already.",
    "generation_tokens": "Tokens of answers.",
    "prefix_cache_queries": "Tokens of prompts that were looked up in the cache.",
    "prefix_cache_hits": "Tokens that the cache had.",
    "parked": "Answers whose slot went to a more important one.",
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
GROWING = ("evictions",)  # of what is told when it is read
Gauge = tuple[str, str, dict[str, float]]  # name, text, values by tier ("" where there is one value)


class Metrics:
    """Of one service. prefixes: of the names. gauges: what is to be told when it is read, by the requests that run."""

    def __init__(self, model: str, prefixes: Iterable[str], gauges: Callable[[int], Iterable[Gauge]]):
        self.registry = CollectorRegistry()
        self.waiting = self.running = 0
        self._sets = [_Set(self.registry, prefix, model) for prefix in prefixes]
        self._prefixes, self._model, self._gauges = list(prefixes), model, gauges
        self.registry.register(self)

    def text(self) -> bytes:
        """In Prometheus' format."""
        return generate_latest(self.registry)

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        """What is asked for when it is read."""
        requests = {"num_requests_running": self.running, "num_requests_waiting": self.waiting}
        own = [(name, "Requests now.", {"": float(value)}) for name, value in requests.items()]
        for prefix in self._prefixes:
            for name, text, values in [*own, *self._gauges(self.running)]:
                labels = ["model_name", *(["tier"] if set(values) != {""} else [])]
                kind = CounterMetricFamily if name in GROWING else GaugeMetricFamily
                family = kind(f"{prefix}:{name}", text, labels=labels)
                for tier, value in values.items():
                    family.add_metric([self._model, tier][: len(labels)], value)
                yield family

    def count(self, name: str, amount: float = 1, **labels: str) -> None:
        for one in self._sets:
            for counter in one.counters[name]:
                counter.labels(self._model, *labels.values()).inc(amount)

    def observe(self, name: str, value: float) -> None:
        for one in self._sets:
            for histogram in one.histograms[name]:
                histogram.labels(self._model).observe(max(0.0, value))

    def step(self, kind: StepKind, seconds: float) -> None:
        """The engine has made a step, or did what is told by its seconds."""
        if kind == "park":
            self.count("parked")
        elif kind in ("stall", "snapshot"):
            self.observe(f"{kind}_seconds", seconds)
        else:
            for one in self._sets:
                one.steps.labels(self._model, kind).observe(seconds)


class _Set:
    """The counters and histograms of one prefix, by name: some have another name, too."""

    def __init__(self, registry: CollectorRegistry, prefix: str, model: str):
        def make(kind: Any, name: str, text: str, *labels: str, **more: Any) -> list[Any]:
            names = [name, *filter(None, [ALSO.get(prefix, {}).get(name)])]
            return [kind(f"{prefix}:{one}", text, ["model_name", *labels], registry=registry, **more) for one in names]

        self.histograms = {n: make(Histogram, n, text, buckets=bounds) for n, (text, bounds) in HISTOGRAMS.items()}
        self.counters = {n: make(Counter, n, text) for n, text in COUNTS.items()}
        for made in (*self.histograms.values(), *self.counters.values()):
            for one in made:
                one.labels(model)  # it is there from the beginning
        self.counters |= {n: make(Counter, n, text, label) for n, (text, label) in LABELLED.items()}
        (self.steps,) = make(Histogram, "step_seconds", "Of a step of the engine.", "kind", buckets=SHORT_S)


class Track:
    """Follows one request by its events. since: perf_counter time of its arrival.

    prompt: whether its prompt counts: several answers may have one. answer: whether it makes an answer.
    account: of whoever asks.
    """

    def __init__(self, metrics: Metrics, account: Account, *, since: float, prompt: bool = True, answer: bool = True):
        self._metrics, self._since, self._prompt, self._answer = metrics, since, prompt, answer
        self._account, self._read = account, 0
        self._queued = self._began = False
        self._last: float | None = None  # time of the last token

    def __call__(self, event: Event) -> None:
        """Something has happened now."""
        metrics, now = self._metrics, perf_counter()
        if isinstance(event, Queued):
            metrics.waiting += 1
            self._queued, self._read = True, event.resumed_tokens
            self._looked_up(event)
            return
        if not self._began:
            self._began = True
            metrics.waiting -= self._queued
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

    def _looked_up(self, event: Queued) -> None:
        if not self._prompt:
            return
        metrics, use = self._metrics, event.use
        found = {use.tier or "none": use.hit_tokens, "state": event.resumed_tokens - use.hit_tokens}
        for source, tokens in {**found, "computed": event.prompt_tokens - event.resumed_tokens}.items():
            if tokens > 0:
                metrics.count("prompt_tokens_by_source", tokens, source=source)
        metrics.count("prompt_tokens", event.prompt_tokens)
        metrics.count("prompt_tokens_cached", event.resumed_tokens)
        if use.reason != "off":
            metrics.count("prefix_cache_queries", event.prompt_tokens)
            metrics.count("prefix_cache_hits", use.hit_tokens)
            if use.reason is not None:
                metrics.count("prefix_cache_miss", reason=use.reason.partition(" at ")[0])

    def _ended(self, event: End, now: float) -> None:
        metrics, usage, reason = self._metrics, event.usage, event.finish.reason
        metrics.running -= 1
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
