"""The sizes that the Triton kernels take: one table. What is not in it goes to the portable kernels, or is refused."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

KERNEL = "triton_chunks"
LEAST_CHUNK = 64  # tokens
CAPABILITY = 9, 0  # Hopper: the only one that the kernels were measured and tested on


class Sizes(Protocol):
    """What the table reads of a model's configuration."""

    @property
    def dhqk(self) -> int: ...
    @property
    def dhhv(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def slstm_at(self) -> Sequence[int]: ...
    @property
    def quantization(self) -> object: ...
    @property
    def use_bias(self) -> bool: ...
    @property
    def gate_soft_cap(self) -> float | None: ...


class Asked(NamedTuple):
    """What a run asks of the kernels. capability: of the GPU, None if that is not known here."""

    config: Sizes
    columns: Sequence[int]  # of the feed-forward, of each band
    chunk: int
    dtype: str
    capability: tuple[int, int] | None


def _powers(least: int, most: int) -> Callable[[int], bool]:
    return lambda size: least <= size <= most and size & (size - 1) == 0


# What it is, what is allowed, how it is read of a run, the check. Triton's tiles are made of powers of two; a head's
# V columns are in the registers of one program, and K of them in its shared memory.
TABLE: tuple[tuple[str, str, Callable[[Asked], object], Callable], ...] = (
    (
        "the GPU's compute capability",
        "9.0 (Hopper)",
        lambda a: _dotted(a.capability),
        lambda x: x == _dotted(CAPABILITY),
    ),
    ("the dtype", "bfloat16 or float8", lambda a: a.dtype, lambda x: x in ("bfloat16", "float8")),
    ("DHQK", "32, 64, 128 or 256", lambda a: a.config.dhqk, _powers(32, 256)),
    ("DHHV", "32, 64, 128, 256 or 512", lambda a: a.config.dhhv, _powers(32, 512)),
    ("the chunk size", "64, 128 or 256", lambda a: a.chunk, _powers(LEAST_CHUNK, 256)),
    ("the hidden size", "a multiple of 64", lambda a: a.config.hidden_size, lambda x: x % 64 == 0),
    (
        "a band's feed-forward columns",
        "a multiple of 16",
        lambda a: list(a.columns),
        lambda x: not any(n % 16 for n in x),
    ),
    ("slstm_at", "no sLSTM blocks", lambda a: list(a.config.slstm_at), lambda x: not x),
    ("use_bias", "false", lambda a: a.config.use_bias, lambda x: not x),
    ("quantization", "plain weights", lambda a: a.config.quantization, lambda x: x is None),
    ("gate_soft_cap", "a number", lambda a: a.config.gate_soft_cap, lambda x: x is not None),
)


def misfit(asked: Asked) -> str | None:
    """Why the Triton kernels do not take a run, in words; None if they do."""
    for name, allowed, read, fits in TABLE:
        value = read(asked)
        if not fits(value):
            return f"{name} is {value}; the Triton kernels take {allowed}"
    return None


def _dotted(capability: tuple[int, int] | None) -> str:
    return "not known" if capability is None else ".".join(map(str, capability))
