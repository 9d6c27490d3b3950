"""Does a run fit in memory? Checked before it starts, with ways to make it smaller."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Literal

import psutil
import torch

from xlstm_ray.container import machine_bytes
from xlstm_ray.errors import MemoryLimitError
from xlstm_ray.files import MIB
from xlstm_ray.memory.need import (
    ACTOR,
    HELD_ROWS,
    RAY_IN_DRIVER,
    TRITON,
    Call,
    GridNeed,
    Loaded,
    Need,
    activation_bytes,
    advice,
    computed_need,
    scoring_bytes,
    state_bytes,
    store_bytes,
)
from xlstm_ray.memory.sample import Sample, process_bytes, take_sample
from xlstm_ray.memory.watchdog import Limits

MOST_DOCUMENTS = 4096 * MIB


@dataclass(frozen=True)
class Room:
    """The memory that a run needs and the memory that there is.

    where: "process": the run works in this process. "grid": all actors are on this machine. "elsewhere": they are not,
    and nothing is checked. head, watchdog: their bytes, if this run starts them. hard_name: what set the hard limit.
    A call is (rows, tokens), the shape of a window.
    """

    loaded: Loaded
    device: torch.device
    where: Literal["process", "grid", "elsewhere"]
    limits: Limits | None
    hard_name: str
    force: bool = False
    head: int = 0
    watchdog: int = 0

    @property
    def fits(self) -> bool:
        """Whether a tile of one prompt fits in this process."""
        return self.need(1, [(1, self.loaded.tile)]).total <= self._room()[0]

    def need(self, batch: int, calls: Sequence[tuple[int, int]], *, scored: bool = False) -> Need:
        """The memory that `batch` prompts of any length take in this process (on cuda, on the device).

        scored: log-probabilities of their tokens are computed, too.
        """
        needs = [computed_need(self.loaded, Call(batch, rows, tokens, scored)) for rows, tokens in set(calls)]
        return max(needs, key=lambda need: need.total)

    def grid_need(self, batch: int, tokens: int | None = None, *, scored: bool = False) -> GridNeed:
        """The memory that a grid takes on this machine, for `batch` prompts in windows of `tokens` (None: a tile's).

        scored: log-probabilities of their tokens are computed, too, by one actor of the last stage.
        """
        loaded, tokens = self.loaded, tokens or self.loaded.tile
        actors, on_host = loaded.stages * loaded.bands * loaded.spans, loaded.device != "cuda"
        state = (2 * batch + HELD_ROWS) * state_bytes(loaded.config)
        states = state + 2 * batch * (loaded.spans - 1) * state_bytes(loaded.config)  # before a tile and after it
        tile = activation_bytes(replace(loaded, workers=1), rows=batch, tokens=tokens)
        last = max(tile, scoring_bytes(loaded, rows=batch, tokens=tokens)) if scored else tile
        return GridNeed(
            head=self.head,
            driver=process_bytes() + RAY_IN_DRIVER + state + loaded.cache,
            actors=actors,
            programs=actors * actor_bytes(),
            weights=loaded.weights * loaded.spans * on_host,
            state=states * on_host,
            tiles=((actors - 1) * tile + last) * on_host,
            watchdog=self.watchdog,
            store=store_bytes(loaded, rows=batch, tokens=tokens),
            documents=loaded.documents,
        )

    def slots(self, most: int) -> int:
        """How many requests can be worked on at once, `most` at most: one is read, the others decode together."""
        if self.where != "process" or self.force:
            return most
        room, _ = self._room()
        return max((n for n in range(1, most + 1) if self.serving(n).total <= room), default=1)

    def serving(self, slots: int) -> Need:
        """The memory of so many requests at once, in this process (on cuda, on the device)."""
        return self.need(2 * slots, [(slots, 1), (1, self.loaded.tile)], scored=True)

    def shown(self, slots: int) -> str:
        """What a service of so many requests at once takes, for people."""
        if self.where == "process":
            more = f"; documents' states {self.loaded.documents / MIB:,.0f} MiB of the host"
            return f"{self.serving(slots)}{more if self.device.type == 'cuda' else ''}"
        if self.where == "grid":
            return str(self.grid_need(slots, scored=True))
        return f"documents' states {self.loaded.documents / MIB:,.0f} MiB"

    def for_documents(self, slots: int) -> int:
        """The bytes that the states of a service's documents may take where nobody has said: a part of what is free."""
        if self.where == "process" and self.device.type != "cuda":
            spare = self._room()[0] - self.serving(slots).total
        else:
            spare = spare_bytes(self.limits)
        return usual_documents(spare)

    def require_start(self) -> None:
        """Raise MemoryLimitError where a tile of one prompt cannot fit, with the arithmetic."""
        if not self.force and (self.where == "elsewhere" or self.device.type == "cuda"):
            require_documents(self.loaded.documents, self.limits)
        if self.where == "process":
            self.require(1, [(1, self.loaded.tile)])
        elif self.where == "grid" and not self.force:
            self._require_on_machine(self.grid_need(1), 1, process_bytes())

    def require(
        self, batch: int, calls: Sequence[tuple[int, int]], kept: int | None = None, *, scored: bool = False
    ) -> None:
        """Raise MemoryLimitError if `batch` prompts in these calls do not fit, with the loaded model.

        kept: rows of states that are held besides the call's own (None: one a prompt). scored: as in `need`.
        """
        if self.force:
            return
        if self.where == "grid":
            for rows, tokens in sorted(set(calls)):
                if rows > 1 or scored:
                    one, all_ = self.grid_need(1, tokens), self.grid_need(rows, tokens, scored=scored)
                    more = replace(all_, head=0, programs=0, weights=0, watchdog=0, driver=all_.driver - one.driver)
                    more = replace(more, documents=0)
                    if rows == 1:  # the memory of one row was allocated before, but for its log-probabilities
                        more = replace(more, driver=0, state=0, store=0, tiles=all_.tiles - one.tiles)
                    self._require_on_machine(more, rows, 0)
        if self.where != "process":
            return
        need, (room, where) = self.need(kept or batch, calls, scored=scored), self._room()
        if need.total > room:
            ways = self.ways(batch, calls)
            if self.device.type != "cuda":
                sample = take_sample()
                ways |= self._room_elsewhere(sample.available_bytes, sample.total_bytes, room)
            raise MemoryLimitError(
                f"this run needs {need}, but {room / MIB:,.0f} MiB {where}; "
                f"{advice(ways, need.total - room)}; or start all the same with `force=True`"
            )

    def ways(self, batch: int, calls: Sequence[tuple[int, int]]) -> dict[str, int]:
        """Ways to make a run of these calls smaller, and the most bytes that each saves."""
        loaded, rows = self.loaded, max(rows for rows, _ in calls)
        if self.where == "process":
            need: Need | GridNeed = self.need(batch, calls)
            flat = self.need(batch, [(rows, min(tokens, loaded.chunk)) for rows, tokens in calls]).total
            alone = self.need(1, [(1, loaded.tile)]).total
        else:
            need, flat, alone = self.grid_need(rows), self.grid_need(rows, loaded.chunk).total, self.grid_need(1).total
        activations = need.total - flat
        ways = {}
        if loaded.documents:
            ways[f"give `states_mb` below {loaded.documents // MIB}"] = loaded.documents
        if loaded.itemsize == 4:
            ways["give `dtype=bfloat16`"] = (need.weights + activations) // 2
        if loaded.tile > loaded.chunk:
            ways[f"give a `tile_size` below {loaded.tile}"] = activations
        if batch > 1:
            ways[f"give fewer than {batch} prompts at once"] = need.total - alone
        if loaded.stages < loaded.config.num_blocks:
            where = "`stages` with a `ray_address`" if loaded.stages == 1 else f"more than {loaded.stages} `stages`"
            ways[f"spread the blocks over more machines ({where})"] = need.weights + need.state
        return ways

    def require_under_limit(self, sample: Sample, doing: str) -> None:
        """Raise MemoryLimitError if this process is over its hard limit."""
        if self.limits is not None and self.limits.exceeded(sample) == "hard":
            raise MemoryLimitError(
                f"memory: this process uses {sample.process_bytes / MIB:,.0f} MiB, over the hard limit of "
                f"{self.limits.hard / MIB:,.0f} MiB, while it {doing}; give a shorter prompt, or "
                f"raise the limit ({self.hard_name})"
            )

    # ------------------------------------------------------------------------------------------------------------------
    def _require_on_machine(self, need: GridNeed, batch: int, own: int) -> None:
        """As `require`, for a grid that is all on this machine. own: bytes of this process that the need includes."""
        loaded, (available, total) = self.loaded, machine_bytes()
        room, where = available + own, "can be had on this machine"
        if self.limits and total < psutil.virtual_memory().total:
            # All memory of a container counts as this run's: over its hard limit, the watchdog ends the run.
            room, where = room - (total - self.limits.hard), f"{where} below the hard limit ({self.hard_name})"
        if need.total > room:
            ways = {}
            if loaded.spans > 1:
                fewer = (need.programs + need.weights + need.tiles) * (loaded.spans - 1) // loaded.spans
                ways[f"give fewer than {loaded.spans} `spans`"] = fewer
            if loaded.stages > 1:
                fewer = need.programs * (loaded.stages - 1) // loaded.stages
                ways[f"give fewer than {loaded.stages} `stages`"] = fewer
            ways["use local mode"] = need.head + need.programs + need.watchdog + need.store
            ways |= self.ways(batch, [(batch, loaded.tile)]) | self._room_elsewhere(available, total, room)
            raise MemoryLimitError(
                f"this grid needs {need}, but {room / MIB:,.0f} MiB {where}; "
                f"{advice(ways, need.total - room)}; or start all the same with `force=True`"
            )

    def _room(self) -> tuple[int, str]:
        """The bytes that a run here may take in all, and what bounds them."""
        if self.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self.device)
            room, where = free + torch.cuda.memory_reserved(self.device), "are free on the device"
            hard = self.limits.device_hard if self.limits else None
        else:
            sample = take_sample()
            room, where = sample.available_bytes + sample.process_bytes, "can be had on this machine"
            hard = self.limits.hard if self.limits else None
        if hard is not None and hard < room:
            return hard, f"are allowed ({self.hard_name})"
        return room, where

    def _room_elsewhere(self, available: int, total: int, room: int) -> dict[str, int]:
        """Ways to give a run more than `room` on this machine, and the most bytes that each gives."""
        used = process_bytes()
        ways, others = {}, max(0, total - available - used)
        hard = self.limits.hard if self.limits else total
        if room < min(hard, total):  # the memory of other programs is missing
            what = "container" if total < psutil.virtual_memory().total else "machine"
            text = f"end other programs, which use {others / MIB:,.0f} of this {what}'s {total / MIB:,.0f} MiB"
            ways[text] = min(others, hard - room)
        elif self.limits:
            ways[f"raise the limit ({self.hard_name})"] = available + used - hard
        return ways


def actor_bytes() -> int:
    """The bytes of an actor's program."""
    return ACTOR + TRITON * (find_spec("triton") is not None)


def spare_bytes(limits: Limits | None) -> int:
    """The memory that this process may still take."""
    sample = take_sample()
    spare = sample.available_bytes
    return spare if limits is None else min(spare, limits.hard - sample.process_bytes)


def usual_documents(spare: int) -> int:
    """The bytes that states of documents may take where nobody has said, of so many that are free."""
    return max(0, min(MOST_DOCUMENTS, spare // 4))


def require_documents(asked: int, limits: Limits | None) -> None:
    """Raise MemoryLimitError where the states of documents may take more than this process has left for them."""
    spare = spare_bytes(limits)
    if asked > spare:
        raise MemoryLimitError(
            f"documents' states may take {asked / MIB:,.0f} MiB, but {max(0, spare) / MIB:,.0f} MiB can be had for "
            f"this program; give `states_mb` below {max(1, spare // MIB)}; or start all the same with `force=True`"
        )


def base_bytes(*, compiled: bool) -> int:
    """The bytes of this process before a model is loaded, including the compiler if it is needed."""
    if compiled:
        import torch._dynamo
        import torch._inductor.compile_fx  # noqa: F401
    return process_bytes()
