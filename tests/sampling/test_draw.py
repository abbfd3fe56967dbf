"""Inverse of the cumulative distribution against NumPy's over the whole vocabulary, and truncation against formulas."""

import numpy as np
import pytest
import torch

from quire.sampling.draw import BLOCK, draw, draw_truncated


@pytest.fixture(autouse=True)
def one_thread():
    """Many tiny launches: on a busy machine, threads spend their time waiting for each other."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.mark.parametrize("vocab_size", [1, 2, 63, 64, 255, 256, 257, 512, 1000, 50257])
def test_draw_is_the_inverse_of_the_cumulative_sum(vocab_size):
    generator = torch.Generator().manual_seed(vocab_size)
    probs = (torch.randn(64, vocab_size, generator=generator) * 3).softmax(-1)
    probs[:, ::3] = torch.where(torch.rand(probs[:, ::3].shape, generator=generator) < 0.5, 0.0, probs[:, ::3])
    probs[:, 0] += 1e-6
    u = torch.rand(64, generator=generator, dtype=torch.float64)
    u[0], u[1] = 0.0, 1 - 2.0**-53
    tokens, total = draw(probs, u)
    cumulative = np.cumsum(probs.numpy().astype(np.float64), -1)
    assert np.allclose(total.numpy(), cumulative[:, -1], rtol=1e-6)
    for row, token in enumerate(tokens.tolist()):
        assert probs[row, token] > 0
        target = float(u[row]) * cumulative[row, -1]
        assert (cumulative[row, token - 1] if token else 0.0) <= target + 1e-6
        assert cumulative[row, token] > target - 1e-6


def test_a_token_of_probability_zero_is_never_drawn():
    for hot in (0, 5, BLOCK - 1, BLOCK, 999):
        probs = torch.zeros(4, 1000)
        probs[:, hot] = 1e-30
        tokens, _ = draw(probs, torch.tensor([0.0, 0.3, 0.999, 1 - 2.0**-53], dtype=torch.float64))
        assert tokens.tolist() == [hot] * 4


def kept_tokens(probs, top_k, top_p, min_p):
    """Written token by token: who survives min-p, then top-k, then top-p."""
    ranked = sorted(range(len(probs)), key=lambda token: (-probs[token], token))
    ranked = [token for token in ranked if probs[token] >= np.float32(min_p) * np.float32(max(probs))][:top_k]
    whole, before, kept = sum(float(probs[token]) for token in ranked), 0.0, set()
    for token in ranked:
        if before >= float(np.float32(top_p)) * whole:
            break
        kept.add(token)
        before += float(probs[token])
    return kept


@pytest.mark.parametrize("ties", [False, True])
def test_truncation_keeps_exactly_the_tokens_of_the_formula(ties):
    rng = np.random.default_rng(5)
    for _ in range(40):
        vocab_size = int(rng.integers(1, 400))
        logits = rng.normal(0, rng.choice([0.1, 1, 4]), vocab_size)
        probs = torch.tensor(np.round(logits) if ties else logits, dtype=torch.float32).softmax(-1)
        top_k = int(rng.choice([1, 2, 5, 50, vocab_size]))
        top_p, min_p = float(rng.choice([1.0, 0.9, 0.5, 1e-9])), float(rng.choice([0.0, 0.05, 1.0]))
        if ties and top_p in (0.5, 0.9):
            top_p += 0.0123  # a share that no sum of equal probabilities can hit to the last bit
        expected = kept_tokens(probs.numpy(), min(top_k, vocab_size), top_p, min_p)
        u = torch.linspace(0, 1 - 1e-12, 1000, dtype=torch.float64)
        rows = len(u)
        each = [torch.full((rows,), float(value)) for value in (min(top_k, vocab_size), top_p, min_p)]
        tokens, total = draw_truncated(probs.expand(rows, -1), u, *each)
        assert torch.equal(tokens, draw_truncated(probs.expand(rows, -1), u, *each, narrow=False)[0])
        whole = sum(float(probs[token]) for token in expected)
        assert total.tolist() == pytest.approx([whole] * rows, rel=1e-5)
        assert set(tokens.tolist()) <= expected
        # Each kept token that is wider than the grid of u must show up.
        assert set(tokens.tolist()) >= {token for token in expected if probs[token] / whole > 3e-3}
