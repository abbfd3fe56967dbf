"""Attention of one token of each sequence for Hopper, in Gluon: the twin of `attend` in `quire.kernels.triton.attention` for
low tiles that hold one token.

A program is one warp, and keys are the rows of its products, a group's heads the columns, padded to 8:

    scores [T, 8]    =  keys [T, D]            x  queries [D, 8]
    output [D, 8]    =  values [T, D] turned   x  probabilities [T, 8]

The Triton kernel has heads as rows, padded to 16, and makes an address for each 16 bytes that it brings. A card that has
reached its limit of power decodes as fast as that limit lets it, and this way a byte takes fewer instructions. Keys and values
come by TMA, one box for a block's keys of a head, or a turn's where blocks are larger, and another for their values. Nobody
else reads them, so a stage is filled again as soon as this warp has it in registers.

Of a box, what lies beyond the sequence's end may be anything, NaN among it: in the last turn such values become zeros, and
their scores are hidden.

Letters of shapes: as in `quire.kernels.triton.attention`; T the keys of a turn, R the 8 columns.
"""

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from quire.kernels.gluon import MAX_DECODE_GROUP, GluonTile
from quire.kernels.gluon.ptx import asm, narrow
from quire.kernels.triton import dependent
from quire.kernels.triton.attention import LOG2_E, check_layout, choose_merge_rows, choose_merge_slots, prefetch

_COLUMNS = gl.constexpr(MAX_DECODE_GROUP)
_WIDTH = gl.constexpr(64)
"""Elements of a row of a box: what the swizzle spans."""
_HIDDEN = gl.constexpr(-(2.0**100))  # as in the Triton kernel
_NOWHERE = gl.constexpr(1 << 30)
"""No block: a box there is zeros."""


@gluon.constexpr_function
def _tile_layout(keys, head_size, box):
    """Where element [key, d] lies: boxes one behind the other, in each the head's parts of 64, whose rows are keys. The swizzle
    turns a row's chunks of 8 elements by the row's number in its 8."""
    width = _WIDTH.value
    elements = [[0, 1 << i] for i in range(width.bit_length() - 1)]
    turned = [[1 << i, 8 << i] for i in range(3)]
    rows = [[1 << i, 0] for i in range(3, box.bit_length() - 1)]
    parts = [[0, 1 << i] for i in range(width.bit_length() - 1, head_size.bit_length() - 1)]
    boxes = [[1 << i, 0] for i in range(box.bit_length() - 1, keys.bit_length() - 1)]
    return gl.SharedLinearLayout(elements + turned + rows + parts + boxes, alignment=1024)


