"""Between host and device without waiting: what goes to a GPU, and what comes back, passes through pinned memory.

On a CPU nothing moves. torch gives pinned memory to nobody else before the copies that use it are done. Knows no samplers.
"""

import numpy as np
import torch
from torch import Tensor


def to_device(values: np.ndarray, device: torch.device) -> Tensor:
    """The same numbers on the device, ordered before whatever the current stream runs next."""
    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


class ToHost:
    """Copies of tensors that are on their way to the host. `wait` waits for them, and for nothing launched after them."""

    def __init__(self, *tensors: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._tensors = tensors
        if tensors[0].is_cuda:
            self._tensors = tuple(torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True) for tensor in tensors)
            for host, tensor in zip(self._tensors, tensors):
                host.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def wait(self) -> tuple[Tensor, ...]:
        if self._event is not None:
            self._event.synchronize()
            self._event = None
        return self._tensors
