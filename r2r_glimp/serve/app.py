"""The HTTP application: routes, and nothing that is not about routes."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion

from r2r_glimp import __version__
from r2r_glimp.core import DataError
from r2r_glimp.pages import content_policy
from r2r_glimp.serve.errors import Refusal, add_error_handlers, error_body
from r2r_glimp.serve.limits import Guard, Limits
from r2r_glimp.serve.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    ErrorReply,
    TokenizeRequest,
)
from r2r_glimp.serve.service import Service
from r2r_glimp.serve.streaming import ClientGoneError, answer

PLAYGROUND = Path(__file__).with_name("playground.html")
NO_PLAYGROUND = "<!doctype html><title>r2r_glimp</title><p>r2r_glimp serves at <code>/v1</code>.\n"
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorReply, "description": description}
    for status, description in (
        (400, "the request cannot be met"),
        (401, "no valid API key"),
        (404, "no such model"),
        (408, "the body did not arrive in time"),
        (413, "the body is too large"),
        (415, "the body is not JSON"),
        (429, "the queue is full"),
        (431, "the headers are too large"),
        (500, "it failed while computing"),
        (503, "the engine takes no requests"),
        (504, "not finished in time"),
    )
}
_STREAM = {"text/event-stream": {"schema": {"type": "string"}}}


def create_app(service: Service, limits: Limits) -> FastAPI:
    """The application around a service; its worker runs while the application does."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.worker.start()
        yield
        await service.worker.stop()

    app = FastAPI(
        title="r2r_glimp",
        version=__version__,
        summary="A small and a large language model write one text together.",
        lifespan=lifespan,
        docs_url=None,  # these pages load scripts from elsewhere
        redoc_url=None,
        responses=_ERRORS,
    )
    app.add_middleware(Guard, limits=limits, metrics=service.worker.metrics)
    add_error_handlers(app)
    _add_generation(app, service)
    _add_tokens(app, service)
    _add_operations(app, service)
    return app


def _add_generation(app: FastAPI, service: Service) -> None:
    @app.post(
        "/v1/chat/completions",
        response_model=None,
        responses={200: {"model": ChatCompletion, "content": _STREAM}},
    )
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """Write the next message of a conversation."""
        arguments = body.chat_template_kwargs
        chosen = arguments.model_dump(exclude_none=True) if arguments else {}
        messages = [message.to_dict() for message in body.messages]
        return await generate(request, body, [messages], chosen)

    @app.post(
        "/v1/completions",
        response_model=None,
        responses={200: {"model": Completion, "content": _STREAM}},
    )
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continue texts, or lists of token ids."""
        return await generate(request, body, body.prompts, {})

    async def generate(request: Request, body: Any, prompts: list[Any], chosen: Any) -> Response:
        is_chat = isinstance(body, ChatRequest)
        prefix = "chatcmpl" if is_chat else "cmpl"
        job = await service.open(body, prompts, chosen, prefix=prefix)
        try:
            return await answer(request, job, "chat" if is_chat else "text")
        except ClientGoneError:
            return Response(status_code=499)  # nobody reads it

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The pair, and each of its models alone."""
        return {"object": "list", "data": [m.model_dump() for m in service.catalog.models]}

    @app.get("/v1/models/{name}", response_model=None, responses={200: {"model": Model}})
    async def model(name: str) -> dict[str, Any]:
        """One of them."""
        return service.catalog.card(name).model_dump()


def _add_tokens(app: FastAPI, service: Service) -> None:
    @app.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        """The ids of a text, or of messages in the chat template."""
        loaded = service.catalog.loaded(body.model)
        is_llm = loaded is not service.engine.pair.slm

        def encode() -> list[int]:
            if body.messages is not None:
                encoded = service.engine.encode([m.to_dict() for m in body.messages])
                return encoded.llm if is_llm else encoded.slm
            add = body.add_special_tokens
            return loaded.tokenizer(body.prompt, add_special_tokens=add)["input_ids"]

        ids = await service.in_thread(encode)
        return {"tokens": ids, "count": len(ids), "max_model_len": min(service.engine.room)}

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> dict[str, str]:
        """The text of token ids."""
        loaded = service.catalog.loaded(body.model)
        size = loaded.fingerprint.vocab_size
        bad = next((token for token in body.tokens if token >= size), None)
        if bad is not None:
            raise DataError(f"token ids must be 0 to {size - 1:,}: got {bad}")
        return {"prompt": await service.in_thread(loaded.tokenizer.decode, body.tokens)}


def _add_operations(app: FastAPI, service: Service) -> None:
    worker = service.worker

    @app.get("/", response_class=HTMLResponse)
    async def playground() -> HTMLResponse:
        """A page to talk with the pair."""
        page = PLAYGROUND.read_text(encoding="utf-8") if PLAYGROUND.is_file() else NO_PLAYGROUND
        # It may run its own script and talk to this server, and nothing else.
        policy = content_policy(page, "connect-src 'self'", "frame-ancestors 'none'")
        return HTMLResponse(page, headers={"Content-Security-Policy": policy})

    @app.get("/health")
    async def health() -> Response:
        """200 while the engine lives and moves."""
        alive = worker.health in ("ok", "draining")
        return JSONResponse({"status": worker.health}, 200 if alive else 503)

    @app.get("/ready")
    async def ready() -> Response:
        """200 while requests are taken."""
        try:
            worker.check()
        except Refusal as refusal:
            return JSONResponse(error_body(refusal), refusal.status, refusal.headers)
        return JSONResponse({"status": "ready"})

    @app.get("/metrics")
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(worker.metrics.render(), media_type="text/plain; version=0.0.4")

    @app.get("/version")
    async def version() -> dict[str, str]:
        """The version of r2r_glimp."""
        return {"version": __version__}
