"""The running sequences as arrays, one element a row, so that a step over a thousand of them is a few NumPy operations.

For one row, in tokens (a decoding sequence with one step in flight, then one in the middle of its prompt):

    0        num_computed   num_scheduled   num_tokens   + num_pending     max_total
    |  in memory  |   in flight   |                |  drawn by steps  |  may still come |
    0            30              31               31                 32               64
    0           512            1024             2000               2000             2128

`num_scheduled` may pass `num_tokens`: the token at num_tokens will be drawn, and read, on the device.
Does not know blocks or the token budget.
"""

from __future__ import annotations

import numpy as np

from quire.core.sequence import Sequence, Status
from quire.core.stop import all_stop_ids

UNLIMITED = np.iinfo(np.int32).max
MAX_STOP_IDS = 8  # per row in the array; a sequence with more of them is looked at by itself


class Batch:
    """`max_num_seqs` rows; `token_ids` is int32 [max_num_seqs, max_model_len] and takes memory only as it is used."""

    def __init__(self, max_num_seqs: int, max_model_len: int) -> None:
        def column(fill: int = 0) -> np.ndarray:
            return np.full(max_num_seqs, fill, dtype=np.int32)

        self.max_num_seqs = max_num_seqs
        self.token_ids = np.empty((max_num_seqs, max_model_len), dtype=np.int32)
        self.num_tokens = column()
        self.num_pending = column()
        self.num_scheduled = column()
        self.num_computed = column()
        self.num_charged = column()  # what its client has been charged for, however often it is computed
        self.num_prompt = column()
        self.client = column()  # the client's number
        self.max_total = column()  # prompt + max_tokens
        self.min_total = column()  # prompt + min_tokens: before that, no token stops
        self.limit = column(UNLIMITED)  # num_scheduled must not pass it yet: it waits for something
        self.is_beam = column()  # 1: its samples are candidates, and the group decides
        self.last_step = np.full(max_num_seqs, -1, dtype=np.int64)
        self.epoch = column()  # counts the row's tenants
        self.stop_ids = np.full((max_num_seqs, MAX_STOP_IDS), -1, dtype=np.int32)
        self.has_many_stop_ids = np.zeros(max_num_seqs, dtype=np.bool_)
        self.sequences = np.full(max_num_seqs, None, dtype=object)
        self._used = np.zeros(max_num_seqs, dtype=np.bool_)
        self.priority = np.zeros(max_num_seqs, dtype=np.int64)
        self._arrival = np.zeros(max_num_seqs, dtype=np.int64)
        self._branch = np.zeros(max_num_seqs, dtype=np.int64)
        self._free_rows = list(range(max_num_seqs - 1, -1, -1))
        self._order: np.ndarray | None = np.zeros(0, dtype=np.intp)

    @property
    def num_free_rows(self) -> int:
        return len(self._free_rows)

    @property
    def num_running(self) -> int:
        return self.max_num_seqs - len(self._free_rows)

    def rows_in_order(self) -> np.ndarray:
        """intp: rows in use, by (priority, arrival, branch). The rows of a group are neighbours.

        NumPy indexes several times faster with intp than with int32, and a step indexes by rows some forty times.
        """
        if self._order is None:
            used = np.flatnonzero(self._used)
            keys = (self._branch[used], self._arrival[used], self.priority[used])
            self._order = used[np.lexsort(keys)]
        return self._order

    def add(self, sequence: Sequence) -> int:
        row = self._free_rows.pop()
        group = sequence.group
        prompt = len(group.prompt_token_ids)
        sequence.move_in(self, row)
        sequence.status = Status.RUNNING
        self.num_prompt[row], self.client[row] = prompt, group.client_number
        self.max_total[row] = prompt + group.max_tokens
        self.min_total[row] = prompt + group.params.min_tokens
        self.limit[row] = UNLIMITED
        self.is_beam[row] = group.beam is not None
        self.last_step[row] = sequence.last_step
        stop_ids = all_stop_ids(group)
        self.has_many_stop_ids[row] = len(stop_ids) > MAX_STOP_IDS
        self.stop_ids[row] = -1
        self.stop_ids[row, : len(stop_ids)] = stop_ids[:MAX_STOP_IDS]
        self.sequences[row] = sequence
        self._used[row] = True
        self.priority[row], self._arrival[row], self._branch[row] = group.priority, group.arrival, sequence.branch
        self._order = None
        return row

    def remove(self, sequence: Sequence) -> None:
        row = sequence.row
        sequence.last_step = int(self.last_step[row])
        sequence.move_out()
        self.sequences[row] = None
        self._used[row] = False
        self.epoch[row] += 1
        self._free_rows.append(row)
        self._order = None
