"""Our kernels behind the signatures of NX-AI's packages: `mlstm_kernels` for the mLSTM, `xlstm` for the sLSTM.

Each function takes a kernel's name in this project's registry and returns that kernel with their words and shapes.
B batch, NH heads, S tokens, K = DHQK, V = DHHV, DH the head dimension of an sLSTM, D = NH x DH.
For inference: a call that would need a gradient is refused. What follows a kernel's own arguments is not looked at.
"""

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from xlstm_ray import kernels
from xlstm_ray.engine.windows import plan_windows
from xlstm_ray.errors import KernelError, UsageError
from xlstm_ray.kernels.compiled import compile_each, compile_strict
from xlstm_ray.kernels.native import PAD_F, PAD_I, State

TILE_SIZE = 1024  # tokens of a compiled call; the rest goes in calls of one chunk, so two shapes are compiled
T_INNER = 8  # steps in a call of a kernel that goes step by step


@cache
def mlstm_chunkwise(name: str = "queued_compiled_chunks", *, tile_size: int = TILE_SIZE) -> Callable[..., Any]:
    """A chunkwise kernel: f(q, k, v, i, f, c_initial, n_initial, m_initial, return_last_states, eps, chunk_size).

    q, k (B, NH, S, K)   v (B, NH, S, V)   i, f (B, NH, S) gate pre-activations   states c (B, NH, K, V),
    n (B, NH, K), m (B, NH, 1)   Returns h (B, NH, S, V) in q's dtype; with return_last_states (h, (c, n, m)), float32.
    S is any number: the last chunk is padded by gates that leave the state as it is, to the bit.
    Raises UsageError for a name that is not known or needs a Ray grid, and if a tile is not whole chunks.
    """
    backend = kernels.chunkwise_backend(name)
    if backend.executor == "ray":
        raise UsageError(f"{name!r} needs a Ray grid; inside other code, take a kernel of one process: queued_...")

    def make(tokens: int, chunk_size: int) -> Callable:
        cell = backend.cell(tokens, chunk_size=chunk_size, t_inner=T_INNER, compiler=compile_strict)
        return _compiled(cell, f"mlstm_{tokens}") if backend.kernel == "compiled_chunks" else cell

    cell = _by_kind(make)

    def chunkwise(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        i: Tensor,
        f: Tensor,
        c_initial: Tensor | None = None,
        n_initial: Tensor | None = None,
        m_initial: Tensor | None = None,
        return_last_states: bool = False,
        eps: float = 1e-6,
        chunk_size: int = 64,
        **_: Any,
    ) -> Any:
        if chunk_size < 1 or tile_size % chunk_size:
            raise UsageError(f"tile_size {tile_size} is not a multiple of chunk_size {chunk_size}")
        _require_no_gradient(q, k, v, i, f)
        state = _state(q, v, (c_initial, n_initial, m_initial))
        B, NH, S, V = v.shape
        out = q.new_empty(B, S, NH, V).transpose(1, 2)  # callers go on with all heads of a token
        for window in plan_windows([0], [q.shape[2]], tile_size=tile_size, chunk_size=chunk_size):
            parts = [_window(x, window.start, window.size, pad) for x, pad in zip((q, k, v, i, f), PADS, strict=True)]
            run = cell((*parts, *state), window.size, chunk_size)
            h, state = run(*parts[:3], i=parts[3], f=parts[4], state=state, eps=eps)
            here = out[:, :, window.start : window.start + window.size]
            here.copy_(h[:, :, : here.shape[2]])
        return _result(out, state, return_last_states)

    return chunkwise


@cache
def mlstm_sequence(name: str = "native_sequence__metal") -> Callable[..., Any]:
    """A sequence kernel, in strict time order: f(q, k, v, i, f, c_initial, n_initial, m_initial, ..., eps).

    Shapes and results as mlstm_chunkwise. Raises UsageError for a name that is not known.
    """
    cell = _by_kind(partial(kernels.sequence_kernel, name, t_inner=T_INNER))

    def sequence(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        i: Tensor,
        f: Tensor,
        c_initial: Tensor | None = None,
        n_initial: Tensor | None = None,
        m_initial: Tensor | None = None,
        return_last_states: bool = False,
        eps: float = 1e-6,
        **_: Any,
    ) -> Any:
        _require_no_gradient(q, k, v, i, f)
        state = _state(q, v, (c_initial, n_initial, m_initial))
        h, state = cell((q, k, v, i, f, *state))(q, k, v, i=i, f=f, state=state, eps=eps)
        return _result(h, state, return_last_states)

    kernels.lookup(kernels.SEQUENCE_KERNELS, "sequence kernel", name)
    return sequence


