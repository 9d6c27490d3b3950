"""The lineage of states: after any makes, drops and copies to the host, its plan makes every needed state again."""

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xlstm_ray.actors.lineage import Lineage, Made, steps_until_kept
from xlstm_ray.runtime.executor import Step

Value = tuple[Any, ...]  # what a state is: all that it was made of, a value a row


def a_step(order: int) -> Step:
    return Step(torch.tensor([[order]]), torch.tensor([0]), torch.tensor([1]), chunk_size=16)


def do(made: Made, store: dict[int, Value]) -> None:
    """An actor's operations, on values that show how they were made."""
    for number in made.drop:
        del store[number]
    if made.step is not None:
        store[made.state] = tuple((row, int(made.step.tokens)) for row in store[made.src])
    elif made.rows:
        store[made.state] = tuple("fresh" if row is None else store[row[0]][row[1]] for row in made.rows)
    elif made.source is not None:
        store[made.state] = made.source["value"]  # type: ignore[assignment]
    else:
        store[made.state] = ("fresh",) * made.batch


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_what_is_needed_makes_every_state_again_that_somebody_has(data):
    lineage, store, results, batches = Lineage(), {}, {}, {}
    orders, numbers, unseen = 0, 0, 0
    for _ in range(data.draw(st.integers(1, 40))):
        kind = data.draw(st.sampled_from(["load", "take", "step", "step", "step", "free", "kept", "seen", "prune"]))
        alive = sorted(store)
        if kind == "free" and alive:
            del store[data.draw(st.sampled_from(alive))]
        elif kind == "kept" and results:
            order = data.draw(st.sampled_from(sorted(results)))
            lineage.kept(order, {"value": results.pop(order)})  # type: ignore[dict-item]
        elif kind == "seen":
            unseen = data.draw(st.integers(unseen, orders))
        elif kind == "prune":
            lineage.prune(set(store), unseen)
        elif kind in ("load", "take", "step") and (alive or kind == "load"):
            src, number = (data.draw(st.sampled_from(alive)) if alive else -1), numbers
            if kind == "load":
                made = Made(number, 2, orders, source=data.draw(st.sampled_from([None, {"value": ("host", orders)}])))
            elif kind == "take":
                rows = st.none() | st.sampled_from([(n, b) for n in alive for b in range(batches[n])])
                taken = data.draw(st.lists(rows, min_size=1, max_size=3))
                made = Made(number, len(taken), orders, rows=taken)
            else:
                number = data.draw(st.sampled_from([number, src]))
                made = Made(number, batches[src], orders, step=a_step(orders), src=src)
            lineage.add(made)
            do(made, store)
            batches[number] = made.batch
            if kind == "step":
                results[orders] = store[number]
            orders, numbers = orders + 1, numbers + 1
    again: dict[int, Value] = {}
    came: dict[int, Value] = {}
    needed = lineage.needed(set(store), unseen)
    assert [made.order for made in needed] == sorted({made.order for made in needed})
    for made in needed:
        do(made, again)  # a KeyError here is a state that was dropped too early
        if made.step is not None:
            came[made.order] = again[made.state]
    assert {number: again[number] for number in store} == store
    assert {n: v for n, v in results.items() if n >= unseen} == {n: v for n, v in came.items() if n >= unseen}
    assert len(again) <= len(store) + 1 + sum(made.order >= unseen for made in needed)


def test_a_fault_costs_the_steps_since_the_host_had_the_state():
    lineage = Lineage()
    lineage.add(Made(0, 1, 0))
    for n in range(1, 8):
        lineage.add(Made(n, 1, n, step=a_step(n), src=n - 1))
    assert lineage.depth(7) == 7
    lineage.kept(5, {})
    assert [made.order for made in lineage.needed({7}, 8)] == [5, 6, 7]
    assert (lineage.depth(7), lineage.depth(5)) == (2, 0)
    lineage.prune({7}, 8)
    assert len(lineage) == 3
    for n in range(8, 12):  # in place
        lineage.add(Made(7, 1, n, step=a_step(n), src=7))
    assert lineage.depth(7) == 6
    lineage.kept(10, {})
    assert [made.order for made in lineage.needed({7}, 12)] == [10, 11]
    assert lineage.depth(7) == 1


@given(st.integers(1, 1 << 36), st.floats(1e-4, 100))
def test_states_are_brought_seldom_enough_for_their_size_and_as_often_as_that_allows(size, step_s):
    """At 750 MB a second, as measured between two GPUs' actors and the driver."""
    steps = steps_until_kept(size, step_s)
    assert size / 750e6 <= 0.0501 * steps * step_s
    assert steps == 256 or size / 750e6 >= 0.0499 * (steps - 1) * step_s
