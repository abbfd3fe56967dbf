"""A GPU's energy, by a driver's library that is not one."""

import ctypes
from typing import Any

import pytest
import torch

from quire.bench.power import PowerMeter


class Driver:
    """NVML's functions that are asked, of one card that has drawn `millijoules`."""

    def __init__(self, uuid: str = "0-1") -> None:
        self.millijoules = 5_000_000_000  # more than 32 bits
        self._uuid = f"GPU-{uuid}".encode()

    def nvmlInit_v2(self) -> int:
        return 0

    def nvmlDeviceGetHandleByUUID(self, uuid: bytes, device: Any) -> int:
        device._obj.value = 77
        return 0 if uuid == self._uuid else 6

    def nvmlDeviceGetEnforcedPowerLimit(self, device: ctypes.c_void_p, limit: Any) -> int:
        limit._obj.value = 700_000
        return 0 if device.value == 77 else 2

    def nvmlDeviceGetTotalEnergyConsumption(self, device: ctypes.c_void_p, found: Any) -> int:
        found._obj.value = self.millijoules
        return 0 if device.value == 77 else 2


def test_joules_and_watts_since_it_began(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 10.0
    monkeypatch.setattr("quire.bench.power.time.perf_counter", lambda: now_s)
    driver = Driver()
    meter = PowerMeter(driver, "0-1")
    driver.millijoules += 1_000
    meter.begin()
    driver.millijoules += 3_500_000
    now_s = 15.0
    assert meter.facts() == {"J": 3500.0, "W": 700.0, "limit W": 700.0}
    meter.begin()
    assert meter.joules() == 0


def test_a_card_that_the_driver_does_not_know() -> None:
    with pytest.raises(OSError, match=r"nvmlDeviceGetHandleByUUID: NVML's error 6"):
        PowerMeter(Driver(), "0-2")


def test_none_without_a_gpu_or_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    assert PowerMeter.find("cpu") is None
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: type("Card", (), {"uuid": "0-1"})(), raising=True
    )
    monkeypatch.setattr("quire.bench.power.ctypes.CDLL", lambda name: Driver("0-2"))
    assert PowerMeter.find("cuda") is None
    monkeypatch.setattr("quire.bench.power.ctypes.CDLL", lambda name: Driver())
    assert isinstance(PowerMeter.find("cuda:0"), PowerMeter)

    def missing(name: str) -> Any:
        raise OSError(name)

    monkeypatch.setattr("quire.bench.power.ctypes.CDLL", missing)
    assert PowerMeter.find("cuda") is None
