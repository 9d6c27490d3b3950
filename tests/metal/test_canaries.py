"""Known faults of mps: they pass where nothing is wrong, each is caught when it is planted, and a run is refused.

The planted faults do what the reports in PyTorch's tracker describe. They are planted under the simulated device.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Ran
from tiny import make_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import xlstm_ray
from xlstm_ray.config import ModelConfig
from xlstm_ray.errors import KernelError
from xlstm_ray.runtime.canaries import CANARIES, failure, failures, require_sound

aten = torch.ops.aten


class Planted(TorchDispatchMode):
    """Calls on mps have the result that this gives them: (function, its arguments, the right result)."""

    def __init__(self, fault: Callable[[Any, tuple[Any, ...], Tensor], Tensor]):
        super().__init__()
        self.fault = fault

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        first = out[0] if isinstance(out, tuple) else out
        return self.fault(func, args, out) if isinstance(first, Tensor) and first.device.type == "mps" else out


@contextmanager
def planted(fault: Callable[[Any, tuple[Any, ...], Tensor], Tensor]) -> Iterator[None]:
    failure.cache_clear()
    try:
        with Planted(fault):
            yield
    finally:
        failure.cache_clear()


def operands(func: Any, args: tuple[Any, ...]) -> tuple[Tensor, Tensor] | None:
    """A product's operands (..., K) and (..., K, N); None: the call is not a product."""
    if func is aten.linear.default:
        return args[0], args[1].T
    if func is aten.addmm.default:
        return args[1], args[2]
    return args[:2] if func in (aten.matmul.default, aten.bmm.default) else None


def dense(x: Tensor) -> Tensor:
    """Reads a tensor's storage as if it had no strides."""
    return x.as_strided(x.shape, torch.empty(x.shape).stride())


def one_in_16(func: Any, args: Any, out: Tensor) -> Tensor:
    pair = operands(func, args)
    if pair and 0 in pair[0].stride():
        return torch.where(torch.arange(len(out), device=out.device).unsqueeze(-1) % 16 == 0, out, 0)
    return out


def ignores_gaps(func: Any, args: Any, out: Tensor) -> Tensor:
    return func(args[0], dense(args[1]), *args[2:]) if func is aten.linear.default else out


def ignores_permutation(func: Any, args: Any, out: Tensor) -> Tensor:
    return func(args[0], dense(args[1])) if func is aten.matmul.default and args[1].ndim == 4 else out


def with_a_bias(func: Any, args: Any, out: Tensor) -> Tensor:
    return out.roll(1, 1) if func is aten.linear.default and len(args) == 3 and out.ndim == 3 else out


def another_the_second_time() -> Callable[..., Tensor]:
    calls = []

    def fault(func: Any, args: Any, out: Tensor) -> Tensor:
        if operands(func, args) and out.dtype == torch.bfloat16:
            calls.append(1)
            return out + 30 * (len(calls) % 2 == 0)
        return out

    return fault


def transposed(func: Any, args: Any, out: Tensor) -> Tensor:
    pair = operands(func, args)
    return pair[0] @ pair[1].T if pair and pair[0].shape == pair[1].shape else out


def reads_too_far(func: Any, args: Any, out: Tensor) -> Tensor:
    pair = operands(func, args)
    return out + 1e3 if pair and pair[0].shape[-1] >= 32_767 else out


def loses_columns(func: Any, args: Any, out: Tensor) -> Tensor:
    if operands(func, args) and out.shape[-1] > 32_768 and out.shape[-2] > 1024:
        out[..., 1024:] = 0
    return out


def no_sum(func: Any, args: Any, out: Tensor) -> Tensor:
    return args[0].clone() if func is aten.cumsum.default else out


def sixteen_at_most(func: Any, args: Any, out: Any) -> Any:
    if func is aten.topk.default and args[1] > 16:
        out[0][..., 16:] = 0
    return out


def mask_as_it_lies(func: Any, args: Any, out: Tensor) -> Tensor:
    if func is aten.masked_fill.Scalar and not args[1].is_contiguous():
        return torch.where(dense(args[1]), args[2], args[0])
    return out


def no_offset(func: Any, args: Any, out: Tensor) -> Tensor:
    if func is aten.stack.default and any(part.storage_offset() for part in args[0]):
        return torch.stack([part.as_strided(part.shape, part.stride(), 0).clone() for part in args[0]], *args[1:])
    return out


