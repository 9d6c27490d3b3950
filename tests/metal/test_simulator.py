"""The simulator itself: every check fires, and what runs on it is right.

Takes about 35 s cold on two slow cores, 20 s once its libraries are built.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from . import shaders
from .operators import operators_with_mps_kernels
from .plugin import require_simulator
from .simulator import Simulator
from .simulator import simulator as the_simulator

ORDERS = tuple(shaders.ORDERS)

# One library, so that g++ runs once: each kernel does one thing wrong (or, good_sum, does it right).
SOURCE = """
#include <c10/metal/utils.h>
#include <c10/metal/reduction_utils.h>
#include <c10/metal/error.h>

kernel void read_past_end(device float* out, constant float* in, uint i [[thread_position_in_grid]]) {
  out[i] = in[i + 1];
}
kernel void write_before_start(device float* out, uint i [[thread_position_in_grid]]) {
  out[int(i) - 1] = 1.0;
}
kernel void divergent_barrier(device float* out, uint i [[thread_position_in_grid]],
                              uint l [[thread_position_in_threadgroup]]) {
  if (l < 5) { metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup); }
  out[i] = 1.0;
}
kernel void early_return(device float* out, uint i [[thread_position_in_grid]],
                         uint l [[thread_position_in_threadgroup]]) {
  if (l == 0) { return; }
  metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);
  out[i] = 1.0;
}
kernel void two_barriers(device float* out, uint i [[thread_position_in_grid]],
                         uint l [[thread_position_in_threadgroup]]) {
  if (l < 5) { metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup); }
  else {
    metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup); }
  out[i] = 1.0;
}
kernel void divergent_simd(device float* out, uint i [[thread_position_in_grid]],
                           uint l [[thread_position_in_threadgroup]]) {
  if (l < 5) { out[i] = metal::simd_sum(1.0); }
}
kernel void read_unwritten(device float* out, uint i [[thread_position_in_grid]],
                           uint l [[thread_position_in_threadgroup]]) {
  threadgroup float shared[64];
  if (l != 3) { shared[l] = 1.0; }
  metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);
  out[i] = shared[l];
}
kernel void past_shared(device float* out, uint i [[thread_position_in_grid]],
                        uint l [[thread_position_in_threadgroup]]) {
  threadgroup float shared[4];
  shared[l] = 1.0;
  out[i] = 1.0;
}
kernel void too_much_shared(device float* out, uint i [[thread_position_in_grid]],
                            uint l [[thread_position_in_threadgroup]]) {
  threadgroup float first[4096];
  threadgroup float second[4097];
  out[i] = first[l] = second[l] = 1.0;
}
kernel void no_group(device float* out, uint i [[thread_position_in_grid]]) {
  out[i] = metal::simd_sum(1.0);
}
kernel void missing_barrier(device float* out, uint i [[thread_position_in_grid]],
                            uint l [[thread_position_in_threadgroup]]) {
  threadgroup float shared[64];
  shared[l] = float(i);
  out[i] = shared[63 - l];
}
kernel void reports_error(device float* out, device c10::metal::ErrorMessages* errors,
                          uint i [[thread_position_in_grid]]) {
  if (i == 2) { TORCH_REPORT_ERROR(errors, "Index ", 7, " out of range"); return; }
  out[i] = 1.0;
}
[[max_total_threads_per_threadgroup(64)]]
kernel void good_sum(device float* out, constant float* in, constant float& scale,
                     uint i [[thread_position_in_grid]], uint l [[thread_position_in_threadgroup]]) {
  threadgroup float shared[2];
  auto total = c10::metal::threadgroup_sum(shared, in[i] * scale, l, 64);
  out[i] = total;
}
kernel void bfloat_add(device bfloat* out, constant bfloat* a, constant bfloat* b,
                       uint i [[thread_position_in_grid]]) {
  out[i] = a[i] + b[i];
}
"""


@pytest.fixture
def wrong(simulator: Simulator) -> shaders.Library:
    """The kernels above."""
    return torch.mps.compile_shader(SOURCE)


def test_without_a_compiler_skipped_but_not_in_ci(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.backends.mps.is_built():
        pytest.skip("a real mps")
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CI", "")
    with pytest.raises(pytest.skip.Exception, match="g\\+\\+ is not installed"):
        require_simulator()
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="g\\+\\+ is not installed"):
        require_simulator()


def test_never_beside_a_real_mps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._C, "_has_mps", True)
    with pytest.raises(pytest.skip.Exception, match="never loaded beside it"):
        require_simulator()
    with pytest.raises(RuntimeError, match="must not take its place"):
        the_simulator.__wrapped__()


# ---- limits


def test_32_buffers_do_not_compile(simulator: Simulator) -> None:
    def source(buffers: int) -> str:
        parameters = "".join(f"device float* b{i}, " for i in range(buffers))
        return f"kernel void wide({parameters}uint i [[thread_position_in_grid]]) {{ b0[i] = 1.0; }}"

    torch.mps.compile_shader(source(31))
    with pytest.raises(SyntaxError, match="kernel wide takes 32 buffers, Metal allows 31"):
        torch.mps.compile_shader(source(32))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        ("divergent_barrier", "barrier reached by only part of its threadgroup"),
        ("early_return", "barrier reached by only part of its threadgroup"),
        ("two_barriers", "wait at different barriers"),
        ("divergent_simd", "simdgroup operation reached by only part of its simdgroup"),
        ("past_shared", "write past the end of threadgroup array shared"),
        ("too_much_shared", "threadgroup memory of 32784 bytes, Metal allows 32768"),
        ("no_group", "simdgroup operation in a kernel that was launched without group_size"),
    ],
)
def test_wrong_kernels_are_named(
    simulator: Simulator, wrong: shaders.Library, kernel: str, message: str, order: str
) -> None:
    group = {} if kernel == "no_group" else {"group_size": [64]}
    threads = 8 if kernel == "past_shared" else 64
    group = {"group_size": [threads]} if group else {}
    out = torch.zeros(64, device="mps")
    with simulator.order(order), pytest.raises(shaders.MetalError, match=f"kernel {kernel}.*{message}"):
        getattr(wrong, kernel)(out, threads=[threads], **group)


@pytest.mark.parametrize("order", ORDERS)
def test_indices_out_of_bounds(simulator: Simulator, wrong: shaders.Library, order: str) -> None:
    storage = torch.zeros(16, device="mps")
    with simulator.order(order):
        wrong.read_past_end(torch.zeros(8, device="mps"), storage[:8], threads=[8])  # Metal sees the whole storage
        with pytest.raises(shaders.MetalError, match=r"read_past_end: out of bounds: in\[8\], it has 8 elements"):
            wrong.read_past_end(torch.zeros(8, device="mps"), storage[8:], threads=[8])
        with pytest.raises(shaders.MetalError, match=r"write_before_start: out of bounds: out\[-1\]"):
            wrong.write_before_start(storage, threads=[8])


def test_launch_limits(simulator: Simulator, wrong: shaders.Library) -> None:
    x, out = torch.ones(2048, device="mps"), torch.empty(2048, device="mps")
    with pytest.raises(shaders.MetalError, match="good_sum: 128 threads a group, it allows 64"):
        wrong.good_sum(out, x, 1.0, threads=[1, 2048], group_size=[2, 64])
    with pytest.raises(shaders.MetalError, match="read_unwritten: 2048 threads a group, it allows 1024"):
        wrong.read_unwritten(out, threads=[64, 32], group_size=[64, 32])
    with pytest.raises(shaders.MetalError, match="read_unwritten: threads \\[0\\]"):
        wrong.read_unwritten(out, threads=[0], group_size=[64])
    with pytest.raises(shaders.MetalError, match="good_sum takes 3 arguments, got 2"):
        wrong.good_sum(out, x, threads=[64], group_size=[64])
    with pytest.raises(shaders.MetalError, match=r"in is float\*, got a torch.bfloat16 tensor"):
        wrong.good_sum(out, x.bfloat16(), 1.0, threads=[64], group_size=[64])
    with pytest.raises(shaders.MetalError, match="in has to be a tensor on mps"):
        wrong.good_sum(out, x.cpu(), 1.0, threads=[64], group_size=[64])


def test_errors_that_a_kernel_reports(wrong: shaders.Library) -> None:
    with pytest.raises(shaders.MetalError, match="reports_error reported: Index 7 out of range"):
        wrong.reports_error(torch.empty(4, device="mps"), threads=[4], error_buf_idx=1)


def test_memory_is_poisoned(simulator: Simulator, wrong: shaders.Library) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.empty(5, dtype=dtype, device="mps").isnan().all()
    assert (torch.empty(5, dtype=torch.int64, device="mps") == -1).all()
    out = torch.zeros(64, device="mps")
    wrong.read_unwritten(out, threads=[64], group_size=[64])
    assert out.isnan().nonzero().flatten().tolist() == [3]


def test_a_missing_barrier_shows_in_one_of_the_orders(simulator: Simulator, wrong: shaders.Library) -> None:
    out = {}
    for order in ORDERS:
        out[order] = torch.zeros(64, device="mps")
        with simulator.order(order):
            wrong.missing_barrier(out[order], threads=[64], group_size=[64])
    right = torch.arange(63, -1, -1.0)
    assert not all(torch.equal(o.cpu(), right) for o in out.values())


@pytest.mark.parametrize("order", ORDERS)
def test_a_right_kernel(simulator: Simulator, wrong: shaders.Library, order: str) -> None:
    x = torch.randn(256)
    out = torch.empty(256, device="mps")
    with simulator.order(order):
        wrong.good_sum(out, x.to("mps"), 2.0, threads=[256], group_size=[64])
    torch.testing.assert_close(out.cpu().view(4, 64), (2 * x).view(4, 64).sum(1, keepdim=True).expand(4, 64))
    assert [kernel.name for kernel in simulator.launches()] == ["good_sum"]


def test_bfloat_rounds_to_nearest_even(wrong: shaders.Library) -> None:
    a, b = torch.randn(4096).bfloat16(), (torch.randn(4096) * 2.0 ** torch.randint(-9, 9, (4096,))).bfloat16()
    a[:3], b[:3] = torch.tensor([torch.inf, torch.nan, 3.38e38]), torch.tensor([-torch.inf, 1.0, 3.38e38])
    out = torch.empty(4096, dtype=torch.bfloat16, device="mps")
    wrong.bfloat_add(out, a.to("mps"), b.to("mps"))
    torch.testing.assert_close(out.cpu(), a + b, rtol=0, atol=0, equal_nan=True)


# ---- the device


def test_operators_are_counted_and_unknown_ones_refused(simulator: Simulator) -> None:
    x = torch.ones(3, 3, device="mps")
    simulator.clear_counts()
    assert (x @ x).cumsum(0).cpu()[2, 0] == 9.0
    assert set(simulator.operators()) == {"aten::mm.out", "aten::cumsum.out"}
    assert set(simulator.operators()) <= operators_with_mps_kernels()

    with torch.library._scoped_library("made_up", "DEF") as library:
        library.define("operator(Tensor x) -> Tensor")
        library.impl("operator", lambda x: x.clone(), "CPU")
        assert torch.ops.made_up.operator(torch.ones(2)).sum() == 2
        with pytest.raises(NotImplementedError, match="'made_up::operator' is not currently implemented for the MPS"):
            torch.ops.made_up.operator(x)
    with pytest.raises(NotImplementedError, match="_linalg_svd"):
        torch.linalg.svd(x)


def test_bytes_moved_are_counted(simulator: Simulator) -> None:
    x = torch.ones(10, 10).to("mps")
    assert ((x @ x)[:2] + 1).cpu().sum() == 220
    assert simulator.bytes_moved() == (400, 80)


def test_what_apples_device_refuses(simulator: Simulator) -> None:
    x = torch.ones(3, device="mps")
    with pytest.raises(RuntimeError, match="same device"):
        x + torch.ones(3)
    with pytest.raises(TypeError, match="float64"):
        x.double()
    with pytest.raises(RuntimeError, match="Expected a 'mps' device type for generator"):
        torch.rand(3, device="mps", generator=torch.Generator())


def test_memory_is_accounted_for(simulator: Simulator) -> None:
    start = torch.mps.current_allocated_memory()
    torch.accelerator.reset_peak_memory_stats()
    x = torch.empty(1 << 20, device="mps")
    del x
    assert torch.mps.current_allocated_memory() == start
    assert torch.accelerator.max_memory_allocated() == start + (4 << 20)
    assert torch.mps.driver_allocated_memory() >= start + (4 << 20)
    torch.mps.empty_cache()
    assert torch.mps.driver_allocated_memory() == start
    torch.mps.set_per_process_memory_fraction(1e-6)
    with pytest.raises(torch.OutOfMemoryError, match="MPS backend out of memory"):
        torch.empty(1 << 20, device="mps")


def test_a_program_finds_what_it_expects(simulator: Simulator) -> None:
    assert torch.backends.mps.is_built()
    assert torch.backends.mps.is_available()
    assert torch.accelerator.current_accelerator() == torch.device("mps")
    assert torch.accelerator.is_available()
    assert torch.mps.device_count() == 1
    torch.mps.synchronize()
    torch.accelerator.synchronize()
    torch.accelerator.empty_cache()
    event = torch.mps.Event(enable_timing=True)
    event.record()
    assert event.query()

    draws = [torch.rand(4, device="mps", generator=torch.Generator("mps").manual_seed(7)).cpu() for _ in range(2)]
    assert torch.equal(*draws)
    torch.manual_seed(3)
    first = torch.randn(4, device="mps").cpu()
    torch.manual_seed(3)
    assert torch.equal(torch.randn(4, device="mps").cpu(), first)

    table = torch.randn(10, 4)
    rows = F.embedding(torch.tensor([1, 7], device="mps"), table.to("mps", torch.bfloat16))
    assert torch.equal(rows.cpu(), table[[1, 7]].bfloat16())
    assert rows[1, 2].item() == table[7, 2].bfloat16().item()
    assert torch.ones(3).pin_memory().is_pinned()
    assert not rows.is_pinned()


# ---- torch.compile, as the project uses it


def run_compiled(simulator: Simulator, f: Callable[..., tuple[Tensor, ...]], *args: Tensor) -> list[tuple[Tensor, ...]]:
    """f's results on mps, in each of the orders; Metal kernels did it."""
    compiled = torch.compile(f, fullgraph=True, dynamic=False)
    on_mps = [a.to("mps") for a in args]
    results = []
    for order in ORDERS:
        simulator.clear_counts()
        with simulator.order(order):
            results.append(compiled(*on_mps))
        assert simulator.launches()
    return results


