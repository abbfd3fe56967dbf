"""`quire bench throughput`: a list of requests given at once; tokens a second until the last answer is complete.

Beside it the floor of the steps that the last run made (`quire.bench.floors`) and the share of it that was reached; steps by
the way they ran (graphs of decoding steps, graphs of mixed ones, eager); with --profile, their kernels, gaps and host.

A peer answers a part of the list as one static batch, after Quire has answered the same part and has left the device.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from typing import Any

from quire.bench import peer
from quire.bench.profile import add_profile_arguments
from quire.bench.report import add_report_arguments, report
from quire.bench.steps import share
from quire.bench.subject import Subject, add_model_arguments, chosen_config, decode_params, show_tables
from quire.bench.workload import Lengths, draw_lengths, draw_prompts, read_lengths
from quire.errors import ConfigError

HELP = "a list of requests given at once: tokens a second, share of the floor, beside a peer if asked"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("workload")
    what.add_argument("--workload", metavar="FILE", help="JSON list of [prompt tokens, output tokens], or CSV")
    what.add_argument("--num-prompts", type=int, help="only the first N of the list; without --workload, draw N (32)")
    what.add_argument("--temperature", type=float, default=0.0)
    what.add_argument("--repeat", type=int, default=3, help="medians of so many runs are reported (3)")
    what.add_argument("--peer", choices=["transformers"], help="run a part of the list through this peer as well, once")
    what.add_argument("--peer-requests", type=int, default=128, help="the part: the first N of the list (128)")
    what.add_argument("--peer-batch", type=int, default=128, help="requests of each of the peer's static batches (128)")
    add_profile_arguments(parser, default=False)
    add_report_arguments(parser)
    add_model_arguments(what, parser)


def run(args: argparse.Namespace) -> int:
    lengths = (
        read_lengths(args.workload) if args.workload else draw_lengths(args.num_prompts or 32, (16, 256), (16, 128))
    )
    lengths = lengths[: args.num_prompts]
    if not lengths or min(args.repeat, args.peer_requests, args.peer_batch) < 1:
        raise ConfigError("the list, --repeat, --peer-requests and --peer-batch must not be empty or below 1")
    if args.peer:
        peer.check()
    num_in, num_out = (sum(column) for column in zip(*lengths))
    title = f"{args.shape or args.model}: {len(lengths)} requests, {num_in:,} tokens in, {num_out:,} out"
    with chosen_config(args, max(map(sum, lengths))) as config:
        subject = Subject(config)
        prompts = draw_prompts(lengths, subject.engine.model.vocab_size)
        subject.generate([prompts[0], prompts[-1]], decode_params(4, args.temperature))
        times = [_answer(subject, prompts, lengths, args.temperature) for _ in range(args.repeat)]
        floor, host_ms, idle_s = subject.watch.floor(), subject.watch.host_ms, times[-1] - subject.watch.elapsed_s
        power = subject.power
        tables = subject.tables(args, title, lambda: _answer(subject, prompts, lengths, args.temperature))
        rows = [_row("quire", times, lengths)]
        if args.peer:
            part = lengths[: args.peer_requests]
            prompts = prompts[: len(part)]
            if len(part) < len(lengths):
                again = [_answer(subject, prompts, part, args.temperature) for _ in range(args.repeat)]
                rows.append(_row("quire", again, part))
        facts = {**subject.facts, "temperature": args.temperature}
        dtype = subject.device.dtype
        subject.shutdown()
        if args.peer:
            batches = [
                (prompts[i : i + args.peer_batch], max(output for _, output in part[i : i + args.peer_batch]))
                for i in range(0, len(part), args.peer_batch)
            ]
            seconds = peer.transformers_seconds(config, dtype, batches, args.temperature)
            rows.append(_row(args.peer, [seconds], part))
            for row in rows[-2:]:
                row["times the peer"] = row["output tok/s"] / rows[-1]["output tok/s"]
    facts |= {
        "host ms/step": host_ms,
        "s between steps (of the last run)": idle_s,
        "floor s (of the steps that the last run made)": floor.seconds,
        "floor, share reached": share(floor.seconds, times[-1]),
        "floor, parts": floor.facts(),
    }
    if power:
        facts["power (of the last run)"] = {**power, "J/output token": power["J"] / num_out}
    report(args, title, rows, data=tables, **facts)
    show_tables(args, tables)
    return 0


def _answer(
    subject: Subject, prompts: Sequence[Sequence[int]], lengths: Sequence[Lengths], temperature: float
) -> float:
    """Seconds for the first requests of the list, as many as `lengths` has."""
    params = [decode_params(output, temperature) for _, output in lengths]
    seconds, outputs = subject.generate(prompts[: len(lengths)], params)
    assert [len(output.outputs[0].token_ids) for output in outputs] == [output for _, output in lengths]
    return seconds


def _row(engine: str, times: Sequence[float], lengths: Sequence[Lengths]) -> dict[str, Any]:
    num_in, num_out = (sum(column) for column in zip(*lengths))
    median = statistics.median(times)
    return {
        "engine": engine,
        "requests": len(lengths),
        "seconds": median,
        "fastest": min(times),
        "slowest": max(times),
        "output tok/s": num_out / median,
        "total tok/s": (num_in + num_out) / median,
        "times the peer": None,
    }
