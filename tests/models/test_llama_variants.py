"""The Llama file apart from any checkpoint: split over ranks, in half precision, with overridden configs."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pytest
import torch

from quire.attention.reference import ReferenceBackend
from quire.errors import ConfigError, ModelError
from quire.kernels.torch_ops import TorchKernels
from quire.layers.context import BuildContext
from quire.model_config import load_model_config
from quire.models import build_model
from quire.parallel import ParallelGroup

CONFIG = {
    "model_type": "qwen2",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "use_sliding_window": True,
    "sliding_window": 8,
    "max_window_layers": 1,
    "torch_dtype": "float32",
}
IDS = [(7 * i * i + 3) % 64 for i in range(40)]


@pytest.fixture
def directory(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


def logits_of(model):
    parts = [model.step({0: ids})[0] for ids in (IDS[:17], IDS[17:18], IDS[18:])]
    return torch.cat(parts)


@dataclass(frozen=True)
class ThreadGroup(ParallelGroup):
    """Ranks that are threads of one process: each lays its tensor on the table, and takes the others'."""

    barrier: threading.Barrier = field(kw_only=True)
    table: list = field(kw_only=True)

    def _exchange(self, x):
        self.table[self.rank] = x.clone()
        self.barrier.wait(timeout=60)
        tensors = list(self.table)
        self.barrier.wait(timeout=60)
        return tensors

    def all_reduce(self, x):
        return sum(self._exchange(x))

    def all_gather(self, x, dim):
        return torch.cat(self._exchange(x), dim)


@pytest.mark.parametrize("overrides", [{}, {"tie_word_embeddings": True}, {"model_type": "llama", "mlp_bias": True}])
def test_ranks_together_compute_what_one_computes(directory, paged_model, overrides):
    overrides = {"attention_bias": True, **overrides}
    whole = logits_of(paged_model(directory, load_format="dummy", hf_overrides=overrides))
    shared = {"barrier": threading.Barrier(2), "table": [None, None]}
    ranks = [
        paged_model(directory, load_format="dummy", hf_overrides=overrides, group=ThreadGroup(rank, 2, **shared))
        for rank in range(2)
    ]
    assert ranks[0].groups[None][2].shape[3] == 2  # each rank keeps half of the KV heads
    with ThreadPoolExecutor(2) as pool:
        for logits in pool.map(logits_of, ranks):
            torch.testing.assert_close(logits, whole, rtol=0, atol=1e-5)


def test_half_precision_stays_near_fp32(directory, paged_model):
    exact = logits_of(paged_model(directory, load_format="dummy"))
    for dtype, tolerance in (("float16", 0.01), ("bfloat16", 0.05)):
        logits = logits_of(paged_model(directory, load_format="dummy", dtype=dtype))
        assert logits.dtype == torch.float32
        assert (logits - exact).abs().max() < tolerance * exact.abs().max()


def test_overrides_change_the_model(directory, paged_model):
    model = paged_model(
        directory,
        load_format="dummy",
        hf_overrides={"num_hidden_layers": 2, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
    )
    assert len(model.model.model.layers) == 2
    assert model.max_model_len == 256
    assert [spec.window for spec in model.model.attention_specs] == [None, 8]


def build_context(**changes):
    options = {"kernels": TorchKernels(), "attention": ReferenceBackend(), "max_model_len": 64}
    return BuildContext(dtype=torch.float32, device=torch.device("cpu"), **{**options, **changes})


def test_a_model_type_without_a_file(directory):
    config = load_model_config(directory)
    object.__setattr__(config, "model_type", "gpt2")
    with pytest.raises(ModelError, match="'gpt2' has no model file"):
        build_model(config, build_context())


def test_more_ranks_than_shares(directory):
    with pytest.raises(ConfigError, match=r"cannot be shared evenly by 3"):
        build_model(load_model_config(directory), build_context(group=ParallelGroup(0, 3)))


def test_a_layer_that_the_attention_backend_cannot_do(directory):
    class Choosy(ReferenceBackend):
        def check(self, spec):
            raise ConfigError(f"no head size {spec.head_size}")

    with pytest.raises(ConfigError, match="no head size 8"):
        build_model(load_model_config(directory), build_context(attention=Choosy()))
