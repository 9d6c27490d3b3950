"""`xlstm-ray plan`: a computed estimate of a prefill's memory and time on a device, and the settings for it.

It reads only config.json and, if there are weights, their headers. A tile's time is

    max(max(products, weights) + traffic, calls)
    products  operations of the matrix products / (the device's rate x the share of it that is reached)
    weights   bytes of the weights, read once a tile, / bandwidth
    traffic   bytes through memory between the products: activations, and the states of every chunk,
              / (bandwidth x the share of it that is reached)
    calls     the host's time to launch a block's work on a GPU, for any tile size

The shares were measured: on an H100 with a 7B model (docs/figures.md), and on two CPU cores.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch

from xlstm_ray.config import ModelConfig
from xlstm_ray.engine.windows import plan_windows
from xlstm_ray.errors import EstimateError, UsageError
from xlstm_ray.files import MIB
from xlstm_ray.layout import partition
from xlstm_ray.measure.child import Child
from xlstm_ray.measure.devices import DEVICES, GB, SHARES, Device
from xlstm_ray.memory.need import PROGRAM, BlockTensors, Call, Loaded, Need, computed_need
from xlstm_ray.memory.sample import process_bytes, take_sample
from xlstm_ray.model import linear
from xlstm_ray.plan import OnPaper
from xlstm_ray.tensors import EMBEDDING, HEAD, OUT_NORM, bytes_of, expected_tensors, stored_tensors, whole_bytes

LINK = 1.25 * GB  # bytes a second between machines: an assumed 10 Gbit/s
SLSTM_STEP_S = 10e-6  # assumed: one token's step of an sLSTM block; each waits for the one before
# Of a Mac's memory, what Metal recommends for its GPU: with less than 36 GB, and with more (16, 32 and 64 GB in logs of
# github.com/abetlen/llama-cpp-python/issues/687, ollama/ollama/issues/434, ggml-org/llama.cpp/issues/1870).
METAL_SHARES, LARGE_MAC_GB = (2 / 3, 3 / 4), 36
UNKNOWN = (
    "other work on the machine, a device that slows down when it is hot, the disk (loading), and compiling kernels "
    "that are new there (10 to 60 s for each shape)"
)
FACTOR = 1.5  # an estimate may be off by this factor
CHECK_ROUNDS = 5
PROBE_S = 2.0


@dataclass(frozen=True)
class Model:
    """A model's sizes, known without reading weights; in bytes, in the dtype of the run."""

    path: Path
    config: ModelConfig
    dtype: torch.dtype
    blocks: list[int]  # bytes of each block
    first: int  # embedding
    last: int  # out norm and head
    tied: bool  # the embedding is also the head
    largest_tensor: int
    known_from: str

    @property
    def weights(self) -> int:
        return self.first + sum(self.blocks) + self.last


def read_model(paper: OnPaper) -> Model:
    """The sizes of a model, with or without its weights."""
    config, dtype, checkpoint = paper.config, paper.dtype, paper.checkpoint
    shapes = expected_tensors(config)
    known_from = f"config.json alone, as if stored in {str(paper.stored).removeprefix('torch.')}"
    largest = 0
    if checkpoint is not None:
        known_from = "config.json and the weights' headers"
        shapes, largest = checkpoint.shapes, checkpoint.largest_tensor_bytes
    else:
        shapes[OUT_NORM] = (config.hidden_size,)
        if not config.tie_word_embeddings:
            shapes[HEAD] = (config.vocab_size, config.hidden_size)
        shapes = stored_tensors(config, shapes)
    size = {name: bytes_of(config, name, shape, dtype) for name, shape in shapes.items()}

    def of(*beginnings: str) -> int:
        """With scales and zeros, whose names begin with their tensor's."""
        return sum(size[name] for name in size if name.startswith(beginnings))

    blocks = [of(f"backbone.blocks.{b}.") for b in range(config.num_blocks)]
    first, last = of(EMBEDDING), of(OUT_NORM, HEAD)
    largest = largest or max(torch.Size(shape).numel() for shape in shapes.values()) * paper.stored.itemsize
    return Model(paper.model, config, dtype, blocks, first, last, HEAD not in size, largest, known_from)


