"""The most trivial of streaming servers, to learn what the load generator itself can take: `python -m quire.bench.loopback`.

It answers every POST with as many equal events as the request's max_tokens: in rounds, one event for each open stream, as an
engine's steps would, as fast as they are taken or with the pause_s of the last request between them. Prints its port and ends
when its standard input does. It looks at nothing else: it is no server to test clients with.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
MAX_UNSENT_BYTES = 1 << 16


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def _event(**fields: Any) -> bytes:
    base = {"id": "cmpl-0", "object": "text_completion", "created": 0, "model": "loopback"}
    return _chunk(b"data: " + json.dumps(base | fields, separators=(",", ":")).encode() + b"\n\n")


TOKEN = _event(choices=[{"index": 0, "text": " token", "logprobs": None, "finish_reason": None}], usage=None)


class _Rounds:
    """The open streams, and what happens to them."""

    def __init__(self) -> None:
        self.streams: set[_Stream] = set()
        self.pause_s = 0.0
        self._wake = asyncio.Event()
        self._is_ending = False

    def join(self, stream: _Stream, pause_s: float) -> None:
        self.streams.add(stream)
        self.pause_s = pause_s
        self._wake.set()

    def end(self) -> None:
        self._is_ending = True
        self._wake.set()

    async def run(self) -> None:
        while not self._is_ending:
            await self._wake.wait()
            for stream in list(self.streams):
                stream.send_one()
            if not self.streams and not self._is_ending:
                self._wake.clear()
            await asyncio.sleep(self.pause_s)


class _Stream(asyncio.Protocol):
    """One connection; takes part in the rounds when its request is there."""

    def __init__(self, rounds: _Rounds) -> None:
        self._rounds, self._received = rounds, b""
        self.num_left = self.num_asked = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, _, body = self._received.partition(b"\r\n\r\n")
        lengths = [line.split(b":")[1] for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")]
        if lengths and len(body) == int(lengths[0]):
            request = json.loads(body)
            self.num_left = self.num_asked = request["max_tokens"]
            self.transport.write(HEAD)
            self._rounds.join(self, request.get("pause_s", 0.0))

    def connection_lost(self, exc: Exception | None) -> None:
        self._rounds.streams.discard(self)

    def send_one(self) -> None:
        if self.transport.get_write_buffer_size() > MAX_UNSENT_BYTES:
            return  # its client is behind
        self.transport.write(TOKEN)
        self.num_left -= 1
        if not self.num_left:
            usage = {"prompt_tokens": 1, "completion_tokens": self.num_asked, "total_tokens": 1 + self.num_asked}
            self.transport.write(_event(choices=[], usage=usage) + _chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")
            self.transport.close()
            self._rounds.streams.discard(self)


async def _serve() -> None:
    loop, rounds = asyncio.get_running_loop(), _Rounds()
    server = await loop.create_server(lambda: _Stream(rounds), "127.0.0.1", 0, backlog=4096)
    print(server.sockets[0].getsockname()[1], flush=True)
    loop.add_reader(sys.stdin, rounds.end)  # nobody writes there: it is the end
    await rounds.run()
    server.close()


if __name__ == "__main__":
    asyncio.run(_serve())
