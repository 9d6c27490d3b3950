#!/usr/bin/env python
"""One prompt, and many, over the GPUs of a host: a random model on 1, 2, 4, ... of them, side by side.

    python scripts/bench_scaling.py --device cuda --out scaling.jsonl --png scaling.png   # 7B's shape, every GPU
    python scripts/bench_scaling.py --hidden 256 --blocks 4 --heads 4 --vocab 2048 --stages 1,2 --tokens 2048,8192 \\
        --tile-size 512 --chunk-size 64 --answer 16                                       # on two CPU cores
    python scripts/bench_scaling.py --device cuda --layout stages,spans --tokens 16384,65536 --answer 0

--layout says what the GPUs have: a stage of the blocks each (`--stages` of the program), or all blocks each and the
tiles in turn (`--spans`); --stages says how many GPUs, in either.

A contestant is a process that has loaded, compiled and run once: on one GPU it is one process without Ray, on more a
grid of one actor a GPU. Loaded at a time are one GPU's and those of one number: in a round they run one after the
other, each length in turn. Each then answers --rows requests for every decoding step that it has in flight: one, or on
GPUs three a stage; and again with answers of twice the length. Tokens a second are the difference: the prompts' time is
in neither. Each run is printed as it ends. With --out, it is a line of JSON, too; the same command again, or one with
other --stages, --layout, --tokens or --rounds, makes only the runs that are missing. The first line has the other
settings, and a file that has others there is refused.

The tables have medians over rounds. For a prompt:

    x one        how many times as fast as one, in the rounds beside it
    by number    x one, over the number of GPUs
    on paper     what the layout allows at most, by number, where nothing takes time but the blocks (docs/scaling.md)
    fill         the time on paper in which some have nothing to do: stages fill and drain, a last round has few tiles
    rest         the time beyond that: transfers, calls, uneven stages
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from arguments import device, plainly, positive, positives, whole

SELF = Path(__file__).resolve()
BEGAN = time.perf_counter()
PROMPT, FEW = 64, 2  # tokens of a request's prompt; tiles of the first run, at least
Row = dict[str, Any]


class Way(NamedTuple):
    """What the GPUs have, and their number."""

    layout: str
    number: int

    def __str__(self) -> str:
        return f"{self.number} {self.layout}"

    def tiles(self, tiles: int, blocks: int) -> float:
        """The time of a prompt on paper, in times of a tile on one."""
        if self.layout == "spans":
            return -(-tiles // self.number) + (tiles - 1) % self.number / blocks
        return (tiles + self.number - 1) / self.number


class Run(NamedTuple):
    """beside: the largest number of GPUs in its rounds. work: tokens of a prompt; 0: answer many requests."""

    beside: int
    round: int
    work: int
    way: Way


def fields(args: argparse.Namespace) -> list[list[Way]]:
    """Who runs in the same rounds: the first, and those of one number. All would need more memory than a GPU has.

    On one, all layouts are the same.
    """
    first, *others = [Way(name, n) for n in args.stages for name in (args.layout if n > 1 else args.layout[:1])]
    numbers = dict.fromkeys(way.number for way in others)
    return [[first, *(way for way in others if way.number == n)] for n in numbers] or [[first]]


# -- a contestant's process: reads what to do, answers with figures ----------------------------------------------------
def contestant(args: argparse.Namespace) -> None:
    import torch

    import xlstm_ray
    from xlstm_ray import Request, Sampling
    from xlstm_ray.threads import collect_seldom, settle

    collect_seldom()
    (layout,), (number,) = args.layout, args.stages
    executor = "ray" if number > 1 else "queued"
    grid: dict[str, Any] = {"chunkwise_backend": f"{executor}_{args.kernel}"}
    grid["threads"] = args.threads_each or max(1, args.threads // number)
    if number > 1:
        grid |= {"ray_local_mode": False, layout: number}
    lm = xlstm_ray.load(
        args.model, device=args.device, dtype=args.dtype, tile_size=args.tile_size, chunk_size=args.chunk_size, **grid
    )

    def prompt(tokens: int, seed: int) -> list[int]:
        return torch.randint(args.vocab, (tokens,), generator=torch.Generator().manual_seed(seed)).tolist()

    def prefill(tokens: int) -> Row:
        result = lm.prefill(prompt(tokens, 1))
        return {
            "seconds": result.stats.prefill_s,
            "ttft_s": result.stats.ttft_s,
            "memory": result.stats.peak_memory_bytes,
            "digest": result.state.digest(),
        }

    def answers(count: int, tokens: int) -> tuple[float, list[list[int]]]:
        sampling = Sampling(max_new_tokens=tokens, ignore_eos=True)
        began = time.perf_counter()
        handles = [lm.submit(Request(prompt(PROMPT, 2 + n), sampling=sampling)) for n in range(count)]
        ends = [handle.result().tokens for handle in handles]
        return time.perf_counter() - began, ends

    def answer(count: int) -> Row:
        half_s, _ = answers(count, args.answer)
        seconds, ends = answers(count, 2 * args.answer)
        return {"seconds": seconds - half_s, "half_s": half_s, "tokens": count * args.answer, "answers": ends}

    lm.prefill(prompt(max(FEW, number + 1) * args.tile_size, 1))  # each actor has worked
    count = lm.executor.parallel * args.rows
    if args.answer:
        lm.serve(slots=count, buckets=(args.rows,))
        answer(count)
    settle()
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        tokens = json.loads(line)
        print(json.dumps(prefill(tokens) if tokens else answer(count)), flush=True)
    lm.close()


class Contestant:
    def __init__(self, way: Way, model: Path, argv: list[str]):
        self.way = way
        own = ["--contestant", "--layout", way.layout, "--stages", str(way.number), "--model", str(model)]
        command = [sys.executable, str(SELF), *argv, *own]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._ready = False

    def ready(self) -> None:
        """Wait until it has loaded."""
        self._ready = self._ready or self.read() == "ready"

    def read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            sys.exit(f"the contestant with {self.way} ended early; its error stands above")
        return json.loads(line)

    def run(self, tokens: int) -> Row:
        """tokens: of a prompt; 0: answer many requests."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{tokens}\n")
        self._process.stdin.flush()
        return self.read()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


