"""Every setting: flags and environment variables into one frozen object. The only reader of the environment."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from xlstm_ray.errors import UsageError

DEVICES = ("auto", "mps", "cuda", "cpu")
DTYPES = ("auto", "float32", "bfloat16")
DEFAULT_BACKEND = "queued_compiled_chunks"

Count = Annotated[int, Field(gt=0, le=1 << 16)]


class Settings(BaseSettings):
    """What the user asked for; None where nothing was asked. A flag wins over its environment variable.

    tile_size and chunk_size are in tokens, heads_per_band in heads, workers in threads.
    """

    model_config = SettingsConfigDict(frozen=True, extra="forbid", populate_by_name=True, protected_namespaces=())

    model: Path | None = None
    device: Annotated[str, Field(pattern=f"^({'|'.join(DEVICES)})$")] = "auto"
    dtype: Annotated[str, Field(pattern=f"^({'|'.join(DTYPES)})$")] = "auto"
    chunkwise_backend: Annotated[str | None, Field(validation_alias="XLSTM_CHUNKWISE_BACKEND")] = None
    tile_size: Count | None = None
    chunk_size: Count | None = None
    heads_per_band: Annotated[Count | None, Field(validation_alias="XLSTM_MPS_HEADS_PER_BAND")] = None
    workers: Annotated[Annotated[int, Field(gt=0, le=256)] | None, Field(validation_alias="XLSTM_MPS_WORKERS")] = None
    t_inner: Annotated[int, Field(gt=0, le=64, validation_alias="XLSTM_T_INNER")] = 8
    enable_mps_fallback: Annotated[bool, Field(validation_alias="PYTORCH_ENABLE_MPS_FALLBACK")] = False

    @classmethod
    def settings_customise_sources(  # type: ignore[override]
        cls, settings_cls: Any, init_settings: Any, env_settings: Any, **_: Any
    ) -> Any:
        """Arguments, then the environment; only variables named here are read."""
        return init_settings, env_settings

    @classmethod
    def make(cls, **asked: Any) -> "Settings":
        """Settings from what was asked (None: not asked) and the environment; UsageError names the setting."""
        try:
            return cls(**{name: value for name, value in asked.items() if value is not None})
        except ValidationError as err:
            first = err.errors()[0]
            name = str(first["loc"][0])
            if first["type"] == "extra_forbidden":
                raise UsageError(f"{name!r} is no option; there are: {', '.join(cls.model_fields)}") from None
            flag = name if name.isupper() else "--" + name.replace("_", "-")
            allowed = {"device": DEVICES, "dtype": DTYPES}.get(name)
            what = f"allowed: {', '.join(allowed)}" if allowed else first["msg"].replace("Input", "it")
            raise UsageError(f"{flag} is {str(first['input'])!r}; {what}") from None
