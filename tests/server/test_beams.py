"""Beam search and best_of over HTTP: the same answers as `LLM.beam_search`, streamed or whole."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from quire import LLM, BeamSearchParams

PROMPT = "Hello, how are you?"
BEAM = {"use_beam_search": True, "ignore_eos": True, "return_token_ids": True}
PATHS = ["/v1/completions", "/v1/chat/completions"]


def ask(http: httpx.Client, path: str = "/v1/completions", **body: Any) -> httpx.Response:
    first = {"messages": [{"role": "user", "content": PROMPT}]} if "chat" in path else {"prompt": PROMPT}
    return http.post(path, json={**first, "max_tokens": 12, **body})


def read(response: httpx.Response) -> list[dict[str, Any]]:
    """The choices of a stream, in the order in which they came."""
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
    assert lines[-1] == "[DONE]"
    return [choice for line in lines[:-1] for choice in json.loads(line)["choices"]]


@pytest.fixture(scope="module")
def llm(chat_model: Path) -> Any:
    with LLM(str(chat_model), load_format="dummy", num_threads=1, max_num_seqs=16) as made:
        yield made


@pytest.mark.parametrize(
    "options",
    [
        {"n": 4},
        {"n": 2, "best_of": 5, "length_penalty": 2.0, "early_stopping": True},
        {"n": 3, "length_penalty": 0.5, "early_stopping": "never", "min_tokens": 4, "ignore_eos": False},
        {"n": 3, "repetition_penalty": 1.3, "bad_words": ["the"], "temperature": 0},
        {"n": 1},
    ],
)
def test_beams_are_those_of_the_library(http: httpx.Client, llm: LLM, options: dict[str, Any]) -> None:
    found = ask(http, **{**BEAM, **options}).json()["choices"]
    given = {"ignore_eos": True, **options}
    given["beam_width"] = given.pop("best_of", given["n"])
    (output,) = llm.beam_search([PROMPT], BeamSearchParams(max_tokens=12, **given))
    prompt = found[0]["prompt_token_ids"]
    assert [prompt + choice["token_ids"] for choice in found] == [beam.tokens for beam in output.sequences]
    assert [choice["index"] for choice in found] == list(range(options["n"]))
    for choice, beam in zip(found, output.sequences):
        assert choice["beam_score"] == pytest.approx(beam.score, abs=1e-4)
        assert choice["cumulative_logprob"] == pytest.approx(beam.cum_logprob, abs=1e-4)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("extra", [{}, {"stop": ["e", "qu"]}, {"logprobs": True}])
def test_a_stream_of_beams_adds_up_to_the_whole(http: httpx.Client, path: str, extra: dict[str, Any]) -> None:
    options = {**BEAM, "n": 3, "best_of": 4, "max_tokens": 20, **extra}
    if "logprobs" in extra:
        options["logprobs"] = True if "chat" in path else 1
    whole = ask(http, path, **options).json()["choices"]
    texts, tokens, ends = [""] * 3, [[] for _ in range(3)], {}
    before_the_end = [""] * 3
    for choice in read(ask(http, path, **options, stream=True)):
        index = choice["index"]
        texts[index] += choice["delta"].get("content", "") if "chat" in path else choice["text"]
        tokens[index] += choice.get("token_ids", [])
        if choice["finish_reason"]:
            ends[index] = (choice["finish_reason"], choice["stop_reason"], choice["beam_score"])
        elif not ends and "beam_score" not in choice:
            before_the_end[index] = texts[index]
    expected = [choice["message"]["content"] if "chat" in path else choice["text"] for choice in whole]
    assert texts == expected
    assert tokens == [choice["token_ids"] for choice in whole]
    assert [ends[i] for i in range(3)] == [(c["finish_reason"], c["stop_reason"], c["beam_score"]) for c in whole]
    # what was told while it ran is the same for all
    assert len(set(before_the_end)) == 1


def test_what_has_settled_is_told_before_the_end(stories: Path, make_server: Callable[..., Any]) -> None:
    """Beams of a trained model agree on what lies a few tokens back."""
    server = make_server("--load-format", "auto", "--num-gpu-blocks-override", "512", model=stories)
    with server.http() as http:
        body = {"prompt": "Once upon a time", **BEAM, "n": 3, "max_tokens": 120}
        whole = http.post("/v1/completions", json=body).json()["choices"]
        choices = read(http.post("/v1/completions", json={**body, "stream": True}))
    for index in range(3):
        mine = [choice for choice in choices if choice["index"] == index]
        assert [choice["finish_reason"] for choice in mine] == [None] * (len(mine) - 1) + ["length"]
        assert len(mine) > 5 and sum(len(choice["token_ids"]) for choice in mine[:-1]) > 60
        assert "".join(choice["text"] for choice in mine) == whole[index]["text"]
    server.wait_until_empty()
    server.stop()


def test_the_models_recommendations_do_not_leak_into_beams(
    chat_model: Path, make_server: Callable[..., Any], tmp_path: Path
) -> None:
    """A model that recommends sampling is asked for beams all the same, and may not draw by it."""
    model = tmp_path / "recommends"
    model.mkdir()
    for file in chat_model.iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    recommended = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20}
    (model / "generation_config.json").write_text(json.dumps(recommended))
    server = make_server("--num-gpu-blocks-override", "512", model=model)
    with server.http() as http:
        for path in PATHS:
            response = ask(http, path, **BEAM, n=2)
            assert response.status_code == 200 and len(response.json()["choices"]) == 2
            assert ask(http, path, **BEAM, n=2, temperature=0.5).json()["error"]["param"] == "temperature"
    server.wait_until_empty()
    server.stop()


def test_best_of_gives_the_likeliest(http: httpx.Client) -> None:
    options = {"temperature": 1.0, "seed": 7, "ignore_eos": True, "logprobs": 0}

    def likelihoods(**options: Any) -> list[tuple[float, str]]:
        choices = ask(http, **options).json()["choices"]
        return [(sum(choice["logprobs"]["token_logprobs"]), choice["text"]) for choice in choices]

    every = likelihoods(**options, n=6)
    best = likelihoods(**options, n=2, best_of=6)
    assert [text for _, text in best] == [text for _, text in sorted(every, key=lambda one: -one[0])[:2]]
    found = ask(http, "/v1/chat/completions", n=2, best_of=3, ignore_eos=True)
    assert [choice["index"] for choice in found.json()["choices"]] == [0, 1]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({**BEAM, "n": 129}, "n"),
        ({**BEAM, "best_of": 129}, "best_of"),
        ({**BEAM, "n": 4, "best_of": 3}, "best_of"),
        ({**BEAM, "temperature": 0.7}, "temperature"),
        ({**BEAM, "top_p": 0.5}, "temperature"),
        ({**BEAM, "length_penalty": 1e9}, "length_penalty"),
        ({**BEAM, "early_stopping": "soon"}, "early_stopping"),
        ({**BEAM, "early_stopping": 1}, "early_stopping"),
        ({"length_penalty": 2.0}, "length_penalty"),
        ({"early_stopping": True}, "early_stopping"),
        ({"best_of": 2, "stream": True}, "best_of"),
        ({"best_of": 0}, "best_of"),
        ({**BEAM, "n": 17}, "n"),  # more than run at once
    ],
)
def test_what_is_wrong_is_named(
    server: Any, http: httpx.Client, path: str, options: dict[str, Any], param: str
) -> None:
    response = ask(http, path, **options)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param
    server.wait_until_empty()


def test_widths_above_the_operators_cap_name_their_field(make_server: Callable[..., Any]) -> None:
    server = make_server("--max-n", "4", "--num-gpu-blocks-override", "64", "--max-model-len", "512")
    with server.http() as http:
        for path in PATHS:
            for options, param in (({"n": 5}, "n"), ({"best_of": 5}, "best_of")):
                error = ask(http, path, **BEAM, **options).json()["error"]
                assert error["param"] == param and "at most 4" in error["message"]
            assert ask(http, path, **BEAM, n=4).status_code == 200
        # each fits by itself, all of them never do
        error = ask(http, **BEAM, n=4, max_tokens=490).json()["error"]
        assert "KV blocks" in error["message"]
    server.wait_until_empty()
    server.stop()


def test_a_client_that_leaves_ends_its_beams(server: Any) -> None:
    before = server.wait_until_empty()
    body = {"prompt": PROMPT, **BEAM, "n": 4, "max_tokens": 6000}
    with server.http() as http:
        with http.stream("POST", "/v1/completions", json={**body, "stream": True}) as response:
            next(response.iter_lines())
        with pytest.raises(httpx.ReadTimeout):
            http.post("/v1/completions", json=body, timeout=1.0)
    after = server.wait_until_empty()
    assert after["quire:request_aborts_total"] == before["quire:request_aborts_total"] + 2


def test_the_official_client_gets_scores(client: openai.OpenAI) -> None:
    found = client.completions.create(model="tiny", prompt=PROMPT, n=2, max_tokens=4, extra_body=BEAM)
    scores = [choice.model_extra["beam_score"] for choice in found.choices if choice.model_extra]
    assert len(scores) == 2 and scores == sorted(scores, reverse=True)
