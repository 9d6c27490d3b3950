"""Tensors from one GPU to the next one of the same host, without the host's memory.

The sender's tensors are in a ring in its GPU's memory. Ray carries a Spot in place of each: it says how another process
maps the ring (CUDA's handles between processes, by torch.multiprocessing) and where in it the tensor is. The receiver
copies it from there, over NVLink or PCIe. So nothing waits for the other end, and an actor that dies holds up nobody.

Ray's own transports do not serve here (2.60): CUDA_IPC is refused between two GPUs, and NCCL needs both ends at once
and cannot leave an end that has died.
"""

import os
from collections.abc import Callable, Sequence
from itertools import count
from threading import Lock
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import reduce_tensor

_numbers = count()  # of this process's rings
DEVICE = 6  # the place of the device's index among the arguments of torch's rebuild_cuda_tensor


class Spot(NamedTuple):
    """A tensor in another process's GPU memory."""

    ring: tuple[int, int]  # the sender's process, and which of its rings
    mapped: tuple[Callable[..., Tensor], tuple[Any, ...]]  # as torch.multiprocessing makes it of the ring
    first: int  # the tensor's first element in the ring
    shape: torch.Size


class Ring:
    """The sender's end. It keeps the last `places` tensors; an older one must have been read.

    A larger tensor than before makes a larger ring. The smaller one stays, for those that still read from it.
    """

    def __init__(self, places: int):
        self._places = places
        self._rings: list[Tensor] = []
        self._mapped: tuple[Callable[..., Tensor], tuple[Any, ...]] | None = None
        self._name = (os.getpid(), -1)
        self._next = 0
        self._lock = Lock()  # a thread of an epoch before may still put its last one

    def put(self, x: Tensor) -> Spot:
        """Copy a tensor into the ring, in the current stream: its Spot counts once the stream has come here."""
        place, spot = self._place(x, x.numel())
        place.view(x.shape).copy_(x)
        return spot._replace(shape=x.shape)

    def join(self, parts: Sequence[Tensor]) -> Spot:
        """As `put`, the elements of several tensors of one dtype, one after the other, by one kernel."""
        flat = [part.reshape(-1) for part in parts]
        place, spot = self._place(flat[0], sum(map(len, flat)))
        torch.cat(flat, out=place)
        return spot

    def _place(self, like: Tensor, numel: int) -> tuple[Tensor, Spot]:
        """The next place, for so many elements of this kind."""
        with self._lock:
            if not self._rings or self._rings[-1].numel() < self._places * numel:
                self._rings.append(torch.empty(self._places * numel, dtype=like.dtype, device=like.device))
                self._mapped, self._name = reduce_tensor(self._rings[-1]), (os.getpid(), next(_numbers))
            ring, mapped = self._rings[-1], self._mapped
            assert mapped is not None
            first = self._next * (ring.numel() // self._places)
            self._next = (self._next + 1) % self._places
            return ring[first : first + numel], Spot(self._name, mapped, first, torch.Size([numel]))


class Mapped:
    """The receiver's end: the rings of the stage before, as this process sees them."""

    def __init__(self) -> None:
        self._rings: dict[tuple[int, int], Tensor] = {}

    def view(self, spot: Spot) -> Tensor:
        """The tensor of this Spot, in the sender's memory. RuntimeError of CUDA if this process cannot read there."""
        if spot.ring not in self._rings:
            rebuild, arguments = spot.mapped
            if arguments[DEVICE:] and isinstance(arguments[DEVICE], int):  # its own number of the GPU; here we read
                arguments = (*arguments[:DEVICE], torch.cuda.current_device(), *arguments[DEVICE + 1 :])
            self._rings[spot.ring] = rebuild(*arguments)
        ring = self._rings[spot.ring]
        return ring[spot.first : spot.first + spot.shape.numel()].view(spot.shape)

    def clear(self) -> None:
        """Let go of all rings: their sender may have another process now."""
        self._rings.clear()
