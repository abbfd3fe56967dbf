"""Another engine on the same requests: Hugging Face transformers, in static batches, as most scripts form them.

A batch is padded on the left and runs until its longest answer is complete; then the next one begins. Tokens that no request
asked for are computed and not counted. Its model has the same shape and dtype and, where weights are random, other random ones.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from typing import Any

from quire.config import EngineConfig
from quire.errors import ConfigError


def check() -> None:
    """Raises ConfigError if transformers is missing: better before a run than after it."""
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise ConfigError("--peer transformers needs the transformers package installed") from error


Batch = tuple[Sequence[Sequence[int]], int]
"""Prompts, and how many tokens each gets."""


def transformers_seconds(config: EngineConfig, dtype: str, batches: Sequence[Batch], temperature: float) -> float:
    """Seconds in which `generate` answers one batch after the other, after a short warm-up. Frees its memory."""
    import torch

    device = "cuda" if torch.cuda.is_available() and config.device != "cpu" else "cpu"
    try:
        model = _load(config, getattr(torch, dtype), device)
        _generate(model, device, (batches[0][0], 2), temperature)
        return sum(_generate(model, device, batch, temperature) for batch in batches)
    finally:
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()


def _load(config: EngineConfig, dtype: Any, device: str) -> Any:
    import torch
    import transformers

    auto: Any = transformers.AutoModelForCausalLM
    if config.load_format != "dummy":
        return auto.from_pretrained(config.model, dtype=dtype).to(device).eval()
    shape = transformers.AutoConfig.from_pretrained(config.model)
    with torch.device(device):  # drawn where they stay: on the host a large model's take minutes
        return auto.from_config(shape, dtype=dtype).eval()


def _generate(model: Any, device: str, batch: Batch, temperature: float) -> float:
    import torch

    prompts, num_output = batch

    # top_k is 50 where nobody says otherwise
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    began_s = time.perf_counter()
    with torch.inference_mode():
        made = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=num_output,
            min_new_tokens=num_output,
            pad_token_id=0,
            eos_token_id=None,
            **sampling,
        )
    assert made.shape[1] == longest + num_output
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began_s
