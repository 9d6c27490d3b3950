"""The server: the app behind a socket, in a thread of its own."""

import asyncio
import socket
import threading
from concurrent.futures import Future
from contextlib import suppress
from importlib.util import find_spec
from time import monotonic, sleep
from typing import Literal

import uvicorn

from xlstm_ray.errors import UsageError
from xlstm_ray.serve.app import make_app
from xlstm_ray.serve.desk import Desk, Serves
from xlstm_ray.serve.documents import Documents
from xlstm_ray.serve.options import Options
from xlstm_ray.serve.shelf import Shelf
from xlstm_ray.text.template import Template

POLL_S = 0.05
LAST_S = 5  # seconds that replies have to reach their readers
HEAD_BYTES = 1 << 16  # of a request besides its body


class Server:
    """Listens from its making on, and answers 503 until it has an engine. Raises UsageError for a port that is taken.

    template: of chats. stop: set when a signal says so, and when the server has ended by itself.
    """

    def __init__(self, options: Options, stop: threading.Event, template: Template | None = None):
        self.desk, self._stop = Desk(options), stop
        self._shelf = Shelf(options.folder)
        self.documents = Documents(self.desk, self._shelf, options.states_bytes)
        self._socket = _listen(options.host, options.port)
        self.port: int = self._socket.getsockname()[1]
        config = uvicorn.Config(
            make_app(self.desk, self.documents, template),
            http=_protocol(),
            log_config=None,
            log_level="error",  # not a line for each stranger's nonsense
            access_log=False,  # it has what callers ask
            lifespan="off",
            ws="none",
            server_header=False,
            timeout_graceful_shutdown=LAST_S,
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._run, name="http", daemon=True)
        self._loop: Future[asyncio.AbstractEventLoop] = Future()
        self._thread.start()

    def open(self, engine: Serves, slots: int, states_bytes: int | None = None) -> None:
        """Take requests from now on. states_bytes: that documents may take; None: as the options say."""
        loop = self._loop.result()
        if states_bytes is not None:
            self.documents.budget = states_bytes
        asyncio.run_coroutine_threadsafe(self.documents.restore(), loop).result()
        self.desk.open(engine, slots)
        asyncio.run_coroutine_threadsafe(self.documents.go_on(), loop)

    def drain(self, hurry: threading.Event) -> bool:
        """Take no more requests, and wait until those that are under way have ended; False: some had to be cancelled.

        hurry: do not wait.
        """
        desk, end = self.desk, monotonic() + self.desk.options.drain_s
        desk.draining = True
        with suppress(RuntimeError):  # the server has ended by itself
            self._loop.result().call_soon_threadsafe(self.documents.park)
        while desk.under_way and monotonic() < end and self._thread.is_alive() and not hurry.wait(POLL_S):
            pass
        whole = not desk.under_way
        desk.cancel_all()
        end = monotonic() + LAST_S
        while desk.under_way and monotonic() < end and self._thread.is_alive():
            sleep(POLL_S)
        return whole

    def close(self) -> None:
        """End; replies are sent to their ends."""
        self.desk.draining = True
        self._server.should_exit = True
        self._thread.join()
        self._shelf.close()

    def _run(self) -> None:
        try:
            with asyncio.Runner(loop_factory=self._server.config.get_loop_factory()) as runner:
                runner.run(self._serve())
        finally:
            self._stop.set()

    async def _serve(self) -> None:
        self._loop.set_result(asyncio.get_running_loop())
        await self._server.serve(sockets=[self._socket])


def _protocol() -> type[asyncio.Protocol] | Literal["auto"]:
    """What reads requests: uvicorn's own, but a head without an end would take all memory. h11 has such a bound."""
    if find_spec("httptools") is None:
        return "auto"
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

    class Bounded(HttpToolsProtocol):
        head = 0  # bytes since the last part of a body, or the last request's end

        def data_received(self, data: bytes) -> None:
            self.head += len(data)
            super().data_received(data)
            if self.head > HEAD_BYTES and not self.transport.is_closing():
                self.send_400_response(f"a request has more than {HEAD_BYTES:,} bytes besides its body")

        def send_400_response(self, msg: str) -> None:
            super().send_400_response(msg)
            if self.cycle is not None:  # of a request whose head was whole: its reply has nowhere to go
                self.cycle.disconnected = True

        def shutdown(self) -> None:
            super().shutdown()
            if self.cycle is not None and self.cycle.more_body:
                self.cycle.message_event.set()  # nobody waits for the rest of a body: body.py

        def on_body(self, body: bytes) -> None:
            self.head = 0
            super().on_body(body)

        def on_message_complete(self) -> None:
            self.head = 0
            super().on_message_complete()

    return Bounded


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family, backlog=1024)
    except OSError as err:
        raise UsageError(
            f"`host` {host} and `port` {port}: nothing can listen there ({err.strerror or err}); "
            "choose another port, or 0 for a free one"
        ) from None
