"""States that an engine keeps for later prompts: a hit has the bits of a cold run, in every tier."""

import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import programs
import pytest
from engines import SIZES, model

import xlstm_ray
from xlstm_ray import Engine, Request, Sampling
from xlstm_ray.engine.tree import DISK, MEMORY
from xlstm_ray.engine.work import Work
from xlstm_ray.errors import StateError, UsageError
from xlstm_ray.memory.need import MOVERS
from xlstm_ray.state import RecurrentState

__all__ = ["model"]

TILE, CHUNK = SIZES["tile_size"], SIZES["chunk_size"]
BACKENDS = {
    "native": {"chunkwise_backend": "native"},
    "chunks": {"chunkwise_backend": "queued_compiled_chunks"},
    "chunks, two bands": {"chunkwise_backend": "queued_compiled_chunks", "heads_per_band": 1},
}
_random = random.Random(5)
BOOK = [_random.randrange(256) for _ in range(400)]
OTHER = [_random.randrange(256) for _ in range(400)]


@pytest.fixture(params=BACKENDS)
def load(request: pytest.FixtureRequest, model: Path, eager: None) -> Callable[..., Engine]:
    def made(**more: Any) -> Engine:
        return xlstm_ray.load(model, **{**SIZES, **BACKENDS[request.param], **more})

    return made


@pytest.fixture
def plain(model: Path, eager: None) -> Callable[..., Engine]:
    """The reference backend only, for tests that do not depend on the backend."""

    def made(**more: Any) -> Engine:
        return xlstm_ray.load(model, **{**SIZES, "chunkwise_backend": "native", **more})

    return made


def hits(result: Any) -> list[tuple[int, str | None]]:
    return [use[:2] for use in result.stats.row_cache]


EDITS = {
    "the same": (BOOK[:150], 150),
    "longer": (BOOK[:250], 128),
    "shorter": (BOOK[:100], 96),
    "edited": ([*BOOK[:70], *OTHER[70:150]], 64),
    "another": (OTHER[:150], 0),
}


@pytest.mark.parametrize("tier", ["host", "disk", "disk, after a restart"])
def test_a_hit_has_the_bits_of_a_cold_run(tier, load, tmp_path):
    cache: dict[str, Any] = {"cache_memory_mb": 64}
    if tier != "host":
        cache["cache_dir"] = tmp_path / "cache"
    lm = load(**cache)
    lm.prefill(BOOK[:150])
    if tier == "disk, after a restart":
        lm.close()
        lm = load(**cache)
    with load() as cold, lm:
        for prompt, length in EDITS.values():
            if tier != "host":
                forget_memory(lm)
            again = lm.prefill(prompt)
            assert hits(again) == [(length, tier.partition(",")[0] if length else None)]
            assert again.state.digest() == cold.prefill(prompt).state.digest()
            assert again.stats.tiles == 0 or length < len(prompt)
            texts = ["".join(engine.generate(prompt, max_new_tokens=5)) for engine in (lm, cold)]
            assert texts[0] == texts[1]


def forget_memory(lm: Engine) -> None:
    """Evict all states from memory, as if other prompts needed the room; written ones stay on the disk."""
    cache = lm._core.cache
    assert cache is not None
    assert cache._writes is not None
    cache._writes.finish()
    cache._settle()
    for entry in list(cache._tree.entries):
        assert DISK in entry.tiers
        if MEMORY in entry.tiers:
            cache._tree.drop(entry, MEMORY)
            entry.what.start = None


def stop_after(tiles: int) -> dict[str, Any]:
    seen: list[object] = []
    return {"on_progress": seen.append, "should_stop": lambda: len(seen) >= tiles}


def cached(lm: Engine) -> Any:
    cache = lm._core.cache
    assert cache is not None
    return cache


