"""Sends requests to an OpenAI-compatible server when their time has come, and notes when each token came back.

    Job (what, when) ──> encoded ahead of its time ──> sent, with at most max_concurrency on the way ──> Record
    SplitLoad: the same by several processes (`python -m quire.bench.load`), where one would itself be the limit

A request's latencies count from the moment it was sent. How late that was, beside the schedule, stands in its record: if the
client itself were the limit, it would show there. Does not know where requests come from, nor statistics.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import signal
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from quire.bench.http import HttpError, Target
from quire.errors import QuireError

PATHS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}
MAX_ERROR_CHARS = 200
INTERRUPTED = "interrupted"
MAX_LINE_BYTES = 1 << 30  # of what a process of a SplitLoad is told


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
    is_streamed: bool = True

    @property
    def ttft_s(self) -> float | None:
        """Time to the first token; None for an answer that came as a whole."""
        return self.token_s[0] - self.sent_s if self.token_s and self.is_streamed else None

    @property
    def e2e_s(self) -> float | None:
        """From sending to the last token."""
        return self.token_s[-1] - self.sent_s if self.token_s else None

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first; None for answers of one token, and for those that came as a whole."""
        if self.num_output < 2 or not self.token_s or not self.is_streamed:
            return None
        return (self.token_s[-1] - self.token_s[0]) / (self.num_output - 1)

    @property
    def gaps_s(self) -> list[float]:
        """Between the pieces of the answer: inter-token latencies."""
        return [after - before for before, after in zip(self.token_s, self.token_s[1:])]


@dataclass
class Load:
    """Sends jobs to `target`. `num_active` requests are on their way at this moment.

    endpoint: a key of PATHS. timeout_s: for one whole answer. is_streamed: what the requests ask for. records: of all requests
    whose time has come, in the order of their jobs; if `run` is cancelled, those that were on their way say so.
    """

    target: Target
    endpoint: str
    max_concurrency: int | None = None
    timeout_s: float = 600.0
    on_end: Callable[[Record], None] | None = None
    is_streamed: bool = True
    num_active: int = 0
    began_s: float = 0.0
    records: list[Record] = field(default_factory=list)

    @property
    def cpu_s(self) -> float:
        """Of the process that sends."""
        return time.process_time()

    async def run(self, jobs: Sequence[Job]) -> None:
        """Sends all jobs, in the order given, each at its time; returns when all are answered or have failed."""
        await self.run_encoded([job.send_s for job in jobs], ((job.num_asked, encode_body(job)) for job in jobs))

    async def run_encoded(self, send_s: Sequence[float], jobs: Iterable[tuple[int | None, bytes]]) -> None:
        """The same for jobs as (num_asked, body), which are taken out of `jobs` one by one, and when to send each."""
        seats = asyncio.Semaphore(self.max_concurrency) if self.max_concurrency else contextlib.nullcontext()
        self.began_s = time.perf_counter()
        async with asyncio.TaskGroup() as tasks:
            for i, (due_s, (num_asked, body)) in enumerate(zip(send_s, jobs)):
                await asyncio.sleep(due_s - self.now_s())
                record = Record(i, num_asked, error=INTERRUPTED, is_streamed=self.is_streamed)
                self.records.append(record)
                tasks.create_task(self._send(record, due_s, body, seats))

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
                    record.error = await (self._stream if self.is_streamed else self._whole)(record, body)
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
                    event = msgspec.json.decode(data)
                except msgspec.DecodeError:
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
        _take_usage(record, usage, len(record.token_s))
        return None if record.token_s else "the answer is empty"

    async def _whole(self, record: Record, body: bytes) -> str | None:
        """The same for an answer that comes as a whole."""
        async with self.target.open("POST", PATHS[self.endpoint], body) as response:
            data = await response.read()
        if response.status != 200:
            return f"HTTP {response.status}: {error_message(data)}"
        record.token_s.append(self.now_s())
        try:
            answer = msgspec.json.decode(data)
            record.finish_reason = answer["choices"][0]["finish_reason"]
            _take_usage(record, answer["usage"], 0)
        except (msgspec.DecodeError, LookupError, TypeError, AttributeError):
            return "what came is no answer"
        return None if record.num_output else "the answer is empty"


def encode_body(job: Job) -> bytes:
    return json.dumps(job.make_body(), separators=(",", ":")).encode()


def _take_usage(record: Record, usage: Mapping[str, Any], num_seen: int) -> None:
    """`num_seen`: tokens of the answer, for servers that don't count them."""
    record.num_prompt = usage.get("prompt_tokens") or 0
    record.num_output = usage.get("completion_tokens") or num_seen
    record.num_cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0


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


