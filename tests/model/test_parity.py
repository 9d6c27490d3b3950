"""Whole models against transformers' xLSTMForCausalLM, in its native torch code: logits at every position, all states.

Most run the compiled backends' functions as plain torch (fixture `eager`), so that odd sizes cost no compilation; the
last section compiles them.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import make_model
from torch import Tensor
from transformers import xLSTMForCausalLM

import xlstm_ray
from xlstm_ray import Engine, PrefillResult
from xlstm_ray.checkpoint import Checkpoint
from xlstm_ray.layout import make_layout

TOKENS = 77  # four chunks of 16 and 13 more; two tiles of 32 and 13 more

# What is odd about a model; transformers' own is right only where hidden_size x qk_dim_factor is a multiple of 64.
CASES: dict[str, dict[str, Any]] = {
    "usual": {},
    "one head": {"num_heads": 1},
    "three heads": {"hidden_size": 384, "num_heads": 3, "num_hidden_layers": 2},
    "eight heads": {"num_heads": 8},
    "v twice as wide": {"v_dim_factor": 2.0},
    "v half as wide": {"v_dim_factor": 0.5},
    "q and k as wide": {"qk_dim_factor": 1.0},
    "biases": {"use_bias": True},
    "no out norm": {"out_norm": False},
    "an out norm that the configuration denies": {"add_out_norm": False},
    "odd vocabulary": {"vocab_size": 1021},
    "a head of its own beside tied embeddings": {"tie_word_embeddings": True},
    "one block": {"num_hidden_layers": 1},
    "odd feed-forward": {"ffn_proj_factor": 1.37, "ffn_round_up_to_multiple_of": 7},
    "other caps": {"gate_soft_cap": 3.0, "output_logit_soft_cap": 7.0},
    "other epsilons": {"norm_eps": 1e-2, "eps": 1e-1},
    "odd chunks": {"chunk_size": 11},
    "all at once": {"v_dim_factor": 2.0, "use_bias": True, "vocab_size": 307},
}


class Reference(NamedTuple):
    directory: Path
    model: xLSTMForCausalLM
    ids: list[int]
    logits: Tensor  # (TOKENS, vocabulary)
    states: list[tuple[Tensor, ...]]  # (C, n, m), a block each


def ask_transformers(model: xLSTMForCausalLM, ids: list[int]) -> tuple[Tensor, list[tuple[Tensor, ...]]]:
    with torch.no_grad():
        out = model(torch.tensor([ids]), use_cache=True)
    states = out.cache_params.rnn_state
    return out.logits[0].float(), [states[n] for n in range(len(states))]


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Reference]:
    """Models by the name of their case, made once."""
    made: dict[str, Reference] = {}

    def get(case: str) -> Reference:
        if case not in made:
            directory = tmp_path_factory.mktemp("model")
            seed = 500 + list(CASES).index(case)
            model = make_model(directory, seed=seed, **CASES[case])
            g = torch.Generator().manual_seed(seed)
            ids = torch.randint(0, model.config.vocab_size, (TOKENS,), generator=g).tolist()
            made[case] = Reference(directory, model, ids, *ask_transformers(model, ids))
        return made[case]

    return get


def load(directory: Path, **options: Any) -> Engine:
    return xlstm_ray.load(directory, **{"device": "cpu", "tile_size": 32, "chunk_size": 16, **options})


def relative(out: Tensor, reference: Tensor) -> float:
    """||out - reference|| / ||reference||."""
    assert out.shape == reference.shape
    return ((out - reference).norm() / reference.norm()).item()


def assert_logits_equal(out: Tensor, reference: Tensor) -> None:
    """(tokens, vocabulary) both: 1e-4 over all, and no position off by itself.

    A single position may be ill-conditioned, a head's output close to 0 before its norm, and is allowed 1e-3.
    """
    assert relative(out, reference) <= 1e-4
    assert max(relative(mine, theirs) for mine, theirs in zip(out, reference, strict=True)) <= 1e-3


def assert_states_equal(tensors: dict[str, Tensor], states: list[tuple[Tensor, ...]]) -> None:
    assert len(tensors) == 3 * len(states) + 1
    for n, (C, n_, m) in enumerate(states):
        errors = {
            "C": relative(tensors[f"blocks.{n}.C"], C),
            "n": relative(tensors[f"blocks.{n}.n"], n_),
            "m": relative(tensors[f"blocks.{n}.m"], m),
        }
        assert max(errors.values()) <= 1e-4, (n, errors)


def assert_equal_to_transformers(result: PrefillResult, ref: Reference) -> None:
    assert_logits_equal(result.all_logits[0], ref.logits)
    assert torch.equal(result.logits[0], result.state.tensors["logits"][0])
    assert relative(result.logits[0], ref.logits[-1]) <= 1e-3
    assert_states_equal(result.state.tensors, ref.states)


@pytest.mark.parametrize("case", ["usual", "one head", "biases", "all at once"])
def test_the_random_models_are_worth_comparing(case, reference):
    """Random weights with which gates come near their caps, and the last of 77 tokens still depends on the first."""
    ref = reference(case)
    gates: list[Tensor] = []
    hooks = [
        gate.register_forward_hook(lambda _module, _inputs, out: gates.append(out))
        for block in ref.model.backbone.blocks
        for gate in (block.mlstm_layer.igate_preact, block.mlstm_layer.fgate_preact)
    ]
    changed = ask_transformers(ref.model, [(ref.ids[0] + 1) % 256, *ref.ids[1:]])[0]
    for hook in hooks:
        hook.remove()
    assert min(g.min() for g in gates) < -5
    assert max(g.max() for g in gates) > 12
    assert relative(changed[-1], ref.logits[-1]) > 0.01


BACKENDS: dict[str, dict[str, Any]] = {
    "chunks": {"chunkwise_backend": "queued_compiled_chunks"},
    "steps": {"chunkwise_backend": "queued_compiled_steps"},
    "native": {"chunkwise_backend": "native"},
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
def test_every_odd_model_equals_transformers(case, backend, reference, eager):
    ref = reference(case)
    chunk = CASES[case].get("chunk_size", 16)
    lm = load(ref.directory, **BACKENDS[backend], chunk_size=chunk, tile_size=2 * chunk)
    assert_equal_to_transformers(lm.prefill(ref.ids, all_logits=True), ref)


@pytest.mark.parametrize(
    ("case", "heads_per_band", "bands"),
    [
        ("usual", 1, 4),
        ("usual", 3, 2),
        ("three heads", 2, 2),
        ("eight heads", 5, 2),
        ("biases", 3, 2),
        ("odd feed-forward", 3, 2),
        ("no out norm", 2, 2),
        ("all at once", 3, 2),
    ],
)
def test_any_band_of_heads_equals_transformers(case, heads_per_band, bands, reference, eager):
    ref = reference(case)
    lm = load(ref.directory, heads_per_band=heads_per_band)
    assert lm.bands == bands
    assert_equal_to_transformers(lm.prefill(ref.ids, all_logits=True), ref)


@pytest.mark.parametrize("sizes", [(1, 1), (6, 1), (7, 7), (21, 7), (77, 77), (76, 38), (128, 16), (512, 256)])
def test_any_tile_and_chunk_equals_transformers(sizes, reference, eager):
    ref = reference("usual")
    lm = load(ref.directory, tile_size=sizes[0], chunk_size=sizes[1])
    assert_equal_to_transformers(lm.prefill(ref.ids, all_logits=True), ref)


def test_rows_of_different_lengths_equal_transformers(reference, eager):
    ref = reference("biases")
    rows = [ref.ids[:50], ref.ids, ref.ids[7:8], ref.ids[40:72]]
    result = load(ref.directory, heads_per_band=3).prefill(rows, all_logits=True)
    for b, row in enumerate(rows):
        logits, states = ask_transformers(ref.model, row)
        assert_logits_equal(result.all_logits[b], logits)
        assert relative(result.logits[b], logits[-1]) <= 1e-3
        assert_states_equal(result.state.row(b).tensors, states)


# -- layouts of a checkpoint -------------------------------------------------------------------------------------------
def edit_config(directory: Path, **changes: Any) -> None:
    """Change keys of config.json; None removes one."""
    config = {**json.loads((directory / "config.json").read_text()), **changes}
    (directory / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def copy_model(source: Path, target: Path) -> Path:
    return Path(shutil.copytree(source, target))


def fuse(directory: Path) -> None:
    """Rewrite a checkpoint of weight mode single as fused: stack the rows of several projections."""
    tensors = load_file(directory / "model.safetensors")
    together = {
        "mlstm_layer.qkv_opreact": ["mlstm_layer.q", "mlstm_layer.k", "mlstm_layer.v", "mlstm_layer.ogate_preact"],
        "mlstm_layer.ifgate_preact": ["mlstm_layer.igate_preact", "mlstm_layer.fgate_preact"],
        "ffn.proj_up_gate_z": ["ffn.proj_up_gate", "ffn.proj_up"],
    }
    blocks = {name.split(".")[2] for name in tensors if name.startswith("backbone.blocks.")}
    for n in blocks:
        for fused, parts in together.items():
            for kind in ("weight", "bias"):
                names = [f"backbone.blocks.{n}.{part}.{kind}" for part in parts]
                if names[0] in tensors:
                    tensors[f"backbone.blocks.{n}.{fused}.{kind}"] = torch.cat([tensors.pop(name) for name in names])
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    edit_config(directory, weight_mode="fused")


@pytest.mark.parametrize("heads_per_band", [3, 4])
@pytest.mark.parametrize("case", ["usual", "biases", "v twice as wide", "odd feed-forward"])
def test_fused_weights_equal_their_unfused_twin(case, heads_per_band, reference, eager, tmp_path):
    ref = reference(case)
    twin = copy_model(ref.directory, tmp_path / "fused")
    fuse(twin)
    result = load(twin, heads_per_band=heads_per_band).prefill(ref.ids, all_logits=True)
    assert_equal_to_transformers(result, ref)
    single = load(ref.directory, heads_per_band=heads_per_band).prefill(ref.ids, all_logits=True)
    assert torch.equal(result.all_logits[0], single.all_logits[0])
    assert result.state.digest() == single.state.digest()


@pytest.mark.parametrize("stages", [1, 2])
def test_tied_embeddings_are_the_head_where_there_is_no_other(stages, reference, eager, tmp_path):
    """transformers never ties weights in this model, so tie the reference here."""
    ref = reference("usual")
    directory = copy_model(ref.directory, tmp_path / "model")
    tensors = load_file(directory / "model.safetensors")
    tensors["lm_head.weight"] = tensors["backbone.embeddings.weight"].clone()
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    tied = xLSTMForCausalLM.from_pretrained(directory).eval()
    logits, _ = ask_transformers(tied, ref.ids)
    del tensors["lm_head.weight"]
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    edit_config(directory, tie_word_embeddings=True)
    lm = load(directory)
    result = lm.prefill(ref.ids, all_logits=True)
    assert_logits_equal(result.all_logits[0], logits)
    # A last stage that is not the first needs the embedding for its head too.
    shards = make_layout(lm.config, heads_per_band=4, stages=stages)[-1]
    _, ends = Checkpoint(directory, lm.config).load(shards[0], dtype=torch.float32, device=torch.device("cpu"))
    assert torch.equal(ends.head, tensors["backbone.embeddings.weight"])


@pytest.mark.parametrize("case", ["usual", "biases"])
def test_a_sharded_checkpoint_is_the_same_model_as_one_file(case, reference, eager, tmp_path):
    ref = reference(case)
    ref.model.save_pretrained(tmp_path, max_shard_size="200KB")
    shutil.copy(ref.directory / "tokenizer.json", tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert (tmp_path / "model.safetensors.index.json").is_file()
    sharded, single = load(tmp_path), load(ref.directory)
    result = sharded.prefill(ref.ids, all_logits=True)
    assert_equal_to_transformers(result, ref)
    assert result.state.digest() == single.prefill(ref.ids).state.digest()
    assert sharded.fingerprint == single.fingerprint


def test_the_sizes_go_by_the_xlstm_packages_names_too(reference, eager, tmp_path):
    ref = reference("usual")
    other = copy_model(ref.directory, tmp_path / "model")
    edit_config(other, embedding_dim=128, num_blocks=3, hidden_size=None, num_hidden_layers=None)
    assert_equal_to_transformers(load(other).prefill(ref.ids, all_logits=True), ref)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.bfloat16])
def test_weights_stored_in_another_dtype_are_computed_in_float32_when_asked(dtype, reference, eager, tmp_path):
    ref = reference("usual")
    stored = copy_model(ref.directory, tmp_path / "model")
    tensors = {k: v.to(dtype) for k, v in load_file(stored / "model.safetensors").items()}
    save_file(tensors, stored / "model.safetensors", {"format": "pt"})
    rounded = xLSTMForCausalLM.from_pretrained(stored, dtype=torch.float32).eval()
    expected = Reference(stored, rounded, ref.ids, *ask_transformers(rounded, ref.ids))
    lm = load(stored, **({"dtype": "float32"} if dtype == torch.bfloat16 else {}))
    assert lm.dtype == torch.float32
    assert_equal_to_transformers(lm.prefill(ref.ids, all_logits=True), expected)


# -- tokens ------------------------------------------------------------------------------------------------------------
def test_the_begin_token_is_inserted_where_the_configuration_forces_it(reference, eager, tmp_path):
    ref = reference("usual")
    forced = copy_model(ref.directory, tmp_path / "model")
    edit_config(forced, force_bos_token_insert=True)
    text, ids = "Grüße", load(forced).tokenizer.encode("Grüße").ids
    for lm, expected in ((load(ref.directory), ids), (load(forced), [257, *ids])):
        result = lm.prefill(text, all_logits=True)
        logits, states = ask_transformers(ref.model, expected)
        assert result.stats.prompt_tokens == len(expected)
        assert_logits_equal(result.all_logits[0], logits)
        assert_states_equal(result.state.tensors, states)
    assert load(forced).prefill(ids).stats.prompt_tokens == len(ids)  # token ids are taken as they are


# -- decoding ----------------------------------------------------------------------------------------------------------
def transformers_greedy(model: xLSTMForCausalLM, ids: list[int], count: int) -> list[int]:
    """transformers' greedy continuation; its best two tokens must differ enough to compare."""
    prompt = torch.tensor([ids])
    out = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=count,
        return_dict_in_generate=True,
        output_scores=True,
    )
    best = torch.cat(out.scores).topk(2).values
    assert (best[:, 0] - best[:, 1]).min() > 1e-3, "a near tie: choose another seed"
    return out.sequences[0, len(ids) :].tolist()


