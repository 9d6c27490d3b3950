#!/usr/bin/env python
"""Many requests in one engine against the same requests one after another, in this process.

    python scripts/bench_serving.py                              # all tables, the demo model, 16 slots
    python scripts/bench_serving.py --only mixed --requests 200 --rate 20 --png serving.png
    python scripts/bench_serving.py --only memory --many 1000
    python scripts/bench_serving.py --model DIR --device cuda --slots 64
    python scripts/bench_serving.py --url http://127.0.0.1:8000 --url http://127.0.0.1:8001    # services that run

Tables (medians of rounds; all contestants are engines of this process, which take turns):

    streams   as many requests at once as there are slots, of a short prompt and --answer tokens each, against one slot
    mixed     prompts of 8 to 2,048 tokens and answers of 8 to 96, which arrive at random (--rate), against one slot
    long      streams, and one prompt of --long tokens that is read beside them, against streams alone
    unique    prompts that never repeat, with a cache of states and without, in turn in one engine
    hit       a prompt that was seen and a new end of 64 tokens, against the same length unseen; and an exact repeat
    http      prompts of 64 tokens, one at a time and 32 at once, over HTTP from another process against submit here
    memory    --many requests through one engine: resident memory on the way, and the computed need

With --url, services of one model instead, by one caller in turn: how much later than the first the others say the first
token to prompts of 64 tokens that never repeat. A key is taken from XLSTM_RAY_API_KEY.

Figures: tokens a second over all, time to the first token (TTFT) and between two tokens (ITL), p50 and p99.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import psutil
from arguments import device, positive, whole

from xlstm_ray.engine.request import End, Piece, Reading

SUFFIX = 64  # tokens after a prompt that was seen


CALLER = """
import json, sys
from concurrent.futures import ThreadPoolExecutor
from time import perf_counter
from xlstm_ray.client.keys import find_key
from xlstm_ray.client.service import Service
from xlstm_ray.errors import XlstmRayError


def ask(prompt):
    began, first = perf_counter(), None
    body = {"prompt": prompt, "max_tokens": 4, "temperature": 0, "ignore_eos": True, "stream": True}
    for event in service.events("/v1/completions", body):
        first = first or perf_counter() - began
    return first

try:
    service, pool = Service(sys.argv[1], find_key(None)), ThreadPoolExecutor(64)
    for line in sys.stdin:
        asked = json.loads(line)
        print(json.dumps(list(pool.map(ask, [asked["prompt"]] * asked["count"]))), flush=True)
except XlstmRayError as err:  # a service that is not there, a wrong key
    sys.exit(f"error: {err}")
"""


class Caller:
    """A process that asks a service."""

    def __init__(self, url: str):
        command = [sys.executable, "-c", CALLER, url]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, prompt: list[int], count: int = 1) -> list[float]:
        """The seconds to the first token of so many requests at once. Ends this program where the caller has ended."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"prompt": prompt, "count": count}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            sys.exit(self._process.wait())  # its error stands above
        return json.loads(line)

    def close(self) -> None:
        self._process.communicate()


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
        lm.submit(request).listen(Watched(seen, count, done))
    for _ in requests:
        done.acquire()
    return seen


