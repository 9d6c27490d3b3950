"""Chooses the next tokens of rows, each by its own parameters, in one computation on the device.

A row's token depends only on its own logits, parameters, seed and position, to the bit: not on other rows or their
number. So sums are done in integers: probabilities become integers of 40 bits, whose sums are the same in any order.
Nothing here waits for the device, and shapes depend only on the kinds of parameters in use, so `choose` can be captured
in a CUDA graph. float64 is not used: mps lacks it.
"""

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from xlstm_ray.sampling.order import best
from xlstm_ray.sampling.params import Sampling

ONE = 40  # the likeliest token's weight is 2^40; a vocabulary of 2^22 tokens sums up to less than 2^63
HALF, HALF_MASK = 31, (1 << 31) - 1  # products of 62 bits are computed in two halves
GOLDEN = 0x9E3779B97F4A7C15
MIXED = (30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)
NUMBERS, WHOLES = 5, 6  # columns of a sampler's tensors
LEAST_DIVISOR = 1e-30  # what logits are divided by: smaller numbers underflow in float32, and leave no number


class Needs(NamedTuple):
    """The computations that some row needs; others are skipped. A captured graph serves equal needs."""

    draws: bool = False  # a temperature above 0
    sorts: int = 0  # the number of likeliest tokens to sort, for top_k or top_p
    counts: bool = False  # any of the three penalties
    bias: bool = False
    forbids: bool = False  # end tokens, within min_tokens


def needs_of(sampling: Sampling, vocabulary: int) -> Needs:
    s = sampling
    draws = s.temperature > 0
    most = max(64, 1 << (s.top_k - 1).bit_length()) if s.top_k else vocabulary  # rounded up to few sizes
    return Needs(
        draws,
        min(most, vocabulary) if draws and (s.top_k > 0 or s.top_p < 1) else 0,
        s.repetition_penalty != 1 or s.presence_penalty != 0 or s.frequency_penalty != 0,
        bool(s.logit_bias),
        s.min_tokens > 0 and not s.ignore_eos,
    )


class Rows(NamedTuple):
    """What chooses tokens of n rows elsewhere, as a Sampler has it at their positions: all but counts and biases."""

    needs: Needs
    numbers: Tensor  # (n, 5) float32, on the CPU
    wholes: Tensor  # (n, 6) int64, on the CPU
    ends: tuple[int, ...]

    def packed(self) -> list[Any]:
        """As lists, numbers and bytes, which are quickly sent."""
        return [[*self.needs], self.numbers.numpy().tobytes(), self.wholes.numpy().tobytes(), [*self.ends]]

    @classmethod
    def unpacked(cls, packed: list[Any]) -> "Rows":
        needs, numbers, wholes, ends = packed
        floats = torch.frombuffer(bytearray(numbers), dtype=torch.float32).view(-1, NUMBERS)
        whole = torch.frombuffer(bytearray(wholes), dtype=torch.int64).view(-1, WHOLES)
        return cls(Needs(*needs), floats, whole, tuple(ends))


