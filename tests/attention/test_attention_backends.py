"""Every attention backend against the reference, and the reference against dense attention written out here."""

import importlib.util
from dataclasses import dataclass, replace

import pytest
import torch

from quire.attention import AttentionBackend, AttentionBatch, AttentionSpec, select_backend
from quire.errors import ConfigError
from quire.kernels import select_kernels
from quire.kernels.cpu import CpuKernels

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def make_backend(name: str) -> AttentionBackend:
    if name == "cpu-generic":
        return select_backend("cpu", "cpu", CpuKernels.build(("-DQUIRE_GENERIC",)))
    return select_backend(name, "cpu", select_kernels("cpu"))


@dataclass
class Case:
    """A random step: `contexts` tokens of each sequence, the last `queries` of them new; all else in the pool is NaN."""

    spec: AttentionSpec
    batch: AttentionBatch
    pool: torch.Tensor
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    keys: list[torch.Tensor]
    values: list[torch.Tensor]

    def run(self, name: str) -> torch.Tensor:
        backend = make_backend(name)
        backend.check(self.spec)
        pool = self.pool.clone()
        return backend.run(backend.plan(self.batch), self.q, self.k, self.v, pool[:, 1], self.spec)


def make_case(spec, block_size=16, contexts=(1, 17, 400, 77, 600, 5), queries=(1, 1, 1, 77, 130, 3), seed=0) -> Case:
    torch.manual_seed(seed)
    N, K, D, dtype = spec.num_heads, spec.num_kv_heads, spec.head_size, spec.kv_dtype
    blocks = [-(-context // block_size) for context in contexts]
    pool = torch.full((sum(blocks) + 1, 2, 2, K, block_size, D), torch.nan, dtype=dtype)
    ids = (torch.randperm(sum(blocks)) + 1).split(blocks)
    tables = torch.zeros(len(contexts), max(blocks) + 1, dtype=torch.int32)
    qkv = torch.randn(sum(queries), (N + 2 * K) * D).to(dtype)
    q, k, v = (x.unflatten(-1, (-1, D)) for x in qkv.split([N * D, K * D, K * D], -1))  # strided, as a model gives them
    keys, values, slots, start = [], [], [], 0
    for s, (context, query) in enumerate(zip(contexts, queries)):
        tables[s, : blocks[s]] = ids[s]
        positions = torch.arange(context)
        all_slots = ids[s][positions // block_size] * block_size + positions % block_size
        old = all_slots[: context - query]
        keys.append(torch.cat([torch.randn(context - query, K, D).to(dtype), k[start : start + query]]))
        values.append(torch.cat([torch.randn(context - query, K, D).to(dtype), v[start : start + query]]))
        pool[old // block_size, 1, 0, :, old % block_size] = keys[s][: len(old)]
        pool[old // block_size, 1, 1, :, old % block_size] = values[s][: len(old)]
        if spec.window:  # blocks before every query's window are given back: the table shows the null block there
            tables[s, : max(0, context - query - spec.window + 1) // block_size] = 0
        slots.append(all_slots[context - query :])
        start += query
    batch = AttentionBatch(
        query_start_loc_S1=torch.tensor([0, *queries]).cumsum(0).int(),
        seq_lens_S=torch.tensor(contexts).int(),
        block_tables_SB=tables,
        slots_T=torch.cat(slots),
        block_size=block_size,
        max_query_len=max(queries),
        max_seq_len=max(contexts),
    )
    return Case(spec, batch, pool, q, k, v, keys, values)


def make_spec(heads=(9, 3), head_size=64, dtype=torch.float32, **options) -> AttentionSpec:
    return AttentionSpec(*heads, head_size, scale=head_size**-0.5, kv_dtype=dtype, **options)


SPECS = {
    "smollm2": (make_spec(), 16),
    "smollm2-bf16": (make_spec(dtype=torch.bfloat16), 16),
    "smollm2-fp16": (make_spec(dtype=torch.float16), 16),
    "stories": (make_spec((8, 4), 8), 16),
    "stories-bf16": (make_spec((8, 4), 8, torch.bfloat16), 8),
    "mha-80": (make_spec((4, 4), 80), 1),
    "mha-80-bf16": (make_spec((4, 4), 80, torch.bfloat16), 8),
    "96": (make_spec((6, 3), 96), 32),
    "128-window": (make_spec((8, 2), 128, window=37), 16),
    "128-bf16-window": (make_spec((8, 2), 128, torch.bfloat16, window=200), 32),
    "window-of-one": (make_spec(window=1), 8),
    "256-softcap": (make_spec((4, 2), 256, softcap=3.0), 16),
    "256-bf16-softcap-window": (make_spec((8, 4), 256, torch.bfloat16, softcap=3.0, window=64), 16),
    "mqa": (make_spec((7, 1), 64, torch.bfloat16), 16),
    "mqa-of-more-heads-than-a-tile-has-rows": (make_spec((100, 1), 32), 16),
    "odd-block-size": (make_spec((4, 2), 72), 5),
    "not-causal": (make_spec(causal=False), 16),
    "other-scale": (replace(make_spec((2, 2), 16), scale=1.7), 16),
}  # fmt: skip


@pytest.mark.parametrize("case_name", SPECS)
@pytest.mark.parametrize("backend", ["cpu", "cpu-generic"])
def test_backend_equals_reference(backend, case_name):
    case = make_case(*SPECS[case_name])
    actual, expected = case.run(backend), case.run("reference")
    assert actual.dtype is expected.dtype is case.q.dtype
    assert actual.is_contiguous()
    torch.testing.assert_close(actual, expected, atol=TOLERANCE[case.q.dtype], rtol=0)


@pytest.mark.parametrize("case_name", SPECS)
def test_reference_equals_dense_attention(case_name):
    case = make_case(*SPECS[case_name])
    spec, batch, actual = case.spec, case.batch, case.run("reference")
    for s, (keys, values) in enumerate(zip(case.keys, case.values)):
        begin, end = batch.query_start_loc_S1[s : s + 2].tolist()
        for n in range(spec.num_heads):
            kv_head = n * spec.num_kv_heads // spec.num_heads
            for t in {begin, (begin + end) // 2, end - 1}:
                position = len(keys) - end + t
                last = position + 1 if spec.causal else len(keys)
                first = max(0, position - spec.window + 1) if spec.window else 0
                scores = keys[first:last, kv_head].double() @ case.q[t, n].double() * spec.scale
                scores = spec.softcap * (scores / spec.softcap).tanh() if spec.softcap else scores
                expected = scores.softmax(0) @ values[first:last, kv_head].double()
                error = (actual[t, n].double() - expected).abs().max().item()
                assert error < {torch.float32: 3e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}[spec.kv_dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["cpu", "cpu-generic"])
def test_queries_and_cache_may_differ_in_dtype(backend, dtype):
    case = make_case(make_spec(dtype=torch.float16))
    case.q = case.q.to(dtype)
    torch.testing.assert_close(case.run(backend), case.run("reference"), atol=TOLERANCE[dtype], rtol=0)


@pytest.mark.parametrize("window", [None, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["cpu", "cpu-generic"])
def test_a_result_is_bitwise_the_same_alone_in_chunks_and_on_one_thread(backend, dtype, window):
    contexts = (300, 1500, 70)
    whole = make_case(make_spec(dtype=dtype, window=window), contexts=contexts, queries=contexts)
    expected = whole.run(backend)
    pool = whole.pool.clone()
    engine = make_backend(backend)
    engine.run(engine.plan(whole.batch), whole.q, whole.k, whole.v, pool[:, 1], whole.spec)
    starts = whole.batch.query_start_loc_S1.tolist()

    def run(s: int, begin: int, end: int) -> torch.Tensor:
        """Queries at positions begin .. end - 1 of sequence s, with nothing else in the batch."""
        batch = AttentionBatch(
            torch.tensor([0, end - begin]).int(), torch.tensor([end]).int(), whole.batch.block_tables_SB[s : s + 1],
            torch.full((end - begin,), -1), 16, end - begin, end,
        )  # fmt: skip
        q, k, v = (x[starts[s] + begin : starts[s] + end] for x in (whole.q, whole.k, whole.v))
        return engine.run(engine.plan(batch), q, k, v, pool[:, 1], whole.spec)

    threads = torch.get_num_threads()
    try:
        for s, context in enumerate(contexts):
            cut = context // 3
            for chunks in ([(0, context)], [(0, cut), (cut, context - 1), (context - 1, context)]):
                for count in (threads, 1):
                    torch.set_num_threads(count)
                    actual = torch.cat([run(s, *chunk) for chunk in chunks])
                    assert torch.equal(actual, expected[starts[s] : starts[s + 1]])
    finally:
        torch.set_num_threads(threads)


def test_random_batches():
    for seed in range(24):
        torch.manual_seed(1000 + seed)
        contexts = torch.randint(1, 700, (int(torch.randint(1, 6, ())),)).tolist()
        queries = [int(torch.randint(0 if seed % 3 else 1, c + 1, ())) if seed % 2 else 1 for c in contexts]
        kv_heads, size = int(torch.randint(1, 4, ())), 8 * int(torch.randint(1, 12, ()))
        dtype = (torch.float32, torch.bfloat16, torch.float16)[seed % 3]
        window = int(torch.randint(1, 400, ())) if seed % 4 == 0 else None
        spec = make_spec((kv_heads * int(torch.randint(1, 5, ())), kv_heads), size, dtype, window=window)
        case = make_case(spec, int(torch.randint(1, 33, ())), contexts, queries, seed)
        torch.testing.assert_close(case.run("cpu"), case.run("reference"), atol=TOLERANCE[dtype], rtol=0)


def test_an_empty_batch():
    case = make_case(make_spec(), contexts=(20, 5), queries=(0, 0))
    assert case.run("cpu").shape == (0, 9, 64)


def test_contradicting_batches_raise():
    case = make_case(make_spec())
    for change, error in (
        ({"seq_lens_S": case.batch.seq_lens_S * 100}, ValueError),
        ({"seq_lens_S": case.batch.seq_lens_S * 0}, ValueError),
        ({"seq_lens_S": case.batch.seq_lens_S.long()}, ValueError),
        ({"query_start_loc_S1": case.batch.query_start_loc_S1 + 1}, ValueError),
        ({"block_tables_SB": case.batch.block_tables_SB + 1000}, IndexError),
        ({"block_tables_SB": case.batch.block_tables_SB[:, :30]}, ValueError),
    ):
        wrong = replace(case, batch=replace(case.batch, **change))
        with pytest.raises(error):
            wrong.run("cpu")


def test_what_a_backend_cannot_do_raises():
    with pytest.raises(ConfigError, match="head size"):
        make_backend("cpu").check(make_spec(head_size=12))
    with pytest.raises(ConfigError, match="float64"):
        make_backend("cpu").check(make_spec(dtype=torch.float64))
    make_backend("reference").check(make_spec(head_size=12))
    for wrong in ({"heads": (9, 2)}, {"window": 0}, {"window": 5, "causal": False}, {"softcap": -1.0}):
        with pytest.raises(ConfigError):
            make_spec(**wrong)


def test_selection():
    kernels = select_kernels("cpu")
    assert select_backend("auto", "cpu", kernels).name == "cpu"
    assert select_backend("reference", "cpu", kernels).name == "reference"
    assert select_backend("auto", "cpu", select_kernels("cpu", "torch")).name == "reference"
    on_cuda = "triton" if torch.cuda.is_available() and importlib.util.find_spec("triton") else "reference"
    assert select_backend("auto", "cuda", kernels).name == on_cuda
    for name, device, chosen in (("cpu", "cuda", kernels), ("cpu", "cpu", select_kernels("cpu", "torch"))):
        with pytest.raises(ConfigError):
            select_backend(name, device, chosen)
    with pytest.raises(ConfigError, match="flash"):
        select_backend("flash", "cpu", kernels)
