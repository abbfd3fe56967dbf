"""The Llama family: Llama 2 and 3, SmolLM 1 to 3, Mistral, Qwen2 and Qwen3, which differ only in what the config says.

    tokens -> embedding -> [ norm -> attention -> + -> norm -> MLP -> + ] x num_layers -> norm -> (head -> logits)

The tokens of all sequences of a step come as one flat batch, prefill and decode mixed; only attention, through the
step's context, knows which sequence a token belongs to. In the last layer, those that nothing is drawn from end with
attention. Names of modules are those of Hugging Face's checkpoints.

Shapes: T tokens, M of them whose hidden states are wanted, H hidden size, N query heads, K KV heads, D head size, I
intermediate size, V vocabulary; N, K and I are this rank's share.
"""

from torch import Tensor, nn

from quire.attention.base import AttentionSpec
from quire.kernels import ResidualKernels
from quire.layers.attention import Attention
from quire.layers.context import BuildContext, ForwardContext
from quire.layers.embedding import Embedding, LMHead
from quire.layers.linear import ColumnParallelLinear, RowParallelLinear
from quire.layers.norm import RMSNorm
from quire.layers.rotary import RotaryEmbedding
from quire.model_config import ModelConfig


class LlamaAttention(nn.Module):
    """Grouped-query attention. `rotary` is None on layers without positions (SmolLM3's NoPE layers)."""

    def __init__(
        self, config: ModelConfig, layer_index: int, rotary: RotaryEmbedding | None, build: BuildContext
    ) -> None:
        super().__init__()
        num_heads, num_kv_heads, head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        q_size, kv_size = num_heads * head_dim, num_kv_heads * head_dim
        pieces = {"q_proj": q_size, "k_proj": kv_size, "v_proj": kv_size}
        self.head_dim = head_dim
        self.attn = Attention(layer_index, num_heads, num_kv_heads, head_dim, config.layer_windows[layer_index], build)
        self.qkv_proj = ColumnParallelLinear(config.hidden_size, pieces, bias=config.qkv_bias, build=build)
        self.o_proj = RowParallelLinear(q_size, config.hidden_size, bias=config.o_bias, build=build)
        # Qwen3 norms each head's query and key before they turn.
        self.q_norm = RMSNorm(head_dim, config.rms_norm_eps, build) if config.qk_norm else None
        self.k_norm = RMSNorm(head_dim, config.rms_norm_eps, build) if config.qk_norm else None
        self.rotary = rotary

    def forward(self, qkv_TO: Tensor, positions_T: Tensor, ctx: ForwardContext) -> Tensor:
        """From q, k and v of all heads, side by side, to what attention gives: [T, N D]. The projections around it are the
        layer's to call."""
        num_tokens = qkv_TO.shape[0]
        q, k, v = qkv_TO.split(list(self.qkv_proj.piece_sizes.values()), dim=-1)
        q_TND, k_TKD, v_TKD = (part.view(num_tokens, -1, self.head_dim) for part in (q, k, v))
        o_TND = self.attn(
            q_TND, k_TKD, v_TKD, ctx,
            positions_T=positions_T, rotary=self.rotary, q_norm=self.q_norm, k_norm=self.k_norm,
        )  # fmt: skip
        return o_TND.reshape(num_tokens, -1)


class LlamaMLP(nn.Module):
    """down(silu(gate(x)) * up(x)): SwiGLU, Shazeer 2020."""

    def __init__(self, config: ModelConfig, build: BuildContext) -> None:
        super().__init__()
        hidden_size, inner_size, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        pieces = {"gate_proj": inner_size, "up_proj": inner_size}
        self.gate_up_proj = ColumnParallelLinear(hidden_size, pieces, bias=bias, build=build)
        self.down_proj = RowParallelLinear(inner_size, hidden_size, bias=bias, build=build)

    def forward(self, x_TH: Tensor) -> Tensor:
        """[T, H] -> [T, H], or pieces of it, [P, T, H]"""
        return self.down_proj.pieces(self.gate_up_proj.silu_mul(x_TH))

    def add_to(self, kernels: ResidualKernels, residual_TH: Tensor, norm: RMSNorm) -> None:
        """residual += forward(norm(residual)), in place."""
        self.down_proj.add_to(kernels, residual_TH, self.gate_up_proj.normed_silu_mul(kernels, residual_TH, norm))


