"""Every setting, once: its flag, its environment variable, its bounds. The only reader of the environment.

What was given wins in this order: flag (or argument in Python), the state that a run goes on from, environment
variable, `--config FILE`, `--profile NAME`, the model's config.json (the engine reads that), default. This module
imports little: `--help` is made from the table below.
"""

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Any, NamedTuple, get_args, get_type_hints

from xlstm_ray.errors import UsageError

DEVICES = ("auto", "mps", "cuda", "cpu")
DTYPES = ("auto", "float32", "bfloat16")
MEM_ACTIONS = ("warn", "empty_cache")
DEFAULT_BACKEND = "queued_compiled_chunks"
MIB = 1 << 20

PROFILES: dict[str, dict[str, Any]] = {
    # A Mac with 256 GB: throughput first, a warning only near the limit, no shrinking.
    "high-memory-256gb": {
        "mem_action": ("warn",),
        "mem_soft_mb": 215_000,
        "mem_hard_mb": 235_000,
        "shrink_on_soft": False,
        "chunk_size": 64,
        "heads_per_band": 4,
    }
}


class Source(NamedTuple):
    """Where a value came from: flag, state, environment, file, profile, model, autoscale or default, and which."""

    kind: str
    where: str = ""

    def __str__(self) -> str:
        return f"{self.kind} {self.where}".rstrip()


@dataclass(frozen=True)
class Setting:
    """A row of the table."""

    name: str
    kind: type  # int, float, bool, str, Path; or tuple, for words with commas between
    default: Any
    help: str
    shown: str = ""  # what stands for the default in the help
    flag: str | None = ""  # "" for --name; None for none; "--yes/--no" for a switch with both
    env: str | None = None
    low: int = 1
    high: int = 1 << 16
    one_of: tuple[str, ...] = ()
    in_file: bool = True

    @property
    def flags(self) -> str | None:
        """The flag as it is declared, with both forms of a switch."""
        return "--" + self.name.replace("_", "-") if self.flag == "" else self.flag

    @property
    def allowed(self) -> str:
        """What the values may be, in words."""
        if self.kind is tuple:
            return f"one or more of {', '.join(self.one_of)}, with commas between"
        if self.one_of:
            return ", ".join(self.one_of)
        if self.kind is bool:
            return "1 or 0 (true or false)"
        if self.kind is float:
            return "a fraction above 0, up to 1 (0.85 is 85 %)"
        return f"a whole number from {self.low} to {self.high}" if self.kind is int else "a text that is not empty"

    def parse(self, text: str) -> Any:
        """A value from a text, as the environment has it; ValueError where it is none."""
        if self.kind is bool:
            words = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False}
            return {**words, "off": False}.get(text.lower(), text)
        return self.kind(text) if self.kind in (int, float) else text

    def accept(self, value: Any) -> Any:
        """The value as it will be used; ValueError where its type or size is not allowed."""
        wanted: Any = str if self.kind is Path else self.kind
        if self.kind is tuple:
            words = tuple(value.split(",") if isinstance(value, str) else value)
            if not words or not all(isinstance(w, str) and w.strip() in self.one_of for w in words):
                raise ValueError
            return tuple(w.strip() for w in words)
        if self.kind is Path and isinstance(value, os.PathLike):
            value = os.fspath(value)
        if self.kind is float and type(value) is int:
            value = float(value)
        if type(value) is not wanted or value == "":
            raise ValueError
        if self.one_of and value not in self.one_of:
            raise ValueError
        if self.kind is int and not self.low <= value <= self.high:
            raise ValueError
        if self.kind is float and not 0 < value <= 1:
            raise ValueError
        return Path(value) if self.kind is Path else value


