"""Linear layers, split over the tensor-parallel group by columns (outputs) or by rows (inputs).

    ColumnParallelLinear   y = x W^T + b, W [out / size, in]; several checkpoint tensors fused one below the other
    RowParallelLinear      y = sum over ranks of x W^T, + b once; W [out, in / size]

The pair column -> row needs one all_reduce. Products are the kernels' to choose: torch's, or a GPU's own, which do what
stands beside the product as well: `silu_mul` and `pieces` for some tokens, `normed`, `normed_silu_mul` and `add_to`
where products add to the residual themselves (`quire.kernels.ResidualKernels`).

Shapes: T tokens, I inputs, O outputs of this rank.
"""

from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from quire.kernels import ResidualKernels
from quire.layers.context import BuildContext
from quire.layers.norm import RMSNorm
from quire.layers.slots import WeightSlot, empty_parameter


class ColumnParallelLinear(nn.Module):
    """One matmul for all layers that read the same input: q, k and v; or gate and up.

    `pieces` maps each checkpoint name (the last part of its path, say "q_proj") to its number of outputs over all
    ranks, in the order in which the outputs are laid out. Each rank holds its share of *every* piece, so that whole
    heads stay together:

        {"q_proj": 8, "k_proj": 4, "v_proj": 4} on 2 ranks: rank 0 has q[0:4] k[0:2] v[0:2], rank 1 the rest
    """

    def __init__(self, in_size: int, pieces: Mapping[str, int], *, bias: bool, build: BuildContext) -> None:
        super().__init__()
        self.group = build.group
        self.kernels = build.kernels
        self.piece_sizes = {
            name: build.group.share(size, f"the output size of {name}") for name, size in pieces.items()
        }
        out_size = sum(self.piece_sizes.values())
        self.weight = empty_parameter(out_size, in_size, dtype=build.dtype, device=build.device)
        self.bias = empty_parameter(out_size, dtype=build.dtype, device=build.device) if bias else None

    def forward(self, x_TI: Tensor) -> Tensor:
        """[T, I] -> [T, O], the pieces' outputs side by side."""
        return self.kernels.linear(x_TI, self.weight, self.bias)

    def silu_mul(self, x_TI: Tensor) -> Tensor:
        """silu(gate) * up of two pieces of one size, gate and up: [T, I] -> [T, O / 2]"""
        return self.kernels.linear_silu_mul(x_TI, self.weight, self.bias)

    def normed(self, kernels: ResidualKernels, x_TI: Tensor, norm: RMSNorm) -> Tensor:
        """forward(norm(x)): [T, I] -> [T, O]"""
        return kernels.linear(x_TI, self.weight, self.bias, norm=(norm.weight, norm.eps))

    def normed_silu_mul(self, kernels: ResidualKernels, x_TI: Tensor, norm: RMSNorm) -> Tensor:
        """silu_mul(norm(x)): [T, I] -> [T, O / 2]"""
        return kernels.linear_silu_mul(x_TI, self.weight, self.bias, norm=(norm.weight, norm.eps))

    def weight_slots(self, path: str) -> Iterator[WeightSlot]:
        parent = path.rpartition(".")[0]
        start = 0
        for name, size in self.piece_sizes.items():
            for kind, parameter in self.named_parameters():
                yield WeightSlot(f"{parent}.{name}.{kind}", parameter[start : start + size], self.group, shard_dim=0)
            start += size


class RowParallelLinear(nn.Module):
    """Takes an input that is split over the ranks, gives the whole output on every rank."""

    def __init__(self, in_size: int, out_size: int, *, bias: bool, build: BuildContext) -> None:
        super().__init__()
        self.group = build.group
        self.kernels = build.kernels
        share = build.group.share(in_size, "the input size of a linear layer")
        self.weight = empty_parameter(out_size, share, dtype=build.dtype, device=build.device)
        self.bias = empty_parameter(out_size, dtype=build.dtype, device=build.device) if bias else None

    def forward(self, x_TI: Tensor) -> Tensor:
        """[T, I] -> [T, O]"""
        # Only one rank adds the bias, or the sum would hold it `size` times.
        bias = self.bias if self.group.rank == 0 else None
        return self.group.all_reduce(self.kernels.linear(x_TI, self.weight, bias))

    def pieces(self, x_TI: Tensor) -> Tensor:
        """forward(x), perhaps not summed up yet, for a norm to add: [T, I] -> [T, O], or fp32 [P, T, O]"""
        if self.group.size == 1:
            return self.kernels.linear_pieces(x_TI, self.weight, self.bias)
        return self(x_TI)

    def add_to(self, kernels: ResidualKernels, residual_TO: Tensor, x_TI: Tensor) -> None:
        """residual += forward(x), in place."""
        if self.group.size == 1:
            kernels.linear_add_(x_TI, self.weight, residual_TO, self.bias)
        else:  # the sum over the ranks stands between the product and the addition
            residual_TO += self(x_TI)

    def weight_slots(self, path: str) -> Iterator[WeightSlot]:
        yield WeightSlot(f"{path}.weight", self.weight, self.group, shard_dim=1)
        if self.bias is not None:
            yield WeightSlot(f"{path}.bias", self.bias, self.group)
