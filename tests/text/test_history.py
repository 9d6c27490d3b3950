"""Trails: what a state knows of its tokens."""

import random
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


def test_a_beginning_that_both_have_is_not_compared_again(monkeypatch):
    rng, made = random.Random(5), TokenTrail.lengthened
    hashed: list[int] = []

    def counted(before: str, units: list[int]) -> str:
        hashed.append(len(units))
        return made(before, units)

    for _ in range(200):
        shared, one, other = ([rng.randrange(9) for _ in range(rng.choice((0, 1, 40, 700)))] for _ in range(3))
        trail, units = TokenTrail().extend([*shared, *one]), [*shared, *other]
        apart = trail.difference(units)
        for known in (0, len(shared) // 3, len(shared)):
            both = TokenTrail().extend(shared[:known])
            with monkeypatch.context() as patch:
                patch.setattr(TokenTrail, "lengthened", staticmethod(counted))
                hashed.clear()
                found = trail.difference(units, both)
            assert found == (None if apart is None else (max(apart[0], known), apart[1]))
            assert sum(hashed) <= len(units) - known
