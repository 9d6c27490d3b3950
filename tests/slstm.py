"""Random models with sLSTM blocks in the published layout."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tiny import write_byte_tokenizer
from torch import Tensor

from xlstm_ray.config import ModelConfig

VOCABULARY = 261
CASES: dict[str, dict[str, Any]] = {
    "hybrid": {"slstm_at": [1], "num_blocks": 3},
    "all sLSTM": {"slstm_at": [0, 1], "num_blocks": 2},
    "three heads, biases": {"slstm_at": [0, 2], "num_blocks": 3, "num_heads": 3, "hidden_size": 48, "use_bias": True},
    "fused, one head": {"slstm_at": [1], "num_blocks": 2, "num_heads": 1, "weight_mode": "fused"},
    "odd sizes": {"slstm_at": [0], "num_blocks": 2, "hidden_size": 60, "num_heads": 5, "v_dim_factor": 2.0},
}


def write_model(directory: Path, *, seed: int = 0, **config: Any) -> Path:
    """A random model in the published layout. The last heads forget quickly, the first hardly ever."""
    config = {
        "model_type": "xlstm", "vocab_size": VOCABULARY, "hidden_size": 64, "num_heads": 4, "qk_dim_factor": 0.5,
        "ffn_proj_factor": 2.0, "ffn_round_up_to_multiple_of": 8, "bos_token_id": 257, "eos_token_id": 258, **config,
    }  # fmt: skip
    D, NH, sizes = config["hidden_size"], config["num_heads"], ModelConfig.from_dict(config)
    QK, V, FFN, DH = D // 2, int(D * config.get("v_dim_factor", 1)), sizes.ffn_dim, D // NH
    fused, biases = config.get("weight_mode") == "fused", config.get("use_bias", False)
    g = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}

    def draw(name: str, *shape: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
        tensors[name] = scale * torch.randn(shape, generator=g) + shift
        return tensors[name]

    def linear(name: str, rows: int, columns: int, *, scale: float = 1.0, bias: bool = biases) -> None:
        draw(f"{name}.weight", rows, columns, scale=scale * columns**-0.5)
        if bias:
            draw(f"{name}.bias", rows, scale=0.5)

    def norm(name: str, size: int) -> None:
        draw(f"{name}.weight", size, scale=0.3, shift=1)
        if biases:
            draw(f"{name}.bias", size, scale=0.3)

    draw("backbone.embeddings.weight", VOCABULARY, D)
    remember = torch.linspace(6, -1, NH)
    for n in range(config["num_blocks"]):
        at = f"backbone.blocks.{n}"
        if n in config["slstm_at"]:
            norm(f"{at}.norm_slstm", D)
            for gate in ("fgate", "igate", "zgate", "ogate"):
                draw(f"{at}.slstm_layer.{gate}.weight", NH, DH, DH, scale=2 * DH**-0.5)
            draw(f"{at}.slstm_layer.slstm_cell._recurrent_kernel_", NH, DH, 4 * DH, scale=1.5 * DH**-0.5)
            bias = 0.5 * torch.randn(NH, 4, DH, generator=g)
            bias[:, 1] += remember.unsqueeze(-1)
            tensors[f"{at}.slstm_layer.slstm_cell._bias_"] = bias.flatten()
            draw(f"{at}.slstm_layer.group_norm.weight", D, scale=0.5)
        else:
            norm(f"{at}.norm_mlstm", D)
            if fused:
                linear(f"{at}.mlstm_layer.qkv_opreact", 2 * QK + 2 * V, D)
                linear(f"{at}.mlstm_layer.ifgate_preact", 2 * NH, D, scale=3, bias=True)
                tensors[f"{at}.mlstm_layer.ifgate_preact.bias"][NH:] += remember
            else:
                for name, rows in (("q", QK), ("k", QK), ("v", V), ("ogate_preact", V)):
                    linear(f"{at}.mlstm_layer.{name}", rows, D)
                for name in ("igate_preact", "fgate_preact"):
                    linear(f"{at}.mlstm_layer.{name}", NH, D, scale=3, bias=True)
                tensors[f"{at}.mlstm_layer.fgate_preact.bias"] += remember
            norm(f"{at}.mlstm_layer.multihead_norm", V)
            linear(f"{at}.mlstm_layer.out_proj", D, V)
        norm(f"{at}.norm_ffn", D)
        if fused:
            linear(f"{at}.ffn.proj_up_gate_z", 2 * FFN, D)
        else:
            linear(f"{at}.ffn.proj_up_gate", FFN, D)
            linear(f"{at}.ffn.proj_up", FFN, D)
        linear(f"{at}.ffn.proj_down", D, FFN)
    draw("backbone.out_norm.weight", D, scale=0.3, shift=1)
    draw("lm_head.weight", VOCABULARY, D, scale=D**-0.5)
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config))
    write_byte_tokenizer(directory / "tokenizer.json")
    return directory
