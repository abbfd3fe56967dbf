"""One worker in this process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from quire.config import DeviceReport, EngineConfig, MemoryReport
from quire.core.cache_group import CacheGroup
from quire.core.step import SchedulerOutput, StepOutput
from quire.executor.base import Executor
from quire.model_config import ModelConfig
from quire.worker.worker import Worker


class LaunchedStep(Future[StepOutput]):
    """A step that runs on a GPU: `result` waits for it there, in the thread that asks."""

    def __init__(self, finish: Callable[[], StepOutput]) -> None:
        super().__init__()
        self._finish = finish

    def result(self, timeout: float | None = None) -> StepOutput:
        if not self.done():
            try:
                found = self._finish()
                self.set_result(found)
                return found
            except Exception as error:
                self.set_exception(error)
        return super().result(timeout)


class UniprocExecutor(Executor):
    """On a CPU with one step in flight a step runs in `submit`; with more, in a thread beside the scheduler.

    On a GPU `submit` launches it. The device runs steps one after the other by itself, and a thread that launches would only
    contend with the scheduler for the interpreter.
    """

    def __init__(
        self,
        config: EngineConfig,
        model: ModelConfig,
        directory: str,
        groups: Sequence[CacheGroup],
        max_model_len: int,
    ) -> None:
        self._worker: Worker | None = Worker(config, model, directory, groups, max_model_len)
        self._on_gpu = self._worker.device_report.device.startswith("cuda")
        self.max_steps_in_flight = config.max_steps_in_flight or (2 if self._on_gpu else 1)
        self._thread: ThreadPoolExecutor | None = None
        if self.max_steps_in_flight > 1 and not self._on_gpu:
            self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="quire-worker")

    @property
    def worker(self) -> Worker:
        assert self._worker is not None, "the executor was shut down"
        return self._worker

    @property
    def device_report(self) -> DeviceReport:  # type: ignore[override]
        return self.worker.device_report

    def report_memory(self) -> MemoryReport:
        return self.worker.report_memory()

    def allocate(self, num_blocks: int, num_host_blocks: int) -> None:
        self.worker.allocate(num_blocks, num_host_blocks)

    def submit(self, step: SchedulerOutput) -> Future[StepOutput]:
        if self._thread is not None:
            return self._thread.submit(self._run, step)
        if self._on_gpu:
            return self._launch(step)
        future: Future[StepOutput] = Future()
        try:
            future.set_result(self._run(step))
        except Exception as error:
            future.set_exception(error)
        return future

    def _launch(self, step: SchedulerOutput) -> Future[StepOutput]:
        try:
            return LaunchedStep(self.worker.launch(step))
        except Exception as error:
            failed: Future[StepOutput] = Future()
            failed.set_exception(error)
            return failed

    def _run(self, step: SchedulerOutput) -> StepOutput:
        self.worker.forward(step)
        return self.worker.sample(step)

    def shutdown(self) -> None:
        if self._thread is not None:
            self._thread.shutdown(wait=True)
        self._worker = None
