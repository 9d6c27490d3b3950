"""Every setting, once: its flag, its environment variable, its bounds. Only this module reads these variables.

The order of precedence: flag (or argument in Python), the state that a run goes on from, environment variable,
`--config FILE`, `--profile NAME`, the model's config.json (the engine reads it), default. `--help` is made from the
fields of Settings.
"""

import os
from collections import ChainMap
from collections.abc import Mapping
from contextlib import suppress
from difflib import get_close_matches
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, ModelWrapValidatorHandler, SkipValidation, TypeAdapter, ValidationError, model_validator
from pydantic.fields import FieldInfo
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    InitSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from xlstm_ray import hub
from xlstm_ray.declare import Actions, File, Setting, Share, Source, Stages, count, refuse_unknown, setting
from xlstm_ray.errors import UsageError
from xlstm_ray.files import JOURNAL_FILE, LOG, STATE, Input, Output
from xlstm_ray.profiles import PROFILES

DEFAULT_BACKEND = "queued_compiled_chunks"


class Settings(BaseSettings):
    """What the user asked for; None if a setting was not given and has no fixed default.

    Sizes are in tokens, heads_per_band in heads, mem_*_mb in MiB, mem_*_pct are fractions, mem_poll_ms is in ms.
    """

    model_config = SettingsConfigDict(frozen=True, strict=True, extra="forbid", case_sensitive=True)

    model: File = setting(
        "A model directory, or owner/name[@revision] on the Hugging Face hub.", shown="the demo model"
    )
    device: Literal["auto", "mps", "cuda", "cpu"] = setting(
        "auto, mps, cuda or cpu.", "auto", shown="auto, the first that this machine has"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float8"] = setting(
        "auto, float32, bfloat16, or float8 (less exact; on NVIDIA Hopper GPUs).",
        "auto",
        shown="auto, bfloat16 on a GPU; on the CPU by model and speed",
    )
    chunkwise_backend: str | None = setting(
        "queued_compiled_chunks, queued_compiled_steps, queued_triton_chunks (NVIDIA Hopper GPUs), the same with ray_, "
        "or native (the eager reference).",
        shown="the model's, else queued_triton_chunks where it serves, else queued_compiled_chunks",
        env="XLSTM_CHUNKWISE_BACKEND",
        min_length=1,
    )
    tile_size: int | None = count("Tokens of a tile, a multiple of the chunk size.", shown="by device")
    chunk_size: int | None = count("Tokens of a chunk.", shown="the model's")
    heads_per_band: int | None = count("Heads of a band.", shown="all; 4 on mps", env="XLSTM_MPS_HEADS_PER_BAND")
    workers: int = count("Threads that work on bands, at most one for each band.", 6, env="XLSTM_MPS_WORKERS", high=256)
    streams: int | None = count(
        "CUDA streams that the threads share.", shown="one a thread", flag=None, env="XLSTM_MPS_STREAMS", high=256
    )
    t_inner: int = count("Steps unrolled in a compiled call, for step kernels.", 8, env="XLSTM_T_INNER", high=64)
    autoscale: bool = setting(
        "Probe this machine for heads of a band, workers and tile size, once for a model and device.",
        False,
        env="XLSTM_MPS_AUTOSCALE",
    )
    autoscale_again: bool = setting("Probe again, even if a result is kept.", False)
    warmup: bool = setting("Compile before the first tile, not on first use.", True, env="XLSTM_MPS_WARMUP")
    cuda_graphs: bool = setting("On CUDA, decode a token of all rows as one graph.", True)
    enable_mps_fallback: bool = setting(
        "Refused on mps: operators would leave the GPU silently.", False, flag=None, env="PYTORCH_ENABLE_MPS_FALLBACK"
    )
    mem_watchdog: bool = setting("Watch memory during prefill.", True, env="XLSTM_MEM_WATCHDOG")
    mem_soft_pct: Share = setting("Soft limit as a fraction of the machine's memory.", 0.85, env="XLSTM_MEM_SOFT_PCT")
    mem_hard_pct: Share = setting("Hard limit as a fraction of the machine's memory.", 0.92, env="XLSTM_MEM_HARD_PCT")
    mem_soft_mb: int | None = count("Soft limit in MiB.", shown="the fraction", env="XLSTM_MEM_SOFT_MB", high=1 << 30)
    mem_hard_mb: int | None = count("Hard limit in MiB.", shown="the fraction", env="XLSTM_MEM_HARD_MB", high=1 << 30)
    mem_poll_ms: int = count("Milliseconds between samples of memory.", 200, env="XLSTM_MEM_POLL_MS", high=60_000)
    mem_action: Actions = setting(
        "What a soft limit does besides shrinking: warn, or warn,empty_cache.",
        ("warn", "empty_cache"),
        env="XLSTM_MEM_ACTION",
    )
    shrink_on_soft: bool = setting(
        "At a soft limit, halve the tile, then the chunk.", True, flag="--mem-shrink", env="XLSTM_SHRINK_ON_SOFT"
    )
    min_chunk: int = count("The smallest chunk that shrinking makes, in tokens.", 8, env="XLSTM_MIN_CHUNK")
    mem_log: File = setting("Write the watchdog's samples to this CSV file.", shown="none")
    force: bool = setting(
        "Start even if the computed memory need does not fit. The hard limit still ends a run "
        "unless `mem_watchdog=False`. Disk space, devices of a cluster and files of other programs "
        "(see `overwrite=True`) are still checked.",
        False,
    )
    stats_log: File = setting("Write a row for each tile, or each answer to a line, to this CSV file.", shown="none")
    overwrite: bool = setting("Outputs may replace files that this program did not write.", False)
    profile: Literal["high-memory-256gb"] | None = setting(f"A set of settings: {', '.join(PROFILES)}.", shown="none")
    stages: Stages = setting(
        "Stages, ranges of blocks with actors of their own: how many, the blocks of each (5,3), or auto: by the "
        "measured speed and memory of each node.",
        1,
        allowed="a whole number from 1 to 65536, the blocks of each stage with commas between, or auto",
    )
    spans: int = count("Actors with all blocks, to which a prompt's tiles go in turn; instead of stages.", 1, high=1024)
    threads: int | None = count("CPU threads of each worker.", shown="an equal share of the cores", high=1024)
    ray_local_mode: bool = setting(
        "Run the ray_ backends in this process, without Ray.", True, env="XLSTM_RAY_LOCAL_MODE"
    )
    ray_autoshutdown: bool = setting(
        "Stop the Ray head that this run started.", True, flag=None, env="XLSTM_RAY_AUTOSHUTDOWN"
    )
    ray_dashboard: bool = setting("Start Ray's dashboard, on loopback.", False, env="XLSTM_RAY_DASHBOARD")
    ray_dashboard_port: int | None = count(
        "The dashboard's port.", shown="8265, or the next free one", env="XLSTM_RAY_DASHBOARD_PORT", high=65535
    )
    ray_keep_alive: bool = setting("Leave the Ray head running after the run.", False)
    ray_address: str | None = setting("HOST:PORT of a running Ray head.", shown="none", min_length=1)
    ray_token_path: File = setting("The file with that head's token.", shown="where Ray looks")
    ray_state_dir: File = setting(
        "The folder of Ray heads' records and token.", shown="~/.local/state/xlstm-ray", env="XLSTM_RAY_STATE_DIR"
    )
    ray_temp_dir: File = setting(
        "The folder of a head's sockets, logs and spilled objects; a short path.",
        shown="/tmp/xr-UID",
        env="XLSTM_RAY_TEMP_DIR",
    )
    actors_per_device: int = count("Actors that may share a GPU.", 1, high=64)
    gpu_direct: bool = setting("On CUDA, stages of one host pass tensors from GPU to GPU, not over its memory.", True)
    journal: File = setting("Write snapshots of the run to this directory.", shown="none")
    journal_every: int | None = count("Tiles between snapshots.", shown="16; 64 on cuda")
    resume: File = setting("Go on from this directory's snapshots.", shown="none")
    cache_dir: File = setting(
        "Keep states of prompts in this directory, and begin from those that are there.",
        shown="none; then there is no cache",
    )
    cache_memory_mb: int | None = count(
        "MiB of memory that kept states may take.", shown="none; 256 with a directory", high=1 << 30
    )
    cache_disk_mb: int = count("MiB that the directory's states may take.", 4096, high=1 << 30)
    cache_every: int | None = count("Tiles between two kept states.", shown="8 states a prompt at most")
    cache_match: Literal["exact", "nearest"] = setting(
        "exact: the bits of a run without a cache; nearest: go on from any state of the prompt's beginning.", "exact"
    )
    states_mb: int | None = count(
        "MiB of memory that the states of a service's documents may take.",
        shown="a quarter of what is free, up to 4096",
        high=1 << 30,
    )
    sources: SkipValidation[Mapping[str, Source]] = Field({}, repr=False)

    @classmethod
    def make(
        cls, *, config: Path | None = None, state: tuple[str, Mapping[str, Any]] | None = None, **asked: Any
    ) -> Self:
        """Settings from arguments (None: not given), a state (its name and values), and the other sources.

        Raises UsageError, which names the field, variable or file of the wrong value.
        """
        refuse_unknown(asked, _GIVEN)
        given = {**asked, "config": config, "state": state}
        return cls(**{name: value for name, value in given.items() if value is not None})

    @classmethod
    def settings_customise_sources(cls, settings_cls: Any, init_settings: Any, *_: Any, **__: Any) -> Any:
        """Merge the sources in their order, and note the source of each value."""
        flags: dict[str, Any] = dict(init_settings.init_kwargs)
        config, (state, of_state) = flags.pop("config", None), flags.pop("state", ("", {}))
        layers: dict[Source, dict[str, Any]] = {
            Source("flag"): flags,
            Source("state", state): dict(of_state),
            Source("environment"): _Environment(cls)(),
            Source("file", str(config)): _read_file(config) if config else {},
        }
        profile = str(ChainMap(*layers.values()).get("profile"))
        layers[Source("profile", profile)] = PROFILES.get(profile, {})
        sources = {name: source for source, given in reversed(layers.items()) for name in given}
        return (InitSettingsSource(cls, {**ChainMap(*layers.values()), "sources": sources}),)

    @model_validator(mode="wrap")
    @classmethod
    def _check(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """Turn pydantic's errors into one line: the source of the wrong value, and what is allowed."""
        try:
            settings = handler(data)
        except ValidationError as err:
            name = str(err.errors()[0]["loc"][0])
            row, source = table()[name], data["sources"][name]
            given = os.environ[row.env] if source.kind == "environment" else data[name]
            raise UsageError(f"{row.named(source, given)} is {given!r}; allowed: {row.allowed}") from None
        settings._refuse_without_effect()
        return settings

    def _refuse_without_effect(self) -> None:
        """Refuse flags without an effect. Variables and files are not checked: they are for other commands too."""
        cached = {"cache_dir": self.cache_dir, "cache_memory_mb": self.cache_memory_mb}
        for name, needs in (("cache_disk_mb", 1), ("cache_every", 2), ("cache_match", 2)):
            there = [value is not None for value in [*cached.values()][:needs]]
            if self.source(name).kind == "flag" and not any(there):
                ways = " or ".join(f"`{way}`" for way in [*cached][:needs])
                raise UsageError(f"{self.named(name)} has no effect without a cache; add {ways}, or leave it out")
        for which in ("soft", "hard"):
            share, mb = f"mem_{which}_pct", f"mem_{which}_mb"
            if self.source(share).kind == self.source(mb).kind == "flag":
                raise UsageError(f"{self.named(share)} has no effect beside {self.named(mb)}; leave one of them out")
        if self.source("ray_local_mode").kind == "flag" and self.ray_local_mode and self.ray_address is not None:
            raise UsageError(
                f"{self.named('ray_local_mode')} has no effect beside {self.named('ray_address')}, where actors work; "
                "leave one of them out"
            )
        off, fixed = not self.mem_watchdog, not self.shrink_on_soft
        for name in self.flags():
            if off and name != "mem_watchdog" and name.startswith(("mem_", "shrink_on_soft", "min_chunk")):
                raise UsageError(
                    f"{self.named(name)} has no effect without the watchdog ({self.named('mem_watchdog')}); "
                    "leave one of them out"
                )
            if fixed and name == "min_chunk":
                raise UsageError(
                    f"{self.named(name)} has no effect if nothing shrinks ({self.named('shrink_on_soft')}); "
                    "leave one of them out"
                )

    def flags(self) -> list[str]:
        """The settings that a flag or an argument gave."""
        return [name for name, source in self.sources.items() if source.kind == "flag"]

    def require_output(self, *more: Path | None) -> None:
        """Raise UsageError if `overwrite` was given for nothing. more: outputs besides those of settings."""
        if self.overwrite and "overwrite" in self.flags() and not (any(more) or self.outputs()):
            raise UsageError(f"{self.named('overwrite')} has no effect without an output; leave it out")

    def outputs(self) -> list[Output]:
        """The output files of these settings."""
        logs = [(name, getattr(self, name)) for name in ("stats_log", "mem_log")]
        found = [Output(self.named(name), path, LOG) for name, path in logs if path is not None]
        if self.journal or self.resume:
            name = "journal" if self.journal else "resume"
            path = getattr(self, name) / JOURNAL_FILE
            found.append(Output(self.named(name), path, STATE, makes_directory=True))
        return found

    def inputs(self) -> list[Input]:
        """The input files of these settings."""
        found = []
        if self.model:
            names = {*hub.SMALL, *hub.WEIGHTS}
            with suppress(OSError):  # reading the model later reports it
                names |= {name for name in os.listdir(self.model) if fnmatch(name, "model-*.safetensors")}
            found += [Input(self.named("model"), self.model / name) for name in sorted(names)]
        if self.ray_token_path:
            found.append(Input(self.named("ray_token_path"), self.ray_token_path))
        return found

    def source(self, name: str) -> Source:
        """The source of a setting's value."""
        source = self.sources.get(name, Source("default"))
        return source if source.where or source.kind == "default" else source._replace(where=self.named(name))

    def named(self, name: str) -> str:
        """A setting's name in errors: the field, the variable, or its place in a file or profile."""
        return table()[name].named(self.sources.get(name, Source("default")), getattr(self, name))


@cache
def table() -> dict[str, Setting]:
    """Every setting by name, in the order of the help."""
    return {name: Setting(name, field) for name, field in Settings.model_fields.items() if name != "sources"}


_GIVEN = [name for name in table() if name != "enable_mps_fallback"]  # torch itself reads that one's variable


class _Environment(EnvSettingsSource):
    """Reads only the variables of the table. A value that does not parse stays a text, which Settings refuses."""

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        row = table().get(field_name)
        return os.environ.get(row.env) if row else None, field_name, False

    def prepare_field_value(self, field_name: str, field: FieldInfo, value: Any, value_is_complex: bool) -> Any:
        if not value:
            return value  # it is not there; or "", and Path("") would be the current directory
        with suppress(ValidationError):
            return TypeAdapter[Any](field.annotation or str).validate_python(value)
        return value


def given_variables() -> dict[str, str]:
    """The environment variables that gave settings: a command that resumes the run needs them too."""
    return {row.env: os.environ[row.env] for row in table().values() if row.env in os.environ}


def unknown_variables() -> list[str]:
    """A line for each unknown environment variable that begins with XLSTM_."""
    known = {row.env.removeprefix("XLSTM_"): row.env for row in table().values()}
    ours, notes = {*known.values(), "XLSTM_RAY_API_KEY"}, []  # the last one is of `xlstm-ray client`
    for name in sorted(name for name in os.environ if name.startswith("XLSTM_") and name not in ours):
        near = [known[word] for word in get_close_matches(name.removeprefix("XLSTM_"), known, 3)]
        hint = f"did you mean {' or '.join(near)}?" if near else "xlstm-ray config --json lists the names"
        notes.append(f"the variable {name} has no effect: it is not a setting; {hint}")
    return notes


def _read_file(path: Path) -> dict[str, Any]:
    """The settings of a TOML file; its paths are relative to its directory."""
    try:
        if not path.is_file():  # the library ignores it
            raise UsageError(f"`config` {path}: cannot be read (No such file, or a directory or pipe)")
        values = TomlConfigSettingsSource(Settings, path).toml_data
    except OSError as err:
        raise UsageError(f"`config` {path}: cannot be read ({err.strerror})") from None
    except (ValueError, RecursionError) as err:
        raise UsageError(f"`config` {path}: is not TOML ({err})") from None
    refuse_unknown(values, _GIVEN, f"`config` {path}: ")
    for name, value in values.items():
        if table()[name].kind is Path and isinstance(value, str) and value:
            is_name = name == "model" and hub.is_name(Path(value), path.parent)
            values[name] = Path(value) if is_name else path.parent / value
    return values
