"""The only messages between scheduler and worker: what to do in one step, and what came of it.

All arrays are int32 and host memory; rows are the worker's rows, assigned by the core. A sequence keeps its row as long as
it runs; its token ids, block tables and sampling parameters live in the worker under that row, and a step sends changes only.

Within a step the worker does, in this order: new rows, token and table updates, swap out, swap in, block copies, forward,
sample.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import numpy as np

from quire.sampling_params import SamplingParams


@dataclass(slots=True)
class NewRow:
    """A sequence moves into a row: everything that the worker must know of it, replacing what the row held.

    `token_ids` [n] are all its known tokens; the first `num_prompt_tokens` of them are the prompt.
    """

    row: int
    token_ids: np.ndarray
    num_prompt_tokens: int
    params: SamplingParams
    seed: int
    branch: int
    stop_token_ids: tuple[int, ...]  # end-of-text tokens, unless ignored: masked until min_tokens are out
    bad_words_token_ids: tuple[tuple[int, ...], ...] = ()
    num_candidates: int = 0  # above 0: a beam, whose samples give so many candidates and draw nothing


@dataclass(slots=True)
class TokenUpdate:
    """A token that was decided on the host: token_ids[rows[i], positions[i]] = token_ids[i]."""

    rows: np.ndarray
    positions: np.ndarray
    token_ids: np.ndarray


@dataclass(frozen=True, slots=True)
class TokenInfo:
    """Of one token: its log probability and rank under the raw model distribution, and the likeliest tokens beside it."""

    logprob: float
    rank: int
    top_ids: np.ndarray
    top_logprobs: np.ndarray


@dataclass(slots=True)
class Candidates:
    """How a beam may go on: `token_ids` [K] and `scores` [K], log probabilities after penalties and masks, best first.

    Where the request asks for logprobs: `logprobs` [K] and `ranks` [K] of the candidates under the raw distribution, and its
    likeliest tokens `top_ids` and `top_logprobs` [k].
    """

    token_ids: np.ndarray
    scores: np.ndarray
    logprobs: np.ndarray | None = None
    ranks: np.ndarray | None = None
    top_ids: np.ndarray | None = None
    top_logprobs: np.ndarray | None = None

    def info(self, column: int) -> TokenInfo | None:
        if self.logprobs is None or self.ranks is None or self.top_ids is None or self.top_logprobs is None:
            return None
        return TokenInfo(float(self.logprobs[column]), int(self.ranks[column]), self.top_ids, self.top_logprobs)


@dataclass(slots=True)
class TableUpdate:
    """Entries of one cache group's block tables: tables[rows[i], columns[i]] = blocks[i]. Later entries win."""

    rows: np.ndarray
    columns: np.ndarray
    blocks: np.ndarray


class Direction(Enum):
    OUT = "out"  # device to host
    IN = "in"  # host to device


@dataclass(slots=True)
class Transfer:
    """Blocks that move between device and host; `pairs` [n, 2] are (source, target).

    Both sides are pinned until `transfer_id` comes back in a StepOutput.
    """

    transfer_id: int
    direction: Direction
    pairs: np.ndarray


@dataclass(slots=True)
class SchedulerOutput:
    """One step. Entry i computes the tokens at positions starts[i] .. starts[i] + num_tokens[i] - 1 of row rows[i].

    The input token ids are in the worker's row already (prompt tokens came with the row, drawn ones were written there by
    the step that drew them), so a step in flight needs no token from the host.

    Sample j draws the token at index sample_positions[j] of row sample_rows[j] from the logits of the last position of entry
    sample_entries[j]. Several samples may share an entry: that is how n sequences start from one prefill.

    Example, two decoding rows 4 and 7 and a prefill chunk of 5 tokens that ends the prompt of row 2 with n = 2 (second
    sequence in row 3):
        rows [4 7 2]  starts [30 12 0]  num_tokens [1 1 5]
        sample_entries [0 1 2 2]  sample_rows [4 7 2 3]  sample_positions [31 13 5 5]
    """

    step_id: int
    rows: np.ndarray
    starts: np.ndarray
    num_tokens: np.ndarray
    sample_entries: np.ndarray
    sample_rows: np.ndarray
    sample_positions: np.ndarray
    new_rows: list[NewRow] = field(default_factory=list)
    token_updates: TokenUpdate | None = None
    table_updates: list[list[TableUpdate]] = field(default_factory=list)  # one list for each cache group
    swap_out: list[Transfer] = field(default_factory=list)
    swap_in: list[Transfer] = field(default_factory=list)
    copies: np.ndarray = field(default_factory=lambda: np.zeros((0, 2), dtype=np.int32))  # (source, target)
    # Entry -> guessed tokens that follow its last known one; its num_tokens includes them. A sample of such an entry
    # returns as many tokens as were right, and one more.
    draft_token_ids: dict[int, list[int]] = field(default_factory=dict)

    @property
    def total_num_tokens(self) -> int:
        return int(self.num_tokens.sum())


@dataclass(slots=True)
class StepOutput:
    """What came of a step: `token_ids` [M] drawn for its M samples, in their order.

    With drafts, `accepted` maps a sample to all its tokens (one or more) and `token_ids` holds the first of them.
    """

    step_id: int
    token_ids: np.ndarray
    accepted: dict[int, list[int]] = field(default_factory=dict)
    draft_token_ids: dict[int, list[int]] = field(default_factory=dict)  # sample -> guesses for its next step
    logprobs: dict[int, Any] = field(default_factory=dict)  # sample -> sampling.logprobs of the drawn token
    prompt_logprobs: dict[int, Any] = field(default_factory=dict)  # entry -> of the tokens that follow its positions
    candidates: dict[int, Candidates] = field(default_factory=dict)  # sample -> how its beam may go on
    errors: dict[int, str] = field(default_factory=dict)  # sample -> why no token could be drawn
    finished_transfers: list[int] = field(default_factory=list)
    elapsed_s: float = 0.0  # of the whole step
    transfer_s: float = 0.0  # of that, moving its blocks out and in; 0 if it was not waited for
