"""Block tables and blocks, in Triton: lay a step's batch out, change table entries, copy and swap blocks.

The twin of `lay_out` is `worker.input_batch.InputBatch.lay_out`, that of `swap_blocks` is in `torch_ops`. Does not know
which sequence owns a block.

Shape legend: R = rows, L = most tokens of a sequence, B = blocks of a table, S = sequences of the step, T = tokens, U = table
entries that change.
"""

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 256  # tokens or table entries that a program of `_lay_out_kernel` handles at once
_MAX_WIDTH = 16  # programs of one sequence
_WORDS = 1024  # 8-byte words that a program of `_copy_kernel` moves at once
_ROUNDS = 4


@triton.jit(do_not_specialize=["block_table_stride"])
def _lay_out_kernel(
    token_ids_ptr,
    table_ptr,
    row_ptr,
    query_start_loc_ptr,
    seq_len_ptr,
    input_id_ptr,
    position_ptr,
    slot_ptr,
    block_table_ptr,
    token_stride,
    table_stride,
    block_table_stride,
    BLOCK_SIZE: tl.constexpr,
    TOKENS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Program (s, i) has tiles i, i + width, ... of sequence s: of its tokens in this step, then of its block table."""
    s = tl.program_id(0)
    first_tile = tl.program_id(1) * TILE
    step = tl.num_programs(1) * TILE
    row = tl.load(row_ptr + s).to(tl.int64)
    begin = tl.load(query_start_loc_ptr + s)
    count = tl.load(query_start_loc_ptr + s + 1) - begin
    seq_len = tl.load(seq_len_ptr + s)
    table = table_ptr + row * table_stride
    for tile in range(first_tile, count, step):
        at = tile + tl.arange(0, TILE)
        mask = at < count
        position = seq_len - count + at
        block = tl.load(table + position // BLOCK_SIZE, mask=mask, other=0)
        tl.store(slot_ptr + begin + at, block * BLOCK_SIZE + position % BLOCK_SIZE, mask=mask)
        if TOKENS:
            token = tl.load(token_ids_ptr + row * token_stride + position, mask=mask, other=0)
            tl.store(input_id_ptr + begin + at, token, mask=mask)
            tl.store(position_ptr + begin + at, position, mask=mask)
    num_blocks = (seq_len + BLOCK_SIZE - 1) // BLOCK_SIZE
    target = block_table_ptr + s.to(tl.int64) * block_table_stride
    for tile in range(first_tile, num_blocks, step):
        at = tile + tl.arange(0, TILE)
        tl.store(target + at, tl.load(table + at, mask=at < num_blocks, other=0), mask=at < num_blocks)


def lay_out(
    token_ids_RL: Tensor,
    table_RB: Tensor,
    rows_S: Tensor,
    query_start_loc_S1: Tensor,
    seq_lens_S: Tensor,
    input_ids_T: Tensor,
    positions_T: Tensor,
    slots_T: Tensor,
    block_tables_SB: Tensor,
    block_size: int,
    width: int,
    *,
    tokens: bool,
) -> None:
    """Fills slots_T and block_tables_SB of one cache group, and with `tokens` input_ids_T and positions_T too. All int32.

    block_tables_SB may be narrower than table_RB and is filled up to each sequence's last block; what lies behind stays.
    width: programs for each sequence, more for longer ones; the result is the same.
    """
    _lay_out_kernel[(len(rows_S), min(width, _MAX_WIDTH))](
        token_ids_RL, table_RB, rows_S, query_start_loc_S1, seq_lens_S, input_ids_T, positions_T, slots_T,
        block_tables_SB, token_ids_RL.stride(0), table_RB.stride(0), block_tables_SB.stride(0),
        BLOCK_SIZE=block_size, TOKENS=tokens, TILE=_TILE, num_warps=4,
    )  # fmt: skip


def width_for(longest: int) -> int:
    """Programs for each sequence, where the most tokens or blocks that one has to lay out are `longest`."""
    return max(1, triton.cdiv(longest, _TILE))


@triton.jit(do_not_specialize=["capacity"], do_not_specialize_on_alignment=["update_ptr", "count_ptr"])
def _update_kernel(table_ptr, update_ptr, count_ptr, capacity, table_stride, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < tl.load(count_ptr)
    row = tl.load(update_ptr + at, mask=mask, other=0).to(tl.int64)
    column = tl.load(update_ptr + capacity + at, mask=mask, other=0)
    block = tl.load(update_ptr + 2 * capacity + at, mask=mask, other=0)
    tl.store(table_ptr + row * table_stride + column, block, mask=mask)


def update_table(table_RB: Tensor, updates_3U: Tensor, count_1: Tensor) -> None:
    """table[rows[i], columns[i]] = blocks[i] for the first count of updates_3U (rows, columns, blocks), no place twice.

    All int32 and on the device, the count too: U is a capacity.
    """
    capacity = updates_3U.shape[1]
    _update_kernel[(triton.cdiv(capacity, 256),)](
        table_RB, updates_3U, count_1, capacity, table_RB.stride(0), BLOCK=256, num_warps=4
    )


@triton.jit(do_not_specialize=["num_pairs"])
def _copy_kernel(src_ptr, dst_ptr, pair_ptr, num_pairs, words, WORDS: tl.constexpr, ROUNDS: tl.constexpr):
    """Program (i, j) copies words [j * ROUNDS * WORDS, (j + 1) * ROUNDS * WORDS) of pair i."""
    src = src_ptr + tl.load(pair_ptr + tl.program_id(0)) * words
    dst = dst_ptr + tl.load(pair_ptr + num_pairs + tl.program_id(0)) * words
    begin = tl.program_id(1) * (WORDS * ROUNDS)
    for i in tl.static_range(ROUNDS):
        at = begin + i * WORDS + tl.arange(0, WORDS)
        tl.store(dst + at, tl.load(src + at, mask=at < words), mask=at < words)


def swap_blocks(src_pool: Tensor, dst_pool: Tensor, src_ids: Tensor, dst_ids: Tensor) -> None:
    """`Kernels.swap_blocks`. On one device: one launch. Between the device and pinned host memory: one asynchronous copy
    for each run of neighbours, on the current stream, which moves them at the bus's speed while kernels run on others."""
    for pool in (src_pool, dst_pool):
        if pool.shape[1:] != src_pool.shape[1:] or pool.dtype is not src_pool.dtype or not pool.is_contiguous():
            raise ValueError("pools must be contiguous and have blocks of the same shape and dtype")
    if not len(src_ids):
        return
    if src_pool.device != dst_pool.device:
        for src, dst, count in _runs(src_ids.numpy(), dst_ids.numpy()):
            dst_pool[dst : dst + count].copy_(src_pool[src : src + count], non_blocking=True)
        return
    pairs_2N = torch.stack((src_ids, dst_ids))
    if src_pool.is_cuda:
        pairs_2N = pairs_2N.pin_memory().to(src_pool.device, non_blocking=True)
    block_bytes = src_pool[:1].nbytes
    word = next(dtype for dtype in (torch.int64, torch.int32, torch.int16) if block_bytes % dtype.itemsize == 0)
    src_BW, dst_BW = (pool.view(len(pool), -1).view(word) for pool in (src_pool, dst_pool))
    words = src_BW.shape[1]
    _copy_kernel[(len(src_ids), triton.cdiv(words, _WORDS * _ROUNDS))](
        src_BW, dst_BW, pairs_2N, len(src_ids), words, WORDS=_WORDS, ROUNDS=_ROUNDS, num_warps=4
    )


def _runs(src_N: np.ndarray, dst_N: np.ndarray) -> list[tuple[int, int, int]]:
    """(source, target, count) of the runs in which both go up by one: [5, 6, 9] to [2, 3, 4] is (5, 2, 2), (9, 4, 1)."""
    breaks = np.flatnonzero((np.diff(src_N) != 1) | (np.diff(dst_N) != 1)) + 1
    starts = np.concatenate(([0], breaks))
    ends = np.concatenate((breaks, [len(src_N)]))
    return [(int(src_N[i]), int(dst_N[i]), int(j - i)) for i, j in zip(starts, ends)]
