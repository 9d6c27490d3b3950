"""Trails: what a state knows of its tokens."""

import sys
from concurrent.futures import ThreadPoolExecutor

from xlstm_ray.text.history import LaterTrail, TokenTrail


def test_a_trail_that_is_made_later_is_that_of_all_tokens_whoever_asks_for_it_at_once():
    tokens = list(range(900))
    whole = TokenTrail().extend(tokens)
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # threads take turns as often as they can
    try:
        with ThreadPoolExecutor(4) as pool:
            for _ in range(50):
                first = LaterTrail(TokenTrail(), tokens[:300])
                last = LaterTrail(LaterTrail(first, tokens[300:601]), tokens[601:])
                assert last.length == whole.length
                made = [asked.result() for asked in [pool.submit(last.made) for _ in range(4)]]
                assert {trail.hash for trail in made} == {whole.hash}
                assert last.made().hash == whole.hash
                assert first.made() == TokenTrail().extend(tokens[:300])
    finally:
        sys.setswitchinterval(before)
