"""The engine of a service whose replicas are on Ray Serve: what a Desk takes in place of one in its process.

Import it only where Ray may be imported.
"""

import asyncio
import threading
from array import array
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import partial
from secrets import token_hex
from typing import Any
from weakref import WeakKeyDictionary

import ray
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from xlstm_ray.choose import Setup
from xlstm_ray.engine.figures import Figures
from xlstm_ray.engine.request import End, Event, Handle, Piece, Queued, Request
from xlstm_ray.errors import GridLost, ReplicaLost, StateError, XlstmRayError
from xlstm_ray.generation_config import GenerationConfig
from xlstm_ray.sampling.params import require_likeliest
from xlstm_ray.serve.replica import LOST, Call, Told, failed
from xlstm_ray.serve.routes import Mark, Route, Routes, mark_of_state, marks_of
from xlstm_ray.state import RecurrentState
from xlstm_ray.supervisor.presence import LOOK_S, Presence
from xlstm_ray.text.answer import Finish
from xlstm_ray.text.ondisk import TextFile, TokenFile, parcels
from xlstm_ray.text.prompt import Prompt
from xlstm_ray.text.tokenizer import Text

TRIES = 3  # replicas that a request is sent to before its caller is told that they are lost
PARCEL = 4 << 20  # bytes of a prompt's file that travel at once; a shorter one travels with its request
SLACK = 4  # requests that a replica may have more than the least busy one, and still gets what it knows


class Remote:
    """Its requests are done by replicas. readers, decoders: the replicas that read prompts, and those that answer

    from the states of the former; None: readers do both.
    """

    def __init__(self, setup: Setup, readers: DeploymentHandle, decoders: DeploymentHandle | None = None):
        self.config = setup.config
        eos = self.config.eos_token_id
        self.published = GenerationConfig.of(setup.model)
        self.end_tokens = self.published.end_tokens(eos) if self.published else eos
        self._text = Text(setup.model, setup.config)
        self.readers = _Group(readers, setup)
        self.decoders = None if decoders is None else _Group(decoders, setup)
        self.failed: XlstmRayError | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._refs: WeakKeyDictionary[RecurrentState, Any] = WeakKeyDictionary()
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="replicas", daemon=True)
        self._thread.start()
        self.about = self.run(self.readers.ask("about")).result()
        self.slots = self.about.slots
        self._figures: dict[str, Figures] = {}
        self._asking = self.run(self._ask_figures())

    def run(self, work: Any) -> "Future[Any]":
        """Do this in the thread that talks with replicas."""
        return asyncio.run_coroutine_threadsafe(work, self.loop)

    async def watch(self, head: Presence) -> None:
        """Until the head is gone, which Ray itself tells after minutes: then all requests end, and none is taken."""
        while (why := await asyncio.to_thread(head.gone)) is None:
            await asyncio.sleep(LOOK_S)
        self.failed = GridLost(f"{why}, and the replicas with it; start this command again")
        for task in self._tasks:
            task.cancel()

    async def _ask_figures(self) -> None:
        while True:
            groups = [self.readers, *([] if self.decoders is None else [self.decoders])]
            told = await asyncio.gather(*(group.figures(self._figures) for group in groups))
            self._figures = {name: figures for one in told for name, figures in one.items()}
            await asyncio.sleep(LOOK_S)

    def close(self) -> None:
        """End the thread; nothing is asked any more."""
        if not self._asking.cancel():
            self._asking.result()  # a bug
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()

    # -- what an engine has --------------------------------------------------------------------------------------------
    def encode(self, prompt: Prompt, *, tenant: str = "") -> list[int]:
        """As the engine's."""
        return self._text.tokens(prompt, tenant=tenant).tolist()

    def encode_more(self, more: Prompt, after: Sequence[int] = (), *, tenant: str = "") -> list[int]:
        """As the engine's."""
        return self._text.more(more, after, tenant)

    def decode(self, tokens: Sequence[int]) -> str:
        """As the engine's."""
        return self._text.text_of(tokens)

    def figures(self) -> dict[str, Figures]:
        """Of each replica, as it has told last."""
        return self._figures

    def submit_n(self, request: Request) -> list[Handle]:
        """As the engine's; what a replica finds wrong comes as the error of an End."""
        require_likeliest(request.prompt_logprobs)
        if request.sampling is not None:
            request.sampling.require_vocabulary(self.config.vocab_size)
        marks: list[Mark] = []
        if request.state is not None:
            marks = [mark_of_state(request.state.tokens[0], request.state.prompt_hash[0], request.tenant)]
        elif request.prompt is not None:
            about, prompt = self.about, request.prompt
            tokens: TokenFile | memoryview
            cut: TokenFile | array[int]
            if isinstance(prompt, TextFile | TokenFile):
                tokens = cut = self._text.on_disk(prompt)
            else:
                tokens = self._text.tokens(prompt, tenant=request.tenant).numpy().data
                cut = array("i", tokens.tobytes())  # it travels in a tenth of the time that a list takes
            marks = marks_of(tokens, tile=about.tile_size, chunk=about.chunk_size, salt=request.tenant)
            if not request.keep:  # a kept state knows its text
                request = replace(request, prompt=cut)
        asked = _Asked(self, request, marks)
        self.loop.call_soon_threadsafe(self._begin, asked)
        return asked.handles

    def _begin(self, asked: "_Asked") -> None:
        task = self.loop.create_task(asked.run())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def ref_of(self, state: RecurrentState) -> Any:
        """A reference to a state's bytes."""
        if state not in self._refs:
            data = await asyncio.to_thread(state.to_bytes)
            self._refs[state] = await asyncio.to_thread(ray.put, data)
        return self._refs[state]


