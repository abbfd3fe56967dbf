"""Keys, limits, request ids and log lines: what every request passes."""

import asyncio
import gc
import json
import socket
import threading
import weakref
from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest

from quire.server.gate import Gate

GO_ON = {"ignore_eos": True}
KEYS = ("first-key", "second-key")


@pytest.fixture(scope="module")
def guarded(make_server: Callable[..., Any]) -> Any:
    return make_server(
        *("--api-key", KEYS[0], "--api-key", KEYS[1], "--max-num-seqs", "1", "--max-queue", "2", "--max-prompts", "3"),
        *("--max-n", "1", "--max-body-mb", "0.01", "--log-format", "json", "--num-gpu-blocks-override", "1024"),
        *("--trust-request-chat-template", "--chat-template-kwarg", "mood"),
    )


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


@pytest.fixture(scope="module")
def inside(guarded: Any) -> Any:
    with guarded.http(headers=bearer(KEYS[1])) as http:
        yield http


def test_every_route_but_health_asks_for_a_key(guarded: Any) -> None:
    with guarded.http() as http:
        assert http.get("/health").status_code == 200
        for path in ("/v1/models", "/metrics", "/version", "/openapi.json", "/nope", "/health/", "//health", "/Health"):
            response = http.get(path)
            assert response.status_code == 401, path
            assert response.json()["error"]["code"] == "invalid_api_key"
            assert response.headers["x-request-id"]
        for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"):
            assert http.post(path, json={}).status_code == 401
        for value in ("", "Bearer", "Bearer wrong", "Basic first-key", "first-key", "Bearer first-key2", "Bearer é"):
            wrong = http.get("/v1/models", headers={"authorization": value.encode()})
            assert wrong.status_code == 401, value
        for key in KEYS:
            assert http.get("/v1/models", headers=bearer(key)).status_code == 200


def test_a_request_that_is_over_is_freed_at_once() -> None:
    """Without waiting for the collector of cycles: what sends holds the scope, as in uvicorn."""

    class Cycle:
        def __init__(self) -> None:
            self.scope = {"type": "http", "method": "GET", "path": "/health", "headers": []}

        async def send(self, message: Any) -> None: ...

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert scope["state"]["send_body"]
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def receive() -> Any: ...

    ended: list[Any] = []
    gate = Gate(app, keys=[], max_body_bytes=1000, on_end=ended.append)
    cycle = Cycle()
    collects = gc.isenabled()
    gc.disable()
    try:
        asyncio.run(gate(cycle.scope, receive, cycle.send))
        gone = weakref.ref(cycle)
        del cycle
        assert gone() is None
    finally:
        if collects:
            gc.enable()
    assert len(ended) == 1


def test_the_official_client_sends_its_key(guarded: Any) -> None:
    with guarded.client(api_key=KEYS[0]) as client:
        assert client.models.list().data
    with guarded.client(api_key="wrong") as client, pytest.raises(openai.AuthenticationError):
        client.models.list()


def test_bodies_are_limited(inside: httpx.Client) -> None:
    long = json.dumps({"prompt": "x" * 20_000}).encode()
    response = inside.post("/v1/completions", content=long)
    assert response.status_code == 413 and "bytes" in response.json()["error"]["message"]

    def pieces() -> Any:
        for at in range(0, len(long), 1000):
            yield long[at : at + 1000]

    chunked = inside.post("/v1/completions", content=pieces(), headers={"content-type": "application/json"})
    assert chunked.status_code == 413 and chunked.json()["error"]["type"] == "invalid_request_error"


def test_prompts_and_n_are_limited(inside: httpx.Client) -> None:
    response = inside.post("/v1/completions", json={"prompt": ["a"] * 4})
    assert response.status_code == 400 and response.json()["error"]["param"] == "prompt"
    response = inside.post("/v1/completions", json={"prompt": "a", "n": 2})
    assert response.status_code == 400 and response.json()["error"]["param"] == "n"


