"""`xlstm-ray doctor`: this machine's devices, and a model's kernels on Metal."""

import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from itertools import product
from typing import Any

import psutil
import torch

from xlstm_ray import __version__
from xlstm_ray.config import ModelConfig
from xlstm_ray.errors import UsageError
from xlstm_ray.kernels import Backend
from xlstm_ray.kernels.metal import MAX_BUFFERS, Generated, Probe
from xlstm_ray.kernels.quantized import Quantized
from xlstm_ray.layout import make_layout
from xlstm_ray.model import BandShape, BlockWeights, EndWeights, SlstmWeights, Weights
from xlstm_ray.plan import RunPlan
from xlstm_ray.runtime.blocks import Kernels
from xlstm_ray.runtime.canaries import failures
from xlstm_ray.runtime.worker import Worker
from xlstm_ray.state import Numerics

PACKAGES = ("torch", "safetensors", "tokenizers")


def machine() -> dict[str, Any]:
    """Versions, processor, memory in bytes, and the devices that torch has here."""
    facts: dict[str, Any] = {
        "platform": platform.platform(),
        "python": platform.python_version(),
        "xlstm-ray": __version__,
        **{name: version(name) for name in PACKAGES},
        "cpu": f"{platform.processor() or platform.machine()}, {psutil.cpu_count()} cores",
        "memory_bytes": psutil.virtual_memory().total,
    }
    if torch.backends.mps.is_available():
        facts["mps"] = f"{torch.backends.mps.get_name()}, {torch.backends.mps.get_core_count()} cores"
        facts["mps_recommended_bytes"] = torch.mps.recommended_max_memory()
    if torch.cuda.is_available():
        facts["cuda"] = torch.cuda.get_device_name()
    return facts


def canary_report(device: torch.device) -> tuple[list[dict[str, Any]], list[str]]:
    """What is known to have gone wrong on mps, tried on a device: as figures, and as lines of text."""
    rows, lines = [], []
    for one, wrong in failures(device):
        rows.append({"name": one.name, "issues": one.issues, "known": one.where, "wrong": wrong})
        issues = ", ".join(f"#{number}" for number in one.issues)
        said = f"{one.name} (known of {one.where}, pytorch {issues})"
        lines.append(f"right  {said}" if wrong is None else f"WRONG  {said}; {wrong}")
    return rows, lines


def kernel_report(plan: RunPlan) -> tuple[dict[str, Any], list[str]]:
    """The launches and traffic of a run's kernels on mps: as figures, and as lines of text.

    Raises UsageError if the backend compiles no kernels.
    """
    config, backend, numerics, steps, bands = plan.config, plan.backend, plan.numerics, plan.steps, plan.bands
    if not backend.compiled:
        raise UsageError(f"`chunkwise_backend` is {backend.name!r}, which compiles no kernels; leave it out")
    sizes = sorted({numerics.tile_size, numerics.chunk_size, 1}, reverse=True)
    windows = metal_kernels(config, backend, numerics, t_inner=steps.t_inner, windows=sizes)
    figures: dict[str, Any] = {
        "backend": backend.name,
        "dtype": numerics.dtype,
        "blocks": config.num_blocks,
        "bands": bands,
        "t_inner": steps.t_inner,
        "note": steps.note,
        "windows": [],
    }
    lines = [f"{backend.name}, {figures['dtype']}, {config.num_blocks} blocks, {bands} band(s)"]
    lines += [steps.note] if steps.note else []
    for window in windows:
        figures["windows"].append(
            {
                "tokens": window.tokens,
                "kind": window.kind,
                "blocks": window.blocks,
                "functions": [asdict(f) for f in window.functions],
                "most_buffers": window.most_buffers,
                "launches_per_token": window.launches_per_token * window.blocks * bands,
                "calls_per_token": window.calls_per_token * window.blocks * bands,
                "bytes_per_token": window.bytes_per_token * window.blocks * bands,
            }
        )
        lines += kernel_lines(window, bands)
    return figures, lines


@dataclass(frozen=True)
class WindowKernels:
    """The compiled functions of one block and band, for a window of `tokens` tokens of every row."""

    tokens: int
    kind: str  # mLSTM or sLSTM
    blocks: int  # the number of the model's blocks of this kind
    functions: list[Generated]

    @property
    def launches_per_token(self) -> float:
        """Launches a token of one block and band: Metal kernels and torch's own."""
        return sum(f.calls * f.all_launches for f in self.functions) / self.tokens

    @property
    def calls_per_token(self) -> float:
        """Calls of compiled functions a token of one block and band."""
        return sum(f.calls for f in self.functions) / self.tokens

    @property
    def bytes_per_token(self) -> float:
        return sum(f.calls * f.bytes for f in self.functions) / self.tokens

    @property
    def most_buffers(self) -> int:
        return max(f.most_buffers for f in self.functions)


