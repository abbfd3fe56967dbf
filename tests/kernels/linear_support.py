"""What the tests of linear layers share: random tensors, and how near a result must be to float64."""

import pytest
import torch

from triton_interpreter import HAS_CUDA  # isort: skip

DEVICE = "cuda" if HAS_CUDA else "cpu"
MARKS = [pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"), *([pytest.mark.gpu] * HAS_CUDA)]
on_the_card = pytest.mark.skipif(not HAS_CUDA, reason="no CUDA device on this machine")

# Relative errors of whole results. The interpreter cuts bf16 off instead of rounding it; the card's matrix units cut off
# their fp32 sums: 1.6e-5 in all over 14,336 inputs.
TOLERANCE = {torch.bfloat16: 5e-3 if HAS_CUDA else 2e-2, torch.float16: 1e-3, torch.float32: 3e-5 if HAS_CUDA else 1e-6}


def random(*shape: int, dtype: torch.dtype = torch.bfloat16, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(shape, device=DEVICE) * scale).to(dtype)


def close(actual: torch.Tensor, expected: torch.Tensor, rounded: torch.Tensor | None = None) -> None:
    """`rounded`: the twin's result in the same type, whose roundings in between may cost more than the tolerance."""
    assert actual.shape == expected.shape and actual.isfinite().all()
    error, rounding = (
        0.0 if found is None else float((found.double() - expected).norm() / expected.norm())
        for found in (actual, rounded)
    )
    assert error < max(TOLERANCE[actual.dtype], 1.1 * rounding), f"relative error {error:.2e}"
