"""xLSTM over HTTP on Ray Serve: what rayservice.yaml runs, a model a replica. Needs `pip install '.[rayserve]'`.

    serve run deploy.serve_app:build model=DIR token_file=FILE          (on a head that is up; RUNBOOK.md, "Kubernetes")
    curl -N -H @HEADER_WITH_THE_TOKEN -d '{"prompt": "The capital of France is"}' http://127.0.0.1:8000/

The answer is the text, piece by piece. A replica works on one request at a time, since prefill uses the whole device;
a few more wait, and others get 503. Serve's proxy has no authentication, so this app asks for a token itself.
"""

import asyncio
import hmac
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from threading import Event, Lock

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from ray import serve
from ray.serve import Application
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse

from xlstm_ray import load
from xlstm_ray.errors import XlstmRayError


class Options(BaseModel):
    """The arguments of `build`: model directory (none: the demo model), device, and the file with the token."""

    model_config = ConfigDict(extra="forbid")

    model: Path | None = None
    device: str = "auto"
    token_file: Path


class Question(BaseModel):
    """The body of a request. Greedy unless temperature, top_p or a seed is given."""

    model_config = ConfigDict(extra="forbid")

    prompt: str
    max_new_tokens: int = Field(64, ge=1, le=4096)
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None


@serve.deployment(max_ongoing_requests=1, max_queued_requests=16)
class Generate:
    """One model on one device."""

    def __init__(self, options: Options):
        self.token = options.token_file.read_text().strip()
        if not self.token:
            raise ValueError(f"{options.token_file} is empty: it must hold the token that callers give")
        self.engine = load(options.model, device=options.device)
        self.lock = Lock()  # a request without its caller ends at its next tile; the next request waits for that

    async def __call__(self, request: Request) -> Response:
        """POST a Question -> 200 and a stream of text; 400 for a mistake in it, 401 without the token."""
        given = request.headers.get("authorization", "")
        if not hmac.compare_digest(given.encode(), f"Bearer {self.token}".encode()):
            return PlainTextResponse("give the token: Authorization: Bearer TOKEN\n", 401)
        gone = Event()
        try:
            question = Question.model_validate_json(await request.body())
            pieces = await asyncio.to_thread(self._start, question, gone)
        except (ValidationError, XlstmRayError) as error:
            return PlainTextResponse(f"{error}\n", 400)
        except asyncio.CancelledError:
            gone.set()
            raise
        return StreamingResponse(self._stream(pieces, gone), media_type="text/plain; charset=utf-8")

    def _start(self, question: Question, gone: Event) -> Iterator[str]:
        """The prefill, and an iterator over what is then generated."""
        with self.lock:
            return iter(self.engine.generate(**question.model_dump(), should_stop=gone.is_set))

    async def _stream(self, pieces: Iterator[str], gone: Event) -> AsyncIterator[str]:
        def step() -> str | None:
            with self.lock:
                return next(pieces, None)

        try:
            while (piece := await asyncio.to_thread(step)) is not None:
                yield piece
        finally:
            gone.set()


def build(options: Options) -> Application:
    """What Serve imports."""
    return Generate.bind(options)
