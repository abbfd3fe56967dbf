"""The rows of `quire bench kernels` for linear layers: ours beside cuBLAS at 1 to 8,192 tokens.

Each layer is that of a model's shape, with what our kernels fuse into it: for few tokens (`skinny`) norm before qkv and
gate_up, SiLU x up after gate_up, the residual's addition after o and down; for more (`triton.linear`, and on Hopper
`gluon.linear`) SiLU x up, and o and down are left in pieces for the norm to sum. cuBLAS does the product alone, and where
ours has SiLU x up also with that as a kernel of its own after it. The ceiling is reading the weights or multiplying, whichever
takes longer. A graph goes round several copies of the weights, more than the L2 cache holds. Variants are compiled by several
processes first, into Triton's cache, and each result is checked before it is timed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import multiprocessing
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from quire.kernels.gluon import LinearTile
    from quire.kernels.triton import linear, skinny

    Tile = skinny.Tile | linear.Tile | LinearTile

MIN_BYTES = 4e8
"""Of weights that a graph goes round."""
VARIED = (1, 4, 32, 128)
"""Numbers of tokens for which variants are tried, of kernels in Triton."""

# outputs of a program (or twice its pairs), inputs of a turn, warps
SKINNY = (
    (8, 1024, 4), (4, 1024, 4), (16, 1024, 4), (4, 1024, 2), (8, 512, 2), (4, 2048, 4), (2, 4096, 8), (4, 4096, 8),
    (2, 2048, 4),
)  # fmt: skip
# outputs (or pairs) of a program, inputs of a turn, stages
LINEAR = (
    (32, 64, 6), (32, 128, 4), (32, 128, 6), (64, 64, 3), (64, 64, 4), (64, 64, 6), (64, 128, 3), (64, 128, 4), (64, 128, 6),
    (128, 64, 4), (128, 64, 6), (128, 128, 3),
)  # fmt: skip
PIECES = (1, 2, 4)


@dataclass(frozen=True)
class Layer:
    """`silu`: the weight is [2 outputs, size]."""

    name: str
    size: int
    outputs: int
    norm: bool = False
    silu: bool = False

    @property
    def weight_shape(self) -> tuple[int, int]:
        return self.outputs * (2 if self.silu else 1), self.size

    @property
    def in_pieces(self) -> bool:
        """Whether a norm follows, which can sum up pieces."""
        return not self.norm

    @property
    def num_bytes(self) -> int:
        return 2 * math.prod(self.weight_shape)


LAYERS = (
    Layer("0.6B qkv", 1024, 4096, norm=True),
    Layer("0.6B o", 2048, 1024),
    Layer("0.6B gate_up", 1024, 3072, norm=True, silu=True),
    Layer("0.6B down", 3072, 1024),
    Layer("8B qkv", 4096, 6144, norm=True),
    Layer("8B o", 4096, 4096),
    Layer("8B gate_up", 4096, 14336, norm=True, silu=True),
    Layer("8B down", 14336, 4096),
)
WORKS = tuple(
    (f"linear {layer.name} x{tokens}", layer, tokens)
    for layer in LAYERS
    for tokens in (
        1,
        2,
        4,
        16,
        32,
        64,
        96,
        128,
        144,
        160,
        192,
        208,
        224,
        256,
        320,
        384,
        512,
        768,
        1024,
        1280,
        2048,
        8192,
    )
)


def variants(layer: Layer, tokens: int) -> list[Tile]:
    from quire.kernels.triton import linear, skinny

    if tokens not in VARIED:
        return []
    tiles: dict[Tile, None]
    if tokens <= skinny.MAX_TOKENS:
        whole = 1 << (layer.size - 1).bit_length()
        pairs = 2 if layer.silu else 1
        tiles = dict.fromkeys(
            skinny.Tile(r // pairs, columns, warps) for r, columns, warps in SKINNY if columns <= whole
        )
    else:
        tiles = dict.fromkeys(
            linear.Tile(rows, max(tokens, 64 if rows < 64 else 16), columns, stages, pieces)
            for rows, columns, stages in LINEAR
            for pieces in (PIECES if layer.in_pieces else (1,))
        )
    return list(tiles)


def chosen(layer: Layer, x_TH: Tensor, weight: Tensor) -> Tile | None:
    """None: of so many tokens this is cuBLAS's."""
    from quire.kernels import gluon
    from quire.kernels.triton import linear, skinny

    tokens = len(x_TH)
    if tokens <= skinny.MAX_TOKENS:
        return skinny.choose_tile(tokens, layer.outputs, layer.size, layer.silu)
    if (layer.silu or layer.in_pieces) and gluon.takes_linear(x_TH, weight, None, silu=layer.silu):
        return gluon.choose_linear_tile(tokens, layer.outputs, silu=layer.silu)
    if not linear.takes(x_TH, weight, None, silu=layer.silu, in_pieces=layer.in_pieces):
        return None
    return linear.choose_tile(tokens, layer.outputs, layer.size, silu=layer.silu, in_pieces=layer.in_pieces)


