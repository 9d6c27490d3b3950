#!/usr/bin/env python
"""Prefill, side by side: this project, transformers' xLSTM, and the bare matrix products of the same random model.

    python scripts/bench_prefill.py                      # speed on 8192 tokens, memory at 4096 and 65536
    python scripts/bench_prefill.py --tokens 2048 --rounds 3 --memory-tokens ''
    python scripts/bench_prefill.py --decode 128         # an answer's tokens on the CPU instead, one row

Every contestant runs in its own process, and rounds alternate, so that a drift of the machine's speed affects all
alike. The output has medians over rounds, and ratios of medians. Contestants:

    this float32, this bfloat16    lm.prefill of the whole prompt, last logits and state kept
    transformers float32           backbone over the whole prompt with its cache, last logits; native torch kernels
    kernels float32                the same with this project's kernels in it (`use_kernels`); only if it is named
    products float32, bfloat16     only torch's matrix products of all blocks, a tile or the whole prompt at a time
                                   (the faster of the two), on prepared operands: the upper limit of any prefill
    memory float32, bfloat16       only with --decode: reads as many bytes a token as the matrices have
    this float8, products float8   the same in float8, on Hopper GPUs; gates' products are left out of the latter

On a GPU, the shape of xLSTM 7B:

    python scripts/bench_prefill.py --device cuda --hidden 4096 --blocks 32 --heads 8 --vocab 50304 --store bfloat16 \\
        --tokens 65536 --tile-size 4096 --chunk-size 256 --memory-tokens 16384,262144 \\
        --contestants this:bfloat16,products:bfloat16,this:float8,products:float8

Peak memory: the process's high-water mark of resident memory during a prefill (on cuda: the allocator's), without the
weights; each length in its own process, which has loaded and compiled before the mark was reset.
"""

import argparse
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from arguments import contestants, device, plainly, positive, positives, whole

