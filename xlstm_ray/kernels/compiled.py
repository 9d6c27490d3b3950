"""Strict torch.compile: one graph for one shape, or a KernelError that says why not.

"metal" is the field's name for these kernels on Apple's GPU; the same functions compile for whatever device the
tensors are on (Metal shaders on mps, Triton on cuda, C++ on cpu). Nothing falls back to eager or to another device.
"""

import os
import shutil
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from tempfile import TemporaryFile
from threading import Lock
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from xlstm_ray.directories import compile_cache_dir
from xlstm_ray.errors import KernelError
from xlstm_ray.kernels.inductor import LaunchCounter, launches_of, loaded_modules, own_code, switched_off, unguarded
from xlstm_ray.kernels.native import SlstmState, State, mlstm_sequence, mlstm_step, slstm_sequence

TRIES, NOTHING_RAN = 10, "fullgraph=True found no compiled frames"
Compiler = Callable[[Callable, str], Callable]  # (function, name) -> the function compiled: compile_strict's signature


@cache
def require_compile_cache() -> None:
    """Raise KernelError if torch cannot write its compile cache; later this would fail in many ways."""
    directory = compile_cache_dir()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=directory) as file:
            file.write(bytes(1 << 16))
            file.flush()
    except OSError as err:
        raise KernelError(
            f"the compile cache {directory} cannot be written ({err.strerror}); set TORCHINDUCTOR_CACHE_DIR to a "
            "directory that can, or use `chunkwise_backend=native`, the slow eager reference"
        ) from None


def require_compiler(backend: str, device: torch.device) -> None:
    """Raise KernelError, before anything is loaded, if Inductor lacks its cache or, on the CPU, a C++ compiler."""
    require_compile_cache()
    if device.type != "cpu":
        return
    # Inductor's own check would import it (a second, 70 MiB), and on Ray this process does not compile.
    name = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if shutil.which(name) is None:
        raise KernelError(
            f"`chunkwise_backend={backend}` compiles its kernels and needs a C++ compiler (g++ or clang++, or its "
            "path in CXX), but none was found; install one, or use `chunkwise_backend=native`, the slow eager reference"
        )


def compile_strict(
    fn: Callable,
    name: str,
    *,
    fusion_limit: int | None = None,
    counter: LaunchCounter | None = None,
    guards: bool = True,
) -> Callable:
    """Compile `fn` on its first call, only for the shapes, strides, dtypes and device of that call.

    The code object is copied: otherwise all shapes in the process would share one list of variants, with its guards and
    its limit. fusion_limit: the number of buffers at which Inductor stops fusing. counter: counts the launches of every
    call. guards: whether torch compares every call with the first one. Without, the caller has chosen the function by
    shapes, dtypes and device, and the code itself compares shapes and strides alone: of a small function's call that
    saves a third of the time. Raises KernelError with the kernel, the shapes and the device if the compilation fails,
    would break the graph, or would happen a second time.
    """
    if switched_off():
        return fn
    require_compile_cache()
    import torch._inductor.config as inductor_config  # here: the compiler comes with it, and an eager run has none

    options: dict[str, Any] = {} if fusion_limit is None else {"max_fusion_unique_io_buffers": fusion_limit}
    if inductor_config.cpp.vec_isa_ok is None:
        # Without this, Inductor compiles three files, one after the other, to see whether g++ knows AVX512 and AVX2.
        # All compilers that know torch's C++20 do; the processor is asked in any case.
        options["cpp.vec_isa_ok"] = True
    if torch.cuda.is_available():
        # Without this, Inductor times several block sizes of a kernel and keeps the fastest. Block sizes change the
        # order of sums, so two processes that begin with an empty cache would give different bits.
        options["deterministic"] = True
    own = own_code(fn, name)
    compiled = torch.compile(  # type: ignore[call-overload] # recompile_limit is missing from the overloads
        own, fullgraph=True, dynamic=False, options=options or None, recompile_limit=1
    )

    # The lock: the threads of two bands would compile it twice, and the second compilation is over the limit.
    first: Lock | None = Lock()
    launches: int | None = None
    bare: Callable | None = None

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal first, launches, bare
        if bare is not None:
            if counter:
                counter.add(launches)
            return bare(*args, **kwargs)
        from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
        from torch._inductor.exc import CppCompileError

        try:
            with first or nullcontext(), _as_one_file(name, args) if first else nullcontext():
                loaded = len(loaded_modules()) if first and counter else 0
                result = _surely(compiled, args, kwargs)
                if first and counter and launches is None:  # only the first thread that had the lock
                    launches = launches_of(loaded_modules()[loaded:])
            first = None
            if counter:
                counter.add(launches)
            if not guards:
                bare = unguarded(own)
            return result
        except (TorchDynamoException, FailOnRecompileLimitHit, CppCompileError, OSError) as err:
            raise _failed(name, _describe(args), err) from err  # OSError: from the cache's files

    return call


