"""The service of `xlstm-ray serve --replicas` behind Ray Serve's own proxy: what rayservice.yaml runs.

    serve run deploy.serve_app:build model=DIR token_file=FILE          (on a head that is up; RUNBOOK.md, "Kubernetes")
    curl -H @HEADER_WITH_THE_TOKEN -d '{"prompt": "The capital of France is"}' http://127.0.0.1:8000/v1/completions

Needs `pip install '.[serve]'`. One ingress takes requests: it checks them, cuts them into tokens, and sends each to the
replica that has read its beginning. Serve's proxy has no authentication, so the ingress asks for a token itself.
"""

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator
from ray import serve
from ray.serve import Application

from xlstm_ray.choose import Setup, setup_of
from xlstm_ray.files import MIB
from xlstm_ray.serve.app import make_app
from xlstm_ray.serve.desk import Desk
from xlstm_ray.serve.documents import Documents
from xlstm_ray.serve.fleet import AT_ONCE, Fleet, measured_tile
from xlstm_ray.serve.options import Options as ServiceOptions
from xlstm_ray.serve.options import Slots, read_keys
from xlstm_ray.serve.remote import Remote
from xlstm_ray.serve.shelf import Shelf
from xlstm_ray.text.template import find_template


class Options(BaseModel):
    """The arguments of `build`.

    model: its directory on every node (none: the demo model). name: in requests. token_file: keys of callers.
    cache_dir: of states and documents, the same on every node. replicas: that read and answer; with decoders, they only
    read. max_replicas: to which Serve may add of each kind. settings: more settings of the engine, by name. drain_s:
    seconds that requests have to end. max_stall_ms: answers wait no longer than this for a prompt: the tile is timed
    once, where a replica may be. num_cpus, num_gpus: of each replica.
    """

    model_config = ConfigDict(extra="forbid")

    model: Path | None = None
    name: str | None = None
    device: str = "auto"
    token_file: Path
    cache_dir: Path | None = None
    slots: int | None = None
    replicas: int = 2
    decoders: int = 0
    max_replicas: int | None = None
    settings: dict[str, Any] = {}
    states_mb: int = Field(4096, ge=1)
    drain_s: float = 60.0
    max_stall_ms: float | None = None
    num_cpus: float = 1
    num_gpus: float = 0

    @field_validator("settings")
    @classmethod
    def _each_once(cls, settings: dict[str, Any]) -> dict[str, Any]:
        for name in settings:
            if name in cls.model_fields:
                raise ValueError(f"{name} is an argument of its own; take it out of the settings")
        return settings


@serve.deployment(max_ongoing_requests=AT_ONCE)
@serve.ingress()
class Ingress:
    """Takes the requests of all callers; it has no model."""

    async def __init__(self, options: Options, setup: Setup, readers: Any, decoders: Any):
        name = options.name or ("demo" if options.model is None else options.model.name)
        folder = None if options.cache_dir is None else options.cache_dir / "documents"
        # Serve's proxy is what listens.
        service = ServiceOptions(host="0.0.0.0", keys=read_keys(options.token_file), name=name, folder=folder)
        self.desk = Desk(service)
        self.documents = Documents(self.desk, Shelf(folder), options.states_mb * MIB)
        self.template = find_template(setup.model, None)
        await self.documents.restore()
        remote = Remote(setup, readers, decoders)
        self.desk.open(remote, remote.slots * (options.decoders or options.replicas))
        await self.documents.go_on()

    def __serve_build_asgi_app__(self) -> Any:
        return make_app(self.desk, self.documents, self.template)


def build(options: Options) -> Application:
    """What Serve imports."""
    given = {"model": options.model, "device": options.device, "cache_dir": options.cache_dir, **options.settings}
    setup, needs = setup_of(**given), {"num_cpus": options.num_cpus, "num_gpus": options.num_gpus}
    if options.max_stall_ms is not None:
        _, tile = measured_tile(setup, needs, options.max_stall_ms, given="tile_size" in options.settings)
        setup = setup_of(**{**given, "tile_size": tile})
    numbers = options.replicas, options.decoders, options.max_replicas
    fleet = Fleet(setup, Slots(options.slots), *numbers, options.drain_s, needs)
    return Ingress.bind(options, setup, fleet.readers(), fleet.answerers())