def files(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.state"))


BATCHES = [
    [BOOK[:150], OTHER[:20], OTHER[:25], BOOK[:28], BOOK[:70]],
    [BOOK[:150], OTHER[:20], OTHER[:25], BOOK[:28], BOOK[:70]],  # the same: nothing is computed
    [BOOK[:150], OTHER[:20], [*OTHER[:16], *BOOK[:14]], BOOK[:28], BOOK[:90]],
    [BOOK[:170], BOOK[:150], OTHER[:33]],
    [BOOK[:45], BOOK[:40], BOOK[:46], BOOK[:47]],
    [BOOK[:45], BOOK[:40], [*BOOK[:20], *OTHER[:26]], BOOK[:47]],
    [BOOK[:45]],
]


def test_rows_of_batches_have_the_bits_of_a_cold_run(load):
    with load() as cold, load(cache_memory_mb=64) as lm:
        for n, batch in enumerate(BATCHES):
            result = lm.prefill(batch)
            assert result.state.digest() == cold.prefill(batch).state.digest()
            if n == 1:
                assert (result.stats.tiles, result.stats.resumed_tokens) == (0, sum(map(len, batch)))
            assert any(use.hit_tokens for use in result.stats.row_cache) or n == 0 or n >= 4


def test_a_run_that_was_stopped_goes_on_from_the_longer_of_its_state_and_the_cache(load, tmp_path):
    with load() as cold, load(cache_dir=tmp_path, cache_every=1) as lm:
        digest = cold.prefill(BOOK[:250]).state.digest()
        early = lm.prefill(BOOK[:250], **stop_after(1)).state
        late = lm.prefill(BOOK[:250], **stop_after(3)).state
        assert (early.tokens, late.tokens) == ([32], [128])  # three tiles more
        again = lm.prefill(BOOK[:250], state=early)
        assert hits(again) == [(128, "host")]
        assert again.state.digest() == digest
        assert hits(lm.prefill(BOOK[:250], state=late)) == [(250, "host")]
        # What goes on from a whole state has that state's bits, not a cold run's.
        whole = lm.prefill(BOOK[:20]).state
        assert lm.prefill(BOOK[:250], state=whole).stats.row_cache[0].reason == "off"


def test_tenants_share_nothing_and_each_look_says_why(plain):
    with plain(cache_memory_mb=64) as lm:
        asked = [
            (BOOK[:150], "a"),
            (BOOK[:150], "b"),
            (BOOK[:150], "a"),
            ([*BOOK[:100], *OTHER[:100]], "a"),
            (OTHER[:90], "a"),
        ]
        uses = [lm.prefill(prompt, tenant=tenant).stats.row_cache[0] for prompt, tenant in asked]
        assert [use.hit_tokens for use in uses] == [0, 0, 150, 96, 0]
        assert [use.reason for use in uses] == ["none seen", "none seen", None, "diverged at 96", "none seen"]
        # All logits are of all tokens.
        everything = lm.prefill(BOOK[:150], tenant="a", all_logits=True)
        assert (everything.stats.row_cache[0].reason, len(everything.all_logits[0])) == ("off", 150)
        assert "".join(lm.generate(BOOK[:150], tenant="a", max_new_tokens=4)) == "".join(
            lm.generate(BOOK[:150], tenant="c", max_new_tokens=4)
        )


def test_other_numerics_are_told_and_not_used(plain, tmp_path):
    with plain(cache_dir=tmp_path) as lm:
        lm.prefill(BOOK[:150])
    with plain(cache_dir=tmp_path, tile_size=64) as lm, plain(tile_size=64) as cold:
        result = lm.prefill(BOOK[:150])
        assert result.stats.row_cache[0] == (0, None, "other numerics")
        assert result.state.digest() == cold.prefill(BOOK[:150]).state.digest()


def test_states_of_kernels_that_were_not_compiled_are_told_and_not_used(plain, tmp_path, monkeypatch):
    """They have other bits. The fixture's own way to compile nothing is not known to the engine."""
    compiled = {"chunkwise_backend": "queued_compiled_chunks", "cache_dir": tmp_path}
    with monkeypatch.context() as context:
        context.setenv("TORCHDYNAMO_DISABLE", "1")
        with plain(**compiled) as lm:
            lm.prefill(BOOK[:150])
        with plain(**compiled) as lm:
            assert hits(lm.prefill(BOOK[:150])) == [(150, "disk")]
    with plain(**compiled) as lm:
        assert lm.prefill(BOOK[:150]).stats.row_cache[0] == (0, None, "other numerics")


def test_nearest_goes_on_from_any_state(plain):
    with plain() as cold, plain(cache_memory_mb=64, cache_match="nearest") as lm:
        lm.prefill(BOOK[:150])
        result, reference = lm.prefill(BOOK[:160]), cold.prefill(BOOK[:160])
        assert hits(result) == [(150, "host")]
        assert result.state.numerics.mixed  # the bits are this run's own
        assert (result.logits - reference.logits).abs().max() < 1e-4
        assert hits(lm.prefill(BOOK[:165])) == [(160, "host")]
        assert not lm.prefill(BOOK[:150]).state.numerics.mixed


@pytest.mark.parametrize("stop", [None, 3])
def test_nearest_goes_on_from_an_answers_end(plain, stop):
    with plain() as cold, plain(cache_memory_mb=64, cache_match="nearest") as lm:
        answer = lm.submit(Request(BOOK[:50], sampling=Sampling(max_new_tokens=9))).result().tokens
        if stop is not None:  # what ends an answer is not a part of it
            first = answer[:stop] if answer[stop] not in answer[:stop] else answer[: answer.index(answer[stop])]
            lm._service._work._ends = (answer[stop],)
            end = lm.submit(Request(BOOK[:50], sampling=Sampling(max_new_tokens=9), tenant="a")).result()
            assert end.tokens == first
            answer, tenant, fed = first, "a", len(first)
        else:
            tenant, fed = "", len(answer) - 1
        turn = [*BOOK[:50], *answer, *OTHER[:30]]
        result, reference = lm.prefill(turn, tenant=tenant), cold.prefill(turn)
        assert hits(result) == [(50 + fed, "host")]
        assert (result.logits - reference.logits).abs().max() < 1e-4


def test_a_state_is_kept_where_the_caller_asks(plain):
    with plain(cache_memory_mb=64, cache_every=100) as lm:
        lm.prefill(BOOK[:300], keep_at=[70])
        assert hits(lm.prefill([*BOOK[:75], *OTHER[:100]])) == [(64, "host")]
        assert hits(lm.prefill([*BOOK[:60], *OTHER[:100]])) == [(0, None)]


def test_on_a_device_states_stay_there_and_the_oldest_go_to_the_host(load, monkeypatch):
    prompts = [[n, *BOOK[:40]] for n in range(6)]
    with load() as cold, load(cache_memory_mb=64) as lm:
        monkeypatch.setattr(lm.executor, "on_host", False)
        for prompt in prompts:
            lm.prefill(prompt)
        rows = [lm.prefill(prompt).stats.row_cache[0] for prompt in reversed(prompts)]
        assert {use.hit_tokens for use in rows} == {41}
        assert rows[0].tier == "device"
        assert rows[-1].tier == "host"
        for prompt in prompts:
            assert lm.prefill(prompt).state.digest() == cold.prefill(prompt).state.digest()


def test_budgets_are_kept_and_what_runs_stays(plain, tmp_path):
    with plain(cache_dir=tmp_path, cache_every=1) as lm:
        cache = cached(lm)
        size = cache._size
        cache.plan = cache.plan._replace(memory_bytes=3 * size, disk_bytes=5 * size)
        cache._tree.budgets.update({MEMORY: 3 * size, DISK: 5 * size})
        for n in range(12):
            prompt = [n, *BOOK[:99]]
            running: list[object] = []

            def look(progress: object, prompt: list[int] = prompt, running: list[object] = running) -> None:
                leased = [e for e in cache._tree.entries if e.leases]
                running.append(leased)
                assert cache._tree.used[MEMORY] <= 3 * size
                assert all(e.tiers or e.what is None or e.what.start is not None for e in leased)

            lm.prefill(prompt, on_progress=look)
            again = lm.prefill(prompt, on_progress=look)
            assert again.stats.row_cache[0].hit_tokens == 100
            assert running
            cache._writes.finish()
            assert sum(file.stat().st_size for file in files(tmp_path)) <= 5 * size
        assert sum(cache.evicted.values()) > 0
        assert len(files(tmp_path)) >= 5  # a file takes less than what is reserved for it
    with plain(cache_dir=tmp_path) as lm:
        assert len([n for n in range(12) if lm.prefill([n, *BOOK[:99]]).stats.row_cache[0].tier == "disk"]) > 0


def test_a_directory_without_room_in_memory_serves_from_the_disk(plain, tmp_path):
    with plain() as cold, plain(cache_dir=tmp_path, cache_every=1) as lm:
        cache = cached(lm)
        cache.plan = cache.plan._replace(memory_bytes=1)
        cache._tree.budgets[MEMORY] = 1
        lm.prefill(BOOK[:150])
        forget_memory(lm)
        for prompt, length in EDITS.values():
            result = lm.prefill(prompt)
            assert hits(result) == [(length, "disk" if length else None)]
            assert result.state.digest() == cold.prefill(prompt).state.digest()
            assert cache._tree.used[MEMORY] == 0


@pytest.mark.filterwarnings("ignore:the cache has removed")
@pytest.mark.parametrize("damage", ["torn", "flipped", "header", "empty", "another's name", "a text"])
def test_a_damaged_file_is_refused_removed_and_counted(damage, plain, tmp_path):
    with plain(cache_dir=tmp_path) as lm:
        lm.prefill(BOOK[:150])
        lm.prefill(OTHER[:20])
    data = {path: path.read_bytes() for path in files(tmp_path)}
    (longest,) = [path for path in data if RecurrentState.load(path).tokens == [150]]
    (other,) = [path for path in data if RecurrentState.load(path).tokens == [20]]
    whole = data[longest]
    at = {"flipped": len(whole) - 100, "header": 60}.get(damage, 0)
    longest.write_bytes(
        {
            "torn": whole[: len(whole) // 2],
            "flipped": whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :],
            "header": whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :],
            "empty": b"",
            "another's name": data[other],
            "a text": b"not a state " * 1000,
        }[damage]
    )
    notes: list[str] = []
    with plain() as cold, plain(cache_dir=tmp_path) as lm:
        lm.on_note = notes.append
        result = lm.prefill(BOOK[:150])
        assert hits(result) == [(128, "disk")]
        assert result.state.digest() == cold.prefill(BOOK[:150]).state.digest()
        assert cached(lm).counts.refused == 1
    assert RecurrentState.load(longest).tokens == [150]  # written again
    with plain(cache_dir=tmp_path) as lm:
        assert hits(lm.prefill(BOOK[:150])) == [(150, "disk")]


