"""The last product: logits are float32 for any dtype of weights, and of equal logits the lowest id is first.

And a block's products of few rows, which are compiled like the last one.
"""

from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import xlstm_ray
from xlstm_ray.choose import DEMO_MODEL
from xlstm_ray.kernels import CHUNKWISE_BACKENDS
from xlstm_ray.kernels.compiled import compile_strict
from xlstm_ray.kernels.inductor import loaded_modules
from xlstm_ray.model import FEW_ROWS, HEAD_PART, linear
from xlstm_ray.runtime.blocks import Kernels
from xlstm_ray.sampling import Sampling
from xlstm_ray.sampling.sampler import Sampler

VOCABULARY, D = 3 * HEAD_PART // 512 + 5, 512  # a head of more than one part, and a last part of another size


@pytest.fixture(scope="module")
def demo() -> xlstm_ray.Engine:
    return xlstm_ray.load(device="cpu", dtype="bfloat16", chunkwise_backend="native")


@pytest.mark.parametrize("backend", ["native", "queued_compiled_chunks"])
@pytest.mark.parametrize("rows", [1, 3, FEW_ROWS + 1])
def test_the_product_of_bfloat16_operands_is_not_rounded_to_bfloat16(backend: str, rows: int) -> None:
    g = torch.Generator().manual_seed(rows)
    x, head = (torch.randn(n, D, generator=g).bfloat16() for n in (rows, VOCABULARY))
    kernels = Kernels(CHUNKWISE_BACKENDS[backend], t_inner=8)
    y, want = kernels.head(x, head), x.double() @ head.double().T
    assert (y.dtype, y.shape) == (torch.float32, want.shape)
    assert (y - want).norm() / want.norm() < 1e-6  # rounded to bfloat16: 2e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 4])
def test_a_token_of_few_rows_reads_a_blocks_weights_once_and_equals_float64(rows: int, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(rows)
    x, w, bias = (torch.randn(*n, generator=g).to(dtype) for n in ((rows, 1, 200), (72, 200), (72,)))
    before = len(loaded_modules())
    y = compile_strict(lambda x, w, bias: linear(F.silu(x), w, bias), f"few_{rows}_{dtype.itemsize}")(x, w, bias)
    want = F.linear(F.silu(x).double(), w.double(), bias.double())
    assert (y.dtype, y.shape) == (dtype, want.shape)
    assert (y - want).norm() / want.norm() < (1e-6 if dtype == torch.float32 else 3e-3)
    code = Path(str(loaded_modules()[before:][-1].__file__)).read_text()
    assert "extern_kernels." not in code  # the sum is in the code itself
    exp, columns = code.index("exp()"), code.index("int64_t x1=")  # in loops one after the other
    assert exp < columns, "the activation is computed anew for every row of the weights"


def test_no_two_tokens_are_equally_likely_in_a_text(demo: xlstm_ray.Engine, eager: None) -> None:
    text = Path(DEMO_MODEL, "README.md").read_text()[:1000]
    with xlstm_ray.load(device="cpu", dtype="bfloat16") as lm:
        (logits,) = lm.prefill(text, all_logits=True).all_logits
    best = logits.topk(2).values
    assert len(logits) > 250
    assert not (best[:, 0] == best[:, 1]).any()
    assert [demo.next_tokens(row, 1)[0].id for row in logits] == logits.argmax(-1).tolist()


def test_equals_are_listed_and_taken_lowest_id_first(demo: xlstm_ray.Engine) -> None:
    g = torch.Generator().manual_seed(0)
    for _ in range(20):
        logits = torch.randint(4, (2048,), generator=g).float()
        order = sorted(range(2048), key=lambda token: (-logits[token], token))
        assert [token.id for token in demo.next_tokens(logits, 600)] == order[:600]
        for sampling in (Sampling(), Sampling(temperature=1.0, top_p=1e-9)):
            row = Sampler(1, 2048)
            row.put(0, sampling, position=0)
            assert row.choose(logits.unsqueeze(0), torch.tensor([0])).tolist() == order[:1]


def test_more_tokens_than_there_are_may_be_asked_for(demo: xlstm_ray.Engine) -> None:
    listed = demo.next_tokens(torch.zeros(2048), 5000)
    assert Counter(token.id for token in listed) == Counter(range(2048))
