"""The split of blocks over unlike places, against every split that there is."""

import random
from itertools import combinations, permutations

import pytest

from xlstm_ray.errors import UsageError
from xlstm_ray.files import MIB
from xlstm_ray.split import ANY_ORDER, HELPS, Blocks, Place, split


def seconds(place: Place, kinds: list[str], start: int, stop: int) -> float:
    ends = place.first_s * (start == 0) + place.last_s * (stop == len(kinds))
    return sum(place.block_s[kind] for kind in kinds[start:stop]) + ends


def need(blocks: Blocks, start: int, stop: int) -> int:
    ends = blocks.first * (start == 0) + blocks.last * (stop == len(blocks.kinds))
    return sum(blocks.sizes[start:stop]) + ends + blocks.each


def by_trying(places: list[Place], blocks: Blocks) -> float | None:
    """The time of the slowest stage of the best of all splits; None if none fits."""
    count, times = len(blocks.kinds), []
    for stages in range(1, len(places) + 1):
        for order in permutations(places, stages):
            for cuts in combinations(range(1, count), stages - 1):
                parts = list(zip(order, [0, *cuts], [*cuts, count], strict=True))
                if all(need(blocks, a, b) <= place.room for place, a, b in parts):
                    times.append(max(seconds(place, list(blocks.kinds), a, b) for place, a, b in parts))
    return min(times, default=None)


@pytest.mark.parametrize("seed", range(40))
def test_no_split_is_better(seed: int) -> None:
    drawn = random.Random(seed)
    count = drawn.randint(1, 7)
    kinds = [drawn.choice(["mLSTM", "sLSTM"]) for _ in range(count)]
    sizes = [drawn.randint(1, 9) for _ in range(count)]
    blocks = Blocks(kinds, sizes, drawn.randint(0, 5), drawn.randint(0, 5), drawn.randint(0, 3))
    places = [
        Place(
            str(n),
            f"host{n}",
            drawn.randint(6, 45),
            {"mLSTM": drawn.uniform(1, 5), "sLSTM": drawn.uniform(1, 9)},
            drawn.uniform(0, 1),
            drawn.uniform(0, 1),
        )
        for n in range(drawn.randint(1, 4))
    ]
    best = by_trying(places, blocks)
    if best is None:
        with pytest.raises(UsageError, match="do not fit: .* on host0"):
            split(places, blocks)
        return
    stages = split(places, blocks)
    assert [n for stage in stages for n in stage.blocks] == list(range(count))
    assert len({stage.place.node for stage in stages}) == len(stages)
    for stage in stages:
        start, stop = stage.blocks.start, stage.blocks.stop
        assert stage.seconds == pytest.approx(seconds(stage.place, kinds, start, stop))
        assert stage.need == need(blocks, start, stop) <= stage.place.room
    assert best <= max(stage.seconds for stage in stages) * (1 + 1e-9) <= best * HELPS * (1 + 1e-6)


def place(name: str, block_s: float, room: int = 1 << 40) -> Place:
    return Place(name, name, room, {"mLSTM": block_s})


def alike(count: int, each: int = 0) -> Blocks:
    return Blocks(["mLSTM"] * count, [10 * MIB] * count, 0, 0, each)


def lengths(places: list[Place], blocks: Blocks) -> dict[str, int]:
    return {stage.place.host: len(stage.blocks) for stage in split(places, blocks)}


def test_a_node_of_a_third_of_the_speed_has_a_third_of_the_blocks() -> None:
    assert lengths([place("slow", 3), place("fast", 1)], alike(8)) == {"slow": 2, "fast": 6}


def test_a_node_that_would_not_make_it_faster_is_left_out() -> None:
    assert lengths([place("snail", 100), place("fast", 1), place("other", 1)], alike(8)) == {"fast": 4, "other": 4}


def test_what_does_not_fit_on_the_fast_node_goes_to_the_slow_one() -> None:
    small = place("fast", 1, room=35 * MIB)  # three blocks, and 5 MiB for the programs
    assert lengths([small, place("slow", 3)], alike(8, each=5 * MIB)) == {"fast": 3, "slow": 5}
    with pytest.raises(UsageError, match=r"the model's 90 MiB in 2 stage\(s\) do not fit: 35 MiB on fast, 35 MiB on"):
        split([small, place("slow", 3, room=35 * MIB)], alike(8, each=5 * MIB))


def test_many_nodes_are_taken_from_the_fastest_on() -> None:
    many = [place(f"host{n}", 1 + n % 4) for n in range(ANY_ORDER + 6)]
    stages = split(many, alike(64))
    assert [n for stage in stages for n in stage.blocks] == list(range(64))
    speed = sum(1 / p.block_s["mLSTM"] for p in many)
    assert 64 / speed <= max(stage.seconds for stage in stages) < 64 / speed + 4  # at most a slow node's block more


def test_a_stage_says_why() -> None:
    (stage,) = split([place("host", 0.0125, 100 * MIB)], alike(8))
    assert str(stage) == "blocks 0-7 on host (12.5 ms a tile and mLSTM block, 100 ms in all; 80 of 100 MiB)"
