"""`quire bench rates`: a trace's requests at rising rates, until the median normalized latency leaves its plateau.

Normalized latency is a request's end-to-end latency divided by the length of its answer (Kwon et al., SOSP 2023, section 6.1,
whose figure 12 this is; there it is the mean, here both). The plateau is the lowest median so far; a rate whose median is
--beyond times as high is the last. Each rate sends as many of the trace's requests as come in --seconds, from the trace's
beginning, and waits for all of them. The engine runs in this process, without HTTP, and takes requests between steps, when
they are due; with --url, a running server answers them, in streams.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from quire.bench.http import Target
from quire.bench.load import Job, load_by
from quire.bench.picture import draw_curve, write_text
from quire.bench.report import add_report_arguments, report
from quire.bench.serve import allow_many_files, ask_model, fixed_fields, target_of
from quire.bench.subject import Subject, add_model_arguments, chosen_config, without_prefix_cache
from quire.bench.summary import percentile
from quire.bench.traffic import (
    FIRST_TOKEN_ID,
    Item,
    PromptMaker,
    arrival_times,
    fit,
    items_of,
    read_items,
    scale_lengths,
    trace_times,
)
from quire.bench.workload import draw_lengths
from quire.errors import ConfigError, QuireError
from quire.sampling_params import RequestOutputKind, SamplingParams

HELP = "a trace's requests at rising rates, until latency leaves its plateau: the curve"
NUM_DRAWN = 4096


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("workload")
    what.add_argument(
        "--workload", metavar="FILE", help="a trace, as for bench serve; without it, lengths are drawn: 16-256, 16-128"
    )
    what.add_argument("--length-scale", type=float, default=1.0, metavar="X", help="multiplies lengths")
    what.add_argument(
        "--max-tokens", type=int, default=128, help="of answers whose length the trace doesn't tell (128)"
    )
    what.add_argument("--temperature", type=float, default=0.0)
    what.add_argument(
        "--arrivals", choices=["poisson", "trace"], default="poisson",
        help="gaps drawn, or the trace's own times, scaled to the rate (default: poisson)",
    )  # fmt: skip
    when = parser.add_argument_group("rates")
    when.add_argument("--first-rate", type=float, default=1.0, metavar="X", help="requests a second (1)")
    when.add_argument("--factor", type=float, default=1.5, metavar="X", help="from one rate to the next (1.5)")
    when.add_argument("--max-rates", type=int, default=16, metavar="N", help="at most so many (16)")
    when.add_argument(
        "--seconds", type=float, default=30.0, metavar="S", help="in which requests come, at each rate (30)"
    )
    when.add_argument("--beyond", type=float, default=3.0, metavar="X", help="times the plateau at which it ends (3)")
    server = parser.add_argument_group("server", "instead of an engine in this process")
    server.add_argument("--url", help="of a running OpenAI-compatible server, best without a prefix cache")
    server.add_argument("--api-key", metavar="KEY", help="default: the environment's QUIRE_API_KEY, if there is one")
    server.add_argument(
        "--vocab-size", type=int, default=500, metavar="N", help="its prompts' ids are below this (500)"
    )
    server.add_argument("--client-processes", type=int, default=1, metavar="N", help="processes that send (1)")
    parser.add_argument("--svg", metavar="FILE", help="draw the curve")
    add_report_arguments(parser)
    add_model_arguments(what, parser)


def run(args: argparse.Namespace) -> int:
    if min(args.first_rate, args.seconds, args.length_scale) <= 0 or args.factor <= 1 or args.beyond <= 1:
        raise ConfigError("--first-rate, --seconds and --length-scale must be above 0, --factor and --beyond above 1")
    if min(args.max_rates, args.max_tokens) < 1:
        raise ConfigError("--max-rates and --max-tokens must be positive")
    items = read_items(args.workload) if args.workload else items_of(draw_lengths(NUM_DRAWN, (16, 256), (16, 128)))
    if any(item.text is not None for item in items):
        raise ConfigError(f"{args.workload} holds texts; what is needed is a trace of lengths")
    if args.arrivals == "trace" and trace_times(items, 1.0) is None:
        raise ConfigError(f"--arrivals trace: {args.workload or 'what is drawn'} tells no times")
    items = [scale_lengths(item, args.length_scale) for item in items]
    rows: list[dict[str, Any]] = []
    with _over_http(args) if args.url else _in_process(args, items) as answering:
        items = [fit(item, answering.max_model_len) for item in items]
        plateau, rate = float("inf"), args.first_rate
        answering.answer(items[:4], [0.0] * len(items[:4]))  # warms up
        for _ in range(args.max_rates):
            part, times = choose(items, rate, args)
            rows.append(row := rate_row(rate, answering.answer(part, times)))
            median = row["median s/token"]
            plateau = min(plateau, median)
            if median > args.beyond * plateau:
                break
            rate *= args.factor
        facts = answering.facts
    name = Path(args.workload).name if args.workload else "drawn lengths"
    title = f"{answering.name}: {name} at rising rates{', over HTTP' if args.url else ''}"
    facts |= {
        "arrivals": args.arrivals,
        "plateau, s/token": plateau,
        f"last rate within {args.beyond:g} times the plateau": max(
            (row["requests/s"] for row in rows if row["median s/token"] <= args.beyond * plateau), default=None
        ),
    }
    if args.svg:
        write_text(args.svg, curve(title, facts["device"], rows, args.beyond, plateau, args.seconds))
    report(args, title, rows, **facts)
    return 0


def choose(items: Sequence[Item], rate: float, args: argparse.Namespace) -> tuple[list[Item], list[float]]:
    """The first requests of the trace (again from its beginning if it is short), as many as come at this rate, and when."""
    count = max(round(rate * args.seconds), 1)
    part = [items[i % len(items)] for i in range(count)]
    if args.arrivals == "poisson":
        return part, arrival_times(count, rate, 1.0, random.Random(f"{args.seed}:gaps"))
    part = part[: len(items)]
    times = trace_times(part, 1.0)
    assert times is not None
    scale = len(part) / rate / max(times[-1], 1e-9)
    return part, [time_s * scale for time_s in times]


@dataclass(frozen=True, slots=True)
class Answered:
    """One request: seconds from when it was due to its end, and to its first token, and tokens of its answer."""

    end_s: float
    first_s: float
    num_output: int


class Answering(Protocol):
    """Who answers. Facts are for the report, "device" among them; name: the model's."""

    name: str
    max_model_len: int

    @property
    def facts(self) -> dict[str, Any]: ...

    def answer(self, items: Sequence[Item], times: Sequence[float]) -> list[Answered]:
        """Answers all, each from its time on."""
        ...


