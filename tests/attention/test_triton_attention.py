"""The Triton backend against attention in float64: in Triton's interpreter where there is no GPU, and on the card with more.

Run as a program, this file compiles the kernels for sm_90 (no GPU needed) and prints registers and spills as JSON.
"""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.dirname(__file__)))
    os.environ["TRITON_INTERPRET"] = "0"
from triton_interpreter import HAS_CUDA  # isort: skip
import triton
from test_attention_backends import Case, make_case, make_spec

from quire.attention import AttentionBatch, AttentionSpec, select_backend
from quire.attention.triton import TritonBackend
from quire.attention.work_list import LayerKind, choose_costs, choose_tile, layer_kind, list_work
from quire.errors import ConfigError
from quire.kernels import gluon
from quire.kernels.torch_ops import TorchKernels
from quire.kernels.triton import attention as kernels

gpu = [pytest.mark.gpu, pytest.mark.skipif(not HAS_CUDA, reason="no CUDA device on this machine")]
DEVICE = "cuda" if HAS_CUDA else "cpu"
pytestmark = [pytest.mark.gpu] if HAS_CUDA else []
# Relative, of norms. bf16 operands are rounded to 8 bits, probabilities too.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-3}


@pytest.fixture(autouse=True)
def triton_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gluon's kernels, which Hopper GPUs have in their place, have tests of their own."""
    monkeypatch.setattr(gluon, "available", lambda device: False)


