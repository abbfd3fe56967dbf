"""Logits in bf16, of random models of each head size, are near those in fp32 from the CPU's reference backend: a prompt in one
piece and in chunks, and tokens decoded after it as long as both ways choose the same ones."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from quire import LLM, SamplingParams

transformers = pytest.importorskip("transformers")

HEADS = {64: (8, 2), 80: (8, 4), 96: (4, 4), 128: (8, 2), 256: (4, 1)}
"""Head size -> query heads, key/value heads."""
PROMPTS = [[3 + (i * j) % 300 for j in range(1, n)] for i, n in ((1, 9), (2, 40), (3, 150), (5, 333))]
OPTIONS: dict[str, Any] = {"skip_tokenizer_init": True, "num_threads": 1, "max_num_seqs": 8, "swap_space": 0}
cuda = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]


def write_model(directory: Path, head_size: int) -> None:
    """Weights of a size that gives logits some spread, in bf16, so that both ways have the same. Two layers: roundings of three
    take any way in bf16 to 1.9e-2, torch's on a CPU too."""
    heads, kv_heads = HEADS[head_size]
    torch.manual_seed(head_size)
    config = transformers.LlamaConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=heads,
        num_key_value_heads=kv_heads, head_dim=head_size, vocab_size=320, max_position_embeddings=512,
        initializer_range=0.08, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)


def logits_and_tokens(directory: Path, **options: Any) -> tuple[list[np.ndarray], list[list[int]]]:
    """Of each prompt in turn: the logits of each drawn token [tokens, V], and the tokens. Asserts the way that steps ran."""
    with LLM(str(directory), **OPTIONS, **options) as llm:
        runner = llm.engine.executor.worker.runner
        compute, seen = runner._logits, []
        runner._logits = lambda step, hidden: seen.append(compute(step, hidden)) or seen[-1]
        found, tokens = [], []
        # With log probabilities wanted, the draw is not in a graph: its logits can be seen.
        params = SamplingParams(temperature=0, max_tokens=12, logprobs=1, ignore_eos=True)
        for prompt in PROMPTS:
            seen.clear()
            (output,) = llm.generate([prompt], params, use_tqdm=False)
            found.append(torch.cat(seen).float().cpu().numpy())
            tokens.append(list(output.outputs[0].token_ids))
        if options["dtype"] == "bfloat16":
            on_gpu = options["device"] == "cuda"
            assert llm.engine.executor.device_report.attention_backend == ("triton" if on_gpu else "cpu")
            assert not on_gpu or (runner.graphs.num_replays > 0 and runner.graphs.num_mixed_replays > 0)
        return found, tokens


@pytest.mark.parametrize("head_size", HEADS)
@pytest.mark.parametrize("options", [{}, {"max_num_batched_tokens": 16}], ids=["whole", "chunks"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=cuda)])
def test_logits_in_bf16_are_near_those_in_fp32(
    tmp_path: Path, device: str, options: dict[str, Any], head_size: int
) -> None:
    write_model(tmp_path, head_size)
    expected, tokens = logits_and_tokens(tmp_path, device="cpu", dtype="float32", attention_backend="reference")
    actual, drawn = logits_and_tokens(tmp_path, device=device, dtype="bfloat16", **options)
    for want, got, told, took in zip(expected, actual, tokens, drawn):
        assert want.shape == got.shape == (12, 320)
        same = next((i for i, (a, b) in enumerate(zip(told, took)) if a != b), 11) + 1
        error = np.linalg.norm(got[:same] - want[:same]) / np.linalg.norm(want[:same])
        assert error < 2e-2, f"relative error {error:.2e} over {same} tokens"
