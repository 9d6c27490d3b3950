"""A command's settings, checked before torch is loaded, and its engine, open while the command runs."""

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from xlstm_ray import files
from xlstm_ray.cachefiles import Folder
from xlstm_ray.cli import keeper
from xlstm_ray.cli.models import fetch_weights
from xlstm_ray.cli.output import note, tell
from xlstm_ray.cli.reporter import ProgressKind, Reporter
from xlstm_ray.cli.signals import leave_at_once, stop_on_signals
from xlstm_ray.errors import StateError, UsageError
from xlstm_ray.files import JOURNAL_FILE, Input, Output, check_outputs, require_writable
from xlstm_ray.settings import Settings

if TYPE_CHECKING:
    from xlstm_ray.choose import Setup
    from xlstm_ray.engine.engine import Engine
    from xlstm_ray.text.template import Template


def require_places(
    settings: Settings,
    config: Path | None,
    prompt_file: str | None,
    state_in: Path | None,
    state_out: Path | None,
    *,
    later: bool = False,
) -> None:
    """Check before torch is loaded that every output may be written, and that there is one where it is asked for.

    later: there may be others, which are named later.
    """
    if not later:
        settings.require_output(state_out)
    outputs = [Output("--state-out", state_out, files.STATE)] if state_out is not None else []
    inputs = settings.inputs()
    if prompt_file not in (None, "-"):
        inputs.append(Input("--prompt-file", Path(str(prompt_file))))
    if config is not None:
        inputs.append(Input("--config", config))
    if state_in is not None:
        inputs.append(Input("--state-in", state_in, files.STATE))
    if settings.cache_dir is not None:
        Folder(settings.cache_dir)
    check_outputs([*outputs, *settings.outputs()], inputs, overwrite=settings.overwrite)


def require_one_form(*, json_output: bool, jsonl: bool) -> None:
    """Refuse to be asked twice how results are printed."""
    if json_output and jsonl:
        raise UsageError("--json has no effect beside --jsonl, which prints an object for each line; leave it out")


def require_no_documents(settings: Settings) -> None:
    """Refuse room for documents where there are none."""
    if "states_mb" in settings.flags():
        raise UsageError("`states_mb` has no effect here: only `xlstm-ray serve` has documents; leave it out")


def require_use_of_cache(settings: Settings) -> None:
    """Refuse a cache in the memory of a command that reads its prompts at once, and then ends."""
    if settings.cache_dir is None and "cache_memory_mb" in settings.flags():
        raise UsageError(
            "`cache_memory_mb` has no effect without `cache_dir` here: it keeps states for prompts to come, and this "
            "command reads all of its own at once; add it, or leave both out"
        )


def require_no_shrinking(settings: Settings) -> None:
    """Refuse options about smaller tiles where requests share one size of them."""
    for name in ("shrink_on_soft", "min_chunk"):
        if name in settings.flags():
            raise UsageError(
                f"{settings.named(name)} has no effect with --jsonl, whose lines share one size of tile; leave it out"
            )


def check_prompt_logprobs(count: int | None, *, printed: bool) -> None:
    """Refuse a wrong number of log-probabilities before a model is read. printed: whether results are JSON."""
    from xlstm_ray.sampling.params import require_likeliest

    require_likeliest(count)
    if count is not None and not printed:
        raise UsageError("`prompt_logprobs` are printed with --json and --jsonl; add one, or leave it out")


def check_generation(sampling: dict[str, Any], own: list[dict[str, Any]], *, printed: bool) -> list[int]:
    """Refuse wrong sampling before a model is read; returns how many answers each line gets (or each prompt).

    own: fields of each line of --jsonl; [] without lines. printed: whether results are printed as JSON, which
    log-probabilities need.
    """
    from xlstm_ray.sampling.params import Sampling, over

    usual, lines = Sampling.make(sampling).n, []
    for n, fields in enumerate(own):
        try:
            lines.append(Sampling.make(over(sampling, fields)).n)
        except UsageError as err:
            raise UsageError(f"the line of index {n}: {err}") from None
    if "logprobs" in sampling and not printed:
        raise UsageError("`logprobs` are printed with --json and --jsonl; add one, or leave it out")
    return lines or [usual]


