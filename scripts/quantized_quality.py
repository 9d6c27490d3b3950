#!/usr/bin/env python3
"""What quantization costs a model: bits per byte of held-out text, divergence from the original, errors of logits.

    python scripts/quantized_quality.py --model DIR --text heldout.npz        (documents of scripts/demo/corpus.py)
    python scripts/quantized_quality.py --model DIR --text book.txt

The original runs in bfloat16, as the quantized copies do. All text is one prompt, in the same tiles for each.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from arguments import positive
from torch import Tensor

import xlstm_ray
from xlstm_ray.choose import DEMO_MODEL
from xlstm_ray.config import Quantization
from xlstm_ray.quantize import quantize_model
from xlstm_ray.runtime.executor import Step, run

sys.path.insert(0, str(Path(__file__).parent / "demo"))
TILE = 1024


def read(path: Path, model: Path) -> tuple[Tensor, int, int]:
    """The text's tokens (T,), its bytes, and the token between documents, whose bits do not count (-1: none)."""
    if path.suffix == ".npz":
        from corpus import Documents

        documents = Documents.read(path)
        return torch.from_numpy(documents.tokens.astype("int64")), documents.utf8_bytes, 0
    text = path.read_text()
    with xlstm_ray.load(model, device="cpu", chunkwise_backend="native") as lm:
        return torch.tensor(lm.encode(text)), len(text.encode()), -1


def logits(model: Path, tokens: Tensor) -> Iterator[Tensor]:
    """The logits after each token but the last, (tokens of a tile, vocabulary) at a time."""
    with (
        torch.inference_mode(),
        xlstm_ray.load(model, device="cpu", dtype="bfloat16", chunkwise_backend="native") as lm,
    ):
        chunk, whole = lm.config.chunk_size, tokens[:-1]
        steps = []
        for tile in whole.split(TILE):
            end = torch.tensor([len(tile)])
            tile = torch.nn.functional.pad(tile, (0, -len(tile) % chunk))
            steps.append(Step(tile.unsqueeze(0), torch.zeros_like(end), end, chunk, logits="all"))
        for step, _, result in run(lm.executor, lm.executor.load(None, 1), steps):
            assert result.logits is not None
            yield result.logits[0, : int(step.end)]


def compared(original: list[Tensor], model: Path, tokens: Tensor, apart: int, size: int) -> dict[str, float]:
    """Figures of a model beside the original's logits."""
    following, at = tokens[1:], 0
    bits = [0.0, 0.0]
    divergence, error, same, count = 0.0, 0.0, 0, 0
    for before, now in zip(original, logits(model, tokens), strict=True):
        wanted = following[at : at + len(now)]
        at += len(now)
        text = wanted != apart
        p, q = before.float().log_softmax(-1), now.float().log_softmax(-1)
        for n, each in enumerate((p, q)):
            bits[n] -= each.gather(-1, wanted.unsqueeze(-1))[text].double().sum().item() / math.log(2)
        divergence += (p.exp() * (p - q)).sum().item()
        error += (before - now).float().square().mean(-1).sqrt().sum().item()
        same += int((before.argmax(-1) == now.argmax(-1)).sum())
        count += len(now)
    return {
        "bits_per_byte": bits[1] / size,
        "of_original": bits[1] / bits[0],
        "kl_nats": divergence / count,
        "logits_rms_error": error / count,
        "same_best": same / count,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEMO_MODEL)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokens", type=positive, help="only so many [default: all]")
    parser.add_argument("--cases", default="8:128,8:32,4:128,4:64,4:32,4:32:ends", help="bits:group[:ends]")
    args = parser.parse_args()
    tokens, size, apart = read(args.text, args.model)
    if args.tokens is not None and args.tokens < len(tokens):
        tokens, size = tokens[: args.tokens], size * args.tokens // len(tokens)
    original = [part.to(torch.float32) for part in logits(args.model, tokens)]
    with TemporaryDirectory() as folder:
        for case in args.cases.split(","):
            bits, group, *ends = case.split(":")
            asked = Quantization.model_validate(
                {"bits": int(bits), "group_size": int(group), "embedding": bool(ends), "head": bool(ends)}
            )
            out = Path(folder) / case.replace(":", "-")
            for _ in quantize_model(args.model, out, asked):
                pass
            row = compared(original, out, tokens, apart, size)
            print(json.dumps({"case": case, **{name: round(value, 5) for name, value in row.items()}}), flush=True)


if __name__ == "__main__":
    main()
