"""Attention through block tables for Hopper, in Gluon: the twin of `attend` in `quire.kernels.triton.attention` for high tiles.

A program (one of each multiprocessor) computes items of the work list in turn: each time that it is through with one it draws
the next, so that all end together, and loads for the next begin before the last's output is written. Its warps have parts:

    leader      draws items; queries and keys    -- TMA: one box for each block and 64 elements of the head -->  shared memory
    producer    values                           -- the same -->
    consumer 0  rows 0 to 63                     scores of tile i | softmax of tile i           | scores of tile i + 1 ...
    consumer 1  rows 64 to 127                                    | scores of tile i | softmax  | ...

Consumers take turns in handing products to the matrix units, those of tile i's scores and of tile i - 1's probabilities
with its values, so that one's softmax runs beside the other's products (the ping-pong of FlashAttention-3: Shah et al. 2024,
arXiv 2407.08608, section 3.1). Keys are taken from the end to the begin: masked tiles come first, the others need no test.

A slot that holds no token may hold NaN, and what TMA brings into shared memory is multiplied, if by zero. So nothing beyond
the end is brought. In the last block that has keys, of which `count` are to be seen, the box begins before the block:

    rows of the box   0 ... size - count - 1     size - count ... size - 1
    slots             before the first: zeros    0 ... count - 1

and `_hide` knows that its keys lie so much higher. (Where blocks are larger than tiles, what comes first are other keys, which
`_hide` hides.) Boxes beyond are aimed at a block that doesn't exist, and are zeros.

Letters of shapes: as in `quire.kernels.triton.attention`; R the rows of one consumer, T the keys of a tile.
"""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from quire.kernels.gluon import GluonTile
from quire.kernels.gluon.ptx import asm, narrow
from quire.kernels.triton import dependent
from quire.kernels.triton.attention import LOG2_E, check_layout

CONSUMERS = 2
REGISTERS = {"consumer": 232, "producer": 40}
"""Of a thread; producers are two warps, and take registers for four."""
_CONSUMERS = gl.constexpr(CONSUMERS)
_CONSUMER_REGISTERS = gl.constexpr(REGISTERS["consumer"])
_PRODUCER_REGISTERS = gl.constexpr(REGISTERS["producer"])
_WIDTH = gl.constexpr(64)
"""Elements of a row of a box: what the matrix units' swizzle spans."""
_HIDDEN = gl.constexpr(-(2.0**100))  # as in the Triton kernel
_NOWHERE = gl.constexpr(1 << 30)
"""No block, no position."""
_FIRST_BARRIER = gl.constexpr(14)
"""Named barriers of the consumers' turns, 14 and 15: the compiler counts from 0."""


@gluon.constexpr_function
def _await_turn(which):
    return f"bar.sync {_FIRST_BARRIER.value + which}, 256; // $0"


@gluon.constexpr_function
def _pass_turn(which):
    return f"bar.arrive {_FIRST_BARRIER.value + 1 - which}, 256; // $0"


@gluon.jit
def _item(program, count, items_ptr, NUM_KV_HEADS: gl.constexpr, HEAD_RUN: gl.constexpr):
    """The key/value head that is program's, and where its item lies. The last run of items may be a shorter one."""
    run = program // (HEAD_RUN * NUM_KV_HEADS)
    within = program - run * (HEAD_RUN * NUM_KV_HEADS)
    size = gl.minimum(count - run * HEAD_RUN, HEAD_RUN)
    return within // size, items_ptr + (run * HEAD_RUN + within % size) * 8


@gluon.jit
def _give(programs, given, taken, turn, program, LAYOUT: gl.constexpr):
    """The leader tells the other warps which program is the turn-th."""
    place = turn & 1
    mbarrier.wait(taken.index(place), (turn >> 1) & 1 ^ 1)
    programs.index(place).store(gl.full([1], 0, gl.int32, LAYOUT) + program)
    mbarrier.arrive(given.index(place))