@pytest.mark.parametrize("options", [{}, {"heads_per_band": 3}, {"chunkwise_backend": "native"}], ids=str)
@pytest.mark.parametrize("case", ["usual", "biases", "all at once"])
def test_greedy_decoding_equals_transformers(case, options, reference, eager):
    ref = reference(case)
    lm = load(ref.directory, **options)
    expected = transformers_greedy(ref.model, ref.ids[:40], 24)
    generation = lm.generate(ref.ids[:40], max_new_tokens=24)
    text = "".join(generation)
    made = generation.tokens[0]
    assert made == [token for token in expected if token != 258]  # the end token is not part of the text
    assert generation.texts == [text]
    logits, states = ask_transformers(ref.model, ref.ids[:40] + made)
    state = generation.state()
    assert state.tokens == [40 + len(made)]
    assert relative(state.tensors["logits"][0], logits[-1]) <= 1e-3
    assert_states_equal(state.tensors, states)


def test_decoding_stops_at_the_end_token(reference, eager, tmp_path):
    ref = reference("usual")
    made = load(ref.directory).generate(ref.ids, max_new_tokens=8)
    list(made)
    early = copy_model(ref.directory, tmp_path / "model")
    end = made.tokens[0][5]
    edit_config(early, eos_token_id=[end, 258])
    (early / "generation_config.json").unlink()  # transformers wrote it; its end tokens go before those
    generation = load(early).generate(ref.ids, max_new_tokens=8)
    list(generation)
    assert generation.tokens[0] == made.tokens[0][: made.tokens[0].index(end)]


