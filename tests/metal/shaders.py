"""Metal source to CPU code: what stands behind torch.mps.compile_shader on the simulated device.

Of a Metal source only the kernels' signatures and the declarations of threadgroup memory are rewritten; all the rest is
C++ that native/msl.h makes g++ understand. Kernels are built when the first of a library is launched, so that looking
at generated code costs no compilation.
"""

from __future__ import annotations

import ctypes
import math
import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from . import build

MAX_BUFFERS = 31  # entries of a kernel's buffer argument table
MAX_THREADS_PER_GROUP = 1024
MAX_THREADS_PER_AXIS = 2**32 - 1
SHADER_FLAGS = [
    "-w",
    "-fsingle-precision-constant",  # 1.5 is a float in Metal
    "-ffp-contract=off",
    "-fsigned-char",
    "-fno-strict-aliasing",
]
ENGINE_FLAGS = ["-U_FORTIFY_SOURCE"]  # its longjmp goes between stacks, which the fortified one takes for a mistake
ORDERS = {"ascending": 0, "descending": 1}

DTYPES = {
    "bool": torch.bool,
    "char": torch.int8,
    "short": torch.int16,
    "int": torch.int32,
    "long": torch.int64,
    "uchar": torch.uint8,
    "half": torch.float16,
    "bfloat": torch.bfloat16,
    "float": torch.float32,
}
SCALARS = {"int": ctypes.c_int, "uint": ctypes.c_uint, "long": ctypes.c_long, "float": ctypes.c_float}
ERRORS_TYPE = "c10::metal::ErrorMessages"

_KERNEL = re.compile(r"(?:\[\[max_total_threads_per_threadgroup\((\d+)\)\]\]\s*)?\bkernel void (\w+)\(([^()]*)\)\s*\{")
_GROUP_ARRAY = re.compile(r"^(\s*)threadgroup\s+(\w+)\s+(\w+)\s*((?:\[[^\]]*\])?)\s*;", re.MULTILINE)
_METAL_INCLUDE = re.compile(r"^\s*#include\s*<metal_\w+>.*$", re.MULTILINE)
_POINTER = re.compile(r"(device|constant)\s+([\w:]+)\s*\*\s*(\w+)")
_REFERENCE = re.compile(r"constant\s+(\w+)\s*&\s*(\w+)")
_POSITION = re.compile(r"(uint[23]?)\s+(\w+)\s*\[\[(thread_position_in_grid|thread_position_in_threadgroup)\]\]")


class MetalError(RuntimeError):
    """A kernel broke a rule of Metal's while it ran, or was launched wrongly; the message names it."""


class _ErrorMessage(ctypes.Structure):
    _fields_ = [
        ("file", ctypes.c_char * 128),
        ("func", ctypes.c_char * 128),
        ("message", ctypes.c_char * 250),
        ("line", ctypes.c_uint),
    ]


class _ErrorMessages(ctypes.Structure):
    """c10::metal::ErrorMessages: where a kernel reports an index out of range."""

    _fields_ = [("count", ctypes.c_uint), ("msg", _ErrorMessage * 30)]


@dataclass(frozen=True)
class Parameter:
    """One parameter of a kernel that takes an entry of the buffer argument table."""

    name: str
    type: str
    is_pointer: bool


@dataclass
class Signature:
    """A kernel's parameters and limits, and the C++ that calls it."""

    name: str
    max_threads: int
    parameters: list[Parameter] = field(default_factory=list)
    declarations: list[str] = field(default_factory=list)
    arguments: list[str] = field(default_factory=list)

    def body(self) -> str:
        """The function of type sim::Body that the engine calls for every thread."""
        return (
            f'extern "C" void body_{self.name}(void* const* arguments, const long* counts, '
            f"const sim::Position& position) {{\n  {self.name}({', '.join(self.arguments)});\n}}\n"
        )


