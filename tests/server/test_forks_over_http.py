"""POST /v1/fork: branches of a running completion, and what is refused; nothing is left behind by any of it."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

ENDLESS = {"prompt": "Hello, how are you?", "max_tokens": 4000, "ignore_eos": True, "stream": True, "temperature": 0}


class Stream:
    """A stream that is read as far as it is asked for."""

    def __init__(self, response: httpx.Response) -> None:
        self.response = response
        self.request_id = response.headers["x-request-id"]
        self.chunks: list[dict[str, Any]] = []
        self._lines = response.iter_lines()

    def read(self, count: int = -1) -> list[dict[str, Any]]:
        """So many chunks more, or all that are left."""
        found: list[dict[str, Any]] = []
        for line in self._lines if count else ():
            if not line:
                continue
            if line == "data: [DONE]":
                break
            found.append(json.loads(line.removeprefix("data: ")))
            if len(found) == count:
                break
        self.chunks += found
        return found

    @property
    def choices(self) -> list[dict[str, Any]]:
        return [choice for chunk in self.chunks for choice in chunk.get("choices", ())]

    def tokens(self, index: int = 0) -> list[int]:
        return [token for choice in self.choices if choice["index"] == index for token in choice["token_ids"]]

    @property
    def finish_reasons(self) -> dict[int, str]:
        return {choice["index"]: choice["finish_reason"] for choice in self.choices if choice["finish_reason"]}


@contextmanager
def stream(http: httpx.Client, path: str = "/v1/completions", **body: Any) -> Iterator[Stream]:
    with http.stream("POST", path, json={**body, "stream": True, "return_token_ids": True}) as response:
        if response.status_code != 200:
            response.read()
        assert response.status_code == 200, response.text
        yield Stream(response)


def fork(http: httpx.Client, request_id: str, **body: Any) -> httpx.Response:
    return http.post("/v1/fork", json={"request_id": request_id, "return_token_ids": True, "max_tokens": 8, **body})


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error: dict[str, Any] = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    return error


def greedy(http: httpx.Client, prompt: list[int], max_tokens: int = 8) -> list[int]:
    body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    tokens: list[int] = http.post("/v1/completions", json=body).json()["choices"][0]["token_ids"]
    return tokens


@pytest.mark.parametrize("kind", ["the answer's id", "x-request-id", "the prompt's id"])
def test_branches_go_on_from_where_the_parent_is(server: Any, http: httpx.Client, kind: str) -> None:
    with stream(http, **ENDLESS) as parent:
        (first,) = parent.read(1)
        names = {"the answer's id": first["id"], "x-request-id": parent.request_id}
        response = fork(http, names.get(kind, f"{parent.request_id}-0"), n=3)
        found = response.json()
        assert found["object"] == "text_completion" and found["id"].startswith("cmpl-")
        assert [choice["index"] for choice in found["choices"]] == [0, 1, 2]
        ids = [choice["request_id"] for choice in found["choices"]]
        assert ids == [f"{response.headers['x-request-id']}-{i}" for i in range(3)]
        prompt = found["choices"][0]["prompt_token_ids"]
        start = first["choices"][0]["prompt_token_ids"]
        parent.read(len(prompt) - len(start) + 8)
        # greedy: a branch says what its parent says, and what a request of its own would
        for choice in found["choices"]:
            assert choice["prompt_token_ids"] == prompt and choice["finish_reason"] == "length"
            assert prompt + choice["token_ids"] == (start + parent.tokens())[: len(prompt) + 8]
        assert greedy(http, prompt) == found["choices"][0]["token_ids"]
        usage = found["usage"]
        assert (usage["prompt_tokens"], usage["completion_tokens"]) == (len(prompt), 24)
        assert usage["prompt_tokens_details"]["cached_tokens"] >= len(prompt) - 2
    server.wait_until_empty()


def test_text_or_tokens_may_be_appended(server: Any, http: httpx.Client) -> None:
    appended = http.post("/tokenize", json={"prompt": " and so", "add_special_tokens": False}).json()["tokens"]
    with stream(http, **ENDLESS) as parent:
        (first,) = parent.read(1)
        start = first["choices"][0]["prompt_token_ids"]
        for how in ({"append": " and so"}, {"append_token_ids": appended}):
            (choice,) = fork(http, first["id"], **how).json()["choices"]
            prompt = choice["prompt_token_ids"]
            assert prompt[: len(start)] == start and prompt[-len(appended) :] == appended
            assert greedy(http, prompt) == choice["token_ids"]
    server.wait_until_empty()


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_stream_of_branches(server: Any, http: httpx.Client, path: str) -> None:
    body = {**ENDLESS, "messages": [{"role": "user", "content": "Hello"}]} if "chat" in path else ENDLESS
    body = {key: value for key, value in body.items() if key != ("prompt" if "chat" in path else "messages")}
    with stream(http, path, **body) as parent:
        (first,) = parent.read(1)
        options = {"n": 2, "max_tokens": 9, "logprobs": 1, "stream_options": {"include_usage": True}}
        with stream(http, "/v1/fork", request_id=first["id"], append=" then", **options) as branches:
            branches.read()
        assert branches.finish_reasons == {0: "length", 1: "length"}
        for index in range(2):
            mine = [choice for choice in branches.choices if choice["index"] == index]
            assert {choice["request_id"] for choice in mine} == {f"{branches.request_id}-{index}"}
            assert len(branches.tokens(index)) == 9
            assert greedy(http, mine[0]["prompt_token_ids"], 9) == branches.tokens(index)
            assert sum(len(choice["logprobs"]["tokens"]) for choice in mine if choice["logprobs"]) == 9
        assert branches.chunks[-1]["usage"]["completion_tokens"] == 18
        assert parent.read(1)  # it goes on
    server.wait_until_empty()


def test_branches_of_branches_and_of_each_choice(server: Any, http: httpx.Client) -> None:
    body = {**ENDLESS, "prompt": ["One", "Two"], "n": 2, "temperature": 1.0, "seed": 5}
    with stream(http, **body) as parent:
        while len({choice["index"] for choice in parent.choices}) < 4:
            parent.read(1)
        for index in range(4):
            (choice,) = fork(http, parent.chunks[0]["id"], index=index, temperature=0).json()["choices"]
            prompt = choice["prompt_token_ids"]
            start = next(c for c in parent.choices if c["index"] == index)["prompt_token_ids"]
            parent.read(4 * (len(prompt) - len(start)) + 8)
            assert prompt == (start + parent.tokens(index))[: len(prompt)]
            assert greedy(http, prompt) == choice["token_ids"]
        with stream(http, "/v1/fork", request_id=parent.request_id, index=3, n=2, max_tokens=3000) as branches:
            branches.read(2)
            own = branches.choices[0]["request_id"]
            (choice,) = fork(http, own, temperature=0).json()["choices"]
            assert greedy(http, choice["prompt_token_ids"]) == choice["token_ids"]
    server.wait_until_empty()


def test_seeds_make_branches_differ_and_repeat(server: Any, http: httpx.Client) -> None:
    def three() -> list[list[int]]:
        with stream(http, **{**ENDLESS, "max_tokens": 3000}) as parent:
            (first,) = parent.read(1)
            # the same tokens in the same place: what the parent has said meanwhile may not matter
            found = fork(http, first["id"], n=3, temperature=1.0, seed=3, append="\n\nOnce").json()["choices"]
        return [choice["token_ids"] for choice in found]

    branches = three()
    assert len({tuple(tokens) for tokens in branches}) == 3
    server.wait_until_empty()


def test_what_is_left_out_is_as_the_parent_has_it(server: Any, http: httpx.Client) -> None:
    body = {**ENDLESS, "max_tokens": 600, "allowed_token_ids": [300, 301], "logprobs": 0}
    with stream(http, **body) as parent:
        (first,) = parent.read(1)
        response = http.post("/v1/fork", json={"request_id": first["id"], "return_token_ids": True})
        (choice,) = response.json()["choices"]
        assert set(choice["token_ids"]) <= {300, 301} and choice["logprobs"]["tokens"]
        said = len(choice["prompt_token_ids"]) - len(first["choices"][0]["prompt_token_ids"])
        assert len(choice["token_ids"]) == 600 - said and choice["finish_reason"] == "length"
    server.wait_until_empty()


def test_a_branch_can_be_killed_and_its_siblings_go_on(server: Any, http: httpx.Client) -> None:
    with stream(http, **ENDLESS) as parent:
        (first,) = parent.read(1)
        with stream(http, "/v1/fork", request_id=first["id"], n=2, max_tokens=2000) as branches:
            branches.read(4)
            killed, other = f"{branches.request_id}-0", f"{branches.request_id}-1"
            assert http.delete(f"/v1/requests/{killed}").json() == {"id": killed, "object": "request", "deleted": True}
            branches.read()
            assert branches.finish_reasons == {0: "abort", 1: "length"}
            assert len(branches.tokens(1)) == 2000 > len(branches.tokens(0))
        for gone in (killed, other, branches.request_id):
            assert error_of(http.delete(f"/v1/requests/{gone}"), 404)["code"] == "request_not_found"
        assert http.delete(f"/v1/requests/{first['id']}").status_code == 200
        parent.read()
        assert parent.finish_reasons == {0: "abort"}
    server.wait_until_empty()


def test_who_leaves_a_fork_kills_its_branches(server: Any, http: httpx.Client) -> None:
    before = server.metrics()
    with stream(http, **ENDLESS) as parent:
        (first,) = parent.read(1)
        with stream(http, "/v1/fork", request_id=first["id"], n=4, max_tokens=3000) as branches:
            branches.read(1)
        server.wait_for(lambda: server.metrics()["quire:num_requests_running"] == 1, "the parent alone")
        with pytest.raises(httpx.ReadTimeout):
            http.post("/v1/fork", json={"request_id": first["id"], "n": 4, "max_tokens": 3000}, timeout=0.5)
        server.wait_for(lambda: server.metrics()["quire:num_requests_running"] == 1, "the parent alone")
        assert parent.read(1)
    after = server.wait_until_empty()
    assert after["quire:forked_requests_total"] == before["quire:forked_requests_total"] + 8
    assert after["quire:request_aborts_total"] == before["quire:request_aborts_total"] + 9


def test_what_does_not_run_is_not_found(server: Any, http: httpx.Client) -> None:
    done = http.post("/v1/completions", json={"prompt": "Hello", "max_tokens": 2}).json()["id"]
    hexadecimal = done.removeprefix("cmpl-")
    unknown = ("", "x", "cmpl-", "cmpl-" + "0" * 32, "req-" + "0" * 32 + "-0", "../health", "cmpl-é", hexadecimal)
    others = (done, f"req-{hexadecimal}", f"req-{hexadecimal}-0", f"req-{hexadecimal}-1", f"req-{hexadecimal}-999999")
    for request_id in (*unknown, *others):
        error = error_of(fork(http, request_id), 404)
        assert (error["type"], error["param"], error["code"]) == ("not_found_error", "request_id", "request_not_found")
        error_of(fork(http, request_id, stream=True), 404)
        if "/" not in request_id and request_id:
            error_of(http.delete(f"/v1/requests/{request_id}"), 404)
    server.wait_until_empty()


def test_a_choice_that_has_ended_is_not_found_and_one_that_never_was_is_wrong(server: Any, http: httpx.Client) -> None:
    with stream(http, **{**ENDLESS, "n": 2, "temperature": 1.0}) as parent:
        (first,) = parent.read(1)
        assert error_of(fork(http, first["id"], index=2), 400)["param"] == "index"
        assert error_of(fork(http, first["id"], index=-1), 400)["param"] == "index"
    with stream(http, **{**ENDLESS, "prompt": ["a", "b"], "max_tokens": 3000}) as parent:
        while len({choice["index"] for choice in parent.choices}) < 2:
            parent.read(1)
        request_id = f"{parent.request_id}-1"
        assert http.delete(f"/v1/requests/{request_id}").status_code == 200
        while 1 not in parent.finish_reasons:
            parent.read(1)
        error_of(fork(http, request_id), 404)
        error_of(fork(http, parent.request_id, index=1), 404)
        assert fork(http, parent.request_id, index=0).status_code == 200
    server.wait_until_empty()


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"append": "x", "append_token_ids": [1]}, "append"),
        ({"append_token_ids": [6400]}, "append_token_ids"),
        ({"append_token_ids": [-1]}, "append_token_ids"),
        ({"append": "word " * 9000}, "append"),
        ({"append": "\ud800"}, "append"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"logprobs": 21}, "logprobs"),
        ({"stop_token_ids": [6400]}, "stop_token_ids"),
        ({"logit_bias": {"6400": 1}}, "logit_bias"),
        ({"seed": 1 << 70}, "seed"),
        ({"stop": [""]}, "stop"),
        ({"use_beam_search": True}, "use_beam_search"),
        ({"prompt": "x"}, "prompt"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
    ],
)
def test_what_is_wrong_is_named_and_leaves_nothing(
    server: Any, http: httpx.Client, options: dict[str, Any], param: str
) -> None:
    with stream(http, **{**ENDLESS, "max_tokens": 500}) as parent:
        (first,) = parent.read(1)
        body = {"request_id": first["id"], "n": 3, **options}
        response = http.post("/v1/fork", content=json.dumps(body), headers={"content-type": "application/json"})
        assert error_of(response, 400)["param"] == param
        assert server.metrics()["quire:num_requests_running"] <= 1
        assert len(parent.tokens() + [t for c in parent.read() for t in c["choices"][0]["token_ids"]]) == 500
    server.wait_until_empty()


def test_a_beam_search_cannot_be_forked(server: Any, http: httpx.Client) -> None:
    body = {"prompt": "Hello", "max_tokens": 4000, "ignore_eos": True, "use_beam_search": True, "n": 2}
    with stream(http, **body) as parent:
        error = error_of(fork(http, parent.request_id), 400)
        assert error["param"] == "request_id" and "beam search" in error["message"]
    server.wait_until_empty()


@pytest.fixture(scope="module")
def keyed(make_server: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Two clients with keys of their own, few blocks, a short queue."""
    file: Path = tmp_path_factory.mktemp("keys") / "keys.toml"
    file.write_text('[alice]\nkey = ["alice-key", "alice-old"]\nweight = 2\n[bob]\nkey = "bob-key"\n')
    return make_server(
        *("--api-keys-file", str(file), "--max-num-seqs", "4", "--max-queue", "4", "--max-n", "8"),
        *("--num-gpu-blocks-override", "80", "--max-model-len", "1024"),
    )