# -- all runs, and those that a file has already -----------------------------------------------------------------------
def measure(args: argparse.Namespace, argv: list[str], settings: Row) -> list[Row]:
    rows: list[Row] = []
    if args.out is not None and args.out.exists():
        first, *lines = args.out.read_text().splitlines()
        if json.loads(first) != settings:
            sys.exit(f"{args.out} has runs of other settings: {first}; give another --out, or remove it")
        rows = [json.loads(line) for line in lines]
    elif args.out is not None:
        args.out.write_text(json.dumps(settings) + "\n")
    there = {Run(row["beside"], row["round"], row["work"], Way(row["layout"], row["number"])) for row in rows}
    works = [*args.tokens, *([0] if args.answer else [])]
    all_runs = [
        Run(field[-1].number, n, work, way)
        for field in fields(args)
        for n in range(args.rounds)
        for work in works
        for way in field
    ]
    missing = [run for run in all_runs if run not in there]
    if not missing:
        return rows
    from bench_prefill import make_model

    loaded: dict[Way, Contestant] = {}
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
        model = args.model or Path(folder) / "model"
        if not model.exists():
            make_model(model, args)
            tell("the model is made")
        for beside, group in groupby(missing, lambda run: run.beside):
            runs = list(group)
            needed = dict.fromkeys(run.way for run in runs)
            for way in [way for way in loaded if way not in needed]:
                loaded.pop(way).close()
            loaded |= {way: Contestant(way, model, argv) for way in needed if way not in loaded}
            for way in needed:
                loaded[way].ready()
            tell(f"ready: {', '.join(map(str, needed))}")
            for run in runs:
                row = {"beside": beside, "round": run.round, "work": run.work, **run.way._asdict()}
                row |= loaded[run.way].run(run.work)
                rows.append(row)
                tell(f"{run.way}, {f'{run.work:,} tokens' if run.work else 'answers'}: {row['seconds']:.3f} s")
                if args.out is not None:
                    with args.out.open("a") as file:
                        file.write(json.dumps(row) + "\n")
        for one in loaded.values():
            one.close()
    return rows


def tell(what: str) -> None:
    print(f"-- {time.perf_counter() - BEGAN:.0f} s: {what}", flush=True)


