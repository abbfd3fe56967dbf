"""`quire bench decode`: time per decoded token of a few requests, with CUDA graphs and without, and where a step's time goes.

A step's time is split three ways, by a profile of some steps in the middle: *kernels* is when the device worked, *gaps* when it
had nothing to do, and *host* is what the host spent on a step beside waiting, most of it while the device works. Profiling
slows the host down: times per token come from runs without it.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from quire.bench.report import add_report_arguments, report
from quire.bench.shapes import SHAPES, write_shape
from quire.bench.workload import draw_prompts
from quire.config import EngineConfig
from quire.errors import ConfigError

HELP = "time per decoded token of a few requests, graphs against eager, and where a step's time goes"
PROFILED_STEPS = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from quire.cli import add_engine_arguments

    what = parser.add_argument_group("workload")
    what.add_argument("--shape", choices=sorted(SHAPES), help="random weights of this shape instead of --model")
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
    what.add_argument("--no-profile", action="store_true", help="do not split a step's time")
    add_report_arguments(parser)
    add_engine_arguments(parser, model_required=False)


def run(args: argparse.Namespace) -> int:
    from quire.cli import engine_config_from

    if bool(args.shape) == bool(args.model):
        raise ConfigError("give either --shape or --model")
    if min(args.num_requests, args.input_len, args.repeat) < 1 or args.output_len < 2:
        raise ConfigError("--num-requests, --input-len and --repeat must be positive, --output-len at least 2")
    with tempfile.TemporaryDirectory() as directory:
        options: dict[str, Any] = {"skip_tokenizer_init": True}
        if args.shape:
            options |= {"model": str(write_shape(args.shape, Path(directory))), "load_format": "dummy"}
        if args.max_model_len is None:
            options["max_model_len"] = args.input_len + args.output_len
        config = engine_config_from(args, **options)
        switch_off(args.without)
        bench = DecodeBench(config, args)
        modes = ["graphs", "eager"] if args.mode == "both" else [args.mode]
        rows = [bench.measure(mode) for mode in modes]
        kernels = bench.kernel_rows
        bench.shutdown()
    title = f"{args.shape or args.model}: {args.num_requests} x ({args.input_len} in, {args.output_len} out)"
    report(args, title, rows, dtype=config.dtype, temperature=args.temperature, **bench.facts)
    if kernels and args.json != "-":
        args.json = None
        report(args, f"kernels of a step ({modes[0]}), by time", kernels[:14])
    return 0


def switch_off(parts: list[str]) -> None:
    """For the rest of this process, and before an engine is made, which captures its graphs."""
    if "few" in parts:
        from quire.kernels.triton.fused import TritonFewTokens

        TritonFewTokens.takes = lambda self, x_TH: False  # type: ignore[method-assign]
    if "pdl" in parts:
        from quire.kernels.triton import dependent

        dependent.options = lambda device: {"PDL": False}


class DecodeBench:
    """One engine, whose graphs are switched off and on between runs: weights are loaded once."""

    def __init__(self, config: EngineConfig, args: argparse.Namespace) -> None:
        from quire.engine.engine import Engine
        from quire.sampling_params import SamplingParams

        began = time.perf_counter()
        self.args = args
        self.engine = Engine(dataclasses.replace(config, enforce_eager=False, enable_prefix_caching=False))
        device = self.engine.executor.device_report
        self.facts = {
            "device": device.device,
            "attention": device.attention_backend,
            "kernels": device.kernels,
            "start s": time.perf_counter() - began,
        }
        self.kernel_rows: list[dict[str, Any]] = []
        self._runner = self.engine.executor.worker.runner  # type: ignore[attr-defined]
        self._graphs = self._runner.graphs
        lengths = [(args.input_len, args.output_len)] * args.num_requests
        self._prompts = draw_prompts(lengths, self.engine.model.vocab_size)
        self._params = SamplingParams(temperature=args.temperature, max_tokens=args.output_len, ignore_eos=True)
        self._num_runs = 0

    def shutdown(self) -> None:
        self.engine.shutdown()

    def measure(self, mode: str) -> dict[str, Any]:
        self._runner.graphs = self._graphs if mode == "graphs" else None
        began = time.perf_counter()
        self._generate()
        warm_up_s = time.perf_counter() - began
        runs = [self._generate() for _ in range(self.args.repeat)]
        first_s, token_s, host_s = (statistics.median(column) for column in zip(*runs))
        row: dict[str, Any] = {
            "mode": mode,
            "ms per token": 1e3 * token_s,
            "tokens/s": self.args.num_requests / token_s,
            "first token ms": 1e3 * first_s,
            "host ms/step": 1e3 * host_s,
            "first run s": warm_up_s,
        }
        if not self.args.no_profile:
            row |= self._profile(keep=not self.kernel_rows)
        return row

    def _generate(self, profile_at: int | None = None) -> tuple[float, float, float]:
        """(seconds to everybody's first token, per token from there on, host's share of those), of one run."""
        engine, waiting = self.engine, Waiting()
        self._num_runs += 1
        began = time.perf_counter()
        for i, prompt in enumerate(self._prompts):
            engine.add_request(f"{self._num_runs}-{i}", {"prompt_token_ids": prompt}, self._params)
        started: set[str] = set()
        first_s, steps, waited_at_first = 0.0, 0, 0.0
        with waiting:
            while engine.has_unfinished:
                outputs = engine.step()
                if len(started) < len(self._prompts):
                    started.update(output.request_id for output in outputs if output.outputs[0].token_ids)
                    if len(started) == len(self._prompts):
                        first_s, waited_at_first = time.perf_counter() - began, waiting.seconds
                else:
                    steps += 1
        decode_s = time.perf_counter() - began - first_s
        host_s = decode_s - (waiting.seconds - waited_at_first)
        return first_s, decode_s / (self.args.output_len - 1), host_s / max(steps, 1)

    def _profile(self, keep: bool) -> dict[str, Any]:
        """Kernels and gaps of some steps, in ms per step. Leaves them out where there is no device to profile."""
        import torch
        from torch.profiler import ProfilerActivity, profile

        if not torch.cuda.is_available() or self.args.output_len < 2 * PROFILED_STEPS:
            return {}
        engine = self.engine
        self._num_runs += 1
        for i, prompt in enumerate(self._prompts):
            engine.add_request(f"{self._num_runs}-{i}", {"prompt_token_ids": prompt}, self._params)
        started: set[str] = set()
        while len(started) < len(self._prompts):
            started.update(output.request_id for output in engine.step() if output.outputs[0].token_ids)
        for _ in range(4):
            engine.step()
        with profile(activities=[ProfilerActivity.CUDA]) as found:
            for _ in range(PROFILED_STEPS):
                engine.step()
            torch.cuda.synchronize()
        while engine.has_unfinished:
            engine.step()
        spans: list[tuple[float, float]] = []
        by_name: Counter[str] = Counter()
        counts: Counter[str] = Counter()
        for event in found.events():
            if event.device_type == torch.autograd.DeviceType.CUDA:
                start, end = event.time_range.start, event.time_range.end
                spans.append((start, end))
                by_name[event.name] += end - start
                counts[event.name] += 1
        if not spans:
            return {"kernels ms/step": None, "gaps ms/step": None, "launched/step": None}
        spans.sort()
        busy, reached = 0.0, spans[0][0]
        for start, end in spans:
            busy += max(0.0, end - max(start, reached))
            reached = max(reached, end)
        if keep:
            self.kernel_rows = [
                {
                    "kernel": name[:70],
                    "us/step": us / PROFILED_STEPS,
                    "launches/step": counts[name] / PROFILED_STEPS,
                    "us each": us / counts[name],
                }
                for name, us in by_name.most_common()
            ]
        return {
            "kernels ms/step": busy / PROFILED_STEPS / 1e3,
            "gaps ms/step": (reached - spans[0][0] - busy) / PROFILED_STEPS / 1e3,
            "launched/step": len(spans) / PROFILED_STEPS,
        }


class Waiting:
    """Adds up the time in which the host waits for a step's result, while it is entered."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __enter__(self) -> Waiting:
        from quire.sampling.transfer import ToHost

        original = self._original = ToHost.wait

        def wait(copies: ToHost) -> Any:
            began = time.perf_counter()
            result = original(copies)
            self.seconds += time.perf_counter() - began
            return result

        ToHost.wait = wait  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        from quire.sampling.transfer import ToHost

        ToHost.wait = self._original  # type: ignore[method-assign]
