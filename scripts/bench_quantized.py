#!/usr/bin/env python3
"""Products of integers beside the plain product in bfloat16, in turn, on one core: the table of kernels/quantized.py.

python scripts/bench_quantized.py [--size 4096] [--rounds 15]
"""

import argparse
from collections.abc import Callable
from functools import partial
from statistics import median
from time import perf_counter

import torch
import torch.nn.functional as F
from arguments import positive, positives
from torch import Tensor

from xlstm_ray.kernels.compiled import compile_strict
from xlstm_ray.kernels.quantized import Quantized, by_blocks, quantize

GROUP = 32


def forms(weight: Tensor) -> dict[str, Callable[[Tensor], Tensor]]:
    """What computes x (M, K) times the weight (N, K), transposed, by name."""

    def few(w: Quantized, x: Tensor) -> Tensor:
        return w._inside(x.float()).to(x.dtype)

    def many(w: Quantized, x: Tensor) -> Tensor:
        return w._whole(x)

    def blocks(w: Quantized, x: Tensor) -> Tensor:
        return by_blocks(x, w.q, w.scale, w.zero)

    def theirs(w: Quantized, x: Tensor) -> Tensor:
        return torch._weight_int4pack_mm_for_cpu(x, w.q.view(len(weight), -1), GROUP, w.scale)

    found: dict[str, Callable[[Tensor], Tensor]] = {"plain": partial(F.linear, weight=weight.bfloat16())}
    for bits in (8, 4):
        values, scale, zero = quantize(weight, bits=bits, group=GROUP)
        w = Quantized.make(values, scale, zero, before=0, packed=False)
        found[f"{bits} bits, inside"] = partial(compile_each_size(few), w)
        found[f"{bits} bits, by blocks"] = partial(blocks, w)
        found[f"{bits} bits, whole"] = partial(compile_each_size(many), w)
        if bits == 4 and (own := Quantized.make(values, scale, zero, before=0, packed=True)).packed:
            found["4 bits, torch's"] = partial(theirs, own)
    row = (weight.abs().amax(1) / 127).bfloat16()
    integers = (weight / row.float().unsqueeze(1)).round().to(torch.int8)
    found["8 bits, torch's, a scale a row"] = lambda x: torch._weight_int8pack_mm(x, integers, row)
    return found


def compile_each_size(fn: Callable) -> Callable:
    made: dict[int, Callable] = {}

    def call(w: Quantized, x: Tensor) -> Tensor:
        if len(x) not in made:
            made[len(x)] = compile_strict(fn, f"{fn.__name__}_{len(x)}")
        return made[len(x)](w, x)

    return call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=positive, default=4096, help="rows and columns of the weight [default: 4096]")
    parser.add_argument("--rounds", type=positive, default=15)
    parser.add_argument("--rows", type=positives, default=[1, 4, 16, 64, 512], help="rows of x, with commas between")
    args = parser.parse_args()
    torch.set_num_threads(1)
    made = forms(torch.randn(args.size, args.size, generator=torch.Generator().manual_seed(0)) / args.size**0.5)
    print(f"{'rows of x':<32}" + "".join(f"{n:>8}" for n in args.rows))
    table: dict[str, list[str]] = {name: [] for name in made}
    with torch.inference_mode():
        for M in args.rows:
            x = torch.randn(M, args.size).bfloat16()
            now = {name: f for name, f in made.items() if "inside" not in name or M <= 16}
            times: dict[str, list[float]] = {name: [] for name in now}
            for f in now.values():
                f(x)
            for _ in range(args.rounds if M < 100 else max(3, args.rounds // 5)):
                for name, f in now.items():
                    began = perf_counter()
                    f(x)
                    times[name].append(perf_counter() - began)
            for name in made:
                ratios = [a / b for a, b in zip(times.get(name, []), times["plain"], strict=False)]
                table[name].append(f"{median(ratios):>8.2f}" if ratios else f"{'-':>8}")
    for name, row in table.items():
        print(f"{name:<32}" + "".join(row), flush=True)


if __name__ == "__main__":
    main()
