"""The twelve traps of OpenAI-compatible servers, each a test, by the official client where it can say it.

6 and 7, which are about tool calls, are in test_tools.py, where a model makes them.
"""

import asyncio
from typing import Any

import httpx
import openai
import pytest

from quire.engine.tokenizer import Tokenizer

HELLO: list[Any] = [{"role": "user", "content": "Hello"}]
GO_ON = {"ignore_eos": True}


@pytest.fixture(scope="module")
def tokenizer(chat_model: Any) -> Tokenizer:
    return Tokenizer.from_dir(chat_model)


def test_1_max_completion_tokens_wins(client: openai.OpenAI) -> None:
    done = client.chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=9, max_completion_tokens=4, extra_body=GO_ON
    )
    assert done.usage is not None and done.usage.completion_tokens == 4
    assert done.choices[0].finish_reason == "length"


@pytest.mark.parametrize("as_list", [False, True])
def test_2_a_stop_string_over_several_tokens_never_leaks(client: openai.OpenAI, as_list: bool) -> None:
    options: dict[str, Any] = {"model": "tiny", "prompt": "Hello", "max_tokens": 60, "seed": 3, "extra_body": GO_ON}
    whole = client.completions.create(**options).choices[0].text
    stop = whole[40:52]  # random tokens are a few characters each: it spans several
    cut = whole[: whole.index(stop)]
    options["stop"] = ["never there", stop] if as_list else stop
    done = client.completions.create(**options).choices[0]
    assert (done.text, done.finish_reason) == (cut, "stop")
    assert done.stop_reason == stop  # type: ignore[attr-defined]
    pieces = list(client.completions.create(stream=True, **options))
    told = ""
    for piece in pieces:
        told += piece.choices[0].text
        assert cut.startswith(told)
    assert told == cut
    assert [piece.choices[0].finish_reason for piece in pieces] == [None] * (len(pieces) - 1) + ["stop"]


def test_3_half_a_character_is_held_back(client: openai.OpenAI, tokenizer: Tokenizer) -> None:
    parts = tokenizer.encode("🙂")
    assert len(parts) > 1  # each is a piece of the character
    options = {"allowed_token_ids": parts, "ignore_eos": True, "return_token_ids": True}
    stream = client.completions.create(
        model="tiny", prompt="x", n=16, seed=1, max_tokens=32, stream=True, extra_body=options
    )
    texts, tokens = [""] * 16, [b""] * 16
    for chunk in stream:
        (choice,) = chunk.choices
        texts[choice.index] += choice.text
        tokens[choice.index] += b"".join(map(tokenizer.token_bytes, choice.token_ids))  # type: ignore[attr-defined]
    assert texts == [data.decode("utf-8", "replace") for data in tokens]
    assert any("🙂" in text for text in texts)  # a stream that held nothing back would have torn it