class _Group:
    """The replicas of one kind."""

    def __init__(self, handle: DeploymentHandle, setup: Setup):
        self.handle = handle
        self.routes = Routes(slack=SLACK, state_bytes=setup.config.state_file_bytes(1))

    async def ask(self, method: str, **fields: Any) -> Any:
        """Call a method of any replica, or of the one that `order` says."""
        return await getattr(self.handle, method).remote(Call(token_hex(8), **fields))

    async def figures(self, before: Mapping[str, Figures]) -> dict[str, Figures]:
        """Of all replicas; of one that does not answer soon, what it has told before."""
        there: list[str] = []

        def first(names: list[str]) -> list[str]:
            there[:] = names
            return names

        async def of(order: Callable[[list[str]], list[str]]) -> dict[str, Figures]:
            try:
                return dict([await asyncio.wait_for(self.ask("figures", order=order), LOOK_S)])
            except (*LOST, TimeoutError):
                return {}

        told = await of(first)
        rest = [partial(sorted, key=name.__ne__) for name in there if name not in told]
        for one in await asyncio.gather(*map(of, rest)):
            told |= one
        return {name: figures for name in there if (figures := told.get(name) or before.get(name)) is not None}


@dataclass
class _Asked:
    """One request, from its way to a replica to its last event."""

    remote: Remote
    request: Request
    marks: list[Mark]
    handles: list[Handle] = field(default_factory=list)
    cancelled: set[int] = field(default_factory=set)
    route: Route | None = None
    response: Any = None
    call: Call | None = None
    group: _Group | None = None
    queued: set[int] = field(default_factory=set)  # answers of which it was told
    moved: bool = False  # whether a state was fetched for it
    told: bool = False  # whether a piece was handed on
    read: Told | None = None  # the end of the reading, where another replica answers
    left: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        count = 1 if self.request.sampling is None else self.request.sampling.n
        self.handles = [Handle(partial(self.cancel, n)) for n in range(count)]
        self.left = set(range(count))

    async def run(self) -> None:
        """Ask until it is answered. Every answer has an End."""
        error: XlstmRayError = ReplicaLost("the replica that worked on this is lost; try again")
        try:
            if self.remote.failed is not None:
                return
            for _ in range(TRIES):
                try:
                    await self._answer()
                    return
                except LOST as lost:
                    if isinstance(lost, RayTaskError) and not isinstance(lost.cause, RayError):
                        raise
                    if self.told or self.cancelled >= self.left:
                        return
        except asyncio.CancelledError:  # the head is gone
            raise
        except BaseException:
            error = XlstmRayError("a fault of this program; a replica's log has the traceback")
            raise
        finally:
            for n in list(self.left):
                end = failed(error)
                self._tell(n, replace(end, finish=Finish("cancelled"), error=None) if n in self.cancelled else end)

    async def _answer(self) -> None:
        """By a replica that does both, or by one that reads and another that goes on from its state."""
        remote, request, state = self.remote, replace(self.request, state=None), self.request.state
        ref = () if state is None else (await remote.ref_of(state),)
        if remote.decoders is None or request.sampling is None:
            await self._ask(remote.readers, request, ref)
            return
        reading = replace(request, sampling=None, keep=True)
        self.read = None
        await self._ask(remote.readers, reading, ref)
        if self.read is not None:
            self.marks = []
            await self._ask(remote.decoders, replace(request, append=None, prompt_logprobs=None), self.read.state)

    async def _ask(self, group: _Group, request: Request, state: tuple[Any, ...]) -> None:
        """Hand on what a replica says."""
        self.route = route = Route(group.routes, self.marks)
        self.group = group
        self.call = call = Call(token_hex(8), route.order, route.sent, request, state)
        route.call, route.moves = call, request.prompt is not None and not state and request.prompt_logprobs is None
        begun = False
        try:
            await self._send(group, call)
            self.response = group.handle.options(stream=True).answer.remote(call)
            async for name, found, moved in self.response:
                if not begun:
                    begun = True
                    route.sent(name)
                    if self.cancelled:
                        self._send_cancel()
                if moved is not None:
                    group.routes.moved(*moved)
                    self.moved = True
                for told in found:
                    if request.sampling is None and self.request.sampling is not None:
                        self._take_read(told, name)
                    else:
                        await self._take(told, name)
            if not begun:
                raise RayServeException("the replica has no parcels of this prompt")
        except LOST:
            if route.replica is not None and not self.cancelled >= self.left:
                group.routes.gone(route.replica)
            raise
        finally:
            route.end()
            self.response = None

    async def _send(self, group: _Group, call: Call) -> None:
        """Send a long prompt, parcel by parcel, to the replica that the call then goes to."""
        assert call.request is not None
        assert self.route is not None
        for name, file in (("prompt", call.request.prompt), ("append", call.request.append)):
            if not isinstance(file, TextFile | TokenFile) or file.size <= PARCEL:
                continue
            call.filled, call.ids, self.route.moves = name, isinstance(file, TokenFile), False
            empty: dict[str, Any] = {name: None}
            call.request = replace(call.request, **empty)
            left = parcels(file, PARCEL)
            while (parcel := await asyncio.to_thread(next, left, None)) is not None:
                if self.cancelled >= self.left:
                    raise RayServeException("nobody waits for it")
                there = await group.handle.take.remote(Call(call.number, call.order, call.sent, parcel=parcel))
                call.order = partial(sorted, key=there.__ne__)

    def _take_read(self, told: Told, name: str) -> None:
        """What is said of the prompt goes to all its answers; its End is kept for the second replica."""
        event = told.event
        if not isinstance(event, End):
            for n in list(self.left):
                self._tell(n, event, name)
        elif event.finish.reason == "stop":
            self._learn(event)
            self.read = told
        else:
            for n in list(self.left):
                self._tell(n, event)

    def _learn(self, end: End) -> None:
        usage = end.usage
        done_s = usage.total_s if usage.first_token_s is None else usage.first_token_s
        self.remote.readers.routes.read(usage.prompt_tokens - usage.resumed_tokens, done_s - usage.queued_s)

    async def _take(self, told: Told, name: str) -> None:
        event = told.event
        if isinstance(event, End):
            event = await self._end(event, told.state)
        self._tell(told.answer, event, name)

    async def _end(self, end: End, state: tuple[Any, ...]) -> End:
        if self.read is None:
            self._learn(end)
        elif isinstance(self.read.event, End):  # the prompt's figures are those of who has read it
            first, usage = self.read.event, end.usage
            began_s = None if usage.first_token_s is None else first.usage.total_s + usage.first_token_s
            usage = replace(
                first.usage,
                answer_tokens=usage.answer_tokens,
                first_token_s=began_s,
                total_s=first.usage.total_s + usage.total_s,
            )
            end = replace(end, usage=usage, prompt_logprobs=first.prompt_logprobs)
        if not state:
            return end
        try:
            data = await state[0]
            return replace(end, state=await asyncio.to_thread(RecurrentState.from_bytes, data, "the state"))
        except StateError as error:
            return replace(end, finish=Finish("error"), error=error)

    def _tell(self, answer: int, event: Event, replica: str = "") -> None:
        if isinstance(event, Queued):
            if answer in self.queued:  # at the replica before
                return
            self.queued.add(answer)
            use = event.use._replace(tier="replica") if self.moved and event.use.tier else event.use
            event = event._replace(replica=replica, use=use)
        elif isinstance(event, End):
            self.left.discard(answer)
        self.told = self.told or isinstance(event, Piece)
        self.handles[answer].tell(event)

    def cancel(self, answer: int) -> None:
        """Cancel an answer; from any thread."""
        self.remote.loop.call_soon_threadsafe(self._cancel, answer)

    def _cancel(self, answer: int) -> None:
        self.cancelled.add(answer)
        if self.response is None:
            return
        if self.route is not None and self.route.replica is not None:
            self._send_cancel()
        elif self.cancelled >= self.left:
            self.response.cancel()

    def _send_cancel(self) -> None:
        """To the replica that works on it. A prompt is read while any of its answers is wanted."""
        assert self.route is not None
        assert self.group is not None
        assert self.call is not None
        assert self.call.request is not None
        reads = self.call.request.sampling is None
        if reads and not self.cancelled >= self.left:
            return
        replica = self.route.replica

        def order(there: list[str]) -> list[str]:
            return sorted(there, key=lambda name: name != replica)

        answers = (0,) if reads else tuple(self.cancelled)
        self.group.handle.cancel.remote(Call(self.call.number, order, answers=answers))
