"""Floors against numbers worked out by hand."""

import numpy as np
import pytest

from quire.bench.floors import Ceilings, Floor, ModelWork, measure_ceilings
from quire.bench.shapes import SHAPES
from quire.model_config import parse_model_config
from support import TINY_CONFIG


def array(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int32)


def work_of(config: dict, dtype: str = "bfloat16") -> ModelWork:
    return ModelWork(parse_model_config(config), dtype, dtype)


def test_weights_are_those_of_linear_layers_and_of_a_head_that_is_used() -> None:
    work = work_of(SHAPES["llama-3.1-8b"])
    layer = 4096 * (4096 + 2 * 1024) + 4096 * 4096 + 3 * 4096 * 14336
    assert work.layer_weights == 32 * layer
    assert work.weight_bytes(0) == 2 * 32 * layer
    assert work.weight_bytes(1) == work.weight_bytes(7) == 2 * (32 * layer + 128256 * 4096)


@pytest.mark.parametrize("shape", ["llama-3.1-8b", "qwen3-0.6b", "smollm2-135m"])
def test_weights_are_the_models_but_for_norms_and_the_input_embedding(shape: str) -> None:
    work = work_of(SHAPES[shape])
    model = work.model
    embedding = 0 if model.tie_word_embeddings else model.vocab_size * model.hidden_size
    norms = model.num_layers * (2 * model.hidden_size + 2 * model.head_dim * model.qk_norm) + model.hidden_size
    assert work.layer_weights + work.head_weights + embedding + norms == model.num_parameters


def test_a_decoding_step_of_the_8b_shape() -> None:
    work = work_of(SHAPES["llama-3.1-8b"])
    assert work.kv_token_bytes == 131072
    floor = work.floor(Ceilings(4.24e12, 781e12), array(511), array(1), 1)
    assert floor.weights_s == pytest.approx(15_009_316_864 / 4.24e12)
    assert floor.kv_s == pytest.approx(512 * 131072 / 4.24e12)
    assert floor.seconds == pytest.approx(3.556e-3, rel=1e-3)


def test_operations_of_a_prompt() -> None:
    """Two layers, 4 heads of 8; 3 tokens from position 2 on see 3, 4 and 5 keys in the first one."""
    work = work_of(TINY_CONFIG, "float32")
    keys_and_values = 32 * 2 * 16
    layer = 32 * 32 + keys_and_values + 32 * 32 + 3 * 32 * 48
    attention = 4 * 4 * 8 * (3 + 4 + 5)
    assert work.flops(array(2), array(3), 3) == 2 * (2 * layer * 3 + 96 * 32 * 3) + attention
    assert work.flops(array(2), array(3), 1) == 2 * (layer * 3 + keys_and_values * 2 + layer + 96 * 32) + attention
    assert work.flops(array(2), array(3), 0) == 2 * (layer * 3 + keys_and_values * 3) + attention
    assert work.flops(array(9), array(1), 4) == 2 * (2 * layer + 96 * 32 * 4) + 4 * 4 * 8 * 10
    assert work.kv_bytes(array(2), array(3)) == 5 * 2 * (2 * 2 * 8 * 4)


def test_a_window_bounds_keys_and_pairs() -> None:
    work = work_of({**TINY_CONFIG, "model_type": "mistral", "sliding_window": 4}, "float32")
    full = work_of(TINY_CONFIG, "float32")
    # 5 tokens from position 2 on see 3, 4, 4, 4 and 4 keys, of the 7 that there are in all; without a window 3 to 7
    more = 4 * 4 * 8 * ((3 + 4 + 5 + 6 + 7) - 19)
    assert full.flops(array(2), array(5), 1) - work.flops(array(2), array(5), 1) == more
    assert work.kv_bytes(array(20), array(1)) == 4 * 2 * (2 * 2 * 8 * 4)
    assert work.kv_bytes(array(0), array(3)) == full.kv_bytes(array(0), array(3))


def test_the_slower_of_reading_and_multiplying_counts_and_keys_come_on_top() -> None:
    work = work_of(SHAPES["qwen3-0.6b"])
    for ceilings in (Ceilings(1e12, 1e15), Ceilings(1e15, 1e12)):
        floor = work.floor(ceilings, array(100, 0), array(1, 500), 1)
        assert floor.seconds == max(floor.weights_s, floor.matmul_s) + floor.kv_s
    assert work.floor(Ceilings(1e12, 1e15), array(), array(), 0) == Floor()


def test_floors_add_up_step_by_step() -> None:
    total = Floor(1, 2, 3, 5) + Floor(4, 1, 1, 5)
    assert total == Floor(5, 3, 4, 10)  # not max(5, 3) + 4: each step waits for its own slower part


def test_long_prompts_do_not_overflow() -> None:
    work = work_of(SHAPES["llama-3.1-8b"])
    pairs = 128_000 * 128_001 // 2
    assert work.flops(array(0).astype(np.int64), array(128_000).astype(np.int64), 0) > 4 * 32 * 128 * 31 * pairs
    floor = work.floor(Ceilings(1.0, 1.0), array(0), array(128_000), 0)
    assert floor.matmul_s > 4 * 32 * 128 * 31 * pairs


def test_a_cpu_has_ceilings() -> None:
    ceilings = measure_ceilings("cpu", "float32")
    assert 1e8 < ceilings.read < 1e14
    assert 1e8 < ceilings.matmul < 1e15
