"""What a caller does with an engine and its handles hurts nobody else: it leaves, raises, asks twice or wrongly."""

import asyncio
import sys
import textwrap
import threading
from typing import Any

import programs
import pytest
from engines import OPTIONS, lm, model

import xlstm_ray
from xlstm_ray import Request, Sampling
from xlstm_ray.engine.request import End, Handle, Piece
from xlstm_ray.errors import MemoryLimitError, UsageError
from xlstm_ray.memory.sample import process_bytes

__all__ = ["lm", "model"]

ENDLESS = 100_000


def ask(lm: xlstm_ray.Engine, tokens: int = 3, text: str = "abc") -> Handle:
    return lm.submit(Request(text, sampling=Sampling(max_new_tokens=tokens)))


def test_who_stops_waiting_leaves_the_request_and_the_engine_as_they_are(lm):
    async def leave() -> Handle:
        handle = ask(lm, ENDLESS)
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(handle, 0.01)
        async for event in handle:
            if isinstance(event, Piece):
                break
        return handle

    handle = asyncio.run(leave())
    assert isinstance(next(iter(handle)), Piece)  # the loop is closed, and the answer goes on
    assert ask(lm).result(60).finish.reason == "length"
    handle.cancel()

    async def again() -> str:
        return (await asyncio.wait_for(handle, 60)).finish.reason

    assert asyncio.run(again()) == handle.result(60).finish.reason == "cancelled"


def test_each_event_is_handed_out_once_and_every_iteration_ends(lm):
    handle, parts = ask(lm, 30), [[], [], []]

    def read(part: list[Any]) -> None:
        part.extend(handle)

    async def read_too() -> None:
        parts[2].extend([event async for event in handle])

    threads = [threading.Thread(target=read, args=(part,), daemon=True) for part in parts[:2]]
    for thread in threads:
        thread.start()
    asyncio.run(asyncio.wait_for(read_too(), 60))
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    events = [event for part in parts for event in part]
    alone = [type(event) for event in ask(lm, 30)]
    assert sorted(map(str, map(type, events))) == sorted(map(str, alone))
    assert list(handle) == []


def test_a_listener_that_raises_ends_its_own_request_alone(lm, monkeypatch):
    told: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", told.append)
    other, faulty, heard = ask(lm, 40), ask(lm, ENDLESS), []

    def listen(event: Any) -> None:
        heard.append(event)
        if isinstance(event, Piece):
            raise ZeroDivisionError("of a caller")

    faulty.listen(listen)
    assert faulty.result(60).finish.reason == "cancelled"
    assert other.result(60).finish.reason == "length"
    assert ask(lm).result(60).finish.reason == "length"
    assert {one.exc_type for one in told} == {ZeroDivisionError}
    assert isinstance(heard[-1], End)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("priority", "high"),
        ("priority", 1.5),
        ("keep", 1),
        ("keep_at", ["a"]),
        ("keep_at", [-4]),
        ("keep_at", 7),
        ("tenant", 5),
        ("sampling", {"n": 2}),
        ("state", "a.state"),
        ("prompt_logprobs", -1),
    ],
)
def test_a_value_of_a_wrong_kind_is_refused_where_it_is_given(lm, field, value):
    with pytest.raises(UsageError, match=f"`{field}` is .*; (give|allowed)"):
        lm.submit(Request("abc", **{field: value}))
    if field in ("keep_at", "tenant"):
        with pytest.raises(UsageError, match=f"`{field}` is "):
            lm.prefill("abc", **{field: value})


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"slots": 0}, "`slots`: 0 was given"),
        ({"slots": 2.5}, "`slots`: 2.5 was given"),
        ({"buckets": ()}, "`buckets`: none was given"),
        ({"buckets": (4, 0)}, "`buckets`: 4, 0 was given"),
        ({"fills_per_decode": 0}, "`fills_per_decode`: 0 was given"),
    ],
)
def test_numbers_that_nothing_can_be_served_with_are_refused(lm, options, said):
    with pytest.raises(UsageError, match=said):
        lm.serve(**options)
    assert lm.serve(slots=2) == 2


def test_slots_that_do_not_fit_in_memory_are_refused(model):
    with xlstm_ray.load(model, **OPTIONS, mem_hard_mb=(process_bytes() >> 20) + 500) as lm:
        fit = lm.plan.room.slots(1 << 14)
        assert 1 < fit < 1 << 14
        with pytest.raises(MemoryLimitError, match=rf"`slots` is {1 << 14}, and \d+ fit in memory"):
            lm.serve(slots=1 << 14)


def test_a_call_has_never_more_rows_than_the_largest_bucket(lm, monkeypatch):
    """With more slots than that, there are several calls a token; with one bucket, the bits are those alone."""
    rows: set[int] = set()
    submit = lm.executor.submit

    def counted(state, step):
        rows.add(state.batch)
        return submit(state, step)

    lm.serve(slots=9, buckets=(4,))
    texts = [chr(97 + n) * (n + 1) for n in range(9)]
    alone = [ask(lm, 12, text).result(60).tokens for text in texts]
    monkeypatch.setattr(lm.executor, "submit", counted)
    assert [handle.result(60).tokens for handle in [ask(lm, 12, text) for text in texts]] == alone
    assert rows == {1, 4}


def _services() -> int:
    """Other engines of this process may have some."""
    return [thread.name for thread in threading.enumerate()].count("requests")


def test_callers_who_are_first_at_once_begin_one_service(lm):
    before, others = threading.active_count(), _services()
    all_here, reasons = threading.Barrier(8), []

    def first() -> None:
        all_here.wait(60)
        reasons.append(ask(lm).result(60).finish.reason)

    threads = [threading.Thread(target=first) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert reasons == ["length"] * 8
    assert _services() == others + 1
    assert threading.active_count() <= before + 2  # and a memory watchdog


LEAVES = """
    import sys
    import xlstm_ray
    lm = xlstm_ray.load(sys.argv[1], device="cpu", chunkwise_backend="native", tile_size=32, chunk_size=16)
    handles = [lm.submit(xlstm_ray.Request("a" * 900, sampling=xlstm_ray.Sampling(max_new_tokens=100_000)))] * 4
    next(iter(handles[0]))
"""


def test_a_program_that_ends_amid_requests_ends_in_silence(model):
    done = programs.run(
        [sys.executable, "-c", textwrap.dedent(LEAVES), str(model)], capture_output=True, text=True, timeout=100
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
