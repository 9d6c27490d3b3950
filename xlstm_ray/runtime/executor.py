"""Executor: the protocol that moves windows of tokens through workers."""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, Protocol

from torch import Tensor


class Tile(NamedTuple):
    """A window's tokens for all rows of a batch: one task's worth."""

    number: int
    tokens: Tensor  # (B, T) int64, on the CPU; 0 where a row has none
    first: Tensor  # (B,) int64: row b's tokens are first[b] <= t < last[b], the others are padding
    last: Tensor  # (B,) int64
    keep: bool = False  # whether the state after it is wanted


class TileResult(NamedTuple):
    number: int
    hidden: Tensor  # (B, D) residual stream after the last block, of each row's last token in the tile
    logits: Tensor | None  # (B, T, vocabulary) float32, where all were asked for
    seconds: float
    state: dict[str, Tensor] | None = None  # after this tile, on the CPU, where it was to be kept
    held: Callable[[], dict[str, Tensor]] | None = None  # what brings the state after this tile here, where it is cheap


class Executor(Protocol):
    """What the driver needs of the place where weights and state live. One state at a time."""

    def warm_up(self, batch: int, sizes: Iterable[int]) -> None:
        """Compile what windows of these sizes need, for `batch` rows; size 1 is decoding."""

    def set_state(self, tensors: dict[str, Tensor] | None, batch: int) -> None:
        """Start from these tensors (named as in RecurrentState, on the CPU), or from a fresh state."""

    def get_state(self) -> dict[str, Tensor]:
        """The state after all tiles so far, on the CPU."""

    def stream(self, tiles: Iterable[Tile], *, all_logits: bool = False) -> Iterator[TileResult]:
        """Pull tiles as there is room for them, push them through all blocks in order, yield results in order.

        Raises GridLost where what holds the state is gone and cannot be replaced.
        """

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden (B, D) -> logits (B, vocabulary) float32, on the CPU."""

    def decode(self, tokens: Tensor, active: Tensor) -> Tensor:
        """One more token a row: tokens (B,) int64, active (B,) bool -> logits (B, vocabulary) float32, on the CPU.

        The state of rows that are not active stays as it is, and their logits mean nothing.
        """

    @property
    def peak_memory_bytes(self) -> int:
        """The largest use of memory so far, of the kind that matters for the device; summed over processes."""

    @property
    def restarts(self) -> int:
        """How many times a worker had to be replaced."""

    def close(self) -> None:
        """Let go of threads, weights and state."""
