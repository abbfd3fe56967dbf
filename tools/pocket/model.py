"""Pocket as it is trained: a small Llama in plain torch, its weights named as Hugging Face's LlamaForCausalLM names them.

Shapes: B rows, T tokens, H hidden size, N query heads, K KV heads, D head size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    vocab_size: int = 4096
    hidden_size: int = 256
    intermediate_size: int = 768
    num_layers: int = 8
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    context: int = 1024
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5

    def to_config(self, eos_token_ids: list[int], bos_token_id: int) -> dict[str, Any]:
        """As config.json."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": self.context,
            "rope_theta": self.rope_theta,
            "rms_norm_eps": self.norm_eps,
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": True,
            "initializer_range": 0.02,
            "bos_token_id": bos_token_id,
            "eos_token_id": eos_token_ids,
            "torch_dtype": "bfloat16",
        }


class Norm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype) * self.weight.to(x.dtype)


def rotate(x_BNTD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    """Su et al. 2021, the two halves of a head as the pairs, as Hugging Face lays them out."""
    first, second = x_BNTD.chunk(2, dim=-1)
    return x_BNTD * cos_TD + torch.cat((-second, first), dim=-1) * sin_TD


class SelfAttention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        q_size, kv_size = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        self.q_proj = nn.Linear(shape.hidden_size, q_size, bias=False)
        self.k_proj = nn.Linear(shape.hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(shape.hidden_size, kv_size, bias=False)
        self.o_proj = nn.Linear(q_size, shape.hidden_size, bias=False)

    def forward(self, x_BTH: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
        rows, tokens, _ = x_BTH.shape
        s = self.shape
        q_BNTD = self.q_proj(x_BTH).view(rows, tokens, s.num_heads, s.head_dim).transpose(1, 2)
        k_BKTD = self.k_proj(x_BTH).view(rows, tokens, s.num_kv_heads, s.head_dim).transpose(1, 2)
        v_BKTD = self.v_proj(x_BTH).view(rows, tokens, s.num_kv_heads, s.head_dim).transpose(1, 2)
        q_BNTD, k_BKTD = rotate(q_BNTD, cos_TD, sin_TD), rotate(k_BKTD, cos_TD, sin_TD)
        group = s.num_heads // s.num_kv_heads
        k_BNTD, v_BNTD = k_BKTD.repeat_interleave(group, 1), v_BKTD.repeat_interleave(group, 1)
        o_BNTD = F.scaled_dot_product_attention(q_BNTD, k_BNTD, v_BNTD, is_causal=True)
        return self.o_proj(o_BNTD.transpose(1, 2).reshape(rows, tokens, -1))


class MLP(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.up_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.down_proj = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=False)

    def forward(self, x_BTH: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x_BTH)) * self.up_proj(x_BTH))


class Layer(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.self_attn = SelfAttention(shape)
        self.mlp = MLP(shape)
        self.input_layernorm = Norm(shape.hidden_size, shape.norm_eps)
        self.post_attention_layernorm = Norm(shape.hidden_size, shape.norm_eps)

    def forward(self, x_BTH: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
        x_BTH = x_BTH + self.self_attn(self.input_layernorm(x_BTH), cos_TD, sin_TD)
        return x_BTH + self.mlp(self.post_attention_layernorm(x_BTH))


class Body(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.num_layers))
        self.norm = Norm(shape.hidden_size, shape.norm_eps)


class Pocket(nn.Module):
    """forward: ids [B, T] -> logits [B, T, V]."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.model = Body(shape)
        self.compute_dtype: torch.dtype | None = None
        self.reset()
        frequencies = shape.rope_theta ** -(torch.arange(0, shape.head_dim, 2, dtype=torch.float32) / shape.head_dim)
        angles = torch.outer(torch.arange(shape.context, dtype=torch.float32), frequencies).repeat(1, 2)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def reset(self) -> None:
        """Normal weights; what is added to the residual stream is scaled down by the number of additions (GPT-2's rule)."""
        residual = (2 * self.shape.num_layers) ** -0.5
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                width = self.shape.hidden_size if "embed" in name else parameter.shape[1]
                std = 0.02 if "embed" in name else width**-0.5 * 0.6
                nn.init.normal_(
                    parameter, std=std * (residual if name.endswith(("o_proj.weight", "down_proj.weight")) else 1)
                )

    def forward(self, ids_BT: Tensor) -> Tensor:
        x_BTH = self.model.embed_tokens(ids_BT)
        if self.compute_dtype is not None:  # under autocast: what flows between the layers is narrow too
            x_BTH = x_BTH.to(self.compute_dtype)
        tokens = ids_BT.shape[1]
        cos_TD, sin_TD = self.cos[:tokens].to(x_BTH.dtype), self.sin[:tokens].to(x_BTH.dtype)
        for layer in self.model.layers:
            x_BTH = layer(x_BTH, cos_TD, sin_TD)
        return F.linear(self.model.norm(x_BTH), self.model.embed_tokens.weight)


@torch.no_grad()
def generate(
    model: Pocket, prompts: Sequence[Sequence[int]], max_tokens: int, stop_ids: set[int], batch_size: int = 100
) -> list[list[int]]:
    """Greedy continuations, the stop token left out. No KV cache: it is for a few short answers."""
    device = next(model.parameters()).device
    answers: list[list[int]] = []
    for start in range(0, len(prompts), batch_size):
        rows = [list(prompt) for prompt in prompts[start : start + batch_size]]
        lengths = [len(row) for row in rows]
        live = set(range(len(rows)))
        for _ in range(max_tokens):
            if not live:
                break
            listed = sorted(live)
            longest = -(-max(len(rows[i]) for i in listed) // 32) * 32
            longest = min(longest, model.shape.context)
            ids = torch.tensor([(rows[i] + [0] * longest)[:longest] for i in listed], device=device)
            last = torch.tensor([len(rows[i]) - 1 for i in listed], device=device)
            chosen = model(ids)[torch.arange(len(listed), device=device), last].float().argmax(-1).tolist()
            for i, token in zip(listed, chosen):
                rows[i].append(token)
                if token in stop_ids or len(rows[i]) >= model.shape.context:
                    live.discard(i)
        for row, length in zip(rows, lengths):
            answer = row[length:]
            answers.append(answer[:-1] if answer and answer[-1] in stop_ids else answer)
    return answers
