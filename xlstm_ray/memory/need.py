"""The memory that a run needs, computed before it starts, and ways to make it smaller."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

from xlstm_ray.config import ModelConfig
from xlstm_ray.files import MIB

# glibc keeps freed blocks of up to 32 MiB. If bands have threads, each thread has its own pool of them: on Linux, peaks
# of 1.9 to 2.7 times the live bytes were measured.
KEPT_BY_THREADS = 2.2
WIDENED_HEAD = 2 * MIB  # the part of a bfloat16 head that is in float32 while it is multiplied
SCORING = 160 * MIB  # what log-probabilities of a piece of logits take (sampling/logprobs.py)
PROGRAM = 400 * MIB  # interpreter, torch and compiler, measured on Linux; for runs that are only planned
HELD_ROWS = 4  # rows of states that an engine keeps on a device for later calls, besides the current call's
MOVERS = 4  # states on their way from a device to the host at once, where states are kept
READING = 3  # rows of a prompt that is read beside rows that decode: before two windows, and after them
CUBLAS = 3 * 32 * MIB  # torch's workspaces on Hopper, for each stream and thread: of prefills, graphs and logits
COMPILED_CODE = 60 * MIB  # memory that stays after compiling, besides the compiler's own modules
FIRST_CALLS = 30 * MIB  # what torch's own kernels take when they are first called, where nothing is compiled

# The memory of Ray itself: proportional set sizes of Ray 2.60 on Linux, rounded up. The RUNBOOK lists them by process.
# A program is interpreter, torch, Ray and the compiler with COMPILED_CODE.
HEAD = 330 * MIB
DASHBOARD = 300 * MIB
WATCHDOG = 60 * MIB
RAY_IN_DRIVER = 60 * MIB
ACTOR = 350 * MIB
TRITON = 80 * MIB  # what a program with the compiler takes more where triton is installed, as torch for cuda has it


@dataclass(frozen=True)
class Need:
    """The most memory that a run takes, in bytes, computed before it starts. The prompt's length does not matter."""

    base: int  # interpreter, torch and compiler
    weights: int
    state: int
    tile: int  # activations of a tile
    documents: int = 0  # states of a service's documents

    @property
    def total(self) -> int:
        return self.base + self.weights + self.state + self.tile + self.documents

    def __str__(self) -> str:
        parts = {"program": self.base, "weights": self.weights, "state": self.state, "a tile's activations": self.tile}
        parts |= {"documents' states": self.documents} if self.documents else {}
        sums = " + ".join(f"{name} {size / MIB:,.0f}" for name, size in parts.items())
        return f"{sums} = {self.total / MIB:,.0f} MiB"


