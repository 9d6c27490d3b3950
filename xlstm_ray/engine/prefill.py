"""One call of prefill: groups of rows, snapshots, the memory guard, and the result."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from time import perf_counter, time

from xlstm_ray.engine.batch import BatchOutcome, prefill_groups, take
from xlstm_ray.engine.core import Core
from xlstm_ray.engine.decode import require_finite
from xlstm_ray.engine.driver import LAST, Each, Hooks, Progress, Sizes, Snapshot
from xlstm_ray.engine.guard import MemoryGuard, Stop
from xlstm_ray.engine.held import HeldRows
from xlstm_ray.engine.logs import RunLogs
from xlstm_ray.engine.result import OtherTimes, PrefillResult, Statistics
from xlstm_ray.engine.resume import Going
from xlstm_ray.engine.reuse import Reuse, Share
from xlstm_ray.engine.scores import Scores
from xlstm_ray.engine.windows import Group, plan_groups, window_calls, window_sizes
from xlstm_ray.errors import MemoryLimitError
from xlstm_ray.state import RecurrentState


@dataclass(frozen=True)
class Asked:
    """A caller's arguments, as in Engine.prefill."""

    each: Each = LAST
    on_progress: Callable[[Progress], object] | None = None
    on_ready: Callable[[int, PrefillResult], object] | None = None
    should_stop: Callable[[], bool] = lambda: False
    on_snapshot: Callable[[RecurrentState], object] | None = None
    share: Share = Share()