def call(layer: Layer, x_TH: Tensor, weight: Tensor, norm_H: Tensor, residual_TO: Tensor, tile: Tile) -> Tensor:
    """Our kernels, as the model calls them; the result of layers that add is residual."""
    from quire.kernels import gluon
    from quire.kernels.triton import linear, skinny

    if isinstance(tile, gluon.LinearTile):
        from quire.kernels.gluon import linear as gluon_linear

        return (gluon_linear.linear_silu_mul if layer.silu else gluon_linear.linear_pieces)(x_TH, weight, tile=tile)
    if isinstance(tile, linear.Tile):
        if layer.silu:
            return linear.linear_silu_mul(x_TH, weight, tile=tile)
        return (linear.linear_pieces if layer.in_pieces else linear.linear)(x_TH, weight, tile=tile)
    norm = (norm_H, 1e-6)
    if layer.silu:
        return skinny.linear_silu_mul(x_TH, weight, norm=norm, tile=tile)
    if layer.norm:
        return skinny.linear(x_TH, weight, norm=norm, tile=tile)
    skinny.linear_add_(x_TH, weight, residual_TO, tile=tile)
    return residual_TO


def expected(layer: Layer, x_TH: Tensor, weight: Tensor, norm_H: Tensor, residual_TO: Tensor, fused: bool) -> Tensor:
    """The same from torch, in fp32; fused: with norm and addition."""
    x = x_TH.float()
    if layer.norm and fused:
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * norm_H.float()
    y = x @ weight.float().T
    if layer.silu:
        gate, up = y.chunk(2, -1)
        return F.silu(gate) * up
    return y if layer.norm or not fused else residual_TO.float() + y


def tensors(layer: Layer, tokens: int, device: str = "cuda") -> tuple[Tensor, Tensor, Tensor]:
    """x, the norm's weights, the residual; bf16."""
    shapes = ((tokens, layer.size), (layer.size,), (tokens, layer.outputs))
    x, norm, residual = (torch.randn(shape, device=device).to(torch.bfloat16) for shape in shapes)
    return x, norm, residual


def compile_ahead(works: Sequence[tuple[str, Layer, int]]) -> None:
    """Fills Triton's cache on disk with all variants of these works."""
    jobs: dict[tuple[Any, ...], tuple[Layer, int, Tile]] = {}
    for _, layer, tokens in works:
        for tile in variants(layer, tokens):
            jobs.setdefault((layer, tile), (layer, tokens, tile))
    if not jobs:
        return
    workers = max(1, min(14, (os.cpu_count() or 2) - 2, len(jobs)))
    shares = [list(jobs.values())[i::workers] for i in range(workers)]
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(_compile, shares))


def _compile(jobs: Iterable[tuple[Layer, int, Tile]]) -> None:
    for layer, tokens, tile in jobs:
        weight = torch.zeros(layer.weight_shape, device="cuda", dtype=torch.bfloat16)
        x, norm, residual = tensors(layer, tokens)
        with contextlib.suppress(Exception):  # told when it is measured
            call(layer, x, weight, norm, residual, tile)


TimeGraph = Callable[[Sequence[Callable[[], object]], int], float]


