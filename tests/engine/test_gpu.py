"""The engine on a GPU gives the CPU's tokens. Needs CUDA; there the operations are still plain torch."""

from pathlib import Path
from typing import Any

import pytest
import torch

from quire import LLM, SamplingParams
from support import assert_nothing_leaked

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]

OPTIONS: dict[str, Any] = {"load_format": "dummy", "skip_tokenizer_init": True, "num_threads": 1, "max_num_seqs": 16}
PROMPTS = [[3 + (i * j) % 90 for j in range(1, 10 + 7 * i)] for i in range(1, 9)]


def answers(model: Path, **options: Any) -> list[list[int]]:
    with LLM(str(model), **OPTIONS, **options) as llm:
        greedy = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
        drawn = SamplingParams(n=3, seed=3, max_tokens=20, top_p=0.9, top_k=40, ignore_eos=True)
        params = [greedy, drawn] * (len(PROMPTS) // 2)
        outputs = llm.generate(PROMPTS, params, use_tqdm=False)
        assert_nothing_leaked(llm.engine)
        return [list(completion.token_ids) for output in outputs for completion in output.outputs]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_num_batched_tokens": 7},
        {"max_steps_in_flight": 2},
        {"num_gpu_blocks_override": 24, "max_model_len": 128, "preemption_mode": "swap"},
        {"num_gpu_blocks_override": 24, "max_model_len": 128, "preemption_mode": "recompute"},
    ],
    ids=str,
)
def test_tokens_are_those_of_the_cpu(tiny_model: Path, options: dict[str, Any]) -> None:
    assert answers(tiny_model, device="cuda", **options) == answers(tiny_model, device="cpu")


def test_the_device_is_chosen_where_there_is_one(tiny_model: Path) -> None:
    with LLM(str(tiny_model), **OPTIONS) as llm:
        assert llm.engine.executor.device_report.device.startswith("cuda")
