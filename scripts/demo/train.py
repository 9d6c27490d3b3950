#!/usr/bin/env python3
"""Train the demo model: a corpus folder (corpus.py) -> a model folder, with evaluation.json beside the weights.

Needs no network. The model is that of network.py, this project's own, differentiated.
"""

import argparse
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from corpus import Documents
from evaluate import bits, figures
from network import Model
from safetensors.torch import save
from torch import Tensor

from xlstm_ray.config import ModelConfig
from xlstm_ray.files import write_whole
from xlstm_ray.tensors import HEAD, OUT_NORM, expected_tensors


class RowSampler:
    """Training rows. A row starts at a document, from a fresh state, as a prompt does: half of them without END, since
    a prompt has none, and a quarter with a capital first."""

    def __init__(self, train: Documents, capitals: Documents, *, repeats: int, seed: int):
        self.rng = np.random.default_rng(seed)
        self.train, self.capitals, self.repeats = train, capitals, repeats
        self.openings = capitals.rows()
        self.epoch = 0
        self._next_epoch()

    def _next_epoch(self) -> None:
        self.epoch += 1
        self.stream = self.train.shuffled(self.capitals, self.repeats, self.rng)
        self.starts, self.cursor = self.stream.starts, 0

    def batch(self, count: int, length: int) -> np.ndarray:
        """(count, length) uint16"""
        if length + 1 > len(self.stream.tokens):
            raise SystemExit(f"the training text has {len(self.stream.tokens)} tokens, a row takes {length + 1}")
        out = np.empty((count, length), np.uint16)
        for row in out:
            parts = []
            if self.rng.random() < 0.25:
                parts.append(self.openings[self.rng.integers(len(self.openings))])
            at = np.searchsorted(self.starts, self.cursor)
            if at == len(self.starts) or self.starts[at] + length + 1 > len(self.stream.tokens):
                self._next_epoch()
                at = 0
            start = self.starts[at]
            parts.append(self.stream.tokens[start : start + length + 1])
            whole = np.concatenate(parts)[int(self.rng.random() < 0.5) :][:length]
            row[:] = whole
            self.cursor = start + length - (len(parts[0]) if len(parts) > 1 else 0)
        return out

    @property
    def seen(self) -> float:
        """Epochs, the current one's share included."""
        return self.epoch - 1 + min(1.0, self.cursor / len(self.stream.tokens))


def model_config(args: argparse.Namespace, vocab_size: int) -> dict[str, Any]:
    """config.json as transformers writes it for xLSTM."""
    return {
        "architectures": ["xLSTMForCausalLM"],
        "model_type": "xlstm",
        "vocab_size": vocab_size,
        "hidden_size": args.hidden_size,
        "embedding_dim": args.hidden_size,
        "num_blocks": args.blocks,
        "num_hidden_layers": args.blocks,
        "num_heads": args.heads,
        "qk_dim_factor": 0.5,
        "v_dim_factor": 1.0,
        "ffn_proj_factor": args.ffn_proj_factor,
        "ffn_round_up_to_multiple_of": 64,
        "use_bias": False,
        "add_out_norm": True,
        "tie_word_embeddings": False,
        "norm_eps": 1e-6,
        "norm_reduction_force_float32": True,
        "eps": 1e-6,
        "gate_soft_cap": 15.0,
        "output_logit_soft_cap": 30.0,
        "weight_mode": "single",
        "chunk_size": 64,
        "chunkwise_kernel": "chunkwise--native_autograd",
        "sequence_kernel": "native_sequence__native",
        "step_kernel": "native",
        "return_last_states": True,
        "inference_state_dtype": "float32",
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
        "dtype": "bfloat16",
    }


