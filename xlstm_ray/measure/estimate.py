"""`xlstm-ray plan`: a computed estimate of a prefill's memory and time on a device, and the settings for it.

It reads only config.json and, if there are weights, their headers. work.py has the arithmetic.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple

import torch

from xlstm_ray.errors import EstimateError, UsageError
from xlstm_ray.files import MIB
from xlstm_ray.kernels.quantized import rows_at_once
from xlstm_ray.layout import partition
from xlstm_ray.measure.child import Child
from xlstm_ray.measure.devices import DEVICES, GB, SHARES, Device
from xlstm_ray.measure.work import (
    HOP_S,
    LINK_GBIT,
    Model,
    in_turn_seconds,
    need,
    need_of,
    need_of_span,
    prefill_seconds,
    read_model,
    stage_seconds,
)
from xlstm_ray.memory.need import PROGRAM, Call, Loaded, Need, computed_need
from xlstm_ray.memory.sample import process_bytes, take_sample
from xlstm_ray.model import linear
from xlstm_ray.plan import OnPaper
from xlstm_ray.split import Blocks, Place, Stage, split
from xlstm_ray.tensors import whole_bytes

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


class Layout(NamedTuple):
    """What several machines have, "stages" or "spans", and what that gives. need: of the machine with the most."""

    name: str
    machines: int
    tile_size: int
    need: Need
    fits: bool
    seconds: float

    def __str__(self) -> str:
        fits = "" if self.fits else ", which do not fit"
        return f"{_duration(self.seconds)} with {self.machines} {self.name}{fits} ({self.need.total / MIB:,.0f} MiB)"


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
    split: list[Stage] | None = None  # over unlike machines; the other fields are of the one that needs the most
    spans: int = 1  # machines that have all blocks each
    layouts: Sequence[Layout] = ()  # this one and the other one, if these machines can have both
    link_gbit: float = LINK_GBIT

    @property
    def better(self) -> str | None:
        """The faster layout of those that fit."""
        there = [layout for layout in self.layouts if layout.fits]
        return min(there, key=lambda layout: layout.seconds).name if there else None

    @property
    def fits(self) -> bool:
        return self.need.total <= self.room

    @property
    def tok_s(self) -> float:
        return self.tokens / self.seconds

    @property
    def asked(self) -> dict[str, Any]:
        """The settings of this run."""
        stages = self.machines if self.split is None else "auto"
        layout = {"spans": self.spans} if self.spans > 1 else {"stages": stages}
        of_machines = {"chunkwise_backend": self.backend, **layout} if self.machines > 1 else {}
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
            each = " with a stage each" if self.spans > 1 else ""
            more = f"{self.machines_needed} machines{each} would do" if self.machines_needed else "nor on more machines"
            fit = f"does not fit{many}; {more}"
        return [
            f"model       {self.model.path} ({self.model.known_from})",
            f"device      {d.name}: {d.memory_gb:,.0f} GB, {d.bandwidth / GB:,.0f} GB/s, "
            f"{d.rate(self.model.dtype) / 1e12:,.3g} TFLOPS in {dtype}",
            f"            {d.source}",
            f"            of these {shares.products:.0%} and {shares.traffic:.0%} are reached: {shares.source}",
            f"memory      {self.need}",
            f"            {fit}: {self.room / MIB:,.0f} MiB may be used; the prompt's length does not matter",
            *(f"stage       {stage}" for stage in self.split or []),
            f"time        {_duration(self.seconds)} for {self.tokens:,} tokens ({self.tok_s:,.0f} tokens/s)",
            "            without loading and compiling",
            *self._compared,
            f"not known   {UNKNOWN}",
            f"settings    {' '.join(f'`{name}={value}`' for name, value in self.asked.items())}",
        ]

    @property
    def _compared(self) -> list[str]:
        if self.machines == 1:
            return []
        link = f"            with {self.link_gbit:,g} Gbit/s between machines, and an assumed {1e3 * HOP_S:g} ms a hop"
        heads = self.model.config.num_heads
        if len(self.layouts) < 2:
            bands = self.heads_per_band < heads and self.split is None
            return [link, *[f"layout      for `spans` instead, give `heads_per_band={heads}`"] * bands]
        one, other = self.layouts
        times = max(one.seconds, other.seconds) / min(one.seconds, other.seconds)
        both = f"; {self.better} are {times:.2f} x as fast" if one.fits and other.fits else ""
        return [link, f"layout      {one}, {other}{both}"]

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
            "stages": 1 if self.spans > 1 else self.machines,
            "spans": self.spans,
            "layouts": {
                layout.name: {"need_bytes": layout.need.total, "fits": layout.fits}
                | {"tile_size": layout.tile_size, "seconds": layout.seconds}
                for layout in self.layouts
            },
            "better": self.better,
            "link_gbit": self.link_gbit if self.machines > 1 else None,
            "layout": [
                {"device": s.place.host, "blocks": [s.blocks.start, s.blocks.stop - 1], "tile_s": s.seconds}
                | {"block_s": dict(s.place.block_s), "need_bytes": s.need, "room_bytes": s.place.room}
                for s in self.split or []
            ],
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
    link_gbit: float | None = None,
) -> Plan:
    """The estimate for `tokens` prompt tokens on a device, or on `machines` of them with a stage of the blocks each.
    With spans, on as many with all blocks each. link_gbit: Gbit/s between them; None: LINK_GBIT.

    choose: makes the choices of a run for a kind of device. The tile is halved until the run fits, unless it was given.
    memory_gb: the device's memory, where it is not the most that is sold.
    device_name: also several, with commas between: a machine each, whose stages are as `stages=auto` makes them.
    Raises UsageError for a device that is not in the table, or a number out of range.
    """
    names = device_name.split(",")
    for name in names:
        if name != "this" and name not in DEVICES:
            raise UsageError(f"`device` is {name!r}; there are: this, {', '.join(DEVICES)}")
    if not 1 <= tokens <= 1 << 40:
        raise UsageError(f"`prompt_tokens` is {tokens}; allowed: 1 to 2^40")
    if memory_gb is not None and "this" in names:
        raise UsageError("`memory_gb` is for a device of the table; this machine's memory is known, so leave it out")
    if memory_gb is not None and not 1 <= memory_gb <= 4096:
        raise UsageError(f"`memory_gb` is {memory_gb:g}; allowed: 1 to 4096")
    kind, *others = dict.fromkeys("cpu" if name == "this" else DEVICES[name].kind for name in names)
    if others:
        raise UsageError(f"`device` is {device_name!r}, but the actors of a grid work on one kind of device")
    if len(names) > 1 and machines != 1:
        raise UsageError(f"`machines` has no effect beside {len(names)} names in `device`; leave it out")
    if len(names) > 1 and memory_gb is not None:
        raise UsageError(f"`memory_gb` is for one device, and `device` names {len(names)}; leave it out")
    paper = choose(kind)
    if paper.spans > 1 and machines != 1:
        both = f"{paper.spans_named} and `machines`"
        raise UsageError(f"{both} were both given, and a machine has all blocks or a stage's; give one of them")
    if paper.spans > 1 and len(names) > 1:
        raise UsageError(f"{paper.spans_named} is for machines of one kind, and `device` names {len(names)}")
    if link_gbit is not None and not 0.01 <= link_gbit <= 1e6:
        raise UsageError(f"`link_gbit` is {link_gbit:g}; allowed: 0.01 to 1000000")
    if link_gbit is not None and machines == paper.spans == len(names) == 1:
        raise UsageError("`link_gbit` is for several machines (`machines`, `spans`); leave it out")
    link = LINK_GBIT if link_gbit is None else link_gbit
    model = read_model(paper)
    blocks = model.config.num_blocks
    if not 1 <= machines <= blocks:
        raise UsageError(f"`machines` is {machines}; allowed: 1 to {blocks}, the model's blocks")
    many = max(machines, paper.spans)
    backend = "queued_compiled_chunks" if many == len(names) == 1 else "ray_compiled_chunks"
    tile, chunk, heads = paper.sizes
    devices = [probe(model, tile) if name == "this" else DEVICES[name] for name in names]
    devices = [replace(device, memory_gb=memory_gb or device.memory_gb) for device in devices]
    metal = [METAL_SHARES[device.memory_gb >= LARGE_MAC_GB] if kind == "mps" else 1.0 for device in devices]
    rooms = [int(min(paper.share, share) * d.memory) for d, share in zip(devices, metal, strict=True)]
    if kind == "cpu":
        rooms = [min(room, take_sample().available_bytes + process_bytes()) for room in rooms]
    device, room = devices[0], rooms[0]

    loaded = Loaded(
        model.config,
        device=kind,
        itemsize=model.dtype.itemsize,
        compiled=True,
        base=0 if kind == "cuda" else PROGRAM,
        weights=model.sizes.all,
        largest_tensor=model.largest_tensor,
        whole_matrix=whole_bytes(model.config, model.dtype, rows_at_once(kind, compiled=True)),
        tile=tile,
        chunk=chunk,
        heads_per_band=heads,
        workers=paper.workers,
        documents=paper.documents,
    )

    def needed(tile: int, machines: int, *, spans: bool = False) -> Need:
        of_tile = replace(loaded, tile=tile)
        return need_of_span(of_tile) if spans else need(of_tile, model, machines)

    chunks = tile // chunk
    sizes = [tile] if paper.tile_asked else [chunk * (chunks >> n) for n in range(chunks.bit_length())]
    if len(names) > 1:
        tile, stages = _uneven(loaded, model, devices, rooms, sizes)
        at = [(devices[int(stage.place.node)], stage.blocks) for stage in stages]
        seconds = prefill_seconds(model, at, tokens, tile, chunk, link_gbit=link)
        needs = need_of(replace(loaded, tile=tile), model, [s.blocks for s in stages])
        n = max(range(len(stages)), key=lambda n: needs[n].total)
        run = backend, tile, chunk, heads, needs[n], stages[n].place.room, seconds, paper.workers
        return Plan(at[n][0], model, tokens, len(stages), *run, len(stages), stages, link_gbit=link)

    def layout(name: str) -> Layout:
        spans = name == "spans"
        size = next((size for size in sizes if needed(size, many, spans=spans).total <= room), tile)
        most = needed(size, many, spans=spans)
        if spans:
            seconds = in_turn_seconds(model, device, many, tokens, size, chunk, link_gbit=link)
        else:
            even = [(device, stage) for stage in partition(blocks, many)]
            seconds = prefill_seconds(model, even, tokens, size, chunk, link_gbit=link)
        return Layout(name, many, size, most, most.total <= room, seconds)

    # Spans have no bands, and there are no more stages than blocks.
    can_be = {"stages": many <= blocks, "spans": many > 1 and heads == model.config.num_heads}
    layouts = {name: layout(name) for name, can in can_be.items() if can}
    found = layouts["spans" if paper.spans > 1 else "stages"]
    fewest = next((m for m in range(1, blocks + 1) if needed(found.tile_size, m).total <= room), None)
    of_run = backend, found.tile_size, chunk, heads, found.need, room, found.seconds, paper.workers
    there = [*layouts.values()]
    return Plan(device, model, tokens, many, *of_run, fewest, spans=paper.spans, layouts=there, link_gbit=link)


def _uneven(
    loaded: Loaded, model: Model, devices: Sequence[Device], rooms: Sequence[int], tiles: Sequence[int]
) -> tuple[int, list[Stage]]:
    """The largest of these tiles with which the blocks fit on the devices, and their stages there."""
    c, chunk = model.config, loaded.chunk
    kinds = ["sLSTM" if n in c.slstm_at else "mLSTM" for n in range(c.num_blocks)]
    for tile in tiles:
        whole = computed_need(replace(loaded, tile=tile), Call(1, 1, tile))
        sizes = [size + whole.state // c.num_blocks for size in model.sizes.blocks]
        blocks = Blocks(kinds, sizes, model.sizes.first, model.sizes.of_last, whole.base + whole.tile)
        places = []
        for n, (device, room) in enumerate(zip(devices, rooms, strict=True)):
            each = {kind: kinds.index(kind) for kind in dict.fromkeys(kinds)}
            times = {k: stage_seconds(model, device, range(b, b + 1), tile, chunk) for k, b in each.items()}
            places.append(Place(str(n), device.name, room, times))
        try:
            return tile, split(places, blocks)
        except UsageError:
            if tile == tiles[-1]:
                raise
    raise AssertionError("there is a tile")


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
            whole = [(device, range(model.config.num_blocks))]
            estimated.append(prefill_seconds(model, whole, estimate.tokens, tile, chunk))
            measured.append(child.figures()["prefill_s"])
    ratio = median(measured) / median(estimated)
    line = (
        f"measured    {estimate.tokens / median(measured):,.0f} tokens/s, median of {CHECK_ROUNDS}; "
        f"estimated {ratio:.2g} of it, by probes between these runs"
    )
    if not 1 / FACTOR <= ratio <= FACTOR:
        raise EstimateError(f"{line}: beyond a factor of {FACTOR}; is the machine busy with other work?")
    return line
