"""The addresses below /v1/states."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from errno import ENOSPC
from os import strerror
from pathlib import Path
from shutil import disk_usage
from typing import Annotated, Any

from fastapi import FastAPI, Query
from fastapi.requests import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from xlstm_ray.errors import StateError
from xlstm_ray.files import HEAD_BYTES, STATE
from xlstm_ray.serve.body import pieces, read_body, takes
from xlstm_ray.serve.desk import Desk
from xlstm_ray.serve.documents import Document, Documents
from xlstm_ray.serve.fields import one_prompt, read
from xlstm_ray.serve.refusals import Refused
from xlstm_ray.serve.shelf import Record, named
from xlstm_ray.serve.stream import EventStream, comment, data
from xlstm_ray.state import Piece, RecurrentState
from xlstm_ray.text.ondisk import take_text

POLL_S = 0.1
PIECE = 1 << 20  # bytes of a download at once
FILES = "text/plain", "application/octet-stream"  # what a document's body may be besides JSON
FORM = "application/x-www-form-urlencoded"
HEADER = 32 << 20  # bytes of a state's file besides its tensors, at most
Base = Annotated[str | None, Query(alias="state", description="The document that the text follows.")]
Ttl = Annotated[str | None, Query(description="Seconds without use after which it goes.")]


class NewState(BaseModel):
    """The body of a document. prompt: a text or token ids. state: another document that it goes on from.

    Without a prompt it is a copy of that one. ttl: seconds without use after which it goes.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str | None = None
    id: str | None = None
    prompt: Any = None
    state: str | None = None
    ttl: float | None = Field(None, gt=0, le=1e9)


def add_states(app: FastAPI, desk: Desk, documents: Documents) -> None:
    """Add them to the app."""

    @app.post("/v1/states", openapi_extra=takes(NewState))
    async def new(
        request: Request, name: Annotated[str | None, Query(alias="id")] = None, base: Base = None, ttl: Ttl = None
    ) -> Response:
        """Begin to read a document; answers at once, with its id.

        A body of text/plain or application/octet-stream is a file, as with PUT, and the fields are in the address.
        """
        if _kind(request) in FILES:
            return await take_file(request, name, base, ttl)
        _ = desk.engine
        desk.account(request.scope["tenant"]).admit()
        if _kind(request) == "multipart/form-data":
            text = "a form is not taken; send the file itself, as text/plain (curl -T FILE URL/v1/states/NAME)"
            raise Refused(415, text)
        data = await read_body(request, desk.options.body_bytes)
        if _kind(request) == FORM and not data.lstrip().startswith(b"{"):  # what curl calls any file
            text = "the body is not a JSON object; a text is sent as text/plain, or by PUT to /v1/states/NAME"
            raise Refused(415, text)
        for odd in request.query_params:
            raise Refused(400, f"`{odd}` is in the address of a body that is JSON; put it there", param=odd)
        body = read(NewState, data, {})
        desk.require_model(body.model)
        tenant = request.scope["tenant"]
        if body.prompt is None and body.state is not None:
            record = Record.named(body.id, tenant=tenant, ttl=body.ttl)
            state = await documents.state(tenant, body.state)
            return JSONResponse((await documents.add(record, state)).info(), 201)
        record, prompt = Record.named(body.id, tenant=tenant, ttl=body.ttl, base=body.state), one_prompt(body.prompt)
        with documents.shelf.room() as path:
            source = await asyncio.to_thread(documents.shelf.write_prompt, path, prompt)
            del prompt, body
            return JSONResponse((await documents.add(record.of(source), path)).info(), 202)

    @app.put("/v1/states/{name}")
    async def upload(request: Request, name: str, base: Base = None, ttl: Ttl = None) -> Response:
        """Begin to read a document that is a file of text, or take one that is the state of `--state-out`.

        `?state=`: the text follows that document.
        """
        return await take_file(request, name, base, ttl)

    async def take_file(request: Request, name: str | None, base: str | None, ttl: str | None) -> Response:
        engine = desk.engine
        desk.account(request.scope["tenant"]).admit()
        record = Record.named(name, tenant=request.scope["tenant"], ttl=_seconds(ttl), base=base)
        if base is not None:
            await documents.state(record.tenant, base)  # it is there
        documents.require_room(record)  # before all of it was sent
        with documents.shelf.room() as path:
            if not await _receive(request, path, desk.options.upload_bytes):
                await asyncio.to_thread(take_text, path, "the file")
                return JSONResponse((await documents.add(record.of("text"), path)).info(), 202)
            if base is not None:
                raise Refused(
                    400, "the file is a state, and with `?state=` a text is sent that follows one", param="state"
                )
            if path.stat().st_size > engine.config.state_file_bytes(1) + HEADER:
                raise Refused(413, "the state is larger than one of this model")
            try:
                state = named(await asyncio.to_thread(RecurrentState.load, path), record)
            except StateError as err:
                raise Refused(400, str(err).replace(str(path), "the upload")) from None
        return JSONResponse((await documents.add(record, state)).info(), 201)

    @app.get("/v1/states")
    async def states(request: Request) -> Response:
        """All documents of this caller."""
        found = [document.info() for document in documents.of(request.scope["tenant"])]
        return JSONResponse({"object": "list", "data": found})

    @app.get("/v1/states/{name}")
    async def state(request: Request, name: str) -> Response:
        """How far a document is."""
        return JSONResponse(one(request, name).info())

    @app.get("/v1/states/{name}/events")
    async def events(request: Request, name: str) -> Response:
        """The same as a stream, until it was read or stopped."""
        return EventStream(_events(one(request, name), desk.options.ping_s), lambda: None, {})

    @app.get("/v1/states/{name}/file")
    async def file(request: Request, name: str) -> Response:
        """Its state, as the file of `--state-out`."""
        found = await documents.state(request.scope["tenant"], name)
        whole = await asyncio.to_thread(found.to_pieces)
        size = sum(map(len, whole))
        headers = {"content-length": str(size), "content-disposition": f'attachment; filename="{name}.state"'}
        return StreamingResponse(_parts(whole), media_type="application/octet-stream", headers=headers)

    @app.post("/v1/states/{name}/cancel")
    async def cancel(request: Request, name: str) -> Response:
        """Stop to read a document; what was computed stays."""
        found = one(request, name)
        documents.cancel(found)
        if found.open:
            await found.ended.wait()
        return JSONResponse(found.info())

    @app.post("/v1/states/{name}/resume")
    async def resume(request: Request, name: str) -> Response:
        """Read the rest of a document that was stopped."""
        _ = desk.engine
        desk.account(request.scope["tenant"]).admit()
        found = one(request, name)
        await documents.resume(found)
        return JSONResponse(found.info(), 202)

    @app.delete("/v1/states/{name}")
    async def delete(request: Request, name: str) -> Response:
        """A document goes."""
        await documents.remove(one(request, name))
        return JSONResponse({"id": name, "object": "state", "deleted": True})

    def one(request: Request, name: str) -> Document:
        return documents.get(request.scope["tenant"], name)


