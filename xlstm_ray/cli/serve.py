"""The command that serves a model over HTTP."""

import json
import shlex
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from xlstm_ray import hub
from xlstm_ray.cli.options import (
    RUN,
    SERVICE,
    DeterministicOption,
    GivenPath,
    ProgressOption,
    SlotsOption,
    bare,
    examples,
    takes,
)
from xlstm_ray.cli.output import leave_terminal, show, tell
from xlstm_ray.cli.replicas import Wanted, open_replicas, require_fleet, smaller_tiles
from xlstm_ray.cli.reporter import ProgressKind, Reporter
from xlstm_ray.cli.session import open_engine, require_places, run_under_keeper
from xlstm_ray.cli.signals import handling, leave_at_once, stop_on_signals
from xlstm_ray.errors import Interrupted, UsageError, pip_install
from xlstm_ray.files import MIB
from xlstm_ray.serve.options import Slots
from xlstm_ray.settings import Settings
from xlstm_ray.threads import settle

if TYPE_CHECKING:
    from xlstm_ray.engine.engine import Engine
    from xlstm_ray.serve.desk import Serves
    from xlstm_ray.serve.options import Options

commands = typer.Typer()
REPLICAS = "Replicas on Ray Serve"
LOOK_S = 1.0  # seconds between two looks at whether the engine still serves
PACKAGES = "fastapi", "uvicorn", "prometheus-client"
# A run's journal and logs have no place here, nor has shrinking: requests share one size of tile.
SETTINGS = """
    model device dtype chunkwise_backend tile_size chunk_size heads_per_band workers threads t_inner autoscale
    autoscale_again warmup force profile stages spans actors_per_device ray_address ray_token_path ray_state_dir
    ray_temp_dir ray_local_mode ray_dashboard ray_dashboard_port ray_keep_alive cache_dir cache_memory_mb cache_disk_mb
    cache_every cache_match states_mb
"""


def _option(flag: str, help: str, **more: Any) -> Any:
    return typer.Option(flag, help=bare(help), rich_help_panel=SERVICE, **more)


_path = partial(_option, metavar="<path>")


def _replicas(flag: str, help: str) -> Any:
    return typer.Option(flag, help=bare(help), rich_help_panel=REPLICAS, min=1, max=1024)


