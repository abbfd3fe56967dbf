"""`quire bench swap`: how fast blocks move between the device and the host, alone and beside products, of what the bus allows.

Blocks of a model's shape go out and in as preemption sends them (`worker.kv_store`): as neighbours, and scattered, which is a
copy for each of them. The ceiling is one copy of as many bytes from or to pinned memory, in the same run. On a GPU once more
beside large products that were launched right after, as a step's layers are: how much slower are either?
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from quire.bench.report import add_report_arguments, report
from quire.bench.shapes import SHAPES, write_shape
from quire.core.cache_group import form_groups
from quire.core.step import Direction, Transfer
from quire.errors import ConfigError
from quire.model_config import load_model_config

if TYPE_CHECKING:
    import torch

    from quire.worker.kv_store import KVStore

HELP = "blocks between device and host: GB/s alone and beside products, of what the bus allows"
PRODUCT = 8192
"""Rows and columns of the matrices."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-3.1-8b")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--num-blocks", type=int, default=512, help="that move at once (512)")
    parser.add_argument("--device", choices=["auto", "cuda", "cpu"], default="auto")
    parser.add_argument("--repeat", type=int, default=5, help="the median counts (5)")
    add_report_arguments(parser)


def run(args: argparse.Namespace) -> int:
    from quire.worker.worker import choose_device

    if min(args.block_size, args.num_blocks, args.repeat) < 1:
        raise ConfigError("--block-size, --num-blocks and --repeat must be positive")
    device = choose_device(args.device)
    with tempfile.TemporaryDirectory() as directory:
        model = load_model_config(str(write_shape(args.shape, Path(directory))))
    groups = form_groups(model.layer_windows, model.num_kv_heads, model.head_dim, args.dtype)
    moving = Moving(groups, args, device)
    rows = []
    for direction in (Direction.OUT, Direction.IN):
        ceiling = moving.one_copy(direction)
        for how in ("neighbours", "scattered"):
            seconds = moving.swap(direction, how)
            row: dict[str, Any] = {
                "blocks": f"{how}, {direction.value}",
                "GB/s": moving.num_bytes / seconds / 1e9,
                "one copy": moving.num_bytes / ceiling / 1e9,
                "of it": ceiling / seconds,
            }
            if device.type == "cuda":
                beside_s, slower = moving.beside_products(direction, how)
                row |= {
                    "beside products": moving.num_bytes / beside_s / 1e9,
                    "products take so many times as long": slower,
                }
            rows.append(row)
    moving.check()
    report(args, f"{args.shape}: {args.num_blocks} blocks of {moving.num_bytes / args.num_blocks / 1e6:.2f} MB", rows)
    return 0


class Moving:
    """A store, blocks of it that move, and how long they take; seconds are medians."""

    def __init__(self, groups: Any, args: argparse.Namespace, device: torch.device) -> None:
        import torch

        from quire.kernels import select_kernels
        from quire.worker.kv_store import KVStore

        count = args.num_blocks
        self._repeat, self._device = args.repeat, device
        self._store: KVStore = KVStore(
            groups, 2 * count, 2 * count, args.block_size, getattr(torch, args.dtype), device, select_kernels(device)
        )
        self._store.pin_host_memory()
        self._store.wait_until_pinned()
        self.num_bytes = self._store.blocks_BG2HSD[:count].nbytes
        rng = np.random.default_rng(0)
        ids = np.arange(1, count + 1)
        self._pairs = {
            "neighbours": np.stack((ids, ids), 1),
            "scattered": np.stack((rng.permutation(2 * count)[:count], rng.permutation(2 * count)[:count]), 1) + 1,
        }

    def swap(self, direction: Direction, how: str) -> float:
        return self._median(lambda: self._move(direction, self._pairs[how])())

    def one_copy(self, direction: Direction) -> float:
        import torch

        there = torch.empty(self.num_bytes, dtype=torch.uint8, device=self._device)
        here = torch.empty(self.num_bytes, dtype=torch.uint8, pin_memory=self._device.type == "cuda")
        source, target = (there, here) if direction is Direction.OUT else (here, there)
        return self._median(lambda: self._seconds(lambda: target.copy_(source, non_blocking=True)))

    def beside_products(self, direction: Direction, how: str) -> tuple[float, float]:
        """Seconds of the transfer, and how many times as long the products take."""
        import torch

        a, b = (torch.randn(PRODUCT, PRODUCT, device=self._device, dtype=torch.bfloat16) for _ in range(2))
        one_s = self._median(lambda: self._seconds(lambda: torch.mm(a, b)))
        count = max(1, round(self.swap(direction, how) / one_s))  # so that they last as long

        def products() -> None:
            for _ in range(count):
                torch.mm(a, b)

        alone_s = self._median(lambda: self._seconds(products))
        both = []
        for _ in range(self._repeat):
            ended = self._move(direction, self._pairs[how])
            products_s = self._seconds(products)
            both.append((ended(), products_s))
        transfers_s, products_s = (statistics.median(column) for column in zip(*both))
        return transfers_s, products_s / alone_s

    def check(self) -> None:
        """What went out and came in is what was there."""
        import torch

        out, blocks_BX = self._pairs["scattered"], self._store.blocks_BG2HSD.flatten(1)
        numbers_B = torch.arange(len(blocks_BX), device=self._device) % 256  # which any dtype can hold
        blocks_BX.copy_(numbers_B[:, None])
        there = blocks_BX[out[:, 0]].clone()
        self._move(Direction.OUT, out)()
        blocks_BX.zero_()
        self._move(Direction.IN, out[:, ::-1])()
        assert torch.equal(blocks_BX[out[:, 0]], there), "blocks came back changed"

    def _move(self, direction: Direction, pairs: np.ndarray) -> Callable[[], float]:
        """Orders a transfer; what is returned waits for it, and gives its seconds."""
        import torch

        if self._device.type == "cuda":
            torch.cuda.synchronize()
        began_s = time.perf_counter()
        swap = self._store.swap_out if direction is Direction.OUT else self._store.swap_in
        swap(Transfer(0, direction, pairs))
        if self._device.type == "cuda":
            return self._store.transfers_launched()
        seconds = time.perf_counter() - began_s
        return lambda: seconds

    def _seconds(self, work: Callable[[], object]) -> float:
        """By the device's clock, if it has one."""
        import torch

        if self._device.type == "cpu":
            began_s = time.perf_counter()
            work()
            return time.perf_counter() - began_s
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        work()
        ended.record()
        ended.synchronize()
        return began.elapsed_time(ended) / 1e3

    def _median(self, measure: Callable[[], float]) -> float:
        measure()
        return statistics.median(measure() for _ in range(self._repeat))