def metal_kernels(
    config: ModelConfig, backend: Backend, numerics: Numerics, *, t_inner: int, windows: list[int], batch: int = 1
) -> Iterator[WindowKernels]:
    """For every window size and kind of block: all compiled functions of a block of the first band on mps.

    Only generates code: no weights or states are allocated, nothing is launched.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    shards, dtype = make_layout(config, heads_per_band=numerics.heads_per_band)[0], getattr(torch, numerics.dtype)
    slstm = sorted(config.slstm_at)
    mlstm = [n for n in range(config.num_blocks) if n not in slstm]
    for tokens, (kind, blocks) in product(windows, (("mLSTM", mlstm), ("sLSTM", slstm))):
        if not blocks:
            continue
        probe = Probe()
        kernels = Kernels(backend, t_inner=t_inner, compiler=probe)
        shard = replace(shards[0], blocks=range(blocks[0], blocks[0] + 1))
        with torch.no_grad(), FakeTensorMode():
            empty = _empty_slstm_weights if kind == "sLSTM" else _empty_weights
            weights = empty(config, len(shard.heads), len(shard.ffn), dtype)
            worker = Worker(config, shard, [weights], EndWeights(None, None, None), kernels)
            worker.warm_up(batch, tokens, numerics.chunk_size, one_band=len(shards) == 1)
        yield WindowKernels(tokens, kind, len(blocks), probe.functions)


def _empty_slstm_weights(config: ModelConfig, heads: int, ffn: int, dtype: torch.dtype) -> Weights:
    """An sLSTM block's weights of one band, without values, on mps. Tensors that an mLSTM block has too are alike."""
    dh, empty = config.dh, partial(torch.empty, device="mps")
    own = {
        "gates": empty(heads, 4 * dh, dh),
        "recurrent": empty(heads, dh, 4 * dh),
        "gates_bias": empty(heads, 4 * dh),
        "head_norm": empty(heads * dh),
        "channel": empty((), dtype=torch.long),
    }
    parts: dict[str, Any] = _empty_weights(config, heads, ffn, dtype)._asdict() | own
    return SlstmWeights(**{name: parts[name] for name in SlstmWeights._fields})


def _empty_weights(config: ModelConfig, heads: int, ffn: int, dtype: torch.dtype) -> BlockWeights:
    """An mLSTM block's weights of one band, without values, on mps."""
    s, D = BandShape.of(config, heads), config.hidden_size
    rows, v = 2 * heads * (s.dhqk + s.dhhv), heads * s.dhhv

    bits, group = (q.bits, q.group_size) if (q := config.quantization) else (0, 1)

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.float32 if bits else dtype, device="mps")

    def matrix(rows: int, columns: int) -> torch.Tensor | Quantized:
        if not bits:
            return empty(rows, columns)
        values = torch.empty(rows, -(-columns // group) * group, dtype=torch.int8 if bits == 8 else torch.uint8)
        scale = torch.empty(rows, values.shape[1] // group, dtype=dtype)
        made = Quantized.make(values, scale, scale if bits == 4 else None, before=0, packed=False)
        return made.to(torch.device("mps"))

    def bias(size: int) -> torch.Tensor | None:
        return empty(size) if config.use_bias else None

    return BlockWeights(
        mixer_norm=empty(D),
        mixer_norm_bias=bias(D),
        qkvo=matrix(rows, D),
        qkvo_bias=bias(rows),
        gates=empty(2 * heads, D).float(),
        gates_bias=empty(2 * heads).float(),
        head_norm=empty(v),
        head_norm_bias=bias(v),
        out=matrix(D, v),
        out_bias=bias(D),
        ffn_norm=empty(D),
        ffn_norm_bias=bias(D),
        up=matrix(2 * ffn, D),
        up_bias=bias(2 * ffn),
        down=matrix(D, ffn),
        down_bias=bias(D),
    )


def kernel_lines(window: WindowKernels, bands: int) -> list[str]:
    """The table for one window size as lines: one for each compiled function, and the sums of all such blocks."""
    lines = [
        f"window of {window.tokens} token(s), one {window.kind} block, one band",
        "  function           calls  Metal kernels  torch's  most buffers  launches/token  MiB/token",
    ]
    for f in window.functions:
        rate, size = f.calls * f.all_launches / window.tokens, f.calls * f.bytes / window.tokens
        lines.append(
            f"  {f.name:<18} {f.calls:5}  {f.launches:13}  {sum(f.library_calls.values()):7}  "
            f"{f.most_buffers:6} of {MAX_BUFFERS}  {rate:14.3f}  {size / 2**20:9.3f}"
        )
    times = window.blocks * bands
    launches, calls = times * window.launches_per_token, times * window.calls_per_token
    size = times * window.bytes_per_token / 2**20
    lines.append(
        f"  {window.blocks} {window.kind} blocks x {bands} band(s): {launches:.2f} launches, {calls:.2f} calls of "
        f"compiled code and {size:.1f} MiB a token"
    )
    return lines
