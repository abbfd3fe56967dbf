"""The model that a benchmark of the engine measures: one of --model or random weights of a --shape, ceilings, and watched
steps."""

from __future__ import annotations

import argparse
import dataclasses
import gc
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quire.bench import picture, profile
from quire.bench.floors import ModelWork, measure_ceilings
from quire.bench.power import PowerMeter
from quire.bench.report import Row, report
from quire.bench.shapes import SHAPES, write_shape
from quire.bench.steps import StepWatch
from quire.config import EngineConfig
from quire.errors import ConfigError
from quire.options import add_engine_arguments, engine_config_from
from quire.outputs import RequestOutput
from quire.sampling_params import SamplingParams

TIME_SPLIT = ("kernels ms", "gaps ms", "host ms", "launching ms", "launched")


def add_model_arguments(what: argparse._ArgumentGroup, parser: argparse.ArgumentParser) -> None:
    """--shape into the group `what`, and the engine's options."""
    what.add_argument("--shape", choices=sorted(SHAPES), help="random weights of this shape instead of --model")
    add_engine_arguments(parser, model_required=False)


@contextmanager
def chosen_config(args: argparse.Namespace, max_model_len: int) -> Iterator[EngineConfig]:
    """The engine's options, with token ids for prompts; `max_model_len` where the user gives none. A shape's directory lasts as
    long as the context."""
    if bool(args.shape) == bool(args.model):
        raise ConfigError("give either --shape or --model")
    with tempfile.TemporaryDirectory() as directory:
        options: dict[str, Any] = {"skip_tokenizer_init": True}
        if args.shape:
            options |= {"model": str(write_shape(args.shape, Path(directory))), "load_format": "dummy"}
        if args.max_model_len is None:
            options["max_model_len"] = max_model_len
        yield engine_config_from(args, **options)


@dataclass(frozen=True, slots=True)
class Timing:
    """Of requests given at once: seconds until all have their first token; from there on; a token from there on; what such a
    step costs the host; and floors of the steps with prompts, and of one without."""

    first_s: float
    decode_s: float
    token_s: float
    host_s: float
    first_floor_s: float
    token_floor_s: float


