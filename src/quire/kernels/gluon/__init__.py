"""Kernels in Gluon, for Hopper alone: what their callers need to know before they load them, and with them the compiler's
experimental part (`quire.kernels.gluon.attention`, `quire.kernels.gluon.linear`).

Does not know how work is planned (`quire.attention.work_list`).
"""

from dataclasses import dataclass
from functools import cache

import torch
import triton
from torch import Tensor

from quire.kernels.triton.attention import Tile
from quire.kernels.triton.linear import PROGRAMS, lie_for_tma

TRITON_VERSIONS = ("3.6",)
"""Those that the kernels were seen to work with: Gluon is experimental, and changes its functions from one to the next."""
GROUPS = (1, 2, 4, 8, 16, 32)
HEAD_SIZES = (64, 128)
BLOCK_SIZES = (16, 32, 64, 128, 256)
MAX_TOKENS = 256
"""Of a linear layer."""
MAX_SILU_TOKENS = 192
"""Of one with SiLU x up: three consumers' registers are all that there are."""
MAX_PAIRS = 112
MAX_PIECES = 4


@dataclass(frozen=True)
class GluonTile(Tile):
    """A tile that `quire.kernels.gluon.attention` computes where it can (no softcap, and `takes`), else the Triton kernel.

    num_stages: turns' keys, and as many turns' values, that shared memory holds. num_warps is the Triton kernel's.
    """


@dataclass(frozen=True)
class LinearTile:
    """How `quire.kernels.gluon.linear` cuts the work."""

    rows: int
    """Outputs of a program, or pairs of gate and up."""
    num_pieces: int = 1


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


def choose_linear_tile(num_outputs: int, *, silu: bool = False) -> LinearTile:
    """The tile whose programs are through soonest, where as many run at once as there are multiprocessors."""
    if silu:
        rows = min(range(MAX_PAIRS, 0, -16), key=lambda rows: rows * _rounds(num_outputs, rows))
        return LinearTile(rows)
    return LinearTile(64, min(range(1, MAX_PIECES + 1), key=lambda pieces: _rounds(num_outputs, 64, pieces) / pieces))


def _rounds(num_outputs: int, rows: int, num_pieces: int = 1) -> int:
    return -(-(-(-num_outputs // rows) * num_pieces) // PROGRAMS)


def takes_linear(x_TH: Tensor, weight: Tensor, bias: Tensor | None, *, silu: bool = False) -> bool:
    """Whether the kernels are the way for x, rather than Triton's, or cuBLAS's product and separate kernels beside it.

    Measured on an H200 with layers of 1,024 to 14,336 inputs and outputs. Of up to 32 tokens Triton's ask for weights sooner;
    with SiLU x up they are as fast up to 64. silu: else the result comes in pieces.
    """
    least, most = (64, MAX_SILU_TOKENS) if silu else (32, MAX_TOKENS)
    if silu and len(weight) % 2:
        return False
    return least < len(x_TH) <= most and bias is None and available(x_TH.device) and lie_for_tma(x_TH, weight)
