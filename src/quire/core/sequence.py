"""A request's group of sequences, and the state that a sequence carries from one row to the next.

While a sequence runs, its counters and tokens live in the arrays of `Batch` under its row; this object holds them when it
waits, and what never changes always. Does not know blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

import numpy as np

from quire.core.beam import Beam, BeamSearch
from quire.core.journal import Journal
from quire.core.step import Candidates
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
        "_num_charged",
        "_num_computed",
        "_num_pending",
        "_num_scheduled",
        "_num_tokens",
        "batch",
        "block_names",
        "branch",
        "candidates",
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
        self.candidates: Candidates | None = None  # of a beam, until its group has decided
        self._buffer = token_ids
        self._num_tokens = len(token_ids)
        self._num_scheduled = 0
        self._num_computed = 0
        self._num_pending = 0
        self._num_charged = 0  # tokens whose computation its client has been charged for

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
        """Its keys and values are gone: everything is to be computed again, and what came of it to be drawn again."""
        self.candidates = None
        self._num_computed = self._num_scheduled = self.num_published = 0

    def move_in(self, batch: Batch, row: int) -> None:
        """Its counters and tokens move into `row` of `batch`. Called by `Batch` only."""
        count = self._num_tokens
        batch.token_ids[row, :count] = self._buffer[:count]
        batch.num_tokens[row] = count
        batch.num_scheduled[row] = self._num_scheduled
        batch.num_computed[row] = self._num_computed
        batch.num_pending[row] = self._num_pending
        batch.num_charged[row] = self._num_charged
        self.batch, self.row = batch, row

    def move_out(self) -> None:
        batch, row = self.batch, self.row
        assert batch is not None
        self._num_tokens = int(batch.num_tokens[row])
        self._num_scheduled = int(batch.num_scheduled[row])
        self._num_computed = int(batch.num_computed[row])
        self._num_pending = int(batch.num_pending[row])
        self._num_charged = int(batch.num_charged[row])
        self._buffer = batch.token_ids[row, : self._num_tokens].copy()
        self.batch, self.row = None, -1

    def append(self, token_id: int) -> None:
        """A token that was decided on the host, for a running sequence."""
        assert self.batch is not None
        count = self.num_tokens
        self.batch.token_ids[self.row, count] = token_id
        self.batch.num_tokens[self.row] = count + 1

    def fork(self) -> Sequence:
        """A sequence of the same group with this one's tokens. It has no row and no blocks yet."""
        child = Sequence(self.group, self.group.num_branches, self.token_ids.copy())
        self.group.num_branches += 1
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
    client: str = ""  # whose request it is: clients share token time by their weights
    stop_token_ids: tuple[int, ...] = ()  # end-of-text tokens: they finish a sequence with stop_reason None
    bad_words_token_ids: tuple[tuple[int, ...], ...] = ()
    find_stop_string: Callable[[Beam, int], str | None] | None = None  # that a token behind a beam completes
    cache_salt: str | None = None
    source: Sequence | None = None  # a sequence of another group, from which this one was forked while it ran
    max_tokens: int = 0  # most tokens of an answer, what the model's length leaves; set by the scheduler
    beam: BeamSearch | None = None  # set by the scheduler, where the request asks for it
    sequences: list[Sequence] = field(default_factory=list)  # of a beam search: the live beams, best first
    num_branches: int = 1  # sequences that it has had
    num_forks: int = 0  # groups that were forked from it, or from those
    num_own_forks: int = 0  # from it alone
    root: RequestGroup | None = None  # of such a group: the request that all began with
    client_number: int = 0  # of `client` among those with live requests; set by the scheduler
    num_cached_tokens: int = 0  # of the prompt, found in the prefix cache at first admission
    journal: Journal = field(default_factory=Journal)
    is_forked: bool = False  # its n sequences exist

    def __post_init__(self) -> None:
        if not self.sequences:
            self.sequences.append(Sequence(self, 0, self.prompt_token_ids))
            self.is_forked = self.params.num_sequences == 1 or self.params.use_beam_search

    def start_beams(self) -> None:
        """Begins the search that the request asks for; its longest answer is known now."""
        if self.params.use_beam_search:
            self.beam = BeamSearch(
                self.params.num_sequences,
                num_end_tokens=len({*self.stop_token_ids, *(self.params.stop_token_ids or ())}),
                max_tokens=self.max_tokens,
                length_penalty=self.params.length_penalty,
                early_stopping=self.params.early_stopping,
            )

    @property
    def was_admitted(self) -> bool:
        return self.journal.admitted_step is not None

    @property
    def num_preemptions(self) -> int:
        return len(self.journal.preemptions)

    @property
    def order(self) -> tuple[int, int]:
        return (self.priority, self.arrival)

    @property
    def live(self) -> list[Sequence]:
        return [sequence for sequence in self.sequences if not sequence.is_finished]

    @property
    def is_finished(self) -> bool:
        for sequence in self.sequences:  # noqa: SIM110 - asked of each request at each step, which a generator makes dear
            if sequence.status is not Status.FINISHED:
                return False
        return True

    @property
    def num_rows(self) -> int:
        """Rows that it needs to run to its end."""
        if self.is_finished:
            return 0
        return len(self.live) if self.is_forked and self.beam is None else self.params.num_sequences
