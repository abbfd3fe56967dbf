"""Linear layers for few tokens against their torch twins in float64: in Triton's interpreter, or on the card (marker `gpu`).

`compile_for_sm90.py` beside this compiles them for the card at real shapes, and looks for spills.
"""

import pytest
import torch
from linear_support import DEVICE, HAS_CUDA, MARKS, close, on_the_card, random

from quire.kernels.torch_ops import TorchKernels, TorchResidual
from quire.kernels.triton import dependent, skinny
from quire.kernels.triton.ops import TritonFewTokens, TritonKernels
from quire.kernels.triton.skinny import Tile

pytestmark = MARKS

TILES = [None, Tile(4, 32, 1), Tile(2, 64, 2)]
REAL = [(1024, 4096), (2048, 1024), (1024, 3072), (3072, 1024), (4096, 6144), (4096, 14336), (14336, 4096)]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def check(
    tokens: int, size: int, outputs: int, dtype: torch.dtype, tile: Tile | None, *, norm: bool, bias: bool
) -> None:
    """All three operations against the twin in float64."""
    twin = TorchResidual()
    x = random(tokens, size, dtype=dtype, scale=2.0)
    weight = random(2 * outputs, size, dtype=dtype, scale=size**-0.5)
    b = random(2 * outputs, dtype=dtype) if bias else None
    scale = random(size, dtype=dtype)
    x64, weight64, b64 = x.double(), weight.double(), None if b is None else b.double()
    few = TritonFewTokens()
    linear, silu = few.linear, few.linear_silu_mul
    if tile is not None:
        linear = lambda *args, norm: skinny.linear(*args, norm=norm, tile=tile)  # noqa: E731
        silu = lambda *args, norm: skinny.linear_silu_mul(*args, norm=norm, tile=tile)  # noqa: E731
    with_norm, norm64 = ((scale, 1e-5), (scale.double(), 1e-5)) if norm else (None, None)
    close(linear(x, weight, b, norm=with_norm), twin.linear(x64, weight64, b64, norm=norm64))
    close(
        silu(x, weight, b, norm=with_norm),
        twin.linear_silu_mul(x64, weight64, b64, norm=norm64),
        twin.linear_silu_mul(x, weight, b, norm=with_norm),
    )
    residual = random(tokens, 2 * outputs, dtype=dtype)
    expected = residual.double()
    twin.linear_add_(x64, weight64, expected, b64)
    skinny.linear_add_(x, weight, residual, b, tile=tile)
    close(residual, expected)


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("tokens", [1, 3, 4])
@pytest.mark.parametrize(("dtype", "size", "outputs"), [(torch.bfloat16, 64, 24), (torch.float16, 104, 13)])
def test_against_the_twins(tile: Tile | None, tokens: int, dtype: torch.dtype, size: int, outputs: int) -> None:
    check(tokens, size, outputs, dtype, tile, norm=size == 104 or tokens % 2 == 1, bias=size == 64)


def test_rounding_is_that_of_the_operations_one_by_one() -> None:
    """With sums that are exact in any order, results are equal bit for bit."""
    x, weight = torch.randint(-3, 4, (3, 64), device=DEVICE), torch.randint(-2, 3, (16, 64), device=DEVICE)
    x, weight, residual = x.to(torch.float16), weight.to(torch.float16), random(3, 16, dtype=torch.float16)
    few, twin = TritonFewTokens(), TorchResidual()
    norm = random(64, dtype=torch.float16), 1e-5
    normed = TritonKernels().rms_norm(x, *norm)
    assert torch.equal(few.linear(x, weight), twin.linear(x, weight))
    torch.testing.assert_close(few.linear(x, weight, norm=norm), few.linear(normed, weight), atol=4e-3, rtol=1e-3)
    expected = residual.clone()
    twin.linear_add_(x, weight, expected)
    few.linear_add_(x, weight, residual)
    assert torch.equal(residual, expected)


