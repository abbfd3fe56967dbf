"""A small HTTP/1.1 client for load generation: streams as they come, time-stamped close to the socket.

One connection for each request, which the server is asked to close behind the answer: nothing is retried, nothing is reused,
what is measured is what happened. Does not know redirects, compression, proxies or cookies, nor what the bodies mean.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from quire.errors import ConfigError

MAX_HEAD_BYTES = 1 << 16
READ_BYTES = 1 << 16


class HttpError(Exception):
    """The connection, or what came over it, is not what HTTP promises. The message is short, so that errors can be counted."""


@dataclass(frozen=True)
class Target:
    """A server. `prefix` is the path of its URL, without a slash at the end; `headers` go with every request."""

    host: str
    port: int
    is_tls: bool = False
    prefix: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def from_url(cls, url: str, api_key: str | None = None) -> Target:
        """`http://host:port`, with or without a /v1 at the end. Raises ConfigError for what is no such URL."""
        try:
            parts = urlsplit(url if "://" in url else f"http://{url}")
            port = parts.port
        except ValueError as error:
            raise ConfigError(f"url {url!r}: {error}") from error
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"url {url!r} is not of the form http://host:port")
        is_tls = parts.scheme == "https"
        headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        prefix = parts.path.rstrip("/").removesuffix("/v1")
        return cls(parts.hostname, port or (443 if is_tls else 80), is_tls, prefix, headers)

    @contextlib.asynccontextmanager
    async def open(self, method: str, path: str, body: bytes = b"") -> AsyncIterator[Response]:
        """Sends a request; gives its response when the head of it is there. Raises HttpError or OSError."""
        context = ssl.create_default_context() if self.is_tls else None
        reader, writer = await asyncio.open_connection(self.host, self.port, ssl=context, limit=MAX_HEAD_BYTES)
        try:
            writer.write(self._head(method, path, len(body)) + body)
            yield await _read_head(reader)
        finally:
            writer.close()

    def _head(self, method: str, path: str, num_bytes: int) -> bytes:
        host = f"[{self.host}]" if ":" in self.host else self.host
        headers = {"Host": f"{host}:{self.port}", "Connection": "close", **self.headers}
        if num_bytes:
            headers |= {"Content-Type": "application/json", "Content-Length": str(num_bytes)}
        lines = [f"{method} {self.prefix}{path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


class Response:
    """The status and headers (lower case) of an answer; its body is still on the way."""

    def __init__(self, status: int, headers: Mapping[str, str], reader: asyncio.StreamReader) -> None:
        self.status = status
        self.headers = headers
        self._reader = reader

    async def pieces(self) -> AsyncIterator[bytes]:
        """The body, as it arrives. Raises HttpError if it ends before it is complete."""
        chunked = ChunkedDecoder() if "chunked" in self.headers.get("transfer-encoding", "").lower() else None
        length = self.headers.get("content-length")
        left = int(length) if length is not None and length.isdecimal() and chunked is None else None
        while left != 0 and not (chunked and chunked.is_complete):
            data = await self._reader.read(READ_BYTES if left is None else min(left, READ_BYTES))
            if not data:
                if left or chunked:
                    raise HttpError("the connection was closed in the middle of an answer")
                return
            if left is not None:
                left -= len(data)
            yield chunked.feed(data) if chunked else data

    async def read(self) -> bytes:
        """The whole body."""
        return b"".join([piece async for piece in self.pieces()])

    async def events(self) -> AsyncIterator[tuple[float, bytes]]:
        """The data of server-sent events, each one line, with the time (`time.perf_counter`) at which it was read."""
        rest = b""
        async for piece in self.pieces():
            now_s = time.perf_counter()
            *lines, rest = (rest + piece).split(b"\n")
            for line in lines:
                if line.startswith(b"data:"):
                    yield now_s, line[5:].strip()


async def _read_head(reader: asyncio.StreamReader) -> Response:
    try:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    except asyncio.IncompleteReadError as error:
        raise HttpError("the connection was closed without an answer") from error
    except asyncio.LimitOverrunError as error:
        raise HttpError("the head of the answer is too long") from error
    first, *lines = head.split("\r\n")
    version, _, status = first.partition(" ")
    if not version.startswith("HTTP/1.") or not status[:3].isdecimal():
        raise HttpError("the answer is not HTTP/1")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines if line)}
    return Response(int(status[:3]), headers, reader)


class ChunkedDecoder:
    """Takes the bytes of a chunked body as they arrive, gives what is in its complete chunks.

    feed(b"5\\r\\nhello\\r\\n3\\r\\nyo") -> b"hello";  feed(b"u\\r\\n0\\r\\n\\r\\n") -> b"you", is_complete
    """

    def __init__(self) -> None:
        self.is_complete = False
        self._buffer = b""

    def feed(self, data: bytes) -> bytes:
        """Raises HttpError for what is not a chunk. What follows the last chunk (trailers) is not looked at."""
        buffer, at, found = self._buffer + data, 0, []
        while (end := buffer.find(b"\r\n", at)) >= 0:
            try:
                size = int(buffer[at:end].partition(b";")[0], 16)
            except ValueError as error:
                raise HttpError("the answer is badly chunked") from error
            if size == 0:
                self.is_complete = True
                break
            begin = end + 2
            if len(buffer) < begin + size + 2:
                break
            found.append(buffer[begin : begin + size])
            at = begin + size + 2
        self._buffer = buffer[at:]
        return b"".join(found)
