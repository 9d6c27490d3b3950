"""ModelConfig: what config.json of an xLSTM-Large model says, checked, with the derived sizes. No torch here."""

import json
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from xlstm_ray.errors import ConfigError

Size = Annotated[int, Field(gt=0, le=1 << 24, strict=True)]
Factor = Annotated[float, Field(gt=0, le=64, allow_inf_nan=False)]
Epsilon = Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)]
Cap = Annotated[float, Field(gt=0, allow_inf_nan=False)]
TokenId = Annotated[int, Field(ge=0, strict=True)]


def _id_list(value: Any) -> Any:
    """eos_token_id is written as a number, a list or null."""
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else (value,)


class ModelConfig(BaseModel):
    """The keys of config.json (model_type xlstm) that change what the model computes.

    Keys that choose other programs' kernels (chunkwise_kernel: chunkwise--triton_xl_chunk, ...) or describe training
    do not change the function and are not read, except `chunk_size` and a `chunkwise_kernel` that is ours.
    """

    model_config = ConfigDict(frozen=True, extra="ignore", protected_namespaces=())

    vocab_size: Size
    hidden_size: Size
    num_blocks: Annotated[int, Field(gt=0, le=4096, strict=True)]
    num_heads: Size
    qk_dim_factor: Factor = 0.5
    v_dim_factor: Factor = 1.0
    ffn_proj_factor: Factor = 2.667
    ffn_round_up_to_multiple_of: Size = 64
    use_bias: Annotated[bool, Field(strict=True)] = False
    add_out_norm: Annotated[bool, Field(strict=True)] = True
    tie_word_embeddings: Annotated[bool, Field(strict=True)] = False
    norm_eps: Epsilon = 1e-6
    eps: Epsilon = 1e-6
    gate_soft_cap: Cap | None = 15.0
    output_logit_soft_cap: Cap | None = 30.0
    weight_mode: Annotated[str, Field(pattern="^(single|fused)$")] = "single"
    chunk_size: Annotated[int, Field(gt=0, le=1 << 16, strict=True)] = 64
    chunkwise_kernel: Annotated[str, Field(strict=True)] = "chunkwise--native_autograd"
    bos_token_id: TokenId | None = None
    eos_token_id: Annotated[tuple[TokenId, ...], BeforeValidator(_id_list)] = ()
    force_bos_token_insert: Annotated[bool, Field(strict=True)] = False

    @model_validator(mode="before")
    @classmethod
    def _names_of_either_library(cls, data: Any) -> Any:
        """hidden_size and num_blocks have two names each: transformers' and the xlstm package's."""
        if not isinstance(data, dict):
            raise ValueError("must be a JSON object")
        data = dict(data)
        if data.get("model_type") != "xlstm":
            raise ValueError(f"model_type is {data.get('model_type')!r}, only 'xlstm' is served")
        for name, other in (("hidden_size", "embedding_dim"), ("num_blocks", "num_hidden_layers")):
            first, second = data.get(name), data.get(other)
            if first is not None and second is not None and first != second:
                raise ValueError(f"{name} is {first!r} but {other} is {second!r}; they name the same size")
            value = first if first is not None else second
            if value is None:
                raise ValueError(f"{name} (or {other}) is missing")
            data[name] = value
        if data.get("force_bos_token_insert") and data.get("bos_token_id") is None:
            raise ValueError("force_bos_token_insert is true but bos_token_id is missing")
        for name, served in _ONLY.items():
            if name in data and data[name] not in served:
                allowed = " or ".join(repr(value) for value in served)
                raise ValueError(f"{name} is {data[name]!r}, which cannot be honoured; allowed: {allowed}")
        return data

    @model_validator(mode="after")
    def _sizes_fit(self) -> "ModelConfig":
        for name, size in (("qk_dim_factor", self.qk_dim), ("v_dim_factor", self.v_dim)):
            if size < self.num_heads or size % self.num_heads:
                raise ValueError(
                    f"hidden_size {self.hidden_size} x {name} = {size} cannot be split into num_heads {self.num_heads}"
                )
        if self.force_bos_token_insert and self.bos_token_id is not None and self.bos_token_id >= self.vocab_size:
            raise ValueError(f"bos_token_id {self.bos_token_id} is outside the vocabulary of {self.vocab_size}")
        return self

    @property
    def qk_dim(self) -> int:
        return int(self.hidden_size * self.qk_dim_factor)

    @property
    def v_dim(self) -> int:
        return int(self.hidden_size * self.v_dim_factor)

    @property
    def dhqk(self) -> int:
        """K: the head dimension of q and k."""
        return self.qk_dim // self.num_heads

    @property
    def dhhv(self) -> int:
        """V: the head dimension of v."""
        return self.v_dim // self.num_heads

    @property
    def ffn_dim(self) -> int:
        multiple = self.ffn_round_up_to_multiple_of
        return int((self.hidden_size * self.ffn_proj_factor + multiple - 1) // multiple * multiple)

    @classmethod
    def from_dict(cls, data: object, *, source: str = "the configuration") -> "ModelConfig":
        """Check `data`; ConfigError names `source` and the key."""
        try:
            return cls.model_validate(data)
        except ValidationError as err:
            first = err.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            what = first["msg"].removeprefix("Value error, ")
            given = f" (given: {str(first['input'])[:80]!r})" if where else ""
            raise ConfigError(f"{source}: {where + ': ' if where else ''}{what}{given}") from None

    @classmethod
    def from_file(cls, path: Path) -> "ModelConfig":
        """Read and check config.json; ConfigError in one line where it cannot be read or honoured."""
        try:
            text = path.read_bytes().decode("utf-8")
        except OSError as err:
            raise ConfigError(f"{path}: cannot be read ({err.strerror}); a model directory has a config.json") from None
        except UnicodeDecodeError as err:
            raise ConfigError(f"{path}: is not UTF-8 text ({err.reason} at byte {err.start})") from None
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as err:
            raise ConfigError(f"{path}: is not JSON ({err})") from None
        return cls.from_dict(data, source=str(path))


# Values other than these would change the function that the model computes into one that is not implemented.
_ONLY: dict[str, tuple[Any, ...]] = {
    "add_qk_norm": (False, None),
    "add_post_norm": (False, None),
    "add_embedding_dropout": (False, None),
    "slstm_at": ([], None),
    "inference_state_dtype": ("float32", None),
    "norm_reduction_force_float32": (True, None),
    "return_last_states": (True, None),
}