@cache
def mlstm_step(name: str = "metal") -> Callable[..., tuple[Tensor, State]]:
    """A step kernel, for one token: f(q, k, v, i, f, c, n, m, eps) -> h (B, NH, V), (c, n, m).

    q, k (B, NH, K)   v (B, NH, V)   i, f (B, NH, 1)   Raises UsageError for a name that is not known.
    """
    cell = _by_kind(partial(kernels.step_kernel, name))

    def step(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        i: Tensor,
        f: Tensor,
        c: Tensor | None = None,
        n: Tensor | None = None,
        m: Tensor | None = None,
        eps: float = 1e-6,
        **_: Any,
    ) -> tuple[Tensor, State]:
        _require_no_gradient(q, k, v, i, f)
        state = _state(q.unsqueeze(2), v, (c, n, m))
        inputs = [x.contiguous() for x in (q, k, v, i.squeeze(-1), f.squeeze(-1))]
        return cell((*inputs, *state))(*inputs[:3], i=inputs[3], f=inputs[4], state=state, eps=eps)

    kernels.lookup(kernels.STEP_KERNELS, "step kernel", name)
    return step


@cache
def slstm_forward(name: str = "native_compiled") -> Callable[..., tuple[Tensor, Tensor]]:
    """An sLSTM kernel: f(x, states, R, b) -> h of every token (S, B, D), and the last states (4, B, D).

    x (S, B, 4 D): W x of the gates i, f, z, o   states (4, B, D): h, c, n, m   R (NH, 4 DH, DH)   b (4 D)
    Their forget gate's pre-activation has no limit, ours is at most 15, as in published models.
    Raises UsageError for a name that is not known.
    """
    cell = _by_kind(partial(kernels.slstm_kernel, name, t_inner=T_INNER))

    def forward(x: Tensor, states: Tensor, R: Tensor, b: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        _require_no_gradient(x, states, R, b)
        (S, B, _width), (NH, _rows, DH) = x.shape, R.shape
        gates = (x + b).view(S, B, 4, NH, DH).permute(1, 3, 0, 2, 4).contiguous()
        state = [part.view(B, NH, DH).contiguous() for part in states]
        token = torch.ones(B, 1, S, dtype=torch.bool, device=x.device)
        run = cell((gates, R, *state))
        h, state = run(gates, recurrent=R.transpose(1, 2).contiguous(), token=token, state=tuple(state))
        return h.permute(2, 0, 1, 3).reshape(S, B, NH * DH), torch.stack([part.reshape(B, NH * DH) for part in state])

    kernels.lookup(kernels.SLSTM_KERNELS, "sLSTM kernel", name)
    return forward


PADS = 0.0, 0.0, 0.0, PAD_I, PAD_F  # of q, k, v, i, f


def _by_kind(make: Callable[..., Callable]) -> Callable[..., Callable]:
    """The kernel for given tensors, and sizes that `make` takes: compiled code is for one kind of tensor, too."""
    made: dict[tuple, Callable] = {}

    def find(tensors: Sequence[Tensor], *sizes: int) -> Callable:
        key = *sizes, *(x.is_inference() for x in tensors)
        if key not in made:
            made.setdefault(key, make(*sizes))  # all threads get the same one
        return made[key]

    return find


def _window(x: Tensor, start: int, size: int, pad: float) -> Tensor:
    """x (B, NH, S, ...) -> its tokens from `start` on (B, NH, size, ...), padded and contiguous."""
    part = x[:, :, start : start + size]
    missing = size - part.shape[2]
    return F.pad(part, (0, 0) * (x.ndim - 3) + (0, missing), value=pad) if missing else part.contiguous()


def _compiled(cell: Callable, name: str) -> Callable:
    """A cell of the registry, compiled."""

    def positional(q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, state: State, eps: float) -> Any:
        return cell(q, k, v, i=i, f=f, state=state, eps=eps)

    run = compile_each(positional, name)
    return lambda q, k, v, *, i, f, state, eps: run(q, k, v, i, f, state, eps)


def _state(q: Tensor, v: Tensor, given: Sequence[Tensor | None]) -> State:
    """The given states in float32, or fresh ones for q (B, NH, ..., K) and v (B, NH, ..., V)."""
    rows, K, V = q.shape[:2], q.shape[-1], v.shape[-1]
    shapes = (*rows, K, V), (*rows, K), (*rows, 1)
    c, n, m = (
        torch.zeros(shape, device=q.device) if x is None else x.to(torch.float32).contiguous()
        for x, shape in zip(given, shapes, strict=True)
    )
    return c, n, m


def _result(h: Tensor, state: State, return_last_states: bool) -> Any:
    return (h, state) if return_last_states else h


def _require_no_gradient(*tensors: Tensor) -> None:
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        raise KernelError("these kernels are for inference; call the model under torch.no_grad() or inference_mode()")
