"""Attention through block tables, in Triton: two kernels, launched over work lists that someone else planned.

`attend` computes one item of a work list per program: a tile of queries of one sequence (some tokens, times the heads that
share a key/value head) against a piece of its keys. A tile whose keys are one piece writes its output; otherwise each piece
writes an output normalized by itself and the logarithm of its sum, and these are weighed together ("FlashDecoding"; the
online softmax is Milakov & Gimelshein 2018, arXiv 1805.02867): low tiles', whose results are small, by whichever of their
programs ends last, while others still run; high tiles' by a second kernel, `merge`. Together they are the twin of
`TorchKernels.attention`. Nothing takes a length from the host: counts lie on the device, so that a captured graph can be
replayed over other work.

It does not know how work is divided (`quire.attention.work_list`), what a spec is, or what a step is.

Letters of shapes: as in `quire.kernels`; I items, E entries to merge, P slots of partial results, R rows of a tile.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from quire.kernels.triton import dependent

ITEM_FIELDS = 8
"""Of an item, int32 each: sequence, first query token (flat index), number of query tokens, position of the first, first
key, end of the keys, slot for the partial result (-1: the only piece, writes the output), its entry to merge."""
MERGE_FIELDS = 4
"""Of an entry to merge, int32 each: first query token (flat index), number of query tokens, first slot, number of slots."""
LOW_ROWS = 32
"""Tiles of so many rows or fewer merge their pieces themselves."""
MERGED_AT_ONCE = 16
"""Rows of partial results that each warp of such a merge holds in registers at once, of all slots together."""

LOG2_E = 1.4426950408889634
DOT_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
HIDDEN = tl.constexpr(
    -(2.0**100)
)  # the score of a key that a query doesn't see; a power of 2: times any scale it is exact


@dataclass(frozen=True)
class Tile:
    """How one kind of item is computed. Rows are query tokens times the heads of a group, padded to a power of two."""

    num_rows: int
    num_keys: int
    """Keys in each turn of the loop."""
    num_warps: int
    num_stages: int
    """Depth of the compiler's pipeline. Shared memory holds num_stages - 1 turns' keys and values, and one more from 64 rows
    on, where the matrix units read them there."""
    per_sm: int
    """Programs that a multiprocessor holds at once, by their registers and shared memory: what a planner counts on."""
    head_run: int = 1
    """So many items run for one key/value head before the next head's turn: with many tiles of one sequence in flight, its
    keys are then read from L2. 1: all heads of an item run together."""


@triton.jit
def prefetch(kv_ptr, kv_head, block_T, key_T, num_blocks, kv_stride_b, HEAD_SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr,
             VALUES: tl.constexpr):  # fmt: skip
    """Asks for these keys and their values to be brought into L2, by lines of 128 bytes."""
    LINE: tl.constexpr = 128 * 8 // kv_ptr.dtype.element_ty.primitive_bitwidth
    LINES: tl.constexpr = (HEAD_SIZE + LINE - 1) // LINE
    # Before the wait a table may still be being written: whatever it holds, nothing beyond the cache is asked for. (And it
    # is read past L1, which would keep what lay there.)
    block_T = tl.minimum(tl.maximum(block_T, 0), num_blocks - 1).to(tl.int64)
    key_ptr_T = kv_ptr + kv_head * (BLOCK_SIZE * HEAD_SIZE) + block_T * kv_stride_b + key_T % BLOCK_SIZE * HEAD_SIZE
    for line in tl.static_range(LINES):
        for part in tl.static_range(2):
            tl.inline_asm_elementwise(
                "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [(key_ptr_T + (line * LINE + part * VALUES)).to(tl.int64)],
                dtype=tl.int32, is_pure=False, pack=1,
            )  # fmt: skip


@triton.jit
def _merge_slots(
    o_ptr, partial_o_ptr, partial_lse_ptr, first_token, num_tokens, first_slot, num_slots, kv_head, partial_rows,
    NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_SIZE: tl.constexpr, FIRST: tl.constexpr, D: tl.constexpr,
    ROWS: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """One program's merge of all rows of an entry, SLOTS partial results at a time; elements FIRST to FIRST + D of each."""
    row_R = tl.arange(0, ROWS)
    token_R = row_R // GROUP
    valid_R = token_R < num_tokens
    column_D = FIRST + tl.arange(0, D)
    max_R = tl.full([ROWS], HIDDEN, dtype=tl.float32)
    total_R = tl.zeros([ROWS], dtype=tl.float32)
    acc_RD = tl.zeros([ROWS, D], dtype=tl.float32)
    for start in range(0, num_slots, SLOTS):
        slot_P = start + tl.arange(0, SLOTS)
        partial_PR = ((first_slot + slot_P) * NUM_KV_HEADS + kv_head).to(tl.int64)[:, None] * partial_rows + row_R[
            None, :
        ]
        there_PR = (slot_P < num_slots)[:, None] & valid_R[None, :]
        # Past L1, which may hold what lay there before.
        lse_PR = tl.load(partial_lse_ptr + partial_PR, mask=there_PR, other=HIDDEN, cache_modifier=".cg")
        o_PRD = tl.load(
            partial_o_ptr + partial_PR[:, :, None] * HEAD_SIZE + column_D[None, None, :],
            mask=there_PR[:, :, None] & (column_D < HEAD_SIZE)[None, None, :], other=0.0, cache_modifier=".cg",
        )  # fmt: skip
        new_max_R = tl.maximum(max_R, tl.max(lse_PR, 0))
        weight_PR = tl.exp2(lse_PR - new_max_R[None, :])
        decay_R = tl.exp2(max_R - new_max_R)
        acc_RD = acc_RD * decay_R[:, None] + tl.sum(weight_PR[:, :, None] * o_PRD, 0)
        total_R = total_R * decay_R + tl.sum(weight_PR, 0)
        max_R = new_max_R
    head_R = kv_head * GROUP + row_R % GROUP
    o_row_R = ((first_token + token_R).to(tl.int64) * (NUM_KV_HEADS * GROUP) + head_R) * HEAD_SIZE
    tl.store(
        o_ptr + o_row_R[:, None] + column_D[None, :],
        (acc_RD / total_R[:, None]).to(o_ptr.dtype.element_ty),
        mask=valid_R[:, None] & (column_D < HEAD_SIZE)[None, :],
    )


