"""The rotary table: every scaling against transformers' formulas, with the parameters of real models."""

import math

import pytest
import torch

from quire.kernels.torch_ops import TorchKernels
from quire.layers.context import BuildContext
from quire.layers.rotary import RotaryEmbedding, attention_factor, inverse_frequencies, rotary_table
from quire.model_config import RopeConfig, parse_model_config

transformers = pytest.importorskip("transformers")
rope_utils = pytest.importorskip("transformers.modeling_rope_utils")

REAL = {
    "Llama 2, linear 4": ({"rope_type": "linear", "factor": 4.0}, 1e4, 128, 4096),
    "Llama 2, dynamic 2": ({"rope_type": "dynamic", "factor": 2.0}, 1e4, 128, 4096),
    "Qwen2.5, yarn 4": (
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
        1e6,
        128,
        32768,
    ),
    "gpt-oss, yarn 32": (
        {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}
        | {"original_max_position_embeddings": 4096},
        150_000.0,
        64,
        131072,
    ),
    "DeepSeek-V3, yarn 40": (
        {"rope_type": "yarn", "factor": 40.0, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0}
        | {"original_max_position_embeddings": 4096},
        1e4,
        64,
        163840,
    ),
    "yarn, unlike mscales": (
        {"rope_type": "yarn", "factor": 16.0, "mscale": 0.707, "mscale_all_dim": 1.3}
        | {"original_max_position_embeddings": 4096},
        1e4,
        64,
        65536,
    ),
    "Llama 3.1": (
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        | {"original_max_position_embeddings": 8192},
        5e5,
        128,
        131072,
    ),
    "Llama 3.2": (
        {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        | {"original_max_position_embeddings": 8192},
        5e5,
        64,
        131072,
    ),
    "partial, linear": ({"rope_type": "linear", "factor": 3.0, "partial_rotary_factor": 0.25}, 1e4, 96, 2048),
}


def both(scaling, theta, head_dim, max_positions):
    """The same model's config, ours and transformers'."""
    config = {
        "model_type": "llama",
        "hidden_size": 2 * head_dim,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "vocab_size": 8,
        "max_position_embeddings": max_positions,
        "rope_parameters": {"rope_theta": theta, **scaling},
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return parse_model_config(config), transformers.LlamaConfig(**config)


@pytest.mark.parametrize("name", REAL)
def test_frequencies_equal_transformers(name):
    ours, theirs = both(*REAL[name])
    length = 3 * ours.max_position_embeddings
    expected, factor = rope_utils.ROPE_INIT_FUNCTIONS[ours.rope.rope_type](theirs, seq_len=length)
    torch.testing.assert_close(inverse_frequencies(ours.rope, length), expected, rtol=1e-6, atol=0)
    assert math.isclose(attention_factor(ours.rope), factor, rel_tol=1e-12)


def test_table_of_a_small_example():
    table = rotary_table(RopeConfig("default", 100.0, 4, 8), 3)  # frequencies 1 and 0.1
    for p in range(3):
        expected = torch.tensor([math.cos(p), math.cos(p / 10), math.sin(p), math.sin(p / 10)])
        torch.testing.assert_close(table[p], expected)
    assert table.dtype == torch.float32


def test_yarn_scales_the_table_by_its_attention_factor():
    rope = RopeConfig("yarn", 100.0, 4, 8, 4.0, attention_factor=1.5)
    table = rotary_table(rope, 32)
    torch.testing.assert_close(table[:, :2].square() + table[:, 2:].square(), torch.full((32, 2), 2.25))


def test_dynamic_is_unscaled_within_the_original_length_and_fixed_beyond():
    dynamic, default = RopeConfig("dynamic", 1e4, 16, 64, 4.0), RopeConfig("default", 1e4, 16, 64)
    for length in (10, 64):
        assert torch.equal(inverse_frequencies(dynamic, length), inverse_frequencies(default, length))
    assert not torch.equal(inverse_frequencies(dynamic, 65), inverse_frequencies(default, 65))
    # One table for the length that is served: its first rows are turned by the same frequencies as its last.
    table = rotary_table(dynamic, 256)
    torch.testing.assert_close(table[1, :8], inverse_frequencies(dynamic, 256).cos())
    torch.testing.assert_close(table[255, :8], (255 * inverse_frequencies(dynamic, 256)).cos())


def test_dimensions_beyond_the_rotary_ones_stay():
    build = BuildContext(torch.float32, torch.device("cpu"), TorchKernels(), None, max_model_len=8)
    layer = RotaryEmbedding(RopeConfig("default", 100.0, 4, 8), build)
    q, k = torch.randn(3, 2, 10), torch.randn(3, 1, 10)
    turned_q, turned_k = q.clone(), k.clone()
    layer(turned_q, turned_k, torch.tensor([0, 5, 7]))
    for before, after in ((q, turned_q), (k, turned_k)):
        assert torch.equal(before[..., 4:], after[..., 4:])
        assert torch.equal(before[0], after[0])
        pairs = torch.complex(before[1:, :, :2], before[1:, :, 2:4])
        angles = torch.tensor([5.0, 7.0])[:, None, None] * torch.tensor([1.0, 0.1])
        expected = pairs * torch.polar(torch.ones_like(angles), angles)
        torch.testing.assert_close(torch.complex(after[1:, :, :2], after[1:, :, 2:4]), expected)
