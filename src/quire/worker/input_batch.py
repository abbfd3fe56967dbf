"""What the worker keeps of each row, and how a step's flat batch is laid out of it.

A row's token ids and block tables live on the device for as long as its sequence runs; a step brings changes only. The flat
batch has no padding: the tokens of entry 0, then those of entry 1, and so on, whether they are one or a thousand.

On a GPU, `PackedInputBatch` sends all that a step changes in one copy from pinned memory, and one kernel lays the batch out.

Does not know the model. Shape legend: R = rows, L = most tokens of a sequence, B = blocks of a table, T = tokens of the step,
S = entries (sequences) of the step, M = samples, U = table entries that change.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from quire.attention.base import AttentionBatch
from quire.core.cache_group import CacheGroup
from quire.core.step import NewRow, SchedulerOutput, TableUpdate
from quire.sampling.transfer import to_device, write


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
            write(new.token_ids, self.token_ids_RL[new.row, : len(new.token_ids)])
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
                query_start_loc_host_S1=query_start_loc,
                seq_lens_host_S=lengths_S,
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
        self.token_ids_RL[self._index(rows_M), self._index(positions_M)] = token_ids_M.to(self.device, torch.int32)

    def _index(self, values: np.ndarray) -> Tensor:
        return to_device(values.astype(np.int64), self.device)


class Packing:
    """Named int32 arrays, one behind the other, each at a multiple of 16 bytes: pointers of one alignment need one kernel.

    Packing({"rows": 3, "seq_lens": 5}) has rows in words 0 to 2, seq_lens in 4 to 8, and is 12 words long.
    """

    def __init__(self, sizes: Mapping[str, int]) -> None:
        self.slices: dict[str, slice] = {}
        end = 0
        for name, size in sizes.items():
            self.slices[name] = slice(end, end + size)
            end += -(-size // 4) * 4
        self.num_words = end

    def views(self, words: Tensor) -> dict[str, Tensor]:
        return {name: words[where] for name, where in self.slices.items()}


def pinned_words(count: int, device: torch.device) -> Tensor:
    """int32 [count] on the host, uninitialised, from which a copy to the device need not be waited for."""
    return torch.empty(count, dtype=torch.int32, pin_memory=device.type == "cuda")


class PackedInputBatch(InputBatch):
    """An InputBatch on a GPU. It has a row more, `padding_row`, of block tables that are all null: what graphs pad with."""

    def __init__(
        self,
        max_num_seqs: int,
        max_model_len: int,
        block_size: int,
        groups: Sequence[CacheGroup],
        device: torch.device,
    ) -> None:
        super().__init__(max_num_seqs + 1, max_model_len, block_size, groups, device)
        self.padding_row = max_num_seqs
        self.token_ids_RL[self.padding_row] = 0

    def apply(self, step: SchedulerOutput) -> None:
        """Takes new rows. Changed table entries wait for `lay_out`, unless there is nothing to lay out."""
        for new in step.new_rows:
            self.rows[new.row] = new
            write(new.token_ids, self.token_ids_RL[new.row, : len(new.token_ids)])
        if not len(step.rows):
            for g, updates_3U in enumerate(self.updates(step)):
                self.send_updates(g, updates_3U)

    def updates(self, step: SchedulerOutput) -> list[np.ndarray]:
        """For each cache group the changed table entries, int32 [3, U]: rows, columns, blocks; no place twice."""
        return [
            joined_updates(updates, table_RB.shape[1])
            for table_RB, updates in zip(self.tables_RB, step.table_updates or [[]] * len(self.tables_RB))
        ]

    def send_updates(self, group: int, updates_3U: np.ndarray) -> None:
        """Changes table entries at once, by a copy of their own."""
        from quire.kernels.triton import blocks

        count = updates_3U.shape[1]
        if count:
            words = to_device(np.append(updates_3U.ravel(), np.int32(count)), self.device)
            blocks.update_table(self.tables_RB[group], words[:-1].view(3, count), words[-1:])

    def lay_out(self, step: SchedulerOutput) -> FlatBatch:
        from quire.kernels.triton import blocks

        counts_S = step.num_tokens
        lengths_S = (step.starts + counts_S).astype(np.int32)
        query_start_loc = np.zeros(len(counts_S) + 1, dtype=np.int32)
        np.cumsum(counts_S, out=query_start_loc[1:])
        num_tokens, num_entries = int(query_start_loc[-1]), len(counts_S)
        updates = self.updates(step)
        arrays = {
            "rows": step.rows,
            "query_start_loc": query_start_loc,
            "seq_lens": lengths_S,
            "last": query_start_loc[1:][step.sample_entries] - 1,
            "num_updates": np.array([updates_3U.shape[1] for updates_3U in updates]),
        }
        arrays |= {f"updates_{g}": updates_3U.ravel() for g, updates_3U in enumerate(updates)}
        packing = Packing({name: len(array) for name, array in arrays.items()})
        host = pinned_words(packing.num_words, self.device)
        words = host.numpy()
        for name, array in arrays.items():
            words[packing.slices[name]] = array
        views = packing.views(host.to(self.device, non_blocking=True))

        for g, updates_3U in enumerate(updates):
            if count := updates_3U.shape[1]:
                blocks.update_table(
                    self.tables_RB[g], views[f"updates_{g}"].view(3, count), views["num_updates"][g : g + 1]
                )
        max_seq_len, max_query_len = int(lengths_S.max()), int(counts_S.max())
        num_columns = -(-max_seq_len // self.block_size)
        input_ids_T, positions_T = (torch.empty(num_tokens, dtype=torch.int32, device=self.device) for _ in range(2))
        attention = []
        for g, table_RB in enumerate(self.tables_RB):
            slots_T = torch.empty(num_tokens, dtype=torch.int32, device=self.device)
            # Rows of a multiple of 16 bytes, so that the kernels that read them need not be compiled for other ones.
            tables_SB = torch.empty((num_entries, -(-num_columns // 4) * 4), dtype=torch.int32, device=self.device)
            blocks.lay_out(
                self.token_ids_RL, table_RB, views["rows"], views["query_start_loc"], views["seq_lens"],
                input_ids_T, positions_T, slots_T, tables_SB, self.block_size,
                blocks.width_for(max(max_query_len, num_columns)), tokens=g == 0,
            )  # fmt: skip
            attention.append(
                AttentionBatch(
                    query_start_loc_S1=views["query_start_loc"],
                    seq_lens_S=views["seq_lens"],
                    block_tables_SB=tables_SB,
                    slots_T=slots_T,
                    block_size=self.block_size,
                    max_query_len=max_query_len,
                    max_seq_len=max_seq_len,
                    query_start_loc_host_S1=query_start_loc,
                    seq_lens_host_S=lengths_S,
                )
            )
        return FlatBatch(input_ids_T=input_ids_T, positions_T=positions_T, attention=attention, last_M=views["last"])


def joined_updates(updates: Sequence[TableUpdate], num_columns: int) -> np.ndarray:
    """One int32 [3, U] (rows, columns, blocks) of several updates, of which later ones win."""
    if not updates:
        return np.zeros((3, 0), dtype=np.int32)
    joined_3U = np.empty((3, sum(len(update.rows) for update in updates)), dtype=np.int32)
    end = 0
    for update in updates:
        begin, end = end, end + len(update.rows)
        for i, column in enumerate((update.rows, update.columns, update.blocks)):
            joined_3U[i, begin:end] = column
    places_U = joined_3U[0].astype(np.int64) * num_columns + joined_3U[1]
    in_order_U = np.sort(places_U)
    if not np.count_nonzero(in_order_U[1:] == in_order_U[:-1]):
        return joined_3U
    _, from_behind = np.unique(places_U[::-1], return_index=True)
    return np.ascontiguousarray(joined_3U[:, np.sort(len(places_U) - 1 - from_behind)])