def _signature(name: str, max_threads: str | None, text: str) -> Signature:
    signature = Signature(name, int(max_threads) if max_threads else MAX_THREADS_PER_GROUP)
    for piece in filter(None, (piece.strip() for piece in text.split(","))):
        slot = len(signature.parameters)
        if match := _POINTER.fullmatch(piece):
            space, element, variable = match.groups()
            signature.parameters.append(Parameter(variable, element, is_pointer=True))
            const = "const " if space == "constant" else ""
            if element == ERRORS_TYPE:
                signature.declarations.append(f"{element}* {variable}")
                signature.arguments.append(f"({element}*)arguments[{slot}]")
            else:
                signature.declarations.append(f"msl::Buffer<{const}{element}> {variable}")
                signature.arguments.append(f'{{({const}{element}*)arguments[{slot}], counts[{slot}], "{variable}"}}')
        elif match := _REFERENCE.fullmatch(piece):
            scalar, variable = match.groups()
            signature.parameters.append(Parameter(variable, scalar, is_pointer=False))
            signature.declarations.append(f"const {scalar}& {variable}")
            signature.arguments.append(f"*(const {scalar}*)arguments[{slot}]")
        elif match := _POSITION.fullmatch(piece):
            vector, variable, attribute = match.groups()
            signature.declarations.append(f"{vector} {variable}")
            signature.arguments.append(f"msl::position(position.{attribute}, ({vector}*)nullptr)")
        else:
            raise SyntaxError(f"kernel {name}: parameter {piece!r} is of a kind the simulator does not know")
    if len(signature.parameters) > MAX_BUFFERS:
        raise SyntaxError(
            f"program_source: error: kernel {name} takes {len(signature.parameters)} buffers, Metal allows "
            f"{MAX_BUFFERS} ('buffer' attribute parameter is out of bounds: must be between 0 and 30)"
        )
    return signature


def translate(source: str) -> tuple[str, list[Signature]]:
    """C++ for a Metal source whose torch headers are already part of it, and the signatures of its kernels.

    Raises SyntaxError, as Metal's compiler does, for a kernel over the limit of buffers.
    """
    signatures: list[Signature] = []

    def rewrite(match: re.Match[str]) -> str:
        signature = _signature(match[2], match[1], match[3])
        signatures.append(signature)
        return f"static void {signature.name}({', '.join(signature.declarations)}) {{"

    body = _KERNEL.sub(rewrite, _METAL_INCLUDE.sub("", source))
    body = _GROUP_ARRAY.sub(r'\1auto& \3 = msl::group_array<\2\4>("\3");', body)
    return '#include "msl.h"\n' + body + "\n" + "\n".join(s.body() for s in signatures), signatures


class Launches:
    """What was launched since the last clear(), in order; written by several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kernels: list[Kernel] = []

    def add(self, kernel: Kernel) -> None:
        with self._lock:
            self._kernels.append(kernel)

    def clear(self) -> None:
        with self._lock:
            self._kernels.clear()

    def kernels(self) -> list[Kernel]:
        with self._lock:
            return list(self._kernels)


class Engine:
    """native/engine.cpp: runs a kernel's body over a grid. `order` is a key of ORDERS."""

    def __init__(self) -> None:
        source = (build.NATIVE / "engine.cpp").read_text()
        self.library = build.shared_library("engine", source, ENGINE_FLAGS)
        self._launch = ctypes.CDLL(str(self.library)).sim_launch
        self.order = "ascending"
        self.launches = Launches()

    def launch(
        self, kernel: Kernel, body: Callable[..., None], pointers: Any, counts: Any, grid: Any, group: Any
    ) -> None:
        """Runs one kernel to its end; raises MetalError with its name."""
        self.launches.add(kernel)
        error = ctypes.create_string_buffer(1024)
        if self._launch(body, pointers, counts, grid, group, ORDERS[self.order], error, len(error)):
            raise MetalError(f"kernel {kernel.name}: {error.value.decode()}")


