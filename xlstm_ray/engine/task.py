"""A request that an engine's thread works on."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from time import perf_counter

from torch import Tensor

from xlstm_ray.engine.held import HeldRows
from xlstm_ray.engine.request import Handle, Request, Usage
from xlstm_ray.engine.resume import Going
from xlstm_ray.engine.windows import Window
from xlstm_ray.runtime.executor import StateRef
from xlstm_ray.text.answer import Answer
from xlstm_ray.text.history import Row
from xlstm_ray.text.tokenizer import Text


@dataclass
class Task:
    """A request in work. state: its own state of one row, while it is not in a batch."""

    request: Request
    handle: Handle
    going: Going
    rows: HeldRows  # where it starts from
    logits: Tensor | None  # (vocabulary,) after the last token that the state has seen
    windows: Iterator[Window]
    made: float = field(default_factory=perf_counter)  # perf_counter time
    began: float | None = None
    first_token: float | None = None
    resumed: int = 0
    read: int = 0  # tokens of the prompt in the state, including windows in flight
    last: bool = False  # True if the last window was submitted
    state: StateRef | None = None
    answer: Answer | None = None
    slot: int | None = None
    hidden: Tensor | None = None  # (1, D) after the last window with a result
    under_way: int = 0  # the number of its windows in flight
    cancelled: bool = False

    @property
    def total(self) -> int:
        return len(self.going.tokens)

    def known(self, text: Text) -> Row:
        """What a state knows of the prompt, as far as it was read."""
        if self.resumed == self.total:
            return self.going.row
        self.going.advance(self.read)
        return self.going.known(text, complete=self.read == self.total)

    def usage(self) -> Usage:
        """The figures of the request, at its end."""
        now = perf_counter()
        return Usage(
            prompt_tokens=self.total,
            resumed_tokens=self.resumed,
            answer_tokens=len(self.answer.tokens) if self.answer else 0,
            queued_s=(self.began or now) - self.made,
            first_token_s=None if self.first_token is None else self.first_token - self.made,
            total_s=now - self.made,
        )
