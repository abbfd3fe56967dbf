"""Quire serves language models with a KV cache kept in blocks.

    from quire import LLM, SamplingParams
    print(LLM("path/to/model").generate("Once upon a time", SamplingParams(max_tokens=32))[0].outputs[0].text)

Names are imported when they are first used, so that `import quire` loads no torch.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

from quire.version import __version__

if TYPE_CHECKING:
    from quire.engine.async_engine import AsyncEngine
    from quire.engine.llm import LLM
    from quire.outputs import CompletionOutput, RequestOutput
    from quire.sampling_params import BeamSearchParams, SamplingParams

_HOME = {
    "AsyncEngine": "quire.engine.async_engine",
    "BeamSearchParams": "quire.sampling_params",
    "CompletionOutput": "quire.outputs",
    "LLM": "quire.engine.llm",
    "RequestOutput": "quire.outputs",
    "SamplingParams": "quire.sampling_params",
}

# For OpenMP's library, which reads it when torch loads it: threads that wait for each other spin for tens of microseconds, then
# sleep. Its own choice is milliseconds, in which they keep the core from the one that they wait for, if others are busy too.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")

__all__ = [
    "LLM",
    "AsyncEngine",
    "BeamSearchParams",
    "CompletionOutput",
    "RequestOutput",
    "SamplingParams",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'quire' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
