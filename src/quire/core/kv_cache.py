"""Block tables: which block holds which tokens of which row, and everything that changes that.

A table maps a sequence's block index (position // block_size) to a block. Tables of running sequences are NumPy arrays, one
for each cache group, [max_num_seqs, max_blocks]; changes are collected for the worker. Sequences that share tokens share
blocks; the first to write into a shared block gets a copy of it (copy-on-write).

    row 4  [ 17 | 3 | 8 ]          ref_count[17] = ref_count[3] = 2: a common prefix, never written again
    row 7  [ 17 | 3 | 5 ]          8 and 5: each has one writer

Does not know who runs when, or why a sequence is preempted: the scheduler does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from quire.core.batch import Batch
from quire.core.block_pool import NULL_BLOCK, BlockEvent, BlockPool, EventKind, OutOfBlocks
from quire.core.cache_group import CacheGroup
from quire.core.prefix_cache import chain_name, group_key, root_name
from quire.core.sequence import HostTable
from quire.core.sequence import Sequence as TokenSequence
from quire.core.step import Direction, TableUpdate, Transfer


@dataclass(slots=True)
class AllocationPlan:
    """Which of `rows` needs how many blocks to compute `counts` tokens from `starts` on.

    `needed` [R] sums over cache groups: new blocks at the table's end, and copies of shared ones. `new` and `copy` say the
    same for each group. `total` is the sum of `needed`.
    """

    rows: np.ndarray
    starts: np.ndarray
    needed: np.ndarray
    total: int
    new: list[np.ndarray]
    copy: list[np.ndarray]  # bool: the block that is written first is shared


@dataclass(slots=True)
class PrefixHit:
    """Cached tokens that a sequence starts with: `blocks` in each cache group's table, full but for what `partial` says.

    Blocks that a window has left behind are NULL_BLOCK. With partial = (source block of each group, tokens), the first
    tokens of one more block are valid too: it is copied before it is written on.
    """

    num_tokens: int = 0
    blocks: list[list[int]] = field(default_factory=list)
    partial: tuple[list[int], int] | None = None
    is_fork: bool = False  # blocks of a running sequence; the last may be its partial one, shared until somebody writes

    def without_partial(self) -> PrefixHit:
        extra = self.partial[1] if self.partial else 0
        return PrefixHit(self.num_tokens - extra, self.blocks)


@dataclass(slots=True)
class _Moving:
    """A transfer under way, and what to let go of when it is done."""

    pool: BlockPool
    blocks: list[int]


_NO_COPIES = np.zeros((0, 2), dtype=np.int32)


class KVCacheManager:
    """All block tables and both pools of one engine.

    `root` are the parts that, beside the tokens, decide what a block's content is: model revision, KV dtype, adapter.
    """

    def __init__(
        self,
        batch: Batch,
        groups: Sequence[CacheGroup],
        num_blocks: int,
        block_size: int,
        *,
        num_host_blocks: int = 0,
        enable_prefix_caching: bool = True,
        root: Sequence[str | int | None] = (),
        on_event: Callable[[BlockEvent], None] | None = None,
    ) -> None:
        assert block_size > 0 and groups
        self.batch = batch
        self.groups = tuple(groups)
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self.pool = BlockPool(num_blocks, on_event)
        self.host_pool = BlockPool(num_host_blocks)
        self.num_copies = 0
        self.num_prefix_queries = 0  # tokens looked for
        self.num_prefix_hits = 0  # tokens found
        max_blocks = -(-batch.token_ids.shape[1] // block_size)
        shape = (batch.max_num_seqs, max_blocks)
        self.tables = [np.zeros(shape, dtype=np.int32) for _ in groups]
        self.num_blocks = [np.zeros(batch.max_num_seqs, dtype=np.int32) for _ in groups]
        self.first_block = [
            np.zeros(batch.max_num_seqs, dtype=np.int32) for _ in groups
        ]  # those before have been freed
        self._windowed = [g for g, group in enumerate(groups) if group.window is not None]
        self._root = (*root, block_size)
        self._group_prefixes = [group_key(g, b"") for g in range(len(groups))]
        self._updates: list[list[TableUpdate]] = [[] for _ in groups]
        self._copies: dict[int, int] = {}  # target -> source, of the step being planned
        self._copied_from: list[int] = []  # cached sources, pinned until the step that copies them is known
        self._moving: dict[int, _Moving] = {}
        self._next_transfer = 0

    # -- allocate ----------------------------------------------------------------------------------------------------
    def plan(self, rows: np.ndarray, starts: np.ndarray, counts: np.ndarray) -> AllocationPlan:
        """What it takes to write `counts` tokens from position `starts` on, for each of `rows`. Changes nothing."""
        size = self.block_size
        first = starts // size
        end = (starts + counts + (size - 1)) // size
        needed = np.zeros(len(rows), dtype=np.int32)
        new, copy = [], []
        for g in range(len(self.groups)):
            have = self.num_blocks[g][rows]
            grow = np.maximum(end - have, 0)
            written = self.tables[g][rows, np.minimum(first, self.tables[g].shape[1] - 1)]
            shared = (self.pool.ref_count[written] > 1) | self.pool.published[written]
            if np.count_nonzero(shared):
                shared = self._last_writer_keeps(written, shared & (first < have) & (counts > 0))
            needed += grow + shared
            new.append(grow)
            copy.append(shared)
        return AllocationPlan(rows, starts, needed, int(np.add.reduce(needed)), new, copy)

    def _last_writer_keeps(self, written: np.ndarray, shared: np.ndarray) -> np.ndarray:
        """Of several rows that write into one block, each takes a copy, but the last one alone with it writes in place."""
        copy = shared.copy()
        holders: dict[int, int] = {}
        for i in np.flatnonzero(shared).tolist():
            block = int(written[i])
            left = holders.setdefault(block, int(self.pool.ref_count[block]))
            copy[i] = left > 1 or self.pool.published[block]
            holders[block] = left - 1
        return copy

    def commit(self, plan: AllocationPlan, last_step: int) -> None:
        """Allocates what `plan` says; the caller has seen that it fits. `last_step`: the newest step that was scheduled."""
        if not plan.total:
            return
        for g, (grow, copy) in enumerate(zip(plan.new, plan.copy)):
            if copy.any():
                self._copy_on_write(g, plan.rows[copy], plan.starts[copy] // self.block_size, last_step)
            total = int(grow.sum())
            if not total:
                continue
            blocks = np.asarray(self.pool.allocate(total), dtype=np.int32)
            growing = grow > 0
            rows, counts = plan.rows[growing], grow[growing]
            have = self.num_blocks[g][rows]
            if total > len(rows):
                offset = np.arange(total, dtype=np.int32) - np.repeat(np.cumsum(counts) - counts, counts)
                columns = (np.repeat(have, counts) + offset).astype(np.int32)
                self._set(g, np.repeat(rows, counts), columns, blocks)
            else:
                self._set(g, rows, have, blocks)
            self.num_blocks[g][rows] = have + counts

    def _copy_on_write(self, g: int, rows: np.ndarray, columns: np.ndarray, last_step: int) -> None:
        targets = self.pool.allocate(len(rows))
        sources = self.tables[g][rows, columns].tolist()
        self._set(g, rows, columns, np.asarray(targets, dtype=np.int32))
        for source, target in zip(sources, targets):
            self._copy(source, target)
        # the copy itself reads the source in the step being planned
        self.pool.release(sources, last_step + 1)

    def _copy(self, source: int, target: int) -> None:
        # copies of a launch are made at once: what is to be copied on is copied from where it comes
        self._copies[target] = self._copies.get(source, source)
        self.num_copies += 1
        if self.pool.on_event:
            self.pool.on_event(BlockEvent(EventKind.COPIED, target, b""))

    def _set(self, g: int, rows: np.ndarray, columns: np.ndarray, blocks: np.ndarray) -> None:
        self.tables[g][rows, columns] = blocks
        self._updates[g].append(TableUpdate(rows.astype(np.int32, copy=False), columns, blocks))

    def _set_row(self, g: int, row: int, blocks: Sequence[int], first_block: int = 0) -> None:
        """The whole table of a row that has none: its entries from `first_block` on."""
        count = len(blocks)
        if count:
            columns = np.arange(first_block, first_block + count, dtype=np.int32)
            self._set(g, np.full(count, row, dtype=np.int32), columns, np.asarray(blocks, dtype=np.int32))
        self.num_blocks[g][row] = first_block + count
        self.first_block[g][row] = first_block

    def blocks_of(self, g: int, row: int) -> list[int]:
        return self.tables[g][row, self.first_block[g][row] : self.num_blocks[g][row]].tolist()

    # -- fork, free --------------------------------------------------------------------------------------------------
    def fork(self, source: int, target: int, num_tokens: int) -> None:
        """Row `target`, which has no blocks, shares those of row `source` that hold its first `num_tokens` tokens."""
        columns = -(-num_tokens // self.block_size)
        for g in range(len(self.groups)):
            first = int(self.first_block[g][source])
            blocks = self.tables[g][source, first:columns].tolist()
            self.pool.share(blocks)
            self._set_row(g, target, blocks, first)

    def free(self, row: int, last_step: int) -> None:
        """Lets go of all blocks of a row; `last_step` is the last step that computes for it."""
        for g in range(len(self.groups)):
            self.pool.release(self.blocks_of(g, row)[::-1], last_step)
            self._clear(g, row)

    def _clear(self, g: int, row: int) -> None:
        self.tables[g][row, : self.num_blocks[g][row]] = NULL_BLOCK
        self.num_blocks[g][row] = self.first_block[g][row] = 0

    def free_behind_windows(self, rows: np.ndarray, last_step: int) -> None:
        """Lets go of blocks that no later query of `rows` can see."""
        for g in self._windowed:
            window = self.groups[g].window
            assert window is not None
            needed = np.maximum(self.batch.num_computed[rows] - window + 1, 0) // self.block_size
            needed = np.minimum(needed, self.num_blocks[g][rows])
            behind = needed > self.first_block[g][rows]
            for row, first in zip(rows[behind].tolist(), needed[behind].tolist()):
                old = int(self.first_block[g][row])
                self.pool.release(self.tables[g][row, old:first].tolist(), last_step)
                self.tables[g][row, old:first] = NULL_BLOCK
                self.first_block[g][row] = first

    # -- the prefix cache --------------------------------------------------------------------------------------------
    def names_of(self, sequence: TokenSequence, count: int) -> list[bytes]:
        """The names of the sequence's first `count` full blocks, computed as far as they aren't known yet."""
        names = sequence.block_names
        if len(names) < count:
            size = self.block_size
            raw = np.ascontiguousarray(sequence.token_ids[len(names) * size : count * size], dtype="<i4").tobytes()
            parent = names[-1] if names else self.root_of(sequence)
            for at in range(0, len(raw), 4 * size):
                parent = chain_name(parent, raw[at : at + 4 * size])
                names.append(parent)
        return names

    def root_of(self, sequence: TokenSequence) -> bytes:
        return root_name((*self._root, sequence.group.cache_salt))

    def lookup(self, sequence: TokenSequence, max_tokens: int) -> PrefixHit:
        """The longest start of the sequence, at most `max_tokens`, that is cached in every cache group. Changes nothing."""
        hit = PrefixHit(blocks=[[] for _ in self.groups])
        if not self.enable_prefix_caching or max_tokens <= 0:
            return hit
        names = self.names_of(sequence, max_tokens // self.block_size)[: max_tokens // self.block_size]
        get = self.pool.cache.get
        count = len(names)
        for g in range(len(self.groups)):
            if g not in self._windowed:
                count = next((i for i in range(count) if get(group_key(g, names[i])) is None), count)
        count = self._covered_by_windows(names, count)
        for g in range(len(self.groups)):
            first = self._first_needed(g, count * self.block_size)
            found = [get(group_key(g, name)) for name in names[first:count]]
            hit.blocks[g] = [NULL_BLOCK] * first + [block for block in found if block is not None]
            assert len(hit.blocks[g]) == count
        hit.num_tokens = count * self.block_size
        self._extend_partially(sequence, hit, names[count - 1] if count else self.root_of(sequence), max_tokens)
        return hit

    def _first_needed(self, g: int, num_tokens: int) -> int:
        """The first block that the query at position `num_tokens` can see."""
        window = self.groups[g].window
        return 0 if window is None else max(0, num_tokens - window + 1) // self.block_size

    def _covered_by_windows(self, names: list[bytes], count: int) -> int:
        """The largest number of blocks, at most `count`, before which every windowed group has its window cached."""
        get = self.pool.cache.get
        while count:
            for g in self._windowed:
                first = self._first_needed(g, count * self.block_size)
                missing = [i for i in range(first, count) if get(group_key(g, names[i])) is None]
                if missing:
                    count = missing[-1]
                    break
            else:
                return count
        return 0

    def _extend_partially(self, sequence: TokenSequence, hit: PrefixHit, parent: bytes, max_tokens: int) -> None:
        start = hit.num_tokens
        stop = min(start + self.block_size, max_tokens)
        if stop <= start:
            return
        tokens = np.ascontiguousarray(sequence.token_ids[start:stop], dtype="<i4").tobytes()
        sources, length = [], stop - start
        for g in range(len(self.groups)):
            found = self.pool.cache.longest_start(group_key(g, parent), tokens)
            if found is None:
                return
            sources.append(found[0])
            length = min(length, found[1])
        hit.partial = (sources, length)
        hit.num_tokens += length

    def shared_with(self, source: TokenSequence, num_tokens: int) -> PrefixHit | None:
        """The first `num_tokens` tokens in the blocks of a running sequence. None if its windows have left some behind."""
        row, end = source.row, -(-num_tokens // self.block_size)
        if any(self.first_block[g][row] > self._first_needed(g, num_tokens) for g in self._windowed):
            return None
        return PrefixHit(num_tokens, [table[row, :end].tolist() for table in self.tables], is_fork=True)

    def cached_after(self, sequence: TokenSequence, num_tokens: int, most: int = 4) -> list[int]:
        """Tokens that cached blocks of the first cache group have at index `num_tokens`, after the same beginning: at most
        `most` different ones. What they are beside `sequence`'s own token there tells why a hit ended."""
        full = num_tokens // self.block_size
        parent = self.names_of(sequence, full)[full - 1] if full else self.root_of(sequence)
        at = num_tokens - full * self.block_size
        begins = np.ascontiguousarray(sequence.token_ids[full * self.block_size : num_tokens], dtype="<i4").tobytes()
        return self.pool.cache.next_tokens(group_key(0, parent), begins, at, most)

    def num_revived(self, hit: PrefixHit) -> int:
        """Blocks of a hit that count as available until it is attached."""
        blocks = [block for table in hit.blocks for block in table] + (hit.partial[0] if hit.partial else [])
        return sum(self.pool.is_evictable(block) for block in blocks)

    def attach(self, row: int, hit: PrefixHit) -> None:
        """Row `row`, which has no blocks, starts with what was found. A partial block is copied in the next step.

        Raises OutOfBlocks, with nothing changed, if there is no block for the copy.
        """
        if hit.partial and self.pool.num_free - self.num_revived(hit) < len(self.groups):
            raise OutOfBlocks("no block to copy a partial hit into")
        for table in hit.blocks:
            self.pool.share(block for block in table if block != NULL_BLOCK)
        if hit.partial:
            self.pool.share(hit.partial[0])
        for g, table in enumerate(hit.blocks):
            first = self._first_needed(g, hit.num_tokens)
            first = min(first, len(table))
            gone = [block for block in table[:first] if block != NULL_BLOCK]
            self.pool.release(gone)
            blocks = table[first:]
            if hit.partial:
                (target,) = self.pool.allocate(1)
                self._copy(hit.partial[0][g], target)
                blocks = [*blocks, target]
            self._set_row(g, row, blocks, first)
        if hit.partial:
            self._copied_from += hit.partial[0]

    def publish(self, rows: np.ndarray, num_tokens: np.ndarray) -> None:
        """Offers the full blocks of running sequences, up to `num_tokens` (computed and accepted), to the prefix cache."""
        size, sequences = self.block_size, self.batch.sequences
        have_one = num_tokens >= size
        rows, last = rows[have_one], num_tokens[have_one] // size - 1
        if not self.enable_prefix_caching or not len(rows):
            return
        # nearly always there is one new block a row: all rows' tokens and blocks are fetched at once
        tokens = self.batch.token_ids[rows[:, None], (last * size)[:, None] + np.arange(size)].astype("<i4", copy=False)
        raw, width = tokens.tobytes(), 4 * size
        blocks = [table[rows, last].tolist() for table in self.tables]
        for i, (row, index) in enumerate(zip(rows.tolist(), last.tolist())):
            sequence: TokenSequence = sequences[row]
            if sequence.num_published > index:
                continue
            for earlier in range(sequence.num_published, index):
                start = earlier * size
                earlier_tokens = sequence.token_ids[start : start + size].astype("<i4", copy=False).tobytes()
                here = [int(table[row, earlier]) for table in self.tables]
                self._publish_block(sequence, earlier, earlier_tokens, here)
            self._publish_block(sequence, index, raw[i * width : (i + 1) * width], [column[i] for column in blocks])
            sequence.num_published = index + 1

    def _publish_block(self, sequence: TokenSequence, index: int, tokens: bytes, blocks: list[int]) -> None:
        names = sequence.block_names
        parent = names[index - 1] if index else self.root_of(sequence)
        if index == len(names):
            names.append(chain_name(parent, tokens))
        for prefix, block in zip(self._group_prefixes, blocks):
            if block != NULL_BLOCK:
                self.pool.publish(block, prefix + names[index], prefix + parent, tokens)

    # -- swapping ----------------------------------------------------------------------------------------------------
    def swap_out(self, sequences: Sequence[TokenSequence]) -> Transfer | None:
        """Moves all blocks of a group's sequences to host memory; a block that they share moves once and stays shared.

        The sequences keep their rows until the caller removes them, but have no blocks. None, with nothing changed, if the
        host has too little room.
        """
        tables = [[self.blocks_of(g, s.row) for g in range(len(self.groups))] for s in sequences]
        unique = dict.fromkeys(block for per_group in tables for table in per_group for block in table)
        if len(unique) > self.host_pool.num_free:
            return None
        host = dict(zip(unique, self.host_pool.allocate(len(unique))))
        seen: set[int] = set()
        for sequence, per_group in zip(sequences, tables):
            sequence.host_tables = []
            for g, table in enumerate(per_group):
                sequence.host_tables.append(
                    HostTable(int(self.first_block[g][sequence.row]), [host[block] for block in table])
                )
                for block in table:
                    if block in seen:
                        self.host_pool.share([host[block]])
                    seen.add(block)
                self._clear(g, sequence.row)
        held = [block for per_group in tables for table in per_group for block in table[::-1]]
        return self._start(Direction.OUT, list(host.items()), self.pool, held)

    def num_to_swap_in(self, sequences: Sequence[TokenSequence]) -> int:
        """Device blocks that it takes to bring swapped sequences back."""
        return len({block for s in sequences for table in s.host_tables for block in table.blocks})

    def swap_in(self, sequences: Sequence[TokenSequence]) -> Transfer:
        """Brings swapped sequences, which have rows again, back; the caller has seen that they fit."""
        unique = dict.fromkeys(block for s in sequences for table in s.host_tables for block in table.blocks)
        device = dict(zip(unique, self.pool.allocate(len(unique))))
        seen: set[int] = set()
        for sequence in sequences:
            for g, table in enumerate(sequence.host_tables):
                blocks = [device[block] for block in table.blocks]
                self.pool.share(block for block, old in zip(blocks, table.blocks) if old in seen)
                seen.update(table.blocks)
                self._set_row(g, sequence.row, blocks, table.first)
        held = [block for s in sequences for table in s.host_tables for block in table.blocks]
        for sequence in sequences:
            sequence.host_tables = []
            sequence.num_published = 0  # the new blocks have no names yet
        return self._start(Direction.IN, list(device.items()), self.host_pool, held)

    def drop_host(self, sequence: TokenSequence) -> None:
        """Forgets what a swapped sequence has in host memory."""
        for table in sequence.host_tables:
            self.host_pool.release(table.blocks)
        sequence.host_tables = []

    def _start(self, direction: Direction, pairs: list[tuple[int, int]], pool: BlockPool, held: list[int]) -> Transfer:
        transfer = Transfer(self._next_transfer, direction, np.asarray(pairs, dtype=np.int32).reshape(-1, 2))
        self._next_transfer += 1
        # Both sides stay pinned until it is done: the source by the references that the sequences held, the target by one
        # more of its own, since its sequence may be aborted meanwhile.
        target_pool = self.host_pool if direction is Direction.OUT else self.pool
        targets = [target for _, target in pairs]
        target_pool.share(targets)
        self._moving[transfer.transfer_id] = _Moving(pool, held)
        self._moving[-1 - transfer.transfer_id] = _Moving(target_pool, targets)
        return transfer

    def finish_transfer(self, transfer_id: int) -> None:
        for key in (transfer_id, -1 - transfer_id):
            moving = self._moving.pop(key)
            moving.pool.release(moving.blocks)

    @property
    def has_transfers(self) -> bool:
        return bool(self._moving)

    @property
    def num_moving(self) -> int:
        """Device blocks that nothing but a transfer under way holds: they can be had when it is done."""
        pins = Counter(block for moving in self._moving.values() if moving.pool is self.pool for block in moving.blocks)
        return sum(self.pool.ref_count[block] == count for block, count in pins.items())

    # -- for the step being planned ----------------------------------------------------------------------------------
    def drain(self, step: int) -> tuple[list[list[TableUpdate]], np.ndarray]:
        """Table updates and (source, target) copies [C, 2] collected for step `step`."""
        updates, self._updates = self._updates, [[] for _ in self.groups]
        if not self._copies and not self._copied_from:
            return updates, _NO_COPIES
        copies = np.asarray([(source, target) for target, source in self._copies.items()], dtype=np.int32).reshape(
            -1, 2
        )
        self.pool.release(self._copied_from, step)
        self._copies, self._copied_from = {}, []
        return updates, copies

    def check(self) -> None:
        """Asserts that reference counts equal the tables' references. For tests: it walks everything."""
        self.pool.check()
        self.host_pool.check()
        counted = np.zeros_like(self.pool.ref_count)
        for g in range(len(self.groups)):
            for row in range(self.batch.max_num_seqs):
                blocks = self.blocks_of(g, row)
                assert NULL_BLOCK not in blocks
                np.add.at(counted, blocks, 1)
        np.add.at(counted, self._copied_from, 1)
        for moving in self._moving.values():
            if moving.pool is self.pool:
                np.add.at(counted, moving.blocks, 1)
        assert (counted == self.pool.ref_count).all(), "a reference count differs from the tables"
        assert not self._copies.keys() & set(self._copies.values()), "a block is source and target of copies"