class Subject:
    """An engine, ceilings of the machine that it runs on, and its steps. `start_s`: seconds that making it took; `power`: what
    the GPU drew during the last `generate`, if it tells."""

    def __init__(self, config: EngineConfig) -> None:
        import torch

        from quire.engine.llm import LLM

        on_gpu = config.device != "cpu" and torch.cuda.is_available()
        model = _model_config(config)
        dtype = config.dtype if config.dtype != "auto" else model.dtype or "float32"
        if on_gpu:  # before the engine takes what is free
            self.ceilings = measure_ceilings("cuda", dtype)
        began_s = time.perf_counter()
        self.llm = LLM.from_config(config)
        self.start_s = time.perf_counter() - began_s
        self.engine = self.llm.engine
        self.device = self.engine.executor.device_report
        if not on_gpu:  # on the threads that the engine has chosen
            self.ceilings = measure_ceilings("cpu", dtype)
        self.work = ModelWork(self.engine.model, self.device.dtype, self.device.kv_dtype)
        self.watch = StepWatch(self.engine, self.work, self.ceilings)
        self._meter = PowerMeter.find(self.device.device)
        self.power: dict[str, float] = {}

    @property
    def facts(self) -> dict[str, Any]:
        """For a report."""
        import torch

        on_gpu = self.device.device.startswith("cuda")
        return {
            "device": torch.cuda.get_device_name() if on_gpu else self.device.device,
            "dtype": self.device.dtype,
            "attention": self.device.attention_backend,
            "kernels": self.device.kernels,
            "start s": self.start_s,
            "ceilings": self.ceilings.facts(),
        }

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams | Sequence[SamplingParams]
    ) -> tuple[float, list[RequestOutput]]:
        """Answers prompts given at once, with nothing in the prefix cache: seconds, and outputs. `watch` then has its steps."""
        self.engine.kv.pool.drop_cache()
        self.watch.reset()
        if self._meter:
            self._meter.begin()
        began_s = time.perf_counter()
        outputs = self.llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - began_s
        if self._meter:
            self.power = self._meter.facts()
        return seconds, outputs

    def together(self, prompts: Sequence[Sequence[int]], params: SamplingParams) -> Timing:
        """Answers prompts of one length given at once, all with `params`, at least two tokens each. `watch` then has its
        steps."""
        engine, watch = self.engine, self.watch
        watch.reset()
        began_s = time.perf_counter()
        for i, prompt in enumerate(prompts):
            engine.add_request(str(i), {"prompt_token_ids": prompt}, params)
        waiting, first_s = {str(i) for i in range(len(prompts))}, 0.0
        while engine.has_unfinished:
            outputs = engine.step()
            if waiting:
                waiting.difference_update(output.request_id for output in outputs if output.outputs[0].token_ids)
                first_s = time.perf_counter() - began_s
        decode_s = time.perf_counter() - began_s - first_s
        num_prefill = max(i + 1 for i, step in enumerate(watch.steps) if (step.starts < len(prompts[0])).any())
        decoding = watch.steps[num_prefill:]
        return Timing(
            first_s,
            decode_s,
            decode_s / (params.max_tokens - 1),  # type: ignore[operator]
            statistics.fmean(step.host_s for step in decoding),
            watch.floor(watch.steps[:num_prefill]).seconds,
            watch.floor(decoding).seconds / len(decoding),
        )

    def tables(
        self, args: argparse.Namespace, title: str, run: Callable[[], object]
    ) -> dict[str, list[dict[str, Any]]]:
        """Of the last run: its steps by the way they ran ("steps"), and where a profile is asked for
        (`add_profile_arguments`) their kernels ("step kernels") from one more run of the same, which `run` makes. Writes
        --trace and --svg."""
        rows = self.watch.rows()
        if not profile.is_wanted(args):
            return {"steps": rows}
        seconds_by_way = {row["way"]: row["seconds"] for row in rows}
        recorded = profile.record(self.engine, profile.choose_windows(self.watch.steps), run)
        found = {row["way"]: row for row in profile.way_rows(recorded)}
        for row in rows:
            row |= {name: found.get(row["way"], {}).get(name) for name in ("kernels ms", "gaps ms", "launched")}
        if recorded and args.trace:
            picture.write_text(args.trace, picture.trace(recorded, title))
        if recorded and args.svg:
            picture.write_text(args.svg, picture.draw_step(profile.typical(recorded, seconds_by_way), title))
        return {"steps": rows, "step kernels": profile.kernel_rows(recorded), "recorded": list(found.values())}

    def shutdown(self) -> None:
        """Gives the device's memory back, if nobody else holds the engine."""
        import torch

        self.llm.shutdown()
        del self.llm, self.engine, self.watch
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def show_tables(args: argparse.Namespace, tables: Mapping[str, Sequence[Row]], most: int = 8) -> None:
    """What `Subject.tables` found, on the screen alone, after the main table; `most` kernels of each way."""
    if args.json == "-" or not tables["steps"]:
        return
    args.json = None
    steps = tables["steps"]
    split = [name for name in TIME_SPLIT if name in steps[0]]
    report(
        args,
        "steps by the way they ran, last run",
        [{name: value for name, value in row.items() if name not in TIME_SPLIT} for row in steps],
    )
    report(args, "milliseconds of a step", [{name: row[name] for name in ("way", *split)} for row in steps])
    kernels = tables.get("step kernels", ())
    for way in dict.fromkeys(row["way"] for row in kernels):
        same = [{name: value for name, value in row.items() if name != "way"} for row in kernels if row["way"] == way]
        report(args, f"kernels of a step ({way}), by time", same[:most])


def decode_params(num_output: int, temperature: float = 0.0) -> SamplingParams:
    """An answer of just so many tokens."""
    return SamplingParams(temperature=temperature, max_tokens=num_output, ignore_eos=True)


def without_prefix_cache(config: EngineConfig) -> EngineConfig:
    return dataclasses.replace(config, enable_prefix_caching=False)


def _model_config(config: EngineConfig) -> Any:
    from quire.hub import resolve_model
    from quire.model_config import load_model_config

    directory = resolve_model(config.model, revision=config.revision, config_only=config.load_format == "dummy")
    return load_model_config(directory, config.hf_overrides)
