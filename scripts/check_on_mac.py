#!/usr/bin/env python
"""Check this Mac's GPU: what works, how exact and how fast. Prints one block to paste into a report.

    ./scripts/check_on_mac.sh                                          # the demo model
    ./scripts/check_on_mac.sh --model path/to/xlstm-7b --lengths 2048,8192,32768

The machine and the Metal kernels (doctor --kernels); the faults of mps that are known, tried here; the demo model's
results on mps, as it is and with 8- and 4-bit weights, against the eager float32 reference on the CPU; prefill at the
given lengths, each in its own process so that the memory peak is of that length.
Exit code 1 if a result on mps is wrong.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

SELF = Path(__file__).resolve()
sys.path[:0] = [str(SELF.parents[1]), str(SELF.parent)]

import xlstm_ray  # noqa: E402, I001  before torch: it sets what OpenMP reads
import torch  # noqa: E402
from arguments import positive  # noqa: E402
from xlstm_ray.choose import DEMO_MODEL, setup_of  # noqa: E402
from xlstm_ray.config import Quantization  # noqa: E402
from xlstm_ray.errors import XlstmRayError  # noqa: E402
from xlstm_ray.measure.doctor import canary_report, kernel_report, machine  # noqa: E402
from xlstm_ray.plan import choose_plan  # noqa: E402
from xlstm_ray.quantize import quantize_model  # noqa: E402

TEXT = "The capital of France is Paris, and the river that flows through it is the Seine. "
# Largest difference of a log probability among the likeliest tokens: float32 sums in another order, bfloat16 rounds.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.25}


def parity(tile_size: int | None) -> tuple[list[str], bool]:
    """The demo model on mps, compiled, in both dtypes, and with 8- and 4-bit weights, against the reference of the same
    weights: lines, and whether all is well."""
    lines, good = [], True
    cases = [(None, backend, tuple(TOLERANCE)) for backend in ("queued_compiled_chunks", "queued_compiled_steps")]
    cases += [(bits, "queued_compiled_chunks", ("bfloat16",)) for bits in (8, 4)]
    with TemporaryDirectory() as folder:
        models, wanted = {None: DEMO_MODEL}, {}
        for bits, backend, dtypes in cases:
            if bits not in models:
                models[bits] = Path(folder) / f"{bits} bits"
                list(quantize_model(DEMO_MODEL, models[bits], Quantization(bits=bits, group_size=32)))
            if bits not in wanted:
                wanted[bits] = _answer(models[bits], "cpu", "float32", "native", tile_size)
            for dtype in dtypes:
                what = f"{backend:<23} {dtype:<9} {f'{bits} bits' if bits else 'as it is':<9}"
                try:
                    found = _answer(models[bits], "mps", dtype, backend, tile_size)
                except XlstmRayError as error:
                    lines.append(f"{what} REFUSED: {error}")
                    good = False
                    continue
                errors, ok = [], True
                for got, want in zip(found, wanted[bits], strict=True):
                    top = want.topk(5).indices
                    errors.append((got - want)[top].abs().max().item())
                    ok = ok and errors[-1] <= TOLERANCE[dtype]
                    ok = ok and (dtype != "float32" or bool(got.argmax() == want.argmax()))
                good = good and ok
                lines.append(f"{what} log probabilities within {max(errors):.1e}  {'ok' if ok else 'WRONG'}")
    return lines, good


def _answer(model: Path, device: str, dtype: str, backend: str, tile_size: int | None) -> list[torch.Tensor]:
    """Log probabilities (vocabulary,) after a prompt; of integers, which have products of their own for few rows, after
    one token more, too."""
    options = {"device": device, "dtype": dtype, "chunkwise_backend": backend, "tile_size": tile_size}
    with xlstm_ray.load(model, **options) as lm:
        if lm.config.quantization is None:
            return [torch.log_softmax(lm.prefill(TEXT * 4).logits[0].double().cpu(), -1)]
        generation = lm.generate(TEXT * 4, max_new_tokens=2, temperature=0)
        list(generation.rows())
        found = generation.prefill.logits, generation.state().tensors["logits"]
    return [torch.log_softmax(logits[0].double().cpu(), -1) for logits in found]


def canaries() -> list[str]:
    """What is known to have gone wrong on mps, in lines. A run that one concerns is refused: see `parity`."""
    rows, lines = canary_report(torch.device("mps"))
    wrong = [line for row, line in zip(rows, lines, strict=True) if row["wrong"] is not None]
    return [f"{len(rows) - len(wrong)} of {len(rows)} right", *wrong]


def prefill(length: int, model: Path | None, tile_size: int | None) -> dict[str, float]:
    """Figures of one prefill of `length` tokens on mps, the model's own settings."""
    engine = xlstm_ray.load(model, device="mps", tile_size=tile_size)
    tokens = engine.encode(TEXT)
    stats = engine.prefill((tokens * (length // len(tokens) + 1))[:length]).stats
    return {
        "tokens": length,
        "tokens_s": stats.prefill_tok_s or 0.0,
        "first_token_s": stats.ttft_s,
        "compile_s": stats.compile_s,
        "load_s": engine.load_s,
        "peak_mib": stats.peak_memory_bytes / 2**20,
    }


def report(args: argparse.Namespace) -> bool:
    """Print the block; returns whether all is well."""
    print("```\nxlstm-ray on a Mac")
    for name, value in machine().items():
        print(f"  {name:<22} {value}")
    print("\nfaults of mps that are known (xlstm-ray doctor tells more)")
    print("\n".join(f"  {line}" for line in canaries()))
    print("\nmps against the reference on the CPU (demo model)", flush=True)
    lines, good = parity(args.tile_size)
    print("\n".join(f"  {line}" for line in lines))
    print(f"\nprefill on mps ({args.model or 'demo model'})", flush=True)
    # The interpreter and its options as this script was started with them.
    command = [*sys.orig_argv[: len(sys.orig_argv) - len(sys.argv)], str(SELF), "--prefill"]
    options = [f"--model={args.model}"] * bool(args.model) + [f"--tile-size={args.tile_size}"] * bool(args.tile_size)
    for length in args.lengths.split(","):
        ran = subprocess.run([*command, length, *options], capture_output=True, text=True, check=False)
        if ran.returncode:
            good = False
            last = (ran.stderr.strip().splitlines() or ["no message"])[-1]
            print(f"  {length:>7} tokens: FAILED: {last}", flush=True)
            continue
        row = json.loads(ran.stdout.splitlines()[-1])
        print(
            f"  {row['tokens']:>7} tokens: {row['tokens_s']:9,.0f} tokens/s, "
            f"first token in {row['first_token_s']:.3f} s, load {row['load_s']:.1f} s, "
            f"compile {row['compile_s']:.1f} s, peak {row['peak_mib']:,.0f} MiB",
            flush=True,
        )
    print("\nMetal kernels")
    plan = choose_plan(setup_of(model=args.model, device="mps", tile_size=args.tile_size), None)
    print("\n".join(f"  {line}" for line in kernel_report(plan)[1]))
    print(f"\n{'all well' if good else 'SOMETHING IS WRONG, see above'}\n```", flush=True)
    return good


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a model directory [default: the demo model]")
    parser.add_argument("--lengths", default="512,2048,8192", help="prompt lengths in tokens, with commas between")
    parser.add_argument("--tile-size", type=positive, help="tokens of a tile [default: as xlstm-ray]")
    parser.add_argument("--prefill", type=positive, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not torch.backends.mps.is_available():
        sys.exit("error: this machine has no mps device")
    if args.prefill:
        print(json.dumps(prefill(args.prefill, args.model, args.tile_size)))
    else:
        sys.exit(0 if report(args) else 1)


if __name__ == "__main__":
    main()
