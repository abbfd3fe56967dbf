"""The engine on a GPU gives the CPU's tokens, by every way that a step may take: graphs of decoding and of mixed steps, eager,
overlapped, in chunks, after preemption. Needs CUDA. Each test asserts which backend and kernels ran, and whether graphs were
replayed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from quire import LLM, SamplingParams
from support import TINY_CONFIG, assert_nothing_leaked

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]

OPTIONS: dict[str, Any] = {"load_format": "dummy", "skip_tokenizer_init": True, "num_threads": 1, "max_num_seqs": 16}
PROMPTS = [[3 + (i * j) % 90 for j in range(1, 10 + 7 * i)] for i in range(1, 9)]
MARGIN = 1e-4
"""Where the reference's two likeliest tokens are nearer than this (in log probability), either is right."""


@pytest.fixture(autouse=True)
def _ieee_products() -> None:
    torch.set_float32_matmul_precision("highest")


def check_way(llm: LLM, options: dict[str, Any]) -> None:
    """That the fast kernels ran; and graphs, unless switched off."""
    report, runner = llm.engine.executor.device_report, llm.engine.executor.worker.runner
    assert report.device.startswith("cuda")
    assert llm.engine.executor.max_steps_in_flight == options.get("max_steps_in_flight", 2)
    if options.get("attention_backend") == "reference":
        assert (report.attention_backend, report.kernels, runner.sampler.name) == ("reference", "torch", "torch")
        assert runner.graphs is None
        return
    assert (report.attention_backend, report.kernels, runner.sampler.name) == ("triton", "triton", "triton")
    if options.get("enforce_eager"):
        assert runner.graphs is None
    else:
        assert runner.graphs.num_replays > 5
        assert runner.graphs.num_mixed_replays > 0
        assert runner.graphs.num_captures >= 2 * len(runner.graphs.sizes.decode) + len(runner.graphs.sizes.mixed)


def test_nothing_is_left_to_compile_when_graphs_are_captured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.jit import JITFunction

    from quire.kernels.triton import attention, blocks, fused, linear, sampling, skinny
    from quire.worker.graph_runner import GraphRunner

    for module in (attention, blocks, fused, linear, sampling, skinny):
        for kernel in vars(module).values():
            if isinstance(kernel, JITFunction):
                kernel.device_caches.clear()
    phases: list[str] = []
    compiled: dict[str, list[str]] = {"compile_ahead": [], "capture_all": []}
    compiles = JITFunction._do_compile

    def compile_(self: JITFunction, *args: Any, **kwargs: Any) -> Any:
        if phases:
            compiled[phases[-1]].append(self.__name__)
        return compiles(self, *args, **kwargs)

    monkeypatch.setattr(JITFunction, "_do_compile", compile_)
    for phase in compiled:
        method = getattr(GraphRunner, phase)

        def within(runner: GraphRunner, *args: Any, method: Any = method, phase: str = phase) -> None:
            phases.append(phase)
            method(runner, *args)
            phases.pop()

        monkeypatch.setattr(GraphRunner, phase, within)
    (tmp_path / "config.json").write_text(json.dumps(TINY_CONFIG))
    with LLM(
        str(tmp_path), load_format="dummy", skip_tokenizer_init=True, device="cuda", dtype="bfloat16", max_num_seqs=200
    ):
        pass
    assert {"_attend", "_linear", "_multiply_add", "_choose_kernel"} <= set(compiled["compile_ahead"])
    assert compiled["capture_all"] == []


def test_steps_take_no_more_memory_than_planned(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shape = {
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 90_000,
    }
    (tmp_path / "config.json").write_text(json.dumps(TINY_CONFIG | shape | {"max_position_embeddings": 8192}))
    caplog.set_level("INFO", "quire.worker.worker")
    with LLM(str(tmp_path), load_format="dummy", skip_tokenizer_init=True, device="cuda", dtype="bfloat16"):
        pass
    assert "beside weights and KV cache" in caplog.text
    assert "were planned" not in caplog.text


def answers(model: Path, **options: Any) -> list[list[int]]:
    with LLM(str(model), **OPTIONS, **options) as llm:
        greedy = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
        drawn = SamplingParams(n=3, seed=3, max_tokens=20, top_p=0.9, top_k=40, ignore_eos=True)
        params = [greedy, drawn] * (len(PROMPTS) // 2)
        outputs = llm.generate(PROMPTS, params, use_tqdm=False)
        assert_nothing_leaked(llm.engine)
        if options["device"] == "cuda":
            check_way(llm, options)
        return [list(completion.token_ids) for output in outputs for completion in output.outputs]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"enforce_eager": True},
        {"attention_backend": "reference"},
        {"max_num_batched_tokens": 7},
        {"max_steps_in_flight": 1},
        {"max_steps_in_flight": 4, "block_size": 32},
        {"num_gpu_blocks_override": 24, "max_model_len": 128, "preemption_mode": "swap"},
        {"num_gpu_blocks_override": 24, "max_model_len": 128, "preemption_mode": "recompute"},
    ],
    ids=str,
)
def test_tokens_are_those_of_the_cpu(tiny_model: Path, options: dict[str, Any]) -> None:
    assert answers(tiny_model, device="cuda", **options) == answers(tiny_model, device="cpu")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"enforce_eager": True},
        {"max_steps_in_flight": 1},
        {"max_num_batched_tokens": 5, "max_steps_in_flight": 3},
        {"block_size": 64, "enable_prefix_caching": False, "max_num_seqs": 5},
        {"num_gpu_blocks_override": 30, "max_model_len": 128, "preemption_mode": "swap"},
    ],
    ids=str,
)
def test_greedy_answers_of_a_trained_model_are_the_golden_ones(stories: Path, options: dict[str, Any]) -> None:
    golden = [json.loads(line) for line in (stories / "golden_greedy.jsonl").read_text().splitlines()]
    prompts = [line["prompt_ids"] for line in golden]
    with LLM(str(stories), device="cuda", dtype="float32", **options) as llm:
        params = [SamplingParams(temperature=0, max_tokens=len(line["greedy_ids"]), ignore_eos=True) for line in golden]
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        assert_nothing_leaked(llm.engine)
        check_way(llm, options)
    for line, output in zip(golden, outputs):
        found, expected = list(output.outputs[0].token_ids), line["greedy_ids"]
        assert len(found) == len(expected)
        if found != expected:
            place = next(i for i, (a, b) in enumerate(zip(found, expected)) if a != b)
            assert margin(stories, line["prompt_ids"] + expected[:place]) < MARGIN, f"token {place}: {found}"


