"""The application: which path is answered by what. Start reading here.

Gate (id, key, size, log) ──> route ──> completions.py, chat.py, fork.py ──> generation.py ──> EngineClient
                                 errors.py: whatever goes wrong, in one form
"""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, Response

from quire.engine.client import Health
from quire.server import errors
from quire.server.chat import create_chat_completion, encode_chat
from quire.server.completions import create_completion
from quire.server.errors import SERVER, ApiError, no_such_request
from quire.server.fork import create_fork
from quire.server.gate import Gate
from quire.server.generation import Service, engine_id
from quire.server.keys import Keys
from quire.server.logs import RequestLog, RequestRecord
from quire.server.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    ErrorBody,
    ForkRequest,
    TokenizeRequest,
)
from quire.version import __version__

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody} for status in (400, 401, 404, 405, 413, 429, 500, 503)
}


def create_app(service: Service, keys: Keys) -> Gate:
    """The whole application around one served model."""
    app = FastAPI(
        title="Quire",
        version=__version__,
        docs_url=None,  # its pages load scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
        responses=ERRORS,
    )
    errors.install(app)
    _add_generation(app, service)
    _add_requests(app, service, hides_others=len(keys.names) > 1)
    _add_models(app, service)
    _add_tokens(app, service)
    _add_state(app, service)
    _describe_errors(app)
    options = service.options
    log = RequestLog(
        enabled=options.log_requests, as_json=options.log_format == "json", with_prompts=options.log_prompts
    )

    def on_end(record: RequestRecord) -> None:
        if record.status >= 400:
            service.metrics.errors[str(record.status)] += 1
        log.write(record)

    return Gate(app, keys=keys.keys, max_body_bytes=options.max_body_bytes, on_end=on_end, clock=service.clock)


def _add_generation(app: FastAPI, service: Service) -> None:
    @app.post("/v1/completions", response_class=JSONResponse)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continues prompts."""
        return await create_completion(service, body, request)

    @app.post("/v1/chat/completions", response_class=JSONResponse)
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """Continues a conversation."""
        return await create_chat_completion(service, body, request)


def _add_requests(app: FastAPI, service: Service, *, hides_others: bool) -> None:
    @app.post("/v1/fork", response_class=JSONResponse)
    async def fork(body: ForkRequest, request: Request) -> Response:
        """Branches of a completion that runs."""
        return await create_fork(service, body, request)

    @app.delete("/v1/requests/{request_id}")
    async def delete(request_id: str, request: Request) -> dict[str, Any]:
        """Ends a request or a branch: it is told what there is, with the finish_reason "abort"."""
        found = service.running(request_id, request.state.record.owner)
        ended = [await service.client.abort(job.request_id) for job in found.jobs]
        if not any(ended):
            raise no_such_request(request_id)
        return {"id": request_id, "object": "request", "deleted": True}

    @app.get("/v1/requests/{request_id}/explain")
    async def explain(request_id: str, request: Request) -> dict[str, Any]:
        """Why a request took its time: one that runs, or one of the last that did."""
        internal = engine_id(request_id)
        if internal is None:
            raise no_such_request(request_id)
        owner = request.state.record.owner
        found = await service.client.explain(internal, owner, with_others=not hides_others)
        if found is None:
            raise no_such_request(request_id)
        return found


def _add_models(app: FastAPI, service: Service) -> None:
    began = int(service.wall_clock())

    def card(name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": began,
            "owned_by": "quire",
            "root": service.client.config.model_name,
            "parent": None,
            "max_model_len": service.max_model_len,
        }

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The model that is served, by each of its names."""
        return {"object": "list", "data": [card(name) for name in service.names]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        service.check_model(name)
        return card(name)


def _add_tokens(app: FastAPI, service: Service) -> None:
    @app.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        """Token ids of a prompt, or of messages in the model's chat template."""
        service.check_model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise ApiError(400, "give either prompt or messages", param="prompt")
        if body.prompt is not None:
            (ids,) = await service.encode([body.prompt], add_special_tokens=body.add_special_tokens is not False)
        else:
            _, ids = await encode_chat(service, body)
        found: dict[str, Any] = {"count": len(ids), "max_model_len": service.max_model_len, "tokens": ids}
        if body.return_token_strs:
            tokenizer = service.need_tokenizer("token strings", "return_token_strs")
            found["token_strs"] = [tokenizer.token(token_id) for token_id in ids]
        return found

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> dict[str, Any]:
        """The text of token ids, special ones too."""
        service.check_model(body.model)
        tokenizer = service.need_tokenizer("detokenizing", "tokens")
        beyond = [token_id for token_id in body.tokens if token_id >= service.client.info.vocab_size]
        if beyond:
            raise ApiError(400, f"token id {beyond[0]} is outside the vocabulary", param="tokens")
        return {"prompt": await asyncio.to_thread(tokenizer.decode, body.tokens, skip_special_tokens=False)}


def _add_state(app: FastAPI, service: Service) -> None:
    @app.get("/version")
    async def version() -> dict[str, str]:
        return {"version": __version__}

    @app.get("/health")
    async def health() -> dict[str, str]:
        """200 while steps come back; 503 when the engine is starting, stuck or dead."""
        state = service.client.health
        if state is not Health.OK:
            raise ApiError(503, f"the engine is {state.value}", kind=SERVER, code=f"engine_{state.value}")
        return {"status": state.value}

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(await service.metrics.render(), media_type=METRICS_TYPE)


def _describe_errors(app: FastAPI) -> None:
    """FastAPI describes its own 422, which never leaves this server."""
    schema = app.openapi()
    for path in schema["paths"].values():
        for operation in path.values():
            operation.get("responses", {}).pop("422", None)
