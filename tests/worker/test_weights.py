"""Checkpoints into models: every tensor at its place, and a sentence for every broken file."""

import json
import struct
import time

import pytest
import torch
from safetensors.torch import save_file

from quire.attention.reference import ReferenceBackend
from quire.errors import ConfigError, WeightsError
from quire.layers.context import BuildContext
from quire.layers.slots import weight_slots
from quire.model_config import parse_model_config
from quire.models import build_model
from quire.parallel import ParallelGroup
from quire.worker.weights import INDEX_NAME, init_dummy_weights, load_weights, resolve_dtype

CONFIG = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 32,
    "max_position_embeddings": 64,
    "attention_bias": True,
    "mlp_bias": True,
}


def config_of(**changes):
    return parse_model_config({**CONFIG, **changes})


def build(config=None, dtype=torch.float32, group=None):
    """A model that is loaded and looked at, never run; so it needs no kernels."""
    context = BuildContext(
        dtype=dtype,
        device=torch.device("cpu"),
        kernels=None,
        attention=ReferenceBackend(),
        max_model_len=64,
        group=group or ParallelGroup(),
    )
    model = build_model(config or config_of(), context)
    for parameter in model.parameters():
        parameter.fill_(float("nan"))
    return model


def loaded(directory, config=None, **options):
    model = build(config, **options)
    load_weights(model, directory)
    return model


def checkpoint(config=None, dtype=torch.float32):
    """Random tensors under all the names that a checkpoint of this config has."""
    torch.manual_seed(0)
    return {slot.name: torch.randn(slot.full_shape).to(dtype) for slot in weight_slots(build(config))}


@pytest.fixture
def directory(tmp_path):
    save_file(checkpoint(), tmp_path / "model.safetensors")
    return tmp_path


