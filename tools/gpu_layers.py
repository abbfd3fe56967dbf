"""On a machine with a GPU: what a decoding layer's kernels take at states of a list of requests, by leaving others out: time
and energy. Where a card has reached its limit of power, a step takes as long as its energy needs.

    python3 tools/gpu_layers.py SHAPE WORKLOAD STEP ...        (PYTHONPATH=src)

SHAPE is one of `quire.bench.shapes`, WORKLOAD a JSON list of [prompt tokens, output tokens]. The list runs until each STEP;
there the step's graph is captured again, as it is and without some of its kernels, and replayed for a second: microseconds and
millijoules of a layer, over all layers, and the card's watts meanwhile (energies of equal runs differed by up to 11 %). What is
left out leaves numbers that mean nothing, but takes no time.
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from triton.runtime.jit import JITFunction

from quire import LLM, SamplingParams
from quire.bench.power import PowerMeter
from quire.bench.shapes import SHAPES, write_shape
from quire.kernels.triton import dependent

LINEAR = {"_linear", "_linear_pieces", "_linear_silu_mul", "_multiply_add", "_silu_and_mul_kernel"}
# name: whether a Triton or Gluon kernel of that name stays, whether cuBLAS's do, whether launches are dependent. The last
# writes what belongs into the step's slots, where others left what later steps could not use.
CASES: dict[str, tuple[Callable[[str], bool], bool, bool]] = {
    "launches not dependent": (lambda name: True, True, False),
    "attention alone": (lambda name: name == "_attend", False, True),
    "linear alone": (lambda name: name in LINEAR, True, True),
    "gate and up in Gluon alone": (lambda name: name == "_linear_silu_mul", False, True),
    "pieces in Gluon alone": (lambda name: name == "_linear_pieces", False, True),
    "cuBLAS alone": (lambda name: False, True, True),
    "neither attention nor linear": (lambda name: name not in LINEAR | {"_attend"}, False, True),
    "without attention": (lambda name: name != "_attend", True, True),
    "without norms": (lambda name: name != "_rms_norm_kernel", True, True),
    "without rotary and writes": (lambda name: name != "_heads_kernel", True, True),
    "without cuBLAS": (lambda name: True, False, True),
    "without gate and up in Gluon": (lambda name: name != "_linear_silu_mul", True, True),
    "without pieces in Gluon": (lambda name: name != "_linear_pieces", True, True),
    "as it is": (lambda name: True, True, True),
}


class Choice:
    """Which kernels launches reach, while it is entered."""

    def __init__(self, stays: Callable[[str], bool], cublas: bool, is_dependent: bool) -> None:
        self._stays, self._cublas, self._is_dependent = stays, cublas, is_dependent

    def __enter__(self) -> None:
        run, linear, options = JITFunction.run, functional.linear, dependent.options
        self._originals = run, linear, options

        def chosen(kernel: Any, *args: Any, **kwargs: Any) -> Any:
            return run(kernel, *args, **kwargs) if self._stays(kernel.__name__) else None

        def nothing(x: torch.Tensor, weight: torch.Tensor, bias: Any = None) -> torch.Tensor:
            return x.new_empty((*x.shape[:-1], len(weight)))

        JITFunction.run = chosen
        if not self._cublas:
            functional.linear = nothing
        if not self._is_dependent:
            dependent.options = lambda device: {"PDL": False}

    def __exit__(self, *_: object) -> None:
        JITFunction.run, functional.linear, dependent.options = self._originals


def measure(replay: Callable[[], object], meter: PowerMeter, for_s: float = 1.0) -> tuple[float, float]:
    """Seconds and joules of one replay, of as many as take for_s, after a third as many."""

    def run(count: int) -> float:
        began = time.perf_counter()
        for _ in range(count):
            replay()
        torch.cuda.synchronize()
        return time.perf_counter() - began

    run(3)
    count = max(3, int(for_s / (run(3) / 3)))
    run(count // 3)
    meter.begin()
    seconds = run(count)
    return seconds / count, meter.joules() / count


def main(shape: str, workload: str, steps: list[int]) -> None:
    lengths = json.loads(Path(workload).read_text())
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as directory:
        llm = LLM(
            str(write_shape(shape, Path(directory))), load_format="dummy", dtype="bfloat16", skip_tokenizer_init=True,
            swap_space=0, enable_prefix_caching=False, max_model_len=max(map(sum, lengths)),
        )  # fmt: skip
    engine, submitted, meter = llm.engine, [], PowerMeter.find("cuda")
    if meter is None:
        raise SystemExit("the driver does not tell the card's energy")
    graphs, submit = engine.executor.worker.runner.graphs, engine.executor.submit

    def watched(step: Any) -> Any:
        submitted.append(step)
        return submit(step)

    engine.executor.submit = watched
    for i, (num_in, num_out) in enumerate(lengths):
        prompt = {"prompt_token_ids": rng.integers(5, 30_000, num_in).tolist()}
        engine.add_request(str(i), prompt, SamplingParams(max_tokens=num_out, ignore_eos=True, temperature=0.6))
    for call in range(1, max(steps) + 1):
        engine.step()
        assert engine.has_unfinished, f"at step {call} no request is left"
        if call not in steps:
            continue
        torch.cuda.synchronize()
        step = submitted[-1]
        count, lengths_S = len(step.rows), step.starts + 1
        size = graphs.sizes.for_entries(count)
        words = size.words.clone()
        print(f"{shape}, step {call}: {count} requests of {lengths_S.mean():.0f} tokens, a layer:", flush=True)
        layers = SHAPES[shape]["num_hidden_layers"]
        for name, case in CASES.items():
            with torch.inference_mode(), Choice(*case):
                plans = graphs._plans(size, graphs._one_token_each[: count + 1], lengths_S)
                size.words.copy_(words)
                graphs._layers(size, plans)
                replay, _ = graphs._capture(lambda size=size, plans=plans: graphs._layers(size, plans))
            seconds, joules = measure(replay, meter)
            of_layer = f"{1e6 * seconds / layers:8.1f} us {1e3 * joules / layers:7.2f} mJ {joules / seconds:5.0f} W"
            print(f"    {name:32}{of_layer}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], [int(step) for step in sys.argv[3:]])
