"""The sampler's slots: one for each request that makes an answer."""

from collections.abc import Sequence

import torch
from torch import Tensor

from xlstm_ray.engine.decode import Made, made_of
from xlstm_ray.engine.task import Task
from xlstm_ray.engine.tokens import Stored, Tail
from xlstm_ray.runtime.executor import Choice
from xlstm_ray.sampling.sampler import Sampler


class Slots:
    """Chooses tokens for up to `count` tasks, each by its own parameters, on this device. ends: the end tokens."""

    def __init__(self, count: int, vocabulary: int, ends: Sequence[int], device: torch.device):
        self._tasks: list[Task | None] = [None] * count
        self._sampler = Sampler(count, vocabulary, ends=ends, device=device)

    def take(self, task: Task) -> None:
        """Give the task a free slot."""
        task.slot = self._tasks.index(None)
        self._tasks[task.slot] = task
        self._put(task)

    def give_back(self, task: Task) -> None:
        """Free the task's slot, if it has one."""
        if task.slot is not None:
            self._sampler.clear(task.slot)
            self._tasks[task.slot] = None
            task.slot = None

    def choice(self, places: Sequence[Task | None], *, there: bool) -> Choice | None:
        """How an executor that chooses does so for a step of these rows; a place without a task is idle.

        there: it can take only what Sampler.rows can say, and has no log-probabilities; else None.
        """
        if there and any(t is not None and t.answer and t.answer.sampling.logprobs is not None for t in places):
            return None
        slots = torch.tensor([self._sampler.idle if task is None else task.slot for task in places])
        rows = self._sampler.rows(slots) if there else None
        return None if there and rows is None else Choice(self._sampler, slots, rows)

    def chosen(
        self, tokens: Tensor, logits: Sequence[Tensor], tasks: Sequence[Task]
    ) -> tuple[list[int], list[Made | None]]:
        """As `choose`, of tokens (rows,) on the CPU that the executor has chosen from these logits (vocabulary,)."""
        counts = [task.answer.sampling.logprobs if task.answer else None for task in tasks]
        if all(count is None for count in counts):
            return tokens.tolist(), [None] * len(counts)
        return tokens.tolist(), made_of(torch.stack(list(logits)), tokens.to(logits[0].device), counts)

    def choose(self, logits: Tensor, tasks: Sequence[Task]) -> tuple[list[int], list[Made | None]]:
        """logits (rows, vocabulary) float32 -> the tasks' next tokens, and log-probabilities if requested."""
        logits = logits.to(self._sampler.device)  # those of a kept state are on the host
        slots = torch.tensor([task.slot for task in tasks], device=logits.device)
        chosen = self._sampler.choose(logits, slots)
        counts = [task.answer.sampling.logprobs if task.answer else None for task in tasks]
        return chosen.tolist(), made_of(logits, chosen, counts)

    def _put(self, task: Task) -> None:
        assert task.slot is not None
        assert task.answer is not None
        tokens, made = task.going.tokens, task.answer.tokens
        prompt: Sequence[int] | Tensor | Stored = tokens.tokens if isinstance(tokens, Tail) else tokens
        if isinstance(prompt, Stored):  # all of them may be many
            prompt = prompt.file.distinct() if task.answer.sampling.repetition_penalty != 1 else ()
        self._sampler.put(task.slot, task.answer.sampling, position=task.total + len(made), prompt=prompt, made=made)
