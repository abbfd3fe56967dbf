"""A step that was launched is waited for where its result is asked for, once."""

from typing import Any

import numpy as np
import pytest

from quire.core.step import SchedulerOutput
from quire.executor.uniproc import LaunchedStep, UniprocExecutor


def test_a_launched_step_is_finished_when_its_result_is_asked_for() -> None:
    calls: list[str] = []
    step = LaunchedStep(lambda: calls.append("waited") or "result")  # type: ignore[arg-type, return-value]
    assert not step.done() and not calls
    assert step.result() == "result"
    assert step.result() == "result"
    assert calls == ["waited"]


def test_an_error_of_the_device_is_raised_by_result() -> None:
    def fail() -> None:
        raise RuntimeError("device-side assert")

    step = LaunchedStep(fail)  # type: ignore[arg-type]
    for _ in range(2):
        with pytest.raises(RuntimeError, match="device-side"):
            step.result()


@pytest.mark.parametrize("on_gpu", [True, False])
def test_a_step_that_cannot_be_handed_over_raises_where_its_result_is_asked_for(on_gpu: bool) -> None:
    class Broken:
        def forward(self, step: SchedulerOutput) -> Any:
            raise RuntimeError("out of memory")

        launch = forward

    executor = UniprocExecutor.__new__(UniprocExecutor)
    executor._worker, executor._on_gpu, executor._thread = Broken(), on_gpu, None  # type: ignore[assignment]
    nothing = np.zeros(0, dtype=np.int32)
    future = executor.submit(SchedulerOutput(0, nothing, nothing, nothing, nothing, nothing, nothing))
    with pytest.raises(RuntimeError, match="out of memory"):
        future.result()
