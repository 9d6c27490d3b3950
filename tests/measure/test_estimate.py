"""`xlstm-ray plan`: its arithmetic against measurements, torch's counts, and the engine's own figures."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

import pytest
import torch
from conftest import Ran
from safetensors.torch import load_file, save_file
from slstm import write_model
from tiny import make_model
from torch.utils.flop_counter import FlopCounterMode

import xlstm_ray
from xlstm_ray.actors.ring import Ring
from xlstm_ray.choose import DEMO_MODEL
from xlstm_ray.config import ModelConfig
from xlstm_ray.errors import EstimateError
from xlstm_ray.measure import estimate, work
from xlstm_ray.measure.devices import DEVICES
from xlstm_ray.measure.estimate import Plan, plan
from xlstm_ray.measure.work import HOP_S, Work, in_turn_seconds, stage_seconds
from xlstm_ray.plan import choose_on_paper
from xlstm_ray.settings import Settings

XLSTM_7B = {"model_type": "xlstm", "vocab_size": 50304, "hidden_size": 4096, "num_blocks": 32, "num_heads": 8}


@pytest.fixture(scope="module")
def of_7b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config.json without weights."""
    directory = tmp_path_factory.mktemp("7b")
    (directory / "config.json").write_text(json.dumps(XLSTM_7B))
    return directory


def planned(
    model: Path,
    device: str,
    tokens: int = 65536,
    machines: int = 1,
    memory_gb: float | None = None,
    link_gbit: float | None = None,
    **asked: object,
) -> Plan:
    choose = partial(choose_on_paper, Settings.make(model=model, **asked))
    return plan(choose, device, tokens, machines, memory_gb=memory_gb, link_gbit=link_gbit)


# Measured: 35,201 tokens/s of a whole run with chunks of 256; choose.choose_sizes: those of the prefill alone.
@pytest.mark.parametrize(("chunk", "measured"), [(None, 35_201), (64, 31_300), (128, 36_400), (256, 39_900)])
def test_7b_on_an_h100_as_measured(of_7b: Path, chunk: int | None, measured: int) -> None:
    estimate = planned(of_7b, "h100", chunk_size=chunk)
    assert measured / 1.5 < estimate.tok_s < measured * 1.5
    assert (estimate.tile_size, estimate.chunk_size, estimate.heads_per_band) == (4096, chunk or 256, 8)
    assert estimate.fits


def test_larger_chunks_are_faster_on_an_h100_as_measured(of_7b: Path) -> None:
    speeds = [planned(of_7b, "h100", chunk_size=chunk).tok_s for chunk in (64, 128, 256)]
    assert speeds == sorted(speeds)


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("hybrid", [False, True])
def test_operations_are_those_that_torch_counts(tmp_path: Path, hybrid: bool) -> None:
    if hybrid:
        write_model(tmp_path, slstm_at=[1], num_blocks=3)
    else:
        make_model(tmp_path)
    config = ModelConfig.from_file(tmp_path / "config.json")
    assert bool(config.slstm_at) == hybrid
    tokens, chunk = 64, config.chunk_size
    asked = {"device": "cpu", "dtype": "bfloat16", "tile_size": 64, "warmup": False}
    with xlstm_ray.load(tmp_path, **asked) as lm, FlopCounterMode(display=False) as counter:
        lm.prefill(list(range(tokens)))
    head = 2 * config.vocab_size * config.hidden_size  # the last token's logits
    counted = (counter.get_total_flops() - head) / tokens
    estimate = sum(Work.of(config, b, chunk, 2).flops for b in range(config.num_blocks))
    assert estimate == pytest.approx(counted, rel=0.05)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_and_settings_are_the_engines(dtype: str) -> None:
    assert_as_the_engine(DEMO_MODEL, dtype)


def test_memory_of_a_head_that_is_the_embedding(tmp_path: Path) -> None:
    make_model(tmp_path, tie_word_embeddings=True)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    found = assert_as_the_engine(tmp_path, "float32")
    assert found.model.sizes.tied
    ends = [planned(tmp_path, "this", 1000, machines=m, dtype="float32").need.weights for m in (1, 3)]
    block, embedding = found.model.sizes.blocks[0], 259 * 128 * 4
    assert ends == [3 * block + embedding + 128 * 4, block + embedding + 128 * 4]  # the last stage has one of its own


