"""Linear layers on Hopper, in Gluon: twins of `linear_pieces` (up to 256 tokens) and `linear_silu_mul` (any number) in
`quire.kernels.triton.linear`, which round in the same places.

With tens of tokens multiplying takes about as long as reading the weights, so both have to run at their full rate at once, on
all multiprocessors, in one go. A program's warps have parts:

    producer    weights and tokens, 64 inputs in each turn   -- TMA -->   shared memory, a ring of stages
    consumers   64 rows of one times all rows of the other, in sums that stay in registers

    linear_pieces     one consumer: 64 outputs times all tokens, over one piece of the inputs. Tiles are small so that they fill
                      the multiprocessors; the price is that each reads all tokens, from L2.
    linear_silu_mul   2 or 3 consumers, each with 64 tokens: times a tile of gate rows and the up rows that belong to them. A
                      thread has the gate and the up of an output. Where one tile of tokens is all, those of weights are
                      such that all run at once if they can (14,336 outputs are 128 tiles of 112); else a program computes
                      several tiles, and loads for the next begin before the last is through.

What goes through shared memory lies there in boxes of 16 rows of 64 inputs (2 KiB, in the matrix units' swizzle), so that any
multiple of 16 rows can stand beside 64: the matrix units take them in parts, which are powers of two.

Barriers, for a program's turn t, which uses stage t % S: `full` ends its (t // S)-th phase when all that the turn needs has
come; `empty` when all consumers are through with it.

Letters of shapes: T tokens, H inputs, O outputs (or pairs of gate and up), P pieces; N rows beside the 64.
"""

import torch
import triton
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

from quire.kernels.gluon import MAX_PAIRS, MAX_TOKENS, LinearTile, choose_linear_tile
from quire.kernels.gluon.ptx import asm, narrow, reciprocal
from quire.kernels.triton import dependent
from quire.kernels.triton.linear import PROGRAMS

_WIDTH = gl.constexpr(64)
"""Inputs of a turn: what the matrix units' swizzle spans."""
_BOX = gl.constexpr(16)
_BOXES = gl.constexpr(4)
"""Of 64 rows."""
_FLAT = gl.constexpr(gl.NVMMASharedLayout(128, 16, rank=2))
_FIVE = gl.constexpr(gl.NVMMASharedLayout(128, 16, rank=5))
_GROUP = gl.constexpr(16)
"""Tiles of tokens that take turns at a tile of weights."""
_LOG2_E = gl.constexpr(1.4426950408889634)
SHARED_BYTES = 230_000
MAX_STAGES = 8
REGISTERS = {2: (232, 40), 3: (160, 32)}
"""By consumers of a program: of a thread of theirs, and of the others."""


@gluon.constexpr_function
def _parts(count):
    """Powers of two from 16 to 128, the largest first, that add up to count, a multiple of 16."""
    return [128] * (count // 128) + [part for part in (64, 32, 16) if count & part]


@gluon.constexpr_function
def _num_parts(count):
    return len(_parts(count))


@gluon.constexpr_function
def _part(count, i):
    return _parts(count)[i]


@gluon.constexpr_function
def _start(count, i):
    return sum(_parts(count)[:i])


@gluon.constexpr_function
def _layout(count, i):
    """Of the sums of a part."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, _parts(count)[i], 16])


@gluon.constexpr_function
def _operand(count, i):
    """Of the 64 rows, where the matrix units take them from registers."""
    return gl.DotOperandLayout(0, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, _parts(count)[i], 16]), 2)


@gluon.constexpr_function
def _rows_layout(columns):
    """The matrix units' sums with columns in another order: four neighbours are one thread's, and sixteen its quad's."""
    further = [[0, 1 << bit] for bit in range(4, 8) if 1 << bit < columns]
    lanes, warps = [[0, 4], [0, 8], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]]
    return gl.DistributedLinearLayout([[0, 1], [0, 2], [8, 0], *further], lanes, warps, [], [64, columns])


@gluon.constexpr_function
def _descriptor(count, i):
    """Which of those of 64, 32 and 16 rows is for half of a part."""
    return {128: 0, 64: 1, 32: 2}[_parts(count)[i]]


