"""Requests to a service, its replies, its streams of events; what goes wrong is one line."""

import json
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from time import sleep
from typing import IO, Any
from urllib.parse import quote, urlsplit

from xlstm_ray.errors import ServiceError, UsageError, one_line

CONNECT_S = 10  # seconds to find the service
QUIET_S = 600  # seconds between two bytes; as OpenAI's client has it
TRIES = 5  # how often a request is sent again that there was no room for
LONGEST_S = 60  # is not waited for longer at once
PIECE = 1 << 20  # bytes of a download at once
NO_ROOM = 429, 503
LEFT = BrokenPipeError, ConnectionResetError

Sent = bytes | IO[bytes] | Iterable[bytes]


class Service:
    """url: as `xlstm-ray serve` prints it, with or without /v1. key: who asks; None: nobody in particular.

    Where the service has no room, a request waits as long as it is told to and is sent again, up to `tries` times;
    say: is told of each wait. All methods raise ServiceError.
    """

    def __init__(
        self, url: str, key: str | None = None, *, tries: int = TRIES, say: Callable[[str], object] = lambda text: None
    ):
        self.url = url.rstrip("/").removesuffix("/v1")
        self._key, self._tries, self._say = key, tries, say
        try:
            parts = urlsplit(self.url)
            self._host, self._port = parts.hostname or "", parts.port
        except ValueError as err:
            raise UsageError(f"`url` {url!r}: is not an address ({err})") from None
        if parts.scheme not in ("http", "https") or not self._host or parts.query or parts.fragment or parts.username:
            raise UsageError(f"`url` is {url!r}; allowed: an address as http://127.0.0.1:8000")
        self._connection = HTTPSConnection if parts.scheme == "https" else HTTPConnection
        self._path = parts.path

    def get(self, path: str) -> dict[str, Any]:
        with self.open("GET", path) as reply:
            return reply.json()

    def post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        with self.open("POST", path, json.dumps(body).encode()) as reply:
            return reply.json()

    def put(self, path: str, data: Sent) -> dict[str, Any]:
        """Send a file; one that can be read again is, where there was no room for it."""
        with self.open("PUT", path, data) as reply:
            return reply.json()

    def delete(self, path: str) -> dict[str, Any]:
        with self.open("DELETE", path) as reply:
            return reply.json()

    def events(self, path: str, body: Mapping[str, Any] | None = None) -> Iterator[dict[str, Any]]:
        """The objects of a stream, as they come."""
        data = None if body is None else json.dumps(body).encode()
        with self.open("GET" if data is None else "POST", path, data) as reply:
            yield from reply.events()

    @contextmanager
    def open(self, method: str, path: str, data: Sent | None = None) -> Iterator["Reply"]:
        """A reply that is being read. path: below the service's address, quoted."""
        connection, response = self._answered(method, path, data)
        try:
            yield Reply(self, response)
        finally:
            connection.close()

    # ------------------------------------------------------------------------------------------------------------------
    def _answered(self, method: str, path: str, data: Sent | None) -> tuple[HTTPConnection, HTTPResponse]:
        """A connection, and the beginning of a reply that is not a refusal."""
        for number in range(1, self._tries + 2):
            connection, response = self._sent(method, path, data)
            if response.status < 400:
                return connection, response
            refusal = self._refusal(response)
            connection.close()
            pause = refusal.retry_s
            if response.status not in NO_ROOM or pause is None or number > self._tries or not _again(data):
                raise refusal
            self._say(f"{refusal}; trying again in {pause:g} s ({number} of {self._tries})")
            sleep(pause)
        raise AssertionError

    def _sent(self, method: str, path: str, data: Sent | None) -> tuple[HTTPConnection, HTTPResponse]:
        connection = self._connection(self._host, self._port, timeout=CONNECT_S)
        headers = {"accept": "application/json, text/event-stream"}
        if self._key is not None:
            headers["authorization"] = f"Bearer {self._key}"
        if isinstance(data, bytes):
            headers["content-type"] = "application/json"
        try:
            with self.trouble():
                connection.connect()
                assert connection.sock is not None
                connection.sock.settimeout(QUIET_S)
                connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                try:
                    connection.request(method, self._path + path, data, headers)
                except LEFT:  # it may have said why before it has left
                    with suppress(*LEFT, HTTPException):
                        return connection, connection.getresponse()
                    raise
                return connection, connection.getresponse()
        except BaseException:
            connection.close()
            raise

    @contextmanager
    def trouble(self) -> Iterator[None]:
        """Errors of a connection as one line."""
        try:
            yield
        except ConnectionRefusedError:
            raise ServiceError(
                f"{self.url}: no service answers there; `xlstm-ray serve` starts one, and `url` names another"
            ) from None
        except TimeoutError:
            raise ServiceError(f"{self.url}: the service does not answer") from None
        except OSError as err:
            why = err.strerror or str(err)
            raise ServiceError(f"{self.url}: the service cannot be reached ({one_line(why)})") from None
        except HTTPException as err:
            why = "the connection has ended" if not str(err) or isinstance(err, ConnectionError) else str(err)
            raise ServiceError(f"{self.url}: the reply is not whole ({one_line(why)})") from None

    def _refusal(self, response: HTTPResponse) -> ServiceError:
        """What the service says of its refusal: in OpenAI's form, or in any."""
        with self.trouble():
            body = response.read(1 << 16)
        text, code = body.decode("utf-8", "replace").strip() or response.reason, None
        with suppress(ValueError, AttributeError):
            error = json.loads(text)
            error = error.get("error") or error.get("detail") or error
            text, code = (error, None) if isinstance(error, str) else (error.get("message", text), error.get("code"))
        said = one_line(text).replace("`", "'")  # its names are no flags of ours
        if response.status == 401:
            said += "; `api_key_file`, or the variable XLSTM_RAY_API_KEY, gives a key"
        return ServiceError(f"{self.url}: {said}", response.status, code, _pause(response))