def setting(help: str, default: Any = None, **row: Any) -> Any:
    """A field of Settings with its row of the table."""
    return field(default=default, metadata={"help": help, **row})


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the user asked for; None where nothing was asked and there is no fixed default.

    Sizes are in tokens, heads_per_band in heads, mem_*_mb in MiB, mem_*_pct in parts of 1, mem_poll_ms in ms.
    """

    model: Path | None = setting("A model directory in the Hugging Face layout.", shown="the demo model")
    device: str = setting("auto, mps, cuda or cpu.", "auto", shown="auto, the first that is there", one_of=DEVICES)
    dtype: str = setting(
        "auto, float32 or bfloat16.", "auto", shown="auto, bfloat16 on a GPU, else as stored", one_of=DTYPES
    )
    chunkwise_backend: str | None = setting(
        "queued_compiled_chunks, queued_compiled_steps or native (the eager reference).",
        shown="the model's, else queued_compiled_chunks",
        env="XLSTM_CHUNKWISE_BACKEND",
    )
    tile_size: int | None = setting("Tokens a task, a multiple of the chunk size.", shown="by device")
    chunk_size: int | None = setting("Tokens a chunk of the closed form.", shown="the model's")
    heads_per_band: int | None = setting("Heads a band.", shown="all; 4 on mps", env="XLSTM_MPS_HEADS_PER_BAND")
    workers: int = setting("Threads that work on bands, at most one a band.", 6, env="XLSTM_MPS_WORKERS", high=256)
    streams: int | None = setting(
        "CUDA streams that the threads share.", shown="one a thread", flag=None, env="XLSTM_MPS_STREAMS", high=256
    )
    t_inner: int = setting("Steps unrolled in a compiled call, for step kernels.", 8, env="XLSTM_T_INNER", high=64)
    autoscale: bool = setting(
        "Probe this machine for heads a band, workers and tile size, once a model and device.",
        False,
        flag="--autoscale/--no-autoscale",
        env="XLSTM_MPS_AUTOSCALE",
    )
    warmup: bool = setting(
        "Compile before the first tile, not on first use.", True, flag="--warmup/--no-warmup", env="XLSTM_MPS_WARMUP"
    )
    enable_mps_fallback: bool = setting(
        "Refused on mps: operators would leave the GPU silently.",
        False,
        flag=None,
        env="PYTORCH_ENABLE_MPS_FALLBACK",
        in_file=False,  # torch itself reads the variable
    )
    mem_watchdog: bool = setting(
        "Watch memory during prefill.", True, flag="--mem-watchdog/--no-mem-watchdog", env="XLSTM_MEM_WATCHDOG"
    )
    mem_soft_pct: float = setting("Soft limit as a fraction of the machine's memory.", 0.85, env="XLSTM_MEM_SOFT_PCT")
    mem_hard_pct: float = setting("Hard limit as a fraction of the machine's memory.", 0.92, env="XLSTM_MEM_HARD_PCT")
    mem_soft_mb: int | None = setting("Soft limit in MiB.", shown="the fraction", env="XLSTM_MEM_SOFT_MB", high=1 << 30)
    mem_hard_mb: int | None = setting("Hard limit in MiB.", shown="the fraction", env="XLSTM_MEM_HARD_MB", high=1 << 30)
    mem_poll_ms: int = setting("Milliseconds between samples of memory.", 200, env="XLSTM_MEM_POLL_MS", high=60_000)
    mem_action: tuple[str, ...] = setting(
        "What a soft limit does beside shrinking: warn, or warn,empty_cache.",
        MEM_ACTIONS,
        env="XLSTM_MEM_ACTION",
        one_of=MEM_ACTIONS,
    )
    shrink_on_soft: bool = setting(
        "At a soft limit, halve the tile, then the chunk.",
        True,
        flag="--mem-shrink/--no-mem-shrink",
        env="XLSTM_SHRINK_ON_SOFT",
    )
    min_chunk: int = setting("Shrinking ends at chunks of so many tokens.", 8, env="XLSTM_MIN_CHUNK")
    mem_log: Path | None = setting("Write the watchdog's samples to this CSV file.", shown="none")
    force: bool = setting("Start although the computed need of memory does not fit.", False)
    stats_log: Path | None = setting("Write a row a tile to this CSV file.", shown="none")
    profile: str | None = setting(f"A set of settings: {', '.join(PROFILES)}.", shown="none", one_of=tuple(PROFILES))
    stages: int = setting("Stages that the blocks are cut into, an actor each.", 1)
    threads: int | None = setting("CPU threads a worker.", shown="the cores, shared out", high=1024)
    ray_local_mode: bool = setting(
        "Run the ray_ backends in this process, without Ray.",
        True,
        flag="--ray-local-mode/--no-ray-local-mode",
        env="XLSTM_RAY_LOCAL_MODE",
    )
    ray_autoshutdown: bool = setting(
        "Stop the Ray head that this run started.", True, flag=None, env="XLSTM_RAY_AUTOSHUTDOWN"
    )
    ray_dashboard: bool = setting(
        "With Ray's dashboard, on loopback.",
        False,
        flag="--ray-dashboard/--no-ray-dashboard",
        env="XLSTM_RAY_DASHBOARD",
    )
    ray_dashboard_port: int | None = setting(
        "Its port.", shown="8265, or the next free one", env="XLSTM_RAY_DASHBOARD_PORT", high=65535
    )
    ray_keep_alive: bool = setting("Leave the Ray head running after the run.", False)
    ray_address: str | None = setting("HOST:PORT of a Ray head that runs.", shown="none")
    ray_token_path: Path | None = setting("The file with that head's token.", shown="where Ray looks")
    actors_per_device: int = setting("Actors that may share a GPU.", 1, high=64)
    journal: Path | None = setting("Write snapshots of the run to this directory.", shown="none")
    journal_every: int = setting("Tiles between snapshots.", 16)
    resume: Path | None = setting("Go on from this directory's snapshots.", shown="none")
    sources: Mapping[str, Source] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def make(
        cls,
        *,
        config: Path | None = None,
        state: tuple[str, Mapping[str, Any]] | None = None,
        **asked: Any,
    ) -> "Settings":
        """Settings from what was asked (None: not asked), from a state (its name and values), and from the rest.

        Raises UsageError that names the flag, variable or file which the wrong value came from.
        """
        known = table()
        for name in asked:
            if name not in known:
                raise UsageError(f"{name!r} is no option; {_near(name, known)}")
        layers = [
            (Source("flag"), {name: value for name, value in asked.items() if value is not None}),
            (Source("state", state[0]) if state else Source("state"), state[1] if state else {}),
            (Source("environment"), {n: os.environ[s.env] for n, s in known.items() if s.env and s.env in os.environ}),
            (Source("file", str(config)), _read_file(config) if config is not None else {}),
        ]
        profile = next((values["profile"] for _, values in layers if "profile" in values), None)
        if profile in PROFILES:
            layers.append((Source("profile", profile), PROFILES[profile]))
        values, sources = {}, {}
        for name, row in known.items():
            for source, given in layers:
                if name in given:
                    where = {"flag": _flag(row, given[name]), "environment": row.env}.get(source.kind, source.where)
                    sources[name] = Source(source.kind, where or "")
                    values[name] = _checked(row, given[name], sources[name])
                    break
        settings = cls(**values, sources=sources)
        if not settings.mem_watchdog:
            for name in known:
                if name.startswith("mem_") and sources.get(name, Source("")).kind == "flag" and name != "mem_watchdog":
                    raise UsageError(
                        f"{sources[name].where} has no effect without the watchdog ({settings.named('mem_watchdog')}); "
                        "leave one of them out"
                    )
        return settings

    def source(self, name: str) -> Source:
        """Where a setting's value came from."""
        return self.sources.get(name, Source("default"))

    def named(self, name: str) -> str:
        """What an error calls a setting: the flag, the variable, or its place in a file or profile."""
        return _named(table()[name], self.source(name))