class Prefill:
    """One call of prefill. state: where the rows start from. encode_s: the seconds of cutting texts into tokens."""

    def __init__(self, core: Core, going: list[Going], state: RecurrentState | None, asked: Asked, encode_s: float):
        self._core, self._going, self._asked, self._encode_s = core, going, asked, encode_s
        self._rows = [one.tokens for one in going]
        self._ends, self._begin = [len(row) for row in self._rows], [one.seen for one in going]
        plan = core.plan
        self._begun = list(state.begun or state.tokens) if state is not None else self._begin
        self._sampling = None if state is None else state.sampling
        if state is None:
            nothing = core.nothing.expand(len(going), -1)
            self._start = Snapshot(self._begin, nothing, HeldRows([None] * len(going)))
        else:
            sums = [one.begun.scored for one in going]
            self._start = Snapshot(self._begin, state.logits, core.rows_of(state), sums)
        mixed = state is not None and state.numerics != plan.numerics and any(self._begin)
        self._groups = plan_groups(
            self._begun, self._ends, tile_size=plan.numerics.tile_size, chunk_size=plan.numerics.chunk_size
        )
        self._reuse = Reuse(core.cache if asked.each == LAST and not mixed else None, going, asked.share)
        self._reuse.find(self._groups, self._begun, plan.numerics)
        self._start = self._reuse.start(self._start)
        self._begin = self._start.consumed
        # These change during the run.
        self._numerics = plan.numerics.model_copy(update={"mixed": mixed or not self._reuse.exact})
        self._left = list(self._groups)  # groups that are not done
        self._ended_by: MemoryLimitError | None = None
        self._windows = 0
        self._bring: Callable[[], RecurrentState] | None = None  # fetches the state at the last window's end
        self._compile_s = 0.0  # for all sizes
        self._paused_s = 0.0  # part of compile_s spent after the first tile

    def run(self) -> PrefillResult:
        """Read all rows. Raises MemoryLimitError if they do not fit, before any work; GridLost without a snapshot."""
        core, own = self._core, len(self._rows)
        try:
            with core.kept.one_run if core.writes else nullcontext():
                others = sum(core.rows)
                core.rows.append(own)
                try:
                    return self._run(kept_rows=own + others if others else None)
                except BaseException:
                    core.kept.hold(self._bring)
                    self._bring = None
                    raise
                finally:
                    core.rows.remove(own)
        finally:
            self._reuse.release()

    def _run(self, kept_rows: int | None) -> PrefillResult:
        core, plan, kept, asked = self._core, self._core.plan, self._core.kept, self._asked
        calls = self._calls(self._groups, self._begun, self._sizes)
        plan.room.require(len(self._rows), calls, kept_rows, scored=asked.each.scores)
        kept.begin(plan.config.state_file_bytes(len(self._rows)))
        with RunLogs(plan.logs, core.logs, self._log_failed) as logs, ExitStack() as open_:
            guard = MemoryGuard.of(
                core,
                open_,
                batch=len(self._rows),
                left=lambda sizes: self._calls(self._left, self._begin, sizes),
                log=logs.memory,
            )
            core.states.evict(but=self._start.rows)
            self._warm_up()
            if core.running.launches is not None:
                core.running.launches.total = 0
            core.on_phase("prefill")
            snapshots = kept.journal is not None or asked.on_snapshot is not None
            outcome = prefill_groups(
                core.states,
                self._rows,
                self._groups,
                start=self._start,
                sizes=lambda: self._sizes,
                each=asked.each,
                hooks=Hooks(
                    keep_every=plan.journal_every,
                    on_snapshot=self._keep if snapshots else None,
                    on_group=self._ready,
                    on_progress=lambda p: self._progress(p, logs),
                    on_window=self._hold,
                    wants=self._reuse.wants if self._reuse.hits else None,
                    on_wanted=self._wanted,
                    next=lambda: self._next(guard),
                ),
            )
            logs.seen(core.running.seen(at_end=logs.memory is not None))
        if outcome.lost and not any(outcome.end.rows):
            raise outcome.lost  # no snapshot yet: nothing to keep
        chosen = perf_counter()
        outcome.end.logits.argmax(-1).tolist()
        stats = self._statistics(outcome, perf_counter() - chosen)
        state, self._bring = self._state_at(outcome.end), None  # which holds the memory of a whole state
        if not state.complete and not outcome.lost:
            kept.write(state)
        ended_by = outcome.lost or self._ended_by
        scores = self._scores(outcome, range(len(self._rows)))
        return PrefillResult(state, outcome.end.logits, stats, outcome.all_logits, scores, ended_by, outcome.end.scored)

    # -- between windows -----------------------------------------------------------------------------------------------
    @property
    def _sizes(self) -> Sizes:
        return Sizes(self._numerics.tile_size, self._numerics.chunk_size)

    def _next(self, guard: MemoryGuard | None) -> Sizes | None:
        """The sizes of the next window; None: stop."""
        if self._asked.should_stop():
            return None
        for text in self._core.running.helpers_lost():
            self._core.on_note(text)
        if guard is not None:
            verdict = guard.next(self._sizes)
            if isinstance(verdict, Stop):
                self._ended_by = verdict.error
                return None
            if verdict.sizes != self._sizes:
                self._resize(verdict.sizes)
        self._windows += 1
        return self._sizes

    def _resize(self, sizes: Sizes) -> None:
        begun = self._windows > 0 or any(self._begin)
        mixed = self._numerics.mixed or begun
        update = {"tile_size": sizes.tile, "chunk_size": sizes.chunk, "mixed": mixed}
        self._numerics = self._numerics.model_copy(update=update)
        self._core.on_note(
            f"memory: tiles of {sizes.tile} tokens and chunks of {sizes.chunk} from here on"
            + ("; the result has mixed numerics now: right within rounding, but not to the bit" if begun else "")
        )
        self._paused_s += self._warm_up()

    def _warm_up(self) -> float:
        """Compile the present sizes; returns the seconds it took."""
        seconds, (tile, chunk) = 0.0, self._sizes
        for rows, size in self._left:
            begin, ends = [self._begin[b] for b in rows], [self._ends[b] for b in rows]
            windows = window_sizes(begin, ends, tile_size=tile, chunk_size=chunk)
            seconds += self._core.warm_up(size, windows, chunk)
        self._compile_s += seconds
        return seconds

    def _calls(self, groups: Sequence[Group], begin: Sequence[int], sizes: Sizes) -> list[tuple[int, int]]:
        """The shapes (rows, tokens) of the windows of these groups."""
        return window_calls(groups, begin, self._ends, tile_size=sizes.tile, chunk_size=sizes.chunk)

    # -- what is told and kept -----------------------------------------------------------------------------------------
    def _progress(self, p: Progress, logs: RunLogs) -> None:
        logs.progress(p, self._sizes, self._core.running)
        if self._asked.on_progress is not None:
            self._asked.on_progress(p)

    def _log_failed(self, text: str) -> None:
        self._core.kept.failed(text)
        self._core.on_note(text)

    def _hold(self, bring: Callable[[], Snapshot]) -> None:
        self._bring = lambda: self._state_at(bring())

    def _keep(self, snapshot: Snapshot) -> None:
        state = self._state_at(snapshot)
        self._core.kept.write(state)
        if self._asked.on_snapshot is not None:
            self._asked.on_snapshot(state)

    def _wanted(self, group: Group, part: Snapshot) -> None:
        """Give the cache the states of a group that it wants."""
        self._reuse.keep(group, part, cold=self._numerics == self._core.plan.numerics)

    def _ready(self, group: Group, outcome: BatchOutcome) -> None:
        self._left.remove(group)
        own, places = take(outcome.end, group.rows, len(group.rows)), group.rows
        self._wanted(group, own)
        if self._asked.on_ready is None:
            return
        stats = self._statistics(outcome, 0.0).of_rows(places)
        scores = self._scores(outcome, places)
        result = PrefillResult(self._state_at(own, places), own.logits, stats, prompt_logprobs=scores)
        for n, b in enumerate(places):
            self._asked.on_ready(b, result.row(n))

    def _scores(self, outcome: BatchOutcome, places: Sequence[int]) -> list[Scores]:
        """The log-probabilities of these rows. A row that was not begun has none."""
        count = self._asked.each.likeliest
        if count is None:
            return []
        found, start = outcome.scores, self._start
        return [
            found[b] if b in found else Scores(self._rows[b], self._begin[b], start.logits[b], count) for b in places
        ]

    def _statistics(self, outcome: BatchOutcome, chosen_s: float) -> Statistics:
        """The figures so far; the first token has just been chosen."""
        other = OtherTimes(self._compile_s, self._paused_s, self._encode_s + chosen_s)
        with self._core.turn.executor():
            stats = Statistics.of(self._ends, list(self._begin), self._core.running, outcome, other)
        stats.first_token_at, stats.row_cache = time(), self._reuse.uses()
        return stats

    def _state_at(self, snapshot: Snapshot, places: Sequence[int] | None = None) -> RecurrentState:
        """A snapshot of the rows at these places (None: all rows) as a state for callers."""
        places = range(len(self._rows)) if places is None else places
        require_finite(snapshot.logits, self._core.plan.model)
        for b, c in zip(places, snapshot.consumed, strict=True):
            self._going[b].advance(c)
        complete = snapshot.consumed == [self._ends[b] for b in places]
        known = [self._going[b].known(self._core.text, complete=complete) for b in places]
        known = [
            row.model_copy(update={"scored": None if complete else sums})
            for row, sums in zip(known, snapshot.scored, strict=True)
        ]
        made = self._core.state(snapshot, known, self._numerics, self._sampling, complete=complete)
        made.begun = None if complete else [self._begun[b] for b in places]
        return made
