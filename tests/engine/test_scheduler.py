"""The scheduler: random requests over a fake engine, which only counts."""

from collections import Counter
from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from xlstm_ray.engine.scheduler import AGE, Decode, Fill, Park, Resume, Scheduler


@dataclass
class Asked:
    arrives: int  # before this decision
    windows: int
    tokens: int  # after the first, which comes with the prompt's end
    priority: int
    leaves: int | None  # before this decision it is cancelled
    answers: int  # answers that go on from its prompt's end; 0: it decodes itself


REQUESTS = st.lists(
    st.builds(
        Asked,
        arrives=st.integers(0, 30),
        windows=st.integers(1, 6),
        tokens=st.integers(0, 6),
        priority=st.integers(-1, 2),
        leaves=st.none() | st.integers(0, 60),
        answers=st.integers(0, 2),
    ),
    min_size=1,
    max_size=12,
)


@given(REQUESTS, st.integers(1, 4), st.integers(1, 3))
@settings(max_examples=200, deadline=None)
def test_any_requests_get_through_and_every_rule_holds(asked, slots, fills):
    scheduler = Scheduler(slots, fills)
    left: dict[int, list[int]] = {}  # windows and tokens to go, of those that are there
    begun: list[int] = []
    on_device: set[int] = set()
    behind: dict[int, list[int]] = {}
    priority = {n: request.priority for n, request in enumerate(asked)}
    coming, since_decode, decisions = sorted(range(len(asked)), key=lambda n: asked[n].arrives), 0, 0
    while coming or left:
        while coming and (asked[coming[0]].arrives <= decisions or not left):
            number = coming.pop(0)
            one = asked[number]
            left[number] = [one.windows, 0 if one.answers else one.tokens]
            scheduler.arrive(number, priority=one.priority)
            behind[number] = [100 * (number + 1) + k for k in range(one.answers)]
            for answer in behind[number]:
                left[answer], priority[answer] = [0, one.tokens + 1], one.priority
                scheduler.arrive(answer, priority=one.priority, behind=True)
        for number in [n for n in left if n < 100 and asked[n].leaves is not None and asked[n].leaves <= decisions]:
            for one in (number, *behind[number]):
                scheduler.leave(one)
                del left[one]
                on_device.discard(one)
        if not left:
            assert scheduler.next() is None
            continue
        decoding = [n for n in left if scheduler.phase(n) == "decoding"]
        action = scheduler.next()
        decisions += 1
        assert decisions < 3000
        match action:
            case Fill(number):
                assert left[number][0] > 0
                if number not in begun:
                    begun.append(number)
                on_device.add(number)
                since_decode = since_decode + 1 if decoding else 0
                left[number][0] -= 1
                if left[number][0] == 0:
                    scheduler.filled(number)
                    for answer in behind[number]:
                        scheduler.follow(answer)
                    if left[number][1] == 0:
                        scheduler.leave(number)
                        del left[number]
                        on_device.discard(number)
            case Decode(numbers):
                assert sorted(numbers) == sorted(decoding)
                since_decode = 0
                for number in numbers:
                    left[number][1] -= 1
                    if left[number][1] == 0:
                        scheduler.leave(number)
                        del left[number]
                        on_device.discard(number)
            case Park(number):
                assert scheduler.phase(number) == ("waiting" if left[number][0] else "parked")
                assert any(priority[n] > priority[number] for n in left if scheduler.phase(n) in ("waiting", "parked"))
                on_device.discard(number)
            case Resume(number):
                assert left[number][1] > 0
                on_device.add(number)
            case None:
                raise AssertionError("there is work, and nothing is done")
        assert len(on_device) <= slots
        assert since_decode <= fills
    assert len(scheduler) == 0
    if len({request.priority for request in asked}) == 1:  # first come, first served
        order = sorted(range(len(asked)), key=lambda n: asked[n].arrives)
        assert begun == [n for n in order if n in begun]


def test_a_request_that_waits_long_enough_comes_before_more_important_ones():
    scheduler = Scheduler(1)
    scheduler.arrive(0, priority=0)
    for number in range(1, 3 * AGE):
        scheduler.arrive(number, priority=1)
        action = scheduler.next()
        assert isinstance(action, Fill)
        if action.request == 0:
            break
        scheduler.leave(action.request)
    assert AGE <= number <= AGE + 1


def test_who_is_behind_has_the_place_of_its_arrival():
    scheduler = Scheduler(2)
    scheduler.arrive(0)
    scheduler.arrive(10, behind=True)
    scheduler.arrive(11, behind=True)
    scheduler.arrive(1)
    assert scheduler.waiting == 2
    assert [scheduler.next() for _ in range(2)] == [Fill(0)] * 2
    scheduler.filled(0)
    scheduler.follow(10)
    scheduler.follow(11)
    scheduler.leave(0)
    assert [scheduler.next(), scheduler.next(), scheduler.next()] == [Resume(10), Resume(11), Decode((10, 11))]


def test_only_a_more_important_request_takes_a_slot_and_it_is_given_back():
    scheduler = Scheduler(1)
    scheduler.arrive(0)
    assert scheduler.next() == Fill(0)
    scheduler.filled(0)
    scheduler.arrive(1)
    assert scheduler.next() == Decode((0,))
    assert scheduler.place(1) == 0
    scheduler.arrive(2, priority=1)
    assert scheduler.place(1) == 1
    assert scheduler.next() == Park(0)
    assert scheduler.next() == Fill(2)
    scheduler.leave(2)
    assert scheduler.next() == Resume(0)
    assert scheduler.next() == Decode((0,))


def test_a_long_prompt_goes_on_beside_any_number_of_more_important_ones():
    """The document of a service, which callers with short prompts never leave alone."""
    scheduler, windows = Scheduler(2), Counter()
    scheduler.arrive(0, priority=-1)
    assert scheduler.next() == Fill(0)
    for other in range(1, 10 * AGE):  # each has one window, and the next request arrives before it is read
        scheduler.arrive(other)
        action = scheduler.next()
        assert isinstance(action, Fill)
        windows[action.request] += 1
        for request in [n for n in windows if n]:
            scheduler.leave(request)
            del windows[request]
    assert windows[0] >= 4


def test_who_reads_makes_room_for_who_is_more_important_and_goes_on_after():
    scheduler = Scheduler(1)
    scheduler.arrive(0, priority=-1)
    assert scheduler.next() == Fill(0)
    scheduler.arrive(1)
    assert [scheduler.next() for _ in range(2)] == [Park(0), Fill(1)]
    scheduler.filled(1)
    assert scheduler.next() == Decode((1,))
    scheduler.arrive(2)  # as important as the one that has the slot
    assert scheduler.next() == Decode((1,))
    scheduler.leave(1)
    assert scheduler.next() == Fill(2)
    scheduler.leave(2)
    assert scheduler.next() == Fill(0)


def test_windows_that_were_under_way_may_end_a_prompt_that_was_parked():
    scheduler = Scheduler(1)
    scheduler.arrive(0, priority=-1)
    assert scheduler.next() == Fill(0)
    scheduler.arrive(1)
    assert scheduler.next() == Park(0)
    scheduler.filled(0)
    assert scheduler.phase(0) == "parked"
    assert scheduler.next() == Fill(1)
    scheduler.leave(1)
    assert [scheduler.next() for _ in range(2)] == [Resume(0), Decode((0,))]