class Sampler:
    """Chooses tokens for up to `slots` rows. A row's data is in its slot, in tensors on the device.

    Token counts for penalties are (slots, vocabulary): int32 for the answer, bool for the prompt. Biases are float32 of
    that shape. Each tensor is made when a row needs it first. ends: the end tokens.
    """

    def __init__(self, slots: int, vocabulary: int, *, ends: Collection[int] = (), device: torch.device | str = "cpu"):
        self.slots, self.vocabulary, self.device = slots, vocabulary, torch.device(device)
        self.idle = slots  # the slot of empty places in a call
        self.needs = Needs()  # of all rows together
        self._of = [Needs()] * slots
        # Columns: temperature, min_p, repetition, presence, frequency; key, position, made, top_k, top_p, least.
        self._numbers = torch.tensor([[0.0, 0.0, 1.0, 0.0, 0.0]], device=device).repeat(slots + 1, 1)
        self._wholes = torch.tensor([[0, 0, 0, vocabulary, 1 << HALF, 0]], device=device).repeat(slots + 1, 1)
        self._moves = torch.tensor([0, 1, 1, 0, 0, 0], device=device)  # each token moves position and made by one
        self.ends = tuple(token for token in ends if token < vocabulary)  # published lists may name others
        self._ends = torch.zeros(vocabulary, dtype=torch.bool, device=device)
        self._ends[list(self.ends)] = True
        self._made: Tensor | None = None
        self._seen: Tensor | None = None
        self._bias: Tensor | None = None

    def put(
        self,
        slot: int,
        sampling: Sampling,
        *,
        position: int,
        prompt: Sequence[int] | Tensor = (),
        made: Sequence[int] | Tensor = (),
    ) -> None:
        """Put a row into this slot. position: of its next token. prompt, made: the tokens before it, for penalties."""
        sampling.require_vocabulary(self.vocabulary)
        s, needs = sampling, needs_of(sampling, self.vocabulary)
        self._set(slot, needs)
        least = s.min_tokens if needs.forbids else 0
        top_p = max(1, round(s.top_p * (1 << HALF)))
        top_k = min(s.top_k, self.vocabulary) or self.vocabulary
        temperature = max(s.temperature, LEAST_DIVISOR) if needs.draws else 0.0
        repetition = max(s.repetition_penalty, LEAST_DIVISOR)
        self._numbers[slot] = torch.tensor([temperature, s.min_p, repetition, s.presence_penalty, s.frequency_penalty])
        self._wholes[slot] = torch.tensor([key_of(s.seed), position, len(made), top_k, top_p, least])
        if needs.counts and (self._made is None or self._seen is None):
            shape = self.slots + 1, self.vocabulary
            self._made = torch.zeros(shape, dtype=torch.int32, device=self.device)
            self._seen = torch.zeros(shape, dtype=torch.bool, device=self.device)
        if self._made is not None and self._seen is not None:
            self._made[slot] = torch.bincount(torch.as_tensor(made, dtype=torch.long), minlength=self.vocabulary)
            seen = torch.zeros(self.vocabulary, dtype=torch.bool)
            seen[torch.as_tensor(prompt, dtype=torch.long)] = True
            self._seen[slot] = seen
        if needs.bias and self._bias is None:
            self._bias = torch.zeros(self.slots + 1, self.vocabulary, device=self.device)
        if self._bias is not None:
            bias = torch.zeros(self.vocabulary)
            for token, value in s.logit_bias:
                bias[token] = value
            self._bias[slot] = bias

    def clear(self, slot: int) -> None:
        """Free the slot of a row that has left."""
        self._set(slot, Needs())

    def _set(self, slot: int, needs: Needs) -> None:
        self._of[slot] = needs
        self.needs = Needs(*map(max, zip(*self._of, strict=True)))

    def rows(self, slots: Tensor) -> Rows | None:
        """The rows in these slots (n,), to choose their tokens elsewhere; None if a row needs counts or biases."""
        taken = [self._of[slot] for slot in slots.tolist() if slot != self.idle]
        needs = Needs(*map(max, zip(Needs(), *taken, strict=True)))
        if needs.counts or needs.bias:
            return None
        return Rows(needs, self._numbers[slots].cpu(), self._wholes[slots].cpu(), self.ends)

    def set_rows(self, rows: Rows) -> None:
        """Put these rows of another sampler into the first slots; its end tokens must be the same."""
        n = len(rows.numbers)
        self._numbers[:n].copy_(rows.numbers, non_blocking=True)
        self._wholes[:n].copy_(rows.wholes, non_blocking=True)
        self.needs = rows.needs

    def choose(self, logits: Tensor, slots: Tensor) -> Tensor:
        """logits (n, vocabulary) float32, the rows' slots (n,) int64 -> their tokens (n,) int64. Counts the tokens."""
        tokens = self.pick(logits, slots)
        self.count(slots, tokens)
        return tokens

    def pick(self, logits: Tensor, slots: Tensor) -> Tensor:
        """As `choose`, but does not count the tokens: a second call picks the same ones."""
        needs = self.needs
        scores = self.scores(logits, slots)
        tokens = scores.argmax(-1)  # the first of equals
        if needs.draws:
            temperature, min_p = self._numbers[slots, :2].split(1, -1)
            key, position, _, top_k, top_p, _ = self._wholes[slots].split(1, -1)
            greedy = temperature == 0
            shares = ((scores - scores.amax(-1, keepdim=True)) / temperature.masked_fill(greedy, 1)).exp()
            weights = (shares * float(1 << ONE)).long()
            if needs.sorts:
                some = likeliest(weights, best(scores, needs.sorts), top_k, top_p)
                all_of = (top_k == self.vocabulary) & (top_p == 1 << HALF)  # may need more tokens than were sorted
                weights = torch.where(all_of, weights, some)
            weights = weights.masked_fill(shares < min_p, 0)
            tokens = torch.where(greedy.squeeze(-1), tokens, drawn(weights, random_bits(key, position)))
        return tokens

    def count(self, slots: Tensor, tokens: Tensor) -> None:
        """The rows in these slots (n,) have these tokens (n,) now."""
        self._wholes.index_add_(0, slots, self._moves.expand(len(slots), -1))
        if self.needs.counts and self._made is not None:
            places = slots * self.vocabulary + tokens
            self._made.view(-1).scatter_add_(0, places, torch.ones_like(places, dtype=torch.int32))

    def scores(self, logits: Tensor, slots: Tensor) -> Tensor:
        """The logits (n, vocabulary) to choose from: after bias, forbidden end tokens and penalties.

        The repetition penalty is that of transformers (RepetitionPenaltyLogitsProcessor, after arXiv 1909.05858); the
        other two are OpenAI's, "mu[j] - c[j] * frequency - (c[j] > 0) * presence", over the answer's tokens as in vLLM.
        """
        needs, scores = self.needs, logits
        if needs.bias and self._bias is not None:
            scores = scores + self._bias[slots]
        if needs.forbids:
            made, least = self._wholes[slots, 2:3], self._wholes[slots, 5:6]
            scores = scores.masked_fill(self._ends & (made < least), -torch.inf)
        if needs.counts and self._made is not None and self._seen is not None:
            repetition, presence, frequency = self._numbers[slots, 2:].split(1, -1)
            made, seen = self._made[slots], self._seen[slots]
            again = torch.where(scores < 0, scores * repetition, scores / repetition)
            scores = torch.where(seen | (made > 0), again, scores)
            scores = scores - frequency * made - presence * (made > 0)
        return scores


