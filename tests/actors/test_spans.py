"""Tiles that go to actors with all blocks in turn give the bits of one process, also when actors die.

As test_grid.py: a script runs beside a head of ours and prints a JSON line for each thing that it saw.
"""

import importlib.util
import json
import os
from collections import ChainMap
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from grids import CHUNK, PROMPT, as_in_actors, head, home, model, models, script

import xlstm_ray
from xlstm_ray.actors.call import Call
from xlstm_ray.actors.placement import Placement, Seat
from xlstm_ray.actors.ring import Spot
from xlstm_ray.actors.shard import WorkerSpec
from xlstm_ray.actors.span import SpanWork
from xlstm_ray.checkpoint import Checkpoint
from xlstm_ray.choose import choose_sizes, setup_of
from xlstm_ray.errors import UsageError
from xlstm_ray.layout import Shard, make_layout
from xlstm_ray.plan import choose_plan
from xlstm_ray.supervisor.records import Head

__all__ = ["head", "home", "model", "models"]

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None and os.environ.get("CI") != "true", reason="Ray is not installed"
)
TILE, SPANS = 2 * CHUNK, 3
# Tokens: 1 tile, as many as actors less one, as many, 3 an actor and one, of which the last is not full; and a tail of
# chunks, which stays with the actor of the last tile.
LENGTHS = TILE, (SPANS - 1) * TILE, SPANS * TILE, (3 * SPANS + 1) * TILE - 5, (3 * SPANS + 1) * TILE + CHUNK + 3

# What one process and the actors do alike: lm is loaded, say is called with each thing that is seen.
ALIKE = """
def alike(lm, prompt, lengths, say):
    from xlstm_ray.engine.request import Request
    from xlstm_ray.sampling import Sampling

    say(digests=[lm.prefill(prompt[:n]).state.digest() for n in lengths])
    middle = lm.prefill(prompt[: lengths[2] + 5])
    say(resumed=lm.prefill(prompt[: lengths[-1]], state=middle.state).state.digest(), middle=middle.state.digest())
    say(batch=lm.prefill([prompt[:77], prompt[:320]]).state.digest())
    turns = [lm.generate(prompt[: lengths[-1]], max_new_tokens=9), lm.generate(prompt[3:64], max_new_tokens=9)]
    pieces = [list(pair) for pair in zip(*turns)]
    say(turns=["".join(texts) for texts in zip(*pieces)], after=[turn.state().digest() for turn in turns])
    lm.serve(slots=4, buckets=(4,))
    given = {"temperature": 0.8, "seed": 3}, {}, {"repetition_penalty": 1.3, "logit_bias": {5: 2.0}}, {"logprobs": 2}
    asked = [Sampling(max_new_tokens=9 + 5 * n, **each) for n, each in enumerate(given)]
    handles = [lm.submit(Request(prompt[n : lengths[3 - n] + n], sampling=s, keep=True)) for n, s in enumerate(asked)]
    ends = [handle.result(240) for handle in handles]
    say(served=[[end.tokens, end.state.digest()] for end in ends])
    asked = lm.prefill(prompt[:96], prompt_logprobs=2).prompt_logprobs[0]
    say(scores=[made and [made.logprob, made.likeliest] for made in asked])
"""

