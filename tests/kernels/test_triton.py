"""Each Triton kernel against its torch twin: in Triton's interpreter, or on the card where there is one (marker `gpu`).

`compile_for_sm90.py` beside this compiles every kernel for the card on machines that have none.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from triton_interpreter import HAS_CUDA  # isort: skip

from quire.kernels.torch_ops import TorchKernels
from quire.kernels.triton import blocks, sampling
from quire.kernels.triton.ops import TritonKernels
from quire.sampling import SamplingState
from quire.sampling.logprobs import gather_logprobs
from quire.sampling.random import uniform
from quire.sampling.sampler import Sampler, TorchChooser
from quire.sampling.triton import TritonChooser, entry_words
from quire.sampling_params import SamplingParams

DEVICE = "cuda" if HAS_CUDA else "cpu"
# Infinities are part of the work; the interpreter's NumPy would have warned of them.
pytestmark = [pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")]
if HAS_CUDA:
    pytestmark.append(pytest.mark.gpu)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# One unit in the last place of values around 4, for results that may round to either neighbour.
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 2**-5, torch.float16: 2**-8}
if not HAS_CUDA:
    TOLERANCE[torch.bfloat16] *= (
        4  # the interpreter cuts bf16 off instead of rounding it, at up to three places in a row
    )


@pytest.fixture
def kernels() -> TritonKernels:
    return TritonKernels()


@pytest.fixture
def twin() -> TorchKernels:
    return TorchKernels()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape).to(DEVICE, dtype)


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.dtype is expected.dtype
    torch.testing.assert_close(actual, expected, atol=TOLERANCE[expected.dtype], rtol=TOLERANCE[expected.dtype] / 4)


# ---- layers ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 8), (3, 576), (5, 1030)])
def test_rms_norm(kernels, twin, dtype, shape):
    x, weight = random(*shape, dtype=dtype), random(shape[-1], dtype=dtype)
    close(kernels.rms_norm(x, weight, 1e-5), twin.rms_norm(x, weight, 1e-5))
    residual = random(*shape, dtype=dtype)
    expected_residual = residual.clone()
    expected = twin.add_rms_norm(x, expected_residual, weight, 1e-5)
    close(kernels.add_rms_norm(x, residual, weight, 1e-5), expected)
    close(residual, expected_residual)


def test_rms_norm_of_heads_of_a_strided_view(kernels, twin):
    qkv, weight = random(9, 5 * 16), random(16)
    q = qkv[:, 16:64].view(9, 3, 16)
    close(kernels.rms_norm(q, weight, 1e-6), twin.rms_norm(q, weight, 1e-6))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("size", "rotary_size"), [(64, 64), (80, 80), (32, 8)])
def test_rotary(kernels, twin, dtype, size, rotary_size):
    qkv = random(6, 9 * size, dtype=dtype)
    cos_sin = random(50, rotary_size)
    positions = torch.randint(0, 50, (6,), device=DEVICE, dtype=torch.int32)
    actual, expected = qkv.clone(), qkv.clone()
    for kind, x in ((kernels, actual), (twin, expected)):
        q, k = x[:, : 5 * size].view(6, 5, size), x[:, 5 * size : 7 * size].view(6, 2, size)
        kind.rotary_(q, k, cos_sin, positions)
    close(actual, expected)
    assert torch.equal(actual[:, 7 * size :], qkv[:, 7 * size :])


@pytest.mark.parametrize(
    ("dtype", "kv_dtype"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float32, torch.float16)],
)
def test_write_kv(kernels, twin, dtype, kv_dtype):
    pool = random(7, 3, 2, 2, 4, 16, dtype=kv_dtype)
    expected = pool.clone()
    k, v = random(5, 2, 16, dtype=dtype), random(5, 4, 16, dtype=dtype)[:, 1:3]
    slots = torch.tensor([9, -1, 27, 3, 16], device=DEVICE, dtype=torch.int32)
    kernels.write_kv(k, v, pool[:, 1], slots)
    twin.write_kv(k, v, expected[:, 1], slots)
    assert torch.equal(pool, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(("size", "rotary_size"), [(64, 64), (48, 16), (16, None)])
def test_norm_rotary_write(kernels, twin, dtype, normed, size, rotary_size):
    num_tokens, q_heads, kv_heads = 5, 6, 3
    qkv = random(num_tokens, (q_heads + 2 * kv_heads) * size, dtype=dtype)
    pool = random(6, 2, 2, kv_heads, 4, size, dtype=dtype)
    slots = torch.tensor([5, 6, -1, 21, 12], device=DEVICE, dtype=torch.int32)
    norm = (random(size, dtype=dtype), random(size, dtype=dtype), 1e-6) if normed else None
    rotary = None
    if rotary_size is not None:
        rotary = (random(30, rotary_size), torch.tensor([3, 29, 0, 7, 8], device=DEVICE, dtype=torch.int32))
    results = []
    for kind in (kernels, twin):
        x, kv = qkv.clone(), pool.clone()
        q, k, v = (
            part.view(num_tokens, -1, size)
            for part in x.split([q_heads * size, kv_heads * size, kv_heads * size], dim=-1)
        )
        kind.norm_rotary_write(q, k, v, kv[:, 1], slots, norm=norm, rotary=rotary)
        results.append((q.clone(), kv))
    for actual, expected in zip(*results):
        close(actual, expected)
    assert torch.equal(results[0][1][:, 0], pool[:, 0])


@pytest.mark.parametrize(
    ("dtype", "kv_dtype"),
    [(torch.float32, torch.float16), (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)],
)
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(
    ("num_tokens", "q_heads", "kv_heads", "size", "rotary_size"),
    [(11, 6, 3, 80, 80), (37, 2, 1, 96, 32), (5, 12, 9, 128, 128), (9, 4, 4, 96, None), (37, 1, 1, 16, 16)],
)
def test_programs_of_several_tokens_end_with_the_last_one(
    kernels, twin, dtype, kv_dtype, normed, num_tokens, q_heads, kv_heads, size, rotary_size
):
    """Buffers go on beyond the tokens with positions and slots that nobody may look at, and rows that nobody may change."""
    qkv = random(num_tokens + 40, (q_heads + 2 * kv_heads) * size + 16, dtype=dtype)
    pool = random(12, 2, 2, kv_heads, 4, size, dtype=kv_dtype)
    slots = torch.full((num_tokens + 40,), 10**6, device=DEVICE, dtype=torch.int32)
    slots[:num_tokens] = torch.randperm(48, device=DEVICE)[:num_tokens]
    slots[[2, num_tokens - 1]] = -1
    positions = torch.full((num_tokens + 40,), 10**8, device=DEVICE, dtype=torch.int32)
    positions[:num_tokens] = torch.randint(0, 30, (num_tokens,), device=DEVICE)
    norm = (random(size, dtype=dtype), random(size, dtype=dtype), 1e-6) if normed else None
    rotary = None if rotary_size is None else (random(30, rotary_size), positions[:num_tokens])
    results = []
    for kind in (kernels, twin):
        x, kv = qkv.clone(), pool.clone()
        q, k, v = (
            part.view(num_tokens, -1, size)
            for part in x[:num_tokens, : (q_heads + 2 * kv_heads) * size].split(
                [q_heads * size, kv_heads * size, kv_heads * size], dim=-1
            )
        )
        kind.norm_rotary_write(q, k, v, kv[:, 1], slots[:num_tokens], norm=norm, rotary=rotary)
        results.append((x[:num_tokens, : q_heads * size].clone(), kv))
        assert torch.equal(x[:num_tokens, q_heads * size :], qkv[:num_tokens, q_heads * size :])
        assert torch.equal(x[num_tokens:], qkv[num_tokens:])
    close(results[0][0], results[1][0])
    tolerance = max(TOLERANCE[dtype], TOLERANCE[kv_dtype])
    torch.testing.assert_close(results[0][1], results[1][1], atol=tolerance, rtol=tolerance / 4)
    assert torch.equal(results[0][1][:, 0], pool[:, 0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [24, 1100])
def test_silu_and_mul(kernels, twin, dtype, size):
    gate_up = random(3, 2 * size + 5, dtype=dtype)[:, : 2 * size]
    close(kernels.silu_and_mul(gate_up), twin.silu_and_mul(gate_up))


def test_embed(kernels, twin):
    table = random(50, 1100, dtype=torch.bfloat16)
    ids = torch.tensor([3, 49, 3, 0], device=DEVICE, dtype=torch.int32)
    assert torch.equal(kernels.embed(ids, table), twin.embed(ids, table))


def test_no_tokens(kernels):
    assert kernels.rms_norm(random(0, 8), random(8), 1e-5).shape == (0, 8)
    assert kernels.silu_and_mul(random(0, 8)).shape == (0, 4)
    assert kernels.embed(torch.zeros(0, dtype=torch.int32, device=DEVICE), random(5, 8)).shape == (0, 8)


@pytest.mark.parametrize("wrong", ["dtype", "weight", "stride", "halves"])
def test_wrong_arguments_raise(kernels, wrong):
    calls = {
        "dtype": lambda: kernels.rms_norm(random(3, 8).double(), random(8).double(), 1e-5),
        "weight": lambda: kernels.rms_norm(random(3, 8), random(9), 1e-5),
        "stride": lambda: kernels.rms_norm(random(8, 3).T, random(8), 1e-5),
        "halves": lambda: kernels.silu_and_mul(random(3, 9)),
    }
    with pytest.raises((TypeError, ValueError)):
        calls[wrong]()


# ---- blocks ----


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((2, 2, 1, 4, 8), torch.float32), ((1, 2, 1, 1, 1), torch.bfloat16), ((3, 2, 2, 16, 64), torch.bfloat16)],
)
def test_copy_and_swap_blocks(kernels, twin, shape, dtype):
    pool, other = random(9, *shape, dtype=dtype), random(6, *shape, dtype=dtype)
    src, dst = torch.tensor([3, 8, 1]), torch.tensor([0, 2, 7])
    expected = pool.clone()
    twin.copy_blocks(expected, src, dst)
    kernels.copy_blocks(pool, src, dst)
    assert torch.equal(pool, expected)
    src, dst = torch.tensor([3, 4, 8]), torch.tensor([1, 2, 5])
    expected = other.clone()
    twin.swap_blocks(pool, expected, src, dst)
    kernels.swap_blocks(pool, other, src, dst)
    assert torch.equal(other, expected)
    kernels.copy_blocks(pool, src[:0], dst[:0])


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_CUDA, reason="no CUDA device on this machine")
def test_swap_between_device_and_pinned_memory(kernels):
    pool = random(9, 3, 2, 2, 16, 64, dtype=torch.bfloat16)
    host = torch.randn(9, 3, 2, 2, 16, 64).to(torch.bfloat16).pin_memory()
    expected = pool[torch.tensor([3, 4, 8], device=DEVICE)].cpu()
    kernels.swap_blocks(pool, host, torch.tensor([3, 4, 8]), torch.tensor([1, 2, 0]))
    torch.cuda.synchronize()
    assert torch.equal(host[torch.tensor([1, 2, 0])], expected)
    kernels.swap_blocks(host, pool, torch.tensor([1, 2, 0]), torch.tensor([7, 6, 5]))
    torch.cuda.synchronize()
    assert torch.equal(pool[torch.tensor([7, 6, 5], device=DEVICE)].cpu(), expected)


def test_runs_of_neighbours():
    assert blocks._runs(np.array([5, 6, 9]), np.array([2, 3, 4])) == [(5, 2, 2), (9, 4, 1)]
    assert blocks._runs(np.array([5]), np.array([2])) == [(5, 2, 1)]
    assert blocks._runs(np.array([5, 6, 7]), np.array([2, 3, 5])) == [(5, 2, 2), (7, 5, 1)]


def test_update_table():
    table = torch.zeros(5, 300, dtype=torch.int32, device=DEVICE)
    updates = torch.randint(0, 5, (3, 300), dtype=torch.int32)
    updates[1] = torch.randperm(300)
    updates[:, 290:] = 10**6  # not looked at
    expected = table.cpu()
    expected[updates[0, :290].long(), updates[1, :290].long()] = updates[2, :290]
    blocks.update_table(table, updates.to(DEVICE), torch.tensor([290], dtype=torch.int32, device=DEVICE))
    assert torch.equal(table.cpu(), expected)


# ---- sampling ----

NUM_ROWS = 40


def state_of(params_list: list[SamplingParams], vocab_size: int, seed: int = 0) -> tuple[SamplingState, np.ndarray]:
    state = SamplingState(NUM_ROWS, vocab_size, DEVICE)
    rows = np.arange(len(params_list)) + 2
    for i, params in enumerate(params_list):
        state.set_row(int(rows[i]), params, seed=(seed + i) * 0x9E3779B97F4A7C15, branch=i % 3, prompt_len=4)
    return state, rows


def choose(chooser, logits, state, rows, positions):
    tokens, codes = chooser.choose(logits, state, rows, positions, state.uses_R[rows])
    return tokens.cpu().tolist(), codes.cpu().tolist()


def test_greedy_takes_the_lowest_id_among_equals():
    logits = random(4, 5000)
    logits[0, [70, 4500]] = 9.0
    logits[1, 4999] = 9.0
    logits[2] = 0.0
    logits[3, :] = -torch.inf
    logits[3, 3000] = -5.0
    state, rows = state_of([SamplingParams(temperature=0)] * 4, 5000)
    tokens, codes = choose(TritonChooser(), logits, state, rows, np.full(4, 9))
    assert tokens == [70, 4999, 0, 3000]
    assert codes == [0, 0, 0, 0]


@pytest.mark.parametrize("kwargs", [{"temperature": 0}, {}, {"top_k": 5, "top_p": 0.5}], ids=str)
def test_rows_that_are_not_finite_are_told(kwargs):
    logits = random(5, 3000)
    logits[1, 2999] = torch.nan
    logits[2, 10] = torch.inf
    logits[3] = -torch.inf
    state, rows = state_of([SamplingParams(**kwargs)] * 5, 3000)
    tokens, codes = choose(TritonChooser(), logits, state, rows, np.full(5, 9))
    assert codes == [0, 1, 1, 1, 0]
    assert tokens[1:4] == [0, 0, 0]


CASES = [
    {}, {"temperature": 0.5}, {"temperature": 3.0}, {"top_k": 1}, {"top_k": 7}, {"top_p": 0.8}, {"top_p": 0.0001},
    {"min_p": 0.1}, {"min_p": 0.05, "top_p": 0.7}, {"top_k": 20, "top_p": 0.7, "temperature": 1.5},
    {"min_p": 0.02, "top_k": 30, "top_p": 0.9}, {"top_k": 60, "temperature": 5.0}, {"top_p": 0.999, "temperature": 8.0},
]  # fmt: skip


@pytest.mark.parametrize("kwargs", CASES, ids=str)
@pytest.mark.parametrize("vocab_size", [300, 4500, 40_000] if HAS_CUDA else [300, 4500])
def test_draws_are_those_of_the_cpu(kwargs, vocab_size):
    num = 24 if HAS_CUDA else 6  # the interpreter takes a second for eight
    logits = random(num, vocab_size) * 2
    state, rows = state_of([SamplingParams(**kwargs)] * num, vocab_size)
    positions = np.arange(num) + 4
    actual, codes = choose(TritonChooser(), logits, state, rows, positions)
    cpu_state, _ = state_of([SamplingParams(**kwargs)] * num, vocab_size)
    cpu_state.device, cpu_state.params_RC = torch.device("cpu"), cpu_state.params_RC.cpu()
    expected, _ = choose(TorchChooser(), logits.cpu(), cpu_state, rows, positions)
    assert codes == [0] * num
    # rounding may decide a draw that falls on a border between two tokens
    assert sum(a != b for a, b in zip(actual, expected)) <= (0 if vocab_size == 300 else 1)


@pytest.mark.parametrize("kwargs", [{"top_k": 3}, {"top_p": 0.55}, {"top_k": 5, "top_p": 0.7}, {"min_p": 0.5}], ids=str)
def test_among_equals_the_lower_ids_stay(kwargs):
    num, vocab_size = 12, 3000
    logits = torch.full((num, vocab_size), -torch.inf, device=DEVICE)
    # weights 1/8 of eight equals, far apart
    logits[:, torch.arange(8, device=DEVICE) * 370 + 11] = 0.0
    state, rows = state_of([SamplingParams(**kwargs)] * num, vocab_size)
    positions = np.arange(num)
    actual, _ = choose(TritonChooser(), logits, state, rows, positions)
    cpu_state, _ = state_of([SamplingParams(**kwargs)] * num, vocab_size)
    cpu_state.device, cpu_state.params_RC = torch.device("cpu"), cpu_state.params_RC.cpu()
    expected, _ = choose(TorchChooser(), logits.cpu(), cpu_state, rows, positions)
    assert actual == expected
    assert len(set(actual)) > 1


def test_a_row_does_not_depend_on_its_batch():
    kinds = [{"temperature": 0}, {}, {"top_k": 9}, {"top_p": 0.6}, {"temperature": 0.3, "min_p": 0.2}]
    params = [SamplingParams(**kind) for kind in kinds]
    logits = random(5, 2500) * 2
    state, rows = state_of(params, 2500)
    positions = np.arange(5) + 4
    together, _ = choose(TritonChooser(), logits, state, rows, positions)
    alone = [
        choose(TritonChooser(), logits[i : i + 1], state, rows[i : i + 1], positions[i : i + 1])[0][0] for i in range(5)
    ]
    assert together == alone


def test_tokens_are_written_into_their_rows():
    logits = random(3, 300)
    state, rows = state_of([SamplingParams(temperature=0)] * 3, 300)
    token_ids = torch.zeros(NUM_ROWS, 20, dtype=torch.int32, device=DEVICE)
    positions = np.array([4, 9, 19])
    words = entry_words(state, rows, positions, state.uses_R[rows])
    result = torch.empty(2, 3, dtype=torch.int32, device=DEVICE)
    sampling.choose_tokens(
        logits.to(torch.bfloat16), torch.from_numpy(words).to(DEVICE), state.params_RC, result, truncated=False,
        token_ids_RL=token_ids,
    )  # fmt: skip
    assert result[0].tolist() == logits.to(torch.bfloat16).float().argmax(-1).tolist()
    assert token_ids[rows, positions].tolist() == result[0].tolist()
    assert (token_ids != 0).sum() <= 3


def test_uniform_numbers_are_those_of_the_cpu():
    """One token in 2**k of equal weight is k bits of the number; two draws with a scaled rest would tell more than enough."""
    num, vocab_size = 36, 1 << 12
    state, rows = state_of([SamplingParams()] * num, vocab_size, seed=5)
    positions = np.arange(num) * 977
    actual, _ = choose(TritonChooser(), torch.zeros(num, vocab_size, device=DEVICE), state, rows, positions)
    u = uniform(state.seed_R[rows], state.branch_R[rows], positions)
    assert actual == np.floor(u * vocab_size).astype(int).tolist()


@pytest.mark.parametrize("k", [0, 4])
def test_logprobs(k):
    logits = random(3, 4500) * 3
    chosen = torch.tensor([5, 4499, int(logits[2].argmax())], device=DEVICE)
    ids, values, rank = sampling.logprobs(logits, chosen, k)
    expected = gather_logprobs(logits, chosen, k)
    assert torch.equal(ids, expected.token_ids_NK1)
    torch.testing.assert_close(values, expected.logprobs_NK1, atol=1e-5, rtol=1e-5)
    assert torch.equal(rank, expected.rank_N)


def test_the_sampler_edits_then_chooses():
    """Masks, bias and penalties come before the choice, log probabilities from the raw logits, with either chooser."""
    params = [
        SamplingParams(temperature=0, logit_bias={7: 100.0}, logprobs=2),
        SamplingParams(repetition_penalty=1.7, presence_penalty=0.5, top_k=4),
        SamplingParams(allowed_token_ids=[3, 5], seed=1),
        SamplingParams(temperature=0.7),
    ]
    logits = random(4, 400)
    token_ids = torch.randint(0, 400, (NUM_ROWS, 20), dtype=torch.int32, device=DEVICE)
    outputs = []
    for chooser in (TritonChooser(), TorchChooser()):
        state, rows = state_of(params, 400)
        outputs.append(Sampler(chooser).sample(logits, state, rows, np.full(4, 9), token_ids))
    first, second = outputs
    assert first.token_ids_M.tolist() == second.token_ids_M.tolist()
    assert first.errors == second.errors == []
    for a, b in zip(first.logprobs, second.logprobs):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.token_ids.tolist() == b.token_ids.tolist()
            np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)


def test_nothing_allowed_is_told_from_not_finite():
    params = [SamplingParams(allowed_token_ids=[3], logit_bias={5: 1.0}), SamplingParams()]
    logits = random(2, 400)
    logits[0, 3] = -torch.inf
    state, rows = state_of(params, 400)
    token_ids = torch.zeros(NUM_ROWS, 20, dtype=torch.int32, device=DEVICE)
    output = Sampler(TritonChooser()).sample(logits, state, rows, np.full(2, 9), token_ids)
    assert [entry for entry, _ in output.errors] == [0]
    assert "no token is allowed" in output.errors[0][1]


# ---- compiling ----


def launch_everything() -> None:
    """Every kernel once in each dtype and kind; `compile_for_sm90` compiles what this launches."""
    kernels = TritonKernels()
    for dtype in (torch.float32, torch.bfloat16):
        x, weight, heads = random(4, 4096, dtype=dtype), random(4096, dtype=dtype), random(4, 3, 128, dtype=dtype)
        kernels.rms_norm(x, weight, 1e-5)
        kernels.add_rms_norm(x, x.clone(), weight, 1e-5)
        kernels.rms_norm(heads, random(128, dtype=dtype), 1e-5)
        kernels.silu_and_mul(x)
        kernels.embed(torch.zeros(4, dtype=torch.int32), x)
        positions, slots = torch.zeros(4, dtype=torch.int32), torch.zeros(4, dtype=torch.int32)
        pool = random(3, 2, 2, 3, 16, 128, dtype=dtype)
        kernels.rotary_(heads, heads, random(9, 128), positions)
        kernels.write_kv(heads, heads, pool[:, 1], slots)
        norm = (random(128, dtype=dtype), random(128, dtype=dtype), 1e-6)
        for rotary_size in (128, 32):
            kernels.norm_rotary_write(
                heads, heads, heads, pool[:, 1], slots, norm=norm, rotary=(random(9, rotary_size), positions)
            )
        kernels.norm_rotary_write(heads, heads, heads, pool[:, 1], slots, rotary=(random(9, 128), positions))
        result, words = torch.zeros(2, 4, dtype=torch.int32), torch.zeros(4, 8, dtype=torch.int32)
        token_ids = torch.zeros(5, 9, dtype=torch.int32)
        for truncated in (False, True):
            sampling.choose_tokens(x, words, random(5, 8), result, truncated=truncated, token_ids_RL=token_ids)
        sampling.choose_tokens(random(4, 151936, dtype=dtype), words, random(5, 8), result, truncated=True)
        sampling.logprobs(x, torch.zeros(4, dtype=torch.int64), 3)
    kernels.copy_blocks(pool, torch.tensor([0]), torch.tensor([1]))
    ints = torch.zeros(9, dtype=torch.int32)
    table = torch.zeros(5, 9, dtype=torch.int32)
    for tokens in (False, True):
        blocks.lay_out(token_ids, table, ints, ints, ints, ints, ints, ints, table, 16, 1, tokens=tokens)
    blocks.update_table(table, torch.zeros(3, 7, dtype=torch.int32), ints)


@pytest.mark.skipif(HAS_CUDA, reason="the tests above have compiled them")
def test_everything_compiles_for_sm90():
    """In a process of its own: this one's kernels are interpreted."""
    script = Path(__file__).with_name("compile_for_sm90.py")
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    result = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "kernels compiled" in result.stdout