@pytest.mark.parametrize("tokens", [1, 2])
def test_a_strided_input(tokens: int) -> None:
    x, weight = random(tokens, 160, dtype=torch.float16), random(16, 64, dtype=torch.float16)
    close(skinny.linear(x[:, 32:96], weight), x[:, 32:96].double() @ weight.double().T)


def test_what_does_not_fit_raises() -> None:
    x, weight = random(5, 64), random(16, 64)
    with pytest.raises(ValueError, match="4 tokens"):
        skinny.linear(x, weight)
    with pytest.raises(ValueError, match="match"):
        skinny.linear(x[:2], random(16, 32))
    with pytest.raises(TypeError):
        skinny.linear(x[:2], weight.half())


def test_few_bf16_tokens_of_a_gpu_are_taken() -> None:
    few = TritonFewTokens()
    assert few.takes(random(4, 8)) == few.takes(random(1, 8, dtype=torch.float16)) == HAS_CUDA
    assert few.takes(random(2, 4096)) == HAS_CUDA
    assert not few.takes(random(5, 8)) and not few.takes(random(3, 4096))
    assert not few.takes(random(0, 8))
    assert not few.takes(random(1, 8, dtype=torch.float32))
    kernels = TritonKernels()
    assert (type(kernels.residual(random(4, 8))) is TritonFewTokens) == HAS_CUDA
    assert kernels.residual(random(5, 8)) is None and TorchKernels().residual(random(4, 8)) is None
    assert dependent.options(torch.device("cpu")) == {"PDL": False}


@on_the_card
@pytest.mark.parametrize("tokens", [1, 2, 4])
@pytest.mark.parametrize(("size", "outputs"), REAL)
def test_real_shapes(size: int, outputs: int, tokens: int) -> None:
    check(tokens, size, outputs // 2, torch.bfloat16, None, norm=True, bias=False)


@on_the_card
@pytest.mark.parametrize("tokens", [1, 4])
def test_a_graph_of_dependent_launches_gives_what_launches_one_by_one_give(tokens: int) -> None:
    """A chain in which each kernel reads what the one before wrote, of sizes that run at the same time."""
    few = TritonFewTokens()
    residual = random(tokens, 1024)
    scale = random(1024), 1e-6
    layers = [
        (random(2048, 1024, scale=1 / 32), random(1024, 2048, scale=1 / 45), random(6144, 1024, scale=1 / 32),
         random(1024, 3072, scale=1 / 55))
        for _ in range(6)
    ]  # fmt: skip
    state = torch.empty_like(residual)

    def chain(wait: bool) -> None:
        state.copy_(residual)
        for one, two, three, four in layers:
            for inner, weight, outer in ((few.linear, one, two), (few.linear_silu_mul, three, four)):
                y = inner(state, weight, norm=scale)
                if wait:
                    torch.cuda.synchronize()
                few.linear_add_(y, outer, state)
                if wait:
                    torch.cuda.synchronize()

    chain(wait=True)
    expected = state.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chain(wait=False)
    for _ in range(50):
        graph.replay()
        assert torch.equal(state, expected)


def launch_everything() -> None:
    """Real shapes with the tiles that are chosen; `compile_for_sm90` compiles what this launches."""
    few = TritonFewTokens()
    for tokens in (1, 2, 4):
        for size, outputs in REAL:
            x, weight = (
                torch.empty(tokens, size, dtype=torch.bfloat16),
                torch.empty(outputs, size, dtype=torch.bfloat16),
            )
            norm = torch.empty(size, dtype=torch.bfloat16), 1e-6
            if (size, outputs) in ((1024, 3072), (4096, 14336)):
                few.linear_silu_mul(x, torch.empty(2 * outputs, size, dtype=torch.bfloat16), norm=norm)
            elif outputs > size:
                few.linear(x, weight, norm=norm)
            else:
                few.linear_add_(x, weight, torch.empty(tokens, outputs, dtype=torch.bfloat16))
