"""Sends requests to an OpenAI-compatible server when their time has come, and notes when each token came back.

    Job (what, when) ──> encoded ahead of its time ──> sent, with at most max_concurrency on the way ──> Record

A request's latencies count from the moment it was sent. How late that was, beside the schedule, stands in its record: if the
client itself were the limit, it would show there. Does not know where requests come from, nor statistics.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from quire.bench.http import HttpError, Target

PATHS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}
MAX_ERROR_CHARS = 200
INTERRUPTED = "interrupted"


@dataclass(frozen=True, slots=True)
class Job:
    """One request: when to send it (seconds from the start), and how to write its body, as late as possible."""

    send_s: float
    make_body: Callable[[], Mapping[str, Any]]
    num_asked: int | None = None  # tokens of the answer


@dataclass(slots=True)
class Record:
    """What became of one request. Times are seconds since the start of the run; error None: it was answered.

    token_s: when each piece of the answer came, usually one token. num_output: the server's count, or else that of pieces.
    waited_s: for --max-concurrency. late_s: how much later than that it was sent, for which the client is to blame.
    """

    index: int
    num_asked: int | None = None
    sent_s: float = 0.0
    waited_s: float = 0.0
    late_s: float = 0.0
    token_s: list[float] = field(default_factory=list)
    num_prompt: int = 0
    num_cached: int = 0
    num_output: int = 0
    finish_reason: str | None = None
    error: str | None = None

    @property
    def ttft_s(self) -> float | None:
        """Time to the first token."""
        return self.token_s[0] - self.sent_s if self.token_s else None

    @property
    def e2e_s(self) -> float | None:
        """From sending to the last token."""
        return self.token_s[-1] - self.sent_s if self.token_s else None

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first; None for answers of one token."""
        if self.num_output < 2 or not self.token_s:
            return None
        return (self.token_s[-1] - self.token_s[0]) / (self.num_output - 1)

    @property
    def gaps_s(self) -> list[float]:
        """Between the pieces of the answer: inter-token latencies."""
        return [after - before for before, after in zip(self.token_s, self.token_s[1:])]


@dataclass
class Load:
    """Sends jobs to `target`. `num_active` requests are on their way at this moment.

    endpoint: a key of PATHS. timeout_s: for one whole answer. records: of all requests whose time has come, in the order of
    their jobs; if `run` is cancelled, those that were on their way say so.
    """

    target: Target
    endpoint: str
    max_concurrency: int | None = None
    timeout_s: float = 600.0
    on_end: Callable[[Record], None] | None = None
    num_active: int = 0
    began_s: float = 0.0
    records: list[Record] = field(default_factory=list)

    async def run(self, jobs: Sequence[Job]) -> None:
        """Sends all jobs, in the order given, each at its time; returns when all are answered or have failed."""
        seats = asyncio.Semaphore(self.max_concurrency) if self.max_concurrency else contextlib.nullcontext()
        self.began_s = time.perf_counter()
        async with asyncio.TaskGroup() as tasks:
            for i, job in enumerate(jobs):
                body = json.dumps(job.make_body(), separators=(",", ":")).encode()
                await asyncio.sleep(job.send_s - self.now_s())
                record = Record(i, job.num_asked, error=INTERRUPTED)
                self.records.append(record)
                tasks.create_task(self._send(record, job.send_s, body, seats))

    def now_s(self) -> float:
        """Seconds since the start of `run`."""
        return time.perf_counter() - self.began_s

    async def _send(
        self, record: Record, send_s: float, body: bytes, seats: contextlib.AbstractAsyncContextManager[Any]
    ) -> None:
        record.late_s = self.now_s() - send_s
        async with seats:
            record.sent_s = self.now_s()
            record.waited_s = record.sent_s - send_s - record.late_s
            self.num_active += 1
            try:
                async with asyncio.timeout(self.timeout_s):
                    record.error = await self._stream(record, body)
            except TimeoutError:
                record.error = f"no complete answer within {self.timeout_s:g} s"
            except HttpError as error:
                record.error = str(error)
            except OSError as error:
                record.error = f"connection failed: {error.strerror or type(error).__name__}"
            finally:
                self.num_active -= 1
        if self.on_end is not None:
            self.on_end(record)

    async def _stream(self, record: Record, body: bytes) -> str | None:
        """Fills the record; returns what went wrong, if something did."""
        async with self.target.open("POST", PATHS[self.endpoint], body) as response:
            if response.status != 200:
                return f"HTTP {response.status}: {error_message(await response.read())}"
            usage: Mapping[str, Any] = {}
            async for now_s, data in response.events():
                if data == b"[DONE]":
                    break
                try:
                    event = json.loads(data)
                except ValueError:
                    return "an event of the stream is not JSON"
                if event.get("error"):
                    return f"error in the stream: {error_message(data)}"
                usage = event.get("usage") or usage
                for choice in event.get("choices") or ():
                    if _brings_token(choice):
                        record.token_s.append(now_s - self.began_s)
                    record.finish_reason = choice.get("finish_reason") or record.finish_reason
            else:
                return "the stream ended without [DONE]"
        record.num_prompt = usage.get("prompt_tokens") or 0
        record.num_output = usage.get("completion_tokens") or len(record.token_s)
        record.num_cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        return None if record.token_s else "the answer is empty"


def _brings_token(choice: Mapping[str, Any]) -> bool:
    """A completion's chunk without text may still be a token (half a character); a chat's first one is only its role."""
    if "delta" in choice:
        delta = choice["delta"]
        return bool(delta.get("content") or delta.get("reasoning_content") or delta.get("tool_calls"))
    return bool(choice.get("text")) or choice.get("finish_reason") is None


def error_message(body: bytes) -> str:
    """What an OpenAI-like error body says, or its beginning."""
    try:
        message = json.loads(body)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = body.decode("utf-8", "replace")
    return " ".join(str(message).split())[:MAX_ERROR_CHARS]
