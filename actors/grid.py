"""The executor of the grid: an actor per (stage, band), tiles in flight between them, and what happens when one dies.

The driver submits a tile's calls as a graph of object references: residual streams and partial sums pass between actors
and never through here. Two kinds of order hold whatever happens: a call waits for what it reads, and a block's call for
a tile waits for its call for the tile before.

Actors are never restarted by Ray: a fresh one would go on with an empty state. When one dies or hangs, another takes
its place, all actors are set back to the last snapshot, and the tiles since are played again, to the same bits.
"""

import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from statistics import median
from time import monotonic, perf_counter, sleep
from types import ModuleType
from typing import Any, NamedTuple

import psutil
import torch
from torch import Tensor

from xlstm_ray.actors.link import LOOK_S, PATIENCE_S, Link
from xlstm_ray.actors.metrics import GridMetrics
from xlstm_ray.actors.shard import GROUPS, BandActor, Call, WorkerSpec
from xlstm_ray.actors.watchdog import ActorSample, Event, Watchdog
from xlstm_ray.actors.wire import from_wire, to_wire
from xlstm_ray.errors import GridLost, GridOutOfMemory, UsageError, XlstmRayError, one_line
from xlstm_ray.layout import Band, join_bands
from xlstm_ray.memory.watchdog import Limits
from xlstm_ray.runtime.executor import Tile, TileResult
from xlstm_ray.supervisor.processes import find, this_machine, wait_for_end

END_S = 5.0  # what a call to Ray may take at the end
KILL_S = 2.0  # and an actor that Ray has been told to kill
DECODE_KEEP = 256  # tokens between two snapshots while decoding


@dataclass(frozen=True)
class GridOptions:
    """How a grid uses its cluster. Times in seconds."""

    run: str  # names this run's actors
    actors_per_device: int = 1
    cpus: float | None = None  # what an actor asks of Ray; None: a CPU for each thread
    place_timeout_s: float = 10.0
    answer_timeout_s: float = 5.0
    patience_s: float = PATIENCE_S  # for an actor that may be behind a network that is away
    start_timeout_s: float = 120.0
    least_deadline_s: float = 30.0  # a tile's: 20 times the median of the last ones, but this at least
    first_deadline_s: float = 900.0  # before any tile was measured
    retries: int = 3  # recoveries without a new tile in between
    limits: Callable[[int, int | None], Limits] | None = None  # as the watchdog wants them; None: no watchdog
    watch_every_s: float = 0.2
    empty_cache: bool = True
    on_event: Callable[[Event], None] = lambda event: None  # called between tiles


@dataclass
class Seat:
    """A place in the grid, and the actor that has it now."""

    index: int  # of its bundle
    name: str
    band: Band
    handle: Any = None
    node: str = ""  # Ray's id of the node that it is on
    process: psutil.Process | None = None  # the actor's, where this process sees the same ones
    done: dict[int, Any] = field(default_factory=dict)  # a block: its last call, which the next one waits for


class Entry(NamedTuple):
    """A tile that was submitted since the last snapshot."""

    number: int
    tile: Tile
    all_logits: bool


class Flight(NamedTuple):
    """A tile on its way: references to the last stage's result, and to every seat's state where it is kept."""

    entry: Entry
    result: Any
    states: list[Any]


