"""The tensors of a model in the Hugging Face layout: names, shapes, and where a projection's rows are."""

from collections.abc import Mapping
from math import prod
from typing import NamedTuple

import torch

from xlstm_ray.config import ModelConfig

SCALE, ZERO = "_scale", "_zero"  # after the name of a quantized tensor
_MATRICES = tuple(
    f"{name}.weight"
    for name in (
        *("mlstm_layer.q", "mlstm_layer.k", "mlstm_layer.v", "mlstm_layer.ogate_preact", "mlstm_layer.qkv_opreact"),
        *("mlstm_layer.out_proj", "ffn.proj_up_gate", "ffn.proj_up", "ffn.proj_up_gate_z", "ffn.proj_down"),
    )
)
EMBEDDING, OUT_NORM, HEAD = "backbone.embeddings.weight", "backbone.out_norm.weight", "lm_head.weight"
# An sLSTM's gates i, f, z, o, and the published tensor of each. The names of the first two are swapped: the published
# layer feeds the tensor named fgate into the cell's input i, and igate into f.
SLSTM_GATES = "fgate", "igate", "zgate", "ogate"


def projections(config: ModelConfig) -> dict[str, tuple[str, int, int]]:
    """Where a projection's rows are: ours -> (theirs, first row, rows). The two weight modes differ only here."""
    qk, v, nh, ffn = config.qk_dim, config.v_dim, config.num_heads, config.ffn_dim
    if config.weight_mode == "single":
        return {
            "q": ("mlstm_layer.q", 0, qk),
            "k": ("mlstm_layer.k", 0, qk),
            "v": ("mlstm_layer.v", 0, v),
            "o": ("mlstm_layer.ogate_preact", 0, v),
            "i": ("mlstm_layer.igate_preact", 0, nh),
            "f": ("mlstm_layer.fgate_preact", 0, nh),
            "gate": ("ffn.proj_up_gate", 0, ffn),
            "up": ("ffn.proj_up", 0, ffn),
        }
    return {
        "q": ("mlstm_layer.qkv_opreact", 0, qk),
        "k": ("mlstm_layer.qkv_opreact", qk, qk),
        "v": ("mlstm_layer.qkv_opreact", 2 * qk, v),
        "o": ("mlstm_layer.qkv_opreact", 2 * qk + v, v),
        "i": ("mlstm_layer.ifgate_preact", 0, nh),
        "f": ("mlstm_layer.ifgate_preact", nh, nh),
        "gate": ("ffn.proj_up_gate_z", 0, ffn),
        "up": ("ffn.proj_up_gate_z", ffn, ffn),
    }


def expected_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor's name and shape, without out norm and head: the files decide about these (see Checkpoint)."""
    D, table = config.hidden_size, projections(config)
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, D)}
    for n in range(config.num_blocks):
        at = f"backbone.blocks.{n}."
        slstm = n in config.slstm_at
        rows: dict[str, int] = {}
        for name, start, count in table.values():
            if not (slstm and name.startswith("mlstm_layer.")):
                rows[name] = max(rows.get(name, 0), start + count)
        linears = {name: (count, D) for name, count in rows.items()}
        linears["ffn.proj_down"] = (D, config.ffn_dim)
        if slstm:
            nh, dh = config.num_heads, config.dh
            shapes |= {f"{at}slstm_layer.{gate}.weight": (nh, dh, dh) for gate in SLSTM_GATES}
            shapes[f"{at}slstm_layer.slstm_cell._recurrent_kernel_"] = (nh, dh, 4 * dh)
            shapes[f"{at}slstm_layer.slstm_cell._bias_"] = (4 * D,)
            shapes[f"{at}slstm_layer.group_norm.weight"] = (D,)
            norms = {"norm_slstm": D, "norm_ffn": D}
        else:
            linears["mlstm_layer.out_proj"] = (D, config.v_dim)
            norms = {"norm_mlstm": D, "norm_ffn": D, "mlstm_layer.multihead_norm": config.v_dim}
        for name, shape in linears.items():
            shapes[f"{at}{name}.weight"] = shape
            if config.use_bias or "gate_preact" in name and "ogate" not in name:
                shapes[f"{at}{name}.bias"] = shape[:1]
        for name, size in norms.items():
            shapes[f"{at}{name}.weight"] = (size,)
            if config.use_bias:
                shapes[f"{at}{name}.bias"] = (size,)
    return shapes


