"""The driver: feeds windows to an executor, counts, and stops between windows. Everything it needs is an argument."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from time import perf_counter

import torch
from torch import Tensor

from xlstm_ray.prefill.executor import Executor, Tile
from xlstm_ray.prefill.plan import Window, plan_windows


@dataclass(frozen=True)
class Progress:
    """Where a prefill is: counts of new tokens over all rows, seconds since its first tile was submitted."""

    tokens_done: int
    tokens_total: int
    tiles_done: int
    tile_seconds: float
    seconds: float

    @property
    def tokens_per_s(self) -> float:
        return self.tokens_done / self.seconds if self.seconds > 0 else 0.0

    @property
    def eta_s(self) -> float:
        return (self.tokens_total - self.tokens_done) / self.tokens_per_s if self.tokens_per_s else 0.0


@dataclass
class Outcome:
    """What a run of the driver leaves, beside the executor's state."""

    consumed: list[int]  # a row: how many tokens of its prompt are in the state now
    logits: Tensor  # (B, vocabulary) float32: of each row's last consumed token
    all_logits: list[Tensor] = field(default_factory=list)  # a row (tokens, vocabulary), where they were asked for
    seconds: float = 0.0
    tile_seconds: list[float] = field(default_factory=list)
    stopped: bool = False


def make_tile(window: Window, rows: Sequence[Tensor], begin: Sequence[int]) -> Tile:
    """The window's tokens; rows: int64 prompts, begin: a row's first token that is not in the state yet."""
    tokens = torch.zeros(len(rows), window.size, dtype=torch.long)
    parts = [window.part(b, len(row)) for b, row in zip(begin, rows, strict=True)]
    for b, (first, last) in enumerate(parts):
        tokens[b, first:last] = rows[b][window.start + first : window.start + last]
    firsts, lasts = zip(*parts, strict=True)
    return Tile(window.number, tokens, torch.tensor(firsts), torch.tensor(lasts))


def prefill(
    executor: Executor,
    rows: Sequence[Tensor],
    *,
    begin: Sequence[int],
    logits: Tensor | None,
    tile_size: int,
    chunk_size: int,
    all_logits: bool = False,
    on_progress: Callable[[Progress], None] | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Outcome:
    """Consume rows[b][begin[b]:] of every row; the executor's state is that of begin, and moves on.

    rows: prompts, 1-D int64 on the CPU. logits (B, vocabulary): those of token begin - 1, for rows with nothing new.
    should_stop is asked before every window; what has been submitted by then is finished, so the state is that of a
    window's end.
    """
    end = [len(row) for row in rows]
    total = sum(e - b for b, e in zip(begin, end, strict=True))
    outcome = Outcome(list(begin), torch.empty(0))
    pieces: list[list[Tensor]] = [[] for _ in rows]
    hidden: Tensor | None = None
    submitted: dict[int, tuple[Window, Tile]] = {}

    def tiles() -> Iterator[Tile]:
        for window in plan_windows(begin, end, tile_size=tile_size, chunk_size=chunk_size):
            if should_stop():
                outcome.stopped = True
                return
            tile = make_tile(window, rows, begin)
            submitted[window.number] = window, tile
            yield tile

    started = perf_counter()
    for result in executor.stream(tiles(), all_logits=all_logits):
        window, tile = submitted.pop(result.number)
        has = tile.last > tile.first
        hidden = (
            result.hidden if hidden is None else torch.where(has.unsqueeze(-1).to(hidden.device), result.hidden, hidden)
        )
        for b, (first, last) in enumerate(zip(tile.first.tolist(), tile.last.tolist(), strict=True)):
            if first < last:
                outcome.consumed[b] = window.start + last
                if result.logits is not None:
                    pieces[b].append(result.logits[b, first:last].cpu())
        outcome.seconds = perf_counter() - started
        outcome.tile_seconds.append(result.seconds)
        if on_progress is not None:
            done = sum(outcome.consumed) - sum(begin)
            on_progress(Progress(done, total, len(outcome.tile_seconds), result.seconds, outcome.seconds))
    outcome.logits = _last_logits(executor, hidden, logits, begin, outcome.consumed)
    outcome.seconds = perf_counter() - started
    if all_logits:
        outcome.all_logits = [torch.cat(p) if p else torch.empty(0, outcome.logits.shape[1]) for p in pieces]
    return outcome


def _last_logits(
    executor: Executor, hidden: Tensor | None, known: Tensor | None, begin: Sequence[int], consumed: Sequence[int]
) -> Tensor:
    """Logits of the rows that moved on from `hidden`, the known ones of the others."""
    moved = torch.tensor([c > b for b, c in zip(begin, consumed, strict=True)])
    if hidden is None:
        return torch.empty(0) if known is None else known
    fresh = executor.logits(hidden)
    return fresh if known is None else torch.where(moved.unsqueeze(-1), fresh, known)
