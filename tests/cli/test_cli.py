"""The command line from outside: its output, the order of it, and its exit codes.

Most calls run in this process, through the entry point; what only a process of its own shows (signals, terminals,
closed files, a machine without a compiler) runs in one. The eager backend is used: compilation is not the point here.
"""

import csv
import io
import json
import os
import pty
import re
import shlex
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import programs
import pytest
import torch
from conftest import Ran
from programs import PROGRAM
from tiny import make_model

import xlstm_ray
from xlstm_ray import Engine, PrefillResult, RecurrentState
from xlstm_ray.choose import setup_of
from xlstm_ray.cli import reporter
from xlstm_ray.cli.keep import resume_command

PROMPT = "The time has come, the walrus said"
KEYS = (
    "model device dtype dtype_reason backend prompt_tokens resumed_tokens tile_size chunk_size bands stages layout "
    "compile_s ttft_s prefill_s prefill_tok_s peak_memory_bytes state_path state_digest next_tokens load_s tiles "
    "launches tile_tok_s_median tile_tok_s_p99 peak_process_bytes peak_device_bytes"
).split()
LONG = "To talk of many things: of shoes and ships and sealing-wax. " * 50  # 3000 tokens, some seconds


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    # No end token, so that as many tokens are made as are asked for.
    make_model(directory, hidden_size=32, num_hidden_layers=2, num_heads=2, eos_token_id=None)
    return directory


@pytest.fixture(scope="module")
def options(model: Path) -> tuple[str, ...]:
    """Options of every run here."""
    return "--model", str(model), "--chunkwise-backend", "native", "--device", "cpu"


@contextmanager
def start(*words: object, **how: Any) -> Iterator[subprocess.Popen[str]]:
    """The program in its own process, which ends with the test."""
    how = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **how}
    with programs.Popen([PROGRAM, *map(str, words)], **how) as process:
        try:
            yield process
        finally:
            process.kill()


def finish(process: subprocess.Popen[str], **how: Any) -> Ran:
    out, err = process.communicate(timeout=120, **how)
    return Ran(process.returncode, out or "", err or "")


# -- help and usage ----------------------------------------------------------------------------------------------------
# One process imports the program, once; each command line is run in a fork of it, which tells what it has imported.
EACH = """
import json, os, sys
from xlstm_ray.cli.app import main
for line in json.loads(sys.argv[1]):
    sys.stdout.flush()
    child = os.fork()
    if not child:
        sys.argv = ["xlstm-ray", *line.split()]
        try:
            main()
        finally:
            print(json.dumps(["\\n", *sys.modules]))
    print(json.dumps([line, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])]))
"""


def modules_after(lines: Sequence[str], folder: Path) -> dict[str, tuple[int, set[str], str]]:
    """By command line: its exit code, the imported modules, and its output."""
    done = subprocess.run(
        [sys.executable, "-c", EACH, json.dumps(lines)], cwd=folder, capture_output=True, text=True, timeout=120
    )
    found, printed = {}, ""
    modules: set[str] = set()
    for line in done.stdout.splitlines(keepends=True):
        if line.startswith('["\\n", "'):
            modules = set(json.loads(line))
        elif line.startswith("["):
            name, code = json.loads(line)
            found[name], printed, modules = (code, modules, printed), "", set()
        else:
            printed += line
    assert list(found) == list(lines), done.stderr
    return found


def test_help_answers_without_torch(tmp_path):
    code, found, printed = modules_after(["--help"], tmp_path)["--help"]
    assert code == 0
    assert "prefill   Compute a prompt's state and the likeliest next tokens." in printed
    assert {"typer", "rich"} <= found  # rich draws the panels
    assert not found & {"torch", "tokenizers", "safetensors", "ray", "numpy", "huggingface_hub"}


COMMANDS = "prefill generate chat score download doctor config up status down parity bench plan".split()