class Kernel:
    """One kernel of a shader library; called as torch calls those of torch.mps.compile_shader."""

    def __init__(self, library: Library, signature: Signature) -> None:
        self.name = signature.name
        self.parameters = signature.parameters
        self.max_threads = signature.max_threads
        self._library = library

    def __repr__(self) -> str:
        return f"<kernel {self.name}, {len(self.parameters)} buffers>"

    def __call__(
        self,
        *args: torch.Tensor | int | float,
        threads: Sequence[int] | int | None = None,
        group_size: Sequence[int] | int | None = None,
        error_buf_idx: int | None = None,
    ) -> None:
        """Runs the kernel with its buffers and scalars in order; `threads` default to the first tensor's elements.

        Raises MetalError for a launch beyond Metal's limits and for what the kernel does wrong.
        """
        arguments: list[Any] = list(args)
        errors = _ErrorMessages()
        if error_buf_idx is not None:
            arguments.insert(error_buf_idx, errors)
        if len(arguments) != len(self.parameters):
            raise MetalError(f"kernel {self.name} takes {len(self.parameters)} arguments, got {len(arguments)}")
        if threads is None:
            threads = next(a.numel() for a in args if isinstance(a, torch.Tensor))
        grid = self._extent("threads", threads, MAX_THREADS_PER_AXIS)
        group = [0, 0, 0]
        if group_size is not None:
            group = self._extent("group_size", group_size, self.max_threads)
            if (total := math.prod(group)) > self.max_threads:
                raise MetalError(f"kernel {self.name}: {total} threads a group, it allows {self.max_threads}")
        bound = [self._bind(p, a) for p, a in zip(self.parameters, arguments, strict=True)]
        pointers = (ctypes.c_void_p * len(bound))(*(pointer for pointer, _, _ in bound))
        counts = (ctypes.c_long * len(bound))(*(count for _, count, _ in bound))
        vector = ctypes.c_uint32 * 3
        body = self._library.body(self.name)
        self._library.engine.launch(self, body, pointers, counts, vector(*grid), vector(*group))
        if errors.count:
            raise MetalError(f"kernel {self.name} reported: {errors.msg[0].message.decode()}")

    def _extent(self, what: str, value: Sequence[int] | int, limit: int) -> list[int]:
        sizes = [value] if isinstance(value, int) else list(value)
        if not 1 <= len(sizes) <= 3 or not all(1 <= size <= limit for size in sizes):
            raise MetalError(f"kernel {self.name}: {what} {sizes}, allowed are 1 to 3 numbers from 1 to {limit}")
        return sizes + [1] * (3 - len(sizes))

    def _bind(self, parameter: Parameter, value: Any) -> tuple[int, int, Any]:
        """(address, element count, what keeps the address valid) of one argument."""
        if isinstance(value, _ErrorMessages):
            return ctypes.addressof(value), 1, value
        if not parameter.is_pointer:
            scalar: Any = SCALARS[parameter.type](value)
            return ctypes.addressof(scalar), 1, scalar
        if not isinstance(value, torch.Tensor) or value.device.type != "mps" and value.dim() > 0:
            raise MetalError(f"kernel {self.name}: {parameter.name} has to be a tensor on mps, not {value!r}")
        if value.device.type != "mps":  # torch passes CPU scalars by value, and a float64 one as a float
            value = value.to(DTYPES[parameter.type])
        if value.dtype != DTYPES[parameter.type]:
            raise MetalError(f"kernel {self.name}: {parameter.name} is {parameter.type}*, got a {value.dtype} tensor")
        count = value.untyped_storage().nbytes() // value.element_size() - value.storage_offset()
        return value.data_ptr(), count, value


class Library:
    """A compiled shader source: its kernels are attributes."""

    def __init__(self, engine: Engine, source: str) -> None:
        self.engine = engine
        self.cpp, signatures = translate(source)
        self.kernels = {signature.name: Kernel(self, signature) for signature in signatures}
        self._lock = threading.Lock()
        self._built: ctypes.CDLL | None = None

    def __getattr__(self, name: str) -> Kernel:
        try:
            return self.__dict__["kernels"][name]
        except KeyError:
            raise AttributeError(f"no kernel {name!r} in this shader library") from None

    def body(self, kernel: str) -> Callable[..., None]:
        """The kernel's sim::Body; builds the library if nobody did yet."""
        with self._lock:
            if self._built is None:
                path = self._build()
                self._built = ctypes.CDLL(str(path))
        return getattr(self._built, f"body_{kernel}")

    def _build(self) -> Path:
        try:
            header = f"-I{build.precompiled('msl.h', *SHADER_FLAGS)}"
            return build.shared_library("shader", self.cpp, [header, *SHADER_FLAGS, str(self.engine.library)])
        except build.BuildError as error:
            names = ", ".join(self.kernels)
            raise MetalError(f"kernels {names}: not understood by the simulator\n{error}") from error
