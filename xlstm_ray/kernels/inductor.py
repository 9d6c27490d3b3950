"""What Inductor has made: code objects of our own, its modules, and the launches in its code."""

import re
import types
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from threading import Lock

_LAUNCH = re.compile(r"^\s*(generated_kernel_\d+)\(", re.MULTILINE)
_LIBRARY_CALL = re.compile(r"^\s*(?:\w+ = )?(?:extern_kernels|torch\.ops\.aten)\.(\w+)", re.MULTILINE)


class LaunchCounter:
    """Counts what compiled code launches on Metal: kernels generated for it and calls of torch's own.

    total becomes None, which is "not known", once code has run that no count was had of: Inductor loads a module of
    Python for every graph, and where it finds that module loaded already, or none, there is nothing to read.
    """

    def __init__(self) -> None:
        self.total: int | None = 0
        self._lock = Lock()

    def add(self, launches: int | None) -> None:
        """One call of code that launches so many."""
        with self._lock:
            self.total = None if self.total is None or launches is None else self.total + launches


def loaded_modules() -> "list[types.ModuleType]":
    """What Inductor has loaded so far, a module for every graph."""
    from torch._inductor.codecache import PyCodeCache

    return PyCodeCache.modules


def own_code(fn: Callable, name: str) -> Callable:
    """`fn` under another name, with a code object of its own: torch.compile keeps its variants on the code object."""
    assert isinstance(fn, types.FunctionType)
    own = types.FunctionType(fn.__code__.replace(), fn.__globals__, name, fn.__defaults__, fn.__closure__)
    own.__kwdefaults__ = fn.__kwdefaults__
    return own


def launches_of(modules: "list[types.ModuleType]") -> int | None:
    """What a call of the one graph launches, read from its module; None where it is not one."""
    files = {module.__file__ for module in modules if hasattr(module, "call")}
    if len(files) != 1 or None in files:
        return None
    kernels, library_calls = count_launches(Path(str(files.pop())).read_text())
    return kernels + sum(library_calls.values())


def count_launches(code: str) -> tuple[int, dict[str, int]]:
    """What one call of a graph's generated code launches on Metal: kernels made for it, and torch's own by name."""
    body = code[code.index("def call(") :]
    return len(_LAUNCH.findall(body)), dict(Counter(_LIBRARY_CALL.findall(body)))
