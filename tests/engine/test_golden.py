"""A real model's greedy answers, token for token, by every way that the engine may take."""

import json
from pathlib import Path
from typing import Any

import pytest

from quire import LLM, SamplingParams
from quire.core.preemption import Preemption
from support import assert_nothing_leaked

Golden = dict[str, Any]
NUM_EXTRA = 48  # golden tokens that lengthen a prompt


@pytest.fixture(scope="module")
def golden(stories: Path) -> list[Golden]:
    lines = (stories / "golden_greedy.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    assert len(found) == 12
    return found


def load(stories: Path, **options: Any) -> LLM:
    return LLM(str(stories), **{"dtype": "float32", "num_threads": 1, **options})


def params_for(line: Golden, skip: int = 0) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=len(line["greedy_ids"]) - skip, ignore_eos=True)


def answers(llm: LLM, golden: list[Golden], skip: int = 0) -> list[list[int]]:
    prompts = [{"prompt_token_ids": line["prompt_ids"] + line["greedy_ids"][:skip]} for line in golden]
    outputs = llm.generate(prompts, [params_for(line, skip) for line in golden], use_tqdm=False)
    assert_nothing_leaked(llm.engine)
    return [line["greedy_ids"][:skip] + list(output.outputs[0].token_ids) for line, output in zip(golden, outputs)]


def expected(golden: list[Golden]) -> list[list[int]]:
    return [line["greedy_ids"] for line in golden]


def test_alone(stories: Path, golden: list[Golden]) -> None:
    with load(stories) as llm:
        for line in golden:
            (output,) = llm.generate(line["prompt"], params_for(line), use_tqdm=False)
            assert output.prompt_token_ids == line["prompt_ids"]
            assert output.outputs[0].token_ids == line["greedy_ids"]
            assert output.outputs[0].text.strip() == line["greedy_text"].strip()
        assert llm.engine.executor.device_report.attention_backend == "cpu"
        assert_nothing_leaked(llm.engine)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"attention_backend": "reference"},
        {"max_num_batched_tokens": 3},
        {"max_num_batched_tokens": 3, "max_num_seqs": 3},
        {"max_steps_in_flight": 2},
        {"max_steps_in_flight": 4, "max_num_batched_tokens": 5},
        {"block_size": 1},
        {"block_size": 7, "enable_prefix_caching": False},
        {"num_threads": 2},
    ],
    ids=lambda options: " ".join(f"{name}={value}" for name, value in options.items()) or "plain",
)
def test_all_at_once(stories: Path, golden: list[Golden], options: dict[str, Any]) -> None:
    with load(stories, **options) as llm:
        assert answers(llm, golden) == expected(golden)
        wanted = "reference" if "attention_backend" in options else "cpu"
        assert llm.engine.executor.device_report.attention_backend == wanted


@pytest.mark.parametrize("in_flight", [1, 2])
def test_lengthened_prompts_through_the_prefix_cache_cold_and_warm(
    stories: Path, golden: list[Golden], in_flight: int
) -> None:
    with load(stories, max_steps_in_flight=in_flight) as llm:
        kv = llm.engine.kv
        assert answers(llm, golden, NUM_EXTRA) == expected(golden)
        cold = kv.num_prefix_hits
        assert answers(llm, golden, NUM_EXTRA) == expected(golden)
        warm = kv.num_prefix_hits - cold
        # all of each prompt was there, but for the token whose logits are wanted
        assert warm == sum(len(line["prompt_ids"]) + NUM_EXTRA - 1 for line in golden)
        # 48 golden tokens end inside a block for most prompts, so whole blocks alone cannot have given that
        assert kv.num_copies > 0


@pytest.mark.parametrize("in_flight", [1, 3])
@pytest.mark.parametrize("mode", ["recompute", "swap"])
@pytest.mark.parametrize("caching", [True, False])
def test_so_few_blocks_that_sequences_are_preempted(
    stories: Path, golden: list[Golden], mode: str, in_flight: int, caching: bool
) -> None:
    options = {"num_gpu_blocks_override": 30, "max_model_len": 128, "enable_prefix_caching": caching}
    with load(stories, preemption_mode=mode, max_steps_in_flight=in_flight, **options) as llm:
        assert answers(llm, golden) == expected(golden)
        counts = llm.engine.scheduler.counts
        assert counts.preempted(Preemption(mode)) >= 3
        if mode == "recompute":
            assert not counts.preempted(Preemption.SWAP)


def test_a_full_swap_space_means_recomputing(stories: Path, golden: list[Golden]) -> None:
    options = {"num_gpu_blocks_override": 30, "max_model_len": 128, "preemption_mode": "swap", "swap_space": 0}
    with load(stories, **options) as llm:
        assert answers(llm, golden) == expected(golden)
        assert llm.engine.scheduler.counts.preempted(Preemption.RECOMPUTE) >= 3