class Reply:
    """What a service answers. Errors while it is read are ServiceErrors."""

    def __init__(self, service: Service, response: HTTPResponse):
        self._service, self._response = service, response
        self.headers = response.headers

    def json(self) -> dict[str, Any]:
        with self._service.trouble():
            data = self._response.read()
        try:
            found = json.loads(data)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise ServiceError(
                f"{self._service.url}: the reply is not a JSON object; is this a service of OpenAI's API?"
            )
        return found

    def events(self) -> Iterator[dict[str, Any]]:
        """The objects of a stream, to its end; comments are left out."""
        while True:
            with self._service.trouble():
                line = self._response.readline()
            if not line:
                return
            if not line.startswith(b"data:"):
                continue
            text = line[5:].strip()
            if text == b"[DONE]":
                return
            try:
                event = json.loads(text)
            except ValueError:
                event = None
            if not isinstance(event, dict):
                raise ServiceError(f"{self._service.url}: the stream has an event that is not a JSON object")
            if event.get("error") and "choices" not in event and "id" not in event:
                error = event["error"]
                said = error.get("message", error) if isinstance(error, dict) else error
                raise ServiceError(f"{self._service.url}: {one_line(said)}".replace("`", "'"), 0)
            yield event

    def pieces(self) -> Iterator[bytes]:
        """A file, piece by piece."""
        while True:
            with self._service.trouble():
                piece = self._response.read(PIECE)
                if not piece:
                    if self._response.length:
                        raise HTTPException(f"{self._response.length} bytes are missing")
                    return
            yield piece


def state_path(name: str, more: str = "") -> str:
    """The path of a document. Raises UsageError for what is no name: it would be another address."""
    if not name or "/" in name:
        raise UsageError(f"a document's name is {name!r}; allowed: letters and digits, and . _ - after the first")
    return f"/v1/states/{quote(name, safe='')}{more}"


def _again(data: Sent | None) -> bool:
    """Whether a body can be sent once more; a file is put back to its beginning."""
    if data is None or isinstance(data, bytes):
        return True
    file: Any = data
    if not hasattr(data, "seekable") or not file.seekable():
        return False
    file.seek(0)
    return True


def _pause(response: HTTPResponse) -> float | None:
    """Seconds after which it may be tried again; None: it is not said, or too long to wait for."""
    try:
        seconds = float(response.headers.get("retry-after", ""))
    except ValueError:
        return None
    return max(0.1, seconds) if seconds <= LONGEST_S else None
