"""Documents: prompts that are read once, under a name, and asked many times. They outlive who sent them."""

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import IO, Any, Literal

from xlstm_ray.engine.request import End, Event, Handle, Queued, Reading, Request
from xlstm_ray.errors import OutputError, StateError, XlstmRayError
from xlstm_ray.files import shown_bytes
from xlstm_ray.serve.desk import LOADING_S, Desk
from xlstm_ray.serve.metrics import Track, both
from xlstm_ray.serve.refusals import Refused
from xlstm_ray.serve.shelf import Record, Shelf, Status
from xlstm_ray.state import RecurrentState

PRIORITY = -1  # who asks goes before what is read for later
AGAIN_S = 2  # seconds after which a document may be ready
OPEN = "queued", "reading"
AT_ONCE = 1 << 16  # characters or tokens of a prompt that waits for no other one to be cut


class _Stopped(Exception):
    """It was stopped before it was handed in."""


@dataclass
class Document:
    """record: what is kept of it on disk. prompt: its file, until it was read. tokens_done of tokens_total are in its

    state. cut: of a long text, the characters that were cut into tokens, and all.
    """

    record: Record
    state: RecurrentState | None = None
    prompt: IO[bytes] | None = None
    cut: tuple[int, int] | None = None
    turn: "asyncio.Task[Literal[True]] | None" = None  # it waits until other texts were cut
    tokens_done: int = 0
    tokens_total: int | None = None
    began: tuple[float, int] | None = None  # perf_counter time, and tokens done then
    rate: float | None = None  # tokens a second
    handle: Handle | None = None
    stop_as: Status | None = None  # what it is to be when it has stopped; None: it is not to stop
    leaving: bool = False  # nobody may ask for it any more
    timer: asyncio.TimerHandle | None = None
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def open(self) -> bool:
        """Whether it is being worked on."""
        return self.record.status in OPEN

    def info(self) -> dict[str, Any]:
        """As replies tell it."""
        record, total = self.record, self.tokens_total
        left = None if total is None or not self.rate or not self.open else (total - self.tokens_done) / self.rate
        return {
            "id": record.name,
            "object": "state",
            "created": int(record.created),
            "status": record.status,
            "tokens_done": self.tokens_done,
            "tokens_total": total,
            "characters_done": None if self.cut is None else self.cut[0],
            "characters_total": None if self.cut is None else self.cut[1],
            "tokens_per_s": self.rate if self.open else None,
            "seconds_left": left,
            "ttl": record.ttl,
            "error": record.error,
        }