@pytest.mark.parametrize(("written", "meant"), [(-1, None), ([-1], None), ([-1, 258], 258), ([], None)])
def test_an_end_token_of_minus_one_is_how_exporters_say_none(written, meant, reference, eager, tmp_path):
    ref = reference("usual")
    copies = [copy_model(ref.directory, tmp_path / name) for name in ("written", "meant")]
    edit_config(copies[0], eos_token_id=written, bos_token_id=-1, pad_token_id=-1)
    edit_config(copies[1], eos_token_id=meant, bos_token_id=None)
    made = []
    for copy in copies:
        generation = load(copy).generate(ref.ids, max_new_tokens=12)
        list(generation)
        made.append(generation.tokens)
    assert made[0] == made[1]
    assert load(copies[0]).config == load(copies[1]).config


# -- bfloat16 ----------------------------------------------------------------------------------------------------------
def in_bfloat16(ref: Reference, directory: Path) -> tuple[xLSTMForCausalLM, Reference]:
    """The model stored in bfloat16, and its float32 reference with equal weights: only the arithmetic differs."""
    copy_model(ref.directory, directory)
    tensors = {k: v.bfloat16() for k, v in load_file(directory / "model.safetensors").items()}
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    exact = xLSTMForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    return exact, Reference(directory, exact, ref.ids, *ask_transformers(exact, ref.ids))


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_block_in_bfloat16_is_within_2_percent_of_float32(backend, reference, eager, tmp_path):
    _, expected = in_bfloat16(reference("one block"), tmp_path / "model")
    lm = load(expected.directory, dtype="bfloat16", **BACKENDS[backend])
    result = lm.prefill(expected.ids, all_logits=True)
    assert relative(result.all_logits[0], expected.logits) < 0.02
    for name, state in zip("Cnm", expected.states[0], strict=True):
        assert relative(result.state.tensors[f"blocks.0.{name}"], state) < 0.01