async def _receive(request: Request, path: Path, most: int) -> bool:
    """Write the body to a file, piece by piece; whether it is a state of this program.

    Raises Refused where it has more bytes than `most`, the disk has no room for it, or its sender leaves.
    """
    head, told = b"", int(request.headers.get("content-length") or 0)
    try:
        if most >= told > disk_usage(path).free:
            raise OSError(ENOSPC, strerror(ENOSPC))
        with open(path, "wb") as file:
            async for piece in pieces(request, most, PIECE):
                head += piece[: max(0, HEAD_BYTES - len(head))]
                await asyncio.to_thread(file.write, piece)
    except OSError as err:
        raise Refused(507, f"the file cannot be taken ({err.strerror})") from None
    return STATE.ours(head)


def _kind(request: Request) -> str:
    """What a body says that it is."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def _seconds(ttl: str | None) -> float | None:
    """The time to live in an address. Raises Refused."""
    try:
        seconds = None if ttl is None else float(ttl)
    except ValueError:
        seconds = -1.0
    if seconds is not None and not 0 < seconds <= 1e9:
        raise Refused(400, f"`ttl` is {str(ttl)[:80]!r}; allowed: a number of seconds above 0", param="ttl")
    return seconds


async def _events(document: Document, ping_s: float) -> AsyncIterator[str]:
    before, quiet = None, 0.0
    while True:
        info, open_ = document.info(), document.open
        if info != before:
            before, quiet = info, 0.0
            yield data(info)
        elif quiet > ping_s:
            quiet = 0.0
            yield comment("waiting")
        if not open_:
            return
        await asyncio.sleep(POLL_S)
        quiet += POLL_S


async def _parts(whole: Sequence[Piece]) -> AsyncIterator[bytes]:
    """A file's pieces in smaller ones, of which each is a copy: nobody waits for a disk or a slow reader."""
    for piece in whole:
        for start in range(0, len(piece), PIECE):
            yield bytes(piece[start : start + PIECE])