@contextmanager
def _in_process(args: argparse.Namespace, items: Sequence[Item]) -> Iterator[Answering]:
    longest = max(item.num_prompt + (item.num_output or args.max_tokens) for item in items)
    with chosen_config(args, longest) as config:
        subject = Subject(without_prefix_cache(config))
        yield InProcess(args, subject)
        subject.shutdown()


class InProcess:
    """An engine in this process, which takes requests between steps."""

    def __init__(self, args: argparse.Namespace, subject: Subject) -> None:
        self._args, self._subject = args, subject
        self.name = args.shape or args.model
        self.max_model_len = subject.engine.max_model_len

    @property
    def facts(self) -> dict[str, Any]:
        return self._subject.facts

    def answer(self, items: Sequence[Item], times: Sequence[float]) -> list[Answered]:
        args, engine = self._args, self._subject.engine
        clock = engine.clock
        found: list[Answered] = []
        prompts = PromptMaker(engine.model.vocab_size, args.seed)
        waiting = [
            (str(i), prompts.token_ids(item), _params(item.num_output or args.max_tokens, args.temperature))
            for i, item in enumerate(items)
        ][::-1]
        engine.kv.pool.drop_cache()
        self._subject.watch.reset()
        began_s = clock()
        while len(found) < len(items):
            while waiting and times[int(waiting[-1][0])] <= clock() - began_s:
                request_id, prompt, params = waiting.pop()
                engine.add_request(request_id, {"prompt_token_ids": prompt}, params)
            if not engine.has_unfinished:
                time.sleep(min(max(times[int(waiting[-1][0])] - (clock() - began_s), 0.0), 0.001))
                continue
            for output in engine.step():
                due_s = began_s + times[int(output.request_id)]
                metrics: Any = output.metrics
                found.append(
                    Answered(
                        metrics.finished_time - due_s,
                        metrics.first_token_time - due_s,
                        len(output.outputs[0].token_ids),
                    )
                )
        return found


