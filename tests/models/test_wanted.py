"""Of tokens that nothing is drawn from, the last layer makes keys and values and no more; the others' logits are as ever."""

import json

import pytest
import torch

from quire.kernels.torch_ops import TorchResidual
from support import TINY_CONFIG

MANY, FEW = 6, 3
"""Tokens from and up to which products add to the residual themselves, in the ways so called."""

WAYS = {
    "norms add": lambda residual: None,
    "products add": lambda residual: TorchResidual(),
    "products of many tokens add": lambda residual: TorchResidual() if len(residual) >= MANY else None,
    "products of few tokens add": lambda residual: TorchResidual() if len(residual) <= FEW else None,
}
STEPS = [  # what each sequence goes on with, and whose logits are wanted
    ({0: list(range(3, 12)), 1: [5, 6]}, [8, 10]),
    ({0: [7], 1: [9], 2: list(range(40, 60))}, [0, 1]),
    ({2: [1, 2, 3]}, []),
    ({0: [8], 2: [4, 9], 1: [30]}, [3, 2, 0]),
    ({0: [1], 1: [2]}, [0, 1, 1, 0]),
]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("changes", [{}, {"model_type": "mistral", "sliding_window": 5}], ids=["", "window"])
def test_logits_are_those_of_all_tokens(paged_model, tmp_path, monkeypatch, way, changes):
    (tmp_path / "config.json").write_text(json.dumps(TINY_CONFIG | changes))
    usual, sparing = (paged_model(str(tmp_path), dtype="float32", load_format="dummy") for _ in range(2))
    monkeypatch.setattr(sparing.kernels, "residual", WAYS[way])
    seen = []
    for layer in sparing.model.model.layers:
        monkeypatch.setattr(layer, "finish", counting(layer.finish, seen))
    for chunks, wanted in STEPS:
        all_logits = usual.flat_step(chunks)
        seen.clear()
        logits = sparing.flat_step(chunks, wanted)
        assert logits.shape == (len(wanted), TINY_CONFIG["vocab_size"])
        torch.testing.assert_close(logits, all_logits[wanted], atol=1e-5, rtol=1e-5)
        in_each = [len(all_logits)] * (TINY_CONFIG["num_hidden_layers"] - 1)
        assert seen == in_each + [len(wanted)] * (len(wanted) > 0)


def counting(finish, seen):
    def counted(attended, residual):
        seen.append(len(residual))
        return finish(attended, residual)

    return counted
