"""Start what a plan needs: the executor in this process or over actors, our Ray head, metrics."""

from collections import deque
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial
from secrets import token_hex
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

from xlstm_ray.checkpoint import Checkpoint
from xlstm_ray.choose import Cluster, Setup
from xlstm_ray.errors import UsageError
from xlstm_ray.kernels.compiled import compile_strict
from xlstm_ray.kernels.inductor import LaunchCounter
from xlstm_ray.memory.watchdog import Event, Limits, Seen
from xlstm_ray.plan import RunPlan, divide
from xlstm_ray.runtime.blocks import Kernels
from xlstm_ray.runtime.canaries import require_sound
from xlstm_ray.runtime.executor import Executor
from xlstm_ray.runtime.local import InProcessExecutor
from xlstm_ray.runtime.worker import build_worker
from xlstm_ray.supervisor.connect import connect, job_metadata
from xlstm_ray.supervisor.mode import Mode
from xlstm_ray.supervisor.records import Head, dashboard_line, lost_helpers
from xlstm_ray.supervisor.start import managed

if TYPE_CHECKING:
    from xlstm_ray.actors.grid import RayExecutor
    from xlstm_ray.actors.metrics import GridMetrics
    from xlstm_ray.actors.options import GridOptions
    from xlstm_ray.actors.shard import WorkerSpec
    from xlstm_ray.actors.watch import Watch

T = TypeVar("T")