SELF = Path(__file__).resolve()
PROMPT = 32  # tokens, before --decode
PREFILL = "this:float32,transformers:float32,products:float32,this:bfloat16,products:bfloat16"
DECODE = "this:float32,transformers:float32,memory:float32,this:bfloat16,transformers:bfloat16,memory:bfloat16"


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def make_model(directory: Path, args: argparse.Namespace) -> None:
    """A random model in the Hugging Face layout, with a shard for each block; drawn on the GPU if there is one. The
    directory is there when all of it is."""
    import torch
    from safetensors.torch import save_file

    from xlstm_ray.config import ModelConfig
    from xlstm_ray.headers import INDEX_FILE
    from xlstm_ray.tensors import HEAD, OUT_NORM, expected_tensors

    config = {
        "model_type": "xlstm", "hidden_size": args.hidden, "num_hidden_layers": args.blocks, "num_heads": args.heads,
        "vocab_size": args.vocab, "chunk_size": 64, "eos_token_id": None, "bos_token_id": None, "pad_token_id": None,
    }  # fmt: skip
    shapes = expected_tensors(ModelConfig.from_dict(config))
    shapes |= {OUT_NORM: (args.hidden,), HEAD: (args.vocab, args.hidden)}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    files: dict[str, list[str]] = {}
    for name in shapes:
        where = name.split(".")[2] if ".blocks." in name else "ends"
        files.setdefault(f"model-{where}.safetensors", []).append(name)
    part = directory.with_name(f"{directory.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    (part / "config.json").write_text(json.dumps(config))
    for file, names in files.items():  # one after the other: at most one of them is in memory
        tensors = {}
        for name in names:
            shape = shapes[name]
            tensor = torch.randn(shape, device=device) * (shape[-1] ** -0.5 if len(shape) > 1 else 0.1)
            if "norm" in name:
                tensor.add_(1)
            elif name.endswith("fgate_preact.bias"):
                tensor.add_(torch.linspace(3, 6, len(tensor), device=device))
            tensors[name] = tensor.to("cpu", getattr(torch, args.store))
        save_file(tensors, part / file, {"format": "pt"})
    index = {name: file for file, names in files.items() for name in names}
    (part / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (part / "tokenizer.json").write_text(json.dumps(tokenizer(args.vocab)))
    part.rename(directory)


def tokenizer(vocabulary: int) -> dict[str, Any]:
    """The demo model's tokenizer, with a word for each token more: whatever a random model says is a text."""
    made = json.loads((SELF.parents[1] / "xlstm_ray" / "demo" / "tokenizer.json").read_text())
    words = made["model"]["vocab"]
    words |= {f"\u0120word{n}": n for n in range(len(words), vocabulary)}
    return made


# -- contestants: each returns a function of a token count that does one run -------------------------------------------
def decoded(steps: Iterator, count: int) -> float:
    """Seconds of so many steps after the first one, whose token comes with the prompt."""
    next(steps)
    began = time.perf_counter()
    for _ in range(count):
        next(steps)
    return time.perf_counter() - began


def this_project(directory: Path, dtype: str, args: argparse.Namespace):
    import torch

    import xlstm_ray

    lm = xlstm_ray.load(
        directory, device=args.device, dtype=dtype, tile_size=args.tile_size, chunk_size=args.chunk_size
    )
    prompts: dict[int, list[int]] = {}

    def run(tokens: int) -> float | None:
        size = PROMPT if args.decode else tokens
        if size not in prompts:
            prompts[size] = torch.randint(0, args.vocab, (size,)).tolist()
        if args.decode:
            made = lm.generate(prompts[size], max_new_tokens=tokens + 1, sampling={"ignore_eos": True})
            return decoded(made.rows(), tokens)
        lm.prefill(prompts[size])
        return None

    return run


def transformers_xlstm(directory: Path, dtype: str, args: argparse.Namespace, *, ours: bool = False):
    import torch
    from transformers import xLSTMForCausalLM
    from transformers.models.xlstm import modeling_xlstm

    assert not modeling_xlstm.external_xlstm, "the xlstm package is installed; this compares with the native code"
    device = args.device if args.device != "auto" else "cpu"
    model = xLSTMForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype)).to(device).eval()
    if ours:
        from xlstm_ray.integrations.transformers import use_kernels

        use_kernels(model)

    def steps() -> Iterator[None]:
        out = model(torch.randint(0, args.vocab, (1, PROMPT), device=device), use_cache=True)
        while True:
            token = out.logits[:, -1].argmax(-1, keepdim=True)
            token.tolist()
            yield
            out = model(token, cache_params=out.cache_params, use_cache=True)

    def run(tokens: int) -> float | None:
        with torch.no_grad():
            if args.decode:
                return decoded(steps(), tokens)
            out = model.backbone(torch.randint(0, args.vocab, (1, tokens), device=device), use_cache=True)
            model.lm_head(out.last_hidden_state[:, -1])
            if device != "cpu":
                torch.accelerator.synchronize()
        return None

    return run