def shard(directory, tensors, num_files=3):
    """Writes `tensors` over several files with an index, as transformers does."""
    weight_map = {}
    for i in range(num_files):
        file_name = f"model-{i + 1:05}-of-{num_files:05}.safetensors"
        part = dict(list(tensors.items())[i::num_files])
        save_file(part, directory / file_name)
        weight_map |= dict.fromkeys(part, file_name)
    (directory / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return weight_map


def fails(directory, match, **changes):
    with pytest.raises(WeightsError, match=match) as caught:
        load_weights(build(config_of(**changes)), directory)
    return str(caught.value)


# ----------------------------------------------------------------------------------------------------- what is loaded


def test_names_are_those_of_the_hub():
    names = set(checkpoint())
    assert names >= {
        "model.embed_tokens.weight",
        "model.layers.1.self_attn.q_proj.weight",
        "model.layers.1.self_attn.k_proj.bias",
        "model.layers.1.self_attn.o_proj.bias",
        "model.layers.1.mlp.gate_proj.weight",
        "model.layers.1.mlp.down_proj.bias",
        "model.layers.1.input_layernorm.weight",
        "model.layers.1.post_attention_layernorm.weight",
        "model.norm.weight",
        "lm_head.weight",
    }
    assert len(names) == 3 + 2 * 16


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3", "smollm3"])
@pytest.mark.parametrize("tied", [False, True])
def test_slots_cover_every_parameter_once(model_type, tied):
    config = config_of(model_type=model_type, head_dim=4, tie_word_embeddings=tied)
    model = build(config)
    for parameter in model.parameters():
        parameter.zero_()
    for slot in weight_slots(model):
        slot.target.add_(1)
    assert all((parameter == 1).all() for parameter in model.parameters())
    assert sum(parameter.numel() for parameter in model.parameters()) == config.num_parameters


def test_tensors_land_in_the_fused_buffers(directory):
    tensors, model = checkpoint(), loaded(directory)
    attention, mlp = "model.layers.1.self_attn", "model.layers.1.mlp"
    layer = model.model.layers[1]
    for kind in ("weight", "bias"):
        qkv = torch.cat([tensors[f"{attention}.{name}.{kind}"] for name in ("q_proj", "k_proj", "v_proj")])
        gate_up = torch.cat([tensors[f"{mlp}.{name}.{kind}"] for name in ("gate_proj", "up_proj")])
        assert torch.equal(getattr(layer.self_attn.qkv_proj, kind), qkv)
        assert torch.equal(getattr(layer.mlp.gate_up_proj, kind), gate_up)
        assert torch.equal(getattr(layer.mlp.down_proj, kind), tensors[f"{mlp}.down_proj.{kind}"])
    assert torch.equal(model.lm_head.weight, tensors["lm_head.weight"])
    assert torch.equal(model.model.embed_tokens.weight, tensors["model.embed_tokens.weight"])


def test_shards_load_as_one_file_does(tmp_path, directory):
    whole = loaded(directory)
    (directory / "model.safetensors").unlink()
    shard(directory, checkpoint())
    sharded = loaded(directory)
    (directory / INDEX_NAME).unlink()
    unindexed = loaded(directory)
    for a, b, c in zip(whole.parameters(), sharded.parameters(), unindexed.parameters()):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def test_mistrals_second_copy_is_left_alone(directory):
    save_file({"layers.0.attention.wq.weight": torch.zeros(1)}, directory / "consolidated.safetensors")
    loaded(directory)
    (directory / "model.safetensors").rename(directory / "other.safetensors")
    loaded(directory)


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_tensors_are_cast_to_the_models_dtype(tmp_path, stored):
    tensors = checkpoint(dtype=stored)
    save_file(tensors, tmp_path / "model.safetensors")
    model = loaded(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert torch.equal(model.model.norm.weight, tensors["model.norm.weight"].bfloat16())


def test_a_tied_head_is_the_embedding_and_its_copy_in_the_file_is_ignored(directory):
    model = loaded(directory, config_of(tie_word_embeddings=True))
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert torch.equal(model.lm_head.weight, checkpoint()["model.embed_tokens.weight"])


def test_rotary_frequencies_of_old_exports_are_ignored(tmp_path):
    save_file(
        {**checkpoint(), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}, tmp_path / "model.safetensors"
    )
    loaded(tmp_path)


@pytest.mark.parametrize("tied", [False, True])
def test_ranks_hold_shares_that_join_to_the_whole(directory, tied):
    config = config_of(tie_word_embeddings=tied)
    whole = loaded(directory, config)
    ranks = [loaded(directory, config, group=ParallelGroup(rank, 2)) for rank in range(2)]
    layers = [model.model.layers[0] for model in (whole, *ranks)]
    q, k, v = layers[0].self_attn.qkv_proj.weight.split([16, 8, 8])
    for rank, layer in enumerate(layers[1:]):
        expected = torch.cat([q[8 * rank :][:8], k[4 * rank :][:4], v[4 * rank :][:4]])
        assert torch.equal(layer.self_attn.qkv_proj.weight, expected)
        assert layer.self_attn.attn.spec.num_heads == 2
        assert layer.self_attn.attn.spec.num_kv_heads == 1
    assert torch.equal(torch.cat([r.mlp.down_proj.weight for r in layers[1:]], dim=1), layers[0].mlp.down_proj.weight)
    assert torch.equal(torch.cat([model.lm_head.weight for model in ranks]), whole.lm_head.weight)


def test_shapes_that_ranks_cannot_share():
    with pytest.raises(ConfigError, match="num_key_value_heads 2"):
        build(group=ParallelGroup(0, 4))


def test_resolve_dtype():
    assert resolve_dtype("auto", config_of()) == torch.float32
    assert resolve_dtype("auto", config_of(torch_dtype="bfloat16")) == torch.bfloat16
    assert resolve_dtype("half", config_of(torch_dtype="bfloat16")) == torch.float16
    with pytest.raises(ConfigError, match="int8"):
        resolve_dtype("int8", config_of())


# ------------------------------------------------------------------------------------------------------ broken files


def test_no_weights_at_all(tmp_path):
    assert 'load_format="dummy"' in fails(tmp_path, r"no \.safetensors file")


def test_pickled_weights_are_not_opened(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"boom")
    fails(tmp_path, r"pytorch_model\.bin.*which may run any code")


@pytest.mark.parametrize("keep", [0, 4, 8, 100, 0.5, -1])
def test_truncated_files(directory, keep):
    path = directory / "model.safetensors"
    content = path.read_bytes()
    length = int(len(content) * keep) if isinstance(keep, float) else len(content) + keep if keep < 0 else keep
    path.write_bytes(content[:length])
    fails(directory, rf"model\.safetensors \({length} bytes\) is truncated, corrupt.*Download it again")


@pytest.mark.parametrize(
    "content",
    [
        b"garbage that is long enough to have a header",
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 4) + b"[1,]",
        struct.pack("<Q", 2) + b"{}" + b"trailing",
        b"<!doctype html><html>not found</html>",
    ],
)
def test_corrupt_files(directory, content):
    (directory / "model.safetensors").write_bytes(content)
    fails(directory, r"model\.safetensors .*corrupt")


def test_a_header_whose_offsets_lie(directory):
    header = json.dumps({"model.norm.weight": {"dtype": "F32", "shape": [16], "data_offsets": [0, 2**40]}}).encode()
    (directory / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 64)
    fails(directory, r"model\.safetensors .*corrupt")


def test_missing_tensors(tmp_path):
    tensors = checkpoint()
    del tensors["model.layers.1.self_attn.k_proj.weight"], tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    fails(tmp_path, r"lacks 2 of the 35 tensors.*'model\.layers\.1\.self_attn\.k_proj\.weight'")


def test_an_untied_head_that_is_missing(tmp_path):
    tensors = checkpoint()
    del tensors["lm_head.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    fails(tmp_path, r"'lm_head\.weight'")


def test_unexpected_tensors(tmp_path):
    save_file({**checkpoint(), "model.layers.2.mlp.up_proj.weight": torch.ones(1)}, tmp_path / "model.safetensors")
    fails(tmp_path, r"model\.safetensors: tensor 'model\.layers\.2\.mlp\.up_proj\.weight' has no place")


def test_a_config_with_fewer_layers_than_the_file(directory):
    fails(directory, r"'model\.layers\.1\..*has no place", num_hidden_layers=1)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.layers.0.self_attn.q_proj.weight", (16, 17)),
        ("model.layers.0.self_attn.k_proj.weight", (16, 16)),  # as many rows as q, not as k
        ("model.layers.0.mlp.up_proj.weight", (24, 16, 1)),
        ("model.embed_tokens.weight", (33, 16)),
        ("model.norm.weight", (1,)),  # would broadcast
        ("model.norm.weight", ()),
    ],
)
def test_wrong_shapes(tmp_path, name, shape):
    save_file({**checkpoint(), name: torch.ones(shape)}, tmp_path / "model.safetensors")
    message = fails(tmp_path, rf"tensor '{name}' has shape \[")
    assert str(list(shape)) in message


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.float8_e4m3fn])
def test_element_types_that_are_no_plain_weights(tmp_path, dtype):
    save_file({**checkpoint(), "model.norm.weight": torch.ones(16).to(dtype)}, tmp_path / "model.safetensors")
    fails(tmp_path, r"'model\.norm\.weight' has element type")


