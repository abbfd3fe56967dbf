"""A request's group of sequences, and the state that a sequence carries from one row to the next.

While a sequence runs, its counters and tokens live in the arrays of `Batch` under its row; this object holds them when it
waits, and what never changes always. Does not know blocks.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

import numpy as np

from quire.sampling_params import SamplingParams

if TYPE_CHECKING:
    from quire.core.batch import Batch


class Status(Enum):
    WAITING = "waiting"  # has no blocks: new, or preempted to be recomputed
    SWAPPED = "swapped"  # its blocks are in host memory, or on their way there
    RUNNING = "running"  # has a row
    FINISHED = "finished"


class FinishReason(Enum):
    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(slots=True)
class HostTable:
    """The host blocks of one cache group: they stand for blocks `first` .. `first + len(blocks) - 1` of the sequence."""

    first: int
    blocks: list[int]


class Sequence:
    """One stream of tokens.

    Three counts of tokens, each at most the next (see `Batch` for what lies between them):
        num_computed <= num_scheduled <= num_tokens + num_pending
    """

    __slots__ = (
        "_buffer",
        "_num_computed",
        "_num_pending",
        "_num_scheduled",
        "_num_tokens",
        "batch",
        "block_names",
        "branch",
        "error",
        "finish_reason",
        "group",
        "host_tables",
        "last_step",
        "num_published",
        "row",
        "status",
        "stop_reason",
    )

    def __init__(self, group: RequestGroup, branch: int, token_ids: np.ndarray) -> None:
        self.group = group
        self.branch = branch
        self.status = Status.WAITING
        self.batch: Batch | None = None
        self.row = -1
        self.last_step = -1  # the last step that computes for it
        self.block_names: list[bytes] = []  # of its full blocks, as far as they have been needed
        self.num_published = 0  # full blocks offered to the prefix cache
        self.host_tables: list[HostTable] = []  # one for each cache group, while swapped
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | str | None = None
        self.error: str | None = None
        self._buffer = token_ids
        self._num_tokens = len(token_ids)
        self._num_scheduled = 0
        self._num_computed = 0
        self._num_pending = 0

    @property
    def num_tokens(self) -> int:
        """Known tokens: the prompt and the accepted ones."""
        return int(self.batch.num_tokens[self.row]) if self.batch else self._num_tokens

    @property
    def num_output_tokens(self) -> int:
        return self.num_tokens - len(self.group.prompt_token_ids)

    @property
    def num_computed(self) -> int:
        """Tokens whose keys and values are in memory, by steps that have come back."""
        return int(self.batch.num_computed[self.row]) if self.batch else self._num_computed

    @property
    def num_pending(self) -> int:
        """Tokens that steps in flight will draw."""
        return int(self.batch.num_pending[self.row]) if self.batch else self._num_pending

    @property
    def num_scheduled(self) -> int:
        """Tokens whose keys and values are in memory or will be when the steps in flight have run."""
        return int(self.batch.num_scheduled[self.row]) if self.batch else self._num_scheduled

    @property
    def token_ids(self) -> np.ndarray:
        """int32 [num_tokens]: prompt and output. A view: copy it to keep it."""
        if self.batch:
            return self.batch.token_ids[self.row, : self.num_tokens]
        return self._buffer[: self._num_tokens]

    @property
    def output_token_ids(self) -> np.ndarray:
        return self.token_ids[len(self.group.prompt_token_ids) :]

    @property
    def is_finished(self) -> bool:
        return self.status is Status.FINISHED

    # -- what happens to a sequence without a row: its last step in flight comes back -----------------------------------
    def append_while_waiting(self, token_ids: list[int]) -> None:
        assert self.batch is None
        self._buffer = np.concatenate([self.token_ids, np.asarray(token_ids, dtype=np.int32)])
        self._num_tokens = len(self._buffer)
        self._num_pending -= 1

    def set_computed(self, count: int) -> None:
        assert self.batch is None
        self._num_computed = count

    def rewind(self, count: int) -> None:
        """Only the first `count` tokens' keys and values are good."""
        assert self.batch is None
        self._num_computed = self._num_scheduled = count

    def forget_computed(self) -> None:
        """Its keys and values are gone: everything is to be computed again."""
        self._num_computed = self._num_scheduled = self.num_published = 0

    def move_in(self, batch: Batch, row: int) -> None:
        """Its counters and tokens move into `row` of `batch`. Called by `Batch` only."""
        count = self._num_tokens
        batch.token_ids[row, :count] = self._buffer[:count]
        batch.num_tokens[row] = count
        batch.num_scheduled[row] = self._num_scheduled
        batch.num_computed[row] = self._num_computed
        batch.num_pending[row] = self._num_pending
        self.batch, self.row = batch, row

    def move_out(self) -> None:
        batch, row = self.batch, self.row
        assert batch is not None
        self._num_tokens = int(batch.num_tokens[row])
        self._num_scheduled = int(batch.num_scheduled[row])
        self._num_computed = int(batch.num_computed[row])
        self._num_pending = int(batch.num_pending[row])
        self._buffer = batch.token_ids[row, : self._num_tokens].copy()
        self.batch, self.row = None, -1

    def fork(self, branch: int) -> Sequence:
        """A sequence of the same group with this one's tokens. It has no row and no blocks yet."""
        child = Sequence(self.group, branch, self.token_ids.copy())
        child.block_names = list(self.block_names)
        self.group.sequences.append(child)
        return child


@dataclass(slots=True, eq=False)
class RequestGroup:
    """One request: its prompt, its parameters, and the sequences that answer it.

    `prompt_token_ids` is int32 [P]. Groups are served in the order (priority, arrival), lower first; `arrival` is a running
    number. `arrival_s` and other times are the caller's clock.
    """

    request_id: str
    prompt_token_ids: np.ndarray
    params: SamplingParams
    seed: int
    arrival: int = 0
    arrival_s: float = 0.0
    priority: int = 0
    stop_token_ids: tuple[int, ...] = ()  # end-of-text tokens: they finish a sequence with stop_reason None
    bad_words_token_ids: tuple[tuple[int, ...], ...] = ()
    cache_salt: str | None = None
    max_tokens: int = 0  # most tokens of an answer, what the model's length leaves; set by the scheduler
    sequences: list[Sequence] = field(default_factory=list)
    num_cached_tokens: int = 0  # of the prompt, found in the prefix cache at first admission
    num_recomputed_tokens: int = 0
    num_preemptions: int = 0
    was_admitted: bool = False
    is_forked: bool = False  # its n sequences exist

    def __post_init__(self) -> None:
        if not self.sequences:
            self.sequences.append(Sequence(self, 0, self.prompt_token_ids))
            self.is_forked = self.params.n == 1

    @property
    def order(self) -> tuple[int, int]:
        return (self.priority, self.arrival)

    @property
    def live(self) -> list[Sequence]:
        return [sequence for sequence in self.sequences if not sequence.is_finished]

    @property
    def is_finished(self) -> bool:
        return all(sequence.is_finished for sequence in self.sequences)

    @property
    def num_rows(self) -> int:
        """Rows that it needs to run to its end."""
        return len(self.live) if self.is_forked else self.params.n
