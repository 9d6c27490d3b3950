"""Many requests in one engine: each gets the answer that it gets alone."""

import asyncio
import random
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from time import sleep
from typing import Any

import pytest
import torch
from engines import OPTIONS, lm, model

import xlstm_ray
from xlstm_ray import Engine, RecurrentState
from xlstm_ray.engine.request import End, Event, Handle, Piece, Queued, Reading, Request
from xlstm_ray.engine.rows import Batch
from xlstm_ray.engine.task import Task
from xlstm_ray.engine.work import Work
from xlstm_ray.errors import CheckpointError, GridLost, StateError, UsageError
from xlstm_ray.sampling import Sampling
from xlstm_ray.serve.warm import first_answers

__all__ = ["lm", "model"]

TEXTS = [bytes(range(33 + n, 120 - n)).decode() * (1 + n % 3) for n in range(9)]


def sampling_of(n: int) -> Sampling:
    """Greedy and drawn, short and long, with penalties and stop texts."""
    drawn = {"temperature": 0.8, "seed": n, "top_p": 0.9} if n % 2 else {}
    shaped = {"repetition_penalty": 1.2} if n % 3 == 0 else {}
    return Sampling(max_new_tokens=3 + n % 7, **drawn, **shaped)


def ask(lm: Engine, n: int, **more: Any) -> Handle:
    return lm.submit(Request(TEXTS[n % len(TEXTS)], sampling=sampling_of(n), **more))


def what(end: End) -> tuple[str, list[int], str, str]:
    assert end.state is not None
    return end.text, end.tokens, end.finish.reason, end.state.digest()


def test_requests_together_get_what_each_gets_alone_to_the_bit(lm):
    lm.serve(slots=4, buckets=(4,))
    alone = [what(ask(lm, n, keep=True).result(60)) for n in range(9)]
    for seed in range(3):
        order = list(range(9))
        random.Random(seed).shuffle(order)
        handles = {n: ask(lm, n, keep=True) for n in order}
        assert [what(handles[n].result(60)) for n in range(9)] == alone


def test_a_request_is_answered_as_generate_answers(lm):
    lm.serve(buckets=(1,))
    for n in range(4):
        s = sampling_of(n)
        generation = lm.generate(TEXTS[n], sampling=s.model_dump(exclude_defaults=True), last=False)
        text = "".join(generation)
        end = ask(lm, n, keep=True).result(60)
        assert (end.text, end.tokens) == (text, generation.tokens[0])
        assert end.state.digest() == generation.state().digest()


def test_calls_of_other_threads_go_on_beside_requests(lm):
    lm.serve(slots=4, buckets=(4,))
    alone = lm.prefill(TEXTS[0] * 3).state.digest(), "".join(lm.generate(TEXTS[1], max_new_tokens=6))
    ends = [ask(lm, n).result(60).text for n in range(6)]
    handles = [ask(lm, n) for n in range(6)]
    with ThreadPoolExecutor(2) as pool:
        states = [pool.submit(lambda: lm.prefill(TEXTS[0] * 3).state.digest()) for _ in range(3)]
        texts = [pool.submit(lambda: "".join(lm.generate(TEXTS[1], max_new_tokens=6))) for _ in range(3)]
        assert {f.result(60) for f in states} == {alone[0]}
        assert {f.result(60) for f in texts} == {alone[1]}
    assert [handle.result(60).text for handle in handles] == ends


def test_cancelled_requests_leave_the_others_bits_alone_and_nothing_behind(lm):
    lm.serve(slots=4, buckets=(4,))
    alone = [what(ask(lm, n, keep=True).result(60)) for n in range(5)]
    rng = random.Random(5)
    for _ in range(6):
        handles = [ask(lm, n, keep=True) for n in range(5)]
        others = [lm.submit(Request(TEXTS[8] * 4, sampling=Sampling(max_new_tokens=400))) for _ in range(3)]
        for other in others:
            events = iter(other)
            for _ in range(rng.randrange(1, 12)):
                next(events)
            other.cancel()
            *_, last = events
            assert last.finish.reason == "cancelled"
        assert [what(handle.result(60)) for handle in handles] == alone
        del handles, others
    (worker, *_), *_ = lm.executor.stages
    lm.submit(Request("a")).result(60)  # a cancelled request's state is freed before the next request ends
    assert len(worker.states) <= 1


