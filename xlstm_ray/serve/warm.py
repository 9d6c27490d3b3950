"""What is compiled before an engine serves."""

from collections.abc import Callable
from typing import NamedTuple

from xlstm_ray.engine.engine import Engine
from xlstm_ray.engine.request import Request
from xlstm_ray.engine.windows import GROUP_SIZES, group_size
from xlstm_ray.sampling import Sampling
from xlstm_ray.serve.options import Slots


class Compiled(NamedTuple):
    """One compilation: so many rows, windows of these sizes; size 1 is decoding."""

    rows: int
    sizes: list[int]
    seconds: float


def begin(engine: Engine, wanted: Slots) -> int:
    """Begin to serve; returns the slots.

    All that requests will call is compiled, unless warm-up is off: else a later one would stop everybody for a minute.
    """
    fixed = wanted.deterministic
    sizes = (group_size(wanted.most or GROUP_SIZES[-1]),) if fixed else GROUP_SIZES
    slots = engine.serve(slots=wanted.most, buckets=sizes)
    for rows, windows in _calls(engine, wanted, slots):
        engine.warm_up(rows, windows)
    if engine.plan.warms_up and engine.executor.chooses == "here":  # a CUDA graph has what chooses the tokens
        first_answers(engine, min(slots, GROUP_SIZES[-1]))
    return slots


def first_answers(engine: Engine, most: int) -> None:
    """Answer so many requests at once, greedily and drawn, as the first callers would: nothing of it is kept."""
    for temperature in (0.0, 1.0):
        # Prompts are read in turn with tokens of those before: rows come one by one, through calls of all sizes.
        sampling = Sampling(max_new_tokens=2 * most + 2, temperature=temperature, ignore_eos=True)
        request = Request([0], sampling=sampling, prompt_logprobs=0)  # with these, no cache is asked
        for handle in [engine.submit(request) for _ in range(most)]:
            handle.result()


def _calls(engine: Engine, wanted: Slots, slots: int) -> list[tuple[int, list[int]]]:
    """Rows and windows of all calls that requests make."""
    fixed, numerics = wanted.deterministic, engine.numerics
    decoding = (
        [group_size(wanted.most or GROUP_SIZES[-1])] if fixed else [n for n in GROUP_SIZES if n <= group_size(slots)]
    )
    return [(1, [numerics.tile_size, numerics.chunk_size]), *((rows, [1]) for rows in decoding)]


def compile_all(
    engine: Engine, wanted: Slots, *, batches: bool, on_done: Callable[[int, int], object]
) -> list[Compiled]:
    """Compile what `prefill`, `generate` and a service of this engine call. on_done: how many calls of how many.

    batches: also what a prefill of many prompts calls.
    """
    calls = _calls(engine, wanted, engine.serve(slots=wanted.most))
    if (1, [1]) not in calls:  # a lone answer is decoded so
        calls.append((1, [1]))
    if batches:
        calls += [(rows, [engine.numerics.chunk_size]) for rows in GROUP_SIZES[1:]]
    made = []
    on_done(0, len(calls))
    for rows, sizes in calls:
        made.append(Compiled(rows, sizes, engine.warm_up(rows, sizes)))
        on_done(len(made), len(calls))
    return made
