"""The last product: logits are float32 for any dtype of weights, and of equal logits the lowest id is first."""

from collections import Counter
from pathlib import Path

import pytest
import torch

import xlstm_ray
from xlstm_ray.choose import DEMO_MODEL
from xlstm_ray.kernels import CHUNKWISE_BACKENDS
from xlstm_ray.model import FEW_ROWS, HEAD_PART
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
