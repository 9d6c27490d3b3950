"""What memory a run will need, computed before it starts, and what makes it smaller."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

from xlstm_ray.config import ModelConfig
from xlstm_ray.files import MIB

# glibc keeps freed blocks of up to 32 MiB, and where bands have threads, in a pool of each thread: measured on Linux,
# peaks are then 1.9 to 2.7 times what is alive.
KEPT_BY_THREADS = 2.2
WIDENED_HEAD = 2 * MIB  # the part of a bfloat16 head that is in float32 while it is multiplied
PROGRAM = 400 * MIB  # interpreter, torch and compiler, as measured on Linux: where no run is there to ask
HELD_ROWS = 4  # rows of states that an engine leaves on a device for calls to come, beside those that it works on
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


@dataclass(frozen=True)
class Loaded:
    """A model as a run holds it: all that its need of memory follows from. Sizes in bytes, if nothing else is said."""

    config: ModelConfig
    device: str  # its type
    itemsize: int  # of an element in the model's dtype
    compiled: bool
    base: int  # what the process takes before anything is loaded; on cuda, its context on the device
    weights: int
    largest_tensor: int
    tile: int  # tokens
    chunk: int  # tokens
    heads_per_band: int
    workers: int  # bands at once
    stages: int = 1

    @property
    def bands(self) -> int:
        return -(-self.config.num_heads // self.heads_per_band)


class Call(NamedTuple):
    """The largest call of a run of `batch` prompts: so many rows of them, of so many tokens each."""

    batch: int
    rows: int
    tokens: int


@dataclass(frozen=True)
class BlockTensors:
    """What stands between the products of an mLSTM block, in bytes a token. The need counts what is alive at once of
    it; `xlstm-ray plan` counts all of it, written and read."""

    residual: int  # the stream
    ffn: int  # the feed-forward's gate, up and activated columns
    columns: int  # q, k, v, o; ordered copies of q, k, v and weighted k
    states: float  # the state's change in each chunk twice, and the state before it, float32
    scores: int  # float32, and in the model's dtype
    output: int  # in the model's dtype
    output32: int  # float32

    @classmethod
    def of(cls, config: ModelConfig, *, chunk: int, itemsize: int) -> "BlockTensors":
        """Chunks in tokens."""
        c, qk, v = config, config.qk_dim, config.v_dim
        return cls(
            residual=c.hidden_size * itemsize,
            ffn=3 * c.ffn_dim * itemsize,
            columns=(2 * (qk + v) + 3 * qk + v) * itemsize,
            states=3 * c.num_heads * c.dhqk * c.dhhv * 4 / chunk,
            scores=c.num_heads * chunk * (4 + itemsize),
            output=v * itemsize,
            output32=v * 4,
        )


def activation_bytes(loaded: Loaded, *, rows: int, tokens: int) -> int:
    """The most that is alive at once while a window of so many rows and tokens goes through a block.

    The residual stream twice, and the larger of two moments: the feed-forward, and the mLSTM with two outputs.
    """
    parts = BlockTensors.of(loaded.config, chunk=loaded.chunk, itemsize=loaded.itemsize)
    bands = loaded.bands
    at_once = min(loaded.workers, bands) / bands  # this share of the columns
    residual = parts.residual * (2 + bands if bands > 1 else 2)  # beside it every band's share of the sum
    mixer = parts.columns + parts.states + parts.scores + 2 * parts.output32
    return int(rows * tokens * (residual + at_once * max(parts.ffn, mixer)))


def computed_need(loaded: Loaded, call: Call) -> Need:
    """The need of a run in this process. On cuda it is the device's memory that is meant."""
    on_host = loaded.device != "cuda"
    row = state_bytes(loaded.config) + loaded.config.vocab_size * 4  # with its logits
    state = 2 * call.rows * row  # before a window and after it
    if loaded.device != "cpu":  # which works on a window while the one before is looked at
        state += (call.rows + HELD_ROWS) * row
    if call.batch > call.rows and on_host:  # else they are the host's
        state += call.batch * row
    tile_bytes = activation_bytes(loaded, rows=call.rows, tokens=call.tokens)
    if loaded.itemsize == 2 and on_host:
        tile_bytes = max(tile_bytes, WIDENED_HEAD)
    if loaded.device == "cpu" and loaded.workers > 1:
        tile_bytes = int(tile_bytes * KEPT_BY_THREADS)
    base = loaded.base + (COMPILED_CODE if loaded.compiled else 0)
    # A tensor is read through a mapping of its file, which counts until it is copied; no tile is alive then.
    return Need(base, loaded.weights, state, max(tile_bytes, loaded.largest_tensor if on_host else 0))


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


def store_bytes(loaded: Loaded, *, rows: int, tokens: int) -> int:
    """What a grid has in the object store at once: states as they are handed over, and the tiles under way.

    A tile is a residual stream a stage; with several bands every band's partial sums of two halves of a block too.
    """
    stream = rows * tokens * loaded.config.hidden_size * loaded.itemsize
    each = 2 if loaded.bands == 1 else 1 + 4 * loaded.bands
    return 2 * rows * state_bytes(loaded.config) + 2 * (loaded.stages + 1) * each * stream


def state_bytes(config: ModelConfig) -> int:
    """A row's recurrent state of all blocks, float32."""
    shapes = [config.state_shapes(n, config.num_heads) for n in range(config.num_blocks)]
    return sum(prod(shape) for block in shapes for shape in block.values()) * 4