def copies_in_a_row(func: Any, args: Any, out: Tensor) -> Tensor:
    if func is aten.copy_.default and not args[0].is_contiguous():
        dense(args[0]).copy_(args[1])
    return out


def counts_once(func: Any, args: Any, out: Tensor) -> Tensor:
    return args[0].clamp_(max=1) if func is aten.scatter_add_.default else out


def overflows(func: Any, args: Any, out: Tensor) -> Tensor:
    return torch.where(args[0].abs() > 44, torch.nan, out) if func is aten.tanh.default else out


def raises(func: Any, args: Any, out: Tensor) -> Tensor:
    if func is aten.cumsum.default and args[1] < 0:
        raise RuntimeError("Expected dim to be between 0 and 2 but got -1")
    return out


FAULTS: list[tuple[Callable[..., Any], str]] = [
    (with_a_bias, "a product of three dimensions with a bias"),
    (another_the_second_time(), "the same bfloat16 product twice"),
    (ignores_gaps, "a product with gaps between the weights' rows"),
    (ignores_permutation, "a product of permuted heads"),
    (transposed, "products of square matrices"),
    (one_in_16, "a product of one row that is repeated"),
    (reads_too_far, "a product with sums of 32,767 terms"),
    (loses_columns, "a product with 32,769 columns"),
    (no_sum, "running sums"),
    (sixteen_at_most, "the largest of long integers"),
    (mask_as_it_lies, "masks of another layout"),
    (no_offset, "rows and columns put together"),
    (copies_in_a_row, "copies from a view and into one"),
    (counts_once, "rows by their numbers"),
    (overflows, "functions of large numbers"),
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny")
    make_model(directory, num_hidden_layers=2)
    return directory


def test_nothing_is_wrong_where_nothing_is(mps: torch.device) -> None:
    for device in (torch.device("cpu"), mps):
        assert [(canary.name, wrong) for canary, wrong in failures(device) if wrong] == []


@pytest.mark.parametrize(("fault", "name"), FAULTS, ids=[name for _, name in FAULTS])
def test_a_planted_fault_is_caught_and_named(fault: Callable[..., Any], name: str, simulator: object) -> None:
    """And no other canary says so: each stands for its own fault."""
    with planted(fault):
        assert [canary.name for canary, wrong in failures(torch.device("mps")) if wrong] == [name]


def test_each_canary_has_a_planted_fault() -> None:
    assert [canary.name for canary in CANARIES] == [name for _, name in FAULTS]


def test_a_run_on_a_faulty_device_is_refused(simulator: object, tiny: Path) -> None:
    with planted(raises), pytest.raises(KernelError) as refused:
        xlstm_ray.load(tiny, device="mps", dtype="float32", warmup=False)
    text = str(refused.value)
    assert "running sums: failed: Expected dim to be between 0 and 2 but got -1" in text
    assert f"pytorch issue 90635; macOS unknown, torch {torch.__version__}" in text
    assert "update macOS, or use `device=cpu`" in text


def test_a_fault_that_a_model_cannot_reach_does_not_stop_it(simulator: object, tiny: Path) -> None:
    small = ModelConfig.from_file(tiny / "config.json")
    with planted(reads_too_far):
        require_sound(torch.device("mps"), small)
        with pytest.raises(KernelError, match="sums of 32,767 terms"):
            require_sound(torch.device("mps"), small.model_copy(update={"hidden_size": 40_000}))


def test_doctor_tries_all(simulator: object, run: Callable[..., Ran]) -> None:
    with planted(no_sum):
        rows = run("doctor", "--json").row["canaries"]
        lines = run("doctor").out.splitlines()
    assert [row["name"] for row in rows if row["wrong"]] == ["running sums"]
    assert len(rows) == len(CANARIES)
    (wrong,) = [line for line in lines if line.startswith("WRONG")]
    assert "running sums (known of torch 1.13, pytorch #90635, #92329); off by" in wrong
    assert sum(line.startswith("right ") for line in lines) == len(CANARIES) - 1


def test_the_guide_lists_each_with_its_issues() -> None:
    guide = (Path(xlstm_ray.__file__).parents[1] / "docs" / "metal.md").read_text()
    for canary in CANARIES:
        (line,) = [line for line in guide.splitlines() if line.startswith(f"| {canary.name} |")]
        assert all(
            f"[{number}](https://github.com/pytorch/pytorch/issues/{number})" in line for number in canary.issues
        )
        assert canary.where in line
