"""`generate --jsonl`: each line is a request of its own, and its result comes when it ends."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any

import programs
import pytest
from programs import PROGRAM
from tiny import make_model

import xlstm_ray
from xlstm_ray.cli.lines import LOG_COLUMNS
from xlstm_ray.files import LOG

NUMERICS = {"device": "cpu", "chunkwise_backend": "native", "tile_size": 32, "chunk_size": 16, "dtype": "float32"}
TEXTS = [chr(97 + n) * (5 + 23 * n) for n in range(7)]
ENDLESS = 10**7


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    make_model(directory, seed=3, hidden_size=64, num_hidden_layers=1, num_heads=2, eos_token_id=None)
    return directory


@pytest.fixture(scope="module")
def words(model: Path) -> list[str]:
    options = [f"--{name.replace('_', '-')}={value}" for name, value in NUMERICS.items()]
    return ["generate", "--model", str(model), *options, "--jsonl"]


def file_of(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def rows_of(out: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.splitlines()]


def started(*command: object) -> subprocess.Popen[str]:
    process = programs.Popen([PROGRAM, *map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    threading.Timer(100, process.kill).start()  # ends a test that waits for a line in vain
    return process


def test_lines_get_what_each_gets_alone_with_their_own_figures(model, words, run, tmp_path):
    lines: list[dict[str, Any]] = [{"max_new_tokens": 3 + n, "logprobs": n % 3} for n in range(7)]
    for n in (1, 3, 5):
        lines[n] |= {"temperature": 1.0, "seed": n}
    lines[4] |= {"temperature": 2.0, "n": 3}
    named = [{"prompt": text, "id": n, **line} for n, (text, line) in enumerate(zip(TEXTS, lines, strict=True))]
    path = file_of(tmp_path / "lines", named)
    ran = run(*words, "-f", path, "--ordered", "--prompt-logprobs", 1, "--stats-log", tmp_path / "log.csv")
    assert (ran.code, ran.err) == (0, "")
    rows = rows_of(ran.out)
    places = [(n, answer) for n in range(7) for answer in range(3 if n == 4 else 1)]
    assert [(row["index"], row["answer"]) for row in rows] == places
    with xlstm_ray.load(model, **NUMERICS) as lm:
        for row in rows:
            n = row["index"]
            fields = {**lines[n], "n": 1}
            if n == 4:
                fields["seed"] = row["answer"]
            made = lm.generate(TEXTS[n], sampling=fields)
            assert row["text"] == "".join(made)
            assert (row["id"], row["new_tokens"]) == (n, len(made.tokens[0]))
            assert row["finish_reason"] == made.finish_reasons[0]
            expected = made.logprobs(0)
            assert [token["id"] for token in row.get("logprobs", [])] == (made.tokens[0] if expected else [])
            assert len(row["prompt_logprobs"]) == row["prompt_tokens"] == len(TEXTS[n])
            assert row["cache"] == {"hit_tokens": 0, "tier": None, "reason": "off"}
            assert 0 <= row["queued_s"] <= row["ttft_s"] <= row["total_s"]
    with open(tmp_path / "log.csv") as file:
        logged = list(csv.DictReader(file))
    assert sorted((int(row["index"]), int(row["answer"])) for row in logged) == places
    assert [int(row["new_tokens"]) for row in sorted(logged, key=lambda row: (row["index"], row["answer"]))] == [
        row["new_tokens"] for row in rows
    ]
    assert LOG.ours(",".join(["time", *LOG_COLUMNS]).encode())
    assert run(*words, "-f", path, "-n", 1, "--stats-log", tmp_path / "log.csv").code == 0  # its own log is replaced


def test_the_same_lines_give_the_same_bits_whenever_they_come(words, run, tmp_path):
    path = file_of(tmp_path / "lines", [{"prompt": text, "logprobs": 2} for text in TEXTS])
    first, second = (
        [(row["index"], row["text"], row["logprobs"]) for row in rows_of(run(*words, "-f", path, "--ordered").out)]
        for _ in range(2)
    )
    assert first == second


def test_a_result_is_there_when_it_ends_or_in_order(words, tmp_path):
    lines = [{"prompt": "a", "max_new_tokens": ENDLESS}, *({"prompt": "b", "max_new_tokens": 2} for _ in range(40))]
    path = file_of(tmp_path / "lines", lines)
    with started(*words, "-f", path) as process:
        assert process.stdout is not None
        ended = [json.loads(process.stdout.readline()) for _ in range(40)]
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate()
    assert sorted(row["index"] for row in ended) == list(range(1, 41))
    (left,) = rows_of(out)
    assert (left["index"], left["finish_reason"]) == (0, "cancelled")
    assert left["new_tokens"] > 2
    assert process.returncode == 143
    assert "stopping after this token" in err
    assert err.splitlines()[-1].startswith("stopped after 40 of 41 answers; ")
    # In order, all results wait for the first.
    with started(*words, "-f", path, "--ordered", "--progress", "ndjson") as process:
        assert process.stderr is not None
        told: dict[str, Any] = {}
        while told.get("answers_done") != 40:
            told = json.loads(process.stderr.readline())
        assert (told["answers_total"], told["event"]) == (41, "answer")
        assert told["tokens_done"] == 40 * 3
        process.send_signal(signal.SIGINT)
        out, err = process.communicate()
    assert process.returncode == 130
    assert [row["index"] for row in rows_of(out)] == list(range(41))


def test_a_signal_leaves_the_lines_that_were_not_begun(words, tmp_path):
    path = file_of(tmp_path / "lines", [{"prompt": "a", "max_new_tokens": ENDLESS ** (n > 0)} for n in range(200)])
    with started(*words, "-f", path) as process:
        assert process.stdout is not None
        assert json.loads(process.stdout.readline())["finish_reason"] == "length"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate()
    rows = rows_of(out)
    assert process.returncode == 130
    assert 0 < len(rows) < 199
    assert {row["finish_reason"] for row in rows} == {"cancelled"}
    said = err.splitlines()[-1]
    assert said == "stopped after 1 of 200 answers; no state is kept, and 199 can be asked for again"


def test_questions_of_one_state_are_requests_and_what_ends_in_one_state_is_a_batch(words, run, tmp_path):
    state = tmp_path / "book.state"
    assert run("prefill", *words[1:-1], "-p", "A book. ", "-o", state).code == 0
    path = file_of(tmp_path / "lines", ["why?", "who is it?"])
    served = rows_of(run(*words, "--state-in", state, "--append-file", path, "-n", 4, "--ordered").out)
    assert [row["resumed_tokens"] for row in served] == [8, 8]
    assert [row["prompt_tokens"] for row in served] == [12, 18]
    out = tmp_path / "both.state"
    batch = rows_of(run(*words, "--state-in", state, "--append-file", path, "-n", 4, "-o", out).out)
    assert [row["text"] for row in batch] == [row["text"] for row in served]
    assert xlstm_ray.RecurrentState.load(out).tokens == [16, 22]
    error = run(*words, "--state-in", state, "-f", path).error  # whole prompts that begin differently
    assert "--append" in error
    assert "--ordered" in run(*words[:-1], "-p", "a", "--ordered").error


def test_two_thousand_lines_take_no_more_memory_than_a_hundred(words, run, tmp_path):
    path = file_of(tmp_path / "lines", [f"number {n}" for n in range(2000)])
    program = [PROGRAM, *words, "-f", path, "-n", "1"]
    alone = {**os.environ, "OMP_NUM_THREADS": "1"}  # for time: products this small wait for their threads
    done = subprocess.run(program, capture_output=True, text=True, timeout=200, check=True, env=alone)
    peaks = [row["peak_process_bytes"] for row in rows_of(done.stdout)]
    assert len(peaks) == 2000
    assert peaks[-1] - peaks[100] < 8 << 20


OVER_THE_HARD_LIMIT = """
    import os, sys, threading, time
    import xlstm_ray.engine.engine
    from xlstm_ray.cli.app import main
    from xlstm_ray.files import MIB
    from xlstm_ray.memory.sample import process_bytes
    os.environ["XLSTM_MEM_HARD_MB"] = str(process_bytes() // MIB + 200)
    log = sys.argv[-1]
    def eat():
        while not os.path.exists(log) or open(log).read().count("\\n") < 5:
            time.sleep(0.001)
        globals()["ballast"] = bytearray(b"1") * (400 * MIB)
    threading.Thread(target=eat, daemon=True).start()
    main()
"""


def test_over_the_hard_limit_what_is_in_work_ends_with_the_reason(words, tmp_path):
    path = file_of(tmp_path / "lines", ["a"] * 4 + [{"prompt": "b", "max_new_tokens": ENDLESS}] * 200)
    command = [*words, "-f", path, "-n", 2, "--mem-poll-ms", 5, "--mem-log", tmp_path / "memory.csv"]
    program = [sys.executable, "-c", textwrap.dedent(OVER_THE_HARD_LIMIT), *map(str, command)]
    program += ["--stats-log", str(tmp_path / "log.csv")]
    done = programs.run(program, capture_output=True, text=True, timeout=100)
    assert done.returncode == 3
    reasons = [row["finish_reason"] for row in rows_of(done.stdout)]
    assert reasons[:4] == ["length"] * 4
    assert 0 < len(reasons[4:]) < 200
    assert {"error"} <= set(reasons[4:]) <= {"error", "cancelled"}  # a line may begin before the first end is heard of
    said = done.stderr.splitlines()[-1]
    assert re.match(r"error: memory: this process uses [\d,]+ MiB, over the hard limit of [\d,]+ MiB", said)
    with open(tmp_path / "memory.csv") as file:
        assert [row["level"] for row in csv.DictReader(file)][-1] == "hard"


FAILING = """
    import resource, sys
    from xlstm_ray.cli.app import main
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))
    main()
"""


def test_results_come_out_though_the_log_is_not_whole(words, tmp_path):
    path = file_of(tmp_path / "lines", ["a"] * 20)
    command = [*words, "-f", path, "-n", 1, "--stats-log", tmp_path / "log.csv"]
    program = [sys.executable, "-c", textwrap.dedent(FAILING), *map(str, command)]
    done = programs.run(program, capture_output=True, text=True, timeout=100)
    assert done.returncode == 1
    assert len(rows_of(done.stdout)) == 20
    assert re.search(r"^error: --stats-log .* is not whole \(File too large\)$", done.stderr, re.MULTILINE)