def test_a_full_queue_is_a_429_that_says_when(guarded: Any, inside: httpx.Client) -> None:
    guarded_metrics = lambda: guarded.metrics(headers=bearer(KEYS[0]))  # noqa: E731
    body = {"prompt": "Hello", "max_tokens": 2000, "ignore_eos": True, "stream": True}
    leave = threading.Event()

    def occupy() -> None:
        with guarded.http(headers=bearer(KEYS[0])) as http, http.stream("POST", "/v1/completions", json=body) as stream:
            for _ in stream.iter_lines():
                if leave.is_set():
                    return

    # one runs, two wait
    threads = [threading.Thread(target=occupy) for _ in range(3)]
    for thread in threads:
        thread.start()
    guarded.wait_for(lambda: guarded_metrics()["quire:num_requests_waiting"] == 2, "a queue")
    try:
        response = inside.post("/v1/completions", json={"prompt": "Hello"})
        assert response.status_code == 429
        assert response.headers["retry-after"].isdigit()
        assert response.json()["error"] == {
            "message": response.json()["error"]["message"],
            "type": "rate_limit_error",
            "param": None,
            "code": "queue_full",
        }
    finally:
        leave.set()
        for thread in threads:
            thread.join()
    # the client sends it again by itself
    with guarded.client(api_key=KEYS[0], max_retries=3) as client:
        assert client.completions.create(model="tiny", prompt="x", max_tokens=2).choices


def test_a_burst_does_not_slip_past_the_queue(guarded: Any) -> None:
    statuses: list[int] = []

    def ask() -> None:
        with guarded.http(headers=bearer(KEYS[0])) as http:
            body = {"prompt": "Hello", "max_tokens": 100, "ignore_eos": True}
            statuses.append(http.post("/v1/completions", json=body).status_code)

    threads = [threading.Thread(target=ask) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(statuses) == {200, 429} and statuses.count(200) >= 3


def log_line(server: Any, request_id: str) -> dict[str, Any]:
    """It is written when the answer is out, so perhaps a moment later."""

    def look() -> list[dict[str, Any]]:
        return [json.loads(line) for line in server.log().splitlines() if request_id in line]

    (line,) = server.wait_for(look, "a line in the log")
    return dict(line)


def test_request_ids_are_the_servers_own(guarded: Any, inside: httpx.Client) -> None:
    body = {"prompt": "Hello", "max_tokens": 1, "request_id": "mine"}
    ids = {inside.post("/v1/completions", json=body, headers={"x-request-id": "mine"}).headers["x-request-id"]}
    ids.add(inside.post("/v1/completions", json=body).headers["x-request-id"])
    assert len(ids) == 2 and all(request_id.startswith("req-") for request_id in ids)
    assert [log_line(guarded, request_id)["client_id"] for request_id in ids] == ["mine", "mine"]


def test_a_line_for_each_request_and_no_prompt_in_it(guarded: Any, inside: httpx.Client) -> None:
    response = inside.post("/v1/completions", json={"prompt": "secret words", "max_tokens": 3, "ignore_eos": True})
    line = log_line(guarded, response.headers["x-request-id"])
    assert (line["method"], line["path"], line["status"]) == ("POST", "/v1/completions", 200)
    assert line["completion_tokens"] == 3 and line["finish_reasons"] == ["length"] and line["first_token_s"] > 0
    refused = inside.post("/v1/completions", json={"prompt": "secret words", "temperature": -1})
    assert "temperature" in log_line(guarded, refused.headers["x-request-id"])["error"]
    assert "secret" not in guarded.log() and not any(key in guarded.log() for key in KEYS)


def test_an_operator_may_allow_templates_of_requests(inside: httpx.Client) -> None:
    template = "{% for m in messages %}[{{ m.content }}|{{ mood }}]{% endfor %}"
    body = {
        "messages": [{"role": "user", "content": "Hi"}],
        "chat_template": template,
        "chat_template_kwargs": {"mood": "good"},
    }
    tokens = inside.post("/tokenize", json=body).json()["tokens"]
    assert inside.post("/detokenize", json={"tokens": tokens}).json()["prompt"] == "[Hi|good]"
    for hostile in ("{{ ''.__class__.__mro__ }}", "{{ messages.__init__.__globals__ }}", "{% for %}", "{{ 1 / 0 }}"):
        response = inside.post("/tokenize", json={**body, "chat_template": hostile})
        assert response.status_code in (200, 400)
        assert "class" not in inside.post("/detokenize", json={"tokens": response.json().get("tokens", [])}).json().get(
            "prompt", ""
        )


def test_nothing_but_http_is_spoken(guarded: Any) -> None:
    host, port = guarded.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(
            b"GET /v1/models HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n"
        )
        assert b" 401 " in connection.recv(1000).split(b"\r\n")[0]
