"""The actor of one shard, as Ray knows it. Importable without Ray; Placement wraps the class.

Ray imports an actor's class wherever a handle of it goes. A watchdog has handles and needs no torch, which would triple
its memory: so the work is in shard.py, which only the actor itself imports.

Calls run in threads (Ray's concurrency groups): `compute` works on tiles, `transfer` brings results of finished
tiles to the host while the next one computes, `snapshot` does so with states, which are larger, and `control` answers
at any time. On cuda tokens have two threads, `token`: one launches a step while the other waits for the one before.
"""

from collections.abc import Iterator
from typing import Any

from xlstm_ray.actors.watchdog import ActorSample
from xlstm_ray.threads import collect_seldom

GROUPS = {"compute": 1, "transfer": 1, "snapshot": 1, "control": 1, "token": 2}


def groups(actors: int) -> dict[str, int]:
    """With `actors` that have all blocks, a thread for each other one, which takes one state at a time."""
    return GROUPS if actors == 1 else {**GROUPS, "give": actors - 1}


class ShardActor:
    """Has the ShardWork of these arguments, or with `spans` the SpanWork."""

    def __init__(self, *args: Any, spans: bool, **kwargs: Any):
        collect_seldom()
        from xlstm_ray.actors.shard import ShardWork
        from xlstm_ray.actors.span import SpanWork

        self._work: Any = (SpanWork if spans else ShardWork)(*args, **kwargs)

    def __repr__(self) -> str:
        return f"ShardActor({self._work.name})"

    def call(self, method: str, *args: Any) -> Any:
        """Call this method of the work."""
        return getattr(self._work, method)(*args)

    def give(self, *args: Any) -> Iterator[Any]:
        """As SpanWork.give. Ray streams only what a method yields itself."""
        yield from self._work.give(*args)

    def sample(self) -> ActorSample:
        """As ShardWork.sample."""
        return self._work.sample()

    def empty_cache(self) -> None:
        """As ShardWork.empty_cache."""
        self._work.empty_cache()
