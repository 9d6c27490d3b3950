"""How the next token is chosen. torch is imported with the first sampler: a wrong option is refused without it."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from xlstm_ray.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor


class Published(Protocol):
    """What was published with a model, as far as sampling goes."""

    def sampling(self, asked: bool) -> "Sampling": ...


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    temperature 0 is greedy; top_k keeps so many of the likeliest tokens (0: all), of equals the lowest ids; top_p then
    keeps the likeliest of that total mass. The random number of a token hangs on the seed and on its position alone: a
    row's do not depend on other rows, and go on where the row goes on.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    top_k: int = 0

    @classmethod
    def make(
        cls,
        temperature: float | None,
        top_p: float | None,
        seed: int | None,
        top_k: int | None = None,
        *,
        before: "Sampling | None" = None,
        published: Published | None = None,
    ) -> "Sampling":
        """Greedy unless asked otherwise; asking for top_p, top_k or a seed asks for sampling, at temperature 1.

        What is not given is taken from `before`, how a state's last answer was made, else from what was published with
        the model. Raises UsageError for what is out of range.
        """
        if temperature is not None and not 0 <= temperature <= 100:
            raise UsageError(f"`temperature` is {temperature}; allowed: 0 (greedy) to 100")
        asks = not top_p is top_k is seed is None
        if temperature == 0 and asks:
            raise UsageError("`top_p`, `top_k` and `seed` have no effect at `temperature=0` (greedy); leave them out")
        if top_p is not None and not 0 < top_p <= 1:
            raise UsageError(f"`top_p` is {top_p}; allowed: above 0, up to 1")
        if top_k is not None and not 0 <= top_k < 1 << 31:
            raise UsageError(f"`top_k` is {top_k}; allowed: 0 (all tokens) and more")
        if seed is not None and not 0 <= seed < 1 << 63:
            raise UsageError(f"`seed` is {seed}; allowed: 0 to 2^63 - 1")
        if temperature == 0:
            return cls()
        asks = asks or temperature is not None
        base = before
        if base is None or (base.temperature == 0 and asks):
            base = published.sampling(asks) if published else cls(temperature=1.0 if asks else 0.0)
        return cls(
            temperature=base.temperature if temperature is None else temperature,
            top_p=base.top_p if top_p is None else top_p,
            seed=base.seed if seed is None else seed,
            top_k=base.top_k if top_k is None else top_k,
        )

    def sampler(self) -> "Callable[[Tensor, Sequence[int]], list[int]]":
        """A function from logits (B, vocabulary) and the position of the next token, a row, to that token, a row."""
        if self.temperature == 0:
            return lambda logits, positions: logits.argmax(-1).tolist()
        import torch

        def sample(logits: "Tensor", positions: Sequence[int]) -> list[int]:
            # Differences from the largest, so that the smallest of temperatures makes no infinity of it.
            scores = logits.double() - logits.double().amax(-1, keepdim=True)
            p, order = torch.softmax(scores / self.temperature, -1).sort(dim=-1, descending=True, stable=True)
            if self.top_k:
                p[:, self.top_k :] = 0
            mass = p.cumsum(-1)
            p = p.masked_fill(mass - p >= self.top_p * mass[:, -1:], 0)  # keeps the token that crosses top_p
            mass = p.cumsum(-1)
            drawn = torch.tensor([[self.uniform(n)] for n in positions], dtype=torch.float64)
            pick = torch.searchsorted(mass, drawn * mass[:, -1:], right=True)
            pick = pick.minimum((p > 0).sum(-1, keepdim=True) - 1)
            return order.gather(-1, pick).squeeze(-1).tolist()

        return sample

    def uniform(self, position: int) -> float:
        """The random number, from 0 to below 1, of the token at this position."""
        data = self.seed.to_bytes(8, "little") + position.to_bytes(8, "little")
        return (int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") >> 11) * 2.0**-53
