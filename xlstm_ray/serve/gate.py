"""Who may come in: the Host header, the page that sends a request, the key."""

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from xlstm_ray.serve.options import Options
from xlstm_ray.serve.pages import AT
from xlstm_ray.serve.refusals import Refused

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN = {"/health", "/ping", *AT}  # for probes, which have no key, and for the page that asks for one


class Gate:
    """Refuses strangers before anything of their request is read.

    `scope["tenant"]` says whose the others are, and `scope["key"]` is their key's name.
    """

    def __init__(self, app: App, options: Options):
        self._app, self._options = app, options

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                scope["tenant"] = self._tenant(scope)
            except Refused as refused:
                await refused.response()(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _tenant(self, scope: Scope) -> str:
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        host = headers.get(b"host", "")
        if not self._options.knows_host(host):
            raise Refused(
                403, f"this service is not called {host[:80]!r}; xlstm-ray serve --allowed-host NAME allows it"
            )
        origin = headers.get(b"origin")
        if origin is not None and origin.partition("://")[2] != host:
            raise Refused(403, f"pages of {origin[:80]!r} may not use this service")
        if scope["path"] in OPEN:
            return ""
        kind, _, key = headers.get(b"authorization", "").partition(" ")
        found = self._options.key(key.strip() if kind.lower() == "bearer" else "")
        if found is None and self._options.keys:
            raise Refused(401, "give a key of this service: Authorization: Bearer KEY", code="invalid_api_key")
        scope["key"] = found and found.name
        return self._options.tenant(found)
