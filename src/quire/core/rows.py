"""Who sits in which row, which rows are kept for sequences that will fork, and what the worker must hear of it.

A group that will fork into n sequences, or whose beams may become `width`, has so many rows to itself from its start, so
that a fork never waits for one. Does not know why a sequence comes or goes.
"""

from __future__ import annotations

import numpy as np

from quire.core.batch import Batch
from quire.core.kv_cache import KVCacheManager
from quire.core.sequence import RequestGroup, Sequence, Status
from quire.core.step import NewRow, TokenUpdate


class RowKeeper:
    """Moves sequences into and out of the rows of `batch`, blocks included."""

    def __init__(self, batch: Batch, kv: KVCacheManager) -> None:
        self._batch = batch
        self._kv = kv
        self._new: list[Sequence] = []
        self._decided: dict[int, tuple[int, int]] = {}  # row -> position and token that the worker does not know yet
        self._kept: dict[str, int] = {}  # request -> rows that are kept free for its forks

    @property
    def num_free(self) -> int:
        """Rows that another group can have."""
        return self._batch.num_free_rows - sum(self._kept.values())

    @property
    def num_kept(self) -> int:
        """Groups that rows are kept for."""
        return len(self._kept)

    def enter(self, sequence: Sequence) -> int:
        row = self._batch.add(sequence)
        self._new.append(sequence)
        return row

    def enter_group(self, group: RequestGroup) -> None:
        for sequence in group.live:
            self.enter(sequence)
        self.keep_for(group)

    def leave(self, sequence: Sequence) -> None:
        """Frees its row and its blocks."""
        row = sequence.row
        if sequence in self._new:
            self._new.remove(sequence)
        self._decided.pop(row, None)
        self._kept.pop(sequence.group.request_id, None)
        self._kv.free(row, int(self._batch.last_step[row]))
        self._batch.remove(sequence)

    def keep_for(self, group: RequestGroup) -> None:
        """Keeps the rows that a running group may still fork into."""
        running = sum(sequence.status is Status.RUNNING for sequence in group.sequences)
        if running and group.num_rows > running:
            self._kept[group.request_id] = group.num_rows - running
        else:
            self._kept.pop(group.request_id, None)

    def append(self, sequence: Sequence, token_id: int) -> None:
        """Gives a running sequence a token that was not drawn by the worker."""
        self._decided[sequence.row] = (sequence.num_tokens, token_id)
        sequence.append(token_id)

    def fork(self, parent: Sequence) -> Sequence:
        """A new running sequence that has all that `parent` has computed, and is in the same steps in flight."""
        batch, child, source = self._batch, parent.fork(), parent.row
        target = self.enter(child)
        count = int(batch.num_scheduled[source])
        self._kv.fork(source, target, count)
        batch.num_scheduled[target] = count
        for column in (batch.num_computed, batch.num_charged, batch.last_step):
            column[target] = column[source]
        child.num_published = parent.num_published
        return child

    # -- for the step being planned --------------------------------------------------------------------------------------
    def drain(self) -> tuple[list[NewRow], TokenUpdate | None]:
        new, self._new = [_describe(sequence) for sequence in self._new], []
        update = None
        if self._decided:
            rows = np.fromiter(self._decided, dtype=np.int32)
            pairs = np.asarray(list(self._decided.values()), dtype=np.int32)
            update = TokenUpdate(rows, pairs[:, 0], pairs[:, 1])
            self._decided = {}
        return new, update


def _describe(sequence: Sequence) -> NewRow:
    group = sequence.group
    return NewRow(
        row=sequence.row,
        token_ids=sequence.token_ids.copy(),
        num_prompt_tokens=len(group.prompt_token_ids),
        params=group.params,
        seed=group.seed,
        branch=sequence.branch,
        stop_token_ids=group.stop_token_ids,
        bad_words_token_ids=group.bad_words_token_ids,
        num_candidates=group.beam.num_ranked if group.beam else 0,
    )
