"""The operations that model layers and attention backends are built of, behind one interface: `Kernels`.

An object of this kind is passed to layers when they are constructed; `select_kernels` makes one for a device. Each
operation exists in plain torch (`torch_ops.TorchKernels`, any device, the meaning of the operation), for CPUs in C
(`cpu.CpuKernels`), and for GPUs in Triton (`triton.ops.TritonKernels`). This package knows tensors only; it does not know
models, schedulers or backends.

Letters of shapes: T tokens of the step, H hidden size, I intermediate size, N query heads, K key/value heads, D head
size, P positions, R rotary size, S sequences, B blocks, L layers of the cache group.

The KV cache is one contiguous tensor per pool, kv_BL2KSD [num_blocks, num_layers, 2, num_kv_heads, block_size, head_size]: the
bytes of one block over all layers lie together, so that copying or swapping a block is one memcpy. (S after K is the slot in
the block.) A layer sees the strided view kv_B2KSD = kv_BL2KSD[:, layer]; keys are at index 0, values at 1.
Block 0 is the null block: it pads tables and belongs to nobody. Slots that hold no token of a sequence may hold anything,
even NaN, and never influence a result.
"""

import logging
from typing import Literal, Protocol

import torch
from torch import Tensor

from quire.errors import ConfigError

__all__ = ["Kernels", "ResidualKernels", "select_kernels"]

logger = logging.getLogger(__name__)


class ResidualKernels(Protocol):
    """Linear layers with what stands beside them in a residual stream: the norm before, the addition after.

    Letters: H inputs, O outputs. Weights are contiguous, biases optional, all of x's dtype. norm is a norm's weights [H] and
    eps: x is `Kernels.rms_norm`ed first. What is rounded in between is what the operations one by one round, but that a product
    may be added to the residual before it is rounded.
    """

    def linear(
        self, x_TH: Tensor, weight_OH: Tensor, bias_O: Tensor | None = None, *, norm: tuple[Tensor, float] | None = None
    ) -> Tensor:
        """Returns x W^T + b, [T, O], new and contiguous."""
        ...

    def linear_silu_mul(
        self,
        x_TH: Tensor,
        weight_O2H: Tensor,
        bias_O2: Tensor | None = None,
        *,
        norm: tuple[Tensor, float] | None = None,
    ) -> Tensor:
        """Returns silu(gate) * up, [T, O], of [gate | up] = x W^T + b, W [2 O, H]: as `Kernels.silu_and_mul`."""
        ...

    def linear_add_(
        self, x_TH: Tensor, weight_OH: Tensor, residual_TO: Tensor, bias_O: Tensor | None = None
    ) -> None:  # fmt: skip
        """Adds x W^T + b to residual (contiguous) in place."""
        ...


