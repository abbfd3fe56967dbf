"""Chooses the attention backend for a device. Knows the backends' names; does not know models."""

import importlib.util

import torch

from quire.attention.base import AttentionBackend
from quire.attention.cpu import CpuBackend
from quire.attention.reference import ReferenceBackend
from quire.errors import ConfigError
from quire.kernels import Kernels
from quire.kernels.cpu import CpuKernels


def select_backend(name: str, device: torch.device | str, kernels: Kernels) -> AttentionBackend:
    """Returns the backend called `name` ("reference", "cpu" or "triton"); "auto": the fastest that device and kernels allow.

    Raises ConfigError for an unknown name, or one that can't run here. Its `.name` tells which it is.
    """
    device = torch.device(device)
    if name == "auto":
        name = _fastest(device, kernels)
    if name == "reference":
        return ReferenceBackend()
    if name == "cpu":
        if not isinstance(kernels, CpuKernels) or device.type != "cpu":
            raise ConfigError(
                f"attention backend cpu needs a CPU (not {device}) and the C kernels (not {kernels.name})"
            )
        return CpuBackend(kernels)
    if name == "triton":
        return _triton(device, kernels)
    raise ConfigError(f"attention backend {name!r} is unknown: choose auto, reference, cpu or triton")


def _fastest(device: torch.device, kernels: Kernels) -> str:
    if device.type == "cpu":
        return "cpu" if isinstance(kernels, CpuKernels) else "reference"
    usable = device.type == "cuda" and torch.cuda.is_available() and importlib.util.find_spec("triton") is not None
    return "triton" if usable else "reference"


def _triton(device: torch.device, kernels: Kernels) -> AttentionBackend:
    try:
        import triton

        from quire.attention.triton import TritonBackend
    except ImportError as error:
        raise ConfigError(f"attention backend triton needs the package triton: {error}") from error
    if device.type == "cuda":
        return TritonBackend(kernels, device)
    if device.type == "cpu" and triton.knobs.runtime.interpret:
        return TritonBackend(kernels, device, num_sms=4)  # as many programs as exercise the cutting of keys
    raise ConfigError(f"attention backend triton needs a GPU, or TRITON_INTERPRET=1 on a CPU, not {device}")