def bare_products(directory: Path, dtype: str, args: argparse.Namespace):
    import torch
    import torch.nn.functional as F
    from safetensors import safe_open

    device, float8 = args.device if args.device != "auto" else "cpu", dtype == "float8"
    plain = torch.bfloat16 if float8 else getattr(torch, dtype)
    if float8:
        from xlstm_ray.kernels.triton_products import product8, quantized_rows
    weights = {}
    for path in directory.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            weights |= {name: file.get_tensor(name).to(device, plain) for name in file.keys()}
    blocks = []
    for n in range(args.blocks):
        at = f"backbone.blocks.{n}."

        def one(*names: str, at: str = at) -> torch.Tensor:
            return torch.cat([weights.pop(f"{at}{name}.weight") for name in names])

        block = [one(*(f"mlstm_layer.{x}" for x in ("q", "k", "v", "ogate_preact")))]
        gates = one("mlstm_layer.igate_preact", "mlstm_layer.fgate_preact")
        block += [one("mlstm_layer.out_proj"), one("ffn.proj_up_gate", "ffn.proj_up"), one("ffn.proj_down")]
        blocks.append([quantized_rows(w) for w in block] if float8 else [*block, gates])
    operands: dict[tuple[int, int], torch.Tensor] = {}

    def operand(rows: int, columns: int) -> torch.Tensor:
        if (rows, columns) not in operands:
            operands[rows, columns] = torch.randn(rows, columns, device=device).to(plain)
            if float8:
                ones = torch.ones(rows, 1, device=device)
                operands[rows, columns] = operands[rows, columns].to(torch.float8_e4m3fn), ones
        return operands[rows, columns]

    def products(tokens: int, at_once: int) -> None:
        for _ in range(0, tokens, at_once):
            for block in blocks:
                for w in block:
                    if float8:
                        product8(operand(at_once, w[0].shape[1]), w)
                    else:
                        F.linear(operand(at_once, w.shape[1]), w)
        if device != "cpu":
            torch.accelerator.synchronize()

    sizes: dict[int, int] = {}

    def run(tokens: int) -> None:
        if tokens not in sizes:
            times = {}
            for at_once in (1,) if args.decode else (args.tile_size or 512, tokens):
                products(tokens, at_once)
                began = time.perf_counter()
                products(tokens, at_once)
                times[at_once] = time.perf_counter() - began
            sizes[tokens] = min(times, key=times.get)
        products(tokens, sizes[tokens])

    return run


