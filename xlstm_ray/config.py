"""ModelConfig: what config.json of an xLSTM-Large model says, checked, with the derived sizes. No torch here."""

import json
from collections import Counter
from math import prod
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from xlstm_ray.errors import ConfigError, XlstmRayError
from xlstm_ray.files import is_lfs_pointer, lfs_advice

Size = Annotated[int, Field(gt=0, le=1 << 24, strict=True)]
Factor = Annotated[float, Field(gt=0, le=64, allow_inf_nan=False, strict=True)]
Epsilon = Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False, strict=True)]
Cap = Annotated[float, Field(ge=1e-6, le=1e6, allow_inf_nan=False, strict=True)]  # cap tanh(x / cap) fits float32
BlockIndex = Annotated[int, Field(ge=0, strict=True)]
TokenId = Annotated[int, Field(ge=0, strict=True)]
DTYPES = "float32", "bfloat16", "float16", "float64"


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {_shown(twice)} is there twice")
    return found


def parse_json(data: bytes) -> Any:
    """Parse JSON in UTF-8. Raises ValueError or RecursionError if it is not JSON or an object has a key twice."""
    return json.loads(data.decode("utf-8"), object_pairs_hook=_unique)


def read_json(path: Path, error: type[XlstmRayError]) -> Any:
    """The JSON value in a file; `error`, in one line, where it cannot be read."""
    try:
        if path.exists() and not path.is_file():
            raise error(f"{path}: is not a file")  # reading a pipe would wait
        return parse_json(path.read_bytes())
    except FileNotFoundError:
        raise error(f"{path}: is missing; a model directory has config.json, tokenizer.json and weights") from None
    except OSError as err:
        raise error(f"{path}: cannot be read ({err.strerror})") from None
    except UnicodeDecodeError as err:
        raise error(f"{path}: is not UTF-8 text ({err.reason} at byte {err.start})") from None
    except (ValueError, RecursionError) as err:
        if is_lfs_pointer(path):
            raise error(lfs_advice(path)) from None
        raise error(f"{path}: is not JSON ({err})") from None


def _shown(value: object) -> str:
    """A value from a file, short and printable for an error message."""
    return repr(value)[:80]


def _one_edit_apart(a: str, b: str) -> bool:
    """Whether changing, adding or removing one letter turns one into the other."""
    a, b = sorted((a.lower(), b.lower()), key=len)
    n = next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), len(a))
    return a[n + (len(a) == len(b)) :] == b[n + 1 :]


def _no_id(value: Any) -> bool:
    """Exporters write null or -1 for "there is none"."""
    return value is None or (type(value) is int and value == -1)


def _id(value: Any) -> Any:
    return None if _no_id(value) else value


def _id_list(value: Any) -> Any:
    """eos_token_id is written as a number, a list or null."""
    ids = value if isinstance(value, list) else [value]
    return tuple(one for one in ids if not _no_id(one))


def _dtype_name(value: Any) -> Any:
    """The name of a dtype; older writers put "torch." before it."""
    name = value.removeprefix("torch.") if isinstance(value, str) else value
    if name is not None and name not in DTYPES:
        raise ValueError(f"allowed: {', '.join(DTYPES)}")
    return name


def _block_indices(value: Any) -> Any:
    """slstm_at is written as a list or null; "all" is handled by the check that knows the number of blocks."""
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else value