def assert_as_the_engine(model: Path, dtype: str) -> Plan:
    estimate = planned(model, "this", 1000, dtype=dtype)
    with xlstm_ray.load(model, device="cpu", dtype=dtype, chunkwise_backend="native") as lm:
        want, numerics = lm.need(1), lm.numerics
    got = estimate.need
    assert (got.weights, got.state, got.tile) == (want.weights, want.state, want.tile)
    assert (estimate.tile_size, estimate.chunk_size) == (numerics.tile_size, numerics.chunk_size)
    assert str(estimate.model.dtype) == f"torch.{numerics.dtype}"
    return estimate


def test_a_configuration_alone_is_enough(tmp_path: Path) -> None:
    shutil.copy(DEMO_MODEL / "config.json", tmp_path)
    alone, whole = planned(tmp_path, "m2"), planned(DEMO_MODEL, "m2")
    assert alone.model.sizes == whole.model.sizes
    assert alone.need == whole.need
    assert alone.seconds == whole.seconds
    assert "config.json alone" in alone.lines[0]
    assert "headers" in whole.lines[0]


def test_stages_of_several_machines(of_7b: Path) -> None:
    one, two, four = (planned(of_7b, "m1", machines=m) for m in (1, 2, 4))
    assert not one.fits
    assert one.machines_needed == 2
    assert "does not fit; 2 machines would do" in "\n".join(one.lines)
    assert two.fits
    assert four.fits
    assert two.need.weights < one.need.weights * 0.55
    assert one.seconds / 2 < two.seconds < one.seconds * 0.6  # a stage waits for its first tile
    assert two.seconds / 2 < four.seconds < two.seconds * 0.6
    assert {"chunkwise_backend": "ray_compiled_chunks", "stages": 2}.items() <= two.asked.items()
    assert planned(of_7b, "m1", dtype="float32").machines_needed == 3


def test_spans_take_as_long_as_when_their_blocks_are_followed_one_by_one(of_7b: Path) -> None:
    """Where sending is no bottleneck: then a state takes a time of its own from a block to the same one of the next."""
    model = planned(of_7b, "h200").model
    hybrid = replace(model, config=model.config.model_copy(update={"slstm_at": [3, 20]}))
    for of, spans, tiles, gbit in product((model, hybrid), (2, 3, 8, 40), (1, 2, 7, 8, 65), (20, 1e6)):
        device, config = DEVICES["h200"], of.config
        times = [stage_seconds(of, device, range(b, b + 1), 4096, 256) for b in range(config.num_blocks)]
        sizes = [sum(torch.Size(s).numel() for s in config.state_shapes(b, 8).values()) for b in range(len(times))]
        before, free = [0.0] * len(times), [0.0] * spans
        for n in range(tiles):
            now, ends = free[n % spans], []
            for b, seconds in enumerate(times):
                there = before[b] + HOP_S + sizes[b] * 4 * 8 / (gbit * 1e9) if n else 0.0
                now = max(now, there) + seconds
                ends.append(now)
            before, free[n % spans] = ends, now
        found = in_turn_seconds(of, device, spans, tiles * 4096, 4096, 256, link_gbit=gbit)
        assert found == pytest.approx(now, rel=1e-9), (spans, tiles, gbit)


