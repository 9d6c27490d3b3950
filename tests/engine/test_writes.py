"""States on their way to a cache's files: the useful ones first, and nobody waits for the disk."""

import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from time import sleep
from typing import Any

import programs
import pytest
from engines import OPTIONS, model

import xlstm_ray
from xlstm_ray import Engine
from xlstm_ray.cachefiles import Folder
from xlstm_ray.engine.tree import DISK, MEMORY
from xlstm_ray.errors import StateError
from xlstm_ray.state import RecurrentState

__all__ = ["model"]

PROMPTS = [[n, *range(200), *range(98)] for n in range(3)]  # 9 tiles of 32, and 11 tokens more
LIKELY = {288, 299}  # where other prompts go on, and this one


@pytest.fixture
def load(model: Path, eager: None, tmp_path: Path) -> Callable[..., Engine]:
    return lambda **more: xlstm_ray.load(model, **{**OPTIONS, **more})


def files(directory: Path) -> list[Path]:
    """In the order in which they were written."""
    return sorted(directory.glob("*.state"), key=lambda path: path.stat().st_mtime_ns)


PROCESS = """
import sys, xlstm_ray
lm = xlstm_ray.load(sys.argv[1], device="cpu", chunkwise_backend="native", tile_size=32, chunk_size=16, threads=1,
                    cache_dir=sys.argv[2], cache_every=1)
for n in range(3):
    lm.prefill([n, *range(200), *range(98)])
print("all are read", flush=True)
sys.stdin.read()
"""


def test_what_kill_9_leaves_is_all_that_prompts_go_on_from(model, load, tmp_path):
    command = [sys.executable, "-c", PROCESS, str(model), str(tmp_path)]
    with Folder(tmp_path).lock():  # the disk is slow: nothing is written until all is read
        process = programs.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline() == "all are read\n"
    while len(files(tmp_path)) < 1 + len(PROMPTS) * len(LIKELY):  # the first one was begun before
        sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    first = Counter(RecurrentState.load(path).tokens[0] for path in files(tmp_path)[:7])
    assert [first[length] for length in LIKELY] == [len(PROMPTS)] * 2
    with load(threads=1) as cold, load(threads=1, cache_dir=tmp_path) as lm:
        for prompt in PROMPTS:
            found = lm.prefill([*prompt, 7, 8])
            assert found.stats.row_cache[0][:2] == (288, "disk")
            assert found.state.digest() == cold.prefill([*prompt, 7, 8]).state.digest()
            assert lm.prefill(prompt).stats.tiles == 0


@pytest.mark.parametrize("on_host", [True, False])
def test_nobody_waits_for_a_disk_that_does_not_keep_up(on_host, load, tmp_path, monkeypatch):
    with load() as cold, load(cache_dir=tmp_path, cache_every=1) as lm:
        monkeypatch.setattr(lm.executor, "on_host", on_host)
        cache: Any = lm._core.cache
        size = cache._size
        cache.plan = cache.plan._replace(memory_bytes=3 * size)
        cache._tree.budgets[MEMORY] = 3 * size
        with Folder(tmp_path).lock():
            for prompt in PROMPTS:
                read = lm.prefill(prompt)
                assert cache._tree.used[MEMORY] <= 3 * size
                assert read.state.digest() == cold.prefill(prompt).state.digest()
            assert not files(tmp_path)
            assert 3 <= cache.unwritten <= 4  # what is in memory, and what was begun
        cache._writes.finish()
        cache._settle()
        assert cache.unwritten == 0
        assert 3 <= len(files(tmp_path)) <= 4
        on_disk = {f"{entry.name}.state" for entry in cache._tree.entries if DISK in entry.tiers}
        assert on_disk == {path.name for path in files(tmp_path)}
        for path in files(tmp_path):
            RecurrentState.load(path)
        assert cache.counts.unwritten == 0


def test_files_of_its_own_are_not_read_to_learn_of_them(load, tmp_path, monkeypatch):
    looked: list[str] = []
    header = Folder._header
    monkeypatch.setattr(Folder, "_header", lambda self, name, info: looked.append(name) or header(self, name, info))
    with load(cache_dir=tmp_path, cache_every=1) as one, load(cache_dir=tmp_path, cache_every=1) as other:
        for prompt in PROMPTS:
            one.prefill(prompt)
            while one._core.cache.unwritten:
                sleep(0.001)
        assert not looked
        assert other.prefill(PROMPTS[0]).stats.row_cache[0].tier == "disk"
        assert {*looked} == {path.name for path in files(tmp_path)}


def test_a_kept_file_has_a_checksum_and_the_digest_of_its_state(load, tmp_path):
    with load(cache_dir=tmp_path) as lm, load() as cold:
        lm.prefill(PROMPTS[0])
        digest = cold.prefill(PROMPTS[0]).state.digest()
    (whole,) = [path for path in files(tmp_path) if RecurrentState.load(path).tokens == [299]]
    state, data = RecurrentState.load(whole), whole.read_bytes()
    assert state.digest() == digest
    assert digest.encode() not in data
    assert state.save(tmp_path / "own") == digest
    assert digest.encode() in (tmp_path / "own").read_bytes()
    assert RecurrentState.load(tmp_path / "own").digest() == digest
    for at in range(len(data) - 4, len(data) // 2, -len(data) // 9):
        whole.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with pytest.raises(StateError, match="is damaged"):
            RecurrentState.load(whole)