@gluon.jit
def _blocks(table_ptr, start, end, BLOCK_SIZE: gl.constexpr, KEYS: gl.constexpr):
    """The blocks of the keys from `start`, one for each box."""
    BOX: gl.constexpr = min(BLOCK_SIZE, KEYS)
    blocks = ()
    for j in gl.static_range(KEYS // BOX):
        key = start + j * BOX
        block = gl.load(table_ptr + key // BLOCK_SIZE, mask=key < end, other=_NOWHERE)
        blocks = blocks + (block,)  # noqa: RUF005
    return blocks


@gluon.jit
def _bring(
    kv_desc, k_boxes, v_boxes, k_full, v_full, blocks, kv_head, start, end, stage,
    NUM_KV_HEADS: gl.constexpr, HEAD_SIZE: gl.constexpr, BLOCK_SIZE: gl.constexpr, KEYS: gl.constexpr,
):  # fmt: skip
    """Keys and values from `start`, if any are there; `blocks` are theirs."""
    BOX: gl.constexpr = min(BLOCK_SIZE, KEYS)
    BOXES: gl.constexpr = KEYS // BOX
    there = start < end
    for part in gl.static_range(2):
        boxes = v_boxes if part else k_boxes
        full = v_full.index(stage) if part else k_full.index(stage)
        mbarrier.expect(full, KEYS * HEAD_SIZE * 2, pred=there)
        for j in gl.static_range(BOXES):
            if BLOCK_SIZE > BOX:
                slot = (start + j * BOX) % BLOCK_SIZE
            else:
                slot = 0
            at = [blocks[j], part * NUM_KV_HEADS + kv_head, 0, slot, 0]
            tma.async_copy_global_to_shared(kv_desc, at, full, boxes.index(stage * BOXES + j), pred=there)


@gluon.jit
def _turn(
    k_tile, v_tile, k_full, v_full, phase, q_DR, acc_DR, max_R, sum_TR, score_scale, start, end,
    MASKED: gl.constexpr, KEYS: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """Each thread adds up the probabilities that it has: sum_TR."""
    ROWS: gl.constexpr = gl.DotOperandLayout(0, LAYOUT, 2)
    mbarrier.wait(k_full, phase)
    score_TR = mma_v2(k_tile.load(ROWS), q_DR, gl.zeros([KEYS, _COLUMNS], gl.float32, LAYOUT))
    if MASKED:
        key_T = start + gl.arange(0, KEYS, layout=gl.SliceLayout(1, LAYOUT))
        score_TR = gl.where((key_T < end)[:, None], score_TR, _HIDDEN)
    new_max_R = gl.maximum(max_R, gl.max(score_TR, 0) * score_scale)
    p_TR = gl.exp2(score_TR * score_scale - new_max_R[None, :])
    decay_R = gl.exp2(max_R - new_max_R)
    sum_TR = sum_TR * decay_R[None, :] + p_TR
    p_TR = gl.convert_layout(narrow(p_TR, k_tile.dtype), gl.DotOperandLayout(1, LAYOUT, 2))
    mbarrier.wait(v_full, phase)
    v_DT = v_tile.permute([1, 0]).load(ROWS)
    if MASKED:
        key_T = start + gl.arange(0, KEYS, layout=gl.SliceLayout(0, ROWS))
        v_DT = gl.where((key_T < end)[None, :], v_DT, 0.0)
    acc_DR = mma_v2(v_DT, p_TR, acc_DR * decay_R[None, :])
    return acc_DR, new_max_R, sum_TR


@gluon.jit
def _merge_slots(
    o_ptr, partial_o_ptr, partial_lse_ptr, first_token, first_slot, num_slots, kv_head, partial_rows,
    NUM_KV_HEADS: gl.constexpr, GROUP: gl.constexpr, HEAD_SIZE: gl.constexpr, ROWS: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    """One program's merge of all rows of an entry, SLOTS partial results at a time, as in the Triton kernel."""
    P_R_D: gl.constexpr = gl.BlockedLayout([1, 1, HEAD_SIZE // 32], [1, 1, 32], [1, 1, 1], [2, 1, 0])
    P_R: gl.constexpr = gl.SliceLayout(2, P_R_D)
    R_D: gl.constexpr = gl.SliceLayout(0, P_R_D)
    row_R = gl.arange(0, ROWS, layout=gl.SliceLayout(0, P_R))
    column_D = gl.arange(0, HEAD_SIZE, layout=gl.SliceLayout(0, gl.SliceLayout(1, P_R_D)))
    max_R = gl.full([ROWS], _HIDDEN, gl.float32, gl.SliceLayout(0, P_R))
    total_R = gl.zeros([ROWS], gl.float32, gl.SliceLayout(0, P_R))
    acc_RD = gl.zeros([ROWS, HEAD_SIZE], gl.float32, R_D)
    for start in range(0, num_slots, SLOTS):
        slot_P = start + gl.arange(0, SLOTS, layout=gl.SliceLayout(1, P_R))
        partial_P = ((first_slot + slot_P) * NUM_KV_HEADS + kv_head).to(gl.int64) * partial_rows
        partial_PR = partial_P[:, None] + row_R[None, :]
        there_PR = (slot_P < num_slots)[:, None] & (row_R < GROUP)[None, :]
        # Past L1, which may hold what lay there before.
        lse_PR = gl.load(partial_lse_ptr + partial_PR, mask=there_PR, other=_HIDDEN, cache_modifier=".cg")
        o_PRD = gl.load(
            partial_o_ptr + (partial_PR * HEAD_SIZE)[:, :, None] + column_D[None, None, :],
            mask=there_PR[:, :, None], other=0.0, cache_modifier=".cg",
        )  # fmt: skip
        new_max_R = gl.maximum(max_R, gl.max(lse_PR, 0))
        weight_PR = gl.exp2(lse_PR - new_max_R[None, :])
        decay_R = gl.exp2(max_R - new_max_R)
        acc_RD = acc_RD * gl.convert_layout(decay_R, gl.SliceLayout(1, R_D))[:, None]
        acc_RD += gl.sum(weight_PR[:, :, None] * o_PRD, 0)
        total_R = total_R * decay_R + gl.sum(weight_PR, 0)
        max_R = new_max_R
    acc_RD = acc_RD / gl.convert_layout(total_R, gl.SliceLayout(1, R_D))[:, None]
    _store(o_ptr, acc_RD, (first_token * NUM_KV_HEADS + kv_head) * GROUP, GROUP, R_D)


@gluon.jit
def _store(ptr, values_RD, first_row, GROUP: gl.constexpr, LAYOUT: gl.constexpr):
    """The group's rows of the values, from first_row on."""
    ROWS: gl.constexpr = values_RD.shape[0]
    HEAD_SIZE: gl.constexpr = values_RD.shape[1]
    row_R = gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT))
    column_D = gl.arange(0, HEAD_SIZE, layout=gl.SliceLayout(0, LAYOUT))
    at_R = (first_row + row_R).to(gl.int64) * HEAD_SIZE
    gl.store(ptr + at_R[:, None] + column_D[None, :], values_RD.to(ptr.dtype.element_ty), mask=(row_R < GROUP)[:, None])


# What changes from step to step is not specialised on, as in the Triton kernel.
@gluon.jit(
    do_not_specialize=["table_stride", "partial_rows", "num_blocks"],
    do_not_specialize_on_alignment=["tables_ptr", "items_ptr", "count_ptr", "merges_ptr", "arrivals_ptr"],
)
def _attend(
    q_ptr, kv_ptr, kv_desc, tables_ptr, o_ptr, partial_o_ptr, partial_lse_ptr, items_ptr, count_ptr, merges_ptr, arrivals_ptr,
    score_scale, q_stride_t, q_stride_n, table_stride, partial_rows, num_blocks, kv_stride_b,
    NUM_KV_HEADS: gl.constexpr, GROUP: gl.constexpr, HEAD_SIZE: gl.constexpr, BLOCK_SIZE: gl.constexpr,
    KEYS: gl.constexpr, STAGES: gl.constexpr, MERGE_ROWS: gl.constexpr, MERGE_SLOTS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """One program: one item for one key/value head. score_scale turns scores into exponents of 2."""
    if PDL:
        asm("griddepcontrol.launch_dependents; // $0")
    program = gl.program_id(0)
    kv_head = program % NUM_KV_HEADS
    item = program // NUM_KV_HEADS
    # The lists, which were copied here before the first kernel of the step, may be read before the wait.
    if item >= gl.load(count_ptr):
        if PDL:
            asm("griddepcontrol.wait; // $0")
        return
    item_ptr = items_ptr + item * 8
    sequence = gl.load(item_ptr)
    first_token = gl.load(item_ptr + 1)
    begin = gl.load(item_ptr + 4)
    end = gl.load(item_ptr + 5)
    slot = gl.load(item_ptr + 6)
    table_ptr = tables_ptr + sequence.to(gl.int64) * table_stride

    BOX: gl.constexpr = min(BLOCK_SIZE, KEYS)
    dtype: gl.constexpr = kv_desc.dtype
    TILE: gl.constexpr = _tile_layout(KEYS, HEAD_SIZE, BOX)
    BOXES: gl.constexpr = [STAGES * (KEYS // BOX), 1, 1, HEAD_SIZE // _WIDTH, BOX, _WIDTH]
    k_boxes = gl.allocate_shared_memory(dtype, BOXES, kv_desc.layout)
    v_boxes = gl.allocate_shared_memory(dtype, BOXES, kv_desc.layout)
    k_tiles = k_boxes._reinterpret(dtype, [STAGES, KEYS, HEAD_SIZE], TILE)
    v_tiles = v_boxes._reinterpret(dtype, [STAGES, KEYS, HEAD_SIZE], TILE)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_full.index(stage), 1)
        mbarrier.init(v_full.index(stage), 1)
    fence_async_shared()
    if PDL:
        first_T = begin + gl.arange(0, KEYS, layout=gl.BlockedLayout([1], [32], [1], [0]))
        first_T = gl.minimum(first_T, end - 1)
        block_T = gl.load(table_ptr + first_T // BLOCK_SIZE, cache_modifier=".cg")
        prefetch(
            kv_ptr, kv_head, block_T, first_T, num_blocks, kv_stride_b, HEAD_SIZE, BLOCK_SIZE,
            NUM_KV_HEADS * BLOCK_SIZE * HEAD_SIZE,
        )  # fmt: skip
        asm("griddepcontrol.wait; // $0")

    for i in gl.static_range(STAGES):
        start = begin + i * KEYS
        blocks = _blocks(table_ptr, start, end, BLOCK_SIZE, KEYS)
        _bring(
            kv_desc, k_boxes, v_boxes, k_full, v_full, blocks, kv_head, start, end, i,
            NUM_KV_HEADS, HEAD_SIZE, BLOCK_SIZE, KEYS,
        )  # fmt: skip
    blocks = _blocks(table_ptr, begin + STAGES * KEYS, end, BLOCK_SIZE, KEYS)  # one turn ahead of their use

    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [1, 1], [16, _COLUMNS])
    Q_LAYOUT: gl.constexpr = gl.DotOperandLayout(1, LAYOUT, 2)
    row_R = gl.arange(0, _COLUMNS, layout=gl.SliceLayout(0, Q_LAYOUT))
    column_D = gl.arange(0, HEAD_SIZE, layout=gl.SliceLayout(1, Q_LAYOUT))
    q_R = first_token.to(gl.int64) * q_stride_t + (kv_head * GROUP + row_R) * q_stride_n
    q_DR = gl.load(q_ptr + q_R[None, :] + column_D[:, None], mask=(row_R < GROUP)[None, :], other=0.0)
    acc_DR = gl.zeros([HEAD_SIZE, _COLUMNS], gl.float32, LAYOUT)
    max_R = gl.full([_COLUMNS], _HIDDEN, gl.float32, gl.SliceLayout(0, LAYOUT)) * score_scale
    sum_TR = gl.zeros([KEYS, _COLUMNS], gl.float32, LAYOUT)
    stage = 0
    phase = 0
    last_start = begin + (end - begin - 1) // KEYS * KEYS
    for start in range(begin, last_start, KEYS):
        acc_DR, max_R, sum_TR = _turn(
            k_tiles.index(stage), v_tiles.index(stage), k_full.index(stage), v_full.index(stage), phase,
            q_DR, acc_DR, max_R, sum_TR, score_scale, start, end, False, KEYS, LAYOUT,
        )  # fmt: skip
        new = start + STAGES * KEYS
        _bring(
            kv_desc, k_boxes, v_boxes, k_full, v_full, blocks, kv_head, new, end, stage,
            NUM_KV_HEADS, HEAD_SIZE, BLOCK_SIZE, KEYS,
        )  # fmt: skip
        blocks = _blocks(table_ptr, new + KEYS, end, BLOCK_SIZE, KEYS)
        stage += 1
        if stage == STAGES:
            stage = 0
            phase ^= 1
    acc_DR, max_R, sum_TR = _turn(
        k_tiles.index(stage), v_tiles.index(stage), k_full.index(stage), v_full.index(stage), phase,
        q_DR, acc_DR, max_R, sum_TR, score_scale, last_start, end, True, KEYS, LAYOUT,
    )  # fmt: skip

    sum_R = gl.sum(sum_TR, 0)
    R_D: gl.constexpr = gl.BlockedLayout([1, HEAD_SIZE // 32], [1, 32], [1, 1], [1, 0])
    acc_RD = gl.convert_layout((acc_DR / sum_R[None, :]).permute([1, 0]), R_D)
    if slot < 0:
        _store(o_ptr, acc_RD, (first_token * NUM_KV_HEADS + kv_head) * GROUP, GROUP, R_D)
    else:
        first_row = (slot * NUM_KV_HEADS + kv_head) * partial_rows
        lse_row_R = gl.arange(0, _COLUMNS, layout=gl.SliceLayout(0, LAYOUT))
        gl.store(partial_lse_ptr + first_row + lse_row_R, max_R + gl.log2(sum_R), mask=lse_row_R < GROUP)
        _store(partial_o_ptr, acc_RD, first_row, GROUP, R_D)
        entry = gl.load(item_ptr + 7)
        first_slot = gl.load(merges_ptr + entry * 4 + 2)
        num_slots = gl.load(merges_ptr + entry * 4 + 3)
        arrivals_ptr += entry * NUM_KV_HEADS + kv_head
        # All threads' results are written before one of them counts this program in; whoever counts last sees all.
        gl.thread_barrier()
        if gl.atomic_add(arrivals_ptr, 1, sem="acq_rel") == num_slots - 1:
            gl.store(arrivals_ptr, 0)  # for the next layer
            _merge_slots(
                o_ptr, partial_o_ptr, partial_lse_ptr, first_token, first_slot, num_slots, kv_head, partial_rows,
                NUM_KV_HEADS, GROUP, HEAD_SIZE, MERGE_ROWS, MERGE_SLOTS,
            )  # fmt: skip


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
    tile: GluonTile,
    *,
    scale: float,
    window: int | None = None,
) -> None:
    """As `quire.kernels.triton.attention.attend` for items of one token each, where `supports_decode` and `takes` are true.

    An item's first key is a multiple of tile.num_keys. Raises ValueError for what it does not compute.
    """
    num_heads, head_size = q_TND.shape[1:]
    num_blocks, _, num_kv_heads, block_size = kv_B2KSD.shape[:4]
    group = num_heads // num_kv_heads
    check_layout(kv_B2KSD)
    if partial_rows != group:
        raise ValueError(f"items are of one token each: partial results have {group} rows, not {partial_rows}")
    if group > MAX_DECODE_GROUP or window is not None:
        raise ValueError(
            f"the kernel takes up to {MAX_DECODE_GROUP} heads a group and no window, not {group} and {window}"
        )
    parts, width = head_size // _WIDTH.value, _WIDTH.value
    kv_desc = TensorDescriptor(
        kv_B2KSD, [num_blocks, 2 * num_kv_heads, parts, block_size, width],
        [kv_B2KSD.stride(0), block_size * head_size, width, head_size, 1],
        [1, 1, parts, min(block_size, tile.num_keys), width], gl.NVMMASharedLayout(128, 16, rank=5),
    )  # fmt: skip
    merge_rows = choose_merge_rows(tile, group, partial_rows)
    _attend[(grid_items * num_kv_heads,)](
        q_TND, kv_B2KSD, kv_desc, block_tables_SB, o_TND, partial_o, partial_lse, items_I8, count_1, merges_E4, arrivals_EK,
        scale * LOG2_E, *q_TND.stride()[:2], block_tables_SB.stride(0), partial_rows, num_blocks, kv_B2KSD.stride(0),
        NUM_KV_HEADS=num_kv_heads, GROUP=group, HEAD_SIZE=head_size, BLOCK_SIZE=block_size,
        KEYS=tile.num_keys, STAGES=tile.num_stages, MERGE_ROWS=merge_rows, MERGE_SLOTS=choose_merge_slots(tile, merge_rows),
        num_warps=1, **dependent.options(q_TND.device),
    )  # fmt: skip
