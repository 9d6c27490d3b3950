"""The tree of states against a brute-force search that has all tokens and goes through all windows."""

import subprocess
import sys
from array import array
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xlstm_ray.engine import tree as module
from xlstm_ray.engine.tree import DISK, MEMORY, Chain, Entry, Found, Run, Tree, root_of
from xlstm_ray.engine.windows import plan_groups, plan_windows

TILE, CHUNK, STEP = 8, 4, 4
Tokens = tuple[int, ...]


@pytest.fixture(autouse=True, scope="module")
def small_steps():
    """Remember places every four tokens, so that short prompts have many."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "STEP", STEP)
        yield


def chain(tokens: Sequence[int], salt: str = "") -> Chain:
    return Chain(root_of("model", salt), memoryview(array("i", tokens)))


def windows(begun: list[int], ends: list[int], place: int) -> list[tuple[int, int]]:
    """The windows that lead to a place, for rows that share them."""
    plan = plan_windows(begun, ends, tile_size=TILE, chunk_size=CHUNK)
    return [(w.start, w.size) for w in plan if w.start < place]


class Kept:
    """An entry of the brute-force search."""

    def __init__(self, entry: Entry, tokens: Tokens, rows: int, way: list[tuple[int, int]], salt: str, numerics: str):
        self.entry, self.tokens, self.rows, self.way, self.salt, self.numerics = (
            entry,
            tokens,
            rows,
            way,
            salt,
            numerics,
        )


def usable(kept: Kept, tokens: Tokens, rows: int, ends: list[int], salt: str, numerics: str) -> bool:
    """Whether a cold run of `tokens` in a group with these ends goes through all windows of that state."""
    length = len(kept.tokens)
    if (salt, numerics, rows) != (kept.salt, kept.numerics, kept.rows) or tokens[:length] != kept.tokens:
        return False
    way = windows([0] * len(ends), ends, length)
    ends_there = length == len(tokens) or (way and sum(way[-1]) == length)
    return bool(ends_there) and way == kept.way


PROMPT = st.lists(st.integers(0, 1), min_size=1, max_size=45).map(tuple)
RUN = st.tuples(
    st.lists(PROMPT, min_size=1, max_size=3),
    st.sampled_from(["", "", "a"]),
    st.sampled_from(["f32", "f32", "bf16"]),
    st.sampled_from([None, 1, 2]),
    st.lists(st.integers(1, 45), max_size=2),
    st.integers(0, 30),  # how many states are kept by then
)


@settings(max_examples=300)
@given(st.lists(RUN, min_size=2, max_size=8))
def test_the_longest_state_is_that_of_brute_force(runs):
    tree = Tree({MEMORY: 20, DISK: 0})
    there: list[Kept] = []
    gone: list[Kept] = []
    seen: list[tuple[Tokens, str]] = []
    for batch, salt, numerics, every, asked, size in runs:
        ends = [len(tokens) for tokens in batch]
        for group in plan_groups([0] * len(batch), ends, tile_size=TILE, chunk_size=CHUNK):
            own_ends = [ends[b] for b in group.rows]
            for b in group.rows:
                tokens = batch[b]
                links, run = chain(tokens, salt), Run.in_group(group, b, ends, tile=TILE, chunk=CHUNK)
                found = tree.longest(links, run, numerics)
                fit = [k for k in there if usable(k, tokens, group.size, own_ends, salt, numerics)]
                assert found.length == max((len(k.tokens) for k in fit), default=0)
                assert found.entry is None or found.entry in [k.entry for k in fit]
                lost = [k for k in gone if usable(k, tokens, group.size, own_ends, salt, numerics)]
                check_reason(
                    found, tokens, [k for k in there if k.salt == salt], lost, [t for t, s in seen if s == salt]
                )
                points = tree.points(run, found, every=every, asked=asked)
                check_points(points, tokens, own_ends, found, every, asked)
                tree.see(links)
                seen.append((tokens, salt))
                for place in sorted(points):
                    entry = tree.add(links, run, numerics, place, size=1)
                    if not entry.tiers:
                        tree.put(entry, MEMORY)
                        way = windows([0] * len(own_ends), own_ends, place)
                        there.append(Kept(entry, tokens[:place], group.size, way, salt, numerics))
        tree.budgets[MEMORY] = size
        dropped = tree.fit(MEMORY)
        gone = [
            k
            for k in gone
            if (k.tokens, k.salt, k.numerics, k.rows, k.way)
            not in [(t.tokens, t.salt, t.numerics, t.rows, t.way) for t in there]
        ]
        gone += [k for k in there if k.entry in dropped]
        there = [k for k in there if k.entry not in dropped]
        assert tree.used[MEMORY] == len(there) == len(tree.entries) <= size
        assert {k.entry for k in there} == tree.entries


def common(a: Tokens, b: Tokens) -> int:
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def check_reason(found: Found, tokens: Tokens, there: list[Kept], lost: list[Kept], seen: list[Tokens]) -> None:
    if found.length == len(tokens):
        assert found.reason is None
        return
    longer = [k for k in there if tokens[: len(k.tokens)] == k.tokens and len(k.tokens) > found.length]
    shared = max((common(tokens, other) for other in seen), default=0)
    match found.reason:
        case "other numerics":
            assert longer
        case "evicted":
            assert any(len(k.tokens) > found.length for k in lost)
        case "none seen":
            assert not any(len(k.tokens) > found.length for k in lost)
        case str() as reason:
            place = int(reason.removeprefix("diverged at "))
            assert place == found.known > 0
            assert place <= shared
            assert shared < place + STEP or any(k.tokens == tokens[:place] for k in there)
        case None:
            raise AssertionError("a prompt that was not found whole has a reason")


def check_points(
    points: set[int], tokens: Tokens, ends: list[int], found: Found, every: int | None, asked: list[int]
) -> None:
    """Each point is a window's end after the found state; the promised ones are there."""
    length = len(tokens)
    way = windows([0] * len(ends), ends, length)
    possible = {min(start + size, length) for start, size in way}
    assert points <= {n for n in possible if n > found.length}
    promised = {length, length // TILE * TILE, *range(TILE * (every or 1), length + 1, TILE * (every or 1))}
    promised |= {max((n for n in possible if n <= min(place, length)), default=0) for place in (found.known, *asked)}
    assert points == {n for n in promised | {found.known // TILE * TILE} if n > found.length and n in possible}


def test_prompts_that_part_have_a_state_there_on_second_sight():
    tree = Tree({MEMORY: 1000, DISK: 0})
    shared = [1] * 21

    def look(rest: list[int]) -> tuple[Found, set[int]]:
        links, run = chain(shared + rest), Run.alone(len(shared + rest), tile=TILE, chunk=CHUNK)
        found = tree.longest(links, run, "f32")
        points = tree.points(run, found, every=100)
        tree.see(links)
        for place in points:
            tree.put(tree.add(links, run, "f32", place, size=1), MEMORY)
        return found, points

    assert look([0] * 40) == (Found(None, 0, "none seen"), {56, 61})
    found, points = look([2] * 40)
    assert (found.length, found.reason, points) == (0, "diverged at 20", {16, 56, 61})
    found, _ = look([3] * 40)
    assert (found.length, found.reason) == (16, "diverged at 20")


@settings(max_examples=200)
@given(
    st.lists(st.tuples(PROMPT, st.integers(1, 9)), min_size=1, max_size=12),
    st.sets(st.integers(0, 40)),
    st.integers(0, 40),
    st.lists(st.integers(0, 11), max_size=6),
)
def test_what_is_leased_stays_and_what_is_worth_the_least_goes_first(made, leased, budget, touched):
    tree = Tree({MEMORY: budget, DISK: 0})
    for tokens, size in made:
        run = Run.alone(len(tokens), tile=TILE, chunk=CHUNK)
        entry = tree.add(chain(tokens), run, "f32", len(tokens), size=size)
        tree.put(entry, MEMORY)
    entries = sorted(tree.entries, key=lambda e: e.used)
    for n in touched:
        tree.touch(entries[n % len(entries)])
    for n, entry in enumerate(entries):
        entry.leases = int(n in leased)
    now = max(e.used for e in entries)
    worth = {e: (e.length - (e.parent.length if e.parent else 0)) / e.size / (now - e.used + 1) for e in entries}
    dropped = tree.fit(MEMORY)
    stay = [e for e in entries if e not in dropped]
    assert not any(e.leases for e in dropped)
    assert tree.used[MEMORY] == sum(e.size for e in stay)
    assert tree.used[MEMORY] <= budget or all(e.leases for e in stay)
    assert [worth[e] for e in dropped] == sorted(worth[e] for e in dropped)
    assert all(worth[e] >= max(map(worth.__getitem__, dropped)) for e in stay if dropped and not e.leases)
    if dropped:  # as few as possible
        assert tree.used[MEMORY] + dropped[-1].size > budget
    for entry in stay:
        assert entry.parent is None or entry.parent in stay


def test_tenants_and_models_share_nothing():
    tree, tokens = Tree({MEMORY: 1000, DISK: 0}), list(range(40))
    run = Run.alone(40, tile=TILE, chunk=CHUNK)
    links = chain(tokens, "a")
    tree.see(links)
    tree.put(tree.add(links, run, "f32", 40, size=1), MEMORY)
    assert tree.longest(links, run, "f32").length == 40
    for other in (chain(tokens, "b"), chain(tokens), Chain(root_of("another", "a"), memoryview(array("i", tokens)))):
        assert tree.longest(other, run, "f32") == Found(None, 0, "none seen")


def test_what_is_remembered_of_prompts_stays_small(monkeypatch):
    monkeypatch.setattr(module, "NODES", 100)
    monkeypatch.setattr(module, "EVICTED", 10)
    tree = Tree({MEMORY: 3, DISK: 0})
    for n in range(200):
        tokens = [n, *range(80)]
        links, run = chain(tokens), Run.alone(len(tokens), tile=TILE, chunk=CHUNK)
        found = tree.longest(links, run, "f32")
        tree.see(links)
        for place in tree.points(run, found):
            tree.put(tree.add(links, run, "f32", place, size=1), MEMORY)
            tree.fit(MEMORY)
    assert len(tree._nodes) < 130
    assert len(tree._gone) == 10
    assert len(tree.entries) == 3


@pytest.mark.parametrize("salt", ["", "a/b", "../../../etc/passwd", "\0", "é" * 500])
def test_a_files_name_is_a_hash_whatever_a_salt_is(salt):
    tree, run = Tree({MEMORY: 1, DISK: 0}), Run.alone(9, tile=TILE, chunk=CHUNK)
    name = tree.add(chain(range(9), salt), run, "f32", 9, size=1).name
    assert len(name) == 32
    assert set(name) <= set("0123456789abcdef")


def test_the_tree_needs_no_torch():
    code = "import sys; sys.modules['torch'] = None; import xlstm_ray.engine.tree, xlstm_ray.cachefiles"
    subprocess.run([sys.executable, "-c", code], check=True)
