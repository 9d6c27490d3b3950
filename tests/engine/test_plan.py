"""Windows: which tokens go into which window. Integers only, so hypothesis can try many."""

from hypothesis import given
from hypothesis import strategies as st

from xlstm_ray.engine.windows import plan_windows, window_sizes

SIZES = st.tuples(st.integers(1, 24), st.integers(1, 6)).map(lambda s: {"tile_size": s[0] * s[1], "chunk_size": s[0]})
ROWS = st.lists(st.tuples(st.integers(0, 400), st.integers(0, 200)), min_size=1, max_size=4)


def spans(rows: list[tuple[int, int]]) -> tuple[list[int], list[int]]:
    """(begin, length) pairs -> begins, ends."""
    return [b for b, _ in rows], [b + n for b, n in rows]


@given(rows=ROWS, sizes=SIZES)
def test_every_new_token_is_in_one_window_and_nothing_else_is(rows, sizes):
    begin, end = spans(rows)
    seen = [[] for _ in rows]
    for window in plan_windows(begin, end, **sizes):
        for row, b, e in zip(seen, begin, end, strict=True):
            start, stop = window.part(b, e)
            assert 0 <= start <= stop <= window.size
            row += range(window.start + start, window.start + stop)
    assert seen == [list(range(b, e)) for b, e in zip(begin, end, strict=True)]


@given(rows=ROWS, sizes=SIZES)
def test_windows_lie_on_the_grid_in_order_and_none_is_empty(rows, sizes):
    begin, end = spans(rows)
    windows = list(plan_windows(begin, end, **sizes))
    assert [window.number for window in windows] == list(range(len(windows)))
    for window in windows:
        assert window.size in sizes.values()
        assert window.start % window.size == 0
        parts = [window.part(b, e) for b, e in zip(begin, end, strict=True)]
        assert any(start < end for start, end in parts)
    for one, other in zip(windows, windows[1:], strict=False):
        assert one.start + one.size <= other.start
    assert window_sizes(begin, end, **sizes) == sorted({window.size for window in windows}, reverse=True)


@given(rows=ROWS, sizes=SIZES)
def test_padding_is_less_than_a_quarter_of_the_last_tile(rows, sizes):
    begin, end = spans(rows)
    padded = [max(w.start + w.size - max(end), 0) for w in plan_windows(begin, end, **sizes)]
    assert sum(padded) < max(sizes["tile_size"] / 4, sizes["chunk_size"])


@given(rows=ROWS, sizes=SIZES)
def test_a_run_resumed_at_any_windows_end_goes_through_the_same_windows(rows, sizes):
    begin, end = spans(rows)
    windows = [(w.start, w.size) for w in plan_windows(begin, end, **sizes)]
    for done, (start, size) in enumerate(windows, 1):
        consumed = [max(b, min(start + size, e)) for b, e in zip(begin, end, strict=True)]
        rest = [(w.start, w.size) for w in plan_windows(consumed, end, **sizes)]
        assert rest == windows[done:]


def test_a_prompt_of_one_tile_is_one_tile_and_one_more_token_costs_one_chunk():
    def shape(tokens: int, begin: int = 0) -> list[tuple[int, int]]:
        return [(w.start, w.size) for w in plan_windows([begin], [tokens], tile_size=64, chunk_size=16)]

    assert shape(1) == [(0, 16)]
    assert shape(48) == [(0, 16), (16, 16), (32, 16)]
    assert shape(49) == [(0, 64)]
    assert shape(64) == [(0, 64)]
    assert shape(65) == [(0, 64), (64, 16)]
    assert shape(192, begin=63) == [(48, 16), (64, 64), (128, 64)]
    assert shape(192, begin=192) == []
