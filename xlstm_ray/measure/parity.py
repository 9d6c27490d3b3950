"""`xlstm-ray parity`: every kernel and backend of the registry on one device, against float64 on the CPU.

Errors are ||out - reference|| / ||reference||, the worst of all rows and heads. A state's C and n have the scale
exp(m), and many m are right. So C exp(m) and n exp(m) are compared, and m by its absolute error (relative where m is
large).
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from xlstm_ray.checkpoint import Checkpoint
from xlstm_ray.choose import setup_of
from xlstm_ray.config import ModelConfig
from xlstm_ray.engine.engine import Engine
from xlstm_ray.errors import KernelError
from xlstm_ray.kernels import (
    CHUNKWISE_BACKENDS,
    SEQUENCE_KERNELS,
    SLSTM_KERNELS,
    STEP_KERNELS,
    lookup,
    sequence_kernel,
    slstm_kernel,
    step_kernel,
)
from xlstm_ray.kernels.compiled import compile_each, compile_strict
from xlstm_ray.kernels.fit import KERNEL, LEAST_CHUNK
from xlstm_ray.kernels.native import PAD_F, PAD_I, mlstm_sequence, slstm_sequence
from xlstm_ray.kernels.quantized import FEW, Quantized, dequantized, quantize
from xlstm_ray.layout import make_layout
from xlstm_ray.model import Weights
from xlstm_ray.runtime.blocks import Kernels
from xlstm_ray.runtime.worker import Move, build_worker

B, T, WINDOWS, CHUNK = 2, 48, 6, 16  # rows; tokens of a window, number of windows, tokens of a chunk
K, V, DH = 16, 32, 16
T_INNER = 4  # few enough steps for Metal's limit of buffers at any shape
PADDED = 5  # the last tokens of the second row are padding
ROWS, COLUMNS, GROUP = 130, 192, 32  # of a weight: its last block of 64 rows is not whole
PROMPT, NEW = 96, 4  # tokens given to a model, tokens then decoded

# Each step multiplies the state by a number that float32 rounds by up to 3e-8: 1e-5 after 288 tokens. A bfloat16
# product rounds each operand by up to 2^-9; a model adds up the rounding of all its layers.
TOLERANCE = {"float32": 5e-5, "bfloat16": 1e-2}
MODEL_TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-1, "float8": 3e-1}


class Row(NamedTuple):
    """A line of the table. Errors as described above; None if the kernel did not run, with `reason`."""

    part: str  # mlstm, slstm, weights or model
    name: str
    dtype: str
    outputs: float | None
    state: float | None  # also None for what has no state
    tolerance: float
    reason: str | None = None

    @property
    def good(self) -> bool:
        figures = [x for x in (self.outputs, self.state) if x is not None]
        return self.reason is None and all(x <= self.tolerance for x in figures)  # also false of NaN

    @property
    def line(self) -> str:
        verdict = "ok" if self.good else self.reason or "OVER"
        outputs, state = ("-" if x is None else f"{x:.1e}" for x in (self.outputs, self.state))
        figures = f"{outputs:>8} {state:>8} {self.tolerance:10.0e}"
        return f"{self.part:<6} {self.name:<33} {self.dtype:<9} {figures}  {verdict}"


HEADER = f"{'part':<6} {'kernel or backend':<33} {'dtype':<9} {'outputs':>8} {'state':>8} {'tolerance':>10}"
Errors = tuple[float, float | None]  # outputs, state


def compare(part: str | None, device: torch.device, model: Path) -> Iterator[Row]:
    """Yields the rows of a part, or of all parts. model: the model's directory, for the part "model".

    Raises UsageError for an unknown part.
    """
    parts = PARTS.values() if part is None else [lookup(PARTS, "part", part)]
    for rows in parts:
        yield from rows(device, model)


def _row(part: str, name: str, kind: str, tolerance: dict[str, float], errors: Callable[[], Errors]) -> Row:
    try:
        return Row(part, name, kind, *errors(), tolerance[kind])
    except KernelError as err:  # go on with the other rows
        return Row(part, name, kind, None, None, tolerance[kind], str(err))


def _worst(out: Tensor, reference: Tensor) -> float:
    """The largest relative error over rows and heads; both are (B, NH, ...)."""
    out, reference = out.cpu().double().flatten(2), reference.flatten(2)
    return ((out - reference).norm(dim=-1) / reference.norm(dim=-1)).max().item()


def _off(m: Tensor, reference: Tensor) -> float:
    return ((m.cpu().double() - reference).abs() / (1 + reference.abs())).max().item()


def _uniform(g: torch.Generator, shape: tuple[int, ...], ranges: list[tuple[float, float]]) -> Tensor:
    """Random values (B, NH, ...), with a range for each head."""
    low, high = (torch.tensor(ends).view(1, -1, *[1] * (len(shape) - 2)) for ends in zip(*ranges, strict=True))
    return low + (high - low) * torch.rand(shape, generator=g)


# -- mLSTM -------------------------------------------------------------------------------------------------------------
# Ranges of gates for each head, capped at 15: as in trained models; anything; write anything and keep all; write all
# and forget little; forget at once; hardly write.
I_RANGES: list[tuple[float, float]] = [(-3, 1), (-15, 15), (-15, 15), (14, 15), (-3, 1), (-15, -14)]
F_RANGES: list[tuple[float, float]] = [(5, 15), (-15, 15), (15, 15), (12, 15), (-15, -14), (12, 15)]


def mlstm_rows(device: torch.device, _model: Path) -> Iterator[Row]:
    """Step kernels, sequence kernels and the cells of all chunkwise backends."""
    kernels: dict[str, Callable[[], Callable]] = {}
    for name in STEP_KERNELS:
        kernels[f"step {name}"] = partial(_by_steps, name)
    for name in SEQUENCE_KERNELS:
        kernels[name] = partial(sequence_kernel, name, t_inner=T_INNER)
    for name, backend in CHUNKWISE_BACKENDS.items():
        if backend.kernel == KERNEL:
            continue  # its cell has the head norm in it: it is compared as a part of a model

        def cell(backend: Any = backend) -> Callable:
            cell = backend.cell(T, chunk_size=CHUNK, t_inner=T_INNER, compiler=compile_strict)
            if not backend.compiled or not backend.cell_inside(T):
                return cell

            def chunks(q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, state: Any, eps: float) -> Any:
                return cell(q, k, v, i=i, f=f, state=state, eps=eps)

            return compile_each(chunks, f"chunks_{T}")  # in a model it is compiled together with its block

        kernels[name] = cell
    for dtype in (torch.float32, torch.bfloat16):
        inputs, state = _mlstm_inputs(dtype)
        reference = mlstm_sequence(**{n: x.double() for n, x in inputs.items()}, state=_double(state))  # type: ignore
        for name, make in kernels.items():
            kind = str(dtype).removeprefix("torch.")
            yield _row("mlstm", name, kind, TOLERANCE, partial(_mlstm_errors, make, inputs, state, reference, device))


def _mlstm_inputs(dtype: torch.dtype) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
    """q, k, v, i, f of all windows and a state. Positive q, k and n: near q.n = 0, h is ill-conditioned."""
    g, NH, tokens = torch.Generator().manual_seed(0), len(I_RANGES), T * WINDOWS
    q, k, v = (torch.randn(B, NH, tokens, size, generator=g) for size in (K, K, V))
    i, f = (_uniform(g, (B, NH, tokens), ranges) for ranges in (I_RANGES, F_RANGES))
    i[1, :, -PADDED:], f[1, :, -PADDED:] = PAD_I, PAD_F
    C, n, m = (torch.randn(B, NH, *shape, generator=g) for shape in ((K, V), (K,), (1,)))
    return {"q": q.abs().to(dtype), "k": k.abs().to(dtype), "v": v.to(dtype), "i": i, "f": f}, (C, n.abs(), m)


def _by_steps(name: str) -> Callable:
    """A step kernel over a window."""
    step = step_kernel(name)

    def cell(q: Tensor, k: Tensor, v: Tensor, *, i: Tensor, f: Tensor, state: Any, eps: float) -> tuple[Tensor, Any]:
        outputs = []
        for t in range(q.shape[2]):
            now = [x[:, :, t].contiguous() for x in (q, k, v, i, f)]
            h, state = step(*now[:3], i=now[3], f=now[4], state=state, eps=eps)
            outputs.append(h)
        return torch.stack(outputs, 2), state

    return cell


def _mlstm_errors(
    make: Callable[[], Callable], inputs: Any, state: Any, reference: Any, device: torch.device
) -> Errors:
    cell, outputs = make(), []
    state = tuple(part.to(device) for part in state)
    for start in range(0, T * WINDOWS, T):
        now = {name: x[:, :, start : start + T].contiguous().to(device) for name, x in inputs.items()}
        h, state = cell(now["q"], now["k"], now["v"], i=now["i"], f=now["f"], state=state, eps=1e-6)
        outputs.append(h)
    h_ref, (C_ref, n_ref, m_ref) = reference
    C, n, m = (part.cpu().double() for part in state)
    scale = torch.exp(m - m_ref)
    stored = max(_worst(C * scale.unsqueeze(-1), C_ref), _worst(n * scale, n_ref), _off(m, m_ref))
    return _worst(torch.cat(outputs, 2), h_ref), stored


def _double(parts: Any) -> Any:
    return tuple(part.double() for part in parts)


# -- sLSTM -------------------------------------------------------------------------------------------------------------
# Ranges of i and f for each head, without a cap; f has an effect up to 15.
SLSTM_I: list[tuple[float, float]] = [(-3, 1), (-40, 40), (90, 100), (-100, -90), (-3, 1)]
SLSTM_F: list[tuple[float, float]] = [(5, 15), (-40, 40), (10, 30), (12, 20), (-30, -20)]


def slstm_rows(device: torch.device, _model: Path) -> Iterator[Row]:
    """The sLSTM kernels; gates and state are float32 for any model dtype."""
    g, NH, tokens = torch.Generator().manual_seed(0), len(SLSTM_I), T * WINDOWS
    x = torch.randn(B, NH, tokens, 4, DH, generator=g)
    x[..., 0, :], x[..., 1, :] = (_uniform(g, (B, NH, tokens, DH), ranges) for ranges in (SLSTM_I, SLSTM_F))
    x[..., 2, :] += 1  # a sum c of positive and negative terms is ill-conditioned
    recurrent = 0.3 * torch.randn(NH, DH, 4 * DH, generator=g) * DH**-0.5
    token = torch.ones(B, 1, tokens, dtype=torch.bool)
    token[1, :, -PADDED:] = False
    fresh = tuple(torch.zeros(B, NH, DH) for _ in range(4))
    reference = slstm_sequence(x.double(), recurrent=recurrent.double(), token=token, state=_double(fresh))

    def errors(name: str) -> Errors:
        cell, outputs, state = slstm_kernel(name, t_inner=T_INNER), [], tuple(part.to(device) for part in fresh)
        for start in range(0, tokens, T):
            now = [part[:, :, start : start + T].contiguous().to(device) for part in (x, token)]
            h, state = cell(now[0], recurrent=recurrent.to(device), token=now[1], state=state)  # type: ignore
            outputs.append(h)
        h_ref, (last_ref, c_ref, n_ref, m_ref) = reference
        last, c, n, m = (part.cpu().double() for part in state)
        scale = torch.exp(m - m_ref)
        stored = max(_worst(last, last_ref), _worst(c * scale, c_ref), _worst(n * scale, n_ref), _off(m, m_ref))
        return _worst(torch.cat(outputs, 2), h_ref), stored

    for name in SLSTM_KERNELS:
        yield _row("slstm", name, "float32", TOLERANCE, partial(errors, name))


# -- weights of integers -----------------------------------------------------------------------------------------------
def weights_rows(device: torch.device, _model: Path) -> Iterator[Row]:
    """The products of 8- and 4-bit weights in each of their forms, and an embedding's rows."""
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(ROWS, COLUMNS, generator=g) * torch.rand(ROWS, 1, generator=g)
    counts = {"few rows": FEW.compiled // 2, "many rows": FEW.packed + 1}
    x = {name: torch.randn(count, COLUMNS, generator=g) for name, count in counts.items()}
    for dtype in (torch.float32, torch.bfloat16):
        for bits in (8, 4):
            values, scale, zero = quantize(weight, bits=bits, group=GROUP)
            want = dequantized(values, scale, zero)
            of_groups = scale.to(dtype), None if zero is None else zero.to(dtype)
            plain, own = (Quantized.make(values, *of_groups, before=0, packed=packed) for packed in (False, True))
            forms = {"": plain.to(device)} | ({", torch's own": own} if own.packed and device.type == "cpu" else {})
            kind = str(dtype).removeprefix("torch.")
            for form, w in forms.items():
                for name, given in x.items():
                    errors = partial(_product_errors, w, given.to(dtype), want)
                    yield _row("weights", f"{bits} bits, {name}{form}", kind, TOLERANCE, errors)
            errors = partial(_embedding_errors, plain.to(device), want)
            yield _row("weights", f"{bits} bits, embedding", kind, TOLERANCE, errors)


def _product_errors(w: Quantized, x: Tensor, want: Tensor) -> Errors:
    y = compile_strict(lambda x, w: w.linear(x), f"product_{len(x)}")(x.to(w.device), w)
    return _worst(y.reshape(1, 1, -1), (x.double() @ want.T).view(1, 1, -1)), None


def _embedding_errors(w: Quantized, want: Tensor) -> Errors:
    tokens = torch.arange(ROWS).view(2, -1)
    return _worst(w.embed(tokens.to(w.device)).reshape(1, 1, -1), want[tokens].view(1, 1, -1)), None


# -- a whole model -----------------------------------------------------------------------------------------------------
def model_rows(device: torch.device, directory: Path) -> Iterator[Row]:
    """A model through every backend of this process: prefill in tiles, then decoding.

    Backends on Ray run the same kernels in actors; the mlstm part compares those.
    """
    config = ModelConfig.from_file(directory / "config.json")
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(0, config.vocab_size, (PROMPT,), generator=g).tolist()
    half = (config.num_heads + 1) // 2
    bands = {"": config.num_heads} | ({", two bands": half} if half < config.num_heads else {})

    def errors(backend: str, heads: int, dtype: str) -> Errors:
        chunk = LEAST_CHUNK if CHUNKWISE_BACKENDS[backend].kernel == KERNEL else CHUNK
        unrolls = CHUNKWISE_BACKENDS[backend].unrolls(slstm=bool(config.slstm_at))
        setup = setup_of(
            model=directory,
            device=device.type,
            dtype=dtype,
            chunkwise_backend=backend,
            heads_per_band=heads,
            tile_size=2 * chunk,
            chunk_size=chunk,
            t_inner=T_INNER if unrolls else None,
        )
        with Engine(setup) as engine:
            made = engine.generate(ids, max_new_tokens=NEW, temperature=0)
            before = made.prefill.logits
            list(made.rows())
            state, (tokens,) = made.state(), made.tokens
        logits, reference = _reference(directory, config, [*ids, *tokens])
        outputs = [
            _worst(mine.view(1, 1, -1), logits[at - 1].view(1, 1, -1))
            for mine, at in ((before, PROMPT), (state.tensors["logits"], PROMPT + len(tokens)))
        ]
        return max(outputs), _state_error(state.tensors, reference, config)

    for dtype in ("float32", "bfloat16", "float8"):
        for name, backend in CHUNKWISE_BACKENDS.items():
            triton = backend.kernel == KERNEL
            if backend.executor != "queued" or (dtype == "float32" if triton else dtype == "float8"):
                continue
            if triton and device.type != "cuda":
                continue
            for which, heads in bands.items():
                yield _row("model", name + which, dtype, MODEL_TOLERANCE, partial(errors, name, heads, dtype))


def _reference(directory: Any, config: ModelConfig, ids: list[int]) -> tuple[Tensor, dict[str, Tensor]]:
    """The model in float64 by the eager reference: logits (tokens, vocabulary), and the state after the last token."""
    cpu = torch.device("cpu")
    ((shard,),) = make_layout(config, heads_per_band=config.num_heads)
    kernels = Kernels(CHUNKWISE_BACKENDS["native"], t_inner=T_INNER)
    worker = build_worker(Checkpoint(directory, config), kernels, shard, dtype=torch.float64, device=cpu)
    worker.blocks = [_widened(w) for w in worker.blocks]  # type: ignore[arg-type]
    worker.states[0] = [_double(worker.fresh_state(n, 1)) for n in range(config.num_blocks)]
    first = torch.zeros(1, dtype=torch.long)
    x, move = worker.embed(torch.tensor([ids])), Move(0, 1, first, first + len(ids), CHUNK)
    for n in range(config.num_blocks):
        x = worker.run_block(n, x, move)
    return worker.logits(x)[0], worker.save(1)


def _widened(w: Weights) -> Weights:
    """Weights with float32 tensors in float64."""
    return tree_map(lambda part: part.double() if isinstance(part, Tensor) and part.is_floating_point() else part, w)


def _state_error(tensors: dict[str, Tensor], reference: dict[str, Tensor], config: ModelConfig) -> float:
    """The worst error over blocks, with all heads of a block together: in a model one head may be almost 0."""
    errors = []
    for n in range(config.num_blocks):
        names = [f"blocks.{n}.{name}" for name in config.state_shapes(n, config.num_heads)]
        *parts, m = (tensors[name].double() for name in names)
        *parts_ref, m_ref = (reference[name] for name in names)
        errors.append(_off(m, m_ref))
        scale = torch.exp(m - m_ref)
        for name, part, ref in zip(names, parts, parts_ref, strict=False):
            if not name.endswith(".h"):
                part = part * scale.view(*scale.shape, *[1] * (part.ndim - scale.ndim))
            errors.append(_worst(part.flatten(1).unsqueeze(1), ref.flatten(1).unsqueeze(1)))
    return max(errors)


PARTS: dict[str, Callable[[torch.device, Path], Iterator[Row]]] = {
    "mlstm": mlstm_rows,
    "slstm": slstm_rows,
    "weights": weights_rows,
    "model": model_rows,
}