class Kernels(Protocol):
    """The operations; element types are fp32, bf16 or fp16, and arithmetic is in fp32.

    Arguments of a wrong dtype, shape or layout raise TypeError or ValueError, indices out of range IndexError (not on GPUs,
    where the host does not see them).
    """

    name: str
    """Which implementation this is: "torch", "cpu" or "triton"."""

    def residual(self, residual_TH: Tensor) -> ResidualKernels | None:
        """The way for so many tokens in which products add to the residual themselves; None where the norm that follows is
        to add (`linear_pieces`, `add_rms_norm`)."""
        ...

    def linear(self, x_TH: Tensor, weight_OH: Tensor, bias_O: Tensor | None = None) -> Tensor:
        """Returns x W^T + b, [T, O], new and contiguous; all of x's dtype, x with a contiguous last dimension."""
        ...

    def linear_silu_mul(self, x_TH: Tensor, weight_O2H: Tensor, bias_O2: Tensor | None = None) -> Tensor:
        """Returns silu_and_mul(linear(x, W, b)), [T, O], of W [2 O, H]."""
        ...

    def linear_pieces(self, x_TH: Tensor, weight_OH: Tensor, bias_O: Tensor | None = None) -> Tensor:
        """Returns linear(x, W, b), or pieces of it, fp32 [P, T, O], whose sum it is: what add_rms_norm takes either of."""
        ...

    def rms_norm(self, x_TH: Tensor, weight_H: Tensor, eps: float) -> Tensor:
        """Returns weight * x / sqrt(mean(x^2) + eps) as a new contiguous tensor of x's shape and dtype.

        x is [T, H], or [T, heads, D] normed over the last dimension (q/k norms), and may be a strided view with a
        contiguous last dimension. The normalized value is rounded to x's dtype before the product with weight (of the same
        dtype), exactly as in transformers' LlamaRMSNorm.
        """
        ...

    def add_rms_norm(self, x_TH: Tensor, residual_TH: Tensor, weight_H: Tensor, eps: float) -> Tensor:
        """Sets residual to x + residual in place (contiguous, x's shape and dtype), and returns its rms_norm.

        x may come in pieces, fp32 [P, T, H] contiguous: their sum, in order and rounded to residual's dtype, is x.
        """
        ...

    def rotary_(self, q_TND: Tensor, k_TKD: Tensor, cos_sin_PR: Tensor, positions_T: Tensor) -> None:
        """Rotates q and k in place by the angles of their positions, in halves as Llama and NeoX do.

        Element i of the first R/2 is paired with element i + R/2; elements from R on stay. Row p of cos_sin (fp32,
        contiguous) holds R/2 cosines, then R/2 sines. q and k may be strided views with a contiguous last dimension.
        positions is int32 or int64. Computed in fp32 and rounded once (transformers rounds cos and sin too).
        """
        ...

    def silu_and_mul(self, gate_up_TI2: Tensor) -> Tensor:
        """Returns silu(gate) * up, [T, I], of gate_up [T, 2 I] whose first half is gate; silu is rounded before the product."""
        ...

    def write_kv(self, k_TKD: Tensor, v_TKD: Tensor, kv_B2KSD: Tensor, slots_T: Tensor) -> None:
        """Writes the keys and values of each token into its slot, converting to the cache's dtype.

        slot = block * block_size + offset, int32 or int64; tokens whose slot is negative are skipped. k and v may be strided
        views with a contiguous last dimension; kv is one layer's view of the pool.
        """
        ...

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
        """All that comes between the projections and attention: rms_norm of each head of q and k, rotary_, write_kv.

        norm: weights of q and k ([D] each) and eps; rotary: cos_sin_PR and positions_T; None leaves the thing out. q changes
        in place; whether k does is undefined, what counts is in the cache.
        """
        ...

    def embed(self, ids_T: Tensor, table_VH: Tensor) -> Tensor:
        """Returns rows ids[i] (int32 or int64) of a contiguous table [V, H]: [T, H], new and contiguous."""
        ...

    def copy_blocks(self, kv: Tensor, src_ids: Tensor, dst_ids: Tensor) -> None:
        """Copies blocks src_ids[i] (int64 [n], CPU) to dst_ids[i] within a whole pool [num_blocks, ...], all layers at once.

        No block may be both a source and a destination of one call.
        """
        ...

    def swap_blocks(self, src_pool: Tensor, dst_pool: Tensor, src_ids: Tensor, dst_ids: Tensor) -> None:
        """As copy_blocks, from one pool to another whose blocks have the same shape and dtype."""
        ...

    def attention(
        self,
        q_TND: Tensor,
        kv_B2KSD: Tensor,
        query_start_loc_S1: Tensor,
        seq_lens_S: Tensor,
        block_tables_SB: Tensor,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        causal: bool = True,
    ) -> Tensor:
        """Returns softmax(scale * q k^T) v over each sequence's own keys in the cache: o [T, N, D], contiguous, q's dtype.

        Queries of sequence s are tokens query_start_loc[s] .. query_start_loc[s + 1] - 1 (int32 [S + 1]), at positions
        seq_len - query_len .. seq_len - 1 (seq_lens: int32 [S]); its key at position p is in block
        block_tables[s, p // block_size] (int32 [S, B], contiguous). Query head n uses key/value head n // (N / K).
        causal: a query at position p sees keys up to p. window: only the last `window` of these, p itself included.
        softcap: scores become softcap * tanh(score / softcap). Rows of o that belong to no sequence are undefined.

        Example: query_start_loc [0, 1, 5], seq_lens [9, 4] is a decoding sequence (position 8) and a prompt (0 .. 3).
        """
        ...


def select_kernels(
    device: torch.device | str = "cpu", prefer: Literal["auto", "torch", "cpu", "triton"] = "auto"
) -> Kernels:
    """Makes the kernels for a device: C for CPUs, Triton for CUDA, torch elsewhere, or with a warning where those can't be had.

    `prefer="cpu"` or "triton" raises ConfigError instead; the result's `.name` tells what was chosen.
    """
    from quire.kernels.cpu import BuildError, CpuKernels
    from quire.kernels.torch_ops import TorchKernels

    if prefer not in ("auto", "torch", "cpu", "triton"):
        raise ConfigError(f"kernels {prefer!r} are unknown: choose auto, torch, cpu or triton")
    kind = torch.device(device).type
    on_cpu = kind == "cpu"
    if prefer == "triton" or (prefer == "auto" and kind == "cuda"):
        try:
            from quire.kernels.triton.ops import TritonKernels
        except ImportError as error:
            if prefer == "triton":
                raise ConfigError(f"the Triton kernels can't be had: {error}") from error
            logger.warning("Triton unavailable, using slower torch kernels: %s", error)
            return TorchKernels()
        return TritonKernels()
    if prefer == "torch" or (prefer == "auto" and not on_cpu):
        return TorchKernels()
    if not on_cpu:
        raise ConfigError(f"the C kernels run on the CPU, not on {device}")
    try:
        return CpuKernels.build()
    except BuildError as error:
        if prefer == "cpu":
            raise ConfigError(f"the C kernels can't be had: {error}") from error
        logger.warning("C kernels unavailable, using slower torch ones: %s", error)
        return TorchKernels()
