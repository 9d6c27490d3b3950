"""Every kernel of the registry against float64: outputs and final state, short, odd, long, padded and poisoned.

Relative error means ||out - reference|| / ||reference||, the worst of all heads. A state's C and n have the scale
exp(m), and any m may be chosen with it: what is compared is C exp(m), and m itself apart from it.
"""

import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from xlstm_ray.errors import KernelError, UsageError
from xlstm_ray.kernels import CHUNKWISE_BACKENDS, chunkwise_backend, sequence_kernel, step_kernel
from xlstm_ray.kernels.compiled import compile_each, compile_strict
from xlstm_ray.kernels.native import PAD_F, PAD_I, State, decayed, log_sigmoid, mlstm_sequence

EPS = 1e-6
Run = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, State]  # q, k, v, i, f, state


def at_once(q: Tensor, k: Tensor, v: Tensor, *, i: Tensor, f: Tensor, state: State, rows: Tensor | None = None):
    """The mLSTM as one sum over all earlier tokens, (T, T) weights a head, in float64: no steps, no chunks.

    rows: compute the outputs of these tokens only.
    """
    q, k, v, i, f, C, n, m = (x.double() for x in (q, k, v, i, f, *state))
    T = q.shape[2]
    rows = torch.arange(T) if rows is None else rows
    b = -torch.log1p(torch.exp(-f)).cumsum(-1)
    log_weight = b[:, :, rows, None] - b[:, :, None, :] + i[:, :, None, :]
    log_weight = log_weight.masked_fill(torch.arange(T) > rows.unsqueeze(-1), -torch.inf)
    log_first = b[:, :, rows] + m
    m_t = torch.maximum(log_first, log_weight.amax(-1))
    weight, first = torch.exp(log_weight - m_t.unsqueeze(-1)), torch.exp(log_first - m_t)
    qs = q[:, :, rows] * q.shape[-1] ** -0.5
    S = weight * (qs @ k.transpose(-1, -2))
    numerator = S @ v + first.unsqueeze(-1) * (qs @ C)
    denominator = S.sum(-1) + first * (qs @ n.unsqueeze(-1)).squeeze(-1)
    h = numerator / (torch.maximum(denominator.abs(), torch.exp(-m_t)) + EPS).unsqueeze(-1)
    assert rows[-1] == T - 1
    kw, keep = weight[:, :, -1, :, None] * k, first[:, :, -1, None]
    return h, (kw.transpose(-1, -2) @ v + keep.unsqueeze(-1) * C, kw.sum(-2) + keep * n, m_t[..., -1:])


def error(out: Tensor, reference: Tensor) -> float:
    """The largest relative error of a head: (B, NH, ...) both."""
    difference = (out.double() - reference.double()).flatten(2).norm(dim=-1)
    return (difference / reference.double().flatten(2).norm(dim=-1)).max().item()


def assert_close(
    out: tuple[Tensor, State], reference: tuple[Tensor, State], tolerance: float, m_tolerance=1e-5
) -> None:
    (h, (C, n, m)), (h_ref, (C_ref, n_ref, m_ref)) = out, reference
    assert h.shape == h_ref.shape
    assert C.dtype == n.dtype == m.dtype
    scale = torch.exp(m.double() - m_ref.double())
    errors = {
        "h": error(h, h_ref),
        "C": error(C.double() * scale.unsqueeze(-1), C_ref),
        "n": error(n.double() * scale, n_ref),
        "m": ((m.double() - m_ref.double()).abs() / (1 + m_ref.double().abs())).max().item(),
    }
    assert errors.pop("m") <= m_tolerance, (m, m_ref)
    assert max(errors.values()) <= tolerance, errors


