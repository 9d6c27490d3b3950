"""Engine: a loaded model on its device; prefill and generate."""

import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from secrets import token_hex
from time import perf_counter, time
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from xlstm_ray.checkpoint import Checkpoint
from xlstm_ray.choose import (
    choose_device,
    choose_dtype,
    choose_grid,
    choose_limits,
    choose_setup,
    choose_steps,
    choose_streams,
    choose_workers,
)
from xlstm_ray.directories import default_state_dir
from xlstm_ray.engine.batch import BatchOutcome, prefill_groups, take
from xlstm_ray.engine.decode import require_finite
from xlstm_ray.engine.driver import Progress, Snapshot
from xlstm_ray.engine.generation import Generation
from xlstm_ray.engine.guard import MemoryGuard
from xlstm_ray.engine.journal import Journal
from xlstm_ray.engine.result import PrefillResult, Statistics
from xlstm_ray.engine.resume import appended, prompts
from xlstm_ray.engine.turn import Turn, in_turn
from xlstm_ray.engine.windows import Group, group_size, plan_groups, window_calls
from xlstm_ray.errors import StateError, UsageError
from xlstm_ray.files import check_outputs
from xlstm_ray.generation_config import GenerationConfig
from xlstm_ray.kernels.compiled import compile_strict
from xlstm_ray.kernels.inductor import LaunchCounter
from xlstm_ray.launch import attached, device_of_cluster, grid_executor, head_options, job_metadata, require_compiler
from xlstm_ray.layout import make_grid
from xlstm_ray.memory.need import DASHBOARD, HEAD, WATCHDOG, Loaded, Need
from xlstm_ray.memory.room import Room, base_bytes
from xlstm_ray.memory.sample import (
    device_total_bytes,
    peak_device_bytes,
    peak_process_bytes,
    take_sample,
)
from xlstm_ray.memory.watchdog import Limits
from xlstm_ray.runtime.blocks import Kernels
from xlstm_ray.runtime.executor import Executor
from xlstm_ray.runtime.local import InProcessExecutor
from xlstm_ray.runtime.worker import Worker
from xlstm_ray.sampling import Sampling
from xlstm_ray.settings import Settings, unknown_variables
from xlstm_ray.state import Grid, RecurrentState
from xlstm_ray.supervisor.connect import connect
from xlstm_ray.supervisor.mode import Mode
from xlstm_ray.supervisor.ports import is_loopback
from xlstm_ray.supervisor.records import Head, dashboard_line, lost_helpers
from xlstm_ray.supervisor.start import managed
from xlstm_ray.text.history import Row
from xlstm_ray.text.prompt import Prompt, as_batch
from xlstm_ray.text.tokenizer import NextToken, Text

if TYPE_CHECKING:
    from xlstm_ray.actors.metrics import GridMetrics
    from xlstm_ray.actors.watchdog import Event


