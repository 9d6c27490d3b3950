"""Canaries: operations that some macOS, chip or torch has computed wrongly on mps, each compared with the CPU.

Every one stands for a report in PyTorch's tracker about an operation that is used here; docs/metal.md lists them. A run
on mps does those that its model can reach, once a process, and is refused where one is wrong. `doctor` does all.
"""

import platform
from collections.abc import Callable, Iterator
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from xlstm_ray.config import ModelConfig
from xlstm_ray.errors import KernelError, one_line

CPU = torch.device("cpu")
LONG = 32_767  # terms of a product's sums


class Canary(NamedTuple):
    """What is computed, and where it has been wrong. issues: of pytorch/pytorch.

    tolerance: as a share of the largest value; wrong results were off by 0.1 and more. reached: by a run of that model.
    """

    name: str
    issues: tuple[int, ...]
    where: str
    compute: Callable[[torch.device], Tensor]
    tolerance: float = 1e-5
    reached: Callable[[ModelConfig], bool] = lambda config: True


def _some(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Values in [0, 1), always the same ones."""
    drawn = torch.Generator().manual_seed(sum(shape))
    return torch.rand(shape, generator=drawn).to(dtype)


def _projection(device: torch.device) -> Tensor:
    x, w, b = _some(2, 64, 128), _some(384, 128), _some(384)
    return F.linear(x.to(device), w.to(device), b.to(device))


def _twice(device: torch.device) -> Tensor:
    x, w = (_some(*shape, dtype=torch.bfloat16).to(device) for shape in ((1, 3, 28, 315), (315, 315)))
    return torch.cat([F.linear(x, w).clone(), F.linear(x, w).clone()])


def _gaps(device: torch.device) -> Tensor:
    x, w = _some(2, 64).to(device), _some(96, 64).to(device)
    return F.linear(x, w[::2])


def _heads(device: torch.device) -> Tensor:
    q, k = (_some(2, 20, n * 64).to(device).view(2, 20, n, 64).transpose(1, 2) for n in (3, 3))
    return q @ (k + 1).transpose(-1, -2)


def _square(device: torch.device) -> Tensor:
    a, b = _some(3, 3).to(device), _some(1, 3, 3)[0].to(device)
    return torch.cat([a @ b, a @ b.T, torch.addmm(a, a, b)])


def _one_row(device: torch.device) -> Tensor:
    return _some(1, 48).to(device).expand(64, -1) @ _some(48, 32).to(device)


def _long_sum(device: torch.device) -> Tensor:
    """The operands lie in a buffer with large numbers behind them, which a product that reads too far adds up."""
    buffer = torch.full((2 * 16 * LONG + 4096,), 1e3, device=device)
    for n, part in enumerate((_some(16, LONG), _some(LONG, 16))):
        buffer[n * 16 * LONG : (n + 1) * 16 * LONG] = part.flatten().to(device)
    a, b = buffer[: 16 * LONG].view(16, LONG), buffer[16 * LONG : 32 * LONG].view(LONG, 16)
    return torch.cat([a @ b, torch.bmm(a[None], b[None])[0]])


def _wide(device: torch.device) -> Tensor:
    """The last columns, which were the wrong ones: all of them are 130 MB."""
    return (_some(1025, 1).to(device) @ _some(1, 32_769).to(device))[:, -64:].contiguous()


def _running_sum(device: torch.device) -> Tensor:
    x = _some(2, 3, 16, 64).to(device)
    return torch.stack([x.cumsum(-1), x.cumsum(-2), x.transpose(-1, -2).cumsum(-1).transpose(-1, -2)])


def _best(device: torch.device) -> Tensor:
    """As the sampler packs a logit and its id: integers that float32 cannot tell apart."""
    keys = (_some(3, 300) * 2**20).long().to(device) << 32 | torch.arange(300, device=device)
    return torch.cat([keys.topk(40).values, keys.sort(descending=True).values, keys.argmax(-1, keepdim=True)], -1)


def _masked(device: torch.device) -> Tensor:
    x, mask = _some(5, 4).to(device), (_some(4, 5) < 0.5).to(device).T
    causal = torch.ones(4, 4, dtype=torch.bool, device=device).tril()
    return torch.cat([x.masked_fill(mask, 3), x.T.contiguous().T.masked_fill(mask, 3), torch.where(causal, x[:4], 3)])


def _slices(device: torch.device) -> Tensor:
    x = _some(6, 4).to(device)
    return torch.cat([torch.cat([x[2:3], x[5:6]]), torch.stack([x[:, :1], x[:, -1:]], -1).flatten().view(3, 4)])


def _to_a_view(device: torch.device) -> Tensor:
    """A state's part goes to the device and back: from a view, into one, with another dtype."""
    whole = torch.zeros(2, 8, 4, device=device)
    whole[:, 2:5].copy_(_some(2, 9, 4)[:, 3:6])
    whole[1, 5:].copy_(_some(3, 4, dtype=torch.bfloat16).to(device))
    whole[0, :2].copy_(_some(1, 4).to(device))
    back = torch.zeros(8, 4)
    back[::2].copy_(whole[1][::2])
    return torch.cat(
        [whole.cpu().flatten(), whole[:, ::3].cpu().flatten(), back.flatten(), _some(1).expand(9).to(device).cpu()]
    )


def _rows(device: torch.device) -> Tensor:
    table, ids = _some(50, 8).to(device), torch.tensor([[49, 0, 7], [7, 48, 1]], device=device)
    counts, moved = (
        torch.zeros(50, dtype=torch.int32, device=device),
        torch.zeros(50, 3, dtype=torch.int64, device=device),
    )
    counts.scatter_add_(0, ids.flatten(), torch.ones_like(ids.flatten(), dtype=torch.int32))
    moved.index_add_(0, ids[0], torch.tensor([0, 1, 2**40], device=device).expand(3, -1))
    parts = F.embedding(ids, table).flatten(), table[ids[0], ids[1] % 8], counts.float(), (moved >> 9).flatten().float()
    return torch.cat(parts)


def _saturated(device: torch.device) -> Tensor:
    x = torch.tensor([-200.0, -45, -12, -1e-4, 0, 1e-4, 12, 45, 200], device=device)
    return torch.cat([torch.tanh(x), torch.sigmoid(x), torch.exp(-x.abs()), torch.maximum(x, x.flip(0)) / 200])


CANARIES = (
    Canary("a product of three dimensions with a bias", (192934,), "Apple M1 (Virtual), torch 2.13", _projection),
    Canary("the same bfloat16 product twice", (180776,), "M5, torch before 2.13", _twice, 0.01),
    Canary("a product with gaps between the weights' rows", (161640, 162730), "torch 2.8", _gaps),
    Canary("a product of permuted heads", (78511,), "torch before 1.13", _heads),
    Canary("products of square matrices", (84736, 86937, 116331), "torch 1.12 to 2.2", _square),
    Canary("a product of one row that is repeated", (180201,), "macOS 15.0 to 26.3", _one_row),
    Canary(
        f"a product with sums of {LONG:,} terms", (195163, 193487, 177116), "M1 and M2, torch 2.7 to 2.13", _long_sum,
        1e-4, reached=lambda c: max(c.hidden_size, c.ffn_dim, c.v_dim) >= LONG,
    ),
    Canary(
        "a product with 32,769 columns", (116769, 122045), "torch 2.0 to 2.2", _wide,
        reached=lambda config: False,  # logits are computed for fewer rows; 130 MB are too many for each run
    ),
    Canary("running sums", (90635, 92329), "torch 1.13", _running_sum),
    Canary("the largest of long integers", (78915, 92311), "torch 1.12 to 2.0", _best, 0.0),
    Canary("masks of another layout", (107694, 131285, 176159), "torch 2.0 to 2.11", _masked, 0.0),
    Canary("rows and columns put together", (87856, 91065), "torch 1.13", _slices, 0.0),
    Canary("copies from a view and into one", (189961, 105277, 95417, 78642), "torch 1.12 to 2.13", _to_a_view, 0.0),
    Canary("rows by their numbers", (161446, 82645), "torch 1.12 to 2.8", _rows, 0.0),
    Canary("functions of large numbers", (186278,), "nightlies of torch 2.13", _saturated),
)  # fmt: skip


@cache
def failure(canary: Canary, device: torch.device) -> str | None:
    """What is wrong with a canary on a device; None: it is right."""
    want = canary.compute(CPU).double()
    try:
        got = canary.compute(device).cpu().double()
    except RuntimeError as error:
        return f"failed: {one_line(error)}"
    off, most = (got - want).abs().max().item(), want.abs().max().item()
    return None if off <= canary.tolerance * most else f"off by {off:.2g}, where the largest value is {most:.2g}"


def failures(device: torch.device, config: ModelConfig | None = None) -> Iterator[tuple[Canary, str | None]]:
    """Each canary with what is wrong; with a config, only those that a run of the model can reach."""
    with torch.inference_mode():
        yield from ((one, failure(one, device)) for one in CANARIES if config is None or one.reached(config))


def require_sound(device: torch.device, config: ModelConfig) -> None:
    """Raise KernelError where mps computes something wrongly that a run of this model does. Elsewhere: nothing."""
    if device.type != "mps":
        return
    for canary, wrong in failures(device, config):
        if wrong is not None:
            raise KernelError(
                f"mps gives wrong results here: {canary.name}: {wrong} (pytorch issue {canary.issues[0]}; "
                f"{system()}); update macOS, or use `device=cpu`; `xlstm-ray doctor` tries all that is known"
            )


def system() -> str:
    """macOS and torch, by their versions."""
    return f"macOS {platform.mac_ver()[0] or 'unknown'}, torch {torch.__version__}"
