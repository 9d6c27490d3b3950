"""A dashboard beside a run in one process: its address is printed first, it shows progress, and forgets ended runs."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from grids import asked
from tiny import make_model

from xlstm_ray.supervisor.records import Head, dashboard_line
from xlstm_ray.supervisor.status import status
from xlstm_ray.supervisor.stop import stop_head

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None and os.environ.get("CI") != "true", reason="Ray is not installed"
)
RUN = """
    import sys
    from xlstm_ray.choose import setup_of
    from xlstm_ray.engine.engine import Engine
    model, backend = sys.argv[1:]
    setup = setup_of(model=model, device="cpu", chunkwise_backend=backend, tile_size=32, chunk_size=16,
        ray_dashboard=True, ray_keep_alive=True)
    def wait(progress):
        if progress.tiles_done == 3:
            print("half", flush=True)
            sys.stdin.readline()
    with Engine(setup, on_note=lambda text: print(text, flush=True)) as lm:
        print("ready", flush=True)
        lm.prefill(list(range(256)), on_progress=wait)
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[list[str], Head, "subprocess.Popen[str]"]]:
    """A prefill of 8 tiles that waits after 3: its output, its head, its process."""
    home = tmp_path_factory.mktemp("home")
    make_model(home / "a-model", hidden_size=64, num_hidden_layers=2, num_heads=2, eos_token_id=None)
    env = {**os.environ, "HOME": str(home), "RAY_metrics_report_interval_ms": "1000"}
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(RUN), str(home / "a-model"), "native"],
        env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    state_dir = home / ".local" / "state" / "xlstm-ray"
    try:
        assert process.stdout is not None
        said = []
        for line in process.stdout:
            said.append(line.strip())
            if said[-1] == "half":
                break
        (item,) = status(state_dir).heads
        yield said, item.head, process
    finally:
        process.kill()
        process.wait()
        for item in status(state_dir).heads:
            stop_head(item.head, state_dir)


def figures(head: Head) -> dict[str, float]:
    """Our metrics by name; those of memory by name and kind."""
    rows = re.findall(r"^ray_xlstm_ray_(\w+)\{(.*?)\} (\S+)$", asked(head.metrics_url), re.MULTILINE)
    kinds = [(name, re.search(r'kind="(\w+)"', labels), value) for name, labels, value in rows if "bucket" not in name]
    return {name + (f" {kind[1]}" if kind else ""): float(value) for name, kind, value in kinds}


def until(found: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + 90
    while not (value := found()):
        assert time.monotonic() < deadline
        time.sleep(0.5)
    return value


def test_the_dashboard_is_told_of_before_the_work(run):
    said, head, _ = run
    assert said == [dashboard_line(head), "ready", "half"]
    assert f"{head.dashboard_url} (it asks for a token: paste what is in {head.token_path})" in said[0]


def test_how_far_a_prompt_is_can_be_seen_while_it_is_read(run):
    _, head, process = run
    found = until(lambda: f if (f := figures(head)).get("tiles_total") == 3 and "prompt_tokens" in f else None)
    assert (found["prompt_tokens"], found["prompt_tokens_left"], found["tokens_total"]) == (256, 160, 96)
    assert found["tokens_per_second"] > 0
    assert 50 << 20 < found["actor_memory_bytes process"] < 4 << 30


def test_the_job_has_a_name(run):
    _, head, process = run
    jobs = until(lambda: [j for j in json.loads(asked(f"{head.dashboard_url}/api/jobs/", head)) if j["metadata"]])
    (metadata,) = [job["metadata"] for job in jobs if job["driver_info"]["pid"] == str(process.pid)]
    assert metadata["job_name"] == "xlstm-ray a-model"
    assert "prompt_tokens_left" in metadata["progress"]


def test_series_of_an_ended_run_leave_the_metrics(run):
    _, head, process = run
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.close()
    assert process.wait(60) == 0
    until(lambda: "ray_xlstm_ray_" not in asked(head.metrics_url))
    assert "ray_" in asked(head.metrics_url)
