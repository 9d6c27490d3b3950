"""What we use inside torch's compiler: switches, code objects, compiled code without guards, modules, launches."""

import os
import re
import types
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from threading import Lock

from xlstm_ray.errors import UsageError

SWITCHES = "TORCHDYNAMO_DISABLE", "TORCH_COMPILE_DISABLE"  # torch's own
_LAUNCH = re.compile(r"^\s*(generated_kernel_\d+)\(", re.MULTILINE)
_LIBRARY_CALL = re.compile(r"^\s*(?:\w+ = )?(?:extern_kernels|torch\.ops\.aten)\.(\w+)", re.MULTILINE)


def switched_off() -> str | None:
    """The variable, if one is set, that tells torch to compile nothing: it would import its compiler all the same."""
    return next((name for name in SWITCHES if os.environ.get(name) == "1"), None)


def require_same_switch(*, eager: bool, node: str) -> None:
    """Raise UsageError unless torch is told the same on this node as the driver was, whose `eager` this is."""
    if eager != (switched_off() is not None):
        told, other = ("the driver", f"node {node}") if eager else (f"node {node}", "the driver")
        raise UsageError(
            f"torch is told to compile nothing ({SWITCHES[0]}=1) for {told}, but not for {other}, which gives other "
            "bits; set it for both, or for neither"
        )


class LaunchCounter:
    """Counts what compiled code launches on Metal: kernels generated for it and calls of torch's own.

    total is None (not known) after any graph that cannot be counted: Inductor loads a Python module for every graph,
    and there is nothing to read if that module was loaded before or does not exist.
    """

    def __init__(self) -> None:
        self.total: int | None = 0
        self._lock = Lock()

    def add(self, launches: int | None) -> None:
        """Count one call of code that launches this many kernels."""
        with self._lock:
            self.total = None if self.total is None or launches is None else self.total + launches


def loaded_modules() -> "list[types.ModuleType]":
    """The modules that Inductor has loaded so far: one for every graph."""
    from torch._inductor.codecache import PyCodeCache

    return PyCodeCache.modules


def compiler_version() -> str:
    """The C++ compiler that Inductor calls, by its name, and its version."""
    from torch._inductor.cpp_builder import get_compiler_version_info, get_cpp_compiler

    name = get_cpp_compiler()
    found = re.search(r"version \d[\w.+-]*", get_compiler_version_info(name))
    return f"{name} {found[0] if found else ''}"


def graphs() -> tuple[int, int]:
    """How many graphs this process has compiled, and how many it has found in the compile cache."""
    from torch._dynamo.utils import counters

    return counters["inductor"]["fxgraph_cache_miss"], counters["inductor"]["fxgraph_cache_hit"]


def own_code(fn: Callable, name: str) -> types.FunctionType:
    """`fn` under another name, with a code object of its own: torch.compile keeps its variants on the code object."""
    assert isinstance(fn, types.FunctionType)
    own = types.FunctionType(fn.__code__.replace(), fn.__globals__, name, fn.__defaults__, fn.__closure__)
    own.__kwdefaults__ = fn.__kwdefaults__
    return own


def unguarded(fn: types.FunctionType) -> types.FunctionType | None:
    """The code that torch compiled for the only variant of `fn`, to be called without its guards; None if there is not
    exactly one. The code itself compares shapes and strides, not dtypes."""
    from torch._dynamo.eval_frame import _debug_get_cache_entry_list

    entries = _debug_get_cache_entry_list(fn.__code__)
    if len(entries) != 1:
        return None
    bare = types.FunctionType(entries[0].code, fn.__globals__, fn.__name__, fn.__defaults__, fn.__closure__)
    bare.__kwdefaults__ = fn.__kwdefaults__
    return bare


def launches_of(modules: "list[types.ModuleType]") -> int | None:
    """The launches of one call, read from the graph's module; None if there is not exactly one module."""
    files = {module.__file__ for module in modules if hasattr(module, "call")}
    if len(files) != 1 or None in files:
        return None
    kernels, library_calls = count_launches(Path(str(files.pop())).read_text())
    return kernels + sum(library_calls.values())


def count_launches(code: str) -> tuple[int, dict[str, int]]:
    """The launches of one call of a graph's generated Metal code: generated kernels, and torch's own by name."""
    body = code[code.index("def call(") :]
    return len(_LAUNCH.findall(body)), dict(Counter(_LIBRARY_CALL.findall(body)))
