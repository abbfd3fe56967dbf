"""config.json -> ModelConfig: what is read, what is derived, and every refusal. Needs no torch."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from quire.errors import ConfigError, ModelError
from quire.model_config import (
    MAX_CONFIG_BYTES,
    RopeConfig,
    load_model_config,
    parse_model_config,
)

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "bfloat16",
}


def parse(**changes):
    return parse_model_config({**LLAMA, **changes})


def write(directory: Path, config: object, generation: object = None) -> Path:
    (directory / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (directory / "generation_config.json").write_text(json.dumps(generation))
    return directory


# ------------------------------------------------------------------------------------------------------ what is read


def test_a_plain_llama():
    config = parse()
    assert (config.model_type, config.architectures) == ("llama", ("LlamaForCausalLM",))
    assert (config.hidden_size, config.intermediate_size, config.num_layers) == (64, 128, 4)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (8, 2, 8)
    assert (config.vocab_size, config.max_position_embeddings, config.rms_norm_eps) == (1000, 512, 1e-5)
    assert config.rope == RopeConfig("default", 500000.0, 8, 512)
    assert not any([config.tie_word_embeddings, config.qkv_bias, config.o_bias, config.mlp_bias, config.qk_norm])
    assert config.layer_windows == (None,) * 4
    assert config.layer_ropes == (True,) * 4
    assert (config.bos_token_id, config.eos_token_ids, config.dtype) == (1, (2,), "bfloat16")
    assert config.hf == LLAMA
    assert config.derived_max_model_len == 512
    hash(config)


def test_keys_that_may_be_left_out():
    required = {
        k: v for k, v in LLAMA.items() if k.endswith("size") or k.startswith(("num_h", "num_a", "max", "model"))
    }
    config = parse_model_config(required)
    assert (config.num_kv_heads, config.head_dim, config.dtype, config.eos_token_ids) == (8, 8, None, ())
    assert config.bos_token_id is None
    assert config.rope.theta == 10_000.0
    assert parse(num_key_value_heads=None, head_dim=None).num_kv_heads == 8


def test_biases_and_norms_follow_the_family():
    def flags(model_type, **changes):
        config = parse(model_type=model_type, **changes)
        return config.qkv_bias, config.o_bias, config.mlp_bias, config.qk_norm

    assert flags("llama", attention_bias=True, mlp_bias=True) == (True, True, True, False)
    assert flags("mistral", attention_bias=True) == (False, False, False, False)
    assert flags("qwen2") == (True, False, False, False)
    assert flags("qwen3") == (False, False, False, True)
    assert flags("qwen3", attention_bias=True) == (True, True, False, True)
    assert flags("smollm3", attention_bias=True, mlp_bias=True) == (True, True, True, False)


def test_head_dim_may_be_given_apart_from_hidden_size():
    config = parse(model_type="qwen3", hidden_size=60, head_dim=16)
    assert (config.head_dim, config.rope.rotary_dim) == (16, 16)
    assert parse(model_type="qwen3").head_dim == 128  # as transformers, where a Qwen3 config is silent


def test_windows():
    def windows(model_type, **changes):
        return parse(model_type=model_type, **changes).layer_windows

    full, slide = "full_attention", "sliding_attention"
    assert windows("llama", sliding_window=64) == (None,) * 4
    assert windows("mistral", sliding_window=64) == (64,) * 4
    assert windows("mistral", sliding_window=None) == (None,) * 4
    assert windows("mistral") == (4096,) * 4
    for model_type in ("qwen2", "qwen3"):
        assert windows(model_type, sliding_window=64, max_window_layers=1) == (None,) * 4
        using = {"use_sliding_window": True, "sliding_window": 64}
        assert windows(model_type, **using, max_window_layers=3) == (None, None, None, 64)
        assert windows(model_type, **using) == (None,) * 4  # max_window_layers 28 is above the last layer
        assert windows(model_type, **using, layer_types=[slide, full, slide, full]) == (64, None, 64, None)
        assert windows(model_type, sliding_window=64, layer_types=[slide] * 4) == (None,) * 4


def test_smollm3_layers_without_positions():
    assert parse(model_type="smollm3").layer_ropes == (True, True, True, False)
    assert parse(model_type="smollm3", no_rope_layers=[0, 1, 1, 0]).layer_ropes == (False, True, True, False)
    config = parse(model_type="smollm3", no_rope_layers=[0, 1, 1, 0], use_sliding_window=True, sliding_window=9)
    assert config.layer_windows == (9, None, None, 9)
    assert config.tie_word_embeddings


def test_dtype_in_both_spellings():
    assert parse(torch_dtype=None, dtype="float16").dtype == "float16"
    assert parse(torch_dtype="torch.float32").dtype == "float32"
    assert parse(torch_dtype="float16", dtype="bfloat16").dtype == "bfloat16"


def test_end_tokens_of_generation_config_win(tmp_path):
    write(tmp_path, {**LLAMA, "eos_token_id": [5, 6, 5]})
    assert load_model_config(tmp_path).eos_token_ids == (5, 6)
    write(tmp_path, LLAMA, {"eos_token_id": [2, 9], "temperature": 0.6})
    config = load_model_config(tmp_path)
    assert config.eos_token_ids == (2, 9)
    assert config.generation["temperature"] == 0.6
    write(tmp_path, LLAMA, {"eos_token_id": None})
    assert load_model_config(tmp_path).eos_token_ids == (2,)


def test_num_parameters_of_a_known_model():
    smollm2_135m = parse(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        tie_word_embeddings=True,
    )
    assert smollm2_135m.num_parameters == 134_515_008


# -------------------------------------------------------------------------------------------------------------- rope


def test_old_and_new_spelling_of_rope_are_the_same():
    old = parse(rope_theta=1e6, rope_scaling={"type": "linear", "factor": 2})
    new = parse(rope_theta=None, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e6})
    assert old.rope == new.rope == RopeConfig("linear", 1e6, 8, 512, 2.0)
    # Where both stand, rope_scaling wins, but for a null.
    both = parse(rope_scaling=None, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e6})
    assert both.rope == new.rope
    assert parse(rope_scaling=None).rope.rope_type == "default"


def test_yarn_and_llama3_parameters():
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "beta_fast": 16, "mscale": 0.7}
    rope = parse(rope_scaling=yarn).rope
    assert (rope.factor, rope.original_max_position_embeddings, rope.beta_fast, rope.mscale) == (4.0, 128, 16.0, 0.7)
    assert (rope.beta_slow, rope.attention_factor, rope.truncate) == (1.0, None, True)
    # Without a factor: the ratio of the lengths, 512 / 128.
    assert parse(rope_scaling={"type": "yarn", "original_max_position_embeddings": 128}).rope.factor == 4.0
    llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    assert parse(rope_scaling=llama3).rope.original_max_position_embeddings == 512
    assert parse(rope_scaling=llama3, original_max_position_embeddings=64).rope.original_max_position_embeddings == 64


def test_partial_rotary_factor():
    assert parse(partial_rotary_factor=0.5).rope.rotary_dim == 4
    assert parse(rope_parameters={"partial_rotary_factor": 0.25, "rope_type": "default"}).rope.rotary_dim == 2


@pytest.mark.parametrize(
    ("scaling", "length"),
    [
        (None, 512),
        ({"rope_type": "linear", "factor": 2.5}, 1280),
        ({"rope_type": "dynamic", "factor": 4.0}, 2048),
        ({"rope_type": "yarn", "factor": 4.0}, 2048),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}, 1024),
        ({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}, 512),
    ],
)
def test_derived_max_model_len(scaling, length):
    config = parse(rope_scaling=scaling)
    assert config.derived_max_model_len == length
    assert config.resolve_max_model_len() == length
    assert config.resolve_max_model_len(100) == 100
    for wrong in (0, -1, length + 1):
        with pytest.raises(ConfigError, match="max_model_len"):
            config.resolve_max_model_len(wrong)


# --------------------------------------------------------------------------------------------------------- overrides


def test_overrides_are_merged_key_by_key():
    base = {**LLAMA, "rope_scaling": {"rope_type": "yarn", "factor": 2.0, "beta_fast": 16.0}}
    config = parse_model_config(base, None, {"num_hidden_layers": 2, "rope_scaling": {"factor": 4.0}})
    assert config.num_layers == 2
    assert (config.rope.rope_type, config.rope.factor, config.rope.beta_fast) == ("yarn", 4.0, 16.0)
    assert config.hf["rope_scaling"] == {"rope_type": "yarn", "factor": 4.0, "beta_fast": 16.0}
    assert base["rope_scaling"]["factor"] == 2.0


@pytest.mark.parametrize(
    "base",
    [
        {"rope_theta": 1e6, "rope_scaling": None},
        {"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    ],
)
def test_overrides_of_rope_reach_configs_of_either_spelling(base):
    def rope(**overrides):
        return parse_model_config({**LLAMA, **base}, None, overrides).rope

    assert rope(rope_scaling={"type": "linear", "factor": 2.0}) == RopeConfig("linear", 1e6, 8, 512, 2.0)
    assert rope(rope_parameters={"rope_type": "linear", "factor": 2.0}) == RopeConfig("linear", 1e6, 8, 512, 2.0)
    assert rope(rope_theta=5e5).theta == 5e5


def test_overrides_with_null_remove():
    assert parse_model_config(
        {**LLAMA, "rope_scaling": {"type": "linear", "factor": 2.0}}, None, {"rope_scaling": None}
    )
    config = parse_model_config(
        {**LLAMA, "model_type": "mistral", "sliding_window": 32, "rope_scaling": {"type": "linear", "factor": 2.0}},
        None,
        {"sliding_window": None, "rope_scaling": None},
    )
    assert config.layer_windows == (None,) * 4
    assert config.rope.rope_type == "default"


# ---------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "key",
    [
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "vocab_size",
        "max_position_embeddings",
    ],
)
@pytest.mark.parametrize("value", [None, 0, -8, 8.0, "8", True, [8], {}, 10**30, float("nan")])
def test_sizes_must_be_positive_integers(key, value):
    with pytest.raises(ModelError, match=rf"\b{key}\b"):
        parse(**{key: value})


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"num_key_value_heads": 16}, "num_key_value_heads"),
        ({"num_key_value_heads": 0}, "num_key_value_heads"),
        ({"hidden_size": 60}, "hidden_size"),
        ({"head_dim": 0}, "head_dim"),
        ({"head_dim": 7}, "head_dim"),
        ({"head_dim": "8"}, "head_dim"),
        ({"rms_norm_eps": -1e-5}, "rms_norm_eps"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps"),
        ({"rope_theta": 0}, "rope_theta"),
        ({"rope_theta": -1.0}, "rope_theta"),
        ({"rope_theta": float("inf")}, "rope_theta"),
        ({"rope_theta": 10**400}, "rope_theta"),
        ({"rope_theta": "1e4"}, "rope_theta"),
        ({"rope_scaling": []}, "rope_scaling"),
        ({"rope_scaling": "linear"}, "rope_scaling"),
        ({"rope_scaling": {"type": "linear"}}, "factor"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor"),
        ({"rope_scaling": {"type": "linear", "factor": float("inf")}}, "factor"),
        ({"rope_scaling": {"type": "dynamic", "factor": True}}, "factor"),
        ({"rope_scaling": {"type": "linear", "factor": 1e6}}, "factor"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}, "max_position_embeddings": 2**28}, "factor"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}, "head_dim": 2}, "head_dim"),
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "rope_type"),
        ({"rope_scaling": {"type": 5}}, "rope_type"),
        ({"rope_scaling": {"type": "llama3", "factor": 8.0}}, "low_freq_factor"),
        (
            {"rope_scaling": {"type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0}},
            "high_freq_factor",
        ),
        (
            {"rope_scaling": {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 0}},
            "original_max_position_embeddings",
        ),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, "beta_fast": 0}}, "beta_fast"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, "mscale": -1}}, "mscale"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, "truncate": "no"}}, "truncate"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "rope_parameters"),
        ({"partial_rotary_factor": 1.5}, "partial_rotary_factor"),
        ({"partial_rotary_factor": 0.0}, "partial_rotary_factor"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"attention_bias": 1}, "attention_bias"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"hidden_act": 3}, "hidden_act"),
        ({"architectures": "LlamaForCausalLM"}, "architectures"),
        ({"torch_dtype": "float8_e4m3fn"}, "torch_dtype"),
        ({"torch_dtype": 16}, "torch_dtype"),
        ({"eos_token_id": 1000}, "eos_token_id"),
        ({"eos_token_id": [2, -1]}, "eos_token_id"),
        ({"eos_token_id": [[2]]}, "eos_token_id"),
        ({"eos_token_id": True}, "eos_token_id"),
        ({"bos_token_id": "1"}, "bos_token_id"),
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window"),
        ({"model_type": "mistral", "sliding_window": -4}, "sliding_window"),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 4, "max_window_layers": -1},
            "max_window_layers",
        ),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 4, "layer_types": ["full_attention"]},
            "layer_types",
        ),
        (
            {"model_type": "qwen3", "use_sliding_window": True, "sliding_window": 4, "layer_types": ["x"] * 4},
            "layer_types",
        ),
        ({"model_type": "qwen2", "use_sliding_window": "true", "sliding_window": 4}, "use_sliding_window"),
        ({"model_type": "smollm3", "no_rope_layers": [1]}, "no_rope_layers"),
        ({"model_type": "smollm3", "no_rope_layers": [1, 2, 1, {}]}, "no_rope_layers"),
        ({"model_type": "smollm3", "no_rope_layer_interval": 0}, "no_rope_layer_interval"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
    ],
)
def test_hostile_values_are_refused_by_name(changes, named):
    with pytest.raises(ModelError, match=rf"\b{named}\b"):
        parse(**changes)


def test_a_long_value_is_not_repeated_in_full():
    with pytest.raises(ModelError) as caught:
        parse(hidden_size="9" * 100_000)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("model_type", ["gpt2", None, 3, ["llama"], {}])
def test_unsupported_model_types_are_told_what_is_supported(model_type):
    with pytest.raises(ModelError, match=r"Supported: llama, mistral, qwen2, qwen3"):
        parse(model_type=model_type)


def test_code_from_the_repository_is_refused():
    auto_map = {"AutoModelForCausalLM": "modeling_evil.Evil"}
    with pytest.raises(ModelError, match="never does that"):
        parse(model_type="evil", auto_map=auto_map)
    assert parse(auto_map=auto_map).model_type == "llama"  # needs no code: ours is enough


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"garbage",
        b"\xff\xfe\x00",
        b"[1, 2]",
        b"null",
        b'"llama"',
        b"[" * 200_000,
        b'{"hidden_size": ' + b"9" * 5000 + b"}",
        b" " * (MAX_CONFIG_BYTES + 1),
    ],
    ids=["empty", "cut", "garbage", "not utf-8", "list", "null", "string", "deep", "endless integer", "too large"],
)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_files_that_are_no_json_object(tmp_path, content, name):
    write(tmp_path, LLAMA)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelError, match=name):
        load_model_config(tmp_path)


def test_end_tokens_of_generation_config_are_checked_too(tmp_path):
    write(tmp_path, LLAMA, {"eos_token_id": 1_000_000})
    with pytest.raises(ModelError, match="generation_config's eos_token_id"):
        load_model_config(tmp_path)


def test_a_config_alone_is_enough(tmp_path):
    with pytest.raises(ModelError, match=r"no config\.json"):
        load_model_config(tmp_path)
    assert load_model_config(write(tmp_path, LLAMA)) == parse()


def test_loads_neither_torch_nor_transformers():
    heavy = "('torch', 'transformers', 'numpy', 'huggingface_hub')"
    code = f"import sys, quire.hub, quire.model_config; sys.exit(any(name in sys.modules for name in {heavy}))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
