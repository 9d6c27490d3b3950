"""Places for a grid's actors on the nodes of a cluster; starts, calls, ends and replaces the actors."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import count, pairwise
from math import prod
from time import monotonic, sleep
from typing import Any

import psutil

from xlstm_ray.actors.actor import ShardActor, groups
from xlstm_ray.actors.link import Link
from xlstm_ray.actors.options import GridOptions
from xlstm_ray.actors.shard import WorkerSpec
from xlstm_ray.actors.watchdog import ActorSample
from xlstm_ray.checkpoint import DTYPES
from xlstm_ray.errors import GridLost, UsageError
from xlstm_ray.files import MIB
from xlstm_ray.layout import Shard
from xlstm_ray.supervisor.processes import find, this_machine, wait_for_end

END_S = 5.0  # time limit of a call to Ray at the end
KILL_S = 2.0  # time that an actor gets to end after Ray was told to kill it
# Loading may take LOAD_S, plus the time of the whole model at LOAD_RATE (a fifth of 1 Gbit/s): actors may share one
# disk or server. LOAD_S is ten times what Python, torch and a device's context need.
LOAD_S = 300.0
LOAD_RATE = 20e6  # bytes a second


@dataclass
class Seat:
    """A place in the grid, and its present actor."""

    index: int  # of all, stage by stage
    name: str
    shard: Shard
    group: Any = None  # its placement group, and which of the group's bundles it has
    bundle: int = 0
    handle: Any = None
    calls: dict[tuple[Any, ...], Callable[..., Any]] = field(default_factory=dict)  # the handle's; slow to make
    node: str = ""  # Ray's id of its node
    process: psutil.Process | None = None  # the actor's, if it is visible from this process


class Placement:
    """A seat for each (stage, band), and its actor. layout: [stage][band]; of spans, the only stage for each of them.

    `open` comes before anything else; `close` may come at any time.
    """

    def __init__(self, link: Link, spec: WorkerSpec, layout: list[list[Shard]], options: GridOptions):
        self._link, self._ray, self.spec, self.options = link, link.ray, spec, options
        self._one_band, self._spans = len(layout[0]) == 1, options.spans > 1
        self._actor_class = self._ray.remote(concurrency_groups=groups(options.spans))(ShardActor)
        indices = count()
        self.stages = [
            [Seat(next(indices), f"xlstm-ray {options.run} {_where(s, shard, options)}", shard) for shard in shards]
            for s, shards in enumerate(layout)
        ]
        # Steps in flight. Two a stage: between two stages, too, a step travels while others are computed. With one more
        # than there are stages, four GPUs waited a fifth of their time for steps on their way.
        self.depth = 2 * len(layout)
        # Of tokens on GPUs, three: there a stage computes for less than 3 ms, and a step travels for as long.
        self.token_depth = (3 if spec.device == "cuda" else 2) * len(layout)
        self.over_host: dict[int, str] = {}  # on cuda, by stage: why its results go to the next one over the host
        self.restarts = 0  # the number of actors that replaced another
        self._groups: list[Any] = []

    @property
    def seats(self) -> list[Seat]:
        """All of them, stage by stage."""
        return [seat for stage in self.stages for seat in stage]

    def open(self) -> None:
        """Reserve all places, or none, and start the actors.

        Raises UsageError if the grid does not fit on the cluster, errors of actors that load, and GridLost if an
        actor does not finish loading.
        """
        self._reserve()
        self._start(self.seats)

    def close(self) -> None:
        """End the actors and then free their places: device memory is free when this returns.

        Returns in bounded time in any state of Ray, and raises nothing.
        """
        groups, self._groups = self._groups, []
        self._end(self.seats)
        with suppress(GridLost, self._ray.exceptions.RayError):
            for group in groups:
                self._link.ask(self._ray.util.remove_placement_group, group, timeout_s=END_S)

    def replace(self, seats: list[Seat]) -> None:
        """Start new actors for these seats, on any remaining nodes.

        Raises GridLost if no node has room for them, or an actor does not finish loading: another would not either.
        """
        self._end(seats)
        self.restarts += len(seats)
        for group in {id(seat.group): seat.group for seat in seats}.values():
            if not self._link.ask(group.wait, self.options.place_timeout_s):
                names = ", ".join(seat.name for seat in seats)
                raise GridLost(f"{names}: gone, and {self._no_room(group.bundle_specs[0])}")
        self._start(seats)

    # -- questions to actors -------------------------------------------------------------------------------------------
    def call(self, seat: Seat, method: str, name: str, group: str = "compute", results: int = 1) -> Callable[..., Any]:
        """A function that calls a method of a seat's actor and returns references. name: what Ray shows."""
        key = method, name, group, results
        if key not in seat.calls:
            call = seat.handle.call.options(name=name, concurrency_group=group, num_returns=results).remote
            seat.calls[key] = partial(call, method)
        return seat.calls[key]

    def each(self, seats: Sequence[Seat], method: str, *args: Any) -> list[Any]:
        """Call the same method of the actors of these seats; returns a reference for each."""
        return [self.call(seat, method, method.replace("_", " "))(*args) for seat in seats]

    def samples(self, *, patient: bool = True) -> dict[int, ActorSample]:
        """The samples of all actors that answer, by seat. An actor whose process is not visible from here may be behind
        a broken network: it gets as much time as Ray itself would give it."""
        if self._link.gone:
            return {}
        found: dict[int, ActorSample] = {}
        began = monotonic()
        asked = {seat.index: self._sample(seat) for seat in self.seats if seat.handle is not None}
        for seat in self.seats:
            here = seat.process is not None or not patient
            until = began + (self.options.answer_timeout_s if here else self.options.patience_s)
            while seat.index in asked:
                try:
                    found[seat.index] = self._link.get([asked.pop(seat.index)], max(0.0, until - monotonic()))[0]
                except self._ray.exceptions.ActorUnavailableError:
                    if not here and monotonic() < until:
                        sleep(1)
                        asked[seat.index] = self._sample(seat)
                except self._link.failure:
                    pass
        return found

    def lost(self, longest_call_s: float | None = None) -> list[Seat]:
        """The seats whose actors do not answer, or are in one call for longer than longest_call_s."""
        samples = self.samples()

        def hangs(sample: ActorSample) -> bool:
            return longest_call_s is not None and (sample.busy_s or 0) > longest_call_s

        return [seat for seat in self.seats if seat.index not in samples or hangs(samples[seat.index])]

    def _sample(self, seat: Seat) -> Any:
        return seat.handle.sample.options(concurrency_group="control").remote()

    # -- places --------------------------------------------------------------------------------------------------------
    def _reserve(self) -> None:
        """Reserve a place for every actor, all or none. Raises UsageError within seconds if they do not fit."""
        device = self.spec.device
        bundle: dict[str, float] = {"CPU": self.options.cpus or (self.spec.threads if device == "cpu" else 1)}
        if device != "cpu":
            bundle[{"cuda": "GPU", "mps": "mps"}[device]] = 1 / self.options.actors_per_device
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        room = sum(int(min(n.get(name, 0.0) / each for name, each in bundle.items()) + 1e-6) for n in nodes)
        if room < len(self.seats):  # Ray would wait for somebody to add nodes
            raise UsageError(self._no_room(bundle))
        if self.options.places is None:
            self._group(self.seats, bundle, strategy="PACK")
        else:
            for seats, (node, memory) in zip(self.stages, self.options.places, strict=True):
                # Ray takes another node where this one is gone: a stage of a lost node goes on there.
                more = {"memory": memory} if memory else {}
                self._group_on(node, seats, bundle | more)

    def _group(self, seats: list[Seat], bundle: dict[str, float], **where: Any) -> None:
        """Reserve a bundle for each of these seats, together."""
        group = self._link.ask(self._ray.util.placement_group, [bundle] * len(seats), **where)
        self._groups.append(group)
        for n, seat in enumerate(seats):
            seat.group, seat.bundle = group, n
        if not self._link.ask(group.wait, self.options.place_timeout_s):
            raise UsageError(self._no_room(bundle))

    def _group_on(self, node: str, seats: list[Seat], bundle: dict[str, float]) -> None:
        """As `_group`, on that node. The actor that measured it may still have its CPUs or its device for a moment."""
        until = monotonic() + self.options.place_timeout_s
        while True:
            self._group(seats, bundle, strategy="STRICT_PACK", _soft_target_node_id=node)
            group = self._groups[-1]
            if {*self._link.ask(self._ray.util.placement_group_table, group)["bundles_to_node_id"].values()} == {node}:
                return
            if monotonic() > until:
                raise UsageError(f"a node that was measured has no room any more: {self._no_room(bundle)}")
            self._link.ask(self._ray.util.remove_placement_group, self._groups.pop())
            sleep(0.2)

    def _no_room(self, bundle: dict[str, float]) -> str:
        nodes = [node for node in self._link.ask(self._ray.nodes) if node["Alive"]]
        free = self._link.ask(self._ray.available_resources)
        have = _amounts({name: sum(n["Resources"].get(name, 0) for n in nodes) for name in bundle})
        left = _amounts({name: free.get(name, 0) for name in bundle})
        each = _amounts(bundle)
        stages, bands = len(self.stages), len(self.stages[0])
        less = "fewer `threads`" if set(bundle) == {"CPU"} else "more `actors_per_device`"
        if self._spans:
            return (
                f"a grid of {stages} spans is {stages} actors of {each} each; the cluster's {len(nodes)} node(s) have "
                f"{have} in all, {left} free; use fewer `spans` or {less}, or add nodes"
            )
        return (
            f"a grid of {stages} stage(s) x {bands} band(s) is {stages * bands} actors of {each} each; the cluster's "
            f"{len(nodes)} node(s) have {have} in all, {left} free; use fewer `stages`, more `heads_per_band` or "
            f"{less}, or add nodes"
        )

    # -- actors --------------------------------------------------------------------------------------------------------
    def _start(self, seats: list[Seat]) -> None:
        """Start actors for these seats, and load their weights."""
        self._link.ask(self._create, seats)
        for seat, ref in [(seat, self._sample(seat)) for seat in seats]:
            (sample,) = self._link.get([ref], self.options.start_timeout_s)
            seat.node = sample.node
            seat.process = find(sample.process) if sample.machine == this_machine() else None
        self._load(seats)
        if self._spans:  # at any time: an actor may wait for one that is gone
            handles, timeout_s = [seat.handle for seat in self.seats], self.options.start_timeout_s
            meet = [self.call(seat, "meet", "meet", "control")(seat.index, handles) for seat in self.seats]
            self._link.get(meet, timeout_s)
        if self._one_band and self.options.gpu_direct and self.spec.device == "cuda":
            self._hand_over(seats)

    def _hand_over(self, seats: list[Seat]) -> None:
        """Have stages leave their results, and spans states, in their GPUs where the next one can read them there."""
        timeout_s = self.options.start_timeout_s
        ring = [*self.seats, self.seats[0]] if self._spans else self.seats
        pairs = [(a, b) for a, b in pairwise(ring) if a in seats or b in seats]
        for sender, reader in pairs:
            why = "the next one is on another machine"
            if sender.node == reader.node:
                offer = self.call(sender, "offer", "offer memory")()
                (why,) = self._link.get([self.call(reader, "read", "read another GPU")(offer)], timeout_s)
            # One more than may be in flight, and one that is being written. The reader before this one could perhaps.
            self._link.get(self.each([sender], "hand_over", 0 if why else self.token_depth + 2), timeout_s)
            self.over_host[sender.index] = why

    def _load(self, seats: list[Seat]) -> None:
        timeout_s = self.options.load_timeout_s
        if timeout_s is None:
            stored = self.spec.stored.values()
            timeout_s = LOAD_S + sum(prod(t.shape) * DTYPES[t.dtype].itemsize for t in stored) / LOAD_RATE
        refs = self.each(seats, "load")
        try:
            self._link.get(refs, timeout_s)
        except self._ray.exceptions.GetTimeoutError as error:
            hosts = {node["NodeID"]: node["NodeManagerHostname"] for node in self._link.ask(self._ray.nodes)}
            _, missing = self._ray.wait(refs, num_returns=len(refs), timeout=0)
            late = [seat for seat, ref in zip(seats, refs, strict=True) if ref in missing]
            names = ", ".join(f"{seat.name} on {hosts.get(seat.node, seat.node)}" for seat in late)
            raise GridLost(
                f"{names}: the weights are not loaded after {timeout_s:.0f} s; see whether that machine can read "
                f"{self.spec.model}, and whether anything stops the actor there"
            ) from error

    def _create(self, seats: list[Seat]) -> None:
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        for seat in seats:
            bundle = seat.group.bundle_specs[0]
            seat.handle = self._actor_class.options(
                name=seat.name if not self.restarts else f"{seat.name} ({self.restarts})",
                num_cpus=bundle["CPU"],
                num_gpus=bundle.get("GPU", 0),
                resources={"mps": bundle["mps"]} if "mps" in bundle else {},
                max_restarts=0,
                allow_out_of_order_execution=True,
                scheduling_strategy=PlacementGroupSchedulingStrategy(seat.group, seat.bundle),
            ).remote(self.spec, seat.shard, seat.name, one_band=self._one_band, spans=self._spans)

    def _end(self, seats: list[Seat]) -> None:
        """End the actors; those on this machine have ended when this returns, even if they did not answer.

        Ray ends them. Only an actor that Ray cannot end gets a signal, and no other process can get it: psutil
        compares its start time first.
        """
        seats = [seat for seat in seats if seat.handle is not None]
        with suppress(GridLost, self._ray.exceptions.RayError):
            for seat in seats:
                self._link.ask(self._ray.kill, seat.handle, no_restart=True, timeout_s=END_S)
        processes = [seat.process for seat in seats if seat.process is not None]
        if not self._link.gone:
            wait_for_end(processes, KILL_S)
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        wait_for_end(processes, self.options.answer_timeout_s)
        for seat in seats:
            seat.handle = seat.process = None
            seat.calls.clear()


def _amounts(resources: Mapping[str, float]) -> str:
    """Ray's resources, for people."""
    return ", ".join(
        f"memory {amount / MIB:,.0f} MiB" if name == "memory" else f"{name} {amount:g}"
        for name, amount in resources.items()
    )


def _where(stage: int, shard: Shard, options: GridOptions) -> str:
    blocks, heads = shard.blocks, shard.heads
    kind = "span" if options.spans > 1 else "stage"
    return f"{kind} {stage}, blocks {blocks.start}-{blocks.stop - 1}, heads {heads.start}-{heads.stop - 1}"
