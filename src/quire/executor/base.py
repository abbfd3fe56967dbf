"""Where steps are run: one worker in this process, or several. The engine knows this interface and nothing behind it.

Loads no torch: `create_executor` imports the one that is wanted when it is called.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import Future

from quire.config import DeviceReport, EngineConfig, MemoryReport
from quire.core.cache_group import CacheGroup
from quire.core.step import SchedulerOutput, StepOutput
from quire.model_config import ModelConfig


class Executor(ABC):
    """Created in three steps, since the number of blocks depends on the loaded model: construct, `report_memory`,
    `allocate`. Then steps are submitted; they run in the order in which they came."""

    device_report: DeviceReport
    max_steps_in_flight: int

    @abstractmethod
    def report_memory(self) -> MemoryReport: ...

    @abstractmethod
    def allocate(self, num_blocks: int, num_host_blocks: int) -> None:
        """Makes KV memory for blocks 0 .. num_blocks (0 is the null block) on the device, and likewise on the host."""

    @abstractmethod
    def submit(self, step: SchedulerOutput) -> Future[StepOutput]:
        """Returns at once; the future gives the step's result, or the exception that ended the worker."""

    @abstractmethod
    def shutdown(self) -> None:
        """Waits for steps that run and frees everything. May be called twice."""


def create_executor(
    config: EngineConfig, model: ModelConfig, directory: str, groups: Sequence[CacheGroup], max_model_len: int
) -> Executor:
    """Loads the model of `directory` into an executor in this process.

    Raises WeightsError or CapacityError.
    """
    from quire.executor.uniproc import UniprocExecutor

    return UniprocExecutor(config, model, directory, groups, max_model_len)
