"""What is kept of a run: its state's place, snapshots on the way, and the command that goes on."""

import os
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from xlstm_ray.cli import keeper
from xlstm_ray.cli.output import tell
from xlstm_ray.cli.signals import Stop, stopped_by
from xlstm_ray.errors import GridLost, OutputError, StateError, XlstmRayError
from xlstm_ray.files import shown_bytes
from xlstm_ray.settings import Settings, given_variables

if TYPE_CHECKING:
    from xlstm_ray.engine.engine import Engine
    from xlstm_ray.engine.result import PrefillResult
    from xlstm_ray.state import RecurrentState


class Saved(NamedTuple):
    """Where a run's state is now."""

    start: tuple[str, ...]  # the options that go on from it; none: it is nowhere
    said: str
    asked: Path | None = None  # the file that was asked for, where it could be written
    digest: str | None = None
    failure: str | None = None  # why it could not

    def go_on(self, *, without: Sequence[str] = (), before: str = "\n") -> str:
        """The command that goes on, on a line of its own."""
        return f"{before}to go on: {resume_command(list(self.start), without=without)}" if self.start else ""


def save_state(
    engine: "Engine", state: "RecurrentState", state_out: Path | None, settings: Settings, *, needed: bool
) -> Saved:
    """Write the state to where it was asked for. needed: the run ended early, so that it has to be somewhere.

    What has no place of its own is kept in the cache directory; so is what the place that was asked for cannot take.
    """
    failure: str | None = None
    start: tuple[str, ...] = ()
    if state_out is not None:
        try:
            digest = state.save(state_out, overwrite=settings.overwrite)
            return Saved(("--state-in", str(state_out)), f"state in {state_out}", state_out, digest)
        except StateError as err:
            failure = str(err)
    journal = engine.journal_file
    if needed and not state.complete and journal is not None and not engine.failures:
        said = f"journal in {journal.parent}"
        return Saved(("--resume", str(journal.parent)), f"{failure}; {said}" if failure else said, failure=failure)
    if not needed and failure is None:
        return Saved((), "")
    try:
        kept = state.keep()
        start, said = ("--state-in", str(kept)), f"the state ({shown_bytes(kept.stat().st_size)}) is kept in {kept}"
    except StateError as err:
        said = f"its state is lost: {err}; with --state-out FILE it would be kept there"
    failure = None if failure is None else f"{failure}; {said}"
    return Saved(start, failure or said, failure=failure)


def rescued_state(engine: "Engine", state_out: Path | None, settings: Settings) -> str:
    """Keep what a run that is interrupted in the middle of a window had done before it; says where."""
    state = engine.last_state()
    if state is None:
        return ""
    saved = save_state(engine, state, state_out, settings, needed=True)
    return f" after {sum(state.tokens)} tokens; {saved.said}{saved.go_on()}"


def interrupted_error(result: "PrefillResult", saved: Saved, stop: Stop) -> XlstmRayError:
    """Why the run ended early, what is kept, and how to go on."""
    text = f"stopped after {sum(result.state.tokens)} of {result.stats.prompt_tokens} tokens; {saved.said}"
    text += saved.go_on()
    if result.ended_by is not None:
        return type(result.ended_by)(f"{result.ended_by}; {text}")
    return stopped_by(text, stop)


def _way_on(engine: "Engine", state_out: Path | None) -> str:
    """Where the state is, and the command that goes on from it."""
    if engine.journal_file is not None:
        text = f"; journal in {engine.journal_file.parent}"
        words = ["--resume", str(engine.journal_file.parent)]
    elif state_out is not None:
        text = f"; state in {state_out}"
        words = ["--state-in", str(state_out)]
    else:
        return "; with --state-out FILE the run could be resumed"
    return f"{text}\nto go on: {resume_command(words)}"


def keeping(engine: "Engine", state_out: Path | None) -> "Callable[[RecurrentState], None] | None":
    """What a run on Ray does with each snapshot, so that it outlives this process; a journal does so by itself."""
    run = keeper.current
    if run is None:
        return None
    place = state_out if engine.journal_file is None else None
    missing = False

    def keep(state: "RecurrentState") -> None:
        nonlocal missing
        if place is not None:
            try:
                state.save(run.hold(place))
            except StateError as err:  # the one before stays, and what was said of it
                if not missing:
                    tell(f"note: a snapshot is missing: {err}; the run goes on without it")
                missing = True
                return
            missing = False
        run.kept(f"stopped after {sum(state.tokens)} tokens{_way_on(engine, state_out)}", place)

    return keep


@contextmanager
def prompts_state_kept(
    engine: "Engine", result: "PrefillResult", state_out: Path | None, settings: Settings
) -> Iterator[None]:
    """A grid that is lost after the prompt leaves the prompt's state."""
    if result.complete and (keep := keeping(engine, state_out)):
        keep(result.state)
    try:
        yield
    except GridLost as lost:
        way_on = _way_on(engine, state_out)
        if state_out is not None:
            saved = save_state(engine, result.state, state_out, settings, needed=True)
            way_on = f"; {saved.said}{saved.go_on()}"
        raise GridLost(f"{lost}; the state is the prompt's, without an answer{way_on}") from None


def finish(engine: "Engine", saved: Saved) -> None:
    """After the results are out. Raises OutputError where a file that was asked for is not there or not whole."""
    failures = [*([saved.failure] if saved.failure else []), *engine.failures]
    engine.discard_journal()
    if failures:
        raise OutputError("; ".join(failures))


def resume_command(start: list[str], without: Sequence[str] = ()) -> str:
    """This very command with its environment, but going on from there, and without these options."""
    replaced = "--state-in", "--resume", "--journal", *without
    words, skip = [], False
    for word in sys.argv[1:]:
        if skip or word.startswith(tuple(f"{r}=" for r in replaced)) or word in replaced:
            skip = word in replaced and word != "--jsonl" and not skip
            continue
        words.append(word)
    variables = "".join(f"{name}={shlex.quote(value)} " for name, value in given_variables().items())
    words = [*words[:1], *start, *words[1:]] if without else [*words, *start]
    return f"{variables}{program()} {shlex.join(words)}"


def program() -> str:
    """What starts this program in a shell: without its directory, where that is found."""
    if Path(sys.argv[0]).name == "__main__.py":
        return shlex.join([sys.executable, "-m", "xlstm_ray"])
    found = shutil.which("xlstm-ray")
    same = found is not None and os.path.realpath(found) == os.path.realpath(sys.argv[0])
    return "xlstm-ray" if same else shlex.quote(sys.argv[0])


def require_some(result: "PrefillResult", stop: Stop) -> None:
    if sum(result.state.tokens) == 0:
        if result.ended_by is not None:
            raise result.ended_by
        raise stopped_by("stopped before the first tile; there is nothing to save", stop)