def test_pointwise_functions(simulator: Simulator) -> None:
    x = torch.linspace(-12, 12, 999)
    y = torch.randn(999)

    def f(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        up = x.abs() + 0.1
        return (
            x.exp(), up.log(), up.sqrt(), up.rsqrt(), x.tanh(), x.sigmoid(), x.sin(), x.cos(), x.floor(), x.ceil(),
            x.round(), x.sign(), x.neg(), x.maximum(y), x.minimum(y), x.clamp(-1, 1), up.pow(y), F.silu(x),
            F.softplus(x), up.log1p(), x.masked_fill(y > 0, -torch.inf), x.erf(), x.expm1(), x.fmod(up),
        )  # fmt: skip

    want = f(x, y)
    for got in run_compiled(simulator, f, x, y):
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g.cpu(), w, rtol=2e-6, atol=2e-7)


def test_reductions(simulator: Simulator) -> None:
    x = torch.randn(3, 1500)  # more than the 1024 threads of a group, and not a multiple of 32
    x[1, 77] = torch.nan

    def f(x: Tensor) -> tuple[Tensor, ...]:
        return (
            x.sum(-1), x.amax(-1), x.amin(-1), x.argmax(-1), x[:, :40].argmin(-1), x[:, :20].prod(-1), x.mean(-1),
            x[::2].var(-1), (x > 3).any(-1), x.cumsum(-1), x[:, :7].amax(-1),
        )  # fmt: skip

    want = f(x)
    for got in run_compiled(simulator, f, x):
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g.cpu(), w, rtol=1e-5, atol=1e-5, equal_nan=True)
    assert "aten::cumsum.out" in simulator.operators()  # Inductor makes no Metal kernel of it: torch's own runs


