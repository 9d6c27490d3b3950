"""Replicas on Ray Serve: on the head that this process is connected to, while a block runs.

Import it only where Ray may be imported.
"""

import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from secrets import token_hex
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayTaskError
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, RequestRouterConfig
from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica
from ray.serve.schema import LoggingConfig

from xlstm_ray.choose import Setup
from xlstm_ray.engine.engine import Engine
from xlstm_ray.engine.pace import tile_of
from xlstm_ray.errors import RayError, XlstmRayError, one_line
from xlstm_ray.serve.options import Slots
from xlstm_ray.serve.remote import Remote
from xlstm_ray.serve.replica import Call, Replica
from xlstm_ray.supervisor.presence import Presence

AT_ONCE = 1 << 14  # calls that a replica takes: its engine has a queue, and the desk knows how long it may be
SLOTS = 16  # that autoscaling counts on where their number is not given
UP_S, CALM_S = 10.0, 120.0  # seconds of load until a replica is added, and of calm until one goes
TOLD_S = 2.0  # between two counts of the load
SCALED_DRAIN_S = 3600.0  # that a replica which is not needed any more has for its answers, however long they are


class Router(RequestRouter):
    """Sends each call where it says. Serve asks the replicas that are left where one is full or gone.

    Not in the module of Call: in another process Serve makes this class anew, with all that its module defines.
    """

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        there = {one.replica_id.unique_id: one for one in candidate_replicas}
        call = _call(pending_request)
        order = list(there) if call is None or call.order is None else call.order(list(there))
        return [[there[name]] for name in order]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        call = _call(pending_request)
        if call is not None and call.sent is not None:
            call.sent(replica_id.unique_id)


def _call(request: PendingRequest | None) -> Call | None:
    return next((one for one in request.args if isinstance(one, Call)), None) if request is not None else None


@dataclass(frozen=True)
class Fleet:
    """What is to run. setup: of each replica's engine, in its process. slots: of each.

    replicas: that read prompts, and answer unless there are decoders. most: to which Serve may add replicas of each
    kind under load; None: their numbers stay. drain_s: seconds that a replica's requests have to end when it is to go.
    needs: what Ray reserves for each, as `ray_actor_options`. job: of the program that asks them, by Ray's id; they end
    with it. None: they stay.
    """

    setup: Setup
    slots: Slots
    replicas: int
    decoders: int
    most: int | None
    drain_s: float
    needs: Mapping[str, Any]
    job: str | None = None

    def readers(self) -> Application:
        """As Serve takes it."""
        return self._application("prefill" if self.decoders else "engine", self.replicas)

    def answerers(self) -> Application | None:
        """The same for those that only answer."""
        return self._application("decode", self.decoders) if self.decoders else None

    def _application(self, name: str, count: int) -> Application:
        scale: dict[str, Any] = {"num_replicas": count}
        if self.most is not None:
            target = float(self.slots.most or SLOTS)
            scale = {
                "num_replicas": None,
                "autoscaling_config": AutoscalingConfig(
                    min_replicas=count,
                    max_replicas=max(count, self.most),
                    target_ongoing_requests=target,
                    upscale_delay_s=UP_S,
                    downscale_delay_s=CALM_S,
                    look_back_period_s=UP_S,
                    metrics_interval_s=TOLD_S,
                ),
            }
        deployment: Any = Replica
        router: Any = Router
        return deployment.options(
            name=name,
            max_ongoing_requests=AT_ONCE,
            graceful_shutdown_timeout_s=self.drain_s,
            graceful_shutdown_wait_loop_s=0.2,
            ray_actor_options=dict(self.needs),
            request_router_config=RequestRouterConfig(request_router_class=router),
            logging_config=LoggingConfig(log_level="WARNING", enable_access_log=False),
            **scale,
        ).bind(self.setup, self.slots, self.job)


def measured_tile(setup: Setup, needs: Mapping[str, Any], most_ms: float, *, given: bool) -> tuple[int, int]:
    """The usual tile size, and the one with which answers wait for most_ms at most, timed where a replica may be.

    Replicas have one size, since bits depend on it. given: no other may be taken. Raises UsageError where none fits.
    """
    task = ray.remote(max_calls=1, **needs)(_sizes_of)  # its process goes, with the model
    try:
        return ray.get(task.remote(setup, most_ms, given))
    except RayTaskError as err:
        if isinstance(err.cause, XlstmRayError):
            raise err.cause from None
        raise


def _sizes_of(setup: Setup, most_ms: float, given: bool) -> tuple[int, int]:
    engine = Engine(setup)
    try:
        return engine.numerics.tile_size, tile_of(engine, most_ms, given=given)
    finally:
        engine.close()


@contextmanager
def running(fleet: Fleet, name: str) -> Iterator[Remote]:
    """Replicas, until the block ends. name: what Serve's applications begin with. Raises RayError where they do not

    start. If the head goes, the Remote has failed.
    """
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    context = ray.get_runtime_context()
    fleet, mark, names = replace(fleet, job=context.get_job_id()), token_hex(3), []
    had = serve.status().applications
    serve.start(proxy_location="Disabled")  # this process takes the requests
    remote: Remote | None = None
    try:
        handles: dict[str, Any] = {"prefill": None, "decode": None}
        kinds = {"prefill": fleet.readers(), "decode": fleet.answerers()}
        for kind, application in kinds.items():
            if application is not None:
                names.append(f"{name}-{mark}-{kind}")
                try:
                    handles[kind] = serve.run(application, name=names[-1], route_prefix=None)
                except RuntimeError:
                    raise RayError(f"replicas did not start: {_why(names[-1])}") from None
        remote = Remote(fleet.setup, handles["prefill"], handles["decode"])
        watching = remote.run(remote.watch(Presence(context.gcs_address)))
        try:
            yield remote
        finally:
            if not watching.cancel():
                watching.result()  # the head is gone, or this is where a bug shows
            remote.close()
    finally:
        if remote is not None and remote.failed is not None:
            pass  # nobody is there to be asked
        elif had:
            for one in names:
                serve.delete(one)
        else:
            serve.shutdown()


def _why(name: str) -> str:
    """What Serve says about an application that has failed: the last line of a traceback that it quotes."""
    found = serve.status().applications.get(name)
    said = "" if found is None else "\n".join([found.message, *(one.message for one in found.deployments.values())])
    errors = [line for line in said.splitlines() if re.match(r"\S*Error\b", line)]
    return one_line(errors[-1] if errors else said)
