"""Every kernel in plain torch: what the operations mean, on any device; slow, and the yardstick of the fast ones.

Shapes, dtypes and the cache's layout are in `quire.kernels`.
"""

import torch
from torch import Tensor

from quire.kernels import ResidualKernels


class TorchKernels:
    """`Kernels` in plain torch."""

    name = "torch"

    def residual(self, residual_TH: Tensor) -> ResidualKernels | None:
        return None

    def rms_norm(self, x_TH: Tensor, weight_H: Tensor, eps: float) -> Tensor:
        x = x_TH.float()
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        return weight_H * x.to(x_TH.dtype)

    def linear(self, x_TH: Tensor, weight_OH: Tensor, bias_O: Tensor | None = None) -> Tensor:
        return torch.nn.functional.linear(x_TH, weight_OH, bias_O)

    def linear_silu_mul(self, x_TH: Tensor, weight_O2H: Tensor, bias_O2: Tensor | None = None) -> Tensor:
        return self.silu_and_mul(self.linear(x_TH, weight_O2H, bias_O2))

    def linear_pieces(self, x_TH: Tensor, weight_OH: Tensor, bias_O: Tensor | None = None) -> Tensor:
        return self.linear(x_TH, weight_OH, bias_O)

    def add_rms_norm(self, x_TH: Tensor, residual_TH: Tensor, weight_H: Tensor, eps: float) -> Tensor:
        residual_TH.add_(x_TH if x_TH.dim() == 2 else x_TH.sum(0).to(residual_TH.dtype))
        return self.rms_norm(residual_TH, weight_H, eps)

    def rotary_(self, q_TND: Tensor, k_TKD: Tensor, cos_sin_PR: Tensor, positions_T: Tensor) -> None:
        cos_T1r, sin_T1r = cos_sin_PR[positions_T.long(), None].chunk(2, -1)
        half = cos_T1r.shape[-1]
        for x in (q_TND, k_TKD):
            a, b = x[..., :half].float(), x[..., half : 2 * half].float()
            x[..., : 2 * half] = torch.cat([a * cos_T1r - b * sin_T1r, b * cos_T1r + a * sin_T1r], -1).to(x.dtype)

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
        k = k_TKD.clone()
        if norm is not None:
            q_weight_D, k_weight_D, eps = norm
            q_TND.copy_(self.rms_norm(q_TND, q_weight_D, eps))
            k = self.rms_norm(k, k_weight_D, eps)
        if rotary is not None:
            self.rotary_(q_TND, k, *rotary)
        self.write_kv(k, v_TKD, kv_B2KSD, slots_T)

    def embed(self, ids_T: Tensor, table_VH: Tensor) -> Tensor:
        return torch.nn.functional.embedding(ids_T, table_VH)

    def silu_and_mul(self, gate_up_TI2: Tensor) -> Tensor:
        gate, up = gate_up_TI2.chunk(2, -1)
        return torch.nn.functional.silu(gate) * up

    def write_kv(self, k_TKD: Tensor, v_TKD: Tensor, kv_B2KSD: Tensor, slots_T: Tensor) -> None:
        kept = slots_T >= 0
        slots = slots_T[kept].long()
        blocks, offsets = slots // kv_B2KSD.shape[3], slots % kv_B2KSD.shape[3]
        kv_B2KSD[blocks, 0, :, offsets] = k_TKD[kept].to(kv_B2KSD.dtype)
        kv_B2KSD[blocks, 1, :, offsets] = v_TKD[kept].to(kv_B2KSD.dtype)

    def copy_blocks(self, kv: Tensor, src_ids: Tensor, dst_ids: Tensor) -> None:
        self.swap_blocks(kv, kv, src_ids, dst_ids)

    def swap_blocks(self, src_pool: Tensor, dst_pool: Tensor, src_ids: Tensor, dst_ids: Tensor) -> None:
        dst_pool[dst_ids.to(dst_pool.device)] = src_pool[src_ids.to(src_pool.device)].to(dst_pool.device)

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
        o_TND = torch.empty_like(q_TND, memory_format=torch.contiguous_format)
        num_heads, num_kv_heads, block_size = q_TND.shape[1], kv_B2KSD.shape[2], kv_B2KSD.shape[3]
        starts, seq_lens = query_start_loc_S1.tolist(), seq_lens_S.tolist()
        for s, seq_len in enumerate(seq_lens):
            start, end = starts[s], starts[s + 1]
            positions_q1 = torch.arange(seq_len - (end - start), seq_len, device=q_TND.device)[:, None]
            # Keys before the first query's window may have been freed, their table entries be the null block: leave
            # them out altogether, for a probability of 0 does not cure a NaN.
            low = max(0, seq_len - (end - start) - window + 1) if window else 0
            positions_k = torch.arange(low, seq_len, device=q_TND.device)
            blocks_k = block_tables_SB[s, positions_k // block_size].long()
            keys_values = kv_B2KSD[blocks_k, :, :, positions_k % block_size].float()
            k_NkD, v_NkD = keys_values.repeat_interleave(num_heads // num_kv_heads, dim=2).permute(1, 2, 0, 3)
            scores_Nqk = scale * (q_TND[start:end].float().transpose(0, 1) @ k_NkD.transpose(1, 2))
            if softcap:
                scores_Nqk = softcap * torch.tanh(scores_Nqk / softcap)
            if causal:
                scores_Nqk.masked_fill_(positions_k > positions_q1, -torch.inf)
            if window:
                scores_Nqk.masked_fill_(positions_k <= positions_q1 - window, -torch.inf)
            o_TND[start:end] = (torch.softmax(scores_Nqk, -1) @ v_NkD).transpose(0, 1).to(q_TND.dtype)
        return o_TND


class TorchResidual:
    """`ResidualKernels` one operation after the other: what they mean, by the operations of any `Kernels`."""

    def __init__(self, kernels: TorchKernels | None = None) -> None:
        self._kernels = kernels or TorchKernels()

    def linear(
        self, x_TH: Tensor, weight_OH: Tensor, bias_O: Tensor | None = None, *, norm: tuple[Tensor, float] | None = None
    ) -> Tensor:
        return self._kernels.linear(self._normed(x_TH, norm), weight_OH, bias_O)

    def linear_silu_mul(
        self,
        x_TH: Tensor,
        weight_O2H: Tensor,
        bias_O2: Tensor | None = None,
        *,
        norm: tuple[Tensor, float] | None = None,
    ) -> Tensor:
        return self._kernels.linear_silu_mul(self._normed(x_TH, norm), weight_O2H, bias_O2)

    def linear_add_(
        self, x_TH: Tensor, weight_OH: Tensor, residual_TO: Tensor, bias_O: Tensor | None = None
    ) -> None:  # fmt: skip
        residual_TO.add_(self._kernels.linear(x_TH, weight_OH, bias_O))

    def _normed(self, x_TH: Tensor, norm: tuple[Tensor, float] | None) -> Tensor:
        return x_TH if norm is None else self._kernels.rms_norm(x_TH, *norm)
