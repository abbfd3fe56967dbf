"""KV memory: one tensor on the device and one on the host, and the three ways in which whole blocks move.

Layout: [block, layer of the group, key or value, KV head, slot, head size]. All bytes of a block lie together, so that a copy
or a transfer is one run of bytes for each block. Does not know which block belongs to whom.

On a GPU, transfers run on a stream of their own beside the step that ordered them: after all that was launched before, so
after the last writer of what they read. Nobody touches their blocks meanwhile, for the scheduler has them pinned.

Shape legend: B = blocks, G = layers of a cache group, H = KV heads, S = slots of a block, D = head size.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from quire.core.cache_group import CacheGroup
from quire.core.step import Transfer
from quire.errors import CapacityError
from quire.kernels import Kernels
from quire.worker.host_memory import CudaDriver, PinnedLater


class KVStore:
    """`num_blocks` and `num_host_blocks` don't count the null block. Memory is not filled: pages are taken as they are used."""

    def __init__(
        self,
        groups: Sequence[CacheGroup],
        num_blocks: int,
        num_host_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
        kernels: Kernels,
    ) -> None:
        spec = groups[0]
        shape = (len(spec.layers), 2, spec.num_kv_heads, block_size, spec.head_size)
        try:
            self.blocks_BG2HSD = torch.empty((num_blocks + 1, *shape), dtype=dtype, device=device)
            self.host_BG2HSD = torch.empty((num_host_blocks + 1, *shape), dtype=dtype)
        except RuntimeError as error:
            raise CapacityError(
                f"no memory for {num_blocks} KV blocks on {device} and {num_host_blocks} on the host: lower "
                f"gpu_memory_utilization, num_gpu_blocks_override or swap_space"
            ) from error
        self._device = device
        self._kernels = kernels
        self._pinned: PinnedLater | None = None
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._transfers_began: torch.cuda.Event | None = None
        # layer -> its view [B, 2, H, S, D] and its cache group
        self.layers: list[Tensor] = [torch.empty(0)] * sum(len(group.layers) for group in groups)
        self.group_of_layer = [0] * len(self.layers)
        for g, group in enumerate(groups):
            for i, layer in enumerate(group.layers):
                self.layers[layer] = self.blocks_BG2HSD[:, i]
                self.group_of_layer[layer] = g

    def pin_host_memory(self) -> None:
        """Begins to, where there is a GPU; until it is done, transfers keep the host waiting."""
        if self._device.type == "cuda" and len(self.host_BG2HSD) > 1:
            self._pinned = PinnedLater(self.host_BG2HSD, CudaDriver(self._device))
            weakref.finalize(self, self._pinned.close)

    def wait_until_pinned(self) -> None:
        """Or until that has failed."""
        if self._pinned is not None:
            self._pinned.wait()

    def copy(self, pairs: np.ndarray) -> None:
        """Copies blocks on the device; `pairs` [n, 2] are (source, target), and no block is both."""
        if len(pairs):
            source, target = self._ids(pairs)
            self._kernels.copy_blocks(self.blocks_BG2HSD, source, target)

    def swap_out(self, transfer: Transfer) -> None:
        self._swap(self.blocks_BG2HSD, self.host_BG2HSD, transfer)

    def swap_in(self, transfer: Transfer) -> None:
        self._swap(self.host_BG2HSD, self.blocks_BG2HSD, transfer)

    def _swap(self, source_pool: Tensor, target_pool: Tensor, transfer: Transfer) -> None:
        source, target = self._ids(transfer.pairs)
        if self._stream is None:
            self._kernels.swap_blocks(source_pool, target_pool, source, target)
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        if self._transfers_began is None:
            self._transfers_began = torch.cuda.Event(enable_timing=True)
            self._transfers_began.record(self._stream)
        with torch.cuda.stream(self._stream):
            self._kernels.swap_blocks(source_pool, target_pool, source, target)

    def transfers_launched(self) -> Callable[[], float]:
        """What is returned waits for the transfers ordered since this was last asked, and gives the seconds that they took.

        0.0 where there are none, and where they were over when they were ordered.
        """
        began, self._transfers_began = self._transfers_began, None
        if began is None:
            return float
        ended = torch.cuda.Event(enable_timing=True)
        ended.record(self._stream)

        def wait() -> float:
            ended.synchronize()
            return began.elapsed_time(ended) / 1e3

        return wait

    @staticmethod
    def _ids(pairs: np.ndarray) -> tuple[Tensor, Tensor]:
        ids = torch.from_numpy(np.ascontiguousarray(pairs.T.astype(np.int64)))
        return ids[0], ids[1]
