"""What tests of several directories share, beside fixtures."""

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from quire.engine.engine import Engine

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"


def shared_data(relative: str) -> Path:
    """A file or directory of the shared test data; skips the test where it is absent."""
    path = SHARED / "data" / relative
    if not path.exists():
        pytest.skip(f"test data {relative} is not on this machine")
    return path


@contextmanager
def loaded(path: Path) -> Iterator[ModuleType]:
    """The program or module at `path`, which is no package's, under its own name."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        del sys.modules[path.stem]


TINY_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "eos_token_id": 2,
    "torch_dtype": "float32",
}


def assert_nothing_leaked(engine: "Engine") -> None:
    """All blocks are free or cached, and no row is taken."""
    pool = engine.kv.pool
    assert pool.num_held == 0
    assert pool.num_pending == 0
    assert pool.num_free == pool.num_blocks
    assert engine.kv.host_pool.num_free == engine.kv.host_pool.num_blocks
    assert engine.scheduler.num_running == 0
    assert not engine.has_unfinished
    engine.kv.check()
