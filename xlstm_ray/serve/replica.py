"""What runs on Ray Serve: a replica with the model in its process, and the calls that it takes.

Import it only where Ray may be imported.
"""

import asyncio
import logging
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from tempfile import TemporaryFile
from time import monotonic
from typing import IO, Any, NamedTuple

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from xlstm_ray.choose import Setup
from xlstm_ray.engine.engine import Engine
from xlstm_ray.engine.figures import Figures
from xlstm_ray.engine.request import End, Event, Handle, Piece, Request, Usage
from xlstm_ray.errors import StateError, XlstmRayError
from xlstm_ray.serve.options import Slots
from xlstm_ray.serve.warm import begin
from xlstm_ray.state import RecurrentState
from xlstm_ray.supervisor.ray_inside import job_has_ended
from xlstm_ray.text.answer import Finish
from xlstm_ray.text.ondisk import TextFile, TokenFile
from xlstm_ray.threads import collect_seldom, settle

TOGETHER_S = 0.02  # pieces of one answer within this time travel together: each message costs the asker a millisecond
STATES = 8  # given states that a replica keeps, so that the next question finds them
LOST = RayError, RayServeException
CANCELS = 256  # cancels that have overtaken their requests
FILES = 8  # prompts that a replica has got in parcels, and was not asked about yet


@dataclass
class Call:
    """A call of a replica. request: without its state, which is in the object store: `state` is (its reference,).

    source: the replica whose state of the prompt is to be fetched; None: none is. parcel: of a long prompt, which a
    replica takes before it is asked: then `filled` is the field of the request that is in them. ids: they have token
    ids, not a text.

    order, sent: stay in the asker's process. They say which replicas are best, and hear which one it is.
    """

    number: str
    order: Callable[[list[str]], list[str]] | None = None
    sent: Callable[[str], None] | None = None
    request: Request | None = None
    state: tuple[Any, ...] = ()
    source: str | None = None
    answers: tuple[int, ...] = ()  # that are cancelled
    parcel: bytes = b""
    filled: str = ""
    ids: bool = False

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "order": None, "sent": None}


class Told(NamedTuple):
    """What has happened to an answer. state: () or a reference to the bytes of the End's state."""

    answer: int
    event: Event
    state: tuple[Any, ...] = ()


class Said(NamedTuple):
    """What a replica has to say. moved: the bytes of a state that it has fetched, and the seconds that this took."""

    replica: str
    told: list[Told]
    moved: tuple[int, float] | None = None


class About(NamedTuple):
    """What there is to know about replicas; all are alike."""

    slots: int
    tile_size: int
    chunk_size: int


