"""`xlstm-ray bench`: prefill speed and memory on this machine, prompt lengths x backends, as a table and a picture.

Every pair runs in its own process, so that its memory peak is only this pair's. It loads and compiles before anything
is timed. The backends of one length are loaded together and take turns, so that a drift of the machine's speed affects
all alike.
"""

import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from xlstm_ray.errors import UsageError
from xlstm_ray.files import MIB, PICTURE, Output, check_outputs
from xlstm_ray.kernels import CHUNKWISE_BACKENDS
from xlstm_ray.measure.child import AUTO, Child
from xlstm_ray.measure.picture import pyplot, save

HEADER = f"{'tokens':>9}  {'backend':<24} {'tokens/s':>10}  {'range of seconds':>19}  {'memory, MiB':>11}"


@dataclass(frozen=True)
class Row:
    """A pair's figures. seconds: of each round's prefill. peak_bytes: of the memory that matters for the device."""

    tokens: int
    backend: str
    device: str
    dtype: str
    seconds: list[float]
    peak_bytes: int
    peak_process_bytes: int
    peak_device_bytes: int | None  # None on the CPU
    model: str = ""
    threads: int | None = None  # torch's threads on the CPU
    machine: str = ""

    @property
    def tok_s(self) -> float:
        """Tokens a second of the median round."""
        return self.tokens / median(self.seconds)

    @property
    def line(self) -> str:
        seconds = f"{min(self.seconds):.3f} to {max(self.seconds):.3f}"
        peak = self.peak_bytes / MIB
        return f"{self.tokens:>9,}  {self.backend:<24} {self.tok_s:>10,.0f}  {seconds:>19}  {peak:>11,.0f}"

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "tok_s": self.tok_s}


def parse(
    lengths: str, backends: str, rounds: int, png: Path | None, *, overwrite: bool = False
) -> tuple[list[int], list[str]]:
    """Parse prompt lengths and backends. Raises UsageError for wrong ones, or if the picture cannot be drawn."""
    words = [word.strip() for word in lengths.split(",")]
    if not all(word.isdecimal() and 0 < int(word) <= 1 << 24 for word in words):
        raise UsageError(f"`lengths` is {lengths!r}; allowed: whole numbers from 1 to {1 << 24}, with commas between")
    names = [word.strip() for word in backends.split(",")]
    for name in names:
        if name != AUTO and name.removeprefix("chunkwise--") not in CHUNKWISE_BACKENDS:
            raise UsageError(f"`backends` names {name!r}; there are: {', '.join((AUTO, *CHUNKWISE_BACKENDS))}")
    if rounds < 1:
        raise UsageError(f"`rounds` is {rounds}; allowed: 1 or more")
    if png is not None:
        check_outputs([Output("`png`", png, PICTURE)], [], overwrite=overwrite)
        pyplot()
    return list(dict.fromkeys(map(int, words))), list(dict.fromkeys(name.removeprefix("chunkwise--") for name in names))


def measure(
    lengths: Sequence[int],
    backends: Sequence[str],
    rounds: int,
    asked: dict[str, Any],
    on_note: Callable[[str], object],
) -> Iterator[Row]:
    """Yields each pair's figures. asked: settings by name; None: not given. on_note: as in `Child`.

    Raises errors of a child's engine, and XlstmRayError if a child ended without an answer.
    """
    for tokens in lengths:
        with ExitStack() as children:
            pairs = [children.enter_context(Child(tokens, name, asked, on_note)) for name in backends]
            for pair in pairs:
                pair.figures()  # warm-up, also of caches; one pair at a time
            runs = [[pair.figures() for pair in pairs] for _ in range(rounds)]
            for n, last in enumerate(runs[-1]):
                about = {"model": last["model"], "threads": last["threads"], "machine": _machine()}
                peaks = (last[key] for key in ("peak_memory_bytes", "peak_process_bytes", "peak_device_bytes"))
                seconds = [turn[n]["prefill_s"] for turn in runs]
                yield Row(tokens, last["backend"], last["device"], last["dtype"], seconds, *peaks, **about)


def _machine() -> str:
    """This machine, in words."""
    processor = platform.processor() or platform.machine()
    return f"{platform.node()}: {platform.system()} {platform.machine()}, {processor}, {psutil.cpu_count()} cores"


def draw(rows: Sequence[Row], path: Path, *, overwrite: bool = False) -> None:
    """Draw tokens/s and peak memory over prompt length, a line for each backend. Writes the whole file or none."""
    plot = pyplot()
    from matplotlib import ticker

    figure, axes = plot.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for backend in dict.fromkeys(row.backend for row in rows):
        own = sorted((row for row in rows if row.backend == backend), key=lambda row: row.tokens)
        lengths = [row.tokens for row in own]
        axes[0].plot(lengths, [row.tok_s for row in own], marker="o", label=backend)
        slow, fast = [[row.tokens / edge(row.seconds) for row in own] for edge in (max, min)]
        axes[0].fill_between(lengths, slow, fast, alpha=0.25)  # the range of the rounds
        axes[1].plot(lengths, [row.peak_bytes / MIB for row in own], marker="o", label=backend)
    for axis, title in zip(axes, ("tokens/s (median, and the range of rounds)", "peak memory, MiB"), strict=True):
        axis.set(xscale="log", xlabel="prompt tokens", ylabel=title, ylim=(0, 1.05 * axis.get_ylim()[1]))
        axis.xaxis.set_major_locator(ticker.FixedLocator(sorted({row.tokens for row in rows})))
        axis.xaxis.set_major_formatter("{x:,.0f}")
        axis.xaxis.set_minor_locator(ticker.NullLocator())
        axis.grid(visible=True, alpha=0.3)
    axes[0].legend()
    first = rows[0]
    threads = f", {first.threads} threads" if first.threads and first.device == "cpu" else ""
    title = f"prefill of {first.model} on {first.device}, {first.dtype}{threads}, {len(first.seconds)} rounds"
    figure.suptitle(f"{title}\n{first.machine}, {datetime.now().astimezone():%Y-%m-%d %H:%M %z}", fontsize=10)
    save(figure, path, "xlstm-ray bench", overwrite=overwrite)
