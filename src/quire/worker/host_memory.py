"""Host memory that a GPU copies from and to, pinned while the engine already serves.

Pinning gigabytes at the start takes seconds to tens of seconds, most of it for the kernel to find pages and clear them, and
under the driver's lock, so that nothing is launched meanwhile. Here a thread of its own has the pages brought first, without
the driver; the pinning itself is then short. Before that, and where it fails, copies are right but slow: the driver takes
them through a buffer of its own, and the host waits.

    PinnedLater    | populate 16 MiB | populate 16 MiB | ... | register |                        | unregister
    the engine       captured | serves ............................................... | closed

Does not know what lies in the memory, and leaves it as it is.
"""

import ctypes
import logging
import mmap
import threading
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

CHUNK = 16 << 20
"""Bytes that are populated at once: so long may others that map memory have to wait."""
MADV_POPULATE_WRITE = 23
"""Linux 5.14: brings pages as writing to them would, and writes nothing."""


class Driver(Protocol):
    """What pins memory; both raise RuntimeError where that fails."""

    def register(self, address: int, num_bytes: int) -> None: ...

    def unregister(self, address: int) -> None: ...


class CudaDriver:
    def __init__(self, device: torch.device) -> None:
        self._device = device

    def register(self, address: int, num_bytes: int) -> None:
        with torch.cuda.device(self._device):
            torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(address, num_bytes, 0))

    def unregister(self, address: int) -> None:
        with torch.cuda.device(self._device):
            torch.cuda.synchronize()  # copies that a shutdown left under way
            torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(address))


def populate(address: int, num_bytes: int) -> bool:
    """Whether the kernel brought the pages of this range, whose address is a multiple of the page size."""
    try:
        madvise = ctypes.CDLL(None, use_errno=True).madvise
    except (OSError, AttributeError):
        return False
    return madvise(ctypes.c_void_p(address), ctypes.c_size_t(num_bytes), MADV_POPULATE_WRITE) == 0


class PinnedLater:
    """Pins a tensor's memory in the background, from its construction on; `close` ends that and undoes it.

    The memory lives as long as this does. populate: brings a range of pages, and says whether it could.
    """

    def __init__(self, memory: Tensor, driver: Driver, populate: Callable[[int, int], bool] = populate) -> None:
        self._memory = memory
        self._driver = driver
        self._populate = populate
        self._closing = threading.Event()
        self.is_pinned = False
        self._thread = threading.Thread(target=self._pin, name="quire-pin", daemon=True)
        self._thread.start()

    def _pin(self) -> None:
        address, num_bytes = self._memory.data_ptr(), self._memory.nbytes
        page = mmap.PAGESIZE
        first = -(-address // page) * page
        for begin in range(first, address + num_bytes - page + 1, CHUNK):
            if self._closing.is_set():
                return
            if not self._populate(begin, min(CHUNK, (address + num_bytes - begin) // page * page)):
                break  # the driver brings them
        if self._closing.is_set():
            return
        try:
            self._driver.register(address, num_bytes)
            self.is_pinned = True
        except RuntimeError as error:
            logger.warning("swap space is not pinned, so swapping is slow: %s", error)

    def wait(self) -> None:
        """Until it is pinned, or has failed to be."""
        self._thread.join()

    def close(self) -> None:
        """Nobody may begin a copy any more."""
        self._closing.set()
        self._thread.join()
        if self.is_pinned:
            self.is_pinned = False
            try:
                self._driver.unregister(self._memory.data_ptr())
            except RuntimeError as error:  # at the end of the process the driver may have gone before
                logger.debug("memory stays pinned: %s", error)
