"""On a machine with a GPU: what a decoding layer's kernels take at states of a list of requests, by leaving others out.

    python3 tools/gpu_layers.py SHAPE WORKLOAD STEP ...        (PYTHONPATH=src)

SHAPE is one of `quire.bench.shapes`, WORKLOAD a JSON list of [prompt tokens, output tokens]. The list runs until each STEP;
there the step's graph is captured again, as it is and without some of its kernels, and replayed: microseconds of a layer, over
all layers. What is left out leaves numbers that mean nothing, but takes no time.
"""

import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from triton.runtime.jit import JITFunction

from quire import LLM, SamplingParams
from quire.bench.shapes import SHAPES, write_shape
from quire.kernels.triton import dependent

LINEAR = {"_linear", "_linear_pieces", "_linear_silu_mul", "_multiply_add", "_silu_and_mul_kernel"}
# name: whether a Triton or Gluon kernel of that name stays, whether cuBLAS's do, whether launches are dependent. The last
# writes what belongs into the step's slots, where others left what later steps could not use.
CASES: dict[str, tuple[Callable[[str], bool], bool, bool]] = {
    "launches not dependent": (lambda name: True, True, False),
    "attention alone": (lambda name: name == "_attend", False, True),
    "linear alone": (lambda name: name in LINEAR, True, True),
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


def seconds_of(replay: Callable[[], object]) -> float:
    """Of one replay, the median of 7 times 5 after 15."""
    times = []
    for i in range(8):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        for _ in range(5 if i else 15):
            replay()
        ended.record()
        ended.synchronize()
        times.append(began.elapsed_time(ended) / 5e3)
    return statistics.median(times[1:])


def main(shape: str, workload: str, steps: list[int]) -> None:
    lengths = json.loads(Path(workload).read_text())
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as directory:
        llm = LLM(
            str(write_shape(shape, Path(directory))), load_format="dummy", dtype="bfloat16", skip_tokenizer_init=True,
            swap_space=0, enable_prefix_caching=False, max_model_len=max(map(sum, lengths)),
        )  # fmt: skip
    engine, submitted = llm.engine, []
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
        found = {}
        for name, case in CASES.items():
            with torch.inference_mode(), Choice(*case):
                plans = graphs._plans(size, graphs._one_token_each[: count + 1], lengths_S)
                size.words.copy_(words)
                graphs._layers(size, plans)
                replay, _ = graphs._capture(lambda size=size, plans=plans: graphs._layers(size, plans))
            found[name] = round(1e6 * seconds_of(replay) / SHAPES[shape]["num_hidden_layers"], 1)
        print(
            f"{shape}, step {call}: {count} requests of {lengths_S.mean():.0f} tokens, us a layer: {found}", flush=True
        )


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], [int(step) for step in sys.argv[3:]])
