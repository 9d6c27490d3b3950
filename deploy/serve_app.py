"""The service of `xlstm-ray serve` on Ray Serve: what rayservice.yaml runs, a model a replica.

    serve run deploy.serve_app:build model=DIR token_file=FILE          (on a head that is up; RUNBOOK.md, "Kubernetes")
    curl -H @HEADER_WITH_THE_TOKEN -d '{"prompt": "The capital of France is"}' http://127.0.0.1:8000/v1/completions

Needs `pip install '.[serve,rayserve]'`. Serve's proxy has no authentication, so the app asks for a token itself. It
has no documents (/v1/states): they would be in one replica, and Serve asks any of them.
"""

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict
from ray import serve
from ray.serve import Application

from xlstm_ray import load
from xlstm_ray.serve import options as service
from xlstm_ray.serve.app import make_app
from xlstm_ray.serve.desk import Desk
from xlstm_ray.serve.template import find_template


class Options(BaseModel):
    """The arguments of `build`: model directory (none: the demo model), device, and the file with the token."""

    model_config = ConfigDict(extra="forbid")

    model: Path | None = None
    device: str = "auto"
    token_file: Path


@serve.deployment(max_ongoing_requests=64, max_queued_requests=256)
@serve.ingress()
class Generate:
    """One model on one device, for many requests at once."""

    def __init__(self, options: Options):
        name = "demo" if options.model is None else options.model.name
        keys = service.read_keys(options.token_file)
        self.engine = load(options.model, device=options.device)
        self.desk = Desk(service.Options(host="0.0.0.0", keys=keys, name=name))  # Serve's proxy is what listens
        self.desk.open(self.engine, self.engine.serve())

    def __serve_build_asgi_app__(self) -> Any:
        return make_app(self.desk, None, find_template(self.engine.model_path, None))

    def check_health(self) -> None:
        """Serve replaces a replica that raises here."""
        if self.engine.failed is not None:
            raise self.engine.failed


def build(options: Options) -> Application:
    """What Serve imports."""
    return Generate.bind(options)
