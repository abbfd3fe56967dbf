"""Where a step's time goes: kernels by name, gaps in which the device had nothing to do, and what the host did meanwhile.

Some steps of a run are recorded with torch's profiler. On a GPU each step begins with a marker, an empty kernel, by which what
the device did is told apart; on a CPU "kernels" are the operations that the layers call, and gaps what Python takes between
them. Where kernels overlap (programmatic dependent launch starts one before the one before it has ended), the time counts for
the one that began first, so that kernels and gaps add up to the step. Recording slows the host down: the host's share is
better taken from a run without it.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from quire.bench.steps import WatchedStep

WINDOW = 8  # steps that are recorded of each way in which steps ran
MARKER = "spin_kernel"

KINDS = {
    "linear layers": r"gemm|gemv|nvjet|cutlass|cublas|splitk|^_?linear|^_multiply_add|^_matrix|^aten::(linear|mm|addmm|matmul)",
    "attention": r"^_attend|^_merge|attention|flash|fmha",
    "norm, rotary, activation": r"norm|^_heads_kernel|silu|rotary|write_kv",
    "sampling": r"^_(piece|bound|count|gather|choose|logprob)_kernel|softmax|argmax|sort|topk|log_?sum|multinomial",
    "copies": r"memcpy|memset|^_?copy|copy_blocks|::copy_|^aten::(to|_to_copy)$",
    "other": r"",
}
"""Of kernels, by their names: the first that fits."""


def kind_of(kernel: str) -> str:
    return next(kind for kind, pattern in KINDS.items() if re.search(pattern, kernel, re.IGNORECASE))


@dataclass(frozen=True, slots=True)
class Span:
    """Something that took from `start_us` to `end_us`: a kernel, or a phase of the host's work."""

    name: str
    start_us: float
    end_us: float


@dataclass(slots=True)
class RecordedStep:
    """One step on the device, and what the host did from its start to its end; spans in the order of their starts."""

    way: str
    num_tokens: int
    num_sequences: int
    start_us: float
    end_us: float
    kernels: list[Span]
    host: list[Span] = field(default_factory=list)

    @property
    def duration_us(self) -> float:
        return self.end_us - self.start_us

    @property
    def busy_us(self) -> float:
        return sum(self.exclusive_us())

    @property
    def gaps_us(self) -> float:
        return self.duration_us - self.busy_us

    def exclusive_us(self) -> list[float]:
        """Of each kernel, what no kernel before it covers."""
        found, reached = [], self.start_us
        for span in self.kernels:
            found.append(max(0.0, span.end_us - max(span.start_us, reached)))
            reached = max(reached, span.end_us)
        return found

    def gaps(self) -> list[Span]:
        """When the device had nothing to do."""
        found, reached = [], self.start_us
        for span in [*self.kernels, Span("end", self.end_us, self.end_us)]:
            if span.start_us > reached:
                found.append(Span("gap", reached, span.start_us))
            reached = max(reached, span.end_us)
        return found


# -- options -----------------------------------------------------------------------------------------------------------------
def add_profile_arguments(parser: argparse.ArgumentParser, *, default: bool) -> None:
    group = parser.add_argument_group("profile")
    group.add_argument(
        "--profile",
        action=argparse.BooleanOptionalAction,
        default=default,
        help="one more run, to split some of its steps into kernels by name, gaps and host",
    )
    group.add_argument("--trace", metavar="FILE", help="write the recorded steps for chrome://tracing or Perfetto")
    group.add_argument("--svg", metavar="FILE", help="draw a typical step of the way that most of the time went to")


def is_wanted(args: argparse.Namespace) -> bool:
    return bool(args.profile or args.trace or args.svg)


# -- recording ---------------------------------------------------------------------------------------------------------------
def choose_windows(steps: Sequence[WatchedStep], count: int = WINDOW) -> list[range]:
    """Calls of `Engine.step` to record: of each way, `count` (or all) in the middle of its longest row.

    calls  0 1 2 3 4 5 6 7 8 9        ways m: mixed, d: decode; count 2
    ways   m m m m d d d d d d   ->   calls 1 to 2, and 6 to 7
    """
    longest: dict[str, tuple[int, int]] = {}  # way -> (first, end) in steps
    first = 0
    for end in range(1, len(steps) + 1):
        if end == len(steps) or steps[end].way != steps[first].way:
            known = longest.get(steps[first].way, (0, 0))
            if end - first > known[1] - known[0]:
                longest[steps[first].way] = (first, end)
            first = end
    windows: list[range] = []
    for first, end in sorted(longest.values()):
        begin = first + max(0, end - first - count) // 2
        calls = range(steps[begin].call, steps[min(begin + count, end) - 1].call + 1)
        if windows and calls.start <= windows[-1].stop:
            windows[-1] = range(windows[-1].start, max(calls.stop, windows[-1].stop))
        else:
            windows.append(calls)
    return windows


