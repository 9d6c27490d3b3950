"""Which stages a run has: what was asked for, checked. Errors are reported before torch is loaded."""

from typing import Literal

from xlstm_ray.config import ModelConfig
from xlstm_ray.errors import UsageError
from xlstm_ray.settings import Settings
from xlstm_ray.supervisor.mode import Mode

Asked = int | tuple[int, ...] | Literal["auto"]


def choose_stages(settings: Settings, config: ModelConfig, mode: Mode) -> Asked:
    """The number of stages, the blocks of each, or auto. Raises UsageError where the model or the place has no such, or
    beside `spans`."""
    stages, blocks, name = settings.stages, config.num_blocks, settings.named("stages")
    if settings.spans > 1 and stages != 1:
        both = f"{settings.named('spans')} and {name}"
        raise UsageError(f"{both} were both given, and an actor has all blocks or a stage's; give one of them")
    if stages == "auto":
        if mode is Mode.LOCAL:
            raise UsageError(
                f"{name} is auto, which measures the nodes of a grid, but all work is in this process; give "
                "`ray_address`, or leave it out"
            )
    elif isinstance(stages, int):
        if stages > blocks:
            raise UsageError(f"{name} is {stages}, but the model has {blocks} blocks")
    elif sum(stages) != blocks:
        raise UsageError(f"{name} is {shown(stages)}, which is {sum(stages)} blocks, but the model has {blocks}")
    return stages


def refuse_bands(settings: Settings, config: ModelConfig, heads: int) -> None:
    """Raise UsageError for `spans` beside bands of so many heads."""
    if settings.spans > 1 and heads < config.num_heads:
        raise UsageError(
            f"{settings.named('spans')} is {settings.spans}, and each actor has all heads, but there are bands of "
            f"fewer; give `heads_per_band={config.num_heads}`, or leave one of them out"
        )


def shown(stages: Asked) -> str:
    """As it is given on the command line."""
    return ",".join(map(str, stages)) if isinstance(stages, tuple) else str(stages)
