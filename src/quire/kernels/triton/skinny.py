"""Linear layers for few tokens (1 to 4), fused with what stands beside them: the time is that of reading the weights once.

    linear           y = norm(x) W^T + b                    norm: RMS norm of x, or none
    linear_silu_mul  y = silu(gate) * up, of [gate | up] = norm(x) W^T + b
    linear_add_      residual += x W^T + b

A program owns some outputs and goes over all inputs, multiplying and adding in registers, without the matrix units; so sums
are always taken in the same order. It loads its first weights before it waits for the kernel before it (`dependent`): a small
model's program has all its weights in registers by then. Bytes in flight are what counts: a GPU of 4.2 TB/s and 132
multiprocessors wants 40 KB and more in flight on each.

Rounding is that of the operations one by one (`torch_ops`): arithmetic and sums are in fp32, and what they round to the
tensors' dtype in between is rounded here too; only the order of the sums is another.

Letters of shapes: T tokens, H inputs, O outputs (or pairs of gate and up); in the kernel R outputs of a program, G groups
of inputs. Does not know models, nor when these operations are the right ones (`ops.TritonFewTokens.takes` does).
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from quire.kernels.triton import dependent

MAX_TOKENS = 4
DTYPES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Tile:
    """How the work is cut."""

    rows: int
    """Outputs of a program: rows of the weight, or pairs of them."""
    columns: int
    """Inputs of a turn, whose weights are loaded while the turn before is computed."""
    num_warps: int


# What is multiplied and added has four dimensions from the start, so that the compiler gives all of it one layout (which
# prefers the last dimension, then the first), and nothing moves between threads but the last sums:
#
#     [groups of inputs (over threads), tokens, outputs, 8 inputs of a group (16 bytes, of one thread)]        G T R 8
#
# `column` is start + 8 * group + input, [G, 1, 1, 8].


@triton.jit
def _load_weights(weight_ptr, row_R, column, SIZE: tl.constexpr, EVEN: tl.constexpr):
    address = weight_ptr + row_R.to(tl.int64)[None, None, :, None] * SIZE + column
    if EVEN:
        return tl.load(address, eviction_policy="evict_first")
    else:
        return tl.load(address, mask=column < SIZE, other=0.0, eviction_policy="evict_first")


@triton.jit
def _load_tokens(x_ptr, stride_t, num_tokens, column, SIZE: tl.constexpr, TOKENS: tl.constexpr):
    token = tl.arange(0, TOKENS)[None, :, None, None]
    # Past L1, which may hold what the kernel before last left.
    return tl.load(
        x_ptr + token * stride_t + column, mask=(token < num_tokens) & (column < SIZE), other=0.0, cache_modifier=".cg"
    )


@triton.jit
def _columns(GROUPS: tl.constexpr):
    return tl.arange(0, GROUPS)[:, None, None, None] * 8 + tl.arange(0, 8)[None, None, None, :]


@triton.jit
def _weighted(x, root_T1, scale):
    """x / root mean square, rounded, times the norm's weights, rounded."""
    normed = (x.to(tl.float32) * root_T1[None, :, :, None]).to(x.dtype)
    return (normed.to(tl.float32) * scale.to(tl.float32)).to(x.dtype)


@triton.jit
def _products(x, weight):
    """Sums over the 8 inputs of each group: [G, T, R]."""
    return tl.sum(x.to(tl.float32) * weight.to(tl.float32), axis=3)


@triton.jit
def _load_residual(
    out_ptr, row_R, num_tokens, OUTPUTS: tl.constexpr, TOKENS: tl.constexpr, ADD: tl.constexpr
):  # fmt: skip
    """[T, R]; without ADD anything."""
    token_T = tl.arange(0, TOKENS)
    mask_TR = (token_T < num_tokens)[:, None] & (row_R >= 0)[None, :] & ADD
    return tl.load(out_ptr + token_T[:, None] * OUTPUTS + row_R[None, :], mask=mask_TR, other=0.0, cache_modifier=".cg")


