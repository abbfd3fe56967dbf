"""The model's way with products that add to the residual, with the torch twins of its kernels, gives the usual logits."""

import json

import pytest
import torch

from quire.kernels.torch_ops import TorchResidual
from support import TINY_CONFIG


class OnlyFew(TorchResidual):
    """Takes at most 16 tokens; counts how often."""

    def __init__(self):
        super().__init__()
        self.taken = 0

    def for_tokens(self, x_TH):
        self.taken += len(x_TH) <= 16
        return self if len(x_TH) <= 16 else None


@pytest.mark.parametrize("changes", [{}, {"attention_bias": True, "mlp_bias": True}], ids=str)
def test_few_tokens_have_the_usual_logits(paged_model, tmp_path, monkeypatch, changes):
    (tmp_path / "config.json").write_text(json.dumps(TINY_CONFIG | changes))
    few = OnlyFew()
    logits = []
    for operations in (None, few):
        model = paged_model(str(tmp_path), dtype="float32", load_format="dummy")
        if operations is not None:
            monkeypatch.setattr(model.kernels, "residual", operations.for_tokens)
        steps = [{0: list(range(3, 30)), 1: [5, 6]}, {0: [7], 1: [9]}, {1: [2, 8, 4]}]
        logits.append(torch.cat([rows for step in steps for rows in model.step(step).values()]))
    assert few.taken == 2 * 2 * TINY_CONFIG["num_hidden_layers"]  # of two steps, each layer's two parts
    torch.testing.assert_close(logits[1], logits[0], atol=1e-5, rtol=1e-5)
