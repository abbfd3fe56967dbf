"""Groups on their way to host memory and back, and the transfers that carry them.

A group that is swapped out cannot come back before its blocks have arrived; one that comes back has rows at once, and waits
in them for its blocks. Does not know why a group is swapped.
"""

from __future__ import annotations

from collections import Counter

from quire.core.batch import Batch
from quire.core.kv_cache import KVCacheManager
from quire.core.sequence import RequestGroup, Sequence, Status
from quire.core.step import Direction, Transfer


class Transfers:
    """Between the step that orders a transfer and the one that reports its end."""

    def __init__(self, batch: Batch, kv: KVCacheManager, num_blocks: Counter[Direction]) -> None:
        self._batch = batch
        self._kv = kv
        self._arriving: dict[int, list[Sequence]] = {}  # transfer -> sequences that run when it is done
        self._leaving: dict[int, RequestGroup] = {}  # transfer -> group that cannot come back before it is done
        self._ordered: list[Transfer] = []  # for the step being planned
        self._num_blocks = num_blocks  # moved since the start

    @property
    def are_ordered(self) -> bool:
        return bool(self._ordered)

    def out(self, group: RequestGroup, transfer: Transfer) -> None:
        self._leaving[transfer.transfer_id] = group
        self._order(group, transfer)

    def back(self, group: RequestGroup) -> None:
        """Brings a swapped group, which has rows again, back."""
        live = group.live
        transfer = self._kv.swap_in(live)
        for sequence in live:
            self._batch.limit[sequence.row] = 0  # until its blocks are there
        self._arriving[transfer.transfer_id] = list(live)
        self._order(group, transfer)

    def _order(self, group: RequestGroup, transfer: Transfer) -> None:
        self._ordered.append(transfer)
        self._num_blocks[transfer.direction] += len(transfer.pairs)
        group.journal.num_swapped_blocks += len(transfer.pairs)

    def drop(self, sequence: Sequence) -> None:
        """`sequence` is about to leave its row."""
        for arriving in self._arriving.values():
            if sequence in arriving:
                arriving.remove(sequence)

    def involve(self, group: RequestGroup) -> bool:
        """Its blocks are on their way to it."""
        return any(sequence.group is group for arriving in self._arriving.values() for sequence in arriving)

    def is_leaving(self, group: RequestGroup) -> bool:
        return any(leaving is group for leaving in self._leaving.values())

    def finish(self, transfer_id: int) -> list[Sequence]:
        """A transfer is done: the sequences whose blocks have arrived, and which still run."""
        self._kv.finish_transfer(transfer_id)
        self._leaving.pop(transfer_id, None)
        arrived = self._arriving.pop(transfer_id, [])
        return [sequence for sequence in arrived if sequence.status is Status.RUNNING]

    def drain(self) -> tuple[list[Transfer], list[Transfer]]:
        """Out and in, for the step being planned."""
        if not self._ordered:
            return [], []
        ordered, self._ordered = self._ordered, []
        out = [transfer for transfer in ordered if transfer.direction is Direction.OUT]
        return out, [transfer for transfer in ordered if transfer.direction is Direction.IN]
