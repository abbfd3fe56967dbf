"""What a GPU draws while something runs, by the counter of its driver (NVML).

A card at its limit of power lowers its clock: then a step takes as long as its energy needs, and no kernel is as fast as alone.
"""

from __future__ import annotations

import ctypes
import time
from typing import Any


class PowerMeter:
    """One card's energy since `begin`. Of equal work of one second it was seen to tell up to 11 % more or less."""

    def __init__(self, nvml: Any, uuid: str) -> None:
        """nvml: the driver's library. uuid: of the card, as torch tells it. Raises OSError if it can't tell of that card."""
        self._nvml, self._device = nvml, ctypes.c_void_p()
        self._ask("nvmlInit_v2")
        self._ask("nvmlDeviceGetHandleByUUID", f"GPU-{uuid.removeprefix('GPU-')}".encode(), ctypes.byref(self._device))
        limit = ctypes.c_uint()
        self._ask("nvmlDeviceGetEnforcedPowerLimit", self._device, ctypes.byref(limit))
        self.limit_w = limit.value / 1e3
        self.begin()

    @classmethod
    def find(cls, device: str) -> PowerMeter | None:
        """Of a device of torch; None where there is none, or no driver that tells."""
        if not device.startswith("cuda"):
            return None
        import torch

        try:
            return cls(ctypes.CDLL("libnvidia-ml.so.1"), str(torch.cuda.get_device_properties(device).uuid))
        except (OSError, AttributeError):  # a driver or a torch without it
            return None

    def _ask(self, function: str, *args: Any) -> None:
        if code := getattr(self._nvml, function)(*args):
            raise OSError(f"{function}: NVML's error {code}")

    def _millijoules(self) -> int:
        found = ctypes.c_ulonglong()
        self._ask("nvmlDeviceGetTotalEnergyConsumption", self._device, ctypes.byref(found))
        return found.value

    def begin(self) -> None:
        self._before_mj, self._began_s = self._millijoules(), time.perf_counter()

    def joules(self) -> float:
        """Since `begin`."""
        return (self._millijoules() - self._before_mj) / 1e3

    def facts(self) -> dict[str, float]:
        """For a report, of what has run since `begin`."""
        joules, seconds = self.joules(), time.perf_counter() - self._began_s
        return {"J": joules, "W": joules / seconds, "limit W": self.limit_w}
