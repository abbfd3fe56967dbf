"""On a GPU in bf16, steps of few tokens run our own linear layers, in graphs too, and give the log probabilities of cuBLAS."""

from pathlib import Path

import numpy as np
import pytest
import torch

from quire import LLM, SamplingParams

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]


@pytest.mark.parametrize("enforce_eager", [False, True])
def test_log_probabilities_are_those_without_them(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, enforce_eager: bool
) -> None:
    from quire.kernels.triton.ops import TritonFewTokens

    taken: list[int] = []
    original = TritonFewTokens.takes

    def run(enabled: bool) -> list[dict[int, float]]:
        def takes(few: TritonFewTokens, x_TH: torch.Tensor) -> bool:
            answer = enabled and original(few, x_TH)
            if answer:
                taken.append(len(x_TH))
            return answer

        monkeypatch.setattr(TritonFewTokens, "takes", takes)
        options = {"load_format": "dummy", "skip_tokenizer_init": True, "max_num_seqs": 4, "max_logprobs": 20}
        with LLM(str(tiny_model), dtype="bfloat16", device="cuda", enforce_eager=enforce_eager, **options) as llm:
            params = SamplingParams(temperature=0, max_tokens=12, logprobs=20, ignore_eos=True)
            prompt = {"prompt_token_ids": list(range(3, 13))}
            (output,) = llm.generate([prompt], params, use_tqdm=False)
        token_ids, logprobs = output.outputs[0].token_ids, output.outputs[0].logprobs
        assert logprobs is not None
        return [{"token": int(t)} | {k: v.logprob for k, v in d.items()} for t, d in zip(token_ids, logprobs)]  # type: ignore[dict-item]

    ours, theirs = run(True), run(False)
    assert 1 in taken
    for a, b in zip(ours, theirs):
        both = [key for key in a if key in b and key != "token"]
        assert len(both) > 10
        x, y = (np.array([row[key] for key in both]) for row in (a, b))
        assert np.linalg.norm(x - y) < 2e-2 * np.linalg.norm(y)
        if a["token"] != b["token"]:  # type: ignore[index]
            break  # from here on they tell different stories