SPREAD = f"""
    import json, os, random, signal, sys, threading, time
    from concurrent.futures import ThreadPoolExecutor
    import xlstm_ray

    def say(**row): print(json.dumps(row), flush=True)
    model, address, prompt, lengths = *sys.argv[1:4], json.loads(sys.argv[4])
    lm = xlstm_ray.load(model, chunkwise_backend="ray_compiled_chunks", ray_address=address, spans={SPANS},
        device="cpu", threads=1, tile_size={TILE}, chunk_size={CHUNK}, journal_every=3)
    executor, long = lm.executor, prompt[:lengths[-1]]
    code = {{}}
    exec({ALIKE!r}, code)
    code["alike"](lm, prompt, lengths, say)
    calls, plain = [], executor.placement.call
    def call(seat, method, *more, **options):
        calls.append((method, seat.index))
        return plain(seat, method, *more, **options)
    executor.placement.call = call
    lm.prefill(long)
    executor.placement.call = plain
    say(runs=[seat for method, seat in calls if method == "run"])
    lm.prefill(prompt, should_stop=lambda: True)  # several tiles are under way
    with ThreadPoolExecutor(2) as pool:
        say(threads=[result.state.digest() for result in pool.map(lm.prefill, [long, long])])

    # How many states the actors have, early and late in a prompt.
    import ray
    def there(ref):
        try: return ray.get(ref) is not None
        except KeyError: return False
    def held():
        known, epoch = max(executor._pipeline._homes), executor._pipeline._epoch
        asks = [plain(seat, "save", "look for a state") for seat in executor.placement.seats]
        return sum(map(there, [ask(epoch, n) for ask in asks for n in range(max(0, known - 60), known + 1)]))
    held_at = {{}}
    def look(p):
        if p.tiles_done in (10, 40): held_at[p.tiles_done] = held()
    lm.prefill(prompt * 2, on_progress=look)
    say(held=[held_at[10], held_at[40]])

    # An actor is killed in a prompt; then all of them between two tokens of an answer.
    def kill(n):
        os.kill(executor.placement.seats[n].process.pid, signal.SIGKILL)
    left = [1]
    def seen(p):
        if p.tiles_done == 4 and left: kill(left.pop())
    say(killed=lm.prefill(long, on_progress=seen).state.digest(), restarts=executor.restarts)
    say(text_before="".join(lm.generate(long, max_new_tokens=9)))
    generation = lm.generate(long, max_new_tokens=9)
    pieces = []
    for piece in generation:
        pieces.append(piece)
        if len(pieces) == 3:
            for n in range({SPANS}): kill(n)
    say(text_again="".join(pieces), after_again=generation.state().digest())

    # An actor hangs: those that wait for its states do not.
    import dataclasses
    for part in (executor.placement, executor.recovery):
        part.options = dataclasses.replace(part.options, least_deadline_s=4.0, answer_timeout_s=2.0)
    before, pids = executor.restarts, [executor.placement.seats[1].process.pid]
    def hang(p):
        if p.tiles_done == 4 and pids: os.kill(pids.pop(), signal.SIGSTOP)
    say(hung=lm.prefill(long, on_progress=hang).state.digest(), hung_restarts=executor.restarts - before)
    lm.close()
"""


# -- without Ray -------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def hybrid(models: dict[int, Path]) -> Path:
    """A model with blocks of both kinds."""
    return models[3]


@pytest.fixture(scope="module")
def alone(hybrid: Path) -> dict[str, Any]:
    """What one process does, with one thread as an actor has."""
    return seen_here(hybrid)


def seen_here(model: Path, **more: Any) -> dict[str, Any]:
    code: dict[str, Any] = {}
    exec(ALIKE, code)
    seen: dict[str, Any] = {}
    sizes = {"threads": 1, "workers": 1, "tile_size": TILE, "chunk_size": CHUNK, "device": "cpu", **more}
    with as_in_actors(), xlstm_ray.load(model, **sizes) as lm:
        code["alike"](lm, PROMPT, LENGTHS, lambda **row: seen.update(row))
    torch.set_num_threads(os.cpu_count() or 1)
    return seen


def test_in_one_process_spans_change_no_bit(hybrid, alone, monkeypatch) -> None:
    monkeypatch.delenv("XLSTM_RAY_LOCAL_MODE", raising=False)
    assert seen_here(hybrid, spans=SPANS, chunkwise_backend="ray_compiled_chunks") == alone


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"stages": 2}, "`spans` and `stages` were both given"),
        ({"stages": "auto"}, "`spans` and `stages` were both given"),
        ({"heads_per_band": 2}, "`spans` is 3, and each actor has all heads, but there are bands of fewer"),
        ({"chunkwise_backend": "queued_compiled_chunks"}, "`spans` is for the ray_ backends"),
        ({"spans": 0}, "`spans` is 0; allowed: a whole number from 1 to 1024"),
    ],
)
def test_what_does_not_go_with_spans_is_refused(asked: dict[str, Any], said: str, model: Path) -> None:
    with pytest.raises(UsageError) as refused:
        setup_of(**{"model": model, "chunkwise_backend": "ray_compiled_chunks", "spans": SPANS, **asked})
    assert said in str(refused.value)


def test_bands_that_nobody_asked_for_do_not_go_with_spans_either(model: Path) -> None:
    setup = setup_of(model=model, chunkwise_backend="ray_compiled_chunks", spans=SPANS)
    config = setup.config.model_copy(update={"num_heads": 8})
    assert choose_sizes(setup.settings, config, "cuda").heads == 8
    with pytest.raises(UsageError, match="bands of fewer; give `heads_per_band=8`"):
        choose_sizes(setup.settings, config, "mps")


