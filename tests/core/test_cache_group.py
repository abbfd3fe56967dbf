"""Layers that share a block table, and how many blocks a sequence of theirs can hold at once."""

import pytest

from quire.core.cache_group import CacheGroup, form_groups
from quire.errors import ConfigError


def test_a_model_of_one_kind_is_one_group() -> None:
    (group,) = form_groups([None] * 12, num_kv_heads=4, head_size=64, dtype="bfloat16")
    assert group.layers == tuple(range(12)) and group.window is None
    # 12 layers x (key + value) x 4 heads x 64 x 2 bytes x 16 tokens
    assert group.block_bytes(16) == 12 * 2 * 4 * 64 * 2 * 16 == 196_608


def test_groups_have_equally_many_layers_so_that_blocks_have_equal_bytes() -> None:
    """28 layers, every fourth of which sees everything: 7 full ones, and 3 groups of 7 with a window."""
    groups = form_groups([None if i % 4 == 3 else 4096 for i in range(28)], 8, 128, "float16")
    assert [(len(group.layers), group.window) for group in groups] == [(7, 4096)] * 3 + [(7, None)]
    assert sorted(layer for group in groups for layer in group.layers) == list(range(28))
    assert len({group.block_bytes(16) for group in groups}) == 1


def test_layers_that_have_no_common_divisor_are_groups_of_one() -> None:
    groups = form_groups([None, 8, 8, None, None], 1, 8, "float32")
    assert [group.layers for group in groups] == [(0,), (3,), (4,), (1,), (2,)]


def test_an_unknown_dtype_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="'int3' is not one of float32, float16, bfloat16"):
        form_groups([None], 1, 8, "int3")


@pytest.mark.parametrize(
    ("window", "tokens", "step", "blocks"),
    [
        (None, 0, 8, 0),
        (None, 1, 8, 1),
        (None, 16, 8, 4),
        (None, 17, 8, 5),
        (4, 5, 8, 2),  # shorter than the window and a chunk
        (4, 1000, 1, 3),  # 5 tokens that begin anywhere: 2 blocks and a border
        (4, 1000, 8, 4),
        (1, 1000, 1, 2),
    ],
)
def test_most_blocks_of_a_sequence_with_blocks_of_4(window: int | None, tokens: int, step: int, blocks: int) -> None:
    assert CacheGroup((0,), window, 1, 8, "float32").max_blocks(tokens, 4, step) == blocks
