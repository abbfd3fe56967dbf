"""Block tables by hand: growth, forks, copy-on-write, prefix hits, windows, swapping. Blocks hold 4 tokens."""

import numpy as np
import pytest

from quire.core.batch import Batch
from quire.core.block_pool import NULL_BLOCK, BlockEvent, EventKind, OutOfBlocks
from quire.core.cache_group import CacheGroup
from quire.core.kv_cache import KVCacheManager
from quire.core.sequence import RequestGroup, Sequence
from quire.core.step import Direction
from quire.sampling_params import SamplingParams

SIZE = 4


class Tables:
    """A manager, and sequences that live in its rows."""

    def __init__(
        self, num_blocks: int = 32, windows: tuple[int | None, ...] = (None,), num_host: int = 0, cached: bool = True
    ) -> None:
        groups = [CacheGroup((i,), window, 1, 8, "float32") for i, window in enumerate(windows)]
        self.batch = Batch(8, 64)
        self.events: list[BlockEvent] = []
        self.kv = KVCacheManager(
            self.batch,
            groups,
            num_blocks,
            SIZE,
            num_host_blocks=num_host,
            enable_prefix_caching=cached,
            on_event=self.events.append,
        )
        self.step = 0

    def sequence(self, tokens: list[int], salt: str | None = None) -> Sequence:
        group = RequestGroup("r", np.asarray(tokens, dtype=np.int32), SamplingParams(), seed=0, cache_salt=salt)
        group.max_tokens = 64 - len(tokens)
        return group.sequences[0]

    def enter(self, tokens: list[int], salt: str | None = None) -> int:
        return self.batch.add(self.sequence(tokens, salt))

    def write(self, *what: tuple[int, int, int]) -> list[tuple[int, int]]:
        """One step in which each (row, start, count) is computed; returns the step's copies."""
        rows, starts, counts = (np.asarray(column, dtype=np.int32) for column in zip(*what))
        self.kv.commit(self.kv.plan(rows, starts, counts), self.step - 1)
        _, copies = self.kv.drain(self.step)
        self.batch.num_scheduled[rows] = self.batch.num_computed[rows] = starts + counts
        self.kv.pool.complete_step(self.step)
        self.step += 1
        self.kv.check()
        return [tuple(copy) for copy in copies.tolist()]

    def compute(self, tokens: list[int], salt: str | None = None) -> int:
        """A row with all its tokens computed and its full blocks published."""
        row = self.enter(tokens, salt)
        self.write((row, 0, len(tokens)))
        self.kv.publish(np.asarray([row]), np.asarray([len(tokens)], dtype=np.int32))
        return row

    def leave(self, row: int) -> None:
        self.kv.free(row, -1)
        self.batch.remove(self.batch.sequences[row])
        self.kv.check()

    def needed(self, *what: tuple[int, int, int]) -> list[int]:
        rows, starts, counts = (np.asarray(column, dtype=np.int32) for column in zip(*what))
        return self.kv.plan(rows, starts, counts).needed.tolist()


# -- growth, forks, copy-on-write --------------------------------------------------------------------------------------
def test_a_row_takes_a_block_at_each_border_and_none_between() -> None:
    t = Tables()
    row = t.enter([1] * 5)
    assert t.needed((row, 0, 5)) == [2]
    t.write((row, 0, 5))
    assert [t.needed((row, 5, count))[0] for count in (0, 1, 3, 4, 7, 8)] == [0, 0, 0, 1, 1, 2]
    assert len(t.kv.blocks_of(0, row)) == 2


def test_table_updates_name_the_new_entries_only() -> None:
    t = Tables()
    rows = np.asarray([t.enter([1] * 5), t.enter([2] * 9)], dtype=np.int32)
    starts, counts = np.zeros(2, dtype=np.int32), np.asarray([5, 9], dtype=np.int32)
    t.kv.commit(t.kv.plan(rows, starts, counts), -1)
    ((update,),), _ = t.kv.drain(0)
    assert update.rows.tolist() == [rows[0]] * 2 + [rows[1]] * 3
    assert update.columns.tolist() == [0, 1, 0, 1, 2]
    assert update.blocks.tolist() == [*t.kv.blocks_of(0, rows[0]), *t.kv.blocks_of(0, rows[1])]
    assert t.kv.drain(1)[0] == [[]], "told once"


def test_a_fork_shares_all_blocks_and_copies_nothing() -> None:
    t = Tables()
    parent, child = t.enter([1] * 6), t.enter([1] * 6)
    t.write((parent, 0, 6))
    t.kv.fork(parent, child, 6)
    assert t.kv.blocks_of(0, child) == t.kv.blocks_of(0, parent)
    assert t.kv.pool.num_held == 2 and t.kv.num_copies == 0
    assert t.kv.pool.ref_count[t.kv.blocks_of(0, parent)].tolist() == [2, 2]
    t.kv.check()