class Running:
    """What runs a plan. Call `attach`, then `start`; `close` may be called at any time and ends what was started.

    on_phase: called before steps that may take long. on_note: called with the dashboard's address.
    """

    def __init__(self, on_phase: Callable[[str], object], on_note: Callable[[str], object]):
        self._on_phase, self._on_note = on_phase, on_note
        self._cluster = ExitStack()
        self._ray: ModuleType | None = None
        self._executor: Executor | None = None
        self._head: Head | None = None
        self._started: RunPlan | None = None
        self._lost: set[str] = set()  # helpers of the head that were reported
        self.stays: Head | None = None  # our head, if it stays after this run
        self.metrics: GridMetrics | None = None  # only with Ray, which shows them
        self.launches: LaunchCounter | None = None  # None if launches cannot be counted
        self._watch: Watch | None = None  # of the grid
        self._events: deque[Event] = deque()  # reported by the watchdogs of the grid's nodes
        self._seen: deque[Seen] = deque(maxlen=1 << 16)  # what they have seen, if it is to be logged

    @property
    def executor(self) -> Executor:
        """The executor, which has weights and states. Raises UsageError after `close`."""
        if self._executor is None:
            raise UsageError("this engine has been closed; load the model again")
        return self._executor

    @property
    def plan(self) -> RunPlan:
        """The plan that was started."""
        assert self._started is not None
        return self._started

    def attach(self, setup: Setup) -> Cluster | None:
        """Connect to somebody's head, if the run is to use one; returns its cluster."""
        if setup.head is None:
            return None
        address, token, state_dir = setup.head
        metadata = job_metadata(setup.model, setup.stages)
        self._ray = ray = self._cluster.enter_context(
            connect(address, state_dir=state_dir, token_path=token, metadata=metadata)
        )
        cpus = [node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"]]
        return Cluster(ray.cluster_resources(), cpus)

    def start(self, plan: RunPlan, checkpoint: Checkpoint) -> None:
        """Load the weights, and start what is missing: a head, actors."""
        self._started = plan
        if plan.mode is Mode.LOCAL:
            self._executor = self._in_process(plan, checkpoint)
            if plan.head is not None:  # only for its dashboard: the work stays in this process
                from xlstm_ray.actors.metrics import GridMetrics

                self._start_head(plan)
                self.metrics = GridMetrics(token_hex(3))
            return
        ray = self._ray or self._start_head(plan)
        self._on_phase("starting actors, which load the model")
        self._executor = executor = self._over_actors(ray, plan, checkpoint)
        self.metrics = executor.metrics

    def divided(self, plan: RunPlan, checkpoint: Checkpoint) -> RunPlan:
        """The plan with stages by the speed and memory of the cluster's nodes, if it asks for that."""
        if not plan.measures:
            return plan
        from xlstm_ray.actors.speed import measure

        plan.room.require_start()  # all in one stage: more stages need more
        self._ray = ray = self._ray or self._start_head(plan)
        self._on_phase("measuring the nodes")
        (bands,), sizes = plan.layout, (plan.numerics.tile_size, plan.numerics.chunk_size)
        spec, options = self._spec(plan, checkpoint), self._options(plan)
        return divide(plan, checkpoint, measure(ray, spec, bands, options, threads=plan.threads, sizes=sizes))

    def events(self) -> list[Event]:
        """Events that the watchdogs of the grid's nodes reported since the last call."""
        return _drained(self._events)

    def seen(self, *, at_end: bool = False) -> list[Seen]:
        """What the watchdogs of the grid's nodes have seen since the last call. at_end: wait for the rest, too."""
        if at_end and self._watch is not None:
            self._watch.last_look()
        return _drained(self._seen)

    def actors_use(self) -> tuple[int, int] | None:
        """Bytes of all actors together, of their processes and on devices, as last reported; None if not reported."""
        used = [] if self._watch is None else list(self._watch.used.values())
        return (sum(s.process_bytes for s in used), sum(s.device_driver_bytes for s in used)) if used else None

    def require_head(self) -> None:
        """Raise GridLost if the head of a grid is known to be gone."""
        if self._watch is not None:
            self._watch.require_head()

    def helpers_lost(self) -> list[str]:
        """A line for each of Ray's helpers that ended since the last call. The run goes on without them."""
        if self._head is None or self.plan.head is None:
            return []
        new = set(lost_helpers(self._head, self.plan.head.state_dir)) - self._lost
        self._lost |= new
        return [f"Ray's {name} has ended; the run goes on without it (logs in {self._head.folder})" for name in new]

    def close(self) -> None:
        """End the actors first, so that their memory is free, then our head unless it stays."""
        executor, self._executor = self._executor, None
        try:
            if executor is not None:
                executor.close()
        finally:
            self._cluster.close()

    # ------------------------------------------------------------------------------------------------------------------
    def _in_process(self, plan: RunPlan, checkpoint: Checkpoint) -> InProcessExecutor:
        require_sound(plan.device, plan.config)
        # Launches can be counted only in Metal code; elsewhere the figure would be a guess.
        if plan.backend.compiled and plan.device.type == "mps":
            self.launches = LaunchCounter()
        kernels = Kernels(
            plan.backend,
            t_inner=plan.steps.t_inner,
            compiler=partial(compile_strict, fusion_limit=plan.steps.fusion_limit, counter=self.launches, guards=False),
        )
        float8 = plan.numerics.dtype == "float8"
        build = partial(build_worker, checkpoint, kernels, dtype=plan.dtype, device=plan.device, float8=float8)
        stages = [[build(shard) for shard in shards] for shards in plan.layout]
        return InProcessExecutor(
            stages,
            band_threads=plan.workers,
            streams=plan.streams,
            torch_threads=plan.threads,
            graphs=plan.uncaptured is None,
        )

    def _start_head(self, plan: RunPlan) -> ModuleType:
        """Start our head and connect to it."""
        assert plan.head is not None
        self._on_phase("starting Ray")
        head = self._head = self._cluster.enter_context(managed(plan.head))
        self.stays = head if plan.head.stays else None
        if head.dashboard_url:
            self._on_note(dashboard_line(head))
        return self._cluster.enter_context(connect(head, metadata=job_metadata(plan.model, plan.stages)))

    def _over_actors(self, ray: ModuleType, plan: RunPlan, checkpoint: Checkpoint) -> "RayExecutor":
        """The executor over actors, one for each shard, on the cluster that `ray` is connected to."""
        from xlstm_ray.actors.grid import RayExecutor

        executor = RayExecutor(ray, self._spec(plan, checkpoint), plan.layout * plan.spans, self._options(plan))
        self._watch = executor.watch
        for stage, why in executor.placement.over_host.items():
            if why:
                who = f"span {stage} passes states" if plan.spans > 1 else f"stage {stage} passes its results"
                self._on_note(f"{who} on over the host's memory: {why}")
        return executor

    def _spec(self, plan: RunPlan, checkpoint: Checkpoint) -> "WorkerSpec":
        from xlstm_ray.actors.shard import WorkerSpec

        assert plan.actors is not None
        return WorkerSpec(
            model=plan.model.resolve(),
            config=plan.config,
            stored=checkpoint.stored(),
            backend=plan.backend.name,
            device=plan.device.type,
            dtype=plan.dtype,
            float8=plan.numerics.dtype == "float8",
            graphs=plan.uncaptured is None,
            t_inner=plan.steps.t_inner,
            fusion_limit=plan.steps.fusion_limit,
            threads=plan.actors.threads,
            eager=plan.numerics.eager,
        )

    def _options(self, plan: RunPlan) -> "GridOptions":
        from xlstm_ray.actors.options import GridOptions

        assert plan.actors is not None
        watched: dict[str, Any] = {}
        if plan.watch is not None:
            watched = {
                "limits": partial(Limits.make, *plan.watch.limits),
                "watch_every_s": plan.watch.every_s,
                "empty_cache": "empty_cache" in plan.watch.actions,
                "on_seen": self._seen.append if "mem_log" in plan.logs else None,
            }
        return GridOptions(
            run=token_hex(3),
            actors_per_device=plan.actors.per_device,
            cpus=plan.actors.cpus,
            places=plan.actors.places,
            gpu_direct=plan.actors.gpu_direct,
            spans=plan.spans,
            # Shorter windows are of a prompt's tail: there are many, and a hop takes longer than one of their blocks.
            least_span=min(plan.numerics.tile_size, 2 * plan.numerics.chunk_size),
            on_event=self._events.append,
            **watched,
        )


def _drained(queue: deque[T]) -> list[T]:
    """Takes all out of a queue that other threads use, too."""
    taken: list[T] = []
    with suppress(IndexError):
        while True:
            taken.append(queue.popleft())
    return taken