class Documents:
    """All documents of a service, of all tenants; used in the thread of the app's event loop."""

    def __init__(self, desk: Desk, shelf: Shelf, budget: int):
        self._desk, self.shelf, self.budget = desk, shelf, budget
        self._cutting = asyncio.Lock()  # texts that are cut one after the other, so that requests are cut beside one
        self._all: dict[tuple[str, str], Document] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self.restored = False  # whether they are known

    # -- what callers do -----------------------------------------------------------------------------------------------
    def of(self, tenant: str) -> list[Document]:
        """The documents of a tenant, the oldest first. Raises Refused until they are known."""
        self._require_restored()
        return [one for (owner, _), one in self._all.items() if owner == tenant and not one.leaving]

    def room(self, tenant: str) -> dict[str, int]:
        """How many documents a tenant has, and the bytes that all states take and may take."""
        size = self._desk.state_bytes
        return {"states": len(self.of(tenant)), "bytes": len(self._all) * size, "most": self.budget}

    def get(self, tenant: str, name: str) -> Document:
        """Raises Refused where there is none of that name, and until they are known."""
        self._require_restored()
        document = self._all.get((tenant, name))
        if document is None or document.leaving:
            raise Refused(404, f"there is no state {name[:100]!r} here", param="state", code="state_not_found")
        self._touch(document)
        return document

    async def state(self, tenant: str, name: str) -> RecurrentState:
        """The state of a document that was read. Raises Refused where it is not ready."""
        document = self.get(tenant, name)
        if document.record.status != "ready":
            total = "?" if document.tokens_total is None else f"{document.tokens_total:,}"
            done = f"{document.tokens_done:,} of {total} tokens"
            raise Refused(
                409,
                f"the state {name!r} is {document.record.status}, with {done}",
                param="state",
                code="state_not_ready",
                retry_s=AGAIN_S,
            )
        if document.state is None:
            try:
                document.state = await asyncio.to_thread(self.shelf.load, document.record)
            except StateError as err:
                raise Refused.of(err) from None
        return document.state

    def require_room(self, record: Record) -> None:
        """Raise Refused where the name is taken, or no more states may be here."""
        if (record.tenant, record.name) in self._all:
            text = f"there is a state {record.name!r}; delete it first, or choose another name"
            raise Refused(409, text, param="id", code="state_exists")
        size = self._desk.state_bytes
        if (len(self._all) + 1) * size > self.budget:
            there = f"{len(self._all)} states of {shown_bytes(size)} are here" if self._all else "there is no room"
            text = f"{there}, and all may take {shown_bytes(self.budget)} (`states_mb`), each {shown_bytes(size)}"
            raise Refused(400, f"{text}; delete one" if self._all else text, code="states_full")
        most, own = self._desk.account(record.tenant).states_bytes, len(self.of(record.tenant))
        if most is not None and (own + 1) * size > most:
            raise Refused(
                400,
                f"this key has {own} states of {shown_bytes(size)}, and all of its may take {shown_bytes(most)}; "
                "delete one",
                code="states_full",
            )

    async def add(self, record: Record, given: RecurrentState | Path) -> Document:
        """Begin to read a document, or take a state that is whole. Raises Refused and XlstmRayError.

        given: that state, or the prompt, a file of the shelf's `room` as the record says.
        """
        state = given if isinstance(given, RecurrentState) else None
        if record.base is not None:  # its own from now on: another one may have that name later
            state = await self.state(record.tenant, record.base)
        self.require_room(record)
        self._desk.admit(1)
        document = Document(record, state)
        self._all[record.tenant, record.name] = document  # the name is taken from now on
        try:
            if isinstance(given, Path):
                document.prompt = await asyncio.to_thread(self.shelf.take, record, given)
            else:
                assert state is not None
                length = document.tokens_done = document.tokens_total = await self._checked(record.tenant, state)
                record = record.now("ready", tokens=length)
            await asyncio.to_thread(self.shelf.write, record, state)
        except (Refused, XlstmRayError):
            self._desk.release(1)
            await self._forget(document)
            raise
        document.record = record
        self._touch(document)
        if document.open:
            self._begin(document, state)
        else:
            self._desk.release(1)
            document.ended.set()
        return document

    def cancel(self, document: Document, status: Status = "cancelled") -> None:
        """Stop to read it; what was computed stays."""
        if document.open:
            document.stop_as = status
            if document.handle is not None:
                document.handle.cancel()
            if document.turn is not None:
                document.turn.cancel()

    async def resume(self, document: Document) -> None:
        """Read the rest of a document that was stopped. Raises Refused."""
        if document.record.status not in ("cancelled", "parked", "failed") or document.record.source is None:
            text = f"the state {document.record.name!r} is {document.record.status}: nothing is left to read"
            raise Refused(409, text, code="state_not_stopped")
        before, document.record = document.record, document.record.now("queued")
        document.stop_as = None
        await self._start(document, before)

    async def remove(self, document: Document) -> None:
        """It goes, whatever is done with it."""
        document.leaving = True
        self._touch(document)
        self.cancel(document)
        if document.open:
            await document.ended.wait()
        await self._forget(document)

    # -- what the service does -----------------------------------------------------------------------------------------
    async def restore(self) -> None:
        """Know what an earlier service has left. Before the desk opens."""
        for record in await asyncio.to_thread(self.shelf.read):
            total = record.tokens if record.status == "ready" else None
            begun = record.status in (*OPEN, "parked")
            document = Document(
                record.now("queued") if begun else record, tokens_done=record.tokens or 0, tokens_total=total
            )
            self._all[record.tenant, record.name] = document
            self._touch(document)
        self.restored = True

    async def go_on(self) -> None:
        """Read on what an earlier service had begun."""
        for document in list(self._all.values()):
            if document.open:
                with suppress(Refused):  # there is no room now
                    await self._start(document, document.record.now("parked"))

    def park(self) -> None:
        """Stop to read: the next service goes on with them, where they outlive this one; else nobody can ask them."""
        for document in self._all.values():
            self.cancel(document, "parked")

    # ------------------------------------------------------------------------------------------------------------------
    def _require_restored(self) -> None:
        if not self.restored:
            raise Refused(503, "the model is being loaded", code="loading", retry_s=LOADING_S)

    async def _base(self, document: Document) -> RecurrentState | None:
        """Its state, as far as it came; at first that of the document before it. Raises Refused."""
        record = document.record
        if document.state is not None or (record.base is None and not self.shelf.has_state(record)):
            return document.state
        try:
            return await asyncio.to_thread(self.shelf.load, record)
        except StateError as err:
            if record.base is not None:
                raise Refused.of(err) from None
            return None  # it begins again

    async def _start(self, document: Document, before: Record) -> None:
        """Go on from where it is. before: what it stays where that cannot be. Raises Refused."""
        document.ended.clear()
        try:
            base = await self._base(document)
            self._desk.admit(1)
        except Refused:
            document.record = before
            self._touch(document)
            document.ended.set()
            raise
        self._touch(document)
        self._begin(document, base)

    def _begin(self, document: Document, base: RecurrentState | None) -> None:
        self._spawn(self._read(document, base))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Do this beside everything else; a task that nobody refers to may vanish."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _read(self, document: Document, base: RecurrentState | None) -> None:
        """From the first window to the last, or to where it is stopped."""
        record, events = document.record, asyncio.Queue[Event]()
        try:
            account = self._desk.account(record.tenant)
            track = Track(self._desk.metrics, account, since=perf_counter(), answer=False)
            document.handle = await self._submitted(document, base, both(track, events.put_nowait))
            if document.stop_as is not None:
                document.handle.cancel()
            while not isinstance(event := await events.get(), End):
                _progress(document, event)
            await self._ended(document, event)
        except _Stopped:
            await self._became(document, document.stop_as or "parked", None)
        except XlstmRayError as err:
            document.record = document.record.now("failed", Refused.of(err).message)
        except Refused as err:
            document.record = document.record.now("failed", err.message)
        finally:
            document.handle = document.cut = None
            self._touch(document)
            self._desk.release(1)
            document.ended.set()

    async def _submitted(
        self, document: Document, base: RecurrentState | None, hear: Callable[[Event], None]
    ) -> Handle:
        """Cut its text into tokens, and hand it in. Raises _Stopped if it is stopped before."""
        record = document.record

        def look(done: int, of: int) -> None:
            document.cut = None if done >= of else (done, of)
            if document.stop_as is not None:
                raise _Stopped

        if document.prompt is None:
            document.prompt = await asyncio.to_thread(self.shelf.reopen, record)
        prompt = await asyncio.to_thread(self.shelf.prompt, record, document.prompt, look)
        given: dict[str, Any] = {"prompt": prompt} if record.base is None else {"append": prompt}
        request = Request(**given, state=base, priority=PRIORITY, keep=True, tenant=record.tenant)
        if len(prompt) <= AT_ONCE:
            (handle,) = await self._desk.submit(request, [hear])
            return handle
        if document.stop_as is not None:
            raise _Stopped
        document.turn = asyncio.ensure_future(self._cutting.acquire())
        try:
            await document.turn
        except asyncio.CancelledError:
            raise _Stopped from None
        finally:
            document.turn = None
        try:
            (handle,) = await self._desk.submit(request, [hear])
        finally:
            self._cutting.release()
        return handle

    async def _ended(self, document: Document, end: End) -> None:
        reason = end.finish.reason
        if end.error is not None:
            raise end.error
        if end.state is not None:
            document.state, document.tokens_done = end.state, end.state.tokens[0]
        status: Status = "ready" if reason == "stop" else document.stop_as or "parked"
        if status == "ready":
            document.prompt = None
        await self._became(document, status, end.state)

    async def _became(self, document: Document, status: Status, state: RecurrentState | None) -> None:
        """It has stopped. Where the disk cannot take that, it is so all the same, and a next service reads it again."""
        document.record = document.record.now(status, tokens=document.tokens_done)
        try:
            await asyncio.to_thread(self.shelf.write, document.record, state)
        except OutputError as err:
            document.record = document.record.now(status, Refused.of(err).message)

    async def _checked(self, tenant: str, state: RecurrentState) -> int:
        """The tokens of a state that a caller has sent, if this model can go on from it. Raises Refused."""
        if state.batch != 1:
            raise Refused(400, f"the state is of {state.batch} prompts; only one of a single prompt can be asked")
        end: asyncio.Future[End] = asyncio.get_running_loop().create_future()
        account = self._desk.account(tenant)
        track = Track(self._desk.metrics, account, since=perf_counter(), prompt=False, answer=False)
        await self._desk.submit(Request(state=state, tenant=tenant), [both(track, _last(end))])
        failed = (await end).error
        if failed is not None:
            raise Refused.of(failed)
        return state.tokens[0]

    def _touch(self, document: Document) -> None:
        """It was of use now: its time to live begins again; while it is read it is of use."""
        if document.timer is not None:
            document.timer.cancel()
        if document.record.ttl is not None and not (document.open or document.leaving):
            loop, ttl = asyncio.get_running_loop(), document.record.ttl
            document.timer = loop.call_later(ttl, lambda: self._spawn(self.remove(document)))

    async def _forget(self, document: Document) -> None:
        """Its name is free when its files have gone: another one of this name has files of the same names."""
        name = document.record.tenant, document.record.name
        if self._all.get(name) is not document:  # it went while somebody waited to delete it
            return
        document.leaving = True
        self._touch(document)
        await asyncio.to_thread(self.shelf.remove, document.record)
        del self._all[name]
        document.ended.set()


def _progress(document: Document, event: Event) -> None:
    if isinstance(event, Queued):
        document.tokens_done, document.tokens_total = event.resumed_tokens, event.prompt_tokens
    elif isinstance(event, Reading):
        now = perf_counter()
        if document.began is None or document.record.status == "queued":
            document.began = now, event.tokens_done
            document.record = document.record.now("reading")
        elif now > document.began[0]:
            document.rate = (event.tokens_done - document.began[1]) / (now - document.began[0])
        document.tokens_done = event.tokens_done


def _last(end: "asyncio.Future[End]") -> Callable[[Event], None]:
    def tell(event: Event) -> None:
        if isinstance(event, End) and not end.done():
            end.set_result(event)

    return tell
