"""Every error as OpenAI's clients expect it: {"error": {"message", "type", "param", "code"}}, with the right status.

The clients send 408, 409, 429 and every 5xx again: a failure that would happen again is none of these.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from quire.errors import EngineDeadError, ModelError, QuireError, RequestError

INVALID, AUTHENTICATION, NOT_FOUND, RATE_LIMIT, SERVER = (
    "invalid_request_error",
    "authentication_error",
    "not_found_error",
    "rate_limit_error",
    "server_error",
)
RETRY_AFTER_S = "1"
MAX_MESSAGE_CHARS = 1000


class ApiError(QuireError):
    """An error with everything that its response says."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = INVALID,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.kind, self.param, self.code = status, kind, param, code
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        # a message may quote what came in, lone surrogates included, and those have no UTF-8
        message = str(self)[:MAX_MESSAGE_CHARS].encode("utf-8", "replace").decode()
        param = None if self.param is None else self.param[:200].encode("utf-8", "replace").decode()
        return {"error": {"message": message, "type": self.kind, "param": param, "code": self.code}}


def queue_full(max_queue: int) -> ApiError:
    return ApiError(
        429,
        f"{max_queue} requests are waiting already: try again later",
        kind=RATE_LIMIT,
        code="queue_full",
        headers={"Retry-After": RETRY_AFTER_S},
    )


def context_overflow(message: str, param: str) -> ApiError:
    return ApiError(400, message, param=param, code="context_length_exceeded")


def no_such_request(request_id: str) -> ApiError:
    """Unknown, finished, or another key's: which of these is not told."""
    return ApiError(
        404,
        f"there is no request {request_id[:200]!r} of yours here that runs",
        kind=NOT_FOUND,
        param="request_id",
        code="request_not_found",
    )


def not_supported(what: str, param: str) -> ApiError:
    return ApiError(400, f"{what} is not supported yet", param=param, code="unsupported_parameter")


def request_failed(message: str) -> ApiError:
    """It failed inside a step, and would again."""
    return ApiError(400, f"this request could not be computed: {message}", code="request_failed")


def as_api_error(error: Exception) -> ApiError:
    """Any exception as what the client is told of it."""
    match error:
        case ApiError():
            return error
        case RequestError():
            return ApiError(400, str(error), param=error.param)
        case EngineDeadError():
            return ApiError(
                503, str(error), kind=SERVER, code="engine_unavailable", headers={"Retry-After": RETRY_AFTER_S}
            )
        case ModelError():  # the model has no chat template, say: for this model the request is wrong
            return ApiError(400, str(error), code="model_error")
        case RequestValidationError():
            return _validation_error(error.errors())
        case HTTPException():
            return _http_error(error)
    return ApiError(500, "the server made a mistake; its log has the details", kind=SERVER, code="internal_error")


def error_response(error: Exception) -> Response:
    told = as_api_error(error)
    return Response(msgspec.json.encode(told.body), told.status, told.headers, "application/json")


def error_event(error: Exception) -> bytes:
    """The same in the middle of a stream; it ends there."""
    return b"data: " + msgspec.json.encode(as_api_error(error).body) + b"\n\n"


def install(app: FastAPI) -> None:
    """Makes `app` answer every exception like this."""

    async def handle(request: Request, error: Exception) -> Response:
        told = as_api_error(error)
        # for the log, without the message: that may quote a prompt
        request.state.record.error = " ".join(filter(None, (told.code or told.kind, told.param)))
        return error_response(told)

    for kind in (QuireError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, handle)


def _http_error(error: HTTPException) -> ApiError:
    kinds = {401: AUTHENTICATION, 404: NOT_FOUND, 429: RATE_LIMIT}
    kind = kinds.get(error.status_code, INVALID if error.status_code < 500 else SERVER)
    return ApiError(error.status_code, str(error.detail), kind=kind, headers=error.headers)


def _validation_error(found: Sequence[Any]) -> ApiError:
    """The first of what pydantic found. `loc` is ("body", field, …, and the names of union members)."""
    first: dict[str, Any] = found[0] if found else {"loc": (), "msg": "the request is not valid", "type": ""}
    loc = [str(part) for part in first["loc"] if part not in ("body", "query", "path")]
    if first["type"] == "extra_forbidden":
        name = ".".join(loc)
        return ApiError(400, f"unknown field {name[:200]!r}", param=name, code="unknown_parameter")
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {first.get('ctx', {}).get('error', first['msg'])}")
    if not loc:
        return ApiError(400, "the body must be a JSON object, with content-type application/json")
    # of a field that may be of several types, each member has its own complaint: the field's name says enough
    messages = dict.fromkeys(error["msg"] for error in found if [str(part) for part in error["loc"]][1:2] == loc[:1])
    return ApiError(400, f"{loc[0]}: {'; or '.join(messages)}", param=loc[0])
