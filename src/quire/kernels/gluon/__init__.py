"""Kernels in Gluon, for Hopper alone: what their callers need to know before they load them, and with them the compiler's
experimental part (`quire.kernels.gluon.attention` for queries of many tokens, `decode` for one, `linear`).

Does not know how work is planned (`quire.attention.work_list`).
"""

from dataclasses import dataclass
from functools import cache

import torch
import triton
from torch import Tensor

from quire.kernels.triton.attention import Tile
from quire.kernels.triton.linear import MANY, PROGRAMS, lie_for_tma

TRITON_VERSIONS = ("3.6",)
"""Those that the kernels were seen to work with: Gluon is experimental, and changes its functions from one to the next."""
GROUPS = (1, 2, 4, 8, 16, 32)
HEAD_SIZES = (64, 128)
BLOCK_SIZES = (16, 32, 64, 128, 256)
MAX_DECODE_GROUP = 8
MAX_TOKENS = 256
"""Of a linear layer in pieces."""
MAX_PAIRS = {2: 128, 3: 112}
"""Of gate and up in a program, by its consumers: their registers are all that there are."""
MAX_PIECES = 4
MAX_TOKENS_AT_ONCE = 192
"""Of a layer with SiLU x up: so many are one program's, of 3 consumers. With more, programs have 2, and several tiles."""
PAIRS_OF_SEVERAL = (64, 112, 128)
"""Gate and up of a program then."""
LEAST_SHARE = 0.64
"""See `takes_linear`. The kernel was as fast as cuBLAS and SiLU, or faster, with 0.646 and more; with 0.63 and less it was as
fast or slower, but for 208 and 224 tokens of a small layer (by 2 and 4 %)."""


@dataclass(frozen=True)
class GluonTile(Tile):
    """A tile that `quire.kernels.gluon` computes where it can (no softcap, and `takes`), else the Triton kernel: a low one in
    `decode`, a high one in `attention`.

    num_stages: turns' keys, and as many turns' values, that shared memory holds. num_warps is the Triton kernel's.
    """


@dataclass(frozen=True)
class LinearTile:
    """How `quire.kernels.gluon.linear` cuts the work."""

    rows: int
    """Outputs of a program, or pairs of gate and up."""
    num_pieces: int = 1
    consumers: int = 1
    """With SiLU x up, 2 or 3, each with 64 tokens."""


@cache
def available(device: torch.device) -> bool:
    """Whether this is a GPU that the kernels are for, and a Triton that compiles them."""
    return (
        device.type == "cuda"
        and torch.cuda.get_device_capability(device)[0] == 9
        and ".".join(triton.__version__.split(".")[:2]) in TRITON_VERSIONS
    )


def supports(num_heads: int, num_kv_heads: int, head_size: int, dtype: torch.dtype) -> bool:
    """Whether the attention kernel is for such layers, with or without a window, causal or not, but with no softcap.

    dtype: of queries and cache both.
    """
    group = num_heads // num_kv_heads
    return group in GROUPS and head_size in HEAD_SIZES and dtype in (torch.bfloat16, torch.float16)


def takes(q_TND: Tensor, kv_B2KSD: Tensor) -> bool:
    """Whether these tensors, of a layer that `supports` is true for, lie as TMA needs it: on multiples of 16 bytes."""
    return kv_B2KSD.shape[3] in BLOCK_SIZES and all(
        x.dtype.itemsize == 2 and x.stride(-1) == 1 and not (x.data_ptr() % 16 or any(s % 8 for s in x.stride()[:-1]))
        for x in (q_TND, kv_B2KSD)
    )


def choose_tile(max_query_len: int, window: int | None) -> GluonTile:
    """The tile for items of sequences with up to so many query tokens."""
    if window is not None:  # fewer keys in a turn: less lies beyond the edges, whose masks take registers
        return GluonTile(128, 64, 8, 4, 1, 64)
    if max_query_len <= 1024:  # and beyond the diagonal, which is much of what they see
        return GluonTile(128, 64, 8, 4, 1, 32)
    return GluonTile(128, 128, 8, 2, 1, 32)


