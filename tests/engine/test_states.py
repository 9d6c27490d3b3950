"""States are values: each can be continued, and other work of the engine does not change it."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import SIZES, model
from torch.utils._python_dispatch import TorchDispatchMode

import xlstm_ray
from xlstm_ray import Engine
from xlstm_ray.engine.held import HeldRows
from xlstm_ray.memory.need import HELD_ROWS
from xlstm_ray.runtime.moves import ALIGNED, copy_all, side_by_side

__all__ = ["model"]

BACKENDS = {
    "native": {"chunkwise_backend": "native"},
    "chunks": {"chunkwise_backend": "queued_compiled_chunks"},
    "steps": {"chunkwise_backend": "queued_compiled_steps"},
    "chunks, two bands": {"chunkwise_backend": "queued_compiled_chunks", "heads_per_band": 1},
}
PROMPTS = [bytes(range(33 + n, 120 - n)).decode() for n in range(3)]


@pytest.fixture(params=BACKENDS)
def lm(request: pytest.FixtureRequest, model: Path, eager: None):
    with xlstm_ray.load(model, **SIZES, **BACKENDS[request.param]) as engine:
        yield engine


def elsewhere(lm: Engine, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Treat the executor's states like those of a GPU; returns a list with an entry for each copy to the host."""
    saved: list[int] = []
    plain = lm.executor.save

    def save(state):
        saved.append(state.batch)
        return plain(state)

    monkeypatch.setattr(lm.executor, "on_host", False)
    monkeypatch.setattr(lm.executor, "save", save)
    return saved


def test_two_states_worked_on_in_turn_equal_each_alone(lm):
    alone = [lm.generate(p, max_new_tokens=6) for p in PROMPTS]
    texts = ["".join(generation) for generation in alone]
    digests = [generation.state().digest() for generation in alone]
    together = [lm.generate(p, max_new_tokens=6) for p in PROMPTS]
    pieces = [""] * len(PROMPTS)
    steps = [iter(generation) for generation in together]
    left = list(range(len(PROMPTS))) * 6
    random.Random(3).shuffle(left)
    for n in left:
        pieces[n] += next(steps[n])
    pieces = [piece + "".join(rest) for piece, rest in zip(pieces, steps, strict=True)]
    assert pieces == texts
    assert [generation.state().digest() for generation in together] == digests


def test_a_cancelled_one_leaves_the_others_bits_alone(lm):
    alone = "".join(lm.generate(PROMPTS[0], max_new_tokens=6))
    kept = iter(lm.generate(PROMPTS[0], max_new_tokens=6))
    text = next(kept)
    seen: list[object] = []
    stopped = lm.prefill(PROMPTS[1] * 3, on_progress=seen.append, should_stop=lambda: len(seen) >= 2)
    assert not stopped.complete
    given_up = iter(lm.generate(PROMPTS[2], max_new_tokens=6))
    next(given_up)
    del given_up
    assert text + "".join(kept) == alone


def test_a_state_that_is_kept_survives_what_goes_on_from_it(lm):
    kept = lm.prefill(PROMPTS[0])
    digest = lm.prefill(PROMPTS[0]).state.digest()
    answers = {"".join(lm.generate(state=kept.state, max_new_tokens=50)) for _ in range(2)}
    lm.prefill(append=PROMPTS[1], state=kept.state)
    assert len(answers) == 1
    assert kept.state.digest() == digest


def test_two_answers_to_one_question_from_one_state(lm):
    book = lm.prefill(PROMPTS[0]).state
    forks = [lm.generate(append=q, state=book, max_new_tokens=5) for q in PROMPTS[1:]]
    pieces = [list(pair) for pair in zip(*forks, strict=True)]
    for n, question in enumerate(PROMPTS[1:]):
        alone = lm.generate(append=question, state=lm.prefill(PROMPTS[0]).state, max_new_tokens=5)
        assert "".join(p[n] for p in pieces) == "".join(alone)


def test_nothing_goes_to_the_host_until_somebody_asks(lm, monkeypatch):
    saved = elsewhere(lm, monkeypatch)
    first = lm.generate(PROMPTS[0], max_new_tokens=4)
    text = "".join(first)
    second = lm.generate(append=PROMPTS[1], state=first.state(), max_new_tokens=4)
    more = "".join(second)
    assert saved == []
    state = second.state()
    assert state.digest() == state.digest()
    assert saved == [1]
    assert (text, more) != ("", "")