def likeliest(weights: Tensor, order: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Weights (n, vocabulary) after top_k (n, 1) and top_p (n, 1); excluded tokens are 0. order: at least top_k ids,
    the likeliest first. top_p, in units of 2^-31: the likeliest tokens up to this mass and the one that crosses it."""
    kept = weights.gather(-1, order)
    kept = kept.masked_fill(torch.arange(kept.shape[-1], device=kept.device) >= top_k, 0)
    mass = kept.cumsum(-1)
    kept = kept.masked_fill(mass - kept >= part_of(mass[:, -1:], top_p, 0), 0)
    return torch.zeros_like(weights).scatter_(-1, order, kept)


def drawn(weights: Tensor, bits: tuple[Tensor, Tensor]) -> Tensor:
    """Draw a token for each row: weights (n, vocabulary) int64, random numbers in two halves (n, 1) -> (n,) int64."""
    mass = weights.cumsum(-1)
    return (mass <= part_of(mass[:, -1:], *bits)).sum(-1)


def part_of(whole: Tensor, high: Tensor, low: Tensor | int) -> Tensor:
    """floor(whole * (high * 2^31 + low) / 2^62) without numbers of more than 63 bits; whole is below 2^62."""
    above, below = whole >> HALF, whole & HALF_MASK
    fine = above * low + (below * low >> HALF) + (below * high & HALF_MASK)
    return above * high + (below * high >> HALF) + (fine >> HALF)


def random_bits(key: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
    """62 random bits of this position in the key's stream, in two halves: SplitMix64 (Steele, Lea, Flood, 2014)."""
    x = key + (position + 1) * _signed(GOLDEN)
    for shift, factor in MIXED:
        x = (x ^ _shifted(x, shift)) * _signed(factor)
    x = x ^ _shifted(x, 31)
    return _shifted(x, 33), x & HALF_MASK


def key_of(seed: int) -> int:
    """The start of the seed's stream; mixed, so that streams of neighbouring seeds have nothing in common."""
    x = (seed + GOLDEN) & ((1 << 64) - 1)
    for shift, factor in MIXED:
        x = (x ^ x >> shift) * factor & ((1 << 64) - 1)
    return _signed(x ^ x >> 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Of int64 as if it had no sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(x: int) -> int:
    """The int64 with these 64 bits."""
    return x - (1 << 64) if x >> 63 else x
