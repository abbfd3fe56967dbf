"""`Kernels` for GPUs: which of the kernels in Triton and Gluon, or cuBLAS, is the way for these tensors.

Meanings, shapes and dtypes are in `quire.kernels`; the kernels, and what they refuse, in the modules beside this one. Attention
and sampling have kernels that are called elsewhere.
"""

from torch import Tensor

from quire.kernels import ResidualKernels, gluon
from quire.kernels.torch_ops import TorchKernels, TorchResidual
from quire.kernels.triton import blocks, fused, linear, skinny

SMALL = 2048  # hidden size


class TritonKernels(TorchKernels):
    """`Kernels` for GPUs. `attention` is the slow twin's: the attention backend "triton" has kernels of its own."""

    name = "triton"

    def __init__(self) -> None:
        self._residual = (TritonFewTokens(), TritonManyTokens(self))

    def residual(self, residual_TH: Tensor) -> ResidualKernels | None:
        return next((kernels for kernels in self._residual if kernels.takes(residual_TH)), None)

    def rms_norm(self, x_TH: Tensor, weight_H: Tensor, eps: float) -> Tensor:
        return fused.rms_norm(x_TH, None, weight_H, eps)

    def linear(self, x_TH: Tensor, weight_OH: Tensor, bias_O: Tensor | None = None) -> Tensor:
        if linear.takes(x_TH, weight_OH, bias_O):
            return linear.linear(x_TH, weight_OH, bias_O)
        return super().linear(x_TH, weight_OH, bias_O)

    def linear_silu_mul(self, x_TH: Tensor, weight_O2H: Tensor, bias_O2: Tensor | None = None) -> Tensor:
        if gluon.takes_linear(x_TH, weight_O2H, bias_O2, silu=True):
            from quire.kernels.gluon import linear as gluon_linear  # needs a Triton that has Gluon: `gluon.available`

            return gluon_linear.linear_silu_mul(x_TH, weight_O2H)
        if linear.takes(x_TH, weight_O2H, bias_O2, silu=True):
            return linear.linear_silu_mul(x_TH, weight_O2H, bias_O2)
        return super().linear_silu_mul(x_TH, weight_O2H, bias_O2)

    def linear_pieces(self, x_TH: Tensor, weight_OH: Tensor, bias_O: Tensor | None = None) -> Tensor:
        if gluon.takes_linear(x_TH, weight_OH, bias_O):
            from quire.kernels.gluon import linear as gluon_linear

            return gluon_linear.linear_pieces(x_TH, weight_OH)
        if linear.takes(x_TH, weight_OH, bias_O, in_pieces=True):
            return linear.linear_pieces(x_TH, weight_OH)
        return super().linear_pieces(x_TH, weight_OH, bias_O)

    def add_rms_norm(self, x_TH: Tensor, residual_TH: Tensor, weight_H: Tensor, eps: float) -> Tensor:
        return fused.rms_norm(x_TH, residual_TH, weight_H, eps)

    def rotary_(self, q_TND: Tensor, k_TKD: Tensor, cos_sin_PR: Tensor, positions_T: Tensor) -> None:
        fused.norm_rotary_write(q_TND, k_TKD, None, rotary=(cos_sin_PR, positions_T))

    def write_kv(self, k_TKD: Tensor, v_TKD: Tensor, kv_B2KSD: Tensor, slots_T: Tensor) -> None:
        fused.norm_rotary_write(None, k_TKD, v_TKD, cache=(kv_B2KSD, slots_T))

    def norm_rotary_write(
        self,
        q_TND: Tensor,
        k_TKD: Tensor,
        v_TKD: Tensor,
        kv_B2KSD: Tensor,
        slots_T: Tensor,
        *,
        norm: tuple[Tensor, Tensor, float] | None = None,
        rotary: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        fused.norm_rotary_write(q_TND, k_TKD, v_TKD, norm=norm, rotary=rotary, cache=(kv_B2KSD, slots_T))

    def silu_and_mul(self, gate_up_TI2: Tensor) -> Tensor:
        return fused.silu_and_mul(gate_up_TI2)

    def embed(self, ids_T: Tensor, table_VH: Tensor) -> Tensor:
        return fused.embed(ids_T, table_VH)

    def copy_blocks(self, kv: Tensor, src_ids: Tensor, dst_ids: Tensor) -> None:
        blocks.swap_blocks(kv, kv, src_ids, dst_ids)

    def swap_blocks(self, src_pool: Tensor, dst_pool: Tensor, src_ids: Tensor, dst_ids: Tensor) -> None:
        blocks.swap_blocks(src_pool, dst_pool, src_ids, dst_ids)


def most_few_tokens(hidden_size: int) -> int:
    """Of a step whose linear layers are `TritonFewTokens`'s. Measured on an H200, the matrix units' way (`linear`) is as fast
    from 2 tokens on, and from 5 for small models, whose time is in the launches; it is for 16 tokens or more."""
    return 4 if hidden_size <= SMALL else 1


class TritonFewTokens:
    """`ResidualKernels` for few tokens on GPUs, from `skinny`. Does not see a CPU's tensors: those would be interpreted."""

    def takes(self, x_TH: Tensor) -> bool:
        """Whether this is the way for x, by its device, dtype and number of tokens."""
        return x_TH.is_cuda and x_TH.dtype in skinny.DTYPES and 0 < len(x_TH) <= most_few_tokens(x_TH.shape[1])

    def linear(
        self, x_TH: Tensor, weight_OH: Tensor, bias_O: Tensor | None = None, *, norm: tuple[Tensor, float] | None = None
    ) -> Tensor:
        return skinny.linear(x_TH, weight_OH, bias_O, norm=norm)

    def linear_silu_mul(
        self,
        x_TH: Tensor,
        weight_O2H: Tensor,
        bias_O2: Tensor | None = None,
        *,
        norm: tuple[Tensor, float] | None = None,
    ) -> Tensor:
        return skinny.linear_silu_mul(x_TH, weight_O2H, bias_O2, norm=norm)

    def linear_add_(
        self, x_TH: Tensor, weight_OH: Tensor, residual_TO: Tensor, bias_O: Tensor | None = None
    ) -> None:  # fmt: skip
        skinny.linear_add_(x_TH, weight_OH, residual_TO, bias_O)


class TritonManyTokens(TorchResidual):
    """`ResidualKernels` for many tokens on GPUs: cuBLAS's products add to the residual as they write.

    A norm that does not add reads and writes half as much. On an H200, of 67 us for 8,192 tokens of hidden size 4,096 that
    saves 34, and a product takes 10 longer at most. A bias is added apart, so that nothing is saved there.
    """

    def takes(self, x_TH: Tensor) -> bool:
        """Whether this is the way for x."""
        return x_TH.is_cuda and x_TH.dtype in skinny.DTYPES and len(x_TH) > linear.MANY

    def linear_add_(
        self, x_TH: Tensor, weight_OH: Tensor, residual_TO: Tensor, bias_O: Tensor | None = None
    ) -> None:  # fmt: skip
        if bias_O is None:
            residual_TO.addmm_(x_TH, weight_OH.t())
        else:
            super().linear_add_(x_TH, weight_OH, residual_TO, bias_O)