def initial_tensors(config: ModelConfig, seed: int) -> dict[str, Tensor]:
    """float32 tensors under Hugging Face's names, initialised as xLSTM-Large is (transformers: _init_weights).

    One difference: the feed-forward's gate projection is small instead of zero; transformers zeroes it because "gate"
    is in its name.
    """
    generator = torch.Generator().manual_seed(seed)
    D = config.hidden_size
    shapes = expected_tensors(config) | {OUT_NORM: (D,), HEAD: (config.vocab_size, D)}
    small, wang = math.sqrt(2 / (5 * D)), 2 / config.num_blocks / math.sqrt(D)
    tensors = {}
    for name, shape in shapes.items():
        if "norm" in name:
            tensors[name] = torch.ones(shape)
        elif name.endswith("igate_preact.bias"):
            tensors[name] = torch.full(shape, -10.0)
        elif name.endswith("fgate_preact.bias"):
            tensors[name] = torch.linspace(3.0, 6.0, shape[0])
        elif "gate_preact" in name:
            tensors[name] = torch.zeros(shape)
        else:
            std = wang if "out_proj" in name or "proj_down" in name else small
            tensors[name] = torch.randn(shape, generator=generator) * std
    return tensors


def write_model(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any], tokenizer: Path) -> None:
    """config and tensors in the Hugging Face layout; each file is there whole, or as it was before."""
    folder.mkdir(parents=True, exist_ok=True)
    stored = {name: tensor.detach().to("cpu", torch.bfloat16).contiguous() for name, tensor in tensors.items()}
    write_whole(folder / "model.safetensors", save(stored, metadata={"format": "pt"}))
    write_whole(folder / "config.json", (json.dumps(config, indent=2) + "\n").encode())
    write_whole(folder / "tokenizer.json", tokenizer.read_bytes())


def learning_rate(progress: float, step: int, warmup: int) -> float:
    """Linear warm-up, then a cosine down to a fiftieth; as a share of the peak."""
    return min(1.0, (step + 1) / warmup) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def optimizer_groups(tensors: dict[str, Tensor], weight_decay: float) -> list[dict[str, Any]]:
    """Decay of matrices only: not of norms and biases, nor of gates and the embedding, whose scale means something."""
    matrices = [t for name, t in tensors.items() if t.ndim == 2 and "gate_preact" not in name and "embed" not in name]
    chosen = {id(t) for t in matrices}
    others = [t for t in tensors.values() if id(t) not in chosen]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


class Training:
    """Tensors in training, with their optimizer and their text, and how far they have come.

    args: the command line's. tensors: float32, under Hugging Face's names; every step computes with them in args.dtype.
    """

    def __init__(self, args: argparse.Namespace):
        torch.manual_seed(args.seed)
        self.args, self.device, self.dtype = args, torch.device(args.device), getattr(torch, args.dtype)
        vocab_size = len(json.loads((args.corpus / "tokenizer.json").read_text())["model"]["vocab"])
        self.written = model_config(args, vocab_size)
        self.config = ModelConfig.from_dict(self.written)
        initial = initial_tensors(self.config, args.seed)
        self.tensors = {name: tensor.to(self.device).requires_grad_() for name, tensor in initial.items()}
        self.optimizer = torch.optim.AdamW(
            optimizer_groups(self.tensors, args.weight_decay),
            lr=args.lr,
            betas=(0.9, 0.95),
            fused=self.device.type == "cuda",
        )
        train, capitals = (Documents.read(args.corpus / f"{kind}.npz") for kind in ("train", "capitals"))
        self.sampler = RowSampler(train, capitals, repeats=args.capital_repeats, seed=args.seed)
        self.development = Documents.read(args.corpus / "development.npz")
        self.steps = self.tokens = 0
        self.started = time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    @property
    def progress(self) -> float:
        """The share of the steps or of the minutes that is done, whichever is more."""
        return max(self.steps / self.args.steps, self.seconds / (self.args.minutes * 60))

    def model(self) -> Model:
        return Model.of_tensors(self.tensors, self.config, self.dtype)

    def step(self, progress: float) -> Tensor:
        """One batch of rows learned; its loss, in nats a token, still on the device."""
        args = self.args
        length = args.row_lengths[self.steps % len(args.row_lengths)]
        rows = self.sampler.batch(args.batch_tokens // length, length + 1)
        batch = torch.from_numpy(rows.astype(np.int64)).to(self.device, non_blocking=True)
        for group in self.optimizer.param_groups:
            group["lr"] = args.lr * learning_rate(progress, self.steps, args.warmup)
        model = self.model()
        x, _ = model.hidden(batch[:, :-1], drop=args.dropout)
        loss = F.cross_entropy(model.logits(x).flatten(0, 1), batch[:, 1:].flatten())
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.tensors.values(), 1.0, error_if_nonfinite=False)
        self.optimizer.step()
        self.steps, self.tokens = self.steps + 1, self.tokens + batch.shape[0] * length
        return loss.detach()

    def save(self, loss: float) -> dict[str, Any]:
        """The model as it is now, scored and written; returns the log's line. loss: mean since the last line."""
        if not math.isfinite(loss):
            raise SystemExit(f"the loss is {loss} at step {self.steps}")
        seconds = self.seconds
        with torch.inference_mode():
            total = bits(self.model(), self.development.rows())
        write_model(self.args.out, self.tensors, self.written, self.args.corpus / "tokenizer.json")
        return {
            "step": self.steps,
            "tokens": self.tokens,
            "epochs": round(self.sampler.seen, 2),
            "seconds": round(seconds, 1),
            "tokens_per_s": round(self.tokens / seconds),
            "loss": round(loss, 4),
            "development_bits_per_byte": round(total / self.development.utf8_bytes, 4),
        }