@dataclass(frozen=True)
class Work:
    """A block's work for a token with chunks of L tokens: operations of its products, bytes between them."""

    flops: float
    traffic: float

    @classmethod
    def of(cls, config: ModelConfig, block: int, chunk: int, itemsize: int) -> "Work":
        c, L, s = config, chunk, itemsize
        D, NH, K, V, F, qk, v = c.hidden_size, c.num_heads, c.dhqk, c.dhhv, c.ffn_dim, c.qk_dim, c.v_dim
        parts = BlockTensors.of(c, chunk=L, itemsize=s)
        ffn_flops = 2 * 3 * D * F
        ffn_traffic = 5 * parts.residual + 2 * parts.ffn  # norm and residual; columns written and read
        if block in c.slstm_at:
            return cls(ffn_flops + 2 * 8 * D * c.dh, ffn_traffic + 5 * parts.residual + 2 * 5 * D * 4)
        products = 2 * (D * (2 * qk + 2 * v) + D * v + 2 * NH * D)
        cell = NH * (2 * L * K + 2 * L * V + 4 * K * V)  # scores, their products with v; with and into the state
        mixer = parts.columns + parts.states + parts.scores + parts.output + parts.output32
        return cls(ffn_flops + products + cell, ffn_traffic + 5 * parts.residual + 2 * mixer)


@dataclass(frozen=True)
class Plan:
    """An estimate and its settings. Times in seconds; `need` is of the machine that needs the most memory."""

    device: Device
    model: Model
    tokens: int
    machines: int
    backend: str
    tile_size: int
    chunk_size: int
    heads_per_band: int
    need: Need
    room: int  # bytes that may be used on a machine
    seconds: float
    workers: int  # threads that work on bands, at most one for each band
    machines_needed: int | None  # the fewest that it fits on; None if not even one block fits on each

    @property
    def fits(self) -> bool:
        return self.need.total <= self.room

    @property
    def tok_s(self) -> float:
        return self.tokens / self.seconds

    @property
    def asked(self) -> dict[str, Any]:
        """The settings of this run."""
        of_machines = {"chunkwise_backend": self.backend, "stages": self.machines} if self.machines > 1 else {}
        return {
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "tile_size": self.tile_size,
            "chunk_size": self.chunk_size,
            "heads_per_band": self.heads_per_band,
            **of_machines,
        }

    @property
    def lines(self) -> list[str]:
        """Lines for people."""
        d, dtype = self.device, str(self.model.dtype).removeprefix("torch.")
        shares = SHARES[d.kind]
        many = f" on each of {self.machines} machines" if self.machines > 1 else ""
        fit = f"fits{many}"
        if not self.fits:
            more = f"{self.machines_needed} machines would do" if self.machines_needed else "nor on more machines"
            fit = f"does not fit{many}; {more}"
        return [
            f"model       {self.model.path} ({self.model.known_from})",
            f"device      {d.name}: {d.memory_gb:,.0f} GB, {d.bandwidth / GB:,.0f} GB/s, "
            f"{d.rate(self.model.dtype) / 1e12:,.3g} TFLOPS in {dtype}",
            f"            {d.source}",
            f"            of these {shares.products:.0%} and {shares.traffic:.0%} are reached: {shares.source}",
            f"memory      {self.need}",
            f"            {fit}: {self.room / MIB:,.0f} MiB may be used; the prompt's length does not matter",
            f"time        {_duration(self.seconds)} for {self.tokens:,} tokens ({self.tok_s:,.0f} tokens/s)",
            "            without loading and compiling",
            f"not known   {UNKNOWN}",
            f"settings    {' '.join(f'`{name}={value}`' for name, value in self.asked.items())}",
        ]

    def to_json(self) -> dict[str, Any]:
        return {
            "model": str(self.model.path),
            "known_from": self.model.known_from,
            "device": asdict(self.device),
            "shares": asdict(SHARES[self.device.kind]),
            "prompt_tokens": self.tokens,
            "machines": self.machines,
            "machines_needed": self.machines_needed,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "backend": self.backend,
            "tile_size": self.tile_size,
            "chunk_size": self.chunk_size,
            "heads_per_band": self.heads_per_band,
            "stages": self.machines,
            "workers": self.workers,
            "not_known": UNKNOWN,
            "need_bytes": {**asdict(self.need), "total": self.need.total},
            "room_bytes": self.room,
            "fits": self.fits,
            "seconds": self.seconds,
            "tok_s": self.tok_s,
        }