def is_quantized(config: ModelConfig, name: str) -> bool:
    """Whether the files have integers of that tensor."""
    q = config.quantization
    if q is None or name in (EMBEDDING, HEAD):
        return q is not None and {EMBEDDING: q.embedding, HEAD: q.head}[name]
    return name.endswith(_MATRICES)


def stored_tensors(config: ModelConfig, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """What the files have of tensors of these shapes. A byte of 4-bit integers has two columns, the first in its low
    half; scales and zeros have a column for each group."""
    stored = dict(shapes)
    for name, (rows, columns) in ((n, shape) for n, shape in shapes.items() if is_quantized(config, n)):
        assert config.quantization is not None
        groups = -(-columns // config.quantization.group_size)
        stored[name] = rows, -(-columns * config.quantization.bits // 8)
        stored[name + SCALE] = rows, groups
        if config.quantization.bits == 4:
            stored[name + ZERO] = rows, groups
    return stored


def bytes_of(
    config: ModelConfig, name: str, shape: tuple[int, ...], dtype: torch.dtype, *, float8: bool = False
) -> int:
    """Bytes of a stored tensor after loading in `dtype`. float8: as in itemsize_of."""
    return prod(shape) * (1 if is_quantized(config, name) else itemsize_of(name, dtype, float8=float8))


class Sizes(NamedTuple):
    """Bytes of weights after loading: of the embedding, of each block, of the out norm and the head."""

    first: int
    blocks: list[int]
    last: int
    tied: bool  # the embedding is the head too: a last stage that is not the first has a second copy

    @property
    def all(self) -> int:
        return self.first + sum(self.blocks) + self.last

    @property
    def of_last(self) -> int:
        """What the last of several stages has besides its blocks."""
        return self.last + self.first * self.tied


def sizes_of(
    config: ModelConfig, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, *, float8: bool = False
) -> Sizes:
    """The sizes of stored tensors of these names and shapes, loaded in `dtype`. float8: as in itemsize_of."""
    size = {name: bytes_of(config, name, shape, dtype, float8=float8) for name, shape in shapes.items()}
    blocks = [sum(size[n] for n in size if n.startswith(f"backbone.blocks.{b}.")) for b in range(config.num_blocks)]
    last = sum(n for name, n in size.items() if name.startswith((OUT_NORM, HEAD)))
    first = sum(n for name, n in size.items() if name.startswith(EMBEDDING))
    return Sizes(first, blocks, last, HEAD not in size)


def whole_bytes(config: ModelConfig, dtype: torch.dtype, rows: int | None = None) -> int:
    """Bytes that a block's largest matrix takes where integers become numbers for a product, in `dtype`; 0 without
    integers. rows: of it that are made at a time, if not all."""
    if config.quantization is None:
        return 0
    elements = stacked_elements(config)
    if rows is not None:
        elements = min(elements, rows * max(config.hidden_size, config.ffn_dim))
    return elements * dtype.itemsize


def reading_bytes(config: ModelConfig, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Bytes that the largest matrix takes while it is read, beside its place; 0 without integers. shapes: of the model.

    Integers of 8 bits are put in order from a copy; those of 4 bits are a byte each until then, and lie there twice.
    """
    whole = [prod(shape) for name, shape in shapes.items() if is_quantized(config, name)]
    if config.quantization is None or not whole:
        return 0
    return max(*whole, stacked_elements(config)) * (2 if config.quantization.bits == 4 else 1)


def stacked_elements(config: ModelConfig) -> int:
    """Elements of a block's largest matrix: the rows of gate and up, or of q, k, v and the output gate."""
    return max(2 * config.ffn_dim, 2 * config.qk_dim + 2 * config.v_dim) * config.hidden_size


def itemsize_of(name: str, dtype: torch.dtype, *, float8: bool = False) -> int:
    """Bytes of one element of that tensor after loading in `dtype`: gates and sLSTM layers are float32.

    float8: the large matrices of blocks are quantized.
    """
    exact = (".igate_preact.", ".fgate_preact.", ".ifgate_preact.", ".slstm_layer.")
    if any(part in name for part in exact):
        return 4
    return 1 if float8 and ".blocks." in name and "norm" not in name else dtype.itemsize
