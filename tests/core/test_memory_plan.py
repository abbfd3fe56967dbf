"""How many blocks fit, and what the message says when too few do."""

import pytest

from quire.core.cache_group import CacheGroup, form_groups
from quire.core.memory_plan import GIB, MemoryPlan, format_bytes, plan_memory
from quire.errors import CapacityError

BLOCK = 2 * 8 * 4 * 4  # one layer's keys and values of 4 tokens: 256 bytes


def plan(blocks: int, windows: tuple[int | None, ...] = (None,), **options: int | None) -> MemoryPlan:
    """A plan for a machine that has room for the null block and `blocks` others beside weights and activations."""
    groups = tuple(CacheGroup((i,), window, 1, 8, "float32") for i, window in enumerate(windows))
    given: dict = {"block_size": 4, "max_model_len": 40, "max_num_seqs": 8, "max_step_tokens": 16, **options}
    return plan_memory(
        groups, budget_bytes=1500 + (blocks + 1) * BLOCK, weights_bytes=1000, activation_bytes=500, **given
    )


def test_what_weights_and_activations_leave_is_blocks_and_one_of_them_is_the_null_block() -> None:
    made = plan(30)
    assert (made.block_bytes, made.num_blocks, made.kv_bytes) == (BLOCK, 30, 31 * BLOCK)
    assert made.max_tokens == 120
    assert made.max_sequences(40, (CacheGroup((0,), None, 1, 8, "float32"),), 16) == 3


def test_never_more_blocks_than_all_rows_could_fill() -> None:
    assert plan(10_000).num_blocks == 8 * 10  # max_num_seqs x blocks of max_model_len
    assert plan(10_000, max_num_seqs=1).num_blocks == 10


def test_a_window_needs_blocks_for_itself_and_a_chunk_only() -> None:
    # window 4 and a chunk of 16: 5 blocks and a border's
    assert plan(10_000, windows=(4,), max_num_seqs=1, max_model_len=1000).num_blocks == 6


def test_exactly_one_sequence_is_enough() -> None:
    assert plan(10).num_blocks == 10


def test_too_little_memory_names_what_would_fit() -> None:
    with pytest.raises(CapacityError, match=r"max_model_len=40 needs 10 blocks .* leaves 9 blocks") as caught:
        plan(9)
    assert "Set max_model_len to at most 36, or raise gpu_memory_utilization." in str(caught.value)
    assert plan(9, max_model_len=36).num_blocks == 9, "and it does"


def test_too_little_memory_for_a_single_block_asks_for_a_smaller_model() -> None:
    groups = form_groups([None], 1, 8, "float32")
    with pytest.raises(CapacityError, match="Use a smaller model or dtype"):
        plan_memory(
            groups,
            block_size=4,
            max_model_len=40,
            max_num_seqs=8,
            max_step_tokens=16,
            budget_bytes=100,
            weights_bytes=1000,
            activation_bytes=500,
        )


def test_num_blocks_can_be_set_and_is_checked_too() -> None:
    assert plan(0, num_blocks_override=11).num_blocks == 11
    with pytest.raises(CapacityError, match="num_gpu_blocks_override gives 9 blocks") as caught:
        plan(0, num_blocks_override=9)
    assert "gpu_memory_utilization" not in str(caught.value)


def test_swap_space_is_counted_in_blocks_and_never_outnumbers_the_devices() -> None:
    assert plan(30, swap_bytes=7 * BLOCK + 5).num_host_blocks == 7
    assert plan(30, swap_bytes=1000 * BLOCK).num_host_blocks == 30
    assert plan(30).num_host_blocks == 0


@pytest.mark.parametrize(("count", "text"), [(0, "0.0 MiB"), (3 << 20, "3.0 MiB"), (GIB // 2, "0.50 GiB")])
def test_bytes_are_written_for_people(count: int, text: str) -> None:
    assert format_bytes(count) == text


def test_the_length_that_would_fit_counts_windows_as_they_are() -> None:
    groups = form_groups((None, 4), num_kv_heads=1, head_size=8, dtype="float32")
    # 99 tokens: 99 blocks of one token where all is seen, and at most 4 + 1 + 1 behind a window
    with pytest.raises(CapacityError, match="Set max_model_len to at most 99"):
        plan_memory(
            groups,
            block_size=1,
            max_model_len=500,
            max_num_seqs=1,
            max_step_tokens=1,
            budget_bytes=0,
            weights_bytes=0,
            activation_bytes=0,
            num_blocks_override=105,
        )
