"""Where every slot of KV memory is. A slot is one token's place in one cache group's block.

    filled     holds keys and values of a computed token
    reserved   promised to tokens that steps in flight are computing
    waste      in a block that somebody holds, with nothing in it and nothing on its way (internal fragmentation)
    cached     in a block that nobody holds but whose content can be hit
    pending    in a block that waits for a step in flight, or for a transfer, before it can be had
    free       the rest

A block counts once, however many sequences share it; what sharing saves is `shared`. There is no external fragmentation:
any free block serves any sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from quire.core.kv_cache import KVCacheManager


@dataclass(frozen=True, slots=True)
class SlotUsage:
    """Slots by state. `shared` are slots that further holders of a block would take if each had its own copy: they come on
    top of `total`."""

    filled: int
    reserved: int
    waste: int
    cached: int
    pending: int
    free: int
    total: int
    shared: int

    @property
    def allocated(self) -> int:
        """Slots of blocks that live sequences hold."""
        return self.filled + self.reserved + self.waste

    @property
    def waste_ratio(self) -> float:
        """(allocated - filled) / allocated; 0 when nothing is allocated."""
        return 1 - self.filled / self.allocated if self.allocated else 0.0

    def check(self) -> None:
        """Asserts that no slot is missing or counted twice."""
        parts = (self.filled, self.reserved, self.waste, self.cached, self.pending, self.free)
        assert min(parts) >= 0 and sum(parts) == self.total, f"slots do not add up: {self}"


def measure(kv: KVCacheManager) -> SlotUsage:
    """Counts all slots, by walking the tables of running sequences (milliseconds for a thousand of them)."""
    size, batch, pool = kv.block_size, kv.batch, kv.pool
    rows = batch.rows_in_order()
    computed = np.zeros(pool.num_blocks + 1, dtype=np.int64)
    scheduled = np.zeros(pool.num_blocks + 1, dtype=np.int64)
    references = np.zeros(pool.num_blocks + 1, dtype=np.int64)
    for g in range(len(kv.groups)):
        counts = kv.num_blocks[g][rows] - kv.first_block[g][rows]
        total = int(counts.sum())
        if not total:
            continue
        owner = np.repeat(rows, counts)
        column = np.arange(total) - np.repeat(np.cumsum(counts) - counts, counts) + kv.first_block[g][owner]
        block = kv.tables[g][owner, column]
        start = column * size
        np.maximum.at(computed, block, np.clip(batch.num_computed[owner] - start, 0, size))
        np.maximum.at(scheduled, block, np.clip(batch.num_scheduled[owner] - start, 0, size))
        np.add.at(references, block, 1)
    # a published block is full, however few of its tokens its last holder needs
    held = references > 0
    computed[held & pool.published] = size
    scheduled = np.maximum(scheduled, computed)
    num_held = int(held.sum())
    filled = int(computed[held].sum())
    reserved = int((scheduled - computed)[held].sum())
    # held by a transfer, or by a copy that is about to be made, and by no table
    only_pinned = pool.num_held - num_held
    return SlotUsage(
        filled=filled,
        reserved=reserved,
        waste=num_held * size - filled - reserved,
        cached=pool.num_cached * size,
        pending=(pool.num_pending + only_pinned) * size,
        free=(pool.num_free - pool.num_cached) * size,
        total=pool.num_blocks * size,
        shared=int((references[held] - 1).sum()) * size,
    )
