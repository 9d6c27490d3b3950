"""What memory a run will need, computed before it starts, and what makes it smaller."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from xlstm_ray.config import ModelConfig
from xlstm_ray.files import MIB

# glibc keeps freed blocks of up to 32 MiB, and where bands have threads, in a pool of each thread: measured on Linux,
# peaks are then 1.9 to 2.7 times what is alive.
KEPT_BY_THREADS = 2.2
WIDENED_HEAD = 2 * MIB  # the part of a bfloat16 head that is in float32 while it is multiplied
COMPILED_CODE = 60 * MIB  # what compiling leaves behind, beyond the compiler's own modules

# What Ray takes beside the work, in proportional set sizes of Ray 2.60 on Linux, rounded up: RUNBOOK
# has them by process. A program is interpreter, torch, Ray and the compiler with what it leaves behind.
HEAD = 330 * MIB
DASHBOARD = 300 * MIB
WATCHDOG = 190 * MIB
RAY_IN_DRIVER = 60 * MIB
ACTOR = 350 * MIB


@dataclass(frozen=True)
class Need:
    """The most memory that a run takes, in bytes, computed before it starts. The prompt's length is no part of it."""

    base: int  # interpreter, torch and compiler
    weights: int
    state: int
    tile: int  # activations of a tile

    @property
    def total(self) -> int:
        return self.base + self.weights + self.state + self.tile

    def __str__(self) -> str:
        parts = {"program": self.base, "weights": self.weights, "state": self.state, "a tile's activations": self.tile}
        sums = " + ".join(f"{name} {size / MIB:,.0f}" for name, size in parts.items())
        return f"{sums} = {self.total / MIB:,.0f} MiB"


def activation_bytes(
    config: ModelConfig, *, batch: int, tile: int, chunk: int, heads_per_band: int, workers: int, itemsize: int
) -> int:
    """The most that is alive at once while a tile of `tile` tokens, `batch` rows, goes through a block.

    itemsize: bytes of an element of the model's dtype. The residual stream twice, and the larger of two moments: the
    feed-forward has its gate, up and activated columns; the mLSTM has q, k, v, o, ordered copies of q, k, v and
    weighted k, the state's change in each chunk twice and the state before it (float32), the scores and two outputs.
    """
    D, qk, v = config.hidden_size, config.qk_dim, config.v_dim
    bands = -(-config.num_heads // heads_per_band)
    at_once = min(workers, bands) / bands  # this share of the columns
    residual = 2 * D * itemsize + (bands * D * itemsize if bands > 1 else 0)  # beside it every band's share of the sum
    feed = 3 * config.ffn_dim * itemsize
    states = 3 * config.num_heads * config.dhqk * config.dhhv * 4 / chunk
    scores = config.num_heads * chunk * (4 + itemsize)
    mix = (2 * (qk + v) + 3 * qk + v) * itemsize + states + scores + 2 * v * 4
    return int(batch * tile * (residual + at_once * max(feed, mix)))


def computed_need(
    config: ModelConfig,
    *,
    device_type: str,
    compiled: bool,
    base: int,
    weights: int,
    largest_tensor: int,
    batch: int,
    rows: int,
    tile: int,
    chunk: int,
    heads_per_band: int,
    workers: int,
    itemsize: int,
) -> Need:
    """The need of a run in this process; base: what the process takes before anything is loaded. All in bytes.

    batch: prompts; rows: of them in one call, of `tile` tokens each.
    On cuda it is the device's memory that is meant, and base its context.
    """
    row = state_bytes(config) + config.vocab_size * 4  # with its logits
    state = 2 * rows * row  # of now, and as it is handed over
    if batch > rows and device_type != "cuda":  # there they are the host's
        state += batch * row
    tile_bytes = activation_bytes(
        config,
        batch=rows,
        tile=tile,
        chunk=chunk,
        heads_per_band=heads_per_band,
        workers=workers,
        itemsize=itemsize,
    )
    if itemsize == 2 and device_type != "cuda":
        tile_bytes = max(tile_bytes, WIDENED_HEAD)
    if device_type == "cpu" and workers > 1:
        tile_bytes = int(tile_bytes * KEPT_BY_THREADS)
    base += COMPILED_CODE if compiled else 0
    # A tensor is read through a mapping of its file, which counts until it is copied; no tile is alive then.
    return Need(base, weights, state, max(tile_bytes, largest_tensor if device_type != "cuda" else 0))


def advice(ways: Mapping[str, int], excess: int) -> str:
    """What to do about so many bytes too much.

    ways: what can be done, and the bytes that it saves at most. Those are named that are enough, or else all together
    where that is, or else that none is.
    """
    enough = [way for way, saved in ways.items() if saved >= excess]
    if enough:
        return ", or ".join(enough)
    some = {way: saved for way, saved in ways.items() if saved > 0}
    if sum(some.values()) >= excess:
        return " and ".join(some)
    return "no smaller tile, batch or dtype is enough for that: take a machine with more memory"


@dataclass(frozen=True)
class GridNeed:
    """The most memory that a grid takes on the one machine that has all of it, in bytes, computed before it starts."""

    head: int  # 0 where it is there already
    driver: int
    actors: int  # how many
    programs: int  # theirs
    weights: int
    state: int
    tiles: int  # activations
    watchdog: int
    store: int  # what of Ray's object store is used

    @property
    def total(self) -> int:
        parts = self.head, self.driver, self.programs, self.weights, self.state, self.tiles, self.watchdog, self.store
        return sum(parts)

    def __str__(self) -> str:
        parts = {
            "Ray's head": self.head,
            "this program": self.driver,
            f"{self.actors} actor(s)' programs": self.programs,
            "weights": self.weights,
            "state": self.state,
            "tiles' activations": self.tiles,
            "watchdog": self.watchdog,
            "object store": self.store,
        }
        sums = " + ".join(f"{name} {size / MIB:,.0f}" for name, size in parts.items() if size)
        return f"{sums} = {self.total / MIB:,.0f} MiB"


def store_bytes(config: ModelConfig, *, stages: int, bands: int, batch: int, tile: int, itemsize: int) -> int:
    """What a grid has in the object store at once: states as they are handed over, and the tiles under way.

    A tile is a residual stream a stage; with several bands every band's partial sums of two halves of a block too.
    """
    stream = batch * tile * config.hidden_size * itemsize
    each = 2 if bands == 1 else 1 + 4 * bands
    return 2 * batch * state_bytes(config) + 2 * (stages + 1) * each * stream


def state_bytes(config: ModelConfig) -> int:
    """A row's recurrent state of all blocks, float32."""
    shapes = [config.state_shapes(n, config.num_heads) for n in range(config.num_blocks)]
    return sum(prod(shape) for block in shapes for shape in block.values()) * 4