def test_a_prompt_that_is_cancelled_leaves_a_state_to_go_on_from(lm):
    text = TEXTS[0] * 12
    handle = lm.submit(Request(text, keep=True))
    for event in handle:
        if isinstance(event, Reading) and event.tokens_done > 100:
            handle.cancel()
            break
    end = handle.result(60)
    assert end.finish.reason == "cancelled"
    assert not end.state.complete
    assert 0 < end.state.tokens[0] < len(text)
    assert lm.prefill(text, state=end.state).state.digest() == lm.prefill(text).state.digest()


def test_events_come_in_order_and_say_what_happens(lm):
    events = list(ask(lm, 4))
    kinds = [type(event) for event in events]
    assert kinds[0] is Queued
    assert kinds[-1] is End
    assert kinds == sorted(kinds, key=[Queued, Reading, Piece, End].index)
    assert [e.tokens_done for e in events if isinstance(e, Reading)][-1] == events[-1].usage.prompt_tokens
    assert "".join(e.text for e in events if isinstance(e, Piece)) == events[-1].text
    usage = events[-1].usage
    assert 0 <= usage.queued_s <= usage.first_token_s <= usage.total_s
    assert usage.answer_tokens == len(events[-1].tokens) == sampling_of(4).max_new_tokens


def test_a_state_is_gone_on_from_and_asked_many_times(lm):
    lm.serve(slots=4, buckets=(4,))
    book = lm.submit(Request(TEXTS[0], keep=True)).result(60)
    assert book.state.digest() == lm.prefill(TEXTS[0]).state.digest()
    again = [lm.submit(Request(state=book.state, sampling=sampling_of(2), keep=True)) for _ in range(3)]
    assert len({what(handle.result(60))[0] for handle in again}) == 1
    asked = lm.submit(Request(append="why?", state=book.state, sampling=sampling_of(2))).result(60)
    assert asked.usage.resumed_tokens == len(TEXTS[0])
    assert asked.usage.prompt_tokens == len(TEXTS[0]) + 4
    whole = lm.submit(Request(TEXTS[0] + "why?", state=book.state, sampling=sampling_of(2))).result(60)
    assert whole.text == asked.text
    assert book.state.digest() == lm.prefill(TEXTS[0]).state.digest()


def test_a_more_important_request_goes_first_and_who_made_room_loses_no_bit(lm):
    lm.serve(slots=2, buckets=(2,))
    long = [
        Request(t, sampling=Sampling(max_new_tokens=60, seed=n, temperature=0.7), keep=True)
        for n, t in enumerate(TEXTS[:2])
    ]
    alone = [what(lm.submit(request).result(60)) for request in long]
    ended: list[int] = []
    urgent: list[Handle] = []

    def hear(number: int, event: Event) -> None:
        """In the engine's thread: this one does not go on before a more important one is there."""
        if number == 1 and isinstance(event, Piece) and not urgent:
            urgent.append(lm.submit(Request(TEXTS[5], sampling=Sampling(max_new_tokens=3), priority=1)))
            urgent[0].listen(partial(hear, 2))
        if isinstance(event, End):
            ended.append(number)

    handles = [lm.submit(request) for request in long]
    for n, handle in enumerate(handles):
        handle.listen(partial(hear, n))
    assert [what(handle.result(60)) for handle in handles] == alone
    assert ended[0] == 2


