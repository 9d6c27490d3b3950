"""The ASGI app: what is at which address."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from time import time
from typing import Any

from fastapi import Depends, FastAPI
from fastapi.requests import Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST

from xlstm_ray import __version__
from xlstm_ray.errors import UsageError, XlstmRayError
from xlstm_ray.serve.access import Access
from xlstm_ray.serve.answering import reply_to
from xlstm_ray.serve.body import fields_known, read_body, takes
from xlstm_ray.serve.desk import Desk
from xlstm_ray.serve.documents import Documents
from xlstm_ray.serve.fields import Body, Chat, Completion, Detokenize, Tokenize, read
from xlstm_ray.serve.gate import App, Gate
from xlstm_ray.serve.pages import add_pages
from xlstm_ray.serve.refusals import Refused
from xlstm_ray.serve.replies import Chats, Completions
from xlstm_ray.serve.states import add_states
from xlstm_ray.serve.work import Ask
from xlstm_ray.text.prompt import Prompt
from xlstm_ray.text.template import OWN, Template


def make_app(desk: Desk, documents: Documents | None, template: Template | None = None) -> App:
    """The app of a service. It has the engine when the desk opens. documents: None: it has none. template: of chats."""
    options, began = desk.options, int(time())
    fields = [Depends(fields_known)]
    # FastAPI's own pages of documentation load scripts from elsewhere.
    app = FastAPI(title="xlstm-ray", version=__version__, docs_url=None, redoc_url=None, dependencies=fields)
    app.state.desk = desk

    @app.exception_handler(Refused)
    async def refused(_request: Request, error: Refused) -> Response:
        return error.response()

    @app.exception_handler(XlstmRayError)
    async def wrong(_request: Request, error: XlstmRayError) -> Response:
        return Refused.of(error).response()

    @app.exception_handler(404)
    async def unknown(request: Request, _error: Exception) -> Response:
        return Refused(404, f"there is nothing at {request.scope['path'][:200]!r} here").response()

    @app.exception_handler(405)
    async def method(request: Request, _error: Exception) -> Response:
        return Refused(405, f"{request.scope['path'][:200]!r} takes no {request.method}").response()

    @app.exception_handler(500)
    async def fault(_request: Request, _error: Exception) -> Response:
        return Refused(500, "a fault of this program; its log has the traceback").response()

    @app.get("/health")
    @app.get("/ping")
    async def health() -> Response:
        """200 where requests are taken; 503 while the model is loaded, and while the service drains."""
        _ = desk.engine
        return JSONResponse({"status": "ok"})

    @app.get("/load")
    async def load(request: Request) -> Response:
        """What the service does now: its status, slots, cache and documents."""
        known = None if documents is None or not documents.restored else documents
        own = known and known.room(request.scope["tenant"])
        return JSONResponse({**desk.load(), "documents": own})

    @app.get("/version")
    async def version() -> Response:
        """The program's version."""
        return JSONResponse({"version": __version__})

    @app.get("/v1/models")
    async def models() -> Response:
        """The one model that there is."""
        return JSONResponse({"object": "list", "data": [model()]})

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> Response:
        desk.require_model(name)
        return JSONResponse(model())

    @app.post("/v1/completions", openapi_extra=takes(Completion))
    async def completions(request: Request) -> Response:
        """Texts that go on from prompts, as OpenAI's endpoint of this name."""
        engine = desk.engine
        body = read(Completion, await read_body(request, options.body_bytes))
        desk.require_model(body.model)
        prompts = body.prompts()
        bare = not body.add_special_tokens or body.state is not None  # a text after a state never has any
        if body.return_token_ids or (bare and body.state is None):
            cut = partial(encode, tenant=whose(request, body), bare=bare)
            prompts = [await asyncio.to_thread(cut, p) if isinstance(p, str) else p for p in prompts]
        ask = await ask_of(request, body, prompts)
        if body.echo:
            echo = [text if isinstance(text, str) else engine.decode(text or []) for text in body.prompts()]
            ask = replace(ask, echo=echo)
        return await reply_to(request, desk, body, ask, Completions(engine.decode))

    @app.post("/v1/chat/completions", openapi_extra=takes(Chat))
    async def chats(request: Request) -> Response:
        """The next message of a conversation, as OpenAI's endpoint of this name."""
        engine = desk.engine
        body = read(Chat, await read_body(request, options.body_bytes))
        desk.require_model(body.model)
        text = rendered(body.plain(), answer=body.add_generation_prompt, more=body.chat_template_kwargs)
        prompt: Prompt = text
        if body.state is None:
            prompt = await asyncio.to_thread(conversation, text, whose(request, body))
        elif body.return_token_ids:
            prompt = await asyncio.to_thread(partial(encode, tenant=whose(request, body), bare=True), text)
        return await reply_to(request, desk, body, await ask_of(request, body, [prompt]), Chats(engine.decode))

    @app.post("/tokenize", openapi_extra=takes(Tokenize))
    async def tokenize(request: Request) -> Response:
        """The tokens of a text or a conversation."""
        _ = desk.engine
        body = read(Tokenize, await read_body(request, options.body_bytes), {})
        desk.require_model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise Refused(400, "give `prompt` or `messages`", param="prompt")
        if body.messages is not None:
            plain = [message.plain() for message in body.messages]
            text = rendered(plain, answer=body.add_generation_prompt)
            tokens = await asyncio.to_thread(conversation, text, request.scope["tenant"])
        else:
            cut = partial(encode, tenant=request.scope["tenant"], bare=not body.add_special_tokens)
            tokens = await asyncio.to_thread(cut, body.prompt or "")
        return JSONResponse({"count": len(tokens), "max_model_len": None, "tokens": tokens})

    @app.post("/detokenize", openapi_extra=takes(Detokenize))
    async def detokenize(request: Request) -> Response:
        """The text of tokens."""
        engine = desk.engine
        body = read(Detokenize, await read_body(request, options.body_bytes), {})
        desk.require_model(body.model)
        return JSONResponse({"prompt": engine.decode(body.tokens)})

    @app.get("/tokenizer_info")
    async def tokenizer_info() -> Response:
        """The special tokens, and the template of chats."""
        engine = desk.engine
        config = engine.config
        ends = [token for token in engine.end_tokens if token < config.vocab_size]
        special = {
            "bos_token": None if config.bos_token_id is None else engine.decode([config.bos_token_id]),
            "eos_token": engine.decode(ends[:1]) if ends else None,
        }
        source = None if template is None else template.source
        return JSONResponse({**special, "vocab_size": config.vocab_size, "chat_template": source})

    @app.get("/metrics")
    async def metrics() -> Response:
        """Figures for Prometheus."""
        return Response(desk.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    def encode(text: str, *, tenant: str, bare: bool) -> list[int]:
        engine = desk.engine
        return engine.encode_more(text, tenant=tenant) if bare else engine.encode(text, tenant=tenant)

    def whose(request: Request, body: Body) -> str:
        """With whom a body's prompts share what is known."""
        tenant = str(request.scope["tenant"])
        return f"{tenant}/{body.cache_salt}" if body.cache_salt else tenant

    def rendered(messages: Sequence[Mapping[str, str]], *, answer: bool, more: dict[str, Any] | None = None) -> str:
        """The text of a conversation."""
        if template is None:
            raise Refused(
                400,
                "this model has no chat template: /v1/completions takes a plain text, and `xlstm-ray serve "
                "--chat-template FILE` gives a template",
                code="no_chat_template",
            )
        odd = next((name for name in more or {} if name in OWN), None)
        if odd is not None:
            raise Refused(400, f"`chat_template_kwargs` may not set {odd!r}", param="chat_template_kwargs")
        try:
            return template.render(messages, answer=answer, more=more)
        except UsageError as err:
            raise Refused(400, str(err), param="messages") from None

    def conversation(text: str, tenant: str) -> list[int]:
        """The tokens of a rendered conversation: its template writes special tokens itself."""
        return desk.engine.config.begun(encode(text, tenant=tenant, bare=True))

    async def ask_of(request: Request, body: Body, prompts: Sequence[Prompt | None]) -> Ask:
        tenant = request.scope["tenant"]
        sampling = body.sampling(desk.engine.published, options.answer_tokens)
        if body.state is not None and documents is None:
            raise Refused(400, "`state` is not served here: this service has no documents", param="state")
        state = None if body.state is None or documents is None else await documents.state(tenant, body.state)
        if state is not None and body.repetition_penalty not in (None, 1):
            text = "`repetition_penalty` needs the prompt's tokens, and a state does not have them; leave one out"
            raise Refused(400, text, param="repetition_penalty")
        return Ask(prompts, sampling, -body.priority, whose(request, body), state, scores=body.scores_asked())

    def model() -> dict[str, Any]:
        about = {"id": options.name, "object": "model", "created": began, "owned_by": "xlstm-ray"}
        return {**about, "max_model_len": None}  # a prompt may be of any length

    if documents is not None:
        add_states(app, desk, documents)
    add_pages(app)
    return Access(Gate(app, options), options.access_log)