class RayExecutor:
    """`Executor` over actors. `ray` is the connected module; bands [stage][band] is the grid.

    Raises UsageError where the cluster has no room for the grid, and what the actors raise while they load.
    """

    def __init__(self, ray: ModuleType, spec: WorkerSpec, bands: list[list[Band]], options: GridOptions):
        self._ray, self._spec, self._options = ray, spec, options
        self._alone = len(bands[0]) == 1
        # One more than there are stages: while a result travels, its stage has the next tile to work on.
        self._in_flight = max(2, len(bands) + 1) if self._alone else 2 * len(bands)
        self._actor_class = ray.remote(concurrency_groups=GROUPS)(BandActor)
        indices = count()
        self._stages = [
            [Seat(next(indices), f"xlstm-ray {options.run} {_where(s, band)}", band) for band in stage]
            for s, stage in enumerate(bands)
        ]
        self._numbers = count()
        self._epoch = 0
        self._warm: list[tuple[int, int]] = []
        self._snapshot: tuple[dict[str, Tensor] | None, int] = (None, 1)  # tensors of all heads, batch
        self._log: deque[Entry] = deque()  # tiles since the snapshot
        self._last_seen = -1  # number of the last tile whose result was handed out
        self._times: deque[float] = deque(maxlen=32)
        self._failures = 0  # since the last new result
        self._behind = False  # whether the actors are at the snapshot, with the log still to be played
        self.restarts = 0
        self._link = Link(ray)
        self.metrics = GridMetrics(options.run)
        self._watchdogs: dict[str, Any] = {}  # by node id
        self._reports: dict[str, Any] = {}  # by node id: what was asked for and has not come
        self._next_look = 0.0
        self._group: Any = None
        try:
            self._group = self._reserve()
            self._start(self._seats)
        except BaseException as error:  # Ctrl-C too: actors and their places must not stay
            self.close()
            if isinstance(error, ray.exceptions.RayError):
                raise GridLost(f"the grid did not start: {one_line(error)}") from error
            raise

    # -- Executor ------------------------------------------------------------------------------------------------------
    def warm_up(self, batch: int, sizes: Iterable[int]) -> None:
        sizes = list(sizes)
        self._warm += [(batch, size) for size in sizes]
        # Compiling takes as long as it takes, whatever the tiles before have taken.
        self._guard(lambda: self._each(self._seats, "warm_up", batch, sizes), self._options.first_deadline_s)

    def set_state(self, tensors: dict[str, Tensor] | None, batch: int) -> None:
        self._snapshot = (tensors, batch)
        self._log.clear()
        self._guard(self._restore_calls)

    def get_state(self) -> dict[str, Tensor]:
        def ask() -> list[Any]:
            for _ in self._drive(iter(())):  # after a recovery: what is in the log, again
                pass
            return [seat.handle.state.options(concurrency_group="compute").remote() for seat in self._seats]

        return self._joined(self._guard(ask))

    def stream(self, tiles: Iterable[Tile], *, all_logits: bool = False) -> Iterator[TileResult]:
        numbered = (Entry(next(self._numbers), tile, all_logits) for tile in tiles)
        return self._drive(numbered)

    def logits(self, hidden: Tensor) -> Tensor:
        wire = to_wire(hidden)

        def ask() -> list[Any]:
            return [self._stages[-1][0].handle.logits.options(concurrency_group="compute").remote(wire)]

        (logits,) = self._guard(ask)
        return from_wire(logits, torch.float32).clone()

    def decode(self, tokens: Tensor, active: Tensor) -> Tensor:
        keep = len(self._log) + 1 >= DECODE_KEEP
        tile = Tile(0, tokens.unsqueeze(1), torch.zeros_like(tokens), active.long(), keep)
        (result,) = self.stream([tile])
        return self.logits(result.hidden)

    def close(self) -> None:
        """End the actors, and only then give their places back: device memory is free when this returns.

        Bounded in time whatever has become of Ray, and never an error: what is computed is computed.
        """
        watchdogs, self._watchdogs = list(self._watchdogs.values()), {}
        group, self._group = self._group, None
        with suppress(GridLost, self._ray.exceptions.RayError):
            for watchdog in watchdogs:
                self._link.ask(self._ray.kill, watchdog, timeout_s=END_S)
        self._end(self._seats)
        if group is not None:
            with suppress(GridLost, self._ray.exceptions.RayError):
                self._link.ask(self._ray.util.remove_placement_group, group, timeout_s=END_S)

    @property
    def peak_memory_bytes(self) -> int:
        """Summed over the actors that answer, each at its own peak."""
        try:
            return sum(sample.peak_bytes for sample in self._samples(self._seats, patient=False).values())
        except GridLost:  # a figure is no reason to lose a result
            return 0

    # -- tiles ---------------------------------------------------------------------------------------------------------
    @property
    def _seats(self) -> list[Seat]:
        return [seat for stage in self._stages for seat in stage]

    def _drive(self, entries: Iterator[Entry]) -> Iterator[TileResult]:
        """Plays tiles again that the actors have forgotten, then new ones, and recovers on the way.

        Yields the results that nobody has seen. Between two of them another call may have had to recover.
        """
        waiting: deque[Entry] = deque()
        flights: deque[Flight] = deque()
        before = perf_counter()
        while True:
            if self._behind:
                self._behind = False
                flights.clear()
                waiting = deque(self._log)
                before = perf_counter()
            try:
                # A state takes longer to come than a tile's result: one tile more, so that nobody runs out of work.
                while len(flights) < self._in_flight + bool(flights and flights[0].states):
                    entry = waiting.popleft() if waiting else next(entries, None)
                    if entry is None:
                        break
                    if not self._log or entry.number > self._log[-1].number:
                        self._log.append(entry)
                    flights.append(self._link.ask(self._submit, entry))
                if not flights:
                    return
                result = self._collect(flights[0], len(flights))
            except self._failure as error:
                self._recover(error)
                continue
            entry = flights.popleft().entry
            now = perf_counter()
            result, before = result._replace(seconds=now - before), now
            self._times.append(result.seconds)
            self._observe(entry.tile, result.seconds, len(flights))
            if result.state is not None:
                self._snapshot = result.state, self._snapshot[1]
                while self._log and self._log[0].number <= entry.number:
                    self._log.popleft()
            if entry.number > self._last_seen:
                self._last_seen = entry.number
                self._failures = 0
                yield result

    def _submit(self, entry: Entry) -> Flight:
        """Ask for all of a tile's calls."""
        number, tile = entry.number, entry.tile
        call = Call(self._epoch, number, tile.first.tolist(), tile.last.tolist(), tile.keep, entry.all_logits)
        x: Any = to_wire(tile.tokens)
        states = []
        for s, seats in enumerate(self._stages):
            x = self._through_stage(seats[0], s, call, x) if self._alone else self._through_bands(seats, s, call, x)
            if tile.keep:
                for seat in seats:
                    kept = self._call(seat, "kept", f"state after {_tile(number)}", "snapshot")
                    states.append(kept(call, seat.done[max(seat.done)]))
        return Flight(entry, x, states)

    def _through_stage(self, seat: Seat, s: int, call: Call, x: Any) -> Any:
        done = self._call(seat, "run", f"{_tile(call.number)} stage {s}")(call, x, seat.done.get(0))
        seat.done[0] = done
        return self._call(seat, "output", f"output of {_tile(call.number)} stage {s}", "transfer")(call, done)

    def _through_bands(self, seats: list[Seat], s: int, call: Call, x: Any) -> Any:
        tile = _tile(call.number)
        if s == 0:
            x = self._call(seats[0], "embed", f"embed {tile}")(call, x)
        parts = [x]
        for n, block in enumerate(seats[0].band.blocks):
            mixed = []
            for b, seat in enumerate(seats):
                ask = self._call(seat, "mix", f"mix {tile} block {block} band {b}", results=2)
                part, seat.done[n] = ask(call, n, seat.done.get(n), *parts)
                mixed.append(part)
            parts = [
                self._call(seat, "feed", f"feed {tile} block {block} band {b}")(call, n, *mixed)
                for b, seat in enumerate(seats)
            ]
        return self._call(seats[0], "leave", f"output of {tile} stage {s}")(call, *parts)

    def _call(self, seat: Seat, method: str, name: str, group: str = "compute", results: int = 1) -> Callable[..., Any]:
        return getattr(seat.handle, method).options(name=name, concurrency_group=group, num_returns=results).remote

    def _collect(self, flight: Flight, under_way: int) -> TileResult:
        get = self._get_patiently if flight.states else self._get
        (hidden, *logits), *states = get([flight.result, *flight.states], self._deadline(under_way))
        return TileResult(
            flight.entry.tile.number,
            from_wire(hidden, self._spec.dtype).clone(),
            from_wire(logits[0], torch.float32) if logits else None,
            0.0,
            self._joined(states) if states else None,
        )

    def _joined(self, states: list[dict[str, Any]]) -> dict[str, Tensor]:
        """The seats' states as one, in this process's own memory."""
        tensors: dict[str, Tensor] = {}
        rest = iter(states)
        for seats in self._stages:
            of_stage = [{name: from_wire(a, torch.float32) for name, a in next(rest).items()} for _ in seats]
            tensors |= join_bands(of_stage)
        return tensors

    def _deadline(self, under_way: int) -> float:
        """Seconds after which a tile that has not come means that an actor hangs."""
        if not self._times:
            return self._options.first_deadline_s
        return max(self._options.least_deadline_s, 20 * under_way * median(self._times))

    # -- actors --------------------------------------------------------------------------------------------------------
    def _reserve(self) -> Any:
        """A place for every actor, all or none. Raises UsageError within seconds where the cluster has no room."""
        device = torch.device(self._spec.device).type
        bundle: dict[str, float] = {"CPU": self._options.cpus or (self._spec.threads if device == "cpu" else 1)}
        if device != "cpu":
            bundle[{"cuda": "GPU", "mps": "mps"}[device]] = 1 / self._options.actors_per_device
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        # Ray would wait for nodes to come, in case that somebody adds some.
        if sum(int(min(n.get(name, 0.0) / each for name, each in bundle.items()) + 1e-6) for n in nodes) < len(
            self._seats
        ):
            raise UsageError(self._no_room(bundle))
        bundles = [bundle] * len(self._seats)
        group = self._link.ask(self._ray.util.placement_group, bundles, strategy="PACK")
        if not self._link.ask(group.wait, self._options.place_timeout_s):
            self._link.ask(self._ray.util.remove_placement_group, group)
            raise UsageError(self._no_room(bundle))
        return group

    def _no_room(self, bundle: dict[str, float]) -> str:
        nodes = [node for node in self._link.ask(self._ray.nodes) if node["Alive"]]
        free = self._link.ask(self._ray.available_resources)
        have = ", ".join(f"{name} {sum(n['Resources'].get(name, 0) for n in nodes):g}" for name in bundle)
        left = ", ".join(f"{name} {free.get(name, 0):g}" for name in bundle)
        each = ", ".join(f"{name} {amount:g}" for name, amount in bundle.items())
        stages, bands = len(self._stages), len(self._stages[0])
        less = "fewer --threads" if set(bundle) == {"CPU"} else "more --actors-per-device"
        return (
            f"a grid of {stages} stage(s) x {bands} band(s) is {stages * bands} actors of {each} each; the cluster's "
            f"{len(nodes)} node(s) have {have} in all, {left} free; use fewer --stages, more --heads-per-band or "
            f"{less}, or add nodes"
        )

    def _start(self, seats: list[Seat]) -> None:
        """Actors for these seats: alive, with their weights, warm."""
        self._link.ask(self._create, seats)
        for seat, ref in [(seat, self._sample(seat)) for seat in seats]:
            (sample,) = self._get([ref], self._options.start_timeout_s)
            seat.node = sample.node
            seat.process = find(sample.process) if sample.machine == this_machine() else None
        self._get(self._each(seats, "load"))
        self._link.ask(self._watch)
        for batch, size in self._warm:
            self._get(self._each(seats, "warm_up", batch, [size]))

    def _create(self, seats: list[Seat]) -> None:
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        bundle = self._group.bundle_specs[0]
        for seat in seats:
            seat.done = {}
            seat.handle = self._actor_class.options(
                name=seat.name if not self.restarts else f"{seat.name} ({self.restarts})",
                num_cpus=bundle["CPU"],
                num_gpus=bundle.get("GPU", 0),
                resources={"mps": bundle["mps"]} if "mps" in bundle else {},
                max_restarts=0,
                allow_out_of_order_execution=True,
                scheduling_strategy=PlacementGroupSchedulingStrategy(self._group, seat.index),
            ).remote(self._spec, seat.band, seat.name, alone=self._alone)

    def _watch(self) -> None:
        """A watchdog on every node that has actors, told which."""
        if self._options.limits is None:
            return
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        o = self._options
        nodes = {seat.node for seat in self._seats}
        for node in self._watchdogs.keys() - nodes:
            self._ray.kill(self._watchdogs.pop(node))
        for node in sorted(nodes):
            if node not in self._watchdogs:
                self._watchdogs[node] = (
                    self._ray.remote(num_cpus=0)(Watchdog)
                    .options(
                        name=f"xlstm-ray {o.run} watchdog {node[:8]}",
                        scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
                    )
                    .remote(node[:8], o.limits, o.watch_every_s, empty_cache=o.empty_cache)
                )
            self._watchdogs[node].watch.remote({s.name: s.handle for s in self._seats if s.node == node})

    def _observe(self, tile: Tile, seconds: float, under_way: int) -> None:
        """Metrics after a tile, and what the watchdogs have had to say since the last one; never waits for them."""
        self.metrics.tile(int((tile.last - tile.first).sum()), seconds, under_way)
        for node, ref in list(self._reports.items()):
            ready, _ = self._ray.wait([ref], timeout=0)
            if not ready:
                continue
            del self._reports[node]
            try:
                (report,) = self._get([ref])
            except self._failure:  # its node is gone, or only it was killed: then another takes its place
                self._watchdogs.pop(node, None)
                self._link.ask(self._watch)
                continue
            for name, sample in report.samples.items():
                self.metrics.memory(name, sample.process_bytes, sample.device_driver_bytes)
            for event in report.events:
                self.metrics.limit(event.level)
                self._options.on_event(event)
        if monotonic() >= self._next_look:
            self._next_look = monotonic() + self._options.watch_every_s
            for node, watchdog in self._watchdogs.items():
                if node not in self._reports:
                    self._reports[node] = watchdog.report.remote()

    def _each(self, seats: list[Seat], method: str, *args: Any) -> list[Any]:
        return [self._call(seat, method, method.replace("_", " "))(*args) for seat in seats]

    def _restore_calls(self) -> list[Any]:
        """All actors at the snapshot, in a new epoch."""
        self._epoch += 1
        tensors, batch = self._snapshot
        wires = None if tensors is None else {name: to_wire(tensor) for name, tensor in tensors.items()}
        shared = self._link.ask(self._ray.put, wires)
        for seat in self._seats:
            seat.done = {}
        return self._each(self._seats, "restore", self._epoch, shared, batch)

    def _sample(self, seat: Seat) -> Any:
        return seat.handle.sample.options(concurrency_group="control").remote()

    def _samples(self, seats: list[Seat], *, patient: bool = True) -> dict[int, ActorSample]:
        """By seat: what those actors say that answer. One whose process is not seen from here may be behind a network
        that is away: it is given the time that Ray itself would give it."""
        if self._link.gone:
            return {}
        found: dict[int, ActorSample] = {}
        began = monotonic()
        asked = {seat.index: self._sample(seat) for seat in seats if seat.handle is not None}
        for seat in seats:
            here = seat.process is not None or not patient
            until = began + (self._options.answer_timeout_s if here else self._options.patience_s)
            while seat.index in asked:
                try:
                    found[seat.index] = self._get([asked.pop(seat.index)], max(0.0, until - monotonic()))[0]
                except self._ray.exceptions.ActorUnavailableError:
                    if not here and monotonic() < until:
                        sleep(1)
                        asked[seat.index] = self._sample(seat)
                except self._failure:
                    pass
        return found

    def _end(self, seats: list[Seat]) -> None:
        """The actors are gone when this returns, also those that do not answer, where their processes are seen here.

        They end by Ray's means. A signal is for one that Ray cannot end, and goes to the very process: psutil compares
        its start time first.
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
        wait_for_end(processes, self._options.answer_timeout_s)
        for seat in seats:
            seat.handle = seat.process = None

    # -- faults --------------------------------------------------------------------------------------------------------
    @property
    def _failure(self) -> type[Exception]:
        """What says that an actor, its process, its node or what it held is gone, or that it does not answer.

        All that Ray raises of its own; `_get` turns what an actor's code raises into that.
        """
        return self._ray.exceptions.RayError

    def _guard(self, ask: Callable[[], list[Any]], timeout_s: float | None = None) -> list[Any]:
        """What the calls return; asked again after a recovery when an actor is gone, or late by what tiles take."""
        while True:
            try:
                if timeout_s is not None:
                    return self._get(ask(), timeout_s)
                return self._get_patiently(ask(), self._deadline(self._in_flight + 1))
            except self._failure as error:
                self._recover(error)

    def _recover(self, error: Exception) -> None:
        """Replace what is dead or hangs, and set all actors back to the snapshot. GridLost where that cannot be."""
        while True:
            self._link.require_head()
            if isinstance(error, self._ray.exceptions.OutOfMemoryError):
                # What an actor takes does not grow with the prompt: another in its place would meet the same end.
                raise GridOutOfMemory(
                    f"a node ran out of memory, and Ray ended an actor there: {_out_of_memory(error)}; free memory, or "
                    "use a smaller --tile-size, fewer --stages on that node, or more nodes"
                ) from error
            self._failures += 1
            if self._failures > self._options.retries:
                where = f"tile {self._log[0].tile.number}" if self._log else "a snapshot"
                raise GridLost(
                    f"the grid failed {self._failures} times in a row from {where} on; the last time: {one_line(error)}"
                ) from error
            try:
                self._replace(error)
                self._get(self._restore_calls(), self._options.first_deadline_s)
                self._behind = True
                return
            except self._failure as again:
                error = again

    def _replace(self, error: Exception) -> None:
        """Other actors for those that are dead or hang."""
        timed_out = isinstance(error, self._ray.exceptions.GetTimeoutError)
        lost = self._lost(timed_out)
        if timed_out and not lost:  # all answer and none works: what they wait for will not come
            lost = self._seats
        self._end(lost)
        if not lost:  # the error was of one that has been replaced already
            return
        self.restarts += len(lost)
        self.metrics.restarts(len(lost))
        if not self._link.ask(self._group.wait, self._options.place_timeout_s):
            names = ", ".join(seat.name for seat in lost)
            raise GridLost(f"{names}: gone, and {self._no_room(self._group.bundle_specs[0])}") from error
        self._start(lost)

    def _lost(self, timed_out: bool) -> list[Seat]:
        """The seats whose actors do not answer; after a call that was late, those too that hang in one."""
        samples = self._samples(self._seats)
        half = self._deadline(1) / 2
        return [
            seat
            for seat in self._seats
            if seat.index not in samples or timed_out and (samples[seat.index].busy_s or 0) > half
        ]

    def _get_patiently(self, refs: list[Any], timeout_s: float) -> list[Any]:
        """As _get; but late results are waited for while nobody hangs: a batch's state may take a network minutes."""
        try:
            return self._get(refs, timeout_s)
        except self._ray.exceptions.GetTimeoutError:
            if self._lost(timed_out=True):
                raise
        return self._get(refs, self._options.first_deadline_s)

    def _get(self, refs: list[Any], timeout_s: float | None = None) -> list[Any]:
        """Results, or the actor's own error as it was raised there. GridLost where Ray's head is gone.

        Raises GetTimeoutError after timeout_s.
        """
        until = monotonic() + timeout_s if timeout_s is not None else None
        while True:
            left = LOOK_S if until is None else min(LOOK_S, max(0.0, until - monotonic()))
            _, missing = self._ray.wait(refs, num_returns=len(refs), timeout=left)
            if not missing:
                break
            self._link.require_head()
            if until is not None and monotonic() >= until:
                raise self._ray.exceptions.GetTimeoutError(f"no answer in {timeout_s:.0f} s")
        try:
            return self._link.ask(self._ray.get, refs)
        except self._ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, XlstmRayError):
                raise error.cause from None
            if isinstance(error, self._ray.exceptions.RayError) and isinstance(error.cause, self._failure):
                raise
            raise error.cause from error  # a bug, as it was raised there


def _out_of_memory(error: Exception) -> str:
    """Of Ray's long text, what was used of what there is."""
    text = one_line(error)
    found = re.search(r"Memory on the node .*? was ([\d.]+GB / [\d.]+GB)", str(error).replace("\n", " "))
    return f"{found[1]} used" if found else text


def _tile(number: int) -> str:
    """A tile in the names of its calls: the last digit of its number, as Ray keeps figures of every name for ever."""
    return f"tile *{number % 10}"


def _where(stage: int, band: Band) -> str:
    blocks, heads = band.blocks, band.heads
    return f"stage {stage}, blocks {blocks.start}-{blocks.stop - 1}, heads {heads.start}-{heads.stop - 1}"
