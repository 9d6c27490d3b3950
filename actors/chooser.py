"""Tokens that the last stage chooses, so that only they travel and not their logits."""

import torch
from torch import Tensor

from xlstm_ray.runtime.executor import Choice
from xlstm_ray.runtime.graphs import of_finite
from xlstm_ray.sampling.sampler import Rows, Sampler


class Chooser:
    """Chooses by what the driver's sampler has for the rows: on cuda on the device, else on the CPU, as the driver."""

    def __init__(self, vocabulary: int, device: torch.device):
        self._vocabulary, self._where = vocabulary, device if device.type == "cuda" else "cpu"
        self._choices: dict[tuple[int, tuple[int, ...]], Choice] = {}  # by rows and end tokens: graphs have them
        self.logits: dict[int, Tensor] = {}  # by state: those of its last step

    def choice(self, rows: Rows) -> Choice:
        """How to choose for these rows."""
        key = len(rows.numbers), rows.ends
        if key not in self._choices:
            sampler = Sampler(key[0], self._vocabulary, ends=rows.ends, device=self._where)
            self._choices[key] = Choice(sampler, torch.arange(key[0]))
        self._choices[key].sampler.set_rows(rows)
        return self._choices[key]

    @staticmethod
    def pick(choice: Choice, logits: Tensor) -> Tensor:
        """Logits (B, vocabulary) -> tokens (B,); NOT_FINITE where a row's logits are not."""
        return of_finite(choice.sampler.pick(logits, choice.slots), logits)
