"""`quire bench waste`: KV slots allocated but not filled, while a list of requests runs, beside what reserving would waste.

The engine runs as it is, with a model of next to nothing: allocation does not depend on the numbers that the model computes.
The three reservations are those of Kwon et al., SOSP 2023, section 6.1: a sequence gets all its slots when it starts.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

from quire.bench.report import add_report_arguments, report
from quire.bench.shapes import write_shape
from quire.bench.workload import Lengths, draw_lengths, draw_prompts, read_lengths

HELP = "KV slots wasted while a trace's requests run, beside three ways of reserving"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workload", metavar="FILE", help="CSV or JSON of lengths; without it, lengths are drawn")
    parser.add_argument("--num-prompts", type=int, default=1000, help="only the first N requests")
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--max-model-len", type=int, default=8192, help="longer requests are left out, and counted")
    parser.add_argument("--num-blocks", type=int, default=8192)
    parser.add_argument("--max-num-seqs", type=int, default=256)
    add_report_arguments(parser)


def run(args: argparse.Namespace) -> int:
    lengths = read_lengths(args.workload) if args.workload else draw_lengths(args.num_prompts, (16, 2000), (1, 500))
    lengths = lengths[: args.num_prompts]
    fitting = [pair for pair in lengths if sum(pair) <= args.max_model_len]
    allocated, filled, sequences, steps, preemptions = _run_engine(args, fitting)
    rows = [
        {
            "allocation": f"paged, blocks of {args.block_size}",
            "waste %": 100 * (1 - filled / allocated),
            "slots per sequence": allocated / sequences,
        }
    ]
    reservations: dict[str, Callable[[int], int]] = {
        "reserve the true output (oracle)": lambda output: output,
        "reserve a power of two": lambda output: 1 << (output - 1).bit_length(),
        "reserve the maximum": lambda output: args.max_model_len,
    }
    for name, reserve in reservations.items():
        took, used, lifetimes = _reserved(fitting, reserve, args.max_model_len)
        rows.append({"allocation": name, "waste %": 100 * (1 - used / took), "slots per sequence": took / lifetimes})
    report(
        args,
        f"{len(fitting)} requests ({len(lengths) - len(fitting)} too long for {args.max_model_len} left out)",
        rows,
        steps=steps,
        mean_running=sequences / steps,
        preemptions=preemptions,
        what="waste = (allocated - filled) / allocated to live sequences, summed over all steps",
    )
    return 0


def _run_engine(args: argparse.Namespace, lengths: list[Lengths]) -> tuple[int, int, int, int, int]:
    """Sums over steps of allocated slots, filled slots and running sequences; then steps and preemptions."""
    from quire.config import EngineConfig
    from quire.engine.engine import Engine
    from quire.sampling_params import RequestOutputKind, SamplingParams

    with tempfile.TemporaryDirectory() as directory:
        engine = Engine(
            EngineConfig(
                model=str(write_shape("dummy", Path(directory))),
                load_format="dummy",
                skip_tokenizer_init=True,
                enable_prefix_caching=False,
                block_size=args.block_size,
                max_model_len=args.max_model_len,
                max_num_seqs=args.max_num_seqs,
                num_gpu_blocks_override=args.num_blocks,
            )
        )
    for i, (prompt, (_, output)) in enumerate(zip(draw_prompts(lengths, engine.model.vocab_size), lengths)):
        params = SamplingParams(
            temperature=0, max_tokens=output, ignore_eos=True, output_kind=RequestOutputKind.FINAL_ONLY
        )
        engine.add_request(str(i), prompt, params)
    allocated = filled = sequences = steps = 0
    while engine.has_unfinished:
        engine.step()
        usage = engine.slot_usage()
        allocated += usage.allocated
        filled += usage.filled
        sequences += engine.scheduler.num_running
        steps += 1
    preemptions = sum(engine.scheduler.counts.preemptions.values())
    engine.shutdown()
    return allocated, filled, sequences, steps, preemptions


def _reserved(lengths: list[Lengths], reserve: Callable[[int], int], maximum: int) -> tuple[int, int, int]:
    """Sums over the steps of all requests, one a token, of reserved slots, filled slots, and the steps."""
    took = used = steps = 0
    for prompt, output in lengths:
        slots = min(prompt + reserve(output), maximum)
        took += slots * output
        used += sum(range(prompt, prompt + output))
        steps += output
    return took, used, steps
