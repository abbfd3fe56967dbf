"""Linear layers in Gluon against their torch twins in float64, on a Hopper GPU; which tile is chosen, and for what, anywhere.

`compile_for_sm90.py` beside this compiles them for the card at real shapes. Where there is no card they are interpreted
(`gluon_interpreter`), as their Triton siblings are in `test_linear`.
"""

from importlib.metadata import version

import pytest
import torch
from linear_support import DEVICE, close, random

from quire.kernels import gluon
from quire.kernels.gluon import LinearTile, choose_linear_tile
from quire.kernels.torch_ops import TorchKernels
from quire.kernels.triton import linear as triton_linear
from quire.kernels.triton.fused import TritonKernels

AVAILABLE = gluon.available(torch.device(DEVICE))
hopper = [pytest.mark.gpu, pytest.mark.skipif(not AVAILABLE, reason="no Hopper GPU on this machine")]
twin = TorchKernels()
TOKENS = (1, 16, 33, 64, 65, 100, 128, 129, 144, 176, 192, 193, 208, 224, 240, 256)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def both(x: torch.Tensor, weight: torch.Tensor, tile: LinearTile, pairs: LinearTile) -> None:
    """Both operations of one weight against float64."""
    from quire.kernels.gluon import linear

    x64, weight64 = x.double(), weight.double()
    torch.cuda.synchronize()  # kernels read weights without waiting for the one before
    pieces = linear.linear_pieces(x, weight, tile=tile)
    assert len(pieces) == tile.num_pieces and pieces.dtype is torch.float32
    close(pieces.sum(0), twin.linear(x64, weight64))
    if len(x) <= gluon.MAX_SILU_TOKENS:
        found = linear.linear_silu_mul(x, weight, tile=pairs)
        close(found, twin.linear_silu_mul(x64, weight64), twin.linear_silu_mul(x, weight))


@pytest.mark.parametrize("tokens", [pytest.param(tokens, marks=hopper) for tokens in TOKENS])
def test_any_number_of_tokens(tokens: int) -> None:
    both(random(tokens, 1024), random(1024, 1024, scale=1 / 32), LinearTile(64, 4), LinearTile(112))


SHAPES = {  # inputs, outputs, dtype, pieces, pairs of a program
    "odd-outputs": (256, 74, torch.bfloat16, 1, 16),
    "inputs-in-no-whole-turns": (200, 128, torch.float16, 3, 32),
    "a-piece-without-inputs": (72, 64, torch.bfloat16, 4, 16),
    "more-parts-than-turns": (64, 256, torch.bfloat16, 1, 48),
    "more-parts-than-stages": (128, 448, torch.bfloat16, 1, 112),
    "several-parts": (512, 480, torch.float16, 2, 48),
    "other-parts": (512, 480, torch.bfloat16, 2, 80),
    "more-programs-than-multiprocessors": (128, 34_000, torch.bfloat16, 2, 96),
}


@pytest.mark.parametrize("tokens", [pytest.param(tokens, marks=hopper) for tokens in (50, 144, 192)])
@pytest.mark.parametrize("shape", SHAPES)
def test_any_shape(shape: str, tokens: int) -> None:
    size, outputs, dtype, pieces, pairs = SHAPES[shape]
    x, weight = random(tokens, size, dtype=dtype), random(outputs, size, dtype=dtype, scale=size**-0.5)
    both(x, weight, LinearTile(64, pieces), LinearTile(pairs))


REAL = [(1024, 6144), (3072, 1024), (4096, 4096), (4096, 28672), (14336, 4096), (5120, 5120), (4096, 22016)]


