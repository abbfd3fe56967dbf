"""Root-mean-square norm, alone or fused with the residual addition before it.

Shapes: T tokens, H the size that is normed.
"""

from collections.abc import Iterator

from torch import Tensor, nn

from quire.layers.context import BuildContext
from quire.layers.slots import WeightSlot, empty_parameter


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, the statistics in fp32 (Zhang and Sennrich 2019)."""

    def __init__(self, size: int, eps: float, build: BuildContext) -> None:
        super().__init__()
        self.group = build.group
        self.kernels = build.kernels
        self.eps = eps
        self.weight = empty_parameter(size, dtype=build.dtype, device=build.device)

    def forward(self, x_TH: Tensor) -> Tensor:
        """[T, H], or [T, heads, H] for heads one by one -> the same shape, a new tensor."""
        return self.kernels.rms_norm(x_TH, self.weight, self.eps)

    def add(self, x_TH: Tensor, residual_TH: Tensor) -> Tensor:
        """The norm of x + residual, [T, H]; `residual_TH` becomes x + residual in place. x may be in pieces, [P, T, H]."""
        return self.kernels.add_rms_norm(x_TH, residual_TH, self.weight, self.eps)

    def weight_slots(self, path: str) -> Iterator[WeightSlot]:
        yield WeightSlot(f"{path}.weight", self.weight, self.group, dummy_value=1.0)
