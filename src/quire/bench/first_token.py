"""A process that makes an engine, answers one token, tells what that took as JSON, and ends: `quire bench startup` starts it.

    python -m quire.bench.first_token STARTED_S < {"config": {...}, "input_len": 16}

STARTED_S: the clock (`time.time`) when it was started. Parts are timed from outside, at the functions that do them; what isn't
there on a device, or is called otherwise one day, is missing from the parts and in their rest.
"""

import time

BEGAN_S = time.time()  # before anything else is imported

import json  # noqa: E402
import sys  # noqa: E402
from collections.abc import Callable, Iterator  # noqa: E402
from contextlib import contextmanager  # noqa: E402
from typing import Any  # noqa: E402


class Parts:
    """Seconds by part. What happens in a part within another counts for the inner one alone."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._inner: list[float] = [0.0]

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        began_s = time.perf_counter()
        self._inner.append(0.0)
        try:
            yield
        finally:
            elapsed_s = time.perf_counter() - began_s
            self.seconds[name] = self.seconds.get(name, 0.0) + elapsed_s - self._inner.pop()
            self._inner[-1] += elapsed_s

    def watch(self, owner: Any, function: str, name: str, after: Callable[[], None] = lambda: None) -> None:
        """From now on, what `owner.function` takes is the part `name`; `after` is called at its end, and counts."""
        original = getattr(owner, function, None)
        if original is None:
            return

        def timed(*args: Any, **options: Any) -> Any:
            with self.part(name):
                result = original(*args, **options)
                after()
                return result

        setattr(owner, function, timed)


def main() -> None:
    parts = Parts()
    parts.seconds["Python"] = BEGAN_S - float(sys.argv[1])
    asked = json.load(sys.stdin)
    with parts.part("import of torch"):
        import torch
    with parts.part("import of Quire"):
        from quire.config import EngineConfig
        from quire.engine.engine import Engine
        from quire.sampling_params import SamplingParams
        from quire.worker import worker

    config = EngineConfig(**asked["config"])
    on_gpu = torch.cuda.is_available() and config.device != "cpu"
    if on_gpu:
        with parts.part("CUDA"):
            torch.zeros(1, device="cuda")
    compiled = _watch_worker(parts, worker, torch.cuda.synchronize if on_gpu else lambda: None, on_gpu)
    with parts.part("rest of the engine"):
        engine = Engine(config)
    with parts.part("first token"):
        prompt = [i % engine.model.vocab_size for i in range(asked["input_len"])]
        params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
        engine.add_request("first", {"prompt_token_ids": prompt}, params)
        while engine.has_unfinished:
            engine.step()
    print(json.dumps({"parts": parts.seconds, "end_s": time.time(), "compiled": compiled}), flush=True)
    engine.shutdown()


def _watch_worker(parts: Parts, worker: Any, wait: Callable[[], None], on_gpu: bool) -> dict[str, float]:
    """-> what Triton compiled, filled as it goes on: kernels, their seconds, and kernels that were found in its cache."""
    parts.watch(worker, "select_kernels", "kernels chosen; C: compiled or found")
    parts.watch(worker, "build_model", "model built")
    parts.watch(worker, "load_weights", "weights", wait)
    parts.watch(worker.Worker, "allocate", "KV memory and rows", wait)
    compiled = {"kernels": 0.0, "seconds": 0.0, "found": 0.0}
    if on_gpu:
        from triton import knobs  # type: ignore[import-untyped]

        from quire.worker import graph_runner

        def note(*, times: Any, cache_hit: bool, **_: Any) -> None:
            compiled["found" if cache_hit else "kernels"] += 1
            if not cache_hit:
                compiled["seconds"] += times.total / 1e6

        knobs.compilation.listener = note
        parts.watch(graph_runner.GraphRunner, "compile_ahead", "kernels compiled or found", wait)
        parts.watch(graph_runner.GraphRunner, "capture_all", "graphs captured", wait)
    return compiled


if __name__ == "__main__":
    main()
