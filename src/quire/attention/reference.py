"""The reference backend: plain torch in fp32, one sequence after the other, on any device. All others are tested against it.

The formula itself is `TorchKernels.attention`, the twin of the fast kernels.
"""

from torch import Tensor

from quire.attention.base import AttentionBackend, AttentionBatch, AttentionSpec, Plan
from quire.kernels.torch_ops import TorchKernels


class ReferenceBackend(AttentionBackend):
    name = "reference"

    def __init__(self) -> None:
        self._kernels = TorchKernels()

    def check(self, spec: AttentionSpec) -> None:
        """Does everything a spec can say."""

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
