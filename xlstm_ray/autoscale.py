"""Autoscale: time one block of the model on this machine for a few seconds, and keep the best choice.

The functions are timed uncompiled: compiling every candidate would take minutes. The choices differ in the sizes of the
matrix products and in how bands share cores or launches, and plain torch shows that.
"""

import json
import platform
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from time import perf_counter, time
from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from xlstm_ray import __version__
from xlstm_ray.checkpoint import Checkpoint
from xlstm_ray.config import ModelConfig
from xlstm_ray.directories import cache_dir
from xlstm_ray.files import write_whole
from xlstm_ray.kernels.fit import KERNEL
from xlstm_ray.layout import Shard, make_layout
from xlstm_ray.model import EndWeights
from xlstm_ray.plan import Picked, RunPlan, Search
from xlstm_ray.runtime.blocks import Kernels
from xlstm_ray.runtime.executor import Step, run
from xlstm_ray.runtime.local import InProcessExecutor
from xlstm_ray.runtime.worker import build_worker

BUDGET_S = 10.0
MARGIN = 1.03  # another choice must be this much faster than the usual one, and by more than noise
ROUNDS = 3  # alternating rounds of the best and the usual choice, before one counts as faster
HOLDS_S = 30 * 24 * 3600.0  # how long a choice is kept
BUSY_HOLDS_S = 3600.0  # how long, if the machine was busy
BUSY = 1.25  # the machine counts as busy if the longest time over the shortest is above this