@contextmanager
def as_client(server: Any, key: str) -> Iterator[httpx.Client]:
    with server.http(headers={"authorization": f"Bearer {key}"}) as http:
        yield http


def emptied(server: Any) -> None:
    def look() -> bool:
        found = server.metrics(headers={"authorization": "Bearer bob-key"})
        held = found['quire:kv_blocks{state="held"}'] + found['quire:kv_blocks{state="pending"}']
        return found["quire:num_requests_running"] + found["quire:num_requests_waiting"] + held == 0

    server.wait_for(look, "no request and no held block")


def test_a_request_is_its_keys_alone(keyed: Any) -> None:
    body = {**ENDLESS, "max_tokens": 900}
    with as_client(keyed, "alice-key") as alice, as_client(keyed, "bob-key") as bob, stream(alice, **body) as parent:
        parent.read(1)
        unknown = bob.post("/v1/fork", json={"request_id": "cmpl-" + "0" * 32}).json()["error"]
        for request_id in (parent.request_id, f"{parent.request_id}-0", parent.chunks[0]["id"]):
            error = error_of(fork(bob, request_id), 404)
            # in the words that an unknown one gets
            assert error["message"].replace(request_id, "cmpl-" + "0" * 32) == unknown["message"]
            assert error_of(bob.delete(f"/v1/requests/{request_id}"), 404) == error
            assert error_of(bob.get(f"/v1/requests/{request_id}/explain"), 404) == error
            # an index that is wrong for its owner is not found either
            error_of(fork(bob, request_id, index=7), 404)
        with as_client(keyed, "alice-old") as older:  # the same client, by another key
            assert fork(older, parent.request_id).status_code == 200
        assert alice.delete(f"/v1/requests/{parent.request_id}").status_code == 200
    emptied(keyed)
    tokens = keyed.metrics(headers={"authorization": "Bearer bob-key"})
    assert tokens['quire:client_generation_tokens_total{client="alice"}'] > 0
    assert 'quire:client_generation_tokens_total{client="bob"}' not in tokens
    assert "owner=alice" in keyed.log() and not any(key in keyed.log() for key in ("alice-", "bob-"))


