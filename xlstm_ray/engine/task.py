"""A request in the service."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from time import perf_counter

from torch import Tensor

from xlstm_ray.engine.core import Core
from xlstm_ray.engine.decode import not_finite
from xlstm_ray.engine.driver import Each, Reader, Sizes, Snapshot
from xlstm_ray.engine.held import HeldRows
from xlstm_ray.engine.request import End, Event, Handle, Queued, Request, Usage
from xlstm_ray.engine.result import Use
from xlstm_ray.engine.resume import Going, unchanged
from xlstm_ray.engine.reuse import Reuse
from xlstm_ray.engine.scores import Scores
from xlstm_ray.engine.windows import Group, Window
from xlstm_ray.errors import StateError, XlstmRayError
from xlstm_ray.runtime.executor import StateRef
from xlstm_ray.state import Numerics, RecurrentState
from xlstm_ray.text.answer import Answer, Finish
from xlstm_ray.text.history import Row
from xlstm_ray.text.prompt import Given
from xlstm_ray.text.tokenizer import Text

ALONE = Group([0], 1)


@dataclass(eq=False)
class Task:
    """A request in the service. state: its own state of one row, while it is not in a batch.

    Several answers to one prompt are several tasks, and one more task reads the prompt for them.
    """

    number: int  # its number in the scheduler
    request: Request
    handle: Handle
    going: Going
    start: Snapshot  # where it starts from
    logits: Tensor | None = None  # (vocabulary,) after the whole prompt, and after each token of the answer
    fetch: Callable[[], Tensor] | None = None  # brings them here, while they are where its last token was chosen
    windows: Reader | None = None  # reads its prompt; None before it has arrived
    made: float = field(default_factory=perf_counter)  # perf_counter time
    began: float | None = None
    first_token: float | None = None
    begun: int = 0  # tokens before the first window of its run
    resumed: int = 0  # tokens before the first window that is computed here
    kept: int = 0  # how many states the cache had kept when it looked there
    rows: HeldRows = HeldRows()  # its state, while it is not with the executor
    state: StateRef | None = None
    answer: Answer | None = None
    slot: int | None = None
    cancelled: bool = False
    reuse: Reuse | None = None  # what it takes from the cache and gives to it
    answers: list["Task"] = field(default_factory=list)  # the tasks for which this one reads the prompt
    reader: "Task | None" = None  # the task that reads its prompt, until it is read

    @classmethod
    def of(cls, core: Core, request: Request, number: int, handle: Handle) -> "Task":
        """Make the task of a request. Raises UsageError or StateError for a wrong request."""
        state = request.state
        if request.prompt is None and request.append is None and state is not None and state.batch == 1:
            core.require_whole(state)
            going = unchanged(state)
        else:
            (going,), state = core.going_on(_one(request.prompt), _one(request.append), state, tenant=request.tenant)
        both = (core.nothing, HeldRows([None])) if state is None else (state.logits, core.rows_of(state))
        return cls(number, request, handle, going, Snapshot([going.seen], *both), resumed=going.seen)

    def answer_of(self, number: int, request: Request, handle: Handle) -> None:
        """Add an answer to the prompt that this task reads."""
        self.answers.append(replace(self, number=number, request=request, handle=handle, answers=[], reader=self))

    def follow(self, reader: "Task", rows: HeldRows) -> None:
        """Go on from the end of the prompt that `reader` has read. rows: the state there."""
        self.rows, self.logits, self.windows, self.reader = rows, reader.logits, reader.windows, None
        self.begun, self.resumed, self.began, self.reuse = reader.begun, reader.resumed, reader.began, reader.reuse

    def tell(self, event: Event) -> None:
        """Send an event to its handle, or to the handles of all its answers."""
        for task in self.answers or [self]:
            task.handle.tell(event)

    def fetch_logits(self) -> None:
        """Bring the logits after its last token here, if they stayed where its token was chosen."""
        if self.fetch is not None:
            self.logits, self.fetch = self.fetch(), None

    @property
    def total(self) -> int:
        return len(self.going.tokens)

    @property
    def read(self) -> int:
        """How many tokens of the prompt were read, including those in flight."""
        return self.resumed if self.windows is None else self.windows.read

    @property
    def scores(self) -> Scores | None:
        """The log-probabilities of the prompt's tokens, if they were requested."""
        windows = self.reader.windows if self.reader else self.windows
        return windows.scores[0] if windows and windows.scores else None

    def known(self, text: Text) -> Row:
        """What a state says about the tokens that were read."""
        if self.resumed == self.total and not self.found:
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
            cache=self.reuse.uses()[0] if self.reuse else Use(),
        )

    def end(
        self,
        finish: Finish,
        *,
        logits: Tensor | None = None,
        state: RecurrentState | None = None,
        error: XlstmRayError | None = None,
    ) -> None:
        """Send the last event."""
        tokens, text = (self.answer.tokens, self.answer.text) if self.answer else ([], "")
        self.handle.tell(End(finish, text, tokens, self.usage(), logits, state, error, self.scores))

    def not_finite(self) -> XlstmRayError:
        """Why no token can be chosen from its logits: a caller's state may have numbers that no prompt gives."""
        state = self.request.state
        if state is None:
            return not_finite()
        return StateError(f"{state.name}: the logits after it are not finite; make the state again")

    def look_up(self, core: Core) -> None:
        """Go on from the longest kept state, if it is longer than the given one.

        Once when it arrives, and again before its first window: those before it may have read the same meanwhile.
        """
        state, numerics, likeliest = self.request.state, core.plan.numerics, self.request.prompt_logprobs
        cache = core.cache if likeliest is None else None  # for log-probabilities, the whole prompt must be read
        kept = 0 if cache is None else cache.kept
        if self.windows is not None and kept == self.kept:
            return
        self.begun, self.kept = 0 if state is None else (state.begun or state.tokens)[0], kept
        reuse = Reuse(cache, [self.going], self.request.share, self.reuse)
        reuse.find([ALONE], [self.begun], numerics)
        if self.reuse is not None:
            if not reuse.found:  # only longer states are found
                reuse.release(used=False)
                return
            self.reuse.release(used=False)
        self.reuse = reuse
        start = self.start = reuse.start(self.start)
        (self.resumed,), self.rows = start.consumed, start.rows
        sizes, each = Sizes(numerics.tile_size, numerics.chunk_size), Each(likeliest=likeliest)
        wants = partial(_wants, reuse, self.total)  # a reference to `self` would be a cycle, which keeps the state
        self.windows = Reader(core.states, [self.going.tokens], start, sizes, each=each, wants=wants)
        if self.windows.last:
            self.logits = start.logits[0]

    def queued(self, ahead: int) -> Queued:
        """The task's first event. ahead: how many other tasks will begin before it."""
        return Queued(ahead, self.total, self.resumed, self.reuse.uses()[0] if self.reuse else Use())

    @property
    def found(self) -> bool:
        """Whether it goes on from a state of the cache."""
        return self.reuse is not None and self.reuse.found

    def release(self) -> None:
        """End the lease of the kept state; the request has ended."""
        if self.reuse is not None:
            self.reuse.release()

    def keep(self, snapshot: Snapshot) -> None:
        """Give the cache a state of the prompt."""
        assert self.reuse is not None
        self.reuse.keep(ALONE, snapshot, cold=True)

    @property
    def fed(self) -> int:
        """How many tokens of the answer the state has seen, if the cache keeps states of answers; else 0."""
        if self.reuse is None or not self.reuse.keeps_answers or self.answer is None:
            return 0
        finish, made = self.answer.finish, len(self.answer.tokens)
        return made if finish is not None and isinstance(finish.by, int) else max(0, made - 1)

    def keep_answer(self, core: Core) -> None:
        """Give the cache the state after the tokens of the answer that were fed. The last one is not fed for this."""
        if self.fed and self.answer and self.state is not None and self.logits is not None and self.reuse is not None:
            rows = core.states.rows(self.state, 1)
            self.reuse.keep_answer(self.answer.tokens[: self.fed], rows, self.logits.cpu())

    def numerics(self, core: Core) -> Numerics:
        """The numerics of its state."""
        mixed = self.reuse is not None and not self.reuse.exact
        return core.plan.numerics.model_copy(update={"mixed": mixed})


def _one(prompt: Given | None) -> list[Given] | None:
    return None if prompt is None else [prompt]


def _wants(reuse: Reuse, total: int, window: Window) -> bool:
    """Whether the cache keeps the state at this window's end. total: the prompt's tokens."""
    return bool(reuse.hits) and (window.start + window.size >= total or reuse.wants(ALONE, window))
