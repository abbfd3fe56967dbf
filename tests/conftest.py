"""Fixtures that all tests share."""

import json
import signal
from pathlib import Path

import pytest

from support import TINY_CONFIG, shared_data

# A shell that starts the tests in the background has them ignore Ctrl-C, and programs that they start would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def stories() -> Path:
    """A trained Llama of 260,000 parameters, with its golden greedy answers."""
    return shared_data("models/stories260K")


@pytest.fixture
def tiny_model(tmp_path: Path) -> Path:
    """A directory with a config.json alone, for random weights: load_format="dummy", skip_tokenizer_init=True."""
    directory = tmp_path / "tiny"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(TINY_CONFIG))
    return directory
