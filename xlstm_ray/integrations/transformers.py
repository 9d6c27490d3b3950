"""Our kernels inside transformers' xLSTM models: on mps, cuda and the CPU, in the memory of a tile.

model = xLSTMForCausalLM.from_pretrained("NX-AI/xLSTM-7b")
use_kernels(model)
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from xlstm_ray.errors import UsageError
from xlstm_ray.integrations.nxai import TILE_SIZE, mlstm_chunkwise, mlstm_step

WORDS = {"query": "q", "key": "k", "value": "v", "igate": "i", "fgate": "f"}  # transformers' and mlstm_kernels' own


class Backend(nn.Module):
    """In the place of an mLSTM layer's backend: our kernels for inference, the layer's own ones for training."""

    def __init__(self, own: nn.Module, chunkwise: Callable[..., Any], step: Callable[..., Any]):
        super().__init__()
        self.own: Any = own
        self.config: Any = own.config
        self._chunkwise, self._step = chunkwise, step

    def forward(self, *args: Tensor, mode: str | None = None, **given: Any) -> Any:
        """Arguments and results as the layer's own backend: (B, NH, S, ...), and the states after the last token."""
        mode = mode or self.config.mode
        if "train" in mode:
            return self.own(*args, mode=mode, **given)
        given |= dict(zip(WORDS.values(), args, strict=False))  # mlstm_kernels gives them by place as well
        named = {WORDS.get(name, name): value for name, value in given.items()}
        q, k, v, i, f = (named[name] for name in WORDS.values())
        initial = [named.get(f"{name}_initial") for name in "cnm"]
        if q.shape[2] == 1:
            h, state = self._step(*(x.squeeze(2) for x in (q, k, v)), i, f, *initial, eps=self.config.eps)
            return h.unsqueeze(2), state
        size, eps = self.config.chunk_size, self.config.eps
        return self._chunkwise(q, k, v, i, f, *initial, return_last_states=True, eps=eps, chunk_size=size)


def use_kernels(
    model: nn.Module,
    *,
    chunkwise: str = "queued_compiled_chunks",
    step: str = "metal",
    tile_size: int = TILE_SIZE,
) -> int:
    """Let every mLSTM layer of `model` compute with our kernels; returns the number of layers. Weights are not touched.

    model: an xLSTMModel or xLSTMForCausalLM of transformers, or whatever has layers with an `mlstm_backend`.
    chunkwise, step: names of the registry (`xlstm-ray doctor --kernels` lists them). tile_size: tokens of a compiled
    call. The first call of a shape compiles it. Calling again changes the kernels. Raises UsageError for names that are
    not known, for those that need a Ray grid, for a model without such layers, and if chunks do not fill a tile.
    """
    kernels = mlstm_chunkwise(chunkwise, tile_size=tile_size), mlstm_step(step)
    layers: list[Any] = [layer for layer in model.modules() if hasattr(layer, "mlstm_backend")]
    if not layers:
        raise UsageError(f"{type(model).__name__} has no mLSTM layer; give an xLSTMModel or an xLSTMForCausalLM")
    for layer in layers:
        own, chunk_size = layer.mlstm_backend, layer.mlstm_backend.config.chunk_size
        if tile_size % chunk_size:
            raise UsageError(f"tile_size {tile_size} is not a multiple of the model's chunk_size {chunk_size}")
        layer.mlstm_backend = Backend(own.own if isinstance(own, Backend) else own, *kernels)
    return len(layers)