def test_a_fork_that_cannot_fit_is_wrong(keyed: Any) -> None:
    with as_client(keyed, "alice-key") as alice, stream(alice, **{**ENDLESS, "max_tokens": 900}) as parent:
        parent.read(1)
        error = error_of(fork(alice, parent.request_id, n=3, append="word " * 1200), 400)
        assert error["param"] == "append" and "max_model_len" in error["message"]
        error = error_of(fork(alice, parent.request_id, n=9), 400)
        assert error["param"] == "n"
        assert parent.read(1)
    emptied(keyed)


def test_a_full_queue_refuses_branches_too(keyed: Any) -> None:
    body = {**ENDLESS, "max_tokens": 900}
    with as_client(keyed, "alice-key") as alice, as_client(keyed, "bob-key") as bob, stream(alice, **body) as parent:
        parent.read(1)
        leave = threading.Event()

        def occupy() -> None:
            with as_client(keyed, "alice-key") as http, stream(http, **{**body, "max_tokens": 300}, n=3) as other:
                while not leave.is_set() and other.read(1):
                    pass

        thread = threading.Thread(target=occupy)
        thread.start()

        def running() -> float:
            found: dict[str, float] = keyed.metrics(headers={"authorization": bob.headers["authorization"]})
            return found["quire:num_sequences_running"]

        keyed.wait_for(lambda: running() == 4, "four sequences")
        response = fork(alice, parent.request_id, n=5)
        assert error_of(response, 429)["code"] == "queue_full" and response.headers["retry-after"].isdigit()
        leave.set()
        thread.join()
        keyed.wait_for(lambda: running() == 1, "the parent alone")
        assert fork(alice, parent.request_id, n=5).status_code == 200  # more than run at once: they take turns
    emptied(keyed)


def test_forks_while_memory_is_short_are_right(keyed: Any) -> None:
    """Parent and branches together are more than fits: they are preempted and come back, and say what they would alone."""
    body = {**ENDLESS, "max_tokens": 500}
    with as_client(keyed, "alice-key") as alice, stream(alice, **body) as parent:
        parent.read(1)
        found = fork(alice, parent.request_id, n=3, max_tokens=450).json()["choices"]
        parent.read()
        whole = parent.choices[0]["prompt_token_ids"] + parent.tokens()
        for choice in found:
            start = len(choice["prompt_token_ids"])
            assert len(choice["token_ids"]) == 450
            assert (choice["prompt_token_ids"] + choice["token_ids"])[: len(whole)] == whole[: start + 450]
    emptied(keyed)
    counts = keyed.metrics(headers={"authorization": "Bearer bob-key"})
    assert counts["quire:num_preemptions_total"] > 0
    keyed.stop()