def counted(lm: Engine, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The tokens of each window that is submitted from here on; 1: a step of decoding."""
    windows: list[int] = []
    plain = lm.executor.submit

    def submit(state, step):
        windows.append(step.tokens.shape[1])
        return plain(state, step)

    monkeypatch.setattr(lm.executor, "submit", submit)
    return windows


def test_several_answers_read_their_prompt_once_and_each_is_what_it_is_alone(lm, monkeypatch):
    lm.serve(slots=4, buckets=(4,))
    sampling = Sampling(max_new_tokens=9, temperature=1.0, seed=5, n=6)
    alone = [lm.submit(Request(TEXTS[0], sampling=one, keep=True)).result(60) for one in sampling.one_by_one()]
    assert len({end.text for end in alone}) == 6
    windows = counted(lm, monkeypatch)
    lm.submit(Request(TEXTS[0])).result(60)
    read = [size for size in windows if size > 1]
    windows.clear()
    others = [ask(lm, n) for n in range(4)]
    for other in others:
        other.result(60)
    beside = [size for size in windows if size > 1]
    windows.clear()
    others, handles = [ask(lm, n) for n in range(4)], lm.submit_n(Request(TEXTS[0], sampling=sampling, keep=True))
    ends = [handle.result(60) for handle in handles]
    for other in others:
        other.result(60)
    assert [what(end) for end in ends] == [what(end) for end in alone]
    assert sorted(size for size in windows if size > 1) == sorted(read + beside)
    for end in ends:
        assert (end.usage.prompt_tokens, end.usage.answer_tokens) == (len(TEXTS[0]), 9)
        assert 0 <= end.usage.queued_s <= end.usage.first_token_s <= end.usage.total_s
    with pytest.raises(UsageError, match="`n` is 6, and submit is for one answer"):
        lm.submit(Request("a", sampling=sampling))
    (one,) = lm.submit_n(Request(TEXTS[0], sampling=sampling.one_by_one()[1], keep=True))
    assert what(one.result(60)) == what(alone[1])


def test_several_answers_go_on_from_a_given_state_and_from_what_they_share(lm):
    lm.serve(slots=4, buckets=(4,))
    sampling = Sampling(max_new_tokens=5, temperature=1.0, n=3)
    state = lm.prefill(TEXTS[1]).state
    whole = [handle.result(60).text for handle in lm.submit_n(Request(TEXTS[1], sampling=sampling))]
    assert [handle.result(60).text for handle in lm.submit_n(Request(state=state, sampling=sampling))] == whole
    events = list(lm.submit_n(Request(append="why?", state=state, sampling=sampling))[2])
    assert [type(event) for event in events[:2]] == [Queued, Reading]
    assert events[-1].usage.resumed_tokens == len(TEXTS[1])


def test_an_answer_among_several_is_cancelled_and_with_the_last_one_their_prompt(lm):
    lm.serve(slots=4, buckets=(4,))
    sampling, long = Sampling(max_new_tokens=5, temperature=1.0, n=3), TEXTS[0] * 6
    whole = [handle.result(60).text for handle in lm.submit_n(Request(long, sampling=sampling))]
    for begun in (Queued, Reading, Piece):
        handles = lm.submit_n(Request(long, sampling=sampling))
        next(event for event in handles[1] if isinstance(event, begun))
        handles[1].cancel()
        assert [handles[n].result(60).text for n in (0, 2)] == [whole[n] for n in (0, 2)]
        assert begun is Piece or handles[1].result(60).finish.reason == "cancelled"
    handles = lm.submit_n(Request(long, sampling=sampling))
    read = 0
    for event in handles[0]:
        if isinstance(event, Reading):
            read = event.tokens_done
            for handle in handles:
                handle.cancel()
    assert [handle.result(60).finish.reason for handle in handles] == ["cancelled"] * 3
    assert 0 < read < len(long)
    lm.submit(Request("a")).result(60)
    assert not lm._service._work.left
    assert not lm._service._work._tasks


def test_a_parked_request_that_is_cancelled_leaves_a_state_to_go_on_from(lm):
    lm.serve(slots=1, buckets=(1,))
    sampling = Sampling(max_new_tokens=30, seed=2, temperature=0.7)
    whole = lm.submit(Request(TEXTS[0], sampling=sampling, keep=True)).result(60)
    handle = lm.submit(Request(TEXTS[0], sampling=sampling, keep=True))
    while not isinstance(next(iter(handle)), Piece):
        pass
    urgent = lm.submit(Request(TEXTS[5] * 9, sampling=Sampling(max_new_tokens=1), priority=1))
    while not isinstance(next(iter(urgent)), Reading):
        pass
    handle.cancel()
    end = handle.result(60)
    assert not urgent.done
    assert end.finish.reason == "cancelled"
    assert end.state.tokens == [len(TEXTS[0]) + len(end.tokens)]
    left = sampling.model_copy(update={"max_new_tokens": 30 - len(end.tokens)})
    more = lm.submit(Request(state=end.state, sampling=left, keep=True)).result(60)
    assert what(more)[1:] == (whole.tokens[len(end.tokens) :], "length", whole.state.digest())


def test_an_urgent_request_may_come_at_any_step_also_with_two_in_flight_as_on_a_device(lm, monkeypatch):
    """A row may end by the very step that is under way when another one is to have its slot."""
    sampling = Sampling(max_new_tokens=3)
    requests = [Request("a", sampling=sampling), Request(TEXTS[0]), Request("b", sampling=sampling, priority=1)]
    alone = [lm.submit(request).result(60) for request in requests]
    monkeypatch.setattr(lm.executor, "_depth", 2)
    for steps in range(8):
        work = Work(lm._core, ends=(), slots=2, buckets=(2,), fills_per_decode=1)
        *first, urgent = tasks = [Task.of(lm._core, one, n, Handle(lambda: None)) for n, one in enumerate(requests)]
        with lm._core.turn.of("serve"):
            for task in first:
                work.arrive(task)
            for _ in range(steps):
                work.step()
            work.arrive(urgent)
            while work.left:
                work.step()
        assert [task.handle.result(0).tokens for task in tasks] == [end.tokens for end in alone]


def test_asyncio_callers_wait_for_many_at_once(lm):
    lm.serve(slots=4, buckets=(4,))
    alone = [ask(lm, n).result(60).text for n in range(6)]

    async def stream(n: int) -> str:
        return "".join([event.text async for event in ask(lm, n) if isinstance(event, Piece)])

    async def all_of_them() -> tuple[list[str], list[End]]:
        streams = asyncio.gather(*map(stream, range(6)))
        ends = asyncio.gather(*(ask(lm, n) for n in range(6)))
        return await streams, await ends

    texts, ends = asyncio.run(all_of_them())
    assert texts == alone
    assert [end.text for end in ends] == alone


def test_log_probabilities_come_with_their_tokens(lm):
    sampling = Sampling(max_new_tokens=4, logprobs=3)
    generation = lm.generate(TEXTS[0], sampling={"max_new_tokens": 4, "logprobs": 3})
    list(generation)
    pieces = [
        e for e in lm.submit(Request(TEXTS[0], sampling=sampling)) if isinstance(e, Piece) and e.token is not None
    ]
    found = [(piece.token, piece.made.logprob, piece.made.likeliest) for piece in pieces]
    assert found == [(own.id, own.logprob, [(t.id, t.logprob) for t in top]) for own, top in generation.logprobs(0)]


@pytest.mark.parametrize(
    ("request_", "error", "says"),
    [
        (Request(), UsageError, "neither a prompt nor a state"),
        (Request(""), UsageError, "the prompt is empty"),
        (Request([1, 999]), UsageError, "outside the model's vocabulary"),
        (Request("a", append="b"), UsageError, "both given"),
        (Request(append="b"), UsageError, "no state to append to"),
        (Request("a", sampling=Sampling(logit_bias={999: 1})), UsageError, "999"),
    ],
)
def test_what_cannot_be_asked_for_is_refused_at_once(lm, request_, error, says):
    with pytest.raises(error, match=says):
        lm.submit(request_)


def test_a_state_of_another_prompt_is_refused(lm):
    state = lm.prefill(TEXTS[0]).state
    with pytest.raises(StateError, match="another prompt"):
        lm.submit(Request(TEXTS[1], state=state))


@pytest.mark.parametrize("asks", [{"append": "a"}, {}])
@pytest.mark.parametrize("n", [1, 3])
def test_a_state_with_wild_numbers_ends_who_sent_it_alone(lm, asks, n):
    lm.serve(slots=8, buckets=(8,))
    good = [what(ask(lm, k, keep=True).result(60)) for k in range(3)]
    wild = RecurrentState.from_bytes(lm.prefill(TEXTS[0]).state.to_bytes(), "wild")
    for name, tensor in wild.tensors.items():
        if name.endswith(".C"):
            tensor.fill_(3e38)  # finite, and so taken; what is computed from it is not
    others = [ask(lm, k, keep=True) for k in range(3)]
    sampling = Sampling(max_new_tokens=4, temperature=1.0, n=n, logprobs=1)
    for handle in lm.submit_n(Request(state=wild, sampling=sampling, **asks)):
        with pytest.raises(StateError, match="not finite"):
            handle.result(60)
    assert [what(handle.result(60)) for handle in others] == good
    assert what(ask(lm, 0, keep=True).result(60)) == good[0]


def test_a_prompt_whose_logits_are_no_numbers_ends_alone(lm, monkeypatch):
    good, plain = what(ask(lm, 1, keep=True).result(60)), lm.executor.result
    monkeypatch.setattr(lm.executor, "result", lambda: plain()._replace(logits=torch.full((1, 259), torch.nan)))
    with pytest.raises(CheckpointError, match=r"^the model's logits are not finite"):
        ask(lm, 0).result(60)
    monkeypatch.undo()
    assert what(ask(lm, 1, keep=True).result(60)) == good


def test_a_fault_under_the_engine_ends_every_request_with_its_reason(lm, monkeypatch):
    plain, calls = lm.executor.result, []

    def result():
        calls.append(1)
        if len(calls) == 7:
            raise GridLost("the grid is gone")
        return plain()

    monkeypatch.setattr(lm.executor, "result", result)
    handles = [lm.submit(Request(t * 3, sampling=Sampling(max_new_tokens=50))) for t in TEXTS[:5]]
    for handle in handles:
        with pytest.raises(GridLost, match="the grid is gone"):
            handle.result(60)
    with pytest.raises(GridLost, match="the grid is gone"):
        lm.submit(Request("a"))


def test_a_fault_while_a_request_arrives_ends_every_request_with_its_reason(lm, monkeypatch):
    handles = [lm.submit(Request(t * 3, sampling=Sampling(max_new_tokens=500))) for t in TEXTS[:3]]
    for handle in handles:
        assert isinstance(next(iter(handle)), Queued)

    def lost(self: Task, core: Any) -> None:
        raise GridLost("the grid is gone")

    monkeypatch.setattr(Task, "look_up", lost)
    handles += lm.submit_n(Request(TEXTS[4], sampling=Sampling(temperature=1.0, n=3)))
    for handle in handles:
        with pytest.raises(GridLost, match="the grid is gone"):
            handle.result(60)


def test_what_arrives_after_a_fault_is_ended_by_it_too(lm, monkeypatch):
    """Nothing of it is looked up any more: that could fail again, and all others would wait for ever."""
    calls = []

    def lost(self: Task, core: Any) -> None:
        calls.append(self)
        while len(handles) < 4:  # the others are in the inbox by then
            sleep(0.01)
        raise GridLost("the grid is gone")

    handles: list[Any] = []
    monkeypatch.setattr(Task, "look_up", lost)
    handles += [lm.submit(Request(t)) for t in TEXTS[:3]]
    handles += lm.submit_n(Request(TEXTS[4], sampling=Sampling(temperature=1.0, n=3)))
    for handle in handles:
        with pytest.raises(GridLost, match="the grid is gone"):
            handle.result(60)
    assert len(calls) == 1


def test_closing_ends_what_there_is(model):
    lm = xlstm_ray.load(model, **OPTIONS)
    handles = [lm.submit(Request(t, sampling=Sampling(max_new_tokens=5000))) for t in TEXTS]
    next(iter(handles[0]))
    lm.close()
    assert {handle.result(60).finish.reason for handle in handles} == {"cancelled"}
    with pytest.raises(UsageError, match="closed"):
        lm.submit(Request("a"))


def test_the_first_answers_go_through_calls_of_all_sizes_and_leave_nothing(model, monkeypatch):
    sizes: set[int] = set()
    step = Batch.step

    def seen(batch: Batch, choice: Any) -> None:
        sizes.add(len(batch.places))
        step(batch, choice)

    monkeypatch.setattr(Batch, "step", seen)
    with xlstm_ray.load(model, **OPTIONS, cache_memory_mb=16) as lm:
        lm.serve(slots=16)
        first_answers(lm, 16)
        assert sizes == {1, 4, 16}
        assert len(lm.cache) == 0
        assert not lm._service._work.left
