"""How a step's tokens are shared among those that run.

Who decodes gets one token each; what is left goes to those that catch up, in the order of service, those first whose client
was given least. In a step that has a target for its time, what is left is as much as it allows. Does not know blocks, nor
who waits, but for the one that is about to be let in.
"""

from __future__ import annotations

import numpy as np

from quire.core.batch import Batch
from quire.core.fairness import ServiceCounters
from quire.core.pace import StepPace
from quire.core.sequence import RequestGroup

AIM = 0.85  # of the step target: what is learned of past steps lags behind a context that grows


class TokenBudget:
    """`most` tokens a step. `total` is what the step being planned may have; `drafts` are the rows' guessed tokens; `next_in`
    is the group that is about to be let in, with the tokens that it can use."""

    def __init__(self, batch: Batch, counters: ServiceCounters, most: int, step_target_s: float | None) -> None:
        self.total = most
        self.step_target_s = step_target_s
        self.pace = StepPace()
        self.drafts: dict[int, list[int]] = {}
        self.next_in: tuple[RequestGroup, int] | None = None
        self._batch = batch
        self._counters = counters
        self._most = most

    def share(self, rows: np.ndarray) -> np.ndarray:
        """Tokens [R] that each of `rows`, which are in order, computes: one for each that decodes, the rest to those that
        catch up."""
        batch = self._batch
        target = np.minimum(batch.num_tokens[rows] + batch.num_pending[rows], batch.max_total[rows] - 1)
        counts = np.maximum(np.minimum(target, batch.limit[rows]) - batch.num_scheduled[rows], 0)
        decoding = counts == 1
        num_decoding = int(np.count_nonzero(decoding))
        left = self.total = self._step_budget(rows, num_decoding)
        if num_decoding == len(rows) <= left and not self.drafts:  # as in most steps, nobody catches up
            return counts
        if num_decoding > left:
            counts[np.flatnonzero(decoding)[left:]] = 0
        left = max(left - num_decoding, 0)
        for i in self._in_fair_order(rows, np.flatnonzero(counts > 1)).tolist():
            counts[i] = min(int(counts[i]), max(left - self._held_back(int(rows[i])), 0))
            left -= int(counts[i])
        if self.drafts:
            self._add_drafts(rows, counts, left)
        return counts

    def _step_budget(self, rows: np.ndarray, num_decoding: int) -> int:
        """Tokens of the step: as many as may be, or as few as let it end in time for those that decode."""
        if self.step_target_s is None or not num_decoding:
            return self._most
        context = int(self._batch.num_scheduled[rows].sum())
        ceiling = max(self._most - num_decoding, 0)
        prefill = self.pace.prefill_budget(num_decoding, context, AIM * self.step_target_s, ceiling)
        return min(num_decoding + prefill, self._most)

    def _in_fair_order(self, rows: np.ndarray, entries: np.ndarray) -> np.ndarray:
        """`entries` of `rows`, which are in order: within a priority, those first whose client was given least."""
        if len(entries) < 2 or self._counters.num_clients < 2:
            return entries
        batch, chosen = self._batch, rows[entries]
        return entries[np.lexsort((self._counters.counters[batch.client[chosen]], batch.priority[chosen]))]

    def _held_back(self, row: int) -> int:
        """Tokens that a row which catches up leaves to the group that is about to be let in: all that it can use, if its
        client was given no more than the row's."""
        if self.next_in is None:
            return 0
        (group, num_tokens), batch, counters = self.next_in, self._batch, self._counters.counters
        is_before = (group.priority, counters[group.client_number]) <= (
            batch.priority[row],
            counters[batch.client[row]],
        )
        return num_tokens if is_before and group.client_number != batch.client[row] else 0

    def _add_drafts(self, rows: np.ndarray, counts: np.ndarray, left: int) -> None:
        """Guessed tokens ride along with a row that decodes, as far as the budget and its length allow."""
        batch = self._batch
        for i, row in enumerate(rows.tolist()):
            guesses = self.drafts.get(row)
            if not guesses:
                continue
            room = int(batch.max_total[row] - 1 - batch.num_tokens[row])
            keep = min(len(guesses), left, room)
            if counts[i] != 1 or batch.num_pending[row] or keep <= 0:
                del self.drafts[row]
                continue
            self.drafts[row] = guesses[:keep]
            counts[i] += keep
            left -= keep
