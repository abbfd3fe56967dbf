"""The attention layer: a spec, and a call of the backend with this layer's plan and its part of the KV cache.

It does not know how attention is computed, what a block table is, or which sequences the tokens belong to.

Shapes: T tokens, N query heads and K KV heads of this rank, D head size.
"""

from torch import Tensor, nn

from quire.attention.base import AttentionSpec
from quire.layers.context import BuildContext, ForwardContext
from quire.layers.norm import RMSNorm
from quire.layers.rotary import RotaryEmbedding


class Attention(nn.Module):
    """Layer `layer_index`'s causal attention; `window` counts tokens, the querying one included (None: all).

    Raises ConfigError if the backend cannot do such a layer.
    """

    def __init__(
        self,
        layer_index: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        window: int | None,
        build: BuildContext,
    ) -> None:
        super().__init__()
        self.layer_index = layer_index
        self.backend = build.attention
        self.kernels = build.kernels
        self.spec = AttentionSpec(
            num_heads=build.group.share(num_heads, "num_attention_heads"),
            num_kv_heads=build.group.share(num_kv_heads, "num_key_value_heads"),
            head_size=head_dim,
            scale=head_dim**-0.5,
            window=window,
            kv_dtype=build.kv_dtype or build.dtype,
        )
        self.backend.check(self.spec)

    def forward(
        self,
        q_TND: Tensor,
        k_TKD: Tensor,
        v_TKD: Tensor,
        ctx: ForwardContext,
        *,
        positions_T: Tensor,
        rotary: RotaryEmbedding | None = None,
        q_norm: RMSNorm | None = None,
        k_norm: RMSNorm | None = None,
    ) -> Tensor:
        """Norms each head of q and k, turns them, writes k and v into the cache, then attends: -> [T, N, D].

        q and k may change in place. A backend that attends to a cache which is written already (has a method `attend`) gets
        all that comes before in one kernel.
        """
        plan, kv_B2KSD = ctx.plans[self.layer_index], ctx.kv[self.layer_index]
        attend = getattr(self.backend, "attend", None)
        if attend is not None:
            norm = None if q_norm is None or k_norm is None else (q_norm.weight, k_norm.weight, q_norm.eps)
            turn = None if rotary is None else (rotary.cos_sin_PR, positions_T)
            self.kernels.norm_rotary_write(q_TND, k_TKD, v_TKD, kv_B2KSD, plan.batch.slots_T, norm=norm, rotary=turn)
            return attend(plan, q_TND, kv_B2KSD, self.spec)
        if q_norm is not None and k_norm is not None:
            q_TND, k_TKD = q_norm(q_TND), k_norm(k_TKD)
        if rotary is not None:
            rotary(q_TND, k_TKD, positions_T)
        return self.backend.run(plan, q_TND, k_TKD, v_TKD, kv_B2KSD, self.spec)
