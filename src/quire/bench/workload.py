"""Lists of requests by length.

Token ids are drawn at random, and answers ignore the end token: every engine does the same work.
"""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Sequence
from pathlib import Path

from quire.errors import ConfigError

Lengths = tuple[int, int]  # prompt tokens, output tokens


def read_lengths(path: str | Path) -> list[Lengths]:
    """From JSON, a list of [prompt tokens, output tokens], or CSV with columns prompt_tokens and output_tokens.

    Raises ConfigError if the file is neither.
    """
    path = Path(path)
    try:
        if path.suffix == ".csv":
            with path.open(newline="") as file:
                return [(int(row["prompt_tokens"]), int(row["output_tokens"])) for row in csv.DictReader(file)]
        return [(int(prompt), int(output)) for prompt, output in json.loads(path.read_text())]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"workload {path}: {error!r}; it must be a list of [prompt tokens, output tokens]") from error


def draw_lengths(count: int, prompt: Lengths, output: Lengths, seed: int = 0) -> list[Lengths]:
    """`count` requests, lengths uniform between the given bounds."""
    rng = random.Random(seed)
    return [(rng.randint(*prompt), rng.randint(*output)) for _ in range(count)]


def draw_prompts(lengths: Sequence[Lengths], vocab_size: int, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(vocab_size) for _ in range(prompt)] for prompt, _ in lengths]
