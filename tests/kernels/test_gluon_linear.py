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
from quire.kernels.triton.ops import TritonKernels

AVAILABLE = gluon.available(torch.device(DEVICE))
hopper = [pytest.mark.gpu, pytest.mark.skipif(not AVAILABLE, reason="no Hopper GPU on this machine")]
twin = TorchKernels()
TOKENS = (1, 16, 33, 64, 65, 100, 128, 129, 144, 176, 192, 193, 208, 224, 240, 256, 300, 1000, 2500)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def both(x: torch.Tensor, weight: torch.Tensor, tile: LinearTile, *pairs: LinearTile) -> None:
    """Both operations of one weight against float64, SiLU x up in tiles of `pairs`."""
    from quire.kernels.gluon import linear

    x64, weight64 = x.double(), weight.double()
    torch.cuda.synchronize()  # kernels read weights without waiting for the one before
    if len(x) <= gluon.MAX_TOKENS:
        pieces = linear.linear_pieces(x, weight, tile=tile)
        assert len(pieces) == tile.num_pieces and pieces.dtype is torch.float32
        close(pieces.sum(0), twin.linear(x64, weight64))
    exact, rounded = twin.linear_silu_mul(x64, weight64), twin.linear_silu_mul(x, weight)
    for tile in pairs:
        close(linear.linear_silu_mul(x, weight, tile=tile), exact, rounded)


@pytest.mark.parametrize("tokens", [pytest.param(tokens, marks=hopper) for tokens in TOKENS])
def test_any_number_of_tokens(tokens: int) -> None:
    weight = random(1024, 1024, scale=1 / 32)
    both(random(tokens, 1024), weight, LinearTile(64, 4), LinearTile(112, consumers=3), LinearTile(128, consumers=2))


SHAPES = {  # inputs, rows of the weight, dtype, pieces, pairs of a program
    "few-outputs": (256, 96, torch.bfloat16, 1, 16),
    "inputs-in-no-whole-turns": (200, 128, torch.float16, 3, 32),
    "a-piece-without-inputs": (72, 64, torch.bfloat16, 4, 16),
    "more-parts-than-turns": (64, 256, torch.bfloat16, 1, 48),
    "more-parts-than-stages": (128, 448, torch.bfloat16, 1, 112),
    "several-parts": (512, 480, torch.float16, 2, 48),
    "other-parts": (512, 480, torch.bfloat16, 2, 80),
}


@pytest.mark.parametrize("tokens", [pytest.param(tokens, marks=hopper) for tokens in (50, 144, 700)])
@pytest.mark.parametrize("shape", SHAPES)
def test_any_shape(shape: str, tokens: int) -> None:
    size, outputs, dtype, pieces, pairs = SHAPES[shape]
    x, weight = random(tokens, size, dtype=dtype), random(outputs, size, dtype=dtype, scale=size**-0.5)
    both(x, weight, LinearTile(64, pieces), LinearTile(pairs, consumers=2), LinearTile(pairs, consumers=3))


@pytest.mark.parametrize("size", [pytest.param(size, marks=hopper) for size in (64, 320, 576, 712)])
def test_programs_of_several_tiles(size: int) -> None:
    """With turns that are a multiple of the stages, and that are not: then each tile begins at another one, in either phase."""
    x, weight = random(700, size), random(34_016, size, scale=size**-0.5)
    both(
        x,
        weight,
        LinearTile(64),
        LinearTile(128, consumers=2),
        LinearTile(112, consumers=3),
        LinearTile(48, consumers=3),
    )


REAL = [(1024, 6144), (3072, 1024), (4096, 4096), (4096, 28672), (14336, 4096), (5120, 5120), (4096, 22016)]


