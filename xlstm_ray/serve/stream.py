"""Replies that end when their reader goes: streams of server-sent events, and a watch over those that wait."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Any

from fastapi.responses import Response

from xlstm_ray.serve.gate import Receive, Scope, Send

DONE = "data: [DONE]\n\n"
_ENCODE = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def data(value: Mapping[str, Any]) -> str:
    """An event with this object."""
    return f"data: {_ENCODE(value)}\n\n"


def comment(text: str) -> str:
    """A line that clients pass over: it keeps the connection alive."""
    return f": {text}\n\n"


@asynccontextmanager
async def watching(receive: Receive, gone: Callable[[], None]) -> AsyncIterator[None]:
    """Calls `gone` if the client leaves while the block runs; the request's body must have been read."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        gone()

    task = asyncio.create_task(watch())
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


class EventStream(Response):
    """events: texts of `data` and `comment`. gone: called when the client has left, or all was sent."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[str], gone: Callable[[], None], headers: Mapping[str, str]):
        super().__init__(headers={**headers, "cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._events, self._gone = events, gone

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            async with watching(receive, self._gone):
                more = True
                async for text in self._events:
                    more = not text.endswith(DONE)
                    await send({"type": "http.response.body", "body": text.encode(), "more_body": more})
            if more:
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            self._gone()
