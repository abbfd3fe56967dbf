"""What a load generator sends, and when: prompts, answer lengths and arrival times, from lists, traces and text files.

    file ──> Item (pieces of a prompt, or its text; answer length; arrival) ──> scaled to the model's context ──> prompt

A *piece* is a run of tokens with a name: equal names begin with equal tokens. A trace tells no contents, but some tell which
parts of two prompts are the same; prompts made of the pieces of such a trace share as much as the real ones did. Everything
random follows from a seed. Does not know HTTP, nor who answers.
"""

from __future__ import annotations

import csv
import itertools
import json
import random
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from quire.bench.workload import Lengths
from quire.errors import ConfigError

MOONCAKE_BLOCK = 512  # tokens that one of its hash_ids stands for
FIRST_TOKEN_ID = 10  # below that, vocabularies keep their special tokens

# For servers that take no token ids: most tokenizers have each of these, with the space before it, as one token.
WORDS = (  # noqa: SIM905 - a hundred quotes would not read better
    "the of and to in a is that for it as was with be by on not he his but at are this have from or had an they which one you"
    " were all her she there would their we him been has when who will no more if out so up said what its about than into them"
    " can only other time new some could these two may first then do any like my now over such our man me even most made after"
).split()


@dataclass(frozen=True, slots=True)
class Piece:
    """`num_tokens` tokens; those of a piece with the same name begin alike. is_shared: the name may come again."""

    name: str
    num_tokens: int
    is_shared: bool = False


@dataclass(frozen=True, slots=True)
class Item:
    """One request to be sent.

    Either pieces or text is its prompt. num_output None: up to the server, or to what the user says. arrival_s: seconds
    since the first request, None where the source tells no times.
    """

    pieces: tuple[Piece, ...] = ()
    text: str | None = None
    num_output: int | None = None
    arrival_s: float | None = None

    @property
    def num_prompt(self) -> int:
        """Tokens of the prompt, 0 if it is a text."""
        return sum(piece.num_tokens for piece in self.pieces)