def test_missing_shards(tmp_path):
    weight_map = shard(tmp_path, checkpoint())
    (tmp_path / weight_map["model.norm.weight"]).unlink()
    fails(tmp_path, rf"lacks 1 of its 3 weight files, first {weight_map['model.norm.weight']}")


def test_a_shard_without_a_tensor_that_the_index_promises(tmp_path):
    tensors = checkpoint()
    weight_map = shard(tmp_path, tensors)
    file_name = weight_map["model.norm.weight"]
    kept = {name: t for name, t in tensors.items() if weight_map[name] == file_name and name != "model.norm.weight"}
    save_file(kept, tmp_path / file_name)
    fails(tmp_path, rf"first 'model\.norm\.weight'; {INDEX_NAME} promises it in {file_name}")


def test_a_tensor_in_two_files(tmp_path):
    tensors = checkpoint()
    save_file(tensors, tmp_path / "a.safetensors")
    save_file({"model.norm.weight": tensors["model.norm.weight"]}, tmp_path / "b.safetensors")
    fails(tmp_path, r"'model\.norm\.weight' stands in .*a\.safetensors and again in .*b\.safetensors")


@pytest.mark.parametrize(
    "index",
    [b"", b"{", b"[]", b"\xff", b"{}", b'{"weight_map": []}', b'{"weight_map": {}}', b"[" * 100_000],
)
def test_garbage_indexes(directory, index):
    (directory / INDEX_NAME).write_bytes(index)
    fails(directory, INDEX_NAME)


@pytest.mark.parametrize("file_name", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", 3, None])
def test_an_index_must_not_lead_out_of_the_directory(directory, file_name):
    (directory / INDEX_NAME).write_text(json.dumps({"weight_map": {"model.norm.weight": file_name}}))
    fails(directory, "plain file name|lacks 1 of its 1")


def test_unknown_load_format(directory):
    with pytest.raises(ConfigError, match="'pt'"):
        load_weights(build(), directory, load_format="pt")


# -------------------------------------------------------------------------------------------------------------- dummy


def test_dummy_weights_are_seeded_noise(tmp_path):
    first, second, third = build(), build(), build()
    load_weights(first, tmp_path / "nowhere", load_format="dummy", seed=1)
    init_dummy_weights(second, 1)
    init_dummy_weights(third, 2)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters()))
    assert not torch.equal(first.lm_head.weight, third.lm_head.weight)
    assert (first.model.norm.weight == 1).all()
    assert not torch.equal(first.model.layers[0].mlp.down_proj.weight, first.model.layers[1].mlp.down_proj.weight)
    noise = torch.cat([p.flatten() for name, p in first.named_parameters() if "norm" not in name])
    assert abs(noise.std() - 0.02) < 0.001
    assert abs(noise.mean()) < 0.001


def test_dummy_weights_do_not_depend_on_the_number_of_ranks():
    whole, ranks = build(), [build(group=ParallelGroup(rank, 2)) for rank in range(2)]
    for model in (whole, *ranks):
        init_dummy_weights(model, 1)
    assert torch.equal(torch.cat([model.lm_head.weight for model in ranks]), whole.lm_head.weight)
    down = [model.model.layers[1].mlp.down_proj.weight for model in (whole, *ranks)]
    assert torch.equal(torch.cat(down[1:], dim=1), down[0])


def test_dummy_weights_of_135_million_parameters_take_a_moment():
    config = config_of(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        tie_word_embeddings=True,
        attention_bias=False,
        mlp_bias=False,
    )
    model = build(config, dtype=torch.bfloat16)
    # The thread's own seconds: the machine may be busy with something else. An idle core takes 0.3 s.
    start_s = time.thread_time()
    init_dummy_weights(model)
    assert time.thread_time() - start_s < 10
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