def test_stages_and_spans_are_as_the_page_says(of_7b: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/scaling.md has both on paper, for GPUs of one host: spans with hops of 1.5 ms, stages with none."""
    page = (Path(__file__).parents[2] / "docs" / "scaling.md").read_text()
    (table,) = re.findall(r"^\| tokens \| tiles \| four: stages .*?\n\n", page, re.MULTILINE | re.DOTALL)
    lines = [[re.split(r"[ :]", cell.strip())[0] for cell in line.strip("|").split("|")] for line in table.split("\n")]
    for text, tiles, *times in (line for line in lines[2:] if line[0]):
        tokens = int(text.replace(",", ""))
        assert tokens == int(tiles) * 4096
        one = planned(of_7b, "h200", tokens).seconds
        for number, stages, spans in ((4, *times[:2]), (8, *times[2:])):
            in_turn = planned(of_7b, "h200", tokens, spans=number, link_gbit=1e6)
            assert one / in_turn.seconds == pytest.approx(float(spans), rel=0.03)
            assert in_turn.better == "spans"
            with monkeypatch.context() as free:
                free.setattr(work, "HOP_S", 0.0)
                pipeline = planned(of_7b, "h200", tokens, machines=number, link_gbit=1e6)
            assert one / pipeline.seconds == pytest.approx(float(stages), abs=0.006)


def test_spans_have_all_weights_each_and_stages_a_part(of_7b: Path) -> None:
    one, four = planned(of_7b, "h200"), planned(of_7b, "h200", spans=4)
    assert four.need.weights == one.need.weights
    assert four.need.state - one.need.state == 4 * (33 + 2) * 8 * (256 * 512 + 256 + 1)
    assert {"chunkwise_backend": "ray_compiled_chunks", "spans": 4}.items() <= four.asked.items()
    assert "stages" not in four.asked
    stages = planned(of_7b, "h200", machines=4)
    assert {layout.name: layout.seconds for layout in stages.layouts} == {
        "stages": stages.seconds,
        "spans": four.seconds,
    }
    assert "spans are 1." in "\n".join(stages.lines)
    small = planned(of_7b, "m1", spans=4, heads_per_band=8)
    assert (small.fits, small.better, small.machines_needed) == (False, "stages", 2)
    assert "does not fit on each of 4 machines; 2 machines with a stage each would do" in "\n".join(small.lines)
    assert "4 spans, which do not fit" in "\n".join(small.lines)
    assert "for `spans` instead, give `heads_per_band=8`" in "\n".join(planned(of_7b, "m4-max", machines=4).lines)
    assert [layout.name for layout in planned(of_7b, "h200", spans=33).layouts] == ["spans"]


@pytest.mark.parametrize("slstm_at", [[], [0], [0, 1], [1, 2]])
def test_what_gpus_leave_for_the_next_one_is_part_of_the_need(tmp_path: Path, slstm_at: list[int]) -> None:
    """By rings as actors have them, through which all of it goes."""
    write_model(tmp_path, slstm_at=slstm_at, num_blocks=3)
    config = ModelConfig.from_file(tmp_path / "config.json")
    one, spans, stages = (planned(tmp_path, "h200", **more) for more in ({}, {"spans": 2}, {"machines": 3}))
    blocks = [[torch.zeros(shape) for shape in config.state_shapes(n, config.num_heads).values()] for n in range(3)]
    ring = Ring(len(blocks) + 1)
    for block in blocks * 3:
        ring.join(block)
    arriving = 2 * max(sum(part.nbytes for part in block) for block in blocks)
    left, made = spans.need.state - one.need.state - arriving, sum(places.nbytes for places in ring._rings)
    assert left > made if slstm_at == [1, 2] else left == made  # the larger ones come first, and nothing smaller stays
    assert (spans.tile_size, stages.tile_size) == (one.tile_size, one.tile_size)
    ring = Ring(3 * 3 + 2)  # on GPUs `Placement.token_depth` is three a stage
    ring.put(torch.zeros(1, one.tile_size, config.hidden_size, dtype=torch.bfloat16))
    assert stages.need.tile - one.need.tile == ring._rings[0].nbytes


def test_a_slow_network_holds_both_layouts_up(of_7b: Path) -> None:
    fast, slow = (planned(of_7b, "h200", spans=4, link_gbit=gbit) for gbit in (2400, 1))
    for quick, late in zip(fast.layouts, slow.layouts, strict=True):
        assert quick.seconds < late.seconds / 2
    state, stream = 4 * 32 * 8 * (256 * 512 + 256 + 1), 4096 * 4096 * 2
    assert slow.layouts[0].seconds > 15 * stream * 8 / 1e9  # of tiles, a machine sends its stream
    assert slow.layouts[1].seconds > 4 * state * 8 / 1e9  # of rounds, a machine sends its state
    default = planned(of_7b, "h200", spans=4)
    assert default.seconds == planned(of_7b, "h200", spans=4, link_gbit=10).seconds
    assert "with 10 Gbit/s between machines" in "\n".join(default.lines)


def test_the_tile_is_halved_until_it_fits(of_7b: Path) -> None:
    roomy = planned(of_7b, "m4-max", tile_size=65536)
    assert roomy.need.tile > planned(of_7b, "m4-max").need.tile
    small = planned(of_7b, "h100", mem_hard_pct=0.194)  # of 80 GB: 14,801 MiB, and tiles of 4096 need 14,666
    assert (small.fits, small.tile_size) == (True, 4096)
    small = planned(of_7b, "h100", mem_hard_pct=0.19)
    assert (small.fits, small.tile_size) == (True, 2048)
    assert not planned(of_7b, "h100", mem_hard_pct=0.18, tile_size=4096).fits


def test_the_table_of_macs_in_the_readme_is_what_plan_says(tmp_path: Path) -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    (table,) = re.findall(r"^\| xLSTM-7B \|.*?\n\n", readme, re.MULTILINE | re.DOTALL)
    head, _, *lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.split("\n") if line]
    forms = {
        "bfloat16": None,
        "8 bits, 32": {"bits": 8, "group_size": 32},
        "4 bits, 32": {"bits": 4, "group_size": 32},
        "4 bits, 64, with embedding and head": {"bits": 4, "group_size": 64, "embedding": True, "head": True},
    }
    assert [line[0] for line in lines] == list(forms)
    memories = [float(cell.removesuffix(" GB")) for cell in head[2:]]
    assert memories == [8, 16, 24, 32, 36, 48, 64]
    for name, weights, *cells in lines:
        (tmp_path / "config.json").write_text(
            json.dumps(XLSTM_7B | ({"quantization": q} if (q := forms[name]) else {}))
        )
        for gb, cell in zip(memories, cells, strict=True):
            found = planned(tmp_path, "m1", memory_gb=gb)
            assert cell == (str(found.tile_size) if found.fits else f"{found.machines_needed} Macs")
            assert weights == f"{found.model.sizes.all / 1e9:.1f} GB"
            assert found.device.memory_gb == gb
            if not found.fits:
                assert planned(tmp_path, "m1", machines=found.machines_needed or 0, memory_gb=gb).fits


def test_time_grows_with_the_prompt_and_memory_does_not(of_7b: Path) -> None:
    for device in DEVICES:
        short, long = planned(of_7b, device, 8192), planned(of_7b, device, 1 << 20)
        assert long.seconds == pytest.approx(128 * short.seconds, rel=1e-6)
        assert long.need == short.need
        assert short.device.source
    speeds = [planned(of_7b, name).tok_s for name in ("m1", "m1-pro", "m1-max", "m1-ultra", "h100")]
    assert speeds == sorted(speeds)
    tail = planned(of_7b, "h100", 4096 + 100).seconds  # a window of 256 tokens, padded
    assert tail == pytest.approx(planned(of_7b, "h100", 4096 + 256).seconds)


def test_a_small_model_on_a_large_gpu_waits_for_its_calls() -> None:
    assert planned(DEMO_MODEL, "h100", 16 * 4096).seconds == pytest.approx(16 * 4 * 0.75e-3)  # tiles x blocks


# Only absurd timings fail here, and only if they are absurd each time: other work may come in the middle of one.
def test_this_machine_is_probed_and_checked_by_a_real_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate, "FACTOR", 1.0)  # narrower than any run can be

    def is_near() -> bool:
        found = planned(DEMO_MODEL, "this", 4096, tile_size=64)  # which the README's example compiles too
        assert found.device.rate(torch.bfloat16) > 1e9
        assert found.device.bandwidth > 1e8
        with pytest.raises(EstimateError, match="beyond a factor of 1.0") as refused:
            estimate.check(found, print)
        pattern = r"measured +([\d,]+) tokens/s.*; estimated ([\d.]+) of it"
        ((measured, ratio),) = re.findall(pattern, str(refused.value))
        return 1 / 8 < found.tok_s / int(measured.replace(",", "")) < 8 and 1 / 8 < float(ratio) < 8

    assert any(is_near() for _ in range(5))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--device m9", "--device is 'm9'; there are: this, m1, m1-pro"),
        ("--device m1 --prompt-tokens 0", "--prompt-tokens is 0; allowed: 1 to"),
        ("--device m1 --machines 5", "--machines is 5; allowed: 1 to 4, the model's blocks"),
        ("--device m1 --memory-gb 0.5", "--memory-gb is 0.5; allowed: 1 to 4096"),
        ("--device this --memory-gb 8", "--memory-gb is for a device of the table; this machine's memory is known"),
        ("--device h100 --spans 0", "--spans is 0; allowed: a whole number from 1 to 1024"),
        ("--device h100 --spans 2 --machines 2", "--spans and --machines were both given, and a machine has all"),
        ("--device h100,h200 --spans 2", "--spans is for machines of one kind, and --device names 2"),
        ("--device h100 --spans 2 --heads-per-band 2", "--spans is 2, and each actor has all heads, but there are"),
        ("--device h100 --spans 2 --link-gbit 0", "--link-gbit is 0; allowed: 0.01 to 1000000"),
        ("--device h100 --link-gbit 3", "--link-gbit is for several machines (--machines, --spans); leave it out"),
        ("--device this --spans 2 --check", "--check runs on this machine"),
        ("--device m1 --check", "--check runs on this machine"),
        ("--device m1 --model nowhere", "nowhere: is not a directory"),
        ("--device m1 --tile-size 100", "--tile-size is 100, which is not a multiple of the chunk size 64"),
    ],
)
def test_mistakes_are_one_line(words: str, says: str, run: Callable[..., Ran]) -> None:
    ran = run("plan", "--prompt-tokens", 100, *words.split())
    assert ran.code == 1
    assert ran.error.startswith(f"error: {says}")


def test_for_programs(of_7b: Path, run: Callable[..., Ran]) -> None:
    row = run("plan", "--model", of_7b, "--device", "h200", "--prompt-tokens", 8192, "--json").row
    estimate = planned(of_7b, "h200", 8192)
    assert (row["seconds"], row["fits"], row["need_bytes"]["total"]) == (estimate.seconds, True, estimate.need.total)
    assert (row["tile_size"], row["dtype"], row["device"]["memory_gb"]) == (4096, "bfloat16", 141)


def test_layouts_for_programs_and_people(of_7b: Path, run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("plan", "--model", of_7b, "--device", "h200", "--prompt-tokens", 16384, "--link-gbit", 2400)
    row = run(*words, "--spans", 4, "--json").row
    assert (row["stages"], row["spans"], row["better"], row["machines"]) == (1, 4, "spans", 4)
    assert row["layouts"]["spans"]["seconds"] == row["seconds"] < row["layouts"]["stages"]["seconds"]
    assert row["layouts"]["spans"]["need_bytes"] == row["need_bytes"]["total"]
    monkeypatch.setenv("XLSTM_SPANS", "4")
    assert run(*words, "--json").row == row
    assert re.search(r"layout +\S+ s with 4 stages .*, \S+ s with 4 spans .*; spans are 1\.\d+ x", run(*words).out)
    assert run(*words, "--machines", 2).error.startswith("error: XLSTM_SPANS and --machines were both given")


def test_long_times_are_in_hours_and_what_cannot_be_known_is_said(of_7b: Path, run: Callable[..., Ran]) -> None:
    words = ("plan", "--model", of_7b, "--device", "m1-max", "--heads-per-band", 4)
    row = run(*words, "--prompt-tokens", 1 << 22, "--json").row
    people = run(*words, "--prompt-tokens", 1 << 22).out
    minutes = round(row["seconds"] / 60)
    assert minutes > 120
    assert f"{row['seconds']:,.0f} s ({minutes // 60:,} h {minutes % 60} min) for 4,194,304 tokens" in people
    assert " h " not in run(*words, "--prompt-tokens", 64).out.partition("not known")[0].partition("time ")[2]
    assert "other work on the machine" in row["not_known"]
    assert row["not_known"] in people
    assert row["workers"] == 2  # 8 heads in bands of 4, not the 6 of the setting


def test_unlike_machines_have_stages_by_their_speed_and_memory(of_7b: Path, run: Callable[..., Ran]) -> None:
    words = ("plan", "--model", of_7b, "--prompt-tokens", 65536)
    row, people = run(*words, "--device", "m1,m4", "--json").row, run(*words, "--device", "m1,m4").out
    m1, m4 = row["layout"]
    assert (m1["device"], m4["device"]) == ("m1", "m4")
    assert (m1["blocks"][0], m4["blocks"][1], m1["blocks"][1] + 1) == (0, 31, m4["blocks"][0])
    assert m1["block_s"]["mLSTM"] > m4["block_s"]["mLSTM"]
    assert m1["blocks"][1] + 1 < 16 < 32 - m4["blocks"][0]
    for each in row["layout"]:
        assert each["need_bytes"] <= each["room_bytes"]
        assert f"stage       blocks {each['blocks'][0]}-{each['blocks'][1]} on {each['device']} (" in people
    assert "--stages auto" in people
    alike = planned(of_7b, "m4", machines=2)
    assert planned(of_7b, "m4,m4").seconds == pytest.approx(alike.seconds)
    assert alike.seconds < row["seconds"] < planned(of_7b, "m4").seconds

    slow, fast = run(*words, "--device", "m1,m1-ultra", "--json").row["layout"], planned(of_7b, "m1-ultra,m1")
    assert len(slow) == len(fast.split or []) == 2
    assert run(*words, "--device", "m1,h100").error.endswith("the actors of a grid work on one kind of device")
    assert (
        "--machines has no effect beside 2 names in --device" in run(*words, "--device", "m1,m4", "--machines", 2).error
    )
    assert "--memory-gb is for one device" in run(*words, "--device", "m1,m4", "--memory-gb", 16).error
    assert "--device is 'm5'; there are: this, m1" in run(*words, "--device", "m1,m5").error
