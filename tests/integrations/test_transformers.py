"""Our kernels inside transformers' model, beside its own; and behind NX-AI's signatures, beside their formulas."""

import pytest
import torch
from tiny import make_model
from torch import Tensor
from transformers import xLSTMForCausalLM

from xlstm_ray.errors import KernelError, UsageError
from xlstm_ray.integrations.nxai import mlstm_chunkwise, mlstm_sequence, mlstm_step, slstm_forward
from xlstm_ray.integrations.transformers import use_kernels
from xlstm_ray.kernels.native import mlstm_sequence as reference

CHUNK, TILE = 16, 32
COMPILED = "queued_compiled_chunks", "metal"
NATIVE = "chunkwise--native", "native"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> xLSTMForCausalLM:
    return make_model(tmp_path_factory.mktemp("model"), seed=17, num_hidden_layers=2)


def tokens(count: int) -> Tensor:
    return torch.randint(0, 256, (2, count), generator=torch.Generator().manual_seed(count))


def relative(out: Tensor, expected: Tensor) -> float:
    assert out.shape == expected.shape
    return ((out - expected).norm() / expected.norm()).item()


def ask(model: xLSTMForCausalLM, ids: Tensor) -> list[Tensor]:
    """Logits of a prompt, of one more token, of a second prompt that goes on; then every layer's states."""
    with torch.no_grad():
        first = model(ids, use_cache=True)
        second = model(ids[:, :1], cache=first.cache, use_cache=True)
        third = model(ids[:, :5], cache=second.cache, use_cache=True)
    states = [part for layer in third.cache.rnn_state.values() for part in layer]
    return [first.logits, second.logits, third.logits, *states]


@pytest.fixture
def restored(model: xLSTMForCausalLM):
    """The model, with its own backends again when the test has ended."""
    layers = [block.mlstm_layer for block in model.backbone.blocks]
    own = [layer.mlstm_backend for layer in layers]
    yield model
    for layer, backend in zip(layers, own, strict=True):
        layer.mlstm_backend = backend


@pytest.mark.parametrize("names", [COMPILED, ("queued_compiled_steps", "native"), NATIVE], ids=lambda names: names[0])
def test_logits_and_states_equal_the_models_own_kernels(restored, names):
    """77 tokens: two tiles and a padded chunk."""
    ids = tokens(77)
    expected = ask(restored, ids)
    assert use_kernels(restored, chunkwise=names[0], step=names[1], tile_size=TILE) == 2
    for mine, theirs in zip(ask(restored, ids), expected, strict=True):
        assert relative(mine, theirs) < 1e-4


def test_generate_gives_the_same_tokens_in_inference_mode_too(restored):
    ids = tokens(40)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 256}
    expected = restored.generate(ids, **options)
    use_kernels(restored, chunkwise=COMPILED[0], step=COMPILED[1], tile_size=TILE)
    assert torch.equal(restored.generate(ids, **options), expected)
    with torch.inference_mode():
        assert torch.equal(restored.generate(ids, **options), expected)


def test_weights_and_training_stay_the_models_own(restored):
    before, ids = list(restored.state_dict()), tokens(32)
    use_kernels(restored, tile_size=TILE)
    assert list(restored.state_dict()) == before
    with pytest.raises(KernelError, match="for inference"):
        restored(ids)
    configs = {id(block.mlstm_layer.config): block.mlstm_layer.config for block in restored.backbone.blocks}
    for config in configs.values():
        config.mode = "train"
    try:
        loss = restored(ids, labels=ids, use_cache=False).loss
        loss.backward()
    finally:
        for config in configs.values():
            config.mode = "inference"
        restored.zero_grad()
    assert loss.item() > 0


def test_mistakes_are_told(restored):
    with pytest.raises(UsageError, match="'ray_compiled_chunks' needs a Ray grid"):
        use_kernels(restored, chunkwise="ray_compiled_chunks")
    with pytest.raises(UsageError, match="step kernel 'fast' is not known; there are: native, metal"):
        use_kernels(restored, step="fast")
    with pytest.raises(UsageError, match="tile_size 40 is not a multiple of the model's chunk_size 16"):
        use_kernels(restored, tile_size=40)
    with pytest.raises(UsageError, match="Linear has no mLSTM layer"):
        use_kernels(torch.nn.Linear(2, 2))


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_kernels_by_nx_ais_words_equal_float64():
    """In the sizes of the model above, which are compiled already. A tile and half a chunk."""
    q, k, v = draw(2, 4, 40, 16, seed=1), draw(2, 4, 40, 16, seed=2), draw(2, 4, 40, 32, seed=3)
    i, f = 3 * draw(2, 4, 40, seed=4), 4 + draw(2, 4, 40, seed=5)
    start = draw(2, 4, 16, 32, seed=6), draw(2, 4, 16, seed=7), draw(2, 4, 1, seed=8)
    state = tuple(part.double() for part in start)
    h, after = reference(q.double(), k.double(), v.double(), i=i.double(), f=f.double(), state=state)
    initial = {"c_initial": start[0], "n_initial": start[1], "m_initial": start[2]}
    for kernel in mlstm_chunkwise(tile_size=TILE), mlstm_sequence(), mlstm_sequence("native_sequence__native"):
        out, last = kernel(q=q, k=k, v=v, i=i, f=f, **initial, return_last_states=True, chunk_size=CHUNK)
        for mine, theirs in zip((out, *last), (h, *after), strict=True):
            assert relative(mine.double(), theirs) < 1e-4
        assert torch.equal(kernel(q=q, k=k, v=v, i=i, f=f, **initial, chunk_size=CHUNK), out)
    c, n, m = start
    for t in range(3):
        now = {"q": q[:, :, t], "k": k[:, :, t], "v": v[:, :, t], "i": i[:, :, t, None], "f": f[:, :, t, None]}
        out, (c, n, m) = mlstm_step()(**now, c=c, n=n, m=m)
        assert relative(out.double(), h[:, :, t]) < 1e-4


@pytest.mark.parametrize("name", ["vanilla", "native_compiled"])
def test_an_slstm_by_nx_ais_words_equals_their_formula(name):
    """Their formula, written anew in float64: gates from x, R h and b; h = o c / n, stabilised by m."""
    S, B, NH, DH = 8, 2, 3, 4
    D = NH * DH
    x, states, b = draw(S, B, 4 * D, seed=1), torch.zeros(4, B, D), draw(4 * D, seed=2)
    R = 0.5 * draw(NH, 4 * DH, DH, seed=3)
    h, last = slstm_forward(name)(x, states, R, b)
    y, c, n, m = (torch.zeros(B, D, dtype=torch.float64) for _ in range(4))
    outputs = []
    for t in range(S):
        from_h = torch.einsum("bnd,nod->bno", y.view(B, NH, DH), R.double()).view(B, NH, 4, DH).transpose(1, 2)
        i, f, z, o = (x[t].double() + b.double() + from_h.reshape(B, 4 * D)).view(B, 4, D).unbind(1)
        log_f = torch.nn.functional.logsigmoid(f)
        new = i if t == 0 else torch.maximum(i, log_f + m)
        c = torch.exp(log_f + m - new) * c + torch.exp(i - new) * torch.tanh(z)
        n = torch.exp(log_f + m - new) * n + torch.exp(i - new)
        y, m = torch.sigmoid(o) * c / n, new
        outputs.append(y)
    assert relative(h.double(), torch.stack(outputs)) < 1e-5
    assert relative(last.double(), torch.stack([y, c, n, m])) < 1e-5