def test_each_actor_counts_with_all_weights_and_states(model: Path) -> None:
    asked = {"model": model, "device": "cpu", "chunkwise_backend": "ray_compiled_chunks", "ray_local_mode": False}
    needs = [
        choose_plan(setup_of(**asked, spans=n), Checkpoint(model, setup_of(**asked).config)).room.grid_need(1)
        for n in (1, 2, 3)
    ]
    assert [need.actors for need in needs] == [1, 2, 3]
    assert [need.weights for need in needs] == [n * needs[0].weights for n in (1, 2, 3)]
    assert needs[0].weights > 0
    for one, more in pairwise(needs):
        assert more.state > one.state
        assert more.tiles > one.tiles


@pytest.fixture
def work(model: Path) -> SpanWork:
    config = setup_of(model=model).config
    stored = Checkpoint(model, config).stored()
    spec = WorkerSpec(model, config, stored, "native", "cpu", torch.float32, 8, None, threads=1)
    ((shard,),) = make_layout(config, heads_per_band=config.num_heads)
    made = SpanWork(spec, shard, "a span", one_band=True)
    made.load()
    made.load_state(0, 0, None, 1, ())
    made.meet(0, [made, None])
    return made


def tile(epoch: int, src: int, dst: int) -> Call:
    return Call(epoch, 0, src, dst, [0], [CHUNK], CHUNK, False, "none", (), None, None)


@pytest.mark.parametrize("near", [False, True], ids=["over the host", "from the maker's memory"])
def test_a_state_is_given_block_by_block_with_the_bits_that_it_has(near: bool, work: SpanWork) -> None:
    if near:
        work.hand_over(4)
    tokens = torch.arange(CHUNK)[None].numpy()
    with ThreadPoolExecutor(1) as pool:
        given = pool.submit(lambda: [*work.give(0, 1, 1)])  # nobody has made the state yet
        work.run(tile(0, 0, 1), tokens)
        blocks = given.result()
    if near:
        blocks = [work._copies.mapped.view(block).numpy() for block in blocks]
    arrived = [work._arrived(n, block) for n, block in enumerate(blocks)]
    assert len(arrived) == len(work.shard.blocks)
    for got, made in zip(arrived, work.worker.states[1], strict=True):
        assert made is not None
        assert all(torch.equal(a, b) and a.shape == b.shape for a, b in zip(got, made, strict=True))


def test_the_object_store_has_room_for_a_state_on_its_way_to_each_actor(model: Path, work: SpanWork) -> None:
    """All of it at once, also of a batch: a give goes on though nobody takes what it has given."""
    asked = {"model": model, "device": "cpu", "chunkwise_backend": "ray_compiled_chunks", "ray_local_mode": False}
    for rows in (1, 4):
        work.load_state(0, rows, None, rows, ())
        given = sum(block.nbytes for block in work.give(0, rows, 1))
        rooms = [choose_plan(setup_of(**asked, spans=n), None).room for n in (1, 3)]
        one, three = (room.grid_need(rows).store for room in rooms)
        assert three - one == 3 * given


@pytest.mark.parametrize(
    "end",
    [
        lambda work: work.reset(1),
        lambda work: work.meet(0, [work, "another"]),
        lambda work: work.run(tile(0, 77, 1), torch.zeros(1, CHUNK, dtype=torch.long).numpy()),
    ],
    ids=["an epoch begins", "another actor is gone", "the step that makes it fails"],
)
def test_nobody_waits_for_a_state_that_will_not_come(end: Callable[[SpanWork], None], work: SpanWork) -> None:
    with ThreadPoolExecutor(1) as pool:
        given = pool.submit(lambda: [*work.give(0, 1, 1)])
        with suppress(KeyError):  # there is no state 77
            end(work)
        assert given.result() == []


def interrupted(work: SpanWork, monkeypatch: pytest.MonkeyPatch, *, fails: bool) -> None:
    """Tile 0 of epoch 0, in whose last block another epoch begins, as from another thread."""
    plain, last = work.worker.run_block, len(work.shard.blocks) - 1

    def run_block(n: int, *args: Any) -> Any:
        made = plain(n, *args)
        if n == last:
            work.reset(1)
            if fails:
                raise KeyError(n)
        return made

    monkeypatch.setattr(work.worker, "run_block", run_block)
    with suppress(KeyError):
        work.run(tile(0, 0, 1), torch.arange(CHUNK)[None].numpy())
    monkeypatch.undo()


