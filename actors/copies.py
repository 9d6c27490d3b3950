"""Copies between the host and the device of an actor, on cuda beside the work of the tile that is computed."""

from contextlib import nullcontext
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from xlstm_ray.actors.ring import Mapped, Spot
from xlstm_ray.actors.wire import Wire, from_wire, to_wire
from xlstm_ray.runtime.moves import Moves, upload

Fence = torch.cuda.Event | None  # on cuda: recorded after the work that made a tensor


class Copies:
    """Copies for one device. dtype: of the residual stream."""

    def __init__(self, device: torch.device, dtype: torch.dtype):
        self._device, self._dtype, self.mapped = device, dtype, Mapped()
        self._cuda = device.type == "cuda"
        self._moves = Moves(device) if self._cuda else None
        self._streams: dict[str, Any] = {}
        self._lock = Lock()

    def enter(self, x: Wire | Spot) -> Tensor:
        """Tokens, or a residual stream of the host or of another GPU, on this device."""
        if not self._cuda:
            assert not isinstance(x, Spot)
            return self.upload(from_wire(x, self._dtype))
        stream = self._stream("in")  # another stream: does not wait for the tile that is being computed
        with torch.cuda.stream(stream):
            here = self.mapped.view(x).clone() if isinstance(x, Spot) else self.upload(from_wire(x, self._dtype))
        main = torch.cuda.current_stream()
        main.wait_stream(stream)
        here.record_stream(main)
        return here

    def settle(self, name: str = "in") -> None:
        """Wait for another stream's copies. in: then what entered may be written over where it came from."""
        if self._cuda:
            self._stream(name).synchronize()

    def upload(self, host: Tensor) -> Tensor:
        """Copy to the device, not waiting."""
        return upload(host, self._device)

    def state(self, tensors: dict[str, Tensor]) -> dict[str, Wire]:
        """A state's tensors on the host, after the current stream's work."""
        here = tensors if self._moves is None else self._moves.to_host(tensors)()
        return {name: to_wire(part) for name, part in here.items()}

    def fence(self) -> Fence:
        """An event after all work that was submitted to the device so far."""
        return torch.cuda.current_stream().record_event() if self._cuda else None

    def beside(self, fence: Fence, name: str) -> Any:
        """On cuda: another stream for copies to the host, so that they wait for this tile and not for the next."""
        if fence is None:
            return nullcontext()
        fence.synchronize()
        return torch.cuda.stream(self._stream(name))

    def _stream(self, name: str) -> torch.cuda.Stream:
        with self._lock:
            if name not in self._streams:  # first in turn: a copy must not wait for the kernels of the next tiles
                self._streams[name] = torch.cuda.Stream(self._device, priority=-1)
            return self._streams[name]