@pytest.mark.parametrize(
    ("words", "place"), [(["plan"], " plan"), (["client", "ask", "--nope"], " client ask"), (["nope"], "")], ids=str
)
def test_a_word_that_is_wrong_names_the_help_of_its_command(run, words, place):
    failed = run(*words)
    assert failed.code == 2
    assert failed.err.endswith(f"; see xlstm-ray{place} --help\n")


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_is_whole_at_80_columns(command, run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    words = [command] if command else []
    shown = run(*words, "--help")
    assert shown.code == 0
    assert run(*words, "-h").out == shown.out
    assert shown.err == ""
    assert "\u2026" not in shown.out  # rich's mark for cut text
    assert "..." not in shown.out.replace("[ARGS]...", "")
    assert all(len(line) <= 80 for line in shown.out.splitlines())


def test_help_has_panels_and_examples(run):
    shown = run("generate", "--help").out
    titles = re.findall(r"^\u256d\u2500 (.+?) \u2500", shown, re.MULTILINE)
    for title in ("Prompt", "Sampling", "State", "Output", "Model", "Memory", "Journal and logs"):
        assert titles.count(title) == 1
    assert 'xlstm-ray generate -p "The capital of France is" -n 8' in shown
    assert {"Run a model", "Ray heads", "Look and measure"} <= set(
        re.findall(r"^\u256d\u2500 (.+?) \u2500", run("--help").out, re.MULTILINE)
    )


def test_no_arguments_are_answered_with_help(run):
    assert run() == run("--help")


def test_short_options_are_the_long_ones(run, options, model, tmp_path):
    (tmp_path / "prompt").write_text(PROMPT)
    long = ("--model", model, "--device", "cpu", "--prompt-file", tmp_path / "prompt", "--max-new-tokens", 3)
    short = ("-m", model, "-d", "cpu", "-f", tmp_path / "prompt", "-n", 3)
    rows = [
        run("generate", *words, out, tmp_path / out, "--chunkwise-backend", "native", "--json").row
        for words, out in ((long, "--state-out"), (short, "-o"))
    ]
    assert rows[0]["text"] == rows[1]["text"]
    assert rows[0]["state_digest"] == rows[1]["state_digest"] == RecurrentState.load(tmp_path / "-o").digest()
    assert run("prefill", *options, "-p", PROMPT, "--json").row["prompt_tokens"] == len(PROMPT)


def test_completion_for_a_shell(tmp_path):
    def complete(how: str, **variables: str) -> str:
        env = {**os.environ, "HOME": str(tmp_path), "_XLSTM_RAY_COMPLETE": how, **variables}
        return programs.run([PROGRAM], capture_output=True, text=True, env=env, timeout=60).stdout

    assert complete("complete_bash", COMP_WORDS="xlstm-ray pre", COMP_CWORD="1").split() == ["prefill"]
    assert "_XLSTM_RAY_COMPLETE=complete_bash" in complete("source_bash")


def test_as_a_module_of_python(options):
    module = [sys.executable, "-m", "xlstm_ray"]
    words = [*module, "prefill", *options, "--prompt", LONG, "--tile-size", "128", "--progress", "ndjson"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        interrupt_after(process, 1, signal.SIGINT)
        ran = finish(process)
    assert ran.code == 130
    shown = subprocess.run([*module, "--version"], capture_output=True, text=True, timeout=60)
    assert shown.stdout == f"xlstm-ray {xlstm_ray.__version__}\n"


def test_a_command_to_go_on_is_given_for_the_way_that_the_program_was_started(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/a place/xlstm_ray/__main__.py", "prefill"])
    assert resume_command(["--state-in", "s"]) == f"{sys.executable} -m xlstm_ray prefill --state-in s"


WITHOUT_TORCH = [
    "prefill",
    "prefill --no-such",
    "prefill --prompt-file none",
    "prefill --prompt a --model none",
    "prefill --prompt a --model .",
    "prefill --prompt a --chunkwise-backend eager",
    "prefill --prompt a --tile-size 100",
    "prefill --prompt a --heads-per-band 99",
    "prefill --prompt a --chunk-size 3 --tile-size 4 --device cuda",
    "prefill --prompt a --stages 2",
    "prefill --prompt a --stages 99 --chunkwise-backend ray_compiled_chunks --no-ray-local-mode",
    "prefill --prompt a --journal-every 2",
    "prefill --prompt a --resume . --journal .",
    "prefill --resume .",
    "prefill --state-in none",
    "generate --prompt a --top-p 2",
    "generate --prompt a --temperature 0 --seed 1",
    "generate --prompt a --max-new-tokens 0",
    "config --tile-size 100",
    "config --chunkwise-backend eager",
    "bench --backends eager",
]


@pytest.fixture(scope="module")
def answered(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, set[str], str]]:
    return modules_after(WITHOUT_TORCH, tmp_path_factory.mktemp("empty"))


@pytest.mark.parametrize("words", WITHOUT_TORCH)
def test_mistakes_are_answered_without_torch(words, answered):
    code, found, _ = answered[words]
    assert code == (2 if "--no-such" in words else 1)
    assert "xlstm_ray.cli.app" in found
    assert "torch" not in found


@pytest.mark.parametrize("command", ["prefill", "generate"])
def test_help_names_every_option_of_the_command(command, run):
    ran = run(command, "--help")
    assert ran.code == 0
    assert ran.err == ""
    for option in (
        "--prompt --prompt-file --jsonl --model --device --dtype --chunkwise-backend --tile-size --chunk-size "
        "--heads-per-band --workers --state-in --state-out --json --progress"
    ).split():
        assert re.search(rf"^\u2502 +{option}\b", ran.out, re.MULTILINE), option


# (words, exit code, what the line must say)
MISTAKES: dict[str, tuple[str, int, tuple[str, ...]]] = {
    "an unknown command": ("prefil", 2, ("prefil", "prefill")),
    "an unknown option": ("prefill --promt a", 2, ("--promt", "--prompt")),
    "an option of another command": ("prefill --prompt a --temperature 1", 2, ("--temperature",)),
    "an option without its value": ("prefill --prompt", 2, ("--prompt", "requires an argument")),
    "a word too many": ("prefill a --prompt b", 2, ("a",)),
    "no prompt": ("prefill", 1, ("no prompt", "--prompt", "--prompt-file", "--state-in")),
    "an empty prompt": ("prefill --prompt ''", 1, ("empty",)),
    "two prompts": ("prefill --prompt a --prompt-file b", 1, ("--prompt", "--prompt-file", "give one")),
    "lines of nothing": ("prefill --prompt a --jsonl", 1, ("--jsonl", "--prompt-file")),
    "a file that is not there": ("prefill --prompt-file none", 1, ("none", "No such file")),
    "a directory for a file": ("prefill --prompt-file .", 1, (".", "directory")),
    "a name too long": (f"prefill --prompt-file {'x' * 300}", 1, ("File name too long",)),
    "a word for a number": ("prefill --prompt a --tile-size many", 2, ("--tile-size", "many", "integer")),
    "half a number": ("prefill --prompt a --workers 1.5", 2, ("--workers", "1.5", "integer")),
    "no tile": ("prefill --prompt a --tile-size 0", 1, ("--tile-size", "0", "from 1 to")),
    "a negative tile": ("prefill --prompt a --tile-size=-64", 1, ("--tile-size", "-64", "from 1 to")),
    "a huge tile": ("prefill --prompt a --tile-size 9999999", 1, ("--tile-size", "9999999", "65536")),
    "no chunk": ("prefill --prompt a --chunk-size 0", 1, ("--chunk-size", "0", "from 1 to")),
    "no workers": ("prefill --prompt a --workers 0", 1, ("--workers", "0", "from 1 to")),
    "no heads": ("prefill --prompt a --heads-per-band 0", 1, ("--heads-per-band", "0", "from 1 to")),
    "half a chunk": ("prefill --prompt a --tile-size 24", 1, ("--tile-size", "24", "16", "32")),
    "more heads than there are": ("prefill --prompt a --heads-per-band 3", 1, ("--heads-per-band", "3", "2 heads")),
    "a device of no kind": ("prefill --prompt a --device tpu", 1, ("--device", "tpu", "auto, mps, cuda, cpu")),
    "a device that is not here": ("prefill --prompt a --device mps", 1, ("--device", "mps", "available: ", "cpu")),
    "a type of no kind": ("prefill --prompt a --dtype int4", 1, ("--dtype", "int4", "auto, float32, bfloat16")),
    "a backend of no kind": (
        "prefill --prompt a --chunkwise-backend eager",
        1,
        ("eager", "queued_compiled_chunks, queued_compiled_steps, ray_compiled_chunks"),
    ),
    "a progress of no kind": ("prefill --prompt a --progress dots", 2, ("--progress", "dots", "ndjson")),
    "a model that is not there": ("prefill --prompt a --model none", 1, ("none", "--model", "config.json")),
    "a model that is a file": (f"prefill --prompt a --model {__file__}", 1, (__file__, "--model", "directory")),
    "a model that is a directory": ("prefill --prompt a --model .", 1, ("config.json", "missing")),
    "a state that is not there": ("prefill --prompt a --state-in none", 1, ("none", "no such state file")),
    "a state that is none": (f"prefill --prompt a --state-in {__file__}", 1, (__file__, "state file")),
    "no new tokens": ("generate --prompt a --max-new-tokens 0", 1, ("--max-new-tokens", "0", "1 or more")),
    "a negative temperature": ("generate --prompt a --temperature=-1", 1, ("--temperature", "-1", "0 (greedy) to 100")),
    "a temperature that is none": ("generate --prompt a --temperature nan", 1, ("--temperature", "nan")),
    "a seed without sampling": ("generate --prompt a --temperature 0 --seed 1", 1, ("--seed", "no effect", "leave")),
    "a mass of nothing": ("generate --prompt a --top-p 0", 1, ("--top-p", "0", "up to 1")),
    "a mass of two": ("generate --prompt a --top-p 2", 1, ("--top-p", "2", "up to 1")),
    "a negative seed": ("generate --prompt a --seed=-1", 1, ("--seed", "-1", "2^63")),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_that_says_what_was_given_and_what_to_do(name, run, options, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words, code, said = MISTAKES[name]
    # Later options win: those of the table.
    command, *rest = shlex.split(words) or [""]
    ran = run(*([command, *options, *rest] if rest and code == 1 else [command, *rest] if command else []))
    assert ran.code == code
    assert len(ran.error) < 700
    for text in said:
        assert text in ran.error


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("XLSTM_MPS_WORKERS", "many"),
        ("XLSTM_MPS_HEADS_PER_BAND", "-1"),
        ("XLSTM_T_INNER", ""),
        ("XLSTM_MPS_WORKERS", "0"),
    ],
)
def test_a_mistake_in_the_environment_names_the_variable(variable, value, run, options, monkeypatch):
    monkeypatch.setenv(variable, value)
    ran = run("prefill", *options, "--prompt", PROMPT)
    assert variable in ran.error
    assert repr(value) in ran.error


def test_a_backend_from_the_environment_must_exist(run, model, monkeypatch):
    monkeypatch.setenv("XLSTM_CHUNKWISE_BACKEND", "no_such")
    assert "no_such" in run("prefill", "--model", model, "--prompt", PROMPT).error


def test_an_option_wins_over_its_variable(run, options, monkeypatch):
    monkeypatch.setenv("XLSTM_MPS_HEADS_PER_BAND", "1")
    assert run("prefill", *options, "--json", "--prompt", PROMPT).row["bands"] == 2
    assert run("prefill", *options, "--json", "--prompt", PROMPT, "--heads-per-band", 2).row["bands"] == 1


# -- prompts -----------------------------------------------------------------------------------------------------------
def test_the_same_prompt_from_option_file_and_standard_input(run, options, tmp_path):
    (tmp_path / "prompt").write_text(PROMPT + "\n")
    given = run("prefill", *options, "--json", "--prompt", PROMPT).row
    from_file = run("prefill", *options, "--json", "--prompt-file", tmp_path / "prompt").row
    with start("prefill", *options, "--json", "--prompt-file", "-", stdin=subprocess.PIPE) as process:
        piped = finish(process, input=PROMPT + "\n").row
    assert given["prompt_tokens"] == len(PROMPT)
    assert given["state_digest"] == from_file["state_digest"] == piped["state_digest"]


@pytest.mark.parametrize(
    ("data", "said"),
    [(b"", "empty"), (b"\n", "empty"), (b"abc\xff", "byte 3"), (b"\xe2\x82", "UTF-8"), ("x".encode("utf-16"), "UTF-8")],
)
def test_a_prompt_file_that_is_no_text(data, said, run, options, tmp_path):
    path = tmp_path / "prompt"
    path.write_bytes(data)
    error = run("prefill", *options, "--prompt-file", path).error
    assert str(path) in error
    assert said in error


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n"])
@pytest.mark.parametrize("jsonl", [False, True])
def test_marks_and_ends_of_lines_of_other_systems_are_not_the_prompts(mark, end, jsonl, run, options, tmp_path):
    path = tmp_path / "prompt"
    text = json.dumps(PROMPT) if jsonl else PROMPT
    path.write_bytes(mark + text.encode() + end)
    row = run("prefill", *options, "--prompt-file", path, "--jsonl" if jsonl else "--json").row
    assert row["prompt_tokens"] == len(PROMPT)
    path.write_bytes(mark + end)
    empty = run("prefill", *options, "--prompt-file", path, *(["--jsonl"] if jsonl else []))
    assert f"{path}: is empty" in empty.error


def test_what_is_inside_a_prompt_stays(run, options, tmp_path):
    (tmp_path / "prompt").write_bytes(b"a\r\n\xef\xbb\xbfb\r\n\r\n")
    assert run("prefill", *options, "--json", "--prompt-file", tmp_path / "prompt").row["prompt_tokens"] == 9


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"a\nb\nc\xff", ("line 3", "byte 5")),
        (b"\xef\xbb\xbfa\n\xff", ("line 2", "byte 5")),
        (PROMPT.encode("utf-16"), ("line 1", "UTF-16", "save it as UTF-8")),
    ],
)
def test_a_text_of_another_encoding_is_refused_by_its_line(data, said, run, options, tmp_path):
    (tmp_path / "prompt").write_bytes(data)
    for words in ((), ("--jsonl",)):
        error = run("prefill", *options, "--prompt-file", tmp_path / "prompt", *words).error
        assert error.startswith(f"error: {tmp_path / 'prompt'}, line")
        for part in said:
            assert part in error


