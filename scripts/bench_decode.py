#!/usr/bin/env python
"""Decoding on a GPU, side by side in one process: this project, the memory's bandwidth, bare products, transformers.

    python scripts/bench_decode.py                                    # 7B's widths, 32 blocks, random weights
    python scripts/bench_decode.py --batches 1 --contestants this:bfloat16,this:float8
    python scripts/bench_decode.py --prefill 16384,65536 --tile-size 4096    # prefill instead: its steps alone

A token of every row is a whole step: embedding, blocks, logits, the choice of the next token; ids come back to the
host, one step behind. Rounds alternate, and the output has medians. Contestants:

    this:bfloat16, this:float8    one CUDA graph a step; `this:eager` calls block after block
    products:bfloat16             torch's products of the same rows with all weights, captured: no cell, no norms
    transformers:bfloat16         its model with its cache, native kernels (needs its weights beside ours in memory)

--prefill measures what bench_prefill.py does without a checkpoint on disk and without what an engine does for a prompt
(hashes of its tokens, a watchdog): steps of tiles, the last logits to the host; beside it the blocks' large products.
It also tells the memory that a prefill of the longest prompt takes beside the weights, its states included.

The copy bandwidth is that of a large copy on the device, bytes read and written. A step has to move the weights once
and the states twice: the share says how near it is to that.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from arguments import contestants, positive, positives

from xlstm_ray.config import ModelConfig
from xlstm_ray.kernels import chunkwise_backend
from xlstm_ray.layout import make_layout
from xlstm_ray.memory.need import state_bytes
from xlstm_ray.model import BlockWeights, EndWeights
from xlstm_ray.runtime.blocks import Kernels
from xlstm_ray.runtime.executor import Choice, Step, decoding_step
from xlstm_ray.runtime.executor import run as run_steps
from xlstm_ray.runtime.folded import fold, fold_ends
from xlstm_ray.runtime.local import InProcessExecutor
from xlstm_ray.runtime.worker import Worker
from xlstm_ray.sampling.params import Sampling
from xlstm_ray.sampling.sampler import Sampler

STEPS = 64  # of a measurement
Run = Callable[[], None]


def config_of(args: argparse.Namespace) -> ModelConfig:
    return ModelConfig.from_dict(
        {"model_type": "xlstm", "hidden_size": args.hidden, "num_blocks": args.blocks, "num_heads": args.heads,
         "vocab_size": args.vocab}
    )  # fmt: skip


def random_block(c: ModelConfig) -> BlockWeights:
    def draw(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(shape, dtype=dtype, device="cuda") * shape[-1] ** -0.5

    def norm(size: int) -> torch.Tensor:
        return 1 + 0.1 * torch.randn(size, dtype=torch.bfloat16, device="cuda")

    bias = torch.cat([torch.linspace(-10, 0, c.num_heads), torch.linspace(3, 6, c.num_heads)]).cuda()
    gates = draw(2 * c.num_heads, c.hidden_size, dtype=torch.float32)
    mixer = norm(c.hidden_size), None, draw(2 * (c.qk_dim + c.v_dim), c.hidden_size), None, gates, bias
    out = norm(c.v_dim), None, draw(c.hidden_size, c.v_dim), None
    ffn = norm(c.hidden_size), None, draw(2 * c.ffn_dim, c.hidden_size), None, draw(c.hidden_size, c.ffn_dim), None
    return BlockWeights(*mixer, *out, *ffn)


def random_executor(c: ModelConfig, kind: str, *, backend: str = "queued_triton_chunks") -> InProcessExecutor:
    """kind: bfloat16, float8, or eager (bfloat16 without graphs)."""
    torch.manual_seed(0)
    triton = "triton" in backend
    blocks = [fold(w, float8=kind == "float8") if triton else w for w in (random_block(c) for _ in range(c.num_blocks))]
    embedding, head = (torch.randn(c.vocab_size, c.hidden_size, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    ends = EndWeights(embedding, torch.ones(c.hidden_size, dtype=torch.bfloat16, device="cuda"), head * 4096**-0.5)
    ((shard,),) = make_layout(c, heads_per_band=c.num_heads)
    worker = Worker(
        c, shard, blocks, fold_ends(ends) if triton else ends, Kernels(chunkwise_backend(backend), t_inner=8)
    )
    return InProcessExecutor([[worker]], band_threads=1, graphs=kind != "eager")


def this_project(c: ModelConfig, kind: str, B: int, made: dict) -> Run:
    executor = made.get(kind) or made.setdefault(kind, random_executor(c, kind))
    sampler = Sampler(B, c.vocab_size, device="cuda")
    for slot in range(B):
        sampler.put(slot, Sampling(), position=0)
    state, slots = executor.load(None, B), torch.arange(B)

    def run() -> None:
        tokens = [1] * B
        if executor.chooses == "no":
            for _ in range(STEPS):
                executor.submit(state, decoding_step(tokens, in_place=True))
                tokens = sampler.choose(executor.result().logits, slots.cuda()).tolist()
            return
        for _ in range(STEPS):
            executor.submit(state, decoding_step(tokens, in_place=True, choice=Choice(sampler, slots)))
            tokens = executor.result().tokens.tolist()

    return run


def products(c: ModelConfig, kind: str, B: int, made: dict) -> Run:
    """The products of B rows with all weights: those of this project's executor, captured in one graph."""
    executor = made.get(kind) or made.setdefault(kind, random_executor(c, kind))
    worker = executor.stages[0][0]
    weights = [w for block in worker.blocks for w in (block.together, block.out, block.up, block.down)]
    weights.append(worker.ends.head)
    xs = {w.shape[1]: torch.randn(B, w.shape[1], dtype=torch.bfloat16, device="cuda") for w in weights}
    for w in weights:
        torch.mm(xs[w.shape[1]], w.t())
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for w in weights:
            torch.mm(xs[w.shape[1]], w.t())

    made["operands", kind, B] = xs  # the graph has their addresses

    def run() -> None:
        for _ in range(STEPS):
            graph.replay()
        torch.cuda.synchronize()

    return run