def make_run(
    B: int, NH: int, T: int, K: int, V: int, *, dtype: torch.dtype = torch.float32, fresh: bool = False, seed: int = 0
) -> Run:
    """Random inputs with the memory layout of the model's projections; a fresh state or a used one.

    In bfloat16 q, k and n are positive: where q.n is close to 0, h is ill-conditioned, and rounding alone moves it.
    """
    g = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    q, k, v = (rand(B, T, NH, size).to(dtype).transpose(1, 2) for size in (K, K, V))
    i, f = 2 * rand(B, T, NH).transpose(1, 2), 3 * rand(B, T, NH).transpose(1, 2) + 1
    state = rand(B, NH, K, V), rand(B, NH, K), 2 * rand(B, NH, 1)
    if dtype == torch.bfloat16:
        q, k, state = q.abs(), k.abs(), (state[0], state[1].abs(), state[2])
    if fresh:
        state = tuple(torch.zeros_like(x) for x in state)
    return q, k, v, i, f, state


def run(cell: Callable, inputs: Run) -> tuple[Tensor, State]:
    q, k, v, i, f, state = inputs
    return cell(q, k, v, i=i, f=f, state=state, eps=EPS)


def by_steps(step: Callable) -> Callable:
    """A step kernel over a whole run."""

    def cell(q: Tensor, k: Tensor, v: Tensor, *, i: Tensor, f: Tensor, state: State, eps: float):
        out = []
        for t in range(q.shape[2]):
            # Contiguous, as compiled kernels take one layout only and decoding gives it.
            now = [x[:, :, t].contiguous() for x in (q, k, v, i, f)]
            h, state = step(*now[:3], i=now[3], f=now[4], state=state, eps=eps)
            out.append(h)
        return torch.stack(out, 2), state

    return cell


def backend_cell(name: str, T: int, L: int) -> Callable:
    return chunkwise_backend(name).cell(T, chunk_size=L, t_inner=4, compiler=compile_strict)


def positional(cell: Callable) -> Callable:
    """A cell as a plain function, for compile_strict."""
    return lambda q, k, v, i, f, state, eps: cell(q, k, v, i=i, f=f, state=state, eps=eps)


EAGER: dict[str, Callable[[int, int], Callable]] = {  # (tokens, chunk size) -> cell
    "step native": lambda T, L: by_steps(step_kernel("native")),
    "sequence native": lambda T, L: sequence_kernel("native_sequence__native"),
    "backend native": lambda T, L: backend_cell("native", T, L),
    "closed form": lambda T, L: backend_cell("queued_compiled_chunks", T, L),
    "sequence metal, eager": lambda T, L: sequence_kernel("native_sequence__metal", t_inner=4),
}


@cache
def compiled(name: str) -> Callable:
    """Compiled cells for runs of 20 tokens, kept for all tests: a shape is compiled once."""
    if name == "step metal":
        return by_steps(step_kernel("metal"))
    if name == "sequence metal":
        return sequence_kernel("native_sequence__metal", t_inner=3)  # does not divide 20: a kernel of 3, one of 2
    if name == "backend steps":
        return backend_cell("chunkwise--queued_compiled_steps", 20, 10)
    assert name == "closed form compiled"
    return compile_each(positional(backend_cell("chunkwise--queued_compiled_chunks", 20, 10)), "chunks")


COMPILED = ["step metal", "sequence metal", "backend steps", "closed form compiled"]
SHAPES = {  # B, NH, T, K, V, chunk size
    "usual": (2, 3, 60, 8, 16, 20),
    "one head, K > V": (1, 1, 48, 16, 4, 16),
    "T is the chunk, odd sizes": (2, 3, 13, 5, 7, 13),
    "one token": (3, 2, 1, 4, 6, 1),
    "chunks of one token": (1, 2, 9, 4, 4, 1),
    "K of one": (1, 2, 12, 1, 3, 4),
}


def test_the_step_by_step_reference_in_float64_equals_the_sum_over_all_tokens():
    q, k, v, i, f, state = make_run(2, 2, 200, 5, 7)
    inputs = [x.double() for x in (q, k, v, i, f)], tuple(x.double() for x in state)
    out = run(mlstm_sequence, (*inputs[0], inputs[1]))
    assert out[0].dtype == out[1][0].dtype == torch.float64
    assert_close(out, at_once(q, k, v, i=i, f=f, state=state), 1e-12)


