"""`quire bench long-prompt`: some requests decode, a long prompt arrives: do the others' tokens keep the latency target?

Times between two tokens of each of the others, before the prompt arrives, until its first token is out, and afterwards; and how
fast it is read meanwhile, beside the floor of the steps that read it (`quire.bench.floors`). --step-target-ms is the target:
a step with others in it reads as much of the prompt as fits; without one, the step's token budget.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from quire.bench.report import add_report_arguments, report
from quire.bench.steps import share
from quire.bench.subject import Subject, add_model_arguments, chosen_config, without_prefix_cache
from quire.bench.summary import percentile
from quire.bench.workload import draw_prompts
from quire.errors import ConfigError
from quire.sampling_params import RequestOutputKind, SamplingParams

HELP = "others' token gaps while a long prompt is read in chunks, beside the latency target"
PHASES = ("before", "during", "after")
LONG = "long"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("workload")
    what.add_argument("--prompt-len", type=int, default=128_000, help="tokens of the long prompt (128,000)")
    what.add_argument("--num-requests", type=int, default=32, help="others, that decode (32)")
    what.add_argument("--input-len", type=int, default=512, help="tokens of their prompts (512)")
    what.add_argument("--steps", type=int, default=100, help="tokens of each before the prompt, and after it (100)")
    what.add_argument("--temperature", type=float, default=0.0)
    add_report_arguments(parser)
    add_model_arguments(what, parser)


def run(args: argparse.Namespace) -> int:
    if min(args.prompt_len, args.num_requests, args.input_len, args.steps) < 1:
        raise ConfigError("--prompt-len, --num-requests, --input-len and --steps must be positive")
    with chosen_config(args, args.prompt_len + 64) as config:
        if config.max_num_seqs <= args.num_requests:
            raise ConfigError(f"--max-num-seqs must be above {args.num_requests}, the others'")
        subject = Subject(without_prefix_cache(config))
        measure(
            subject, args, min(args.prompt_len, 2 * subject.engine.step_token_budget)
        )  # warms up; the engine learns
        found = measure(subject, args, args.prompt_len)
        floor = subject.watch.floor(found.reading(subject.watch.steps))
        facts = subject.facts
        subject.shutdown()
    rows = [gap_row(phase, found.gaps_ms[phase], config.step_target_ms) for phase in PHASES]
    title = f"{args.shape or args.model}: a prompt of {args.prompt_len:,} tokens beside {args.num_requests} that decode"
    facts |= {
        "step target ms": config.step_target_ms,
        "prompt read s": found.read_s,
        "prompt tokens/s": args.prompt_len / found.read_s,
        "steps in which it was read": found.last_call - found.first_call,
        "floor s of the steps that read it": floor.seconds,
        "floor, share reached": share(floor.seconds, found.read_s),
    }
    report(args, title, rows, data={"gaps ms": found.gaps_ms}, **facts)
    return 0


@dataclass
class Trial:
    """Gaps by phase; seconds from the prompt's arrival to its first token, and the calls of `Engine.step` in between."""

    gaps_ms: dict[str, list[float]] = field(default_factory=lambda: {phase: [] for phase in PHASES})
    read_s: float = 0.0
    first_call: int = 0
    last_call: int = 0

    def reading(self, steps: Sequence[Any]) -> list[Any]:
        """The steps that were handed over in those calls."""
        return [step for step in steps if self.first_call <= step.call < self.last_call]


def measure(subject: Subject, args: argparse.Namespace, prompt_len: int) -> Trial:
    engine, watch, trial = subject.engine, subject.watch, Trial()
    others = draw_prompts([(args.input_len, 1)] * args.num_requests, engine.model.vocab_size)
    (long,) = draw_prompts([(prompt_len, 1)], engine.model.vocab_size, seed=1)
    watch.reset()
    for i, prompt in enumerate(others):
        num_output = engine.max_model_len - args.input_len
        engine.add_request(str(i), {"prompt_token_ids": prompt}, _params(num_output, args.temperature))
    last_s: dict[str, float] = {}

    def step(phase: str | None) -> bool:
        """Whether the long prompt's token came."""
        outputs = engine.step()
        now_s = time.perf_counter()
        for output in outputs:
            if output.request_id != LONG and output.outputs[0].token_ids:
                if phase is not None and output.request_id in last_s:
                    trial.gaps_ms[phase].append(1e3 * (now_s - last_s[output.request_id]))
                last_s[output.request_id] = now_s
        return any(output.request_id == LONG for output in outputs)

    while len(last_s) < len(others):
        step(None)
    for _ in range(args.steps):
        step("before")
    trial.first_call, began_s = watch.num_calls, time.perf_counter()
    engine.add_request(LONG, {"prompt_token_ids": long}, _params(1, args.temperature))
    while not step("during"):
        assert engine.get_group(LONG) is not None, "the long prompt ended without a token"
    trial.read_s, trial.last_call = time.perf_counter() - began_s, watch.num_calls
    for _ in range(args.steps):
        step("after")
    for request_id in last_s:
        engine.abort(request_id)
    while engine.has_unfinished:
        engine.step()
    return trial


def _params(num_output: int, temperature: float) -> SamplingParams:
    return SamplingParams(
        temperature=temperature, max_tokens=num_output, ignore_eos=True, output_kind=RequestOutputKind.DELTA
    )


def gap_row(phase: str, gaps_ms: Sequence[float], target_ms: float | None) -> Mapping[str, Any]:
    """Numbers of one phase; the share of gaps within the target, if there is one."""
    row = {"the others' tokens": phase, "gaps": len(gaps_ms)}
    for name, percent in (("median ms", 50), ("p99 ms", 99), ("longest ms", 100)):
        row[name] = percentile(gaps_ms, percent) if gaps_ms else None
    within = None
    if target_ms is not None and gaps_ms:
        within = sum(gap <= target_ms for gap in gaps_ms) / len(gaps_ms)
    return {**row, "within the target": within}
