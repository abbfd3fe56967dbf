"""Each C kernel, in its fast and its portable build, against its torch twin."""

import pytest
import torch

from quire.kernels.cpu import CpuKernels
from quire.kernels.torch_ops import TorchKernels

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# One unit in the last place of values around 4, for results that may round to either neighbour.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-5, torch.float16: 2**-8}


@pytest.fixture(scope="module", params=["native", "generic"])
def kernels(request: pytest.FixtureRequest) -> CpuKernels:
    return CpuKernels.build(("-DQUIRE_GENERIC",) if request.param == "generic" else ())


@pytest.fixture
def twin() -> TorchKernels:
    return TorchKernels()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.dtype is expected.dtype
    torch.testing.assert_close(actual, expected, atol=TOLERANCE[expected.dtype], rtol=TOLERANCE[expected.dtype] / 4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 8), (7, 100), (130, 576)])
def test_rms_norm(kernels, twin, dtype, shape):
    x, weight = torch.randn(shape).to(dtype), torch.randn(shape[-1]).to(dtype)
    close(kernels.rms_norm(x, weight, 1e-5), twin.rms_norm(x, weight, 1e-5))
    residual = torch.randn(shape).to(dtype)
    expected_residual = residual.clone()
    expected = twin.add_rms_norm(x, expected_residual, weight, 1e-5)
    close(kernels.add_rms_norm(x, residual, weight, 1e-5), expected)
    assert torch.equal(residual, expected_residual)


def test_rms_norm_equals_transformers(kernels):
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    for dtype in DTYPES:
        norm = LlamaRMSNorm(96, eps=1e-5).to(dtype)
        norm.weight.data.normal_()
        x = torch.randn(40, 96).to(dtype)
        close(kernels.rms_norm(x, norm.weight.data, 1e-5), norm(x).detach())


def test_rms_norm_of_heads_of_a_strided_view(kernels, twin):
    qkv, weight = torch.randn(9, 5 * 16), torch.randn(16)
    q = qkv[:, 16:64].view(9, 3, 16)
    close(kernels.rms_norm(q, weight, 1e-6), twin.rms_norm(q, weight, 1e-6))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "size", "rotary"), [(1, 8, 8), (5, 64, 64), (200, 64, 32), (6, 80, 20)])
def test_rotary_on_slices_of_a_fused_projection(kernels, twin, dtype, tokens, size, rotary):
    qkv = torch.randn(tokens, (6 + 2 + 2) * size).to(dtype)
    expected = qkv.clone()
    angles = torch.rand(50, rotary // 2) * 6
    cos_sin = torch.cat([angles.cos(), angles.sin()], -1)
    positions = torch.randint(0, 50, (tokens,), dtype=torch.int32 if tokens == 5 else torch.int64)
    for implementation, x in ((kernels, qkv), (twin, expected)):
        q, k, _ = x.split([6 * size, 2 * size, 2 * size], -1)
        implementation.rotary_(q.view(tokens, 6, size), k.view(tokens, 2, size), cos_sin, positions)
    close(qkv, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 8), (7, 100), (65, 2 * 1536)])
