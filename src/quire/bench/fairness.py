"""`quire bench fairness`: does one client's flood, or one long prompt, hold up the others?

Two trials on the engine itself, without HTTP, by the machine's clock:

    flood        a small client's requests alone; beside another client that sends `--times` as much; and with both under one
                 name, which is first come, first served. Times to the small client's first tokens.
    long prompt  some requests decode while a prompt of 8 times the step's token budget is read, with and without a step
                 target. Times between the steps that bring the others' tokens.
"""

from __future__ import annotations

import argparse
import random
import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from quire.bench.report import add_report_arguments, report
from quire.bench.traffic import PromptMaker, fit, items_of, read_items, scale_lengths
from quire.bench.workload import draw_lengths

HELP = "a small client's first tokens beside a flood; others' tokens beside a long prompt"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", help="directory or hub name (default: the embedded model)")
    parser.add_argument("--load-format", default="auto")
    parser.add_argument(
        "--workload", metavar="FILE", help="requests, as for bench serve; without it, lengths are drawn"
    )
    parser.add_argument("--num-prompts", type=int, default=60, help="the small client's")
    parser.add_argument("--times", type=int, default=20, help="requests of the other client for each of them")
    parser.add_argument("--request-rate", type=float, default=3.0, help="the small client's, per second")
    parser.add_argument("--length-scale", type=float, default=0.1, help="of the workload's lengths")
    parser.add_argument("--step-target-ms", type=float, default=20.0)
    parser.add_argument("--max-num-seqs", type=int, default=32)
    parser.add_argument("--max-num-batched-tokens", type=int, default=256, help="the budget, for the long prompt too")
    parser.add_argument("--seed", type=int, default=0)
    add_report_arguments(parser)


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request, due `at_s` seconds after the start."""

    at_s: float
    client: str
    prompt: list[int]
    num_output: int
    is_small: bool


def run(args: argparse.Namespace) -> int:
    arrivals = _arrivals(args)
    small = [arrival for arrival in arrivals if arrival.is_small]
    one_name = [replace(arrival, client="") for arrival in arrivals]
    rows: list[dict[str, Any]] = []
    for name, trial in (("alone", small), ("beside the flood", arrivals), ("both under one name", one_name)):
        first_ms = 1e3 * _first_tokens(args, trial)
        row = {
            "the small client": name,
            "first token ms p50": float(np.percentile(first_ms, 50)),
            "p99": float(np.percentile(first_ms, 99)),
        }
        for share in ("p50", "p99"):
            key = "first token ms p50" if share == "p50" else "p99"
            row[f"{share} beyond alone, step targets"] = (row[key] - (rows or [row])[0][key]) / args.step_target_ms
        rows.append(row)
    report(
        args,
        f"{len(small)} requests of a small client, {len(arrivals) - len(small)} of another",
        rows,
        step_target_ms=args.step_target_ms,
        others_gaps_beside_a_long_prompt_ms={
            "without a target": _gaps(args, None),
            f"target {args.step_target_ms:g} ms": _gaps(args, args.step_target_ms),
        },
    )
    return 0


def _engine(args: argparse.Namespace, step_target_ms: float | None) -> Any:
    from quire.config import EngineConfig
    from quire.engine.engine import Engine
    from quire.pocket import model_directory

    return Engine(
        EngineConfig(
            model=args.model or str(model_directory()),
            load_format=args.load_format,
            enable_prefix_caching=False,
            max_num_seqs=args.max_num_seqs,
            max_num_batched_tokens=args.max_num_batched_tokens,
            step_target_ms=step_target_ms,
        )
    )


def _arrivals(args: argparse.Namespace) -> list[Arrival]:
    """In their order: each of the small client's requests and `times` of the other's, spread over the same time."""
    rng = random.Random(args.seed)
    count = args.num_prompts * (args.times + 1)
    if args.workload:
        items = (read_items(args.workload) * (count + 1))[:count]
    else:
        items = items_of(draw_lengths(count, (100, 3000), (10, 600), args.seed))
    engine = _engine(args, None)
    vocab_size, max_model_len = engine.model.vocab_size, engine.max_model_len
    engine.shutdown()
    prompts = PromptMaker(vocab_size, args.seed)
    end_s = args.num_prompts / args.request_rate
    found = []
    for i, item in enumerate(items):
        item = fit(scale_lengths(item, args.length_scale), max_model_len)
        is_small = i % (args.times + 1) == 0
        client = "small" if is_small else "large"
        found.append(Arrival(rng.uniform(0, end_s), client, prompts.token_ids(item), item.num_output or 16, is_small))
    return sorted(found, key=lambda arrival: arrival.at_s)


def _params(num_output: int) -> Any:
    from quire.sampling_params import RequestOutputKind, SamplingParams

    return SamplingParams(
        temperature=0, max_tokens=num_output, ignore_eos=True, output_kind=RequestOutputKind.FINAL_ONLY
    )


def _first_tokens(args: argparse.Namespace, arrivals: list[Arrival]) -> np.ndarray:
    """Seconds from when they were due to the first tokens of the small client's requests."""
    engine = _engine(args, args.step_target_ms)
    _warm_up(engine)
    due = {str(i): arrival for i, arrival in enumerate(arrivals)}
    waiting = list(due.items())[::-1]
    num_small = sum(arrival.is_small for arrival in arrivals)
    found: list[float] = []
    began_s = engine.clock()
    while len(found) < num_small:
        now_s = engine.clock() - began_s
        while waiting and waiting[-1][1].at_s <= now_s:
            request_id, arrival = waiting.pop()
            engine.add_request(request_id, arrival.prompt, _params(arrival.num_output), client=arrival.client)
        if not engine.has_unfinished:
            time.sleep(min(max(waiting[-1][1].at_s - now_s, 0), 0.001) if waiting else 0)
            continue
        for output in engine.step():
            if due[output.request_id].is_small:
                found.append(output.metrics.first_token_time - began_s - due[output.request_id].at_s)
    engine.shutdown()
    return np.asarray(found)


def _gaps(args: argparse.Namespace, step_target_ms: float | None) -> dict[str, float]:
    """Milliseconds between the others' tokens while a long prompt is read: p50, p99 and the longest; and how long it took."""
    engine = _engine(args, step_target_ms)
    _warm_up(engine)
    length = min(8 * args.max_num_batched_tokens, engine.max_model_len - 2)
    rng = random.Random(args.seed)
    prompt = [rng.randrange(10, engine.model.vocab_size) for _ in range(length)]
    for i in range(8):
        engine.add_request(str(i), prompt[i : i + 16], _params(engine.max_model_len - 20))
    for _ in range(30):
        engine.step()
    engine.add_request("long", prompt, _params(1))
    gaps: list[float] = []
    while engine.get_group("long") is not None:
        began_s = engine.clock()
        engine.step()
        gaps.append(1e3 * (engine.clock() - began_s))
    engine.shutdown()
    return {
        "p50": float(np.percentile(gaps, 50)),
        "p99": float(np.percentile(gaps, 99)),
        "longest": max(gaps),
        "until it was read": sum(gaps),
    }


def _warm_up(engine: Any) -> None:
    """The first steps are slower, and teach the engine what steps cost."""
    for i in range(4):
        engine.add_request(f"warm up {i}", [10 + i] * 200, _params(40))
        engine.step()
    while engine.has_unfinished:
        engine.step()
