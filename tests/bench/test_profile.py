"""Recorded steps: chosen, told apart, added up; and a real engine's on the CPU."""

from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from quire import LLM, SamplingParams
from quire.bench import steps as steps_module
from quire.bench.floors import Ceilings, ModelWork
from quire.bench.profile import (
    RecordedStep,
    Span,
    choose_windows,
    kernel_rows,
    kernels_of,
    kind_of,
    record,
    short_name,
    split_by_markers,
    typical,
    way_rows,
)
from quire.bench.steps import StepWatch, Waiting, WatchedStep

CEILINGS = Ceilings(1e10, 1e11)


def watched(ways: str) -> list[WatchedStep]:
    none = np.zeros(0, dtype=np.int32)
    return [WatchedStep(call, way, none, none, none, 0.0) for call, way in enumerate(ways)]


@pytest.mark.parametrize(
    ("ways", "windows"),
    [
        ("mmmmdddddd", [range(1, 3), range(6, 8)]),
        ("d", [range(1)]),
        ("mmed", [range(4)]),  # neighbours become one
        ("dddmdddddddd", [range(3, 4), range(7, 9)]),  # the longest row of decoding
        ("", []),
    ],
)
def test_windows_are_in_the_middle_of_each_ways_longest_row(ways: str, windows: list[range]) -> None:
    assert choose_windows(watched(ways), count=2) == windows


def submitted(way: str = "decode graph") -> SimpleNamespace:
    return SimpleNamespace(way=way, num_tokens=4, num_sequences=4)


def test_markers_tell_steps_apart() -> None:
    spans = [
        Span("of a step before", 0, 5),
        Span("at::spin_kernel(long)", 6, 7),
        Span("a", 8, 10),
        Span("b", 10, 15),
        Span("at::spin_kernel(long)", 18, 19),
        Span("a", 19, 24),
        Span("longer", 20, 30),
        Span("b", 24, 26),
    ]
    first, second = split_by_markers(spans, [submitted("mixed graph"), submitted()])
    assert (first.way, first.start_us, first.end_us) == ("mixed graph", 7, 18)
    assert first.busy_us == 7
    assert first.gaps_us == 4
    assert first.gaps() == [Span("gap", 7, 8), Span("gap", 15, 18)]
    assert (second.start_us, second.end_us) == (19, 30)
    assert second.exclusive_us() == [5, 6, 0]  # what overlaps counts once, for the one that began first
    assert second.gaps_us == 0


def test_a_profile_without_kernels_has_no_steps() -> None:
    assert split_by_markers([], [submitted()]) == []
    assert way_rows([]) == [] == kernel_rows([])


def steps_of(*durations: float, way: str = "decode graph") -> list[RecordedStep]:
    return [RecordedStep(way, 4, 4, 100.0, 100.0 + us, [Span("_attend", 101.0, 103.0)]) for us in durations]


def test_rows_are_means_by_way() -> None:
    steps = [*steps_of(10, 20), *steps_of(50, way="eager")]
    decode, eager = way_rows(steps)
    assert (decode["recorded"], decode["ms/step"], decode["kernels ms"]) == (2, 0.015, 0.002)
    assert decode["kernels ms"] + decode["gaps ms"] == pytest.approx(decode["ms/step"])
    assert eager["way"] == "eager" and eager["gaps ms"] == pytest.approx(0.048)
    kernels = kernel_rows(steps)
    assert [(row["way"], row["kernel"], row["us/step"]) for row in kernels] == [
        ("decode graph", "_attend", 2),
        ("eager", "_attend", 2),
    ]
    assert kernels[0]["of the step"] == pytest.approx(4 / 30)


def test_the_typical_step_is_the_median_of_the_way_that_took_most() -> None:
    steps = [*steps_of(30, 10, 20), *steps_of(500, way="eager")]
    assert typical(steps, {"decode graph": 9.0, "eager": 1.0}).duration_us == 20
    assert typical(steps, {"decode graph": 1.0, "eager": 9.0}).duration_us == 500


def test_a_step_whose_host_was_not_recorded_to_its_end_is_not_typical() -> None:
    steps = steps_of(30, 10, 20)
    for step in steps[:2]:
        step.host = [Span("plan", 101.0, 102.0), Span("wait", 102.0, 103.0)]
    steps[2].host = [Span("wait", 101.0, 102.0), Span("wait", 102.0, 103.0)]
    assert typical(steps, {}).duration_us == 30


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("nvjet_tst_128x256_64x4_1x2_h_bz_TNT", "linear layers"),
        ("void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm>", "linear layers"),
        ("_multiply_add", "linear layers"),
        ("_linear", "linear layers"),
        ("linear_silu_mul", "linear layers"),
        ("aten::linear", "linear layers"),
        ("_attend", "attention"),
        ("_merge", "attention"),
        ("_rms_norm_kernel", "norm, rotary, activation"),
        ("_heads_kernel", "norm, rotary, activation"),
        ("_choose_kernel", "sampling"),
        ("Memcpy HtoD (Pinned -> Device)", "copies"),
        ("_gather_kernel", "sampling"),
        ("void at::native::vectorized_gather_kernel<16, long>", "other"),
        ("_embed_kernel", "other"),
    ],
)
def test_kinds(kernel: str, kind: str) -> None:
    assert kind_of(kernel) == kind


def test_names_are_cut() -> None:
    assert short_name("void at::native::(anonymous namespace)::fill<1>") == "fill<1>"
    assert len(short_name("x" * 200)) == 60


