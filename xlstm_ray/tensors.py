"""The tensors of a model in the Hugging Face layout: names, shapes, and where a projection's rows are."""

import torch

from xlstm_ray.config import ModelConfig

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


def itemsize_of(name: str, dtype: torch.dtype, *, float8: bool = False) -> int:
    """Bytes of one element of that tensor after loading in `dtype`: gates and sLSTM layers are float32.

    float8: the large matrices of blocks are quantized.
    """
    exact = (".igate_preact.", ".fgate_preact.", ".ifgate_preact.", ".slstm_layer.")
    if any(part in name for part in exact):
        return 4
    return 1 if float8 and ".blocks." in name and "norm" not in name else dtype.itemsize
