"""What a stream is made of: events from templates are those that would be written one by one, however many come at a time."""

import json
import socket
from typing import Any

import httpx
import msgspec
import pytest

from conftest import Server
from quire.server.streaming import MARK, EventTemplate, event


@pytest.mark.parametrize("text", ["a", "", 'a"b\\', "100%b%%", "half \ud7ff 🙂\n\x00", MARK])
def test_a_filled_template_is_the_event_itself(text: str) -> None:
    def content(text: Any, token_ids: Any) -> dict[str, Any]:
        return {"model": "100% %b \u2028", "choices": [{"text": text, "n": None, "token_ids": token_ids}]}

    template = EventTemplate(content(MARK, MARK))
    assert template.fill(text, [1, 2]) == event(content(text, [1, 2]))
    assert template.fill(text, []) == event(content(text, []))


def stream(http: httpx.Client, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    lines = http.post(path, json={**body, "stream": True}).text.splitlines()
    data = [line.removeprefix("data: ") for line in lines if line]
    assert data[-1] == "[DONE]"
    return [json.loads(item) for item in data[:-1]]


COMPLETION = {"prompt": [5, 6, 7, 8], "max_tokens": 24, "ignore_eos": True, "seed": 3}
CHAT = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 24, "ignore_eos": True, "seed": 3}


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"n": 3},
        {"return_token_ids": True},
        {"prompt": [[5, 6], [7, 8]], "n": 2, "return_token_ids": True},
        {"echo": True, "prompt": "hello"},
        {"echo": True, "prompt": "hello", "logprobs": 1, "return_token_ids": True},
        {"stream_options": {"include_usage": True}},
    ],
)
def test_a_streamed_completion_is_the_whole_one_in_pieces(http: httpx.Client, more: dict[str, Any]) -> None:
    body = {**COMPLETION, **more}
    events = stream(http, "/v1/completions", body)
    body.pop("stream_options", None)
    whole = http.post("/v1/completions", json=body).json()
    if "stream_options" in more:
        last = events.pop()
        assert last["choices"] == [] and last["usage"]["completion_tokens"] == 24
        assert all(event["usage"] is None for event in events)
    assert len({tuple(event) for event in events}) == len({tuple(event["choices"][0]) for event in events}) == 1
    assert len({(event["id"], event["created"], event["model"]) for event in events}) == 1
    for choice in whole["choices"]:
        pieces = [event["choices"][0] for event in events if event["choices"][0]["index"] == choice["index"]]
        assert "".join(piece["text"] for piece in pieces) == choice["text"]
        assert [piece["finish_reason"] for piece in pieces] == [None] * (len(pieces) - 1) + ["length"]
        if body.get("return_token_ids"):
            assert [token for piece in pieces for token in piece["token_ids"]] == choice["token_ids"]
            assert [piece["prompt_token_ids"] for piece in pieces[1:]] == [None] * (len(pieces) - 1)
            assert pieces[0]["prompt_token_ids"] == choice["prompt_token_ids"]
            assert len(pieces) == 24  # a token each, with text or without


@pytest.mark.parametrize("more", [{}, {"n": 3}, {"return_token_ids": True}, {"logprobs": True, "top_logprobs": 1}])
def test_a_streamed_chat_is_the_whole_one_in_pieces(http: httpx.Client, more: dict[str, Any]) -> None:
    body = {**CHAT, **more}
    events = stream(http, "/v1/chat/completions", body)
    whole = http.post("/v1/chat/completions", json=body).json()
    assert len({tuple(event) for event in events}) == 1
    for choice in whole["choices"]:
        pieces = [event["choices"][0] for event in events if event["choices"][0]["index"] == choice["index"]]
        assert pieces[0]["delta"] == {"role": "assistant", "content": ""} and pieces[-1]["delta"] == {}
        assert "".join(piece["delta"].get("content", "") for piece in pieces) == choice["message"]["content"]
        assert [piece["finish_reason"] for piece in pieces] == [None] * (len(pieces) - 1) + ["length"]
        assert len({tuple(piece) for piece in pieces[1:]}) == 1
        if "return_token_ids" in more:
            assert [token for piece in pieces for token in piece.get("token_ids", ())] == choice["token_ids"]
        if "logprobs" in more:
            told = [entry for piece in pieces if piece["logprobs"] for entry in piece["logprobs"]["content"]]
            assert told == choice["logprobs"]["content"]


def test_a_client_that_reads_late_gets_every_event(server: Server) -> None:
    """It lets the server's buffers fill up: what then comes at a time is more than one step's."""
    body = {**COMPLETION, "max_tokens": 3000, "stream": True, "return_token_ids": True}
    data = msgspec.json.encode(body)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(data)}\r\n"
    host, port = server.url.removeprefix("http://").split(":")
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect((host, int(port)))
        connection.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + data)
        server.wait_for(lambda: server.metrics()["quire:num_requests_running"] > 0, "the request")
        server.wait_for(lambda: server.metrics()["quire:num_requests_running"] == 0, "the end of its computing")
        received = b""
        while piece := connection.recv(1 << 16):
            received += piece
    events = _events(received)
    assert events[-1] == b"[DONE]"
    choices = [json.loads(item)["choices"][0] for item in events[:-1]]
    assert len(choices) == 3000 and all(len(choice["token_ids"]) == 1 for choice in choices)
    with server.http() as http:
        whole = http.post("/v1/completions", json={**body, "stream": False}).json()["choices"][0]
    assert [choice["token_ids"][0] for choice in choices] == whole["token_ids"]
    assert "".join(choice["text"] for choice in choices) == whole["text"]


def _events(answer: bytes) -> list[bytes]:
    """The data of the events in a chunked answer."""
    rest, body = answer.partition(b"\r\n\r\n")[2], b""
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        body += rest[: int(size, 16)]
        rest = rest[int(size, 16) + 2 :]
    return [part.removeprefix(b"data: ") for part in body.split(b"\n\n") if part]
