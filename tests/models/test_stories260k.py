"""A trained model: greedy tokens of stories260K equal those that transformers gave, token by token."""

import json
from pathlib import Path

import pytest

MODEL = Path(__file__).parents[3] / "shared" / "data" / "models" / "stories260K"

pytestmark = pytest.mark.skipif(not MODEL.is_dir(), reason=f"real data is absent: {MODEL}")


def test_greedy_tokens(paged_model):
    cases = [json.loads(line) for line in (MODEL / "golden_greedy.jsonl").read_text().splitlines()]
    model = paged_model(MODEL, max_num_seqs=len(cases), block_size=16)
    tokens = [list(case["prompt_ids"]) for case in cases]
    wanted = [len(case["prompt_ids"]) + len(case["greedy_ids"]) for case in cases]
    # All prompts at once, a chunk of 5 at most; each sequence decodes as soon as its prompt is through.
    while any(len(ids) < length for ids, length in zip(tokens, wanted)):
        running = [row for row in range(len(cases)) if len(tokens[row]) < wanted[row]]
        logits = model.step({row: tokens[row][model.seq_lens[row] :][:5] for row in running})
        for row in running:
            if model.seq_lens[row] == len(tokens[row]):
                tokens[row].append(int(logits[row][-1].argmax()))
    for case, ids in zip(cases, tokens):
        assert ids[len(case["prompt_ids"]) :] == case["greedy_ids"], case["prompt"]
