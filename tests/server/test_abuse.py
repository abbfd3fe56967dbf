"""Five hundred clients at once: some leave in the middle, some send rubbish, and the engine's process is killed under them."""

import asyncio
import json
import os
import random
import signal
from collections import Counter
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest

NUM_REQUESTS, NUM_HOSTILE = 500, 200
AT_ONCE = 48

HOSTILE: list[Any] = [
    b"{",
    b"\xff\xfe\x00",
    b"[" * 5000,
    {},
    {"prompt": None},
    {"prompt": ""},
    {"prompt": [[[1]]]},
    {"prompt": [1, -5]},
    {"prompt": [10**9]},
    {"prompt": "x", "max_tokens": -1},
    {"prompt": "x", "max_tokens": 10**9},
    {"prompt": "x", "n": 10**6},
    {"prompt": "x", "temperature": float("nan")},
    {"prompt": "x", "temperature": "hot"},
    {"prompt": "x", "top_p": 7},
    {"prompt": "x", "logit_bias": {"999999": 1}},
    {"prompt": "x", "stop": ["a"] * 10_000},
    {"prompt": "x", "bad_words": ["\ud800"]},
    {"prompt": "x", "surprise": True},
    {"prompt": "x", "model": "no-such-model"},
    {"prompt": "x" * 300_000},
    {"prompt": ["x"] * 100_000},
    {"prompt": "x", "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"$ref": "#"}}}},
]


def resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Crowd:
    """What became of each request, by kind."""

    def __init__(self, url: str, seed: int) -> None:
        self.url = url
        self.rng = random.Random(seed)
        self.outcomes: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.num_done = 0

    async def run(self, at: int, then: Callable[[], None]) -> None:
        """All requests, `AT_ONCE` at a time; `then` is called when `at` of them are over."""
        kinds = ["hostile"] * NUM_HOSTILE + ["leaves", "stays"] * ((NUM_REQUESTS - NUM_HOSTILE) // 2)
        self.rng.shuffle(kinds)
        gate = asyncio.Semaphore(AT_ONCE)
        async with httpx.AsyncClient(base_url=self.url, timeout=120, limits=httpx.Limits(max_connections=None)) as http:

            async def one(kind: str, seed: int) -> None:
                async with gate:
                    await getattr(self, kind)(http, random.Random(seed))
                self.num_done += 1
                if self.num_done == at:
                    then()

            await asyncio.gather(*(one(kind, self.rng.randrange(1 << 30)) for kind in kinds))

    async def hostile(self, http: httpx.AsyncClient, rng: random.Random) -> None:
        body = rng.choice(HOSTILE)
        content = body if isinstance(body, bytes) else json.dumps(body, allow_nan=True).encode("utf-8", "surrogatepass")
        answer = await http.post("/v1/completions", content=content, headers={"content-type": "application/json"})
        error = answer.json().get("error", {})
        if not (400 <= answer.status_code < 500 or answer.status_code == 503) or "message" not in error:
            self.wrong.append(f"{content[:80]!r}: {answer.status_code} {answer.text[:200]}")
        self.outcomes["refused"] += 1

    async def leaves(self, http: httpx.AsyncClient, rng: random.Random) -> None:
        body = {
            "prompt": [rng.randrange(3, 6400) for _ in range(50)],
            "max_tokens": 4000,
            "ignore_eos": True,
            "stream": True,
        }
        try:
            async with asyncio.timeout(rng.random() * 0.5), http.stream("POST", "/v1/completions", json=body) as answer:
                async for _ in answer.aiter_lines():
                    pass
            self.outcomes["told"] += 1  # the engine died under it, before it left
        except TimeoutError:
            self.outcomes["left"] += 1

    async def stays(self, http: httpx.AsyncClient, rng: random.Random) -> None:
        body = {"prompt": [rng.randrange(3, 6400) for _ in range(20)], "max_tokens": 16, "ignore_eos": True}
        if rng.random() < 0.5:
            answer = await http.post("/v1/completions", json=body)
            self.judge(
                answer.status_code, answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == 16
            )
            return
        async with http.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
            lines = [line async for line in answer.aiter_lines() if line]
        told = any('"error"' in line for line in lines)
        self.judge(answer.status_code, lines[-1] == "data: [DONE]", told)

    def judge(self, status: int, complete: bool, told: bool = False) -> None:
        """Answered, or told that the engine had died."""
        if status == 200 and complete:
            self.outcomes["answered"] += 1
        elif status in (500, 503) or told:
            self.outcomes["told"] += 1
        else:
            self.wrong.append(f"status {status}, complete: {complete}")


def send(server: Any, crowd: Crowd, kill: bool) -> int:
    """The server's resident bytes after a crowd of whom each was answered or told, and of whom nothing is left."""
    number = signal.SIGKILL if kill else 0  # 0 asks whether the process is there, no more
    asyncio.run(crowd.run(NUM_REQUESTS // 2, partial(os.kill, server.engine_pid, number)))
    assert not crowd.wrong, crowd.wrong[:5]
    assert crowd.outcomes["refused"] == NUM_HOSTILE
    assert sum(crowd.outcomes.values()) == NUM_REQUESTS
    assert crowd.outcomes["answered"] + crowd.outcomes["told"] >= (NUM_REQUESTS - NUM_HOSTILE) // 2
    assert kill or not crowd.outcomes["told"], crowd.outcomes
    server.wait_for(lambda: httpx.get(f"{server.url}/health").status_code == 200, "health")
    server.wait_until_empty()
    return resident_bytes(server.process.pid)


@pytest.mark.timeout(600)
def test_everybody_is_answered_or_told_and_nothing_leaks(make_server: Callable[..., Any]) -> None:
    server = make_server("--max-num-seqs", "32", "--num-gpu-blocks-override", "2048", "--max-queue", "1000")
    resident = [send(server, Crowd(server.url, seed), kill=seed == 1) for seed in range(3)]
    # Buffers and the allocator's arenas become as large as the worst moment needs, which some crowd after the first
    # brings; a leak would add to every crowd.
    while min(after - before for before, after in pairwise(resident)) > 1 << 20:
        assert len(resident) < 12, resident
        resident.append(send(server, Crowd(server.url, len(resident)), kill=False))
    assert server.stop() == 0