@serve.deployment
class Replica:
    """The model, for many requests at once. Serve calls plain methods in threads; these are all of the loop's."""

    def __init__(self, setup: Setup, slots: Slots, job: str | None):
        collect_seldom()
        self._job = job
        self._engine = Engine(setup)
        self._slots = begin(self._engine, slots)
        settle()
        self._name = serve.get_replica_context().replica_id.unique_id
        self._handles: dict[str, list[Handle]] = {}
        self._early: deque[Call] = deque(maxlen=CANCELS)
        self._states: OrderedDict[str, RecurrentState] = OrderedDict()
        self._files: OrderedDict[str, IO[bytes]] = OrderedDict()

    async def about(self, _call: Call) -> About:
        sizes = self._engine.numerics
        return About(self._slots, sizes.tile_size, sizes.chunk_size)

    async def figures(self, _call: Call) -> tuple[str, Figures]:
        """What it has done, under its name."""
        return self._name, self._engine.figures()[""]

    async def take(self, call: Call) -> str:
        """A parcel of a prompt that it will be asked about. Returns its name."""
        if call.number not in self._files:
            self._files[call.number] = TemporaryFile()
            while len(self._files) > FILES:
                self._files.popitem(last=False)[1].close()
        await asyncio.to_thread(self._files[call.number].write, call.parcel)
        return self._name

    async def answer(self, call: Call) -> AsyncIterator[Said]:
        """The events of a request until its last answer's end; nothing where its parcels are elsewhere."""
        loop, events = asyncio.get_running_loop(), asyncio.Queue[tuple[int, Event]]()
        assert call.request is not None
        if call.filled and call.number not in self._files:
            return
        if call.source not in (None, self._name):
            yield Said(self._name, [], await self._fetch(call))
        try:
            given: dict[str, Any] = {"state": await self._state(call.state)}
            if call.filled:
                given[call.filled] = await asyncio.to_thread(self._file, call)
            request = replace(call.request, **given)
            handles = await asyncio.to_thread(self._engine.submit_n, request)
        except XlstmRayError as error:
            count = 1 if call.request.sampling is None else call.request.sampling.n
            yield Said(self._name, [Told(n, failed(error)) for n in range(count)])
            return
        self._handles[call.number] = handles
        for n, handle in enumerate(handles):
            handle.listen(partial(_pass_on, loop, events, n))
        for early in [one for one in self._early if one.number == call.number]:
            self._cancel(early)
        left, quiet = len(handles), 0.0
        try:
            while left:
                found = [await events.get()]
                if isinstance(found[0][1], Piece):
                    await asyncio.sleep(quiet - monotonic())
                while not events.empty():
                    found.append(events.get_nowait())
                left -= sum(isinstance(event, End) for _, event in found)
                yield Said(self._name, [await self._told(n, event) for n, event in found])
                if any(isinstance(event, Piece) for _, event in found):
                    quiet = monotonic() + TOGETHER_S
        finally:
            del self._handles[call.number]
            for handle in handles:
                handle.cancel()

    def _file(self, call: Call) -> TextFile | TokenFile:
        """The prompt that has come in parcels."""
        file = self._files.pop(call.number)
        file.flush()
        return TokenFile(file) if call.ids else TextFile(file)

    async def lend(self, call: Call) -> bytes | None:
        """The longest state of a prompt that is here, for another replica."""
        assert call.request is not None
        assert call.request.prompt is not None
        state = await asyncio.to_thread(self._engine.lend, call.request.prompt, call.request.tenant)
        return None if state is None else await asyncio.to_thread(state.to_bytes)

    async def _fetch(self, call: Call) -> tuple[int, float] | None:
        """Get the state that another replica has of this prompt; where that fails, it is computed here."""
        began, here = monotonic(), serve.get_replica_context()
        others = serve.get_deployment_handle(here.deployment, here.app_name)

        def order(there: list[str]) -> list[str]:  # if it is slow to say whether it has room, no other is of use
            return [call.source] if call.source in there else there

        try:
            data = await others.lend.remote(Call(call.number, order, request=call.request))
            if data is None:
                return None
            state = await asyncio.to_thread(RecurrentState.from_bytes, data, f"the state of {call.source}")
            await asyncio.to_thread(self._engine.borrow, state)
        except (*LOST, StateError) as error:
            logging.getLogger("ray.serve").warning("no state was fetched: %s", error)
            return None
        return len(data), monotonic() - began

    async def cancel(self, call: Call) -> None:
        """Cancel answers of a request; each still has its end."""
        self._cancel(call)

    def _cancel(self, call: Call) -> None:
        handles = self._handles.get(call.number)
        if handles is None:
            self._early.append(call)
            return
        for n in call.answers:
            handles[n].cancel()

    async def check_health(self) -> None:
        """Serve asks every few seconds, and replaces a replica that raises here.

        Where the program that asks is gone (nothing else outlives a kill -9 of it), its replicas go, too.
        """
        if self._engine.failed is not None:
            raise self._engine.failed
        if self._job is not None and await asyncio.to_thread(job_has_ended, self._job):
            for handle in [one for handles in self._handles.values() for one in handles]:
                handle.cancel()
            name = serve.get_replica_context().app_name
            await asyncio.to_thread(serve.delete, name, _blocking=False)

    async def _state(self, given: tuple[Any, ...]) -> RecurrentState | None:
        """The state behind a reference."""
        if not given:
            return None
        key = given[0].hex()
        if key not in self._states:
            data = await given[0]
            state = self._states[key] = await asyncio.to_thread(RecurrentState.from_bytes, data, "the given state")
            state.name = "the given state"
            while len(self._states) > STATES:
                self._states.popitem(last=False)
        self._states.move_to_end(key)
        return self._states[key]

    async def _told(self, answer: int, event: Event) -> Told:
        if not isinstance(event, End):
            return Told(answer, event)
        state = () if event.state is None else (await asyncio.to_thread(_put, event.state),)
        return Told(answer, replace(event, state=None, logits=None), state)


def failed(error: XlstmRayError) -> End:
    """The end of what could not begin."""
    nothing = Usage(prompt_tokens=0, resumed_tokens=0, answer_tokens=0, queued_s=0.0, first_token_s=None, total_s=0.0)
    return End(Finish("error"), "", [], nothing, error=error)


def _pass_on(
    loop: asyncio.AbstractEventLoop, events: "asyncio.Queue[tuple[int, Event]]", answer: int, event: Event
) -> None:
    """From the engine's thread to the loop's."""
    with suppress(RuntimeError):  # the loop has been closed: nobody listens
        loop.call_soon_threadsafe(events.put_nowait, (answer, event))


def _put(state: RecurrentState) -> Any:
    return ray.put(state.to_bytes())