def transformers(c: ModelConfig, kind: str, B: int, made: dict) -> Run:
    from transformers import xLSTMConfig, xLSTMForCausalLM

    if "transformers" not in made:
        torch.manual_seed(0)
        sizes = {"hidden_size": c.hidden_size, "num_hidden_layers": c.num_blocks, "num_heads": c.num_heads}
        with torch.device("cuda"):
            torch.set_default_dtype(torch.bfloat16)
            made["transformers"] = xLSTMForCausalLM(xLSTMConfig(vocab_size=c.vocab_size, **sizes)).eval()
            torch.set_default_dtype(torch.float32)
    model, cache = made["transformers"], {}

    def run() -> None:
        tokens = torch.ones(B, 1, dtype=torch.long, device="cuda")
        with torch.no_grad():
            for _ in range(STEPS):
                out = model(tokens, cache_params=cache.get("is"), use_cache=True)
                cache["is"], tokens = out.cache_params, out.logits[:, -1].argmax(-1, keepdim=True)
                tokens.tolist()

    return run


def tiles(c: ModelConfig, kind: str, tokens: int, args: argparse.Namespace, made: dict) -> Run:
    """A prefill of so many tokens, by steps."""
    executor = made.get(kind) or made.setdefault(kind, random_executor(c, kind))
    ids, start = torch.randint(0, c.vocab_size, (1, tokens)), torch.zeros(1, dtype=torch.long)
    size, chunk = args.tile_size, min(256, args.tile_size)
    executor.warm_up(1, [size], chunk)

    def run() -> None:
        *before, last = ids.split(size, 1)
        step = Step(last, start, start + size, chunk)
        steps = [*(step._replace(tokens=tile) for tile in before), step._replace(logits="last")]
        for _, _, result in run_steps(executor, executor.load(None, 1), steps):
            last = result.logits
        last.cpu()

    return run


