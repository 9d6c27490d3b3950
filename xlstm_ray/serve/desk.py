"""The desk: how many answers are under way, whether there is an engine yet, and whether new ones are taken."""

import asyncio
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Protocol

from xlstm_ray.config import ModelConfig
from xlstm_ray.engine.figures import Figures
from xlstm_ray.engine.request import End, Event, Handle, Request
from xlstm_ray.errors import XlstmRayError
from xlstm_ray.generation_config import GenerationConfig
from xlstm_ray.serve.limits import Account
from xlstm_ray.serve.metrics import Gauge, Metrics
from xlstm_ray.serve.options import Options
from xlstm_ray.serve.refusals import Refused, without_paths
from xlstm_ray.text.prompt import Prompt

LOADING_S, FULL_S, DRAINING_S = 5, 1, 5  # after so many seconds a caller may try again


SHORT = 512  # characters or tokens that are cut and checked within a millisecond


class Serves(Protocol):
    """What answers: an `Engine` in this process, or `Remote` replicas of one; each member as in Engine."""

    config: ModelConfig
    published: GenerationConfig | None

    @property
    def end_tokens(self) -> Sequence[int]: ...
    @property
    def failed(self) -> XlstmRayError | None: ...
    def encode(self, prompt: Prompt, *, tenant: str = "") -> list[int]: ...
    def encode_more(self, more: Prompt, after: Sequence[int] = (), *, tenant: str = "") -> list[int]: ...
    def decode(self, tokens: Sequence[int]) -> str: ...
    def submit_n(self, request: Request) -> list[Handle]: ...
    def figures(self) -> Mapping[str, Figures]: ...


class Desk:
    """Takes requests to the engine, from the thread of the app's event loop."""

    def __init__(self, options: Options):
        self.options, self.slots = options, 0
        self._engine: Serves | None = None
        self.draining = False
        self.metrics = Metrics(options.name, options.metrics, self._gauges, self._figures)
        self._handles: dict[int, Handle] = {}
        self._told: deque[tuple[Handle, Callable[[Event], None], Event]] = deque()
        self._woken = False  # whether the loop is to hand them out
        self._admitted = 0
        self._accounts = {options.tenant(key): Account(key) for key in options.keys} or {"": Account()}

    def open(self, engine: Serves, slots: int) -> None:
        """Take requests from now on; the engine serves. From any thread."""
        self.slots, self._engine = slots, engine

    @property
    def engine(self) -> Serves:
        """Raises Refused while there is none, or no more."""
        if self.draining:
            raise Refused(503, "this service is stopping", code="draining", retry_s=DRAINING_S)
        if self._engine is None:
            raise Refused(503, "the model is being loaded", code="loading", retry_s=LOADING_S)
        if self._engine.failed is not None:
            why = without_paths(str(self._engine.failed))
            raise Refused(503, f"this service has failed: {why}", code="failed", retry_s=DRAINING_S)
        return self._engine

    def load(self) -> dict[str, object]:
        """What it does now."""
        error = None
        try:
            _ = self.engine
        except Refused as refused:
            error = refused
        caches = [figures.kept for figures in self._figures().values() if figures.kept is not None]
        used = Counter[str]()
        for cache in caches:
            used.update(cache.bytes)
        return {
            "status": "ready" if error is None else error.code,
            "error": error.message if error is not None and error.code == "failed" else None,
            "model": self.options.name,
            "slots": self.slots,
            "queue": self.options.queue,
            "running": self.metrics.running,
            "waiting": self.metrics.waiting,
            "cache": {
                "states": sum(cache.states for cache in caches),
                "bytes": used,
                "unwritten": sum(cache.unwritten for cache in caches),
            }
            if caches
            else None,
        }

    def require_model(self, name: str | None) -> None:
        """Raise Refused unless this is the name of the model, or none."""
        own = self.options.name
        if name is not None and name != own:
            text = f"there is no model {name[:80]!r} here; this service has {own!r}"
            raise Refused(404, text, param="model", code="model_not_found")

    @property
    def state_bytes(self) -> int:
        """Of the state of one prompt; 0 as long as there is no model."""
        return 0 if self._engine is None else self._engine.config.state_file_bytes(1)

    def account(self, tenant: str) -> Account:
        """What a caller may still ask for."""
        return self._accounts.get(tenant) or Account()  # a document may outlive its key

    @property
    def under_way(self) -> int:
        """How many answers are asked for and have not ended."""
        return self._admitted

    def admit(self, count: int, param: str = "n") -> None:
        """Let so many answers in. Raises Refused where there is no room for them."""
        most = self.slots + self.options.queue
        if count > most:
            raise Refused(400, f"{count} answers were asked for at once; this service has room for {most}", param=param)
        if self._admitted + count > most:
            raise Refused(503, f"{self._admitted} answers are under way; try again", code="full", retry_s=FULL_S)
        self._admitted += count

    def release(self, count: int) -> None:
        """So many have ended."""
        self._admitted -= count

    async def submit(self, request: Request, hears: Sequence[Callable[[Event], None]]) -> list[Handle]:
        """Begin a request. Raises Refused.

        hears: for each of its answers, what hears its events, in the loop's thread; the last is an End, always.
        """
        loop, engine = asyncio.get_running_loop(), self._engine
        assert engine is not None
        try:
            if _is_short(request):
                handles = engine.submit_n(request)
            else:
                handles = await asyncio.to_thread(engine.submit_n, request)  # it cuts a text into tokens
        except XlstmRayError as err:
            raise Refused.of(err) from None
        for handle, hear in zip(handles, hears, strict=True):
            self._handles[id(handle)] = handle
            handle.listen(partial(self._pass_on, loop, handle, hear))
        return handles

    def _pass_on(
        self, loop: asyncio.AbstractEventLoop, handle: Handle, hear: Callable[[Event], None], event: Event
    ) -> None:
        """From the engine's thread to the loop's, which is woken once for all that has come meanwhile."""
        self._told.append((handle, hear, event))
        if not self._woken:
            self._woken = True
            with suppress(RuntimeError):  # the loop has been closed: nobody listens
                loop.call_soon_threadsafe(self._hand_out)

    def _hand_out(self) -> None:
        self._woken = False  # before it looks: what comes after its last look wakes it again
        while self._told:
            handle, hear, event = self._told.popleft()
            if isinstance(event, End):
                self._handles.pop(id(handle), None)
            hear(event)

    def cancel_all(self) -> None:
        """Nothing that is under way is waited for any longer."""
        for handle in list(self._handles.values()):
            handle.cancel()

    def _gauges(self, running: int) -> Iterator[Gauge]:
        """What Prometheus is told of now."""
        used = min(running, self.slots)
        yield "slots_total", "Requests that can be worked on at once.", self.slots
        yield "slots_used", "Requests that are worked on.", used
        part = used / max(1, self.slots)
        yield "kv_cache_usage_perc", "The part of the slots that is used, as vLLM calls it.", part

    def _figures(self) -> Mapping[str, Figures]:
        return {} if self._engine is None else self._engine.figures()


def _is_short(request: Request) -> bool:
    """Whether it is handed in sooner than a thread would begin to. A given state is checked, and may be large."""
    prompt = request.prompt
    return request.state is None and isinstance(prompt, str | list) and len(prompt) <= SHORT
