"""The scheduler: random requests over a fake engine, which only counts."""

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


REQUESTS = st.lists(
    st.builds(
        Asked,
        arrives=st.integers(0, 30),
        windows=st.integers(1, 6),
        tokens=st.integers(0, 6),
        priority=st.integers(-1, 2),
        leaves=st.none() | st.integers(0, 60),
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
    coming, since_decode, decisions = sorted(range(len(asked)), key=lambda n: asked[n].arrives), 0, 0
    while coming or left:
        while coming and (asked[coming[0]].arrives <= decisions or not left):
            number = coming.pop(0)
            left[number] = [asked[number].windows, asked[number].tokens]
            scheduler.arrive(number, priority=asked[number].priority)
        for number in [n for n in left if asked[n].leaves is not None and asked[n].leaves <= decisions]:
            scheduler.leave(number)
            del left[number]
            on_device.discard(number)
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
                assert scheduler.phase(number) == "parked"
                assert any(
                    asked[n].priority > asked[number].priority
                    for n in left
                    if scheduler.phase(n) in ("waiting", "parked")
                )
                on_device.discard(number)
            case Resume(number):
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
