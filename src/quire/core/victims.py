"""Who is to make room, and what that would cost. Changes nothing."""

from __future__ import annotations

from collections import Counter

import numpy as np

from quire.core.batch import Batch
from quire.core.fairness import ServiceCounters
from quire.core.kv_cache import KVCacheManager
from quire.core.preemption import VictimFacts, recompute_tokens
from quire.core.sequence import RequestGroup, Sequence


def facts_of(kv: KVCacheManager, running: list[Sequence], is_whole: bool) -> VictimFacts:
    """What preempting a group whose running sequences are `running` would move, or compute again."""
    tables = [[kv.blocks_of(g, sequence.row) for sequence in running] for g in range(len(kv.groups))]
    held = Counter(block for per_group in tables for table in per_group for block in table)
    full = next((g for g, spec in enumerate(kv.groups) if spec.window is None), None)
    if full is None:  # behind a window there are no blocks to count by
        num_tokens = sum(sequence.num_scheduled for sequence in running)
    else:
        stays = kv.pool.published.copy()  # what others hold as well is still there when it comes back
        blocks = np.fromiter(held, dtype=np.int64, count=len(held))
        own = np.fromiter(held.values(), dtype=np.int64, count=len(held))
        stays[blocks] &= kv.pool.ref_count[blocks] > own
        arrays = [np.asarray(table, dtype=np.int64) for table in tables[full]]
        known = [min(sequence.num_scheduled, len(table) * kv.block_size) for sequence, table in zip(running, arrays)]
        num_tokens = recompute_tokens(arrays, known, kv.block_size, stays)
    return VictimFacts(
        num_sequences=len(running),
        num_blocks=len(held),
        num_recompute_tokens=num_tokens,
        num_free_host_blocks=kv.host_pool.num_free,
        is_whole=is_whole,
    )


def over_its_share(
    batch: Batch, counters: ServiceCounters, waiting: RequestGroup, usage: np.ndarray, needed: int
) -> RequestGroup | None:
    """The last group of the client with most of `usage` [R], by running row, if it is to give way to `waiting`."""
    own = waiting.client
    by_client: dict[str, float] = {own: 0.0}
    by_group: dict[str, float] = {}
    last: dict[str, RequestGroup] = {}  # of each client that may be asked
    for sequence, used in zip(batch.sequences[batch.rows_in_order()], usage.tolist()):
        group: RequestGroup = sequence.group
        by_client[group.client] = by_client.get(group.client, 0.0) + used
        by_group[group.request_id] = by_group.get(group.request_id, 0.0) + used
        if group.client != own and group.priority >= waiting.priority:
            last[group.client] = group
    served = counters.counter(own)
    asked = [client for client in last if counters.counter(client) >= served]
    if not asked:
        return None
    client = max(asked, key=lambda name: by_client[name] / counters.weight(name))
    keeps = (by_client[client] - by_group[last[client].request_id]) / counters.weight(client)
    return last[client] if (by_client[own] + needed) / counters.weight(own) <= keeps else None
