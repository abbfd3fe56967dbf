"""`quire bench scheduler`: what planning a step and taking its result cost, without any model behind them."""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np

from quire.bench.report import add_report_arguments, report
from quire.core.batch import Batch
from quire.core.cache_group import CacheGroup
from quire.core.kv_cache import KVCacheManager
from quire.core.scheduler import Scheduler
from quire.core.sequence import RequestGroup
from quire.core.step import StepOutput
from quire.sampling_params import SamplingParams

HELP = "host time of schedule + update for decoding sequences"
PROMPT_TOKENS = 256
MAX_MODEL_LEN = 4096
BLOCK_SIZE = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--num-seqs", type=int, nargs="+", default=[64, 256, 1024, 4096])
    parser.add_argument("--steps", type=int, default=320, help="steps measured at each size")
    parser.add_argument(
        "--repeat", type=int, default=3, help="runs at each size; the one with the lowest median counts"
    )
    add_report_arguments(parser)


def run(args: argparse.Namespace) -> int:
    rows = []
    for count in args.num_seqs:
        schedule, update = min(
            (_measure(count, args.steps) for _ in range(args.repeat)), key=lambda pair: sum(map(sum, pair))
        )
        both = [a + b for a, b in zip(schedule, update)]
        rows.append(
            {
                "sequences": count,
                "schedule ms": statistics.median(schedule),
                "update ms": statistics.median(update),
                "both ms": statistics.median(both),
                "mean ms": statistics.fmean(both),
                "p99 ms": float(np.percentile(both, 99)),
                "us per sequence": statistics.fmean(both) * 1000 / count,
            }
        )
    growth = rows[-1]["mean ms"] / rows[0]["mean ms"]
    ratio = args.num_seqs[-1] / args.num_seqs[0]
    report(
        args,
        "schedule + update, all sequences decoding, prefix cache on",
        rows,
        growth=f"{ratio:.0f} times the sequences take {growth:.1f} times as long",
    )
    return 0


def _measure(count: int, steps: int) -> tuple[list[float], list[float]]:
    """Milliseconds of each schedule and of each update."""
    batch = Batch(count, MAX_MODEL_LEN)
    blocks = count * (-(-(PROMPT_TOKENS + BLOCK_SIZE + steps + 8) // BLOCK_SIZE) + 1)
    kv = KVCacheManager(batch, [CacheGroup((0,), None, 8, 128, "bfloat16")], blocks, BLOCK_SIZE)
    scheduler = Scheduler(batch, kv, max_num_batched_tokens=max(8192, count), max_model_len=MAX_MODEL_LEN)
    rng = np.random.default_rng(0)
    params = SamplingParams(max_tokens=None, ignore_eos=True)
    for i in range(count):
        # lengths differ, so that as many sequences reach a block's border in each step
        prompt = rng.integers(0, 32000, PROMPT_TOKENS + i % BLOCK_SIZE, dtype=np.int32)
        scheduler.add(RequestGroup(str(i), prompt, params, seed=i))
    while True:
        step = scheduler.schedule()
        assert step is not None
        scheduler.update(StepOutput(step.step_id, np.full(len(step.sample_rows), 7, dtype=np.int32)))
        if len(step.rows) == count and (step.num_tokens == 1).all():
            break
    tokens = rng.integers(0, 32000, (steps, count), dtype=np.int32)
    schedule_ms, update_ms = [], []
    for drawn in tokens:
        began = time.perf_counter()
        step = scheduler.schedule()
        planned = time.perf_counter()
        assert step is not None
        scheduler.update(StepOutput(step.step_id, drawn))
        done = time.perf_counter()
        schedule_ms.append((planned - began) * 1e3)
        update_ms.append((done - planned) * 1e3)
    return schedule_ms, update_ms
