"""Answers that end when their client goes, whether they are streamed or not. Does not know what is in them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from quire.errors import QuireError
from quire.server.errors import error_event
from quire.server.logs import RequestRecord

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

DONE = b"data: [DONE]\n\n"
GONE_STATUS = 499  # for the log: nobody reads it


def event(content: object) -> bytes:
    """One server-sent event."""
    return b"data: " + msgspec.json.encode(content) + b"\n\n"


MARK = "\0"  # nothing that a server writes by itself has a NUL in it


class EventTemplate:
    """An event that is sent again and again with other values in it: written down once, with MARKs where those go.

    EventTemplate({"id": 7, "text": MARK}).fill("a") -> what event({"id": 7, "text": "a"}) gives
    """

    def __init__(self, content: object) -> None:
        self._format = event(content).replace(b"%", b"%%").replace(msgspec.json.encode(MARK), b"%b")

    def fill(self, *values: object) -> bytes:
        """One for each MARK, in their order."""
        return self._format % tuple(map(msgspec.json.encode, values))


class ClientGoneError(Exception):
    """The client has closed its connection."""


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """Does `work`, but cancels it and raises ClientGoneError as soon as the client goes."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_wait_until_gone(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGoneError
        return task.result()
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _wait_until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class GoneResponse(Response):
    """For a client that is not there any more."""

    def __init__(self) -> None:
        super().__init__(status_code=GONE_STATUS)


class EventStream(Response):
    """Server-sent events: `first`, then what `events` yields, several at a time where they come together.

    An error among them is told, and ends the stream. The body goes straight to the server: whoever stands between here and
    there looks at the beginning of an answer alone, and a stream has thousands of pieces.
    """

    media_type = "text/event-stream"

    def __init__(self, first: bytes, events: AsyncGenerator[bytes, None], record: RequestRecord) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._first = first
        self._events = events
        self._record = record

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_gone(receive, self._stream(send, scope["state"]["send_body"]))
        except (ClientGoneError, OSError):
            self._record.error = "the client went away"

    async def _stream(self, send: Send, send_body: Send) -> None:
        async with aclosing(self._events) as events:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await send_body({"type": "http.response.body", "body": self._first, "more_body": True})
            try:
                async for event in events:
                    await send_body({"type": "http.response.body", "body": event, "more_body": True})
            except (OSError, asyncio.CancelledError):
                raise
            except Exception as error:
                if not isinstance(error, QuireError):
                    logger.exception("%s failed in the middle of its stream", self._record.request_id)
                self._record.error = str(error)
                await send_body({"type": "http.response.body", "body": error_event(error), "more_body": True})
            await send_body({"type": "http.response.body", "body": b"", "more_body": False})


async def start_stream(receive: Receive, events: AsyncGenerator[bytes, None], record: RequestRecord) -> Response:
    """Waits for the first event, so that what goes wrong before it has a status of its own."""
    try:
        first = await unless_gone(receive, anext(events))
    except ClientGoneError:
        record.error = "the client went away"
        return GoneResponse()
    except StopAsyncIteration:
        first = DONE
    return EventStream(first, events, record)
