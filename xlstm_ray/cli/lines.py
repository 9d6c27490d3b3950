"""The lines of `generate --jsonl` as requests to an engine's service: each answer is printed when it ends."""

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple

from xlstm_ray.cli.output import json_line, tell
from xlstm_ray.cli.report import answer_of
from xlstm_ray.cli.reporter import Reporter
from xlstm_ray.cli.signals import Stop, stop_on_signals, stopped_by
from xlstm_ray.csvlog import CsvLog
from xlstm_ray.engine.decode import Made
from xlstm_ray.engine.engine import Engine
from xlstm_ray.engine.request import End, Event, Handle, Piece, Request
from xlstm_ray.engine.windows import GROUP_SIZES, group_size
from xlstm_ray.errors import OutputError, UsageError, XlstmRayError
from xlstm_ray.settings import Settings
from xlstm_ray.state import RecurrentState

AHEAD = 2  # times as many answers are with the service as it makes at once: it has always something to begin
LOOK_S = 0.2  # between two looks whether a signal has come
LOG_COLUMNS = "index id answer finish_reason prompt_tokens resumed_tokens new_tokens queued_s ttft_s total_s".split()


class Line(NamedTuple):
    """A line: its names in the results, and what is asked."""

    name: dict[str, Any]
    request: Request

    @property
    def places(self) -> list[tuple[int, int]]:
        """Of its answers: the line's index, and which of its answers it is."""
        sampling = self.request.sampling
        assert sampling is not None
        return [(self.name["index"], n) for n in range(sampling.n)]


class _Ended(NamedTuple):
    """An answer. made: its tokens with their log-probabilities, if they were requested."""

    line: Line
    place: tuple[int, int]
    end: End
    made: list[tuple[int, Made]]


class Lines:
    """Lines on their way. Few are with the service at a time, so memory does not grow with their number.

    write: takes each answer's row. ordered: in the order of the lines, else as they end.
    """

    def __init__(self, engine: Engine, lines: Sequence[Line], write: Callable[[dict[str, Any]], None], ordered: bool):
        self._engine, self._left, self._write = engine, deque(lines), write
        places = [place for line in lines for place in line.places]
        self.done, self.total, self.tokens = 0, len(places), 0
        self.whole = 0  # answers that were not cut short
        self._order = deque(places if ordered else [])
        self._early: dict[tuple[int, int], dict[str, Any]] = {}  # rows that wait for those before them
        self._under_way: dict[tuple[int, int], Handle] = {}
        self._ended: SimpleQueue[_Ended] = SimpleQueue()

    def run(self, stop: Stop, report: Callable[["Lines"], object]) -> None:
        """Until all have ended. After a signal, and after an error, which is raised at the end, no line is begun."""
        slots = self._engine.serve(buckets=(bucket_of(self._engine, self.total),))
        error: XlstmRayError | None = None
        while self._left or self._under_way:
            if stop() or error is not None:
                self._left.clear()
                for handle in list(self._under_way.values()):
                    handle.cancel()
            try:
                while self._left and len(self._under_way) < AHEAD * slots:
                    self._begin(self._left.popleft())
            except XlstmRayError as err:
                error = err
                continue
            try:
                ended = self._ended.get(timeout=LOOK_S)
            except Empty:
                continue
            error = error or ended.end.error
            self._take(ended)
            report(self)
        for place in sorted(self._early):
            self._write(self._early[place])
        if error is not None:
            raise error

    def _begin(self, line: Line) -> None:
        for place, handle in zip(line.places, self._engine.submit_n(line.request), strict=True):
            self._under_way[place] = handle
            handle.listen(partial(self._hear, line, place, []))

    def _hear(self, line: Line, place: tuple[int, int], made: list[tuple[int, Made]], event: Event) -> None:
        """In the engine's thread."""
        if isinstance(event, Piece) and event.token is not None and event.made is not None:
            made.append((event.token, event.made))
        if isinstance(event, End):
            self._ended.put(_Ended(line, place, event, made))

    def _take(self, ended: _Ended) -> None:
        line, place, end, made = ended
        del self._under_way[place]
        row = {**line.name, "answer": place[1], **answer_of(self._engine, end, made)}
        self.done, self.tokens = self.done + 1, self.tokens + row["prompt_tokens"] + row["new_tokens"]
        self.whole += row["finish_reason"] in ("stop", "length")
        if not self._order:
            self._write(row)
            return
        self._early[place] = row
        while self._order and self._order[0] in self._early:
            self._write(self._early.pop(self._order.popleft()))


def lines_of(
    engine: Engine,
    given: dict[str, list[str]],
    names: list[dict[str, Any]],
    sampling: dict[str, Any],
    own: list[dict[str, Any]],
    state: RecurrentState | None,
    prompt_logprobs: int | None,
) -> list[Line]:
    """given: the prompts, or what is appended to `state`. Raises UsageError for wrong sampling."""
    ((kind, texts),) = given.items()
    usual = Request(state=state, prompt_logprobs=prompt_logprobs)
    wanted = engine.samplings.of_rows(sampling, own, state, len(texts))
    if state is not None:
        engine.samplings.with_prompts(wanted, None, texts, state)  # for what it tells
    return [
        Line(name, replace(usual, **{kind: text}, sampling=one))  # type: ignore[arg-type]
        for name, text, one in zip(names, texts, wanted.rows, strict=True)
    ]


def bucket_of(engine: Engine, answers: int) -> int:
    """The rows of a call that decodes: as many as are of use and fit in memory.

    A run has one number, so that a row has the same bits in every run.
    """
    useful = [size for size in GROUP_SIZES if size <= group_size(answers)]
    return max((size for size in useful if engine.plan.room.slots(size) == size), default=1)


def answer_lines(engine: Engine, lines: Sequence[Line], settings: Settings, report: Reporter, *, ordered: bool) -> None:
    """Answer all lines. Raises Interrupted after a signal: what was in work is printed as `cancelled`."""
    with _log(settings) as log:

        def write(row: dict[str, Any]) -> None:
            if log is not None:
                log.row(*(row.get(name) for name in LOG_COLUMNS))
            json_line(row)

        run = Lines(engine, lines, write, ordered)

        def so_far() -> str:
            left = run.total - run.whole
            return f" after {run.whole} of {run.total} answers; no state is kept, and {left} can be asked for again"

        def leave() -> str:
            """The second Ctrl-C: the engine's thread may be in a long call, and nothing here is to be kept."""
            if settings.ray_local_mode and not settings.ray_address:
                report.close()
                tell(f"interrupted{so_far()}")
                os._exit(130)
            return so_far()

        with stop_on_signals(report.at_once, leave) as stop, report:
            stop.at = "token"
            report.phase("answering")
            run.run(stop, lambda run: report.answers(run.done, run.total, run.tokens))
        if stop.signals:
            raise stopped_by(f"stopped{so_far()}", stop)


@contextmanager
def _log(settings: Settings) -> Iterator[CsvLog | None]:
    """The file of --stats-log, with a row for each answer. Raises OutputError at the end if it is not whole."""
    path = settings.stats_log
    if path is None:
        yield None
        return
    try:
        log = CsvLog(path, LOG_COLUMNS, overwrite=settings.overwrite)
    except OSError as err:
        raise UsageError(f"--stats-log {path}: cannot be written ({err.strerror})") from None
    try:
        yield log
    finally:
        log.close()
    if log.failure is not None:
        raise OutputError(f"--stats-log {path}: is not whole ({log.failure.strerror})")