# What changes from step to step is not specialised on: 1 and multiples of 16 would each be compiled anew while serving.
@triton.jit(
    do_not_specialize=["window", "table_stride", "partial_rows", "num_blocks"],
    do_not_specialize_on_alignment=["tables_ptr", "items_ptr", "count_ptr", "merges_ptr", "arrivals_ptr"],
)
def _attend(
    q_ptr, kv_ptr, tables_ptr, o_ptr, partial_o_ptr, partial_lse_ptr, items_ptr, count_ptr, merges_ptr, arrivals_ptr,
    score_scale, tanh_scale, window, q_stride_t, q_stride_n, table_stride, partial_rows, num_blocks,
    kv_stride_b,
    NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_SIZE: tl.constexpr, D_LOW: tl.constexpr, D_HIGH: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, HEAD_RUN: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, ALWAYS_MASK: tl.constexpr,
    DOT_TYPE: tl.constexpr, MERGE_ROWS: tl.constexpr, MERGE_SLOTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: one item for one key/value head. Head sizes between powers of two are two parts, D_LOW and D_HIGH wide.
    MERGE_ROWS: 0 leaves merging to another kernel.

    score_scale turns scores into exponents of 2. With a softcap, tanh_scale turns them into 2 x log2 e first, where x is what
    the hyperbolic tangent is taken of, and score_scale stands for the cap.
    """
    if PDL:
        dependent.release()
    program = tl.program_id(0)
    run = program // (HEAD_RUN * NUM_KV_HEADS)
    kv_head = program % (HEAD_RUN * NUM_KV_HEADS) // HEAD_RUN
    item = run * HEAD_RUN + program % HEAD_RUN
    # The lists, which were copied here before the first kernel of the step, may be read before the wait.
    if item >= tl.load(count_ptr):
        if PDL:
            dependent.wait()
        return
    item_ptr = items_ptr + item * 8
    sequence = tl.load(item_ptr)
    first_token = tl.load(item_ptr + 1)
    num_tokens = tl.load(item_ptr + 2)
    first_position = tl.load(item_ptr + 3)
    begin = tl.load(item_ptr + 4)
    end = tl.load(item_ptr + 5)
    slot = tl.load(item_ptr + 6)
    table_ptr = tables_ptr + sequence.to(tl.int64) * table_stride
    VALUES: tl.constexpr = NUM_KV_HEADS * BLOCK_SIZE * HEAD_SIZE  # from a key to its value
    if PDL:
        if ROWS < 64:  # few of these programs are there at once, and wait for memory
            first_T = tl.minimum(begin + tl.arange(0, KEYS), end - 1).to(tl.uint32)
            block_T = tl.load(table_ptr + first_T // BLOCK_SIZE, cache_modifier=".cg")
            prefetch(kv_ptr, kv_head, block_T, first_T, num_blocks, kv_stride_b, HEAD_SIZE, BLOCK_SIZE, VALUES)
        dependent.wait()

    row_R = tl.arange(0, ROWS)
    token_R = row_R // GROUP
    valid_R = token_R < num_tokens
    position_R = first_position + token_R
    head_R = kv_head * GROUP + row_R % GROUP
    low_D = tl.arange(0, D_LOW)
    q_row_R = (first_token + token_R).to(tl.int64) * q_stride_t + head_R * q_stride_n
    q_low_RD = tl.load(
        q_ptr + q_row_R[:, None] + low_D[None, :], mask=valid_R[:, None] & (low_D < HEAD_SIZE)[None, :], other=0.0
    ).to(DOT_TYPE)
    acc_low_RD = tl.zeros([ROWS, D_LOW], dtype=tl.float32)
    if D_HIGH > 0:
        high_D = D_LOW + tl.arange(0, D_HIGH)
        q_high_RD = tl.load(
            q_ptr + q_row_R[:, None] + high_D[None, :], mask=valid_R[:, None] & (high_D < HEAD_SIZE)[None, :], other=0.0
        ).to(DOT_TYPE)
        acc_high_RD = tl.zeros([ROWS, D_HIGH], dtype=tl.float32)
    max_R = tl.full([ROWS], HIDDEN, dtype=tl.float32) * score_scale
    sum_R = tl.zeros([ROWS], dtype=tl.float32)

    # Everything before unmasked_end is seen by all rows, unless a window's left edge says otherwise.
    unmasked_end = tl.minimum(end, first_position + 1) if CAUSAL else end
    last_position = first_position + num_tokens - 1
    k_ptr = kv_ptr + kv_head * (BLOCK_SIZE * HEAD_SIZE)
    # Keys past the end are replaced by the last one, and masked: a slot that holds no token may hold NaN, so it is not read.
    # Blocks are looked up one turn ahead, so that what the loop waits for are keys and values alone. Unsigned: // is a shift.
    block_T = tl.load(table_ptr + tl.minimum(begin + tl.arange(0, KEYS), end - 1).to(tl.uint32) // BLOCK_SIZE)
    for start in range(begin, end, KEYS):
        key_T = tl.minimum(start + tl.arange(0, KEYS), end - 1).to(tl.uint32)
        offset_T = block_T.to(tl.int64) * kv_stride_b + (key_T % BLOCK_SIZE * HEAD_SIZE).to(tl.int64)
        next_T = tl.minimum(start + KEYS + tl.arange(0, KEYS), end - 1).to(tl.uint32)
        block_T = tl.load(table_ptr + next_T // BLOCK_SIZE)

        low_ptr_TD = (k_ptr + low_D)[None, :] + offset_T[:, None]
        if D_LOW <= HEAD_SIZE:
            k_low_TD = tl.load(low_ptr_TD)
        else:
            k_low_TD = tl.load(low_ptr_TD, mask=(low_D < HEAD_SIZE)[None, :], other=0.0)
        score_RT = tl.dot(q_low_RD, tl.trans(k_low_TD.to(DOT_TYPE)), input_precision="ieee")
        if D_HIGH > 0:
            high_ptr_TD = (k_ptr + high_D)[None, :] + offset_T[:, None]
            if D_LOW + D_HIGH <= HEAD_SIZE:
                k_high_TD = tl.load(high_ptr_TD)
            else:
                k_high_TD = tl.load(high_ptr_TD, mask=(high_D < HEAD_SIZE)[None, :], other=0.0)
            score_RT = tl.dot(q_high_RD, tl.trans(k_high_TD.to(DOT_TYPE)), score_RT, input_precision="ieee")

        if HAS_SOFTCAP:
            # tanh(x) = 1 - 2 / (1 + exp(2 x)); where the exponential overflows or vanishes, this is 1 or -1, as it should be
            score_RT = 1.0 - 2.0 / (1.0 + tl.exp2(score_RT * tanh_scale))
        masked = start + KEYS > unmasked_end
        if HAS_WINDOW:
            masked = masked | (start + window <= last_position)
        if ALWAYS_MASK or masked:  # in low tiles scores are few, and a branch costs more than the mask
            shown_T = start + tl.arange(0, KEYS)
            seen_RT = (shown_T < end)[None, :]
            if CAUSAL:
                seen_RT = seen_RT & (shown_T[None, :] <= position_R[:, None])
            if HAS_WINDOW:
                seen_RT = seen_RT & (shown_T[None, :] > position_R[:, None] - window)
            score_RT = tl.where(seen_RT, score_RT, HIDDEN)

        # A row that has seen no key yet counts hidden ones, each 2^0; the first that it sees weighs those by 2^-huge = 0.
        new_max_R = tl.maximum(max_R, tl.max(score_RT, 1) * score_scale)
        p_RT = tl.exp2(score_RT * score_scale - new_max_R[:, None])
        decay_R = tl.exp2(max_R - new_max_R)
        sum_R = sum_R * decay_R + tl.sum(p_RT, 1)
        max_R = new_max_R
        p_RT = p_RT.to(DOT_TYPE)

        if D_LOW <= HEAD_SIZE:
            v_low_TD = tl.load(low_ptr_TD + VALUES)
        else:
            v_low_TD = tl.load(low_ptr_TD + VALUES, mask=(low_D < HEAD_SIZE)[None, :], other=0.0)
        acc_low_RD = acc_low_RD * decay_R[:, None]
        acc_low_RD = tl.dot(p_RT, v_low_TD.to(DOT_TYPE), acc_low_RD, input_precision="ieee")
        if D_HIGH > 0:
            if D_LOW + D_HIGH <= HEAD_SIZE:
                v_high_TD = tl.load(high_ptr_TD + VALUES)
            else:
                v_high_TD = tl.load(high_ptr_TD + VALUES, mask=(high_D < HEAD_SIZE)[None, :], other=0.0)
            acc_high_RD = acc_high_RD * decay_R[:, None]
            acc_high_RD = tl.dot(p_RT, v_high_TD.to(DOT_TYPE), acc_high_RD, input_precision="ieee")

    acc_low_RD = acc_low_RD / sum_R[:, None]
    if D_HIGH > 0:
        acc_high_RD = acc_high_RD / sum_R[:, None]
    if slot < 0:
        o_row_R = ((first_token + token_R).to(tl.int64) * (NUM_KV_HEADS * GROUP) + head_R) * HEAD_SIZE
        tl.store(
            o_ptr + o_row_R[:, None] + low_D[None, :],
            acc_low_RD.to(o_ptr.dtype.element_ty),
            mask=valid_R[:, None] & (low_D < HEAD_SIZE)[None, :],
        )
        if D_HIGH > 0:
            tl.store(
                o_ptr + o_row_R[:, None] + high_D[None, :],
                acc_high_RD.to(o_ptr.dtype.element_ty),
                mask=valid_R[:, None] & (high_D < HEAD_SIZE)[None, :],
            )
    else:
        partial_R = (slot * NUM_KV_HEADS + kv_head).to(tl.int64) * partial_rows + row_R
        tl.store(partial_lse_ptr + partial_R, max_R + tl.log2(sum_R), mask=valid_R)
        tl.store(
            partial_o_ptr + partial_R[:, None] * HEAD_SIZE + low_D[None, :],
            acc_low_RD,
            mask=valid_R[:, None] & (low_D < HEAD_SIZE)[None, :],
        )
        if D_HIGH > 0:
            tl.store(
                partial_o_ptr + partial_R[:, None] * HEAD_SIZE + high_D[None, :],
                acc_high_RD,
                mask=valid_R[:, None] & (high_D < HEAD_SIZE)[None, :],
            )
        if MERGE_ROWS > 0:
            entry = tl.load(item_ptr + 7)
            first_slot = tl.load(merges_ptr + entry * 4 + 2)
            num_slots = tl.load(merges_ptr + entry * 4 + 3)
            arrivals_ptr += entry * NUM_KV_HEADS + kv_head
            # All threads' results are written before one of them counts this program in; whoever counts last sees all.
            tl.debug_barrier()
            if tl.atomic_add(arrivals_ptr, 1, sem="acq_rel", scope="gpu") == num_slots - 1:
                tl.store(arrivals_ptr, 0)  # for the next layer
                _merge_slots(
                    o_ptr, partial_o_ptr, partial_lse_ptr, first_token, num_tokens, first_slot, num_slots, kv_head,
                    partial_rows, NUM_KV_HEADS, GROUP, HEAD_SIZE, 0, D_LOW, MERGE_ROWS, MERGE_SLOTS,
                )  # fmt: skip
                if D_HIGH > 0:
                    _merge_slots(
                        o_ptr, partial_o_ptr, partial_lse_ptr, first_token, num_tokens, first_slot, num_slots, kv_head,
                        partial_rows, NUM_KV_HEADS, GROUP, HEAD_SIZE, D_LOW, D_HIGH, MERGE_ROWS, MERGE_SLOTS,
                    )  # fmt: skip


@triton.jit(do_not_specialize=["partial_rows"], do_not_specialize_on_alignment=["merges_ptr", "count_ptr"])
def _merge(
    o_ptr, partial_o_ptr, partial_lse_ptr, merges_ptr, count_ptr, partial_rows,
    NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_SIZE: tl.constexpr, D: tl.constexpr, SLOTS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Programs take (entry, key/value head, row) in turn; each reads its slots SLOTS at a time."""
    if PDL:
        dependent.release()
        dependent.wait()
    per_entry = partial_rows * NUM_KV_HEADS
    num_jobs = tl.load(count_ptr) * per_entry
    column_D = tl.arange(0, D)
    for job in range(tl.program_id(0), num_jobs, tl.num_programs(0)):
        entry = job // per_entry
        kv_head = job % per_entry // partial_rows
        row = job % partial_rows
        token = row // GROUP
        entry_ptr = merges_ptr + entry * 4
        first_token = tl.load(entry_ptr)
        num_tokens = tl.load(entry_ptr + 1)
        first_slot = tl.load(entry_ptr + 2)
        num_slots = tl.load(entry_ptr + 3)
        if token < num_tokens:
            max_lse = -float("inf")
            total = 0.0
            acc_D = tl.zeros([D], dtype=tl.float32)
            for start in range(0, num_slots, SLOTS):
                slot_P = start + tl.arange(0, SLOTS)
                partial_P = ((first_slot + slot_P) * NUM_KV_HEADS + kv_head).to(tl.int64) * partial_rows + row
                lse_P = tl.load(partial_lse_ptr + partial_P, mask=slot_P < num_slots, other=-float("inf"))
                o_PD = tl.load(
                    partial_o_ptr + partial_P[:, None] * HEAD_SIZE + column_D[None, :],
                    mask=(slot_P < num_slots)[:, None] & (column_D < HEAD_SIZE)[None, :],
                    other=0.0,
                )
                new_max = tl.maximum(max_lse, tl.max(lse_P, 0))
                weight_P = tl.exp2(lse_P - new_max)
                decay = tl.exp2(max_lse - new_max)
                acc_D = acc_D * decay + tl.sum(weight_P[:, None] * o_PD, 0)
                total = total * decay + tl.sum(weight_P, 0)
                max_lse = new_max
            head = kv_head * GROUP + row % GROUP
            o_row = ((first_token + token).to(tl.int64) * (NUM_KV_HEADS * GROUP) + head) * HEAD_SIZE
            tl.store(o_ptr + o_row + column_D, (acc_D / total).to(o_ptr.dtype.element_ty), mask=column_D < HEAD_SIZE)


def split_head_size(head_size: int) -> tuple[int, int]:
    """A head size as two powers of two from 16 up (or 0), padded if need be: 128 is (128, 0), 80 (64, 16), 8 (16, 0)."""
    low = max(16, 1 << head_size.bit_length() - 1)
    return low, max(16, triton.next_power_of_2(head_size - low)) if head_size > low else 0


def check_layout(kv_B2KSD: Tensor) -> None:
    """Raises ValueError where kernels would not find a block's keys and values of one layer."""
    if not kv_B2KSD[:1].is_contiguous():
        raise ValueError(
            f"a block's keys and values of one layer must be contiguous, not of strides {kv_B2KSD.stride()}"
        )


def merges_itself(tile: Tile) -> bool:
    """Whether `attend` leaves nothing to `merge`."""
    return tile.num_rows <= LOW_ROWS


def choose_merge_rows(tile: Tile, group: int, partial_rows: int) -> int:
    """Rows that a program merges, 0 if none: of two cases, for each is compiled by itself, perhaps while serving."""
    one_token = triton.next_power_of_2(group)
    if not merges_itself(tile):
        return 0
    return one_token if partial_rows <= one_token else tile.num_rows


def choose_merge_slots(tile: Tile, merge_rows: int) -> int:
    """Partial results that a program merges at once."""
    return max(1, MERGED_AT_ONCE * tile.num_warps // max(1, merge_rows))


def attend(
    q_TND: Tensor,
    kv_B2KSD: Tensor,
    block_tables_SB: Tensor,
    o_TND: Tensor,
    items_I8: Tensor,
    count_1: Tensor,
    grid_items: int,
    merges_E4: Tensor,
    arrivals_EK: Tensor,
    partial_o: Tensor,
    partial_lse: Tensor,
    partial_rows: int,
    tile: Tile,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    causal: bool = True,
) -> None:
    """Computes the first count_1[0] (int32, on the device, at most grid_items) of the items, int32 [I, ITEM_FIELDS].

    Writes o (contiguous [T, N, D]) for items of one piece. Other pieces go to partial_o, fp32 [P, K, partial_rows, D], and
    the base-2 logarithms of their sums to partial_lse, fp32 [P, K, partial_rows]; partial_rows is at least the tokens of
    such an item times N / K. Where `merges_itself(tile)`, merges_E4 (int32 [E, MERGE_FIELDS]) says what belongs together, and
    arrivals (int32, K for each entry) are zeros, before and after.

    kv is contiguous but for its first dimension; q may be a strided view with a contiguous last dimension. q and kv of one
    type are multiplied in it and summed in fp32, of different types both are made fp32 (slow).
    """
    num_heads, head_size = q_TND.shape[1:]
    num_kv_heads, block_size = kv_B2KSD.shape[2:4]
    low, high = split_head_size(head_size)
    check_layout(kv_B2KSD)
    same = q_TND.dtype == kv_B2KSD.dtype
    merge_rows = choose_merge_rows(tile, num_heads // num_kv_heads, partial_rows)
    _attend[(-(-grid_items // tile.head_run) * tile.head_run * num_kv_heads,)](
        q_TND, kv_B2KSD, block_tables_SB, o_TND, partial_o, partial_lse, items_I8, count_1, merges_E4, arrivals_EK,
        (softcap if softcap else scale) * LOG2_E, 2 * LOG2_E * scale / softcap if softcap else 0.0, window or 0,
        *q_TND.stride()[:2], block_tables_SB.stride(0), partial_rows, len(kv_B2KSD), kv_B2KSD.stride(0),
        NUM_KV_HEADS=num_kv_heads, GROUP=num_heads // num_kv_heads, HEAD_SIZE=head_size, D_LOW=low, D_HIGH=high,
        BLOCK_SIZE=block_size, ROWS=tile.num_rows, KEYS=tile.num_keys, HEAD_RUN=tile.head_run, CAUSAL=causal,
        HAS_WINDOW=window is not None, HAS_SOFTCAP=softcap is not None, ALWAYS_MASK=tile.num_rows < 64,
        DOT_TYPE=DOT_TYPES[q_TND.dtype if same else torch.float32],
        MERGE_ROWS=merge_rows, MERGE_SLOTS=choose_merge_slots(tile, merge_rows),
        num_warps=tile.num_warps, num_stages=tile.num_stages, **dependent.options(q_TND.device),
    )  # fmt: skip


def merge(
    o_TND: Tensor,
    merges_E4: Tensor,
    count_1: Tensor,
    grid_jobs: int,
    partial_o: Tensor,
    partial_lse: Tensor,
    partial_rows: int,
) -> None:
    """Writes into o the first count_1[0] (int32, on the device) of the entries, int32 [E, MERGE_FIELDS].

    Any number of programs does; grid_jobs is how many. The partial results are as `attend` left them.
    """
    num_kv_heads, head_size = partial_o.shape[1], o_TND.shape[2]
    _merge[(grid_jobs,)](
        o_TND, partial_o, partial_lse, merges_E4, count_1, partial_rows,
        NUM_KV_HEADS=num_kv_heads, GROUP=o_TND.shape[1] // num_kv_heads, HEAD_SIZE=head_size,
        D=triton.next_power_of_2(head_size), SLOTS=32, num_warps=4,
        **dependent.options(o_TND.device),
    )  # fmt: skip
