"""What clients hear when the engine dies, hangs, or the server is told to stop; and that nothing is left behind."""

import asyncio
import contextlib
import json
import os
import random
import signal
import threading
from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest

GO_ON = {"ignore_eos": True}
ENDLESS = {"prompt": "Hello", "max_tokens": 8000, "ignore_eos": True, "stream": True}


def read_stream(server: Any, body: dict[str, Any], begun: threading.Event) -> list[str]:
    with server.http() as http, http.stream("POST", "/v1/completions", json=body) as response:
        lines = []
        for line in response.iter_lines():
            if line:
                lines.append(line)
                begun.set()
        return lines


def is_zombie(pid: int) -> bool:
    """Ended, and adopted by a process that does not look after it (in a container, often)."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


class Reader(threading.Thread):
    """Reads a stream to its end."""

    def __init__(self, server: Any, body: dict[str, Any]) -> None:
        super().__init__()
        self._server, self._body = server, body
        self.begun = threading.Event()
        self.lines: list[str] = []
        self.start()
        assert self.begun.wait(30)

    def run(self) -> None:
        with contextlib.suppress(httpx.TransportError):  # the server may be killed meanwhile
            self.lines = read_stream(self._server, self._body, self.begun)


def test_an_engine_that_is_killed_is_told_and_started_again(make_server: Callable[..., Any]) -> None:
    server = make_server("--num-gpu-blocks-override", "1024")
    reader = Reader(server, ENDLESS)
    waiting: list[httpx.Response] = []

    def wait() -> None:
        with server.http() as http:
            waiting.append(http.post("/v1/completions", json={**ENDLESS, "stream": False}))

    thread = threading.Thread(target=wait)
    thread.start()
    server.wait_for(lambda: server.metrics()["quire:num_requests_running"] == 2, "two requests")
    os.kill(server.engine_pid, signal.SIGKILL)
    reader.join(30)
    thread.join(30)
    error = json.loads(reader.lines[-1].removeprefix("data: "))["error"]
    assert error["code"] == "engine_unavailable" and "signal 9" in error["message"]
    assert waiting[0].status_code == 503 and waiting[0].headers["retry-after"]
    with server.http() as http:
        health = http.get("/health")
        assert health.status_code == 503 and health.json()["error"]["code"] == "engine_dead"
        refused = http.post("/v1/completions", json={"prompt": "x"})
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "engine_unavailable"
        server.wait_for(lambda: http.get("/health").status_code == 200, "a new engine")
        assert http.post("/v1/completions", json={"prompt": "x", "max_tokens": 3}).status_code == 200
    assert server.wait_until_empty()["quire:engine_restarts_total"] == 1
    assert server.stop() == 0


def test_an_engine_whose_steps_do_not_come_back_is_stuck(make_server: Callable[..., Any]) -> None:
    server = make_server("--num-gpu-blocks-override", "1024", "--stall-timeout", "0.3")
    reader = Reader(server, ENDLESS)
    with server.http() as http:
        assert http.get("/health").status_code == 200
        os.kill(server.engine_pid, signal.SIGSTOP)  # the process is there, and does nothing
        server.wait_for(lambda: http.get("/health").status_code == 503, "bad health", timeout_s=10)
        assert http.get("/health").json()["error"]["code"] == "engine_stuck"
        assert http.get("/metrics").status_code == 200  # it does not wait for the engine
        os.kill(server.engine_pid, signal.SIGCONT)
        server.wait_for(lambda: http.get("/health").status_code == 200, "good health", timeout_s=10)
    engine = server.engine_pid
    server.stop(signal.SIGKILL)
    reader.join(30)
    # nobody has told the engine to end: it sees that its socket is closed
    server.wait_for(lambda: not os.path.exists(f"/proc/{engine}") or is_zombie(engine), "the end")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_what_runs_at_a_signal_is_finished(make_server: Callable[..., Any], number: int) -> None:
    server = make_server("--num-gpu-blocks-override", "1024")
    reader = Reader(server, {**ENDLESS, "max_tokens": 1000})
    engine = server.engine_pid
    assert server.stop(number) == 0
    reader.join(30)
    assert reader.lines[-1] == "data: [DONE]"
    assert '"finish_reason":"length"' in reader.lines[-2]
    with pytest.raises(ProcessLookupError):
        os.kill(engine, 0)


def test_what_runs_at_the_deadline_is_told(make_server: Callable[..., Any]) -> None:
    server = make_server("--num-gpu-blocks-override", "1024", "--shutdown-timeout", "0.2")
    reader = Reader(server, ENDLESS)
    assert server.stop() == 0
    reader.join(30)
    error = json.loads(reader.lines[-1].removeprefix("data: "))["error"]
    assert "stopping" in error["message"]


def test_a_model_that_cannot_be_loaded_is_one_line(chat_model: Any, tmp_path: Any) -> None:
    from quire.cli import main

    assert main(["serve", str(tmp_path)]) == 2
    assert main(["serve", "a", "--model", "b"]) == 2


def test_many_clients_of_whom_half_leave(server: Any) -> None:
    """Some streamed, some not, some wrong: all well-formed ones that stay are answered, and nothing leaks."""
    rng = random.Random(0)
    before = server.wait_until_empty()

    async def one(client: openai.AsyncOpenAI, i: int) -> str:
        body: dict[str, Any] = {
            "model": "tiny",
            "prompt": "word " * rng.randint(1, 60),
            "max_tokens": rng.randint(1, 60),
            "n": rng.choice((1, 1, 2)),
            "extra_body": GO_ON,
        }
        if i % 10 == 9:
            with pytest.raises(openai.BadRequestError):
                await client.completions.create(**{**body, "temperature": -1})
            return "refused"
        if i % 2:
            try:
                await asyncio.wait_for(client.completions.create(**body), rng.random() * 0.3)
            except TimeoutError:
                return "left"
            return "answered"
        stream = await client.completions.create(**body, stream=True)
        leaves_at = rng.randint(0, 30) if i % 4 == 0 else None
        num_chunks, ends = 0, 0
        async for chunk in stream:
            if num_chunks == leaves_at:
                await stream.close()
                return "left"
            num_chunks += 1
            ends += chunk.choices[0].finish_reason is not None
        assert ends == body["n"]
        return "answered"

    async def all_of_them() -> list[str]:
        gate = asyncio.Semaphore(64)
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:

            async def in_turn(i: int) -> str:
                async with gate:
                    return await one(client, i)

            return await asyncio.gather(*map(in_turn, range(300)))

    found = asyncio.run(all_of_them())
    assert found.count("refused") == 30 and found.count("left") > 50 and found.count("answered") > 80
    after = server.wait_until_empty()
    assert after["quire:request_aborts_total"] > before["quire:request_aborts_total"]
