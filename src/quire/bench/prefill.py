"""`quire bench prefill`: prompts of one length given at once, one token each out: prompt tokens a second, beside the floor.

The floor is that of the steps that the last run made (`quire.bench.floors`): mostly the matrix products, of the linear layers
and of attention.
"""

from __future__ import annotations

import argparse
import statistics

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

HELP = "prompts given at once, one token out: tokens a second and share of the floor"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("workload")
    what.add_argument("--num-prompts", type=int, default=64, help="(64)")
    what.add_argument("--input-len", type=int, default=2048, help="tokens of each (2,048)")
    what.add_argument("--repeat", type=int, default=3, help="medians of so many runs are reported (3)")
    add_profile_arguments(parser, default=False)
    add_report_arguments(parser)
    add_model_arguments(what, parser)


def run(args: argparse.Namespace) -> int:
    if min(args.num_prompts, args.input_len, args.repeat) < 1:
        raise ConfigError("--num-prompts, --input-len and --repeat must be positive")
    title = f"{args.shape or args.model}: {args.num_prompts} prompts of {args.input_len:,} tokens"
    with chosen_config(args, args.input_len + 1) as config:
        subject = Subject(without_prefix_cache(config))
        prompts = draw_prompts([(args.input_len, 1)] * args.num_prompts, subject.engine.model.vocab_size)

        def once() -> float:
            return subject.generate(prompts, decode_params(1))[0]

        first_run_s = once()
        times = [once() for _ in range(args.repeat)]
        floor, power = subject.watch.floor(), subject.power
        tables = subject.tables(args, title, once)
        facts = subject.facts | ({"power (of the last run)": power} if power else {})
        matmul = subject.ceilings.matmul
        subject.shutdown()
    median = statistics.median(times)
    row = {
        "tokens/s": args.num_prompts * args.input_len / median,
        "seconds": median,
        "fastest": min(times),
        "slowest": max(times),
        "floor s": floor.seconds,
        "share": share(floor.seconds, median),
        "TFLOP/s": floor.matmul_s * matmul / median / 1e12,
    }
    report(args, title, [row], data=tables, **facts, **{"first run s": first_run_s, "floor, parts": floor.facts()})
    show_tables(args, tables)
    return 0