def test_fused_bf16_keeps_float32_inside(simulator: Simulator) -> None:
    x = torch.randn(64, 200).bfloat16()

    def norm(x: Tensor) -> tuple[Tensor]:
        wide = x.float()
        return ((wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype),)

    for (got,) in run_compiled(simulator, norm, x):
        torch.testing.assert_close(got.cpu(), norm(x)[0], rtol=2**-7, atol=0)


def step(
    C: Tensor, n: Tensor, m: Tensor, q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One mLSTM token, written plainly: q, k, n (B, NH, K), v (B, NH, V), i, f, m (B, NH, 1), C (B, NH, K, V)."""
    log_f = F.logsigmoid(f)
    m_new = torch.maximum(log_f + m, i)
    keep, write = torch.exp(log_f + m - m_new), torch.exp(i - m_new)
    C = keep[..., None] * C + write[..., None] * k[..., None] * v[..., None, :]
    n = keep * n + write * k
    q = q * q.shape[-1] ** -0.5
    h = (q[..., None] * C).sum(-2) / (torch.maximum((q * n).sum(-1, keepdim=True).abs(), torch.exp(-m_new)) + 1e-6)
    return h, C, n, m_new


def chunk(
    C: Tensor, n: Tensor, m: Tensor, q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """T tokens at once, in closed form: q, k (B, NH, T, K), v (B, NH, T, V), i, f (B, NH, T)."""
    b = F.logsigmoid(f).cumsum(-1)
    T = b.shape[-1]
    a = b[..., -1:] - b + i
    m_end = torch.maximum(b[..., -1:] + m, a.amax(-1, keepdim=True))
    keep = torch.exp(b[..., -1:] + m - m_end)
    weighted = k * torch.exp(a - m_end)[..., None]
    C_end = keep[..., None] * C + weighted.transpose(-1, -2) @ v
    n_end = keep * n + weighted.sum(-2)
    causal = torch.ones(T, T, dtype=torch.bool, device=q.device).tril()
    D = (b[..., None] - b[..., None, :] + i[..., None, :]).masked_fill(~causal, -torch.inf)
    m_t = torch.maximum(b + m, D.amax(-1))
    q = q * q.shape[-1] ** -0.5
    S = (q @ k.transpose(-1, -2)) * torch.exp(D - m_t[..., None])
    before = torch.exp(b + m - m_t)[..., None]
    num = before * (q @ C) + S @ v
    den = before[..., 0] * (q * n[..., None, :]).sum(-1) + S.sum(-1)
    return num / (torch.maximum(den.abs(), torch.exp(-m_t)) + 1e-6)[..., None], C_end, n_end, m_end


def random_cell(T: int) -> list[Tensor]:
    """State and inputs of a cell of 2 heads, 32 x 48."""
    generator = torch.Generator().manual_seed(T)

    def draw(*shape: int) -> Tensor:
        return torch.randn(1, 2, *shape, generator=generator)

    return [draw(32, 48), draw(32), draw(1), draw(T, 32), draw(T, 32), draw(T, 48), 3 * draw(T), 3 + 3 * draw(T)]


def reference(C: Tensor, n: Tensor, m: Tensor, *inputs: Tensor) -> list[Tensor]:
    """Step by step in float64."""
    C, n, m = C.double(), n.double(), m.double()
    q, k, v, i, f = (x.double() for x in inputs)
    outputs = []
    for t in range(q.shape[2]):
        h, C, n, m = step(C, n, m, q[:, :, t], k[:, :, t], v[:, :, t], i[:, :, t, None], f[:, :, t, None])
        outputs.append(h)
    return [torch.stack(outputs, 2), C, n, m]


@pytest.mark.parametrize("form", ["step", "chunk"])
def test_mlstm_cell_against_float64(simulator: Simulator, form: str) -> None:
    T = 1 if form == "step" else 40
    args = random_cell(T)
    want = reference(*args)
    if form == "step":
        args = [*args[:3], *(x[:, :, 0] for x in args[3:6]), *args[6:]]
        want[0] = want[0][:, :, 0]
    for got in run_compiled(simulator, step if form == "step" else chunk, *args):
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g.cpu().double(), w, rtol=2e-5, atol=2e-5 * w.abs().max().item())
    assert max(len(kernel.parameters) for kernel in simulator.launches()) <= shaders.MAX_BUFFERS
    products = {
        "aten::bmm.out",
        "aten::baddbmm.out",
        "aten::cumsum.out",
    }  # all else is generated Metal code
    assert set(simulator.operators()) <= (set() if form == "step" else products)


def test_two_threads_at_once(simulator: Simulator) -> None:
    rows = [torch.randn(40, 300) for _ in range(2)]
    compiled = torch.compile(lambda x: (x.exp().sum(-1), x * 2), fullgraph=True, dynamic=False)
    compiled(rows[0].to("mps"))
    simulator.clear_counts()
    failures: list[BaseException] = []

    def work(x: Tensor) -> None:
        try:
            on_mps = x.to("mps")
            for _ in range(15):
                total, double = compiled(on_mps)
                torch.testing.assert_close(total.cpu(), x.exp().sum(-1))
                assert torch.equal(double.cpu(), x * 2)
        except BaseException as error:  # noqa: BLE001 - handed to the main thread
            failures.append(error)

    threads = [threading.Thread(target=work, args=(x,)) for x in rows]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures[0]
    assert len(simulator.launches()) == 30 * len({kernel.name for kernel in simulator.launches()})


def test_device_is_there_only_inside_the_fixture() -> None:
    """Runs without the fixture: torch answers as on a machine without mps, though the tests above had one."""
    if torch.backends.mps.is_built():
        pytest.skip("a real mps")
    assert not torch.backends.mps.is_available()
    assert torch.accelerator.current_accelerator() is None
    with pytest.raises(RuntimeError):
        torch.empty(1, device="mps")
