"""Linear layers for some tokens against their torch twins in float64: in Triton's interpreter, or on the card (marker `gpu`).

`compile_for_sm90.py` beside this compiles them for the card at real shapes, and looks for spills.
"""

import pytest
import torch
from linear_support import DEVICE, HAS_CUDA, MARKS, close, on_the_card, random

from quire.kernels.torch_ops import TorchKernels, TorchResidual
from quire.kernels.triton import linear
from quire.kernels.triton.linear import Tile
from quire.kernels.triton.ops import TritonKernels, TritonManyTokens

pytestmark = MARKS

REAL = [
    (1024, 4096),
    (2048, 1024),
    (1024, 3072),
    (3072, 1024),
    (4096, 6144),
    (4096, 4096),
    (4096, 14336),
    (14336, 4096),
]
twin = TorchKernels()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def check(tokens: int, size: int, outputs: int, dtype: torch.dtype, tile: Tile | None, *, bias: bool) -> None:
    """All three operations against the twin in float64."""
    x, weight = random(tokens, size, dtype=dtype, scale=2.0), random(2 * outputs, size, dtype=dtype, scale=size**-0.5)
    b = random(2 * outputs, dtype=dtype) if bias else None
    x64, weight64, b64 = x.double(), weight.double(), None if b is None else b.double()
    whole = Tile(tile.rows, tile.tokens, tile.columns, tile.num_stages) if tile else None  # in one piece
    close(linear.linear(x, weight, b, tile=whole), twin.linear(x64, weight64, b64))
    close(
        linear.linear_silu_mul(x, weight, b, tile=whole),
        twin.linear_silu_mul(x64, weight64, b64),
        twin.linear_silu_mul(x, weight, b),
    )
    pieces = linear.linear_pieces(x, weight, tile=tile)
    assert len(pieces) == (tile or linear.choose_tile(tokens, 2 * outputs, size, in_pieces=True)).num_pieces
    close(pieces.sum(0), twin.linear(x64, weight64))


TILES = [None, Tile(32, 128, 64, 2, 2), Tile(32, 128, 32, 2, 3)]
WIDE = Tile(32, 256, 64, 2, 2)


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("tokens", [3, 32, 100])
@pytest.mark.parametrize(("dtype", "size", "outputs"), [(torch.bfloat16, 64, 24), (torch.float16, 200, 37)])
def test_against_the_twins(tile: Tile | None, tokens: int, dtype: torch.dtype, size: int, outputs: int) -> None:
    check(tokens, size, outputs, dtype, tile, bias=size == 200)


@pytest.mark.parametrize("tokens", [130, 256])
def test_as_many_tokens_as_pieces_in_gluon_take(tokens: int) -> None:
    check(tokens, 64, 24, torch.float16, WIDE, bias=False)


def test_a_piece_may_have_no_inputs_at_all() -> None:
    x, weight = random(5, 64, dtype=torch.float16), random(16, 64, dtype=torch.float16)
    pieces = linear.linear_pieces(x, weight, tile=Tile(32, 16, 32, 2, 4))
    assert len(pieces) == 4 and not pieces[2:].any()
    close(pieces.sum(0), twin.linear(x.double(), weight.double()))


def test_rounding_is_that_of_the_operations_one_by_one() -> None:
    """With sums that are exact in any order, results are equal bit for bit."""
    x, weight = torch.randint(-3, 4, (70, 64), device=DEVICE), torch.randint(-2, 3, (32, 64), device=DEVICE)
    x, weight = x.to(torch.float16), weight.to(torch.float16)
    residual, scale = random(70, 32, dtype=torch.float16), random(32, dtype=torch.float16)
    assert torch.equal(linear.linear(x, weight), twin.linear(x, weight))
    pieces = linear.linear_pieces(x, weight, tile=Tile(32, 128, 32, 2, 2))
    expected = residual.clone()
    twin.add_rms_norm(twin.linear(x, weight), expected, scale, 1e-5)
    normed = TritonKernels().add_rms_norm(pieces, residual, scale, 1e-5)
    assert torch.equal(residual, expected)
    close(normed, twin.rms_norm(expected.double(), scale.double(), 1e-5))


@pytest.mark.parametrize("size", [72, 256])
def test_a_norm_sums_pieces(size: int) -> None:
    pieces, scale = random(3, 9, size, dtype=torch.float32), random(size, dtype=torch.float16)
    residual, expected = (random(9, size, dtype=torch.float16, scale=s) for s in (1.0, 0.0))
    expected.copy_(residual)
    normed = TritonKernels().add_rms_norm(pieces, residual, scale, 1e-5)
    close(normed, twin.add_rms_norm(pieces, expected, scale, 1e-5).double())
    close(residual, expected.double())
    with pytest.raises(ValueError, match="pieces"):
        TritonKernels().add_rms_norm(pieces.half(), residual, scale, 1e-5)


def test_a_strided_input() -> None:
    x, weight = random(20, 160, dtype=torch.float16), random(16, 64, dtype=torch.float16)
    close(linear.linear(x[:, 32:96], weight), x[:, 32:96].double() @ weight.double().T)