@commands.command(
    rich_help_panel=RUN,
    epilog=examples("xlstm-ray serve", "xlstm-ray serve -m DIR --port 8080 --cache-dir CACHE --api-key-file KEYS"),
)
@takes(SETTINGS)
def serve(
    host: Annotated[
        str, _option("--host", "The address to listen at; beyond this machine only with keys.")
    ] = "127.0.0.1",
    port: Annotated[int, _option("--port", "The port; 0 is a free one.", min=0, max=65535)] = 8000,
    api_key_file: Annotated[
        GivenPath | None,
        _path(
            "--api-key-file", "Callers give the key of one of its lines: Authorization: Bearer KEY (docs/serving.md)."
        ),
    ] = None,
    allowed_host: Annotated[
        list[str] | None, _option("--allowed-host", "A name that callers may use for this machine; may be repeated.")
    ] = None,
    served_name: Annotated[
        str | None,
        _option("--served-name", "The model's name in requests. [default: that of its directory, or on the hub]"),
    ] = None,
    chat_template: Annotated[
        GivenPath | None, _path("--chat-template", "The template of chats, a jinja file. [default: the model's own]")
    ] = None,
    slots: SlotsOption = None,
    deterministic: DeterministicOption = False,
    queue: Annotated[int, _option("--queue", "Answers that may wait for a slot.", min=0, max=1 << 20)] = 256,
    max_tokens: Annotated[int, _option("--max-tokens", "The most tokens of an answer.", min=1, max=1 << 30)] = 4096,
    max_body_mb: Annotated[int, _option("--max-body-mb", "MiB of the largest body.", min=1, max=1 << 20)] = 32,
    max_upload_mb: Annotated[
        int, _option("--max-upload-mb", "MiB of the largest file that is sent as a document.", min=1, max=1 << 30)
    ] = 4096,
    drain_s: Annotated[
        float, _option("--drain-s", "Seconds that requests have to end after SIGTERM or Ctrl-C.", min=0, max=86_400)
    ] = 25.0,
    metrics_compat: Annotated[
        Literal["vllm"] | None, _option("--metrics-compat", "Figures by the names of vllm, too. [default: only xlstm:]")
    ] = None,
    max_stall_ms: Annotated[
        float | None,
        _option(
            "--max-stall-ms", "Answers wait no longer than this for a prompt: smaller tiles. [default: any]", min=1e-3
        ),
    ] = None,
    access_log: Annotated[
        GivenPath | None,
        _path("--access-log", "A line of JSON for each request is added to this file; - prints them."),
    ] = None,
    replicas: Annotated[
        int | None,
        _replicas("--replicas", "So many models, on Ray Serve; prompts go where they are known."),
    ] = None,
    prefill_replicas: Annotated[int | None, _replicas("--prefill-replicas", "Instead: replicas that read.")] = None,
    decode_replicas: Annotated[
        int | None, _replicas("--decode-replicas", "And those that answer from the states of the former.")
    ] = None,
    max_replicas: Annotated[
        int | None, _replicas("--max-replicas", "Under load Serve adds replicas, up to so many of a kind.")
    ] = None,
    progress: ProgressOption = "auto",
    *,
    asked: dict[str, Any],
) -> None:
    """Serve a model over HTTP, by OpenAI's protocol."""
    settings = Settings.make(**asked)
    wanted = Wanted(replicas, prefill_replicas, decode_replicas, max_replicas)
    if wanted:
        require_fleet(settings)
    run_under_keeper(settings, on_ray=bool(wanted))
    from xlstm_ray.choose import choose_model
    from xlstm_ray.serve.options import Options, read_keys

    options = Options(
        host=host,
        port=port,
        keys=() if api_key_file is None else read_keys(api_key_file),
        hosts=tuple(allowed_host or ()),
        name=served_name or ("demo" if settings.model is None else hub.name_of(settings.model)),
        queue=queue,
        body_bytes=max_body_mb * MIB,
        upload_bytes=max_upload_mb * MIB,
        answer_tokens=max_tokens,
        drain_s=drain_s,
        folder=None if settings.cache_dir is None else settings.cache_dir / "documents",
        metrics=("xlstm", *filter(None, [metrics_compat])),
        access_log=access_log,
    )
    missing = [name for name in PACKAGES if find_spec(name.replace("-", "_")) is None]
    if missing:
        raise UsageError(f"a service needs {' and '.join(missing)}; {pip_install(*missing)} installs what is missing")
    require_places(settings, asked["config"], None, None, None)
    with leave_at_once():
        from xlstm_ray.memory.room import require_documents
        from xlstm_ray.serve.server import Server
        from xlstm_ray.text.template import find_template
    template = find_template(choose_model(settings), chat_template)
    if wanted and not settings.force:  # otherwise the model's need has them
        require_documents((settings.states_mb or 0) * MIB, None)
    stop, hurry = threading.Event(), threading.Event()
    server = Server(options, stop, template)

    def signalled(number: int, _frame: object) -> None:
        if number == signal.SIGHUP:
            leave_terminal()
        # SIGTERM may come twice at once: to a whole group of processes, and from the one that keeps a run on Ray.
        (hurry if stop.is_set() and number == signal.SIGINT else stop).set()

    try:
        opened = (
            open_replicas(settings, wanted, Slots(slots, deterministic), server.port, drain_s, progress, max_stall_ms)
            if wanted
            else _open_here(settings, Slots(slots, deterministic), asked, progress, max_stall_ms)
        )
        with opened as (engine, room, report):
            with handling(signalled, signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                with stop_on_signals():  # nobody is served yet, and to compile takes long
                    places = room()
                settle()
                server.open(engine, places, _documents(settings, engine, places))
                report.close()
                show(_welcome(replace(options, port=server.port), server.desk.slots, api_key_file))
                while not stop.wait(LOOK_S) and engine.failed is None:
                    pass
                if engine.failed is not None:
                    raise engine.failed
                tell(f"stopping: requests have {options.drain_s:g} s to end; Ctrl-C ends them now")
                server.drain(hurry)
                server.close()
    finally:
        server.close()
    if hurry.is_set():
        raise Interrupted("requests were cancelled")


@contextmanager
def _paced(
    settings: Settings, asked: dict[str, Any], progress: ProgressKind, max_stall_ms: float | None
) -> "Iterator[tuple[Engine, Reporter]]":
    """The engine and its reporter. Where a tile takes longer than max_stall_ms, it is opened again with a smaller one:
    a service has one size of tile, since bits depend on it.
    """
    with ExitStack() as opened:
        _, engine, report = opened.enter_context(open_engine(settings, None, None, asked, progress, 1))
        if max_stall_ms is not None:
            from xlstm_ray.engine.pace import tile_of

            tile = engine.numerics.tile_size
            fits = tile_of(engine, max_stall_ms, given=settings.tile_size is not None)
            if fits != tile:
                tell(smaller_tiles(fits, tile))
                opened.close()
                asked = {**asked, "tile_size": fits}
                again = open_engine(Settings.make(**asked), None, None, asked, progress, 1)
                _, engine, report = opened.enter_context(again)
        yield engine, report


@contextmanager
def _open_here(
    settings: Settings, slots: Slots, asked: dict[str, Any], progress: ProgressKind, max_stall_ms: float | None
) -> "Iterator[tuple[Serves, Callable[[], int], Reporter]]":
    """What takes the requests, in this process; what makes it ready and returns its slots; the reporter."""
    from xlstm_ray.serve.warm import begin

    with _paced(settings, asked, progress, max_stall_ms) as (engine, report):
        yield engine, lambda: begin(engine, slots), report


def _documents(settings: Settings, engine: "Serves", slots: int) -> int:
    """The bytes that documents' states may take; tells what all takes."""
    from xlstm_ray.engine.engine import Engine
    from xlstm_ray.memory.room import spare_bytes, usual_documents

    asked = None if settings.states_mb is None else settings.states_mb * MIB
    if not isinstance(engine, Engine):
        return usual_documents(spare_bytes(None)) if asked is None else asked
    room = engine.plan.room
    states = room.for_documents(slots) if asked is None else asked
    tell(f"memory: {replace(room, loaded=replace(room.loaded, documents=states)).shown(slots)}")
    return states


def _welcome(options: "Options", slots: int, key_file: Path | None) -> str:
    """What can be pasted to ask it."""
    url, prompt = f"{options.url}/v1", "The capital of France is"
    body = json.dumps({"model": options.name, "prompt": prompt, "max_tokens": 8, "temperature": 0})
    key, header = '"none"', ""
    if key_file is not None:
        path = str(key_file.absolute())
        key = f"open({json.dumps(path)}).readline().split()[0]"
        header = f' -H "Authorization: Bearer $(head -n 1 {shlex.quote(path)} | cut -d " " -f 1)"'
    name, at, text = map(json.dumps, (options.name, url, prompt))  # in quotes that a shell's own go around
    ask = f"create(model={name}, prompt={text}, max_tokens=8, temperature=0).choices[0].text"
    code = f"from openai import OpenAI; print(OpenAI(base_url={at}, api_key={key}).completions.{ask})"
    return (
        f"xlstm-ray serves {options.name} at {url} ({slots} slots)\n"
        f"  curl {url}/completions{header} -d {shlex.quote(body)}\n"
        f"  python -c {shlex.quote(code)}"
    )
