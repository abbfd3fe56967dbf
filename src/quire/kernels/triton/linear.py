"""Linear layers for some tokens (16 to 128), on the matrix units: the time is that of reading the weights.

    linear           y = x W^T + b
    linear_silu_mul  y = silu(gate) * up, of [gate | up] = x W^T + b
    linear_pieces    y = x W^T, in fp32 and not summed up yet: [P, T, O] over P ranges of the inputs

A program computes a tile of outputs for all tokens. Where a layer has fewer tiles than the GPU has multiprocessors, the
inputs are cut as well, and whoever reads the result sums it: a norm does it in passing (`fused`), in a fixed order.

                     inputs                       programs, 2 pieces
    weight  |     piece 0     |     piece 1     |
    tile 0  | ............... | ............... |     0   2
    tile 1  | ............... | ............... |     1   3

Weights and tokens come through the copy engine (TMA), several turns ahead; what lies beyond a tensor's edge comes as zeros. A
program asks for its first weights to be brought into L2 before it waits for the kernel before it (`dependent`).

Rounding is that of the operations one by one (`torch_ops`), as in `skinny`. Does not know models, nor when these operations
are the right ones (`takes` does, from measurements on two models' shapes).

Letters of shapes: T tokens, H inputs, O outputs (or pairs of gate and up), P pieces; in the kernel R outputs of a program.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from quire.kernels.triton import dependent

MAX_TOKENS = 256
"""`takes` is for no more than 128; beyond, this is what Gluon's (`quire.kernels.gluon.linear`) are compared with."""
MAX_PIECES = 8
MANY = 1024
"""Tokens beyond which products add to the residual (`ops.TritonManyTokens`), and those with SiLU x up have one tile
(`kernels.gluon.choose_linear_tile`)."""
DTYPES = (torch.bfloat16, torch.float16)
SMALL = 2**23
"""Elements of a weight that is read in less time than a few launches take."""
PROGRAMS = 132
"""So many programs at once are wanted: the multiprocessors of an H100 or H200. Fewer or more cost time, nothing else."""
SHARED_BYTES = 200_000
PREFETCHED = 256
"""Inputs of each output whose weights are asked for ahead."""
# The interpreter has no product of bf16.
_DOT_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@dataclass(frozen=True)
class Tile:
    """How the work is cut."""

    rows: int
    """Outputs of a program, or pairs of them."""
    tokens: int
    columns: int
    """Inputs of a turn."""
    num_stages: int
    num_pieces: int = 1
    num_warps: int = 4


