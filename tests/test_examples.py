"""The examples run, with the demo model and uncompiled kernels, and print what they promise."""

import re
import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def said(name: str, capsys: pytest.CaptureFixture[str]) -> list[str]:
    runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"](chunkwise_backend="native", device="cpu")
    return capsys.readouterr().out.splitlines()


def test_all_are_short_and_are_run_here() -> None:
    files = {file.stem: file.read_text() for file in EXAMPLES.glob("*.py")}
    assert set(files) == {"ask_a_saved_state", "batch", "stop_and_resume"}
    assert all(text.count("\n") < 40 for text in files.values())


def test_a_saved_state_answers_each_question(capsys: pytest.CaptureFixture[str]) -> None:
    _, *answers = said("ask_a_saved_state", capsys)
    assert [re.search(r"is (\w+)", line)[1] for line in answers] == ["Tokyo", "Nairobi"]  # type: ignore[index]


def test_rows_of_a_batch_are_printed_the_shortest_first(capsys: pytest.CaptureFixture[str]) -> None:
    lines = said("batch", capsys)
    assert sorted(line.split()[1] for line in lines) == ["0", "1", "2"]
    assert lines[-1].startswith("prompt 0 of ")
    assert "goes on with ' Lisbon'" in lines[0] + lines[1]


def test_a_stopped_prefill_goes_on_to_the_same_bits(capsys: pytest.CaptureFixture[str]) -> None:
    stopped, rest, same = said("stop_and_resume", capsys)
    assert stopped == "stopped after 128 tokens; complete: False"
    assert int(rest.split()[3]) > 100
    assert same == "the same bits: True"
