"""How a grid uses its cluster."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from xlstm_ray.actors.watchdog import Event
from xlstm_ray.memory.watchdog import Limits, Seen
from xlstm_ray.split import Reserved
from xlstm_ray.supervisor.presence import PATIENCE_S


@dataclass(frozen=True)
class GridOptions:
    """How a grid uses its cluster. Times in seconds."""

    run: str  # names this run's actors
    actors_per_device: int = 1
    cpus: float | None = None  # CPUs that an actor requests; None: a CPU for each thread
    gpu_direct: bool = True  # stages of one host pass tensors from GPU to GPU, and spans states
    spans: int = 1  # more: so many actors have all blocks, and windows of least_span tokens go to them in turn
    least_span: int = 1
    places: Sequence[Reserved] | None = None  # of each stage, while its node lives; None: where Ray puts it
    place_timeout_s: float = 10.0
    answer_timeout_s: float = 5.0
    patience_s: float = PATIENCE_S  # for an actor that may be behind a broken network
    start_timeout_s: float = 120.0
    load_timeout_s: float | None = None  # for actors to read their weights; None: by the size of the model's files
    least_deadline_s: float = 30.0  # the least deadline of a tile, which is 20 times the median of the last tiles
    first_deadline_s: float = 900.0  # before any tile was measured
    retries: int = 3  # recoveries without a new tile in between
    limits: Callable[[int, int | None], Limits] | None = None  # for the watchdog; None: no watchdog
    watch_every_s: float = 0.2
    empty_cache: bool = True
    on_event: Callable[[Event], None] = lambda event: None  # called between tiles
    on_seen: Callable[[Seen], None] | None = None  # called with each sample of memory; None: they stay where they are
