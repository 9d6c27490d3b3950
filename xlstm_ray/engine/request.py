"""A caller's request to an engine that serves many, and its events."""

import asyncio
import sys
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from xlstm_ray.engine.decode import Made
from xlstm_ray.engine.result import Use
from xlstm_ray.engine.reuse import Share
from xlstm_ray.engine.scores import Scores
from xlstm_ray.errors import UsageError, XlstmRayError
from xlstm_ray.sampling import Sampling
from xlstm_ray.sampling.params import require_likeliest
from xlstm_ray.state import RecurrentState
from xlstm_ray.text.answer import Finish
from xlstm_ray.text.prompt import Given


@dataclass(frozen=True)
class Request:
    """A prompt to read and, if `sampling` is given, an answer to make.

    prompt: the whole prompt, a text or token ids. append: instead of it, only the part that follows `state`. state: the
    state to go on from; it is not changed. priority: higher ones come first. keep: whether to return the state at the
    end. tenant, keep_at: for the cache, as in `Engine.prefill`. prompt_logprobs: return the log-probabilities of the
    prompt's tokens, and of so many likeliest ones at each place; then nothing is taken from the cache.
    """

    prompt: Given | None = None
    append: Given | None = None
    state: RecurrentState | None = None
    sampling: Sampling | None = None
    priority: int = 0
    keep: bool = False
    tenant: str = ""
    keep_at: Sequence[int] = ()
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        """Raise UsageError for a value of a wrong kind: in the engine's thread it would be everybody's error."""
        _ = self.share
        require_likeliest(self.prompt_logprobs)
        kinds = {"state": RecurrentState | None, "sampling": Sampling | None, "priority": int, "keep": bool}
        for name, kind in kinds.items():
            value = getattr(self, name)
            if not isinstance(value, kind):
                wanted = getattr(kind, "__name__", kind)
                raise UsageError(f"`{name}` is {repr(value)[:80]}; give a value of type {wanted}")

    @property
    def share(self) -> Share:
        """How it shares states of the cache."""
        return Share(self.tenant, self.keep_at)


class Queued(NamedTuple):
    """It waits behind `ahead` others; `resumed_tokens` of its prompt are in a state already.

    use: what the cache was to it. replica: who does it, where a service has several.
    """

    ahead: int
    prompt_tokens: int = 0
    resumed_tokens: int = 0
    use: Use = Use()
    replica: str = ""

    def at_end(self, usage: "Usage") -> "Queued":
        """What was found in the end: others may have read its beginning before its turn came."""
        if usage.resumed_tokens <= self.resumed_tokens:
            return self
        return self._replace(resumed_tokens=usage.resumed_tokens, use=usage.cache)


class Reading(NamedTuple):
    """The number of the prompt's tokens that the state has seen. scores: with the last of them, if asked for."""

    tokens_done: int
    tokens_total: int
    scores: Scores | None = None


class Piece(NamedTuple):
    """The text that a token adds; it may be empty, until more tokens come."""

    text: str
    token: int | None  # None for an end token, and for text that was held back until the end
    made: Made | None = None  # log-probabilities, where they were asked for; an end token has them, too


@dataclass(frozen=True)
class Usage:
    """Numbers of tokens, and seconds from the request to its first window, to its first token and to its end."""

    prompt_tokens: int
    resumed_tokens: int  # of the prompt, found in the given state or in the cache
    answer_tokens: int
    queued_s: float
    first_token_s: float | None
    total_s: float
    cache: Use = Use()


@dataclass(frozen=True)
class End:
    """The last event. finish: why the answer ended; its reason is `stop` if only a prompt was read.

    logits: (vocabulary,) float32, after the last token that was read; over actors, of an answer, only with `keep`.
    state: if `keep` was set; after a cancel in the prompt, it resumes there. error: if the reason is `error`.
    prompt_logprobs: of each token that was read, after those of the given state; None for a prompt's first one.
    """

    finish: Finish
    text: str
    tokens: list[int]
    usage: Usage
    logits: Tensor | None = field(default=None, repr=False)
    state: RecurrentState | None = None
    error: XlstmRayError | None = None
    prompt_logprobs: Scores | None = field(default=None, repr=False)


Event = Queued | Reading | Piece | End


class Handle:
    """A request in work: iterate over its events, or wait for its `result`; in asyncio, `async for` or `await`.

    Each event is handed out once, to the first of these that asks; after the last one, every iteration ends. Who stops
    waiting, by a timeout too, does not cancel the request.
    """

    def __init__(self, cancel: Callable[[], None]):
        self._cancel = cancel
        self._changed = threading.Condition()
        self._events: deque[Event] = deque()
        self._wakes: list[Callable[[], object]] = []  # of those in asyncio that wait for an event
        self._listener: Callable[[Event], object] | None = None
        self._over = False  # the last event has come
        self._end: Future[End] = Future()

    def cancel(self) -> None:
        """Cancel the request. Its last event still comes: `cancelled`, unless it had ended before."""
        self._cancel()

    def result(self, timeout_s: float | None = None) -> End:
        """Wait for its end. Raises its error if it has one, and TimeoutError after timeout_s."""
        end = self._end.result(timeout_s)
        if end.error is not None:
            raise end.error
        return end

    @property
    def done(self) -> bool:
        return self._end.done()

    def __iter__(self) -> Iterator[Event]:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._events or self._over)
                if not self._events:
                    return
                event = self._events.popleft()
            yield event

    async def __aiter__(self) -> AsyncIterator[Event]:
        while True:
            came = None
            with self._changed:
                if self._events:
                    event = self._events.popleft()
                elif self._over:
                    return
                else:
                    came = self._more()
            if came is None:
                yield event
            else:
                await came.wait()

    def __await__(self) -> Generator[object, None, End]:
        return self._wait().__await__()

    async def _wait(self) -> End:
        while True:
            with self._changed:
                if self._over:
                    return self.result()
                came = self._more()
            await came.wait()

    def _more(self) -> asyncio.Event:
        """Set in this thread's loop when the next event comes."""
        came = asyncio.Event()
        loop = asyncio.get_running_loop()
        self._wakes.append(lambda: loop.call_soon_threadsafe(came.set))
        return came

    def listen(self, listener: Callable[[Event], object]) -> None:
        """Call `listener` with every event, also past ones, instead of queueing them; in the engine's thread.

        It must not wait for anything of this engine. If it raises, the request is cancelled and the traceback printed.
        """
        with self._changed:
            self._listener = listener
            while self._events:
                self._call(listener, self._events.popleft())

    def tell(self, event: Event) -> None:
        """Add an event; only the engine calls this."""
        with self._changed:
            if self._listener is not None:
                self._call(self._listener, event)
            else:
                self._events.append(event)
            if isinstance(event, End):
                self._over = True
                self._end.set_result(event)
            self._changed.notify_all()
            for wake in self._wakes:
                with suppress(RuntimeError):  # its loop has been closed
                    wake()
            self._wakes.clear()

    def _call(self, listener: Callable[[Event], object], event: Event) -> None:
        try:
            listener(event)
        except Exception:  # noqa: BLE001  a caller's fault, which must not end the requests of others
            threading.excepthook(threading.ExceptHookArgs((*sys.exc_info(), threading.current_thread())))
            self.cancel()
