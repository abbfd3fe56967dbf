"""From a config to a model. A family's file is imported when a model of that family is built, not before.

A new model: one file here that reads from top to bottom, a line in `_MODEL_CLASSES`, and its keys in `model_config`.
"""

from collections.abc import Mapping
from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING

from quire.errors import ModelError
from quire.model_config import ModelConfig

if TYPE_CHECKING:
    from quire.layers.context import BuildContext
    from quire.models.llama import LlamaForCausalLM

_MODEL_CLASSES: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "llama": ("quire.models.llama", "LlamaForCausalLM"),
        "mistral": ("quire.models.llama", "LlamaForCausalLM"),
        "qwen2": ("quire.models.llama", "LlamaForCausalLM"),
        "qwen3": ("quire.models.llama", "LlamaForCausalLM"),
        "smollm3": ("quire.models.llama", "LlamaForCausalLM"),
    }
)


def build_model(config: ModelConfig, build: "BuildContext") -> "LlamaForCausalLM":
    """The model of `config`, its weights uninitialised on build.device in build.dtype.

    It has `forward(input_ids_T, positions_T, ctx) -> hidden_MH`, `compute_logits(hidden_MH) -> logits_MV` and
    `attention_specs`; `quire.worker.weights.load_weights` fills it.

    Raises ModelError for an unknown model_type, ConfigError if the shapes cannot be shared by the parallel group.
    """
    if config.model_type not in _MODEL_CLASSES:
        raise ModelError(f"model_type {config.model_type!r} has no model file. Supported: {', '.join(_MODEL_CLASSES)}.")
    module_name, class_name = _MODEL_CLASSES[config.model_type]
    return getattr(import_module(module_name), class_name)(config, build).eval()
