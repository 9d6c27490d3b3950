"""What the states of documents may take is a part of the memory that a service needs: computed, shown and checked."""

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Ran
from services import WORDS, model, serving

from xlstm_ray.config import ModelConfig
from xlstm_ray.memory.room import usual_documents

__all__ = ["model"]
MIB = 1 << 20


def parts(text: str) -> dict[str, int]:
    """The parts of a need, in MiB, and `total`."""
    found = re.search(r"(program .*?) = ([\d,]+) MiB", text)
    assert found is not None, text
    pairs = [part.rsplit(" ", 1) for part in found[1].split(" + ")]
    return {name: int(size.replace(",", "")) for name, size in [*pairs, ["total", found[2]]]}


def test_more_than_fits_is_refused_with_the_arithmetic(model: Path, run: Callable[..., Ran]) -> None:
    ran = run("serve", "--model", model, *WORDS, "--port", 0, "--states-mb", 90_000_000)
    need = parts(ran.error)
    assert ran.code == 3
    assert need["documents' states"] == 90_000_000
    assert abs(sum(need.values()) - 2 * need["total"]) <= 4  # rounded
    assert "give --states-mb below 90000000" in ran.error
    ran = run("serve", "--model", model, *WORDS, "--port", 0, "--states-mb", 900, "--config", _limit(model.parent, 900))
    assert ran.code == 3
    assert "900 MiB are allowed" in ran.error
    assert parts(ran.error)["documents' states"] == 900


def _limit(folder: Path, mb: int) -> Path:
    """Settings with a limit of memory, which is no option of a service."""
    path = folder / f"limit-{mb}.toml"
    path.write_text(f"mem_hard_mb = {mb}\n")
    return path


def test_by_default_it_is_a_part_of_what_is_free(model: Path, run: Callable[..., Ran]) -> None:
    config = _limit(model.parent, 1200)
    with serving("--model", model, *WORDS, "--config", config, start=subprocess.Popen) as service:
        most = service.ask("/load").json["documents"]["most"]
        need = parts("".join(service.errors))
    assert 100 * MIB < most < 300 * MIB  # of 1,200, the program has some hundreds
    assert need["documents' states"] == round(most / MIB)
    assert most == pytest.approx((1200 - need["total"] + most / MIB) / 4 * MIB, abs=2 * MIB)
    shown = json.loads(run("config", "--model", model, *WORDS, "--config", config, "--json").out)["states_mb"]
    assert 100 < shown["value"] < 300
    shown = json.loads(run("config", "--model", model, "--states-mb", 7, "--json").out)["states_mb"]
    assert (shown["value"], shown["source"]) == (7, "flag")
    assert [usual_documents(free * MIB) // MIB for free in (-5, 8, 40_000)] == [0, 2, 4096]


def test_no_more_documents_than_may_be_are_taken_and_the_reply_says_why(model: Path) -> None:
    size = ModelConfig.from_file(model / "config.json").state_file_bytes(1)
    fits = MIB // size
    with serving("--model", model, *WORDS, "--states-mb", 1) as service:
        assert service.ask("/load").json["documents"]["most"] == MIB
        assert parts("".join(service.errors))["documents' states"] == 1
        for n in range(fits):
            assert service.ask("/v1/states", {"id": f"{n}", "prompt": "a"}).status == 202
        for got in (
            service.ask("/v1/states", {"prompt": "a"}),
            service.ask("/v1/states/file", b"a", "PUT"),
            service.ask("/v1/states", {"id": "copy", "state": "0"}),
        ):
            assert (got.status, got.error["code"]) == (400, "states_full")
            assert f"{fits} states of" in got.error["message"]


def test_the_plan_on_paper_has_it(model: Path, run: Callable[..., Ran]) -> None:
    words = "plan", "--model", model, "--device", "m1", "--prompt-tokens", 100, "--json"
    plain, with_them = (json.loads(run(*words, *more).out) for more in ([], ["--states-mb", 512]))
    assert with_them["need_bytes"]["documents"] == 512 * MIB
    assert with_them["need_bytes"]["total"] - plain["need_bytes"]["total"] == 512 * MIB