class Choice(BaseModel):
    """One point of the search; sizes as in Settings."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    tile_size: Annotated[int, Field(gt=0)]
    heads_per_band: Annotated[int, Field(gt=0)]
    workers: Annotated[int, Field(gt=0)]

    def __str__(self) -> str:
        return f"tiles of {self.tile_size}, {self.heads_per_band} heads a band, {self.workers} worker(s)"


class Remembered(Choice):
    """A choice, and the time until which it holds (seconds since 1970)."""

    until: Annotated[float, Field(allow_inf_nan=False)] = 0.0


_FILE = TypeAdapter(dict[str, Remembered])


def autoscale(plan: RunPlan, search: Search, checkpoint: Checkpoint) -> tuple[Picked | None, str]:
    """The settings that were not given, measured or from the kept file, and a line about them. None: as planned."""
    config, backend, numerics, device = plan.config, plan.backend, plan.numerics, plan.device
    loaded = plan.room.loaded

    def fits(choice: Choice) -> bool:
        tile, heads, workers = choice.tile_size, choice.heads_per_band, choice.workers
        return replace(plan.room, loaded=replace(loaded, tile=tile, heads_per_band=heads, workers=workers)).fits

    names, free = tuple(Choice.model_fields), search.free
    if not free:
        return None, f"autoscale: {', '.join(names)} are all given, so there is nothing to pick"
    if len(config.slstm_at) == config.num_blocks:
        return None, "autoscale: all blocks are sLSTM, which run the same however they are cut; nothing was picked"
    usual = Choice(tile_size=numerics.tile_size, heads_per_band=numerics.heads_per_band, workers=plan.workers)
    fixed = {name: getattr(usual, name) for name in names if name not in free}
    key = "|".join(
        [
            checkpoint.fingerprint(),
            _device_name(device),
            f"torch {torch.__version__}",
            f"xlstm-ray {__version__}",
            f"{backend.kernel} {numerics.dtype} chunks of {numerics.chunk_size}",
            json.dumps(fixed),
            *filter(None, [plan.eager_note]),
        ]
    )
    path = cache_dir() / "autoscale.json"
    remembered, damage = _read(path)
    known, choice = remembered.get(key), usual
    if known is not None and fits(known) and time() < known.until and not search.again:
        choice = Choice(**known.model_dump(include=set(names)))
        note = f"autoscale: {choice} (remembered in {path}; `autoscale_again=True` measures anew)"
    else:

        def rate(c: Choice) -> float:
            return _rate(c, plan, checkpoint)

        rates = _search(usual, free, plan, fits, rate)
        best = max(rates, key=lambda c: rates[c] * (MARGIN if c == usual else 1))
        turns = [(rate(usual), rate(best)) for _ in range(ROUNDS)]
        gain, busy = compare(*zip(*turns, strict=True))
        if best != usual and gain is not None:
            choice = best
        note = f"autoscale: {choice}; {len(rates)} choices timed on one block"
        if choice != usual:
            note += f", {gain:.2f} x as fast as {usual}"
        elif best != usual:
            note += "; none was faster by more than noise"
        if busy:
            note += "; the machine was busy, so this holds for an hour"
        until = time() + (BUSY_HOLDS_S if busy else HOLDS_S)
        note += damage + _remember(path, key, Remembered(**choice.model_dump(), until=until))
    return Picked({name: getattr(choice, name) for name in free}, str(path)), note


def compare(usual: Sequence[float], other: Sequence[float]) -> tuple[float | None, bool]:
    """Rates of two choices in alternating rounds -> the other one's speed-up, and whether the machine was busy.

    None if it may be noise: a round of the usual choice was as fast as a round of the other one.
    """
    busy = max(max(r) / min(r) for r in (usual, other)) > BUSY
    gain = median(other) / median(usual)
    return (gain if gain > MARGIN and min(other) > max(usual) else None), busy


def _search(
    usual: Choice,
    free: Collection[str],
    plan: RunPlan,
    fits: Callable[[Choice], bool],
    rate: Callable[[Choice], float],
) -> dict[Choice, float]:
    """Tokens a second of one block by choice: the usual one, other tiles, then other bands with the best tile."""
    began = perf_counter()
    rates: dict[Choice, float] = {}

    def time_it(choice: Choice) -> None:
        if choice not in rates and (choice == usual or (fits(choice) and perf_counter() - began < BUDGET_S)):
            rates[choice] = rate(choice)

    time_it(usual)
    # Not for steps: they run one after the other in any tile, and are slow uncompiled.
    if "tile_size" in free and plan.backend.kernel in ("compiled_chunks", KERNEL):
        chunk = plan.numerics.chunk_size
        chunks = usual.tile_size // chunk
        for n in (max(1, chunks // 2), chunks * 2):
            time_it(usual.model_copy(update={"tile_size": n * chunk}))
    best = max(rates, key=lambda c: rates[c] * (MARGIN if c == usual else 1))
    for choice in _bands(best, free, plan.config):
        time_it(choice)
    return rates


def _bands(best: Choice, free: Collection[str], config: ModelConfig) -> Iterator[Choice]:
    """Other bands and workers for the tile of `best`."""
    NH = config.num_heads
    heads = sorted({NH, -(-NH // 2), min(4, NH), min(2, NH)}) if "heads_per_band" in free else [best.heads_per_band]
    for h in reversed(heads):
        bands = -(-NH // h)
        for workers in {min(bands, 6), 1} if "workers" in free else {best.workers} & set(range(bands + 1)):
            yield best.model_copy(update={"heads_per_band": h, "workers": workers})


def _rate(choice: Choice, plan: RunPlan, checkpoint: Checkpoint) -> float:
    """Tokens a second through the first mLSTM block, uncompiled. An sLSTM's speed does not depend on the choice."""
    config, backend, chunk, device, dtype = plan.config, plan.backend, plan.numerics.chunk_size, plan.device, plan.dtype
    n = next(n for n in range(config.num_blocks) if n not in config.slstm_at)
    kernels = Kernels(backend, t_inner=1, compiler=lambda fn, name: fn)
    layout = make_layout(config, heads_per_band=choice.heads_per_band)
    shards = [Shard(range(n, n + 1), shard.heads, shard.ffn) for shard in layout[0]]
    float8 = plan.numerics.dtype == "float8"
    workers = [build_worker(checkpoint, kernels, shard, dtype=dtype, device=device, float8=float8) for shard in shards]
    for worker in workers:  # a vocabulary of one token is enough
        worker.ends = EndWeights(torch.randn(1, config.hidden_size, dtype=dtype, device=device), None, None)
    executor = InProcessExecutor([workers], band_threads=choice.workers)
    T = choice.tile_size if backend.kernel in ("compiled_chunks", KERNEL) else chunk
    tokens = torch.zeros(1, T, dtype=torch.long)
    tile = Step(tokens, torch.zeros(1, dtype=torch.long), torch.full((1,), T), chunk)
    try:
        # The first two tiles warm up caches, pools and clocks.
        results = run(executor, executor.load(None, 1), [tile] * 4)
        return T / min([result.seconds for _, _, result in results][2:])
    finally:
        executor.close()


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = torch.backends.mps.get_name() if device.type == "mps" else platform.processor() or platform.machine()
    return f"{device.type} {platform.node()} {name}, {torch.get_num_threads()} threads"


def _read(path: Path) -> tuple[dict[str, Remembered], str]:
    """The kept choices, and a remark if the file is damaged."""
    try:
        return _FILE.validate_json(path.read_bytes()), ""
    except FileNotFoundError:
        return {}, ""
    except (OSError, ValidationError):
        return {}, f"; {path} could not be read and is written again"


def _remember(path: Path, key: str, choice: Remembered) -> str:
    """Write the file whole or not at all; returns a remark if that fails."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, _FILE.dump_json({**_read(path)[0], key: choice}, indent=1))
    except OSError as err:
        return f"; not remembered ({path}: {err.strerror})"
    return ""
