"""A worker: one device, the model's weights on it, and the memory that they leave.

Knows the device and how to fill it; the steps themselves are the model runner's.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import torch

from quire.attention.select import select_backend
from quire.config import DeviceReport, EngineConfig, MemoryReport
from quire.core.cache_group import CacheGroup
from quire.core.memory_plan import GIB, format_bytes
from quire.core.step import SchedulerOutput, StepOutput
from quire.errors import CapacityError, ConfigError
from quire.kernels import select_kernels
from quire.layers.context import BuildContext
from quire.model_config import ModelConfig
from quire.models import build_model
from quire.sampling.sampler import Sampler
from quire.sampling.state import SamplingState
from quire.worker import memory
from quire.worker.input_batch import InputBatch, PackedInputBatch
from quire.worker.kv_store import KVStore
from quire.worker.model_runner import ModelRunner
from quire.worker.weights import load_weights, resolve_dtype

if TYPE_CHECKING:
    from quire.worker.graph_runner import GraphRunner

logger = logging.getLogger(__name__)

# Kernels that an attention backend asks for; others take what is fastest on the device.
KERNELS: Mapping[str, Literal["torch", "triton"]] = {"reference": "torch", "triton": "triton"}
MAX_COMPILING = 16  # threads: there are some forty kernels, and a part of each compilation is Python
SMALL_MODEL_BYTES = 16 << 20  # read from a core's own caches: a step of it takes about as long as a few barriers


class Worker:
    """Constructed with the model loaded; `allocate` makes KV memory, and then it runs steps."""

    def __init__(
        self,
        config: EngineConfig,
        model: ModelConfig,
        directory: str,
        groups: Sequence[CacheGroup],
        max_model_len: int,
    ) -> None:
        began_s = time.perf_counter()
        self._config = config
        self._model_config = model
        self._groups = groups
        self._max_model_len = max_model_len
        self._device = choose_device(config.device)
        self._dtype = resolve_dtype(config.dtype, model)
        self._kv_dtype = getattr(torch, groups[0].dtype)
        memory.check_weights_fit(model, self._dtype, self._device)
        self._kernels = select_kernels(self._device, KERNELS.get(config.attention_backend, "auto"))
        self._attention = select_backend(config.attention_backend, self._device, self._kernels)
        build = BuildContext(
            dtype=self._dtype,
            device=self._device,
            kernels=self._kernels,
            attention=self._attention,
            max_model_len=max_model_len,
            kv_dtype=self._kv_dtype,
        )
        self._model = build_model(model, build)
        built_s = time.perf_counter()
        load_weights(self._model, directory, load_format=config.load_format, seed=config.seed)
        self._model.eval()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        logger.info("built the model in %.1f s, loaded it in %.1f s", built_s - began_s, time.perf_counter() - built_s)
        if self._device.type == "cpu":
            torch.set_num_threads(config.num_threads or self._choose_threads())
        self._runner: ModelRunner | None = None

    def _choose_threads(self) -> int:
        """All cores, or one for a model so small that threads would spend their time waiting for each other."""
        return 1 if self._weights_bytes < SMALL_MODEL_BYTES else _num_cores()

    @property
    def _weights_bytes(self) -> int:
        return sum(parameter.nbytes for parameter in self._model.parameters())

    @property
    def device_report(self) -> DeviceReport:
        return DeviceReport(
            device=str(self._device),
            dtype=str(self._dtype).removeprefix("torch."),
            kv_dtype=str(self._kv_dtype).removeprefix("torch."),
            attention_backend=self._attention.name,
            kernels=self._kernels.name,
            num_parameters=sum(parameter.numel() for parameter in self._model.parameters()),
        )

    def report_memory(self) -> MemoryReport:
        weights = self._weights_bytes
        budget = memory.budget_bytes(self._config, self._device, weights)
        swap = int(self._config.swap_space * GIB)
        if self._device.type == "cpu":
            # host and device are one memory here: what is swapped out comes out of the same budget
            swap = min(swap, budget // 8)
            budget -= swap
        return MemoryReport(
            budget_bytes=budget,
            weights_bytes=weights,
            activation_bytes=memory.activation_bytes(self._model_config, self._config, self._dtype, self._device),
            swap_bytes=swap,
        )

    def allocate(self, num_blocks: int, num_host_blocks: int) -> None:
        """Makes KV memory and the rows. Raises CapacityError if the machine does not give it."""
        config = self._config
        began_s = time.perf_counter()
        packed = self._kernels.name == "triton"
        inputs = (PackedInputBatch if packed else InputBatch)(
            config.max_num_seqs, self._max_model_len, config.block_size, self._groups, self._device
        )
        # as many rows as the inputs have: graphs pad with one that nobody gets
        sampling = SamplingState(len(inputs.rows), self._model_config.vocab_size, self._device)
        store = KVStore(
            self._groups,
            num_blocks,
            num_host_blocks,
            config.block_size,
            self._kv_dtype,
            self._device,
            self._kernels,
        )
        logger.info("allocated KV memory in %.1f s", time.perf_counter() - began_s)
        self._runner = ModelRunner(self._model, self._attention, inputs, sampling, store)
        if isinstance(inputs, PackedInputBatch):
            from quire.kernels.triton.ops import most_few_tokens
            from quire.sampling.triton import TritonChooser
            from quire.worker.graph_runner import GraphRunner, graphs_for

            self._runner.sampler = Sampler(TritonChooser())
            backend = graphs_for(self._attention)
            if backend is not None and self._device.type == "cuda" and not config.enforce_eager:
                self._runner.graphs = GraphRunner(
                    self._model, backend, inputs, sampling, store, self._model.attention_specs, self._dtype,
                    max_num_tokens=config.step_token_budget(self._device.type),
                    few=most_few_tokens(self._model_config.hidden_size),
                )  # fmt: skip
                self._prepare(self._runner.graphs)
        store.pin_host_memory()

    def _prepare(self, graphs: GraphRunner) -> None:
        """Compiles and captures. The largest size is a step of all tokens that there may be: so the memory plan is verified.

        Raises CapacityError where the device has no memory for that.
        """
        began_s, held = time.perf_counter(), torch.cuda.memory_allocated(self._device)
        try:
            graphs.compile_ahead(min(_num_cores(), MAX_COMPILING))
            compiled_s = time.perf_counter()
            graphs.capture_all()
        except torch.OutOfMemoryError as error:
            raise CapacityError(
                "no memory for the largest step beside weights and KV cache: lower gpu_memory_utilization, "
                "max_num_batched_tokens or max_num_seqs, or free memory of the device"
            ) from error
        planned = memory.activation_bytes(self._model_config, self._config, self._dtype, self._device)
        taken = torch.cuda.memory_reserved(self._device) - held
        logger.info(
            "compiled kernels in %.1f s, captured %d graphs in %.1f s; steps take %s beside weights and KV cache",
            compiled_s - began_s,
            graphs.num_captures,
            time.perf_counter() - compiled_s,
            format_bytes(taken),
        )
        if taken > planned:
            logger.warning("steps take %s, and %s were planned", format_bytes(taken), format_bytes(planned))

    @property
    def runner(self) -> ModelRunner:
        assert self._runner is not None, "allocate comes first"
        return self._runner

    def forward(self, step: SchedulerOutput) -> None:
        self.runner.forward(step)

    def sample(self, step: SchedulerOutput) -> StepOutput:
        return self.runner.sample(step)

    def launch(self, step: SchedulerOutput) -> Callable[[], StepOutput]:
        """`forward` and `sample` without waiting for the device: what is returned does, and gives the result."""
        self.runner.forward(step)
        return self.runner.launch_sample(step)


def choose_device(name: str) -> torch.device:
    """auto, cuda or cpu; raises ConfigError for cuda where torch sees none."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device='cuda', but torch sees no CUDA device here; use device='cpu'")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def _num_cores() -> int:
    """Cores that this process may use, which in a container or under taskset are fewer than the machine's."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
