"""Engine: a loaded model on its device; prefill and generate."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from threading import Lock
from time import perf_counter
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from xlstm_ray.autoscale import autoscale
from xlstm_ray.checkpoint import Checkpoint
from xlstm_ray.choose import Dtype, Setup
from xlstm_ray.engine.chat import Chat
from xlstm_ray.engine.core import Core
from xlstm_ray.engine.driver import Each, Progress
from xlstm_ray.engine.figures import Figures, KeptStates
from xlstm_ray.engine.generation import Generation
from xlstm_ray.engine.journal import Journal, Kept
from xlstm_ray.engine.prefill import Asked, Prefill
from xlstm_ray.engine.request import Handle, Request
from xlstm_ray.engine.result import PrefillResult, Statistics
from xlstm_ray.engine.reuse import Share
from xlstm_ray.engine.score import Score, score
from xlstm_ray.engine.scores import Scores
from xlstm_ray.engine.service import Service
from xlstm_ray.engine.tree import Run
from xlstm_ray.engine.turn import Turn, a_call
from xlstm_ray.engine.wanted import Samplings
from xlstm_ray.engine.windows import GROUP_SIZES, group_size
from xlstm_ray.errors import UsageError, XlstmRayError
from xlstm_ray.generation_config import GenerationConfig
from xlstm_ray.kernels.compiled import require_compiler
from xlstm_ray.launch import Running
from xlstm_ray.memory.need import Need
from xlstm_ray.memory.room import base_bytes
from xlstm_ray.plan import choose_plan
from xlstm_ray.runtime.executor import Executor
from xlstm_ray.sampling.params import require_likeliest
from xlstm_ray.state import RecurrentState
from xlstm_ray.supervisor.records import Head
from xlstm_ray.text.ondisk import TextFile
from xlstm_ray.text.prompt import Given, Prompt, as_batch
from xlstm_ray.text.tokenizer import NextToken, Text


class Engine:
    """A loaded model on its device: prefill and generate. Made by `xlstm_ray.load`.

    Threads may call it at once, also beside requests: their windows and steps take turns, and each gets what it would
    get alone, since each has its own state. Only prefills of an engine with a journal or logs wait for each other. A
    call from inside another one (from `on_progress`) or in a forked child raises UsageError.
    """

    def __init__(
        self,
        setup: Setup,
        *,
        on_phase: Callable[[str], object] = lambda text: None,
        on_note: Callable[[str], None] | None = None,
    ):
        self._turn = Turn()
        self._service: Service | None = None
        self._beginning = Lock()  # of the service
        self.on_note = on_note or _warn  # called with remarks for people while a run goes on
        self._kept = Kept(None)
        self._running = Running(on_phase, on_note or (lambda text: None))
        try:
            self._open(setup, on_phase)
        except BaseException:  # Ctrl-C too: neither actors nor our head may stay
            self._let_go()
            raise

    def _open(self, setup: Setup, on_phase: Callable[[str], object]) -> None:
        """Choose, launch, load. Every choice is in `plan`."""
        started, kept, running = perf_counter(), self._kept, self._running
        on_phase("loading the model")
        setup.require_places()
        setup.require_weights()
        if setup.journal is not None:
            path, named, resumes = setup.journal
            kept.journal = Journal(path, option=named, resumes=resumes, note=lambda text: self.on_note(text))
        cluster = running.attach(setup)
        if cluster is None and setup.backend.compiled:
            require_compiler(setup.backend.name, setup.device())
        text = Text(setup.model, setup.config, lambda done, of: self._core.between_pieces(done, of))
        checkpoint = Checkpoint(setup.model, setup.config)
        choose = partial(
            choose_plan,
            setup,
            checkpoint,
            base=cache(lambda: base_bytes(compiled=setup.backend.compiled)),
            cluster=cluster,
        )
        eos, self.published = setup.config.eos_token_id, GenerationConfig.of(setup.model)
        self.end_tokens = self.published.end_tokens(eos) if self.published else eos
        plan, note = choose(), None
        if plan.search is not None:
            picked, note = autoscale(plan, plan.search, checkpoint)
            plan = choose(picked=picked, dtype=Dtype(plan.dtype, plan.dtype_reason))
        plan = running.divided(plan, checkpoint)
        self.note = "; ".join(filter(None, [plan.eager_note, note, plan.steps.note, plan.split_note])) or None
        plan.room.require_start()
        self.plan, self._core = plan, Core(plan, running, kept, text, self._turn, on_phase=on_phase)
        self._core.on_note = lambda text: self.on_note(text)
        self.samplings = Samplings(self.published, text, lambda text: self.on_note(text))
        running.start(plan, checkpoint)
        self._core.fingerprint = checkpoint.fingerprint()  # all weights were read, or their digests are kept
        self.cache = self._core.open_cache()
        self.load_s = perf_counter() - started
        self.model_path, self.config, self.backend, self.device = plan.model, plan.config, plan.backend, plan.device
        self.dtype, self.dtype_reason, self.numerics = plan.dtype, plan.dtype_reason, plan.numerics
        self.workers, self.bands, self.stages, self.t_inner = plan.workers, plan.bands, plan.stages, plan.steps.t_inner
        self.text, self.tokenizer = text, text.tokenizer
        self.fingerprint, self._warm = self._core.fingerprint, self._core.warm

    @property
    def executor(self) -> Executor:
        """The executor, which has weights and states. Raises UsageError after `close`."""
        return self._running.executor

    @property
    def stays(self) -> Head | None:
        """Our head, if it stays after this engine."""
        return self._running.stays

    # -- tokens --------------------------------------------------------------------------------------------------------
    def encode(self, prompt: Prompt, *, tenant: str = "") -> list[int]:
        """A prompt's tokens, with the begin token if the model's configuration asks for it. tenant: as in `prefill`.

        Raises UsageError for an empty prompt or a token outside the vocabulary.
        """
        return self._core.text.tokens(prompt, tenant=tenant).tolist()

    def encode_more(self, more: Prompt, after: Sequence[int] = (), *, tenant: str = "") -> list[int]:
        """As `Text.more`: the tokens of a text that follows the tokens `after`."""
        return self._core.text.more(more, after, tenant)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens, with that of special ones. Raises UsageError for a token outside the vocabulary."""
        return self._core.text.text_of(tokens)

    def next_tokens(self, logits: Tensor, count: int = 5) -> list[NextToken]:
        """As `Text.likeliest`: the likeliest next tokens: logits (vocabulary,) -> id, text, log probability."""
        return self._core.text.likeliest(logits, count)

    def text_of(self, token: int) -> str:
        """A token's own text, also of a special token."""
        return self._core.text.text_of([token])

    # -- prefill -------------------------------------------------------------------------------------------------------
    @a_call
    def prefill(
        self,
        prompt: Prompt | Sequence[Prompt] | None = None,
        *,
        append: Prompt | Sequence[Prompt] | None = None,
        state: RecurrentState | None = None,
        any_numerics: bool = False,
        all_logits: bool = False,
        prompt_logprobs: int | None = None,
        tenant: str = "",
        keep_at: Sequence[int] = (),
        on_progress: Callable[[Progress], None] | None = None,
        on_ready: Callable[[int, PrefillResult], None] | None = None,
        should_stop: Callable[[], bool] = lambda: False,
        on_snapshot: Callable[[RecurrentState], None] | None = None,
    ) -> PrefillResult:
        """Consume one prompt or a batch of prompts (texts or token ids), starting from `state` if it is given.

        A batch's rows are computed in groups of about the same length; on_ready is called with a row's place and result
        when its group is done.

        With a state, only new tokens are computed. `prompt` is the whole prompt; `append` is only what follows the
        state: one text for each row of the state, or one for all rows, or several texts for a state of one row. Without
        either, the result is the state itself. should_stop is called between tiles; a stopped run returns a state that
        resumes there. Raises StateError where the state belongs to another model or prompt or was made with other
        numerics, and UsageError for an empty prompt. any_numerics takes a state of other numerics: the result is then
        the same within tolerance, not to the bit. on_snapshot is given every state that a grid keeps on the way. A run
        that lost actors or nodes for good ends with the state of its last snapshot and the reason in `ended_by`.

        Where the engine has a cache, a prompt begins from the longest state there that gives the bits of a run without
        one. Prompts of one `tenant` share states. keep_at: so many tokens of each prompt, at whose end, or at the last
        place before it that runs share, a state is kept. all_logits: give the logits of each token, which takes much
        memory. prompt_logprobs: give each token's log-probability, and those of so many likeliest ones at its place;
        logits are held a few at a time. With either, all is computed.
        """
        require_likeliest(prompt_logprobs)
        core = self._core
        if prompt is None and append is None and state is not None:
            core.require_whole(state, any_numerics=any_numerics)
            with self._turn.executor():
                stats = Statistics.of(state.tokens, state.tokens, core.running)
            nothing = torch.empty(0, dtype=torch.int32)
            scores = [Scores(nothing, 0, row, prompt_logprobs) for row in state.logits if prompt_logprobs is not None]
            return PrefillResult(state, state.logits, stats, prompt_logprobs=scores)
        began = perf_counter()
        core.on_phase("cutting the prompt into tokens")
        going, state = core.going_on(prompt, append, state, any_numerics=any_numerics, tenant=tenant)
        share = Share(tenant, keep_at)
        asked = Asked(Each(all_logits, prompt_logprobs), on_progress, on_ready, should_stop, on_snapshot, share)
        return Prefill(core, going, state, asked, encode_s=perf_counter() - began).run()

    @a_call
    def score(self, text: str | TextFile, **how: Any) -> Score:
        """A text's log-likelihood, perplexity, bits per byte, in flat memory; how: as in `engine.score.score`."""
        return score(self._core, text, **how)

    def chat(self, state: RecurrentState | str | Path | None = None, **options: Any) -> Chat:
        """A conversation, from its beginning or from a state or a file of one; options: as in `Chat`."""
        begun = RecurrentState.load(state) if isinstance(state, str | Path) else state
        if begun is not None:
            self._core.require_whole(begun)
        return Chat(self.generate, self.text.conversation, state=begun, **options)

    # -- requests ------------------------------------------------------------------------------------------------------
    def submit(self, request: Request) -> Handle:
        """Begin a request beside others, from any thread; see `serve`. Raises UsageError or StateError."""
        return self._serving().submit(request)

    def submit_n(self, request: Request) -> list[Handle]:
        """As `submit`, for each of the `n` answers that the sampling asks for: their prompt is read once.

        Each sampled answer has the next seed. A handle's figures of the prompt are the same for all.
        """
        return self._serving().submit_n(request)

    @a_call
    def lend(self, prompt: Given, tenant: str = "") -> RecurrentState | None:
        """The longest kept state that a prompt may begin from, for the cache of another engine; None: there is none."""
        tokens, sizes = self._core.text.tokens(prompt), self.numerics
        if self.cache is None:
            return None
        run = Run.alone(len(tokens), tile=sizes.tile_size, chunk=sizes.chunk_size)
        with self._turn.executor():
            return self.cache.lend(tokens.numpy().data, run, tenant)

    @a_call
    def borrow(self, state: RecurrentState) -> None:
        """Keep what another engine has lent. Raises StateError for one of another model, numerics or machine."""
        if self.cache is not None:
            with self._turn.executor():
                self.cache.borrow(state)

    @property
    def failed(self) -> XlstmRayError | None:
        """What has ended the service of requests; None: nothing has."""
        return None if self._service is None else self._service.failed

    def figures(self) -> dict[str, Figures]:
        """What it has done for requests, and what its cache keeps, by the name of its replica: it is none, so ""."""
        cache = self.cache
        kept = None
        if cache is not None:
            kept = KeptStates(len(cache), dict(cache.used), dict(cache.evicted), cache.unwritten)
        return {"": Figures(self._serving().steps.spreads(), kept)}

    def _serving(self) -> Service:
        with self._beginning:  # of callers that are first at once, one begins it
            self._turn.require_own_process()
            self._service = self._service or Service(self._core, self.end_tokens)
            return self._service

    def serve(
        self, *, slots: int | None = None, buckets: Sequence[int] = GROUP_SIZES, fills_per_decode: int = 1
    ) -> int:
        """Begin to serve requests; returns the largest number of states at once.

        slots: states on the device (None: 16, or as many as fit in memory). buckets: the numbers of rows of a decoding
        call; with only one bucket, an answer's bits do not depend on other requests. fills_per_decode: the most
        windows of prompts that are read between two decoding steps. Raises MemoryLimitError for slots that do not fit.
        """
        with self._beginning:
            self._turn.require_own_process()
            if self._service is not None:
                raise UsageError("this engine serves requests already")
            self._service = Service(self._core, self.end_tokens, slots, buckets, fills_per_decode)
            return self._service.slots

    @a_call
    def warm_up(self, batch: int, sizes: Sequence[int]) -> float:
        """Compile for windows of these sizes, once, unless warm-up is off; returns the seconds it took."""
        return self._core.warm_up(batch, sizes)

    # -- generate ------------------------------------------------------------------------------------------------------
    @a_call
    def generate(
        self,
        prompt: Prompt | Sequence[Prompt] | None = None,
        *,
        append: Prompt | Sequence[Prompt] | None = None,
        state: RecurrentState | None = None,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        seed: int | None = None,
        sampling: Mapping[str, Any] = MappingProxyType({}),
        own_sampling: Sequence[Mapping[str, Any]] = (),
        last: bool = True,
        any_numerics: bool = False,
        prompt_logprobs: int | None = None,
        tenant: str = "",
        keep_at: Sequence[int] = (),
        on_progress: Callable[[Progress], None] | None = None,
        should_stop: Callable[[], bool] = lambda: False,
        on_snapshot: Callable[[RecurrentState], None] | None = None,
    ) -> "Generation":
        """Prefill (see there for prompt, append and state), then iterate over pieces of text.

        Sampling parameters that are not given come from the state's last answer, else from the model's
        generation_config.json. Otherwise decoding is greedy, unless temperature, top_p, top_k, min_p or a seed is
        given. sampling: more fields of `Sampling`. own_sampling: for every row, its own fields, which win. With `n`,
        each prompt is read once, and its answers are rows that follow each other. last: no later call goes on from
        here, so a character that the limit cuts shows as U+FFFD; if False, its bytes wait in `state()`.
        """
        _ = self.executor  # it may have been closed
        given = prompt if append is None else append
        batch = max(1 if given is None else len(as_batch(given)), 1 if state is None else state.batch)
        named = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "seed": seed}
        common = {"max_new_tokens": max_new_tokens, **named, **sampling}
        wanted = self.samplings.of_rows(common, own_sampling, state, batch)
        # The need of decoding, with the prompts' states kept. The prefill checks its own need.
        answers = sum(row.n for row in wanted.rows)
        self.plan.room.require(answers, [(group_size(answers), 1)], kept=1 if answers == 1 else batch + answers)
        prefill = self.prefill(
            prompt,
            append=append,
            state=state,
            any_numerics=any_numerics,
            prompt_logprobs=prompt_logprobs,
            tenant=tenant,
            keep_at=keep_at,
            on_progress=on_progress,
            should_stop=should_stop,
            on_snapshot=on_snapshot,
        )
        wanted = self.samplings.with_prompts(wanted, prompt, append, state)
        return Generation(self._core, prefill, wanted, should_stop, end_tokens=self.end_tokens, last=last)

    def close(self, *, keep_journal: bool = False) -> None:
        """Free the model: actors end first, so that their memory is free, then our head unless it stays.

        keep_journal: keep the lock of the journal's directory, for `discard_journal`.
        """
        with self._turn.of("close"), self._beginning:  # not from inside another call: it would wait for it
            service, self._service = self._service, None
        if service is not None:
            service.close()
        with self._turn.of("close"):
            if self._core.cache is not None:
                self._core.cache.close()
            self._core.states.close()
            self._let_go(keep_journal=keep_journal)

    def _let_go(self, *, keep_journal: bool = False) -> None:
        if self._kept.journal is not None and not keep_journal:
            self._kept.journal.close()
        self._running.close()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def need(self, batch: int) -> Need:
        """The memory that a prefill of `batch` prompts of any length takes in this process (on cuda, on the device)."""
        few, many = (1, self.numerics.tile_size), (group_size(batch), self.numerics.chunk_size)
        return self.plan.room.need(batch, [few, many])

    @property
    def journal_file(self) -> Path | None:
        """The journal's file. Each snapshot replaces the one before, whole or not at all."""
        return None if self._kept.journal is None else self._kept.journal.path

    @property
    def failures(self) -> list[str]:
        """Requested files that are incomplete: logs, and a journal whose last snapshot could not be written."""
        return self._kept.failures

    def discard_journal(self) -> None:
        """Remove the journal of a run whose results are saved elsewhere."""
        if self._kept.journal is not None:
            self._kept.journal.discard()

    def last_state(self) -> RecurrentState | None:
        """The state at the last window's end of this thread's last prefill, if an exception (Ctrl-C) ended it, or None.

        With actors, it is the last snapshot.
        """
        return self._kept.last()


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=2)
