"""The speed of each node: a block's own step on real shapes, in an actor for each stage that a node could have.

All are made ready first and then timed at once, as they will work. They read and compile what the run's own actors do,
so that those find it in the compiler's cache.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from xlstm_ray.actors.link import Link
from xlstm_ray.actors.options import GridOptions
from xlstm_ray.config import ModelConfig
from xlstm_ray.container import machine_bytes
from xlstm_ray.errors import GridLost, UsageError, one_line
from xlstm_ray.layout import Shard
from xlstm_ray.memory.sample import process_bytes
from xlstm_ray.model import EndWeights, logits
from xlstm_ray.runtime.worker import Move
from xlstm_ray.split import Measured, Place

if TYPE_CHECKING:
    from xlstm_ray.actors.shard import ShardWork, WorkerSpec

SECONDS, TILES = 1.0, 3  # the least time and tiles of a measurement: a slowed CPU may be fast for 100 ms
ROWS = 4096  # of the tables in place of embedding and head


class Speed:
    """The actor that measures: a block of each kind of one band, and a small piece of embedding and head."""

    def __init__(self, spec: "WorkerSpec", shards: Mapping[str, Shard], tile: int, chunk: int, *, one_band: bool):
        self._spec, self._shards, self._tile, self._chunk, self._one_band = spec, shards, tile, chunk, one_band
        self._works: dict[str, ShardWork] = {}

    def prepare(self) -> int:
        """Load and compile; returns the bytes that were free before, on the device or on the machine."""
        from xlstm_ray.actors.shard import ShardWork

        room = self._room()
        for kind, shard in self._shards.items():
            work = self._works[kind] = ShardWork(self._spec, shard, "speed", one_band=self._one_band)
            work.load()
            work.warm_up(1, [self._tile], self._chunk)
        self.measure(0.0, 1)
        return room

    def measure(self, seconds: float = SECONDS, tiles: int = TILES) -> tuple[dict[str, float], float, float]:
        """Seconds for a tile: of a block of each kind, of the embedding, of the head for one row."""
        steps = {kind: partial(self._block, work) for kind, work in self._works.items()}
        blocks = {kind: self._mean(step, seconds, tiles) for kind, step in steps.items()}
        first, last = (self._mean(end, 0.0, tiles) for end in self._ends(self._spec.config))
        return blocks, first, last

    def _mean(self, call: Any, seconds: float, tiles: int) -> float:
        count, began = 0, perf_counter()
        while count < tiles or perf_counter() - began < seconds:
            call()
            self._wait()
            count += 1
        return (perf_counter() - began) / count

    def _block(self, work: "ShardWork") -> None:
        worker, T = work.worker, self._tile
        x = torch.full((1, T, self._spec.config.hidden_size), 0.5, dtype=self._spec.dtype, device=worker.device)
        start = torch.zeros(1, dtype=torch.long, device=worker.device)
        worker.load(0, None, 1)
        move = Move(0, 1, start, start + T, self._chunk)
        if self._one_band:
            worker.run_block(0, x, move)
        else:
            worker.run_mixer(0, x, move)
            worker.run_ffn(0, x, move)

    def _ends(self, config: ModelConfig) -> Any:
        """Calls of the embedding, and of the head's first rows; its other rows take as long each."""
        rows, D, device = min(config.vocab_size, ROWS), config.hidden_size, torch.device(self._spec.device)
        table = torch.zeros(rows, D, dtype=self._spec.dtype, device=device)
        tokens = torch.zeros(1, self._tile, dtype=torch.long, device=device)
        ends = EndWeights(None, torch.ones(D, dtype=self._spec.dtype, device=device), table)

        def head() -> None:
            for _ in range(-(-config.vocab_size // rows)):
                logits(table[:1], ends, config)

        return (lambda: F.embedding(tokens, table)), head

    def _room(self) -> int:
        if self._spec.device == "cuda":
            return torch.cuda.mem_get_info()[0]
        room = machine_bytes()[0] + process_bytes()
        return min(room, torch.mps.recommended_max_memory()) if self._spec.device == "mps" else room

    def _wait(self) -> None:
        if self._spec.device == "cuda":
            torch.cuda.synchronize()
        elif self._spec.device == "mps":
            torch.mps.synchronize()


def measure(
    ray: Any,
    spec: "WorkerSpec",
    bands: list[Shard],
    options: GridOptions,
    *,
    threads: int | None,
    sizes: tuple[int, int],
) -> Measured:
    """Where stages could be, and how fast each of these places is. bands: the shards of any stage. sizes: tile, chunk.

    threads: of each actor; None: all cores of the smallest node, since bits depend on it, so that a larger node has
    several places. Raises UsageError if no node has room for a stage, errors of loading, and GridLost.
    """
    link, kind, count = Link(ray), spec.device, len(bands)
    nodes = [node for node in link.ask(ray.nodes) if node["Alive"]]
    if kind == "cpu":
        cores = [int(node["Resources"].get("CPU", 0)) // count for node in nodes]
        threads = threads or max(1, min((n for n in cores if n), default=1))
        slots = [n // threads for n in cores]
    else:
        threads, name = threads or 1, {"cuda": "GPU", "mps": "mps"}[kind]
        slots = [int(n["Resources"].get(name, 0) * options.actors_per_device + 1e-6) // count for n in nodes]
    seats = [node for node, n in zip(nodes, slots, strict=True) for _ in range(n)]
    hosts = {node["NodeID"]: _host(node, nodes) for node in nodes}
    if not seats:
        raise UsageError(
            f"`stages` is auto, but none of the cluster's {len(nodes)} node(s) has room for a stage of {count} "
            f"band(s) with {threads} thread(s) each on {kind}; add nodes, or give fewer `threads`"
        )
    if len(seats) == 1:
        only = seats[0]["NodeID"]
        return Measured([Place(only, hosts[only], 1 << 62, {})], threads)
    spec, shards = replace(spec, threads=threads), _a_block_of_each_kind(spec.config, bands[0])
    actors = [
        _actor(ray, node, f"xlstm-ray {options.run} speed {n}", spec, options).remote(
            spec, shards, *sizes, one_band=count == 1
        )
        for n, node in enumerate(seats)
    ]
    try:
        link.get([actor.__ray_ready__.remote() for actor in actors], options.start_timeout_s)
        rooms = link.get([actor.prepare.remote() for actor in actors], options.first_deadline_s)
        speeds = link.get([actor.measure.remote() for actor in actors], options.first_deadline_s)
    except link.failure as error:
        raise GridLost(f"the nodes could not be measured: {one_line(error)}{link.why()}") from error
    finally:
        for actor in actors:
            link.ask(ray.kill, actor, no_restart=True)
    places = []
    for node, room, (block_s, first, last) in zip(seats, rooms, speeds, strict=True):
        # Places of one machine share its memory. A device belongs to one place, or to actors_per_device bands.
        share = room // seats.count(node) if kind != "cuda" else room * count // options.actors_per_device
        memory = int(node["Resources"].get("memory", share)) // seats.count(node)
        room = min(share, memory) if kind != "cuda" else share
        places.append(Place(node["NodeID"], hosts[node["NodeID"]], room, block_s, first, last))
    return Measured(places, threads)


def _a_block_of_each_kind(config: ModelConfig, band: Shard) -> dict[str, Shard]:
    """A block of each kind that the model has, best one with neither embedding nor head."""
    inner = sorted(range(config.num_blocks), key=lambda n: n in (0, config.num_blocks - 1))
    found: dict[str, Shard] = {}
    for n in inner:
        found.setdefault("sLSTM" if n in config.slstm_at else "mLSTM", replace(band, blocks=range(n, n + 1)))
    return found


def _actor(ray: Any, node: dict[str, Any], name: str, spec: "WorkerSpec", options: GridOptions) -> Any:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    share = 1 / options.actors_per_device
    return ray.remote(Speed).options(
        name=name,
        num_cpus=spec.threads if spec.device == "cpu" else 1,
        num_gpus=share if spec.device == "cuda" else 0,
        resources={"mps": share} if spec.device == "mps" else {},
        scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False),
        max_restarts=0,
    )


def _host(node: dict[str, Any], nodes: list[dict[str, Any]]) -> str:
    """A node's name; with Ray's id if another node has the same."""
    name = node["NodeManagerHostname"]
    same = sum(other["NodeManagerHostname"] == name for other in nodes) > 1
    return f"{name} ({node['NodeID'][:8]})" if same else name