def test_4_streams_of_n_interleave_their_index(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": "tiny", "messages": HELLO, "max_tokens": 12, "n": 3, "seed": 5}
    whole = client.chat.completions.create(**options, extra_body=GO_ON)
    chunks = list(client.chat.completions.create(**options, stream=True, extra_body=GO_ON))
    texts = {choice.index: "" for choice in whole.choices}
    roles: dict[int, str | None] = {}
    ends: dict[int, str | None] = {}
    order = []
    for chunk in chunks:
        (choice,) = chunk.choices
        roles.setdefault(choice.index, choice.delta.role)
        assert choice.index not in ends
        texts[choice.index] += choice.delta.content or ""
        order.append(choice.index)
        if choice.finish_reason:
            ends[choice.index] = choice.finish_reason
    assert roles == dict.fromkeys(range(3), "assistant")
    assert texts == {choice.index: choice.message.content for choice in whole.choices}
    assert len(set(texts.values())) == 3
    assert ends == dict.fromkeys(range(3), "length")
    assert order != sorted(order)


def test_5_logprobs_without_alternatives(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": "tiny", "messages": HELLO, "max_tokens": 3, "logprobs": True}
    done = client.chat.completions.create(**options, top_logprobs=0, extra_body=GO_ON)
    content = done.choices[0].logprobs.content  # type: ignore[union-attr]
    assert content is not None and len(content) == 3
    for token in content:
        assert token.logprob < 0 and token.top_logprobs == [] and token.bytes
    done = client.chat.completions.create(**options, top_logprobs=2, extra_body=GO_ON)
    content = done.choices[0].logprobs.content  # type: ignore[union-attr]
    assert content is not None and [len(token.top_logprobs) for token in content] == [2, 2, 2]
    assert all(token.top_logprobs[0].logprob >= token.top_logprobs[1].logprob for token in content)


def test_8_a_seed_reproduces_whatever_else_runs(server: Any) -> None:
    async def ask() -> None:
        client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)

        async def one(seed: int | None, prompt: str = "Hello there") -> str:
            done = await client.completions.create(
                model="tiny", prompt=prompt, max_tokens=20, seed=seed, temperature=1.5, extra_body=GO_ON
            )
            return done.choices[0].text

        alone = await one(7)
        others = (one(None, f"Another prompt {i} " * (i + 1)) for i in range(12))
        together = await asyncio.gather(*others, one(7), one(8))
        assert together[-2] == alone != together[-1]
        await client.close()

    asyncio.run(ask())


def test_9_temperature_zero_is_greedy(client: openai.OpenAI) -> None:
    done = client.chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=8, temperature=0, logprobs=True, top_logprobs=1, extra_body=GO_ON
    )
    content = done.choices[0].logprobs.content  # type: ignore[union-attr]
    assert content is not None
    for token in content:
        assert token.token == token.top_logprobs[0].token


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("as_ids", [False, True])
def test_10_echo_scores_a_prompt_and_draws_nothing(
    client: openai.OpenAI, tokenizer: Tokenizer, stream: bool, as_ids: bool
) -> None:
    text = "The quick brown fox — jumps"
    ids = tokenizer.encode(text)
    found: Any = client.completions.create(
        model="tiny", prompt=ids if as_ids else text, echo=True, logprobs=2, max_tokens=0, stream=stream
    )
    if stream:
        (found, *rest) = list(found)
        assert not any(chunk.choices[0].text for chunk in rest)
    choice = found.choices[0]
    assert choice.text == text
    assert choice.finish_reason == "length"
    assert len(choice.logprobs.tokens) == len(choice.logprobs.text_offset) == len(ids)
    assert choice.logprobs.token_logprobs[0] is None and choice.logprobs.top_logprobs[0] is None
    assert all(logprob < 0 for logprob in choice.logprobs.token_logprobs[1:])
    assert all(2 <= len(top) <= 3 for top in choice.logprobs.top_logprobs[1:])
    for token, offset in zip(choice.logprobs.tokens, choice.logprobs.text_offset):
        assert token.startswith("bytes:") or text.startswith(token, offset)
    if not stream:
        assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (len(ids), 0)


def test_10_echo_comes_before_what_is_generated(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": "tiny", "prompt": "One two", "max_tokens": 3, "temperature": 0}
    plain = client.completions.create(**options, logprobs=1, extra_body=GO_ON).choices[0]
    echoed = client.completions.create(**options, logprobs=1, echo=True, extra_body=GO_ON).choices[0]
    assert echoed.text == "One two" + plain.text
    assert echoed.logprobs is not None and plain.logprobs is not None
    assert echoed.logprobs.tokens[-3:] == plain.logprobs.tokens  # type: ignore[index]
    assert echoed.logprobs.token_logprobs[-3:] == pytest.approx(plain.logprobs.token_logprobs)  # type: ignore[index]


def test_11_content_may_be_a_list_of_parts(client: openai.OpenAI, http: httpx.Client) -> None:
    parts: list[Any] = [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]
    options: dict[str, Any] = {"model": "tiny", "max_tokens": 6, "temperature": 0, "extra_body": GO_ON}
    plain = client.chat.completions.create(messages=HELLO, **options)
    listed = client.chat.completions.create(messages=parts, **options)
    assert listed.choices[0].message.content == plain.choices[0].message.content
    image = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://localhost/x"}}]}]
    refused = http.post("/v1/chat/completions", json={"model": "tiny", "messages": image})
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "messages"


@pytest.mark.parametrize("stream", [True, False])
def test_12_a_client_that_leaves_frees_its_blocks_at_once(server: Any, stream: bool) -> None:
    before = server.wait_until_empty()
    body = {"model": "tiny", "prompt": "Hello", "max_tokens": 8000, "n": 2, "ignore_eos": True, "stream": stream}
    with server.http() as http:
        if stream:
            with http.stream("POST", "/v1/completions", json=body) as response:
                assert next(response.iter_lines()).startswith("data: ")
        else:
            with pytest.raises(httpx.ReadTimeout):
                http.post("/v1/completions", json=body, timeout=0.5)
    after = server.wait_until_empty()
    assert after["quire:request_aborts_total"] == before["quire:request_aborts_total"] + 1
    # 8,000 steps are what it asked for
    assert after["quire:steps_total"] - before["quire:steps_total"] < 4000
