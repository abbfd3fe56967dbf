"""How many blocks fit: arithmetic over the model's shape, done before anything is allocated.

Does not ask a machine how much memory it has, nor measure: the caller passes bytes in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from quire.core.cache_group import CacheGroup
from quire.errors import CapacityError

GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes by purpose, and the blocks that are left for keys and values.

    `num_blocks` can be handed out; memory holds one more, the null block.
    """

    budget_bytes: int
    weights_bytes: int
    activation_bytes: int
    block_bytes: int
    num_blocks: int
    num_host_blocks: int
    block_size: int
    num_groups: int

    @property
    def kv_bytes(self) -> int:
        return (self.num_blocks + 1) * self.block_bytes

    @property
    def max_tokens(self) -> int:
        """Tokens of full-attention sequences that fit at once, borders of blocks aside."""
        return self.num_blocks // self.num_groups * self.block_size

    def max_sequences(self, num_tokens: int, groups: Sequence[CacheGroup], max_step_tokens: int) -> int:
        """How many sequences of `num_tokens` fit at once, none of them sharing anything."""
        blocks = sum(group.max_blocks(num_tokens, self.block_size, max_step_tokens) for group in groups)
        return self.num_blocks // blocks


def format_bytes(count: float) -> str:
    return f"{count / GIB:.2f} GiB" if count >= GIB / 10 else f"{count / (1 << 20):.1f} MiB"


def _longest_that_fits(groups: Sequence[CacheGroup], num_blocks: int, block_size: int, max_step_tokens: int) -> int:
    """Tokens of the longest sequence that `num_blocks` hold, where one is too long for them."""
    fits, too_long = 0, num_blocks * block_size + 1
    while too_long - fits > 1:
        middle = (fits + too_long) // 2
        if sum(group.max_blocks(middle, block_size, max_step_tokens) for group in groups) <= num_blocks:
            fits = middle
        else:
            too_long = middle
    return fits


def plan_memory(
    groups: Sequence[CacheGroup],
    *,
    block_size: int,
    max_model_len: int,
    max_num_seqs: int,
    max_step_tokens: int,
    budget_bytes: int,
    weights_bytes: int,
    activation_bytes: int,
    swap_bytes: int = 0,
    num_blocks_override: int | None = None,
) -> MemoryPlan:
    """Splits `budget_bytes` into weights, activations and KV blocks; never more blocks than all rows could ever fill.

    `num_blocks_override` sets the number of blocks instead. Host blocks take `swap_bytes`, and never outnumber the device's.
    Raises CapacityError, naming the lengths that would fit, if not even one sequence of `max_model_len` has room.
    """
    block_bytes = groups[0].block_bytes(block_size)
    assert all(group.block_bytes(block_size) == block_bytes for group in groups)
    one = sum(group.max_blocks(max_model_len, block_size, max_step_tokens) for group in groups)
    if num_blocks_override is None:
        left = budget_bytes - weights_bytes - activation_bytes
        num_blocks = min(max(left // block_bytes - 1, 0), one * max_num_seqs)
    else:
        num_blocks = num_blocks_override
    if num_blocks < one:
        fits = _longest_that_fits(groups, num_blocks, block_size, max_step_tokens)
        have = (
            f"num_gpu_blocks_override gives {num_blocks} blocks"
            if num_blocks_override is not None
            else f"{format_bytes(budget_bytes)} of memory, less {format_bytes(weights_bytes)} of weights and "
            f"{format_bytes(activation_bytes)} of activations, leaves {num_blocks} blocks"
        )
        raise CapacityError(
            f"too little KV memory: one sequence of max_model_len={max_model_len} needs {one} blocks of "
            f"{format_bytes(block_bytes)}, and {have}. "
            + (
                f"Set max_model_len to at most {fits}"
                if fits
                else "Use a smaller model or dtype, or free memory on this machine"
            )
            + ("." if num_blocks_override is not None else ", or raise gpu_memory_utilization.")
        )
    return MemoryPlan(
        budget_bytes=budget_bytes,
        weights_bytes=weights_bytes,
        activation_bytes=activation_bytes,
        block_bytes=block_bytes,
        num_blocks=num_blocks,
        num_host_blocks=min(swap_bytes // block_bytes, num_blocks),
        block_size=block_size,
        num_groups=len(groups),
    )