@pytest.fixture
def standard_input(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Any], None]]:
    """Replaces this process's standard input by an open file or a pipe's end."""
    kept = os.dup(0)

    def put(file: Any) -> None:
        os.dup2(file.fileno(), 0)
        monkeypatch.setattr(sys, "stdin", open(0, closefd=False))

    yield put
    os.dup2(kept, 0)
    os.close(kept)


@pytest.mark.parametrize("words", [("--prompt", "-"), ("--prompt-file", "-"), ()], ids=["prompt", "file", "neither"])
@pytest.mark.parametrize("kind", ["pipe", "file"])
def test_a_text_on_standard_input(words, kind, run, options, standard_input, tmp_path):
    (tmp_path / "prompt").write_text(PROMPT + "\n")
    end, other = os.pipe()
    os.write(other, (PROMPT + "\n").encode())
    os.close(other)
    with open(end) as pipe, open(tmp_path / "prompt") as file:
        standard_input(pipe if kind == "pipe" else file)
        ran = run("prefill", *options, "--json", *words)
    assert ran.row["prompt_tokens"] == len(PROMPT)
    assert ran.err == ("" if words else "note: the prompt is read from standard input\n")


def test_a_text_on_standard_input_beside_a_prompt_is_told_and_left(options, tmp_path):
    script = f"{shlex.join([str(PROGRAM), 'prefill', *options, '--json', '--prompt', PROMPT])}; cat"
    (tmp_path / "more").write_text("what comes next")
    with open(tmp_path / "more") as file:
        done = subprocess.run(["bash", "-c", script], stdin=file, capture_output=True, text=True, timeout=120)
    result, _, rest = done.stdout.partition("\n")
    assert json.loads(result)["prompt_tokens"] == len(PROMPT)
    assert done.stderr.splitlines() == [
        "note: standard input has a text that is not read; --prompt-file - makes it the prompt"
    ]
    assert rest == "what comes next"


