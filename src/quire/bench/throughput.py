"""`quire bench throughput`: a list of requests given at once; tokens a second until the last answer is complete.

Steps are counted by the way they ran (graphs of decoding steps, graphs of mixed ones, eager), with their mean time by the
device's clock, and what a step costs the host beside waiting, most of it while the device works. All in the last run.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from quire.bench.decode import Waiting
from quire.bench.report import add_report_arguments, report
from quire.bench.shapes import SHAPES, write_shape
from quire.bench.workload import Lengths, draw_lengths, draw_prompts, read_lengths
from quire.config import EngineConfig
from quire.errors import ConfigError

HELP = "a list of requests given at once: tokens a second, beside a peer if asked"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from quire.cli import add_engine_arguments

    what = parser.add_argument_group("workload")
    what.add_argument("--shape", choices=sorted(SHAPES), help="random weights of this shape instead of --model")
    what.add_argument("--workload", metavar="FILE", help="JSON list of [prompt tokens, output tokens], or CSV")
    what.add_argument("--num-prompts", type=int, help="only the first N of the list; without --workload, draw N (32)")
    what.add_argument("--temperature", type=float, default=0.0)
    what.add_argument("--repeat", type=int, default=3, help="runs of each engine, in turn; medians are reported")
    what.add_argument("--peer", choices=["transformers"], help="run the same list through this peer as well")
    what.add_argument("--peer-batch-size", type=int, default=32, help="static batches of this many requests")
    add_report_arguments(parser)
    add_engine_arguments(parser, model_required=False)


def run(args: argparse.Namespace) -> int:
    from quire.cli import engine_config_from

    if bool(args.shape) == bool(args.model):
        raise ConfigError("give either --shape or --model")
    lengths = (
        read_lengths(args.workload) if args.workload else draw_lengths(args.num_prompts or 32, (16, 256), (16, 128))
    )
    lengths = lengths[: args.num_prompts]
    with tempfile.TemporaryDirectory() as directory:
        options: dict[str, Any] = {"skip_tokenizer_init": True}
        if args.shape:
            options |= {"model": str(write_shape(args.shape, Path(directory))), "load_format": "dummy"}
        if args.max_model_len is None:
            options["max_model_len"] = max(prompt + output for prompt, output in lengths)
        config = engine_config_from(args, **options)
        began = time.perf_counter()
        quire = QuireRuns(config, lengths, args.temperature)
        start_s = time.perf_counter() - began
        runners: dict[str, Callable[[], float]] = {"quire": quire.once}
        if args.peer:
            runners["transformers"] = _transformers(config, lengths, args.temperature, args.peer_batch_size)
        seconds: dict[str, list[float]] = {name: [] for name in runners}
        for _ in range(args.repeat):
            for name, once in runners.items():
                seconds[name].append(once())
    num_in, num_out = (sum(column) for column in zip(*lengths))
    rows = []
    for name, times in seconds.items():
        median = statistics.median(times)
        rows.append(
            {
                "engine": name,
                "seconds": median,
                "fastest": min(times),
                "slowest": max(times),
                "output tok/s": num_out / median,
                "total tok/s": (num_in + num_out) / median,
                "times the peer": statistics.median(seconds[args.peer]) / median if args.peer else 1.0,
            }
        )
    title = f"{args.shape or args.model}: {len(lengths)} requests, {num_in:,} tokens in, {num_out:,} out"
    facts = {"dtype": config.dtype, "temperature": args.temperature, "start s": start_s}
    steps = quire.steps.rows()
    report(args, title, rows, data={"steps": steps}, **facts, **{"host ms/step": quire.steps.host_ms})
    if args.json != "-":
        args.json = None
        report(args, "steps by the way they ran, last run", steps)
    return 0


class StepTimes:
    """Watches an engine's steps from when it is made: how many ran which way, their tokens, and how long they took."""

    def __init__(self, engine: Any) -> None:
        self._runner = engine.executor.worker.runner
        self._submit = engine.executor.submit
        self._step = engine.step
        self._waiting = Waiting()
        self.reset()
        engine.executor.submit = self._watched_submit
        engine.step = self._watched_step

    def reset(self) -> None:
        self._found: dict[
            str, list[tuple[float, float, int]]
        ] = {}  # way -> (device's seconds, host's to launch, tokens)
        self._num_steps, self._stepping_s, self._waiting.seconds = 0, 0.0, 0.0

    def _watched_step(self) -> Any:
        began = time.perf_counter()
        with self._waiting:
            outputs = self._step()
        self._stepping_s += time.perf_counter() - began
        self._num_steps += 1
        return outputs

    def _watched_submit(self, step: Any) -> Any:
        began = time.perf_counter()
        future = self._submit(step)
        launch_s = time.perf_counter() - began
        found = self._found.setdefault(self._runner.way.value, [])
        future.add_done_callback(lambda done: found.append((done.result().elapsed_s, launch_s, step.total_num_tokens)))
        return future

    @property
    def host_ms(self) -> float:
        """What a step costs the host beside waiting, planning and outputs included."""
        return 1e3 * (self._stepping_s - self._waiting.seconds) / max(self._num_steps, 1)

    def rows(self) -> list[dict[str, Any]]:
        rows = []
        for way, times in self._found.items():
            elapsed, launch, tokens = zip(*times)
            rows.append(
                {
                    "way": way,
                    "steps": len(times),
                    "tokens/step": statistics.mean(tokens),
                    "ms/step": 1e3 * statistics.mean(elapsed),
                    "seconds": sum(elapsed),
                    "launching ms/step": 1e3 * statistics.mean(launch),
                }
            )
        return rows


