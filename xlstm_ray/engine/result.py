"""The result of a prefill: state, logits and figures."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import NamedTuple

from torch import Tensor

from xlstm_ray.engine.batch import BatchOutcome
from xlstm_ray.engine.scores import Scores
from xlstm_ray.errors import XlstmRayError
from xlstm_ray.launch import Running
from xlstm_ray.memory.sample import peak_device_bytes, peak_process_bytes
from xlstm_ray.state import RecurrentState
from xlstm_ray.text.history import Scored


class Use(NamedTuple):
    """The use of the cache for a prompt. tier: device, host or disk. reason: why not more tokens; None: it was all."""

    hit_tokens: int = 0
    tier: str | None = None
    reason: str | None = "off"


class OtherTimes(NamedTuple):
    """Seconds of a run besides its windows. paused_s: the part of compile_s after the first window."""

    compile_s: float = 0.0
    paused_s: float = 0.0
    first_s: float = 0.0  # cutting the prompt into tokens, and choosing the first one


NOTHING = OtherTimes()


@dataclass
class Statistics:
    """Figures of a run: counts in tokens, times in seconds, memory in bytes."""

    row_tokens: list[int]  # prompt tokens of each row
    row_resumed: list[int]  # of these, tokens that the given state had seen or in the cache
    compile_s: float
    prefill_s: float  # without compile_s
    ttft_s: float  # from the prompt's text to the first chosen token, without loading and compiling
    peak_memory_bytes: int
    tile_seconds: list[float] = field(default_factory=list, repr=False)
    restarts: int = 0  # replaced workers
    tile_tokens: list[int] = field(default_factory=list, repr=False)  # new tokens of each tile, over all rows
    tile_whole: list[bool] = field(default_factory=list, repr=False)  # False for a window of the tail
    first_token_at: float | None = None  # time (seconds since 1970) when it was chosen
    row_ttft_s: list[float] = field(default_factory=list, repr=False)  # ttft_s of each row
    row_prefill_s: list[float] = field(default_factory=list, repr=False)  # seconds of each row's group
    row_cache: list[Use] = field(default_factory=list, repr=False)  # what the cache was to each row
    peak_process_bytes: int = 0  # the largest resident size of this process
    peak_device_bytes: int | None = None  # None on the CPU, and if actors have the device
    launches: int | None = None  # kernel launches of compiled code; None if they cannot be counted

    @classmethod
    def of(
        cls,
        row_tokens: list[int],
        row_resumed: list[int],
        running: Running,
        outcome: BatchOutcome | None = None,
        other: OtherTimes = NOTHING,
    ) -> "Statistics":
        """The figures of a run so far; outcome is None if nothing was computed."""
        seconds = outcome.seconds if outcome else 0.0
        nothing, device = [0.0] * len(row_tokens), running.plan.own_device
        return cls(
            row_tokens,
            row_resumed,
            other.compile_s,
            prefill_s=seconds - other.paused_s,
            ttft_s=seconds + other.first_s,
            peak_memory_bytes=running.executor.peak_memory_bytes,
            tile_seconds=outcome.tile_seconds if outcome else [],
            restarts=running.executor.restarts if outcome else 0,
            tile_tokens=outcome.tile_tokens if outcome else [],
            tile_whole=outcome.tile_whole if outcome else [],
            row_ttft_s=[s + other.first_s for s in outcome.ready_s] if outcome else nothing,
            row_prefill_s=outcome.group_s if outcome else nothing,
            peak_process_bytes=peak_process_bytes(),
            peak_device_bytes=peak_device_bytes(device) if device is not None and device.type != "cpu" else None,
            launches=running.launches.total if running.launches and outcome else None,
        )

    def of_rows(self, rows: Sequence[int]) -> "Statistics":
        """The figures of some rows. Times are those of the last row's group; other figures are the run's."""

        def picked(values: list) -> list:
            return [values[b] for b in rows]

        return replace(
            self,
            row_cache=picked(self.row_cache) if self.row_cache else [],
            row_tokens=picked(self.row_tokens),
            row_resumed=picked(self.row_resumed),
            row_ttft_s=picked(self.row_ttft_s),
            row_prefill_s=picked(self.row_prefill_s),
            ttft_s=max(picked(self.row_ttft_s)),
            prefill_s=max(picked(self.row_prefill_s)),
        )

    def cache(self, b: int) -> Use:
        """What the cache was to row b."""
        return self.row_cache[b] if self.row_cache else Use()

    @property
    def prompt_tokens(self) -> int:
        return sum(self.row_tokens)

    @property
    def resumed_tokens(self) -> int:
        return sum(self.row_resumed)

    @property
    def prefill_tok_s(self) -> float | None:
        new = self.prompt_tokens - self.resumed_tokens
        return new / self.prefill_s if new and self.prefill_s > 0 else None

    @property
    def tiles(self) -> int:
        """The number of computed tiles, including the smaller windows of a tail."""
        return len(self.tile_seconds)

    @property
    def tile_tok_s(self) -> list[float]:
        """Tokens a second of each whole tile. A tail's windows are slower and not included."""
        each = zip(self.tile_tokens, self.tile_seconds, self.tile_whole, strict=True)
        return [n / s for n, s, whole in each if whole and s > 0]

    @property
    def tail_windows(self) -> int:
        """The number of tiles that were smaller windows or not full."""
        return self.tile_whole.count(False)

    @property
    def tile_tok_s_median(self) -> float | None:
        return median(self.tile_tok_s) if self.tile_tok_s else None

    @property
    def tile_tok_s_p99(self) -> float | None:
        """The rate that 99 % of the tiles reach; with fewer than 100 tiles, the slowest tile's rate."""
        rates = sorted(self.tile_tok_s)
        return rates[len(rates) // 100] if rates else None


@dataclass
class PrefillResult:
    """state: to decode or go on from. logits (B, vocabulary) float32: after each row's last token."""

    state: RecurrentState
    logits: Tensor
    stats: Statistics
    all_logits: list[Tensor] = field(default_factory=list, repr=False)  # for each row (tokens, vocabulary)
    prompt_logprobs: list[Scores] = field(default_factory=list, repr=False)  # for each row, if requested
    ended_by: XlstmRayError | None = None  # what ended the run early, other than should_stop
    scored: Sequence[Scored | None] = ()  # for each row, the sums of its log-probabilities, if requested

    @property
    def complete(self) -> bool:
        """False if the run was stopped before the prompt's end."""
        return self.state.complete

    def row(self, b: int) -> "PrefillResult":
        """The result of one prompt of a batch, with its own figures."""
        each = self.all_logits[b : b + 1], self.prompt_logprobs[b : b + 1]
        return PrefillResult(self.state.row(b), self.logits[b : b + 1], self.stats.of_rows([b]), *each, self.ended_by)
