"""Rotary position embedding (Su et al. 2021, RoFormer) with the scalings in use, as one table made at build time.

Pair j of a head's first R = rotary_dim dimensions, (x[j], x[j + R/2]), turns by position * inv_freq[j]. A scaling
changes inv_freq, and yarn also the length of the result; so all of it is in the table, and the step only looks up:

    table[p] = [cos(p * inv_freq) | sin(p * inv_freq)] * attention_factor         fp32 [max_model_len, R]

Shapes: T tokens, N query heads, K KV heads, D head size, P positions, R rotary dimensions, F = R / 2 frequencies.
"""

import math

import torch
from torch import Tensor, nn

from quire.layers.context import BuildContext
from quire.model_config import RopeConfig


class RotaryEmbedding(nn.Module):
    """Holds the table for positions 0 to max_model_len - 1; one object serves all layers."""

    cos_sin_PR: Tensor

    def __init__(self, rope: RopeConfig, build: BuildContext) -> None:
        super().__init__()
        self.kernels = build.kernels
        table_PR = rotary_table(rope, build.max_model_len).to(build.device)
        self.register_buffer("cos_sin_PR", table_PR, persistent=False)

    def forward(self, q_TND: Tensor, k_TKD: Tensor, positions_T: Tensor) -> None:
        """Turns q and k in place by their positions (int64 [T]); dimensions from R up stay as they are."""
        self.kernels.rotary_(q_TND, k_TKD, self.cos_sin_PR, positions_T)


def rotary_table(rope: RopeConfig, max_model_len: int) -> Tensor:
    """The table of cosines (first half) and sines (second half), fp32 [max_model_len, R], on the CPU."""
    inv_freq_F = inverse_frequencies(rope, max_model_len)
    # fp32 throughout, as the reference computes: more exact angles would be other angles than the model was trained on.
    angles_PF = torch.arange(max_model_len, dtype=torch.float32)[:, None] * inv_freq_F
    return torch.cat([angles_PF.cos(), angles_PF.sin()], dim=-1) * attention_factor(rope)


def inverse_frequencies(rope: RopeConfig, max_model_len: int) -> Tensor:
    """Radians per position of each pair, fp32 [F], for sequences of up to `max_model_len` tokens.

    Dynamic scaling depends on the length. A sequence's cached keys were turned by one set of frequencies and stay so;
    therefore the set is chosen once, as if every sequence were `max_model_len` long, and unscaled if that is within
    the original length. (transformers chooses anew as a sequence grows, and leaves older keys with older angles.)
    """
    base, dim = rope.theta, rope.rotary_dim
    if rope.rope_type == "dynamic":
        # bloc97's "NTK-aware" base, at the length in use: https://www.reddit.com/r/LocalLLaMA/comments/14mrgpr
        length = max(max_model_len, rope.original_max_position_embeddings)
        stretch = rope.factor * length / rope.original_max_position_embeddings - (rope.factor - 1)
        base *= stretch ** (dim / (dim - 2))
    inv_freq_F = 1.0 / base ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    if rope.rope_type == "linear":
        return inv_freq_F / rope.factor
    if rope.rope_type == "yarn":
        return _yarn(inv_freq_F, rope)
    if rope.rope_type == "llama3":
        return _llama3(inv_freq_F, rope)
    assert rope.rope_type in ("default", "dynamic"), rope.rope_type
    return inv_freq_F


def attention_factor(rope: RopeConfig) -> float:
    """What yarn multiplies q and k with, 1.0 for other types: YaRN (Peng et al. 2023), eq. 22, or DeepSeek's mscale."""
    if rope.rope_type != "yarn":
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor

    def log_scale(mscale: float) -> float:
        return 0.1 * mscale * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0

    if rope.mscale and rope.mscale_all_dim:
        return log_scale(rope.mscale) / log_scale(rope.mscale_all_dim)
    return log_scale(1.0)


def _yarn(inv_freq_F: Tensor, rope: RopeConfig) -> Tensor:
    """YaRN, section 3.2, "NTK-by-parts": fast pairs stay, slow pairs are slowed by the factor, a ramp lies between.

    A pair is fast if it turns more than `beta_fast` times within the original length, slow below `beta_slow` times.
    """

    def pair_of(num_turns: float) -> float:
        """The (fractional) index of the pair that turns so many times within the original length."""
        wavelength = rope.original_max_position_embeddings / num_turns
        return rope.rotary_dim * math.log(wavelength / (2 * math.pi)) / (2 * math.log(rope.theta))

    first, last = pair_of(rope.beta_fast), pair_of(rope.beta_slow)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    # The upper clamp counts dimensions where pairs are meant; the reference does so, and models were trained with it.
    first, last = max(first, 0), min(last, rope.rotary_dim - 1)
    ramp_F = (torch.arange(len(inv_freq_F), dtype=torch.float32) - first) / ((last - first) or 0.001)
    slow_F = ramp_F.clamp(0, 1)
    return inv_freq_F / rope.factor * slow_F + inv_freq_F * (1 - slow_F)


def _llama3(inv_freq_F: Tensor, rope: RopeConfig) -> Tensor:
    """Llama 3.1's scaling (meta-llama/llama-models, apply_scaling): as yarn's, but the ramp is linear in turns.

    `num_turns` within the original length: at most low_freq_factor -> slowed by the factor; at least high_freq_factor
    -> as is; between them a blend.
    """
    num_turns_F = rope.original_max_position_embeddings * inv_freq_F / (2 * math.pi)
    fast_F = (num_turns_F - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    fast_F = fast_F.clamp(0, 1)
    return inv_freq_F / rope.factor * (1 - fast_F) + inv_freq_F * fast_F
