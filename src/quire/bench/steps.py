"""Watches an engine's steps: how each ran, how long it took, what it cost the host, and its floor.

Three times of a step: *elapsed* by the device's clock, *launching* what it takes the host to hand it over, and *host* all
that the host spends on it beside waiting, planning and outputs included. On a GPU the device works meanwhile; on a CPU it
doesn't.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np

from quire.bench.floors import Ceilings, Floor, ModelWork
from quire.core.step import SchedulerOutput, StepOutput

NO_TOKENS = "no tokens"  # a step that only moves blocks


class Waiting:
    """Adds up the time in which the host waits for the device, by an event of it, while it is entered."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __enter__(self) -> Waiting:
        import torch

        original = self._original = torch.cuda.Event.synchronize

        def synchronize(event: torch.cuda.Event) -> None:
            began_s = time.perf_counter()
            original(event)
            self.seconds += time.perf_counter() - began_s

        torch.cuda.Event.synchronize = synchronize  # type: ignore[assignment,method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        import torch

        torch.cuda.Event.synchronize = self._original  # type: ignore[method-assign]


@dataclass(slots=True)
class WatchedStep:
    """One step. `call`: the call of `Engine.step`, from 0, that handed it over."""

    call: int
    way: str
    starts: np.ndarray
    num_tokens: np.ndarray
    sample_entries: np.ndarray
    launch_s: float
    host_s: float = 0.0
    elapsed_s: float = 0.0

    @property
    def total_tokens(self) -> int:
        return int(self.num_tokens.sum())


class StepWatch:
    """Watches `engine` from when it is made, until it is shut down. `reset` forgets the steps until then."""

    def __init__(self, engine: Any, work: ModelWork, ceilings: Ceilings) -> None:
        self._work = work
        self._ceilings = ceilings
        self._runner = engine.executor.worker.runner
        self._runs_in_submit = (
            engine.executor.device_report.device == "cpu" and engine.executor.max_steps_in_flight == 1
        )
        self._submit, self._step = engine.executor.submit, engine.step
        self._waiting = Waiting()
        self.reset()
        engine.executor.submit = self._watched_submit
        engine.step = self._watched_step

    def reset(self) -> None:
        self.steps: list[WatchedStep] = []
        self.num_calls = 0
        self._waiting.seconds = 0.0

    def _watched_step(self) -> Any:
        num_before, waited_s, began_s = len(self.steps), self._waiting.seconds, time.perf_counter()
        with self._waiting:
            outputs = self._step()
        host_s = time.perf_counter() - began_s - (self._waiting.seconds - waited_s)
        submitted = self.steps[num_before:]
        for step in submitted:
            # what a call costs belongs to the step that it hands over: the first call hands over several, most one
            step.host_s = host_s / len(submitted)
            if self._runs_in_submit:
                step.host_s -= step.launch_s
        self.num_calls += 1
        return outputs

    def _watched_submit(self, step: SchedulerOutput) -> Future[StepOutput]:
        began_s = time.perf_counter()
        future: Future[StepOutput] = self._submit(step)
        launch_s = time.perf_counter() - began_s
        way = self._runner.way.value if len(step.rows) else NO_TOKENS
        found = WatchedStep(self.num_calls, way, step.starts, step.num_tokens, step.sample_entries, launch_s)
        self.steps.append(found)
        future.add_done_callback(lambda done: self._note(found, done))
        return future

    @staticmethod
    def _note(step: WatchedStep, done: Future[StepOutput]) -> None:
        if done.exception() is None:
            step.elapsed_s = done.result().elapsed_s

    # -- what was found --------------------------------------------------------------------------------------------------
    @property
    def host_ms(self) -> float:
        """What a step costs the host beside waiting."""
        return 1e3 * statistics.fmean([step.host_s for step in self.steps] or [0.0])

    @property
    def elapsed_s(self) -> float:
        """Of all steps, by the device's clock: what a run took beyond is time in which the device had nothing to do."""
        return sum(step.elapsed_s for step in self.steps)

    def floor(self, steps: Iterable[WatchedStep] | None = None) -> Floor:
        """Of these steps, or of all."""
        total = Floor()
        for step in self.steps if steps is None else steps:
            num_samples = len(np.unique(step.sample_entries))
            total += self._work.floor(self._ceilings, step.starts, step.num_tokens, num_samples)
        return total

    def rows(self) -> list[dict[str, Any]]:
        """The steps by the way they ran; ms are a step's."""
        rows = []
        for way in dict.fromkeys(step.way for step in self.steps):
            steps = [step for step in self.steps if step.way == way]
            elapsed_s = sum(step.elapsed_s for step in steps)
            floor_s = self.floor(steps).seconds
            rows.append(
                {
                    "way": way,
                    "steps": len(steps),
                    "tokens/step": statistics.fmean(step.total_tokens for step in steps),
                    "seconds": elapsed_s,
                    "ms/step": 1e3 * elapsed_s / len(steps),
                    "floor ms": 1e3 * floor_s / len(steps),
                    "share": share(floor_s, elapsed_s),
                    "host ms": 1e3 * statistics.fmean(step.host_s for step in steps),
                    "launching ms": 1e3 * statistics.fmean(step.launch_s for step in steps),
                }
            )
        return rows


def share(floor_s: float, seconds: float) -> float:
    """Of the floor that was reached: 1 at the floor, less above it."""
    return floor_s / max(seconds, 1e-12)