def test_bytes_that_are_no_text_in_an_option(run, options):
    # What Python makes of `--prompt $'caf\xe9'`.
    error = run("prefill", *options, "--prompt", "caf\udce9").error
    assert "not Unicode text" in error
    assert "character 3" in error


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "has no prompts"),
        ("\n\n", "has no prompts"),
        ("a", "line 1"),
        ('"a"\n{"prompt": 1}', "line 2"),
        ('"a"\n\n{"text": "b"}', "line 3"),
        ('"a"\n""', "line 2: the prompt is empty"),
        ('{"prompt": ""}', "line 1: the prompt is empty"),
        ('"a"\n{"prompt": "b", "max_tokens": 3}', "line 2: 'max_tokens' is not a key; there are: prompt, id"),
        ('{"promt": "b"}', "line 1: 'promt' is not a key; did you mean prompt?"),
        ('{"prompt": "a", "prompt": "b"}', "line 1: is not JSON (the key 'prompt' is there twice)"),
        ('"a"\n"b \\ud83d"', "line 2: the prompt is not Unicode text"),
        ('{"prompt": null}', "line 1"),
        ("[" * 100_000, "line 1"),
        ('"\\ud800"', "not Unicode text"),
    ],
)
def test_lines_that_are_no_prompts(text, said, run, options, tmp_path):
    path = tmp_path / "prompts"
    path.write_text(text)
    error = run("prefill", *options, "--prompt-file", path, "--jsonl").error
    assert said in error


def test_a_line_of_results_for_every_line_of_prompts(run, options, tmp_path):
    prompts = [PROMPT, "a\u2028b\u0085c", "x" * 50]  # what JSON may hold as it is, and str.splitlines would split
    lines = [
        json.dumps(prompts[0]),
        json.dumps({"prompt": prompts[1], "id": 7}, ensure_ascii=False),
        json.dumps(prompts[2]),
    ]
    (tmp_path / "prompts").write_text("\n".join(lines))
    ran = run("prefill", *options, "--tile-size", 32, "--prompt-file", tmp_path / "prompts", "--jsonl")
    assert ran.code == 0
    rows = sorted(
        map(json.loads, ran.out.splitlines()), key=lambda row: row["index"]
    )  # lines come in the order in which they are ready
    assert [row.get("id") for row in rows] == [None, 7, None]
    for row, prompt in zip(rows, prompts, strict=True):
        alone = run("prefill", *options, "--tile-size", 32, "--json", "--prompt", prompt).row
        assert set(KEYS) <= set(row)
        assert row["prompt_tokens"] == alone["prompt_tokens"] == len(prompt.encode())
        assert [t["id"] for t in row["next_tokens"]] == [t["id"] for t in alone["next_tokens"]]
        assert [t["logprob"] for t in row["next_tokens"]] == pytest.approx([t["logprob"] for t in alone["next_tokens"]])
    made = run("generate", *options, "--max-new-tokens", 3, "--prompt-file", tmp_path / "prompts", "--jsonl")
    assert [json.loads(line)["new_tokens"] for line in made.out.splitlines()] == [3, 3, 3]


# -- output ------------------------------------------------------------------------------------------------------------
def test_prefill_for_people(run, options, tmp_path):
    ran = run("prefill", *options, "--prompt", PROMPT, "--state-out", tmp_path / "state", "--tile-size", 32)
    assert ran.code == 0
    assert ran.err == ""  # no terminal, so no bar
    found = dict(re.findall(r"^(\S+(?: \S+)*)  +(\S.*)$", ran.out, re.MULTILINE))
    assert found["device"] == "cpu (float32)"
    assert found["backend"] == "native, tiles of 32, chunks of 16, 1 stage(s) x 1 band(s)"
    assert found["prompt tokens"] == str(len(PROMPT))
    assert re.fullmatch(r"\d+\.\d{3} s \([\d,]+ tokens/s\)", found["first token in"])
    assert re.fullmatch(r"\d+\.\d s", found["load time"])
    assert re.fullmatch(r"\d+\.\d s", found["compile time"])
    assert re.fullmatch(r"[\d,]+ MiB", found["peak memory"])
    digest = RecurrentState.load(tmp_path / "state").digest()
    assert found["state"] == f"{tmp_path / 'state'} (digest {digest[:16]}...)"
    assert len(re.findall(r"^ +\d+\.\d%  '.*' \(\d+\)$", ran.out, re.MULTILINE)) == 5


def test_prefill_for_programs(run, options, model, tmp_path):
    row = run("prefill", *options, "--json", "--prompt", PROMPT, "--state-out", tmp_path / "state").row
    assert set(KEYS) <= set(row)
    assert row["model"] == str(model)
    assert (row["device"], row["dtype"], row["backend"]) == ("cpu", "float32", "native")
    assert (row["bands"], row["stages"], row["chunk_size"]) == (1, 1, 16)
    assert (row["prompt_tokens"], row["resumed_tokens"]) == (len(PROMPT), 0)
    assert row["ttft_s"] > 0
    assert row["prefill_tok_s"] == pytest.approx(len(PROMPT) / row["prefill_s"])
    assert row["peak_memory_bytes"] > 50 << 20
    assert (row["launches"], row["peak_device_bytes"]) == (None, None)  # nothing is launched on a CPU
    assert row["state_path"] == str(tmp_path / "state")
    assert row["state_digest"] == RecurrentState.load(tmp_path / "state").digest()
    assert [set(token) for token in row["next_tokens"]] == [{"id", "text", "logprob"}] * 5
    assert row["next_tokens"] == sorted(row["next_tokens"], key=lambda token: -token["logprob"])
    without = run("prefill", *options, "--json", "--prompt", PROMPT).row
    assert without["state_path"] is None
    assert without["state_digest"] == row["state_digest"]


def test_the_first_token_from_the_prompt_and_from_the_command(options):
    began = time.monotonic()
    with start("prefill", *options, "--prompt", PROMPT, "--json") as process:
        row = finish(process).row
    whole = time.monotonic() - began
    # A process's start is known to a hundredth of a second.
    assert row["prefill_s"] < row["ttft_s"] < row["ttft_command_s"] < row["total_s"] < whole + 0.02
    assert row["ttft_command_s"] > row["load_s"] + row["ttft_s"]  # and torch was imported before


def test_people_are_told_how_long_the_whole_command_took(run, options):
    said = run("generate", *options, "--prompt", PROMPT, "--max-new-tokens", 2).err
    assert re.search(r"whole command [\d,.]+ s to the first token, [\d,.]+ s in all$", said, re.MULTILINE)
    people = run("prefill", *options, "--prompt", PROMPT).out
    assert re.search(r"^whole command   [\d,.]+ s to the first token, [\d,.]+ s in all$", people, re.MULTILINE)