class LlamaLayer(nn.Module):
    """One block, in two parts: up to attention, and from there on.

    The addition after each half is left to the norm that follows it, which does both in one pass; but for numbers of tokens
    that the kernels have a `ResidualKernels` for, where each half adds to the residual itself, and norms what it reads.
    """

    def __init__(self, config: ModelConfig, layer_index: int, rotary: RotaryEmbedding, build: BuildContext) -> None:
        super().__init__()
        self.kernels = build.kernels
        has_rope = config.layer_ropes[layer_index]
        self.self_attn = LlamaAttention(config, layer_index, rotary if has_rope else None, build)
        self.mlp = LlamaMLP(config, build)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, build)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, build)

    def attend(self, x_TH: Tensor | None, residual_TH: Tensor, positions_T: Tensor, ctx: ForwardContext) -> Tensor:
        """`x_TH` is the layer before's output, not yet added to `residual_TH` (None: nothing to add). Both [T, H]; `x_TH` may
        be in pieces, [P, T, H], whose sum the norm makes.

        -> what attention gives, [T, N D]; `residual_TH` has `x_TH` added, in place.
        """
        norm, qkv_proj = self.input_layernorm, self.self_attn.qkv_proj
        if x_TH is not None:
            qkv_TO = qkv_proj(norm.add(x_TH, residual_TH))
        elif (kernels := self.kernels.residual(residual_TH)) is not None:
            qkv_TO = qkv_proj.normed(kernels, residual_TH, norm)
        else:
            qkv_TO = qkv_proj(norm(residual_TH))
        return self.self_attn(qkv_TO, positions_T, ctx)

    def finish(self, attended_TO: Tensor, residual_TH: Tensor) -> Tensor | None:
        """From attention to the layer's output, as the next one's `attend` takes it; token by token, so any of them will do."""
        o_proj, norm = self.self_attn.o_proj, self.post_attention_layernorm
        if (kernels := self.kernels.residual(residual_TH)) is not None:
            o_proj.add_to(kernels, residual_TH, attended_TO)
            self.mlp.add_to(kernels, residual_TH, norm)
            return None
        return self.mlp(norm.add(o_proj.pieces(attended_TO), residual_TH))


class LlamaModel(nn.Module):
    """All but the head: tokens into hidden states."""

    def __init__(self, config: ModelConfig, build: BuildContext) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, build)
        rotary = RotaryEmbedding(config.rope, build)
        self.layers = nn.ModuleList([LlamaLayer(config, i, rotary, build) for i in range(config.num_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, build)

    def forward(self, input_ids_T: Tensor, positions_T: Tensor, ctx: ForwardContext) -> Tensor:
        """-> [M, H], the final norm applied."""
        residual, x = self.embed_tokens(input_ids_T), None
        for i, layer in enumerate(self.layers):
            attended = layer.attend(x, residual, positions_T, ctx)
            if i == len(self.layers) - 1 and ctx.wanted_M is not None:
                attended, residual = (every.index_select(0, ctx.wanted_M) for every in (attended, residual))
                if not len(residual):
                    return residual
            x = layer.finish(attended, residual)
        return self.norm(residual) if x is None else self.norm.add(x, residual)


class LlamaForCausalLM(nn.Module):
    """The model and its head, apart: only the rows that are sampled from need logits."""

    def __init__(self, config: ModelConfig, build: BuildContext) -> None:
        super().__init__()
        self.config = config
        self.model = LlamaModel(config, build)
        tied_to = self.model.embed_tokens if config.tie_word_embeddings else None
        self.lm_head = LMHead(config.vocab_size, config.hidden_size, build, tied_to=tied_to)

    @property
    def attention_specs(self) -> list[AttentionSpec]:
        """What each layer asks of the attention backend and of the KV cache, by layer."""
        return [module.spec for module in self.model.layers.modules() if isinstance(module, Attention)]

    def forward(self, input_ids_T: Tensor, positions_T: Tensor, ctx: ForwardContext) -> Tensor:
        """One step over a flat batch.

        `input_ids_T`: int32 or int64 [T]. `positions_T`: int32 or int64 [T], each token's place in its sequence, below
        max_model_len. `ctx` holds the plans, and the KV cache, which is written in place.
        -> hidden states [M, H] of the tokens that `ctx` wants, in the model's dtype, the final norm applied.
        """
        return self.model(input_ids_T, positions_T, ctx)

    def compute_logits(self, hidden_MH: Tensor, *, fp32: bool = True) -> Tensor:
        """[M, H] -> logits [M, V], V the whole vocabulary on every rank: in fp32, or the same numbers in the model's dtype."""
        return self.lm_head(hidden_MH, fp32=fp32)
