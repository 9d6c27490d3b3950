#!/usr/bin/env python
"""Many requests in one engine against the same requests one after another, in this process.

    python scripts/bench_serving.py                            # the demo model, 48 requests, 16 slots
    python scripts/bench_serving.py --requests 200 --rate 20   # which arrive at random, 20 a second
    python scripts/bench_serving.py --model DIR --device cuda --slots 64

Workloads, each in turn with one slot (one request after the other) and with all slots, alternating, medians of rounds:

    streams     so many requests at once as there are slots, of one short prompt and --answer tokens each
    mixed       requests of prompts of 8 to 2,048 tokens and answers of 8 to 96, which arrive at random (--rate)
    long        streams, and one prompt of --long tokens that is read beside them

Figures: tokens a second over all, time to the first token (TTFT) and between two tokens (ITL), p50 and p99.
"""

import argparse
import random
import statistics
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from xlstm_ray.engine.request import End, Piece


@dataclass
class Seen:
    """What one run of a workload showed, in seconds."""

    began: float
    ended: float = 0.0
    tokens: int = 0
    ttft: list[float] = field(default_factory=list)
    itl: list[float] = field(default_factory=list)

    @property
    def tok_s(self) -> float:
        return self.tokens / (self.ended - self.began)


def percent(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * share))] if values else float("nan")


class Watched:
    """Takes a request's events in the engine's thread, with their times."""

    def __init__(self, seen: Seen, count: bool, done: threading.Semaphore):
        self._seen, self._count, self._done, self._asked, self._last = seen, count, done, time.perf_counter(), None

    def __call__(self, event: Any) -> None:
        now = time.perf_counter()
        if isinstance(event, Piece) and event.token is not None and self._count:
            if self._last is None:
                self._seen.ttft.append(now - self._asked)
            else:
                self._seen.itl.append(now - self._last)
            self._last = now
            self._seen.tokens += 1
        if isinstance(event, End):
            self._seen.ended = now
            self._done.release()


def run(lm: Any, requests: list[tuple[float, Any, bool]]) -> Seen:
    """requests: (seconds after the first, request, whether its figures count)."""
    seen, done = Seen(time.perf_counter()), threading.Semaphore(0)
    for at, request, count in requests:
        pause = seen.began + at - time.perf_counter()
        if pause > 0:
            time.sleep(pause)
        watched = Watched(seen, count, done)
        lm.submit(request).listen(watched)
    for _ in requests:
        done.acquire()
    return seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--requests", type=int, default=48)
    parser.add_argument("--rate", type=float, default=8.0, help="arrivals a second")
    parser.add_argument("--answer", type=int, default=64, help="tokens of a stream's answer")
    parser.add_argument("--long", type=int, default=16384, help="tokens of the long prompt")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    import xlstm_ray
    from xlstm_ray import Request, Sampling

    engines = {}
    for slots in (1, args.slots):
        engines[slots] = lm = xlstm_ray.load(args.model, device=args.device, dtype=args.dtype)
        lm.serve(slots=slots, buckets=sorted({1, min(4, slots), slots}))
    vocabulary, rng = lm.config.vocab_size, random.Random(args.seed)

    def request(prompt: int, answer: int) -> Any:
        tokens = [rng.randrange(1, vocabulary) for _ in range(prompt)]
        return Request(tokens, sampling=Sampling(max_new_tokens=answer, ignore_eos=True))

    streams = [(0.0, request(16, args.answer), True) for _ in range(args.slots)]
    at, mixed = 0.0, []
    for _ in range(args.requests):
        mixed.append((at, request(2 ** rng.randrange(3, 12), rng.randrange(8, 97)), True))
        at += rng.expovariate(args.rate)
    long = [*streams[:-1], (0.2, request(args.long, 1), False)]
    workloads = {"streams": streams, "mixed": mixed, "long": long}
    for lm in engines.values():  # compile, warm caches and pools
        run(lm, [*streams, *mixed[:4], *long[-1:]])

    print(f"{lm.device.type}, {lm.numerics.dtype}, medians of {args.rounds}")
    print("| workload | slots | tok/s | TTFT p50, p99 ms | ITL p50, p99 ms |\n| --- | --- | --- | --- | --- |")
    for name, workload in workloads.items():
        found: dict[int, list[Seen]] = {slots: [] for slots in engines}
        for _ in range(args.rounds):
            for slots, lm in engines.items():
                found[slots].append(run(lm, workload))
        for slots, runs in found.items():
            ttft = [percent([t for seen in runs for t in seen.ttft], p) * 1e3 for p in (0.5, 0.99)]
            itl = [percent([t for seen in runs for t in seen.itl], p) * 1e3 for p in (0.5, 0.99)]
            rate = statistics.median(seen.tok_s for seen in runs)
            print(f"| {name} | {slots} | {rate:,.0f} | {ttft[0]:,.0f}, {ttft[1]:,.0f} | {itl[0]:.1f}, {itl[1]:.1f} |")
        one, many = (statistics.median(seen.tok_s for seen in found[slots]) for slots in engines)
        print(f"| {name} | ratio | {many / one:.2f} | | |")
    for lm in engines.values():
        lm.close()


if __name__ == "__main__":
    main()
