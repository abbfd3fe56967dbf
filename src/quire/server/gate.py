"""What every request passes first: its id, its key, the size of its body; and last: what is to be known of it.

Plain ASGI, so that nothing stands between a handler and the news that its client has gone. Does not know what a route does.
"""

from __future__ import annotations

import hmac
import logging
import time
from collections.abc import Callable, Sequence
from uuid import uuid4

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from quire.server.errors import AUTHENTICATION, ApiError, as_api_error, error_response
from quire.server.keys import ApiKey, digest
from quire.server.logs import RequestRecord

logger = logging.getLogger(__name__)

OPEN_PATHS = ("/health",)


class Gate:
    """Wraps an application. `keys`: of which a request must bring one, by "Authorization: Bearer …"; none asks for none. The
    record of a request says by the key's name whose it is. `on_end` hears of every request when its answer is out."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: Sequence[ApiKey],
        max_body_bytes: int,
        on_end: Callable[[RequestRecord], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._app = app
        self._keys = keys
        self._max_body_bytes = max_body_bytes
        self._on_end = on_end
        self._clock = clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close", "code": 1008})  # nothing here speaks anything else
        record = RequestRecord(f"req-{uuid4().hex}", scope["method"], scope["path"], self._clock())
        # send_body: past everybody, for who has thousands of pieces to send when the answer has begun
        scope.setdefault("state", {}).update(record=record, send_body=send)

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = record.request_id
            await send(message)

        try:
            refusal = self._refuse(scope, record)
            if refusal is not None:
                record.error = str(refusal)
                await error_response(refusal)(scope, receive, send_with_id)
            else:
                await self._app(scope, self._limited(receive), send_with_id)
        except Exception as error:
            # the application has told the client, as far as it could
            logger.exception("%s failed", record.request_id)
            record.error = repr(error)
            if not record.status:
                await error_response(error)(scope, receive, send_with_id)
        finally:
            scope["state"].pop("send_body", None)  # its owner holds the scope: a cycle would wait for the collector
            record.elapsed_s = self._clock() - record.began_s
            self._on_end(record)

    def _refuse(self, scope: Scope, record: RequestRecord) -> ApiError | None:
        headers = Headers(scope=scope)
        owner = self._owner(headers.get("authorization", "")) if self._keys else ""
        record.owner = owner or ""
        if owner is None and scope["path"] not in OPEN_PATHS:
            return ApiError(
                401,
                'this server asks for an API key: send it as "Authorization: Bearer KEY"',
                kind=AUTHENTICATION,
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        length = headers.get("content-length", "0")
        if length.isascii() and length.isdigit() and int(length[:20]) > self._max_body_bytes:
            return as_api_error(self._too_large())
        return None

    def _owner(self, authorization: str) -> str | None:
        """The name of the key, None without one."""
        scheme, _, key = authorization.partition(" ")
        given = digest(key.strip())
        # all of them are compared, each in constant time: how long it takes tells nothing
        matches = [key.name for key in self._keys if hmac.compare_digest(given, key.digest)]
        return matches[0] if scheme.lower() == "bearer" and matches else None

    def _too_large(self) -> HTTPException:
        return HTTPException(413, f"the body has more than {self._max_body_bytes} bytes")

    def _limited(self, receive: Receive) -> Receive:
        """A body without content-length is counted as it comes."""
        num_bytes = 0

        async def receive_counted() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self._max_body_bytes:
                raise self._too_large()
            return message

        return receive_counted