def _params(num_output: int, temperature: float) -> SamplingParams:
    return SamplingParams(
        temperature=temperature, max_tokens=num_output, ignore_eos=True, output_kind=RequestOutputKind.FINAL_ONLY
    )


@contextmanager
def _over_http(args: argparse.Namespace) -> Iterator[Answering]:
    if args.shape or args.model:
        raise ConfigError("--url: the server has its model; leave --shape and --model out")
    if args.client_processes < 1 or args.vocab_size <= FIRST_TOKEN_ID:
        raise ConfigError(f"--client-processes must be positive, --vocab-size above {FIRST_TOKEN_ID}")
    allow_many_files()
    target = target_of(args)
    model, max_model_len = asyncio.run(ask_model(target, None))
    if max_model_len is None:
        raise ConfigError(f"{args.url} does not tell how many tokens its model takes")
    yield OverHttp(args, target, model, max_model_len)


class OverHttp:
    """A running server. What it answers with is streamed, and its prompts are token ids that come at no other rate."""

    def __init__(self, args: argparse.Namespace, target: Target, model: str, max_model_len: int) -> None:
        self._args, self._target, self._model = args, target, model
        self._runs, self._most_cpu = 0, 0.0
        self.name = Path(model).name
        self.max_model_len = max_model_len

    @property
    def facts(self) -> dict[str, Any]:
        return {"device": self._args.url, "client CPU, most of a core at a rate": self._most_cpu}

    def answer(self, items: Sequence[Item], times: Sequence[float]) -> list[Answered]:
        args = self._args
        self._runs += 1
        prompts = PromptMaker(args.vocab_size, args.seed + self._runs)
        fixed = fixed_fields(self._model, args.temperature, stream=True, ignore_eos=True)

        def body_of(item: Item) -> dict[str, Any]:
            return {**fixed, "prompt": prompts.token_ids(item), "max_tokens": item.num_output or args.max_tokens}

        load = load_by(args.client_processes)(self._target, "completions")
        began_s, began_cpu_s = time.perf_counter(), load.cpu_s
        asyncio.run(load.run([Job(due_s, partial(body_of, item)) for due_s, item in zip(times, items)]))
        share = (load.cpu_s - began_cpu_s) / (time.perf_counter() - began_s)
        self._most_cpu = max(self._most_cpu, share)
        errors = [record.error for record in load.records if record.error is not None]
        if errors:
            raise QuireError(f"{len(errors)} of {len(items)} requests failed: {errors[0]}")
        return [
            Answered(record.token_s[-1] - due_s, record.token_s[0] - due_s, record.num_output)
            for record, due_s in zip(load.records, times, strict=True)
        ]


def rate_row(rate: float, answered: Sequence[Answered]) -> dict[str, Any]:
    normalized = [one.end_s / one.num_output for one in answered]
    return {
        "requests/s": rate,
        "requests": len(answered),
        "median s/token": percentile(normalized, 50),
        "mean s/token": sum(normalized) / len(normalized),
        "p90 s/token": percentile(normalized, 90),
        "first token ms, median": 1e3 * percentile([one.first_s for one in answered], 50),
    }


def curve(
    title: str, device: str, rows: Sequence[dict[str, Any]], beyond: float, plateau: float, seconds: float
) -> str:
    series = [
        (name, [(row["requests/s"], row[f"{name} s/token"]) for row in rows]) for name in ("median", "mean")
    ]  # fmt: skip
    told = f"{device}; at each rate the requests of {seconds:g} s; plateau {plateau * 1e3:.3g} ms a token"
    level = (f"{beyond:g} times the plateau", beyond * plateau)
    return draw_curve(title, told, "requests a second", "normalized latency, s/token", series, level)
