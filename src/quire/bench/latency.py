"""`quire bench latency`: N requests of one size given at once, for several N: time to the first token, per token after it,
and to the last, each beside its floor.

The time to the first token is everybody's: until the last of the N has it. Medians of several runs; floors are those of the
steps that the last run made (`quire.bench.floors`).
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

from quire.bench.report import add_report_arguments, report
from quire.errors import ConfigError

HELP = "time to the first token and per token of requests given at once, beside their floors"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from quire.bench.profile import add_profile_arguments
    from quire.bench.subject import add_model_arguments

    what = parser.add_argument_group("workload")
    what.add_argument("--num-requests", type=int, nargs="+", default=[1, 8, 32], help="a row for each (1 8 32)")
    what.add_argument("--input-len", type=int, default=512)
    what.add_argument("--output-len", type=int, default=128)
    what.add_argument("--temperature", type=float, default=0.0)
    what.add_argument("--repeat", type=int, default=3, help="medians of so many runs are reported (3)")
    add_profile_arguments(parser, default=False)
    add_report_arguments(parser)
    add_model_arguments(what, parser)


def run(args: argparse.Namespace) -> int:
    from quire.bench.subject import Subject, chosen_config, decode_params, show_tables, without_prefix_cache
    from quire.bench.workload import draw_prompts

    if min(*args.num_requests, args.input_len, args.repeat) < 1 or args.output_len < 2:
        raise ConfigError("--num-requests, --input-len and --repeat must be positive, --output-len at least 2")
    title = f"{args.shape or args.model}: {args.input_len} tokens in, {args.output_len} out"
    params = decode_params(args.output_len, args.temperature)
    rows: list[dict[str, Any]] = []
    with chosen_config(args, args.input_len + args.output_len) as config:
        subject = Subject(without_prefix_cache(config))
        vocab_size = subject.engine.model.vocab_size
        for count in args.num_requests:
            prompts = draw_prompts([(args.input_len, args.output_len)] * count, vocab_size)
            subject.together(prompts, params)
            times = [subject.together(prompts, params) for _ in range(args.repeat)]
            first_s, token_s, total_s = (
                statistics.median(column)
                for column in zip(*((time.first_s, time.token_s, time.first_s + time.decode_s) for time in times))
            )
            rows.append(
                {
                    "requests": count,
                    "first token ms": 1e3 * first_s,
                    "its floor": 1e3 * times[-1].first_floor_s,
                    "first, share": times[-1].first_floor_s / first_s,
                    "ms per token": 1e3 * token_s,
                    "floor": 1e3 * times[-1].token_floor_s,
                    "share": times[-1].token_floor_s / token_s,
                    "last token ms": 1e3 * total_s,
                    "tokens/s": count / token_s,
                }
            )
        tables = subject.tables(args, f"{title}, {count} requests", lambda: subject.together(prompts, params))
        facts = {**subject.facts, "temperature": args.temperature}
        subject.shutdown()
    report(args, title, rows, data=tables, **facts)
    show_tables(args, tables)
    return 0
