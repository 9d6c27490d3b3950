"""The commands that look after a service's documents: client states list, show, download, upload, fork and so on."""

from collections.abc import Callable
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from xlstm_ray.cli.documents import (
    DEFAULT_URL,
    KeyOption,
    TtlOption,
    UrlOption,
    WaitOption,
    connected,
    read_document,
    sender,
)
from xlstm_ray.cli.options import JsonOption, ProgressOption, bare, examples, given_path
from xlstm_ray.cli.output import json_line, show, tell
from xlstm_ray.client.service import state_path
from xlstm_ray.errors import OutputError, UsageError
from xlstm_ray.files import HEAD_BYTES, STATE, Output, check_outputs, require_writable, shown_bytes, write_whole

commands = typer.Typer(
    help="Look after the documents of a service.",
    epilog=examples("xlstm-ray client states list", "xlstm-ray client states download book book.state"),
    no_args_is_help=True,
)

NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="The document's name.", show_default=False)]


@commands.command("list")
def list_(url: UrlOption = DEFAULT_URL, api_key_file: KeyOption = None, json_output: JsonOption = False) -> None:
    """Show the documents that are there."""
    found = connected(url, api_key_file).get("/v1/states")["data"]
    if json_output:
        json_line({"states": found})
        return
    show(f"{'name':<24}  {'status':<9}  {'tokens':>21}  {'ttl, s':>8}  created")
    for info in found:
        created = datetime.fromtimestamp(info["created"]).strftime("%Y-%m-%d %H:%M")
        ttl = "-" if info["ttl"] is None else f"{info['ttl']:g}"
        show(f"{info['id']:<24}  {info['status']:<9}  {_tokens(info):>21}  {ttl:>8}  {created}")


@commands.command("show")
def show_(
    name: NameArgument, url: UrlOption = DEFAULT_URL, api_key_file: KeyOption = None, json_output: JsonOption = False
) -> None:
    """Show how far a document is."""
    _print(connected(url, api_key_file).get(state_path(name)), json_output=json_output)


@commands.command()
def download(
    name: NameArgument,
    file: Annotated[
        Path, typer.Argument(parser=given_path, metavar="FILE", help="Where the state goes.", show_default=False)
    ],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that is not a state.")] = False,
    url: UrlOption = DEFAULT_URL,
    api_key_file: KeyOption = None,
) -> None:
    """Write a document's state to a file: the one of --state-out, for --state-in and `states upload`."""
    service = connected(url, api_key_file)
    check_outputs([Output("", file, STATE)], [], overwrite=overwrite)
    with service.open("GET", state_path(name, "/file")) as reply:
        size = int(reply.headers.get("content-length") or 0)
        require_writable(file, size=size)
        try:
            write_whole(file, reply.pieces())
        except OSError as err:
            raise OutputError(f"{file}: cannot be written ({err.strerror})") from None
    tell(f"{file}: {shown_bytes(size)}")


@commands.command(epilog=examples("xlstm-ray client states upload book.state --name book"))
def upload(
    file: Annotated[
        Path, typer.Argument(parser=given_path, metavar="FILE", help="A file of --state-out.", show_default=False)
    ],
    name: Annotated[str | None, typer.Option("--name", help=bare("The document's name. [default: the file's]"))] = None,
    ttl: TtlOption = None,
    url: UrlOption = DEFAULT_URL,
    api_key_file: KeyOption = None,
    json_output: JsonOption = False,
    progress: ProgressOption = "auto",
) -> None:
    """Send a state, which then can be asked."""
    service = connected(url, api_key_file)
    try:
        with open(file, "rb") as data:
            if not STATE.ours(data.read(HEAD_BYTES)):
                raise UsageError(f"{file}: is not {STATE.name}; xlstm-ray client prefill --prompt-file sends a text")
            data.seek(0)
            name = file.stem if name is None else name
            send = partial(service.put, state_path(name, "" if ttl is None else f"?ttl={ttl}"), data)
            read_document(service, name, send, wait=True, progress=progress, json_output=json_output)
    except OSError as err:
        raise UsageError(f"{file}: cannot be read ({err.strerror})") from None


@commands.command(epilog=examples("xlstm-ray client states fork book book-2 --append-file volume-2.txt"))
def fork(
    name: NameArgument,
    new: Annotated[str, typer.Argument(metavar="NEW", help="The new document's name.", show_default=False)],
    append: Annotated[str | None, typer.Option("--append", help="The text that follows.")] = None,
    append_file: Annotated[
        str | None, typer.Option("--append-file", help="A file with it, '-' for standard input.")
    ] = None,
    ttl: TtlOption = None,
    wait: WaitOption = True,
    url: UrlOption = DEFAULT_URL,
    api_key_file: KeyOption = None,
    json_output: JsonOption = False,
    progress: ProgressOption = "auto",
) -> None:
    """Go on from a document with more text, under a new name; the old one stays as it is."""
    service = connected(url, api_key_file)
    if (append is None) == (append_file is None):
        raise UsageError("give --append TEXT or --append-file FILE: what follows the document")
    if append == "":
        raise UsageError("--append is empty; give at least one token")
    if append == "-":
        append, append_file = None, "-"
    send = sender(service, new, append, append_file, state=name, ttl=ttl)
    read_document(service, new, send, wait=wait, progress=progress, json_output=json_output)


@commands.command()
def cancel(
    name: NameArgument, url: UrlOption = DEFAULT_URL, api_key_file: KeyOption = None, json_output: JsonOption = False
) -> None:
    """Stop reading a document; what was computed stays."""
    _print(connected(url, api_key_file).post(state_path(name, "/cancel"), {}), json_output=json_output)


@commands.command()
def resume(
    name: NameArgument,
    wait: WaitOption = True,
    url: UrlOption = DEFAULT_URL,
    api_key_file: KeyOption = None,
    json_output: JsonOption = False,
    progress: ProgressOption = "auto",
) -> None:
    """Read the rest of a document that was stopped."""
    service = connected(url, api_key_file)
    send: Callable[[], dict[str, Any]] = partial(service.post, state_path(name, "/resume"), {})
    read_document(service, name, send, wait=wait, progress=progress, json_output=json_output)


@commands.command()
def delete(name: NameArgument, url: UrlOption = DEFAULT_URL, api_key_file: KeyOption = None) -> None:
    """A document goes, whatever is done with it."""
    connected(url, api_key_file).delete(state_path(name))
    tell(f"{name} is deleted")


def _print(info: dict[str, Any], *, json_output: bool) -> None:
    if json_output:
        json_line(info)
        return
    rate, left = info["tokens_per_s"], info["seconds_left"]
    rows = {
        "status": info["status"],
        "tokens": _tokens(info),
        "tokens/s": None if rate is None else f"{rate:,.0f}",
        "time left": None if left is None else f"{left:.0f} s",
        "ttl": None if info["ttl"] is None else f"{info['ttl']:g} s",
        "error": info["error"],
    }
    for title, value in rows.items():
        if value is not None:
            show(f"{title:<10} {value}")


def _tokens(info: dict[str, Any]) -> str:
    done, total = info["tokens_done"], info["tokens_total"]
    return f"{done:,}" if total in (None, done) else f"{done:,} of {total:,}"
