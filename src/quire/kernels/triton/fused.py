"""What a layer does beside its matrix products and attention, in Triton: each kernel reads its inputs once and writes once.

Meanings, shapes and dtypes are in `quire.kernels`, the twin of each operation in `torch_ops`. Rounding follows the twins step
by step: arithmetic is in fp32, and what a twin rounds to the tensors' dtype in between is rounded here too. Every operation can
be captured in a CUDA graph. Indices are not checked: to learn of one out of range the host would have to wait for the device.

Does not know attention, nor which sequence a token belongs to.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quire.kernels.triton import dependent

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Elements of each tile of `_heads_kernel`, halves and rest together: with 4 warps, a thread has 16 bytes of each half in bf16.
_ELEMENTS = 2048


# Counts of tokens are not specialised on: 1 and multiples of 16 would each be compiled anew, in the middle of serving.
@triton.jit(do_not_specialize=["num_rows"])
def _rms_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    num_rows,
    stride_t,
    stride_h,
    eps,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    ADD: tl.constexpr,
    PIECES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program i norms rows [i * ROWS, (i + 1) * ROWS); row r is head r % HEADS of token r // HEADS.

    PIECES: so many fp32 tensors one after the other are x, 0: x is one of its own type.
    """
    at = tl.arange(0, BLOCK)
    if PDL:
        dependent.release()
    weight = tl.load(weight_ptr + at, mask=at < SIZE, other=0.0)
    if PDL:
        dependent.wait()
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    mask = (row < num_rows)[:, None] & (at < SIZE)[None, :]
    offset = (row // HEADS) * stride_t + (row % HEADS) * stride_h
    packed = row[:, None] * SIZE + at[None, :]
    x = tl.load(x_ptr + offset[:, None] + at[None, :], mask=mask, other=0.0)
    for piece in tl.static_range(1, PIECES):
        x += tl.load(x_ptr + piece * (num_rows * SIZE).to(tl.int64) + packed, mask=mask, other=0.0)
    if PIECES > 0:
        x = x.to(residual_ptr.dtype.element_ty)
    if ADD:
        residual = tl.load(residual_ptr + packed, mask=mask, other=0.0)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(residual.dtype)
        tl.store(residual_ptr + packed, x, mask=mask)
    value = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, axis=1) / SIZE + eps)
    # Rounded before the product, as in transformers' LlamaRMSNorm.
    normed = (value * scale[:, None]).to(x.dtype).to(tl.float32) * weight.to(tl.float32)[None, :]
    tl.store(out_ptr + packed, normed.to(x.dtype), mask=mask)


@triton.jit
def _weighted(x_THr, scale_TH, weight_r):
    """x * scale, rounded, times the weights, rounded."""
    scaled_THr = (x_THr.to(tl.float32) * scale_TH[:, :, None]).to(x_THr.dtype).to(tl.float32)
    return (scaled_THr * weight_r.to(tl.float32)[None, None, :]).to(x_THr.dtype)