def margin(model: Path, token_ids: list[int]) -> float:
    """By how much the CPU finds its likeliest next token likelier than the second."""
    with LLM(str(model), device="cpu", dtype="float32", num_threads=1) as llm:
        params = SamplingParams(temperature=0, max_tokens=1, logprobs=2, ignore_eos=True)
        (output,) = llm.generate([{"prompt_token_ids": token_ids}], params, use_tqdm=False)
        assert output.outputs[0].logprobs is not None
        first, second = sorted((entry.logprob for entry in output.outputs[0].logprobs[0].values()), reverse=True)[:2]
        return first - second


def test_what_graphs_do_not_draw_is_drawn_from_their_hidden_states(tiny_model: Path) -> None:
    """Penalties, masks and log probabilities, beside requests without, in steps whose layers are replayed."""
    params = [
        SamplingParams(temperature=0, max_tokens=25, ignore_eos=True),
        SamplingParams(temperature=0, max_tokens=20, repetition_penalty=1.4, logprobs=3, ignore_eos=True),
        SamplingParams(seed=1, max_tokens=15, allowed_token_ids=[5, 9, 33, 71], ignore_eos=True),
        SamplingParams(seed=2, max_tokens=20, presence_penalty=0.5, min_p=0.1, ignore_eos=True),
    ]
    found = []
    for device in ("cpu", "cuda"):
        with LLM(str(tiny_model), **OPTIONS, device=device) as llm:
            outputs = llm.generate(PROMPTS[:4], params, use_tqdm=False)
            if device == "cuda":
                check_way(llm, {})
            found.append(outputs)
    for cpu, cuda in zip(*found):
        assert list(cuda.outputs[0].token_ids) == list(cpu.outputs[0].token_ids)
        if cpu.outputs[0].logprobs is not None:
            for a, b in zip(cuda.outputs[0].logprobs, cpu.outputs[0].logprobs):
                assert list(a) == list(b)
                for token_id in a:
                    assert a[token_id].logprob == pytest.approx(b[token_id].logprob, abs=1e-4)
                    assert a[token_id].rank == b[token_id].rank


def test_long_prompts_in_mixed_graphs(tiny_model: Path) -> None:
    """Chunks that fill the budget, queries long enough for the larger tiles, and short requests that decode meanwhile."""
    prompts = [[3 + (i * j) % 90 for j in range(1, length + 1)] for i, length in enumerate((40, 1700, 9, 2900, 600), 1)]
    greedy = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    found = []
    for options in ({"enforce_eager": True}, {"max_num_batched_tokens": 2048}, {"max_num_batched_tokens": 1300}):
        more = {"hf_overrides": {"max_position_embeddings": 4096}, "enable_prefix_caching": False}
        with LLM(str(tiny_model), **OPTIONS, device="cuda", **more, **options) as llm:
            outputs = llm.generate(prompts, greedy, use_tqdm=False)
            # again, so that what the first list's steps captured is replayed
            repeated = llm.generate(prompts, greedy, use_tqdm=False)
            assert_nothing_leaked(llm.engine)
            check_way(llm, options)
            if not options.get("enforce_eager"):
                assert any(long for _, long in llm.engine.executor.worker.runner.graphs.sizes._made_mixed)
            tokens = [list(output.outputs[0].token_ids) for output in outputs]
            assert tokens == [list(output.outputs[0].token_ids) for output in repeated]
            found.append(tokens)
    assert found[1:] == found[:1] * 2


def test_the_device_is_chosen_where_there_is_one(tiny_model: Path) -> None:
    with LLM(str(tiny_model), **OPTIONS) as llm:
        assert llm.engine.executor.device_report.device.startswith("cuda")