def test_a_fork_of_fewer_tokens_shares_fewer_blocks() -> None:
    t = Tables()
    parent, child = t.enter([1] * 9), t.enter([1] * 9)
    t.write((parent, 0, 9))
    t.kv.fork(parent, child, 4)
    assert t.kv.blocks_of(0, child) == t.kv.blocks_of(0, parent)[:1]


def test_the_last_writer_of_a_shared_block_writes_in_place() -> None:
    """Three sequences share a partial block: two take copies, the third keeps the block itself."""
    t = Tables()
    a, b, c = (t.enter([1] * 6) for _ in range(3))
    t.write((a, 0, 6))
    for child in (b, c):
        t.kv.fork(a, child, 6)
    first, shared = t.kv.blocks_of(0, a)
    assert t.needed((a, 6, 1), (b, 6, 1), (c, 6, 1)) == [1, 1, 0]
    copies = t.write((a, 6, 1), (b, 6, 1), (c, 6, 1))
    assert copies == [(shared, t.kv.blocks_of(0, a)[1]), (shared, t.kv.blocks_of(0, b)[1])]
    assert t.kv.blocks_of(0, c) == [first, shared]
    assert t.kv.pool.num_held == 4 and t.kv.pool.ref_count[first] == 3


def test_siblings_that_write_in_different_steps_copy_as_often() -> None:
    t = Tables()
    a, b = t.enter([1] * 6), t.enter([1] * 6)
    t.write((a, 0, 6))
    t.kv.fork(a, b, 6)
    assert len(t.write((a, 6, 1))) == 1
    assert t.write((b, 6, 1)) == [], "it is alone with the block by now"


def test_a_fork_at_a_border_of_blocks_copies_nothing() -> None:
    t = Tables()
    a, b = t.enter([1] * 8), t.enter([1] * 8)
    t.write((a, 0, 8))
    t.kv.fork(a, b, 8)
    assert t.write((a, 8, 1), (b, 8, 1)) == []
    assert t.kv.pool.num_held == 4  # 2 shared and 2 private


def test_a_published_block_is_copied_even_by_its_only_holder() -> None:
    t = Tables()
    row = t.compute([1, 2, 3, 4])
    assert t.needed((row, 2, 1)) == [1], "a full block of accepted tokens is immutable"


def test_the_source_of_a_copy_is_pending_until_the_copy_was_made() -> None:
    t = Tables()
    a, b = t.enter([1] * 6), t.enter([1] * 6)
    t.write((a, 0, 6))
    t.kv.fork(a, b, 6)
    plan = t.kv.plan(*(np.asarray(x, dtype=np.int32) for x in ([a], [6], [1])))
    t.kv.commit(plan, t.step - 1)
    t.kv.free(b, -1)  # the other holder goes before the step has run
    assert t.kv.pool.num_pending == 1
    t.kv.drain(t.step)
    t.kv.pool.complete_step(t.step)
    assert t.kv.pool.num_pending == 0


def test_copies_are_counted_and_told() -> None:
    t = Tables()
    a, b = t.enter([1] * 6), t.enter([1] * 6)
    t.write((a, 0, 6))
    t.kv.fork(a, b, 6)
    ((_, target),) = t.write((a, 6, 1))
    assert t.kv.num_copies == 1
    assert t.events == [BlockEvent(EventKind.COPIED, target, b"")]


# -- prefix hits -------------------------------------------------------------------------------------------------------
STEM = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]


def test_a_hit_is_counted_in_tokens_not_in_blocks() -> None:
    t = Tables()
    row = t.compute(STEM)
    blocks = t.kv.blocks_of(0, row)
    hit = t.kv.lookup(t.sequence([1, 2, 3, 4, 5, 6, 7, 99, 9]), 8)
    assert (hit.num_tokens, hit.blocks, hit.partial) == (7, [blocks[:1]], ([blocks[1]], 3))
    assert hit.without_partial().num_tokens == 4 and hit.without_partial().partial is None


def test_a_hit_goes_no_further_than_it_may() -> None:
    t = Tables()
    t.compute(STEM)
    for limit in range(13):
        assert t.kv.lookup(t.sequence(STEM), limit).num_tokens == limit


def test_a_hit_needs_the_whole_chain() -> None:
    t = Tables()
    t.compute(STEM)
    other = t.kv.lookup(t.sequence([9, 2, 3, 4, 5, 6, 7, 8, 1]), 8)
    assert other.num_tokens == 0, "equal tokens after different ones are not the same"


def test_a_salt_parts_the_cache() -> None:
    t = Tables()
    t.compute(STEM, salt="alice")
    assert t.kv.lookup(t.sequence(STEM, salt="alice"), 11).num_tokens == 11
    assert t.kv.lookup(t.sequence(STEM, salt="bob"), 11).num_tokens == 0
    assert t.kv.lookup(t.sequence(STEM), 11).num_tokens == 0