# -- sources -----------------------------------------------------------------------------------------------------------------
def read_items(path: str | Path, field_name: str | None = None) -> list[Item]:
    """The requests in a file, in the order of their arrival. What it is shows from its name and its first line:

    .csv           prompt_tokens, output_tokens, and arrival_s (seconds) if there are times
    .json          a list of [prompt tokens, output tokens]
    .jsonl         with `field_name`: that key's value is the prompt, a text or a list of texts (the first one counts)
                   with hash_ids (Mooncake): timestamp (ms), input_length, output_length
                   with parts (RAGPulse): arrival_s, output_tokens, parts = [[name, tokens], …]
                   otherwise prompt_tokens, output_tokens, and arrival_s if there are times
    anything else  a text: each line that isn't empty is a prompt

    Raises ConfigError for a file that is none of these.
    """
    path = Path(path)
    try:
        if path.suffix == ".csv":
            with path.open(newline="", encoding="utf-8") as file:
                items = [_from_lengths(str(i), row) for i, row in enumerate(csv.DictReader(file))]
        elif path.suffix == ".json":
            rows = json.loads(path.read_text(encoding="utf-8"))
            items = [_of_lengths(str(i), int(prompt), int(output)) for i, (prompt, output) in enumerate(rows)]
        else:
            lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
            if path.suffix in (".jsonl", ".ndjson"):
                items = [_from_object(str(i), json.loads(line), field_name) for i, line in enumerate(lines)]
            else:
                items = [Item(text=line) for line in lines]
    except OSError as error:
        raise ConfigError(f"cannot read the workload {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise ConfigError(f"workload {path}: {error!r}; see `quire bench serve --help` for what it may hold") from error
    if not items:
        raise ConfigError(f"workload {path} holds no requests")
    return sorted(items, key=lambda item: item.arrival_s or 0.0)


def items_of(lengths: Iterable[Lengths]) -> list[Item]:
    """Requests of given lengths that share nothing and have no times."""
    return [_of_lengths(str(i), prompt, output) for i, (prompt, output) in enumerate(lengths)]


def _of_lengths(name: str, prompt: int, output: int, arrival_s: float | None = None) -> Item:
    return Item((Piece(name, max(prompt, 1)),), num_output=max(output, 1), arrival_s=arrival_s)


def _from_lengths(name: str, row: Mapping[str, Any]) -> Item:
    arrival = row.get("arrival_s")
    lengths = int(row["prompt_tokens"]), int(row["output_tokens"])
    return _of_lengths(name, *lengths, None if arrival in (None, "") else float(arrival))


def _from_object(name: str, row: Mapping[str, Any], field_name: str | None) -> Item:
    if field_name is not None:
        value = row[field_name]
        text = value if isinstance(value, str) else value[0]
        if not isinstance(text, str):
            raise TypeError(f"{field_name} is not a text")
        return Item(text=text)
    if "hash_ids" in row:
        left, pieces = int(row["input_length"]), []
        for block in row["hash_ids"]:
            pieces.append(Piece(f"block {block}", min(left, MOONCAKE_BLOCK), is_shared=True))
            left -= pieces[-1].num_tokens
        pieces.append(Piece(name, left))  # what no id stands for
        kept = tuple(piece for piece in pieces if piece.num_tokens > 0)
        return Item(kept, None, max(int(row["output_length"]), 1), float(row["timestamp"]) / 1000)
    if "parts" in row:
        pieces = [Piece(f"part {part}", int(size), is_shared=True) for part, size in row["parts"] if size > 0]
        return Item(tuple(pieces), None, max(int(row["output_tokens"]), 1), float(row["arrival_s"]))
    return _from_lengths(name, row)


# -- scaling -----------------------------------------------------------------------------------------------------------------
def scale_to_fit(items: Sequence[Item], max_model_len: int) -> float:
    """The length scale, at most 1, at which every request fits the context."""
    longest = max((item.num_prompt + (item.num_output or 0) for item in items), default=0)
    # rounding up, of a prompt's pieces and of its answer, may cost a token each: `fit` cuts what that leaves over
    return min(1.0, max_model_len / longest) if longest else 1.0


def scale_lengths(item: Item, scale: float) -> Item:
    """Lengths times `scale`, at least one token each. Equal pieces stay equal."""
    if scale == 1.0:
        return item
    # boundaries are rounded, not sizes: the sum stays right however small the pieces get
    ends = [round(end * scale) for end in itertools.accumulate(piece.num_tokens for piece in item.pieces)]
    sizes = [end - begin for begin, end in itertools.pairwise([0, *ends])]
    pieces = [replace(piece, num_tokens=size) for piece, size in zip(item.pieces, sizes) if size]
    if item.pieces and not pieces:
        pieces = [replace(item.pieces[0], num_tokens=1)]
    num_output = None if item.num_output is None else max(round(item.num_output * scale), 1)
    return replace(item, pieces=tuple(pieces), num_output=num_output)


def fit(item: Item, max_model_len: int) -> Item:
    """The request itself if it fits; else shrunk until it does, prompt and answer in proportion, the prompt from its end."""
    if item.num_prompt + (item.num_output or 0) <= max_model_len or not item.pieces:
        return item
    num_output = item.num_output or 0
    keep = max(max_model_len * item.num_prompt // (item.num_prompt + num_output), 1)
    pieces, left = [], keep
    for piece in item.pieces:
        if left > 0:
            pieces.append(replace(piece, num_tokens=min(piece.num_tokens, left)))
            left -= piece.num_tokens
    output = None if item.num_output is None else max(max_model_len - keep, 1)
    return replace(item, pieces=tuple(pieces), num_output=output)


# -- when --------------------------------------------------------------------------------------------------------------------
def arrival_times(count: int, rate: float, burstiness: float, rng: random.Random) -> list[float]:
    """Seconds at which `count` requests are sent, the first at 0.

    Gaps are drawn from a gamma distribution of mean 1 / rate and coefficient of variation 1 / sqrt(burstiness): 1 is a
    Poisson process, less is burstier, more is steadier. An infinite rate sends all at once.
    """
    if rate == float("inf"):
        return [0.0] * count
    gaps = (rng.gammavariate(burstiness, 1 / (rate * burstiness)) for _ in range(count - 1))
    return list(itertools.accumulate(gaps, initial=0.0))


def trace_times(items: Sequence[Item], time_scale: float) -> list[float] | None:
    """The items' own arrivals, times `time_scale`, the first at 0; None if they have none."""
    times = [item.arrival_s for item in items]
    if not times or any(time_s is None for time_s in times):
        return None
    return [(time_s - times[0]) * time_scale for time_s in times]  # type: ignore[operator]


# -- contents ----------------------------------------------------------------------------------------------------------------
@dataclass
class PromptMaker:
    """Token ids, or words in their place, for pieces. Ids are drawn from [10, vocab_size)."""

    vocab_size: int
    seed: int = 0
    _known: dict[str, array[int]] = field(default_factory=dict)

    def token_ids(self, item: Item) -> list[int]:
        return [token_id for piece in item.pieces for token_id in self._piece(piece)]

    def text(self, item: Item) -> str:
        """About as many tokens of common English words."""
        return item.text if item.text is not None else " ".join(WORDS[i % len(WORDS)] for i in self.token_ids(item))

    def _piece(self, piece: Piece) -> array[int]:
        known = self._known.get(piece.name)
        if known is None or len(known) < piece.num_tokens:
            # each id takes one draw, so what is longer begins as what is shorter
            rng = random.Random(f"{self.seed}:{piece.name}")
            known = array("i", rng.choices(range(FIRST_TOKEN_ID, self.vocab_size), k=piece.num_tokens))
            if piece.is_shared:
                self._known[piece.name] = known
        return known[: piece.num_tokens]
