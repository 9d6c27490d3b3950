"""Devices and their published rates, and the shares of them that a prefill reaches."""

from dataclasses import dataclass

import torch

GB = 10**9


@dataclass(frozen=True)
class Shares:
    """The shares of a kind of device's published rates that a prefill reaches."""

    products: float
    traffic: float
    call_s: float  # the host's time for a block and window
    source: str


SHARES = {
    # The bare products of the 7B model reach 53,834 tokens/s x 12.9 GFLOP = 0.70 of the published rate. With 0.5 for
    # traffic, the estimates for chunks of 64, 128 and 256 are within 6 % of the times in docs/figures.md.
    # With tiles of 2048 the calls of 32 blocks took 20 to 28 ms on the host of an H200.
    "cuda": Shares(0.70, 0.5, 0.75e-3, "measured on one H100"),
    # No Mac has run this program yet. llama.cpp's published F16 prompts of 7B models (M1 Pro, M2 Ultra, M3 Pro:
    # github.com/ggml-org/llama.cpp/discussions/4167) reach 0.6 to 0.75 of the rates below; the second is the H100's.
    "mps": Shares(0.65, 0.5, 0.75e-3, "estimated from llama.cpp's published figures; not measured"),
    # The probe uses the model's own products, so all of their rate is reached. Its traffic is a plain copy; the work
    # between products takes 1.4 times as long, in two models on two cores of an AMD EPYC, in both dtypes.
    "cpu": Shares(1.0, 0.7, 0.0, "the first probed, the second measured on two cores of an AMD EPYC"),
}


@dataclass(frozen=True)
class Device:
    """memory in GB as it is sold, bandwidth in bytes/s, rates of matrix products in operations/s."""

    name: str
    kind: str  # mps, cuda or cpu
    memory_gb: float
    bandwidth: float
    bfloat16: float
    float32: float
    source: str

    @property
    def memory(self) -> int:
        """Bytes: a GB is 2^30 of them in a computer's memory, and 10^9 in NVIDIA's data sheets."""
        return int(self.memory_gb * (GB if self.kind == "cuda" else 1 << 30))

    def rate(self, dtype: torch.dtype) -> float:
        return self.bfloat16 if dtype == torch.bfloat16 else self.float32


def _apple(name: str, memory_gb: int, gb_per_s: float, gpu_cores: int, ghz: float, source: str) -> Device:
    """A chip with all of its GPU's cores and the most memory that is sold.

    Memory, bandwidth and cores are published by Apple. The rate is an estimate, the same for both dtypes: cores x 128
    lanes x 2 operations x a clock that Apple does not publish (github.com/philipturner/metal-benchmarks for M1 and M2,
    press reviews for M3 and M4). For M1, M1 Pro and M1 Max it gives the 2.6, 5.2 and 10.4 TFLOPS that Apple has named.
    """
    rate = gpu_cores * 128 * 2 * ghz * 1e9
    return Device(name, "mps", memory_gb, gb_per_s * GB, rate, rate, f"{source}; matrix rate estimated")


# Apple: apple.com/newsroom, by the announcement's title. NVIDIA: the data sheets; rates are dense, half of those
# printed with sparsity, and float32 without TF32, as torch computes it by default.
_TABLE = [
    _apple("m1", 16, 68.25, 8, 1.278, "Apple, 'Apple unleashes M1', Nov 2020; bandwidth from its LPDDR4X-4266"),
    _apple("m1-pro", 32, 200, 16, 1.296, "Apple, 'Introducing M1 Pro and M1 Max', Oct 2021"),
    _apple("m1-max", 64, 400, 32, 1.296, "Apple, 'Introducing M1 Pro and M1 Max', Oct 2021"),
    _apple("m1-ultra", 128, 800, 64, 1.296, "Apple, 'Apple unveils M1 Ultra', Mar 2022"),
    _apple("m2", 24, 100, 10, 1.398, "Apple, 'Apple unveils M2', Jun 2022"),
    _apple("m2-pro", 32, 200, 19, 1.398, "Apple, 'Apple unveils M2 Pro and M2 Max', Jan 2023"),
    _apple("m2-max", 96, 400, 38, 1.398, "Apple, 'Apple unveils M2 Pro and M2 Max', Jan 2023"),
    _apple("m2-ultra", 192, 800, 76, 1.398, "Apple, 'Apple introduces M2 Ultra', Jun 2023"),
    _apple("m3", 24, 100, 10, 1.398, "Apple, 'Apple unveils M3, M3 Pro, and M3 Max', Oct 2023"),
    _apple("m3-pro", 36, 150, 18, 1.398, "Apple, 'Apple unveils M3, M3 Pro, and M3 Max', Oct 2023"),
    _apple("m3-max", 128, 400, 40, 1.398, "Apple, 'Apple unveils M3, M3 Pro, and M3 Max', Oct 2023"),
    _apple("m3-ultra", 512, 819, 80, 1.398, "Apple, 'Apple reveals M3 Ultra', Mar 2025"),
    _apple("m4", 32, 120, 10, 1.578, "Apple, 'Apple introduces M4 Pro and M4 Max', Oct 2024"),
    _apple("m4-pro", 64, 273, 20, 1.578, "Apple, 'Apple introduces M4 Pro and M4 Max', Oct 2024"),
    _apple("m4-max", 128, 546, 40, 1.578, "Apple, 'Apple introduces M4 Pro and M4 Max', Oct 2024"),
    Device("h100", "cuda", 80, 3350 * GB, 989e12, 67e12, "NVIDIA H100 Tensor Core GPU data sheet, SXM"),
    Device("h200", "cuda", 141, 4800 * GB, 989e12, 67e12, "NVIDIA H200 Tensor Core GPU data sheet, SXM"),
]
DEVICES = {device.name: device for device in _TABLE}