@pytest.fixture(autouse=True)
def products_of_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter multiplies bf16 by their bits, as integers; and it cuts off where the card rounds to bf16."""
    if HAS_CUDA:
        return
    assert triton.knobs.runtime.interpret
    from triton.runtime import interpreter

    create_dot = interpreter.InterpreterBuilder.create_dot

    def widened(x):
        if x.dtype.scalar != triton.language.bfloat16:
            return x
        data = (x.data.astype(np.uint32) << 16).view(np.float32)
        return interpreter.TensorHandle(data, triton.language.float32)

    def create_dot_(self, a, b, *args):
        return create_dot(self, widened(a), widened(b), *args)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot_)


def make_backend(num_sms: int = 4, **options) -> TritonBackend:
    return TritonBackend(TorchKernels(), DEVICE, num_sms=None if HAS_CUDA else num_sms, **options)


def on_device(batch: AttentionBatch, device: str = DEVICE) -> AttentionBatch:
    return replace(
        batch,
        query_start_loc_S1=batch.query_start_loc_S1.to(device),
        seq_lens_S=batch.seq_lens_S.to(device),
        block_tables_SB=batch.block_tables_SB.to(device),
        slots_T=batch.slots_T.to(device),
        query_start_loc_host_S1=batch.query_start_loc_S1.numpy(),
        seq_lens_host_S=batch.seq_lens_S.numpy(),
    )


def run(case: Case, backend: TritonBackend) -> torch.Tensor:
    backend.check(case.spec)
    q, k, v, pool = (x.to(DEVICE, copy=True) for x in (case.q, case.k, case.v, case.pool))
    del_me = torch.full_like(q, torch.nan, memory_format=torch.contiguous_format)  # what the output will likely lie in
    del del_me
    return backend.run(backend.plan(on_device(case.batch)), q, k, v, pool[:, 1], case.spec).cpu()


def exact(case: Case) -> torch.Tensor:
    """Dense attention in float64, from the keys that each sequence has."""
    spec, found = case.spec, []
    device = DEVICE
    for s, (keys, values) in enumerate(zip(case.keys, case.values)):
        begin, end = case.batch.query_start_loc_S1[s : s + 2].tolist()
        q, k, v = (x.to(device).double() for x in (case.q[begin:end], keys, values))
        k, v = (x.repeat_interleave(spec.num_heads // spec.num_kv_heads, 1) for x in (k, v))
        scores = torch.einsum("tnd,snd->nts", q, k) * spec.scale
        if spec.softcap:
            scores = spec.softcap * torch.tanh(scores / spec.softcap)
        key = torch.arange(len(keys), device=device)
        position = key[len(keys) - (end - begin) :, None]
        if spec.causal:
            scores.masked_fill_(key > position, -torch.inf)
        if spec.window:
            scores.masked_fill_(key <= position - spec.window, -torch.inf)
        found.append(torch.einsum("nts,snd->tnd", scores.softmax(-1), v).cpu())
    return torch.cat(found)


def check(case: Case, backend: TritonBackend, tolerance: float | None = None) -> None:
    actual, expected = run(case, backend), exact(case)
    assert actual.dtype is case.q.dtype
    assert actual.is_contiguous()
    assert actual.isfinite().all()
    error = ((actual.double() - expected).norm() / expected.norm().clamp_min(1e-9)).item()
    worst = (actual.double() - expected).abs().max().item()
    tolerance = tolerance or TOLERANCE[case.q.dtype]
    assert error < tolerance
    assert worst < 10 * tolerance


bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
MIXED = ((1, 17, 90, 40, 131, 5), (1, 1, 1, 40, 70, 3))  # contexts, queries: decoding, prompts, chunks of some
CASES = {
    "fp32": (make_spec((4, 2), 64), 16, *MIXED),
    "bf16": (make_spec((4, 1), 64, bf16), 16, *MIXED),
    "fp16": (make_spec((3, 1), 64, fp16), 32, *MIXED),
    "tiny-8": (make_spec((4, 2), 8), 8, *MIXED),
    "tiny-16-bf16": (make_spec((2, 2), 16, bf16), 16, *MIXED),
    "tiny-32": (make_spec((2, 1), 32), 128, *MIXED),
    "tiny-48-bf16": (make_spec((2, 1), 48, bf16), 16, *MIXED),
    "80-one-slot-blocks": (make_spec((2, 2), 80), 1, *MIXED),
    "80-bf16": (make_spec((2, 1), 80, bf16), 16, *MIXED),
    "96": (make_spec((2, 1), 96), 32, *MIXED),
    "72-odd-blocks": (make_spec((2, 1), 72, bf16), 5, *MIXED),
    "128-bf16": (make_spec((4, 1), 128, bf16), 64, *MIXED),
    "128-window": (make_spec((4, 1), 128, window=37), 16, *MIXED),
    "128-bf16-window": (make_spec((4, 1), 128, bf16, window=20), 16, *MIXED),
    "256-softcap": (make_spec((2, 1), 256, softcap=3.0), 16, *MIXED),
    "256-bf16-softcap-window": (make_spec((2, 1), 256, bf16, softcap=3.0, window=64), 16, *MIXED),
    "window-of-one": (make_spec((2, 1), 64, window=1), 8, *MIXED),
    "group-of-7": (make_spec((7, 1), 64, bf16), 16, *MIXED),
    "mqa-40": (make_spec((40, 1), 32), 16, (70, 9), (1, 4)),
    "not-causal": (make_spec((2, 1), 64, causal=False), 16, *MIXED),
    "some-without-queries": (make_spec((2, 1), 64), 16, (20, 30, 5, 7), (0, 1, 0, 7)),
    "decode-split": (make_spec((4, 2), 64, bf16), 16, (700, 33), (1, 1)),
    "few-tokens-split": (make_spec((4, 1), 64, bf16), 16, (600,), (9,)),
    "chunk-split": (make_spec((4, 1), 64), 16, (700,), (40,)),
    "decode-split-window": (make_spec((4, 2), 64, window=500), 16, (700, 40), (1, 1)),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_is_attention_in_float64(name):
    spec, block_size, contexts, queries = CASES[name]
    check(make_case(spec, block_size, contexts, queries), make_backend())


@pytest.mark.parametrize("options", [{"softcap": 30.0}, {"scale": 1.7}], ids=str)
def test_a_piece_that_a_query_sees_nothing_of_has_no_weight(options):
    """However high scores are scaled: the first queries of the last tile see nothing of the last keys."""
    spec = replace(make_spec((2, 1), 64), **options)
    for context, queries in ((129, 3), (260, 40)):
        check(make_case(spec, 16, (context,), (queries,)), make_backend(piece=64))


@pytest.mark.parametrize("name", ["bf16", "fp32", "few-tokens-split", "chunk-split", "decode-split-window"])
def test_however_keys_are_cut(name):
    spec, block_size, contexts, queries = CASES[name]
    check(make_case(spec, block_size, contexts, queries), make_backend(piece=64))


def test_more_pieces_than_are_merged_at_once():
    check(make_case(make_spec((8, 2), 64), 16, (1500, 2100), (1, 2)), make_backend(piece=32))


def test_low_tiles_merge_their_pieces_themselves_for_layer_after_layer(monkeypatch):
    monkeypatch.setattr("quire.attention.triton.merge", None)
    case, backend = make_case(make_spec((8, 2), 64), 16, (1500, 1900, 40), (1, 2, 1)), make_backend(piece=64)
    expected = exact(case)
    q, k, v, pool = (x.to(DEVICE) for x in (case.q, case.k, case.v, case.pool))
    plan = backend.plan(on_device(case.batch))
    for _ in range(3):
        found = backend.run(plan, q, k, v, pool[:, 1], case.spec).cpu()
        assert (found.double() - expected).norm() < TOLERANCE[case.q.dtype] * expected.norm()
    (launch,) = backend.prepare(plan, case.spec, q.dtype)
    assert launch.max_merges == 2
    assert launch.arrivals_EK.numel() == 4
    assert not launch.arrivals_EK.any()


@pytest.mark.parametrize("seed", range(8 if not HAS_CUDA else 30))
def test_random_batches(seed):
    rng = np.random.default_rng(seed)
    most = 120 if not HAS_CUDA else 900
    contexts = rng.integers(1, most, rng.integers(1, 5)).tolist()
    queries = [
        int(rng.integers(seed % 3 > 0, c + 1)) if seed % 2 else min(c, int(rng.integers(1, 9))) for c in contexts
    ]
    heads, size = int(rng.integers(1, 3)), int(8 * rng.integers(1, 12))
    dtype = (torch.bfloat16, torch.float32, torch.float16)[seed % 3]
    window = int(rng.integers(1, most)) if seed % 4 == 0 else None
    spec = make_spec((heads * int(rng.integers(1, 6)), heads), size, dtype, window=window)
    check(make_case(spec, int(2 ** rng.integers(3, 7)), contexts, queries, seed), make_backend())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_queries_and_cache_may_differ_in_dtype(dtype):
    case = make_case(make_spec((2, 1), 64, torch.float16), 16, *MIXED)
    case.q = case.q.to(dtype)
    check(case, make_backend(), 1e-3 if dtype is torch.float32 else None)


def test_a_result_is_the_same_in_chunks():
    whole = make_case(make_spec((4, 1), 64), 16, (150,), (150,))
    backend = make_backend()
    expected = run(whole, backend)
    pool = whole.pool.clone().to(DEVICE)
    q, k, v = (x.to(DEVICE) for x in (whole.q, whole.k, whole.v))
    found = []
    for begin, end in ((0, 70), (70, 73), (73, 74), (74, 150)):
        starts, lengths = torch.tensor([0, end - begin]).int(), torch.tensor([end]).int()
        batch = AttentionBatch(
            starts, lengths, whole.batch.block_tables_SB, whole.batch.slots_T[begin:end], 16, end - begin, end
        )
        chunk = slice(begin, end)
        plan = backend.plan(on_device(batch))
        found.append(backend.run(plan, q[chunk], k[chunk], v[chunk], pool[:, 1], whole.spec))
    torch.testing.assert_close(torch.cat(found).cpu(), expected, atol=1e-5, rtol=0)


def test_one_place_serves_steps_of_any_lengths():
    backend = make_backend()
    spec = make_spec((4, 2), 64)
    buffers = backend.buffers(spec, torch.float32, max_num_seqs=4)
    for contexts, queries in (((300, 5, 17, 90), (1, 1, 1, 1)), ((9, 700), (1, 1)), ((40, 60, 9), (1, 0, 1))):
        case = make_case(spec, 16, contexts, queries)
        q, k, v, pool = (x.to(DEVICE, copy=True) for x in (case.q, case.k, case.v, case.pool))
        plan = backend.plan(on_device(case.batch), buffers)
        actual = backend.run(plan, q, k, v, pool[:, 1], spec).cpu()
        assert plan.launches[layer_kind(spec, torch.float32)] is buffers.launches
        torch.testing.assert_close(actual.double(), exact(case), atol=1e-5, rtol=0)
    for contexts, queries in (((9, 8, 7, 6, 5), (1,) * 5), ((20, 4), (2, 1)), ((50,), (40,))):
        with pytest.raises(ValueError, match="larger than its buffers"):
            backend.plan(on_device(make_case(spec, 16, contexts, queries).batch), buffers)
    with pytest.raises(ConfigError):
        backend.buffers(spec, torch.float32, max_num_seqs=4, max_query_len=9)
    other = replace(spec, window=50)
    with pytest.raises(ValueError, match="other layers"):
        backend.attend(plan, q, pool[:, 1], other)


def test_one_place_serves_mixed_steps():
    backend = make_backend()
    spec = make_spec((4, 2), 64)
    buffers = backend.mixed_buffers(spec, torch.float32, max_num_seqs=4, max_tokens=96, max_query_len=96)
    for contexts, queries in (
        ((300, 75, 17, 90), (1, 70, 3, 22)),
        ((9, 700), (1, 1)),
        ((900, 60, 9), (40, 0, 1)),
        ((20, 1300), (9, 87)),
    ):
        case = make_case(spec, 16, contexts, queries)
        q, k, v, pool = (x.to(DEVICE, copy=True) for x in (case.q, case.k, case.v, case.pool))
        plan = backend.plan(on_device(case.batch), buffers)
        actual = backend.run(plan, q, k, v, pool[:, 1], spec).cpu()
        assert plan.launches[layer_kind(spec, torch.float32)] is buffers.launches
        torch.testing.assert_close(actual.double(), exact(case), atol=1e-5, rtol=0)
    for contexts, queries in (((9, 8, 7, 6, 5), (1,) * 5), ((90, 40), (80, 20))):
        with pytest.raises(ValueError, match="larger than its buffers"):
            backend.plan(on_device(make_case(spec, 16, contexts, queries).batch), buffers)


@pytest.mark.parametrize("seed", range(4))
def test_mixed_buffers_hold_the_work_of_any_step(seed):
    """Room for items is a bound by arithmetic, not by trial: here are the trials, with as much cutting as there may be."""
    rng = np.random.default_rng(seed)
    spec = make_spec(((32, 8), (16, 8), (8, 1), (64, 4))[seed], 128, bf16)
    backend = TritonBackend(TorchKernels(), "cpu", num_sms=132)
    for max_tokens in (16, 100, 512, 2048):
        buffers = backend.mixed_buffers(spec, bf16, max_num_seqs=64, max_tokens=max_tokens, max_query_len=1024)
        for _ in range(60):
            num_seqs = int(rng.integers(0, min(64, max_tokens) + 1))
            longest = max(1, max_tokens // max(num_seqs, 1))
            queries = rng.choice([1, 2, 5, 9, longest], num_seqs).clip(1, longest)
            contexts = queries + rng.choice([0, 10, 700, 9000, 120000], num_seqs)
            starts = np.concatenate(([0], np.cumsum(queries)))
            nothing = torch.zeros(0, dtype=torch.int32)
            batch = AttentionBatch(nothing, nothing, nothing, nothing, 16, 1, 1, starts, contexts)
            backend.plan(batch, buffers)
            low, high = buffers.launches if len(buffers.launches) == 2 else (*buffers.launches, None)
            tiles = (
                sum(-(-q // (high.tile.num_rows // (spec.num_heads // spec.num_kv_heads))) for q in queries)
                if high
                else 0
            )
            assert 0 <= int(low.num_items_1) <= low.grid_items
            assert high is None or 0 <= int(high.num_items_1) <= high.grid_items
            assert int(low.num_items_1) + (int(high.num_items_1) if high else 0) >= min(tiles, num_seqs)


def test_lengths_come_from_the_device_where_the_host_has_none():
    case = make_case(make_spec((2, 1), 64), 16, (20, 9), (1, 9))
    plan = make_backend().plan(replace(on_device(case.batch), seq_lens_host_S=None))
    assert plan.seq_lens_S.tolist() == [20, 9]


LLAMA = LayerKind(32, 8, 128, None, True, torch.bfloat16)


@pytest.mark.parametrize("window", [None, 500])
def test_work_lists_cover_each_key_once(window):
    rng = np.random.default_rng(0)
    layer = replace(LLAMA, window=window)
    for trial in range(40):
        count = int(rng.integers(1, 300))
        lengths = rng.integers(1, 5000, count)
        queries = np.minimum(lengths, rng.integers(1, 5 if trial % 2 else 600, count))
        kind = "low" if trial % 2 else "high"
        tile = choose_tile(kind, layer, int(queries.max()), sequences_per_sm=(0.1, 0.4, 2)[trial % 3])
        starts = np.cumsum(queries) - queries
        work = list_work(np.arange(count), starts, queries, lengths, layer, tile, choose_costs(kind, tile), 132)
        covered: dict[int, list[tuple[int, int]]] = {}
        for sequence, first, tokens, position, begin, end, _, _ in work.items_I8.tolist():
            assert 0 < tokens <= tile.num_rows // layer.group
            assert position - (first - starts[sequence]) == lengths[sequence] - queries[sequence]
            assert begin < end
            for token in range(first, first + tokens):
                covered.setdefault(token, []).append((begin, end))
        assert sorted(covered) == list(range(queries.sum()))
        for s in range(count):
            for token in {starts[s], starts[s] + queries[s] - 1}:
                pieces = sorted(covered[token])
                position = lengths[s] - queries[s] + token - starts[s]
                assert pieces[0][0] <= (max(0, position - window + 1) if window else 0)
                assert pieces[-1][1] > position
                assert all(a[1] == b[0] for a, b in pairwise(pieces))
        sizes = work.items_I8[:, 5] - work.items_I8[:, 4]
        assert (np.diff(sizes) <= 0).all()
        partial = work.items_I8[work.items_I8[:, 6] >= 0, 6]
        assert sorted(partial) == list(range(work.num_slots))
        assert work.merges_E4[:, 3].sum() == work.num_slots


@pytest.mark.parametrize(
    ("lengths", "efficiency"),
    [([4096] * 64, 0.85), ([1024] * 256, 0.85), ([8192] * 8, 0.85), ([32768], 0.85), ("drawn", 0.85)],
    ids=str,
)
def test_decoding_keeps_all_multiprocessors_busy(lengths, efficiency):
    if lengths == "drawn":
        lengths = np.random.default_rng(0).integers(64, 2000, 256)
    tile = choose_tile("low", LLAMA, 1, sequences_per_sm=len(lengths) / 132)
    assert busy(np.asarray(lengths), tile) > efficiency


@pytest.mark.parametrize("count", [64, 91, 116])
def test_lengths_of_a_long_tail_are_cut(count):
    """64 as they are would have a place each, and take three times as long as evenly spread (on the card 1.4 times)."""
    lengths = np.exp(np.random.default_rng(count).normal(6.5, 0.8, count)).astype(int)
    assert busy(lengths, gluon.decode_tile(LLAMA.head_size)) > 0.8


@pytest.mark.parametrize(
    "groups", [((1, 8000), (500, 200)), ((4, 16_000), (252, 300)), ((1, 100_000), (200, 800))], ids=str
)
def test_a_few_long_ones_among_many_are_cut_finely(groups):
    lengths = np.concatenate([np.full(count, length) for count, length in groups])
    assert busy(lengths, gluon.decode_tile(LLAMA.head_size)) > 0.75


def busy(lengths, tile):
    """The part of their time that places are at work, if each takes the next item as it ends."""
    ones = np.ones(len(lengths), dtype=np.int64)
    work = list_work(
        np.arange(len(lengths)), np.arange(len(lengths)), ones, lengths, LLAMA, tile, choose_costs("low", tile), 132
    )
    free_at = np.zeros(132 * tile.per_sm)
    for size in np.repeat(work.items_I8[:, 5] - work.items_I8[:, 4], LLAMA.num_kv_heads):
        free_at[free_at.argmin()] += size
    return free_at.mean() / free_at.max()


@pytest.mark.parametrize("count", [40, 56, 64])
def test_tiles_that_fill_the_places_are_left_whole(count):
    """Some end early, while others have begun later: on the card whole ones took less than pieces, at 56 by 15 %."""
    tile = choose_tile("low", LLAMA, 1, sequences_per_sm=count / 132)
    ones, row = np.ones(count, dtype=np.int64), np.arange(count)

    def num_merges(lengths):
        return len(list_work(row, row, ones, lengths, LLAMA, tile, choose_costs("low", tile), 132).merges_E4)

    assert num_merges(np.random.default_rng(5).integers(1000, 2000, count)) == 0
    few_long = np.where(row < 2, 16_000, 200)
    assert num_merges(few_long) == 2


def test_tiles_of_graphs_by_how_full_their_waves_are():
    """132 multiprocessors, 8 key/value heads: at 144 2.2 waves of four programs each, and 2.9 of three."""
    sizes = (16, 32, 64, 96, 128, 144, 160, 192, 208, 224, 256, 512)
    found = [choose_tile("low", LLAMA, 1, sequences_per_sm=size / 132).per_sm for size in sizes]
    assert found == [1, 2, 2, 3, 4, 3, 4, 4, 4, 4, 4, 4]


def test_a_pool_in_another_order_raises():
    case = make_case(make_spec((4, 2), 64, bf16), 16, (20,), (1,))
    case = replace(case, pool=case.pool.transpose(3, 4).contiguous().transpose(3, 4))
    with pytest.raises(ValueError, match="must be contiguous"):
        make_backend().attend(
            make_backend().plan(on_device(case.batch)), case.q.to(DEVICE), case.pool.to(DEVICE)[:, 1], case.spec
        )


@pytest.mark.parametrize("lengths", [[3000], [3000] * 4, [2900] * 8])
def test_a_few_long_ones_are_cut_in_graphs_for_many(lengths):
    tile = choose_tile("low", LLAMA, 1)
    ones, row = np.ones(len(lengths), dtype=np.int64), np.arange(len(lengths))
    work = list_work(row, row, ones, np.array(lengths), LLAMA, tile, choose_costs("low", tile), 132)
    assert len(work.merges_E4) == len(lengths)


def test_what_it_cannot_do_raises():
    backend = make_backend()
    for spec in (
        make_spec(head_size=264),
        make_spec(dtype=torch.float64),
        make_spec((129, 1)),
        replace(make_spec(), scale=-1.0),
    ):
        with pytest.raises(ConfigError):
            backend.check(spec)


def test_selection():
    assert select_backend("triton", DEVICE, TorchKernels()).name == "triton"
    if HAS_CUDA:
        assert select_backend("auto", DEVICE, TorchKernels()).name == "triton"
        with pytest.raises(ConfigError, match="needs a GPU"):
            select_backend("triton", "cpu", TorchKernels())


# -- on the card alone ---------------------------------------------------------------------------------------------------------
BIG = {
    "decode": (make_spec((32, 8), 128, bf16), 16, (4096, 1, 8192, 700) * 6, (1,) * 24),
    "decode-few-long": (make_spec((32, 8), 128, bf16), 16, (20000, 6000, 50), (1,) * 3),
    "drafts": (make_spec((32, 8), 128, bf16), 16, (4096, 1500, 333, 16), (4, 5, 16, 16)),
    "prefill": (make_spec((32, 8), 128, bf16), 16, (2048, 1000, 77), (2048, 1000, 77)),
    "chunk": (make_spec((32, 8), 128, bf16), 16, (9000, 5000, 900), (512, 1, 300)),
    "mixed-window": (make_spec((32, 8), 128, bf16, window=1024), 32, (3000, 5000, 900), (1500, 1, 300)),
    "qwen": (make_spec((16, 8), 128, bf16), 16, (3000, 1200), (1, 1200)),
    "mha-64": (make_spec((16, 16), 64, fp16), 64, (3000, 1200), (1, 1200)),
    "phi-80": (make_spec((8, 8), 80, bf16), 16, (3000, 1200), (1, 1200)),
    "phi-96": (make_spec((8, 8), 96, bf16), 128, (3000, 1200), (1, 1200)),
    "gemma-256": (make_spec((8, 4), 256, bf16, softcap=50.0), 16, (3000, 1200), (1, 1200)),
    "mqa-71": (make_spec((71, 1), 64, bf16), 16, (3000, 300), (1, 300)),
    "fp32": (make_spec((8, 2), 128), 16, (1500, 300, 700), (1, 300, 5)),
    "fp32-256": (make_spec((4, 2), 256), 16, (700, 100), (1, 100)),
}  # fmt: skip


@pytest.mark.parametrize("name", [pytest.param(name, marks=gpu) for name in BIG])
def test_on_the_card(name):
    spec, block_size, contexts, queries = BIG[name]
    check(make_case(spec, block_size, contexts, queries), make_backend())


@pytest.mark.parametrize("steps", [pytest.param(3, marks=gpu)])
def test_a_graph_is_replayed_over_other_lengths(steps):
    replay_over_other_lengths(make_backend(), steps)


def replay_over_other_lengths(backend: TritonBackend, steps: int) -> None:
    spec = make_spec((32, 8), 128, bf16)
    buffers = backend.buffers(spec, bf16, max_num_seqs=8)
    tables = torch.zeros(8, 600, dtype=torch.int32, device=DEVICE)
    pool = torch.full((1600, 2, 2, 8, 16, 128), torch.nan, dtype=bf16, device=DEVICE)
    q = torch.zeros(8, 32, 128, dtype=bf16, device=DEVICE)
    graph, o = torch.cuda.CUDAGraph(), None
    for step in range(steps + 1):
        contexts = ((5000, 3, 700, 90, 1, 64, 333, 16), (1,) * 8, (8000, 900), (1000,) * 8)[step]
        case = make_case(spec, 16, contexts, (1,) * len(contexts), seed=step)
        tables.zero_()[: len(contexts), : case.batch.block_tables_SB.shape[1]] = case.batch.block_tables_SB.to(DEVICE)
        pool[: len(case.pool)] = case.pool.to(DEVICE)
        slots = case.batch.slots_T
        pool[slots // 16, 1, 0, :, slots % 16] = case.k.to(DEVICE)
        pool[slots // 16, 1, 1, :, slots % 16] = case.v.to(DEVICE)
        q[: len(contexts)] = case.q.to(DEVICE)
        plan = backend.plan(replace(on_device(case.batch), block_tables_SB=tables), buffers)
        if step == 0:
            backend.attend(plan, q, pool[:, 1], spec)  # compiles
            torch.cuda.synchronize()
            with torch.cuda.graph(graph):
                o = backend.attend(plan, q, pool[:, 1], spec)
        o.fill_(torch.nan)
        graph.replay()
        expected = exact(case)
        error = (o[: len(contexts)].cpu().double() - expected).norm() / expected.norm()
        assert error.item() < 1e-2


@pytest.mark.parametrize("sequences_per_sm", [0.1, 0.4, 0.7, 2])
def test_low_tiles_of_few_and_many_sequences(sequences_per_sm):
    spec = make_spec((32, 8), 128, bf16)
    layer = layer_kind(spec, bf16)
    tile = choose_tile("low", layer, 1, sequences_per_sm=sequences_per_sm)
    assert tile.per_sm == {0.1: 1, 0.4: 2, 0.7: 3, 2: 4}[sequences_per_sm]
    contexts = (20_000, 300, 129, 1) if HAS_CUDA else (300, 129, 1)
    for piece in (None, 128, 1 << 20):  # 157 pieces of the longest: several turns of the merge
        check(make_case(spec, 16, contexts, (1,) * len(contexts)), make_backend(tiles={"low": tile}, piece=piece))


# -- compiled for the card, without one ----------------------------------------------------------------------------------------
def test_compiles_for_the_card_without_spilling():
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    result = subprocess.run(
        [sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=200, check=True
    )
    for usage in json.loads(result.stdout):
        assert usage["shared_bytes"] <= {90: 232_448, 89: 101_376}[usage["capability"]], usage
        if usage["capability"] == 89:
            continue
        # 128 rows in 4 warps: 128 registers of a thread hold outputs, 64 scores, 32 probabilities; some of the rest spills
        assert usage["stack_bytes"] <= (320 if usage["rows"] == 128 and usage["warps"] == 4 else 0), usage


def compile_for(
    capability: int, spec: AttentionSpec, kind: str, max_query_len: int, sequences_per_sm: float = 9, tokens: int = 1
) -> dict[str, int | str]:
    """Registers of a thread, and bytes that it spills. tokens: most of a low tile."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    layer = layer_kind(spec, spec.kv_dtype)
    tile = choose_tile(kind, layer, max_query_len, sequences_per_sm=sequences_per_sm, little_memory=capability == 89)
    low, high = kernels.split_head_size(spec.head_size)
    merge_rows = kernels.choose_merge_rows(tile, layer.group, tokens * layer.group if kind == "low" else 0)
    element = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[spec.kv_dtype]
    constants = {
        "NUM_KV_HEADS": spec.num_kv_heads, "GROUP": layer.group, "HEAD_SIZE": spec.head_size, "D_LOW": low,
        "D_HIGH": high, "BLOCK_SIZE": 16, "ROWS": tile.num_rows, "KEYS": tile.num_keys, "HEAD_RUN": tile.head_run,
        "CAUSAL": True, "HAS_WINDOW": spec.window is not None, "HAS_SOFTCAP": spec.softcap is not None,
        "ALWAYS_MASK": tile.num_rows < 64, "DOT_TYPE": kernels.DOT_TYPES[spec.kv_dtype],
        "MERGE_ROWS": merge_rows, "MERGE_SLOTS": kernels.choose_merge_slots(tile, merge_rows), "PDL": capability >= 90,
    }  # fmt: skip
    types = dict.fromkeys(kernels._attend.arg_names, "i32")
    types |= {"q_ptr": f"*{element}", "kv_ptr": f"*{element}", "o_ptr": f"*{element}"}
    types |= {"partial_o_ptr": "*fp32", "partial_lse_ptr": "*fp32", "score_scale": "fp32", "tanh_scale": "fp32"}
    types |= {
        "tables_ptr": "*i32",
        "items_ptr": "*i32",
        "count_ptr": "*i32",
        "merges_ptr": "*i32",
        "arrivals_ptr": "*i32",
    }
    types |= dict.fromkeys(constants, "constexpr")
    aligned = (
        "q_ptr",
        "kv_ptr",
        "o_ptr",
        "partial_o_ptr",
        "partial_lse_ptr",
        "q_stride_t",
        "q_stride_n",
        "kv_stride_b",
    )
    attributes = {(kernels._attend.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    compiled = triton.compile(
        ASTSource(kernels._attend, types, constants, attributes),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": tile.num_warps, "num_stages": tile.num_stages, "launch_pdl": capability >= 90},
    )
    tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
    path = f"{os.environ.get('TMPDIR', '/tmp')}/quire-{os.getpid()}.cubin"
    try:
        with open(path, "wb") as file:
            file.write(compiled.asm["cubin"])
        usage = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    finally:
        os.unlink(path)
    found = {key: int(value) for key, value in re.findall(r"([A-Z]+):([0-9]+)", usage)}
    return {
        "capability": capability, "kind": kind, "head_size": spec.head_size, "rows": tile.num_rows, "warps": tile.num_warps,
        "registers": found["REG"], "stack_bytes": found["STACK"], "shared_bytes": compiled.metadata.shared,
    }  # fmt: skip


if __name__ == "__main__":
    specs = [make_spec((32, 8), 128, bf16), make_spec((32, 8), 128, bf16, window=4096, softcap=50.0)]
    found = [compile_for(90, spec, kind, length) for spec in specs for kind, length in (("low", 1), ("high", 999))]
    found += [compile_for(90, specs[0], "low", 1, sequences_per_sm) for sequences_per_sm in (0.1, 0.4, 0.7)]
    found += [compile_for(90, specs[0], "low", 1, tokens=2)]
    for head_size in (128, 256):  # what has less shared memory
        spec = make_spec((32, 8), head_size, bf16)
        found += [compile_for(89, spec, kind, length) for kind, length in (("low", 1), ("high", 999), ("high", 9999))]
    print(json.dumps(found, indent=1))
