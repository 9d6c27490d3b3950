"""The rule by which a prompt goes to a replica, on hashes and integers alone."""

from array import array

from hypothesis import given
from hypothesis import strategies as st

from xlstm_ray.serve.routes import MARKS, Routes, mark_of_state, marks_of

SLACK, STATE = 3, 1000
names = st.lists(st.sampled_from("abcde"), min_size=1, unique=True)
prompts = st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=40), min_size=1, max_size=12)


def marks(tokens: list[int], salt: str = "", tile: int = 8, chunk: int = 4) -> list[tuple[int, bytes]]:
    return marks_of(memoryview(array("i", tokens)), tile=tile, chunk=chunk, salt=salt)


def routes() -> Routes:
    return Routes(slack=SLACK, state_bytes=STATE)


def shared(one: list[int], other: list[int]) -> int:
    """By the marks' own rule, from the tokens: the last place of both at which they are alike."""

    def places(tokens: list[int]) -> set[int]:
        tail = len(tokens) // 8 * 8
        return {*range(8, tail + 1, 8), *range(tail + 4, len(tokens), 4), len(tokens)}

    alike = [n for n in places(one) & places(other) if one[:n] == other[:n]]
    return max(alike, default=0)


@given(prompts, names, st.data())
def test_it_goes_to_the_longest_known_beginning_among_those_that_are_not_much_busier(before, replicas, data):
    rule, busy, read = routes(), dict.fromkeys(replicas, 0), {name: [] for name in replicas}
    for tokens in before:
        known = {name: max((shared(tokens, one) for one in read[name]), default=0) for name in replicas}
        choice = rule.choose(marks(tokens), replicas)
        best = choice.order[0]
        assert sorted(choice.order) == sorted(replicas)
        assert choice.known == known[best]
        near = [name for name in replicas if busy[name] <= min(busy.values()) + SLACK]
        assert best in near
        assert (known[best], -busy[best]) == max((known[name], -busy[name]) for name in near)
        went = data.draw(st.sampled_from(replicas))  # Serve may send it elsewhere
        rule.sent(marks(tokens), went)
        read[went].append(tokens)
        busy[went] += 1
        ended = data.draw(st.sampled_from(replicas))
        if busy[ended]:
            rule.ended(ended)
            busy[ended] -= 1
        assert {name: n for name, n in rule.busy.items() if n} == {name: n for name, n in busy.items() if n}


def test_new_prompts_take_turns_and_a_lost_replica_is_forgotten() -> None:
    rule = routes()
    for n, expected in enumerate("abcabc"):
        found = marks([n] * 20)
        assert rule.choose(found, "abc").order[0] == expected
        rule.sent(found, expected)
        rule.ended(expected)
    again = marks([1] * 20)
    assert (rule.choose(again, "abc").order[0], rule.choose(again, "abc").known) == ("b", 20)
    rule.gone("b")
    assert rule.choose(again, "abc").known == 0


def test_a_replica_that_is_much_busier_is_passed_over() -> None:
    rule, found = routes(), marks([1] * 20)
    for n in range(SLACK + 1):
        assert rule.choose(found, "ab").order[0] == "a"
        rule.sent(found, "a")
        assert rule.busy["a"] == n + 1
    assert rule.choose(found, "ab").order[0] == "b"
    rule.ended("a")
    assert rule.choose(found, "ab").order[0] == "a"


def test_a_state_is_fetched_where_that_takes_less_time_than_to_compute_it_again() -> None:
    rule, found = routes(), marks([1] * 20)
    for _ in range(SLACK + 1):
        rule.sent(found, "a")
    assert rule.choose(found, "ab").source is None  # nobody knows yet how long a token takes
    rule.read(1000, 1000 * 0.002)
    assert rule.choose(found, "ab").source == "a"  # 20 tokens take 40 ms
    for _ in range(50):
        rule.read(1000, 1000 * 0.0001)
    assert rule.choose(found, "ab").source is None  # 2 ms
    for _ in range(50):
        rule.read(1000, 1000 * 0.002)
        rule.moved(STATE, 0.05)
    assert rule.choose(found, "ab").source is None  # a state takes 50 ms
    assert "a" in [rule.choose(found, "ab").source for _ in range(10)]  # now and then it is tried again


def test_tenants_and_states_share_nothing() -> None:
    rule = routes()
    rule.sent(marks([1] * 20, "one"), "a")
    assert rule.choose(marks([1] * 20, "other"), "ab").known == 0
    rule.sent([mark_of_state(20, "0" * 32, "one")], "b")
    assert rule.choose([mark_of_state(20, "0" * 32, "one")], "ab").order[0] == "b"
    assert rule.choose([mark_of_state(20, "0" * 32, "other")], "ab").known == 0


def test_it_remembers_so_many_beginnings_and_forgets_the_oldest() -> None:
    rule, first = routes(), marks([1] * 64)
    rule.sent(first, "a")
    for n in range(MARKS // 8192 + 1):
        rule.sent(marks([0, n] * 32768), "b")
    assert rule.choose(first, "ab").known == 0