class QuireRuns:
    """One engine; `once` gives the seconds that it takes for the list."""

    def __init__(self, config: EngineConfig, lengths: list[Lengths], temperature: float) -> None:
        from quire.engine.llm import LLM
        from quire.sampling_params import SamplingParams

        self._llm = LLM.from_config(config)
        self._outputs = [output for _, output in lengths]
        self._params = [SamplingParams(temperature=temperature, max_tokens=n, ignore_eos=True) for n in self._outputs]
        self._prompts = draw_prompts(lengths, self._llm.engine.model.vocab_size)
        warm_up = SamplingParams(temperature=temperature, max_tokens=4, ignore_eos=True)
        self._llm.generate([self._prompts[0], self._prompts[-1]], warm_up, use_tqdm=False)
        self.steps = StepTimes(self._llm.engine)

    def once(self) -> float:
        self._llm.engine.kv.pool.drop_cache()
        self.steps.reset()
        began = time.perf_counter()
        outputs = self._llm.generate(self._prompts, self._params, use_tqdm=False)
        elapsed = time.perf_counter() - began
        assert [len(output.outputs[0].token_ids) for output in outputs] == self._outputs
        return elapsed


def _transformers(config: EngineConfig, lengths: list[Lengths], temperature: float, batch: int) -> Callable[[], float]:
    """Static batches as most scripts form them: padded on the left, each run until its longest answer is complete."""
    try:
        import torch
        import transformers
    except ImportError as error:
        raise ConfigError("--peer transformers needs the transformers package installed") from error

    device = "cuda" if torch.cuda.is_available() and config.device != "cpu" else "cpu"
    hf_config = transformers.AutoConfig.from_pretrained(config.model)
    dtype = getattr(torch, config.dtype if config.dtype != "auto" else str(hf_config.dtype).removeprefix("torch."))
    if config.load_format == "dummy":
        model = transformers.AutoModelForCausalLM.from_config(hf_config, dtype=dtype)
    else:
        model = transformers.AutoModelForCausalLM.from_pretrained(config.model, dtype=dtype)
    model = model.eval().to(device)
    prompts = draw_prompts(lengths, hf_config.vocab_size)
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}

    def generate(chunk: list[list[int]], num_output: int) -> None:
        longest = max(map(len, chunk))
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in chunk], device=device)
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in chunk], device=device)
        with torch.inference_mode():
            made = model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=num_output,
                min_new_tokens=num_output,
                pad_token_id=0,
                eos_token_id=None,
                **sampling,
            )
        assert made.shape[1] == longest + num_output

    def once() -> float:
        began = time.perf_counter()
        for at in range(0, len(prompts), batch):
            generate(prompts[at : at + batch], max(output for _, output in lengths[at : at + batch]))
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    generate([prompts[0], prompts[-1]], 4)
    return once