def test_nothing_is_found_or_published_with_caching_off() -> None:
    t = Tables(cached=False)
    t.compute(STEM)
    assert t.kv.lookup(t.sequence(STEM), 11).num_tokens == 0
    assert not t.kv.pool.published.any()


def test_a_hit_revives_blocks_that_nobody_held() -> None:
    t = Tables()
    t.leave(t.compute(STEM))
    assert t.kv.pool.num_cached == 3 and t.kv.pool.num_held == 0
    hit = t.kv.lookup(t.sequence([*STEM, 13]), 12)
    assert t.kv.num_revived(hit) == 3
    row = t.enter([*STEM, 13])
    t.kv.attach(row, hit)
    assert t.kv.pool.num_held == 3 and t.kv.num_revived(hit) == 0


def test_the_source_of_a_partial_hit_is_pinned_until_its_copy_was_made() -> None:
    t = Tables()
    t.leave(t.compute(STEM))
    row = t.enter([1, 2, 3, 4, 5, 99])
    hit = t.kv.lookup(t.batch.sequences[row], 5)
    assert hit.partial is not None
    ((source,), count) = hit.partial
    t.kv.attach(row, hit)
    t.kv.check()
    assert count == 1 and t.kv.pool.ref_count[source] == 1 and t.kv.blocks_of(0, row)[1] != source
    _, copies = t.kv.drain(0)
    assert copies.tolist() == [[source, t.kv.blocks_of(0, row)[1]]]
    t.kv.pool.complete_step(0)
    assert t.kv.pool.ref_count[source] == 0 and t.kv.pool.published[source], "it is still there to be hit"


def test_a_partial_hit_without_a_block_for_its_copy_changes_nothing() -> None:
    t = Tables(num_blocks=3)
    t.leave(t.compute(STEM))
    row = t.enter([1, 2, 3, 4, 5, 6, 7, 8, 9, 99])
    hit = t.kv.lookup(t.batch.sequences[row], 9)
    with pytest.raises(OutOfBlocks, match="no block to copy a partial hit into"):
        t.kv.attach(row, hit)
    t.kv.check()
    assert t.kv.pool.num_cached == 3
    t.kv.attach(row, hit.without_partial())
    assert t.kv.pool.num_held == 2


def test_two_sequences_with_equal_tokens_leave_one_cached_copy() -> None:
    t = Tables()
    a, b = t.compute(STEM), t.compute(STEM)
    assert t.kv.pool.published.sum() == 3
    t.leave(a)
    t.leave(b)
    assert t.kv.pool.num_cached == 3


def test_evicting_takes_the_tail_so_that_the_start_can_still_be_hit() -> None:
    t = Tables(num_blocks=4)
    t.leave(t.compute(STEM))
    other = t.enter([7] * 5)
    t.write((other, 0, 5))  # 2 blocks: the free one and the chain's last
    assert t.kv.lookup(t.sequence(STEM), 11).num_tokens == 8


def test_a_block_is_published_once_though_many_rows_publish_it() -> None:
    t = Tables()
    a = t.compute(STEM)
    b = t.enter(STEM)
    t.kv.fork(a, b, 12)
    t.kv.publish(np.asarray([a, b]), np.asarray([12, 12], dtype=np.int32))
    assert sum(event.kind is EventKind.PUBLISHED for event in t.events) == 3


def test_a_row_without_a_full_block_publishes_nothing_even_if_a_block_is_longer_than_the_model() -> None:
    batch = Batch(1, 12)
    kv = KVCacheManager(batch, [CacheGroup((0,), None, 1, 8, "float32")], 4, 16)
    kv.publish(np.asarray([0]), np.asarray([5], dtype=np.int32))


# -- windows -----------------------------------------------------------------------------------------------------------
def test_blocks_behind_a_window_are_let_go_and_no_sooner() -> None:
    """Window 5: the query at position p sees p - 4 .. p, so block 0 (0 .. 3) is needed up to the query at 7."""
    t = Tables(windows=(5,))
    row = t.enter([1] * 20)
    for computed, first in ((7, 0), (8, 1), (11, 1), (12, 2), (20, 4)):
        start = int(t.batch.num_computed[row])
        t.write((row, start, computed - start))
        t.kv.free_behind_windows(np.asarray([row]), -1)
        t.kv.check()
        assert t.kv.first_block[0][row] == first, computed
        assert t.kv.tables[0][row, :first].tolist() == [NULL_BLOCK] * first
    assert t.kv.pool.num_held == 1