# -- several processes -------------------------------------------------------------------------------------------------------
@dataclass
class SplitLoad:
    """A `Load` in `num_processes` processes, each with its share of the jobs and of max_concurrency (at least one).

    All bodies are written down, and the processes have them, before the clock starts. cpu_s: of the busiest process.
    """

    num_processes: int
    target: Target
    endpoint: str
    max_concurrency: int | None = None
    timeout_s: float = 600.0
    on_end: Callable[[Record], None] | None = None
    is_streamed: bool = True
    cpu_s: float = 0.0
    records: list[Record] = field(default_factory=list)
    _due_s: Sequence[float] = ()
    began_s: float = 0.0

    @property
    def num_active(self) -> int:
        """Requests whose time has come and that have not ended."""
        now_s = time.perf_counter() - self.began_s
        return sum(due_s <= now_s for due_s in self._due_s) - len(self.records)

    async def run(self, jobs: Sequence[Job]) -> None:
        """As `Load.run`. Raises QuireError if a process ends too early."""
        processes = []
        try:
            for i in range(self.num_processes):
                process = await asyncio.create_subprocess_exec(
                    *(sys.executable, "-m", "quire.bench.load"),
                    stdin=asyncio.subprocess.PIPE,
                    stdout=asyncio.subprocess.PIPE,
                    limit=MAX_LINE_BYTES,
                )
                processes.append(process)
                assert process.stdin is not None
                share = _Share(
                    self.target,
                    self.endpoint,
                    self.max_concurrency and _part_of(self.max_concurrency, self.num_processes, i),
                    self.timeout_s,
                    self.is_streamed,
                    [(job.send_s, job.num_asked, encode_body(job)) for job in jobs[i :: self.num_processes]],
                )
                process.stdin.write(msgspec.json.encode(share) + b"\n")
            for process in processes:
                assert process.stdout is not None
                await process.stdout.readline()  # it is ready
            self._due_s, self.began_s = [job.send_s for job in jobs], time.perf_counter()
            for process in processes:
                assert process.stdin is not None
                process.stdin.write(b"go\n")
            follow = [asyncio.create_task(self._follow(i, process)) for i, process in enumerate(processes)]
            try:
                await asyncio.shield(asyncio.gather(*follow))
            except asyncio.CancelledError:
                for process in processes:
                    assert process.stdin is not None
                    process.stdin.close()  # that is its end, and it tells what it has
                await asyncio.gather(*follow)
                raise
        finally:
            self.records.sort(key=lambda record: record.index)
            for process in processes:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                await process.wait()

    async def _follow(self, number: int, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        async for line in process.stdout:
            told = msgspec.json.decode(line, type=_Told)
            if told.record is None:
                self.cpu_s = max(self.cpu_s, told.cpu_s)
                return
            told.record.index = told.record.index * self.num_processes + number
            self.records.append(told.record)
            if self.on_end is not None:
                self.on_end(told.record)
        raise QuireError("a process of the load generator has died")


def load_by(num_processes: int) -> Callable[..., Load | SplitLoad]:
    """What makes a load of so many processes: this one alone, where one is enough."""
    return functools.partial(SplitLoad, num_processes) if num_processes > 1 else Load


class _Share(msgspec.Struct):
    """What one process is to send. jobs: (when, tokens asked for, body)."""

    target: Target
    endpoint: str
    max_concurrency: int | None
    timeout_s: float
    is_streamed: bool
    jobs: list[tuple[float, int | None, bytes]]


class _Told(msgspec.Struct):
    """What it tells: a line for each request that has ended, then one of itself."""

    record: Record | None = None
    cpu_s: float = 0.0


def _part_of(whole: int, parts: int, i: int) -> int:
    """The i-th of `parts` that add up to `whole`."""
    return whole // parts + (i < whole % parts)


async def _send_share() -> None:
    """The life of one process of a `SplitLoad`. Whoever started it ends it by closing its standard input."""
    loop = asyncio.get_running_loop()
    lines = asyncio.StreamReader(limit=MAX_LINE_BYTES)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    share = msgspec.json.decode(await lines.readline(), type=_Share)

    def tell(told: _Told) -> None:
        sys.stdout.buffer.write(msgspec.json.encode(told) + b"\n")
        sys.stdout.buffer.flush()

    load = Load(
        share.target,
        share.endpoint,
        share.max_concurrency,
        share.timeout_s,
        lambda record: tell(_Told(record)),
        share.is_streamed,
    )
    times, jobs = [job[0] for job in share.jobs], [job[1:] for job in share.jobs]
    tell(_Told())  # ready
    await lines.readline()  # go
    began_cpu_s = load.cpu_s
    running = asyncio.create_task(load.run_encoded(times, jobs))
    end = asyncio.create_task(lines.read())
    await asyncio.wait({running, end}, return_when=asyncio.FIRST_COMPLETED)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    end.cancel()
    for record in load.records:
        if record.error == INTERRUPTED:
            tell(_Told(record))
    tell(_Told(cpu_s=load.cpu_s - began_cpu_s))


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C reaches whole groups: whoever started it tells
    asyncio.run(_send_share())
