"""The sizes that steps are captured in, what of fixed address each has, and how a step is sent there.

All sizes lie in the same buffers, since only one runs at a time. What a step says goes into a size's *words*: one array of
int32, whose parts (`Packing`) begin elsewhere in each size, and which goes to the device in one copy from pinned memory.

    decode size 16    | entries | rows | seq_lens | table updates | the plan's work |
    mixed size 2,048  | entries | rows | query_start_loc | seq_lens | last | table updates | the plan's work |

Does not know what is captured, nor when (`graph_runner`).

Shape legend: N = entries of a size, X = arrays of one number a token, M = samples, T = tokens, U = table entries that change,
H = hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from quire.attention.base import AttentionBatch, AttentionSpec
from quire.core.step import SchedulerOutput
from quire.kernels.triton import sampling
from quire.sampling.state import SamplingState, Use
from quire.sampling.transfer import Inbox, Outbox
from quire.sampling.triton import write_entries
from quire.worker.input_batch import PackedInputBatch, Packing

LARGEST = 512  # entries: beyond, launching takes less time than the layers do
MIXED_LARGEST = 8192  # tokens
LONG = 1024  # tokens of a query: see `attention.work_list.choose_tile`
_IN_GRAPH = int(Use.RANDOM | Use.TEMPERATURE | Use.TRUNCATE | Use.NUCLEUS)
_TRUNCATE = int(Use.TRUNCATE)


def graph_sizes(max_num_seqs: int, few: int = 4) -> list[int]:
    """1, 2, 4, then 16 and its doubles up to 64, every 32nd up to 128, every 16th up to 160, every 32nd up to LARGEST, and 208;
    the last one holds max_num_seqs. few: what of 2 and 4 is more is left out (`ops.most_few_tokens`); in such a model 2 and
    3 entries would take longer than 16 do.

    Up to 64 a step takes as long as reading the weights, and linear layers of so many tokens read them faster than those of
    fewer (`kernels.triton.linear`). Of 176 tokens they take as long as of 192, of 240 as of 256 (`kernels.gluon.linear`).
    """
    sizes = [size for size in (1, 2, 4) if size <= few]
    sizes += [16, 32, 64, 96, 128, 144, 160, 192, 208, *range(224, LARGEST + 1, 32)]
    return [size for i, size in enumerate(sizes) if i == 0 or sizes[i - 1] < max_num_seqs]


def mixed_sizes(max_num_tokens: int) -> list[int]:
    """16, 32, then every 32nd up to 128, 64th up to 512, 128th up to 1,024, 256th up to 2,048, 1,024th up to MIXED_LARGEST;
    and max_num_tokens."""
    evenly = [16, 32, *range(64, 128, 32), *range(128, 512, 64), *range(512, 1024, 128), *range(1024, 2048, 256)]
    evenly += range(2048, MIXED_LARGEST + 1, 1024)
    last = [max_num_tokens] if 0 < max_num_tokens <= MIXED_LARGEST else []
    return [size for size in evenly if size < max_num_tokens] + last


def kinds_of_mixed(sizes: Iterable[int]) -> Iterator[tuple[int, bool]]:
    """Each mixed size with what there is of it: for shorter queries, and for long ones."""
    for size in sizes:
        yield from ((size, is_long) for is_long in ((False, True) if size > LONG else (False,)))


class GraphBackend(Protocol):
    """An attention backend whose plan can be replayed: see `attention.triton.TritonBackend`.

    Buffers have `work`, int32 words on the device, and `at(work)` gives the same in other words; `tiles` is in what kernels of
    one size differ from those of another.
    """

    def buffers(self, spec: AttentionSpec, dtype: torch.dtype, max_num_seqs: int) -> Any: ...

    def mixed_buffers(
        self, spec: AttentionSpec, dtype: torch.dtype, max_num_seqs: int, max_tokens: int, max_query_len: int
    ) -> Any: ...

    def plan(self, batch: AttentionBatch, buffers: Any = None) -> Any: ...

    def fill(self, buffers: Any, query_starts_S1: np.ndarray, seq_lens_S: np.ndarray, words: np.ndarray) -> None: ...


@dataclass
class GraphSize:
    """One size: where its words lie, its part of the fixed buffers, and what was captured.

    A mixed one draws nothing by itself, has no hidden states of its own, and gets no results.
    """

    is_mixed: bool
    num_tokens: int
    num_entries: int
    num_updates: int  # most table entries that its graphs can change
    packing: Packing
    template: np.ndarray  # the words of a step of padding alone
    words: Tensor
    views: dict[str, Tensor]
    batches: list[AttentionBatch]
    buffers: list[Any]
    result_2N: Tensor
    inbox: Inbox | None = None
    hidden_NH: Tensor | None = None
    replay_layers: Callable[[], object] | None = None
    replay_draw: dict[bool, Callable[[], object]] = field(default_factory=dict)  # whether entries truncate


@dataclass(frozen=True)
class Draw:
    """What the samples of a step that was sent need."""

    truncates: bool
    is_in_graph: bool
    """Whether the draw that is captured gives it."""


class GraphSizes:
    """Makes the sizes as they are asked for, and sends steps to them."""

    def __init__(
        self,
        attention: GraphBackend,
        inputs: PackedInputBatch,
        sampling: SamplingState,
        specs: Sequence[AttentionSpec],
        dtype: torch.dtype,
        max_num_tokens: int,
        few: int,
    ) -> None:
        """specs: of each cache group's layers, which differ in nothing that a plan depends on. dtype: of queries.
        max_num_tokens: of a mixed step; 0: there are none. few: see `graph_sizes`."""
        self._attention = attention
        self._inputs = inputs
        self._sampling = sampling
        self._specs = specs
        self._dtype = dtype
        device, num_groups = inputs.device, len(inputs.tables_RB)
        self.decode = graph_sizes(inputs.padding_row, few)
        self.mixed = mixed_sizes(max_num_tokens)
        self.largest = self.decode[-1]
        packings = [self._packing(size, self._capacity(size), self._decode_buffers(size)) for size in self.decode]
        packings += [
            self._packing(self.mixed_entries(size), self._mixed_capacity(size), self._mixed_buffers(size, long))
            for size, long in kinds_of_mixed(self.mixed)
        ]
        num_words = max(packing.num_words for packing in packings)
        self._words = torch.empty(num_words, dtype=torch.int32, device=device)
        self._outbox = Outbox(num_words, device)
        # input ids, positions, and slots of each cache group, in rows of a multiple of 16 bytes
        num_tokens = -(-max([self.largest, *self.mixed]) // 4) * 4
        self.flat_XT = torch.zeros((2 + num_groups, num_tokens), dtype=torch.int32, device=device)
        width = -(-inputs.tables_RB[0].shape[1] // 4) * 4
        self._tables_NB = [
            torch.zeros((self.largest, width), dtype=torch.int32, device=device) for _ in range(num_groups)
        ]
        self._result_2N = torch.empty((2, self.largest), dtype=torch.int32, device=device)
        self._made: dict[int, GraphSize] = {}
        self._made_mixed: dict[tuple[int, bool], GraphSize] = {}

    # -- which -----------------------------------------------------------------------------------------------------------
    def for_entries(self, num_entries: int) -> GraphSize:
        """The smallest decoding size that holds them."""
        return self.of_entries(next(size for size in self.decode if size >= num_entries))

    def num_tokens_for(self, num_tokens: int) -> int | None:
        """Of the smallest mixed size that holds them, if there is one."""
        return next((size for size in self.mixed if size >= num_tokens), None)

    def mixed_entries(self, num_tokens: int) -> int:
        """Of a mixed size: a decoding size, so that whatever draw the step ends with has padding to read."""
        return next(size for size in self.decode if size >= min(num_tokens, self.largest))

    def of_entries(self, num_entries: int) -> GraphSize:
        if num_entries not in self._made:
            self._made[num_entries] = self._make(num_entries)
        return self._made[num_entries]

    def of_tokens(self, num_tokens: int, long: bool) -> GraphSize:
        size = self._made_mixed.get((num_tokens, long))
        if size is None:
            num_entries, capacity = self.mixed_entries(num_tokens), self._mixed_capacity(num_tokens)
            size = self._empty_size(True, num_tokens, num_entries, capacity, self._mixed_buffers(num_tokens, long))
            self._made_mixed[num_tokens, long] = size
        return size

    # -- one of them -----------------------------------------------------------------------------------------------------
    def _packing(self, num_entries: int, capacity: int, buffers: Sequence[Any]) -> Packing:
        """The samples' entries come first: draws find them there, whatever the size of the step that wrote them."""
        return Packing(
            {
                "entries": num_entries * sampling.WORDS,
                "num_updates": len(self._inputs.tables_RB),
                "rows": num_entries,
                "query_start_loc": num_entries + 1,
                "seq_lens": num_entries,
                "last": num_entries,
                **{f"updates_{g}": 3 * capacity for g in range(len(self._inputs.tables_RB))},
                **{f"work_{g}": of_group.work.shape[0] for g, of_group in enumerate(buffers)},
            }
        )

    def _decode_buffers(self, num_entries: int) -> list[Any]:
        """For each cache group, in words of their own."""
        return [self._attention.buffers(spec, self._dtype, num_entries) for spec in self._specs]

    def _mixed_buffers(self, num_tokens: int, long: bool) -> list[Any]:
        num_entries, longest = self.mixed_entries(num_tokens), num_tokens if long else LONG
        return [
            self._attention.mixed_buffers(spec, self._dtype, num_entries, num_tokens, longest) for spec in self._specs
        ]

    @staticmethod
    def _capacity(size: int) -> int:
        """Table entries that a graph can change: a decoding sequence needs a block at most. Steps with more send them first."""
        return max(64, size)

    def _mixed_capacity(self, num_tokens: int) -> int:
        """A block for each entry, and those of the prompts' tokens; more where a prefix is found in the cache."""
        return -(-(64 + self.mixed_entries(num_tokens) + num_tokens // self._inputs.block_size) // 4) * 4

    def _make(self, num_entries: int) -> GraphSize:
        buffers = self._decode_buffers(num_entries)
        size = self._empty_size(False, num_entries, num_entries, self._capacity(num_entries), buffers)
        size.template[size.packing.slices["query_start_loc"]] = np.arange(num_entries + 1)
        size.template[size.packing.slices["seq_lens"]] = 1
        return size

    def _empty_size(
        self, is_mixed: bool, num_tokens: int, num_entries: int, capacity: int, buffers: Sequence[Any]
    ) -> GraphSize:
        """One whose words say that there are no tokens. buffers: such as it has, whose work is to be among its words."""
        inputs = self._inputs
        packing = self._packing(num_entries, capacity, buffers)
        template = np.zeros(packing.num_words, dtype=np.int32)
        template[packing.slices["rows"]] = inputs.padding_row
        entries = template[packing.slices["entries"]].reshape(num_entries, sampling.WORDS)
        entries[:, sampling.ROW] = inputs.padding_row
        views = packing.views(self._words)
        batches = [
            AttentionBatch(
                query_start_loc_S1=views["query_start_loc"],
                seq_lens_S=views["seq_lens"],
                block_tables_SB=self._tables_NB[g][:num_entries],
                slots_T=self.flat_XT[2 + g, :num_tokens],
                block_size=inputs.block_size,
                max_query_len=num_tokens if is_mixed else 1,
                max_seq_len=inputs.token_ids_RL.shape[1],
            )
            for g in range(len(inputs.tables_RB))
        ]
        # its own part of the buffer, so that one copy brings tokens and codes
        result_2N = self._result_2N.view(-1)[: 2 * num_entries].view(2, num_entries)
        return GraphSize(
            is_mixed=is_mixed,
            num_tokens=num_tokens,
            num_entries=num_entries,
            num_updates=capacity,
            packing=packing,
            template=template,
            words=self._words[: packing.num_words],
            views=views,
            batches=batches,
            buffers=[of_group.at(views[f"work_{g}"]) for g, of_group in enumerate(buffers)],
            result_2N=result_2N,
            inbox=None if is_mixed else Inbox(result_2N),
        )

    def stage(self, size: GraphSize, step: SchedulerOutput, starts_S1: np.ndarray, lengths_S: np.ndarray) -> Draw:
        """Sends all that the step says to where the size's graphs read it. starts_S1: where entries' tokens begin; lengths_S:
        tokens of each, with this step's."""
        slices, num_entries, num_samples = size.packing.slices, len(step.rows), len(step.sample_rows)
        words = self._outbox.next()[: size.packing.num_words]
        words[:] = size.template
        words[slices["rows"]][:num_entries] = step.rows
        words[slices["seq_lens"]][:num_entries] = lengths_S
        if size.is_mixed:  # padding entries have no tokens
            words[slices["query_start_loc"]] = starts_S1[-1]
            words[slices["query_start_loc"]][: num_entries + 1] = starts_S1
            words[slices["last"]][:num_samples] = starts_S1[1:][step.sample_entries] - 1
        rows_M = step.sample_rows.astype(np.intp)
        uses_M = self._sampling.uses_R[rows_M]
        uses = int(np.bitwise_or.reduce(uses_M))
        is_beam = np.count_nonzero(self._sampling.num_candidates_R[rows_M]) > 0
        entries_M8 = words[: num_samples * sampling.WORDS].reshape(num_samples, sampling.WORDS)
        write_entries(entries_M8, self._sampling, rows_M, step.sample_positions, uses_M)
        if any(step.table_updates):
            self._stage_updates(size, step, words)
        for g, buffers in enumerate(size.buffers):
            self._attention.fill(buffers, starts_S1, lengths_S, words[slices[f"work_{g}"]])
        self._outbox.send(size.words)
        return Draw(truncates=uses & _TRUNCATE != 0, is_in_graph=not is_beam and not uses & ~_IN_GRAPH)

    def _stage_updates(self, size: GraphSize, step: SchedulerOutput, words: np.ndarray) -> None:
        slices, capacity = size.packing.slices, size.num_updates
        for g, updates_3U in enumerate(self._inputs.updates(step)):
            count = updates_3U.shape[1]
            if count > capacity:
                self._inputs.send_updates(g, updates_3U)
            elif count:
                words[slices["num_updates"]][g] = count
                words[slices[f"updates_{g}"]].reshape(3, capacity)[:, :count] = updates_3U