def _duration(seconds: float) -> str:
    """A text in seconds; from two minutes on also in hours and minutes."""
    if seconds < 120:
        return f"{seconds:,.2f} s"
    minutes = round(seconds / 60)
    return f"{seconds:,.0f} s ({minutes // 60:,} h {minutes % 60} min)"


def plan(
    choose: Callable[[str], OnPaper],
    device_name: str,
    tokens: int,
    machines: int = 1,
    *,
    memory_gb: float | None = None,
) -> Plan:
    """The estimate for `tokens` prompt tokens on a device, or on `machines` of them with a stage of the blocks each.

    choose: makes the choices of a run for a kind of device. The tile is halved until the run fits, unless it was given.
    memory_gb: the device's memory, where it is not the most that is sold.
    Raises UsageError for a device that is not in the table, or a number out of range.
    """
    if device_name != "this" and device_name not in DEVICES:
        raise UsageError(f"`device` is {device_name!r}; there are: this, {', '.join(DEVICES)}")
    if not 1 <= tokens <= 1 << 40:
        raise UsageError(f"`prompt_tokens` is {tokens}; allowed: 1 to 2^40")
    if memory_gb is not None and device_name == "this":
        raise UsageError("`memory_gb` is for a device of the table; this machine's memory is known, so leave it out")
    if memory_gb is not None and not 1 <= memory_gb <= 4096:
        raise UsageError(f"`memory_gb` is {memory_gb:g}; allowed: 1 to 4096")
    kind = "cpu" if device_name == "this" else DEVICES[device_name].kind
    paper = choose(kind)
    model = read_model(paper)
    blocks = model.config.num_blocks
    if not 1 <= machines <= blocks:
        raise UsageError(f"`machines` is {machines}; allowed: 1 to {blocks}, the model's blocks")
    backend = "queued_compiled_chunks" if machines == 1 else "ray_compiled_chunks"
    tile, chunk, heads = paper.sizes
    device = probe(model, tile) if device_name == "this" else DEVICES[device_name]
    device = replace(device, memory_gb=memory_gb or device.memory_gb)
    metal = METAL_SHARES[device.memory_gb >= LARGE_MAC_GB] if kind == "mps" else 1.0
    room = int(min(paper.share, metal) * device.memory)
    if kind == "cpu":
        room = min(room, take_sample().available_bytes + process_bytes())

    loaded = Loaded(
        model.config,
        device=kind,
        itemsize=model.dtype.itemsize,
        compiled=True,
        base=0 if kind == "cuda" else PROGRAM,
        weights=model.weights,
        largest_tensor=model.largest_tensor,
        whole_matrix=whole_bytes(model.config, model.dtype, compiled=True),
        tile=tile,
        chunk=chunk,
        heads_per_band=heads,
        workers=paper.workers,
    )

    def needed(tile: int, machines: int) -> Need:
        return need(replace(loaded, tile=tile), model, machines)

    chunks = tile // chunk
    sizes = [tile] if paper.tile_asked else [chunk * (chunks >> n) for n in range(chunks.bit_length())]
    tile = next((size for size in sizes if needed(size, machines).total <= room), tile)
    fewest = next((m for m in range(1, blocks + 1) if needed(tile, m).total <= room), None)
    seconds = prefill_seconds(model, device, tokens, tile, chunk, machines)
    most = needed(tile, machines)
    return Plan(
        device, model, tokens, machines, backend, tile, chunk, heads, most, room, seconds, paper.workers, fewest
    )


def need(loaded: Loaded, model: Model, machines: int) -> Need:
    """The memory need of the machine that needs the most."""
    whole = computed_need(loaded, Call(1, 1, loaded.tile))
    stages = partition(model.config.num_blocks, machines)
    weights = [sum(model.blocks[b] for b in stage) for stage in stages]
    weights[0] += model.first
    weights[-1] += model.last + (model.first if model.tied and machines > 1 else 0)
    share = max(map(len, stages)) / model.config.num_blocks
    return replace(whole, weights=max(weights), state=int(whole.state * share))


