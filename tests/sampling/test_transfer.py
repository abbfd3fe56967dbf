"""What goes to a device: on a CPU, and by the way of a GPU's pinned memory, which is ordinary memory here."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from quire.sampling.transfer import write


class OnGpu(torch.Tensor):
    """Says that it is on one."""

    is_cuda = True  # type: ignore[assignment]


@pytest.mark.parametrize("on_gpu", [False, True])
@pytest.mark.parametrize(
    "values", [np.array([3, 5], dtype=np.int32), [3, 5], np.array([3, 5])], ids=["int32", "list", "int64"]
)
@pytest.mark.parametrize("dtype", [torch.int32, torch.float32])
def test_numbers_come_where_they_belong(
    monkeypatch: pytest.MonkeyPatch, on_gpu: bool, values: Any, dtype: torch.dtype
) -> None:
    asked = []

    def empty(*size: int, dtype: torch.dtype, pin_memory: bool) -> torch.Tensor:
        asked.append(pin_memory)
        return make(*size, dtype=dtype)

    make = torch.empty
    table = torch.zeros((2, 4), dtype=dtype)
    target = table.as_subclass(OnGpu) if on_gpu else table
    monkeypatch.setattr(torch, "empty", empty)
    write(values, target[1, 1:3])
    assert table.tolist() == [[0, 0, 0, 0], [0, 3, 5, 0]]
    assert asked == [on_gpu]
    write(values[:0], target[1, :0])
    assert table.sum() == 8