@pytest.mark.parametrize("options", [{"heads_per_band": 3}, *BACKENDS.values()], ids=str)
@pytest.mark.parametrize("case", ["usual", "all at once"])
def test_bfloat16_is_about_as_close_to_float32_as_transformers(case, options, reference, eager, tmp_path):
    """Random blocks multiply earlier rounding errors, so the error of transformers is the measure."""
    exact, expected = in_bfloat16(reference(case), tmp_path / "model")
    result = load(expected.directory, dtype="bfloat16", **options).prefill(expected.ids, all_logits=True)
    theirs = relative(ask_transformers(exact.bfloat16(), expected.ids)[0], expected.logits)
    assert relative(result.all_logits[0], expected.logits) < 2 * theirs < 0.3


# -- compiled ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("case", "options"),
    [
        ("usual", {}),
        ("all at once", {"heads_per_band": 3, "tile_size": 16}),
        ("biases", {"chunkwise_backend": "queued_compiled_steps", "tile_size": 16}),
    ],
    ids=["chunks", "bands", "steps"],
)
def test_compiled_models_equal_transformers(case, options, reference):
    ref = reference(case)
    lm = load(ref.directory, **options)
    result = lm.prefill(ref.ids, all_logits=True)
    assert_equal_to_transformers(result, ref)
    expected = transformers_greedy(ref.model, ref.ids, 6)
    generation = lm.generate(state=result.state, max_new_tokens=6)
    list(generation)
    assert generation.tokens[0] == [token for token in expected if token != 258]