@contextmanager
def open_engine(
    settings: Settings,
    state_in: Path | None,
    state_out: Path | None,
    asked: dict[str, Any],
    progress: ProgressKind,
    rows: int,
) -> "Iterator[tuple[dict[str, Any], Engine, Reporter]]":
    """Yields the state to go on from (as keyword arguments of prefill and generate), the engine, and the reporter.

    Settings that were not given come from the state, so that the numerics agree. At the end the engine is closed, with
    its actors and head; a head that stays is reported. rows: the number of prompts; 0 if only a state is given.
    """
    from xlstm_ray.choose import choose_model, choose_setup, setup_of
    from xlstm_ray.config import ModelConfig

    if settings.resume is not None:
        for other, given in (("--state-in", state_in), ("--journal", settings.journal)):
            if given is not None:
                raise UsageError(f"{other} and --resume were both given; a resumed run goes on in its own journal")
        state_in = settings.resume / JOURNAL_FILE
        if not state_in.is_file():
            raise StateError(f"{settings.resume}: has no journal of a run that did not end ({JOURNAL_FILE})")
    if state_in is None:
        setup = choose_setup(settings)
        config = setup.config
    elif not os.path.exists(state_in):
        raise StateError(f"{state_in}: there is no such state file")
    else:  # settings that were not given come from the state
        config = ModelConfig.from_file(choose_model(settings) / "config.json")
    if state_out is not None:
        before = state_in.stat().st_size if state_in else 0  # to a state of several rows one text is appended
        size = max(before, config.state_file_bytes(max(1, rows)))
        if keeper.current is not None and settings.journal is None and settings.resume is None:
            size *= 2  # the last snapshot stays while the next one is written
        require_writable(state_out, option="--state-out", size=size)
    fetch_weights(settings, progress)  # here: the hub draws bars of its own
    with Reporter(progress) as report:
        start: dict[str, Any] = {}
        with ExitStack() as ahead:
            with leave_at_once():
                report.phase("loading torch")
                if state_in is None and setup.head is not None:
                    ahead.enter_context(_connected(setup))
                from xlstm_ray.engine.engine import Engine
                from xlstm_ray.state import RecurrentState

                if state_in is not None:
                    state = start["state"] = RecurrentState.load(state_in)
                    numerics = {**state.numerics.model_dump(), "chunkwise_backend": _backend_of(state.numerics.kernel)}
                    for no_setting in ("kernel", "mixed", "eager"):
                        numerics.pop(no_setting, None)
                    setup = setup_of(**asked, state=(str(state_in), numerics))
            # In this process nothing is lost by leaving at once, but a head that is started must be stopped again.
            leaving: Any = leave_at_once if settings.ray_local_mode and not settings.ray_address else stop_on_signals
            with leaving():
                engine = Engine(setup, on_phase=report.phase, on_note=note)
        try:
            if engine.note:
                note(engine.note)
            if settings.resume is not None:
                start["any_numerics"] = True
                if not start["state"].numerics.goes_on_as(engine.numerics):
                    differences = start["state"].numerics.differences(engine.numerics)
                    tell(
                        f"note: the journal was made with other numerics ({differences}): the result will be that of "
                        "an uninterrupted run within rounding, not to the bit"
                    )
            yield start, engine, report
        finally:
            engine.close()
            if engine.stays is not None:
                from xlstm_ray.supervisor.records import stays_lines

                tell("\n".join(stays_lines(engine.stays)))


@contextmanager
def _connected(setup: "Setup") -> Iterator[None]:
    """Connect to somebody's head, which takes seconds of waiting, while a thread imports torch. Engines share it."""
    from xlstm_ray.supervisor.connect import connect, job_metadata

    def import_torch() -> None:
        with suppress(ImportError):  # the engine's own import raises it
            import torch  # noqa: F401

    assert setup.head is not None
    address, token_path, state_dir = setup.head
    metadata = job_metadata(setup.model, setup.stages)
    importing = threading.Thread(target=import_torch, name="torch")
    importing.start()
    try:
        with connect(address, state_dir=state_dir, token_path=token_path, metadata=metadata):
            yield
    finally:
        importing.join()  # no module is half imported when this process ends


def _backend_of(kernel: str) -> str:
    from xlstm_ray.kernels import CHUNKWISE_BACKENDS

    return next(name for name, backend in CHUNKWISE_BACKENDS.items() if backend.kernel == kernel)


class Chosen(NamedTuple):
    """The template of chats; note: what is to be said about it."""

    template: "Template"
    note: str | None = None


def chosen_template(settings: Settings, given: Path | None) -> Chosen:
    """The template that was named, else the model's own, else that of plain lines."""
    with leave_at_once():
        from xlstm_ray.choose import choose_model
        from xlstm_ray.text.template import PLAIN, find_template
    found = find_template(choose_model(settings), given)
    return (
        Chosen(found)
        if found
        else Chosen(
            PLAIN,
            "this model has no chat template: it goes on from what is said, word for word, each turn on a new line; "
            "--chat-template FILE gives it one",
        )
    )


def run_under_keeper(settings: Settings, *, on_ray: bool = False) -> None:
    """Start a run on Ray in a child process: Ray may kill it at any moment. on_ray: whatever the settings say."""
    grid = "ray_" in (settings.chunkwise_backend or "ray_") and (
        settings.ray_address is not None or not settings.ray_local_mode
    )
    if (on_ray or grid) and keeper.current is None:
        sys.exit(keeper.start())