def record(engine: Any, windows: Sequence[range], run: Callable[[], object]) -> list[RecordedStep]:
    """Calls `run`, which drives `engine`, and records the calls of its `step` whose numbers, from 0, are in `windows` (in
    order, apart). Empty where the profiler is not allowed to see the device."""
    found: list[RecordedStep] = []
    step, call, open_window = engine.step, 0, contextlib.ExitStack()

    def watched() -> Any:
        nonlocal call
        if any(call == window.start for window in windows):
            open_window.enter_context(_Recording(engine, found))
        try:
            return step()
        finally:
            call += 1
            if any(call == window.stop for window in windows):
                open_window.close()

    engine.step = watched
    try:
        with open_window:
            run()
    finally:
        engine.step = step
    return found


@dataclass(frozen=True, slots=True)
class _Submitted:
    way: str
    num_tokens: int
    num_sequences: int
    start_us: float
    end_us: float


class _Recording:
    """Records the steps that the engine hands over while it is entered, and adds them to `found` at its end."""

    def __init__(self, engine: Any, found: list[RecordedStep]) -> None:
        self._engine = engine
        self._found = found
        self._on_gpu = engine.executor.device_report.device.startswith("cuda")
        self._submitted: list[_Submitted] = []
        self._host: list[Span] = []

    def __enter__(self) -> _Recording:
        import torch
        from torch.profiler import ProfilerActivity, profile

        engine, self._undo = self._engine, contextlib.ExitStack()
        runner = engine.executor.worker.runner
        submit = engine.executor.submit

        def marked(step: Any) -> Any:
            if self._on_gpu and len(step.rows):
                torch.cuda._sleep(1)  # type: ignore[no-untyped-call]
            start_us = _now_us()
            try:
                return submit(step)
            finally:
                if len(step.rows):
                    self._submitted.append(
                        _Submitted(runner.way.value, step.total_num_tokens, len(step.rows), start_us, _now_us())
                    )

        launch = self._phase("launch", marked) if self._on_gpu else marked  # on a CPU a step runs in it
        _replace(self._undo, engine.executor, "submit", launch)
        _replace(self._undo, engine.scheduler, "schedule", self._phase("plan", engine.scheduler.schedule))
        _replace(self._undo, engine.scheduler, "update", self._phase("outputs", engine.scheduler.update))
        _replace(self._undo, engine, "_process", self._phase("outputs", engine._process))
        _replace(self._undo, torch.cuda.Event, "synchronize", self._phase("wait", torch.cuda.Event.synchronize))
        if self._on_gpu:
            # else the profiler lets go of CUPTI at the end of a recording, and taking it again can crash where CUDA graphs live
            os.environ.setdefault("TEARDOWN_CUPTI", "0")
            torch.cuda.synchronize()
        else:
            _name_operations(self._undo, runner)
        what = ProfilerActivity.CUDA if self._on_gpu else ProfilerActivity.CPU
        self._profile: Any = profile(activities=[what])
        self._profile.__enter__()  # type: ignore[no-untyped-call]
        return self

    def _phase(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any) -> Any:
            start_us = _now_us()
            try:
                return function(*args)
            finally:
                self._host.append(Span(name, start_us, _now_us()))

        return timed

    def __exit__(self, *raised: Any) -> None:
        import torch

        self._undo.close()
        if self._on_gpu:
            torch.cuda.synchronize()
        self._profile.__exit__(*raised)
        if raised[0] is None:
            self._found += self._steps()

    def _steps(self) -> list[RecordedStep]:
        """Times relative to the recording's start."""
        results = self._profile.profiler.kineto_results
        offset_us = results.trace_start_ns() / 1e3
        host = sorted(
            (replace(span, start_us=span.start_us - offset_us, end_us=span.end_us - offset_us) for span in self._host),
            key=lambda span: span.start_us,
        )
        events = self._profile.events() or []
        if self._on_gpu:
            steps = split_by_markers(_on_device(events), self._submitted)
        else:
            steps = _within(_top_level(events), self._submitted, offset_us)
        for step in steps:
            step.host = [span for span in host if span.end_us > step.start_us and span.start_us < step.end_us]
        return steps


def _now_us() -> float:
    """By the clock of the profiler's times."""
    return time.time_ns() / 1e3


def _replace(undo: contextlib.ExitStack, owner: Any, name: str, value: Any) -> None:
    own = vars(owner).get(name)
    setattr(owner, name, value)
    undo.callback(lambda: delattr(owner, name) if own is None else setattr(owner, name, own))


