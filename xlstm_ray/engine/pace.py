"""How long a window of a prompt takes, and the largest one that keeps answers from waiting for longer than allowed."""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch

from xlstm_ray.errors import UsageError
from xlstm_ray.runtime.executor import Step, run

if TYPE_CHECKING:
    from xlstm_ray.engine.engine import Engine

WARM, TIMED = 2, 3  # windows before the clock counts, and those that it counts


def window_seconds(engine: "Engine", size: int) -> float:
    """Seconds of one window of `size` tokens: the longest of a few, compiled and warm. Before the engine serves."""
    engine.warm_up(1, [size])
    executor, chunk = engine.executor, engine.numerics.chunk_size
    tokens = torch.zeros(1, size, dtype=torch.long)
    step = Step(tokens, torch.zeros(1, dtype=torch.long), torch.full((1,), size), chunk)
    results = run(executor, executor.load(None, 1), [step] * (WARM + TIMED))
    return max([result.seconds for _, _, result in results][WARM:])


def tile_of(engine: "Engine", most_ms: float, *, given: bool) -> int:
    """The tile size with which this engine keeps answers waiting for most_ms at most. Arguments as in fitting_tile."""
    tile, chunk = engine.numerics.tile_size, engine.numerics.chunk_size
    return fitting_tile(tile, chunk, most_ms, partial(window_seconds, engine), given=given)


def fitting_tile(tile: int, chunk: int, most_ms: float, seconds: Callable[[int], float], *, given: bool) -> int:
    """The tile size that keeps a stall within most_ms: between two tokens of answers, one window is read.

    tile: the usual size; given: no other may be taken. chunk: every size is a multiple. seconds: of a window of a size.
    Smaller ones are halves of the usual one. Raises UsageError, with what was measured, where none is small enough.
    """
    size, took = tile, seconds(tile) * 1000
    while took > most_ms:
        if given or size // 2 < chunk or (size // 2) % chunk:
            least = f"`tile_size={size}`" if given else f"the smallest tile, of {size} tokens,"
            raise UsageError(
                f"`max_stall_ms` is {most_ms:g}, and {least} takes {took:.3g} ms here; allow more than that"
                + (", or leave the tile's size out" if given else "")
            )
        size //= 2
        took = seconds(size) * 1000
    return size