def cache_dir() -> Path:
    """Where this user's caches of the program live."""
    default = Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache")
    return Path(os.environ.get("XDG_CACHE_HOME") or default) / "xlstm-ray"


@cache
def table() -> dict[str, Setting]:
    """Every setting by name, in the order of the help."""
    hints = get_type_hints(Settings)
    rows = {}
    for f in fields(Settings):
        if f.name != "sources":
            (kind, *_) = [k for k in get_args(hints[f.name]) if k is not NoneType] or [hints[f.name]]
            kind = tuple if isinstance(f.default, tuple) else kind
            rows[f.name] = Setting(f.name, kind, f.default, **f.metadata)
    return rows


def _flag(row: Setting, value: Any) -> str:
    """The flag that sets this value."""
    yes, _, no = (row.flags or row.name).partition("/")
    return no if no and value is False else yes


def _named(row: Setting, source: Source) -> str:
    if source.kind in ("flag", "environment"):
        return source.where
    if source.kind == "default":
        return _flag(row, row.default) if row.flags else row.env or row.name
    return f"{row.name} of {source}" if source.kind != "file" else f"{source.where}: {row.name}"


def _checked(row: Setting, value: Any, source: Source) -> Any:
    """The value as it will be used; the UsageError says what was given, where, and what is allowed."""
    try:
        return row.accept(row.parse(value) if source.kind == "environment" else value)
    except (ValueError, TypeError):
        raise UsageError(f"{_named(row, source)} is {value!r}; allowed: {row.allowed}") from None


def _near(name: str, known: Mapping[str, Any]) -> str:
    near = get_close_matches(name.replace("-", "_"), known, 3)
    return f"did you mean {' or '.join(near)}?" if near else f"there are: {', '.join(known)}"


def _read_file(path: Path) -> dict[str, Any]:
    """The settings of a TOML file; its paths are relative to its directory."""
    import tomllib

    try:
        with open(path, "rb") as file:
            values = tomllib.load(file)
    except OSError as err:
        raise UsageError(f"--config {path}: cannot be read ({err.strerror})") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as err:
        raise UsageError(f"--config {path}: is not TOML ({err})") from None
    known = {name: row for name, row in table().items() if row.in_file}
    for name, value in values.items():
        if name not in known:
            raise UsageError(f"--config {path}: {name!r} is no setting; {_near(name, known)}")
        values[name] = _checked(known[name], value, Source("file", str(path)))
        if known[name].kind is Path:
            values[name] = path.parent / values[name]
    return values
