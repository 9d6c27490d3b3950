"""What a caller asks of an engine that serves many, and what it is told."""

import asyncio
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from queue import SimpleQueue
from threading import Lock
from typing import NamedTuple

from torch import Tensor

from xlstm_ray.engine.decode import Made
from xlstm_ray.engine.result import Use
from xlstm_ray.errors import XlstmRayError
from xlstm_ray.sampling import Sampling
from xlstm_ray.state import RecurrentState
from xlstm_ray.text.answer import Finish
from xlstm_ray.text.prompt import Prompt


@dataclass(frozen=True)
class Request:
    """A prompt to read, and an answer to make where `sampling` is given.

    prompt: the whole of it, a text or token ids; append: only what comes after `state`, in its place. state: to go on
    from; it stays as it is. priority: a higher one comes first. keep: whether the state after it is wanted. tenant,
    keep_at: of the cache, where the engine has one, as in `Engine.prefill`.
    """

    prompt: Prompt | None = None
    append: Prompt | None = None
    state: RecurrentState | None = None
    sampling: Sampling | None = None
    priority: int = 0
    keep: bool = False
    tenant: str = ""
    keep_at: Sequence[int] = ()


class Queued(NamedTuple):
    """It waits behind so many others."""

    ahead: int


class Reading(NamedTuple):
    """So many of the prompt's tokens are in the state."""

    tokens_done: int
    tokens_total: int


class Piece(NamedTuple):
    """What a token adds to the text that is shown, which may be nothing yet."""

    text: str
    token: int | None  # None for text that was held back until the end
    made: Made | None = None  # log-probabilities, where they were asked for


@dataclass(frozen=True)
class Usage:
    """Tokens, and seconds since the request was made: to its first window, to the prompt's end and to its own."""

    prompt_tokens: int
    resumed_tokens: int  # of the prompt, found in the given state or in the cache
    answer_tokens: int
    queued_s: float
    first_token_s: float | None
    total_s: float
    cache: Use = Use()


@dataclass(frozen=True)
class End:
    """The last event. finish: of the answer; reason `stop` with nothing else where only the prompt was to be read.

    logits (vocabulary,) float32 after the prompt's last token. state: where it was to be kept; of a request that was
    cancelled while its prompt was read it is what resumes there. error: for the reason `error`.
    """

    finish: Finish
    text: str
    tokens: list[int]
    usage: Usage
    logits: Tensor | None = field(default=None, repr=False)
    state: RecurrentState | None = None
    error: XlstmRayError | None = None


Event = Queued | Reading | Piece | End


class Handle:
    """A request on its way: iterate over its events, or wait for its `result`; in asyncio, `async for` or `await`.

    Every event is handed out once, to whichever of these asks.
    """

    def __init__(self, cancel: Callable[[], None]):
        self._cancel = cancel
        self._lock = Lock()
        self._events: SimpleQueue[Event] = SimpleQueue()
        self._listener: Callable[[Event], object] | None = None
        self._end: Future[End] = Future()

    def cancel(self) -> None:
        """It is not wanted any more. Its last event comes all the same: `cancelled`, if that was in time."""
        self._cancel()

    def result(self, timeout_s: float | None = None) -> End:
        """Its end. Raises its error, where it has one, and TimeoutError after timeout_s."""
        end = self._end.result(timeout_s)
        if end.error is not None:
            raise end.error
        return end

    @property
    def done(self) -> bool:
        return self._end.done()

    def __iter__(self) -> Iterator[Event]:
        while True:
            event = self._events.get()
            yield event
            if isinstance(event, End):
                return

    async def __aiter__(self) -> AsyncIterator[Event]:
        loop, events = asyncio.get_running_loop(), asyncio.Queue[Event]()
        self.listen(lambda event: loop.call_soon_threadsafe(events.put_nowait, event))
        while True:
            event = await events.get()
            yield event
            if isinstance(event, End):
                return

    def __await__(self) -> Generator[object, None, End]:
        return self._wait().__await__()

    async def _wait(self) -> End:
        await asyncio.wrap_future(self._end)
        return self.result()

    def listen(self, listener: Callable[[Event], object]) -> None:
        """Call this with every event, those that have come too, instead of keeping them. From the engine's thread."""
        with self._lock:
            self._listener = listener
            while not self._events.empty():
                listener(self._events.get())

    def tell(self, event: Event) -> None:
        """The engine's: something has happened."""
        with self._lock:
            if self._listener is not None:
                self._listener(event)
            else:
                self._events.put(event)
        if isinstance(event, End):
            self._end.set_result(event)
