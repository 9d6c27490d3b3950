"""The states that one prefill takes from the engine's cache, and the states that it adds."""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor

from xlstm_ray.engine.cache import Cache, Hit
from xlstm_ray.engine.driver import Logits, Snapshot, Start, computed
from xlstm_ray.engine.held import HeldRows
from xlstm_ray.engine.result import Use
from xlstm_ray.engine.resume import Going
from xlstm_ray.engine.tokens import Tail
from xlstm_ray.engine.tree import Chain, Run
from xlstm_ray.engine.windows import Group, Window
from xlstm_ray.errors import UsageError
from xlstm_ray.state import Numerics
from xlstm_ray.text.history import LaterTrail


@dataclass(frozen=True)
class Share:
    """salt: the tenant; its prompts share states. keep_at: positions in a prompt; the last state up to each is kept."""

    salt: str = ""
    keep_at: Sequence[int] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.salt, str):
            raise UsageError(f"`tenant` is {repr(self.salt)[:80]}; give a text")
        at = self.keep_at
        if not isinstance(at, Sequence) or any(type(n) is not int or n < 0 for n in at):
            raise UsageError(f"`keep_at` is {repr(at)[:80]}; give numbers of tokens, from 0 on")


class Reuse:
    """The hits of a prefill's rows. cache: None if it is off; then there are no hits.

    before: an earlier look-up of these rows, of which the hashes are taken.
    """

    def __init__(self, cache: Cache | None, going: Sequence[Going], share: Share, before: "Reuse | None" = None):
        self._cache, self._going, self._share = cache, going, share
        self._chains = {} if before is None else {b: hit.chain for b, hit in before.hits.items()}
        self.hits: dict[int, Hit] = {}
        self._ended = False

    def find(self, groups: Sequence[Group], begun: Sequence[int], numerics: Numerics) -> None:
        """Look up the rows that a cold run begins at their first tokens. begun: where a cold run begins each row."""
        cache, going = self._cache, self._going
        if cache is None:
            return
        ends = [len(one.tokens) for one in going]
        for group in groups:
            # A row with a given state has that state's bits, not those of a cold run.
            if any(begun[b] or isinstance(going[b].tokens, Tail) for b in group.rows):
                continue
            runs = {
                b: Run.in_group(group, b, ends, tile=numerics.tile_size, chunk=numerics.chunk_size) for b in group.rows
            }
            with cache.turn():
                hits = self._look_up(cache, runs, whole=True)
                # Rows of a group share windows only if each row has tokens left.
                if len(runs) > 1 and any(ends[b] == hit.use.hit_tokens for b, hit in hits.items()):
                    if any(ends[b] != hit.use.hit_tokens for b, hit in hits.items()):
                        for hit in hits.values():
                            cache.release(hit)
                        hits = self._look_up(cache, runs, whole=False)
            self.hits |= hits

    def _look_up(self, cache: Cache, runs: dict[int, Run], *, whole: bool) -> dict[int, Hit]:
        return {
            b: cache.find(
                self._going[b].ids,
                run,
                salt=self._share.salt,
                after=self._going[b].seen,
                whole=whole,
                asked=self._share.keep_at,
                begun=self._chains.get(b),
            )
            for b, run in runs.items()
        }

    @property
    def found(self) -> bool:
        """Whether any row goes on from a found state."""
        return any(hit.start is not None for hit in self.hits.values())

    @property
    def exact(self) -> bool:
        """Whether every found state has the bits of a cold run."""
        return all(hit.exact for hit in self.hits.values())

    def uses(self) -> list[Use]:
        """The use of the cache for each row."""
        return [self.hits[b].use if b in self.hits else Use() for b in range(len(self._going))]

    def start(self, start: Snapshot) -> Snapshot:
        """The snapshot to go on from: `start`, with found states in place of its own."""
        consumed, rows, before = list(start.consumed), list(start.rows), start.logits
        found: dict[int, Logits] = {}
        for b, hit in self.hits.items():
            if hit.start is not None:
                consumed[b], rows[b], found[b] = hit.use.hit_tokens, hit.start.rows[0], hit.start.logits
                self._going[b].jump(hit.start.trail)

        def logits() -> Tensor:
            both = before.clone()
            for b, own in found.items():
                both[b] = computed(own)
            return both

        return Snapshot(consumed, logits if found else before, HeldRows(rows), start.scored)

    def wants(self, group: Group, window: Window) -> bool:
        """Whether any row's state at this window's end must be kept. At a row's own end, it comes with its group."""
        end = window.start + window.size
        return any(b in self.hits and end in self.hits[b].points for b in group.rows)

    def keep(self, group: Group, part: Snapshot, *, cold: bool) -> None:
        """Keep the states that the cache needs. part: the group's rows, at a window's end or at their own end."""
        for n, b in enumerate(group.rows):
            hit, seen = self.hits.get(b), part.consumed[n]
            if self._cache is None or hit is None or seen not in hit.points:
                continue
            hit.points.remove(seen)
            self._going[b].advance(seen)
            if self._cache.plan.folder is not None:
                part.begin()  # a file has logits
            row = Start(part.rows.pick([n]), part.some(partial(_row, n)), self._going[b].trail)
            asked = {hit.run.end_before(place) for place in self._share.keep_at}
            slight = seen - hit.use.hit_tokens < hit.run.tile and seen not in asked
            with self._cache.turn():
                self._cache.keep(hit, seen, row, cold=cold and hit.exact, slight=slight)

    @property
    def keeps_answers(self) -> bool:
        """Whether states after answers are kept: only without `exact`, since no cold run has their bits."""
        return self._cache is not None and not self._cache.plan.exact and 0 in self.hits

    def keep_answer(self, answer: Sequence[int], rows: HeldRows, logits: Tensor) -> None:
        """Keep the state after the only row and these tokens of its answer. logits: (vocabulary,)."""
        assert self._cache is not None
        going, hit = self._going[0], self.hits[0]
        going.advance(len(going.tokens))
        tokens = array("i", going.ids.tobytes())
        tokens.extend(answer)
        run, chain = hit.run._replace(length=len(tokens)), Chain(hit.chain.root, memoryview(tokens), hit.chain)
        start = Start(rows, logits, LaterTrail(going.trail, array("i", answer)))
        with self._cache.turn():
            self._cache.keep(replace(hit, run=run, chain=chain), len(tokens), start, cold=False)

    def release(self, *, used: bool = True) -> None:
        """End all leases. used: the run that used the hits has ended; they are counted."""
        ended, self._ended = self._ended, True
        for hit in [] if ended else self.hits.values():
            if self._cache is not None:
                with self._cache.turn():
                    self._cache.release(hit)
                    if used:
                        self._cache.count(hit)


def _row(n: int, logits: Tensor) -> Tensor:
    return logits[n].clone()  # a view would keep the others alive
