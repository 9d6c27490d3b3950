"""Memory: samples against the system's figures, limits, the watchdog on real allocations, the computed need."""

import csv
import json
import os
import re
import subprocess
import sys
import textwrap
from dataclasses import fields
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
from tiny import make_model, model

import xlstm_ray
from xlstm_ray import RecurrentState
from xlstm_ray.config import Quantization
from xlstm_ray.errors import UsageError
from xlstm_ray.files import MIB
from xlstm_ray.memory.sample import Sample, take_sample
from xlstm_ray.memory.watchdog import Limits
from xlstm_ray.plan import choose_limits
from xlstm_ray.quantize import quantize_model
from xlstm_ray.settings import Settings

__all__ = ["model"]


def sample(process: int = 0, driver: int = 0) -> Sample:
    return Sample(0.0, process, 0, driver, 1 << 40, 1 << 40)


# -- samples and limits ------------------------------------------------------------------------------------------------
def test_a_sample_follows_what_a_process_allocates_and_frees():
    code = "import sys; wait = sys.stdin.readline; wait(); x = bytearray(b'1') * (200 << 20); print(flush=True); wait()"
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with child:
        before = take_sample(pid=child.pid)
        child.stdin.write("\n")
        child.stdin.flush()
        child.stdout.readline()
        after = take_sample(pid=child.pid)
        child.stdin.write("\n")
    assert 200 * MIB <= after.process_bytes - before.process_bytes < 240 * MIB
    assert after.seconds > before.seconds
    assert 0 < after.available_bytes < after.total_bytes <= psutil.virtual_memory().total
    with pytest.raises(psutil.NoSuchProcess):
        take_sample(pid=child.pid)


def limits_of(total: int, device_total: int | None = None, **asked: object) -> Limits:
    return Limits.make(*choose_limits(Settings.make(**asked)), total, device_total)


def test_limits_are_mib_where_given_and_fractions_else():
    limits = limits_of(1000 * MIB)
    assert limits == Limits(850 * MIB, 920 * MIB)
    assert limits_of(1000 * MIB, mem_soft_mb=100, mem_hard_pct=0.5) == Limits(100 * MIB, 500 * MIB)
    assert limits_of(1000 * MIB, mem_hard_mb=92) == Limits(85 * MIB, 92 * MIB)  # soft stays below hard
    assert [limits.exceeded(sample(mb * MIB)) for mb in (850, 851, 920, 921)] == [None, "soft", "soft", "hard"]
    assert limits.exceeded(sample(0, 2000 * MIB)) is None  # memory that the device shares is in the process's figure
    own = limits_of(1000 * MIB, 100 * MIB)
    assert [own.exceeded(sample(0, mb * MIB)) for mb in (85, 86, 92, 93)] == [None, "soft", "soft", "hard"]


def test_a_soft_limit_over_the_hard_one_is_refused_with_both():
    with pytest.raises(UsageError, match=r"soft.*`mem_soft_mb` 990: 990 MiB.*`mem_hard_pct` 0.92: 920 MiB"):
        limits_of(1000 * MIB, mem_soft_mb=990)