def tile_products(c: ModelConfig, kind: str, tokens: int, args: argparse.Namespace, made: dict) -> Run:
    """The large products of all blocks, a tile at a time."""
    executor = made.get(kind) or made.setdefault(kind, random_executor(c, kind))
    from xlstm_ray.kernels.triton_products import FP8, product8

    xs: dict[int, torch.Tensor] = {}
    for size in {c.hidden_size, c.v_dim, c.ffn_dim}:
        x = torch.randn(args.tile_size, size, dtype=torch.bfloat16, device="cuda")
        xs[size] = x.to(FP8) if kind == "float8" else x
    ones = torch.ones(args.tile_size, 1, device="cuda")

    def run() -> None:
        for _ in range(tokens // args.tile_size):
            for b in executor.stages[0][0].blocks:
                pairs = (b.qkvo, b.qkvo_scale), (b.out, b.out_scale), (b.up, b.up_scale), (b.down, b.down_scale)
                for w, scale in pairs:
                    if scale is None:
                        torch.mm(xs[w.shape[1]], w.t())
                    else:
                        product8((xs[w.shape[1]], ones), (w, scale))

    return run


def compare_prefill(c: ModelConfig, args: argparse.Namespace) -> None:
    made: dict = {}
    kinds = [word.partition(":")[2] for word in args.contestants.split(",") if word.startswith("this:")]
    for tokens in args.prefill:
        field = {(k, f.__name__): f(c, k, tokens, args, made) for k in kinds for f in (tiles, tile_products)}
        seconds: dict[tuple[str, str], list[float]] = {word: [] for word in field}
        for run in field.values():
            run()
        for _ in range(args.rounds):
            for word, run in field.items():
                torch.cuda.synchronize()
                began = time.perf_counter()
                run()
                torch.cuda.synchronize()
                seconds[word].append(time.perf_counter() - began)
        for kind in kinds:
            ours, bare = (statistics.median(seconds[kind, name]) for name in ("tiles", "tile_products"))
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            field[kind, "tiles"]()
            graphs = sum(tokens.bytes for tokens in made[kind]._tokens)
            memory = (torch.cuda.max_memory_allocated() - before + graphs) / 2**30
            print(f"  {tokens} tokens  {kind:9s} {tokens / ours:9,.0f} tokens/s  products {tokens / bare:9,.0f}"
                  f"  {bare / ours:.3f} of them  {memory:.2f} GiB", flush=True)  # fmt: skip


CONTESTANTS = {"this": this_project, "products": products, "transformers": transformers}


def copy_bandwidth() -> float:
    """Bytes a second of a large copy, read and written."""
    a = torch.randn(1 << 30, device="cuda")
    b = torch.empty_like(a)
    seconds = []
    for _ in range(8):
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(4):
            b.copy_(a)
        torch.cuda.synchronize()
        seconds.append((time.perf_counter() - began) / 4)
    return 2 * a.nbytes / statistics.median(seconds[2:])


def step_bytes(c: ModelConfig, kind: str, B: int, made: dict) -> int:
    """What a step has to move: weights read once, states read and written."""
    worker = made[kind].stages[0][0]
    moved = {
        t.data_ptr(): t.nbytes for w in worker.blocks for t in (w if w.together is None else w[3:]) if t is not None
    }
    return sum(moved.values()) + worker.ends.head.nbytes + 2 * B * state_bytes(c)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("hidden", 4096), ("blocks", 32), ("heads", 8), ("vocab", 50304), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=positive, default=default)
    parser.add_argument("--batches", type=positives, default=[1, 8, 32, 64], help="rows, with commas between them")
    parser.add_argument(
        "--contestants", type=contestants(CONTESTANTS), default="this:bfloat16,products:bfloat16,this:float8"
    )
    parser.add_argument("--prefill", type=positives, help="measure prefills of so many tokens instead, with commas")
    parser.add_argument("--tile-size", type=positive, default=4096, help="of --prefill")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("it measures kernels of NVIDIA GPUs, and torch sees none here")
    c, made = config_of(args), {}
    if args.prefill:
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; {c.num_blocks} blocks, D {c.hidden_size}, "
              f"tiles of {args.tile_size}; medians of {args.rounds} alternating rounds", flush=True)  # fmt: skip
        with torch.inference_mode():
            compare_prefill(c, args)
        return
    card, bandwidth = torch.cuda.get_device_name(), copy_bandwidth()
    print(f"{card}, torch {torch.__version__}; a copy moves {bandwidth / 1e12:.2f} TB/s; {c.num_blocks} blocks, "
          f"D {c.hidden_size}; medians of {args.rounds} alternating rounds of {STEPS} steps", flush=True)  # fmt: skip
    torch.cuda.empty_cache()
    for B in args.batches:
        field = {}
        for word in args.contestants.split(","):
            name, _, kind = word.partition(":")
            with torch.inference_mode():
                field[word] = CONTESTANTS[name](c, kind, B, made)
        seconds: dict[str, list[float]] = {word: [] for word in field}
        with torch.inference_mode():
            for run in field.values():
                run()
            for _ in range(args.rounds):
                for word, run in field.items():
                    torch.cuda.synchronize()
                    began = time.perf_counter()
                    run()
                    torch.cuda.synchronize()
                    seconds[word].append((time.perf_counter() - began) / STEPS)
        for word, runs in seconds.items():
            name, _, kind = word.partition(":")
            took = statistics.median(runs)
            share = step_bytes(c, kind, B, made) / bandwidth / took if name == "this" and kind != "eager" else None
            print(f"  B {B:3d}  {word:24s} {B / took:9,.0f} tokens/s  {1e3 * took:7.3f} ms"
                  + ("" if share is None else f"  {share:.3f} of the copy bandwidth"), flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
