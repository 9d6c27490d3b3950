"""How the next token is chosen. torch is imported with the first sampler: a wrong option is refused without it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from xlstm_ray.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. temperature 0 is greedy; top_p keeps the likeliest tokens of that total mass."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    @classmethod
    def make(cls, temperature: float | None, top_p: float | None, seed: int | None) -> "Sampling":
        """Greedy unless asked otherwise; asking for top_p or a seed asks for sampling, at temperature 1."""
        if temperature is None:
            temperature = 0.0 if top_p is None and seed is None else 1.0
        if not 0 <= temperature <= 100:
            raise UsageError(f"--temperature is {temperature}; allowed: 0 (greedy) to 100")
        if temperature == 0 and (top_p is not None or seed is not None):
            raise UsageError("--top-p and --seed have no effect at --temperature 0 (greedy); leave them out")
        if top_p is not None and not 0 < top_p <= 1:
            raise UsageError(f"--top-p is {top_p}; allowed: above 0, up to 1")
        if seed is not None and not 0 <= seed < 1 << 63:
            raise UsageError(f"--seed is {seed}; allowed: 0 to 2^63 - 1")
        return cls(temperature, 1.0 if top_p is None else top_p, 0 if seed is None else seed)

    def sampler(self) -> "Callable[[Tensor], list[int]]":
        """A function from logits (B, vocabulary) to a token a row; it owns its random generator."""
        if self.temperature == 0:
            return lambda logits: logits.argmax(-1).tolist()
        import torch

        generator = torch.Generator().manual_seed(self.seed)

        def sample(logits: "Tensor") -> list[int]:
            p, order = torch.softmax(logits.double() / self.temperature, -1).sort(dim=-1, descending=True, stable=True)
            p = p.masked_fill(p.cumsum(-1) - p >= self.top_p, 0)  # keeps the token that crosses top_p
            return order.gather(-1, torch.multinomial(p, 1, generator=generator)).squeeze(-1).tolist()

        return sample