def test_every_tile_has_its_own_speed(run, options, tmp_path):
    words = ("prefill", *options, "--prompt", PROMPT * 3, "--tile-size", 32, "--json", "--progress", "ndjson")
    ran = run(*words, "--stats-log", tmp_path / "tiles.csv")
    row, events = json.loads(ran.out), [json.loads(line) for line in ran.err.splitlines()]
    done = [0, *(event["tokens_done"] for event in events)]
    rates = [(b - a) / event["tile_s"] for a, b, event in zip(done, done[1:], events, strict=False)]
    assert done == [0, 32, 64, 96, len(PROMPT) * 3]  # the last window is a chunk of six tokens
    assert (row["tiles"], row["tail_windows"]) == (4, 1)
    assert row["tile_tok_s_median"] == pytest.approx(sorted(rates[:3])[1])  # a tail's window is not a tile
    assert row["tile_tok_s_p99"] == pytest.approx(min(rates[:3]))
    with open(tmp_path / "tiles.csv") as file:
        logged = list(csv.DictReader(file))
    times = [datetime.fromisoformat(tile["time"]) for tile in logged]
    assert times == sorted(times)
    assert abs((datetime.now().astimezone() - times[-1]).total_seconds()) < 60
    assert [int(tile["tokens_done"]) for tile in logged] == done[1:]
    assert [float(tile["tile_s"]) for tile in logged] == [event["tile_s"] for event in events]
    people = run("prefill", *options, "--prompt", PROMPT * 3, "--tile-size", 32).out
    assert re.search(
        r"^tiles +4, 1 of them the tail's: median [\d,]+ tokens/s, 99 % reach [\d,]+$", people, re.MULTILINE
    )


@pytest.mark.parametrize("option", ["--tile-size 32", "--chunk-size 8", "--heads-per-band 1", "--dtype bfloat16"])
def test_what_is_asked_for_is_what_is_used(option, run, options):
    name, value = option.split()
    row = run("prefill", *options, "--json", "--prompt", PROMPT, name, value).row
    key = {"--heads-per-band": "bands"}.get(name, name[2:].replace("-", "_"))
    assert str(row[key]) == {"--heads-per-band": "2"}.get(name, value)


def test_workers_are_at_most_one_a_band(run, options):
    def workers(*words: object) -> int:
        return run("prefill", *options, "--json", "--prompt", PROMPT, "--heads-per-band", 1, *words).row["workers"]

    assert workers() == 2
    assert workers("--workers", 1) == 1
    assert "--workers is 9, but 1 of 2 heads a band make 2 band(s)" in (
        run("prefill", *options, "--prompt", PROMPT, "--heads-per-band", 1, "--workers", 9).error
    )


def test_progress_lines_count_up(run, options):
    ran = run("prefill", *options, "--json", "--progress", "ndjson", "--prompt", "x" * 200, "--tile-size", 64)
    assert ran.row["prompt_tokens"] == 200
    rows = [json.loads(line) for line in ran.err.splitlines()]
    assert len(rows) > 3
    assert [row["tiles_done"] for row in rows] == list(range(1, len(rows) + 1))
    done = [row["tokens_done"] for row in rows]
    assert done == sorted(set(done))
    assert done[-1] == 200
    for row in rows:
        assert (row["event"], row["tokens_total"]) == ("tile", 200)
        assert row["tile_s"] > 0
        assert row["tok_s"] > 0
    assert rows[0]["eta_s"] > rows[-1]["eta_s"] == 0


ISO = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}[+-]\d\d:\d\d"


def test_where_there_is_no_terminal_a_line_comes_every_half_minute(run, options, monkeypatch):
    assert reporter.EVERY_S == 30
    monkeypatch.setattr(reporter, "EVERY_S", 0.005)
    words = ("prefill", *options, "--prompt", PROMPT * 20, "--tile-size", 32, "--json")
    lines = run(*words).err.splitlines()
    tiles = rf"prefill: [\d,]+/{len(PROMPT) * 20:,} tokens  [\d,]+ tokens/s  [\d:]+ left"
    for line in lines:
        assert re.fullmatch(rf"{ISO} ({tiles}|[a-z ]+: [\d:]+ so far)", line)
    assert len([line for line in lines if " tokens/s " in line]) > 2
    ran = run(*words, "--progress", "ndjson")
    events = [json.loads(line) for line in ran.err.splitlines()]
    assert {"tile", "phase"} >= {event["event"] for event in events} >= {"tile"}
    for event in events:
        assert re.fullmatch(ISO, event["time"])
    assert run(*words, "--progress", "none").err == ""


def test_each_phase_is_named_while_it_lasts(model, capsys):
    begun: list[str] = []
    with Engine(setup_of(model=model, device="cpu", chunkwise_backend="native"), on_phase=begun.append) as engine:
        engine.prefill(PROMPT)
    assert begun == ["loading the model", "cutting the prompt into tokens", "prefill"]
    with torch.compiler.set_stance("force_eager"):
        with Engine(setup_of(model=model, device="cpu"), on_phase=begun.append) as engine:
            engine.prefill(PROMPT)
    assert begun[5].startswith("compiling for 16 token(s) at once")


def test_decoding_that_shows_no_text_says_how_long_it_takes(run, options, monkeypatch):
    monkeypatch.setattr(reporter, "EVERY_S", 0.01)
    ran = run("generate", *options, "--prompt", PROMPT, "--max-new-tokens", 60, "--json")
    assert ran.row["new_tokens"] == 60
    assert re.search(rf"^{ISO} decoding: 0:00:0\d so far$", ran.err, re.MULTILINE)


@pytest.mark.parametrize("kind", ["none", "auto"])
def test_without_progress_nothing_is_said(kind, run, options):
    ran = run("prefill", *options, "--json", "--progress", kind, "--prompt", "x" * 100)
    assert ran.row["prompt_tokens"] == 100
    assert ran.err == ""


def test_a_bar_on_a_terminal(options):
    """Only standard error is a terminal: the bar must not be in the JSON."""
    ours, theirs = pty.openpty()
    shown: list[bytes] = []

    def watch() -> None:
        while True:
            try:
                data = os.read(ours, 4096)
            except OSError:  # Linux says so when the other side is closed
                return
            if not data:
                return
            shown.append(data)

    env = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    watcher = threading.Thread(target=watch)
    watcher.start()
    words = ("prefill", *options, "--json", "--prompt", "x" * 1000, "--tile-size", 64)
    with start(*words, stderr=theirs, env=env) as process:
        os.close(theirs)
        ran = finish(process)
    watcher.join()
    os.close(ours)
    assert ran.row["prompt_tokens"] == 1000
    text = b"".join(shown).decode()
    assert "\x1b[" in text  # it moves the cursor
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)
    assert "prefill" in plain
    assert "1,000/1,000 tokens" in plain
    assert "100%" in plain
    assert re.search(r"[1-9][\d,]* tokens/s", plain)
    assert "0:00:00 left" in plain
    assert re.search(r"0:00:0[1-9] left", plain)
    assert "Traceback" not in plain


