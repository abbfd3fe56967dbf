"""Every slot of KV memory is in one of six states. A pool of 10 blocks of 4 slots."""

import numpy as np
import pytest

from quire.core.accounting import SlotUsage, measure
from quire.core.batch import Batch
from quire.core.cache_group import CacheGroup
from quire.core.kv_cache import KVCacheManager
from quire.core.sequence import RequestGroup
from quire.sampling_params import SamplingParams


def memory(num_host: int = 0) -> KVCacheManager:
    group = CacheGroup((0,), None, 1, 8, "float32")
    return KVCacheManager(Batch(4, 40), [group], 10, 4, num_host_blocks=num_host)


def enter(kv: KVCacheManager, num_tokens: int) -> int:
    prompt = np.arange(num_tokens, dtype=np.int32)
    return kv.batch.add(RequestGroup("r", prompt, SamplingParams(), seed=0).sequences[0])


def schedule(kv: KVCacheManager, row: int, end: int) -> None:
    start = int(kv.batch.num_scheduled[row])
    plan = kv.plan(*(np.asarray([x], dtype=np.int32) for x in (row, start, end - start)))
    kv.commit(plan, -1)
    kv.batch.num_scheduled[row] = end


def usage(kv: KVCacheManager) -> SlotUsage:
    found = measure(kv)
    found.check()
    return found


def test_an_idle_engine_is_free() -> None:
    found = usage(memory())
    assert (found.free, found.total, found.allocated, found.waste_ratio) == (40, 40, 0, 0.0)


def test_reserved_becomes_filled_and_the_rest_of_a_block_is_waste() -> None:
    kv = memory()
    row = enter(kv, 6)
    schedule(kv, row, 6)
    found = usage(kv)
    assert (found.filled, found.reserved, found.waste, found.free) == (0, 6, 2, 32)
    kv.batch.num_computed[row] = 6
    found = usage(kv)
    assert (found.filled, found.reserved, found.waste, found.free) == (6, 0, 2, 32)
    assert found.waste_ratio == pytest.approx(2 / 8)


def test_waste_is_less_than_a_block_for_each_sequence() -> None:
    kv = memory()
    for tokens in (1, 5, 9, 4):
        row = enter(kv, tokens)
        schedule(kv, row, tokens)
        kv.batch.num_computed[row] = tokens
    assert usage(kv).waste == 3 + 3 + 3 + 0


def test_a_shared_block_counts_once_and_what_sharing_saves_is_told() -> None:
    kv = memory()
    a, b = enter(kv, 6), enter(kv, 6)
    schedule(kv, a, 6)
    kv.batch.num_computed[a] = 6
    kv.fork(a, b, 6)
    kv.batch.num_scheduled[b] = kv.batch.num_computed[b] = 6
    found = usage(kv)
    assert (found.filled, found.waste, found.free, found.shared) == (6, 2, 32, 8)


def test_a_released_block_is_pending_then_cached_or_free() -> None:
    kv = memory()
    row = enter(kv, 6)
    schedule(kv, row, 6)
    kv.batch.num_computed[row] = 6
    kv.publish(np.asarray([row]), np.asarray([6], dtype=np.int32))
    kv.free(row, 3)
    kv.batch.remove(kv.batch.sequences[row])
    found = usage(kv)
    assert (found.pending, found.free, found.allocated) == (8, 32, 0)
    kv.pool.complete_step(3)
    found = usage(kv)
    assert (found.pending, found.cached, found.free) == (0, 4, 36)


def test_a_block_that_only_a_transfer_holds_is_pending() -> None:
    kv = memory(num_host=5)
    row = enter(kv, 6)
    schedule(kv, row, 6)
    kv.batch.num_computed[row] = 6
    transfer = kv.swap_out([kv.batch.sequences[row]])
    assert transfer is not None
    assert (usage(kv).pending, usage(kv).free) == (8, 32)
    kv.finish_transfer(transfer.transfer_id)
    assert usage(kv).free == 40


def test_a_slot_that_is_missing_or_counted_twice_is_found() -> None:
    SlotUsage(filled=1, reserved=2, waste=3, cached=4, pending=5, free=6, total=21, shared=99).check()
    with pytest.raises(AssertionError, match="slots do not add up"):
        SlotUsage(filled=1, reserved=2, waste=3, cached=4, pending=5, free=6, total=22, shared=0).check()
    with pytest.raises(AssertionError, match="slots do not add up"):
        SlotUsage(filled=1, reserved=0, waste=-1, cached=0, pending=0, free=0, total=0, shared=0).check()
