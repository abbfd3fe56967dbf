"""Physical blocks of one memory (the device's or the host's): who holds them, which can be had, which hold cached content.

A block is in exactly one of four states:

    held       ref_count > 0
    pending    ref_count = 0, but a step in flight may still touch it: nobody gets it before that step has run
    cached     ref_count = 0, content published in the prefix cache: can be hit, or evicted when the free ones are used up
    free       ref_count = 0, nothing in it

Does not know sequences, tables, or what a block's bytes look like. Block 0 is the *null block*: it belongs to nobody and
pads tables, so that an index into KV memory is always valid.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum
from heapq import heappop, heappush

import numpy as np

from quire.core.prefix_cache import PrefixCache

NULL_BLOCK = 0


class OutOfBlocks(Exception):
    """The pool has fewer blocks than were asked for. Raised before anything has changed."""


class EventKind(Enum):
    PUBLISHED = "published"
    EVICTED = "evicted"
    COPIED = "copied"


@dataclass(frozen=True, slots=True)
class BlockEvent:
    """Something that happened to a block's content; `key` is its name in the prefix cache (b"" for a copy's target)."""

    kind: EventKind
    block: int
    key: bytes


class BlockPool:
    """`num_blocks` blocks, numbered from 1; `ref_count` and `published` are indexed by block id.

    Eviction order is least recently used: a block enters the cached list when its last holder lets it go, and the holders
    let a sequence's blocks go from the tail, so that a chain is evicted from its end.
    """

    def __init__(self, num_blocks: int, on_event: Callable[[BlockEvent], None] | None = None) -> None:
        assert num_blocks >= 0
        self.num_blocks = num_blocks
        self.ref_count = np.zeros(num_blocks + 1, dtype=np.int32)
        self.published = np.zeros(num_blocks + 1, dtype=np.bool_)
        self.cache = PrefixCache()
        self.on_event = on_event
        self.completed_step = -1
        # a stack: the block freed last is the one whose lines are still in the machine's caches
        self._free = list(range(num_blocks, 0, -1))
        self._last_step = [-1] * (num_blocks + 1)  # the last step that knew the block, by whichever holder
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._pending: dict[int, int] = {}  # block -> step that must have run
        self._pending_order: list[tuple[int, int]] = []  # a heap; entries of revived blocks are stale

    # -- counts ------------------------------------------------------------------------------------------------------
    @property
    def num_free(self) -> int:
        """Blocks that can be had now: the free ones and the cached ones."""
        return len(self._free) + len(self._cached)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    @property
    def num_pending(self) -> int:
        return len(self._pending)

    @property
    def num_held(self) -> int:
        return self.num_blocks - self.num_free - len(self._pending)

    # -- taking and giving back --------------------------------------------------------------------------------------
    def allocate(self, count: int) -> list[int]:
        """Takes `count` blocks, each with a reference count of 1, evicting cached ones where needed.

        Raises OutOfBlocks, with nothing changed, if fewer can be had.
        """
        if count > self.num_free:
            raise OutOfBlocks(f"{count} blocks asked for, {self.num_free} to be had")
        from_free = min(count, len(self._free))
        blocks = self._free[len(self._free) - from_free :]
        del self._free[len(self._free) - from_free :]
        for _ in range(count - from_free):
            block, _ = self._cached.popitem(last=False)
            self._forget(block)
            blocks.append(block)
        self.ref_count[blocks] = 1
        return blocks

    def share(self, blocks: Iterable[int]) -> None:
        """Adds one reference to each block; a cached or pending one comes back to life with its content."""
        for block in blocks:
            if self.ref_count[block] == 0:
                self._cached.pop(block, None)
                self._pending.pop(block, None)
            self.ref_count[block] += 1

    def release(self, blocks: Iterable[int], last_step: int = -1) -> None:
        """Drops one reference of each block, in the order given: what comes first is evicted first.

        `last_step` is the last step that may read or write these blocks for the holder that lets go. A block whose last
        holder goes is pending until the last such step of any holder has completed.
        """
        for block in blocks:
            last = self._last_step[block] = max(last_step, self._last_step[block])
            self.ref_count[block] -= 1
            count = self.ref_count[block]
            assert count >= 0 and block != NULL_BLOCK, f"block {block} released more often than held"
            if count:
                continue
            if last > self.completed_step:
                self._pending[block] = last
                heappush(self._pending_order, (last, block))
            else:
                self._retire(block)

    def complete_step(self, step: int) -> None:
        """Step `step` and all before it have run: blocks that waited for them can be had again."""
        self.completed_step = step
        while self._pending_order and self._pending_order[0][0] <= step:
            last_step, block = heappop(self._pending_order)
            if self._pending.get(block) == last_step:
                del self._pending[block]
                self._retire(block)

    def _retire(self, block: int) -> None:
        if self.published[block]:
            self._cached[block] = None
        else:
            self._free.append(block)

    # -- content -----------------------------------------------------------------------------------------------------
    def publish(self, block: int, key: bytes, parent: bytes, tokens: bytes) -> bool:
        """Names the content of a full block; False if that content is already there under another block."""
        if self.published[block] or not self.cache.add(block, key, parent, tokens):
            return False
        self.published[block] = True
        if self.on_event:
            self.on_event(BlockEvent(EventKind.PUBLISHED, block, key))
        return True

    def drop_cache(self) -> int:
        """Forgets every published block that nobody holds; returns how many."""
        blocks = list(self._cached)
        for block in blocks:
            self._forget(block)
            self._free.append(block)
        self._cached.clear()
        return len(blocks)

    def _forget(self, block: int) -> None:
        key = self.cache.remove(block)
        self.published[block] = False
        if self.on_event:
            self.on_event(BlockEvent(EventKind.EVICTED, block, key))

    def is_evictable(self, block: int) -> bool:
        return block in self._cached

    def check(self) -> None:
        """Asserts that every block is in exactly one state. For tests: it walks all blocks."""
        held = {int(b) for b in np.flatnonzero(self.ref_count)}
        free, cached, pending = set(self._free), set(self._cached), set(self._pending)
        assert len(free) == len(self._free), "a block is twice in the free list"
        assert NULL_BLOCK not in held | free | cached | pending
        assert len(held) + len(free) + len(cached) + len(pending) == self.num_blocks, "a block is lost"
        assert held | free | cached | pending == set(range(1, self.num_blocks + 1)), "a block is in two states"
        assert all(self.published[b] for b in cached), "a cached block has no name"
        assert not any(self.published[b] for b in free), "a free block has a name"
        assert set(np.flatnonzero(self.published).tolist()) == set(self.cache.blocks()), "names out of step"
