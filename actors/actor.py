"""The actor of one shard, as Ray knows it. Importable without Ray; Placement wraps the class.

Ray imports an actor's class wherever a handle of it goes. A watchdog has handles and needs no torch, which would triple
its memory: so the work is in shard.py, which only the actor itself imports.

Calls run in threads (Ray's concurrency groups): `compute` works on tiles, `transfer` brings results of finished
tiles to the host while the next one computes, `snapshot` does so with states, which are larger, and `control` answers
at any time. On cuda tokens have two threads, `token`: one launches a step while the other waits for the one before.
"""

from typing import Any

from xlstm_ray.actors.watchdog import ActorSample

GROUPS = {"compute": 1, "transfer": 1, "snapshot": 1, "control": 1, "token": 2}


class ShardActor:
    """Has the ShardWork of these arguments."""

    def __init__(self, *args: Any, **kwargs: Any):
        from xlstm_ray.actors.shard import ShardWork

        self._work = ShardWork(*args, **kwargs)

    def __repr__(self) -> str:
        return f"ShardActor({self._work.name})"

    def call(self, method: str, *args: Any) -> Any:
        """Call this method of the work."""
        return getattr(self._work, method)(*args)

    def sample(self) -> ActorSample:
        """As ShardWork.sample."""
        return self._work.sample()

    def empty_cache(self) -> None:
        """As ShardWork.empty_cache."""
        self._work.empty_cache()