def test_text_that_the_terminal_cannot_show(run, options, monkeypatch):
    narrow = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", narrow)
        assert run("generate", *options, "--prompt", PROMPT, "--max-new-tokens", 40).code == 0
        assert run("prefill", *options, "--prompt", PROMPT).code == 0
        assert run("generate", *options, "--json", "--prompt", PROMPT, "--max-new-tokens", 40).code == 0
    narrow.flush()
    written = narrow.buffer.getvalue().decode("ascii")
    assert "\\ufffd" in written  # the model makes random bytes, and some are not text
    assert json.loads(written.splitlines()[-1])["new_tokens"] == 40


# -- generate ----------------------------------------------------------------------------------------------------------
def test_generate_streams_text_and_tells_the_speed(run, options):
    row = run("generate", *options, "--json", "--prompt", PROMPT, "--max-new-tokens", 12).row
    assert set(KEYS) | {"text", "new_tokens", "decode_s", "decode_tok_s"} <= set(row)
    assert row["new_tokens"] == 12
    ran = run("generate", *options, "--prompt", PROMPT, "--max-new-tokens", 12)
    assert ran.code == 0
    assert ran.out == row["text"] + "\n"  # and greedy decoding gives the same again
    assert re.search(rf"prefill {len(PROMPT)} tokens in [\d.]+ s \([\d,]+ tokens/s\)", ran.err)
    assert re.search(r"decode 12 tokens in [\d.]+ s \([\d,]+ tokens/s\)", ran.err)
    assert run("generate", *options, "--json", "--prompt", PROMPT, "--max-new-tokens", 1).row["new_tokens"] == 1


def test_a_seed_gives_the_same_text_again(run, options):
    def text(*words: object) -> str:
        words = ("--max-new-tokens", 24, "--json", *words)
        return run("generate", *options, "--prompt", PROMPT, *words).row["text"]

    assert text("--seed", 1) == text("--seed", 1)
    assert text("--seed", 1) != text("--seed", 2)
    assert text("--seed", 1) != text()
    assert text("--temperature", 0) == text()
    assert text("--seed", 1, "--top-p", 1e-9) == text()  # only the likeliest token is left
    assert text("--temperature", 2) != text("--temperature", 1)


def test_generate_goes_on_from_its_own_state(run, options, tmp_path):
    at_once = run("generate", *options, "--json", "--prompt", PROMPT, "--max-new-tokens", 12).row
    whole = ("--state-out", tmp_path / "whole")
    measured = [k for k, v in at_once.items() if v is not None and ("_s" in k[-2:] or "_bytes" in k or "tok_s" in k)]
    assert run("generate", *options, "--json", "--prompt", PROMPT, "--max-new-tokens", 12, *whole).row == {
        **at_once,
        **{key: pytest.approx(at_once[key], rel=1e9) for key in measured},
        "state_path": str(tmp_path / "whole"),
        "state_digest": RecurrentState.load(tmp_path / "whole").digest(),
    }
    half = ("--state-out", tmp_path / "half")
    run("generate", *options, "--json", "--prompt", PROMPT, "--max-new-tokens", 5, *half)
    back = ("--state-in", tmp_path / "half", "--state-out", tmp_path / "half")
    rest = run("generate", "--model", at_once["model"], "--json", "--max-new-tokens", 7, *back).row
    assert (rest["prompt_tokens"], rest["resumed_tokens"]) == (len(PROMPT) + 5,) * 2
    assert rest["backend"] == "native"  # taken from the state
    assert RecurrentState.load(tmp_path / "half").digest() == RecurrentState.load(tmp_path / "whole").digest()


# -- states ------------------------------------------------------------------------------------------------------------
@pytest.fixture
def state(run: Callable[..., Ran], options: tuple[str, ...], tmp_path: Path) -> Path:
    """A state of PROMPT, with other numerics than the defaults."""
    numerics = ("--tile-size", 32, "--heads-per-band", 1)
    run("prefill", *options, *numerics, "--json", "--prompt", PROMPT, "--state-out", tmp_path / "state").row  # noqa: B018
    return tmp_path / "state"


def test_a_state_is_taken_as_it_is_without_a_prompt(run, model, state):
    row = run("prefill", "--model", model, "--json", "--state-in", state).row
    assert (row["prompt_tokens"], row["resumed_tokens"], row["prefill_tok_s"]) == (len(PROMPT), len(PROMPT), None)
    assert (row["backend"], row["tile_size"], row["bands"]) == ("native", 32, 2)  # settings come from the state
    assert row["state_digest"] == RecurrentState.load(state).digest()
    shown = run("prefill", "--model", model, "--state-in", state)
    assert f"prompt tokens   {len(PROMPT)} ({len(PROMPT)} from the state)" in shown.out


def test_only_what_is_new_is_computed(run, options, model, state):
    longer = PROMPT + ", to talk of many things"
    row = run("prefill", "--model", model, "--json", "--state-in", state, "--prompt", longer).row
    assert (row["prompt_tokens"], row["resumed_tokens"]) == (len(longer), len(PROMPT))
    numerics = ("--tile-size", 32, "--heads-per-band", 1)
    whole = run("prefill", *options, *numerics, "--json", "--prompt", longer).row
    assert [t["id"] for t in row["next_tokens"]] == [t["id"] for t in whole["next_tokens"]]
    assert [t["logprob"] for t in row["next_tokens"]] == pytest.approx(
        [t["logprob"] for t in whole["next_tokens"]], abs=1e-3
    )
    said = run("generate", "--model", model, "--state-in", state, "--prompt", longer, "--max-new-tokens", 2).err
    assert f"prefill {len(longer) - len(PROMPT)} tokens (and {len(PROMPT)} from the state)" in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--prompt", "The time has gone, the walrus said"), ("another prompt", "34")),
        (("--prompt", PROMPT[:-1]), ("33 tokens", "34", "longer one")),
        (("--prompt", PROMPT, "--tile-size", 64), ("other numerics", "tile_size 32, not 64", "leave them out")),
        (("--prompt", PROMPT, "--chunk-size", 8), ("other numerics", "chunk_size 16, not 8")),
        (("--prompt", PROMPT, "--heads-per-band", 2), ("other numerics", "heads_per_band 1, not 2")),
        (("--prompt", PROMPT, "--dtype", "bfloat16"), ("other numerics", "dtype float32, not bfloat16")),
        (("--tile-size", 64), ("other numerics", "tile_size 32, not 64")),
    ],
)
@pytest.mark.parametrize("command", ["prefill", "generate"])
def test_a_state_that_does_not_fit_is_refused_with_the_reason(command, words, said, run, options, state):
    error = run(command, *options, "--state-in", state, *words).error
    assert str(state) in error
    for text in said:
        assert text in error


