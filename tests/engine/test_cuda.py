"""On an NVIDIA GPU: decoding as CUDA graphs, resumed and repeated prefills, float8. Each test needs the card.

What the kernels compute is tested on any machine, in tests/kernels/test_triton.py.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from slstm import CASES, write_model
from tiny import make_model

import xlstm_ray
from xlstm_ray import Engine
from xlstm_ray.actors.shard import Call, ShardWork, WorkerSpec
from xlstm_ray.actors.wire import from_wire
from xlstm_ray.checkpoint import Checkpoint
from xlstm_ray.engine.request import Request
from xlstm_ray.errors import UsageError
from xlstm_ray.kernels.fit import CAPABILITY
from xlstm_ray.runtime.executor import Step, decoding_step
from xlstm_ray.runtime.moves import BUFFERS
from xlstm_ray.sampling import Sampling

ON_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == CAPABILITY
pytestmark = pytest.mark.skipif(not ON_HOPPER, reason="needs an NVIDIA Hopper GPU")
DEMO: dict[str, Any] = {"device": "cuda", "tile_size": 512, "chunk_size": 64}
TEXT = "It is a truth universally acknowledged, that a single man in possession of a good fortune, "
PARAMETERS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.8, "seed": 3},
    {"temperature": 1.1, "top_k": 20, "top_p": 0.9, "seed": 4},
    {"repetition_penalty": 1.3, "frequency_penalty": 0.2, "min_tokens": 4, "logit_bias": {5: 2.0}},
]


@pytest.fixture(scope="module")
def lm() -> Iterator[Engine]:
    with xlstm_ray.load(**DEMO) as engine:
        assert engine.backend.name == "queued_triton_chunks"
        engine.serve(slots=8, buckets=(8,))
        yield engine


def answers(engine: Engine, parameters: list[dict[str, Any]], tokens: int = 24) -> list[tuple[list[int], str]]:
    handles = [
        engine.submit(Request(TEXT[n:] * 3, sampling=Sampling(max_new_tokens=tokens, **given), keep=True))
        for n, given in enumerate(parameters)
    ]
    ends = [handle.result(120) for handle in handles]
    assert all(end.state is not None for end in ends)
    return [(end.tokens, end.state.digest()) for end in ends if end.state is not None]


def test_captured_decoding_has_the_bits_of_decoding_block_after_block(lm):
    """All of sampling is in the graph, and each row draws by its own numbers."""
    captured = answers(lm, PARAMETERS)
    with xlstm_ray.load(**DEMO, cuda_graphs=False) as engine:
        engine.serve(slots=8, buckets=(8,))
        assert engine.executor.chooses == "no"
        assert answers(engine, PARAMETERS) == captured
    assert len({tuple(tokens) for tokens, _ in captured}) == len(PARAMETERS)


def test_a_row_has_the_same_bits_beside_any_others_of_its_bucket(lm):
    alone = [answers(lm, [given])[0] for given in PARAMETERS[:1]]
    beside = answers(lm, PARAMETERS + PARAMETERS)
    assert beside[0] == alone[0]


def test_rows_that_come_and_go_and_buckets_that_grow_leave_answers_as_they_are():
    with xlstm_ray.load(**DEMO) as engine:
        engine.serve(slots=16, buckets=(1, 4, 16))
        first = [
            engine.submit(Request(TEXT, sampling=Sampling(max_new_tokens=90 + 9 * n, ignore_eos=True)))
            for n in range(2)
        ]
        later = [
            engine.submit(Request(TEXT, sampling=Sampling(max_new_tokens=5 + 7 * n, ignore_eos=True))) for n in range(7)
        ]
        ends = [handle.result(120) for handle in (*first, *later)]
        assert [len(end.tokens) for end in ends] == [90, 99, *(5 + 7 * n for n in range(7))]


def test_rows_that_end_while_the_next_step_runs_ahead_keep_their_states():
    """Each row ends at another time, by its number of tokens or a stop text."""
    given: list[dict[str, Any]] = [
        {"max_new_tokens": 6 + 5 * n, "ignore_eos": True, "seed": n, "temperature": 0.9} for n in range(5)
    ]
    given.append({"max_new_tokens": 60, "stop": ("e",)})
    found = []
    for graphs in (True, False):
        with xlstm_ray.load(**DEMO, cuda_graphs=graphs) as engine:
            engine.serve(slots=8, buckets=(8,))
            handles = [engine.submit(Request(TEXT, sampling=Sampling(**each), keep=True)) for each in given]
            ends = [handle.result(120) for handle in handles]
            found.append([(end.tokens, end.text, end.state.digest()) for end in ends if end.state is not None])
    assert found[0] == found[1]
    assert len(found[0]) == len(given)


def test_a_prefill_has_the_same_bits_again_and_resumed(lm):
    ids = torch.randint(0, lm.config.vocab_size, (3000,), generator=torch.Generator().manual_seed(1)).tolist()
    whole = lm.prefill(ids)
    digests = {lm.prefill(ids).state.digest() for _ in range(20)}
    half = lm.prefill(ids[:1024])
    resumed = lm.prefill(append=ids[1024:], state=half.state)
    assert digests == {whole.state.digest()} == {resumed.state.digest()}
    assert torch.equal(whole.logits, resumed.logits)


def test_captured_windows_have_the_bits_of_blocks_launched_one_by_one(lm):
    """Of all lengths that a prompt is cut into, one after the other and in turns with tokens of another row."""
    tokens = lm.encode(TEXT * 40)[: 2 * 512 + 3 * 64 + 7]
    with xlstm_ray.load(**DEMO, cuda_graphs=False) as plain:
        want = plain.prefill(tokens)
    assert {*lm.executor._tokens[0]._tiles._graphs} >= {(512, 64), (64, 64)}
    beside = lm.submit(Request(TEXT, sampling=Sampling(max_new_tokens=64, ignore_eos=True)))
    for _ in range(20):
        got = lm.prefill(tokens)
        assert torch.equal(got.logits, want.logits)
        assert got.state.digest() == want.state.digest()
    assert len(beside.result(120).tokens) == 64


def test_nothing_waits_for_the_device_while_a_window_is_submitted(lm):
    executor, ids = lm.executor, torch.arange(512).unsqueeze(0)
    step = Step(ids, torch.zeros(1).long(), torch.full((1,), 512), 64, logits="last")
    state = executor.submit(executor.load(None, 1), step)  # what is made once is there
    executor.result()
    torch.cuda.set_sync_debug_mode("error")
    try:
        state = executor.submit(state, step)
        executor.submit(state, step._replace(logits="none"))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    executor.result()
    executor.result()


def test_the_need_of_memory_covers_what_is_allocated(lm):
    torch.cuda.reset_peak_memory_stats()
    lm.prefill([1] * 5000)
    used, need = lm.executor.peak_memory_bytes, lm.need(1)
    assert need.weights < used, (used, need)
    assert used < need.total + (64 << 20), (used, need)  # of other engines in this process


def test_stages_of_one_process_are_a_graph_each_with_the_same_bits(lm):
    with xlstm_ray.load(**DEMO, chunkwise_backend="ray_triton_chunks", ray_local_mode=True, stages=2) as engine:
        engine.serve(slots=8, buckets=(8,))
        assert answers(engine, PARAMETERS) == answers(lm, PARAMETERS)


def test_an_actors_work_is_the_same_graph(lm):
    """What an actor does, without Ray: a tile, then tokens in place, and one that is not in place."""
    plan = lm.plan
    stored = Checkpoint(plan.model, plan.config).stored()
    spec = WorkerSpec(plan.model, plan.config, stored, "ray_triton_chunks", "cuda", plan.dtype, 8, None, 1, graphs=True)
    ((shard,),) = plan.layout
    work = ShardWork(spec, shard, "work", one_band=True)
    work.load()
    work.load_state(0, 0, None, 2, ())
    ids = torch.randint(0, plan.config.vocab_size, (2, 64), generator=torch.Generator().manual_seed(5))
    executor = lm.executor
    state = executor.submit(executor.load(None, 2), Step(ids, torch.zeros(2).long(), torch.full((2,), 64), 64))
    executor.result()
    work.run(Call(0, 0, 0, 1, [0, 0], [64, 64], 64, False, "none", (), None, None), ids.numpy(), None)
    for number, (dst, in_place) in enumerate(((1, True), (1, True), (2, False)), 1):
        call = Call(0, number, 1, dst, [0, 0], [1, 1], 1, False, "last", (), None, None)
        (hidden, logits), _ = work.token(call.packed(), torch.full((2, 1), number).numpy(), None)
        state = executor.submit(state, decoding_step([number] * 2, in_place=in_place))
        result = executor.result()
        assert result.logits is not None
        assert torch.equal(torch.from_numpy(logits), result.logits.cpu())
        assert torch.equal(from_wire(hidden, torch.bfloat16), result.hidden.cpu())


def test_generation_goes_on_from_its_state_as_it_began(lm):
    assert "".join(lm.generate(TEXT, max_new_tokens=12)) == "".join(lm.generate(TEXT, max_new_tokens=12))


@pytest.mark.parametrize("hybrid", [False, True])
def test_the_portable_kernels_are_captured_too(hybrid, tmp_path: Path):
    if hybrid:
        write_model(tmp_path, **CASES["hybrid"])
    else:
        make_model(tmp_path, hidden_size=64, num_hidden_layers=2, num_heads=2, eos_token_id=None)
    sizes = {"device": "cuda", "tile_size": 32, "chunk_size": 16}
    found = []
    for graphs in (True, False):
        with xlstm_ray.load(tmp_path, **sizes, cuda_graphs=graphs) as engine:
            assert engine.backend.name == "queued_compiled_chunks"
            engine.serve(slots=4, buckets=(4,))
            found.append(answers(engine, PARAMETERS[:2], tokens=6))
    assert found[0] == found[1]


def test_float8_is_near_bfloat16_and_has_the_same_bits_again():
    logits = {}
    for dtype in ("bfloat16", "float8"):
        with xlstm_ray.load(**DEMO, dtype=dtype) as engine:
            logits[dtype] = engine.prefill(TEXT * 20).logits.double()
            assert torch.equal(engine.prefill(TEXT * 20).logits.double(), logits[dtype])
            assert engine.numerics.dtype == dtype
    p, q = (logits[dtype].log_softmax(-1) for dtype in ("bfloat16", "float8"))
    assert 0 < (p.exp() * (p - q)).sum() < 0.2


def test_what_the_kernels_do_not_take_is_refused_by_name():
    with pytest.raises(UsageError, match="the chunk size is 32; the Triton kernels take 64, 128 or 256"):
        xlstm_ray.load(device="cuda", chunk_size=32, tile_size=32, chunkwise_backend="queued_triton_chunks")
    with pytest.raises(UsageError, match="`dtype` is 'float8', but the chunk size is 32"):
        xlstm_ray.load(device="cuda", chunk_size=32, tile_size=32, dtype="float8")
    with xlstm_ray.load(device="cuda", chunk_size=32, tile_size=32) as engine:
        assert engine.backend.name == "queued_compiled_chunks"


def test_a_prompt_whose_state_is_kept_is_answered_beside_one_that_is_read(tmp_path):
    """Logits of a kept state are on the host, and those of a prompt that was read are on the GPU."""
    with xlstm_ray.load(**DEMO, cache_dir=tmp_path, cache_memory_mb=64) as engine:
        engine.serve(slots=4, buckets=(4,))
        for _ in range(3):
            handles = [
                engine.submit(Request(TEXT * n, sampling=Sampling(max_new_tokens=8, seed=1, temperature=0.9)))
                for n in (20, 21)
            ]
            found = [handle.result(120) for handle in handles]
        assert found[0].usage.cache.hit_tokens > 0
    with xlstm_ray.load(**DEMO, cache_dir=tmp_path) as engine:  # the first request finds all of its prompt
        engine.serve(slots=4, buckets=(4,))
        again = engine.submit(Request(TEXT * 20, sampling=Sampling(max_new_tokens=8, seed=1, temperature=0.9)))
        assert again.result(120).tokens == found[0].tokens


def test_the_first_kept_state_waits_for_no_pinned_memory():
    with xlstm_ray.load(**DEMO, cache_memory_mb=64) as engine:
        engine.warm_up(1, [512])
        moves: Any = engine.executor
        buffers = [moves._moves._buffers.get() for _ in range(BUFFERS)]
        assert all(buffer.pinned.nbytes for buffer in buffers)
        for buffer in buffers:
            moves._moves._buffers.put(buffer)
        engine.prefill(TEXT)
        assert engine.prefill(TEXT).stats.tiles == 0
