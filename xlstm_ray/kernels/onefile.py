"""On the CPU: all C++ kernels of a graph in one file, so that the compiler reads torch's headers once for them all.

Inductor writes a file for each kernel: a block of a tile has eleven, and each time g++ reads headers for 2 s where the
kernel itself takes 0.1 to 0.5 s. Its precompiled header takes 6 s and 150 MB. The code of a kernel stays as it is.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from threading import local
from typing import Any, NamedTuple

import torch._inductor.async_compile as theirs
from torch._inductor.codecache import CppPythonBindingsCodeCache
from torch._inductor.exc import CppCompileError

HEADERS = "torch/csrc/inductor/cpp_prefix.h", "Python.h", "sstream", "cstdlib", "cerrno"
# Inductor's bindings are a module for each kernel. This one has all their functions, and starts the others.
MODULE = """
static PyMethodDef all_functions[] = {{ {functions}, {{NULL, NULL, 0, NULL}} }};
static struct PyModuleDef all_kernels = {{PyModuleDef_HEAD_INIT, "{name}", NULL, -1, all_functions}};
PyMODINIT_FUNC PyInit_{name}(void) {{
    PyObject* module;
    {starts}
    return PyModule_Create(&all_kernels);
}}
"""
START = "if ((module = of_{n}::PyInit_kernel_{n}()) == NULL) return NULL; Py_DECREF(module);"
FUNCTION = '{{"kernel_{n}", of_{n}::kernel_{n}_py, METH_VARARGS, ""}}'

_here = local()  # of this thread. explain: makes the error of a graph that does not compile; ahead: see `ahead`


class Pending(NamedTuple):
    """A file that the compiler works on."""

    load: Callable[[], object]  # waits for it
    explain: Callable[[Exception], Exception]

    def wait(self) -> None:
        """Raises KernelError if it does not compile."""
        try:
            self.load()
        except (CppCompileError, OSError) as err:
            raise self.explain(err) from err


class _Kernel(NamedTuple):
    """A kernel that waits for the others of its graph."""

    argtypes: list[str]
    source: str


class _File(CppPythonBindingsCodeCache):
    """The libraries of such files."""

    cache = {}  # Inductor's own way: each class has one
    cache_clear = staticmethod(cache.clear)
    entry_function = "kernels"

    @classmethod
    def _get_uncompiled_header(cls, device: str) -> None:
        """None: no precompiled header, which pays only for some five files."""

    @classmethod
    def text(cls, kernels: list[_Kernel]) -> str:
        """The file of these kernels."""
        parts = [f"#include <{name}>\n" for name in HEADERS]  # all that the parts below include, outside of a namespace
        for n, kernel in enumerate(kernels):
            name, args = f"kernel_{n}", enumerate(kernel.argtypes)
            words = ", ".join(f"parse_arg<{kind.replace('const ', '')}>(args, {at})" for at, kind in args)
            binding = cls.suffix_template.format(
                arg_len=len(kernel.argtypes),
                call_entry_func=f"{name}({words}); Py_RETURN_NONE;",
                entry_func=name,
                extra_parse_arg="",
            )
            parts.append(f"#define kernel {name}\n{kernel.source}\n#undef kernel\nnamespace of_{n} {{ {binding} }}\n")
        functions = ", ".join(FUNCTION.format(n=n) for n in range(len(kernels)))
        starts = "\n    ".join(START.format(n=n) for n in range(len(kernels)))
        return "".join(parts) + MODULE.format(name=cls.entry_function, functions=functions, starts=starts)


class _AsyncCompile(theirs.AsyncCompile):
    """What the module of a graph calls to compile its kernels."""

    def cpp_pybinding(self, argtypes: list[str], source_code: str) -> Any:
        if getattr(_here, "explain", None) is not None:
            return _Kernel(argtypes, source_code)
        return super().cpp_pybinding(argtypes, source_code)

    def wait(self, scope: dict[str, Any]) -> None:
        super().wait(scope)
        kernels = {name: value for name, value in scope.items() if isinstance(value, _Kernel)}
        if not kernels:
            return
        futures: list[Future] = []

        def submit(task: Callable[[], None]) -> Future | None:
            future = self.submit(task)  # None: it is done
            futures.extend([future] if future else [])
            return future

        # Where it has no thread for it, `submit` would compile at once, and load_async has the file's lock meanwhile.
        beside = theirs.get_compile_threads() > 1
        library = _File.load_async(_File.text(list(kernels.values())), submit_fn=submit if beside else None)

        def load() -> None:
            scope.update({name: getattr(library(), f"kernel_{n}") for n, name in enumerate(kernels)})

        pending: list[Pending] | None = getattr(_here, "ahead", None)
        if not futures or pending is None:
            load()
            return
        pending.append(Pending(load, _here.explain))
        scope.update({name: _later(name, scope, load, futures[0]) for name in kernels})


def _later(name: str, scope: dict[str, Any], load: Callable[[], None], future: Future) -> Callable[..., None]:
    """What stands in `scope` for a kernel until its file is loaded."""

    def kernel(*args: Any) -> None:
        if future.done() or getattr(_here, "ahead", None) is None:
            load()
            scope[name](*args)

    return kernel


@contextmanager
def one_file(explain: Callable[[Exception], Exception]) -> Iterator[None]:
    """Within it, this thread compiles, or loads, the C++ kernels of a graph as one file. explain: see `Pending`."""
    theirs.AsyncCompile = _AsyncCompile  # type: ignore[misc] # a graph's module takes it by this name
    before, _here.explain = getattr(_here, "explain", None), explain
    try:
        yield
    finally:
        _here.explain = before


@contextmanager
def ahead(pending: list[Pending]) -> Iterator[None]:
    """Within it, this thread does not wait for the C++ compiler: its files are added to `pending`.

    Kernels of such a file do nothing until it is there. So what is computed within means nothing.
    """
    _here.ahead = pending
    try:
        yield
    finally:
        _here.ahead = None
