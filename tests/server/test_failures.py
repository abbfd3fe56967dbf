"""A request that fails inside a step fails alone: a model one of whose tokens has no number for an embedding."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import openai
import pytest
from safetensors.numpy import save_file

from support import TINY_CONFIG

POISON = 7
VOCAB = 96


@pytest.fixture(scope="module")
def poisoned(make_server: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    directory = tmp_path_factory.mktemp("poisoned")
    config = {**TINY_CONFIG, "tie_word_embeddings": False}
    (directory / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(0)
    hidden, inner, kv = 32, 48, 16
    shapes = {"model.embed_tokens": (VOCAB, hidden), "lm_head": (VOCAB, hidden), "model.norm": (hidden,)}
    for i in range(2):
        layer = f"model.layers.{i}"
        shapes |= {f"{layer}.{name}_layernorm": (hidden,) for name in ("input", "post_attention")}
        shapes |= {f"{layer}.self_attn.{name}_proj": (hidden, hidden) for name in "qo"}
        shapes |= {f"{layer}.self_attn.{name}_proj": (kv, hidden) for name in "kv"}
        shapes |= {f"{layer}.mlp.{name}_proj": (inner, hidden) for name in ("gate", "up")}
        shapes |= {f"{layer}.mlp.down_proj": (hidden, inner)}
    weights = {f"{name}.weight": rng.normal(0, 0.2, shape).astype(np.float32) for name, shape in shapes.items()}
    weights["model.embed_tokens.weight"][POISON] = np.nan
    save_file(weights, directory / "model.safetensors")
    options = ("--load-format", "auto", "--skip-tokenizer-init", "--num-gpu-blocks-override", "256")
    return make_server(*options, model=directory)


def test_a_request_that_fails_in_a_step_fails_alone(poisoned: Any) -> None:
    options: dict[str, Any] = {"model": "tiny", "max_tokens": 100, "temperature": 0}
    # what the model may draw leaves the poisoned token out
    extra = {"ignore_eos": True, "return_token_ids": True, "logit_bias": {str(POISON): -100}}

    async def main() -> None:
        async with openai.AsyncOpenAI(base_url=f"{poisoned.url}/v1", api_key="none", max_retries=0) as client:

            async def ask(prompt: list[int]) -> list[int]:
                done = await client.completions.create(prompt=prompt, **options, extra_body=extra)
                return list(done.choices[0].token_ids)  # type: ignore[attr-defined]

            alone = await ask([5, 6, 9])
            good = [asyncio.create_task(ask([5, 6, 9])) for _ in range(4)]
            for stream in (False, True):
                with pytest.raises(openai.BadRequestError) as caught:  # not a 5xx: the client would send it again
                    await client.completions.create(prompt=[5, POISON, 9], **options, stream=stream)
                assert caught.value.code == "request_failed"
            assert await asyncio.gather(*good) == [alone] * 4

    asyncio.run(main())
    with poisoned.http() as http:
        assert http.get("/health").status_code == 200
    poisoned.wait_until_empty()


def test_without_a_tokenizer_token_ids_are_served_and_text_is_refused(poisoned: Any) -> None:
    with poisoned.http() as http:
        for body in ({"prompt": "text"}, {"prompt": [5], "logprobs": 1}, {"prompt": [5], "echo": True}):
            response = http.post("/v1/completions", json=body)
            assert response.status_code == 400 and response.json()["error"]["code"] == "unsupported_parameter"
        chat = http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "x"}]})
        assert chat.status_code == 400
        assert http.post("/v1/completions", json={"prompt": [5], "stop": "x"}).json()["error"]["param"] == "stop"
