"""What the client's commands share: which service is asked, and a document that is waited for."""

import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from time import perf_counter, sleep
from typing import IO, Annotated, Any
from urllib.parse import urlencode

import typer

from xlstm_ray.cli.keep import program
from xlstm_ray.cli.options import GivenPath, bare, path_option
from xlstm_ray.cli.output import json_line, note, show, tell
from xlstm_ray.cli.reporter import ProgressKind, Reporter
from xlstm_ray.client.keys import find_key
from xlstm_ray.client.service import Service, state_path
from xlstm_ray.errors import Interrupted, ServiceError, UsageError
from xlstm_ray.files import HEAD_BYTES, STATE

DEFAULT_URL = "http://127.0.0.1:8000"
SERVICE = "Service"  # panel of the options
LOST, LOST_S = 10, 3.0  # a service that has gone is looked for so often, with so many seconds between
OPEN = "queued", "reading"

UrlOption = Annotated[str, typer.Option("--url", help="The service's address.", rich_help_panel=SERVICE)]
KeyOption = Annotated[
    GivenPath | None,
    path_option(
        "--api-key-file",
        help=bare(
            "The first line of this file is the key. [default: the variable XLSTM_RAY_API_KEY, else OPENAI_API_KEY]"
        ),
        rich_help_panel=SERVICE,
    ),
]
TtlOption = Annotated[
    float | None,
    typer.Option("--ttl", help=bare("The document goes after so many seconds without use. [default: it stays]")),
]
WaitOption = Annotated[bool, typer.Option("--wait/--no-wait", help="Wait until the document was read.")]


def connected(url: str, key_file: Path | None, **more: Any) -> Service:
    """The service that a command asks."""
    return Service(url, find_key(key_file), say=note, **more)


def command_for(service: Service, words: str, name: str) -> str:
    """The command line that does this with a document."""
    at = "" if service.url == DEFAULT_URL else f" --url {shlex.quote(service.url)}"
    return f"{program()} client {words} {shlex.quote(name)}{at}"


def sender(service: Service, name: str, text: str | None, file: str | None, **given: object) -> Callable[[], Any]:
    """What sends a document: a text, or a file as it is read. given: fields beside it, but for None.

    Raises UsageError where the file cannot be read, or is a state.
    """
    there = {field: value for field, value in given.items() if value is not None}
    if file is None:
        return partial(service.post, "/v1/states", {"id": name, "prompt": text, **there})
    return partial(service.put, state_path(name, f"?{urlencode(there)}" if there else ""), _opened(file))


def _opened(name: str) -> IO[bytes]:
    """A document's file, from its beginning. Raises UsageError where it cannot be read, or is a state."""
    try:
        file: IO[bytes] = sys.stdin.buffer if name == "-" else open(name, "rb")
        if not file.seekable():  # a pipe: its length is not known
            return file
        head = file.read(HEAD_BYTES)
        file.seek(0)
    except OSError as err:
        raise UsageError(f"{name}: cannot be read ({err.strerror})") from None
    if STATE.ours(head):
        raise UsageError(
            f"{name}: is a state and not a text; xlstm-ray client states upload {Path(name).name} sends it"
        )
    return file


def read_document(
    service: Service,
    name: str,
    send: Callable[[], dict[str, Any]],
    *,
    wait: bool,
    progress: ProgressKind,
    json_output: bool,
) -> None:
    """Let the service read a document, wait for it, and print its name. Ctrl-C leaves the service reading."""
    began = perf_counter()
    with Reporter(progress if wait else "none") as report:
        report.phase("sending")
        with _told_on_interrupt(f"interrupted before all was sent: the service keeps nothing of {name}"):
            info = send()
        show_it = command_for(service, "states show", name)
        with _told_on_interrupt(f"interrupted; the service reads {name} on: {show_it} tells how far it is"):
            if wait and info["status"] in OPEN:
                report.phase("waiting")
                info = _followed(service, name, report)
    if wait and info["status"] != "ready":
        raise ServiceError(f"{service.url}: {_unread(service, info)}")
    if json_output:
        json_line(info)
        return
    show(name)
    if not wait:
        tell(f"the service reads it: {show_it} tells how far it is")
        return
    seconds = perf_counter() - began
    ask = f"{command_for(service, 'ask --state', name)} --prompt TEXT"
    tell(f"{info['tokens_total']:,} tokens, ready after {seconds:.1f} s; to ask: {ask}")


def _unread(service: Service, info: dict[str, Any]) -> str:
    """Why a document is not ready."""
    total = f"{info['tokens_total']:,}" if info["tokens_total"] else "?"
    name, done = info["id"], f"{info['tokens_done']:,} of {total} tokens"
    if info["status"] == "failed":
        return f"{name} could not be read: {info['error']}"
    on = "a service with the same cache directory goes on with it"
    if info["status"] == "cancelled":
        on = f"{command_for(service, 'states resume', name)} goes on"
    return f"{name} is {info['status']}, with {done}; {on}"


def _followed(service: Service, name: str, report: Reporter) -> dict[str, Any]:
    """What is known of a document when it is not worked on any more. A service that has gone is looked for again."""
    lost = 0
    while True:
        try:
            for info in service.events(state_path(name, "/events")):
                lost = 0
                if info["tokens_total"]:
                    report.document(
                        info["tokens_done"], info["tokens_total"], info["tokens_per_s"], info["seconds_left"]
                    )
                elif info.get("characters_total"):
                    done, of = info["characters_done"], info["characters_total"]
                    report.phase(f"the service cuts the text into tokens ({done:,} of {of:,} characters)")
                if info["status"] not in OPEN:
                    return info
            raise ServiceError(f"{service.url}: the service has ended the stream")
        except ServiceError as err:
            lost += 1
            if err.status not in (None, 503) or lost > LOST:  # it may be loading its model again
                raise
            note(f"{err}; looking for it again in {LOST_S:g} s ({lost} of {LOST})")
            sleep(LOST_S)


@contextmanager
def _told_on_interrupt(text: str) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(text) from None
