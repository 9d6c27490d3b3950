"""Small random models in the Hugging Face layout, written by transformers: the independent oracle of the tests."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import xLSTMConfig, xLSTMForCausalLM

SIZES: dict[str, Any] = {
    "vocab_size": 259,
    "hidden_size": 128,  # times qk_dim_factor 0.5 is a multiple of 64, where transformers' own cache shapes are right
    "num_hidden_layers": 3,
    "num_heads": 4,
    "chunk_size": 16,
    "bos_token_id": 257,
    "eos_token_id": 258,
    "pad_token_id": 256,
}


def write_byte_tokenizer(path: Path) -> None:
    """A tokenizer.json in which a byte is a token (ids 0 to 255)."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(path))


def make_model(directory: Path, *, seed: int = 0, out_norm: bool = True, **config: Any) -> xLSTMForCausalLM:
    """Write a random model to `directory` and return transformers' own of it, float32, eval mode.

    All weights are drawn, biases and norms too, wide enough that gates reach their caps; the first heads hardly ever
    forget, the last ones within a few tokens, as in trained models.
    out_norm False replaces the norm that transformers always has.
    """
    torch.manual_seed(seed)
    model = xLSTMForCausalLM(xLSTMConfig(**{**SIZES, "add_out_norm": out_norm, **config})).float().eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(0, 0.5 if weight.ndim == 1 else weight.shape[-1] ** -0.5)
            if "norm" in name and name.endswith("weight"):
                weight.add_(1)
            if "gate_preact" in name:
                weight.mul_(3)
            if name.endswith("fgate_preact.bias"):
                weight.add_(torch.linspace(9, 0, len(weight)))
    if not out_norm:
        model.backbone.out_norm = torch.nn.Identity()
    model.save_pretrained(directory)
    write_byte_tokenizer(directory / "tokenizer.json")
    return model


LONG_WORDS = [f"{n:0119d}" for n in range(250)]


def make_model_of_words(directory: Path, **config: Any) -> None:
    """A random model to which each of LONG_WORDS is a token, so that a large text has few; its answers never end."""
    make_model(directory, eos_token_id=None, **config)
    vocabulary = {"?": 0} | {word: n for n, word in enumerate(LONG_WORDS, 1)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(directory / "tokenizer.json"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two blocks of two heads; its answers never end by themselves."""
    directory = tmp_path_factory.mktemp("model")
    make_model(directory, hidden_size=64, num_hidden_layers=2, num_heads=2, eos_token_id=None)
    return directory
