"""A step that was launched is waited for where its result is asked for, once."""

import pytest

from quire.executor.uniproc import LaunchedStep


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
