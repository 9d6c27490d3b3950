#!/usr/bin/env python3
"""The demo model's figures, from a corpus folder and a model folder, at a chosen device and dtype."""

import argparse
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from corpus import Documents, words_of
from network import Model
from tokenizers import Tokenizer

SAMPLES = [
    "The capital of France is",
    "What is the capital of Norway?",
    "A dog is",
    "What is a violin? It is",
    "winter (noun):",
    "house (noun):",
    "To run is to",
    "happy (adjective):",
]


def bits(model: Model, rows: list[np.ndarray], *, batch: int = 64) -> float:
    """Sum of -log2 p of every token after the first of each row, which is END; each row from a fresh state."""
    device = model.blocks[0].qkvo.device
    rows, total = sorted(rows, key=len), 0.0
    for start in range(0, len(rows), batch):
        part = [torch.from_numpy(row.astype(np.int64)) for row in rows[start : start + batch]]
        tokens = torch.nn.utils.rnn.pad_sequence(part, batch_first=True).to(device)
        lengths = torch.tensor([len(row) for row in part], device=device)
        x, _ = model.hidden(tokens[:, :-1], lengths - 1)
        loss = F.cross_entropy(model.logits(x).flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
        real = torch.arange(x.shape[1], device=device) < (lengths - 1).unsqueeze(-1)
        total += loss.view_as(real)[real].double().sum().item()
    return total / math.log(2)


def bits_of_stream(model: Model, documents: Documents, *, tile: int = 2048) -> list[float]:
    """Bits per byte of each quarter of all documents as one prompt, END between them, with the state carried from tile
    to tile: a model that degrades on long prompts would get worse from quarter to quarter. All quarters are assumed to
    have the same bytes for each token."""
    device = model.blocks[0].qkvo.device
    tokens = torch.from_numpy(documents.tokens.astype(np.int64)).to(device).unsqueeze(0)
    losses, state = [], None
    for start in range(0, tokens.shape[1] - 1, tile):
        window = tokens[:, start : start + tile + 1]
        x, state = model.hidden(window[:, :-1], state=state)
        losses.append(F.cross_entropy(model.logits(x[0]), window[0, 1:], reduction="none").double())
    loss = torch.cat(losses)
    text = tokens[0, 1:] != 0  # END costs bits but is not text; its cost is left out, as in `bits`
    per_token = documents.utf8_bytes / int(text.sum())
    quarters = zip(loss.chunk(4), text.chunk(4), strict=True)
    return [part[real].mean().item() / math.log(2) / per_token for part, real in quarters]


def continuations(
    model: Model, prompts: list[list[int]], new_tokens: int, *, before: list[int] | None = None, sampled: bool = False
) -> list[list[int]]:
    """Each prompt continued, greedily or sampled at temperature 1, from the state after the tokens `before`, which are
    read once; prompt and continuation are computed again for every token: simple, and short."""
    device = model.blocks[0].qkvo.device
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    tokens = torch.zeros(len(prompts), int(lengths.max()) + new_tokens, dtype=torch.int64, device=device)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = torch.tensor(prompt, device=device)
    each = torch.arange(len(prompts), device=device)
    state = model.fresh_state(1)
    if before:
        _, state = model.hidden(torch.tensor([before], device=device))
    state = [tuple(part.expand(len(prompts), *part.shape[1:]) for part in parts) for parts in state]
    for n in range(new_tokens):
        x, _ = model.hidden(tokens, lengths + n, state)
        logits = model.logits(x[each, lengths + n - 1])
        tokens[each, lengths + n] = (
            torch.multinomial(logits.softmax(-1), 1).squeeze(-1) if sampled else logits.argmax(-1)
        )
    return [row[size : size + new_tokens].tolist() for row, size in zip(tokens, lengths.tolist(), strict=True)]


def ask_capitals(model: Model, tokenizer: Any, asked: list[dict[str, Any]], before: list[int]) -> list[dict[str, Any]]:
    """Complete "The capital of X is" greedily, after the tokens `before`: right if it goes on with the capital."""
    prompts = [f"The capital of {row['name']} is" for row in asked]
    most = max(len(tokenizer.encode(" " + row["capital"]).ids) for row in asked) + 2
    made = continuations(model, [tokenizer.encode(prompt).ids for prompt in prompts], most, before=before)
    answers = []
    for row, ids in zip(asked, made, strict=True):
        text = tokenizer.decode(ids[: ids.index(0)] if 0 in ids else ids)
        right = re.match(re.escape(" " + row["capital"]) + r"(?!\w)", text) is not None
        answers.append({**row, "answer": text.split(".")[0] if not right else " " + row["capital"], "right": right})
    return answers


def figures(folder: Path, corpus: Path, *, device: str, dtype: str) -> dict[str, Any]:
    """Everything that the demo's README states, computed anew from the stored weights."""
    torch.manual_seed(1)
    known = set((corpus / "words.txt").read_text().split())
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    asked = json.loads((corpus / "capitals.json").read_text())
    heldout = Documents.read(corpus / "heldout.npz")
    with torch.inference_mode():
        model = Model.read(folder, getattr(torch, dtype), torch.device(device))
        total = bits(model, heldout.rows())
        answers = ask_capitals(model, tokenizer, asked, [])
        later = ask_capitals(model, tokenizer, asked, [*heldout.tokens[:2000].tolist(), 0])
        samples = continuations(model, [tokenizer.encode(prompt).ids for prompt in SAMPLES], 40)
        quarters = bits_of_stream(model, heldout)
        free = continuations(model, [[0]] * 64, 60, sampled=True)
    forty = [row for row in answers if row["forty"]]

    def text(ids: list[int]) -> str:
        return tokenizer.decode(ids[: ids.index(0)] if 0 in ids else ids)

    words = [word for ids in free for word in words_of(text(ids))]
    return {
        "device": device,
        "dtype": dtype,
        "heldout": {
            "documents": len(heldout.lengths),
            "tokens": int(heldout.lengths.sum() - len(heldout.lengths)),
            "bytes": heldout.utf8_bytes,
            "bits_per_byte": total / heldout.utf8_bytes,
            "bits_per_byte_of_each_quarter_as_one_prompt": quarters,
        },
        "capitals": {
            "right_of_forty": sum(row["right"] for row in forty),
            "right_of_all": sum(row["right"] for row in answers),
            "all": len(answers),
            "right_of_all_after_2000_tokens_of_other_text": sum(row["right"] for row in later),
            "wrong": [row for row in answers if not row["right"]],
            "forty": forty,
        },
        "words": {"sampled": len(words), "in_training_text": sum(word in known for word in words)},
        "samples": [p + text(ids) for p, ids in zip(SAMPLES, samples, strict=True)],
    }


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--corpus", type=Path, required=True)
    add("--model", type=Path, required=True)
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    return parser


def main(words: Sequence[str] | None = None) -> None:
    args = arguments().parse_args(words)
    print(json.dumps(figures(args.model, args.corpus, device=args.device, dtype=args.dtype), indent=1))


if __name__ == "__main__":
    main()