def test_a_state_of_another_model_is_refused_with_the_reason(run, options, state, tmp_path):
    make_model(tmp_path / "other", seed=1, hidden_size=32, num_hidden_layers=2, num_heads=2, eos_token_id=None)
    error = run("prefill", *options, "--model", tmp_path / "other", "--state-in", state, "--prompt", PROMPT).error
    assert "another model" in error
    assert str(state) in error


@pytest.mark.parametrize("place", ["a directory", "no directory", "a pipe", "a device", "a name too long", "not ours"])
def test_a_state_that_cannot_be_written_is_found_before_the_work(place, run, tmp_path):
    (tmp_path / "directory").mkdir()
    os.mkfifo(tmp_path / "pipe")
    path = {
        "a directory": tmp_path / "directory",
        "no directory": tmp_path / "none" / "state",
        "a pipe": tmp_path / "pipe",
        "a device": Path("/dev/null"),
        "a name too long": tmp_path / ("x" * 300),
        "not ours": tmp_path / "directory" / "state",
    }[place]
    before = sorted(tmp_path.rglob("*"))
    (tmp_path / "directory").chmod(0o555 if place == "not ours" else 0o755)
    root = os.geteuid() == 0
    if root and place == "not ours":
        os.seteuid(65534)  # permissions do not bind root
    try:
        # The model is not there either, but that would only be found later.
        error = run("prefill", "--model", tmp_path / "none", "--prompt", PROMPT, "--state-out", path).error
    finally:
        if root:
            os.seteuid(0)
    assert str(path) in error or str(path.parent) in error
    assert "none: is not a directory" not in error
    assert sorted(tmp_path.rglob("*")) == before
    assert Path("/dev/null").is_char_device()


# -- signals -----------------------------------------------------------------------------------------------------------
def interrupt_after(process: subprocess.Popen[str], tiles: int, number: int) -> list[dict[str, Any]]:
    """Send the signal after this many tiles; returns the progress lines until then."""
    assert process.stderr is not None
    rows: list[dict[str, Any]] = []
    while len(rows) < tiles:  # a slow machine has lines of phases too
        row = json.loads(process.stderr.readline())
        rows += [row] if row["event"] == "tile" else []
    process.send_signal(number)
    return rows


@pytest.fixture(scope="module")
def uninterrupted(model: Path) -> PrefillResult:
    """The digest of LONG without a stop."""
    return xlstm_ray.load(model, device="cpu", chunkwise_backend="native", tile_size=128).prefill(LONG)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_prefill_goes_on_by_the_command_that_it_prints(number, code, uninterrupted, options, tmp_path):
    (tmp_path / "a prompt").write_text(LONG)
    path = tmp_path / "a state"
    words = ("prefill", *options, "--tile-size", 128, "--json", "--prompt-file", tmp_path / "a prompt")
    words = (*words, "--progress", "ndjson", "--state-out", path)
    path_with_us = {**os.environ, "PATH": f"{PROGRAM.parent}{os.pathsep}{os.environ['PATH']}"}
    with start(*words, env=path_with_us) as process:
        before = interrupt_after(process, 3, number)
        stopped = finish(process)
    assert stopped.code == code
    assert stopped.out == ""
    *after, said, go_on = stopped.err.splitlines()
    told = [json.loads(line) for line in after]
    rows = [row for row in told if row["event"] == "tile"]
    assert len(rows) <= 4  # the tile under way, and what was done before the signal arrived
    assert [row["text"] for row in told if row["event"] == "stopping"] == [
        "stopping after this tile; Ctrl-C again: now"
    ]
    rows = before + rows
    done = rows[-1]["tokens_done"]
    assert done == 128 * len(rows)
    assert said == f"stopped after {done} of {len(LONG)} tokens; state in {path}"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a prompt", "a state"]
    part = RecurrentState.load(path)
    assert (part.tokens, part.complete) == ([done], False)
    assert go_on.startswith("to go on: xlstm-ray prefill ")
    again = subprocess.run(
        ["bash", "-c", go_on.removeprefix("to go on: ")], env=path_with_us, capture_output=True, text=True, timeout=120
    )
    row = Ran(again.returncode, again.stdout, again.stderr).row
    assert (row["prompt_tokens"], row["resumed_tokens"]) == (len(LONG), done)
    assert row["state_digest"] == uninterrupted.state.digest()
    assert RecurrentState.load(path).complete


def test_a_closed_terminal_stops_a_prefill_at_a_tile_boundary_with_a_state(options, model, tmp_path):
    """The program is the leader of its terminal's session and draws a bar when the terminal is closed."""
    longer = LONG * 50  # or the run may have ended when the bar has been read
    (tmp_path / "prompt").write_text(longer)
    path = tmp_path / "state"
    words = ("prefill", *options, "--tile-size", 128, "--prompt-file", tmp_path / "prompt", "--state-out", path)
    pid, terminal = pty.fork()
    if pid == 0:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup ignores it, and the program keeps that
        os.execv(PROGRAM, [str(PROGRAM), *map(str, words)])
    seen = b""
    while b" tokens/s" not in seen:
        seen += os.read(terminal, 4096)
    os.close(terminal)  # SIGHUP; from now on, writing there fails
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 129
    part = RecurrentState.load(path)
    lm = xlstm_ray.load(model, device="cpu", chunkwise_backend="native", tile_size=128)
    tokens = lm.encode(longer)
    (read,) = part.tokens
    assert 0 < read < len(tokens)
    undisturbed = lm.prefill(tokens[:read]).state
    assert part.tensors.keys() == undisturbed.tensors.keys()
    assert all(torch.equal(part.tensors[name], tensor) for name, tensor in undisturbed.tensors.items())


def test_the_command_that_resumes_names_the_newest_state_and_the_program(monkeypatch):
    words = ["/no/such/xlstm-ray", "prefill", "--state-in", "an old one", "--prompt", "it's", "--state-in=older"]
    monkeypatch.setattr(sys, "argv", words)
    # Not on the PATH, so its whole name is needed.
    assert resume_command(["--state-in", "new"]) == "/no/such/xlstm-ray prefill --prompt 'it'\"'\"'s' --state-in new"


