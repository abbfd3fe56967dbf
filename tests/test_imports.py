"""What loads what: the import rules, and that planning needs no torch."""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

from support import ROOT


def test_import_rules_hold() -> None:
    if find_spec("importlinter") is None:
        pytest.skip("import-linter is not installed")
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    "module",
    [
        "quire",
        "quire.core.scheduler",
        "quire.core.accounting",
        "quire.core.memory_plan",
        "quire.engine.engine",
        "quire.engine.async_engine",
        "quire.engine.llm",
        "quire.engine.client",
        "quire.engine.process",
        "quire.server.serve",
        "quire.executor.base",
        "quire.bench.scheduler",
        "quire.bench.throughput",
    ],
)
def test_module_loads_no_torch(module: str) -> None:
    program = f"import {module}, sys; assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_public_names_are_there() -> None:
    import quire

    for name in quire.__all__:
        assert getattr(quire, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Missing'"):
        _ = quire.Missing


@pytest.mark.parametrize(
    ("chosen", "spins"),
    [({}, "3000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")],
    ids=str,
)
def test_waiting_threads_sleep_soon_unless_somebody_has_chosen(chosen: dict[str, str], spins: str) -> None:
    names = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    environment = {name: value for name, value in os.environ.items() if name not in names} | chosen
    program = "import quire, os; print(os.environ.get('GOMP_SPINCOUNT'))"
    command = [sys.executable, "-c", program]
    assert subprocess.check_output(command, env=environment, text=True).strip() == spins
