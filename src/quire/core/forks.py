"""Sequences that wait until another one has computed what they are to share with it.

A group that comes back without blocks computes its common beginning once: its first sequence computes, the others fork from
it (or from each other) where they part. A source stops at that point until the fork is made, so that the block behind it has
one writer. Does not know why the group comes back.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from quire.core.batch import UNLIMITED, Batch
from quire.core.kv_cache import KVCacheManager
from quire.core.sequence import RequestGroup, Sequence, Status


@dataclass(slots=True)
class _WaitingFork:
    """`target` starts with the first `num_tokens` tokens of `source`, as soon as that has them."""

    source: Sequence
    target: Sequence
    num_tokens: int


class WaitingForks:
    """All of them, in the order in which they were asked for."""

    def __init__(self, batch: Batch, kv: KVCacheManager) -> None:
        self._batch = batch
        self._kv = kv
        self._forks: list[_WaitingFork] = []

    def __len__(self) -> int:
        return len(self._forks)

    def add(self, source: Sequence, target: Sequence, num_tokens: int) -> None:
        self._forks.append(_WaitingFork(source, target, num_tokens))

    def targets(self) -> Iterator[Sequence]:
        return (fork.target for fork in self._forks)

    def run(self) -> None:
        """Starts the sequences whose source has computed what they share with it."""
        for fork in list(self._forks):
            if fork.source.num_computed >= fork.num_tokens and fork.source not in self.targets():
                self._forks.remove(fork)
                self._start(fork)

    def drop(self, sequence: Sequence) -> None:
        """`sequence` is about to leave its row: who waits for it takes what there is."""
        for fork in [f for f in self._forks if sequence in (f.source, f.target)]:
            self._forks.remove(fork)
            if fork.target is sequence:
                self.set_limit(fork.source)  # it need not stop there any more
            elif fork.target.status is Status.RUNNING:
                self._start(fork)

    def _start(self, fork: _WaitingFork) -> None:
        batch, source, target = self._batch, fork.source.row, fork.target.row
        # not what steps in flight compute: none of them would tell the target when they have
        count = min(fork.num_tokens, int(batch.num_computed[source]))
        self._kv.fork(source, target, count)
        batch.num_scheduled[target] = batch.num_computed[target] = count
        for sequence in (fork.source, fork.target):
            self.set_limit(sequence)

    def set_limit(self, sequence: Sequence) -> None:
        """A row stops where others are to fork from it, and waits at 0 for its own source."""
        limit = min((fork.num_tokens for fork in self._forks if fork.source is sequence), default=UNLIMITED)
        if any(target is sequence for target in self.targets()):
            limit = 0
        self._batch.limit[sequence.row] = limit

    def involve(self, group: RequestGroup) -> bool:
        return any(target.group is group for target in self.targets())
