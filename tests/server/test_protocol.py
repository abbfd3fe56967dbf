"""The forms of requests, answers and errors, beside the twelve traps."""

import json
from typing import Any

import httpx
import openai
import pytest

from quire.server.protocol import NO_EFFECT, NOT_YET

HELLO = [{"role": "user", "content": "Hello"}]
ERROR_KEYS = {"message", "type", "param", "code"}


def post(http: httpx.Client, path: str = "/v1/completions", **body: Any) -> httpx.Response:
    first = {"messages": HELLO} if "chat" in path else {"prompt": "Hello"}
    text = json.dumps({"model": "tiny", **first, "max_tokens": 2, "ignore_eos": True, **body})
    return http.post(path, content=text, headers={"content-type": "application/json"})


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.json().keys() == {"error"}
    error: dict[str, Any] = response.json()["error"]
    assert error.keys() == ERROR_KEYS and error["message"]
    assert response.headers["x-request-id"].startswith("req-")
    return error


# -- answers -----------------------------------------------------------------------------------------------------------------
def test_a_chat_completion_has_all_its_fields(http: httpx.Client) -> None:
    found = post(http, "/v1/chat/completions").json()
    assert found["object"] == "chat.completion" and found["model"] == "tiny"
    assert found["id"].startswith("chatcmpl-") and isinstance(found["created"], int) and found["system_fingerprint"]
    (choice,) = found["choices"]
    assert choice["index"] == 0 and choice["finish_reason"] == "length" and choice["logprobs"] is None
    assert choice["message"].keys() >= {"role", "content", "refusal"} and choice["message"]["role"] == "assistant"
    usage = found["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["completion_tokens"] == 2
    assert usage["prompt_tokens_details"]["cached_tokens"] <= usage["prompt_tokens"]


def test_the_prefix_cache_shows_in_usage_and_a_salt_keeps_it_apart(http: httpx.Client) -> None:
    prompt = "a prompt that is long enough for several blocks " * 6
    options = {"prompt": prompt, "cache_salt": "mine"}

    def cached(**options: Any) -> int:
        return int(post(http, **options).json()["usage"]["prompt_tokens_details"]["cached_tokens"])

    assert cached(**options) == 0
    assert cached(**options) > 16
    assert cached(prompt=prompt, cache_salt="another's") == 0


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_usage_of_a_stream_is_its_last_chunk(server: Any, path: str) -> None:
    with server.client() as client:
        options: dict[str, Any] = {"model": "tiny", "max_tokens": 5, "stream": True, "extra_body": {"ignore_eos": True}}
        options |= {"messages": HELLO} if "chat" in path else {"prompt": "Hello"}
        make = client.chat.completions if "chat" in path else client.completions
        *others, last = make.create(**options, stream_options={"include_usage": True})
        assert last.choices == [] and last.usage.completion_tokens == 5
        assert all(chunk.usage is None and chunk.choices for chunk in others)
        assert len({chunk.id for chunk in others} | {last.id}) == 1
        plain = list(make.create(**options))
        assert all(chunk.usage is None and chunk.choices for chunk in plain)


def test_a_stream_is_server_sent_events_and_ends_with_done(http: httpx.Client) -> None:
    with http.stream(
        "POST", "/v1/chat/completions", json={"messages": HELLO, "max_tokens": 2, "stream": True}
    ) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"


@pytest.mark.parametrize("stream", [False, True])
def test_many_prompts_and_n_are_numbered_in_order(client: openai.OpenAI, stream: bool) -> None:
    prompts = ["One", "Two", "Three"]
    options: dict[str, Any] = {"model": "tiny", "max_tokens": 4, "temperature": 0, "extra_body": {"ignore_eos": True}}
    alone = [client.completions.create(prompt=prompt, **options).choices[0].text for prompt in prompts]
    found: Any = client.completions.create(prompt=prompts, n=2, stream=stream, **options)
    texts = dict.fromkeys(range(6), "")
    for chunk in found if stream else [found]:
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert list(texts.values()) == [text for text in alone for _ in range(2)]


def test_prompts_may_be_token_ids(http: httpx.Client) -> None:
    ids = http.post("/tokenize", json={"prompt": "Hello"}).json()["tokens"]
    options = {"temperature": 0, "max_tokens": 6}
    text = post(http, **options).json()["choices"][0]["text"]
    assert post(http, prompt=ids, **options).json()["choices"][0]["text"] == text
    found = post(http, prompt=[ids, ids], **options).json()
    assert [choice["text"] for choice in found["choices"]] == [text, text]
    assert found["usage"]["prompt_tokens"] == 2 * len(ids)


def test_extras_of_vllm_are_acted_on(http: httpx.Client) -> None:
    ids = http.post("/tokenize", json={"prompt": "one two three four"}).json()["tokens"]
    (choice,) = post(http, allowed_token_ids=[300], return_token_ids=True, prompt_logprobs=1).json()["choices"]
    assert choice["token_ids"] == [300, 300] and choice["prompt_token_ids"]
    assert choice["prompt_logprobs"][0] is None and len(choice["prompt_logprobs"]) == len(choice["prompt_token_ids"])
    (choice,) = post(http, prompt=ids, truncate_prompt_tokens=2, return_token_ids=True).json()["choices"]
    assert choice["prompt_token_ids"] == ids[-2:]
    (choice,) = post(http, stop_token_ids=[300], allowed_token_ids=[300], max_tokens=9).json()["choices"]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", 300)
    found = post(http, logit_bias={"301": 100}, temperature=0, return_token_ids=True).json()
    assert found["choices"][0]["token_ids"] == [301, 301]
    assert post(http, priority=-3, request_id="a label", top_k=5, min_p=0.1, bad_words=["x"]).status_code == 200


def test_a_message_can_be_gone_on_with(http: httpx.Client) -> None:
    messages = [*HELLO, {"role": "assistant", "content": "I am"}]
    tokenize = {"messages": messages, "continue_final_message": True}
    text = http.post("/detokenize", json={"tokens": http.post("/tokenize", json=tokenize).json()["tokens"]}).json()[
        "prompt"
    ]
    assert text.endswith("I am")
    assert post(http, "/v1/chat/completions", messages=messages, continue_final_message=True).status_code == 200
    both = {"continue_final_message": True, "add_generation_prompt": True}
    error = error_of(post(http, "/v1/chat/completions", messages=messages, **both), 400)
    assert error["param"] == "continue_final_message"


# -- what is refused, and what has no effect ---------------------------------------------------------------------------------
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_unknown_fields_are_named(http: httpx.Client, path: str) -> None:
    error = error_of(post(http, path, temprature=1), 400)
    assert error["param"] == "temprature" and error["type"] == "invalid_request_error"
    assert error_of(post(http, path, stream_options={"nope": 1}, stream=True), 400)["param"] == "stream_options.nope"
    assert error_of(post(http, path, stream_options={"include_usage": True}), 400)["param"] == "stream_options"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("structured_outputs", {"regex": "a"}),
        ("guided_json", {}),
        ("guided_regex", "a"),
        ("guided_choice", ["a"]),
        ("guided_grammar", "a"),
        ("response_format", {"type": "json_object"}),
        ("response_format", {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}}),
        ("suffix", "end"),
        ("functions", [{}]),
        ("function_call", {"name": "f"}),
        ("modalities", ["audio"]),
        ("chat_template", "{{ messages }}"),
        ("chat_template_kwargs", {"messages": "x"}),
        ("top_logprobs", 2),
        ("tool_choice", "required"),
    ],
)
def test_what_is_not_there_yet_is_refused_by_name(http: httpx.Client, field: str, value: Any) -> None:
    of_completions = field == "suffix"
    error = error_of(post(http, "/v1/completions" if of_completions else "/v1/chat/completions", **{field: value}), 400)
    assert error["param"] == field


