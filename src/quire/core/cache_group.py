"""Cache groups: layers whose keys and values are needed for the same positions, so that one block table serves them all.

Every group's block has equal bytes (its layers' keys and values of `block_size` tokens, lying together), so that one pool
serves all groups: layers of one kind that are more than the other kind's are split into several groups.

Example, 28 layers of which 21 have a window of 4,096 and 7 see everything: four groups of 7 layers, four tables a sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd

from quire.errors import ConfigError

DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True, slots=True)
class CacheGroup:
    """Layers (by index) that share a block table. `window` None: a query sees all tokens before it (full attention);
    W: a query at position p sees the keys of p - W + 1 .. p."""

    layers: tuple[int, ...]
    window: int | None
    num_kv_heads: int
    head_size: int
    dtype: str

    def block_bytes(self, block_size: int) -> int:
        return len(self.layers) * 2 * self.num_kv_heads * self.head_size * DTYPE_BYTES[self.dtype] * block_size

    def max_blocks(self, num_tokens: int, block_size: int, max_step_tokens: int) -> int:
        """Most blocks that a sequence of `num_tokens` holds at once, computed at most `max_step_tokens` at a time."""
        blocks = -(-num_tokens // block_size)
        if self.window is None:
            return blocks
        # a window and a chunk, neither of which need begin at a block's border
        return min(blocks, -(-(self.window + max_step_tokens) // block_size) + 1)


def form_groups(windows: Sequence[int | None], num_kv_heads: int, head_size: int, dtype: str) -> tuple[CacheGroup, ...]:
    """Cache groups of a model whose layer i has the window windows[i]. All have equally many layers.

    Raises ConfigError for a KV dtype that is not known.
    """
    if dtype not in DTYPE_BYTES:
        raise ConfigError(f"KV cache dtype {dtype!r} is not one of {', '.join(DTYPE_BYTES)}")
    kinds: dict[int | None, list[int]] = {}
    for layer, window in enumerate(windows):
        kinds.setdefault(window, []).append(layer)
    size = gcd(*(len(layers) for layers in kinds.values()))
    return tuple(
        CacheGroup(tuple(layers[at : at + size]), window, num_kv_heads, head_size, dtype)
        for window, layers in kinds.items()
        for at in range(0, len(layers), size)
    )
