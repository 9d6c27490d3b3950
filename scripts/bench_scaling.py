#!/usr/bin/env python
"""One prompt, and many, over the GPUs of a host: a random model on 1, 2, 4, ... stages, side by side.

    python scripts/bench_scaling.py --device cuda --out scaling.jsonl --png scaling.png   # 7B's shape, every GPU
    python scripts/bench_scaling.py --hidden 256 --blocks 4 --heads 4 --vocab 2048 --stages 1,2 --tokens 2048,8192 \\
        --tile-size 512 --chunk-size 64 --answer 16                                       # on two CPU cores

A contestant is a process that has loaded, compiled and run once: one stage is one process without Ray, more are a grid
of one actor a stage. In a round they run one after the other, each length in turn. Each then answers --rows requests
for every decoding step that it has in flight: one, or on GPUs two a stage; and again with answers of twice the length.
Tokens a second are the difference: the prompts' time is in neither. With --out, every run is a line of JSON; the same
command again makes only the runs that are missing. The first line has the settings, and a file of other settings is
refused.

The tables have medians over rounds. For a prompt:

    x one        how many times as fast as one stage
    by stages    x one, over the number of stages
    pipeline     what the pipeline alone allows: tiles / (tiles + stages - 1)
    rest         the time beyond one stage's x (tiles + stages - 1) / (tiles x stages): transfers, calls, uneven stages
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SELF = Path(__file__).resolve()
sys.path[:0] = [str(SELF.parents[1]), str(SELF.parent)]
PROMPT, FEW = 64, 2  # tokens of a request's prompt; tiles of the first run
Row = dict[str, Any]


# -- a contestant's process: reads what to do, answers with figures ----------------------------------------------------
def contestant(args: argparse.Namespace) -> None:
    import torch

    import xlstm_ray
    from xlstm_ray import Request, Sampling

    executor = "ray" if args.contestant > 1 else "queued"
    grid: dict[str, Any] = {"chunkwise_backend": f"{executor}_{args.kernel}"}
    grid["threads"] = max(1, args.threads // args.contestant)
    if args.contestant > 1:
        grid |= {"ray_local_mode": False, "stages": args.contestant}
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

    lm.prefill(prompt(FEW * args.tile_size, 1))
    count = lm.executor.parallel * args.rows
    if args.answer:
        lm.serve(slots=count, buckets=(args.rows,))
        answer(count)
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        tokens = json.loads(line)
        print(json.dumps(prefill(tokens) if tokens else answer(count)), flush=True)
    lm.close()


class Contestant:
    def __init__(self, stages: int, model: Path, argv: list[str]):
        self.stages = stages
        command = [sys.executable, str(SELF), *argv, "--contestant", str(stages), "--model", str(model)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            sys.exit(f"the contestant with {self.stages} stages ended early; its error stands above")
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
    works = [*args.tokens, *([0] if args.answer else [])]
    all_runs = [(n, tokens, stages) for n in range(args.rounds) for tokens in works for stages in args.stages]
    there = {(row["round"], row["work"], row["stages"]) for row in rows}
    missing = [run for run in all_runs if run not in there]
    if not missing:
        return rows
    from bench_prefill import make_model

    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
        model = args.model or Path(folder) / "model"
        if not model.exists():
            make_model(model, args)
        field = {stages: Contestant(stages, model, argv) for stages in sorted({run[2] for run in missing})}
        for one in field.values():
            one.read()
        for number, tokens, stages in missing:
            row = {"round": number, "work": tokens, "stages": stages, **field[stages].run(tokens)}
            rows.append(row)
            if args.out is not None:
                with args.out.open("a") as file:
                    file.write(json.dumps(row) + "\n")
        for one in field.values():
            one.close()
    return rows


# -- tables ------------------------------------------------------------------------------------------------------------
def table(rows: list[Row], args: argparse.Namespace) -> dict[int, list[float]]:
    """Print the tables; returns tokens/s for each work and number of stages."""

    def seconds(work: int, stages: int) -> list[float]:
        return [row["seconds"] for row in rows if (row["work"], row["stages"]) == (work, stages)]

    rates: dict[int, list[float]] = {}
    one = args.stages[0]
    for tokens in args.tokens:
        tiles = -(-tokens // args.tile_size)
        print(f"\n{tokens:,} tokens, {tiles} tiles of {args.tile_size}")
        print("stages   tokens/s        seconds   TTFT s   x one   by stages   pipeline     rest   MiB, most")
        base = statistics.median(seconds(tokens, one))
        for stages in args.stages:
            runs = seconds(tokens, stages)
            middle = statistics.median(runs)
            rates.setdefault(tokens, []).append(tokens / middle)
            ideal = base * one * (tiles + stages - 1) / (tiles * stages)
            same = [row for row in rows if (row["work"], row["stages"]) == (tokens, stages)]
            print(
                f"{stages:6d} {tokens / middle:10,.0f} {min(runs):7.2f} to {max(runs):<6.2f}"
                f"{statistics.median(row['ttft_s'] for row in same):7.2f} {base / middle:7.2f}"
                f"{base / middle / stages:12.2f} {tiles / (tiles + stages - 1):10.2f} {1e3 * (middle - ideal):6.0f}ms"
                f"{max(row['memory'] for row in same) / 2**20:12,.0f}"
            )
    if args.answer:
        print(f"\n{args.rows} requests for each step in flight, {PROMPT} + {args.answer} tokens each")
        print("stages   tokens/s   x one   by stages")
        made = [row for row in rows if row["work"] == 0]
        for stages in args.stages:
            rate = statistics.median(row["tokens"] / row["seconds"] for row in made if row["stages"] == stages)
            rates.setdefault(0, []).append(rate)
            print(f"{stages:6d} {rate:10,.0f} {rate / rates[0][0]:7.2f} {rate / rates[0][0] / stages:11.2f}")
    digests = {tokens: {row["digest"] for row in rows if row["work"] == tokens} for tokens in args.tokens}
    answers = {json.dumps(row["answers"][: args.rows]) for row in rows if row["work"] == 0}
    print(f"\ndifferent states of a prompt: {[len(found) for found in digests.values()]}, of answers: {len(answers)}")
    return rates


def draw(path: Path, rates: dict[int, list[float]], args: argparse.Namespace) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4.5), layout="constrained")
    for work, row in rates.items():
        axes.plot(args.stages, [rate / row[0] for rate in row], "o-", label=f"{work:,} tokens" if work else "decoding")
    axes.plot(args.stages, [stages / args.stages[0] for stages in args.stages], ":", color="gray", label="all of it")
    axes.set(xlabel="stages, one on each device", ylabel="times as fast as one", xticks=args.stages)
    axes.legend()
    figure.savefig(path, dpi=150)


def numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=numbers, help="with commas [default: 1, 2, 4, 8 as far as there are GPUs]")
    parser.add_argument("--tokens", type=numbers, default=[16384, 65536, 262144], help="of a prompt, with commas")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=16, help="requests for each step in flight")
    parser.add_argument("--answer", type=int, default=64, help="tokens of an answer; 0 for no requests")
    parser.add_argument("--tile-size", type=int, default=4096)
    parser.add_argument("--chunk-size", type=int, default=256)
    for name, default in (("hidden", 4096), ("blocks", 32), ("heads", 8), ("vocab", 50304)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--store", default="bfloat16", help="dtype that the random model is stored in")
    parser.add_argument("--kernel", help="[default: triton_chunks on cuda, compiled_chunks elsewhere]")
    parser.add_argument("--threads", type=int, default=2, help="on the CPU, over all stages")
    parser.add_argument("--out", type=Path, help="a file of runs, a line of JSON each")
    parser.add_argument("--png", type=Path, help="draw it (needs matplotlib)")
    parser.add_argument("--model", type=Path, help="a folder of the random model, for the next time; made if missing")
    parser.add_argument("--contestant", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.kernel = args.kernel or ("triton_chunks" if args.device == "cuda" else "compiled_chunks")
    if args.contestant:
        contestant(args)
        return
    if args.stages is None:
        import torch

        args.stages = [n for n in (1, 2, 4, 8) if n <= max(1, torch.cuda.device_count())]
    apart = ("out", "png", "model", "contestant", "rounds")
    settings = {name: value for name, value in vars(args).items() if name not in apart}
    rates = table(measure(args, sys.argv[1:], settings), args)
    if args.png is not None:
        draw(args.png, rates, args)


if __name__ == "__main__":
    main()
