"""The registry: every kernel and backend by name. Only here does a name become code.

A chunkwise backend's name is `<executor>_<kernel>`, with or without `chunkwise--` before it, as in config.json.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from xlstm_ray.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from xlstm_ray.kernels.compiled import Compiler
    from xlstm_ray.kernels.native import SlstmState, State

Entry = TypeVar("Entry")


class Cell(Protocol):
    """The mLSTM over T tokens: q, k (B, NH, T, K), v (B, NH, T, V), i, f (B, NH, T) -> h (B, NH, T, V), new state."""

    def __call__(
        self, q: "Tensor", k: "Tensor", v: "Tensor", *, i: "Tensor", f: "Tensor", state: "State", eps: float
    ) -> "tuple[Tensor, State]": ...


class SlstmCell(Protocol):
    """The sLSTM over T tokens: x (B, NH, T, 4, DH), token (B, 1, T) -> h (B, NH, T, DH) and the new state."""

    def __call__(
        self, x: "Tensor", *, recurrent: "Tensor", token: "Tensor", state: "SlstmState"
    ) -> "tuple[Tensor, SlstmState]": ...


@dataclass(frozen=True)
class Backend:
    """A chunkwise backend: the executor that moves the tiles, and the kernel that computes them."""

    name: str
    executor: str  # queued (this process) or ray (actors; in local mode this process)
    kernel: str  # compiled_chunks, compiled_steps, triton_chunks or native

    @property
    def compiled(self) -> bool:
        return self.kernel != "native"

    def runs_on(self, device: str) -> bool:
        """Whether it has code for this type of device."""
        return device == "cuda" or self.kernel != "triton_chunks"

    def unrolls(self, *, slstm: bool) -> bool:
        """Whether T_inner has an effect. slstm: the model has sLSTM blocks, which always go step by step."""
        return self.kernel == "compiled_steps" or (self.compiled and slstm)

    def cell_inside(self, tokens: int) -> bool:
        """Whether the cell is compiled together with the projections around it."""
        return self.kernel == "compiled_chunks" or (self.kernel == "compiled_steps" and tokens == 1)

    def cell(self, tokens: int, *, chunk_size: int, t_inner: int, compiler: "Compiler") -> Cell:
        """The cell for windows of `tokens` tokens; `chunk_size` L divides them, unless they are one decode step."""
        from xlstm_ray.kernels.chunkwise import mlstm_chunkwise
        from xlstm_ray.kernels.compiled import UnrolledSequence
        from xlstm_ray.kernels.native import mlstm_sequence

        if tokens == 1 or self.kernel == "native":
            return mlstm_sequence
        if self.kernel == "compiled_steps":
            return UnrolledSequence(t_inner, compiler)
        return partial(mlstm_chunkwise, chunk_size=chunk_size)

    def slstm_cell(self, tokens: int, *, t_inner: int, compiler: "Compiler") -> SlstmCell:
        """The sLSTM's cell for windows of `tokens` tokens. One decode step is compiled with the block around it."""
        from xlstm_ray.kernels.compiled import UnrolledSlstm
        from xlstm_ray.kernels.native import slstm_sequence

        return UnrolledSlstm(t_inner, compiler) if self.compiled and tokens > 1 else slstm_sequence


CHUNKWISE_BACKENDS = {
    backend.name: backend
    for backend in (
        Backend("queued_compiled_chunks", "queued", "compiled_chunks"),
        Backend("queued_compiled_steps", "queued", "compiled_steps"),
        Backend("ray_compiled_chunks", "ray", "compiled_chunks"),
        Backend("ray_compiled_steps", "ray", "compiled_steps"),
        Backend("native", "queued", "native"),
        Backend("queued_triton_chunks", "queued", "triton_chunks"),
        Backend("ray_triton_chunks", "ray", "triton_chunks"),
    )
}


def lookup(table: dict[str, Entry], kind: str, name: str) -> Entry:
    """The entry of that name. Raises UsageError, which lists the names."""
    if name not in table:
        raise UsageError(f"{kind} {name!r} is not known; there are: {', '.join(table)}")
    return table[name]


def chunkwise_backend(name: str) -> Backend:
    """A chunkwise backend by name, with or without `chunkwise--` before it."""
    return lookup(CHUNKWISE_BACKENDS, "chunkwise backend", name.removeprefix("chunkwise--"))


def step_kernel(name: str) -> Callable[..., Any]:
    """A step kernel by name: `native` (the reference) or `metal` (compiled), with mlstm_step's signature."""
    return lookup(STEP_KERNELS, "step kernel", name)()


def sequence_kernel(name: str, *, t_inner: int = 8) -> Cell:
    """A sequence kernel by name: `native_sequence__native` or `native_sequence__metal`, as mlstm_sequence."""
    return lookup(SEQUENCE_KERNELS, "sequence kernel", name)(t_inner)


def slstm_kernel(name: str, *, t_inner: int = 8) -> SlstmCell:
    """An sLSTM kernel by name: `vanilla` (the reference) or `native_compiled`, as slstm_sequence."""
    return lookup(SLSTM_KERNELS, "sLSTM kernel", name)(t_inner)


# These import torch only when a kernel is asked for.
def _native_step() -> Callable[..., Any]:
    from xlstm_ray.kernels.native import mlstm_step

    return mlstm_step


def _compiled_step() -> Callable[..., Any]:
    from xlstm_ray.kernels.compiled import compiled_step

    return compiled_step()


def _native_sequence(_t_inner: int) -> Cell:
    from xlstm_ray.kernels.native import mlstm_sequence

    return mlstm_sequence


def _unrolled_sequence(t_inner: int) -> Cell:
    from xlstm_ray.kernels.compiled import UnrolledSequence

    return UnrolledSequence(t_inner)


def _native_slstm(_t_inner: int) -> SlstmCell:
    from xlstm_ray.kernels.native import slstm_sequence

    return slstm_sequence


def _unrolled_slstm(t_inner: int) -> SlstmCell:
    from xlstm_ray.kernels.compiled import UnrolledSlstm

    return UnrolledSlstm(t_inner)


STEP_KERNELS: dict[str, Callable[[], Callable[..., Any]]] = {"native": _native_step, "metal": _compiled_step}
SEQUENCE_KERNELS: dict[str, Callable[[int], Cell]] = {
    "native_sequence__native": _native_sequence,
    "native_sequence__metal": _unrolled_sequence,
}
SLSTM_KERNELS: dict[str, Callable[[int], SlstmCell]] = {"vanilla": _native_slstm, "native_compiled": _unrolled_slstm}
