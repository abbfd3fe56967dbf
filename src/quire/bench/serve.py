"""`quire bench serve`: requests, at their times, to an OpenAI-compatible server; latencies, throughput, and its KV cache.

The arrivals do not wait for answers (an open loop), unless --max-concurrency says so: a server that falls behind shows a
growing queue, as it would in life. Loads no torch, and knows a server by its HTTP alone.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import json
import os
import random
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from quire.bench.http import HttpError, Target
from quire.bench.load import INTERRUPTED, PATHS, Job, Load, Record, error_message, load_by
from quire.bench.report import add_report_arguments, report
from quire.bench.summary import Summary, parse_goodput
from quire.bench.timeline import Sample, check_can_plot, plot, sample, waste_ratio, watch
from quire.bench.traffic import (
    FIRST_TOKEN_ID,
    Item,
    Piece,
    PromptMaker,
    arrival_times,
    fit,
    items_of,
    read_items,
    scale_lengths,
    scale_to_fit,
    trace_times,
)
from quire.bench.workload import draw_lengths
from quire.errors import ConfigError

HELP = "load on a running server: latencies, throughput, goodput, its KV cache over time"

CHAT_MARGIN = 32  # tokens of context left to what a chat template writes around a prompt
FAILED, STOPPED = 1, 130
SELF_CHECKS = (  # streams, tokens of each, seconds between two tokens
    (64, 1000, 0.0),
    (64, 100, 0.02),
    (512, 100, 0.05),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    server = parser.add_argument_group("server")
    server.add_argument("--url", default="http://127.0.0.1:8000", help="of the server (default: %(default)s)")
    server.add_argument("--model", metavar="NAME", help="default: the first that the server lists")
    server.add_argument("--api-key", metavar="KEY", help="default: the environment's QUIRE_API_KEY, if there is one")
    server.add_argument("--endpoint", choices=sorted(PATHS), help="default: chat for texts, completions for lengths")
    server.add_argument("--timeout", type=_positive, default=600.0, metavar="S", help="for one answer (default: 600)")

    what = parser.add_argument_group(
        "workload",
        "CSV: prompt_tokens, output_tokens, and arrival_s for times. JSON: a list of [prompt tokens, output tokens]. "
        "JSONL: texts with --field, Mooncake's traces (hash_ids: prompts share what they shared), RAGPulse's (parts), or "
        "objects with a CSV's columns. Any other file is texts, one a line.",
    )
    what.add_argument(
        "--workload", metavar="FILE", help="without it, lengths are drawn: prompts 16-256, answers 16-128"
    )
    what.add_argument("--field", metavar="KEY", help="of the prompt's text in a JSON line")
    what.add_argument("--num-prompts", type=_count, metavar="N", help="only the first N (without --workload: 100)")
    what.add_argument(
        "--first-seconds", type=_positive, metavar="S", help="only what a trace has in its first S seconds"
    )
    what.add_argument(
        "--length-scale", default="1", metavar="X", help="multiplies lengths; auto: the longest request fits"
    )
    what.add_argument(
        "--max-model-len",
        type=_count,
        metavar="N",
        help="shrink requests that are longer (default: what the server says it takes)",
    )
    what.add_argument("--max-tokens", type=_count, default=128, metavar="N", help="answers to texts (default: 128)")
    what.add_argument(
        "--prompt-kind", choices=("ids", "text"), help="of prompts made from lengths: token ids, or words"
    )
    what.add_argument("--vocab-size", type=_count, default=500, metavar="N", help="ids are below this (default: 500)")
    what.add_argument("--temperature", type=float, default=0.0, metavar="X", help="default: 0")
    what.add_argument(
        "--ignore-eos",
        action=argparse.BooleanOptionalAction,
        help="answers go on to their length; the server must know this extra (default: where lengths are given)",
    )
    what.add_argument(
        "--stream",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="ask for streams; without, for answers in one piece, of which only the end is timed (default: yes)",
    )
    what.add_argument("--extra-body", type=_json_object, default={}, metavar="JSON", help="put into each request")

    when = parser.add_argument_group("arrivals")
    when.add_argument(
        "--request-rate",
        type=_positive,
        metavar="X",
        help="a second; inf: all at once (default: the workload's own times, inf where it tells none)",
    )
    when.add_argument(
        "--burstiness",
        type=_positive,
        default=1.0,
        metavar="X",
        help="of gamma-distributed gaps: 1 is Poisson, less is burstier (default: 1)",
    )
    when.add_argument("--time-scale", type=_positive, default=1.0, metavar="X", help="multiplies a trace's times")
    when.add_argument("--max-concurrency", type=_count, metavar="N", help="requests on their way at once, at most")
    when.add_argument(
        "--client-processes",
        type=_count,
        default=1,
        metavar="N",
        help="processes that send, for loads of which one would be the limit itself: see client_cpu_share (default: 1)",
    )
    when.add_argument("--seed", type=int, default=0, help="of prompts and gaps (default: 0)")

    told = parser.add_argument_group("results")
    told.add_argument("--goodput", nargs="+", default=[], metavar="NAME:MS", help="limits: ttft:500 tpot:50 e2e:8000")
    told.add_argument(
        "--num-warmups", type=int, default=1, metavar="N", help="short requests before it begins (default: 1)"
    )
    told.add_argument(
        "--offline-s", type=_positive, metavar="S", help="what the same requests take without HTTP: tells the ratio"
    )
    told.add_argument("--plot", metavar="FILE", help="draw /metrics over time: FILE.svg and FILE.png")
    told.add_argument("--records", metavar="FILE", help="write a JSON line for each request")
    told.add_argument(
        "--self-check", action="store_true", help="measure the client itself, against a server that does nothing"
    )
    add_report_arguments(parser)


def run(args: argparse.Namespace) -> int:
    if args.self_check:
        return _self_check(args)
    limits = parse_goodput(args.goodput)
    if args.plot:
        check_can_plot()
    allow_many_files()
    outcome = asyncio.run(_measure(args))
    summary = Summary(outcome.records, outcome.duration_s, limits)
    facts = {**outcome.plan.facts, **summary.facts()}
    facts["client_cpu_share"] = outcome.client_cpu_s / max(outcome.duration_s, 1e-9)
    if args.offline_s is not None:
        facts["times_offline"] = outcome.duration_s / args.offline_s
    if (waste := waste_ratio(outcome.samples)) is not None:
        facts["kv_internal_waste_share"] = waste
    if args.records:
        _write_records(args.records, outcome.records)
    if args.plot:
        times = [time_s for record in outcome.records for time_s in record.token_s]
        facts["plots"] = ", ".join(map(str, plot(args.plot, outcome.plan.title, outcome.samples, times)))
    timeline = {"timeline": [sample.as_dict() for sample in outcome.samples]}
    report(args, outcome.plan.title, summary.latency_rows(), data=timeline, **facts)
    if any(record.error == INTERRUPTED for record in outcome.records):
        return STOPPED
    return FAILED if summary.errors else 0


# -- what to send ------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Plan:
    """Everything that is decided before the first request is sent. `facts` are for the report."""

    title: str
    endpoint: str
    jobs: Sequence[Job]
    warm_up: Mapping[str, Any]
    facts: Mapping[str, Any]


def make_plan(args: argparse.Namespace, model: str, server_max_len: int | None) -> Plan:
    """From the options, and what the server says of itself. Raises ConfigError for options that contradict each other."""
    if args.vocab_size <= FIRST_TOKEN_ID:
        raise ConfigError(f"--vocab-size must be above {FIRST_TOKEN_ID}, where special tokens end")
    items = _choose_items(args)
    is_text = items[0].text is not None
    endpoint = args.endpoint or ("chat" if is_text else "completions")
    if args.max_concurrency is not None and args.max_concurrency < args.client_processes:
        raise ConfigError("--max-concurrency must be at least --client-processes")
    if args.prompt_kind == "ids" and (is_text or endpoint == "chat"):
        raise ConfigError("--prompt-kind ids needs a workload of lengths and --endpoint completions")
    as_ids = not is_text and endpoint == "completions" and args.prompt_kind != "text"
    limit = args.max_model_len or server_max_len
    if limit is not None and endpoint == "chat":
        limit = max(limit - CHAT_MARGIN, 2)
    items, facts = _scale(args.length_scale, items, limit)
    times, how = _choose_times(args, items)
    maker = PromptMaker(args.vocab_size, args.seed)
    ignore_eos = not is_text if args.ignore_eos is None else args.ignore_eos
    fixed = fixed_fields(model, args.temperature, stream=args.stream, ignore_eos=ignore_eos)

    def body_of(item: Item) -> dict[str, Any]:
        prompt = maker.token_ids(item) if as_ids else maker.text(item)
        what = {"prompt": prompt} if endpoint == "completions" else {"messages": [{"role": "user", "content": prompt}]}
        return {**fixed, **what, "max_tokens": item.num_output or args.max_tokens, **args.extra_body}

    # what is asked for can only be missed where an answer has no end of its own
    jobs = [
        Job(send_s, partial(body_of, item), item.num_output if ignore_eos else None)
        for send_s, item in zip(times, items)
    ]
    name = Path(args.workload).name if args.workload else "drawn lengths"
    short = Item((Piece("warm-up", 4),), text="Hello." if is_text else None, num_output=4)
    return Plan(f"{Path(model).name}: {len(jobs)} requests of {name}, {how}", endpoint, jobs, body_of(short), facts)


def fixed_fields(model: str, temperature: float, *, stream: bool, ignore_eos: bool) -> dict[str, Any]:
    """What all requests of a run say."""
    fixed: dict[str, Any] = {"model": model, "stream": stream, "temperature": temperature}
    fixed |= {"stream_options": {"include_usage": True}} if stream else {}
    return fixed | ({"ignore_eos": True} if ignore_eos else {})


def _choose_items(args: argparse.Namespace) -> list[Item]:
    if args.workload is None:
        return items_of(draw_lengths(args.num_prompts or 100, (16, 256), (16, 128), args.seed))
    items = read_items(args.workload, args.field)
    if args.first_seconds is not None:
        if trace_times(items, 1.0) is None:
            raise ConfigError("--first-seconds: this workload tells no times")
        end_s = (items[0].arrival_s or 0.0) + args.first_seconds
        items = [item for item in items if (item.arrival_s or 0.0) < end_s]
    return items[: args.num_prompts]


def _scale(option: str, items: Sequence[Item], limit: int | None) -> tuple[list[Item], dict[str, Any]]:
    if option == "auto":
        if limit is None:
            raise ConfigError("--length-scale auto needs --max-model-len: the server does not tell its own")
        scale = scale_to_fit(items, limit)
    else:
        scale = _number(option, "--length-scale")
    scaled = [scale_lengths(item, scale) for item in items]
    fitting = [fit(item, limit) for item in scaled] if limit is not None else scaled
    num_shrunk = sum(before is not after for before, after in zip(scaled, fitting))
    facts: dict[str, Any] = {} if scale == 1 else {"length_scale": scale}
    return fitting, facts | ({"requests_shrunk_to_fit": num_shrunk} if num_shrunk else {})


def _choose_times(args: argparse.Namespace, items: Sequence[Item]) -> tuple[list[float], str]:
    """When each is sent, and that in words."""
    if args.request_rate is None and (times := trace_times(items, args.time_scale)) is not None:
        scaled = "" if args.time_scale == 1 else f" times {args.time_scale:g}"
        return times, f"at the trace's times{scaled} (over {times[-1]:.0f} s)"
    rate = float("inf") if args.request_rate is None else args.request_rate
    times = arrival_times(len(items), rate, args.burstiness, random.Random(f"{args.seed}:gaps"))
    if rate == float("inf"):
        return times, "all at once"
    return times, f"{rate:g} a second" + ("" if args.burstiness == 1 else f", burstiness {args.burstiness:g}")


# -- the run -----------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Outcome:
    plan: Plan
    records: Sequence[Record]
    samples: Sequence[Sample]
    duration_s: float
    client_cpu_s: float


async def _measure(args: argparse.Namespace) -> Outcome:
    target = target_of(args)
    model, server_max_len = await ask_model(target, args.model)
    plan = make_plan(args, model, server_max_len)
    for _ in range(args.num_warmups):
        await _warm_up(target, plan, args.timeout, args.stream)
    with _progress(len(plan.jobs)) as advance:
        load = load_by(args.client_processes)(
            target, plan.endpoint, args.max_concurrency, args.timeout, lambda _: advance(), args.stream
        )
        samples: list[Sample] = []
        began_s = time.perf_counter()
        began_cpu_s = load.cpu_s

        def now_s() -> float:
            return time.perf_counter() - (load.began_s or began_s)

        watcher = asyncio.create_task(watch(target, samples, now_s, lambda: load.num_active))
        # Ctrl-C cancels this task: what has come back until then is told all the same
        with contextlib.suppress(asyncio.CancelledError):
            await load.run(plan.jobs)
        duration_s, cpu_s = now_s(), load.cpu_s - began_cpu_s
        watcher.cancel()
        samples.append(await sample(target, duration_s, load.num_active))
    return Outcome(plan, load.records, samples, duration_s, cpu_s)


def target_of(args: argparse.Namespace) -> Target:
    """By --url and --api-key."""
    return Target.from_url(args.url, args.api_key or os.environ.get("QUIRE_API_KEY"))


async def ask_model(target: Target, wanted: str | None) -> tuple[str, int | None]:
    """The model's name, and its most tokens if the server tells. Raises ConfigError if there is no such server or model."""
    try:
        async with asyncio.timeout(30), target.open("GET", "/v1/models") as response:
            body = await response.read()
            if response.status != 200:
                raise ConfigError(f"the server refuses /v1/models: HTTP {response.status}: {error_message(body)}")
            models = {model["id"]: model.get("max_model_len") for model in json.loads(body)["data"]}
    except (OSError, HttpError, TimeoutError) as error:
        raise ConfigError(f"no server answers at {target.host}:{target.port}: {error or 'timeout'}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"what answers at {target.host}:{target.port} is not an OpenAI-compatible server") from error
    name = next(iter(models), None) if wanted is None else wanted
    if name is None:
        raise ConfigError("the server lists no model: name one with --model")
    return name, models.get(name)


async def _warm_up(target: Target, plan: Plan, timeout_s: float, is_streamed: bool) -> None:
    load = Load(target, plan.endpoint, timeout_s=timeout_s, is_streamed=is_streamed)
    await load.run([Job(0.0, lambda: plan.warm_up)])
    error = load.records[0].error
    if error is not None:
        hint = " (a server that takes no token ids needs --prompt-kind text)" if " 400" in error else ""
        raise ConfigError(f"the warm-up request failed: {error}{hint}")


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Callable[[], None]]:
    """Shown on a terminal alone."""
    if not sys.stderr.isatty():
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("requests"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # few refreshes: what the bar takes, the load does not have
    with Progress(*columns, console=Console(stderr=True), transient=True, refresh_per_second=2) as progress:
        task = progress.add_task("", total=total)
        yield lambda: progress.advance(task)


def allow_many_files() -> None:
    """Each open connection is a file; the usual soft limit is 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _write_records(path: str, records: Sequence[Record]) -> None:
    def times(record: Record) -> dict[str, Any]:
        derived = {"ttft_s": record.ttft_s, "tpot_s": record.tpot_s, "e2e_s": record.e2e_s, "itl_s": record.gaps_s}
        return {**dataclasses.asdict(record), **derived}

    try:
        with open(path, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(times(record)) + "\n" for record in records)
    except OSError as error:
        raise ConfigError(f"cannot write the records {path}: {error.strerror}") from error


# -- the client itself -------------------------------------------------------------------------------------------------------
def _self_check(args: argparse.Namespace) -> int:
    command = [sys.executable, "-m", "quire.bench.loopback"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdin is not None and server.stdout is not None
        target = Target("127.0.0.1", int(server.stdout.readline()))
        rows = [_self_check_row(target, *check) for check in SELF_CHECKS]
        server.stdin.close()
    report(args, "what this client takes from a server that does nothing but stream", rows)
    return 0


def _self_check_row(target: Target, num_streams: int, num_tokens: int, pause_s: float) -> dict[str, Any]:
    load = Load(target, "completions")
    jobs = [Job(0.0, lambda: {"max_tokens": num_tokens, "pause_s": pause_s})] * num_streams
    began_s, began_cpu_s = time.perf_counter(), time.process_time()
    asyncio.run(load.run(jobs))
    seconds, cpu_s = time.perf_counter() - began_s, time.process_time() - began_cpu_s
    num_received = sum(len(record.token_s) for record in load.records)
    assert num_received == num_streams * num_tokens, Summary(load.records, seconds, {}).errors
    return {
        "server": f"a token each {pause_s * 1000:g} ms" if pause_s else "as fast as it can",
        "streams": num_streams,
        "tokens": num_received,
        "tokens/s": num_received / seconds,
        "client CPU, µs a token": 1e6 * cpu_s / num_received,
        "client CPU, share of a core": cpu_s / seconds,
    }


# -- values of options -------------------------------------------------------------------------------------------------------
def _number(text: str, name: str) -> float:
    try:
        return _positive(text)
    except argparse.ArgumentTypeError as error:
        raise ConfigError(f"{name}: {error}") from error


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object")
    return value