@dataclass(frozen=True)
class Loaded:
    """A loaded model: everything that its need of memory follows from. Sizes in bytes unless stated otherwise."""

    config: ModelConfig
    device: str  # its type
    itemsize: int  # of an element in the model's dtype
    compiled: bool
    base: int  # the process before anything is loaded; on cuda, its context on the device
    weights: int
    largest_tensor: int
    tile: int  # tokens
    chunk: int  # tokens
    heads_per_band: int
    workers: int  # bands at once
    stages: int = 1
    spans: int = 1  # actors of each stage and band
    cache: int = 0  # of states that are kept for prompts to come
    documents: int = 0  # of states of a service's documents
    triton: bool = False  # the Triton kernels compute it
    whole_matrix: int = 0  # the largest that is made of integers for a product, or its rows that are made at a time

    @property
    def bands(self) -> int:
        return -(-self.config.num_heads // self.heads_per_band)


class Call(NamedTuple):
    """The largest call of a run of `batch` prompts: rows, and tokens of each row."""

    batch: int
    rows: int
    tokens: int
    scored: bool = False  # with log-probabilities of its tokens


@dataclass(frozen=True)
class BlockTensors:
    """The tensors between the products of an mLSTM block, in bytes a token. The need counts those that are alive at
    once; `xlstm-ray plan` counts all of them, written and read."""

    residual: int  # the stream
    ffn: int  # the feed-forward's gate, up and activated columns
    columns: int  # q, k, v, o; ordered copies of q, k, v and weighted k
    states: float  # the state's change in each chunk twice, and the state before it, float32
    scores: int  # float32, and in the model's dtype
    output: int  # in the model's dtype
    output32: int  # float32

    @classmethod
    def of(cls, config: ModelConfig, *, chunk: int, itemsize: int) -> "BlockTensors":
        """chunk: tokens. itemsize: bytes."""
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
    """The most bytes that are alive at once while a window of (rows, tokens) goes through a block.

    The residual stream twice, and the larger of two: the feed-forward, or the mLSTM with two outputs.
    """
    parts = BlockTensors.of(loaded.config, chunk=loaded.chunk, itemsize=loaded.itemsize)
    bands = loaded.bands
    at_once = min(loaded.workers, bands) / bands  # the share of the columns that is computed at once
    if loaded.triton:
        return int(rows * tokens * _triton_bytes(loaded, parts))
    residual = parts.residual * (2 + bands if bands > 1 else 2)  # every band's partial sum too
    mixer = parts.columns + parts.states + parts.scores + 2 * parts.output32
    return int(rows * tokens * (residual + at_once * max(parts.ffn, mixer)))


def _triton_bytes(loaded: Loaded, parts: BlockTensors) -> float:
    """As activation_bytes, of a token, by the Triton kernels: they write bfloat16, and into the residual stream; a
    graph has its own, beside what it gets and what it returns.

    The larger of two: q, k, v, o with weighted keys, the states before the chunks, scores and gated heads, and some
    numbers of each head; or the activated columns, with their float8 operands.
    """
    c, bf16 = loaded.config, 2
    at_once = min(loaded.workers, loaded.bands) / loaded.bands
    residual = parts.residual * (2 + loaded.bands if loaded.bands > 1 else 3)
    states = c.num_heads * c.dhqk * c.dhhv * bf16 / loaded.chunk
    mixer = (2 * (c.qk_dim + c.v_dim) + c.qk_dim + c.v_dim + c.num_heads * loaded.chunk) * bf16 + states
    gates = 4 * (4 * (max(16, 4 * c.num_heads) + 1) + 6 * c.num_heads)
    float8 = 3 * c.hidden_size  # an operand, and a product that is to be added
    return residual + float8 + at_once * max(mixer + gates, 3 * c.ffn_dim)


def scoring_bytes(loaded: Loaded, *, rows: int, tokens: int) -> int:
    """The most bytes that the log-probabilities of a window take: after the last block, with its residual stream."""
    return rows * tokens * loaded.config.hidden_size * loaded.itemsize + SCORING


def computed_need(loaded: Loaded, call: Call) -> Need:
    """The need of a run in this process; on cuda, on the device."""
    on_host = loaded.device != "cuda"
    row = state_bytes(loaded.config) + loaded.config.vocab_size * 4  # with its logits
    state = 2 * call.rows * row  # before a window and after it
    if loaded.device != "cpu":  # a device works on a window while the host handles the one before
        state += (call.rows + HELD_ROWS + (call.rows > 1) * READING + (loaded.cache > 0) * MOVERS) * row
    if on_host:
        state += loaded.cache
    if call.batch > call.rows and on_host:  # otherwise the other rows' states are on the host
        state += call.batch * row
    tile_bytes = activation_bytes(loaded, rows=call.rows, tokens=call.tokens) + loaded.whole_matrix
    if loaded.itemsize == 2 and on_host:
        tile_bytes = max(tile_bytes, WIDENED_HEAD)
    if call.scored:
        tile_bytes = max(tile_bytes, scoring_bytes(loaded, rows=call.rows, tokens=call.tokens))
    if loaded.device == "cpu" and loaded.workers > 1:
        tile_bytes = int(tile_bytes * KEPT_BY_THREADS)
    base = loaded.base + (COMPILED_CODE if loaded.compiled else FIRST_CALLS * on_host) + CUBLAS * (not on_host)
    # A tensor is read from a mapping of its file, which counts until it is copied. No tile is alive at that time.
    tile_bytes = max(tile_bytes, loaded.largest_tensor if on_host else 0)
    return Need(base, loaded.weights, state, tile_bytes, loaded.documents * on_host)


def advice(ways: Mapping[str, int], excess: int) -> str:
    """What to do about `excess` bytes too many.

    ways: what can be done, and the most bytes that it saves. The text names the ways that are enough alone, else all
    together if they are enough, else it says that none is.
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
    """The most memory that a grid takes if all of it is on one machine, in bytes, computed before it starts."""

    head: int  # 0 if it runs already
    driver: int
    actors: int  # the number of actors
    programs: int  # of the actors
    weights: int
    state: int
    tiles: int  # activations
    watchdog: int
    store: int  # the used part of Ray's object store
    documents: int = 0  # states of a service's documents

    @property
    def total(self) -> int:
        parts = self.head, self.driver, self.programs, self.weights, self.state, self.tiles, self.watchdog, self.store
        return sum(parts) + self.documents

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
            "documents' states": self.documents,
        }
        sums = " + ".join(f"{name} {size / MIB:,.0f}" for name, size in parts.items() if size)
        return f"{sums} = {self.total / MIB:,.0f} MiB"


def store_bytes(loaded: Loaded, *, rows: int, tokens: int) -> int:
    """The bytes that a grid has in the object store at once: states on their way, and tiles in flight.

    A tile has a residual stream for each stage; with several bands also every band's partial sums of both block halves.
    With spans each actor may have a state on its way to it, and all of it at once: who gives it does not wait.
    """
    stream = rows * tokens * loaded.config.hidden_size * loaded.itemsize
    each = 2 if loaded.bands == 1 else 1 + 4 * loaded.bands
    states = 2 + (loaded.spans if loaded.spans > 1 else 0)
    return states * rows * state_bytes(loaded.config) + 2 * (loaded.stages + 1) * each * stream


def state_bytes(config: ModelConfig) -> int:
    """The bytes of a row's recurrent state over all blocks, float32."""
    shapes = [config.state_shapes(n, config.num_heads) for n in range(config.num_blocks)]
    return sum(prod(shape) for block in shapes for shape in block.values()) * 4
