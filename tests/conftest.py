"""Fixtures and paths that all tests share."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"

sys.path.insert(0, str(Path(__file__).parent / "core"))  # for the pretend worker


def shared_data(relative: str) -> Path:
    """A file or directory of the shared test data; skips the test where it is absent."""
    path = SHARED / "data" / relative
    if not path.exists():
        pytest.skip(f"test data {relative} is not on this machine")
    return path


@pytest.fixture(scope="session")
def stories() -> Path:
    """A trained Llama of 260,000 parameters, with its golden greedy answers."""
    return shared_data("models/stories260K")
