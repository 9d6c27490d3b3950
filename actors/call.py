"""A step as an actor sees it, and what it leaves there until somebody asks for it."""

from typing import Any, NamedTuple

from torch import Tensor

from xlstm_ray.actors.copies import Fence
from xlstm_ray.actors.ring import Spot
from xlstm_ray.actors.wire import Wire
from xlstm_ray.model import AnyState
from xlstm_ray.runtime.executor import Wanted
from xlstm_ray.sampling.sampler import Rows


class Call(NamedTuple):
    """A call of a step. Calls of an old epoch do nothing: the states have changed since."""

    epoch: int
    number: int
    src: int
    dst: int
    start: list[int]
    end: list[int]
    chunk_size: int
    keep: bool
    logits: Wanted
    drop: tuple[int, ...]  # states that nobody has any more
    following: tuple[Wire, int] | None  # as in Following
    rows: Rows | None  # of a token's step whose next tokens the last stage chooses
    home: int | None = None  # which other actor has the state `src`, where actors have all blocks

    def packed(self) -> list[Any]:
        """As lists, numbers and bytes, which Ray packs in a tenth of the time of our classes: 3 us."""
        rows = self.rows and self.rows.packed()
        return [*self._replace(drop=list(self.drop), rows=rows)]  # type: ignore[arg-type]

    @classmethod
    def unpacked(cls, packed: list[Any]) -> "Call":
        call = cls(*packed)
        rows: Any = call.rows
        return call._replace(drop=tuple(call.drop), rows=rows and Rows.unpacked(rows))


class Done(NamedTuple):
    """A tile's result on the device, or where the next stage reads it."""

    result: tuple[Tensor, ...] | Spot
    fence: Fence


class Kept(NamedTuple):
    """The blocks' states after a tile, on the device."""

    blocks: list[AnyState | None]
    fence: Fence
