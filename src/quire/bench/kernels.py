"""`quire bench kernels`: how near attention and linear layers come to what the GPU allows, and which tiles come nearest.

Decoding is held against reading memory (every key and value once), prefill against a large matrix product (causal
operations alone); both ceilings are measured in the same run. Calls are captured in a CUDA graph that goes round several
layers of the KV pool, more bytes than the L2 cache holds, as a step of a model does. Planning, done once a step, is timed on
its own. Linear layers (`linear_rows`) are held against either, and beside cuBLAS. `--variants` tries other tiles and other
cuts of the keys, and shows the best of each kind of work.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quire.attention.base import AttentionBatch, AttentionSpec
from quire.bench import linear_rows
from quire.bench.report import add_report_arguments, report
from quire.errors import ConfigError
from quire.kernels.torch_ops import TorchKernels

HELP = "attention kernels and linear layers against the GPU's memory bandwidth and matrix rate"
SPEC = AttentionSpec(32, 8, 128, scale=128**-0.5, kv_dtype=torch.bfloat16)
BLOCK_SIZE = 16
MIN_BYTES = 1.2e9
"""Of keys and values that a graph goes round, many times an L2 cache."""


@dataclass(frozen=True)
class Work:
    """Sequences of so many tokens, that decode one or are prefilled whole; the goal, if there is one, is for one H200."""

    name: str
    lengths: tuple[int, ...]
    decode: bool
    goal: float | None
    """TB/s or TFLOP/s."""

    @property
    def kv_bytes(self) -> int:
        """Of one layer: each key and value once."""
        return sum(self.lengths) * 2 * SPEC.num_kv_heads * SPEC.head_size * SPEC.kv_dtype.itemsize

    @property
    def flops(self) -> int:
        """Of one layer, causal: 2 products of 2 operations for each query head, query and key that it sees."""
        return 4 * SPEC.num_heads * SPEC.head_size * sum(n * (n + 1) // 2 for n in self.lengths)


def drawn_lengths() -> tuple[int, ...]:
    """256 of 64 to 4,096, about 1,000 in the mean, most of them shorter."""
    lengths = np.random.default_rng(0).lognormal(6.65, 0.8, 256).clip(64, 4096)
    return tuple(int(n) for n in lengths)


def uneven_lengths(count: int) -> tuple[int, ...]:
    """1,000 to 2,000, as late in a list of requests that began together."""
    return tuple(int(n) for n in np.random.default_rng(5).integers(1000, 2000, count))


WORKS = (
    Work("decode 64 x 4096", (4096,) * 64, True, 4.25),
    Work("decode 256 x 1024", (1024,) * 256, True, 4.05),
    Work("decode 8 x 8192", (8192,) * 8, True, 3.7),
    Work("decode 1 x 32768", (32768,), True, 3.2),
    Work("decode 256 drawn", drawn_lengths(), True, 3.9),
    Work("decode 56 uneven", uneven_lengths(56), True, None),
    Work("decode 14 uneven", uneven_lengths(14), True, None),
    Work("prefill 4 x 4096", (4096,) * 4, False, 480),
    Work("prefill 1 x 16384", (16384,), False, 540),
    Work("prefill 16 x 1024", (1024,) * 16, False, 330),
)

# rows, keys, warps, stages, programs that a multiprocessor holds, items that run for one head in turn
LOW_TILES = (
    (16, 64, 2, 3, 3, 1), (16, 64, 2, 4, 2, 1), (16, 64, 4, 3, 3, 1), (16, 32, 2, 4, 4, 1),
    (16, 32, 1, 4, 4, 1), (16, 128, 4, 3, 1, 1),
)  # fmt: skip
GLUON_LOW_TILES = ((16, 32, 1, 12, 1), (16, 32, 1, 6, 2), (16, 32, 1, 4, 3), (16, 32, 1, 3, 4))
HIGH_TILES = (
    (128, 64, 4, 2, 2, 64), (128, 64, 4, 2, 2, 32), (128, 64, 4, 2, 2, 256), (128, 128, 8, 2, 1, 64), (128, 64, 8, 2, 1, 64),
    (128, 64, 8, 3, 1, 64), (128, 32, 4, 3, 2, 64), (256, 64, 8, 2, 1, 32), (64, 64, 4, 2, 2, 128),
)  # fmt: skip
GLUON_HIGH_TILES = ((128, 128, 8, 2, 1, 32), (128, 128, 8, 2, 1, 64), (128, 64, 8, 4, 1, 64), (128, 64, 8, 3, 1, 64))
PIECES = (256, 384, 512, 704, 1024, 1408, 2048, 4096)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", metavar="TEXT", help="work whose name contains this")
    parser.add_argument("--variants", action="store_true", help="also try other tiles, and other cuts of the keys")
    parser.add_argument("--repeat", type=int, default=5, help="replays of each graph; the median counts")
    add_report_arguments(parser)


def run(args: argparse.Namespace) -> int:
    if not torch.cuda.is_available():
        raise ConfigError("quire bench kernels needs a CUDA device")
    device = torch.device("cuda")
    works = [work for work in WORKS if not args.only or args.only in work.name]
    linear = [work for work in linear_rows.WORKS if not args.only or args.only in work[0]]
    if not works and not linear:
        names = [work.name for work in WORKS] + [name for name, *_ in linear_rows.WORKS]
        raise ConfigError(f"no work is called {args.only}; there are: {', '.join(names)}")
    ceilings = measure_ceilings(device, args.repeat)
    rows, tried = [], []
    for work in works:
        problem = Problem.make(work, device)
        rows.append(_row(work, measure(problem, repeat=args.repeat), ceilings))
        print(*(f"{value:.3g}" if isinstance(value, float) else value for value in rows[-1].values()), flush=True)
        if args.variants:
            for name, options in variants(work):
                try:
                    found = _row(work, measure(problem, repeat=3, **options), ceilings)
                except Exception as error:  # too much shared memory, say: the others still count
                    tried.append({"work": work.name, "variant": name, "error": repr(error)[:200]})
                    continue
                tried.append({"work": work.name, "variant": name, "reached": found["reached"], "us": found["us"]})
        del problem
    for work in works if args.variants else ():
        same = sorted((t for t in tried if t["work"] == work.name), key=lambda t: -t.get("reached", 0))
        print(f"{work.name}: " + ", ".join(f"[{t['variant']}] {t.get('reached', 0):.4g}" for t in same), flush=True)
    linear_found, linear_tried = linear_rows.measure(
        linear, time_graph, ceilings, repeat=args.repeat, with_variants=args.variants
    )
    if rows:
        report(args, "attention kernels, bf16, 32 query heads, 8 key/value heads, head size 128", rows,
               data={"variants": tried, "linear": linear_found, "linear variants": linear_tried}, **ceilings)  # fmt: skip
    if linear_found and not (rows and args.json == "-"):
        if rows:
            args.json = None
        report(args, "linear layers, bf16, x tokens", linear_found, data={"variants": linear_tried}, **ceilings)
    return 0


def _row(work: Work, found: dict[str, float], ceilings: dict[str, float]) -> dict[str, Any]:
    reached = work.kv_bytes / found["s"] / 1e12 if work.decode else work.flops / found["s"] / 1e12
    ceiling = ceilings["read TB/s"] if work.decode else ceilings["matmul TFLOP/s"]
    return {
        "work": work.name,
        "us": found["s"] * 1e6,
        "reached": reached,
        "unit": "TB/s" if work.decode else "TFLOP/s",
        "of ceiling": reached / ceiling,
        "goal (H200)": work.goal,
        "of goal": reached / work.goal if work.goal else None,
        "plan us": found["plan_s"] * 1e6,
    }


def variants(work: Work) -> Iterator[tuple[str, dict[str, Any]]]:
    """Names, and options of `measure`."""
    from quire.kernels.gluon import GluonTile
    from quire.kernels.triton.attention import Tile

    for numbers in LOW_TILES if work.decode else HIGH_TILES:
        yield " ".join(map(str, numbers)), {"tiles": {"low" if work.decode else "high": Tile(*numbers)}}
    for numbers in GLUON_LOW_TILES if work.decode else GLUON_HIGH_TILES:
        tile = GluonTile(*numbers)
        yield "gluon " + " ".join(map(str, numbers)), {"tiles": {"low" if work.decode else "high": tile}}
    if work.decode:
        for piece in PIECES:
            if piece <= max(work.lengths):
                yield f"piece {piece}", {"piece": piece}


@dataclass(frozen=True)
class Problem:
    """One work's tensors. `pool_BL2KSD`: random keys and values, in blocks that are scattered."""

    work: Work
    batch: AttentionBatch
    q_TND: Tensor
    pool_BL2KSD: Tensor

    @classmethod
    def make(cls, work: Work, device: torch.device) -> Problem:
        lengths = np.asarray(work.lengths)
        blocks = -(-lengths // BLOCK_SIZE)
        num_layers = max(2, int(np.ceil(MIN_BYTES / work.kv_bytes)))
        shape = (int(blocks.sum()) + 1, num_layers, 2, SPEC.num_kv_heads, BLOCK_SIZE, SPEC.head_size)
        pool = torch.empty(shape, dtype=SPEC.kv_dtype, device=device).normal_()
        ids = np.random.default_rng(0).permutation(int(blocks.sum())) + 1
        tables = np.zeros((len(lengths), int(blocks.max())), dtype=np.int32)
        tables[np.arange(tables.shape[1]) < blocks[:, None]] = ids
        queries = np.ones_like(lengths) if work.decode else lengths
        starts = np.concatenate([[0], np.cumsum(queries)]).astype(np.int32)
        batch = AttentionBatch(
            query_start_loc_S1=torch.from_numpy(starts).to(device),
            seq_lens_S=torch.from_numpy(lengths.astype(np.int32)).to(device),
            block_tables_SB=torch.from_numpy(tables).to(device),
            slots_T=torch.full((int(starts[-1]),), -1, device=device),
            block_size=BLOCK_SIZE,
            max_query_len=int(queries.max()),
            max_seq_len=int(lengths.max()),
            query_start_loc_host_S1=starts,
            seq_lens_host_S=lengths,
        )
        q = torch.randn(int(starts[-1]), SPEC.num_heads, SPEC.head_size, dtype=SPEC.kv_dtype, device=device)
        return cls(work, batch, q, pool)


def measure(problem: Problem, *, repeat: int = 5, **options: Any) -> dict[str, float]:
    """Seconds of one layer's attention ("s") and of the plan on the host ("plan_s"); `options` are TritonBackend's.

    Decoding runs from buffers made for a graph, with the grid of their capacity, unless a piece is given.
    """
    from quire.attention.triton import TritonBackend

    backend = TritonBackend(TorchKernels(), problem.q_TND.device, **options)
    buffers = None
    if problem.work.decode and "piece" not in options:
        buffers = backend.buffers(SPEC, problem.q_TND.dtype, len(problem.work.lengths))
    times = []
    for _ in range(5):
        began = time.perf_counter()
        plan = backend.plan(problem.batch, buffers)
        backend.prepare(plan, SPEC, problem.q_TND.dtype)
        times.append(time.perf_counter() - began)
    layers = list(problem.pool_BL2KSD.unbind(1))
    layers *= max(1, 8 // len(layers))
    seconds = time_graph([lambda kv=kv: backend.attend(plan, problem.q_TND, kv, SPEC) for kv in layers], repeat)
    return {"s": seconds, "plan_s": statistics.median(times)}


def time_graph(calls: Sequence[Callable[[], object]], repeat: int) -> float:
    """Seconds of one of the calls: all are captured in one graph, which is replayed `repeat` times after two warm-ups."""
    calls[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    graph.replay()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeat)]
    for before, after in events:
        before.record()
        graph.replay()
        after.record()
    torch.cuda.synchronize()
    return statistics.median(before.elapsed_time(after) for before, after in events) / 1000 / len(calls)


def measure_ceilings(device: torch.device, repeat: int) -> dict[str, float]:
    """What torch reaches: reading (a sum over 2 GiB), copying (read and written bytes), a product of 8192 x 8192 in bf16."""
    x = torch.empty(2**29, device=device).normal_()
    y = torch.empty_like(x)
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    num_bytes = x.numel() * x.element_size()
    found = {
        "read TB/s": num_bytes / time_graph([lambda: x.sum()] * 4, repeat) / 1e12,
        "copy TB/s": 2 * num_bytes / time_graph([lambda: y.copy_(x)] * 4, repeat) / 1e12,
    }
    found["matmul TFLOP/s"] = 2 * 8192**3 / time_graph([lambda: a @ b] * 4, repeat) / 1e12
    return found
