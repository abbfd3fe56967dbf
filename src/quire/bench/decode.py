"""`quire bench decode`: time per decoded token of a few requests, with CUDA graphs and without, and where a step's time goes.

A step's time is split three ways, by a profile of some steps in the middle: *kernels* is when the device worked, *gaps* when it
had nothing to do, and *host* is what the host spent on a step beside waiting, most of it while the device works. Profiling
slows the host down: times per token, and the host's, come from runs without it.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import statistics
import time
from typing import Any

from quire.bench.profile import add_profile_arguments
from quire.bench.report import add_report_arguments, report
from quire.bench.steps import share
from quire.bench.subject import (
    Subject,
    add_model_arguments,
    chosen_config,
    decode_params,
    show_tables,
    without_prefix_cache,
)
from quire.bench.workload import draw_prompts
from quire.errors import ConfigError

HELP = "time per decoded token of a few requests, graphs against eager, and where a step's time goes"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("workload")
    what.add_argument("--num-requests", type=int, default=1, help="requests that decode together (1)")
    what.add_argument("--input-len", type=int, default=512)
    what.add_argument("--output-len", type=int, default=256)
    what.add_argument("--temperature", type=float, default=0.6)
    what.add_argument("--repeat", type=int, default=3, help="medians of so many runs are reported (3)")
    what.add_argument("--mode", choices=["both", "graphs", "eager"], default="both")
    what.add_argument(
        "--without", choices=["few", "pdl"], action="append", default=[],
        help="do without our linear layers for few tokens, or without programmatic dependent launch",
    )  # fmt: skip
    add_profile_arguments(parser, default=True)
    add_report_arguments(parser)
    add_model_arguments(what, parser)


def run(args: argparse.Namespace) -> int:
    if min(args.num_requests, args.input_len, args.repeat) < 1 or args.output_len < 2:
        raise ConfigError("--num-requests, --input-len and --repeat must be positive, --output-len at least 2")
    title = f"{args.shape or args.model}: {args.num_requests} x ({args.input_len} in, {args.output_len} out)"
    switch_off(args.without)
    with chosen_config(args, args.input_len + args.output_len) as config:
        subject = Subject(dataclasses.replace(without_prefix_cache(config), enforce_eager=False))
        modes = ["graphs", "eager"] if args.mode == "both" else [args.mode]
        rows, tables = [], {}
        pictured = copy.copy(args)
        for mode in modes:
            row, tables[mode] = measure(subject, mode, pictured, f"{title}, {mode}")
            rows.append(row)
            pictured.trace = pictured.svg = None  # of the first mode
        facts = {**subject.facts, "temperature": args.temperature}
        subject.shutdown()
    report(args, title, rows, data={"modes": tables}, **facts)
    show_tables(args, tables[modes[0]])
    return 0


def switch_off(parts: list[str]) -> None:
    """For the rest of this process, and before an engine is made, which captures its graphs."""
    if "few" in parts:
        from quire.kernels.triton.ops import TritonFewTokens

        TritonFewTokens.takes = lambda self, x_TH: False  # type: ignore[method-assign]
    if "pdl" in parts:
        from quire.kernels.triton import dependent

        dependent.options = lambda device: {"PDL": False}


def measure(
    subject: Subject, mode: str, args: argparse.Namespace, title: str
) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
    """The engine's graphs are switched off and on between modes: weights are loaded once."""
    runner = subject.engine.executor.worker.runner  # type: ignore[attr-defined]
    graphs = runner.graphs
    prompts = draw_prompts([(args.input_len, args.output_len)] * args.num_requests, subject.engine.model.vocab_size)
    params = decode_params(args.output_len, args.temperature)
    runner.graphs = graphs if mode == "graphs" else None
    try:
        began_s = time.perf_counter()
        subject.together(prompts, params)
        warm_up_s = time.perf_counter() - began_s
        runs = [subject.together(prompts, params) for _ in range(args.repeat)]
        decode_way = subject.watch.steps[-1].way
        tables = subject.tables(args, title, lambda: subject.together(prompts, params))
    finally:
        runner.graphs = graphs
    token_s = statistics.median(run.token_s for run in runs)
    row: dict[str, Any] = {
        "mode": mode,
        "ms per token": 1e3 * token_s,
        "floor": 1e3 * runs[-1].token_floor_s,
        "share": share(runs[-1].token_floor_s, token_s),
        "tokens/s": args.num_requests / token_s,
        "first token ms": 1e3 * statistics.median(run.first_s for run in runs),
        "host ms/step": 1e3 * statistics.median(run.host_s for run in runs),
        "first run s": warm_up_s,
    }
    if "recorded" in tables:
        found = next((other for other in tables["recorded"] if other["way"] == decode_way), {})
        row |= {
            "kernels ms/step": found.get("kernels ms"),
            "gaps ms/step": found.get("gaps ms"),
            "launched/step": found.get("launched"),
        }
    return row, tables