@pytest.mark.parametrize("tokens", [pytest.param(tokens, marks=hopper) for tokens in (96, 160, 224, 512, 2100)])
@pytest.mark.parametrize(("size", "outputs"), REAL)
def test_real_shapes(size: int, outputs: int, tokens: int) -> None:
    x, weight = random(tokens, size, scale=2.0), random(outputs, size, scale=size**-0.5)
    both(x, weight, choose_linear_tile(tokens, outputs), choose_linear_tile(tokens, outputs // 2, silu=True))


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
    weight = random(1024, 512, scale=1 / 23)
    both(wide[:tokens, 64:576], weight, LinearTile(64, 2), LinearTile(64, consumers=2), LinearTile(64, consumers=3))


@pytest.mark.parametrize("tokens", [pytest.param(tokens, marks=hopper) for tokens in (96, 192, 256, 2048)])
def test_layers_of_a_model_take_it(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from quire.kernels.gluon import linear

    launched = []
    for name in ("linear_pieces", "linear_silu_mul"):
        function = getattr(linear, name)
        monkeypatch.setattr(linear, name, lambda *args, f=function, n=name: (launched.append(n), f(*args))[1])
    kernels, x, weight = TritonKernels(), random(tokens, 1024), random(2048, 1024, scale=1 / 32)
    torch.cuda.synchronize()  # kernels read weights without waiting for the one before
    expected = ["linear_pieces"] * (tokens <= 256) + ["linear_silu_mul"] * (tokens in (96, 192, 2048))
    pieces = kernels.linear_pieces(x, weight)
    close(pieces.sum(0) if pieces.dim() == 3 else pieces, twin.linear(x.double(), weight.double()))
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
        (lambda: linear.linear_pieces(random(0, 64), weight), ValueError, "no tokens"),
        (lambda: linear.linear_pieces(x, random(32, 128)), ValueError, "match"),
        (lambda: linear.linear_silu_mul(x, random(31, 64)), ValueError, "multiple of 16, not 15.5"),
        (lambda: linear.linear_silu_mul(x, random(48, 64)), ValueError, "multiple of 16, not 24"),
        (lambda: linear.linear_silu_mul(random(1, 64).expand(2**17, 64), random(2**15, 64)), ValueError, "2\\^31"),
        (lambda: linear.linear_silu_mul(x, weight, tile=LinearTile(64)), ValueError, "1 consumers"),
        (lambda: linear.linear_pieces(x, weight.half()), TypeError, "one dtype"),
        (lambda: linear.linear_pieces(x, weight, tile=LinearTile(32)), ValueError, "64 outputs"),
        (lambda: linear.linear_silu_mul(x, weight, tile=LinearTile(24, consumers=2)), ValueError, "pairs"),
        (lambda: linear.linear_silu_mul(x, weight, tile=LinearTile(128, consumers=3)), ValueError, "pairs"),
    ):
        with pytest.raises(error, match=match):
            call()


# -- interpreted -------------------------------------------------------------------------------------------------------------
@pytest.mark.skipif(DEVICE != "cpu", reason="the tests above run the kernels themselves")
@pytest.mark.skipif(not version("triton").startswith(gluon.TRITON_VERSIONS), reason="not for this version of Triton")
@pytest.mark.parametrize("late", ["copies", "products"])
@pytest.mark.parametrize(
    ("tokens", "size", "outputs", "pieces", "pairs"),
    [
        (1, 64, 96, 1, 48),
        (50, 200, 96, 3, 16),
        (130, 640, 256, 1, 112),
        (192, 1216, 96, 1, 32),
        (176, 320, 480, 1, 80),
        (240, 72, 64, 4, 16),
        (225, 1472, 64, 2, 32),
        (300, 576, 320, 1, 48),
        (300, 128, 512, 1, 112),
        (2200, 64, 128, 1, 32),
    ],
)
def test_interpreted(
    tokens: int, size: int, outputs: int, pieces: int, pairs: int, late: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Turns fewer and more than stages, one part and several, programs of one tile and of several, tiles of tokens in one group
    and in two."""
    from gluon_interpreter import interpreted
    from quire.kernels.gluon import linear

    monkeypatch.setattr(linear, "_num_sms", lambda device: 3)
    x, weight = random(tokens, size), random(outputs, size, scale=size**-0.5)
    x64, weight64 = x.double(), weight.double()
    with interpreted(linear, late):
        for consumers in (2, 3):
            silu = linear.linear_silu_mul(x, weight, tile=LinearTile(pairs, consumers=consumers))
            close(silu, twin.linear_silu_mul(x64, weight64), twin.linear_silu_mul(x, weight))
        if tokens <= gluon.MAX_TOKENS:
            close(linear.linear_pieces(x, weight, tile=LinearTile(64, pieces)).sum(0), twin.linear(x64, weight64))


# -- anywhere ----------------------------------------------------------------------------------------------------------------
def test_tiles_fill_the_multiprocessors() -> None:
    assert choose_linear_tile(192, 14336, silu=True) == LinearTile(112, consumers=3)  # 128 programs
    assert choose_linear_tile(128, 3072, silu=True) == LinearTile(32, consumers=2)  # 96: 16 would be two rounds
    assert choose_linear_tile(70, 18944, silu=True) == LinearTile(48, consumers=2)  # three rounds of 132
    assert choose_linear_tile(256, 14336, silu=True) == LinearTile(112, consumers=2)  # 256 items; 128: as many rounds
    assert choose_linear_tile(1024, 14336, silu=True) == LinearTile(128, consumers=2)  # 7 rounds; 112: 8
    assert choose_linear_tile(1024, 3072, silu=True) == LinearTile(64, consumers=2)  # 3 full ones
    assert choose_linear_tile(8192, 14336, silu=True) == LinearTile(128, consumers=2)
    assert choose_linear_tile(200, 4096) == LinearTile(64, 2)
    assert choose_linear_tile(200, 1024) == LinearTile(64, 4)
    assert choose_linear_tile(200, 8192) == LinearTile(64, 1)
    assert choose_linear_tile(200, 5120) == LinearTile(64, 3)


def test_some_tokens_of_a_hopper_gpu_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, wide = random(1024, 512), random(28672, 64)
    assert gluon.takes_linear(random(96, 512), weight, None) == AVAILABLE
    monkeypatch.setattr(gluon, "available", lambda device: True)
    taken = [n for n in (32, 33, 64, 192, 256, 257) if gluon.takes_linear(random(n, 64), wide, None)]
    assert taken == [33, 64, 192, 256]
    silu = (64, 65, 192, 193, 208, 224, 256, 257, 320, 384, 1024, 1025, 8192)
    taken = [n for n in silu if gluon.takes_linear(random(n, 64), wide, None, silu=True)]
    assert taken == [65, 192, 224, 256, 384, 1024, 1025, 8192], "others leave much of the last round idle"
    assert not gluon.takes_linear(random(512, 512), weight, None, silu=True), "half of the multiprocessors idle"
    assert not gluon.takes_linear(random(96, 512), weight, random(1024))
    assert not gluon.takes_linear(random(96, 512, dtype=torch.float32), weight.float(), None)
    assert not gluon.takes_linear(random(96, 516)[:, 4:], weight, None), "not aligned as the copy engine wants it"
    assert not gluon.takes_linear(random(96, 512), random(1000, 512), None, silu=True)
    assert not gluon.takes_linear(random(96, 508), random(1024, 508), None)


def launch_everything() -> None:
    """Real shapes with the tiles that are chosen; `compile_for_sm90` compiles what this launches."""
    from quire.kernels.gluon import linear

    for tokens, dtype in ((64, torch.bfloat16), (144, torch.float16), (240, torch.bfloat16), (256, torch.bfloat16)):
        linear.linear_pieces(torch.empty(tokens, 4096, dtype=dtype), torch.empty(4096, 4096, dtype=dtype))
    for tokens, dtype in ((96, torch.bfloat16), (192, torch.bfloat16), (192, torch.float16), (1024, torch.bfloat16)):
        for size, outputs in ((1024, 3072), (4096, 14336)):
            linear.linear_silu_mul(
                torch.empty(tokens, size, dtype=dtype), torch.empty(2 * outputs, size, dtype=dtype)
            )  # fmt: skip
