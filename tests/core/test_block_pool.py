"""Blocks by state: held, pending, cached, free; and the order in which they can be had again."""

import pytest

from quire.core.block_pool import NULL_BLOCK, BlockEvent, BlockPool, EventKind, OutOfBlocks


def publish(pool: BlockPool, block: int, name: bytes) -> None:
    assert pool.publish(block, name, b"parent", name)


def counts(pool: BlockPool) -> tuple[int, int, int, int]:
    """held, pending, cached, free (without the cached ones)"""
    pool.check()
    return pool.num_held, pool.num_pending, pool.num_cached, pool.num_free - pool.num_cached


def test_blocks_are_numbered_from_one_and_the_null_block_is_never_handed_out() -> None:
    pool = BlockPool(4)
    assert pool.allocate(4) == [4, 3, 2, 1] and NULL_BLOCK == 0
    assert counts(pool) == (4, 0, 0, 0)


def test_too_large_an_allocation_raises_and_changes_nothing() -> None:
    pool = BlockPool(3)
    held = pool.allocate(2)
    publish(pool, held[0], b"a")
    pool.release(held[:1])
    assert counts(pool) == (1, 0, 1, 1)
    with pytest.raises(OutOfBlocks, match="3 blocks asked for, 2 to be had"):
        pool.allocate(3)
    assert counts(pool) == (1, 0, 1, 1)
    assert pool.cache.get(b"a") == held[0]


def test_nothing_can_be_had_from_an_empty_pool() -> None:
    pool = BlockPool(0)
    assert pool.allocate(0) == []
    with pytest.raises(OutOfBlocks):
        pool.allocate(1)


def test_a_block_is_held_until_its_last_holder_lets_go() -> None:
    pool = BlockPool(2)
    (block,) = pool.allocate(1)
    pool.share([block, block])
    assert pool.ref_count[block] == 3
    for held in (1, 1, 0):
        pool.release([block])
        assert pool.num_held == held


def test_releasing_more_often_than_held_is_our_own_mistake() -> None:
    pool = BlockPool(1)
    (block,) = pool.allocate(1)
    pool.release([block])
    with pytest.raises(AssertionError, match="released more often than held"):
        pool.release([block])


def test_the_block_freed_last_is_taken_first() -> None:
    pool = BlockPool(3)
    blocks = pool.allocate(3)
    pool.release(blocks)
    assert pool.allocate(1) == blocks[-1:]


# -- eviction ----------------------------------------------------------------------------------------------------------
def test_free_blocks_are_taken_before_cached_ones_are_evicted() -> None:
    pool = BlockPool(2)
    cached, free = pool.allocate(2)
    publish(pool, cached, b"a")
    pool.release([cached, free])
    assert pool.allocate(1) == [free]
    assert pool.cache.get(b"a") == cached
    assert pool.allocate(1) == [cached]
    assert pool.cache.get(b"a") is None and not pool.published[cached]


def test_eviction_is_least_recently_used_and_a_chain_goes_from_its_tail() -> None:
    pool = BlockPool(6)
    old, new = pool.allocate(3), pool.allocate(3)
    for i, block in enumerate(old + new):
        publish(pool, block, bytes([i]))
    pool.release(old[::-1])  # holders release from the tail
    pool.release(new[::-1])
    pool.share(old)  # used again ...
    pool.release(old[::-1])  # ... so that `new` is now the older one
    assert [pool.allocate(1)[0] for _ in range(6)] == new[::-1] + old[::-1]


def test_a_cached_block_comes_back_to_life_with_its_content() -> None:
    pool = BlockPool(2)
    (block,) = pool.allocate(1)
    publish(pool, block, b"a")
    pool.release([block])
    assert pool.is_evictable(block) and counts(pool) == (0, 0, 1, 1)
    pool.share([block])
    assert not pool.is_evictable(block) and counts(pool) == (1, 0, 0, 1)
    assert pool.cache.get(b"a") == block


def test_dropping_the_cache_forgets_what_nobody_holds() -> None:
    pool = BlockPool(3)
    held, cached, _ = pool.allocate(3)
    publish(pool, held, b"a")
    publish(pool, cached, b"b")
    pool.release([cached])
    assert pool.drop_cache() == 1
    assert counts(pool) == (2, 0, 0, 1)
    assert pool.cache.get(b"a") == held and pool.cache.get(b"b") is None


# -- stamps ------------------------------------------------------------------------------------------------------------
def test_a_block_of_a_step_in_flight_is_pending_until_that_step_has_run() -> None:
    pool = BlockPool(2)
    (block,) = pool.allocate(1)
    pool.release([block], last_step=5)
    assert counts(pool) == (0, 1, 0, 1)
    pool.complete_step(4)
    assert pool.num_pending == 1
    pool.complete_step(5)
    assert counts(pool) == (0, 0, 0, 2)


def test_the_latest_stamp_of_any_holder_counts() -> None:
    pool = BlockPool(1)
    (block,) = pool.allocate(1)
    pool.share([block])
    pool.release([block], last_step=7)  # the first to let go knew the later step
    pool.release([block], last_step=3)
    pool.complete_step(3)
    assert pool.num_pending == 1
    pool.complete_step(7)
    assert pool.num_free == 1


def test_a_pending_block_can_be_revived_and_keeps_its_stamp() -> None:
    pool = BlockPool(1)
    (block,) = pool.allocate(1)
    publish(pool, block, b"a")
    pool.release([block], last_step=7)
    pool.share([block])  # a prefix hit
    assert counts(pool) == (1, 0, 0, 0)
    pool.release([block])  # before step 7 has run
    assert counts(pool) == (0, 1, 0, 0)
    pool.complete_step(7)
    assert counts(pool) == (0, 0, 1, 0)


def test_a_revived_block_is_not_freed_by_the_step_that_it_waited_for() -> None:
    pool = BlockPool(1)
    (block,) = pool.allocate(1)
    pool.release([block], last_step=2)
    pool.share([block])
    pool.complete_step(2)
    assert counts(pool) == (1, 0, 0, 0)


def test_a_pending_block_is_published_into_the_cache_when_its_step_has_run() -> None:
    pool = BlockPool(1)
    (block,) = pool.allocate(1)
    publish(pool, block, b"a")
    pool.release([block], last_step=0)
    assert pool.drop_cache() == 0, "what a step in flight still touches is not dropped"
    pool.complete_step(0)
    assert pool.num_cached == 1


# -- content -----------------------------------------------------------------------------------------------------------
def test_the_first_block_with_a_content_stays_its_home() -> None:
    pool = BlockPool(2)
    first, second = pool.allocate(2)
    assert pool.publish(first, b"a", b"", b"1234")
    assert not pool.publish(second, b"a", b"", b"1234")
    assert not pool.publish(first, b"b", b"", b"5678"), "a block has one name"
    assert pool.cache.get(b"a") == first and not pool.published[second]
    pool.release([second, first])
    assert counts(pool) == (0, 0, 1, 1)


def test_events_tell_what_was_published_and_evicted() -> None:
    events: list[BlockEvent] = []
    pool = BlockPool(1, events.append)
    (block,) = pool.allocate(1)
    publish(pool, block, b"a")
    pool.release([block])
    pool.allocate(1)
    assert events == [BlockEvent(EventKind.PUBLISHED, block, b"a"), BlockEvent(EventKind.EVICTED, block, b"a")]