@gluon.jit
def _take(programs, given, taken, turn, LAYOUT: gl.constexpr):
    place = turn & 1
    mbarrier.wait(given.index(place), (turn >> 1) & 1)
    program = gl.max(programs.index(place).load(LAYOUT), 0)
    mbarrier.arrive(taken.index(place))
    return program


@gluon.jit
def _load_tile(
    kv_desc, boxes, full, empty, table_ptr, row, start, end, tile,
    BLOCK_SIZE: gl.constexpr, HEAD_SIZE: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr, LAST: gl.constexpr,
):  # fmt: skip
    """Keys or values from `start`; LAST: some may lie beyond `end`. `row`: the head, and behind all heads' keys are values."""
    BOX: gl.constexpr = min(BLOCK_SIZE, KEYS)
    BOXES: gl.constexpr = KEYS // BOX
    PARTS: gl.constexpr = HEAD_SIZE // _WIDTH
    stage = tile % STAGES
    blocks = ()
    for j in gl.static_range(BOXES):  # all of them before any is used
        key = start + j * BOX
        if LAST:
            blocks = blocks + (gl.load(table_ptr + key // BLOCK_SIZE, mask=key < end, other=0),)  # noqa: RUF005
        else:
            blocks = blocks + (gl.load(table_ptr + key // BLOCK_SIZE),)  # noqa: RUF005
    mbarrier.wait(empty.index(stage), (tile // STAGES) & 1 ^ 1)
    mbarrier.expect(full.index(stage), KEYS * HEAD_SIZE * 2)
    for j in gl.static_range(BOXES):
        key = start + j * BOX
        block = blocks[j]
        if BLOCK_SIZE > BOX:
            slot = key % BLOCK_SIZE
        else:
            slot = 0
        if LAST:
            block = gl.where(key < end, block, _NOWHERE)
            slot = slot - gl.maximum(gl.minimum(key + BOX - end, BOX), 0)
        for part in gl.static_range(PARTS):
            tma.async_copy_global_to_shared(
                kv_desc,
                [block, row, slot, part * _WIDTH],
                full.index(stage),
                boxes.index((stage * PARTS + part) * BOXES + j),
            )


@gluon.jit
def _produce(
    q_desc, kv_desc, tables_ptr, items_ptr, count_ptr, drawn_ptr, q_boxes, boxes, q_full, q_empty, full, empty,
    programs, given, taken, table_stride, LEADER: gl.constexpr,
    NUM_KV_HEADS: gl.constexpr, GROUP: gl.constexpr, HEAD_SIZE: gl.constexpr, BLOCK_SIZE: gl.constexpr,
    ROWS: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr, HEAD_RUN: gl.constexpr,
):  # fmt: skip
    """The leader brings queries and keys, the other values."""
    BOX: gl.constexpr = min(BLOCK_SIZE, KEYS)
    PARTS: gl.constexpr = HEAD_SIZE // _WIDTH
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    count = gl.load(count_ptr)
    total = count * NUM_KV_HEADS
    tile = 0
    turn = 0
    if LEADER:
        program = gl.program_id(0)
        _give(programs, given, taken, 0, program, ONE)
    else:
        program = _take(programs, given, taken, 0, ONE)
    while program < total:
        kv_head, item_ptr = _item(program, count, items_ptr, NUM_KV_HEADS, HEAD_RUN)
        sequence = gl.load(item_ptr)
        first_token = gl.load(item_ptr + 1)
        begin = gl.load(item_ptr + 4) // BOX * BOX
        end = gl.load(item_ptr + 5)
        num_tiles = (end - begin + KEYS - 1) // KEYS
        table_ptr = tables_ptr + sequence.to(gl.int64) * table_stride
        row = kv_head
        if LEADER:
            program = gl.num_programs(0) + gl.atomic_add(drawn_ptr, 1, sem="relaxed")
            place = turn & 1
            mbarrier.wait(q_empty.index(place), (turn >> 1) & 1 ^ 1)
            mbarrier.expect(q_full.index(place), _CONSUMERS * ROWS * HEAD_SIZE * 2)
            for c in gl.static_range(_CONSUMERS):
                for part in gl.static_range(PARTS):
                    tma.async_copy_global_to_shared(
                        q_desc, [first_token + c * (ROWS // GROUP), kv_head * GROUP, part * _WIDTH], q_full.index(place),
                        q_boxes.index((place * _CONSUMERS + c) * PARTS + part),
                    )  # fmt: skip
        else:
            row += NUM_KV_HEADS
        start = begin + (num_tiles - 1) * KEYS
        _load_tile(
            kv_desc, boxes, full, empty, table_ptr, row, start, end, tile, BLOCK_SIZE, HEAD_SIZE, KEYS, STAGES, True
        )
        for i in range(1, num_tiles):
            _load_tile(
                kv_desc, boxes, full, empty, table_ptr, row, start - i * KEYS, end, tile + i,
                BLOCK_SIZE, HEAD_SIZE, KEYS, STAGES, False,
            )  # fmt: skip
        tile += num_tiles
        turn += 1
        if LEADER:
            _give(programs, given, taken, turn, program, ONE)
        else:
            program = _take(programs, given, taken, turn, ONE)
    if LEADER:  # noqa: SIM102  # whoever ends last, when nobody draws any more, leaves the counts as they were
        if gl.atomic_add(drawn_ptr + 1, 1, sem="acq_rel") == gl.num_programs(0) - 1:
            gl.store(drawn_ptr, 0)
            gl.store(drawn_ptr + 1, 0)


@gluon.jit
def _hide(
    score_RT, start, begin, end, window, position_R,
    BOX: gl.constexpr, KEYS: gl.constexpr, CAUSAL: gl.constexpr, HAS_WINDOW: gl.constexpr, S_LAYOUT: gl.constexpr,
):  # fmt: skip
    """Scores of the tile that begins at `start`, without those that a row doesn't see. Position by position, key_T says which
    key lies there: those of the last box lie higher than they should (see the module)."""
    place_T = start + gl.arange(0, KEYS, layout=gl.SliceLayout(0, S_LAYOUT))
    last = (end - 1) // BOX * BOX
    moved_T = place_T - (last + BOX - end)
    key_T = gl.where(place_T < last, place_T, gl.where((moved_T >= last) & (moved_T < end), moved_T, _NOWHERE))
    if HAS_WINDOW:
        key_T = gl.where(key_T >= begin, key_T, _NOWHERE)
    if CAUSAL:
        seen_RT = key_T[None, :] <= position_R[:, None]
    else:
        seen_RT = key_T[None, :] < (position_R * 0 + _NOWHERE)[:, None]
    if HAS_WINDOW:
        seen_RT = seen_RT & (key_T[None, :] > position_R[:, None] - window)
    return gl.where(seen_RT, score_RT, _HIDDEN)


@gluon.jit
def _softmax(score_RT, max_R, sum_R, score_scale):
    new_max_R = gl.maximum(max_R, gl.max(score_RT, 1) * score_scale)
    p_RT = gl.exp2(score_RT * score_scale - new_max_R[:, None])
    decay_R = gl.exp2(max_R - new_max_R)
    return p_RT, new_max_R, sum_R * decay_R + gl.sum(p_RT, 1), decay_R


@gluon.jit
def _turn(
    tile, q, k_tiles, v_tiles, k_full, k_empty, v_full, v_empty, acc_RD, p_RT, max_R, sum_R, score_scale,
    start, begin, end, window, position_R,
    WHICH: gl.constexpr, BOX: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr,
    HAS_WINDOW: gl.constexpr, MASKED: gl.constexpr, S_LAYOUT: gl.constexpr, P_LAYOUT: gl.constexpr,
):  # fmt: skip
    """Scores and probabilities of this tile; the product of those of the tile before, p, with its values."""
    ROWS: gl.constexpr = q.shape[0]
    stage = tile % STAGES
    before = (tile - 1) % STAGES  # never below 0: the first tile has no turn
    mbarrier.wait(k_full.index(stage), (tile // STAGES) & 1)
    asm(_await_turn(WHICH))
    score_RT = gl.zeros([ROWS, KEYS], gl.float32, S_LAYOUT)
    score_RT = warpgroup_mma(q, k_tiles.index(stage).permute([1, 0]), score_RT, use_acc=False, is_async=True)
    mbarrier.wait(v_full.index(before), ((tile - 1) // STAGES) & 1)
    acc_RD = warpgroup_mma(p_RT, v_tiles.index(before), acc_RD, is_async=True)
    asm(_pass_turn(WHICH))
    score_RT = warpgroup_mma_wait(1, [score_RT])
    mbarrier.arrive(k_empty.index(stage))
    if MASKED:
        score_RT = _hide(score_RT, start, begin, end, window, position_R, BOX, KEYS, CAUSAL, HAS_WINDOW, S_LAYOUT)
    new_RT, max_R, sum_R, decay_R = _softmax(score_RT, max_R, sum_R, score_scale)
    acc_RD, p_RT = warpgroup_mma_wait(0, [acc_RD, p_RT])
    mbarrier.arrive(v_empty.index(before))
    acc_RD = acc_RD * gl.convert_layout(decay_R, gl.SliceLayout(1, acc_RD.type.layout))[:, None]
    p_RT = gl.convert_layout(narrow(new_RT, k_tiles.dtype), P_LAYOUT)
    return acc_RD, p_RT, max_R, sum_R


@gluon.jit
def _consume(
    o_ptr, partial_o_ptr, partial_lse_ptr, items_ptr, count_ptr, q_tiles, k_tiles, v_tiles, q_full, q_empty,
    k_full, k_empty, v_full, v_empty, programs, given, taken, score_scale, window, partial_rows, WHICH: gl.constexpr,
    NUM_KV_HEADS: gl.constexpr, GROUP: gl.constexpr, HEAD_SIZE: gl.constexpr, BLOCK_SIZE: gl.constexpr,
    ROWS: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr, HEAD_RUN: gl.constexpr,
    CAUSAL: gl.constexpr, HAS_WINDOW: gl.constexpr,
):  # fmt: skip
    BOX: gl.constexpr = min(BLOCK_SIZE, KEYS)
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_SIZE, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    if WHICH == 1:
        asm(_pass_turn(WHICH))  # consumer 0 is first
    count = gl.load(count_ptr)
    total = count * NUM_KV_HEADS
    tile = 0
    turn = 0
    program = _take(programs, given, taken, 0, ONE)
    while program < total:
        kv_head, item_ptr = _item(program, count, items_ptr, NUM_KV_HEADS, HEAD_RUN)
        num_tokens = gl.load(item_ptr + 2)
        first_position = gl.load(item_ptr + 3)
        begin = gl.load(item_ptr + 4)
        end = gl.load(item_ptr + 5)
        start = begin // BOX * BOX
        num_tiles = (end - start + KEYS - 1) // KEYS
        # Of all tiles, from the last to the first, num_right are masked for their end, num_left for their begin.
        unmasked_end = gl.minimum(end, first_position + 1) if CAUSAL else end
        num_right = gl.maximum(num_tiles - gl.maximum(unmasked_end - start, 0) // KEYS, 1)
        if HAS_WINDOW:
            unmasked_begin = gl.maximum(begin, first_position + num_tokens - window)
            num_left = gl.maximum(unmasked_begin - start + KEYS - 1, 0) // KEYS
        else:
            num_left = 0
        left = gl.maximum(num_tiles - num_left, num_right)
        last_start = start + (num_tiles - 1) * KEYS
        row_R = WHICH * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, S_LAYOUT))
        position_R = first_position + row_R // GROUP

        q = q_tiles.index((turn & 1) * _CONSUMERS + WHICH)
        mbarrier.wait(q_full.index(turn & 1), (turn >> 1) & 1)
        stage = tile % STAGES
        mbarrier.wait(k_full.index(stage), (tile // STAGES) & 1)
        score_RT = gl.zeros([ROWS, KEYS], gl.float32, S_LAYOUT)
        score_RT = warpgroup_mma(q, k_tiles.index(stage).permute([1, 0]), score_RT, use_acc=False, is_async=True)
        score_RT = warpgroup_mma_wait(0, [score_RT])
        mbarrier.arrive(k_empty.index(stage))
        score_RT = _hide(score_RT, last_start, begin, end, window, position_R, BOX, KEYS, CAUSAL, HAS_WINDOW, S_LAYOUT)
        # A row that has seen no key yet counts hidden ones; the first that it sees weighs those by 2^-huge = 0.
        max_R = gl.full([ROWS], _HIDDEN, gl.float32, gl.SliceLayout(1, S_LAYOUT)) * score_scale
        sum_R = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, S_LAYOUT))
        p_RT, max_R, sum_R, _ = _softmax(score_RT, max_R, sum_R, score_scale)
        p_RT = gl.convert_layout(narrow(p_RT, k_tiles.dtype), P_LAYOUT)
        acc_RD = gl.zeros([ROWS, HEAD_SIZE], gl.float32, O_LAYOUT)
        for i in range(1, num_right):
            acc_RD, p_RT, max_R, sum_R = _turn(
                tile + i, q, k_tiles, v_tiles, k_full, k_empty, v_full, v_empty, acc_RD, p_RT, max_R, sum_R, score_scale,
                last_start - i * KEYS, begin, end, window, position_R,
                WHICH, BOX, KEYS, STAGES, CAUSAL, HAS_WINDOW, True, S_LAYOUT, P_LAYOUT,
            )  # fmt: skip
        for i in range(num_right, left):
            acc_RD, p_RT, max_R, sum_R = _turn(
                tile + i, q, k_tiles, v_tiles, k_full, k_empty, v_full, v_empty, acc_RD, p_RT, max_R, sum_R, score_scale,
                0, begin, end, window, position_R,
                WHICH, BOX, KEYS, STAGES, CAUSAL, HAS_WINDOW, False, S_LAYOUT, P_LAYOUT,
            )  # fmt: skip
        if HAS_WINDOW:
            for i in range(left, num_tiles):
                acc_RD, p_RT, max_R, sum_R = _turn(
                    tile + i, q, k_tiles, v_tiles, k_full, k_empty, v_full, v_empty, acc_RD, p_RT, max_R, sum_R, score_scale,
                    last_start - i * KEYS, begin, end, window, position_R,
                    WHICH, BOX, KEYS, STAGES, CAUSAL, HAS_WINDOW, True, S_LAYOUT, P_LAYOUT,
                )  # fmt: skip
        mbarrier.arrive(q_empty.index(turn & 1))
        tile += num_tiles
        stage = (tile - 1) % STAGES
        mbarrier.wait(v_full.index(stage), ((tile - 1) // STAGES) & 1)
        acc_RD = warpgroup_mma(p_RT, v_tiles.index(stage), acc_RD, is_async=True)
        acc_RD, p_RT = warpgroup_mma_wait(0, [acc_RD, p_RT])
        mbarrier.arrive(v_empty.index(stage))

        first_token = gl.load(item_ptr + 1)
        slot = gl.load(item_ptr + 6)
        row_R = WHICH * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, O_LAYOUT))
        column_D = gl.arange(0, HEAD_SIZE, layout=gl.SliceLayout(0, O_LAYOUT))
        valid_R = row_R // GROUP < num_tokens
        acc_RD = acc_RD / gl.convert_layout(sum_R, gl.SliceLayout(1, O_LAYOUT))[:, None]
        if slot < 0:
            token_R = (first_token + row_R // GROUP).to(gl.int64)
            o_row_R = token_R * (NUM_KV_HEADS * GROUP) + kv_head * GROUP + row_R % GROUP
            gl.store(
                o_ptr + (o_row_R * HEAD_SIZE)[:, None] + column_D[None, :],
                acc_RD.to(o_ptr.dtype.element_ty), mask=valid_R[:, None],
            )  # fmt: skip
        else:
            partial_row = (slot * NUM_KV_HEADS + kv_head).to(gl.int64) * partial_rows
            lse_R = gl.convert_layout(max_R + gl.log2(sum_R), gl.SliceLayout(1, O_LAYOUT))
            gl.store(partial_lse_ptr + partial_row + row_R, lse_R, mask=valid_R)
            gl.store(
                partial_o_ptr + partial_row * HEAD_SIZE + (row_R * HEAD_SIZE)[:, None] + column_D[None, :],
                acc_RD, mask=valid_R[:, None],
            )  # fmt: skip
        turn += 1
        program = _take(programs, given, taken, turn, ONE)


# What changes from step to step is not specialised on, as in the Triton kernel.
@gluon.jit(
    do_not_specialize=["window", "table_stride", "partial_rows"],
    do_not_specialize_on_alignment=["tables_ptr", "items_ptr", "count_ptr", "drawn_ptr"],
)
def _attend(
    q_desc, kv_desc, tables_ptr, o_ptr, partial_o_ptr, partial_lse_ptr, items_ptr, count_ptr, drawn_ptr,
    score_scale, window, table_stride, partial_rows,
    NUM_KV_HEADS: gl.constexpr, GROUP: gl.constexpr, HEAD_SIZE: gl.constexpr, BLOCK_SIZE: gl.constexpr,
    ROWS: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr, HEAD_RUN: gl.constexpr,
    CAUSAL: gl.constexpr, HAS_WINDOW: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """ROWS: of one consumer. score_scale turns scores into exponents of 2."""
    if PDL:
        asm("griddepcontrol.launch_dependents; // $0")
        asm("griddepcontrol.wait; // $0")  # and all other warps for this one
    BOX: gl.constexpr = min(BLOCK_SIZE, KEYS)
    PARTS: gl.constexpr = HEAD_SIZE // _WIDTH
    dtype: gl.constexpr = kv_desc.dtype
    # In memory, box after box is what the matrix units take as rows of keys, part after part of the head.
    FLAT: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    KV_BOXES: gl.constexpr = [STAGES * PARTS * (KEYS // BOX), 1, 1, BOX, _WIDTH]
    q_boxes = gl.allocate_shared_memory(dtype, [2 * _CONSUMERS * PARTS, ROWS // GROUP, GROUP, _WIDTH], q_desc.layout)
    k_boxes = gl.allocate_shared_memory(dtype, KV_BOXES, kv_desc.layout)
    v_boxes = gl.allocate_shared_memory(dtype, KV_BOXES, kv_desc.layout)
    q_tiles = q_boxes._reinterpret(dtype, [2 * _CONSUMERS, ROWS, HEAD_SIZE], FLAT)
    k_tiles = k_boxes._reinterpret(dtype, [STAGES, KEYS, HEAD_SIZE], FLAT)
    v_tiles = v_boxes._reinterpret(dtype, [STAGES, KEYS, HEAD_SIZE], FLAT)
    programs = gl.allocate_shared_memory(gl.int32, [2, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    given = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    taken = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    q_empty = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    for place in gl.static_range(2):
        mbarrier.init(given.index(place), 1)
        mbarrier.init(taken.index(place), _CONSUMERS + 1)
        mbarrier.init(q_full.index(place), 1)
        mbarrier.init(q_empty.index(place), _CONSUMERS)
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_full.index(stage), 1)
        mbarrier.init(k_empty.index(stage), _CONSUMERS)
        mbarrier.init(v_full.index(stage), 1)
        mbarrier.init(v_empty.index(stage), _CONSUMERS)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_consume, (
                o_ptr, partial_o_ptr, partial_lse_ptr, items_ptr, count_ptr, q_tiles, k_tiles, v_tiles, q_full, q_empty,
                k_full, k_empty, v_full, v_empty, programs, given, taken, score_scale, window, partial_rows, gl.constexpr(0),
                NUM_KV_HEADS, GROUP, HEAD_SIZE, BLOCK_SIZE, ROWS, KEYS, STAGES, HEAD_RUN, CAUSAL, HAS_WINDOW,
            )),
            (_consume, (
                o_ptr, partial_o_ptr, partial_lse_ptr, items_ptr, count_ptr, q_tiles, k_tiles, v_tiles, q_full, q_empty,
                k_full, k_empty, v_full, v_empty, programs, given, taken, score_scale, window, partial_rows, gl.constexpr(1),
                NUM_KV_HEADS, GROUP, HEAD_SIZE, BLOCK_SIZE, ROWS, KEYS, STAGES, HEAD_RUN, CAUSAL, HAS_WINDOW,
            )),
            (_produce, (
                q_desc, kv_desc, tables_ptr, items_ptr, count_ptr, drawn_ptr, q_boxes, k_boxes, q_full, q_empty, k_full,
                k_empty, programs, given, taken, table_stride, gl.constexpr(True),
                NUM_KV_HEADS, GROUP, HEAD_SIZE, BLOCK_SIZE, ROWS, KEYS, STAGES, HEAD_RUN,
            )),
            (_produce, (
                q_desc, kv_desc, tables_ptr, items_ptr, count_ptr, drawn_ptr, q_boxes, v_boxes, q_full, q_empty, v_full,
                v_empty, programs, given, taken, table_stride, gl.constexpr(False),
                NUM_KV_HEADS, GROUP, HEAD_SIZE, BLOCK_SIZE, ROWS, KEYS, STAGES, HEAD_RUN,
            )),
        ],
        [4, 1, 1], [_CONSUMER_REGISTERS, _PRODUCER_REGISTERS, _PRODUCER_REGISTERS],
    )  # fmt: skip


def attend(
    q_TND: Tensor,
    kv_B2KSD: Tensor,
    block_tables_SB: Tensor,
    o_TND: Tensor,
    items_I8: Tensor,
    count_1: Tensor,
    drawn_2: Tensor,
    grid_items: int,
    partial_o: Tensor,
    partial_lse: Tensor,
    partial_rows: int,
    tile: GluonTile,
    *,
    scale: float,
    window: int | None = None,
    causal: bool = True,
) -> None:
    """As `quire.kernels.triton.attention.attend` for high tiles, where `supports` and `takes` are true.

    drawn_2, int32 on the device, is zeros, before and after. Without a window, an item's first key is a multiple of
    tile.num_keys. For all programs that grid_items stands for there are as many as there are multiprocessors, or fewer.
    """
    num_heads, head_size = q_TND.shape[1:]
    num_blocks, _, num_kv_heads, block_size = kv_B2KSD.shape[:4]
    group, rows = num_heads // num_kv_heads, tile.num_rows // CONSUMERS
    check_layout(kv_B2KSD)
    q_desc = TensorDescriptor(
        q_TND, [*q_TND.shape], [*q_TND.stride()], [rows // group, group, _WIDTH.value],
        gl.NVMMASharedLayout(128, 16, rank=3),
    )  # fmt: skip
    kv_desc = TensorDescriptor(
        kv_B2KSD, [num_blocks, 2 * num_kv_heads, block_size, head_size],
        [kv_B2KSD.stride(0), block_size * head_size, head_size, 1], [1, 1, min(block_size, tile.num_keys), _WIDTH.value],
        gl.NVMMASharedLayout(128, 16, rank=4),
    )  # fmt: skip
    num_sms = torch.cuda.get_device_properties(q_TND.device).multi_processor_count
    _attend[(min(grid_items * num_kv_heads, num_sms),)](
        q_desc, kv_desc, block_tables_SB, o_TND, partial_o, partial_lse, items_I8, count_1, drawn_2,
        scale * LOG2_E, window or 0, block_tables_SB.stride(0), partial_rows,
        NUM_KV_HEADS=num_kv_heads, GROUP=group, HEAD_SIZE=head_size, BLOCK_SIZE=block_size,
        ROWS=rows, KEYS=tile.num_keys, STAGES=tile.num_stages, HEAD_RUN=tile.head_run,
        CAUSAL=causal, HAS_WINDOW=window is not None, num_warps=4, **dependent.options(q_TND.device),
    )  # fmt: skip
