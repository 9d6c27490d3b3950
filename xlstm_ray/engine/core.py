"""What all calls of one engine share: the running plan, the tokenizer, journal and states, compiled shapes."""

from collections.abc import Callable, Sequence
from time import perf_counter

import torch
from torch import Tensor

from xlstm_ray.engine.cache import Cache, Maker
from xlstm_ray.engine.driver import Snapshot
from xlstm_ray.engine.held import HeldRows, States
from xlstm_ray.engine.journal import Kept
from xlstm_ray.engine.lanes import Lanes
from xlstm_ray.engine.resume import Going, appended, prompts
from xlstm_ray.engine.tokens import Stored
from xlstm_ray.engine.turn import Turn
from xlstm_ray.errors import StateError, UsageError
from xlstm_ray.kernels.inductor import SWITCHES, switched_off
from xlstm_ray.launch import Running
from xlstm_ray.memory.sample import take_sample
from xlstm_ray.plan import RunPlan
from xlstm_ray.sampling import Sampling
from xlstm_ray.state import Numerics, RecurrentState
from xlstm_ray.text.history import Row
from xlstm_ray.text.ondisk import TextFile, TokenFile
from xlstm_ray.text.prompt import Given, as_batch
from xlstm_ray.text.tokenizer import Text


class Core:
    """A loaded model, for prefill and generation. turn: who uses its executor now.

    on_phase: called before steps that may take long. on_note: called with remarks for people while a run goes on.
    """

    def __init__(
        self,
        plan: RunPlan,
        running: Running,
        kept: Kept,
        text: Text,
        turn: Turn,
        *,
        on_phase: Callable[[str], object],
    ):
        self.plan, self.running, self.kept = plan, running, kept
        self.text, self.turn, self.on_phase = text, turn, on_phase
        self.on_note: Callable[[str], None] = lambda text: None
        self.fingerprint = ""  # of the model; known after its weights were read
        self.lane = Lanes(lambda: running.executor, turn).new  # a caller's executor
        self.states = States(self.lane, turn.executor)
        self.rows: list[int] = []  # of each call that has states in memory
        self.nothing = torch.zeros(1, plan.config.vocab_size)  # the logits of a row before its first token
        self.cache: Cache | None = None  # of states for prompts to come
        self.warm: set[tuple[int, int, int]] = set()  # rows, window, chunk
        self.logs: set[str] = set()  # logs that an earlier run has written

    @property
    def writes(self) -> bool:
        """Whether runs write a journal or logs."""
        return self.kept.journal is not None or bool(self.plan.logs)

    def open_cache(self) -> Cache | None:
        """Have a cache of states, where the plan says so; the model is loaded. Raises OutputError."""
        plan = self.plan
        if plan.cache is not None:
            self.cache = Cache(
                plan.cache,
                self.states,
                Maker(self.fingerprint, plan.numerics, _machine(plan)),
                size=plan.config.state_file_bytes(1),
                check=lambda state: state.check(plan.config, self.fingerprint),
                note=lambda text: self.on_note(text),
            )
        return self.cache

    def warm_up(self, batch: int, sizes: Sequence[int], chunk_size: int | None = None) -> float:
        """Compile the functions for windows of these sizes, once, unless warm-up is off; returns the seconds it took.

        chunk_size: tokens of a chunk (None: the plan's).
        """
        chunk = chunk_size or self.plan.numerics.chunk_size
        if not self.plan.warms_up or all((batch, size, chunk) in self.warm for size in sizes):
            return 0.0
        with self.turn.executor():
            missing = [size for size in sizes if (batch, size, chunk) not in self.warm]
            if not missing:  # another call has just compiled them
                return 0.0
            started, text = perf_counter(), " and ".join(map(str, missing))
            self.on_phase(f"compiling for {text} token(s) at once (10 to 60 s the first time on this machine)")
            if self.cache is not None and not self.warm:
                self.states.warm_up()
            self.running.executor.warm_up(batch, missing, chunk)
            self.warm |= {(batch, size, chunk) for size in missing}
            return perf_counter() - started

    def state(
        self, snapshot: Snapshot, rows: list[Row], numerics: Numerics, sampling: Sampling | None, *, complete: bool
    ) -> RecurrentState:
        """A snapshot as a RecurrentState, for callers."""
        return RecurrentState(
            {"logits": snapshot.logits},
            tokens=snapshot.consumed,
            prompt_hash=[row.tokens.hash for row in rows],
            rows=rows,
            sampling=sampling,
            model=self.fingerprint,
            numerics=numerics,
            complete=complete,
            elsewhere=snapshot.rows,
        )

    def check(self, state: RecurrentState, *, any_numerics: bool = False) -> None:
        """Raise StateError unless this model can go on from a state; any_numerics: also with other numerics."""
        state.check(self.plan.config, self.fingerprint)
        its, here = state.numerics, self.plan.numerics
        if not its.goes_on_as(here) and not any_numerics:
            how = "use the same settings, or leave them out to take the state's"
            if its.kernel == here.kernel and its.eager != here.eager:
                how += f"; set {SWITCHES[0]}=1, as there" if its.eager else f"; unset {switched_off()}, as there"
            raise StateError(f"{state.name} was made with other numerics ({its.differences(here)}); {how}")

    def require_whole(self, state: RecurrentState, *, any_numerics: bool = False) -> None:
        """As `check`, for a state without new text: its own prompt must have been read to its end, too."""
        self.check(state, any_numerics=any_numerics)
        if not state.complete:
            raise StateError(
                f"{state.name} is of a prefill that was stopped after {sum(state.tokens)} tokens; "
                "give the same prompt to go on"
            )

    def going_on(
        self,
        prompt: Given | Sequence[Given] | None,
        append: Given | Sequence[Given] | None,
        state: RecurrentState | None,
        *,
        any_numerics: bool = False,
        tenant: str = "",
    ) -> tuple[list[Going], RecurrentState | None]:
        """What each row has to read, and the state to go on from, with as many rows. tenant: as in Text.tokens.

        Raises UsageError and StateError for wrong arguments; see Engine.prefill for prompt, append and state.
        """
        if state is not None:
            self.check(state, any_numerics=any_numerics)
        if append is None:
            if prompt is None:
                raise UsageError("neither a prompt nor a state was given")
            given = as_batch(prompt)
            texts = [p if isinstance(p, str | TextFile) else None for p in given]
            return prompts([self._tokens(p, None, tenant) for p in given], texts, state), state
        if prompt is not None:
            raise UsageError("a prompt and what to append were both given; give one")
        if state is None:
            raise UsageError("there is no state to append to; give `state`, or a `prompt`")
        more = as_batch(append)
        if state.batch == 1:
            state = state.spread(len(more))
        elif len(more) == 1:
            more *= state.batch
        return appended(more, state, lambda new, row: self._tokens(new, row.end.tokens, tenant)), state

    def _tokens(self, given: Given, after: Sequence[int] | None, tenant: str) -> Tensor | Stored:
        """The tokens of a prompt, or of a text after others: of a file, in a file."""
        if isinstance(given, TextFile | TokenFile):
            return Stored(self.text.on_disk(given, after))
        return self.text.tokens(given, after, tenant)

    def rows_of(self, state: RecurrentState) -> HeldRows:
        """The rows of a state; without a copy if an earlier call left them with the executor."""
        if isinstance(state.elsewhere, HeldRows) and self.states.has(state.elsewhere):
            return state.elsewhere
        tensors = {name: tensor for name, tensor in state.tensors.items() if name != "logits"}
        return self.states.rows(None, state.batch, tensors)

    def between_pieces(self, done: int, characters: int) -> None:
        """Between two pieces of a long text: report the progress, and check the memory limit."""
        if done < characters:
            self.on_phase(f"cutting the prompt into tokens ({done:,} of {characters:,} characters)")
        self.plan.room.require_under_limit(take_sample(), "cuts the prompt into tokens")


def _machine(plan: RunPlan) -> str:
    """What decides the bits of a state beside the numerics: torch, the kind of device, and how many threads add up."""
    device = plan.device
    there = device.type == "cuda" and plan.own_device is not None
    kind = torch.cuda.get_device_name(device) if there else torch.backends.cpu.get_cpu_capability()
    threads = plan.threads or torch.get_num_threads()
    return f"torch {torch.__version__}, {device.type}, {kind}, {plan.workers} x {threads} threads"
