"""The engine's options, validated once and frozen, with the names that vLLM's users know; and what a worker reports back.

Loads no torch. Does not read model directories (`model_config` does), nor know how much memory there is.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from typing import Any

from quire.errors import ConfigError
from quire.pocket import embedded_name

LOAD_FORMATS = ("auto", "safetensors", "dummy")
DTYPES = ("auto", "float32", "bfloat16", "float16")
DEVICES = ("auto", "cpu", "cuda")
PREEMPTION_MODES = ("auto", "forks", "recompute", "swap")
ATTENTION_BACKENDS = ("auto", "cpu", "reference", "triton")

CPU_STEP_TOKENS = 2048
GPU_STEP_TOKENS = 8192

DTYPE_SYNONYMS = {"float": "float32", "half": "float16", "fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Options of one engine. Raises ConfigError, naming the option, for a value out of range.

    model: a directory in Hugging Face's form, or a hub name. tokenizer: where it isn't the model's directory.
    skip_tokenizer_init: no tokenizer: prompts are token ids, outputs too.
    load_format: "dummy" draws random weights and needs a config.json alone.
    dtype: of weights and activations; "auto" is the config's. kv_cache_dtype: "auto" is the same.
    max_model_len: most tokens of a sequence, prompt and answer; None is the model's own limit.
    block_size: tokens of a KV block. num_gpu_blocks_override: so many blocks (on a CPU too) instead of what fits.
    gpu_memory_utilization: share of the device's memory that weights, activations and KV cache may take together; None is
        0.9 of a GPU's, and 0.4 of what a CPU's machine has available.
    swap_space: GiB of host memory for the blocks of preempted sequences.
    preemption_mode: "recompute", "swap", "forks" (swap what has several sequences, recompute what has one), or "auto":
        whichever takes less time, by the measured rates of the bus and of prefill.
    max_num_seqs: sequences that run at once. max_num_batched_tokens: token budget of one step; None is
        2,048 on a CPU, 8,192 on a GPU.
    step_target_ms: how long a step in which somebody decodes may take: prompts are read in chunks that fit; None: any time.
    client_weights: client -> weight; a client of weight 2 gets twice the token time of one of weight 1, the default.
    max_steps_in_flight: steps planned before the first has come back; None chooses 1 on a CPU, 2 on a GPU.
    num_threads: of a CPU; None is all that the process may use, or one for models of a few megabytes.
    enforce_eager: no CUDA graphs; on a CPU there are none.
    """

    model: str
    tokenizer: str | None = None
    skip_tokenizer_init: bool = False
    revision: str | None = None
    hf_overrides: Mapping[str, Any] | None = None
    load_format: str = "auto"
    dtype: str = "auto"
    kv_cache_dtype: str = "auto"
    seed: int = 0
    device: str = "auto"
    attention_backend: str = "auto"
    max_model_len: int | None = None
    max_num_seqs: int = 256
    max_num_batched_tokens: int | None = None
    max_steps_in_flight: int | None = None
    step_target_ms: float | None = None
    client_weights: Mapping[str, float] | None = None
    max_logprobs: int = 20
    block_size: int = 16
    gpu_memory_utilization: float | None = None
    num_gpu_blocks_override: int | None = None
    swap_space: float = 4.0
    preemption_mode: str = "auto"
    enable_prefix_caching: bool = True
    enforce_eager: bool = False
    num_threads: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", DTYPE_SYNONYMS.get(_dtype_name(self.dtype), _dtype_name(self.dtype)))
        if not isinstance(self.model, str | PathLike):
            kind = type(self.model).__name__
            raise ConfigError(f"model must name a directory or a hub repository, not be of type {kind}")
        object.__setattr__(self, "model", str(self.model))
        if not self.model:
            raise ConfigError("model must name a directory or a hub repository")
        self._one_of("load_format", LOAD_FORMATS)
        self._one_of("dtype", DTYPES)
        self._one_of("kv_cache_dtype", DTYPES)
        self._one_of("device", DEVICES)
        self._one_of("preemption_mode", PREEMPTION_MODES)
        self._one_of("attention_backend", ATTENTION_BACKENDS)
        self._integer("seed", 0, 2**63 - 1)
        self._integer("max_model_len", 1, 2**24, optional=True)
        self._integer("max_num_seqs", 1, 2**16)
        self._integer("max_num_batched_tokens", 1, 2**20, optional=True)
        self._integer("max_steps_in_flight", 1, 8, optional=True)
        self._integer("max_logprobs", 0, 2**20)
        self._integer("block_size", 1, 256)
        self._integer("num_gpu_blocks_override", 1, 2**31 - 2, optional=True)
        self._integer("num_threads", 1, 1024, optional=True)
        self._number("gpu_memory_utilization", 0.01, 1.0, optional=True)
        self._number("swap_space", 0.0, 65536.0)
        self._number("step_target_ms", 0.01, 1e6, optional=True)
        for client, weight in (self.client_weights or {}).items():
            if not isinstance(client, str) or not isinstance(weight, int | float) or not 1e-3 <= weight <= 1e3:
                raise ConfigError(
                    f"client_weights must map names to numbers from 0.001 to 1000, not {client!r}: {weight!r}"
                )
        for name in ("skip_tokenizer_init", "enable_prefix_caching", "enforce_eager"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be True or False, not {getattr(self, name)!r}")

    @classmethod
    def from_options(cls, model: str, **options: Any) -> EngineConfig:
        """Raises ConfigError for an option that doesn't exist, naming the nearest that does."""
        options = {name: value for name, value in options.items() if not _is_harmless(name, value)}
        known = [f.name for f in dataclasses.fields(cls)]
        for name in options:
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                hint = f"; did you mean {close[0]}?" if close else ""
                raise ConfigError(f"unknown option {name}={options[name]!r}{hint}")
        return cls(model=model, **options)

    @property
    def model_name(self) -> str:
        """What the model is called where nobody named it otherwise: the embedded one has a name, others their path."""
        return embedded_name(self.model) or self.model

    def step_token_budget(self, device: str) -> int:
        """Tokens of one step on `device` ("cpu", "cuda:0"; the one that was chosen, not "auto"): enough rows to fill the matrix
        units, few enough that running answers are not held up."""
        default = GPU_STEP_TOKENS if device.startswith("cuda") else CPU_STEP_TOKENS
        return self.max_num_batched_tokens or max(default, self.max_num_seqs)

    def _one_of(self, name: str, allowed: tuple[str, ...]) -> None:
        value = getattr(self, name)
        if value not in allowed:
            raise ConfigError(f"{name}={value!r} is not one of {', '.join(allowed)}")

    def _integer(self, name: str, low: int, high: int, *, optional: bool = False) -> None:
        value = getattr(self, name)
        if value is None and optional:
            return
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise ConfigError(f"{name} must be an integer from {low} to {high}, not {value!r}")

    def _number(self, name: str, low: float, high: float, *, optional: bool = False) -> None:
        value = getattr(self, name)
        if value is None and optional:
            return
        if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= high:
            raise ConfigError(f"{name} must be a number from {low} to {high}, not {value!r}")


# Options of vLLM's that ask for what Quire does anyway: a script that passes them runs unchanged. Any other value is refused.
_HARMLESS: dict[str, tuple[Any, ...]] = {
    "trust_remote_code": (False,),
    "tensor_parallel_size": (1,),
    "pipeline_parallel_size": (1,),
    "disable_log_stats": (True, False),
    "enable_chunked_prefill": (True, None),
    "tokenizer_mode": ("auto",),
    "use_tqdm_on_load": (True, False),
    "quantization": (None,),
    "cpu_offload_gb": (0,),
    "disable_custom_all_reduce": (True, False),
}


def _is_harmless(name: str, value: Any) -> bool:
    if name not in _HARMLESS:
        return False
    if value not in _HARMLESS[name]:
        allowed = " or ".join(map(repr, _HARMLESS[name]))
        raise ConfigError(f"{name}={value!r} is not supported; Quire takes {allowed}")
    return True


def _dtype_name(dtype: object) -> str:
    """ "bfloat16" of "bfloat16" and of torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True, slots=True)
class MemoryReport:
    """What a loaded model leaves: bytes that weights, activations and KV cache may take together; the first two of these;
    and host memory for swapping."""

    budget_bytes: int
    weights_bytes: int
    activation_bytes: int
    swap_bytes: int


@dataclass(frozen=True, slots=True)
class DeviceReport:
    """What runs where, as the worker chose it, in the words of the options above."""

    device: str
    dtype: str
    kv_dtype: str
    attention_backend: str
    kernels: str
    num_parameters: int