class Quantization(BaseModel):
    """How the matrices of a model are stored: integers of `bits`, with a scale for each `group_size` columns of a row.

    embedding, head: whether these are, too; all large matrices of blocks are.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    bits: Literal[4, 8]
    group_size: Literal[32, 64, 128]
    embedding: Annotated[bool, Field(strict=True)] = False
    head: Annotated[bool, Field(strict=True)] = False


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
    slstm_at: Annotated[tuple[BlockIndex, ...], BeforeValidator(_block_indices)] = ()  # the blocks that are sLSTM
    bos_token_id: Annotated[TokenId | None, BeforeValidator(_id)] = None
    eos_token_id: Annotated[tuple[TokenId, ...], BeforeValidator(_id_list)] = ()
    force_bos_token_insert: Annotated[bool, Field(strict=True)] = False
    quantization: Quantization | None = None
    # The dtype that the model is meant for. It does not change what the model computes: not part of its identity.
    dtype: Annotated[str | None, BeforeValidator(_dtype_name)] = Field(None, exclude=True)

    @model_validator(mode="before")
    @classmethod
    def _names_of_either_library(cls, data: Any) -> Any:
        """hidden_size and num_blocks have two names each: transformers' and the xlstm package's."""
        if not isinstance(data, dict):
            raise ValueError("must be a JSON object")
        data = dict(data)
        if data.get("model_type") != "xlstm":
            raise ValueError(f"model_type is {_shown(data.get('model_type'))}, only 'xlstm' is served")
        # Keys of other programs are ignored. A misspelt key of ours is refused: it would silently mean its default.
        for name in (name for name in data if name not in _KNOWN):
            missing = sorted(_KNOWN - set(data))  # eod_token_id is another key, not a misspelt eos_token_id
            meant = next((known for known in missing if _one_edit_apart(name, known)), None)
            if meant:
                raise ValueError(f"{_shown(name)} is not a known key; is {meant} meant?")
        for name, other in (("hidden_size", "embedding_dim"), ("num_blocks", "num_hidden_layers")):
            first, second = data.get(name), data.get(other)
            if first is not None and second is not None and first != second:
                raise ValueError(f"{name} is {_shown(first)} but {other} is {_shown(second)}; they name the same size")
            value = first if first is not None else second
            if value is None:
                raise ValueError(f"{name} (or {other}) is missing")
            data[name] = value
        if data.get("slstm_at") == "all" and isinstance(data["num_blocks"], int):
            data["slstm_at"] = list(range(min(data["num_blocks"], 4096)))
        if data.get("dtype") is None:
            data["dtype"] = data.get("torch_dtype")  # its older name
        if data.get("force_bos_token_insert") and _no_id(data.get("bos_token_id")):
            raise ValueError("force_bos_token_insert is true but bos_token_id is missing")
        for name, served in _ONLY.items():
            if name in data and data[name] not in served:
                allowed = " or ".join(repr(value) for value in served)
                raise ValueError(f"{name} is {_shown(data[name])}, which cannot be honoured; allowed: {allowed}")
        return data

    @model_validator(mode="after")
    def _sizes_fit(self) -> "ModelConfig":
        for name, size in (("qk_dim_factor", self.qk_dim), ("v_dim_factor", self.v_dim)):
            if size < self.num_heads or size % self.num_heads:
                raise ValueError(
                    f"hidden_size {self.hidden_size} x {name} = {size} cannot be split into num_heads {self.num_heads}"
                )
        odd = next((n for n in self.slstm_at if n >= self.num_blocks), None)
        if odd is not None:
            raise ValueError(f"slstm_at names block {odd}, but there are blocks 0 to {self.num_blocks - 1}")
        if len(set(self.slstm_at)) < len(self.slstm_at):
            twice, _ = Counter(self.slstm_at).most_common(1)[0]
            raise ValueError(f"slstm_at names block {twice} twice")
        if self.slstm_at and self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} cannot be split into num_heads {self.num_heads}, as slstm_at asks"
            )
        if self.quantization and self.tie_word_embeddings and self.quantization.head != self.quantization.embedding:
            raise ValueError("quantization: the embedding is the head too, so both are quantized or none")
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
    def dh(self) -> int:
        """DH: the head dimension of an sLSTM block."""
        return self.hidden_size // self.num_heads

    def begun(self, tokens: list[int]) -> list[int]:
        """The tokens of a text, behind the begin token if the model wants it and they lack it."""
        begin = [self.bos_token_id] if self.force_bos_token_insert and self.bos_token_id is not None else []
        return tokens if tokens[:1] == begin else [*begin, *tokens]

    def state_shapes(self, n: int, heads: int) -> dict[str, tuple[int, ...]]:
        """The tensors of block n's state for one row and `heads` heads, by name; heads are dimension 0."""
        if n in self.slstm_at:
            return dict.fromkeys("hcnm", (heads, self.dh))
        return {"C": (heads, self.dhqk, self.dhhv), "n": (heads, self.dhqk), "m": (heads, 1)}

    def state_file_bytes(self, rows: int) -> int:
        """An upper bound for the file size of a saved state of `rows` prompts: float32 tensors and their header."""
        shapes = [shape for n in range(self.num_blocks) for shape in self.state_shapes(n, self.num_heads).values()]
        return rows * (4 * (sum(map(prod, shapes)) + self.vocab_size) + 256) + 128 * len(shapes) + 4096

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
            given = f" (given: {_shown(first['input'])})" if where else ""
            raise ConfigError(f"{source}: {where + ': ' if where else ''}{what}{given}") from None

    @classmethod
    def from_file(cls, path: Path) -> "ModelConfig":
        """Read and check config.json; ConfigError in one line where it cannot be read or honoured."""
        return cls.from_dict(read_json(path, ConfigError), source=str(path))


# Any other value would select a function that is not implemented.
_ONLY: dict[str, tuple[Any, ...]] = {
    "add_qk_norm": (False, None),
    "add_post_norm": (False, None),
    "add_embedding_dropout": (False, None),
    "inference_state_dtype": ("float32", None),
    "norm_reduction_force_float32": (True, None),
    "return_last_states": (True, None),
}
_KNOWN = {*ModelConfig.model_fields, *_ONLY, "model_type", "embedding_dim", "num_hidden_layers"}
