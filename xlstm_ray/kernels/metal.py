"""What Inductor generates for a kernel on Metal. The code is generated and read, never launched.

Metal allows a kernel 31 buffers, and unrolled steps need more of them for every token. Inductor does not know that.
This module uses three internals of torch (FakeTensorMode, GraphLowering.save_output_code, V.graph): one more reason for
the narrow range of torch versions in pyproject.toml.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from xlstm_ray.errors import KernelError
from xlstm_ray.kernels.inductor import count_launches
from xlstm_ray.kernels.native import State, mlstm_sequence

MAX_BUFFERS = 31  # entries of a Metal kernel's buffer argument table

_KERNEL = re.compile(r"kernel void (\w+)\(([^()]*)\)")


@dataclass
class Generated:
    """One compiled function on Metal. Figures are of one call; `calls` counts the calls in a window."""

    name: str
    buffers: dict[str, int]  # Metal kernel -> entries of its argument table
    launches: int  # of generated Metal kernels
    library_calls: dict[str, int]  # torch's own kernels: matrix products, cumsum
    bytes: int  # read and written
    calls: int = 1

    @property
    def most_buffers(self) -> int:
        return max(self.buffers.values(), default=0)

    @property
    def all_launches(self) -> int:
        """Launches of both kinds."""
        return self.launches + sum(self.library_calls.values())


class _CodeIsThere(BaseException):
    """Ends a compilation once its code is generated. Not an Exception: torch wraps those."""


def generate(fn: Callable, name: str, *args: Any, fusion_limit: int | None = None, **kwargs: Any) -> Generated:
    """What torch.compile generates for fn(*args, **kwargs), whose tensors are fake tensors on mps.

    fusion_limit: the number of buffers at which Inductor stops fusing, or None.
    """
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V

    found: list[tuple[str, int]] = []

    def take_code(code: str) -> None:
        found.append((code, V.graph.count_bytes()[0]))
        raise _CodeIsThere

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        # The caches are off: a hit would generate no code.
        with torch._inductor.config.patch(force_disable_caches=True, max_fusion_unique_io_buffers=fusion_limit):
            return compile_fx(graph, inputs)

    from xlstm_ray.kernels.inductor import own_code

    plain = GraphLowering.__dict__["save_output_code"]
    GraphLowering.save_output_code = staticmethod(take_code)
    try:
        torch.compile(own_code(fn, name), backend=backend, fullgraph=True, dynamic=False)(*args, **kwargs)
    except _CodeIsThere:
        pass
    finally:
        GraphLowering.save_output_code = plain
    ((code, size),) = found
    buffers = {kernel: text.count("*") + text.count("&") for kernel, text in _KERNEL.findall(code)}
    return Generated(name, buffers, *count_launches(code), size)


class Probe:
    """Takes the place of compile_strict: records the code that is generated for fake tensors and does not run it."""

    def __init__(self) -> None:
        self.functions: list[Generated] = []

    def __call__(self, fn: Callable, name: str) -> Callable:
        seen: list[Generated] = []

        def call(*args: Any, **kwargs: Any) -> Any:
            if seen:
                seen[0].calls += 1
            else:
                seen.append(generate(fn, name, *args, **kwargs))
                self.functions.append(seen[0])
            return fn(*args, **kwargs)

        return call


@dataclass(frozen=True)
class Fit:
    """The T_inner to use, Inductor's fusion limit for it, and a note for the user if it is not the requested one."""

    t_inner: int
    fusion_limit: int | None = None
    note: str | None = None


@cache
def fit_t_inner(
    asked: int, *, batch: int, heads: int, dhqk: int, dhhv: int, dtype: torch.dtype, device: torch.device
) -> Fit:
    """The largest T_inner up to `asked` whose kernels keep to Metal's limit of buffers, for these shapes.

    The number of buffers grows by a constant for each token, so two short lengths tell where the limit is. A long
    length is never tried: it takes minutes to generate. One token more, with Inductor's fusion stopped at the limit, is
    used instead if it needs fewer launches a token. Raises KernelError if not even one token fits.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    @cache  # the length that `first` has is often the longest one
    def steps(T: int, fusion_limit: int | None = None) -> Generated:
        with torch.no_grad(), FakeTensorMode():
            empty = partial(torch.empty, device=device)
            qkv = [empty(batch, heads, T, size, dtype=dtype) for size in (dhqk, dhqk, dhhv)]
            i, f = empty(batch, heads, T), empty(batch, heads, T)
            state: State = empty(batch, heads, dhqk, dhhv), empty(batch, heads, dhqk), empty(batch, heads, 1)
            name = f"mlstm_steps_{T}"
            return generate(mlstm_sequence, name, *qkv, i=i, f=f, state=state, fusion_limit=fusion_limit)

    few, more = 4, 8
    first = steps(min(asked, more))
    if asked <= more and first.most_buffers <= MAX_BUFFERS:
        return Fit(asked)
    per_token = max(1, first.most_buffers - steps(few).most_buffers) / (more - few) if asked > more else 1
    longest = min(asked, more + int((MAX_BUFFERS - first.most_buffers) / per_token))
    while longest >= 1 and (fitting := steps(longest)).most_buffers > MAX_BUFFERS:
        longest -= 1
    if longest < 1:
        raise KernelError(
            f"kernel mlstm_steps_1 needs {first.most_buffers} buffers on Metal, which allows {MAX_BUFFERS}"
        )
    if longest == asked:
        return Fit(asked)
    split = steps(longest + 1, MAX_BUFFERS)
    best, rate = Fit(longest), fitting.all_launches / longest
    if split.most_buffers <= MAX_BUFFERS and split.all_launches / (longest + 1) < rate:
        best, rate = Fit(longest + 1, MAX_BUFFERS), split.all_launches / (longest + 1)
    return Fit(
        best.t_inner,
        best.fusion_limit,
        f"T_inner {asked} needs kernels with more than {MAX_BUFFERS} buffers, which Metal does not allow; "
        f"{best.t_inner} is used ({rate:.2f} launches a token), the chunk size stays",
    )