# -- tables ------------------------------------------------------------------------------------------------------------
def table(rows: list[Row], args: argparse.Namespace) -> dict[int, dict[Way, float]]:
    """Print the tables; returns how many times as fast as one, for each work and way."""
    every = list(dict.fromkeys(way for field in fields(args) for way in field))
    one = every[0]

    def runs_of(work: int, way: Way, beside: Way | None = None) -> list[Row]:
        """beside: only those of the rounds beside it."""
        found = [row for row in rows if (row["work"], row["layout"], row["number"]) == (work, *way)]
        return [row for row in found if beside in (None, one) or row["beside"] == beside.number]

    times: dict[int, dict[Way, float]] = {}
    for tokens in args.tokens:
        tiles = -(-tokens // args.tile_size)
        print(f"\n{tokens:,} tokens, {tiles} tiles of {args.tile_size}")
        print("             tokens/s        seconds   TTFT s   x one   by number   on paper", end="")
        print("     fill     rest   MiB, most")
        for way in every:
            runs = runs_of(tokens, way)
            seconds = [row["seconds"] for row in runs]
            middle, paper = statistics.median(seconds), way.tiles(tiles, args.blocks)
            base = statistics.median(row["seconds"] for row in runs_of(tokens, one, way))
            fast = times.setdefault(tokens, {})[way] = base / middle
            alone = one.tiles(tiles, args.blocks)
            fill, rest = base * (paper / alone - one.number / way.number), middle - base * paper / alone
            print(
                f"{way.number:3d} {way.layout:7s} {tokens / middle:10,.0f} {min(seconds):7.2f} to {max(seconds):<6.2f}"
                f"{statistics.median(row['ttft_s'] for row in runs):7.2f} {fast:7.2f}"
                f"{fast * one.number / way.number:12.2f} {tiles / paper / way.number:10.2f} "
                f"{1e3 * fill:6.0f}ms {1e3 * rest:6.0f}ms {max(row['memory'] for row in runs) / 2**20:11,.0f}"
            )
    if args.answer:
        print(f"\n{args.rows} requests for each step in flight, {PROMPT} + {args.answer} tokens each")
        print("             tokens/s   x one   by number")
        for way in every:
            rate, base = [
                statistics.median(row["tokens"] / row["seconds"] for row in runs)
                for runs in (runs_of(0, way), runs_of(0, one, way))
            ]
            fast = times.setdefault(0, {})[way] = rate / base
            print(f"{way.number:3d} {way.layout:7s} {rate:10,.0f} {fast:7.2f} {fast * one.number / way.number:11.2f}")
    digests = {tokens: {row["digest"] for row in rows if row["work"] == tokens} for tokens in args.tokens}
    answers = {json.dumps(row["answers"][: args.rows]) for row in rows if row["work"] == 0}
    print(f"\ndifferent states of a prompt: {[len(found) for found in digests.values()]}, of answers: {len(answers)}")
    return times


def draw(path: Path, times: dict[int, dict[Way, float]], args: argparse.Namespace) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4.5), layout="constrained")
    for work, row in times.items():
        for layout in args.layout:
            line = {way.number: fast for way, fast in row.items() if way.number == 1 or way.layout == layout}
            name = f"{work:,} tokens" if work else "decoding"
            axes.plot([*line], [*line.values()], "o-", label=f"{name}, {layout}" if len(args.layout) > 1 else name)
    axes.plot(args.stages, [stages / args.stages[0] for stages in args.stages], ":", color="gray", label="all of it")
    axes.set(xlabel="devices", ylabel="times as fast as one", xticks=args.stages)
    axes.legend()
    figure.savefig(path, dpi=150)


def names(text: str) -> list[str]:
    if not {*text.split(",")} <= {"stages", "spans"}:
        raise argparse.ArgumentTypeError(f"{text!r}; there are stages and spans")
    return text.split(",")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--stages", type=positives, help="how many GPUs, with commas [default: 1, 2, 4, 8 as far as there are]"
    )
    parser.add_argument("--layout", type=names, default=["stages"], help="stages, spans, or both with a comma")
    parser.add_argument("--tokens", type=positives, default=[16384, 65536, 262144], help="of a prompt, with commas")
    parser.add_argument("--rounds", type=positive, default=3)
    parser.add_argument("--rows", type=positive, default=16, help="requests for each step in flight")
    parser.add_argument("--answer", type=whole, default=64, help="tokens of an answer; 0 for no requests")
    parser.add_argument("--tile-size", type=positive, default=4096)
    parser.add_argument("--chunk-size", type=positive, default=256)
    for name, default in (("hidden", 4096), ("blocks", 32), ("heads", 8), ("vocab", 50304)):
        parser.add_argument(f"--{name}", type=positive, default=default)
    parser.add_argument("--device", type=device, default="cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--store", default="bfloat16", help="dtype that the random model is stored in")
    parser.add_argument("--kernel", help="[default: triton_chunks on cuda, compiled_chunks elsewhere]")
    parser.add_argument("--threads", type=positive, default=2, help="on the CPU, over all actors")
    parser.add_argument("--threads-each", type=positive, help="on the CPU, of each actor, instead: bits depend on it")
    parser.add_argument("--out", type=Path, help="a file of runs, a line of JSON each")
    parser.add_argument("--png", type=Path, help="draw it (needs matplotlib)")
    parser.add_argument("--model", type=Path, help="a folder of the random model, for the next time; made if missing")
    parser.add_argument("--contestant", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.kernel = args.kernel or ("triton_chunks" if args.device == "cuda" else "compiled_chunks")
    if args.contestant:
        with plainly():
            contestant(args)
        return
    if args.stages is None:
        import torch

        args.stages = [n for n in (1, 2, 4, 8) if n <= max(1, torch.cuda.device_count())]
    apart = ("out", "png", "model", "contestant", "rounds", "stages", "layout", "tokens")
    settings = {name: value for name, value in vars(args).items() if name not in apart}
    times = table(measure(args, sys.argv[1:], settings), args)
    if args.png is not None:
        draw(args.png, times, args)


if __name__ == "__main__":
    main()
