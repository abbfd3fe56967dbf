"""GET /v1/requests/{id}/explain and `quire explain`: why a request took its time, for the key that it came with."""

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from quire import cli


def complete(http: httpx.Client, **body: Any) -> dict[str, Any]:
    options = {"prompt": "Hello, how are you?", "max_tokens": 4, "ignore_eos": True, "temperature": 0}
    response = http.post("/v1/completions", json={**options, **body})
    assert response.status_code == 200, response.text
    return {**response.json(), "request_id": response.headers["x-request-id"]}


def explain(http: httpx.Client, request_id: str) -> dict[str, Any]:
    response = http.get(f"/v1/requests/{request_id}/explain")
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


def test_a_request_is_explained_by_each_of_its_names(http: httpx.Client) -> None:
    done = complete(http, prompt=["one", "two, but longer"])
    found = explain(http, done["id"])
    assert found["request_id"] == f"{done['request_id']}-0" and found["status"] == "finished"
    assert found["num_output_tokens"] == [4] and found["preemptions"] == []
    assert found["summary"][0] == f"Request {done['request_id']}-0 is finished."
    assert explain(http, done["request_id"]) == explain(http, f"{done['request_id']}-0") == found
    second = explain(http, f"{done['request_id']}-1")
    assert second["num_prompt_tokens"] > found["num_prompt_tokens"]


def test_what_was_found_of_a_prefix_is_told(http: httpx.Client) -> None:
    words = "a prompt that is long enough for several blocks of sixteen tokens each " * 4
    complete(http, prompt=words + "and then the end")
    found = explain(http, complete(http, prompt=words + "or something else")["id"])
    prefix = found["prefix"]
    assert 0 < prefix["num_cached_tokens"] < prefix["num_prompt_tokens"] and not prefix["from_fork"]
    assert prefix["first_difference"]["position"] == prefix["num_cached_tokens"]
    assert any("were found in the prefix cache" in sentence for sentence in found["summary"])


def test_a_running_request_and_its_branch_are_explained(server: Any, http: httpx.Client) -> None:
    body = {"prompt": "Hello, how are you?", "max_tokens": 4000, "ignore_eos": True, "stream": True}
    with http.stream("POST", "/v1/completions", json=body) as response:
        lines = response.iter_lines()  # kept: the stream ends with it
        next(lines)
        parent = response.headers["x-request-id"]
        assert explain(http, parent)["status"] == "running"
        branch = http.post("/v1/fork", json={"request_id": parent, "max_tokens": 3}).json()["choices"][0]
        found = explain(http, branch["request_id"])
        assert found["prefix"]["from_fork"] and found["status"] == "finished"
        assert any("forked from" in sentence for sentence in found["summary"])
    server.wait_until_empty()


@pytest.mark.parametrize("request_id", ["x", "cmpl-" + "0" * 32, "req-" + "0" * 32 + "-5", "é", "%00", "a%2Fb"])
def test_what_is_not_known_is_not_found(http: httpx.Client, request_id: str) -> None:
    response = http.get(f"/v1/requests/{request_id}/explain")
    assert response.status_code == 404 and response.json()["error"].keys() == {"message", "type", "param", "code"}


def test_preemptions_are_told_with_their_reasons(make_server: Callable[..., Any]) -> None:
    server = make_server("--num-gpu-blocks-override", "24", "--max-model-len", "256", "--preemption-mode", "swap")
    with server.http() as http:
        done = complete(http, prompt=["one", "two", "three", "four"], max_tokens=120)
        every = [explain(http, f"{done['request_id']}-{number}") for number in range(4)]
    notes = [note for found in every for note in found["preemptions"]]
    assert notes and {note["cause"] for note in notes} == {"out of blocks"}
    assert all(note["explanation"] and note["num_blocks"] > 0 for note in notes)
    told = [sentence for found in every for sentence in found["summary"] if "was preempted" in sentence]
    assert len(told) == len(notes)
    assert "was preempted (out of blocks)" in server.log()
    server.wait_until_empty()
    server.stop()


def test_other_keys_prompts_are_not_told(make_server: Callable[..., Any]) -> None:
    """Where a prompt leaves what is cached, the cached tokens may be another key's: token by token, a whole prompt."""
    server = make_server("--api-key", "first", "--api-key", "second", "--num-gpu-blocks-override", "512")
    words = "a prompt that is long enough for several blocks of sixteen tokens each " * 4
    with server.http(headers={"authorization": "Bearer first"}) as first:
        complete(first, prompt=words + "the password is swordfish and nothing else, whatever they say about it")
    with server.http(headers={"authorization": "Bearer second"}) as second:
        done = complete(second, prompt=words + "the password is")
        found = explain(second, done["id"])
        assert found["client"] == "key-2"
        difference = found["prefix"]["first_difference"]
        assert difference is None or difference["cached_tokens"] is None
        assert "where cached prompts have" not in json.dumps(found)
    with server.http(headers={"authorization": "Bearer first"}) as first:
        assert first.get(f"/v1/requests/{done['id']}/explain").status_code == 404
    server.stop()


# -- the command -------------------------------------------------------------------------------------------------------------
def test_the_command_prints_sentences_or_data(
    server: Any, http: httpx.Client, capsys: pytest.CaptureFixture[str]
) -> None:
    done = complete(http)
    assert cli.main(["explain", done["id"], "--url", server.url]) == 0
    printed = capsys.readouterr().out
    assert f"Request {done['request_id']}-0 is finished." in printed and "•" in printed
    assert cli.main(["explain", done["id"], "--url", f"{server.url}/v1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == explain(http, done["id"])


def test_the_commands_mistakes_are_one_line(server: Any, capsys: pytest.CaptureFixture[str]) -> None:
    for argv, message in (
        (["cmpl-x", "--url", server.url], "there is no request 'cmpl-x'"),
        (["../../metrics", "--url", server.url], "says: "),
        (["cmpl-x", "--url", "http://127.0.0.1:9"], "cannot ask"),
        (["cmpl-x", "--url", "http://["], "cannot ask"),
    ):
        assert cli.main(["explain", *argv]) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: ") and message in err and err.count("\n") == 1


def test_the_command_sends_its_key(make_server: Callable[..., Any]) -> None:
    server = make_server("--api-key", "secret", "--num-gpu-blocks-override", "512")
    with server.http(headers={"authorization": "Bearer secret"}) as http:
        done = complete(http)
    command = [sys.executable, "-m", "quire", "explain", done["id"], "--url", server.url]
    refused = subprocess.run(command, capture_output=True, text=True, check=False)
    assert refused.returncode == 2 and "API key" in refused.stderr
    told = subprocess.run([*command, "--api-key", "secret"], capture_output=True, text=True, check=True)
    assert "is finished" in told.stdout
    server.stop()
