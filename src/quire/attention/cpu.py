"""The CPU backend: the C kernels read keys and values straight through the block tables.

Its kernel cuts the work into pieces anew in each call, which costs about a microsecond, so a plan holds the batch only. What
it guarantees about reproducibility is written at `CpuKernels.attention`.
"""

import torch
from torch import Tensor

from quire.attention.base import AttentionBackend, AttentionBatch, AttentionSpec, Plan
from quire.errors import ConfigError
from quire.kernels.cpu import CpuKernels


class CpuBackend(AttentionBackend):
    name = "cpu"

    def __init__(self, kernels: CpuKernels) -> None:
        self._kernels = kernels

    def check(self, spec: AttentionSpec) -> None:
        if spec.head_size % 8 or spec.head_size > 256:
            raise ConfigError(
                f"attention backend cpu needs a head size that is a multiple of 8 up to 256, not {spec.head_size}: "
                "use attention backend reference"
            )
        if spec.kv_dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ConfigError(f"attention backend cpu keeps keys in fp32, bf16 or fp16, not {spec.kv_dtype}")

    def plan(self, batch: AttentionBatch) -> Plan:
        return Plan(batch)

    def run(
        self, plan: Plan, q_TND: Tensor, k_TKD: Tensor, v_TKD: Tensor, kv_B2KSD: Tensor, spec: AttentionSpec
    ) -> Tensor:
        batch = plan.batch
        self._kernels.write_kv(k_TKD, v_TKD, kv_B2KSD, batch.slots_T)
        return self._kernels.attention(
            q_TND, kv_B2KSD, batch.query_start_loc_S1, batch.seq_lens_S, batch.block_tables_SB,
            scale=spec.scale, window=spec.window, softcap=spec.softcap, causal=spec.causal,
        )  # fmt: skip
