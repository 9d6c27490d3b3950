"""Log-probabilities of tokens and of the likeliest tokens, computed on the logits' device."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from xlstm_ray.sampling.order import best

PIECE = 1 << 22  # logits at once: 16 MiB of float32


class Logprobs(NamedTuple):
    """Log-probabilities from logits (..., vocabulary), on their device. `chosen` and `top` agree on a token's value."""

    chosen: Tensor  # (...) float32; NaN for token -1
    ids: Tensor  # (..., count) int64, the likeliest first; equal ones in order of ids
    top: Tensor  # (..., count) float32: of these ids


def logprobs(logits: Tensor, tokens: Tensor, count: int) -> Logprobs:
    """The model's logits (..., vocabulary) float32, tokens (...) int64 (-1: none) -> log-probabilities.

    Of the model's own distribution, before temperature and penalties, like vLLM's `raw_logprobs`. A row's values do not
    depend on other rows.
    """
    count = min(count, logits.shape[-1])
    ids = best(logits, count)
    of_all = torch.log_softmax(logits, -1)
    chosen = of_all.gather(-1, tokens.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return Logprobs(torch.where(tokens < 0, torch.nan, chosen), ids, of_all.gather(-1, ids))


def score(hidden: Tensor, tokens: Tensor, count: int, *, head: Callable[[Tensor], Tensor], vocabulary: int) -> Logprobs:
    """As `logprobs`, from the residual stream (..., D) after the last block, without holding all its logits.

    head: (rows, D) -> (rows, vocabulary) float32; it is called with a few rows at a time, for at most PIECE logits (or
    one row). tokens (...): the token after each position. Values for padding mean nothing.
    """
    rows, named = hidden.reshape(-1, hidden.shape[-1]), tokens.to(hidden.device).flatten()
    size, count = max(1, PIECE // vocabulary), min(count, vocabulary)
    # Allocated before the first piece: small results between large freed tensors would fragment the memory.
    found = Logprobs(
        torch.empty(len(rows), device=rows.device),
        torch.empty(len(rows), count, dtype=torch.int64, device=rows.device),
        torch.empty(len(rows), count, device=rows.device),
    )
    for start in range(0, len(rows), size):
        piece = slice(start, start + size)
        for whole, part in zip(found, logprobs(head(rows[piece]), named[piece], count), strict=True):
            whole[piece] = part
    return Logprobs(*(part.view((*tokens.shape, *part.shape[1:])) for part in found))
