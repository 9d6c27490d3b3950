"""Puts the simulated mps device in torch's place for one, and takes it away again."""

from __future__ import annotations

import ctypes
import functools
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from . import build, shaders
from .operators import operators_with_mps_kernels

GPU_NAME, GPU_CORES = "Simulated Apple GPU", 10


class Simulator:
    """The simulated device, and what happened on it. One a process: see simulator()."""

    def __init__(self) -> None:
        self.engine = shaders.Engine()
        self.libraries: list[shaders.Library] = []
        self._device = ctypes.CDLL(str(_device_library()))
        self._device.sim_device_operator_counts.restype = ctypes.c_char_p
        self._device.sim_device_allow_operators("\n".join(operators_with_mps_kernels()).encode())

    @contextmanager
    def installed(self) -> Iterator[None]:
        """torch has an mps device inside the block, with all counts at zero. Not reentrant.

        Tensors and compiled functions made inside stay usable in memory, but nothing new can be made once it is gone.
        """
        additions = {
            "_mps_compileShader": self._compile_shader,  # the rest of torch._C._mps_* asks the device's hooks
            "_mps_get_core_count": lambda: GPU_CORES,
            "_mps_get_name": lambda: GPU_NAME,
        }
        self.clear_counts()
        self._device.sim_device_install(1)
        torch._C._has_mps = True
        for name, function in additions.items():
            setattr(torch._C, name, function)
        _forget_answers()
        try:
            yield
        finally:
            torch.mps.set_per_process_memory_fraction(0.0)
            self._device.sim_device_install(0)
            torch._C._has_mps = False
            for name in additions:
                delattr(torch._C, name)
            _forget_answers()

    @contextmanager
    def order(self, name: str) -> Iterator[None]:
        """Runs groups, simdgroups and lanes "ascending" (the default) or "descending" inside the block."""
        before, self.engine.order = self.engine.order, name
        try:
            yield
        finally:
            self.engine.order = before

    def clear_counts(self) -> None:
        """Forgets launches, operators, bytes moved and compiled libraries so far."""
        self.engine.launches.clear()
        self.libraries.clear()
        self._device.sim_device_reset_counts()

    def launches(self) -> list[shaders.Kernel]:
        """Every Metal kernel launched since clear_counts(), in order."""
        return self.engine.launches.kernels()

    def operators(self) -> Counter[str]:
        """Operators since clear_counts() that are not Metal kernels made here, and how often: on a Mac they run as
        kernels of torch's own, here on the CPU. Any for which torch has no MPS kernel raised NotImplementedError.
        """
        lines = self._device.sim_device_operator_counts().decode().splitlines()
        return Counter({name: int(count) for name, count in (line.split("\t") for line in lines)})

    def bytes_moved(self) -> tuple[int, int]:
        """Bytes copied to the device and to the host since clear_counts(), but for what operators() did."""
        moved = (ctypes.c_long * 2)()
        self._device.sim_device_bytes_moved(moved)
        return moved[0], moved[1]

    def _compile_shader(self, source: str) -> shaders.Library:
        library = shaders.Library(self.engine, source)
        self.libraries.append(library)
        return library


@functools.cache
def simulator() -> Simulator:
    """The process's simulator; builds and loads it at the first call. It cannot be unloaded, only not installed.

    Raises RuntimeError where torch has an mps device of its own.
    """
    if torch.backends.mps.is_built():
        raise RuntimeError("this torch is built with MPS: the simulated device must not take its place")
    return Simulator()


def _device_library() -> Path:
    torch_folder = Path(torch.__file__).parent
    include = ["-w", "-isystem", str(torch_folder / "include")]
    link = [f"-L{torch_folder / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    return build.shared_library("device", (build.NATIVE / "device.cpp").read_text(), [abi, *include, *link])


def _forget_answers() -> None:
    """torch remembers what it once asked the device."""
    for question in ("is_available", "is_macos_or_newer", "is_macos13_or_newer", "get_name", "get_core_count"):
        getattr(torch.backends.mps, question).cache_clear()