@triton.jit(do_not_specialize=["num_tokens"])
def _heads_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    kv_ptr,
    cos_sin_ptr,
    position_ptr,
    slot_ptr,
    q_weight_ptr,
    k_weight_ptr,
    num_tokens,
    q_stride_t,
    q_stride_h,
    k_stride_t,
    k_stride_h,
    v_stride_t,
    v_stride_h,
    kv_stride_b,
    eps,
    Q_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    NORM: tl.constexpr,
    ROTATE: tl.constexpr,
    WRITE: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Norms and turns the heads of q and k, and writes k and v into their slots: each as far as the flags say.

    Program t * GROUPS + g has HEADS heads of tokens [t * TOKENS, (t + 1) * TOKENS): g counts groups of heads through q, then
    through k, then through v. A head is held as its two halves that are turned against each other, and the rest that is not
    turned:

        | a: HALF elements | b: HALF elements | c: SIZE - 2 * HALF elements |

    q changes in place. k changes in place unless WRITE, for then the cache alone has it.
    """
    if PDL:
        dependent.release()
    group = tl.program_id(0) % GROUPS
    token_T = (tl.program_id(0) // GROUPS).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    Q_GROUPS: tl.constexpr = (Q_HEADS + HEADS - 1) // HEADS
    K_GROUPS: tl.constexpr = (KV_HEADS + HEADS - 1) // HEADS
    is_q = group < Q_GROUPS
    is_v = group >= Q_GROUPS + K_GROUPS
    base = k_ptr
    stride_t = k_stride_t
    stride_h = k_stride_h
    first = (group - Q_GROUPS) * HEADS
    num_heads = KV_HEADS
    weight_ptr = k_weight_ptr
    if is_q:
        base = q_ptr
        stride_t = q_stride_t
        stride_h = q_stride_h
        first = group * HEADS
        num_heads = Q_HEADS
        weight_ptr = q_weight_ptr
    if is_v:
        base = v_ptr
        stride_t = v_stride_t
        stride_h = v_stride_h
        first = (group - Q_GROUPS - K_GROUPS) * HEADS

    # Each load is asked for as soon as it can be, and before what came earlier is used.
    at_r = tl.arange(0, HALF_BLOCK)
    rest_c = 2 * HALF + tl.arange(0, REST_BLOCK)
    if NORM:
        a_weight_r = tl.load(weight_ptr + at_r, mask=at_r < HALF, other=0.0)
        b_weight_r = tl.load(weight_ptr + HALF + at_r, mask=at_r < HALF, other=0.0)
        if 2 * HALF < SIZE:
            c_weight_c = tl.load(weight_ptr + rest_c, mask=rest_c < SIZE, other=0.0)
    if PDL:
        dependent.wait()
    there_T = token_T < num_tokens
    turned_T = there_T & (group < Q_GROUPS + K_GROUPS)
    if ROTATE:
        position_T = tl.load(position_ptr + token_T, mask=turned_T, other=0).to(tl.int64)
    if WRITE:
        slot_T = tl.load(slot_ptr + token_T, mask=there_T, other=-1).to(tl.int64)
    head_H = first + tl.arange(0, HEADS)
    there_TH = there_T[:, None] & (head_H < num_heads)[None, :]
    address_TH = base + token_T[:, None] * stride_t + head_H[None, :] * stride_h
    address_THr = address_TH[:, :, None] + at_r[None, None, :]
    mask_THr = there_TH[:, :, None] & (at_r < HALF)[None, None, :]
    a_THr = tl.load(address_THr, mask=mask_THr, other=0.0)
    b_THr = tl.load(address_THr + HALF, mask=mask_THr, other=0.0)
    rest_THc = address_TH[:, :, None] + rest_c[None, None, :]
    rest_mask_THc = there_TH[:, :, None] & (rest_c < SIZE)[None, None, :]
    c_THc = a_THr
    if 2 * HALF < SIZE:
        c_THc = tl.load(rest_THc, mask=rest_mask_THc, other=0.0)
    if ROTATE:
        # The barriers keep the angles' loads where they are: the assembler would move them up, where all loads would wait for
        # positions, or down behind the norm. Each head asks for its own: what heads share would go through shared memory.
        tl.debug_barrier()
        row_THr = position_T[:, None, None] * (2 * HALF) + tl.broadcast_to(at_r[None, None, :], mask_THr.shape)
        turned_THr = mask_THr & turned_T[:, None, None]
        cos_THr = tl.load(cos_sin_ptr + row_THr, mask=turned_THr, other=1.0)
        sin_THr = tl.load(cos_sin_ptr + HALF + row_THr, mask=turned_THr, other=0.0)
        if NORM:
            tl.debug_barrier()

    if NORM and not is_v:
        x_THr = a_THr.to(tl.float32)
        y_THr = b_THr.to(tl.float32)
        squares_TH = tl.sum(x_THr * x_THr + y_THr * y_THr, axis=2)
        if 2 * HALF < SIZE:
            squares_TH += tl.sum(c_THc.to(tl.float32) * c_THc.to(tl.float32), axis=2)
        scale_TH = tl.rsqrt(squares_TH / SIZE + eps)
        a_THr = _weighted(a_THr, scale_TH, a_weight_r)
        b_THr = _weighted(b_THr, scale_TH, b_weight_r)
        if 2 * HALF < SIZE:
            c_THc = _weighted(c_THc, scale_TH, c_weight_c)
    if ROTATE and not is_v:
        x_THr = a_THr.to(tl.float32)
        y_THr = b_THr.to(tl.float32)
        a_THr = (x_THr * cos_THr - y_THr * sin_THr).to(a_THr.dtype)
        b_THr = (y_THr * cos_THr + x_THr * sin_THr).to(b_THr.dtype)
    if is_q or not WRITE:
        tl.store(address_THr, a_THr, mask=mask_THr)
        tl.store(address_THr + HALF, b_THr, mask=mask_THr)
        if NORM and 2 * HALF < SIZE:
            tl.store(rest_THc, c_THc, mask=rest_mask_THc)
    else:
        dtype: tl.constexpr = kv_ptr.dtype.element_ty
        half = kv_ptr
        if is_v:
            half += KV_HEADS * BLOCK_SIZE * SIZE
        kept_T = half + (slot_T // BLOCK_SIZE) * kv_stride_b + (slot_T % BLOCK_SIZE) * SIZE
        kept_TH1 = (kept_T[:, None] + head_H[None, :] * (BLOCK_SIZE * SIZE))[:, :, None]
        has_slot_T11 = (slot_T >= 0)[:, None, None]
        kept_mask_THr = mask_THr & has_slot_T11
        tl.store(kept_TH1 + at_r[None, None, :], a_THr.to(dtype), mask=kept_mask_THr)
        tl.store(kept_TH1 + HALF + at_r[None, None, :], b_THr.to(dtype), mask=kept_mask_THr)
        if 2 * HALF < SIZE:
            tl.store(kept_TH1 + rest_c[None, None, :], c_THc.to(dtype), mask=rest_mask_THc & has_slot_T11)


@triton.jit
def _silu_and_mul_kernel(x_ptr, out_ptr, stride_t, size, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """Program t * cdiv(size, BLOCK) + i has elements [i * BLOCK, (i + 1) * BLOCK) of token t."""
    if PDL:
        dependent.release()
        dependent.wait()
    blocks_of_token = tl.cdiv(size, BLOCK)
    token = (tl.program_id(0) // blocks_of_token).to(tl.int64)
    at = tl.program_id(0) % blocks_of_token * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    gate = tl.load(x_ptr + token * stride_t + at, mask=mask, other=0.0)
    up = tl.load(x_ptr + token * stride_t + size + at, mask=mask, other=0.0)
    value = gate.to(tl.float32)
    silu = (value / (1.0 + tl.exp(-value))).to(gate.dtype)
    tl.store(out_ptr + token * size + at, (silu.to(tl.float32) * up.to(tl.float32)).to(gate.dtype), mask=mask)


@triton.jit
def _embed_kernel(id_ptr, table_ptr, out_ptr, size, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """Program (t, i) has elements [i * BLOCK, (i + 1) * BLOCK) of token t."""
    if PDL:
        dependent.release()
        dependent.wait()
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    row = tl.load(id_ptr + token).to(tl.int64)
    tl.store(out_ptr + token * size + at, tl.load(table_ptr + row * size + at, mask=mask), mask=mask)


def rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """With a residual it is `Kernels.add_rms_norm`, and x may be in pieces."""
    in_pieces = residual is not None and x.dim() == 3
    if in_pieces:
        if x.dtype is not torch.float32 or x.shape[1:] != residual.shape or not x.is_contiguous():
            raise ValueError(f"pieces must be contiguous fp32 of residual's shape each: {_describe(x)}")
    elif residual is not None and (
        residual.shape != x.shape or residual.dtype is not x.dtype or not residual.is_contiguous()
    ):
        raise ValueError("residual must be contiguous and of x's shape and dtype")
    like = residual if in_pieces else x
    _check(like)
    *outer, size = like.shape
    if weight.dtype is not like.dtype or weight.shape != (size,) or not weight.is_contiguous():
        raise ValueError(f"weight must be a contiguous [{size}] of {like.dtype}, is {_describe(weight)}")
    if len(outer) not in (1, 2) or x.stride(-1) != 1:
        raise ValueError(f"x must be [T, H] or [T, heads, D] with a contiguous last dimension, is {_describe(x)}")
    out = torch.empty_like(like, memory_format=torch.contiguous_format)
    heads, stride_h = (outer[1], x.stride(1)) if len(outer) == 2 else (1, 0)
    num_rows = outer[0] * heads
    if num_rows:
        block = triton.next_power_of_2(size)
        rows = max(1, min(8, 1024 // block))  # one head alone would leave most threads of a program idle
        _rms_norm_kernel[(triton.cdiv(num_rows, rows),)](
            x, x if residual is None else residual, weight, out, num_rows, x.stride(-2) if heads == 1 else x.stride(0),
            stride_h, eps, HEADS=heads, SIZE=size, ADD=residual is not None, PIECES=len(x) if in_pieces else 0, ROWS=rows,
            BLOCK=block, num_warps=min(16, max(4, block // 512)), **dependent.options(x.device),
        )  # fmt: skip
    return out


def norm_rotary_write(
    q_TND: Tensor | None,
    k_TKD: Tensor,
    v_TKD: Tensor | None,
    *,
    norm: tuple[Tensor, Tensor, float] | None = None,
    rotary: tuple[Tensor, Tensor] | None = None,
    cache: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Each as far as it is asked for. norm: weights of q and of k, and eps. rotary: cos_sin and positions. cache: kv and
    slots."""
    _check(k_TKD)
    num_tokens, kv_heads, size = k_TKD.shape
    for x in (q_TND, k_TKD, v_TKD):
        if x is not None and (
            x.dtype is not k_TKD.dtype or len(x) != num_tokens or x.shape[2] != size or x.stride(2) != 1
        ):
            raise ValueError(f"q, k and v don't match: {_describe(x)}, {_describe(k_TKD)}")
    half = size // 2
    # What a flag leaves out still needs an argument of the same type: any tensor of it will do.
    q, v = (k_TKD if x is None else x for x in (q_TND, v_TKD))
    kv, slots, block_size, block_stride = k_TKD, k_TKD, 1, 0
    if cache is not None:
        kv, slots = cache
        block_stride, *inner = kv.stride()
        _, two, _, block_size, _ = kv.shape
        expected = [kv_heads * block_size * size, block_size * size, size, 1]
        if two != 2 or inner != expected or slots.shape != (num_tokens,):
            raise ValueError(f"a layer's cache must be a view pool[:, layer] of a contiguous pool: {_describe(kv)}")
        _check(kv)
    cos_sin, positions = k_TKD, k_TKD
    if rotary is not None:
        cos_sin, positions = rotary
        half = cos_sin.shape[1] // 2
        if cos_sin.dtype is not torch.float32 or not cos_sin.is_contiguous() or 2 * half > size:
            raise ValueError(f"cos_sin must be a contiguous fp32 [P, R], R even, <= {size}: {_describe(cos_sin)}")
        if positions.shape != (num_tokens,):
            raise ValueError(f"positions must be [{num_tokens}]: {_describe(positions)}")
    q_weight, k_weight, eps = norm or (k_TKD, k_TKD, 0.0)
    if not num_tokens:
        return
    q_heads = 0 if q_TND is None else q.shape[1]
    heads = min(8, triton.next_power_of_2(max(q_heads, kv_heads)))
    tokens = max(1, _ELEMENTS // (heads * triton.next_power_of_2(size)))
    num_groups = triton.cdiv(q_heads, heads) + triton.cdiv(kv_heads, heads) * (1 if v_TKD is None else 2)
    _heads_kernel[(triton.cdiv(num_tokens, tokens) * num_groups,)](
        q, k_TKD, v, kv, cos_sin, positions, slots, q_weight, k_weight, num_tokens,
        q.stride(0), q.stride(1), k_TKD.stride(0), k_TKD.stride(1), v.stride(0), v.stride(1), block_stride, eps,
        Q_HEADS=q_heads, KV_HEADS=kv_heads, SIZE=size, HALF=half, BLOCK_SIZE=block_size, NORM=norm is not None,
        ROTATE=rotary is not None, WRITE=cache is not None, TOKENS=tokens, HEADS=heads, GROUPS=num_groups,
        HALF_BLOCK=triton.next_power_of_2(half), REST_BLOCK=triton.next_power_of_2(max(1, size - 2 * half)),
        num_warps=4, **dependent.options(k_TKD.device),
    )  # fmt: skip


def silu_and_mul(gate_up_TI2: Tensor) -> Tensor:
    _check(gate_up_TI2)
    num_tokens, size = gate_up_TI2.shape
    if size % 2 or gate_up_TI2.stride(1) != 1:
        raise ValueError(f"gate_up must be [T, 2 I] with a contiguous last dimension: {_describe(gate_up_TI2)}")
    size //= 2
    out_TI = gate_up_TI2.new_empty((num_tokens, size))
    if num_tokens:
        block = min(1024, triton.next_power_of_2(size))
        _silu_and_mul_kernel[(num_tokens * triton.cdiv(size, block),)](
            gate_up_TI2, out_TI, gate_up_TI2.stride(0), size, BLOCK=block, num_warps=4,
            **dependent.options(out_TI.device),
        )  # fmt: skip
    return out_TI


def embed(ids_T: Tensor, table_VH: Tensor) -> Tensor:
    _check(table_VH)
    if not table_VH.is_contiguous() or not ids_T.is_contiguous():
        raise ValueError(f"the table and the ids must be contiguous: {_describe(table_VH)}, {_describe(ids_T)}")
    num_tokens, size = len(ids_T), table_VH.shape[1]
    out_TH = table_VH.new_empty((num_tokens, size))
    if num_tokens:
        block = min(1024, triton.next_power_of_2(size))
        grid = (num_tokens, triton.cdiv(size, block))
        _embed_kernel[grid](ids_T, table_VH, out_TH, size, BLOCK=block, num_warps=4, **dependent.options(out_TH.device))
    return out_TH


def _check(x: Tensor) -> None:
    if x.dtype not in _DTYPES:
        raise TypeError(f"Triton kernels take fp32, bf16 or fp16, not {_describe(x)}")


def _describe(x: Tensor) -> str:
    return f"{list(x.shape)} {x.dtype} strides {list(x.stride())} on {x.device}"
