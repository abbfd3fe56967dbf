"""The interpreter of Gluon finds faults: such as are planted into the text of the linear layers and of attention."""

from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Literal

import pytest
import torch

import triton_interpreter  # noqa: F401  # isort: skip
from quire.kernels import gluon
from quire.kernels.gluon import LinearTile
from quire.kernels.torch_ops import TorchKernels
from support import loaded

pytestmark = [
    pytest.mark.skipif(
        not version("triton").startswith(gluon.TRITON_VERSIONS), reason="not for this version of Triton"
    ),
    pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are not interpreted where there is a GPU"),
]
LINEAR = Path(gluon.__file__).with_name("linear.py")
FAULTS = {  # what stands there, what is put in its place
    "each tile from the first stage": ("* turns\n        sums", "* 0\n        sums"),
    "the wrong phase of empty stages": ("(turn // STAGES) & 1 ^ 1)", "(turn // STAGES) & 1)"),
    "the wrong phase in the next tile": ("((first + turn) // STAGES) & 1 ^ 1)", "((first + turn) // STAGES) & 1)"),
    "no wait in the next tile": (
        "            mbarrier.wait(empty.index(stage), ((first + turn) // STAGES) & 1 ^ 1)\n", ""
    ),
    "turns left out in the next tile": ("gl.where(item == gl.program_id(0), STAGES, 0)", "STAGES"),
    "the first tile's tokens": ("num_tokens, token_tile, at, CONSUMERS)", "num_tokens, 0, at, CONSUMERS)"),
    "columns in another order": ("permute([0, 1, 3, 2, 4])", "permute([0, 1, 2, 3, 4])"),
    "one phase of full stages": ("full.index(stage), (turn // STAGES) & 1)", "full.index(stage), 0)"),
    "no wait for empty stages": ("        mbarrier.wait(empty.index(stage), (turn // STAGES) & 1 ^ 1)\n", ""),
    "a stage freed too early": ("empty.index((turn + STAGES - 1) % STAGES), pred=turn > 0", "empty.index(stage)"),
    "products not waited for": ("_await_all_but(_num_parts(N), products)", "_await_all_but(2 * _num_parts(N), products)"),
    "other rows": ("row + up * OUTPUTS +", "row + up * PAIRS +"),
    "other inputs": ("full.index(stage), 0, at, N)", "full.index(stage), 0, at + 8, N)"),
    "no arrival": ("            mbarrier.arrive(empty.index(stage))\n", ""),
}  # fmt: skip
CASES = ((50, 64, 96, 1, 48), (130, 640, 256, 1, 112), (192, 1216, 96, 1, 32))  # tokens, inputs, rows, pieces, pairs


@pytest.fixture
def planted(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ModuleType]:
    """The module of the linear layers, with a fault."""
    there, instead = FAULTS[request.param]
    text = LINEAR.read_text()
    assert there in text
    path = tmp_path / "planted_linear.py"
    path.write_text(text.replace(there, instead))
    with loaded(path) as module:
        yield module


@pytest.mark.parametrize("planted", FAULTS, indirect=True)
def test_planted_faults_are_found(planted: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gluon_interpreter.DEADLOCK_S", 0.5)
    monkeypatch.setattr("gluon_interpreter.PRODUCTS_S", 0.03)  # longer than copies take on a busy machine
    monkeypatch.setattr(planted, "_num_sms", few_sms)
    assert any(differs_or_fails(planted, case, late) for case in CASES for late in ("products", "copies"))


def few_sms(device: torch.device) -> int:
    """So few that programs have several tiles."""
    return 2


def differs_or_fails(module: ModuleType, case: tuple[int, ...], late: Literal["copies", "products"]) -> bool:
    from gluon_interpreter import interpreted

    tokens, size, rows, pieces, pairs = case
    torch.manual_seed(0)
    x, weight = torch.randn(tokens, size).half(), (torch.randn(rows, size) * size**-0.5).half()
    twin = TorchKernels()
    try:
        with interpreted(module, late):
            sums = module.linear_pieces(x, weight, tile=LinearTile(64, pieces)).sum(0)
            silu = module.linear_silu_mul(x, weight, tile=LinearTile(pairs, consumers=2)).float()
    except (AssertionError, RuntimeError, TimeoutError):
        return True
    expected = twin.linear(x.double(), weight.double()), twin.linear_silu_mul(x.double(), weight.double())
    return any(not (found - want).norm() < 1e-2 * want.norm() for found, want in zip((sums, silu), expected))


def test_nothing_is_found_where_nothing_is_planted(monkeypatch: pytest.MonkeyPatch) -> None:
    from quire.kernels.gluon import linear

    monkeypatch.setattr(linear, "_num_sms", few_sms)
    assert not any(differs_or_fails(linear, case, late) for case in CASES for late in ("products", "copies"))
