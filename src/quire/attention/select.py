"""Chooses the attention backend for a device. Knows the backends' names; does not know models."""

import torch

from quire.attention.base import AttentionBackend
from quire.attention.cpu import CpuBackend
from quire.attention.reference import ReferenceBackend
from quire.errors import ConfigError
from quire.kernels import Kernels
from quire.kernels.cpu import CpuKernels


def select_backend(name: str, device: torch.device | str, kernels: Kernels) -> AttentionBackend:
    """Returns the backend called `name` ("reference" or "cpu"); "auto": the fastest that device and kernels allow.

    Raises ConfigError for an unknown name, or one that can't run here. Its `.name` tells which it is.
    """
    usable = torch.device(device).type == "cpu" and isinstance(kernels, CpuKernels)
    if name == "reference" or (name == "auto" and not usable):
        return ReferenceBackend()
    if name not in ("auto", "cpu"):
        raise ConfigError(f"attention backend {name!r} is unknown: choose auto, reference or cpu")
    if not isinstance(kernels, CpuKernels) or not usable:
        raise ConfigError(f"attention backend cpu needs a CPU (not {device}) and the C kernels (not {kernels.name})")
    return CpuBackend(kernels)
