"""A pretend OpenAI-compatible server for tests of clients: it streams what a script says, in a thread of its own."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Reply:
    """What one request gets. status other than 200: `message` as an error. ends_early: no [DONE]. breaks: an error event."""

    tokens: list[str] = field(default_factory=lambda: ["a", "b", "c"])
    pause_s: float = 0.0
    status: int = 200
    message: str = ""
    ends_early: bool = False
    breaks: bool = False
    cached: int = 0
    with_usage: bool = True


Behave = Callable[[str, Mapping[str, Any], int], Reply]


class SseServer:
    """Use as a context manager. `behave(path, body, how many requests came before)` gives the reply.

    bodies: of all POSTs, in order. num_gone: clients that left in the middle of an answer.
    """

    def __init__(self, behave: Behave | None = None, metrics: str = "", max_model_len: int | None = None) -> None:
        self.behave: Behave = behave or (lambda path, body, count: Reply())
        self.metrics = metrics
        self.max_model_len = max_model_len
        self.bodies: list[Mapping[str, Any]] = []
        self.num_gone = 0
        self.most_at_once = 0
        self._num_open = 0
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()))

    def __enter__(self) -> SseServer:
        self._thread.start()
        self._ready.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join()

    async def _main(self) -> None:
        self._loop, self._end = asyncio.get_running_loop(), asyncio.Event()
        server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        self._ready.set()
        await self._end.wait()
        server.close()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._num_open += 1
        try:
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
                await self._serve(reader, writer)
        finally:
            self._num_open -= 1
            writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        method, path, _ = head.split(" ", 2)
        if method == "get":
            models = {"data": [{"id": "pretend", "max_model_len": self.max_model_len}]}
            found = {"/v1/models": json.dumps(models), "/metrics": self.metrics}.get(path)
            self._whole(writer, 404 if found is None else 200, found or "")
            return
        (length,) = (int(line[15:]) for line in head.splitlines() if line.startswith("content-length:"))
        body = json.loads(await reader.readexactly(length))
        self.bodies.append(body)
        self.most_at_once = max(self.most_at_once, self._num_open)
        reply = self.behave(path, body, len(self.bodies) - 1)
        if reply.status != 200:
            self._whole(writer, reply.status, json.dumps({"error": {"message": reply.message}}))
            return
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n")
        try:
            await self._stream(writer, "chat" in path, reply)
        except ConnectionError:
            self.num_gone += 1

    async def _stream(self, writer: asyncio.StreamWriter, is_chat: bool, reply: Reply) -> None:
        if is_chat:
            self._event(writer, choices=[{"index": 0, "delta": {"role": "assistant", "content": ""}}])
        for token in reply.tokens:
            await asyncio.sleep(reply.pause_s)
            what = {"delta": {"content": token}} if is_chat else {"text": token}
            self._event(writer, choices=[{"index": 0, **what, "finish_reason": None}])
            await writer.drain()
        if reply.breaks:
            self._event(writer, error={"message": "the engine has died"})
        elif not reply.ends_early:
            what = {"delta": {}} if is_chat else {"text": ""}
            self._event(writer, choices=[{"index": 0, **what, "finish_reason": "stop"}])
            count = len(reply.tokens)
            usage = {"prompt_tokens": 10, "completion_tokens": count, "total_tokens": 10 + count}
            usage["prompt_tokens_details"] = {"cached_tokens": reply.cached}  # type: ignore[assignment]
            if reply.with_usage:
                self._event(writer, choices=[], usage=usage)
            self._chunk(writer, b"data: [DONE]\n\n")
        writer.write(b"0\r\n\r\n")

    def _event(self, writer: asyncio.StreamWriter, **fields: Any) -> None:
        self._chunk(writer, b"data: " + json.dumps(fields).encode() + b"\n\n")

    @staticmethod
    def _chunk(writer: asyncio.StreamWriter, data: bytes) -> None:
        writer.write(b"%x\r\n%b\r\n" % (len(data), data))

    @staticmethod
    def _whole(writer: asyncio.StreamWriter, status: int, body: str) -> None:
        data = body.encode()
        writer.write(b"HTTP/1.1 %d X\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%b" % (status, len(data), data))