def test_what_asks_for_nothing_is_taken(http: httpx.Client) -> None:
    harmless = {name: values[0] for name, values in NOT_YET.items() if values and name not in ("suffix",)}
    assert post(http, "/v1/chat/completions", **harmless, response_format={"type": "text"}).status_code == 200
    assert post(http, suffix="", best_of=1).status_code == 200
    nothing = dict.fromkeys([*NOT_YET, "tools", "stop", "seed", "user", "n", "temperature", "top_logprobs"])
    nothing.pop("suffix")
    assert post(http, "/v1/chat/completions", **nothing).status_code == 200


def test_fields_without_effect_are_taken(http: httpx.Client) -> None:
    values: dict[str, Any] = {
        **dict.fromkeys(NO_EFFECT, "x"),
        "metadata": {"a": "b"},
        "store": True,
        "prediction": {"type": "content", "content": "x"},
        "spaces_between_special_tokens": False,
        "stream": True,
        "stream_options": {"include_obfuscation": False},
    }
    del values["stream_options.include_obfuscation"], values["tools.function.strict"]
    assert post(http, "/v1/chat/completions", **values).status_code == 200


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": 1000}, "n"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"stop": [1]}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"6400": 1}}, "logit_bias"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"allowed_token_ids": []}, "allowed_token_ids"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": 21, "echo": True}, "logprobs"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [6400]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [1 << 40]}, "prompt"),
        ({"prompt": "\ud800"}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": ["a", 5]}, "prompt"),
        ({"priority": 1 << 40}, "priority"),
        ({"cache_salt": ""}, "cache_salt"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"seed": 1 << 70}, "seed"),
        ({"min_tokens": 9}, "min_tokens"),
    ],
)
def test_values_out_of_range_name_their_field(http: httpx.Client, options: dict[str, Any], param: str) -> None:
    assert error_of(post(http, **options), 400)["param"] == param
    assert error_of(post(http, **options, stream=True), 400)["param"] == param


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"messages": []}, "messages"),
        ({"messages": "Hello"}, "messages"),
        ({"messages": [{"content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages"),
    ],
)
def test_chat_names_its_own_fields(http: httpx.Client, options: dict[str, Any], param: str) -> None:
    assert error_of(post(http, "/v1/chat/completions", **options), 400)["param"] == param


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_context_overflow_is_a_400(http: httpx.Client, path: str) -> None:
    long = "word " * 9000
    given = {"messages": [{"role": "user", "content": long}]} if "chat" in path else {"prompt": long}
    error = error_of(post(http, path, **given), 400)
    assert error["code"] == "context_length_exceeded" and "8192" in error["message"]
    assert error_of(post(http, path, max_tokens=8192), 400)["code"] == "context_length_exceeded"
    assert post(http, path, **given, truncate_prompt_tokens=-1).status_code == 200


def test_an_unknown_model_is_a_404(http: httpx.Client) -> None:
    for path in ("/v1/completions", "/v1/chat/completions"):
        error = error_of(post(http, path, model="gpt-9"), 404)
        assert error["param"] == "model" and error["code"] == "model_not_found"
    error_of(http.get("/v1/models/gpt-9"), 404)


def test_paths_methods_and_bodies_that_are_wrong(http: httpx.Client) -> None:
    error_of(http.get("/nope"), 404)
    error_of(http.get("/v1/models/"), 404)
    assert error_of(http.get("/v1/completions"), 405)["type"] == "invalid_request_error"
    error_of(http.post("/v1/models"), 405)
    json_type = {"content-type": "application/json"}
    for body in (b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b"[" * 100_000, b'{"prompt": 1e999999}'):
        error_of(http.post("/v1/completions", content=body, headers=json_type), 400)
    error_of(http.post("/v1/completions", content=b'{"prompt": "x"}', headers={"content-type": "text/plain"}), 400)
    digits = b'{"prompt": "x", "temperature": ' + b"9" * 5000 + b"}"
    error_of(http.post("/v1/completions", content=digits, headers=json_type), 400)
    for depth in (100, 500, 900, 990):
        nested = b"[" * depth + b"]" * depth
        for body in (
            b'{"messages": [{"role": "user", "content": %s}]}',
            b'{"messages": %s}',
            b'{"messages": [{"a": %s}]}',
        ):
            error_of(http.post("/v1/chat/completions", content=body % nested, headers=json_type), 400)
    for value in (b"NaN", b"Infinity"):
        body = b'{"prompt": "x", "temperature": ' + value + b"}"
        assert error_of(http.post("/v1/completions", content=body, headers=json_type), 400)["param"] == "temperature"


# -- the other routes --------------------------------------------------------------------------------------------------------
def test_models(client: openai.OpenAI, http: httpx.Client) -> None:
    (model,) = client.models.list().data
    assert model.id == "tiny" and model.object == "model"
    assert client.models.retrieve("tiny").id == "tiny"
    (card,) = http.get("/v1/models").json()["data"]
    assert card.keys() >= {"created", "owned_by", "root", "parent"} and card["max_model_len"] == 8192


def test_tokens_and_back(http: httpx.Client) -> None:
    found = http.post("/tokenize", json={"prompt": "Hello — wörld", "return_token_strs": True}).json()
    assert found["count"] == len(found["tokens"]) == len(found["token_strs"]) and found["max_model_len"] == 8192
    assert http.post("/detokenize", json={"tokens": found["tokens"]}).json() == {"prompt": "Hello — wörld"}
    chat = http.post("/tokenize", json={"model": "tiny", "messages": HELLO}).json()
    assert chat["count"] == post(http, "/v1/chat/completions").json()["usage"]["prompt_tokens"]
    error_of(http.post("/tokenize", json={}), 400)
    assert error_of(http.post("/detokenize", json={"tokens": [6400]}), 400)["param"] == "tokens"


def test_version_and_health(http: httpx.Client) -> None:
    from quire import __version__

    assert http.get("/version").json() == {"version": __version__}
    assert http.get("/health").json() == {"status": "ok"}