def test_what_does_not_fit_raises() -> None:
    x, weight = random(257, 64), random(16, 64)
    with pytest.raises(ValueError, match="256 tokens"):
        linear.linear(x, weight)
    with pytest.raises(ValueError, match="match"):
        linear.linear(x[:2], random(16, 32))
    with pytest.raises(TypeError):
        linear.linear(x[:2], weight.half())
    with pytest.raises(ValueError, match="does not hold 20"):
        linear.linear(x[:20], weight, tile=Tile(32, 16, 32, 2))
    with pytest.raises(ValueError, match="one piece"):
        linear.linear(x[:2], weight, tile=Tile(32, 16, 32, 2, 2))


def test_some_tokens_of_a_gpu_with_a_copy_engine_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "_has_tma", lambda index: True)
    small, large = random(1024, 1024), random(8192, 2048)
    assert linear.takes(random(128, 1024), small, None) == HAS_CUDA
    assert linear.takes(random(64, 2048), large, None) == HAS_CUDA
    assert linear.takes(random(128, 2048), large, None, silu=True) == HAS_CUDA
    assert not linear.takes(random(128, 2048), large, None)
    assert not linear.takes(random(96, 2048), large, None, silu=True), "tiles not full"
    assert not linear.takes(random(256, 1024), small, None) and not linear.takes(random(0, 1024), small, None)
    assert not linear.takes(random(16, 1024, dtype=torch.float32), small.float(), None)
    assert not linear.takes(random(16, 1024), small, random(1024), in_pieces=True)
    assert not linear.takes(random(16, 1028)[:, 4:], small, None), "not aligned as the copy engine wants it"
    monkeypatch.setattr(linear, "_has_tma", lambda index: False)
    assert not linear.takes(random(16, 1024), small, None)


@pytest.mark.parametrize("bias", [False, True])
def test_many_tokens_products_add_to_the_residual(bias: bool) -> None:
    tokens, size, outputs = (2049, 1024, 3072) if HAS_CUDA else (5, 64, 24)
    kernels = TritonKernels()
    many = TritonManyTokens(kernels)
    x, y, residual = random(tokens, size, scale=2.0), random(tokens, outputs), random(tokens, size)
    into, back = random(2 * outputs, size, scale=size**-0.5), random(size, outputs, scale=outputs**-0.5)
    norm, b = random(size), random(size) if bias else None
    if HAS_CUDA:
        assert isinstance(kernels.residual(x), TritonManyTokens) and kernels.residual(x[:1024]) is None
        assert kernels.residual(x.float()) is None
    else:
        assert kernels.residual(random(2049, 8)) is None, "on a CPU"

    def results(kind: TritonManyTokens | TorchResidual, dtype: torch.dtype) -> list[torch.Tensor]:
        scaled = norm.to(dtype), 1e-6
        sums = residual.to(dtype, copy=True)
        kind.linear_add_(y.to(dtype), back.to(dtype), sums, None if b is None else b.to(dtype))
        x_, into_ = x.to(dtype), into.to(dtype)
        return [sums, kind.linear(x_, into_, norm=scaled), kind.linear_silu_mul(x_, into_, norm=scaled)]

    twin = TorchResidual()
    for found, exact, rounded in zip(
        results(many, x.dtype), results(twin, torch.float64), results(twin, x.dtype), strict=True
    ):
        close(found, exact, rounded)


@on_the_card
@pytest.mark.parametrize("tokens", [5, 16, 40, 64, 100, 128])
@pytest.mark.parametrize(("size", "outputs"), REAL)
def test_real_shapes(size: int, outputs: int, tokens: int) -> None:
    check(tokens, size, outputs // 2, torch.bfloat16, None, bias=False)


@on_the_card
@pytest.mark.parametrize("tokens", [8, 64, 128, 176, 256, 1280])
def test_a_graph_of_dependent_launches_gives_what_launches_one_by_one_give(tokens: int) -> None:
    """A chain in which each kernel reads what the one before wrote, of sizes that run at the same time."""
    kernels = TritonKernels()
    residual, scale = random(tokens, 1024), random(1024)
    layers = [
        (random(2048, 1024, scale=1 / 32), random(1024, 2048, scale=1 / 45), random(6144, 1024, scale=1 / 32),
         random(1024, 3072, scale=1 / 55))
        for _ in range(6)
    ]  # fmt: skip
    state = torch.empty_like(residual)

    def chain(wait: bool) -> None:
        def then(y: torch.Tensor) -> torch.Tensor:
            if wait:
                torch.cuda.synchronize()
            return y

        state.copy_(residual)
        x = torch.zeros_like(state)
        for one, two, three, four in layers:
            h = then(kernels.add_rms_norm(x, state, scale, 1e-6))
            x = then(kernels.linear_pieces(then(kernels.linear(h, one)), two))
            h = then(kernels.add_rms_norm(x, state, scale, 1e-6))
            x = then(kernels.linear_pieces(then(kernels.linear_silu_mul(h, three)), four))
        kernels.add_rms_norm(x, state, scale, 1e-6)

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
    for tokens in (16, 32, 64, 128):
        for size, outputs in REAL:
            x, weight = (
                torch.empty(tokens, size, dtype=torch.bfloat16),
                torch.empty(outputs, size, dtype=torch.bfloat16),
            )
            if (size, outputs) in ((1024, 3072), (4096, 14336)):
                linear.linear_silu_mul(x, torch.empty(2 * outputs, size, dtype=torch.bfloat16))
            elif outputs > size:
                linear.linear(x, weight)
            else:
                linear.linear_pieces(x, weight)
