"""`quire bench sharing`: KV blocks that parallel samples and beams save by sharing, beside figure 15 of the paper.

    savings = (blocks that sequences would hold if each had its own - blocks that are held) / the former

summed over all steps, while they run (Kwon et al., SOSP 2023, section 6.3). Where beams part is the model's doing, so a real
one answers prompts cut from real text. Lengths are geometric with the means of the paper's two datasets, whose own lengths
are not here; answers ignore the end token. Prefixes are not cached: all that is shared is shared within a request.
"""

from __future__ import annotations

import argparse
import math
import random
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quire.bench.report import add_report_arguments, report
from quire.bench.workload import Lengths
from quire.errors import ConfigError

HELP = "KV blocks that parallel samples and beams save by sharing, beside the paper's"

# Means of prompt and output tokens (section 6.1), and figure 15: percent saved; of ShareGPT the text gives the ends alone.
MEANS = {"alpaca": (19.31, 58.45), "sharegpt": (161.31, 337.99)}
PAPER = {
    ("alpaca", "samples"): ("6.09", "8.53", "9.79"),
    ("alpaca", "beams"): ("37.56", "53.13", "55.16"),
    ("sharegpt", "samples"): ("16.2", "", "30.5"),
    ("sharegpt", "beams"): ("44.3", "", "66.3"),
}
WIDTHS = (2, 4, 6)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="pocket", help="a directory, or pocket, the embedded one")
    parser.add_argument(
        "--text", metavar="FILE", help="what prompts are cut from; without it, Python's standard library"
    )
    parser.add_argument("--num-prompts", type=int, default=48)
    parser.add_argument("--lengths", choices=sorted(MEANS), help="of one dataset alone")
    parser.add_argument("--scale", type=float, default=1.0, help="of all lengths, for models of a short context")
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--max-num-seqs", type=int, default=96)
    parser.add_argument("--seed", type=int, default=0)
    add_report_arguments(parser)


def run(args: argparse.Namespace) -> int:
    if args.num_prompts < 1 or args.scale <= 0:
        raise ConfigError("--num-prompts and --scale must be above 0")
    rows = []
    means, redrawn, preemptions = {}, {}, 0
    with _engine(args) as llm:
        for dataset in [args.lengths] if args.lengths else MEANS:
            lengths, redrawn[dataset] = draw_lengths(
                args.num_prompts, MEANS[dataset], args.scale, llm.engine.max_model_len, args.seed
            )
            means[dataset] = " / ".join(f"{sum(column) / len(lengths):.1f}" for column in zip(*lengths))
            prompts = cut_prompts(llm.get_tokenizer(), args.text, [prompt for prompt, _ in lengths], args.seed)
            for kind in ("samples", "beams"):
                for width, paper in zip(WIDTHS, PAPER[dataset, kind]):
                    count = measure(llm.engine, prompts, [output for _, output in lengths], kind, width)
                    preemptions += count.preemptions
                    rows.append(
                        {
                            "lengths": dataset,
                            "decoding": f"{'beams, width' if kind == 'beams' else 'samples, n ='} {width}",
                            "saved %": 100 * count.saved,
                            "paper %": paper or "-",
                            "blocks": count.held / count.steps,
                            "if not shared": count.without / count.steps,
                        }
                    )
    report(
        args,
        f"{args.num_prompts} requests, blocks of {args.block_size}, lengths times {args.scale:g}",
        rows,
        mean_tokens=means,
        redrawn_lengths=redrawn,
        preemptions=preemptions,
        what="saved = (blocks if not shared - blocks held) / the former, summed over all steps; blocks: mean over steps",
    )
    return 0


@dataclass(slots=True)
class Count:
    """Sums over steps."""

    held: int = 0
    without: int = 0
    steps: int = 0
    preemptions: int = 0

    @property
    def saved(self) -> float:
        return 1 - self.held / self.without


def _engine(args: argparse.Namespace) -> Any:
    from quire.engine.llm import LLM
    from quire.pocket import model_directory

    model = str(model_directory()) if args.model == "pocket" else args.model
    return LLM(
        model,
        dtype="float32",
        block_size=args.block_size,
        max_num_seqs=args.max_num_seqs,
        enable_prefix_caching=False,
        max_steps_in_flight=1,
        num_threads=1,  # two of them wait for each other on a busy machine
    )


def measure(engine: Any, prompts: Sequence[list[int]], outputs: Sequence[int], kind: str, width: int) -> Count:
    """Runs all requests, and counts blocks while each step runs: its result ends beams, and starts others."""
    from quire.sampling_params import BeamSearchParams, RequestOutputKind, SamplingParams

    for i, (prompt, output) in enumerate(zip(prompts, outputs)):
        final = RequestOutputKind.FINAL_ONLY
        if kind == "beams":
            search = BeamSearchParams(beam_width=width, max_tokens=output, ignore_eos=True, output_kind=final)
            params = search.sampling_params()
        else:
            params = SamplingParams(n=width, max_tokens=output, ignore_eos=True, seed=i, output_kind=final)
        engine.add_request(str(i), prompt, params)
    count = Count()
    scheduler, kv = engine.scheduler, engine.kv
    update, before = scheduler.update, sum(scheduler.counts.preemptions.values())

    def counted(result: Any) -> Any:
        rows = scheduler.batch.rows_in_order()
        count.held += kv.pool.num_held
        count.without += sum(int(table[rows].sum()) for table in kv.num_blocks)
        count.steps += 1
        return update(result)

    scheduler.update = counted
    try:
        while engine.has_unfinished:
            engine.step()
    finally:
        scheduler.update = update
    count.preemptions = sum(scheduler.counts.preemptions.values()) - before
    return count


def draw_lengths(
    count: int, means: tuple[float, float], scale: float, max_model_len: int, seed: int
) -> tuple[list[Lengths], int]:
    """`count` geometric lengths, and how many were drawn again since they were above the model's."""
    rng = random.Random(seed)

    def draw(mean: float) -> int:
        """1, 2, 3, ... with P(length > k) = (1 - 1 / mean) ** k."""
        return 1 + int(math.log(1 - rng.random()) / math.log1p(-1 / max(scale * mean, 1.001)))

    lengths: list[Lengths] = []
    redrawn = 0
    while len(lengths) < count:
        prompt, output = (draw(mean) for mean in means)
        if prompt + output > max_model_len:
            redrawn += 1
        else:
            lengths.append((prompt, output))
    return lengths, redrawn


def cut_prompts(tokenizer: Any, path: str | None, lengths: Sequence[int], seed: int) -> list[list[int]]:
    """Pieces of a text, from places drawn at random."""
    rng = random.Random(seed)
    if path is None:
        library = Path(sysconfig.get_path("stdlib"))
        text = "".join(
            (library / f"{name}.py").read_text() for name in ("argparse", "heapq", "shutil", "textwrap", "zipfile")
        )
    else:
        text = Path(path).read_text()
    token_ids = tokenizer.encode(text)
    if len(token_ids) <= max(lengths):
        raise ConfigError(f"the text has {len(token_ids)} tokens, and a prompt of {max(lengths)} is to be cut from it")
    starts = (rng.randrange(len(token_ids) - length) for length in lengths)
    return [token_ids[start : start + length] for start, length in zip(starts, lengths)]