def train(training: Training, reports: int) -> list[dict[str, Any]]:
    """Steps until all are done; saved so many times on the way, each with a line of the log, which is returned."""
    log: list[dict[str, Any]] = []
    losses: list[Tensor] = []
    due, progress = 1, 0.0
    while progress < 1:
        losses.append(training.step(progress))
        if training.steps % 20 == 0:  # the clock is only right after the device has caught up
            losses[-1].item()
        progress = training.progress
        if progress >= due / reports or progress >= 1:
            log.append(training.save(torch.stack(losses).mean().item()))
            print(json.dumps(log[-1]), flush=True)
            losses, due = [], int(progress * reports) + 1
    return log


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--corpus", type=Path, required=True)
    add("--out", type=Path, required=True, help="model folder to write")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of activations and products")
    add("--hidden-size", type=int, default=256)
    add("--blocks", type=int, default=4)
    add("--heads", type=int, default=4)
    add("--ffn-proj-factor", type=float, default=2.0)
    add("--steps", type=int, default=3000)
    add("--minutes", type=float, default=math.inf, help="stop then, with the learning rate already down")
    add("--batch-tokens", type=int, default=65536)
    add("--row-lengths", type=int, nargs="+", default=[256, 256, 256, 1024], help="one a step, in turn")
    add("--lr", type=float, default=3e-3)
    add("--warmup", type=int, default=150, help="steps")
    add("--weight-decay", type=float, default=0.1)
    add("--dropout", type=float, default=0.0)
    add("--capital-repeats", type=int, default=4, help="how often an epoch has the countries' documents")
    add("--reports", type=int, default=10, help="how often to log, score and save on the way")
    add("--seed", type=int, default=1)
    return parser


def main(words: Sequence[str] | None = None) -> None:
    begun = time.monotonic()
    parser = arguments()
    args = parser.parse_args(words)
    if args.batch_tokens < max(args.row_lengths):
        parser.error(f"--batch-tokens {args.batch_tokens} is less than a row of {max(args.row_lengths)}")
    training = Training(args)
    log = train(training, args.reports)
    trained = {
        "steps": training.steps,
        "tokens": training.tokens,
        "epochs": round(training.sampler.seen, 2),
        "seconds": round(training.seconds, 1),
        "seconds_with_start": round(time.monotonic() - begun, 1),
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
        "torch": torch.__version__,
        "options": {name: str(value) for name, value in vars(args).items() if name not in ("corpus", "out")},
    }
    parameters = sum(tensor.numel() for tensor in training.tensors.values())
    evaluation = [figures(args.out, args.corpus, device=args.device, dtype=dtype) for dtype in ("float32", "bfloat16")]
    result = {"parameters": parameters, "training": trained, "log": log, "evaluation": evaluation}
    write_whole(args.out / "evaluation.json", (json.dumps(result, indent=1) + "\n").encode())
    print(json.dumps({"training": trained, "parameters": parameters}))
    for part in evaluation:
        brief = {key: value for key, value in part["capitals"].items() if key not in ("wrong", "forty")}
        print(json.dumps({"dtype": part["dtype"], **part["heldout"], **brief}))
    print("\n".join(evaluation[-1]["samples"]))


if __name__ == "__main__":
    main()