def memory_reads(directory: Path, dtype: str, args: argparse.Namespace):
    """Reads as many bytes a token as the matrices have, without the embedding: the upper limit of decoding one row."""
    import torch
    from safetensors import safe_open

    size = getattr(torch, dtype).itemsize
    count = 0
    for path in directory.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            count += sum(file.get_tensor(name).numel() for name in file.keys() if "embeddings" not in name)
    data = torch.ones(count * size // 4)

    def run(tokens: int) -> None:
        for _ in range(tokens):
            data.sum()

    return run


CONTESTANTS = {
    "this": this_project,
    "transformers": transformers_xlstm,
    "kernels": partial(transformers_xlstm, ours=True),
    "products": bare_products,
    "memory": memory_reads,
}


# -- the process of a contestant: reads token counts, answers seconds and bytes ----------------------------------------
def status_bytes(field: str) -> int:
    """A field of /proc/self/status in bytes."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field + ":"))
    return int(line.split()[1]) * 1024


def start_measuring_memory(device: str) -> None:
    """The high-water mark starts from here."""
    if device == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # Linux


def peak_memory(device: str) -> int:
    """The high-water mark in bytes."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    return status_bytes("VmHWM")


def serve(kind: str, dtype: str, args: argparse.Namespace) -> None:
    run = CONTESTANTS[kind](args.model, dtype, args)
    for line in sys.stdin:
        tokens = int(line)
        start_measuring_memory(args.device)
        began = time.perf_counter()
        seconds = run(tokens) or time.perf_counter() - began
        print(json.dumps({"s": seconds, "bytes": peak_memory(args.device)}), flush=True)


class Contestant:
    """A child process that runs on demand."""

    def __init__(self, kind: str, dtype: str, args: argparse.Namespace):
        self.name = f"{kind} {dtype}"
        command = [
            sys.executable,
            str(SELF),
            "--serve",
            kind,
            "--dtype",
            dtype,
            *args.passed,
            "--model",
            str(args.model),
        ]
        paths = [str(SELF.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def run(self, tokens: int) -> dict:
        self._process.stdin.write(f"{tokens}\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended; its message is above")
        return json.loads(line)

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("hidden", 512), ("blocks", 8), ("heads", 4), ("vocab", 2048)):
        parser.add_argument(f"--{name}", type=positive, default=default)
    parser.add_argument("--tokens", type=positive, default=8192)
    parser.add_argument("--decode", type=positive, help="measure so many tokens of an answer instead, one row")
    parser.add_argument("--rounds", type=whole, default=5)
    parser.add_argument("--tile-size", type=positive)
    parser.add_argument("--chunk-size", type=positive)
    parser.add_argument("--device", type=device, default="auto")
    parser.add_argument(
        "--memory-tokens",
        type=lambda text: positives(text) if text else [],
        default=[4096, 65536],
        help="prompt lengths for the memory table; '' for none",
    )
    parser.add_argument("--store", default="float32", help="dtype that the random model is stored in")
    parser.add_argument(
        "--contestants",
        type=contestants(CONTESTANTS),
        help="kind:dtype, with commas between them [default: this, transformers, products; with --decode memory too]",
    )
    parser.add_argument("--dtype", default="float32", help=argparse.SUPPRESS)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.decode:
        args.tokens, args.memory_tokens = args.decode, []
    if args.contestants is None:
        args.contestants = DECODE if args.decode else PREFILL
    if "memory" in args.contestants and not args.decode:
        parser.error("memory is the limit of decoding; give --decode N")
    args.passed = [word for word in sys.argv[1:] if args.serve is None]
    if args.serve:
        with plainly():
            serve(args.serve, args.dtype, args)
        return
    if any(kind in args.contestants for kind in ("transformers", "kernels")) and not _is_there("transformers"):
        from xlstm_ray.errors import pip_install

        parser.error(
            f"it is compared with transformers: {pip_install('transformers')}, or name --contestants without it"
        )
    with tempfile.TemporaryDirectory() as folder:
        args.model = Path(folder) / "model"
        make_model(args.model, args)
        if args.rounds:
            compare_speed(args)
        if args.memory_tokens:
            compare_memory(args)


def compare_speed(args: argparse.Namespace) -> None:
    kinds = [tuple(word.split(":")) for word in args.contestants.split(",")]
    field = [Contestant(kind, dtype, args) for kind, dtype in kinds]
    for contestant in field:
        contestant.run(args.tokens)  # warm-up: compiles, and the products choose their size
    seconds: dict[str, list[float]] = {contestant.name: [] for contestant in field}
    for _ in range(args.rounds):
        for contestant in field:
            seconds[contestant.name].append(contestant.run(args.tokens)["s"])
    for contestant in field:
        contestant.close()
    median = {name: statistics.median(runs) for name, runs in seconds.items()}
    print(
        f"{args.tokens} tokens, D {args.hidden}, {args.blocks} blocks, {args.heads} heads, vocabulary {args.vocab}; ",
        end="",
    )
    print(f"{os.cpu_count()} cores; medians of {args.rounds} alternating rounds")
    for name, runs in seconds.items():
        print(f"  {name:22s} {args.tokens / median[name]:9,.0f} tokens/s   {min(runs):6.2f} to {max(runs):6.2f} s")
    for ours in (name for name in median if name.startswith("this")):
        for other in median:
            kind, _, dtype = other.partition(" ")
            same = kind in ("products", "memory", *(["transformers"] if args.decode else [])) and ours.endswith(dtype)
            if other == "transformers float32" or same:
                print(f"  {ours} / {other}: {median[other] / median[ours]:.2f}")


def compare_memory(args: argparse.Namespace) -> None:
    lengths = args.memory_tokens
    stored = sum(path.stat().st_size for path in args.model.glob("*.safetensors"))
    print("peak memory above the weights, MiB")
    for kind, dtype in (word.split(":") for word in args.contestants.split(",") if "products" not in word):
        sizes = {"float32": 4, "bfloat16": 2, "float8": 1}
        ends = 2 * args.vocab * args.hidden * (dtype == "float8")  # the embedding and the head stay bfloat16
        weights = stored * sizes[dtype] // sizes[args.store] + ends
        row = []
        for tokens in lengths:
            contestant = Contestant(kind, dtype, args)
            contestant.run(lengths[0])
            row.append(contestant.run(tokens)["bytes"] - weights)
            contestant.close()
        cells = "   ".join(f"{n} tokens {b / 2**20:8.1f}" for n, b in zip(lengths, row, strict=True))
        print(f"  {kind + ' ' + dtype:22s} {cells}   ratio {row[-1] / row[0]:.3f}", flush=True)


if __name__ == "__main__":
    main()