def _as_one_file(name: str, args: tuple) -> AbstractContextManager[None]:
    from xlstm_ray.kernels.onefile import one_file  # here: it imports the compiler, which an eager run does without

    return one_file(partial(_failed, name, _describe(args)))


def _failed(name: str, given: str, err: Exception) -> KernelError:
    """What is said of a kernel that does not compile for what was given."""
    cause = getattr(err, "inner_exception", err)
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    line = next((line for line in lines if "error:" in line), lines[0] if lines else "no message")
    reason = f"{type(cause).__name__}: {line}"  # a compiler quotes the source before its error
    return KernelError(
        f"kernel {name} does not compile for {given}: {reason}. Nothing falls back; "
        "`chunkwise_backend=native` runs the eager reference instead. If it compiled before, the cache "
        f"may be damaged or full: remove {compile_cache_dir()}"
    )


def _surely(compiled: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Call `compiled`, and call it again if torch saw no compiled code run.

    torch 2.13 has one count of compiled code for all threads, and threads may reset each other's (pytorch#185138 makes
    it one for each thread). For a function that torch did not compile, the count is 0 at every try.
    """
    for _ in range(TRIES - 1):
        try:
            return compiled(*args, **kwargs)  # compiled functions change nothing, so they may run twice
        except RuntimeError as err:
            if NOTHING_RAN not in str(err):
                raise
    return compiled(*args, **kwargs)


def compile_each(fn: Callable, name: str, compiler: Compiler = compile_strict) -> Callable:
    """Compile `fn` once for every combination of shapes, dtypes and device that it is called with."""
    variants: dict[tuple, Callable] = {}

    def call(*args: Any, **kwargs: Any) -> Any:
        tensors = tree_leaves((args, kwargs))
        key = tuple((t.shape, t.dtype, t.device) if isinstance(t, Tensor) else t for t in tensors)
        if key not in variants:
            variants.setdefault(key, compiler(fn, name))  # the same one for all threads
        return variants[key](*args, **kwargs)

    return call


def _describe(args: tuple) -> str:
    tensors = [a for a in args if isinstance(a, Tensor)]
    shapes = ", ".join(f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}" for t in tensors)
    return f"{shapes} on {tensors[0].device}"


class UnrolledSequence:
    """native_sequence__metal: `t_inner` steps unrolled in one compiled kernel, called in strict time order."""

    def __init__(self, t_inner: int, compiler: Compiler = compile_strict):
        self.t_inner = t_inner
        self._kernel = compile_each(mlstm_sequence, f"mlstm_steps_{t_inner}", compiler)

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, i: Tensor, f: Tensor, state: State, eps: float = 1e-6
    ) -> tuple[Tensor, State]:
        """As mlstm_sequence: q, k (B, NH, T, K), v (B, NH, T, V), i, f (B, NH, T) -> h (B, NH, T, V), state."""
        outputs = []
        for *qkv, i_run, f_run in zip(*(_runs(x, self.t_inner) for x in (q, k, v, i, f)), strict=True):
            h, state = self._kernel(*qkv, i=i_run, f=f_run, state=state, eps=eps)
            outputs.append(h)
        return torch.cat(outputs, 2), state


class UnrolledSlstm:
    """native_compiled: `t_inner` steps of the sLSTM unrolled in one compiled kernel, called in strict time order."""

    def __init__(self, t_inner: int, compiler: Compiler = compile_strict):
        self.t_inner = t_inner
        self._kernel = compile_each(slstm_sequence, f"slstm_steps_{t_inner}", compiler)

    def __call__(self, x: Tensor, *, recurrent: Tensor, token: Tensor, state: SlstmState) -> tuple[Tensor, SlstmState]:
        """As slstm_sequence: x (B, NH, T, 4, DH), token (B, 1, T) -> h (B, NH, T, DH), state."""
        outputs = []
        for x_run, token_run in zip(_runs(x, self.t_inner), _runs(token, self.t_inner), strict=True):
            h, state = self._kernel(x_run, recurrent=recurrent, token=token_run, state=state)
            outputs.append(h)
        return torch.cat(outputs, 2), state


def _runs(x: Tensor, t_inner: int) -> list[Tensor]:
    """x (B, NH, T, ...) -> runs (B, NH, t_inner or fewer, ...), each contiguous.

    A slice has the strides of the whole, and strides are compiled into the kernel. All runs are copied at once.
    """
    T = x.shape[2]
    whole = T - T % t_inner
    runs = list(x[:, :, :whole].unflatten(2, (whole // t_inner, t_inner)).movedim(2, 0).contiguous())
    return [*runs, x[:, :, whole:].contiguous()] if whole < T else runs


def compiled_step() -> Callable:
    """metal: mlstm_step compiled."""
    return compile_each(mlstm_step, "mlstm_step")