def _name_operations(undo: contextlib.ExitStack, runner: Any) -> None:
    """Has the profiler see the operations that are not torch's, by their names."""
    from torch.profiler import record_function

    from quire.kernels import Kernels

    def named(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            with record_function(name):
                return function(*args, **options)

        return call

    kernels = kernels_of(runner.model)
    for name in dir(Kernels):
        if not name.startswith("_") and callable(getattr(kernels, name, None)):
            _replace(undo, kernels, name, named(name, getattr(kernels, name)))
    _replace(undo, runner.attention, "run", named("attention", runner.attention.run))


def kernels_of(model: Any) -> Any:
    """Of its layers, which share one object."""
    return next(module.kernels for module in model.modules() if hasattr(module, "kernels"))


def _on_device(events: Any) -> list[Span]:
    from torch.autograd import DeviceType  # type: ignore[attr-defined]

    spans = [
        Span(event.name, event.time_range.start, event.time_range.end)
        for event in events
        if event.device_type == DeviceType.CUDA
    ]
    return sorted(spans, key=lambda span: (span.start_us, span.end_us))


def _top_level(events: Any) -> list[Span]:
    spans = [Span(e.name, e.time_range.start, e.time_range.end) for e in events if e.cpu_parent is None]
    return sorted(spans, key=lambda span: span.start_us)


def split_by_markers(spans: Sequence[Span], submitted: Sequence[Any]) -> list[RecordedStep]:
    """A step lasts from its marker's end to the next one's start, the last one to the end of its last kernel.

    What comes before the first marker belongs to steps that were handed over before.
    """
    starts = [i for i, span in enumerate(spans) if MARKER in span.name]
    steps = []
    for i, end, one in zip(starts, [*starts[1:], len(spans)], submitted):
        kernels = list(spans[i + 1 : end])
        if kernels:
            last_us = spans[end].start_us if end < len(spans) else max(span.end_us for span in kernels)
            steps.append(
                RecordedStep(one.way, one.num_tokens, one.num_sequences, spans[i].end_us, last_us, kernels)
            )  # fmt: skip
    return steps


def _within(spans: Sequence[Span], submitted: Sequence[_Submitted], offset_us: float) -> list[RecordedStep]:
    """A CPU's steps run while they are handed over."""
    steps = []
    for one in submitted:
        start_us, end_us = one.start_us - offset_us, one.end_us - offset_us
        kernels = [span for span in spans if start_us <= span.start_us and span.end_us <= end_us]
        steps.append(RecordedStep(one.way, one.num_tokens, one.num_sequences, start_us, end_us, kernels))
    return steps


# -- tables ------------------------------------------------------------------------------------------------------------------
def way_rows(steps: Sequence[RecordedStep]) -> list[dict[str, Any]]:
    """Means of the recorded steps, by the way that they ran."""
    rows = []
    for way in dict.fromkeys(step.way for step in steps):
        same = [step for step in steps if step.way == way]
        rows.append(
            {
                "way": way,
                "recorded": len(same),
                "tokens/step": statistics.fmean(step.num_tokens for step in same),
                "ms/step": statistics.fmean(step.duration_us for step in same) / 1e3,
                "kernels ms": statistics.fmean(step.busy_us for step in same) / 1e3,
                "gaps ms": statistics.fmean(step.gaps_us for step in same) / 1e3,
                "launched": statistics.fmean(len(step.kernels) for step in same),
            }
        )
    return rows


def kernel_rows(steps: Sequence[RecordedStep], most: int | None = None) -> list[dict[str, Any]]:
    """Kernels by way and name, those that take most first; `most` of each way."""
    rows: list[dict[str, Any]] = []
    for way in dict.fromkeys(step.way for step in steps):
        same = [step for step in steps if step.way == way]
        took: Counter[str] = Counter()
        counts: Counter[str] = Counter()
        for step in same:
            for span, own_us in zip(step.kernels, step.exclusive_us()):
                took[span.name] += own_us  # type: ignore[assignment]
                counts[span.name] += 1
        total_us = sum(step.duration_us for step in same)
        for name, us in took.most_common(most):
            rows.append(
                {
                    "way": way,
                    "kind": kind_of(name),
                    "kernel": short_name(name),
                    "us/step": us / len(same),
                    "of the step": us / max(total_us, 1e-9),
                    "launches/step": counts[name] / len(same),
                    "us each": us / counts[name],
                }
            )
    return rows


def short_name(kernel: str) -> str:
    """Without what C++ writes around it, at most 60 characters."""
    name = re.sub(r"\(anonymous namespace\)::|at::native::|^void ", "", kernel)
    return name if len(name) <= 60 else name[:59] + "…"


def typical(steps: Sequence[RecordedStep], seconds_by_way: dict[str, float]) -> RecordedStep:
    """Of the way that most time went to, the recorded step of median duration: of those that have all of the host's phases,
    for a recording ends before the last steps do."""
    way = max({step.way for step in steps}, key=lambda way: seconds_by_way.get(way, 0.0))
    same = [step for step in steps if step.way == way]
    phases = [len({span.name for span in step.host}) for step in same]
    whole = [step for step, count in zip(same, phases) if count == max(phases)]
    return sorted(whole, key=lambda step: step.duration_us)[len(whole) // 2]