def test_states_of_earlier_calls_leave_a_device_and_stay_what_they_are(lm, monkeypatch):
    plain = [lm.prefill(p).state.digest() for p in PROMPTS]
    saved = elsewhere(lm, monkeypatch)
    results = [lm.prefill(p) for p in PROMPTS * 2]
    assert sum(saved) == 2 * len(PROMPTS) - HELD_ROWS - 1  # room for these rows and for the last state
    assert [result.state.digest() for result in results] == plain * 2
    before = len(saved)
    assert [result.state.digest() for result in results] == plain * 2
    assert len(saved) == before
    del results
    answer = "".join(lm.generate(state=lm.prefill(PROMPTS[0]).state, max_new_tokens=3))
    assert answer == "".join(lm.generate(PROMPTS[0], max_new_tokens=3))


def test_a_state_that_nobody_has_is_let_go(lm):
    result = lm.prefill(PROMPTS[0])
    (worker, *_), *_ = lm.executor.stages
    assert len(worker.states) == 1
    list(lm.generate(state=result.state, max_new_tokens=3))
    assert len(worker.states) == 1
    del result
    assert worker.states == {}


def test_a_state_outlives_its_engine(lm, model):
    result, generation = lm.prefill(PROMPTS[0]), lm.generate(PROMPTS[1], max_new_tokens=3)
    list(generation)
    state = generation.state()
    digests = lm.prefill(PROMPTS[0]).state.digest(), state.digest()
    lm.close()
    assert (result.state.digest(), state.digest()) == digests
    with xlstm_ray.load(
        model, **SIZES, chunkwise_backend=lm.backend.name, heads_per_band=lm.numerics.heads_per_band
    ) as new:
        assert "".join(new.generate(state=state, max_new_tokens=3))


def test_a_batch_is_taken_apart_and_put_together_where_it_is(lm):
    batch = lm.prefill([p * 2 for p in PROMPTS])
    assert isinstance(batch.state.elsewhere, HeldRows)
    whole = lm.prefill([p * 2 for p in PROMPTS]).state.tensors
    for b in range(3):
        row = batch.state.row(b).tensors
        assert row.keys() == whole.keys()
        assert all(torch.equal(row[name], tensor[b : b + 1]) for name, tensor in whole.items())
    ends = [lm.prefill(append="and so on", state=batch.state.row(b)).logits for b in range(3)]
    all_ends = lm.prefill(append=["and so on"] * 3, state=batch.state).logits
    assert torch.allclose(torch.cat(ends), all_ends, atol=1e-4, rtol=1e-4)


class _Copies(TorchDispatchMode):
    """Counts copies."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten.copy_.default
        return func(*args, **kwargs or {})


def test_tensors_side_by_side_are_copied_at_once_and_any_others_one_by_one():
    """A state of a large model has a hundred tensors: on a GPU each copy takes the host 10 us."""
    shapes = [(1, 3, 5, 7), (1, 3), (2, 1), (1, 40)]

    def beside() -> list[torch.Tensor]:
        return side_by_side(shapes, torch.zeros, torch.device("cpu"))

    def drawn(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        return [tensor.normal_() for tensor in tensors]

    apart = [torch.zeros(shape) for shape in shapes]
    whole = torch.zeros(1, 3, 5, 8)
    strided = [whole[..., :7], *beside()[1:]]  # of the same shapes, but not without gaps
    order = [1, 0, 2, 3]
    other = side_by_side([shapes[n] for n in order], torch.zeros, torch.device("cpu"))
    swapped = [other[n] for n in order]
    for given, count in ((beside(), 1), (apart, 4), (strided, 4), (swapped, 4), (beside()[1:], 1)):
        to = beside()[4 - len(given) :]
        with _Copies() as copies:
            copy_all(to, drawn(given))
        assert copies.count == count
        assert all(torch.equal(a, b) for a, b in zip(to, given, strict=True))
        assert all(tensor.data_ptr() % ALIGNED == 0 for tensor in to)