def supports_decode(num_heads: int, num_kv_heads: int, head_size: int, dtype: torch.dtype) -> bool:
    """As `supports`, of the kernel for items of one token, which knows no window."""
    return (
        num_heads <= MAX_DECODE_GROUP * num_kv_heads
        and head_size in HEAD_SIZES
        and dtype in (torch.bfloat16, torch.float16)
    )


def decode_tile(head_size: int) -> GluonTile:
    """The tile for items of one token each, of however many sequences: in a turn 8 KB of keys and as much of values."""
    return GluonTile(16, 4096 // head_size, 1, 3, 4)


def choose_linear_tile(num_tokens: int, num_outputs: int, *, silu: bool = False) -> LinearTile:
    """The tile whose programs are through soonest, where as many run at once as there are multiprocessors. Without SiLU x up
    num_tokens makes no difference; with it there is one tile for all beyond MANY, so that a start has not many to compile."""
    if not silu:
        pieces = min(range(1, MAX_PIECES + 1), key=lambda pieces: _rounds(num_outputs, 64, pieces) / pieces)
        return LinearTile(64, pieces)
    if num_tokens <= MAX_TOKENS_AT_ONCE:
        consumers = 2 if num_tokens <= 128 else 3
        rows = min(range(MAX_PAIRS[3], 0, -16), key=lambda rows: rows * _rounds(num_outputs, rows))
        return LinearTile(rows, consumers=consumers)
    choices = PAIRS_OF_SEVERAL if num_tokens <= MANY else PAIRS_OF_SEVERAL[-1:]
    return LinearTile(min(choices, key=lambda rows: _silu_time(num_tokens, num_outputs, rows)), consumers=2)


def _silu_time(num_tokens: int, num_outputs: int, rows: int) -> int:
    """In pairs that all multiprocessors' programs compute at once, with 2 consumers. Multiplying for a tile takes as long as
    32 pairs more would: 64, 112 and 128 in 1 to 55 rounds took at most 12 % more or less than that."""
    return _rounds(num_outputs, rows, -(-num_tokens // 128)) * (rows + 32)


def _rounds(num_outputs: int, rows: int, times: int = 1) -> int:
    return -(-(-(-num_outputs // rows) * times) // PROGRAMS)


def takes_linear(x_TH: Tensor, weight: Tensor, bias: Tensor | None, *, silu: bool = False) -> bool:
    """Whether the kernels are the way for x, rather than Triton's, or cuBLAS's product and separate kernels beside it.

    Measured on an H200 with layers of 1,024 to 14,336 inputs and outputs. Of up to 32 tokens Triton's ask for weights sooner;
    with SiLU x up they are as fast up to 64, and beyond MAX_TOKENS_AT_ONCE it depends on how full the rounds are: cuBLAS has
    more ways to cut the work. silu: else the result comes in pieces.
    """
    count = len(x_TH)
    if silu:
        fits = count > 64 and len(weight) % 32 == 0 and count * len(weight) < 2**32
        fits = fits and (count <= MAX_TOKENS_AT_ONCE or _share(count, len(weight) // 2) >= LEAST_SHARE)
    else:
        fits = 32 < count <= MAX_TOKENS
    return fits and bias is None and available(x_TH.device) and lie_for_tma(x_TH, weight)


@cache
def _share(num_tokens: int, num_outputs: int) -> float:
    """Of the time that multiplying takes with all multiprocessors at work all the time, in that of the tile that is chosen."""
    rows = choose_linear_tile(num_tokens, num_outputs, silu=True).rows
    return num_tokens * num_outputs / (_silu_time(num_tokens, num_outputs, rows) * PROGRAMS * 128)
