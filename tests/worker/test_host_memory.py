"""Memory is pinned in the background, page by page and then whole; what lies in it stays, and closing undoes it."""

import itertools
import threading

import pytest
import torch

from quire.worker import host_memory
from quire.worker.host_memory import CHUNK, CudaDriver, PinnedLater


class FakeDriver:
    def __init__(self, fails: bool = False) -> None:
        self.fails = fails
        self.calls: list[tuple] = []

    def register(self, address: int, num_bytes: int) -> None:
        if self.fails:
            raise RuntimeError("no more memory may be locked")
        self.calls.append(("register", address, num_bytes))

    def unregister(self, address: int) -> None:
        self.calls.append(("unregister", address))


def test_pages_come_first_and_then_the_driver_with_all_of_it() -> None:
    memory, driver, ranges = torch.arange(5 * CHUNK // 2, dtype=torch.uint8), FakeDriver(), []

    def populate(address: int, num_bytes: int) -> bool:
        assert not driver.calls
        ranges.append((address, num_bytes))
        return host_memory.populate(address, num_bytes)

    before = memory.clone()
    pinned = PinnedLater(memory, driver, populate)
    pinned.wait()
    assert pinned.is_pinned and driver.calls == [("register", memory.data_ptr(), memory.nbytes)]
    assert torch.equal(memory, before)
    end = memory.data_ptr() + memory.nbytes
    assert len(ranges) == 3 and all(a % 4096 == 0 and n % 4096 == 0 and a + n <= end for a, n in ranges)
    assert ranges[0][0] - memory.data_ptr() < 4096 and end - sum(ranges[-1]) < 4096
    assert all(a + n == b for (a, n), (b, _) in itertools.pairwise(ranges))
    pinned.close()
    pinned.close()
    assert driver.calls[1:] == [("unregister", memory.data_ptr())]


def test_where_pages_cannot_be_brought_the_driver_does_it() -> None:
    asked, driver = [], FakeDriver()
    pinned = PinnedLater(torch.empty(3 * CHUNK, dtype=torch.uint8), driver, lambda *range_: bool(asked.append(range_)))
    pinned.wait()
    assert len(asked) == 1 and pinned.is_pinned


def test_what_cannot_be_pinned_serves_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    driver = FakeDriver(fails=True)
    pinned = PinnedLater(torch.empty(CHUNK, dtype=torch.uint8), driver)
    pinned.wait()
    assert not pinned.is_pinned and "swapping is slow: no more memory" in caplog.text
    pinned.close()
    assert driver.calls == []


def test_closing_does_not_wait_for_all_pages() -> None:
    driver, asked, goes_on = FakeDriver(), [], threading.Event()

    def populate(address: int, num_bytes: int) -> bool:
        asked.append(address)
        return goes_on.wait()

    pinned = PinnedLater(torch.empty(8 * CHUNK, dtype=torch.uint8), driver, populate)
    while not asked:
        pass
    closing = threading.Thread(target=pinned.close)
    closing.start()
    while not pinned._closing.is_set():
        pass
    goes_on.set()
    closing.join()
    assert len(asked) == 1 and driver.calls == [] and not pinned.is_pinned


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
def test_copies_are_right_before_and_after() -> None:
    memory = torch.randint(0, 255, (2 * CHUNK,), dtype=torch.uint8)
    expected = memory.clone()
    pinned = PinnedLater(memory, CudaDriver(torch.device("cuda")))
    for _ in range(2):
        on_device = torch.empty(CHUNK, dtype=torch.uint8, device="cuda").copy_(memory[:CHUNK], non_blocking=True)
        memory[CHUNK:].copy_(on_device, non_blocking=True)
        torch.cuda.synchronize()
        assert torch.equal(memory[:CHUNK], expected[:CHUNK]) and torch.equal(memory[CHUNK:], expected[:CHUNK])
        pinned.wait()
        assert pinned.is_pinned and memory.is_pinned()
    pinned.close()
    assert not memory.is_pinned()
