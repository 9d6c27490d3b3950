"""An engine begins to serve."""

from xlstm_ray.engine.engine import Engine
from xlstm_ray.engine.windows import GROUP_SIZES, group_size
from xlstm_ray.serve.options import Slots


def begin(engine: Engine, wanted: Slots) -> int:
    """Begin to serve; returns the slots.

    All that requests will call is compiled, unless warm-up is off: else a later one would stop everybody for a minute.
    """
    fixed = wanted.deterministic
    sizes = (group_size(wanted.most or GROUP_SIZES[-1]),) if fixed else GROUP_SIZES
    slots = engine.serve(slots=wanted.most, buckets=sizes)
    engine.warm_up(1, [engine.numerics.tile_size, engine.numerics.chunk_size])
    for rows in sizes:
        if fixed or rows <= group_size(slots):
            engine.warm_up(rows, [1])
    return slots