class Engine:
    """A loaded model on its device: prefill and generate. Made by `xlstm_ray.load`.

    It has one state, so it does one call at a time: a thread waits while another's runs, or has a generation that has
    not ended. A call from inside another one (from `on_progress`) and one in a forked child raise UsageError.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        on_phase: Callable[[str], object] = lambda text: None,
        on_note: Callable[[str], None] | None = None,
    ):
        self._turn = Turn()
        self._on_phase = on_phase  # told what begins that may take long
        self._told = on_note
        self.settings = settings
        self._cluster = ExitStack()
        self._executor: Executor | None = None
        self.stays: Head | None = None  # a head of ours that outlives this engine
        self._head: Head | None = None  # a head of ours
        self._metrics: GridMetrics | None = None  # where Ray is, to show them
        self._lost_helpers: set[str] = set()  # of it, that have been told of
        self._memory_events: list[Event] = []  # that the watchdogs of the grid's nodes have reported
        self._launches: LaunchCounter | None = None
        self._journal: Journal | None = None
        self._failures: list[str] = []  # of files that were asked for
        self._last: Callable[[], RecurrentState] | None = None
        self._told_published = False
        self._logs: set[str] = set()  # what has been written by an earlier run of this engine
        self.on_note = on_note or _warn  # told what a person should know of a run that goes on
        try:
            self._open()
        except BaseException:  # Ctrl-C too: neither actors nor a head of ours may stay
            self.close()
            raise

    def _open(self) -> None:
        started = perf_counter()
        settings = self.settings
        self._on_phase("loading the model")
        self.model_path, self.config, self.backend, self.mode = choose_setup(settings)
        check_outputs(settings.outputs(), settings.inputs(), overwrite=settings.overwrite)
        self._open_journal()
        ray = self._cluster.enter_context(attached(settings, self.model_path)) if self.mode is Mode.ATTACHED else None
        self.device = choose_device(settings) if ray is None else device_of_cluster(settings, ray)
        self.grid = choose_grid(settings, self.backend, self.config, self.device)
        if settings.actors_per_device > 1 and self.device.type == "cpu":
            raise UsageError(
                f"{settings.named('actors_per_device')} is for GPUs, and the grid's device is the CPU, which actors "
                "share by --threads; leave it out"
            )
        if self.mode is not Mode.ATTACHED:
            require_compiler(self.backend, self.device)
        self.text = Text(self.model_path, self.config, self._between_pieces)
        self.tokenizer = self.text.tokenizer
        self.published = GenerationConfig.of(self.model_path)
        config_eos = self.config.eos_token_id
        self.end_tokens = self.published.end_tokens(config_eos) if self.published else config_eos
        checkpoint = Checkpoint(self.model_path, self.config)
        # On cuda the device's memory counts, and its context is not part of what is free.
        in_process = self.device.type != "cuda" and self.mode is Mode.LOCAL
        base = base_bytes(compiled=self.backend.compiled) if in_process else 0

        def room(grid: Grid, workers: int, dtype: torch.dtype) -> Room:
            return self._room_for(grid, workers, dtype, checkpoint, base)

        def fits(dtype: torch.dtype) -> bool:
            """Whether the model has room in this dtype; of other machines it is not known."""
            workers = choose_workers(settings, self.config, self.grid.heads_per_band)
            return self.mode is Mode.ATTACHED or room(self.grid, workers, dtype).fits

        dtype, self.dtype_reason = choose_dtype(settings, self.device, checkpoint.dtype, fits)
        self.dtype = dtype
        self.grid = self.grid.model_copy(update={"dtype": str(dtype).removeprefix("torch.")})
        self.note: str | None = None
        if settings.autoscale or settings.autoscale_again:
            settings = self.settings = self._autoscaled(
                checkpoint, lambda grid, workers: room(grid, workers, dtype).fits
            )
            picked = choose_grid(settings, self.backend, self.config, self.device)
            self.grid = picked.model_copy(update={"dtype": self.grid.dtype})
        steps = choose_steps(settings, self.backend, self.config, self.grid.heads_per_band, dtype, self.device)
        self.t_inner = steps.t_inner
        self.note = "; ".join(filter(None, [self.note, steps.note])) or None
        self.workers = choose_workers(settings, self.config, self.grid.heads_per_band)
        stages = make_grid(self.config, heads_per_band=self.grid.heads_per_band, stages=settings.stages)
        self.bands, self.stages = len(stages[0]), len(stages)
        self.room = room(self.grid, self.workers, dtype)
        self.room.require_start()
        if self.mode is Mode.LOCAL:
            # Only of Metal's code is it known how launches are written in it; elsewhere they would be guesses.
            if self.backend.compiled and self.device.type == "mps":
                self._launches = LaunchCounter()
            self._kernels = kernels = Kernels(
                self.backend,
                chunk_size=self.grid.chunk_size,
                t_inner=steps.t_inner,
                compiler=partial(compile_strict, fusion_limit=steps.fusion_limit, counter=self._launches),
            )
            self._executor = InProcessExecutor(
                [
                    [
                        Worker(self.config, band, *checkpoint.load(band, dtype=dtype, device=self.device), kernels)
                        for band in bands
                    ]
                    for bands in stages
                ],
                threads=self.workers,
                streams=choose_streams(settings, self.workers, self.device),
                cores=settings.threads,
            )
            if settings.ray_dashboard:  # to look at only: the work stays in this process
                from xlstm_ray.actors.metrics import GridMetrics

                self._start_head(0)
                self._metrics = GridMetrics(token_hex(3))
        else:
            if ray is None:
                ray = self._start_head(self.stages * self.bands)
            self._on_phase("starting actors, which load the model")
            self._executor = executor = grid_executor(ray, self, stages, steps, checkpoint)
            self._metrics = executor.metrics
        self.fingerprint = checkpoint.fingerprint()  # loading has read everything, or the digests are kept
        self.load_s = perf_counter() - started
        self._warm: set[tuple[int, int, int]] = set()  # rows, window, chunk
        self._runs = 0  # counts what the executor's one state has been given to

    def _start_head(self, actors: int) -> ModuleType:
        """A head of ours for so many actors, connected; a dashboard is told of as soon as there is one."""
        settings = self.settings
        self._on_phase("starting Ray")
        head = self._head = self._cluster.enter_context(managed(head_options(settings, actors, self.device)))
        self.stays = head if settings.ray_keep_alive or not settings.ray_autoshutdown else None
        if head.dashboard_url and self._told is not None:
            self._told(dashboard_line(head))
        return self._cluster.enter_context(connect(head, metadata=job_metadata(settings, self.model_path)))

    @property
    def executor(self) -> Executor:
        """Where the weights and the state are. Raises UsageError after `close`."""
        if self._executor is None:
            raise UsageError("this engine has been closed; load the model again")
        return self._executor

    # -- tokens --------------------------------------------------------------------------------------------------------
    def encode(self, prompt: Prompt) -> list[int]:
        """A prompt's tokens, with the begin token where the model's configuration asks for it.

        Raises UsageError for an empty prompt or a token outside the vocabulary.
        """
        return self.text.tokens(prompt).tolist()

    def encode_more(self, more: Prompt, after: Sequence[int] = ()) -> list[int]:
        """The tokens of what goes on after the tokens `after`: no begin token, nor any other that frames a text.

        A tokenizer may put a space before a text's first word; here the text is taken as it is, where that can be had.
        """
        return self.text.more(more, after)

    def next_tokens(self, logits: Tensor, count: int = 5) -> list[NextToken]:
        """The likeliest next tokens: logits (vocabulary,) -> id, text, log probability. Of equals the lowest id first,
        as greedy decoding takes it."""
        return self.text.likeliest(logits, count)

    def _between_pieces(self, done: int, characters: int) -> None:
        """Between two pieces of a long text: how far it is, and whether there is memory for more."""
        if done < characters:
            self._on_phase(f"cutting the prompt into tokens ({done:,} of {characters:,} characters)")
        self.room.require_under_limit(take_sample(), "cuts the prompt into tokens")

    # -- prefill -------------------------------------------------------------------------------------------------------
    @in_turn
    def prefill(
        self,
        prompt: Prompt | Sequence[Prompt] | None = None,
        *,
        append: Prompt | Sequence[Prompt] | None = None,
        state: RecurrentState | None = None,
        any_grid: bool = False,
        all_logits: bool = False,
        on_progress: Callable[[Progress], None] | None = None,
        on_ready: Callable[[int, PrefillResult], None] | None = None,
        should_stop: Callable[[], bool] = lambda: False,
        on_snapshot: Callable[[RecurrentState], None] | None = None,
    ) -> PrefillResult:
        """Consume one prompt or a batch of them (texts or token ids), from `state` on where one is given.

        A batch's rows are computed in groups of about the same length; on_ready is called with a row's place and result
        when its group is done.

        With a state, only what is new is computed. The prompt is the whole of it; `append` is only what comes after
        the state, in its place: one for each of the state's rows, or several for a state of one, which then serves
        them all, or one for all rows. Without either the state is taken as it is. should_stop is asked between tiles;
        a stopped run gives a state that resumes there. Raises StateError where the state belongs to another model,
        grid or prompt, and UsageError for an empty prompt. any_grid takes a state of another grid: the
        result is then the same within tolerance, not to the bit. on_snapshot is given every state that a grid keeps on
        the way, before the grid is asked anything more. A run that actors or nodes failed for good ends with
        the state of its last snapshot and the reason in `ended_by`.
        """
        if state is not None:
            state.check(self.config, self.fingerprint)
            if not state.grid.goes_on_as(self.grid) and not any_grid:
                raise StateError(
                    f"{state.name} was made on another grid ({state.grid.differences(self.grid)}); "
                    "use the same settings, or leave them out to take the state's"
                )
        if append is not None:
            if prompt is not None:
                raise UsageError("a prompt and what to append were both given; give one")
            if state is None:
                raise UsageError("there is no state to append to; give --state-in FILE, or a --prompt")
        elif prompt is None:
            if state is None:
                raise UsageError("neither a prompt nor a state was given")
            if not state.complete:
                raise StateError(
                    f"{state.name} is of a prefill that was stopped after {sum(state.tokens)} tokens; "
                    "give the same prompt to go on"
                )
            self._set_state(state, state.batch)
            stats = self._statistics(state.tokens, state.tokens)
            return PrefillResult(state, state.tensors["logits"], stats)
        began = perf_counter()
        self._on_phase("cutting the prompt into tokens")
        if append is not None and state is not None:
            more = as_batch(append)
            if state.batch == 1:
                state = state.spread(len(more))
            elif len(more) == 1:
                more *= state.batch
            going = appended(more, state, lambda new, row: self.text.more(new, row.end.tokens))
        else:
            given = as_batch(prompt)  # type: ignore[arg-type]
            texts = [p if isinstance(p, str) else None for p in given]
            going = prompts([self.text.tokens(p) for p in given], texts, state)
        rows = [one.tokens for one in going]
        encode_s = perf_counter() - began
        ends = [len(row) for row in rows]
        begin = [one.seen for one in going]
        start = Snapshot(begin, torch.zeros(len(rows), self.config.vocab_size), {})
        if state is not None:
            start = Snapshot(begin, state.tensors["logits"], state.tensors)
        begun = list(state.begun or state.tokens) if state is not None else begin
        groups = plan_groups(begun, ends, tile_size=self.grid.tile_size, chunk_size=self.grid.chunk_size)
        self.room.require(len(rows), self.calls(groups, begun, ends))
        journal, self._last = self._journal, None
        if journal is not None:
            journal.begin(self.config.state_file_bytes(len(rows)))
        sampling = None if state is None else state.sampling

        def state_at(snapshot: Snapshot, places: Sequence[int] = range(len(rows))) -> RecurrentState:
            """What a snapshot of the rows at these places is to the outside."""
            require_finite(snapshot.logits, self.model_path)
            for b, c in zip(places, snapshot.consumed, strict=True):
                going[b].advance(c)
            complete = snapshot.consumed == [ends[b] for b in places]
            known = [going[b].known(self.text, complete=complete) for b in places]
            made = self._state(snapshot, known, complete, guard.grid, sampling)
            made.begun = None if complete else [begun[b] for b in places]
            return made

        def ready(group: Group, outcome: BatchOutcome) -> None:
            guard.left.remove(group)
            if on_ready is None:
                return
            own, places = take(outcome.end, group.rows, len(group.rows)), group.rows
            stats = self._statistics(ends, begin, guard, outcome, encode_s).of_rows(places)
            stats.first_token_at = time()
            result = PrefillResult(state_at(own, places), own.logits, stats)
            for n, b in enumerate(places):
                on_ready(b, result.row(n))

        def keep(snapshot: Snapshot) -> None:
            kept = state_at(snapshot)
            if journal is not None:
                journal.write(kept)
            if on_snapshot is not None:
                on_snapshot(kept)

        mixed = state is not None and state.grid != self.grid and any(begin)
        with ExitStack() as files:
            guard = MemoryGuard(self, rows, begin, groups, should_stop, mixed=mixed, files=files)
            guard.warm_up()
            self._runs += 1
            if self._launches is not None:
                self._launches.total = 0
            self._on_phase("prefill")
            outcome = prefill_groups(
                self.executor,
                rows,
                groups,
                start=start,
                sizes=lambda: (guard.grid.tile_size, guard.grid.chunk_size),
                all_logits=all_logits,
                keep_every=None if self.mode is Mode.LOCAL and journal is None else self._journal_every,
                on_snapshot=None if journal is None and on_snapshot is None else keep,
                on_group=ready,
                on_progress=guard.reporting(on_progress),
                on_window=lambda bring: setattr(self, "_last", lambda: state_at(bring())),
                should_stop=guard.should_stop,
                resize=guard.resize,
            )
        if outcome.lost and not outcome.end.tensors:
            raise outcome.lost  # before the first snapshot: there is nothing to keep
        chosen = perf_counter()
        outcome.end.logits.argmax(-1).tolist()
        stats = self._statistics(ends, list(begin), guard, outcome, encode_s + perf_counter() - chosen)
        stats.first_token_at = time()
        state = state_at(outcome.end)
        self._last = None  # what it holds is as large as a state
        if journal is not None and not state.complete and not outcome.lost:
            journal.write(state)
        return PrefillResult(state, outcome.end.logits, stats, outcome.all_logits, outcome.lost or guard.ended_by)

    def _statistics(
        self,
        row_tokens: list[int],
        row_resumed: list[int],
        guard: "MemoryGuard | None" = None,
        outcome: BatchOutcome | None = None,
        beside_s: float = 0.0,
    ) -> Statistics:
        """The figures of a run, so far; without guard and outcome where nothing was computed.

        beside_s: what the first token took beside the prefill.
        """
        seconds = outcome.seconds if outcome else 0.0
        nothing = [0.0] * len(row_tokens)
        on_device = self.mode is Mode.LOCAL and self.device.type != "cpu"
        return Statistics(
            row_tokens,
            row_resumed,
            guard.compile_s if guard else 0.0,
            prefill_s=seconds - (guard.paused_s if guard else 0.0),
            ttft_s=seconds + beside_s,
            peak_memory_bytes=self.executor.peak_memory_bytes,
            tile_seconds=outcome.tile_seconds if outcome else [],
            restarts=self.executor.restarts if outcome else 0,
            tile_tokens=outcome.tile_tokens if outcome else [],
            tile_whole=outcome.tile_whole if outcome else [],
            row_ttft_s=[s + beside_s for s in outcome.ready_s] if outcome else nothing,
            row_prefill_s=outcome.group_s if outcome else nothing,
            peak_process_bytes=peak_process_bytes(),
            peak_device_bytes=peak_device_bytes(self.device) if on_device else None,
            launches=self._launches.total if self._launches and outcome else None,
        )

    @in_turn
    def warm_up(self, batch: int, sizes: Sequence[int]) -> float:
        """Compile what windows of these sizes need, once, unless warm-up is off; returns the seconds it took."""
        started = perf_counter()
        chunk = self._kernels.chunk_size if self.mode is Mode.LOCAL else self.grid.chunk_size
        missing = [size for size in sizes if (batch, size, chunk) not in self._warm]
        if missing and self.backend.compiled and self.settings.warmup:
            sizes_text = " and ".join(map(str, missing))
            self._on_phase(f"compiling for {sizes_text} token(s) at once (10 to 60 s where that is new here)")
            self.executor.warm_up(batch, missing)
            self._warm |= {(batch, size, chunk) for size in missing}
            return perf_counter() - started
        return 0.0

    # -- generate ------------------------------------------------------------------------------------------------------
    @in_turn
    def generate(
        self,
        prompt: Prompt | Sequence[Prompt] | None = None,
        *,
        append: Prompt | Sequence[Prompt] | None = None,
        state: RecurrentState | None = None,
        max_new_tokens: int = 64,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        seed: int | None = None,
        last: bool = True,
        any_grid: bool = False,
        on_progress: Callable[[Progress], None] | None = None,
        should_stop: Callable[[], bool] = lambda: False,
        on_snapshot: Callable[[RecurrentState], None] | None = None,
    ) -> "Generation":
        """Prefill (see there for prompt, append and state), then an iterator of pieces of text.

        How tokens are chosen, where it is not given, is taken from the state's last answer, else from the model's
        generation_config.json; else it is greedy unless temperature, top_p, top_k or a seed is given. last: nothing
        goes on from here, so a character that the limit cuts shows as U+FFFD; if False, its bytes wait in `state()`.
        """
        before = state.sampling if state else None
        sampling = Sampling.make(temperature, top_p, seed, top_k, before=before, published=self.published)
        if self.published:
            self._tell_published(sampling, asked=any(x is not None for x in (temperature, top_p, top_k, seed, before)))
        if max_new_tokens < 1:
            raise UsageError(f"--max-new-tokens is {max_new_tokens}; allowed: 1 or more")
        _ = self.executor  # it may have been closed
        given = prompt if append is None else append
        batch = max(1 if given is None else len(as_batch(given)), 1 if state is None else state.batch)
        # Of decoding, beside which the prompts' state is kept; the prefill sees to its own.
        self.room.require(batch, [(group_size(batch), 1)], kept=batch if batch == 1 else 2 * batch)
        prefill = self.prefill(
            prompt,
            append=append,
            state=state,
            any_grid=any_grid,
            on_progress=on_progress,
            should_stop=should_stop,
            on_snapshot=on_snapshot,
        )
        return Generation(self, prefill, sampling, max_new_tokens, should_stop, last=last)

    def _tell_published(self, sampling: Sampling, *, asked: bool) -> None:
        """Say once what of generation_config.json changes an answer, and what cannot."""
        published, told = self.published, self._told_published
        self._told_published = True
        if published is None or told:
            return
        if published.not_served:
            self.on_note(f"generation_config.json asks for {', '.join(published.not_served)}, which is not served here")
        if sampling.temperature and not asked:
            self.on_note(
                f"sampling as generation_config.json says: temperature {sampling.temperature:g}, "
                f"top_k {sampling.top_k or 'off'}, top_p {sampling.top_p:g}; --temperature 0 is greedy"
            )

    @in_turn
    def close(self, *, keep_journal: bool = False) -> None:
        """Let go of the model: actors end first, so that their memory is free, then a head of ours unless it stays.

        keep_journal: the journal's directory stays this engine's, for `discard_journal`.
        """
        if self._journal is not None and not keep_journal:
            self._journal.close()
        executor, self._executor = self._executor, None
        try:
            if executor is not None:
                executor.close()
        finally:
            self._cluster.close()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def tell_lost_helpers(self) -> None:
        """Say once of each of Ray's helpers that has ended: the run goes on without it."""
        if self._head is None:
            return
        state_dir = self.settings.ray_state_dir or default_state_dir()
        for name in set(lost_helpers(self._head, state_dir)) - self._lost_helpers:
            self._lost_helpers.add(name)
            self.on_note(f"Ray's {name} has ended; the run goes on without it (logs in {self._head.folder})")

    @property
    def _journal_every(self) -> int:
        # On two H200 a snapshot costs 60 ms, and 64 tiles are played again in 3 s.
        return self.settings.journal_every or (64 if self.device.type == "cuda" else 16)

    @property
    def journal_file(self) -> Path | None:
        """Where snapshots go, whole or not at all, each in the place of the one before."""
        return None if self._journal is None else self._journal.path

    @property
    def failures(self) -> list[str]:
        """What was asked for and is not whole: logs, and a journal whose last snapshot could not be written."""
        journal = self._journal.failure if self._journal is not None else None
        return [*self._failures, *([journal] if journal else [])]

    def discard_journal(self) -> None:
        """Remove the journal of a run whose results are safe elsewhere."""
        if self._journal is not None:
            self._journal.discard()

    def last_state(self) -> RecurrentState | None:
        """What a prefill that an exception has ended (Ctrl-C) had done by the end of its last window; None: nothing.

        Of actors it is the last snapshot.
        """
        return None if self._last is None else self._last()

    # ------------------------------------------------------------------------------------------------------------------
    def _open_journal(self) -> None:
        name = "journal" if self.settings.journal is not None else "resume"
        directory = getattr(self.settings, name)
        if directory is not None:
            self._journal = Journal(
                directory,
                option=self.settings.named(name),
                resumes=self.settings.resume is not None,
                note=lambda text: self.on_note(text),
            )

    def _set_state(self, state: RecurrentState | None, batch: int) -> None:
        self.executor.set_state(None if state is None else state.tensors, batch)
        self._runs += 1

    def _state(
        self, snapshot: Snapshot, rows: list[Row], complete: bool, grid: Grid, sampling: Sampling | None
    ) -> RecurrentState:
        return RecurrentState(
            {**snapshot.tensors, "logits": snapshot.logits},
            tokens=snapshot.consumed,
            prompt_hash=[row.tokens.hash for row in rows],
            rows=rows,
            sampling=sampling,
            model=self.fingerprint,
            grid=grid,
            complete=complete,
        )

    def _autoscaled(self, checkpoint: Checkpoint, has_room: Callable[[Grid, int], bool]) -> Settings:
        """The settings with what nobody asked for picked by a probe; `note` says what."""
        from xlstm_ray.autoscale import Choice, autoscale

        if self.mode is not Mode.LOCAL:
            raise UsageError(
                f"{self.settings.named('autoscale')} probes this process's device, and the actors have theirs; "
                "leave it out, or stay in local mode"
            )

        def fits(choice: Choice) -> bool:
            grid = {"tile_size": choice.tile_size, "heads_per_band": choice.heads_per_band}
            return has_room(self.grid.model_copy(update=grid), choice.workers)

        settings, self.note = autoscale(
            self.settings,
            config=self.config,
            checkpoint=checkpoint,
            backend=self.backend,
            grid=self.grid,
            device=self.device,
            fits=fits,
        )
        return settings

    def need(self, batch: int) -> Need:
        """The memory that a prefill of `batch` prompts of any length takes in this process (on cuda, on the device)."""
        return self.room.need(batch, [(1, self.grid.tile_size), (group_size(batch), self.grid.chunk_size)])

    def calls(self, groups: Sequence[Group], begin: Sequence[int], ends: Sequence[int]) -> list[tuple[int, int]]:
        """The shapes (rows, tokens) of all windows that these groups take from `begin` on."""
        return window_calls(groups, begin, ends, tile_size=self.grid.tile_size, chunk_size=self.grid.chunk_size)

    def _room_for(self, grid: Grid, workers: int, dtype: torch.dtype, checkpoint: Checkpoint, base: int) -> Room:
        """The room of a run that is cut and computed like this."""
        settings, mode = self.settings, self.mode
        on_machine = mode is Mode.MANAGED or (mode is Mode.ATTACHED and is_loopback(settings.ray_address or ""))
        limits = choose_limits(settings)
        total, own = take_sample().total_bytes, device_total_bytes(self.device) if mode is Mode.LOCAL else None
        return Room(
            Loaded(
                self.config,
                device=self.device.type,
                itemsize=dtype.itemsize,
                compiled=self.backend.compiled,
                base=base,
                weights=checkpoint.weight_bytes(dtype),
                largest_tensor=checkpoint.largest_tensor_bytes,
                tile=grid.tile_size,
                chunk=grid.chunk_size,
                heads_per_band=grid.heads_per_band,
                workers=workers,
                stages=settings.stages,
            ),
            device=self.device,
            where="process" if mode is Mode.LOCAL else "grid" if on_machine else "elsewhere",
            limits=Limits.make(*limits, total, own) if settings.mem_watchdog else None,
            hard_name=limits.hard.name,
            force=settings.force,
            head=HEAD + DASHBOARD * settings.ray_dashboard if mode is Mode.MANAGED else 0,
            watchdog=WATCHDOG if settings.mem_watchdog else 0,
        )


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=2)


def load(model: str | Path | None = None, **options: Any) -> Engine:
    """A model directory (none: the demo model that ships with the package) -> Engine.

    options: the settings of `Settings`, as the flags of the command line (device, dtype, chunkwise_backend, tile_size,
    chunk_size, heads_per_band, workers, ...). Raises errors of xlstm_ray.errors, each one line for the user.
    """
    for note in unknown_variables():
        _warn(note)
    return Engine(Settings.make(model=model, **options))