def prefill_seconds(model: Model, device: Device, tokens: int, tile: int, chunk: int, machines: int) -> float:
    """The time of a prefill's windows. Stages work on different tiles at once, so the slowest sets the pace."""
    c, shares = model.config, SHARES[device.kind]
    stages = partition(c.num_blocks, machines)

    def stage_seconds(stage: range, T: int) -> float:
        # Between products a CPU computes in float32 and is bound by it: bfloat16 is not faster there.
        work = [Work.of(c, b, chunk, 4 if device.kind == "cpu" else model.dtype.itemsize) for b in stage]
        products = T * sum(w.flops for w in work) / (device.rate(model.dtype) * shares.products)
        weights = sum(model.blocks[b] for b in stage) / device.bandwidth
        traffic = T * sum(w.traffic for w in work) / (device.bandwidth * shares.traffic)
        steps = T * SLSTM_STEP_S * sum(b in c.slstm_at for b in stage)
        return max(max(products, weights) + traffic + steps, len(stage) * shares.call_s)

    def seconds(T: int) -> tuple[float, float]:
        """(between two such windows, until the first is through)"""
        each = [stage_seconds(stage, T) for stage in stages]
        sending = T * c.hidden_size * model.dtype.itemsize / LINK
        return max([*each, sending if machines > 1 else 0.0]), sum(each) + sending * (machines - 1)

    whole = max(0, tokens // tile - 1)  # these are alike; the last tile and the tail are planned as in the driver
    last = plan_windows([0], [tokens - whole * tile], tile_size=tile, chunk_size=chunk)
    windows = [window.size for window in last]
    return whole * seconds(tile)[0] + sum(seconds(T)[0] for T in windows[1:]) + seconds(windows[0])[1]


def probe(model: Model, tile: int, seconds: float = PROBE_S) -> Device:
    """This machine's CPU, probed: the rate of the model's products, and of a copy of a tile's activations.

    The rate of the other dtype is unknown and 0.
    """
    c, dtype = model.config, model.dtype
    shapes = [(2 * c.qk_dim + 2 * c.v_dim, c.hidden_size), (c.hidden_size, c.v_dim)]
    shapes += [(2 * c.ffn_dim, c.hidden_size), (c.hidden_size, c.ffn_dim)]
    operands = [(torch.randn(tile, i).to(dtype), torch.randn(o, i).to(dtype)) for o, i in shapes]
    source = torch.randn(tile, 2 * c.ffn_dim).to(dtype)
    target = torch.empty_like(source)
    products: list[float] = []
    copies: list[float] = []
    began = perf_counter()
    with torch.no_grad():
        while len(products) < 5 or (perf_counter() - began < seconds and len(products) < 1000):
            times = [perf_counter()]
            for x, weight in operands:
                linear(x, weight, None)
            times.append(perf_counter())
            target.copy_(source)
            times.append(perf_counter())
            products.append(times[1] - times[0])
            copies.append(times[2] - times[1])
    flops = 2 * tile * sum(o * i for o, i in shapes)
    rate = flops / median(products[1:])
    bandwidth = 2 * source.numel() * source.element_size() / median(copies[1:])
    memory = take_sample().total_bytes / (1 << 30)
    what = f"probed just now with {torch.get_num_threads()} threads"
    rates = {"bfloat16": 0.0, "float32": 0.0, str(dtype).removeprefix("torch."): rate}
    return Device("this", "cpu", memory, bandwidth, **rates, source=what)


def check(estimate: Plan, on_note: Callable[[str], object]) -> str:
    """Run what was estimated, in a child process, and compare. Returns a line; raises EstimateError beyond FACTOR.

    The probe is repeated between the runs, so that other work on the machine slows both; medians of both.
    """
    model, tile, chunk = estimate.model, estimate.tile_size, estimate.chunk_size
    asked = {"model": model.path, "device": "cpu", **estimate.asked}
    estimated, measured = [], []
    with Child(estimate.tokens, estimate.backend, asked, on_note) as child:
        child.figures()  # warm-up
        for _ in range(CHECK_ROUNDS):
            device = probe(model, tile, PROBE_S / CHECK_ROUNDS)
            estimated.append(prefill_seconds(model, device, estimate.tokens, tile, chunk, 1))
            measured.append(child.figures()["prefill_s"])
    ratio = median(measured) / median(estimated)
    line = (
        f"measured    {estimate.tokens / median(measured):,.0f} tokens/s, median of {CHECK_ROUNDS}; "
        f"estimated {ratio:.2g} of it, by probes between these runs"
    )
    if not 1 / FACTOR <= ratio <= FACTOR:
        raise EstimateError(f"{line}: beyond a factor of {FACTOR}; is the machine busy with other work?")
    return line
