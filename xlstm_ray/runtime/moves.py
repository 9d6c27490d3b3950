"""States on their way between a GPU and the host's memory, beside the GPU's work.

A copy between a GPU and ordinary memory waits for all work before it and is slow. So states go through buffers of
pinned memory, in a stream of their own: the GPU goes on, and another thread takes them from there.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from math import prod
from queue import SimpleQueue
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

BUFFERS = 4  # states on their way at once
LARGEST = 512 << 20  # bytes of a buffer; larger states, of many rows, are copied without
ALIGNED = 64  # bytes
COPIERS = 4  # threads that fill a buffer: one of them moves a state in the time that a GPU takes for some windows


class _Buffer(NamedTuple):
    pinned: Tensor  # uint8
    free: torch.cuda.Event | None  # when the GPU has read what was in it


def upload(host: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on the device. On cuda through pinned memory: else it would wait for all work before."""
    if device.type != "cuda" or host.device.type != "cpu":
        return host.to(device)
    return torch.empty(host.shape, dtype=host.dtype, pin_memory=True).copy_(host).to(device, non_blocking=True)


def side_by_side(shapes: Sequence[tuple[int, ...]], made: Callable[..., Tensor], device: torch.device) -> list[Tensor]:
    """Tensors of float32 in one piece of memory: they move by one copy. made: torch.zeros or torch.empty."""
    sizes = [-(-4 * prod(shape) // ALIGNED) * ALIGNED // 4 for shape in shapes]
    parts = made(sum(sizes), device=device).split(sizes)
    return [part[: prod(shape)].view(shape) for part, shape in zip(parts, shapes, strict=True)]


def copy_all(to: Sequence[Tensor], given: Sequence[Tensor]) -> None:
    """Copy each of the second ones to one of the first, not waiting; all at once, where both are side by side."""
    joined = _joined(to), _joined(given)
    if joined[0] is not None and joined[1] is not None and len(joined[0]) == len(joined[1]):
        joined[0].copy_(joined[1], non_blocking=True)
        return
    for here, there in zip(to, given, strict=True):
        here.copy_(there, non_blocking=True)


class Moves:
    """Moves of states from and to one GPU. Buffers are as large as the largest state so far."""

    def __init__(self, device: torch.device):
        self._device, self._stream = device, torch.cuda.Stream(device)
        self._buffers: SimpleQueue[_Buffer] = SimpleQueue()
        self._copiers = ThreadPoolExecutor(COPIERS, "copies")
        for _ in range(BUFFERS):
            self._buffers.put(_Buffer(torch.empty(0, dtype=torch.uint8), None))

    def to_host(
        self, tensors: Mapping[str, Tensor], made: torch.cuda.Event | None = None
    ) -> Callable[[], dict[str, Tensor]]:
        """Begin to copy these tensors of the GPU, as they are after `made`, or after all work so far. Call the result
        once, from any thread: it waits for the copies, and returns them in ordinary memory."""
        if _size(tensors.values()) > LARGEST:
            copies = {name: tensor.cpu() for name, tensor in tensors.items()}
            return lambda: copies
        buffer, places = self._buffer(tensors.values()), dict(zip(tensors, _places(tensors.values()), strict=True))
        if made is None:
            made = torch.cuda.current_stream(self._device).record_event()
        self._stream.wait_event(made)
        with torch.cuda.stream(self._stream):
            if (joined := _joined(list(tensors.values()))) is not None:
                buffer[: len(joined)].copy_(joined, non_blocking=True)
            else:
                for name, tensor in tensors.items():
                    _view(buffer, places[name], tensor).copy_(tensor, non_blocking=True)
            there = self._stream.record_event()

        def wait() -> dict[str, Tensor]:
            there.synchronize()  # until now `tensors` were in use
            size = _size(tensors.values())
            own = torch.from_numpy(np.empty(size, np.uint8))  # numpy asks for huge pages: 512 times fewer faults
            np.copyto(own.numpy(), buffer[:size].numpy())  # in this thread: torch's own would take turns
            self._buffers.put(_Buffer(buffer, None))
            return {name: _view(own, places[name], tensor) for name, tensor in tensors.items()}

        return wait

    def settle(self) -> None:
        """Have the current stream wait for all copies to the host."""
        torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def to_device(self, tensors: Mapping[str, Tensor], take: Callable[[Mapping[str, Tensor]], None]) -> None:
        """Give `take` these tensors in pinned memory. It copies them to the GPU in the current stream, not waiting."""
        if _size(tensors.values()) > LARGEST:
            take(tensors)
            return
        buffer, places = self._buffer(tensors.values()), _places(tensors.values())
        try:
            views = {
                name: _view(buffer, place, tensor)
                for (name, tensor), place in zip(tensors.items(), places, strict=True)
            }
            if (joined := _joined(list(tensors.values()))) is not None:
                both = buffer[: len(joined)].numpy(), joined.numpy()
                pairs = list(zip(*(np.array_split(one, COPIERS) for one in both), strict=True))
            else:
                pairs = [(views[name].numpy(), tensor.numpy()) for name, tensor in tensors.items()]
            list(self._copiers.map(_copy, [pairs[n::COPIERS] for n in range(COPIERS)]))
            take(views)
        finally:  # where the GPU has no memory for them, too: without it, others would wait for ever
            self._buffers.put(_Buffer(buffer, torch.cuda.current_stream(self._device).record_event()))

    def _buffer(self, tensors: Iterable[Tensor]) -> Tensor:
        """A free buffer for these; waits for one."""
        pinned, free = self._buffers.get()
        if free is not None:
            free.synchronize()
        size = _size(tensors)
        return pinned if pinned.nbytes >= size else torch.empty(size, dtype=torch.uint8, pin_memory=True)


def _copy(pairs: Iterable[tuple[np.ndarray, np.ndarray]]) -> None:
    """Copy to the first of each pair; other threads of Python run meanwhile."""
    for to, given in pairs:
        np.copyto(to, given)


def _joined(tensors: Sequence[Tensor]) -> Tensor | None:
    """The memory (bytes,) uint8 of tensors that are side by side, as _places has them; None if they are not."""
    first = tensors[0]
    begin, memory, size = first.data_ptr(), first.untyped_storage(), _size(tensors)
    offset = begin - memory.data_ptr()
    if offset + size > memory.nbytes():
        return None
    each = zip(tensors, _places(tensors), strict=True)
    if any(tensor.data_ptr() != begin + place or not tensor.is_contiguous() for tensor, place in each):
        return None
    return torch.empty(0, dtype=torch.uint8, device=first.device).set_(memory, offset, (size,), (1,))


def _size(tensors: Iterable[Tensor]) -> int:
    """Bytes of a buffer for these."""
    return sum(-(-tensor.nbytes // ALIGNED) * ALIGNED for tensor in tensors)


def _places(tensors: Iterable[Tensor]) -> list[int]:
    """Where each tensor begins in a buffer, in bytes."""
    places, end = [], 0
    for tensor in tensors:
        places.append(end)
        end += -(-tensor.nbytes // ALIGNED) * ALIGNED
    return places


def _view(buffer: Tensor, place: int, like: Tensor) -> Tensor:
    return buffer[place : place + like.nbytes].view(like.dtype).view(like.shape)