@pytest.fixture
def llm(tiny_model: Path) -> LLM:
    options = {"load_format": "dummy", "skip_tokenizer_init": True, "device": "cpu", "max_model_len": 64}
    with LLM(str(tiny_model), **options) as llm:
        yield llm


def test_a_real_engines_steps(llm: LLM) -> None:
    engine = llm.engine
    work = ModelWork(engine.model, "float32", "float32")
    watch = StepWatch(engine, work, CEILINGS)

    def run() -> None:
        watch.reset()
        llm.generate([[3, 4, 5], [6]], SamplingParams(max_tokens=12, ignore_eos=True, temperature=0), use_tqdm=False)

    run()
    step, submit = engine.step, engine.executor.submit
    windows = choose_windows(watch.steps, count=3)
    assert [len(window) for window in windows] == [3]
    steps = record(engine, windows, run)
    assert (engine.step, engine.executor.submit) == (step, submit)  # nothing is left behind
    kernels = kernels_of(engine.executor.worker.runner.model)
    assert "schedule" not in vars(engine.scheduler) and "rms_norm" not in vars(kernels)
    assert [(one.way, one.num_tokens, one.num_sequences) for one in steps] == [("eager", 2, 2)] * 3
    for one in steps:
        assert one.busy_us + one.gaps_us == pytest.approx(one.duration_us)
        assert 0 < one.busy_us < one.duration_us
    counts: Counter[str] = Counter()
    for row in kernel_rows(steps):
        counts[row["kind"]] += row["launches/step"]
    assert counts["attention"] == 2  # layers
    assert counts["linear layers"] == 2 * 4 + 1
    assert way_rows(steps)[0]["recorded"] == 3


def test_watched_steps_have_their_floors(llm: LLM) -> None:
    work = ModelWork(llm.engine.model, "float32", "float32")
    watch = StepWatch(llm.engine, work, CEILINGS)
    llm.generate([[3, 4, 5], [6]], SamplingParams(max_tokens=4, ignore_eos=True, temperature=0), use_tqdm=False)
    assert [step.total_tokens for step in watch.steps] == [4, 2, 2, 2]
    assert [step.call for step in watch.steps] == [0, 1, 2, 3]
    prompts = work.floor(CEILINGS, np.array([0, 0]), np.array([3, 1]), 2)
    last = work.floor(CEILINGS, np.array([5, 3]), np.array([1, 1]), 2)
    assert watch.floor(watch.steps[:1]) == prompts
    assert watch.floor(watch.steps[-1:]) == last
    (row,) = watch.rows()
    assert (row["way"], row["steps"], row["tokens/step"]) == ("eager", 4, 2.5)
    assert row["floor ms"] * 4 == pytest.approx(1e3 * watch.floor().seconds)
    assert row["share"] == pytest.approx(row["floor ms"] / row["ms/step"])
    assert row["host ms"] > 0 and row["launching ms"] > 0
    watch.reset()
    assert watch.rows() == [] and watch.floor().seconds == 0


def test_a_gpus_steps_are_told_apart_by_markers(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a device that answers a marker with one kernel of the step before's name, 5 us long, 2 us later."""
    import torch

    engine = llm.engine
    events: list[SimpleNamespace] = []

    def sleep(_: int) -> None:
        at = 10.0 * len(events)
        for name, start, end in (("at::spin_kernel(long)", at, at + 1), ("_attend", at + 3, at + 8)):
            span = SimpleNamespace(start=start, end=end)
            events.append(SimpleNamespace(name=name, device_type=torch.autograd.DeviceType.CUDA, time_range=span))
        launch = SimpleNamespace(start=at, end=at + 1)
        events.append(
            SimpleNamespace(name="cudaGraphLaunch", device_type=torch.autograd.DeviceType.CPU, time_range=launch)
        )

    class Profile:
        def __init__(self, activities: list[object]) -> None:
            assert activities == [torch.profiler.ProfilerActivity.CUDA]
            self.profiler = SimpleNamespace(kineto_results=SimpleNamespace(trace_start_ns=lambda: 0))

        def __enter__(self) -> None:
            events.clear()

        def __exit__(self, *_: object) -> None: ...

        def events(self) -> list[SimpleNamespace]:
            return events

    monkeypatch.setenv("TEARDOWN_CUPTI", "0")  # and so it is taken back
    report = SimpleNamespace(device="cuda:0")
    monkeypatch.setattr(type(engine.executor), "device_report", property(lambda _: report))
    monkeypatch.setattr(torch.cuda, "_sleep", sleep)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.profiler, "profile", Profile)

    def run() -> None:
        llm.generate([[3, 4, 5]], SamplingParams(max_tokens=6, ignore_eos=True, temperature=0), use_tqdm=False)

    steps = record(engine, [range(2), range(3, 5)], run)
    assert [step.num_tokens for step in steps] == [3, 1, 1, 1]
    assert [(step.duration_us, step.busy_us) for step in steps] == [(29, 5), (7, 5)] * 2
    assert {row["kernel"] for row in kernel_rows(steps)} == {"_attend"}


def test_waiting_counts_every_event_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    clock = iter([1.0, 3.0, 10.0, 14.0])
    monkeypatch.setattr(steps_module.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(torch.cuda.Event, "synchronize", lambda event: None)
    original = torch.cuda.Event.synchronize
    waiting = Waiting()
    with waiting:
        torch.cuda.Event.synchronize(None)
        torch.cuda.Event.synchronize(None)
    assert waiting.seconds == 6
    assert torch.cuda.Event.synchronize is original