def test_files_of_others_stay_and_a_link_is_not_followed(plain, tmp_path):
    folder = tmp_path / "cache"
    folder.mkdir()
    (folder / "notes.state").write_text("mine")
    outside = tmp_path / "outside"
    outside.write_text("mine too")
    (folder / f"{'0' * 32}.state").symlink_to(outside)
    with plain(cache_dir=folder) as lm:
        lm.prefill(BOOK[:150], tenant="../../../x")
    assert (folder / "notes.state").read_text() == "mine"
    assert outside.read_text() == "mine too"
    assert {path.parent for path in folder.rglob("*")} == {folder}


def test_engines_that_share_a_directory_find_each_others_states(plain, tmp_path):
    with plain(cache_dir=tmp_path) as one, plain(cache_dir=tmp_path) as two:
        digest = one.prefill(BOOK[:150]).state.digest()
        forget_memory(one)
        found = two.prefill(BOOK[:150])
        assert (hits(found), found.state.digest()) == ([(150, "disk")], digest)
        for path in files(tmp_path):
            path.unlink()
        again = one.prefill(BOOK[:150])  # the other one, or its user, has removed all
        assert (hits(again), again.state.digest()) == ([(0, None)], digest)
        assert cached(one).counts.refused == 0


PROCESS = """
import sys, xlstm_ray
lm = xlstm_ray.load(sys.argv[1], device="cpu", chunkwise_backend="native", tile_size=32, chunk_size=16, threads=1,
                    cache_dir=sys.argv[2], cache_every=1)
cache = lm._core.cache
cache.plan = cache.plan._replace(disk_bytes=6 * cache._size)
for n in range(20):
    prompt = [n % 7, *range(90)]
    digest = lm.prefill(prompt).state.digest()
    for entry in list(cache._tree.entries):  # so that the state is read from disk
        if entry.tiers == {"memory", "disk"} and not entry.leases:
            cache._tree.drop(entry, "memory")
            entry.what.start = None
    print(n % 7, digest)
    sys.stdout.flush()
lm.close()
assert cache.counts.refused == 0, cache.counts
"""


