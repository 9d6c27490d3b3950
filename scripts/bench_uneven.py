#!/usr/bin/env python
"""`stages=auto` on two nodes of unlike speed, beside every split by hand: one is stopped part of the time.

    python scripts/bench_uneven.py                       # 8 blocks; the other node has a quarter of its time
    python scripts/bench_uneven.py --share 0.5 --rounds 5

Both nodes are on this machine, each with one CPU. Every contestant is an engine of its own, loaded and warmed up; in a
round they run one after the other. The first stage of a split by hand is held on the fast node, the other one on the
slow node, which is slow while it is measured and while it computes. The output has the median time of each split by the
blocks of the fast node, what auto chose, and how long a block takes there beside what it takes in this process, which
nothing slows.
"""

import argparse
import json
import os
import secrets
import signal
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path

import psutil
from arguments import positive

PERIOD_S = 0.02


@contextmanager
def slowed(raylet: int, share: float, only: str = "") -> Iterator[None]:
    """Let the workers of a node run only that share of the time. raylet: its process. only: in their titles."""
    over, node = threading.Event(), psutil.Process(raylet)

    def send(workers: list[psutil.Process], number: int) -> None:
        for worker in workers:
            with suppress(psutil.Error):
                worker.send_signal(number)

    def stop_and_go() -> None:
        workers: list[psutil.Process] = []
        looked = 0.0
        while not over.is_set():
            if time.monotonic() - looked > (0.1 if only else 1.0):  # a look takes some ms of a core
                with suppress(psutil.Error):
                    workers = [w for w in node.children(recursive=True) if only in " ".join(w.cmdline())]
                looked = time.monotonic()
            send(workers, signal.SIGSTOP)
            time.sleep(PERIOD_S * (1 - share))
            send(workers, signal.SIGCONT)
            time.sleep(PERIOD_S * share)

    thread = threading.Thread(target=stop_and_go, name="slow", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def nodes(token: str, store: int = 80 << 20) -> tuple[object, object]:
    """A cluster of two nodes with one CPU each on this machine, and the second node. Call it before importing Ray."""
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": token, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    from ray.cluster_utils import Cluster

    first = {"num_cpus": 1, "object_store_memory": store, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=first)
    return cluster, cluster.add_node(num_cpus=1, object_store_memory=store)


def raylet_of(node) -> int:
    return node.all_processes["raylet"][0].process.pid


@contextmanager
def held_on(*nodes: str) -> Iterator[None]:
    """Put each stage on this node (Ray's ids). Without it, Ray decides where the stages of a split by hand are."""
    from xlstm_ray.actors import grid
    from xlstm_ray.split import Reserved

    class Held(grid.Placement):
        def __init__(self, link, spec, layout, options):
            places = tuple(Reserved(node, memory=0) for node in nodes)
            super().__init__(link, spec, layout, replace(options, places=places))

    free, grid.Placement = grid.Placement, Held
    try:
        yield
    finally:
        grid.Placement = free


def alone(directory: Path, options: dict, tokens: list[int], blocks: int, tile: int) -> float:
    """Seconds of a tile and block in this process, with the same kernels and one thread."""
    import xlstm_ray

    with xlstm_ray.load(directory, chunkwise_backend="queued_compiled_chunks", **options) as lm:
        lm.prefill(tokens[: 2 * tile])
        return statistics.median(lm.prefill(tokens[: 8 * tile]).stats.tile_seconds) / blocks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=float, default=0.25, help="of its time that the slow node has")
    parser.add_argument("--rounds", type=positive, default=3)
    parser.add_argument("--by-hand", help="blocks of the first stage, with commas between [default: all]")
    parser.add_argument("--tokens", type=positive, default=8192)
    parser.add_argument("--tile-size", type=positive, default=256)
    parser.add_argument("--chunk-size", type=positive, default=64)
    parser.add_argument("--hidden", type=positive, default=512)
    parser.add_argument("--blocks", type=positive, default=8)
    parser.add_argument("--heads", type=positive, default=4)
    parser.add_argument("--vocab", type=positive, default=2048)
    parser.add_argument("--store", default="float32")
    args = parser.parse_args()
    from bench_prefill import make_model

    with tempfile.TemporaryDirectory() as folder:
        directory, token = Path(folder) / "model", Path(folder) / "token"
        make_model(directory, args)
        token.write_text(secrets.token_hex(32))
        token.chmod(0o600)
        cluster, slow = nodes(str(token), 200 << 20)
        compare(args, directory, token, cluster, slow)
        cluster.shutdown()


def compare(args, directory: Path, token: Path, cluster, slow) -> None:
    """Rounds of auto and the splits by hand; prints the table."""
    import torch

    import xlstm_ray

    own = {
        "device": "cpu",
        "threads": 1,
        "dtype": "float32",
        "tile_size": args.tile_size,
        "chunk_size": args.chunk_size,
    }
    grid = {"chunkwise_backend": "ray_compiled_chunks", "ray_address": cluster.address, "ray_token_path": str(token)}
    drawn = torch.Generator().manual_seed(1)
    tokens = torch.randint(args.vocab, (args.tokens,), generator=drawn).tolist()
    by_hand = [int(n) for n in args.by_hand.split(",")] if args.by_hand else range(1, args.blocks)
    asked: list[object] = ["auto", *((n, args.blocks - n) for n in by_hand)]
    seen: dict[int, list[float]] = {}
    chosen, digests, auto = 0, set(), []
    for _ in range(args.rounds):
        for stages in asked:
            held = nullcontext() if stages == "auto" else held_on(cluster.head_node.node_id, slow.node_id)
            # Not slow while it loads, which nobody compares.
            with held, slowed(raylet_of(slow), args.share, only="Speed.measure"):
                lm = xlstm_ray.load(directory, stages=stages, **grid, **own)
            with lm, slowed(raylet_of(slow), args.share):
                seats = lm.executor.placement.seats
                fast = sum(len(seat.shard.blocks) for seat in seats if seat.node != slow.node_id)
                lm.prefill(tokens[: 4 * args.tile_size])
                result = lm.prefill(tokens)
                digests.add(result.state.digest())
                if stages == "auto":
                    chosen, note, split = fast, lm.note, lm.plan.split
                    auto.append(result.stats.prefill_s)
                    print(note, flush=True)
                else:
                    assert fast == stages[0], f"{stages}: {fast} blocks are on the fast node"
                    seen.setdefault(fast, []).append(result.stats.prefill_s)
                print(f"{stages}: {fast} blocks on the fast node, {result.stats.prefill_s:.2f} s", flush=True)
    best = min(statistics.median(seconds) for seconds in seen.values())
    print("blocks of the fast node   seconds             x the best by hand")
    for name, seconds in [(f"auto: {chosen}", auto), *((str(fast), seen[fast]) for fast in sorted(seen))]:
        middle = statistics.median(seconds)
        print(f"{name:>23} {middle:9.2f} ({min(seconds):.2f} to {max(seconds):.2f}) {middle / best:9.2f}")
    print(f"{len(digests)} different state(s)")
    here = alone(directory, own, tokens, args.blocks, args.tile_size)
    measured = {stage.place.host: next(iter(stage.place.block_s.values())) for stage in split}
    print(f"a tile and block: {1e3 * here:.2f} ms in this process, alone; measured on the nodes, both at work:")
    for host, seconds in measured.items():
        print(f"  {host:<20} {1e3 * seconds:.2f} ms, {seconds / here:.2f} x")
    print(json.dumps({"auto": chosen, "ratio": statistics.median(auto) / best}))


if __name__ == "__main__":
    main()
