"""How a setting is declared: flag, variable, bounds, the panel of the help; and the sources that values come from."""

from collections.abc import Collection
from difflib import get_close_matches
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic import BeforeValidator, Field
from pydantic.fields import FieldInfo

from xlstm_ray.errors import UsageError

# The panels of the help. A setting that is not named here is in the last one.
PANELS: dict[str, str] = {
    "Model": "model device dtype",
    "Work": "chunkwise_backend tile_size chunk_size heads_per_band workers threads t_inner autoscale warmup "
    "cuda_graphs",
    "Memory": "mem_watchdog mem_soft_pct mem_hard_pct mem_soft_mb mem_hard_mb mem_poll_ms mem_action shrink_on_soft "
    "min_chunk force",
    "Actors on Ray": "stages spans actors_per_device gpu_direct ray_address ray_token_path ray_state_dir ray_temp_dir",
    "A Ray head of this run": "ray_local_mode ray_autoshutdown ray_dashboard ray_dashboard_port ray_keep_alive",
    "Cache": "cache_dir cache_memory_mb cache_disk_mb cache_every cache_match states_mb",
    "Journal and logs": "journal journal_every resume stats_log mem_log",
    "Settings": "profile",
}
SHORT = {"model": "-m", "device": "-d"}


class Source(NamedTuple):
    """A value's source: flag, state, environment, file, profile, model, autoscale, measured, default; and its name."""

    kind: str
    where: str = ""

    def __str__(self) -> str:
        return f"{self.kind} {self.where}".rstrip()


Share = Annotated[float, Field(gt=0, le=1)]
# An empty text stays a text: Path("") would be the current directory.
File = Annotated[Path | None, BeforeValidator(lambda value: Path(value) if value and isinstance(value, str) else value)]
Actions = Annotated[
    tuple[Literal["warn", "empty_cache"], ...],
    Field(strict=False, min_length=1),
    BeforeValidator(lambda value: value.replace(" ", "").split(",") if isinstance(value, str) else value),
]


def _stages(value: Any) -> Any:
    """A text as what it says: a number of stages, or the blocks of each; a list as those."""
    if isinstance(value, str) and value != "auto":
        counts = [int(part) if part.isdecimal() else part for part in value.split(",")]
        return counts[0] if len(counts) == 1 else tuple(counts)
    return tuple(value) if isinstance(value, list) else value


_Count = Annotated[int, Field(ge=1, le=1 << 16)]
Stages = Annotated[
    _Count | Annotated[tuple[_Count, ...], Field(min_length=1)] | Literal["auto"], BeforeValidator(_stages)
]


def setting(
    help: str,
    default: Any = None,
    *,
    env: str = "",
    flag: str | None = "",
    shown: str = "",
    allowed: str = "",
    **bounds: Any,
) -> Any:
    """A field of Settings. env: "" for XLSTM_NAME. flag: "" for --name (and --no-name for a switch), None for no
    flag. shown: the help's text for the default. allowed: what errors say, if its type does not say it.
    """
    extra: Any = {"env": env, "flag": flag, "shown": shown, "allowed": allowed}
    return Field(default, description=help, json_schema_extra=extra, **bounds)


def count(help: str, default: int | None = None, *, high: int = 1 << 16, **row: Any) -> Any:
    """A whole number from 1 to high."""
    return setting(help, default, ge=1, le=high, **row)


class Setting:
    """A field of Settings, for the help and for errors."""

    def __init__(self, name: str, field: FieldInfo):
        extra: Any = field.json_schema_extra
        hint: Any = field.annotation
        hint = get_args(hint)[0] if NoneType in get_args(hint) else hint
        self.name, self.default, self.help = name, field.default, field.description or ""
        self.env, self.shown = extra["env"] or f"XLSTM_{name.upper()}", extra["shown"]
        self.panel = next((title for title, names in PANELS.items() if name in names.split()), "Settings")
        self.short = SHORT.get(name)
        # Or int, float, bool, Path. A union comes as a text.
        self.kind = {Literal: str, tuple: tuple, UnionType: str, Union: str}.get(get_origin(hint), hint)
        self.flags = "--" + name.replace("_", "-") if extra["flag"] == "" else extra["flag"]
        if self.kind is bool and self.flags:
            self.flags += "/--no-" + self.flags[2:]
        words = extra["allowed"] or ", ".join(get_args(get_args(hint)[0] if self.kind is tuple else hint))
        self.allowed = {
            tuple: f"one or more of {words}, with commas between",
            bool: "1 or 0 (true or false)",
            float: "a fraction above 0, up to 1 (0.85 is 85 %)",
            int: f"a whole number from 1 to {max(getattr(bound, 'le', 0) for bound in [*field.metadata, None])}",
        }.get(self.kind, words or "a text that is not empty")

    def named(self, source: Source, value: Any) -> str:
        """The setting's name in errors, for a value from this source; a field if a caller gave it."""
        if source.kind == "environment":
            return self.env
        if source.kind in ("flag", "default"):
            return f"`{self.name}=False`" if self.kind is bool and value is False else f"`{self.name}`"
        return f"{source.where}: {self.name}" if source.kind == "file" else f"{self.name} of {source}"


def refuse_unknown(names: Collection[str], known: Collection[str], where: str = "", kind: str = "setting") -> None:
    """Raise UsageError for the first unknown name, with similar names."""
    for name in (name for name in names if name not in known):
        near = get_close_matches(name.replace("-", "_"), known, 3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are: {', '.join(known)}"
        raise UsageError(f"{where}{name!r} is not a {kind}; {hint}")