@gluon.jit
def _load(desc, rest_desc, boxes, place, full, row, at, ROWS: gl.constexpr):
    """ROWS rows from `row`, 64 inputs from `at`, into boxes from `place`: 64 rows at once, and 16 at once of the rest."""
    WHOLE: gl.constexpr = ROWS // 64
    for i in gl.static_range(WHOLE):
        target = boxes.index(place + i * _BOXES)._reinterpret(boxes.dtype, [64, _WIDTH], _FLAT)
        tma.async_copy_global_to_shared(desc, [row + i * 64, at], full, target)
    for i in gl.static_range(WHOLE * _BOXES, ROWS // _BOX):
        tma.async_copy_global_to_shared(rest_desc, [row + i * _BOX, at], full, boxes.index(place + i))


@gluon.jit
def _sum_up(
    a_boxes, b_boxes, full, empty, first, turns,
    A_STAGE: gl.constexpr, A_FIRST: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr, IN_REGISTERS: gl.constexpr,
):  # fmt: skip
    """-> the parts of a b^T, fp32 [64, n] each, over `turns` turns from turn `first`. a: 64 rows from box A_FIRST of a stage's
    A_STAGE boxes; b: N rows.

    IN_REGISTERS: a is read from shared memory once, not by the product of each part; consumers have to be several then, for
    each waits for its own products in every turn. Else it waits for those of the turn before; that is for programs of one
    tile, which leave the last turn's stage as it is.
    """
    sums = ()
    for i in gl.static_range(_num_parts(N)):
        sums = sums + (gl.zeros([64, _part(N, i)], gl.float32, _layout(N, i)),)  # noqa: RUF005
    for turn in range(first, first + turns):
        stage = turn % STAGES
        mbarrier.wait(full.index(stage), (turn // STAGES) & 1)
        a = a_boxes.index(stage * A_STAGE + A_FIRST)._reinterpret(a_boxes.dtype, [64, _WIDTH], _FLAT)
        if IN_REGISTERS:
            a = a.load(_operand(N, 0))
        products = ()
        for i in gl.static_range(_num_parts(N)):
            box = b_boxes.index(stage * (N // _BOX) + _start(N, i) // _BOX)
            b = box._reinterpret(b_boxes.dtype, [_part(N, i), _WIDTH], _FLAT).permute([1, 0])
            if IN_REGISTERS:
                products = products + (warpgroup_mma(gl.convert_layout(a, _operand(N, i)), b, sums[i], is_async=True),)  # noqa: RUF005
            else:
                products = products + (warpgroup_mma(a, b, sums[i], is_async=True),)  # noqa: RUF005
        if IN_REGISTERS:
            sums = _await_all_but(0, products + (a,))[:-1]  # noqa: RUF005
            mbarrier.arrive(empty.index(stage))
        else:
            sums = _await_all_but(_num_parts(N), products)
            mbarrier.arrive(empty.index((turn + STAGES - 1) % STAGES), pred=turn > 0)
    return _await_all_but(0, sums)


@gluon.jit
def _await_all_but(count: gl.constexpr, products):
    """-> the products, as a tuple, when no more than `count` are under way."""
    if len(products) == 1:
        done = (warpgroup_mma_wait(count, products),)
    else:
        done = warpgroup_mma_wait(count, products)
    return done


@gluon.jit
def _barriers(STAGES: gl.constexpr, CONSUMERS: gl.constexpr):
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), 1)
        mbarrier.init(empty.index(stage), CONSUMERS)
    fence_async_shared()
    return full, empty


# -- linear_pieces ---------------------------------------------------------------------------------------------------------
@gluon.jit
def _produce_pieces(
    weight_desc, x_desc, x_rest_desc, weight_boxes, x_boxes, full, empty, tiles, turns,
    N: gl.constexpr, STAGES: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    BYTES: gl.constexpr = (64 + N) * _WIDTH * 2
    row = gl.program_id(0) % tiles * 64
    begin = gl.program_id(0) // tiles * turns
    for i in gl.static_range(STAGES):
        mbarrier.expect(full.index(i), BYTES)
        _load(weight_desc, weight_desc, weight_boxes, i * _BOXES, full.index(i), row, (begin + i) * _WIDTH, 64)
    if PDL:
        asm("griddepcontrol.wait; // $0")
    for j in gl.static_range(STAGES):
        _load(x_desc, x_rest_desc, x_boxes, j * (N // _BOX), full.index(j), 0, (begin + j) * _WIDTH, N)
    for turn in range(STAGES, turns):
        stage = turn % STAGES
        at = (begin + turn) * _WIDTH
        mbarrier.wait(empty.index(stage), (turn // STAGES) & 1 ^ 1)
        mbarrier.expect(full.index(stage), BYTES)
        _load(weight_desc, weight_desc, weight_boxes, stage * _BOXES, full.index(stage), row, at, 64)
        _load(x_desc, x_rest_desc, x_boxes, stage * (N // _BOX), full.index(stage), 0, at, N)


@gluon.jit
def _consume_pieces(
    out_ptr, num_tokens, weight_boxes, x_boxes, full, empty, num_outputs, tiles, turns, N: gl.constexpr, STAGES: gl.constexpr
):  # fmt: skip
    sums = _sum_up(weight_boxes, x_boxes, full, empty, 0, turns, _BOXES, 0, N, STAGES, False)
    row = gl.program_id(0) % tiles * 64
    piece_ptr = out_ptr + gl.program_id(0) // tiles * num_tokens * num_outputs
    for i in gl.static_range(_num_parts(N)):
        row_R = row + gl.arange(0, 64, layout=gl.SliceLayout(1, _layout(N, i)))
        token_N = _start(N, i) + gl.arange(0, _part(N, i), layout=gl.SliceLayout(0, _layout(N, i)))
        mask_RN = (row_R < num_outputs)[:, None] & (token_N < num_tokens)[None, :]
        gl.store(piece_ptr + (token_N * num_outputs)[None, :] + row_R[:, None], sums[i], mask=mask_RN)


# One compilation for each N serves all layers, but those with fewer turns than stages.
@gluon.jit(do_not_specialize=["num_tokens", "num_outputs", "tiles", "turns"])
def _linear_pieces(
    weight_desc, x_desc, x_rest_desc, out_ptr, num_tokens, num_outputs, tiles, turns,
    N: gl.constexpr, STAGES: gl.constexpr, REGISTERS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Program p * tiles + i: outputs [64 i, 64 (i + 1)) of N tokens, over `turns` turns of inputs from turn p * turns."""
    if PDL:
        asm("griddepcontrol.launch_dependents; // $0")
    dtype: gl.constexpr = x_desc.dtype
    weight_boxes = gl.allocate_shared_memory(dtype, [STAGES * _BOXES, _BOX, _WIDTH], _FLAT)
    x_boxes = gl.allocate_shared_memory(dtype, [STAGES * (N // _BOX), _BOX, _WIDTH], _FLAT)
    full, empty = _barriers(STAGES, 1)
    gl.warp_specialize(
        [
            (_consume_pieces, (
                out_ptr, num_tokens, weight_boxes, x_boxes, full, empty, num_outputs, tiles, turns, N, STAGES,
            )),
            (_produce_pieces, (
                weight_desc, x_desc, x_rest_desc, weight_boxes, x_boxes, full, empty, tiles, turns, N, STAGES, PDL,
            )),
        ],
        [1], [REGISTERS],
    )  # fmt: skip


# -- linear_silu_mul -------------------------------------------------------------------------------------------------------
@gluon.jit
def _load_pairs(weight_descs, boxes, place, full, row, at, OUTPUTS: gl.constexpr, PAIRS: gl.constexpr):
    """Gate rows from `row`, and their up rows: part by part, so that each part is its gates, then its ups."""
    for i in gl.static_range(_num_parts(2 * PAIRS)):
        for up in gl.static_range(2):
            box = boxes.index(place + (_start(2 * PAIRS, i) + up * (_part(2 * PAIRS, i) // 2)) // _BOX)
            target = box._reinterpret(boxes.dtype, [_part(2 * PAIRS, i) // 32, 2, 4, 2, _WIDTH], _FIVE)
            start = (row + up * OUTPUTS + _start(2 * PAIRS, i) // 2) // 16
            tma.async_copy_global_to_shared(weight_descs[_descriptor(2 * PAIRS, i)], [start, 0, 0, 0, at], full, target)


@gluon.jit
def _place(item, token_tiles, weight_tiles):
    """-> the tile of tokens and that of weights of an item: some tiles of tokens take turns for each of weights, so that what
    runs at the same time lies in L2."""
    group = item // (_GROUP * weight_tiles)
    within = item - group * (_GROUP * weight_tiles)
    size = gl.minimum(token_tiles - group * _GROUP, _GROUP)
    return group * _GROUP + within % size, within // size


@gluon.jit
def _first_token(num_tokens, which):
    """Of 64. They are whole where there are so many: better some tokens twice than rows from beyond the end, which come
    slowly."""
    return gl.maximum(gl.minimum(which * 64, num_tokens - 64), 0)


@gluon.jit
def _load_tokens(x_desc, boxes, place, full, num_tokens, tile, at, CONSUMERS: gl.constexpr):
    for which in gl.static_range(CONSUMERS):
        target = boxes.index(place + which * _BOXES)._reinterpret(boxes.dtype, [64, _WIDTH], _FLAT)
        token = _first_token(num_tokens, tile * CONSUMERS + which)
        tma.async_copy_global_to_shared(x_desc, [token, at], full, target)


@gluon.jit
def _produce_pairs(
    weight_descs, x_desc, weight_boxes, x_boxes, full, empty, num_tokens, token_tiles, weight_tiles, turns,
    OUTPUTS: gl.constexpr, PAIRS: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    BYTES: gl.constexpr = (2 * PAIRS + 64 * CONSUMERS) * _WIDTH * 2
    W_STAGE: gl.constexpr = 2 * PAIRS // _BOX
    X_STAGE: gl.constexpr = CONSUMERS * _BOXES
    ahead_tokens, ahead_weights = _place(gl.program_id(0), token_tiles, weight_tiles)
    for i in gl.static_range(STAGES):
        mbarrier.expect(full.index(i), BYTES)
        _load_pairs(
            weight_descs, weight_boxes, i * W_STAGE, full.index(i), ahead_weights * PAIRS, i * _WIDTH, OUTPUTS, PAIRS
        )
    if PDL:
        asm("griddepcontrol.wait; // $0")
    for j in gl.static_range(STAGES):
        _load_tokens(x_desc, x_boxes, j * X_STAGE, full.index(j), num_tokens, ahead_tokens, j * _WIDTH, CONSUMERS)
    for item in range(gl.program_id(0), token_tiles * weight_tiles, gl.num_programs(0)):
        first = item // gl.num_programs(0) * turns
        token_tile, weight_tile = _place(item, token_tiles, weight_tiles)
        row = weight_tile * PAIRS
        begin = gl.where(item == gl.program_id(0), STAGES, 0)
        for turn in range(begin, turns):
            at = turn * _WIDTH
            stage = (first + turn) % STAGES
            mbarrier.wait(empty.index(stage), ((first + turn) // STAGES) & 1 ^ 1)
            mbarrier.expect(full.index(stage), BYTES)
            _load_pairs(weight_descs, weight_boxes, stage * W_STAGE, full.index(stage), row, at, OUTPUTS, PAIRS)
            _load_tokens(x_desc, x_boxes, stage * X_STAGE, full.index(stage), num_tokens, token_tile, at, CONSUMERS)


@gluon.jit
def _silu_mul(gate, up, dtype: gl.constexpr):
    gate = narrow(gate, dtype).to(gl.float32)
    silu = narrow(gate * reciprocal(1.0 + gl.exp2(gate * -_LOG2_E)), dtype)
    return narrow(silu.to(gl.float32) * narrow(up, dtype).to(gl.float32), dtype)


@gluon.jit
def _consume_pairs(
    out_ptr, weight_boxes, x_boxes, full, empty, num_tokens, token_tiles, weight_tiles, turns, WHICH: gl.constexpr,
    OUTPUTS: gl.constexpr, PAIRS: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    X_STAGE: gl.constexpr = CONSUMERS * _BOXES
    for item in range(gl.program_id(0), token_tiles * weight_tiles, gl.num_programs(0)):
        # Not carried from item to item: the compiler takes a sum that begins at 0 for constant.
        first = item // gl.num_programs(0) * turns
        sums = _sum_up(
            x_boxes, weight_boxes, full, empty, first, turns, X_STAGE, WHICH * _BOXES, 2 * PAIRS, STAGES, True
        )  # fmt: skip
        token_tile, weight_tile = _place(item, token_tiles, weight_tiles)
        token = _first_token(num_tokens, token_tile * CONSUMERS + WHICH)
        for i in gl.static_range(_num_parts(2 * PAIRS)):
            gate, up = gl.split(sums[i].reshape([64, 2, _part(2 * PAIRS, i) // 2]).permute([0, 2, 1]))
            column = weight_tile * PAIRS + _start(2 * PAIRS, i) // 2
            _put(
                _silu_mul(gate, up, x_boxes.dtype), out_ptr, num_tokens, token, column, OUTPUTS, _part(2 * PAIRS, i) // 2
            )  # fmt: skip


@gluon.jit
def _put(y, out_ptr, num_tokens, token, column, OUTPUTS: gl.constexpr, COLUMNS: gl.constexpr):
    """[64, COLUMNS], whose columns are in the order of `_groups`: a thread has four neighbours of them."""
    LAYOUT: gl.constexpr = _rows_layout(COLUMNS)
    y = y.reshape([64, COLUMNS // 16, 2, 4, 2]).permute([0, 1, 3, 2, 4]).reshape([64, COLUMNS])
    y = gl.convert_layout(y, LAYOUT, assert_trivial=True)
    token_T = token + gl.arange(0, 64, layout=gl.SliceLayout(1, LAYOUT))
    column_C = column + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, LAYOUT))
    mask_TC = (token_T < num_tokens)[:, None] & (column_C < OUTPUTS)[None, :]
    gl.store(out_ptr + (token_T * OUTPUTS)[:, None] + column_C[None, :], y, mask=mask_TC)


@gluon.jit(do_not_specialize=["num_tokens", "token_tiles", "weight_tiles", "turns"])
def _linear_silu_mul(
    weight_desc64, weight_desc32, weight_desc16, x_desc, out_ptr, num_tokens, token_tiles, weight_tiles, turns,
    OUTPUTS: gl.constexpr, PAIRS: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr,
    REGISTERS: gl.constexpr, REST: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Items are tiles of 64 tokens for each consumer times PAIRS outputs; a program has each num_programs-th of them."""
    if PDL:
        asm("griddepcontrol.launch_dependents; // $0")
    dtype: gl.constexpr = x_desc.dtype
    weight_boxes = gl.allocate_shared_memory(dtype, [STAGES * (2 * PAIRS // _BOX), _BOX, _WIDTH], _FLAT)
    x_boxes = gl.allocate_shared_memory(dtype, [STAGES * CONSUMERS * _BOXES, _BOX, _WIDTH], _FLAT)
    full, empty = _barriers(STAGES, CONSUMERS)
    weight_descs = (weight_desc64, weight_desc32, weight_desc16)
    # Spelled out: a part's constants stay constants only where its arguments are written down.
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (_consume_pairs, (
                    out_ptr, weight_boxes, x_boxes, full, empty, num_tokens, token_tiles, weight_tiles, turns,
                    gl.constexpr(0), OUTPUTS, PAIRS, CONSUMERS, STAGES,
                )),
                (_consume_pairs, (
                    out_ptr, weight_boxes, x_boxes, full, empty, num_tokens, token_tiles, weight_tiles, turns,
                    gl.constexpr(1), OUTPUTS, PAIRS, CONSUMERS, STAGES,
                )),
                (_produce_pairs, (
                    weight_descs, x_desc, weight_boxes, x_boxes, full, empty, num_tokens, token_tiles, weight_tiles, turns,
                    OUTPUTS, PAIRS, CONSUMERS, STAGES, PDL,
                )),
            ],
            [4, 1], [REGISTERS, REST],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_consume_pairs, (
                    out_ptr, weight_boxes, x_boxes, full, empty, num_tokens, token_tiles, weight_tiles, turns,
                    gl.constexpr(0), OUTPUTS, PAIRS, CONSUMERS, STAGES,
                )),
                (_consume_pairs, (
                    out_ptr, weight_boxes, x_boxes, full, empty, num_tokens, token_tiles, weight_tiles, turns,
                    gl.constexpr(1), OUTPUTS, PAIRS, CONSUMERS, STAGES,
                )),
                (_consume_pairs, (
                    out_ptr, weight_boxes, x_boxes, full, empty, num_tokens, token_tiles, weight_tiles, turns,
                    gl.constexpr(2), OUTPUTS, PAIRS, CONSUMERS, STAGES,
                )),
                (_produce_pairs, (
                    weight_descs, x_desc, weight_boxes, x_boxes, full, empty, num_tokens, token_tiles, weight_tiles, turns,
                    OUTPUTS, PAIRS, CONSUMERS, STAGES, PDL,
                )),
            ],
            [4, 4, 1], [REGISTERS, REGISTERS, REST],
        )  # fmt: skip


# -- launches --------------------------------------------------------------------------------------------------------------
def linear_pieces(x_TH: Tensor, weight_OH: Tensor, *, tile: LinearTile | None = None) -> Tensor:
    """-> fp32 [P, T, O], whose sum over P is x W^T."""
    num_tokens, size = _check(x_TH, weight_OH)
    if num_tokens > MAX_TOKENS:
        raise ValueError(f"1 to {MAX_TOKENS} tokens, not {num_tokens}")
    num_outputs = len(weight_OH)
    tile = tile or choose_linear_tile(num_tokens, num_outputs)
    if tile.rows != 64:
        raise ValueError(f"a program has 64 outputs, not {tile.rows}")
    out = torch.empty((tile.num_pieces, num_tokens, num_outputs), dtype=torch.float32, device=x_TH.device)
    beside = triton.cdiv(num_tokens, _BOX.value) * _BOX.value
    tiles, turns = triton.cdiv(num_outputs, 64), triton.cdiv(size, _WIDTH.value * tile.num_pieces)
    registers, most = (40, 128) if beside <= 240 else (104, 160)
    _linear_pieces[(tiles * tile.num_pieces,)](
        _boxes(weight_OH, 64), _boxes(x_TH, 64), _boxes(x_TH, 16), out, num_tokens, num_outputs, tiles, turns,
        N=beside, STAGES=_num_stages(64 + beside, turns),
        REGISTERS=registers, num_warps=4, maxnreg=most, **dependent.options(x_TH.device),
    )  # fmt: skip
    return out


def linear_silu_mul(x_TH: Tensor, weight_O2H: Tensor, *, tile: LinearTile | None = None) -> Tensor:
    """-> [T, O], of weights [2 O, H] whose first half is gate. O is a multiple of 16."""
    num_tokens, size = _check(x_TH, weight_O2H)
    num_outputs = len(weight_O2H) // 2
    tile = tile or choose_linear_tile(num_tokens, num_outputs, silu=True)
    most = MAX_PAIRS.get(tile.consumers, 0)
    if tile.rows % 16 or not 0 < tile.rows <= most:
        raise ValueError(f"{tile.consumers} consumers have a multiple of 16 pairs, up to {most}, not {tile.rows}")
    if len(weight_O2H) % 32:
        raise ValueError(f"outputs must be a multiple of 16, not {len(weight_O2H) / 2:g}")
    if num_tokens * num_outputs >= 2**31:
        raise ValueError(f"{num_tokens} tokens times {num_outputs} outputs are 2^31 or more")
    out = x_TH.new_empty((num_tokens, num_outputs))
    turns = triton.cdiv(size, _WIDTH.value)
    token_tiles, weight_tiles = triton.cdiv(num_tokens, 64 * tile.consumers), triton.cdiv(num_outputs, tile.rows)
    registers, rest = REGISTERS[tile.consumers]
    _linear_silu_mul[(min(token_tiles * weight_tiles, _num_sms(x_TH.device)),)](
        *(_groups(weight_O2H, rows) for rows in (64, 32, 16)), _boxes(x_TH, 64), out, num_tokens, token_tiles, weight_tiles,
        turns, OUTPUTS=num_outputs, PAIRS=tile.rows, CONSUMERS=tile.consumers,
        STAGES=_num_stages(2 * tile.rows + 64 * tile.consumers, turns),
        REGISTERS=registers, REST=rest, num_warps=4, **dependent.options(x_TH.device),
    )  # fmt: skip
    return out


def _num_sms(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else PROGRAMS


def _check(x_TH: Tensor, weight: Tensor) -> tuple[int, int]:
    """-> x's shape."""
    num_tokens, size = x_TH.shape
    if num_tokens == 0:
        raise ValueError("there are no tokens")
    if not weight.is_contiguous() or weight.shape[1] != size:
        raise ValueError(f"x {list(x_TH.shape)} and weight {list(weight.shape)} don't match, or it is not contiguous")
    if weight.dtype is not x_TH.dtype:
        raise TypeError("x and weight must be of one dtype")
    return num_tokens, size


def _boxes(x: Tensor, rows: int) -> TensorDescriptor:
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [rows, _WIDTH.value], _FLAT.value)


def _groups(weight: Tensor, rows: int) -> TensorDescriptor:
    """Rows by 16, of which 4 q + 2 j + e comes as 8 j + 2 q + e: a thread of the matrix units has columns 2 q and 2 q + 1 of
    each 8. (CUDA's documentation wants each stride to be a multiple of those within; driver 580 takes these.)"""
    size = weight.shape[1]
    return TensorDescriptor(
        weight, [len(weight) // 16, 2, 4, 2, size], [16 * size, 2 * size, 4 * size, size, 1],
        [rows // 16, 2, 4, 2, _WIDTH.value], _FIVE.value,
    )  # fmt: skip


def _num_stages(rows: int, turns: int) -> int:
    return min(MAX_STAGES, turns, SHARED_BYTES // (rows * _WIDTH.value * 2))
