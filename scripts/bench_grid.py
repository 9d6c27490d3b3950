#!/usr/bin/env python
"""The grid against one process: actors on Ray and the queued backend, the same random model, alternating rounds.

    python scripts/bench_grid.py                                     # 2 stages, then 2 bands, against 2 threads
    python scripts/bench_grid.py --device cuda --grids stages:2 --hidden 4096 --blocks 32 --heads 8 --vocab 50304 \\
        --tokens 131072 --tile-size 2048 --chunk-size 256            # two GPUs against one

Every contestant is a separate process that has loaded, compiled and run once; the grid has its own Ray head. In a
round, contestants run one after the other. The output has medians over rounds and their ratio; also the cost of a call
of Ray, the number of calls for a tile, and their largest share of a tile's time.
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

from arguments import device, plainly, positive

SELF = Path(__file__).resolve()


def contestant(kind: str, directory: Path, args: argparse.Namespace) -> None:
    """Answers each line of standard input with one run's figures; the grid's kind is stages:N or bands:N."""
    import torch

    import xlstm_ray

    options = {"device": args.device, "dtype": args.dtype, "tile_size": args.tile_size, "chunk_size": args.chunk_size}
    name, _, count = kind.partition(":")
    if name == "queued":
        lm = xlstm_ray.load(directory, threads=args.threads, **options)
    else:
        parts = int(count)
        shape = {"stages": parts} if name == "stages" else {"heads_per_band": -(-args.heads // parts)}
        own = max(1, args.threads // parts)
        lm = xlstm_ray.load(
            directory,
            chunkwise_backend="ray_compiled_chunks",
            ray_local_mode=False,
            threads=own,
            journal_every=args.journal_every,
            **shape,
            **options,
        )
    prompt = torch.randint(args.vocab, (args.tokens,), generator=torch.Generator().manual_seed(1)).tolist()
    lm.prefill(prompt[: 2 * args.tile_size])
    figures = {} if name == "queued" else calls(lm)
    print(json.dumps(figures), flush=True)
    for _ in sys.stdin:
        result = lm.prefill(prompt)
        figures = {
            "seconds": result.stats.prefill_s,
            "tile_s": statistics.median(result.stats.tile_seconds),
            "digest": result.state.digest(),
        }
        print(json.dumps(figures), flush=True)
    lm.close()


def calls(lm) -> dict[str, float]:
    """Seconds that an empty call takes, alone and in a queue, and the calls that a tile takes."""
    import ray

    handle = lm.executor.placement.seats[0].handle
    call = handle.empty_cache.options(concurrency_group="control").remote
    ray.get([call() for _ in range(50)])
    began = time.perf_counter()
    for _ in range(200):
        ray.get(call())
    alone = (time.perf_counter() - began) / 200
    began = time.perf_counter()
    ray.get([call() for _ in range(1000)])
    queued = (time.perf_counter() - began) / 1000
    blocks, stages, bands = lm.config.num_blocks, lm.stages, lm.bands
    a_tile = 2 * stages if bands == 1 else 1 + 2 * blocks * bands + stages
    return {"call_alone_s": alone, "call_queued_s": queued, "calls_a_tile": a_tile}


def start(kind: str, directory: Path, argv: list[str]) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, str(SELF), "--contestant", kind, "--model", str(directory), *argv],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def answer(process: subprocess.Popen) -> dict:
    line = process.stdout.readline()
    if not line:
        sys.exit("a contestant ended early; its error stands above")
    return json.loads(line)


def pair(grid: str, directory: Path, argv: list[str], args: argparse.Namespace) -> None:
    """Rounds of the queued backend and one grid, side by side."""
    processes = {kind: start(kind, directory, argv) for kind in ("queued", grid)}
    costs = {kind: answer(process) for kind, process in processes.items()}[grid]
    seen: dict[str, list[dict]] = {kind: [] for kind in processes}
    for _ in range(args.rounds):
        for kind, process in processes.items():
            process.stdin.write("run\n")
            process.stdin.flush()
            seen[kind].append(answer(process))
    for process in processes.values():
        process.stdin.close()
        process.wait()
    for kind, rows in seen.items():
        seconds = [row["seconds"] for row in rows]
        middle = statistics.median(seconds)
        print(
            f"{kind:<10} {args.tokens / middle:9,.0f} tokens/s   {min(seconds):.2f} to {max(seconds):.2f} s   "
            f"tile {statistics.median(row['tile_s'] for row in rows):.3f} s"
        )
    medians = {kind: statistics.median(row["seconds"] for row in rows) for kind, rows in seen.items()}
    tile = statistics.median(row["tile_s"] for row in seen[grid])
    share = costs["calls_a_tile"] * costs["call_queued_s"] / tile
    print(f"{grid} / queued: {medians['queued'] / medians[grid]:.3f}")
    print(
        f"a call of Ray: {1e3 * costs['call_alone_s']:.2f} ms alone, {1e3 * costs['call_queued_s']:.2f} ms in a queue; "
        f"{costs['calls_a_tile']} a tile: {share:.2%} of its time"
    )
    digests = {row["digest"] for rows in seen.values() for row in rows}
    print(f"{len(digests)} different state(s) in {sum(map(len, seen.values()))} runs\n", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grids", default="stages:2,bands:2", help="stages:N and bands:N, with commas between")
    parser.add_argument("--rounds", type=positive, default=3)
    parser.add_argument("--tokens", type=positive, default=32768)
    parser.add_argument("--device", type=device, default="cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument(
        "--threads", type=positive, default=2, help="of the queued backend; the grid's actors share them"
    )
    parser.add_argument("--tile-size", type=positive, default=1024)
    parser.add_argument("--chunk-size", type=positive, default=64)
    parser.add_argument("--journal-every", type=positive, help="tiles between snapshots [default: by device]")
    parser.add_argument("--hidden", type=positive, default=1024)
    parser.add_argument("--blocks", type=positive, default=12)
    parser.add_argument("--heads", type=positive, default=4)
    parser.add_argument("--vocab", type=positive, default=2048)
    parser.add_argument("--store", default="bfloat16")
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--contestant", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.contestant:
        with plainly():
            contestant(args.contestant, args.model, args)
        return
    from bench_prefill import make_model

    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
        directory = Path(folder) / "model"
        make_model(directory, args)
        for grid in args.grids.split(","):
            pair(grid, directory, sys.argv[1:], args)


if __name__ == "__main__":
    main()