def test_a_second_interrupt_does_not_wait_for_the_tile(options, tmp_path):
    (tmp_path / "prompt").write_text(LONG * 100)
    words = ("prefill", *options, "--tile-size", 4096, "--prompt-file", tmp_path / "prompt", "--progress", "ndjson")
    with start(*words, "--state-out", tmp_path / "state") as process:
        first = json.loads(process.stderr.readline())
        time.sleep(first["tile_s"] / 4)  # into the second tile
        process.send_signal(signal.SIGINT)
        told = json.loads(process.stderr.readline())
        assert told["text"] == "stopping after this tile; Ctrl-C again: now"
        assert process.poll() is None  # the first signal waits for the tile
        process.send_signal(signal.SIGINT)
        ran = finish(process)
    assert ran.code == 130
    said, go_on = ran.err.splitlines()  # and no row of the second tile
    assert (ran.out, said) == ("", f"interrupted after 4096 tokens; state in {tmp_path / 'state'}")
    assert go_on.endswith(f"--state-in {tmp_path / 'state'}")
    assert RecurrentState.load(tmp_path / "state").tokens == [4096]  # the last whole tile


@pytest.mark.parametrize(
    ("sign", "backend"),
    [("numpy._core", "native"), ("torch._tensor", "native"), ("torch._inductor.graph", "queued_compiled_chunks")],
)
def test_an_interrupt_before_the_first_tile_ends_it_at_once(sign, backend, model, tmp_path):
    """During imports, where libraries swallow exceptions, and during a long compilation."""
    words = ("prefill", "--model", model, "--device", "cpu", "--chunkwise-backend", backend, "--prompt", PROMPT)
    # Python says on standard error what it has imported, and so how far it has come.
    env = {**os.environ, "PYTHONPROFILEIMPORTTIME": "1", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "kernels")}
    with start(*words, "--state-out", tmp_path / "state", env=env) as process:
        while not process.stderr.readline().rstrip().endswith(f" {sign}"):
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        ran = finish(process)
    said = [line for line in ran.err.splitlines() if not line.startswith("import time:")]
    assert (ran.code, ran.out, said) == (130, "", ["interrupted"])
    assert not (tmp_path / "state").exists()


def test_an_interrupted_generation_keeps_what_it_made(run, options, tmp_path):
    path = tmp_path / "state"
    words = ("generate", *options, "--prompt", PROMPT)
    with start(*words, "--max-new-tokens", 100_000, "--state-out", path) as process:
        assert process.stdout is not None
        assert process.stdout.read(1)  # text comes while it is made
        process.send_signal(signal.SIGINT)
        ran = finish(process)
    assert ran.code == 130
    made = RecurrentState.load(path).tokens[0] - len(PROMPT)
    assert 0 < made < 100_000
    assert f"decode {made} tokens" in ran.err
    assert f"stopped after {made} new tokens" in ran.err.splitlines()[-1]
    assert f"generate --state-in {path}" in ran.err.splitlines()[-1]
    same = run(*words, "--json", "--max-new-tokens", made, "--state-out", tmp_path / "same").row
    assert RecurrentState.load(path).digest() == same["state_digest"]


# -- files that are closed, full, or not there -------------------------------------------------------------------------
def test_a_reader_that_goes_early_is_no_error_worth_a_traceback(options):
    with start("generate", *options, "--prompt", PROMPT, "--max-new-tokens", 5000) as process:
        assert process.stdout is not None
        process.stdout.read(1)
        process.stdout.close()
        process.stdout = None
        ran = finish(process)
    assert ran.code == 1
    assert ran.err == ""


def test_standard_files_that_are_closed_or_full(options, tmp_path):
    program = shlex.join(
        [str(PROGRAM), "prefill", *options, "--prompt", PROMPT, "--state-out", str(tmp_path / "state")]
    )
    script = (
        f"{program} >&- 2>&- <&-; echo closed $?\n"
        f"{program} >/dev/full; echo full $?\n"
        f"{shlex.quote(str(PROGRAM))} prefill --prompt-file - <&-; echo none $?\n"
    )
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=120)
    assert done.stdout == "closed 0\nfull 1\nnone 1\n"
    assert done.stderr.splitlines() == [
        "error: standard output cannot be written (No space left on device)",
        "error: standard input: is empty; give at least one token",
    ]
    assert RecurrentState.load(tmp_path / "state").tokens == [len(PROMPT)]


def test_without_a_compiler_one_line_names_the_way_out(model, tmp_path):
    bare = {key: value for key, value in os.environ.items() if key not in ("CXX", "CC")} | {"PATH": str(tmp_path)}
    # Weights that are not there would be found on loading, which must not have begun.
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_bytes((model / "config.json").read_bytes())
    with start("prefill", "--model", tmp_path / "model", "--device", "cpu", "--prompt", PROMPT, env=bare) as process:
        error = finish(process).error
    assert "C++ compiler" in error
    assert "--chunkwise-backend native" in error
    words = ("prefill", "--model", model, "--device", "cpu", "--prompt", PROMPT, "--json")
    with start(*words, "--chunkwise-backend", "native", env=bare) as process:
        assert finish(process).row["backend"] == "native"


@pytest.mark.parametrize("place", ["a file", "full"])
def test_a_compile_cache_without_a_place_is_one_line(place, model, tmp_path):
    (tmp_path / "file").write_text("x")
    path = tmp_path / place.removeprefix("a ")
    words = [str(PROGRAM), "prefill", "--model", str(model), "--device", "cpu", "--prompt", PROMPT]
    if place == "full":
        small = f'mkdir {path} && mount -t tmpfs -o size=4k tmpfs {path} && exec "$@"'
        words = ["unshare", "--mount", "bash", "-c", small, "-", *words]
        if subprocess.run([*words[:6], "true"], capture_output=True, timeout=60).returncode:
            pytest.skip("no file system can be mounted here")
        path.rmdir()
    env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(path)}
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, env=env)
    error = Ran(done.returncode, done.stdout, done.stderr).error
    assert f"the compile cache {path} cannot be written" in error
    assert "TORCHINDUCTOR_CACHE_DIR" in error


def test_a_damaged_compile_cache_is_one_line(tmp_path):
    code = """
        import torch
        from xlstm_ray.errors import KernelError
        from xlstm_ray.kernels.compiled import compile_strict

        def double(x):
            return x + x

        try:
            print(compile_strict(double, "double")(torch.ones(3)).tolist())
        except KernelError as err:
            print(err)
    """
    env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}

    def run_it() -> str:
        words = [sys.executable, "-c", textwrap.dedent(code)]
        done = programs.run(words, capture_output=True, text=True, timeout=120, env=env)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    assert run_it() == "[2.0, 2.0, 2.0]"
    damaged = [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".h"]
    assert any(path.suffix == ".so" for path in damaged)
    for path in damaged:
        path.write_bytes(b"not what was here")
    said = run_it()
    assert said == "[2.0, 2.0, 2.0]" or f"the cache may be damaged or full: remove {tmp_path}" in said
    assert "\n" not in said
