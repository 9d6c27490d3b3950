"""Names each request and, where that is wanted, writes a line about it. Nothing that was asked or answered is in it."""

import json
import re
import sys
from datetime import UTC, datetime
from pathlib import Path
from random import getrandbits
from time import perf_counter
from typing import Any

from xlstm_ray.errors import OutputError
from xlstm_ray.serve.gate import App, Receive, Scope, Send
from xlstm_ray.serve.work import Used

HEADER = b"x-request-id"
ID = re.compile(rb"[\w.:/+=-]{1,128}", re.ASCII)  # a caller's own; any other is replaced
OURS = b'{"time":'
STANDARD = Path("-")


class Access:
    """The outermost layer of the app. log: a file that lines are added to, or `-` for standard output; None: no lines.

    The file is opened for each line, so another program may move it away. Raises OutputError where it cannot be one.
    """

    def __init__(self, app: App, log: Path | None = None):
        self._app, self._log = app, log
        if log is not None and log != STANDARD:
            _require_log(log)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(HEADER, b"")
        name = given if ID.fullmatch(given) else f"{getrandbits(128):032x}".encode()
        at, began = datetime.now(UTC), perf_counter()
        status, sent, left = None, False, False

        async def sends(message: Any) -> None:
            nonlocal status, sent
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message.get("headers", ()), (HEADER, name)]}
            elif message["type"] == "http.response.body":
                sent = not message.get("more_body", False)
            await send(message)

        async def receives() -> Any:
            nonlocal left
            message = await receive()
            left = left or (message["type"] == "http.disconnect" and not sent)
            return message

        try:
            await self._app(scope, receives, sends)
        finally:
            if self._log is not None:
                used: Used = scope.get("used") or Used()
                self._write(
                    {
                        "time": at.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
                        "id": name.decode(),
                        "method": scope["method"],
                        "path": scope["path"][:200],
                        "status": status,
                        "seconds": round(perf_counter() - began, 4),
                        "key": scope.get("key"),
                        "prompt_tokens": used.prompt,
                        "cached_tokens": used.cached,
                        "completion_tokens": used.answer,
                        "finish_reasons": used.finished,
                        "left": left,
                    }
                )

    def _write(self, line: dict[str, Any]) -> None:
        """Add a line. A log that cannot be written is told once, and requests go on without it."""
        assert self._log is not None
        text = json.dumps(line, separators=(",", ":")) + "\n"
        try:
            if self._log == STANDARD:
                sys.stdout.write(text)
                sys.stdout.flush()
            else:
                with open(self._log, "a", encoding="utf-8") as file:
                    file.write(text)
        except OSError as err:
            print(f"{self._log}: requests are no longer logged ({err.strerror})", file=sys.stderr)
            self._log = None


def _require_log(path: Path) -> None:
    """Raises OutputError unless lines may be added: nothing is there, or an empty file, a log of requests, a device."""
    try:
        with open(path, "ab"):
            pass
        head = b""
        if path.is_file():
            with open(path, "rb") as file:
                head = file.read(len(OURS))
    except OSError as err:
        raise OutputError(f"`access_log` {path}: cannot be written ({err.strerror})") from None
    if head not in (b"", OURS):
        raise OutputError(f"`access_log` {path}: is there and is not a log of requests; give another name")
