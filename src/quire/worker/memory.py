"""How much memory there is on this machine or device, and how much a step needs beside weights and KV cache."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from quire.config import EngineConfig
from quire.core.memory_plan import format_bytes
from quire.errors import CapacityError
from quire.model_config import ModelConfig

GPU_UTILIZATION = 0.9
CPU_UTILIZATION = 0.4  # the machine has other things to do
_CGROUPS = (  # limit, usage: version 2, then 1
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def available_bytes() -> int:
    """Memory that this process may still take on the host: the system's, or less where a container limits it."""
    available = _system_available_bytes()
    for limit_file, usage_file in _CGROUPS:
        limit, usage = _read_count(limit_file), _read_count(usage_file)
        if limit is not None and usage is not None:
            available = min(available, max(limit - usage, 0))
    return available


def _system_available_bytes() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    # no /proc: half of the physical memory is a guess on the safe side
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _read_count(path: str) -> int | None:
    try:
        return int(Path(path).read_text())
    except (OSError, ValueError):  # absent, or "max"
        return None


def check_weights_fit(model: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
    """Raises CapacityError before anything is loaded, where the machine would only run out of memory halfway."""
    needed = model.num_parameters * dtype.itemsize
    have = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_bytes()
    if needed > have:
        raise CapacityError(
            f"the model's weights take {format_bytes(needed)} in {str(dtype).removeprefix('torch.')}, and {device} has "
            f"{format_bytes(have)} available: use a smaller model or dtype, or free memory"
        )


def budget_bytes(config: EngineConfig, device: torch.device, weights_bytes: int) -> int:
    """What weights, activations and KV cache may take together, once the weights are loaded."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        return int(total * (config.gpu_memory_utilization or GPU_UTILIZATION))
    return int((available_bytes() + weights_bytes) * (config.gpu_memory_utilization or CPU_UTILIZATION))


def activation_bytes(model: ModelConfig, config: EngineConfig, dtype: torch.dtype, device: torch.device) -> int:
    """Most that a step takes for what flows between layers, and for logits.

    A token has, at the widest place of a layer, residual and hidden state, the joint gate and up projections and their
    product (or q, k, v and o); a sample has its logits in fp32 about four times over in the sampler. CUDA graphs have a pool of
    their own for what flows between layers, as large as the largest of them needs. Attention on a GPU keeps partial results in
    fp32: for each multiprocessor at most 4 pieces of 256 rows in each of 2 places.
    """
    mlp = 3 * model.intermediate_size
    attention = 2 * (model.num_heads + model.num_kv_heads) * model.head_dim
    per_token = (2 * model.hidden_size + max(mlp, attention)) * dtype.itemsize
    num_tokens = config.step_token_budget(device.type)
    samples = min(config.max_num_seqs, num_tokens)
    copies = 2 if device.type == "cuda" and not config.enforce_eager else 1
    partial = 0
    if device.type == "cuda":
        partial = (
            torch.cuda.get_device_properties(device).multi_processor_count * 4 * 2 * 256 * (model.head_dim + 1) * 4
        )
    return copies * num_tokens * per_token + samples * model.vocab_size * 4 * 4 + partial