def test_two_processes_on_one_directory_do_not_hurt_each_other(model, tmp_path):
    command = [sys.executable, "-c", PROCESS, str(model), str(tmp_path)]
    pair = [programs.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    pair[2].stdout.readline()
    pair[2].kill()  # on its way
    lines = {line for process in pair[:2] for line in process.communicate(timeout=120)[0].splitlines()}
    pair[2].communicate()
    assert [process.returncode for process in pair[:2]] == [0, 0]
    assert len(lines) == 7  # each prompt has one digest
    with xlstm_ray.load(model, **SIZES, chunkwise_backend="native", threads=1, cache_dir=tmp_path) as lm:
        size = cached(lm)._size
        assert sum(path.stat().st_size for path in files(tmp_path)) <= 6 * size
        for path in files(tmp_path):
            RecurrentState.load(path)
        line = lm.prefill([3, *range(90)])
    assert f"3 {line.state.digest()}" in lines


def test_a_cache_that_cannot_be_written_is_told_once_and_nothing_else_changes(plain, tmp_path, monkeypatch):
    notes: list[str] = []
    with plain(cache_dir=tmp_path / "cache", cache_memory_mb=64) as lm:
        lm.on_note = notes.append
        digest = lm.prefill(BOOK[:150]).state.digest()
        forget_memory(lm)
        shutil.rmtree(tmp_path / "cache")
        (tmp_path / "cache").write_text("in its place")
        with pytest.raises(UsageError):
            plain(cache_every=3)
        assert lm.prefill(OTHER[:150]).state.digest() != digest
    assert len([note for note in notes if "the cache has not written a state" in note]) == 1


def test_requests_share_what_they_have_in_common(load, tmp_path):
    prompts = [BOOK[:150], BOOK[:150], BOOK[:250], [*BOOK[:70], *OTHER[:80]], OTHER[:40], BOOK[:150]]
    sampling = Sampling(max_new_tokens=5)
    with load() as cold:
        alone = [cold.submit(Request(p, sampling=sampling, keep=True)).result() for p in prompts]
        digest = cold.prefill(BOOK[:150]).state.digest()
    with load(cache_dir=tmp_path) as lm:
        ends = [lm.submit(Request(p, sampling=sampling, keep=True)).result() for p in prompts]
        assert [end.usage.cache.hit_tokens for end in ends] == [0, 150, 128, 64, 0, 150]
        assert [end.usage.resumed_tokens for end in ends] == [0, 150, 128, 64, 0, 150]
        assert [end.tokens for end in ends] == [end.tokens for end in alone]
        assert [end.state.digest() for end in ends] == [end.state.digest() for end in alone]
        assert [end.state.rows for end in ends] == [end.state.rows for end in alone]
        read = lm.submit(Request(BOOK[:150], keep=True)).result()  # no answer, nothing to compute
        assert read.state.digest() == digest
        assert lm.prefill(BOOK[:250]).stats.row_cache[0].hit_tokens == 250  # calls and requests share too
        handles = [lm.submit(Request([n, *BOOK[:200]], sampling=sampling, tenant=str(n))) for n in range(6)]
        for handle in handles[::2]:
            handle.cancel()
        for handle in handles:
            handle.result()
        assert not any(e.leases for e in cached(lm)._tree.entries if DISK in e.tiers)
    with load(cache_dir=tmp_path) as lm:
        end = lm.submit(Request(BOOK[:150], sampling=sampling)).result()
        assert (end.usage.cache, end.tokens) == ((150, "disk", None), alone[0].tokens)


def test_requests_that_come_at_once_compute_once_what_they_share(plain):
    prompts = [BOOK[:300], [*BOOK[:260], *OTHER[:40]], BOOK[:300], [*BOOK[:260], *OTHER[:40]], OTHER[:90], BOOK[:300]]
    sampling = Sampling(max_new_tokens=5)
    with plain() as cold:
        cold.serve(slots=4, buckets=(4,))
        alone = [cold.submit(Request(p, sampling=sampling, keep=True)).result() for p in prompts]
    with plain(cache_memory_mb=64) as lm:
        lm.serve(slots=4, buckets=(4,))
        first = lm.submit(Request([7] * 500, sampling=sampling))  # the others come while it is read
        several = lm.submit_n(Request(BOOK[:300], sampling=Sampling(max_new_tokens=5, n=2)))
        handles = [lm.submit(Request(p, sampling=sampling, keep=True)) for p in prompts]
        read = lm.submit(Request(BOOK[:300], keep=True))
        ends = [handle.result() for handle in handles]
        assert [end.usage.cache.hit_tokens for end in ends] == [300, 256, 300, 300, 0, 300]
        assert [end.usage.resumed_tokens for end in ends] == [300, 256, 300, 300, 0, 300]
        assert [end.tokens for end in ends] == [end.tokens for end in alone]
        assert [end.state.digest() for end in ends] == [end.state.digest() for end in alone]
        assert [handle.result().tokens for handle in several] == [alone[0].tokens] * 2
        assert read.result().state.tokens == [300]
        assert first.result().usage.resumed_tokens == 0
        assert not any(e.leases for e in cached(lm)._tree.entries)
        counts = cached(lm).counts
        assert (counts.queries, sum(counts.hit_tokens.values())) == (9, 300 * 5 + 256)


def test_no_prompt_waits_until_a_state_that_is_hardly_of_use_has_left_the_device(plain):
    with plain(cache_memory_mb=64) as lm:
        lm.executor.on_host = False  # as on a GPU
        others: list[Future[Any]] = [Future() for _ in range(MOVERS)]
        lm._core.states._under_way += others
        lm.prefill(BOOK[:150])
        lm.prefill(OTHER[200 : 200 + TILE - 1])  # less than a tile
        lm.prefill(OTHER[300 : 300 + TILE // 2], keep_at=[CHUNK])
        for other in others:
            other.set_result({})
        assert hits(lm.prefill([*BOOK[:70], *OTHER[70:150]])) == [(0, None)]
        assert hits(lm.prefill(BOOK[:150]))[0][0] == 150
        assert hits(lm.prefill([*BOOK[:70], *OTHER[70:150]]))[0][0] == 150
        lm.prefill(OTHER[:150])
        assert hits(lm.prefill([*OTHER[:70], *BOOK[70:150]]))[0][0] == 64
        assert hits(lm.prefill(OTHER[200 : 200 + TILE - 1]))[0][0] == 0
        assert hits(lm.prefill(OTHER[300 : 300 + TILE // 2]))[0][0] == CHUNK


def test_a_reader_who_leaves_is_gone_while_windows_are_under_way_and_their_states_are_kept(plain, monkeypatch):
    with plain() as cold, plain(cache_memory_mb=64) as lm:
        lm.executor._depth = 2  # as on a GPU
        seen, step = [], Work.step

        def and_leave(work: Work) -> None:
            step(work)
            for number in [n for n, task in work._tasks.items() if work._reads(task) and task.read >= 64]:
                work.cancel(number)
                seen.append((work.under_way, number in work._tasks))

        monkeypatch.setattr(Work, "step", and_leave)
        end = lm.submit(Request(BOOK[:300], sampling=Sampling(max_new_tokens=5))).result(60)
        monkeypatch.undo()
        assert (end.finish.reason, end.tokens, seen) == ("cancelled", [], [(True, False)])
        again = lm.prefill(BOOK[:300])
        assert hits(again)[0][0] >= 64
        assert again.state.digest() == cold.prefill(BOOK[:300]).state.digest()
        assert not any(entry.leases for entry in cached(lm)._tree.entries)


def test_what_one_engine_lends_another_goes_on_from_to_the_same_bits(plain):
    lender, borrower, cold = plain(cache_memory_mb=64), plain(cache_memory_mb=64), plain()
    with lender, borrower, cold:
        assert lender.lend(BOOK[:150]) is None
        lender.prefill(BOOK[:150], tenant="one")
        assert lender.lend(BOOK[:150], "other") is None
        for prompt, length in EDITS.values():
            lent = lender.lend(prompt, "one")
            assert (lent.tokens if lent else [0]) == [length]
        data = lender.lend(BOOK[:150], "one").to_bytes()
        borrower.borrow(RecurrentState.from_bytes(data, "a state"))
        same = borrower.prefill(BOOK[:150], tenant="one")
        assert hits(same) == [(150, "host")]
        assert same.state.digest() == cold.prefill(BOOK[:150]).state.digest()
        borrower.borrow(RecurrentState.from_bytes(lender.lend(BOOK[:250], "one").to_bytes(), "a state"))
        longer = borrower.prefill(BOOK[:250], tenant="one")
        assert hits(longer) == [(128, "host")]
        assert longer.state.digest() == cold.prefill(BOOK[:250]).state.digest()
        assert hits(borrower.prefill(BOOK[:150])) == [(0, None)]  # of another tenant
        with plain(cache_memory_mb=64, dtype="bfloat16") as other, pytest.raises(StateError, match="numerics"):
            other.borrow(RecurrentState.from_bytes(data, "a state"))
        with pytest.raises(StateError, match="a state: is damaged"):
            RecurrentState.from_bytes(data[:-1] + bytes([data[-1] ^ 1]), "a state")
        for wrong in (b"", data[:100], data[:-1], b"\0" * 64, b"\x02" + b"\0" * 7 + b"[]"):
            with pytest.raises(StateError, match="a state: is not a whole state"):
                RecurrentState.from_bytes(wrong, "a state")
