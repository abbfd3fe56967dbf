"""Between host and device without waiting: what goes to a GPU, and what comes back, passes through pinned memory.

On a CPU nothing moves. torch gives pinned memory to nobody else before the copies that use it are done; but getting it takes
longer than the copy. What every step sends and gets therefore has buffers of its own, which guard that themselves: `Outbox` and
`Inbox`. Knows no samplers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor


def to_device(values: np.ndarray, device: torch.device) -> Tensor:
    """The same numbers on the device, ordered before whatever the current stream runs next."""
    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def write(values: np.ndarray | Sequence[float], target: Tensor) -> None:
    """Puts the numbers where they belong on the device, likewise."""
    host = torch.empty(len(values), dtype=target.dtype, pin_memory=target.is_cuda)
    host.numpy()[:] = values
    target.copy_(host, non_blocking=True)


class Event(Protocol):
    """A point in a stream: `torch.cuda.Event`, of which these two are used."""

    def record(self) -> None: ...

    def synchronize(self) -> None:
        """Waits until the stream has come to where the event was recorded last; not at all if it never was."""


class NoEvent:
    """Where nothing runs beside the host."""

    def record(self) -> None: ...

    def synchronize(self) -> None: ...


def _events_of(device: torch.device) -> Callable[[], Event]:
    return torch.cuda.Event if device.type == "cuda" else NoEvent


class Outbox:
    """Buffers of int32 words that take turns: one is filled and sent while the copies of the others may be under way.

    `next`, fill what it gives, `send`. A copy reads its buffer when the device comes to it, which may be after the host has
    planned more steps: so the event behind each copy is waited for before its buffer is given out again. With a buffer more
    than there are steps in flight, that copy is over as a rule.

    new_event: `torch.cuda.Event` on a GPU, if None.
    """

    def __init__(
        self,
        num_words: int,
        device: torch.device,
        num_buffers: int = 4,
        new_event: Callable[[], Event] | None = None,
    ) -> None:
        new_event = new_event or _events_of(device)
        pinned = device.type == "cuda"
        self._buffers = [torch.empty(num_words, dtype=torch.int32, pin_memory=pinned) for _ in range(num_buffers)]
        self._words = [buffer.numpy() for buffer in self._buffers]
        self._sent = [new_event() for _ in range(num_buffers)]
        self._at = 0

    def next(self) -> np.ndarray:
        """int32 [num_words], with anything in it. Waits for the last copy from it."""
        self._at = (self._at + 1) % len(self._buffers)
        self._sent[self._at].synchronize()
        return self._words[self._at]

    def send(self, target: Tensor) -> None:
        """Starts the copy of as many words as `target`, int32 and contiguous, has: the first of those that `next` gave."""
        target.copy_(self._buffers[self._at][: target.shape[0]], non_blocking=True)
        self._sent[self._at].record()


class Inbox:
    """Buffers for results of one shape on their way to the host, each with the event behind its copy.

    One that `take` gave is nobody else's until `give_back`, which is when it has been read: its copy being over is not enough.
    """

    def __init__(self, like: Tensor, num_buffers: int = 3, new_event: Callable[[], Event] | None = None) -> None:
        """like: a tensor on the device, of the results' shape and dtype. num_buffers: there are more where so many results are
        under way, but making one may wait for the device."""
        self._like = like
        self._new_event = new_event or _events_of(like.device)
        self._free = [self._make() for _ in range(num_buffers)]

    def _make(self) -> tuple[Tensor, Event]:
        like = self._like
        return torch.empty(like.shape, dtype=like.dtype, pin_memory=like.is_cuda), self._new_event()

    def take(self) -> tuple[Tensor, Event]:
        return self._free.pop() if self._free else self._make()

    def give_back(self, buffer: tuple[Tensor, Event]) -> None:
        self._free.append(buffer)


class ToHost:
    """Copies of tensors that are on their way to the host. `wait` waits for them, and for nothing launched after them.

    inbox: where a single tensor is to arrive, instead of memory of its own.
    """

    def __init__(self, *tensors: Tensor, inbox: Inbox | None = None) -> None:
        self._event: Event | None = None
        self._tensors = tensors
        self._inbox = inbox
        self._buffer: tuple[Tensor, Event] | None = None
        if inbox is not None:
            (tensor,) = tensors
            host, event = self._buffer = inbox.take()
            host.copy_(tensor, non_blocking=True)
            event.record()
        elif tensors[0].is_cuda:
            self._tensors = tuple(torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True) for tensor in tensors)
            for host, tensor in zip(self._tensors, tensors):
                host.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def wait(self) -> tuple[Tensor, ...]:
        if self._buffer is not None and self._inbox is not None:
            host, event = self._buffer
            event.synchronize()
            self._tensors = (host.clone(),)
            self._inbox.give_back(self._buffer)
            self._buffer = None
        elif self._event is not None:
            self._event.synchronize()
            self._event = None
        return self._tensors