@pytest.mark.parametrize("fresh", [False, True], ids=["some state", "fresh state"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("kernel", EAGER)
def test_eager_kernels_equal_float64(kernel, shape, fresh, eager):
    B, NH, T, K, V, L = shape
    inputs = make_run(B, NH, T, K, V, fresh=fresh)
    before = [x.clone() for x in inputs[-1]]
    out = run(EAGER[kernel](T, L), inputs)
    q, k, v, i, f, state = inputs
    assert_close(out, at_once(q, k, v, i=i, f=f, state=state), 1e-5)
    assert all(torch.equal(a, b) for a, b in zip(state, before, strict=True))  # the caller's state is the caller's


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kernel", COMPILED)
def test_compiled_kernels_equal_float64(kernel, dtype):
    for fresh in (False, True):
        q, k, v, i, f, state = inputs = make_run(2, 3, 20, 5, 7, dtype=dtype, fresh=fresh)
        h, after = run(compiled(kernel), inputs)
        assert h.dtype == dtype
        assert after[0].dtype == torch.float32
        assert_close((h, after), at_once(q, k, v, i=i, f=f, state=state), 1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("kernel", EAGER)
def test_eager_kernels_in_bfloat16_equal_float64(kernel, eager):
    q, k, v, i, f, state = inputs = make_run(2, 3, 60, 16, 24, dtype=torch.bfloat16)
    out = run(EAGER[kernel](60, 20), inputs)
    assert out[0].dtype == torch.bfloat16
    assert_close(out, at_once(q, k, v, i=i, f=f, state=state), 1e-2)


@pytest.mark.parametrize("kernel", EAGER)
def test_a_run_in_parts_equals_the_run(kernel, eager):
    q, k, v, i, f, state = make_run(1, 2, 48, 8, 8)
    reference = at_once(q, k, v, i=i, f=f, state=state)
    parts = []
    for part in (slice(0, 32), slice(32, 48)):
        cell = EAGER[kernel](part.stop - part.start, 8)
        h, state = run(cell, (q[:, :, part], k[:, :, part], v[:, :, part], i[:, :, part], f[:, :, part], state))
        parts.append(h)
    assert_close((torch.cat(parts, 2), state), reference, 1e-5)


# -- padding -----------------------------------------------------------------------------------------------------------
def pad(inputs: Run, tokens: slice, garbage: float) -> Run:
    """Make these tokens padding, with `garbage` in their q, k and v."""
    q, k, v, i, f, state = (x.clone() if isinstance(x, Tensor) else x for x in inputs)
    i[:, :, tokens], f[:, :, tokens] = PAD_I, PAD_F
    for x in (q, k, v):
        x[:, :, tokens] *= garbage
    return q, k, v, i, f, state


PADDED = [kernel for kernel in (*EAGER, *COMPILED) if kernel != "sequence metal, eager"]


@pytest.mark.parametrize("kernel", PADDED)
def test_a_window_of_padding_leaves_the_state_to_the_bit(kernel):
    inputs = pad(make_run(2, 3, 20, 5, 7), slice(None), 1e3)
    cell = EAGER[kernel](20, 10) if kernel in EAGER else compiled(kernel)
    _, after = run(cell, inputs)
    for x, before in zip(after, inputs[-1], strict=True):
        assert torch.equal(x, before)


@pytest.mark.parametrize("padded", [slice(0, 3), slice(7, 20), slice(13, 20)], ids=["before", "chunk", "tail"])
@pytest.mark.parametrize("kernel", PADDED)
def test_what_padding_holds_changes_no_bit(kernel, padded):
    inputs = make_run(2, 3, 20, 5, 7)
    cell = EAGER[kernel](20, 10) if kernel in EAGER else compiled(kernel)
    h, state = run(cell, pad(inputs, padded, 1.0))
    other_h, other_state = run(cell, pad(inputs, padded, -1e3))
    tokens = [t for t in range(20) if t not in range(20)[padded]]
    assert torch.equal(h[:, :, tokens], other_h[:, :, tokens])
    assert all(torch.equal(a, b) for a, b in zip(state, other_state, strict=True))
    # The rest equals a run of the tokens without padding.
    q, k, v, i, f, before = inputs
    alone = at_once(*(x[:, :, tokens] for x in (q, k, v)), i=i[:, :, tokens], f=f[:, :, tokens], state=before)
    assert_close((h[:, :, tokens], state), alone, 1e-5)


# -- long runs, gates near the caps ------------------------------------------------------------------------------------
LONG = 20_000


def long_gates() -> dict[str, tuple[Tensor, Tensor]]:
    """i and f of 20,000 tokens for each head: the corners of the caps, and mixtures."""
    g = torch.Generator().manual_seed(0)

    def all_of(x: float) -> Tensor:
        return torch.full((LONG,), x)

    def between(a: float, b: float) -> Tensor:
        return a + (b - a) * torch.rand(LONG, generator=g)

    def either() -> Tensor:
        return torch.where(torch.rand(LONG, generator=g) < 0.5, -15.0, 15.0)

    return {
        "write all, keep all": (all_of(15), all_of(15)),
        "write little, keep all": (all_of(-15), all_of(15)),
        "write all, forget all": (all_of(15), all_of(-15)),
        "write little, forget all": (all_of(-15), all_of(-15)),
        "either": (either(), either()),
        "anything": (between(-15, 15), between(-15, 15)),
        "write anything, keep all": (between(-15, 15), all_of(15)),
        "write anything, forget slowly": (between(-15, 15), all_of(12)),
        "write all, forget a little": (all_of(15), between(12, 15)),
        "usual": (between(-3, 1), between(5, 15)),
        "forget all, then keep all": (between(-3, 1), torch.cat([all_of(-15)[:9_400], all_of(15)[9_400:]])),
    }


@cache
def long_run() -> tuple[Run, Tensor, tuple[Tensor, State]]:
    """Inputs, the tokens whose outputs are compared, and their reference."""
    g = torch.Generator().manual_seed(1)
    gates = long_gates().values()
    i, f = (torch.stack(x).unsqueeze(0) for x in zip(*gates, strict=True))
    # Positive q and k keep q.n away from 0, where h is ill-conditioned and every float32 kernel is off.
    q, k = (torch.randn(1, len(gates), LONG, 8, generator=g).abs() for _ in "qk")
    v = torch.randn(1, len(gates), LONG, 8, generator=g)
    state = tuple(torch.zeros(1, len(gates), *shape) for shape in ((8, 8), (8,), (1,)))
    rows = torch.cat([torch.arange(16), torch.randint(16, LONG - 16, (64,), generator=g).sort().values])
    rows = torch.cat([rows, torch.arange(LONG - 16, LONG)])
    return (q, k, v, i, f, state), rows, at_once(q, k, v, i=i, f=f, state=state, rows=rows)


LONG_KERNELS: dict[str, tuple[int, Callable[[], Callable]]] = {  # tile size, cell
    "sequence native": (LONG, lambda: sequence_kernel("native_sequence__native")),
    "sequence metal": (LONG, lambda: sequence_kernel("native_sequence__metal", t_inner=4)),
    "closed form, one tile": (LONG, lambda: EAGER["closed form"](LONG, 40)),
    "closed form compiled": (1000, lambda: compile_strict(positional(EAGER["closed form"](1000, 40)), "tile")),
}


@pytest.mark.parametrize("kernel", LONG_KERNELS)
def test_20_000_tokens_with_gates_near_the_caps_equal_float64(kernel):
    tile, make = LONG_KERNELS[kernel]
    (q, k, v, i, f, state), rows, reference = long_run()
    cell, outputs = make(), []
    for start in range(0, LONG, tile):
        now = [x[:, :, start : start + tile].contiguous() for x in (q, k, v, i, f)]
        h, state = run(cell, (*now, state))
        outputs.append(h)
    # The steps' m stops once logf + m rounds to m. m is only the scale of C and n, so these stay right.
    assert_close((torch.cat(outputs, 2)[:, :, rows], state), reference, 1e-4, m_tolerance=1e-3)


# Windows of one chunk, as for a long prompt with the shortest tiles.
MANY, AT_THE_CAP = 40_000, {
    "steps": (8, lambda: sequence_kernel("native_sequence__metal", t_inner=8)),
    "closed form": (16, lambda: compile_strict(positional(EAGER["closed form"](16, 16)), "window")),
}  # fmt: skip


@pytest.mark.parametrize("kernel", AT_THE_CAP)
def test_what_a_gate_at_its_cap_forgets_does_not_drift(kernel):
    """A token keeps exp(-3e-7), which float32 always rounds the same way: 1e-4 of the state over this many tokens."""
    g = torch.Generator().manual_seed(7)
    i = torch.stack([torch.full((MANY,), 15.0), torch.zeros(MANY), torch.rand(MANY, generator=g) * 4 - 3]).unsqueeze(0)
    q, k, v = (torch.randn(1, 3, MANY, 8, generator=g).abs() for _ in "qkv")
    fresh = tuple(torch.zeros(1, 3, *shape) for shape in ((8, 8), (8,), (1,)))
    inputs, (window, make) = (q, k, v, i, torch.full_like(i, 15)), AT_THE_CAP[kernel]
    want = at_once(*inputs[:3], i=i, f=inputs[4], state=fresh, rows=torch.tensor([MANY - 1]))
    cell, state = make(), fresh
    for start in range(0, MANY, window):
        h, state = run(cell, (*(x[:, :, start : start + window].contiguous() for x in inputs), state))
    assert_close((h[:, :, -1:], state), want, 2e-5, m_tolerance=1e-3)


@pytest.mark.parametrize("compile_it", [False, True], ids=["eager", "compiled"])
def test_decayed_is_accurate_for_every_exponent(compile_it):
    exponents = -torch.cat([torch.logspace(-9, 1.9, 20_001), torch.linspace(0.2, 0.3, 1001), torch.zeros(1)])
    old, new = torch.tensor([1.0, -3.0, 0.0]).unsqueeze(-1), torch.tensor([0.0, 0.5, 7.0]).unsqueeze(-1)
    out = (compile_strict(decayed, "decayed") if compile_it else decayed)(old, exponents, new).double()
    want = torch.exp(exponents.double()) * old + new
    assert ((out - want).abs() <= 1.2e-7 * (torch.exp(exponents.double()) * old.abs() + new)).all()
    assert torch.equal(out[:, -1], (old + new)[:, 0].double())  # an exponent of 0 changes no bit
    wide = [x.double() for x in (old, exponents, new)]
    assert torch.allclose(decayed(*wide), want, rtol=1e-15, atol=0)


@pytest.mark.parametrize("compile_it", [False, True], ids=["eager", "compiled"])
def test_log_sigmoid_is_accurate_over_the_whole_range_of_the_gates(compile_it):
    f = torch.cat([torch.linspace(-15, 15, 30_001), torch.tensor([0.0, 16.7, 40.0, 87.0, PAD_F, -100.0, -PAD_F])])
    out = (compile_strict(log_sigmoid, "log_sigmoid") if compile_it else log_sigmoid)(f).double()
    x = f.double()
    reference = -torch.where(x > 0, torch.log1p(torch.exp(-x)), torch.log1p(torch.exp(x)) - x)
    known = reference.abs() > 1e-30
    assert ((out - reference).abs()[known] / reference.abs()[known]).max() < 1e-6
    assert out[f == PAD_F] == 0
    assert out.max() == 0  # never above 0: no gate makes a state grow


# -- buffers nobody wrote ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kernel", ["sequence metal", "closed form", "closed form compiled"])
def test_no_kernel_reads_memory_that_nobody_wrote(kernel, poisoned):
    # Sizes that no other test uses: a module that is loaded already would not see the poison.
    q, k, v, i, f, state = inputs = make_run(1, 2, 21, 3, 9)
    cell = EAGER["closed form"](21, 7)
    if kernel == "sequence metal":
        cell = sequence_kernel("native_sequence__metal", t_inner=4)
    elif kernel == "closed form compiled":
        cell = compile_strict(positional(cell), "chunks")
    assert_close(run(cell, inputs), at_once(q, k, v, i=i, f=f, state=state), 1e-5)
    assert bool(poisoned) == (kernel != "closed form")


# -- the registry ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("look_up", [chunkwise_backend, step_kernel, sequence_kernel])
def test_an_unknown_name_lists_the_names_there_are(look_up):
    with pytest.raises(UsageError, match="'triton' is not known; there are: .*native"):
        look_up("triton")


def test_every_backend_is_known_with_and_without_the_prefix_of_model_configurations():
    for name, backend in CHUNKWISE_BACKENDS.items():
        assert backend.name == name
        assert chunkwise_backend(name) is chunkwise_backend(f"chunkwise--{name}") is backend


def test_a_kernel_that_cannot_be_one_graph_is_refused_by_name_and_shape():
    def breaks(x: Tensor) -> Tensor:
        return x * x.sum().item() if x.sum() > 0 else x

    with pytest.raises(KernelError, match=r"kernel breaks_it does not compile for \(3,\) float32 on cpu"):
        compile_strict(breaks, "breaks_it")(torch.ones(3))


def test_a_second_compilation_of_a_kernel_is_refused():
    kernel = compile_strict(lambda x: x + 1, "once")
    assert kernel(torch.ones(2)).tolist() == [2, 2]
    with pytest.raises(KernelError, match="kernel once"):
        kernel(torch.ones(3))


def test_without_guards_the_code_itself_refuses_other_shapes_and_strides_and_makes_few_calls():
    kernel = compile_strict(lambda x, *, y: (x * y).sum(0), "bare", guards=False)
    x, y = torch.arange(6.0).view(2, 3), torch.ones(2, 3)
    assert [kernel(x, y=y).tolist() for _ in range(3)] == [[3, 5, 7]] * 3
    for other in (torch.ones(2, 4), torch.ones(3, 2).T):
        with pytest.raises(AssertionError, match="size|stride"):
            kernel(other, y=y)

    def calls(of: Callable) -> int:
        made = 0

        def count(frame: object, event: str, arg: object) -> None:
            nonlocal made
            made += event == "call"

        sys.setprofile(count)
        try:
            of(x, y=y)
        finally:
            sys.setprofile(None)
        return made

    guarded = compile_strict(lambda x, *, y: (x * y).sum(0), "guarded")
    assert guarded(x, y=y).tolist() == kernel(x, y=y).tolist()
    assert calls(kernel) < calls(guarded)


def test_compiled_kernels_of_many_threads_are_all_seen_to_run():
    """Bands have threads. torch 2.13 counts the compiled code that runs for all of them in one number."""
    kernels = [compile_strict(lambda x: x + 1, f"of thread {n}") for n in range(3)]
    for kernel in kernels:
        kernel(torch.ones(2))
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # switch threads as often as possible
    try:
        with ThreadPoolExecutor(3) as pool:
            threads = [pool.submit(lambda k: [k(torch.ones(2)) for _ in range(20_000)], kernel) for kernel in kernels]
            assert all(y.tolist() == [2, 2] for thread in threads for y in thread.result())
    finally:
        sys.setswitchinterval(before)


def test_a_function_that_torch_skips_is_not_taken_for_a_compiled_one():
    class Skips(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    kernel = compile_strict(lambda x: x + 1, "skipped")
    with Skips(), pytest.raises(RuntimeError, match="found no compiled frames"):
        kernel(torch.ones(2))


def test_the_closed_form_has_gradients_for_training():
    q, k, v, i, f, state = make_run(1, 2, 12, 3, 4)
    leaves = [x.double().requires_grad_() for x in (q, k, v, i, f)]
    state = tuple(x.double() for x in state)

    def loss(cell: Callable) -> list[Tensor]:
        h, after = cell(*leaves[:3], i=leaves[3], f=leaves[4], state=state, eps=EPS)
        return list(torch.autograd.grad(h.square().sum() + after[0].square().sum(), leaves))

    for mine, reference in zip(loss(EAGER["closed form"](12, 4)), loss(mlstm_sequence), strict=True):
        assert error(mine, reference) < 1e-9