def test_a_block_behind_a_window_waits_for_the_steps_in_flight() -> None:
    t = Tables(windows=(5,))
    row = t.enter([1] * 20)
    t.write((row, 0, 12))
    t.kv.free_behind_windows(np.asarray([row]), t.step)
    assert t.kv.pool.num_pending == 2
    t.kv.pool.complete_step(t.step)
    assert t.kv.pool.num_pending == 0


def test_a_hit_in_a_windowed_group_needs_the_window_only() -> None:
    """Blocks 0 and 1 are gone from the cache; the query at 12 sees 8 .. 12, so block 2 is enough."""
    t = Tables(windows=(5,))
    row = t.compute(STEM)
    blocks = t.kv.blocks_of(0, row)
    t.leave(row)
    for block in blocks[:2]:
        t.kv.pool.share([block])
        t.kv.pool._forget(block)
        t.kv.pool.release([block])
    hit = t.kv.lookup(t.sequence([*STEM, 13]), 12)
    assert (hit.num_tokens, hit.blocks) == (12, [[NULL_BLOCK, NULL_BLOCK, blocks[2]]])
    row = t.enter([*STEM, 13])
    t.kv.attach(row, hit)
    assert t.kv.blocks_of(0, row) == [blocks[2]] and t.kv.first_block[0][row] == 2
    assert t.kv.lookup(t.sequence(STEM), 11).num_tokens == 0, "the query at 8 would need block 1"


def test_a_hit_must_hold_in_every_cache_group() -> None:
    t = Tables(windows=(None, 5))
    row = t.compute(STEM)
    full, windowed = t.kv.blocks_of(0, row), t.kv.blocks_of(1, row)
    t.leave(row)
    t.kv.pool.share(windowed[2:])
    t.kv.pool._forget(windowed[2])
    hit = t.kv.lookup(t.sequence([*STEM, 13]), 12)
    assert hit.num_tokens == 8 and hit.blocks == [full[:2], [NULL_BLOCK, windowed[1]]]


# -- swapping ----------------------------------------------------------------------------------------------------------
def swapped_group(t: Tables) -> tuple[Sequence, Sequence]:
    """Two sequences of 6 and 10 tokens that share a block of 4, swapped out: 1 + 1 + 2 blocks."""
    a, b = t.enter([1] * 6), t.enter([1] * 10)
    t.write((a, 0, 4))
    t.kv.fork(a, b, 4)
    t.write((a, 4, 2), (b, 4, 6))
    return t.batch.sequences[a], t.batch.sequences[b]


def test_a_shared_block_is_swapped_once_and_stays_shared() -> None:
    t = Tables(num_host=8)
    a, b = swapped_group(t)
    transfer = t.kv.swap_out([a, b])
    assert transfer is not None and transfer.direction is Direction.OUT and len(transfer.pairs) == 4
    assert a.host_tables[0].blocks[0] == b.host_tables[0].blocks[0]
    assert t.kv.num_to_swap_in([a, b]) == 4
    t.batch.remove(a)
    t.batch.remove(b)
    t.kv.check()
    assert t.kv.pool.num_held == t.kv.num_moving == 4, "pinned until the transfer is done"
    t.kv.finish_transfer(transfer.transfer_id)
    assert t.kv.pool.num_held == 0 and t.kv.host_pool.num_held == 4
    for sequence in (a, b):
        t.batch.add(sequence)
    back = t.kv.swap_in([a, b])
    assert back.direction is Direction.IN and len(back.pairs) == 4
    t.kv.check()
    table_a, table_b = t.kv.blocks_of(0, a.row), t.kv.blocks_of(0, b.row)
    assert table_a[0] == table_b[0] and len({*table_a, *table_b}) == 4
    assert t.kv.host_pool.num_held == 4, "the source is pinned as well"
    t.kv.finish_transfer(back.transfer_id)
    assert t.kv.host_pool.num_held == 0 and t.kv.pool.num_held == 4 and not t.kv.has_transfers
    t.kv.check()


def test_swapping_out_changes_nothing_if_the_host_has_too_little_room() -> None:
    t = Tables(num_host=3)
    a, b = swapped_group(t)
    assert t.kv.swap_out([a, b]) is None
    t.kv.check()
    assert t.kv.host_pool.num_free == 3 and t.kv.pool.num_held == 4 and not t.kv.has_transfers


def test_what_a_swapped_sequence_has_on_the_host_can_be_dropped_before_it_got_there() -> None:
    t = Tables(num_host=8)
    a, b = swapped_group(t)
    transfer = t.kv.swap_out([a, b])
    assert transfer is not None
    t.kv.drop_host(a)
    t.kv.drop_host(b)
    assert t.kv.host_pool.num_held == 4, "the transfer still writes there"
    t.kv.finish_transfer(transfer.transfer_id)
    assert t.kv.host_pool.num_held == t.kv.pool.num_held == 0
