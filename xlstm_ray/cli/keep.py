"""What is kept of a run: its state, snapshots during the run, and the command that resumes it."""

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
from xlstm_ray.kernels.inductor import switched_off
from xlstm_ray.settings import Settings, given_variables

if TYPE_CHECKING:
    from xlstm_ray.engine.engine import Engine
    from xlstm_ray.engine.result import PrefillResult
    from xlstm_ray.state import RecurrentState


class Saved(NamedTuple):
    """The place of a run's state."""

    start: tuple[str, ...]  # the options that resume from it; empty: there is no state
    said: str
    asked: Path | None = None  # the requested file, if it was written
    digest: str | None = None
    failure: str | None = None  # why the requested file was not written

    def go_on(self, *, without: Sequence[str] = (), before: str = "\n") -> str:
        """The command that resumes the run, on its own line."""
        return f"{before}to go on: {resume_command(list(self.start), without=without)}" if self.start else ""


def save_state(
    engine: "Engine", state: "RecurrentState", state_out: Path | None, settings: Settings, *, needed: bool
) -> Saved:
    """Write the state to the requested file. needed: the run ended early, so the state must be saved somewhere.

    Without a requested file, or if it cannot be written, a needed state goes to the cache directory.
    """
    saved = _saved(engine, state, state_out, settings, needed=needed)
    if keeper.current is not None and (saved.start or not needed):
        keeper.current.settle()
    return saved


def _saved(
    engine: "Engine", state: "RecurrentState", state_out: Path | None, settings: Settings, *, needed: bool
) -> Saved:
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
    """Save the state before the window that was interrupted; returns a text about its place."""
    state = engine.last_state()
    if state is None:
        return ""
    saved = save_state(engine, state, state_out, settings, needed=True)
    return f" after {sum(state.tokens)} tokens; {saved.said}{saved.go_on()}"


def interrupted_error(result: "PrefillResult", saved: Saved, stop: Stop) -> XlstmRayError:
    """A text: why the run ended early, what is kept, and how to resume."""
    text = f"stopped after {sum(result.state.tokens)} of {result.stats.prompt_tokens} tokens; {saved.said}"
    text += saved.go_on()
    if result.ended_by is not None:
        return type(result.ended_by)(f"{result.ended_by}; {text}")
    return stopped_by(text, stop)


def _way_on(engine: "Engine", state_out: Path | None) -> str:
    """A text: the place of the state, and the command that resumes from it."""
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
    """What a run on Ray does with each snapshot, so that it survives this process (a journal does anyway)."""
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
            except StateError as err:  # the snapshot before stays, and its text
                if not missing:
                    tell(f"note: a snapshot is missing: {err}; the run goes on without it")
                missing = True
                return
            missing = False
        run.kept(f"stopped after {sum(state.tokens)} tokens{_way_on(engine, state_out)}", place)

    return keep


@contextmanager
def snapshot_kept() -> Iterator[None]:
    """If the run ends before its state is saved, its last snapshot gets the state's place.

    A state is with the grid until it is saved: a grid that is lost after the last tile takes it along.
    """
    try:
        yield
    except BaseException as error:
        text = keeper.current.put_in_place() if keeper.current is not None else None
        if text is None:
            raise
        if isinstance(error, GridLost):
            raise type(error)(f"{error}; {text}") from None
        tell(f"note: {text}")
        raise


@contextmanager
def prompts_state_kept(
    engine: "Engine", result: "PrefillResult", state_out: Path | None, settings: Settings
) -> Iterator[None]:
    """If the grid is lost after the prompt, keep the prompt's state."""
    if result.complete and (keep := keeping(engine, state_out)):
        keep(result.state)
    try:
        yield
    except GridLost as lost:
        way_on = _way_on(engine, state_out)
        if state_out is not None:
            saved = save_state(engine, result.state, state_out, settings, needed=True)
            way_on = f"; {saved.said}{saved.go_on()}"
        if keeper.current is not None:
            keeper.current.settle()
        raise GridLost(f"{lost}; the state is the prompt's, without an answer{way_on}") from None


def finish(engine: "Engine", saved: Saved) -> None:
    """Call after the results are printed. Raises OutputError if a requested file is missing or incomplete."""
    failures = [*([saved.failure] if saved.failure else []), *engine.failures]
    engine.discard_journal()
    if failures:
        raise OutputError("; ".join(failures))


def resume_command(start: list[str], without: Sequence[str] = ()) -> str:
    """This command with its environment, but with the options that resume, and without some others."""
    replaced = "--state-in", "--resume", "--journal", *without
    words, skip = [], False
    for word in sys.argv[1:]:
        if skip or word.startswith(tuple(f"{r}=" for r in replaced)) or word in replaced:
            skip = word in replaced and word not in ("--jsonl", "--chat") and not skip
            continue
        words.append(word)
    needed = given_variables() if (switch := switched_off()) is None else {**given_variables(), switch: "1"}
    variables = "".join(f"{name}={shlex.quote(value)} " for name, value in needed.items())
    words = [*words[:1], *start, *words[1:]] if without else [*words, *start]
    return f"{variables}{program()} {shlex.join(words)}"


def program() -> str:
    """The word that starts this program in a shell; without its directory if the shell finds it."""
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