class Bench:
    """The engines, by what sets them apart, and the requests; each is made when a table asks for it."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.rng, self.engines = args, random.Random(args.seed), {}
        self.drawn: dict[str, list[tuple[str, Seen]]] = {}  # for the picture

    def engine(self, slots: int, *, cache_mb: int = 0) -> Any:
        import xlstm_ray

        key = slots, cache_mb
        if key not in self.engines:
            options = {"cache_memory_mb": cache_mb} if cache_mb else {}
            lm = xlstm_ray.load(self.args.model, device=self.args.device, dtype=self.args.dtype, **options)
            sizes = sorted({1, min(4, slots), slots})
            lm.serve(slots=slots, buckets=sizes)
            tile = lm.numerics.tile_size
            for size in sizes:  # compile
                run(lm, [(0.0, self.request(lm, tile + 1, 4), True)] * size)
            self.engines[key] = lm
        return self.engines[key]

    def tokens(self, lm: Any, count: int) -> list[int]:
        return [self.rng.randrange(1, lm.config.vocab_size) for _ in range(count)]

    def request(self, lm: Any, prompt: int | list[int], answer: int) -> Any:
        from xlstm_ray import Request, Sampling

        tokens = self.tokens(lm, prompt) if isinstance(prompt, int) else prompt
        return Request(tokens, sampling=Sampling(max_new_tokens=answer, ignore_eos=True))

    def close(self) -> None:
        for lm in self.engines.values():
            lm.close()

    # -- tables --------------------------------------------------------------------------------------------------------
    def compare(self, name: str, contestants: dict[str, tuple[Any, Callable[[], list]]]) -> None:
        """Run each contestant's requests on its engine, in turn; print a row for each, and the ratio of first to last.

        The rounds' requests are those of the workload's own seed, so every contestant has the same.
        """
        found: dict[str, list[Seen]] = {title: [] for title in contestants}
        for number in range(self.args.rounds):
            for title, (lm, requests) in contestants.items():
                self.rng.seed(self.args.seed + number)
                found[title].append(run(lm, requests()))
        print(f"\n| {name} | tok/s | TTFT p50, p99 ms | ITL p50, p99 ms |\n| --- | --- | --- | --- |")
        for title, runs in found.items():
            every = Seen(0.0, 1.0, 0, [t for s in runs for t in s.ttft], [t for s in runs for t in s.itl])
            self.drawn.setdefault(name, []).append((title, every))
            ttft, itl = ([percent(values, p) * 1e3 for p in (0.5, 0.99)] for values in (every.ttft, every.itl))
            rate = statistics.median(seen.tok_s for seen in runs)
            print(f"| {title} | {rate:,.0f} | {ttft[0]:,.0f}, {ttft[1]:,.0f} | {itl[0]:.1f}, {itl[1]:.1f} |")
        rates = [statistics.median(seen.tok_s for seen in runs) for runs in found.values()]
        print(f"| last / first | {rates[-1] / rates[0]:.2f} | | |", flush=True)

    def _against_one_slot(self, name: str, requests: Callable[[Any], list]) -> None:
        engines = {slots: self.engine(slots) for slots in (1, self.args.slots)}
        self.compare(name, {f"{n} slot(s)": (lm, partial(requests, lm)) for n, lm in engines.items()})

    def _streams(self, lm: Any) -> list:
        return [(0.0, self.request(lm, 16, self.args.answer), True) for _ in range(self.args.slots)]

    def streams(self) -> None:
        self._against_one_slot("streams", self._streams)

    def mixed(self) -> None:
        def requests(lm: Any) -> list:
            at, made = 0.0, []
            for _ in range(self.args.requests):
                made.append((at, self.request(lm, 2 ** self.rng.randrange(3, 12), self.rng.randrange(8, 97)), True))
                at += self.rng.expovariate(self.args.rate)
            return made

        self._against_one_slot("mixed", requests)

    def long(self) -> None:
        lm = self.engine(self.args.slots)

        def beside() -> list:
            return [*self._streams(lm)[:-1], (0.2, self.request(lm, self.args.long, 1), False)]

        self.compare("long", {"15 streams": (lm, lambda: self._streams(lm)[:-1]), "and a long prompt": (lm, beside)})
        tile = lm.numerics.tile_size
        seconds = statistics.median(self._read(lm, tile)[0] for _ in range(5))
        print(f"a tile of {tile} tokens takes {seconds * 1e3:.0f} ms")

    def _read(self, lm: Any, prompt: int | list[int]) -> tuple[float, Any]:
        """Seconds to read a prompt and choose one token; the request's usage."""
        began = time.perf_counter()
        end = lm.submit(self.request(lm, prompt, 1)).result()
        return time.perf_counter() - began, end.usage

    def unique(self) -> float:
        """One engine, whose cache is taken away for every second request: two engines differ by where memory is."""
        lm = self.engine(1, cache_mb=256)
        core = lm._core
        caches = {"no cache": None, "a cache": core.cache}
        print("\n| unique prompts | no cache: ms | a cache: ms | ratio | pairs: median, quartiles |")
        print("| --- | --- | --- | --- | --- |")
        sums = dict.fromkeys(caches, 0.0)
        for length in (self.args.prompt // n for n in (8, 4, 2, 1)):
            times: dict[str, list[float]] = {title: [] for title in caches}
            for number in range(self.args.pairs):
                for title in list(caches)[:: 1 if number % 2 else -1]:
                    core.cache = caches[title]
                    times[title].append(self._read(lm, length)[0])
            off, on = (statistics.median(seconds) for seconds in times.values())
            sums = {title: sums[title] + statistics.median(times[title]) for title in caches}
            ratios = [b / a for a, b in zip(*times.values(), strict=True)]
            low, middle, high = (percent(ratios, share) for share in (0.25, 0.5, 0.75))
            print(
                f"| {length} tokens | {off * 1e3:.1f} | {on * 1e3:.1f} | {on / off:.3f} "
                f"| {middle:.3f}, {low:.3f} to {high:.3f} |",
                flush=True,
            )
        core.cache = caches["a cache"]
        off, on = sums.values()
        print(f"| all | {off * 1e3:.1f} | {on * 1e3:.1f} | {on / off:.3f} | |", flush=True)
        return on / off

    def hit(self) -> None:
        lm = self.engine(1, cache_mb=256)
        found: dict[str, list[float]] = {"cold": [], "hit": [], "repeat": []}
        length, tile, computed = self.args.prompt, lm.numerics.tile_size, 0
        for _ in range(2 * self.args.rounds + 1):
            book = self.tokens(lm, length)
            asked = [*book, *self.tokens(lm, SUFFIX)]
            found["cold"].append(self._read(lm, book)[0])
            seconds, usage = self._read(lm, asked)
            found["hit"].append(seconds)
            computed = len(asked) - usage.resumed_tokens
            found["repeat"].append(self._read(lm, asked)[0])
        cold, hit, repeat = (statistics.median(seconds) * 1e3 for seconds in found.values())
        limit = f"1.25 x their share + 10 ms: {1.25 * cold * computed / (length + SUFFIX) + 10:.1f}"
        print(
            f"\n| hit, {length} tokens and {SUFFIX} more, tiles of {tile} | TTFT ms |\n| --- | --- |\n"
            f"| cold | {cold:.1f} |\n| {computed} tokens computed | {hit:.1f} ({limit}) |"
            f"\n| an exact repeat | {repeat:.1f} |",
            flush=True,
        )

    def http(self) -> dict[int, float]:
        from xlstm_ray.serve.options import Options
        from xlstm_ray.serve.server import Server

        many = 32
        lm = self.engine(many)
        server = Server(Options(port=0), threading.Event())
        server.open(lm, many)
        caller = Caller(server.desk.options.url.replace(":0", f":{server.port}"))
        text = "The capital of France is a city on a river, and its people have always said that " * 8
        prompt = lm.encode(text)[:64]
        print("\n| http, 64 tokens | submit: TTFT p50, p99 ms | over HTTP | p50 more |\n| --- | --- | --- | --- |")
        added: dict[int, float] = {}
        for count, rounds in ((1, 40 * self.args.rounds), (many, 4 * self.args.rounds)):
            inside: list[float] = []
            over: list[float] = []
            for _ in range(rounds):
                inside += run(lm, [(0.0, self.request(lm, prompt, 4), True)] * count).ttft
                over += caller.ask(prompt, count)
            own, more = ([1e3 * percent(values, p) for p in (0.5, 0.99)] for values in (inside, over))
            added[count] = more[0] - own[0]
            print(
                f"| {count} at once | {own[0]:.1f}, {own[1]:.1f} | {more[0]:.1f}, {more[1]:.1f} | {added[count]:.1f} |",
                flush=True,
            )
        caller.close()
        server.close()
        return added

    def memory(self) -> None:
        lm = self.engine(self.args.slots)
        process, seen, many = psutil.Process(), {}, self.args.many
        peak, ended = 0, threading.Semaphore(self.args.slots * 2)

        def watch(event: Any) -> None:
            nonlocal peak
            if isinstance(event, Reading | End):
                peak = max(peak, process.memory_info().rss)
            if isinstance(event, End):
                ended.release()

        for number in range(1, many + 1):
            ended.acquire()
            prompt, answer = self.rng.randrange(8, 1024), self.rng.randrange(2, 24)
            lm.submit(self.request(lm, prompt, answer)).listen(watch)
            if number in (many // 10, many // 2, many):
                seen[number] = process.memory_info().rss
        for _ in range(self.args.slots * 2):
            ended.acquire()
        need = lm.plan.room.serving(self.args.slots).total
        print(
            f"\nmemory after {', '.join(f'{n:,} requests: {rss >> 20} MiB' for n, rss in seen.items())}; peak "
            f"{peak >> 20} MiB; the computed need {need >> 20} MiB",
            flush=True,
        )

    def draw(self, path: Path) -> None:
        """Each workload's TTFT and ITL, as shares of requests and tokens below a time."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        figure, axes = pyplot.subplots(len(self.drawn), 2, figsize=(10, 3.2 * len(self.drawn)), squeeze=False)
        for (name, sides), row in zip(self.drawn.items(), axes, strict=True):
            for axis, what in zip(row, ("ttft", "itl"), strict=True):
                for title, seen in sides:
                    values = sorted(getattr(seen, what))
                    shares = [(n + 1) / len(values) for n in range(len(values))]
                    axis.step([1e3 * value for value in values], shares, label=title)
                axis.set(xscale="log", xlabel=f"{what.upper()}, ms", ylabel="share below", title=name, ylim=(0, 1))
                axis.grid(alpha=0.3)
                axis.legend()
        figure.tight_layout()
        figure.savefig(path, dpi=120)


def services(urls: list[str], rounds: int, seed: int) -> None:
    rng, times = random.Random(seed), {url: list[float]() for url in urls}
    callers = {url: Caller(url) for url in urls}
    for turn in range(-4, 40 * rounds):  # the first ones are not counted: connections, code
        for url in urls:
            seconds = callers[url].ask([rng.randrange(1, 256) for _ in range(64)])
            times[url] += seconds if turn >= 0 else []
    print("| service | TTFT p50, p99 ms | p50 more than the first |\n| --- | --- | --- |")
    for url in urls:
        own, late = (1e3 * percent(times[url], share) for share in (0.5, 0.99))
        print(f"| {url} | {own:.1f}, {late:.1f} | {own - 1e3 * percent(times[urls[0]], 0.5):.1f} |", flush=True)
        callers[url].close()


TABLES = "streams", "mixed", "long", "unique", "hit", "http", "memory"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(TABLES), help="tables, with commas between")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--device", type=device, default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--slots", type=positive, default=16)
    parser.add_argument("--requests", type=positive, default=48)
    parser.add_argument("--rate", type=float, default=8.0, help="arrivals a second")
    parser.add_argument("--answer", type=positive, default=64, help="tokens of a stream's answer")
    parser.add_argument("--long", type=positive, default=16384, help="tokens of the long prompt")
    parser.add_argument("--prompt", type=positive, default=8192, help="tokens of the longest prompt of unique and hit")
    parser.add_argument("--many", type=positive, default=1000, help="requests of the memory's table")
    parser.add_argument("--rounds", type=positive, default=3)
    parser.add_argument("--pairs", type=positive, default=24, help="pairs of requests of each length of unique")
    parser.add_argument("--seed", type=whole, default=0)
    parser.add_argument("--url", action="append", help="a service that runs; give it for each")
    parser.add_argument("--png", type=Path, help="draw streams, mixed and long (needs matplotlib)")
    args = parser.parse_args()
    if args.url:
        services(args.url, args.rounds, args.seed)
        return
    asked = args.only.split(",")
    if unknown := [name for name in asked if name not in TABLES]:
        parser.error(f"--only {unknown[0]}: not one of {', '.join(TABLES)}")
    bench = Bench(args)
    first = bench.engine(args.slots)
    print(
        f"{first.model_path.name} on {first.device.type}, {first.numerics.dtype}, {args.rounds} rounds, {time.ctime()}"
    )
    for name in asked:
        getattr(bench, name)()
    bench.close()
    if args.png is not None:
        bench.draw(args.png)


if __name__ == "__main__":
    main()
