"""The worker of one (stage, band): its weights, its state, a block's two halves."""

from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from xlstm_ray.checkpoint import Checkpoint
from xlstm_ray.config import ModelConfig
from xlstm_ray.layout import Band
from xlstm_ray.model import AnyState, BandShape, EndWeights, Weights, logits
from xlstm_ray.runtime.blocks import Calls, Kernels


class Worker:
    """Weights and state of one (stage, band), blocks of either kind. Plain torch: knows neither threads nor Ray.

    With all heads in one band, `run_block` does a whole block in one call; with several, `mix` and `feed` return this
    band's partial sums of x (B, T, D), which the executor adds up.
    """

    def __init__(self, config: ModelConfig, band: Band, blocks: Sequence[Weights], ends: EndWeights, kernels: Kernels):
        self.config, self.band, self.blocks, self.ends, self.kernels = config, band, blocks, ends, kernels
        self.shape = BandShape.of(config, len(band.heads))
        self.device, self.dtype = blocks[0].up.device, blocks[0].up.dtype
        self.state: list[AnyState] = []

    def fresh_state(self, n: int, batch: int) -> AnyState:
        """The state of this stage's n-th block before the first token: all zeros, m too. The order is that of names."""
        shapes = self._shapes(n).values()
        return tuple(torch.zeros(batch, *shape, device=self.device) for shape in shapes)  # type: ignore[return-value]

    def _shapes(self, n: int) -> dict[str, tuple[int, ...]]:
        return self.config.state_shapes(self.band.blocks[n], len(self.band.heads))

    def set_state(self, tensors: Mapping[str, Tensor] | None, batch: int) -> None:
        """Go on from these tensors of all heads, named as in RecurrentState, or forget everything.

        Copied, with the strides that the kernels are compiled for.
        """
        self.state = [self.fresh_state(n, batch) for n in range(len(self.blocks))]
        if tensors is not None:
            heads = slice(self.band.heads.start, self.band.heads.stop)
            for name, part in self._named(self.state):
                part.copy_(tensors[name][:, heads])

    def get_state(self, state: list[AnyState] | None = None) -> dict[str, Tensor]:
        """This band's tensors, where they are, named as in RecurrentState: of now, or of an earlier `self.state`."""
        return dict(self._named(state or self.state))

    def _named(self, state: list[AnyState]) -> Iterator[tuple[str, Tensor]]:
        for n, parts in enumerate(state):
            for name, part in zip(self._shapes(n), parts, strict=True):
                yield f"blocks.{self.band.blocks[n]}.{name}", part

    def warm_up(self, batch: int, tokens: int, *, alone: bool) -> None:
        """Compile for windows (batch, tokens) by running a block of each kind on zeros; the state stays as it is."""
        x = torch.zeros(batch, tokens, self.config.hidden_size, dtype=self.dtype, device=self.device)
        first = torch.zeros(batch, dtype=torch.long, device=self.device)
        for n in {type(w): n for n, w in enumerate(self.blocks)}.values():
            w, calls = self.blocks[n], self._calls(n, x)
            args = (x, w, self.fresh_state(n, batch), first, first + tokens)
            if alone:
                calls.block(*args)
            else:
                calls.mix(*args)
                calls.feed(x, w)

    def warm_up_logits(self, batch: int) -> None:
        """Compile what logits of `batch` rows need, where the head is here."""
        if self.ends.head is not None:
            self.logits(torch.zeros(batch, self.config.hidden_size, dtype=self.dtype, device=self.device))

    def embed(self, tokens: Tensor) -> Tensor:
        """tokens (B, T) int64 -> residual stream (B, T, D) on this worker's device."""
        assert self.ends.embedding is not None
        return F.embedding(tokens.to(self.device), self.ends.embedding)

    def logits(self, x: Tensor) -> Tensor:
        """x (..., D) after the last block -> (..., vocabulary) float32."""
        return logits(x.to(self.device), self.ends, self.config, self.kernels.head)

    def run_block(self, n: int, x: Tensor, first: Tensor, last: Tensor) -> Tensor:
        """All of this stage's n-th block, where this band has all heads; its state moves on."""
        x, self.state[n] = self._calls(n, x).block(x, self.blocks[n], self.state[n], first, last)
        return x

    def mix(self, n: int, x: Tensor, first: Tensor, last: Tensor) -> Tensor:
        """This band's share of the mLSTM or sLSTM half of block n; its state moves on."""
        y, self.state[n] = self._calls(n, x).mix(x, self.blocks[n], self.state[n], first, last)
        return y

    def feed(self, n: int, x: Tensor) -> Tensor:
        """This band's share of the feed-forward half of block n."""
        return self._calls(n, x).feed(x, self.blocks[n])

    def _calls(self, n: int, x: Tensor) -> Calls:
        return self.kernels.calls(self.shape, self.blocks[n], x.shape[0], x.shape[1])


def build_worker(
    checkpoint: Checkpoint, kernels: Kernels, shard: Band, *, dtype: torch.dtype, device: torch.device
) -> Worker:
    """The worker of one (stage, band), with its slice of the checkpoint."""
    return Worker(checkpoint.config, shard, *checkpoint.load(shard, dtype=dtype, device=device), kernels)