def choose_tile(num_tokens: int, num_outputs: int, size: int, *, silu: bool = False, in_pieces: bool = False) -> Tile:
    """A tile for a layer, by its shape alone: as the best of some hundred on an H200, within a few per cent.

    The matrix units multiply 64 rows at a time: of tokens, or of outputs where tokens are few.
    """
    tokens = max(16, triton.next_power_of_2(num_tokens))
    rows = 64 if num_outputs >= 0.7 * 64 * PROGRAMS or (in_pieces and num_outputs > 2048) else 32
    if rows < 64:
        tokens = max(64, tokens)
    tiles = triton.cdiv(num_outputs, rows)
    columns = 64 if silu and tokens == 128 else 128
    stage_bytes = 2 * columns * (rows * (2 if silu else 1) + tokens)
    # where there are more programs than multiprocessors, two share one
    stages = min(6, SHARED_BYTES // (2 if columns == 64 and tiles > PROGRAMS else 1) // stage_bytes)
    pieces = max(1, min(MAX_PIECES, PROGRAMS // tiles, size // (2 * columns))) if in_pieces else 1
    return Tile(rows, tokens, columns, stages, pieces)


def takes(
    x_TH: Tensor, weight_OH: Tensor, bias_O: Tensor | None, *, silu: bool = False, in_pieces: bool = False
) -> bool:
    """Whether this is the way for x, rather than cuBLAS's product and separate kernels beside it.

    Measured on an H200 with layers of 1,024 to 14,336 inputs and outputs: it is up to 64 tokens, and up to 128 where something
    is saved beside the product or the weight is small. Only where tokens fill their tile: zeros from beyond a tensor's edge
    come so slowly that 96 tokens take 9 % longer than 128.
    """
    most = 128 if silu or in_pieces or weight_OH.numel() <= SMALL else 64
    return (
        len(x_TH) in (16, 32, 64, 128)
        and len(x_TH) <= most
        and not (in_pieces and bias_O is not None)
        and x_TH.is_cuda
        and _has_tma(x_TH.device.index)
        and lie_for_tma(x_TH, weight_OH)
    )


def lie_for_tma(x_TH: Tensor, weight_OH: Tensor) -> bool:
    """Whether these are of a type that is multiplied here, and lie as the copy engine wants it: on multiples of 16 bytes."""
    return (
        x_TH.dtype in DTYPES
        and weight_OH.dtype is x_TH.dtype
        and weight_OH.is_contiguous()
        and x_TH.stride(1) == 1
        and not (x_TH.stride(0) % 8 or weight_OH.shape[1] % 8 or x_TH.data_ptr() % 16 or weight_OH.data_ptr() % 16)
    )


def _has_tma(index: int | None) -> bool:
    """And as much shared memory as the tiles take, which compute capability 12 has not."""
    return torch.cuda.get_device_capability(index)[0] in (9, 10)


@triton.jit
def _prefetch(weight_ptr, row_R, begin, SIZE: tl.constexpr, COLUMNS: tl.constexpr):
    """Asks for COLUMNS inputs' weights to be brought into L2, by lines of 128 bytes (64 elements)."""
    line_L = tl.minimum(begin + tl.arange(0, COLUMNS // 64) * 64, SIZE - 1)
    address_RL = weight_ptr + row_R.to(tl.int64)[:, None] * SIZE + line_L[None, :]
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [address_RL.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1
    )  # fmt: skip


# Counts of tokens are not specialised on: what is compiled for 64 serves 40.
@triton.jit(do_not_specialize=["num_tokens"])
def _linear(
    x_desc, weight_desc, weight_ptr, bias_ptr, out_ptr, num_tokens,
    SIZE: tl.constexpr, OUTPUTS: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
    PIECES: tl.constexpr, STAGES: tl.constexpr, PREFETCH: tl.constexpr, DOT_TYPE: tl.constexpr,
    BIAS: tl.constexpr, SILU: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: outputs [tile * ROWS, (tile + 1) * ROWS) of all tokens, over one piece of the inputs."""
    TILES: tl.constexpr = (OUTPUTS + ROWS - 1) // ROWS
    TURNS: tl.constexpr = (SIZE + COLUMNS * PIECES - 1) // (COLUMNS * PIECES)
    # Few tokens stand where the matrix units take 8 and more, not 64.
    SWAP: tl.constexpr = TOKENS < 64
    program = tl.program_id(0)
    tile = program % TILES
    piece = program // TILES
    begin = piece * (TURNS * COLUMNS)
    row_R = tile * ROWS + tl.arange(0, ROWS)
    if PDL:
        dependent.release()
        asked_R = tl.minimum(row_R, OUTPUTS - 1)
        _prefetch(weight_ptr, asked_R, begin, SIZE, PREFETCH)
        if SILU:
            _prefetch(weight_ptr, asked_R + OUTPUTS, begin, SIZE, PREFETCH)
        dependent.wait()
    if SWAP:
        sum_TR = tl.zeros([ROWS, TOKENS], dtype=tl.float32)
    else:
        sum_TR = tl.zeros([TOKENS, ROWS], dtype=tl.float32)
    other_TR = sum_TR
    for turn in tl.range(0, TURNS, num_stages=STAGES):
        at = begin + turn * COLUMNS
        x = x_desc.load([0, at]).to(DOT_TYPE)
        weight = weight_desc.load([tile * ROWS, at]).to(DOT_TYPE)
        if SWAP:
            sum_TR = tl.dot(weight, tl.trans(x), sum_TR)
        else:
            sum_TR = tl.dot(x, tl.trans(weight), sum_TR)
        if SILU:
            up = weight_desc.load([OUTPUTS + tile * ROWS, at]).to(DOT_TYPE)
            if SWAP:
                other_TR = tl.dot(up, tl.trans(x), other_TR)
            else:
                other_TR = tl.dot(x, tl.trans(up), other_TR)
    if SWAP:
        sum_TR = tl.trans(sum_TR)
        other_TR = tl.trans(other_TR)
    dtype: tl.constexpr = weight_ptr.dtype.element_ty
    if BIAS:
        sum_TR += tl.load(bias_ptr + row_R, mask=row_R < OUTPUTS, other=0.0).to(tl.float32)[None, :]
    if SILU:
        if BIAS:
            other_TR += tl.load(bias_ptr + OUTPUTS + row_R, mask=row_R < OUTPUTS, other=0.0).to(tl.float32)[None, :]
        gate_TR = sum_TR.to(dtype).to(tl.float32)
        silu_TR = (gate_TR / (1.0 + tl.exp(-gate_TR))).to(dtype)
        sum_TR = silu_TR.to(tl.float32) * other_TR.to(dtype).to(tl.float32)
    token_T = tl.arange(0, TOKENS)
    address_TR = out_ptr + ((piece * num_tokens + token_T) * OUTPUTS).to(tl.int64)[:, None] + row_R[None, :]
    mask_TR = (token_T < num_tokens)[:, None] & (row_R < OUTPUTS)[None, :]
    tl.store(address_TR, sum_TR.to(out_ptr.dtype.element_ty), mask=mask_TR)


def linear(x_TH: Tensor, weight_OH: Tensor, bias_O: Tensor | None = None, *, tile: Tile | None = None) -> Tensor:
    """-> [T, O], contiguous, of x's dtype."""
    tile = tile or choose_tile(len(x_TH), *weight_OH.shape)
    return _launch(x_TH, weight_OH, bias_O, x_TH.new_empty((len(x_TH), len(weight_OH))), tile)


def linear_silu_mul(
    x_TH: Tensor, weight_O2H: Tensor, bias_O2: Tensor | None = None, *, tile: Tile | None = None
) -> Tensor:
    """-> [T, O], of weights [2 O, H] whose first half is gate."""
    num_outputs, size = len(weight_O2H) // 2, weight_O2H.shape[1]
    tile = tile or choose_tile(len(x_TH), num_outputs, size, silu=True)
    return _launch(x_TH, weight_O2H, bias_O2, x_TH.new_empty((len(x_TH), num_outputs)), tile, silu=True)


def linear_pieces(x_TH: Tensor, weight_OH: Tensor, *, tile: Tile | None = None) -> Tensor:
    """-> fp32 [P, T, O], whose sum over P is x W^T."""
    tile = tile or choose_tile(len(x_TH), *weight_OH.shape, in_pieces=True)
    out = torch.empty((tile.num_pieces, len(x_TH), len(weight_OH)), dtype=torch.float32, device=x_TH.device)
    return _launch(x_TH, weight_OH, None, out, tile)


def _launch(
    x_TH: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, tile: Tile, *, silu: bool = False
) -> Tensor:
    num_tokens, size = x_TH.shape
    num_outputs = out.shape[-1]
    if not 0 < num_tokens <= MAX_TOKENS:
        raise ValueError(f"1 to {MAX_TOKENS} tokens, not {num_tokens}")
    if not weight.is_contiguous() or weight.shape != (num_outputs * (2 if silu else 1), size):
        raise ValueError(f"x {list(x_TH.shape)} and weight {list(weight.shape)} don't match, or it is not contiguous")
    if weight.dtype is not x_TH.dtype or (bias is not None and bias.dtype is not x_TH.dtype):
        raise TypeError("x, weight and bias must be of one dtype")
    if tile.num_pieces > 1 and out.dtype is not torch.float32:
        raise ValueError("a result in the tensors' dtype has one piece")
    if tile.tokens < num_tokens:
        raise ValueError(f"a tile of {tile.tokens} tokens does not hold {num_tokens}")
    pdl = dependent.options(x_TH.device)
    _linear[(triton.cdiv(num_outputs, tile.rows) * tile.num_pieces,)](
        TensorDescriptor(x_TH, list(x_TH.shape), list(x_TH.stride()), [tile.tokens, tile.columns]),
        TensorDescriptor(weight, list(weight.shape), list(weight.stride()), [tile.rows, tile.columns]),
        weight, weight if bias is None else bias, out, num_tokens,  # any tensor of the type will do for no bias
        SIZE=size, OUTPUTS=num_outputs, ROWS=tile.rows, TOKENS=tile.tokens, COLUMNS=tile.columns,
        PIECES=tile.num_pieces, STAGES=tile.num_stages, PREFETCH=max(64, min(PREFETCHED, triton.next_power_of_2(size))),
        DOT_TYPE=tl.float32 if triton.knobs.runtime.interpret else _DOT_TYPES[x_TH.dtype],
        BIAS=bias is not None, SILU=silu, num_warps=tile.num_warps, **pdl,
    )  # fmt: skip
    return out
