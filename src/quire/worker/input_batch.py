"""What the worker keeps of each row, and how a step's flat batch is laid out of it.

A row's token ids and block tables live on the device for as long as its sequence runs; a step brings changes only. The flat
batch has no padding: the tokens of entry 0, then those of entry 1, and so on, whether they are one or a thousand.

Does not know the model. Shape legend: R = rows, L = most tokens of a sequence, B = blocks of a table, T = tokens of the step,
S = entries (sequences) of the step, M = samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from quire.attention.base import AttentionBatch
from quire.core.cache_group import CacheGroup
from quire.core.step import NewRow, SchedulerOutput


@dataclass(slots=True)
class FlatBatch:
    """One step on the device. `last_M` are the flat indices whose logits the M samples are drawn from."""

    input_ids_T: Tensor
    positions_T: Tensor
    attention: list[AttentionBatch]  # one for each cache group
    last_M: Tensor


class InputBatch:
    """`max_num_seqs` rows of up to `max_model_len` tokens."""

    def __init__(
        self,
        max_num_seqs: int,
        max_model_len: int,
        block_size: int,
        groups: Sequence[CacheGroup],
        device: torch.device,
    ) -> None:
        self.block_size = block_size
        self.device = device
        max_blocks = -(-max_model_len // block_size)
        self.token_ids_RL = torch.empty((max_num_seqs, max_model_len), dtype=torch.int32, device=device)
        self.tables_RB = [torch.zeros((max_num_seqs, max_blocks), dtype=torch.int32, device=device) for _ in groups]
        self.rows: list[NewRow | None] = [None] * max_num_seqs

    def apply(self, step: SchedulerOutput) -> None:
        """Takes new rows and changed table entries."""
        for new in step.new_rows:
            self.rows[new.row] = new
            self.token_ids_RL[new.row, : len(new.token_ids)] = torch.from_numpy(new.token_ids).to(self.device)
        for table_RB, updates in zip(self.tables_RB, step.table_updates):
            for update in updates:
                rows, columns = self._index(update.rows), self._index(update.columns)
                table_RB[rows, columns] = torch.from_numpy(update.blocks).to(self.device)

    def lay_out(self, step: SchedulerOutput) -> FlatBatch:
        """The step's tokens in a row, and where each cache group finds and puts their keys and values."""
        counts_S, starts_S = step.num_tokens, step.starts
        ends_S = np.cumsum(counts_S)
        row_T = np.repeat(step.rows, counts_S)
        position_T = np.arange(len(row_T)) + np.repeat(starts_S - (ends_S - counts_S), counts_S)
        query_start_loc = np.zeros(len(counts_S) + 1, dtype=np.int32)
        query_start_loc[1:] = ends_S
        lengths_S = (starts_S + counts_S).astype(np.int32)
        max_seq_len, max_query_len = int(lengths_S.max()), int(counts_S.max())

        rows_T, positions_T = self._index(row_T), self._index(position_T)
        rows_S = self._index(step.rows)
        num_columns = -(-max_seq_len // self.block_size)
        block_T, offset_T = positions_T // self.block_size, positions_T % self.block_size
        query_start_loc_S1 = torch.from_numpy(query_start_loc).to(self.device)
        seq_lens_S = torch.from_numpy(lengths_S).to(self.device)
        attention = [
            AttentionBatch(
                query_start_loc_S1=query_start_loc_S1,
                seq_lens_S=seq_lens_S,
                block_tables_SB=table_RB[rows_S, :num_columns],
                slots_T=table_RB[rows_T, block_T].long() * self.block_size + offset_T,
                block_size=self.block_size,
                max_query_len=max_query_len,
                max_seq_len=max_seq_len,
            )
            for table_RB in self.tables_RB
        ]
        return FlatBatch(
            input_ids_T=self.token_ids_RL[rows_T, positions_T],
            positions_T=positions_T,
            attention=attention,
            last_M=self._index(ends_S[step.sample_entries] - 1),
        )

    def write_drawn(self, rows_M: np.ndarray, positions_M: np.ndarray, token_ids_M: Tensor) -> None:
        """Puts drawn tokens where the next step reads them."""
        self.token_ids_RL[self._index(rows_M), self._index(positions_M)] = token_ids_M.to(torch.int32)

    def _index(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values.astype(np.int64)).to(self.device)