@triton.jit
def _finish(
    sum_TR, other_TR, residual_TR, bias_ptr, row_R, out_ptr, num_tokens,
    OUTPUTS: tl.constexpr, TOKENS: tl.constexpr, BIAS: tl.constexpr, SILU: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """Bias, activation or addition, and the store. other_TR: sums of up, if SILU; residual_TR: if ADD."""
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    if BIAS:
        sum_TR += tl.load(bias_ptr + row_R).to(tl.float32)[None, :]
    result_TR = sum_TR.to(dtype)
    if SILU:
        if BIAS:
            other_TR += tl.load(bias_ptr + OUTPUTS + row_R).to(tl.float32)[None, :]
        gate_TR = result_TR.to(tl.float32)
        silu_TR = (gate_TR / (1.0 + tl.exp(-gate_TR))).to(dtype)
        result_TR = (silu_TR.to(tl.float32) * other_TR.to(dtype).to(tl.float32)).to(dtype)
    if ADD:
        result_TR = (result_TR.to(tl.float32) + residual_TR.to(tl.float32)).to(dtype)
    token_T = tl.arange(0, TOKENS)
    # Where the last program's rows are fewer, several of its rows are the last one, and store the same number.
    tl.store(out_ptr + token_T[:, None] * OUTPUTS + row_R[None, :], result_TR, mask=(token_T < num_tokens)[:, None])


# Counts of tokens are not specialised on: what is compiled for 4 serves 3.
@triton.jit(do_not_specialize=["num_tokens"])
def _multiply_add(
    x_ptr, weight_ptr, norm_ptr, bias_ptr, out_ptr, num_tokens, stride_t, eps,
    SIZE: tl.constexpr, OUTPUTS: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    WHOLE: tl.constexpr,
    NORM: tl.constexpr, BIAS: tl.constexpr, SILU: tl.constexpr, ADD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program i has outputs [i * ROWS, (i + 1) * ROWS). WHOLE: a power of two that holds all inputs."""
    EVEN: tl.constexpr = SIZE % COLUMNS == 0
    row_R = tl.minimum(tl.program_id(0) * ROWS + tl.arange(0, ROWS), OUTPUTS - 1)
    column = _columns(COLUMNS // 8)
    if PDL:
        dependent.release()
    weight = _load_weights(weight_ptr, row_R, column, SIZE, EVEN)
    if SILU:
        up = _load_weights(weight_ptr, row_R + OUTPUTS, column, SIZE, EVEN)
    if NORM:
        scale = tl.load(norm_ptr + column, mask=column < SIZE, other=0.0)
    if PDL:
        dependent.wait()
    x = _load_tokens(x_ptr, stride_t, num_tokens, column, SIZE, TOKENS)
    residual_TR = _load_residual(out_ptr, row_R, num_tokens, OUTPUTS, TOKENS, ADD)
    if NORM:
        value = x.to(tl.float32)
        if COLUMNS < SIZE:
            value = _load_tokens(x_ptr, stride_t, num_tokens, _columns(WHOLE // 8), SIZE, TOKENS).to(tl.float32)
        root_T1 = tl.rsqrt(tl.sum(tl.sum(value * value, axis=3), axis=0) / SIZE + eps)
    sum_GTR = tl.zeros([COLUMNS // 8, TOKENS, ROWS], dtype=tl.float32)
    other_GTR = tl.zeros([COLUMNS // 8, TOKENS, ROWS], dtype=tl.float32)
    # Each turn computes what the turn before has loaded, after it has asked for the next turn's.
    for start in range(COLUMNS, SIZE, COLUMNS):
        next_x = _load_tokens(x_ptr, stride_t, num_tokens, start + column, SIZE, TOKENS)
        next_weight = _load_weights(weight_ptr, row_R, start + column, SIZE, EVEN)
        if SILU:
            next_up = _load_weights(weight_ptr, row_R + OUTPUTS, start + column, SIZE, EVEN)
        if NORM:
            x = _weighted(x, root_T1, scale)
            scale = tl.load(norm_ptr + start + column, mask=start + column < SIZE, other=0.0)
        sum_GTR += _products(x, weight)
        if SILU:
            other_GTR += _products(x, up)
            up = next_up
        x = next_x
        weight = next_weight
    if NORM:
        x = _weighted(x, root_T1, scale)
    sum_GTR += _products(x, weight)
    sum_TR = tl.sum(sum_GTR, axis=0)
    other_TR = sum_TR
    if SILU:
        other_GTR += _products(x, up)
        other_TR = tl.sum(other_GTR, axis=0)
    _finish(
        sum_TR, other_TR, residual_TR, bias_ptr, row_R, out_ptr, num_tokens, OUTPUTS, TOKENS, BIAS, SILU, ADD
    )  # fmt: skip


def linear(
    x_TH: Tensor,
    weight_OH: Tensor,
    bias_O: Tensor | None = None,
    *,
    norm: tuple[Tensor, float] | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """-> [T, O], contiguous. norm: weights [H] and eps; then x is contiguous too."""
    out_TO = x_TH.new_empty((len(x_TH), len(weight_OH)))
    _launch(x_TH, weight_OH, bias_O, out_TO, norm=norm, tile=tile)
    return out_TO


def linear_silu_mul(
    x_TH: Tensor,
    weight_O2H: Tensor,
    bias_O2: Tensor | None = None,
    *,
    norm: tuple[Tensor, float] | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """-> [T, O], of weights [2 O, H] whose first half is gate."""
    out_TO = x_TH.new_empty((len(x_TH), len(weight_O2H) // 2))
    _launch(x_TH, weight_O2H, bias_O2, out_TO, norm=norm, silu=True, tile=tile)
    return out_TO


def linear_add_(
    x_TH: Tensor, weight_OH: Tensor, residual_TO: Tensor, bias_O: Tensor | None = None, *, tile: Tile | None = None
) -> None:
    """residual (contiguous) changes in place."""
    _launch(x_TH, weight_OH, bias_O, residual_TO, add=True, tile=tile)


def choose_tile(num_tokens: int, num_outputs: int, size: int, silu: bool) -> Tile:
    """A tile for a layer, by its shape alone. Runs of `quire bench kernels --only linear --variants` say which are good."""
    pairs = 2 if silu else 1
    whole = triton.next_power_of_2(size)
    if whole <= 1024:  # 16 KB of weights in registers, 64 elements a thread
        return Tile(rows=8 // pairs, columns=whole, num_warps=4) if num_tokens <= 2 else Tile(4 // pairs, whole, 2)
    if size < 4096:
        return Tile(rows=4 // pairs, columns=whole, num_warps=whole // 512)
    if num_tokens > 1:
        return Tile(rows=8 // pairs, columns=1024, num_warps=4)
    if silu:
        return Tile(rows=2, columns=4096, num_warps=8)
    if size > 8192:
        return Tile(rows=4, columns=2048, num_warps=4)
    return Tile(rows=16, columns=1024, num_warps=4) if num_outputs > 4096 else Tile(rows=4, columns=1024, num_warps=2)


def _launch(
    x_TH: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out_TO: Tensor,
    *,
    norm: tuple[Tensor, float] | None = None,
    silu: bool = False,
    add: bool = False,
    tile: Tile | None = None,
) -> None:
    num_tokens, size = x_TH.shape
    num_outputs = out_TO.shape[1]
    if not 0 < num_tokens <= MAX_TOKENS:
        raise ValueError(f"1 to {MAX_TOKENS} tokens, not {num_tokens}")
    if x_TH.stride(1) != 1 or not out_TO.is_contiguous() or not weight.is_contiguous():
        raise ValueError("x must have a contiguous last dimension; weight and output must be contiguous")
    if weight.shape != (num_outputs * (2 if silu else 1), size) or len(out_TO) != num_tokens:
        raise ValueError(
            f"x {list(x_TH.shape)}, weight {list(weight.shape)} and output {list(out_TO.shape)} don't match"
        )
    if any(y is not None and y.dtype is not x_TH.dtype for y in (weight, bias, out_TO, norm and norm[0])):
        raise TypeError("x, weights, bias and output must be of one dtype")
    tile = tile or choose_tile(num_tokens, num_outputs, size, silu)
    columns = min(tile.columns, triton.next_power_of_2(max(size, 16)))
    grid = (triton.cdiv(num_outputs, tile.rows),)
    pdl = dependent.options(x_TH.device)
    shape = {"SIZE": size, "OUTPUTS": num_outputs, "ROWS": tile.rows, "COLUMNS": columns}
    does = {"BIAS": bias is not None, "SILU": silu, "ADD": add}
    bias = weight if bias is None else bias  # any tensor of the type will do
    norm_weight, eps = norm or (weight, 0.0)
    _multiply_add[grid](
        x_TH, weight, norm_weight, bias, out_TO, num_tokens, x_TH.stride(0), eps,
        **shape, **does, **pdl, TOKENS=triton.next_power_of_2(num_tokens),
        WHOLE=triton.next_power_of_2(size), NORM=norm is not None, num_warps=tile.num_warps, num_stages=1,
    )  # fmt: skip
