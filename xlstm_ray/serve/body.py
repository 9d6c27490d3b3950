"""What a request gives: its body's bytes and their schema, and the fields in its address."""

from collections.abc import AsyncIterator
from typing import Any

from fastapi.requests import Request
from pydantic import BaseModel

from xlstm_ray.serve.refusals import Refused

PATIENCE = 16 << 20  # bytes over the limit that are still read: many clients read no reply before they have sent all


async def read_body(request: Request, most: int) -> bytes:
    """A request's body. Raises Refused where it has more bytes than `most`, or its sender leaves."""
    return b"".join([piece async for piece in pieces(request, most, 1)])


async def pieces(request: Request, most: int, least: int) -> AsyncIterator[bytes]:
    """A request's body in pieces of at least so many bytes, but for the last. Raises as `read_body`.

    The app's `state.desk` says whether the service goes on.
    """
    told = int(request.headers.get("content-length") or 0)
    piece, size, more = bytearray(), 0, told <= most + PATIENCE
    while more and size <= most + PATIENCE:
        message = await request.receive()
        if message["type"] != "http.request":
            raise Refused(400, "the client has left before the body's end")
        part = message.get("body", b"")
        if not part:  # the server ends, and has woken those that wait for the rest of a body
            _ = request.app.state.desk.engine
        more, size = message.get("more_body", False), size + len(part)
        if size <= most:
            piece += part
        if len(piece) >= least:
            yield bytes(piece)
            piece.clear()
    if max(size, told) > most:
        raise Refused(413, f"the body has more than {most:,} bytes, which is the most that this service takes")
    yield bytes(piece)


async def fields_known(request: Request) -> None:
    """Raise Refused for a field in the address that the call's function does not take, or that is given twice."""
    known = [field.alias for field in request.scope["route"].dependant.query_params]
    seen = set()
    for name, _ in request.query_params.multi_items():
        if name in seen:
            raise Refused(400, f"`{name[:80]}` is given more than once in the address; give it once", param=name[:80])
        if name not in known:
            there = f"there is: {', '.join(known)}" if known else "there is none; fields are in the body"
            text = f"`{name[:80]}` is not a field in the address here; {there}"
            raise Refused(400, text, param=name[:80], code="unknown_field")
        seen.add(name)


def takes(body: type[BaseModel]) -> dict[str, Any]:
    """The schema of a body, for /openapi.json."""
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": body.model_json_schema()}}}}
