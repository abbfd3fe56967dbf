"""What a step sends and gets through buffers that are used again: never before the device, or the host, is done with them."""

from triton_interpreter import HAS_CUDA  # isort: skip

import math
from typing import Any

import numpy as np
import pytest
import torch

from quire.attention import AttentionSpec
from quire.attention.work_list import choose_costs, choose_tile, layer_kind, list_one, list_work
from quire.kernels.gluon import decode_tile
from quire.sampling.transfer import Inbox, Outbox, ToHost


class LateDevice:
    """Copies when it is waited for, and not before: what a copy reads is what its source holds then."""

    def __init__(self) -> None:
        self.copies: list[tuple[LateTarget, torch.Tensor]] = []
        self.num_done = 0

    def run_until(self, count: int) -> None:
        while self.num_done < count:
            target, source = self.copies[self.num_done]
            target.received.append(source.tolist())
            self.num_done += 1


class LateTarget:
    """Stands for a tensor of `count` words on the device."""

    def __init__(self, device: LateDevice, count: int) -> None:
        self.shape = (count,)
        self.received: list[list[int]] = []
        self._device = device

    def copy_(self, source: torch.Tensor, non_blocking: bool) -> None:
        assert non_blocking
        self._device.copies.append((self, source))


class LateEvent:
    def __init__(self, device: LateDevice) -> None:
        self._device = device
        self._behind = 0
        self.num_waits = 0

    def record(self) -> None:
        self._behind = len(self._device.copies)

    def synchronize(self) -> None:
        self.num_waits += 1
        self._device.run_until(self._behind)


def test_words_are_not_written_over_before_the_device_has_read_them() -> None:
    device = LateDevice()
    outbox = Outbox(5, torch.device("cpu"), num_buffers=3, new_event=lambda: LateEvent(device))
    target = LateTarget(device, 4)
    sent = []
    for step in range(10):
        words = outbox.next()
        # as far behind as the buffers let it be, and no further
        assert device.num_done == max(0, step - 2)
        words[:] = np.arange(5) + 10 * step
        sent.append(words[:4].tolist())
        outbox.send(target)  # type: ignore[arg-type]
    device.run_until(10)
    assert target.received == sent


def test_without_the_guard_a_late_device_reads_later_words() -> None:
    """That the test above can fail."""
    device = LateDevice()
    outbox = Outbox(1, torch.device("cpu"), num_buffers=3)
    target = LateTarget(device, 1)
    for step in range(4):
        outbox.next()[:] = step
        outbox.send(target)  # type: ignore[arg-type]
    device.run_until(4)
    assert target.received == [[3], [1], [2], [3]]


def test_a_result_keeps_its_buffer_until_it_was_read() -> None:
    waited: list[int] = []

    class Event:
        def __init__(self) -> None:
            self.number = len(made)
            made.append(self)

        def record(self) -> None: ...

        def synchronize(self) -> None:
            waited.append(self.number)

    made: list[Event] = []
    result = torch.zeros(2, 3, dtype=torch.int32)
    inbox = Inbox(result, num_buffers=2, new_event=Event)
    on_their_way = []
    for step in range(3):
        on_their_way.append(ToHost(result.fill_(step), inbox=inbox))
    assert [sent.wait()[0].unique().tolist() for sent in on_their_way] == [[0], [1], [2]]
    assert sorted(waited) == [0, 1, 2]
    first = on_their_way[0].wait()[0]
    assert len(waited) == 3, "a second wait gives the same"
    for step in range(3, 6):
        ToHost(result.fill_(step), inbox=inbox).wait()
    assert len(made) == 3
    assert first.tolist() == [[0] * 3] * 2, "what was read is the reader's"


@pytest.mark.skipif(HAS_CUDA, reason="plans on the host alone")
@pytest.mark.parametrize("window", [None, 100, 5000])
@pytest.mark.parametrize("heads", [(16, 8), (8, 1), (7, 7)])
@pytest.mark.parametrize("by", ["triton, many", "triton, few", "gluon"])
def test_one_decoding_sequence_is_planned_like_any(heads: tuple[int, int], window: int | None, by: str) -> None:
    rng = np.random.default_rng(0)
    spec = AttentionSpec(*heads, 128, 1.0, window=window, kv_dtype=torch.bfloat16)
    layer = layer_kind(spec, torch.bfloat16)
    tile = choose_tile("low", layer, 1, sequences_per_sm=0.01 if by == "triton, few" else math.inf)
    if by == "gluon":
        tile = decode_tile(128)
    lengths = [
        *range(1, 70),
        *rng.integers(70, 100_000, 400).tolist(),
        *(2**i + j for i in range(7, 17) for j in (-1, 0, 1)),
    ]
    for length in lengths:
        sms, waves, piece = int(rng.choice([4, 132])), int(rng.choice([2, 4])), (None, None, 100)[length % 3]
        shared: Any = (layer, tile, choose_costs("low", tile), sms, piece, waves)
        found = list_one(5, length, *shared)
        expected = list_work(np.array([0]), np.array([5]), np.array([1]), np.array([length]), *shared)
        assert found.items_I8.tolist() == expected.items_I8.tolist()
        assert found.merges_E4.tolist() == expected.merges_E4.tolist()
        assert (found.num_slots, found.partial_rows) == (expected.num_slots, expected.partial_rows)
        assert found.items_I8.dtype == found.merges_E4.dtype == np.int32