def test_silu_and_mul(kernels, twin, dtype, shape):
    x = torch.randn(shape) * 20
    x[0, :4] = torch.tensor([-1e4, 1e4, 0.0, -100.0])
    x[0, shape[1] // 2 : shape[1] // 2 + 4] = 1.0
    x = x.to(dtype)
    actual, expected = kernels.silu_and_mul(x), twin.silu_and_mul(x)
    torch.testing.assert_close(actual, expected, atol=TOLERANCE[dtype], rtol=max(2e-6, 2.5 * torch.finfo(dtype).eps))


@pytest.mark.parametrize("kv_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_write_kv_writes_those_slots_and_no_others(kernels, twin, dtype, kv_dtype):
    qkv = torch.randn(11, 4 * 24).to(dtype)
    k, v = qkv[:, 24:48].view(11, 3, 8), qkv[:, 72:].view(11, 3, 8)
    pool = torch.randn(6, 2, 2, 3, 4, 8).to(kv_dtype)
    expected = pool.clone()
    slots = torch.randperm(24)[:11].to(torch.int32)
    slots[3] = -1
    kernels.write_kv(k, v, pool[:, 1], slots)
    twin.write_kv(k, v, expected[:, 1], slots)
    assert torch.equal(pool, expected)
    kernels.write_kv(v, k, pool[:, 0], slots.long())
    twin.write_kv(v, k, expected[:, 0], slots.long())
    assert torch.equal(pool, expected)


def test_every_half_and_rounding_to_halves(kernels, twin):
    """Conversions by integer arithmetic equal torch's, through write_kv: subnormals, infinities, NaN and ties included."""
    halves = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(1024, 1, 64)
    for narrow in (torch.float16, torch.bfloat16):
        x = halves.view(narrow)
        wide = x.float()
        between = torch.cat(
            [wide * (1 + 2**-11), wide * (1 + 2**-9), torch.nextafter(wide * (1 + 2**-11), torch.ones(()))]
        )
        for source, kv_dtype in ((x, torch.float32), (wide, narrow), (between, narrow)):
            results = []
            for implementation in (kernels, twin):
                pool = torch.zeros(len(source), 1, 2, 1, 1, 64, dtype=kv_dtype)
                implementation.write_kv(source, source, pool[:, 0], torch.arange(len(source)))
                results.append(pool[:, 0])
            torch.testing.assert_close(results[0], results[1], rtol=0, atol=0, equal_nan=True)


def test_copy_and_swap_blocks(kernels, twin):
    ids = torch.tensor([3, 1, 3]), torch.tensor([0, 5, 2])
    for implementation in (kernels, twin):
        pool = torch.arange(6.0).view(6, 1, 1, 1, 1, 1).expand(6, 3, 2, 2, 4, 8).contiguous()
        other = torch.full((7, 3, 2, 2, 4, 8), -1.0)
        implementation.copy_blocks(pool, *ids)
        assert pool[:, 2, 1, 1, 3, 7].tolist() == [3, 1, 3, 3, 4, 1]
        assert pool.unique(dim=1).shape[1] == 1
        implementation.swap_blocks(pool, other, torch.tensor([4]), torch.tensor([6]))
        assert other[:, 0, 0, 0, 0, 0].tolist() == [-1.0] * 6 + [4.0]
        implementation.copy_blocks(pool, torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64))


def test_indices_out_of_range_raise_and_touch_nothing(kernels):
    k, pool = torch.randn(2, 1, 8), torch.zeros(4, 1, 2, 1, 4, 8)
    with pytest.raises(IndexError):
        kernels.write_kv(k, k, pool[:, 0], torch.tensor([16, -1]))
    assert not pool.any()
    with pytest.raises(IndexError):
        kernels.copy_blocks(pool, torch.tensor([4]), torch.tensor([0]))
    with pytest.raises(IndexError):
        kernels.rotary_(k, k.clone(), torch.randn(5, 8), torch.tensor([0, 5]))


def test_wrong_arguments_raise(kernels):
    x = torch.randn(4, 16)
    with pytest.raises(TypeError):
        kernels.silu_and_mul(x.double())
    with pytest.raises(ValueError):
        kernels.silu_and_mul(x.t())
    with pytest.raises(ValueError):
        kernels.rms_norm(x, torch.randn(8), 1e-5)
    with pytest.raises(ValueError):
        kernels.add_rms_norm(x, x.bfloat16(), torch.randn(16), 1e-5)
    with pytest.raises(ValueError):
        kernels.write_kv(
            x.view(4, 2, 8), x.view(4, 2, 8), torch.zeros(3, 2, 2, 4, 8), torch.zeros(3, dtype=torch.int64)
        )
    with pytest.raises(ValueError):
        kernels.write_kv(x.view(4, 2, 8), x.view(4, 2, 8), torch.zeros(3, 2, 3, 4, 8), torch.arange(4))


def test_no_tokens(kernels):
    assert kernels.rms_norm(torch.empty(0, 8), torch.ones(8), 1e-5).shape == (0, 8)
    assert kernels.silu_and_mul(torch.empty(0, 8)).shape == (0, 4)
    empty = torch.empty(0, 1, 8)
    kernels.rotary_(empty, empty, torch.randn(5, 8), torch.empty(0, dtype=torch.int64))
    kernels.write_kv(empty, empty, torch.zeros(4, 2, 1, 4, 8), torch.empty(0, dtype=torch.int64))