@dataclass(frozen=True)
class Problem:
    layer: Layer
    x_TH: Tensor
    norm_H: Tensor
    residual_TO: Tensor
    weights: tuple[Tensor, ...]
    time_graph: TimeGraph
    repeat: int

    def ours(self, tile: Tile) -> dict[str, float]:
        from quire.kernels.triton import skinny

        layer, x, norm = self.layer, self.x_TH, self.norm_H
        want = expected(layer, x, self.weights[0], norm, self.residual_TO, isinstance(tile, skinny.Tile))
        found = call(layer, x, self.weights[0], norm, self.residual_TO.clone(), tile)
        if found.dim() == 3:
            found = found.sum(0)
        error = float((found.float() - want).norm() / want.norm())
        if not error < 1e-2:
            raise AssertionError(f"relative error {error}")
        sums = self.residual_TO.clone()
        return self._row([lambda w=w: call(layer, x, w, norm, sums, tile) for w in self.weights])

    def cublas(self) -> dict[str, float]:
        return self._row([lambda w=w: F.linear(self.x_TH, w) for w in self.weights])

    def cublas_with_silu(self) -> dict[str, float]:
        from quire.kernels.triton.ops import TritonKernels

        silu_and_mul = TritonKernels().silu_and_mul
        return self._row([lambda w=w: silu_and_mul(F.linear(self.x_TH, w)) for w in self.weights])

    def _row(self, calls: Sequence[Callable[[], object]]) -> dict[str, float]:
        seconds = self.time_graph(calls, self.repeat)
        operations = len(self.x_TH) * self.layer.num_bytes  # two for each of the weights, which are of two bytes
        return {
            "us": 1e6 * seconds,
            "TB/s": self.layer.num_bytes / seconds / 1e12,
            "TFLOP/s": operations / seconds / 1e12,
        }


def measure(
    works: Sequence[tuple[str, Layer, int]],
    time_graph: TimeGraph,
    ceilings: Mapping[str, float],
    *,
    repeat: int,
    with_variants: bool,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """-> rows of the table, and what was tried. Prints each row, the variants from the best to the worst."""
    if with_variants:
        compile_ahead(works)
    rows: list[dict[str, Any]] = []
    tried: list[dict[str, Any]] = []
    drawn: tuple[Layer, tuple[Tensor, ...]] | None = None
    for name, layer, tokens in works:
        if drawn is None or drawn[0] != layer:
            drawn = None  # free these first
            count = max(4, math.ceil(MIN_BYTES / layer.num_bytes))
            made = torch.empty((count, *layer.weight_shape), device="cuda", dtype=torch.bfloat16)
            drawn = layer, made.normal_(std=layer.size**-0.5).unbind(0)
        problem = Problem(layer, *tensors(layer, tokens), drawn[1], time_graph, repeat)
        tile = chosen(layer, problem.x_TH, problem.weights[0])
        if tile is None:
            continue
        found, cublas = problem.ours(tile), problem.cublas()
        reached = max(found["TB/s"] / ceilings["read TB/s"], found["TFLOP/s"] / ceilings["matmul TFLOP/s"])
        row = {"layer": name, **found, "of ceiling": reached, "cuBLAS us": cublas["us"]}
        row["and SiLU us"] = problem.cublas_with_silu()["us"] if layer.silu else None
        rows.append(row | {"tile": _words(tile)})
        print(*(f"{value:.3g}" if isinstance(value, float) else value for value in rows[-1].values()), flush=True)
        if not with_variants:
            continue
        same: list[dict[str, Any]] = [{"layer": name, "tile": _words(tile), **found}]
        for other in variants(layer, tokens):
            if other == tile:
                continue
            try:
                same.append({"layer": name, "tile": _words(other), **problem.ours(other)})
            except Exception as error:  # too much shared memory, say: the others still count
                same.append({"layer": name, "tile": _words(other), "us": math.inf, "error": repr(error)[:200]})
        same.sort(key=lambda t: t["us"])
        print("  us: " + ", ".join(f"[{t['tile']}] {t['us']:.2f}" for t in same), flush=True)
        tried += same
    return rows, tried


def _words(tile: Tile) -> str:
    return " ".join(map(str, dataclasses.astuple(tile)))