@pytest.mark.parametrize("fails", [False, True])
def test_what_a_call_of_an_epoch_before_leaves_is_nothing_to_the_next_one(
    fails: bool, work: SpanWork, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(work, monkeypatch, fails=fails)
    work.load_state(1, 0, None, 1, ())
    work.run(tile(1, 0, 1), torch.arange(CHUNK)[None].numpy())  # the same tile and state again
    assert len([*work.give(1, 1, 1)]) == len(work.shard.blocks)
    assert work.output(tile(0, 0, 1), None) is None  # it comes late
    (hidden,) = work.output(tile(1, 0, 1), None)
    assert hidden.shape[0] == 1
    assert not work._done


def test_a_new_reader_gets_the_same_memory_and_one_elsewhere_none(work: SpanWork) -> None:
    work.hand_over(4)
    ring = work._ring
    work.hand_over(4)
    assert work._ring is ring
    work.hand_over(0)
    work.run(tile(0, 0, 1), torch.arange(CHUNK)[None].numpy())
    assert not any(isinstance(block, Spot) for block in work.give(0, 1, 1))


@pytest.mark.parametrize(("nodes", "why", "places"), [("ab", "", 0), ("aa", "no peer access", 0), ("aa", "", 8)])
def test_a_replaced_reader_is_handed_tensors_only_where_it_can_read_them(nodes: str, why: str, places: int) -> None:
    """The sender was there before, and may still leave them for the reader before this one."""
    seats = [Seat(n, f"seat {n}", Shard(range(n, n + 1), range(1), range(1))) for n in range(2)]
    for seat, node in zip(seats, nodes, strict=True):
        seat.node = node
    told: list[tuple[Any, ...]] = []
    here = SimpleNamespace(
        options=SimpleNamespace(start_timeout_s=1.0),
        seats=seats,
        token_depth=6,
        over_host={},
        _spans=False,
        _link=SimpleNamespace(get=lambda refs, timeout_s: refs),
        call=lambda seat, method, name: lambda *args: why,
        each=lambda some, method, *args: told.extend((seat.index, method, *args) for seat in some),
    )
    Placement._hand_over(cast(Placement, here), [seats[1]])
    assert told == [(0, "hand_over", places)]
    assert bool(here.over_host[0]) == (places == 0)


# -- on a head ---------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def spread(home: Path, head: Head, hybrid: Path) -> dict[str, Any]:
    said = script(home, SPREAD, hybrid, head.address, PROMPT, json.dumps(LENGTHS))
    return dict(ChainMap(*said))


@pytest.mark.parametrize("what", ["digests", "resumed", "middle", "batch", "turns", "after", "served", "scores"])
def test_spans_give_the_bits_of_one_process(what: str, spread: dict[str, Any], alone: dict[str, Any]) -> None:
    assert spread[what] == json.loads(json.dumps(alone[what]))


def test_each_tile_is_with_the_next_actor_and_a_tail_with_the_last_tiles(spread: dict[str, Any]) -> None:
    tiles, tail = spread["runs"][: LENGTHS[-1] // TILE], spread["runs"][LENGTHS[-1] // TILE :]
    assert all(after == (before + 1) % SPANS for before, after in pairwise(tiles))
    assert tail == [tiles[-1]] * 2


def test_two_prompts_at_once_keep_their_bits(spread: dict[str, Any], alone: dict[str, Any]) -> None:
    assert spread["threads"] == [alone["digests"][-1]] * 2


def test_actors_let_go_of_states_that_nobody_has(spread: dict[str, Any]) -> None:
    """At most those of the steps in flight, and one before them, but for what is told with the next calls."""
    assert max(spread["held"]) <= 4 * SPANS


def test_killed_actors_change_no_bit(spread: dict[str, Any], alone: dict[str, Any]) -> None:
    assert spread["killed"] == alone["digests"][-1]
    assert spread["restarts"] == 1
    assert spread["text_again"] == spread["text_before"]
    assert spread["after_again"] == alone["after"][0]


def test_an_actor_that_hangs_is_replaced_alone(spread: dict[str, Any], alone: dict[str, Any]) -> None:
    """Those that wait for its states do not hang."""
    assert spread["hung"] == alone["digests"][-1]
    assert spread["hung_restarts"] == 1