# -- the watchdog, in processes of its own -----------------------------------------------------------------------------
def run_child(program: str, *args: object, code: int = 0, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", textwrap.dedent(program), *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ, **variables})
    assert done.returncode == code, done.stderr[-3000:]
    return done


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


OVER_THE_SOFT_LIMIT = """
    import json, sys, xlstm_ray
    from xlstm_ray.files import MIB
    from xlstm_ray.memory.sample import process_bytes
    model, folder, variants = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    plain = {"device": "cpu", "chunkwise_backend": "native", "tile_size": 128, "chunk_size": 32}
    xlstm_ray.load(model, **plain)
    base = process_bytes() // MIB
    ballast = bytearray(b"1") * (200 * MIB)
    for name, options in variants.items():
        logs = {"mem_log": f"{folder}/{name}.memory", "stats_log": f"{folder}/{name}.tiles", "mem_poll_ms": 10}
        limits = {"mem_soft_mb": base + 100, "mem_hard_mb": base + 5000}
        lm = xlstm_ray.load(model, **plain | options, **logs, **limits)
        notes = []
        lm.on_note = notes.append
        lm.prefill(list(range(256)) * 2).state.save(f"{folder}/{name}.state")
        print(json.dumps(notes))
"""
VARIANTS = {
    "shrinks": {"min_chunk": 16},
    "once": {"min_chunk": 32, "tile_size": 64},  # one halving, before the first tile
    "warns": {"shrink_on_soft": False, "mem_action": "warn"},
}


class Soft(NamedTuple):
    """A run over its soft limit."""

    notes: list[str]
    state: RecurrentState
    tiles: list[dict[str, str]]
    samples: list[dict[str, str]]


@pytest.fixture(scope="module")
def soft(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Soft]:
    """Each of VARIANTS, one after the other in one process that holds 100 MiB more than its soft limit."""
    folder = tmp_path_factory.mktemp("soft")
    lines = run_child(OVER_THE_SOFT_LIMIT, model, folder, json.dumps(VARIANTS)).stdout.splitlines()
    return {
        name: Soft(
            json.loads(line),
            RecurrentState.load(folder / f"{name}.state"),
            rows_of(folder / f"{name}.tiles"),
            rows_of(folder / f"{name}.memory"),
        )
        for name, line in zip(VARIANTS, lines, strict=True)
    }


def plain(model: Path, **options: object):
    return xlstm_ray.load(model, device="cpu", chunkwise_backend="native", tile_size=128, chunk_size=32, **options)


def test_over_the_soft_limit_tiles_then_chunks_are_halved_and_the_state_says_so(model, soft):
    notes, state, tiles, samples = soft["shrinks"]
    sizes = [(int(row["tile_size"]), int(row["chunk_size"])) for row in tiles]
    assert sorted(set(sizes), reverse=True) == [(64, 32), (32, 32), (16, 16)]
    assert sizes == sorted(sizes, reverse=True)
    assert [note.startswith("memory: this process uses") for note in notes] == [True, False, False, False]
    assert "not to the bit" not in notes[1]  # before the first tile: all of it is of the smaller sizes
    assert "not to the bit" in notes[2]
    # Every window lies on the absolute grid of its size, and none is left out.
    done = 0
    for row, (size, _) in zip(tiles, sizes, strict=True):
        assert done % size == 0
        done += size
        assert int(row["tokens_done"]) == done
    assert done == 512
    assert (state.numerics.tile_size, state.numerics.chunk_size, state.numerics.mixed) == (16, 16, True)
    # The reference: all of it with one choice of numerics.
    tokens = list(range(256)) * 2
    expected = plain(model).prefill(tokens)
    assert (state.tensors["logits"] - expected.logits).norm() / expected.logits.norm() < 1e-4
    assert not expected.state.numerics.mixed
    # It can go on with tiles of any size, and stays marked as mixed.
    further = plain(model).prefill([*tokens, *range(40)], state=state)
    assert further.state.numerics.mixed
    whole = plain(model).prefill([*tokens, *range(40)])
    assert (further.logits - whole.logits).norm() / whole.logits.norm() < 1e-4
    assert {"soft"} == {row["level"] for row in samples}
    assert list(samples[0]) == ["time", *(f.name for f in fields(Sample)), "level", "who"]
    assert {row["who"] for row in samples} == {"this process"}
    moments = [datetime.fromisoformat(row["time"]) for row in samples]
    assert moments == sorted(moments)
    seconds = [float(row["seconds"]) for row in samples]
    assert seconds == sorted(seconds)


def test_a_run_that_shrinks_before_its_first_tile_is_the_run_of_the_smaller_sizes(model, soft):
    same = xlstm_ray.load(model, device="cpu", chunkwise_backend="native", tile_size=32, chunk_size=32)
    expected = same.prefill(list(range(256)) * 2).state
    assert soft["once"].state.numerics == expected.numerics
    assert soft["once"].state.digest() == expected.digest()


def test_without_shrinking_a_soft_limit_only_warns(model, soft):
    notes, state, tiles, _ = soft["warns"]
    assert len(notes) == 1
    assert "over the soft limit" in notes[0]
    assert {row["tile_size"] for row in tiles} == {"128"}
    expected = plain(model).prefill(list(range(256)) * 2).state
    assert state.numerics == expected.numerics
    assert state.digest() == expected.digest()


OVER_THE_HARD_LIMIT = """
    import os, sys, threading, time
    import xlstm_ray.engine.engine
    from xlstm_ray.cli.app import main
    from xlstm_ray.files import MIB
    from xlstm_ray.memory.sample import process_bytes
    tiles = sys.argv[-1]
    os.environ["XLSTM_MEM_HARD_MB"] = str(process_bytes() // MIB + 200)
    del sys.argv[-1]
    def eat():
        while not os.path.exists(tiles) or open(tiles).read().count("\\n") < 4:
            time.sleep(0.001)
        globals()["ballast"] = bytearray(b"1") * (400 * MIB)
    threading.Thread(target=eat, daemon=True).start()
    main()
"""


def test_over_the_hard_limit_the_run_stops_at_a_tile_and_goes_on_later_to_the_same_bits(model, tmp_path):
    prompt, state, tiles = tmp_path / "prompt", tmp_path / "state", tmp_path / "tiles.csv"
    prompt.write_text("To talk of many things: of shoes and ships and sealing-wax. " * 40)
    words = ["prefill", "--model", model, "--device", "cpu", "--chunkwise-backend", "native", "--tile-size", "64"]
    words += ["--prompt-file", prompt, "--state-out", state, "--no-mem-shrink", "--mem-poll-ms", "5"]
    words += ["--mem-log", tmp_path / "memory.csv"]
    ended = run_child(OVER_THE_HARD_LIMIT, *words, "--stats-log", tiles, tiles, code=3)
    said, go_on = [line for line in ended.stderr.splitlines() if not line.startswith("note: ")]
    assert re.match(r"error: memory: this process uses [\d,]+ MiB, over the hard limit of [\d,]+ MiB", said)
    assert "--tile-size" not in said  # tiles of this model are small: no smaller tile would have helped
    for part in ("raise the limit (XLSTM_MEM_HARD_MB", "available", f"state in {state}", "of 2400 tokens"):
        assert part in said
    part = RecurrentState.load(state)
    assert not part.complete
    assert part.tokens[0] % 64 == 0
    assert 64 * 3 <= part.tokens[0] < 2400
    assert [int(row["tokens_done"]) for row in rows_of(tiles)][-1] == part.tokens[0]
    assert rows_of(tmp_path / "memory.csv")[-1]["level"] == "hard"
    assert f"--state-in {state}" in go_on
    whole = xlstm_ray.load(model, device="cpu", chunkwise_backend="native", tile_size=64)
    expected = whole.prefill(prompt.read_text())
    resumed = whole.prefill(prompt.read_text(), state=part)
    assert resumed.stats.resumed_tokens == part.tokens[0]
    assert resumed.state.digest() == expected.state.digest()


# -- the need ----------------------------------------------------------------------------------------------------------
def test_a_run_that_cannot_fit_is_refused_with_the_arithmetic_unless_forced(model):
    words = [Path(sys.executable).with_name("xlstm-ray"), "prefill", "--model", model, "--device", "cpu"]
    words += ["--chunkwise-backend", "native", "--prompt", "abc"]
    refused = subprocess.run([*map(str, words), "--mem-hard-mb", "100"], capture_output=True, text=True, timeout=60)
    assert (refused.returncode, refused.stdout) == (3, "")
    said = (
        r"error: this run needs program (\d+) \+ weights (\d+) \+ state (\d+) \+ a tile's activations (\d+) = (\d+) MiB"
    )
    found = re.match(said, refused.stderr)
    assert found, refused.stderr
    *parts, total = map(int, found.groups())
    assert abs(sum(parts) - total) <= 2
    for part in ("100 MiB are allowed (--mem-hard-mb 100); raise the limit (--mem-hard-mb 100); or", "--force"):
        assert part in refused.stderr
    # By force it starts; the watchdog then finds it over the limit before the first tile.
    options = {"device": "cpu", "chunkwise_backend": "native", "mem_hard_mb": 100, "force": True}
    forced = xlstm_ray.load(model, **options).prefill("abc")
    assert (forced.state.tokens, forced.complete) == ([0], False)
    assert "over the hard limit of 100 MiB (" in str(forced.ended_by)
    assert xlstm_ray.load(model, **options | {"mem_hard_mb": None}, mem_watchdog=False).prefill("abc").complete


TOO_LITTLE = """
    import json, re, sys, xlstm_ray
    from xlstm_ray.errors import MemoryLimitError
    def refused(**options):
        try:
            xlstm_ray.load(sys.argv[1], device="cpu", chunkwise_backend="native", chunk_size=64, **options)
        except MemoryLimitError as err:
            return str(err)
    for part, missing, options in json.loads(sys.argv[2]):
        arithmetic = refused(mem_hard_mb=50, **options)
        found = re.findall(r"([a-z' ]+?) ([\\d,]+) [+=]", arithmetic)
        of = {name.strip(): int(size.replace(",", "")) for name, size in found}
        total = int(re.search(r"= ([\\d,]+) MiB", arithmetic)[1].replace(",", ""))
        print(json.dumps(refused(mem_hard_mb=int(total - missing * of[part]), **options)))
"""


def test_what_is_advised_makes_that_smaller_which_is_too_large(tmp_path):
    make_model(tmp_path, hidden_size=1024, num_hidden_layers=2)
    tile, weights = "a tile's activations", "weights"
    float32, large, small = {"dtype": "float32"}, {"tile_size": 8192}, {"tile_size": 64}
    cases: list[tuple[str, float, dict[str, object], str]] = [
        (tile, 0.6, {"dtype": "bfloat16", **large}, "give a `tile_size` below 8192"),
        (tile, 0.9, {**float32, **large}, "give a `tile_size` below 8192"),
        (weights, 0.2, {**float32, **small}, "give `dtype=bfloat16`, or spread the blocks over more machines"),
        (weights, 0.8, {**float32, **small}, "spread the blocks over more machines"),
        (weights, 0.5, {"dtype": "bfloat16", **small}, "spread the blocks over more machines"),
    ]
    lines = run_child(TOO_LITTLE, tmp_path, json.dumps([case[:3] for case in cases])).stdout.splitlines()
    for (*_, expected), line in zip(cases, lines, strict=True):
        said = json.loads(line).split("; ")[1]
        said = re.sub(r" \(`stages` with.*?\)", "", said)
        assert said == f"{expected}, or raise the limit" + said.partition(", or raise the limit")[2], line


# glibc's malloc keeps up to 64 MiB that were freed once large blocks were, by chance: a run of 340 MiB may peak at 420.
NO_HOARD = {"MALLOC_MMAP_THRESHOLD_": str(MIB)}

NEED_AND_PEAK = """
    import sys, torch, xlstm_ray
    from xlstm_ray.memory.sample import peak_process_bytes
    lm = xlstm_ray.load(sys.argv[1], device="cpu", tile_size=8192, chunk_size=64, dtype="float32")
    lm.prefill(torch.arange(2 * 8192).mul(7919).remainder(256).tolist())
    print(lm.need(1).total, lm.need(1).tile, peak_process_bytes())
"""


def test_the_computed_need_is_the_measured_peak_within_15_percent(tmp_path):
    make_model(tmp_path, hidden_size=512, num_hidden_layers=1)  # of a width where a tile's activations count
    need, tile, peak = map(float, run_child(NEED_AND_PEAK, tmp_path, **NO_HOARD).stdout.split())
    assert 0.85 < need / peak < 1.15
    assert tile > 0.25 * need  # the computed part is large


INTEGERS = """
    import json, sys, torch, xlstm_ray
    from xlstm_ray.memory.sample import peak_process_bytes, process_bytes
    model, dtype, backend = sys.argv[1:]
    lm = xlstm_ray.load(model, device="cpu", tile_size=64, chunk_size=64, dtype=dtype, chunkwise_backend=backend)
    loaded = process_bytes()
    lm.prefill(list(range(128)))
    need = lm.need(1)
    print(json.dumps([need.total, need.base + need.weights, need.tile, loaded, peak_process_bytes()]))
"""


@pytest.mark.parametrize(
    ("bits", "dtype", "backend"),
    [
        (8, "bfloat16", "native"),
        (4, "float32", "native"),
        (4, "bfloat16", "queued_compiled_chunks"),
    ],
)
def test_the_need_of_integers_is_the_measured_peak(bits, dtype, backend, wide, tmp_path):
    """A few rows of a matrix are made for a product at a time. What reading took is given back."""
    list(quantize_model(wide, tmp_path / "q", Quantization(bits=bits, group_size=32)))
    child = run_child(INTEGERS, tmp_path / "q", dtype, backend, **NO_HOARD)
    need, fixed, tile, loaded, peak = json.loads(child.stdout)
    matrix = 2 * 5504 * 2048  # elements of gate and up
    assert (tile >= 2 * matrix) == (bits == 4)  # a byte each, twice, while they are read
    assert loaded < fixed + 5 * MIB
    assert 0.95 < need / peak < 1.2


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    directory = tmp_path_factory.mktemp("wide")
    make_model(directory, hidden_size=2048, num_hidden_layers=1)
    return directory