@pytest.mark.parametrize("tokens", [pytest.param(tokens, marks=hopper) for tokens in (96, 160, 224)])
@pytest.mark.parametrize(("size", "outputs"), REAL)
def test_real_shapes(size: int, outputs: int, tokens: int) -> None:
    x, weight = random(tokens, size, scale=2.0), random(outputs, size, scale=size**-0.5)
    both(x, weight, choose_linear_tile(outputs), choose_linear_tile(outputs // 2, silu=True))


@pytest.mark.parametrize("tokens", [pytest.param(tokens, marks=hopper) for tokens in (100, 192)])
def test_rounding_is_the_siblings(tokens: int) -> None:
    """With sums that are exact in any order: pieces are equal bit for bit, and so is what SiLU is taken of."""
    from quire.kernels.gluon import linear

    x, weight = torch.randint(-3, 4, (tokens, 256), device=DEVICE), torch.randint(-2, 3, (128, 256), device=DEVICE)
    x, weight = x.to(torch.bfloat16), weight.to(torch.bfloat16)
    torch.cuda.synchronize()
    sibling = triton_linear.Tile(64, 256, 64, 2, 2)
    found = linear.linear_pieces(x, weight, tile=LinearTile(64, 2))
    assert torch.equal(found, triton_linear.linear_pieces(x, weight, tile=sibling))
    silu = linear.linear_silu_mul(x, weight).float()
    exact = twin.linear_silu_mul(x.double(), weight.double()).float()
    same = twin.linear_silu_mul(x, weight).float()
    assert (silu == same).float().mean() > 0.99  # where an exponential rounds to either side
    close(silu.to(torch.bfloat16), exact.double(), same.to(torch.bfloat16))


@pytest.mark.parametrize("tokens", [pytest.param(tokens, marks=hopper) for tokens in (150, 256)])
def test_a_strided_input_and_rows_beyond_it(tokens: int) -> None:
    """What lies beside x in memory has no influence, be it NaN."""
    wide = torch.full((300, 640), float("nan"), device=DEVICE, dtype=torch.bfloat16)
    wide[:tokens, 64:576] = random(tokens, 512)
    both(wide[:tokens, 64:576], random(1024, 512, scale=1 / 23), LinearTile(64, 2), LinearTile(64))


@pytest.mark.parametrize("tokens", [pytest.param(tokens, marks=hopper) for tokens in (96, 192, 256)])
def test_layers_of_a_model_take_it(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from quire.kernels.gluon import linear

    launched = []
    for name in ("linear_pieces", "linear_silu_mul"):
        function = getattr(linear, name)
        monkeypatch.setattr(linear, name, lambda *args, f=function, n=name: (launched.append(n), f(*args))[1])
    kernels, x, weight = TritonKernels(), random(tokens, 1024), random(2048, 1024, scale=1 / 32)
    torch.cuda.synchronize()  # kernels read weights without waiting for the one before
    expected = ["linear_pieces"] + ["linear_silu_mul"] * (tokens <= gluon.MAX_SILU_TOKENS)
    close(kernels.linear_pieces(x, weight).sum(0), twin.linear(x.double(), weight.double()))
    found = kernels.linear_silu_mul(x, weight)
    close(found, twin.linear_silu_mul(x.double(), weight.double()), twin.linear_silu_mul(x, weight))
    assert launched == expected
    kernels.linear_pieces(x, weight, random(2048))
    kernels.linear_pieces(x.float(), weight.float())
    kernels.linear_pieces(x[:32], weight)
    kernels.linear_silu_mul(random(257, 1024), weight)
    assert launched == expected


@pytest.mark.parametrize("tokens", [pytest.param(tokens, marks=hopper) for tokens in (64,)])
def test_what_does_not_fit_raises(tokens: int) -> None:
    from quire.kernels.gluon import linear

    x, weight = random(tokens, 64), random(32, 64)
    for call, error, match in (
        (lambda: linear.linear_pieces(random(257, 64), weight), ValueError, "256 tokens"),
        (lambda: linear.linear_silu_mul(random(193, 64), weight), ValueError, "192 tokens"),
        (lambda: linear.linear_pieces(x, random(32, 128)), ValueError, "match"),
        (lambda: linear.linear_silu_mul(x, random(31, 64)), ValueError, "halves"),
        (lambda: linear.linear_pieces(x, weight.half()), TypeError, "one dtype"),
        (lambda: linear.linear_pieces(x, weight, tile=LinearTile(32)), ValueError, "64 outputs"),
        (lambda: linear.linear_silu_mul(x, weight, tile=LinearTile(24)), ValueError, "pairs"),
        (lambda: linear.linear_silu_mul(x, weight, tile=LinearTile(128)), ValueError, "pairs"),
    ):
        with pytest.raises(error, match=match):
            call()


# -- interpreted -------------------------------------------------------------------------------------------------------------
def interpret(x: torch.Tensor, weight: torch.Tensor, pieces: int, pairs: int, late: str) -> None:
    from gluon_interpreter import interpreted
    from quire.kernels.gluon import linear

    x64, weight64 = x.double(), weight.double()
    with interpreted(linear, late):
        found = linear.linear_pieces(x, weight, tile=LinearTile(64, pieces)).sum(0)
        silu = linear.linear_silu_mul(x, weight, tile=LinearTile(pairs)) if len(x) <= gluon.MAX_SILU_TOKENS else None
    close(found, twin.linear(x64, weight64))
    if silu is not None:
        close(silu, twin.linear_silu_mul(x64, weight64), twin.linear_silu_mul(x, weight))


@pytest.mark.skipif(DEVICE != "cpu", reason="the tests above run the kernels themselves")
@pytest.mark.skipif(not version("triton").startswith(gluon.TRITON_VERSIONS), reason="not for this version of Triton")
@pytest.mark.parametrize("late", ["copies", "products"])
@pytest.mark.parametrize(
    ("tokens", "size", "outputs", "pieces", "pairs"),
    [
        (1, 64, 96, 1, 48),
        (50, 200, 74, 3, 16),
        (130, 640, 256, 1, 112),
        (192, 1216, 96, 1, 32),
        (176, 320, 480, 1, 80),
        (240, 72, 64, 4, 16),
        (225, 1472, 64, 2, 32),
    ],
)
def test_interpreted(tokens: int, size: int, outputs: int, pieces: int, pairs: int, late: str) -> None:
    """Turns fewer and more than stages, one part and several."""
    interpret(random(tokens, size), random(outputs, size, scale=size**-0.5), pieces, pairs, late)


# -- anywhere ----------------------------------------------------------------------------------------------------------------
def test_tiles_fill_the_multiprocessors() -> None:
    assert choose_linear_tile(14336, silu=True) == LinearTile(112)  # 128 programs
    assert choose_linear_tile(3072, silu=True) == LinearTile(32)  # 96: 16 would be two rounds
    assert choose_linear_tile(18944, silu=True) == LinearTile(48)  # three rounds of 132, where 112 would leave 94 idle
    assert choose_linear_tile(4096) == LinearTile(64, 2)
    assert choose_linear_tile(1024) == LinearTile(64, 4)
    assert choose_linear_tile(8192) == LinearTile(64, 1)
    assert choose_linear_tile(5120) == LinearTile(64, 3)


def test_some_tokens_of_a_hopper_gpu_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = random(1024, 512)
    assert gluon.takes_linear(random(96, 512), weight, None) == AVAILABLE
    monkeypatch.setattr(gluon, "available", lambda device: True)
    taken = {n: (gluon.takes_linear(random(n, 512), weight, None), gluon.takes_linear(random(n, 512), weight, None, silu=True))
             for n in (32, 33, 64, 65, 192, 193, 256, 257)}  # fmt: skip
    assert [n for n in taken if taken[n][0]] == [33, 64, 65, 192, 193, 256]
    assert [n for n in taken if taken[n][1]] == [65, 192]
    assert not gluon.takes_linear(random(96, 512), weight, random(1024))
    assert not gluon.takes_linear(random(96, 512, dtype=torch.float32), weight.float(), None)
    assert not gluon.takes_linear(random(96, 516)[:, 4:], weight, None), "not aligned as the copy engine wants it"
    assert not gluon.takes_linear(random(96, 512), random(1023, 512), None, silu=True)
    assert not gluon.takes_linear(random(96, 508), random(1024, 508), None)


def launch_everything() -> None:
    """Real shapes with the tiles that are chosen; `compile_for_sm90` compiles what this launches."""
    from quire.kernels.gluon import linear

    for tokens, dtype in ((64, torch.bfloat16), (144, torch.float16), (240, torch.bfloat16), (256, torch.bfloat16)):
        linear.linear_pieces(torch.empty(tokens, 4096, dtype=dtype), torch.empty(4096, 4096, dtype=dtype))
    for tokens, dtype in ((96, torch.bfloat16), (192, torch.bfloat16), (192, torch.float16)):
        for size, outputs in ((1024, 3072), (4096, 14336)):
            linear.linear_silu_mul(
                torch.empty(tokens, size, dtype=dtype), torch.empty(2 * outputs, size, dtype=dtype)
            )  # fmt: skip
