"""Steps as CUDA graphs: a few launches by the host instead of hundreds.

A step that only decodes, of n entries, runs in the smallest captured size that holds them (`forward`); a *mixed* one, with
chunks of prompts, in the smallest that holds its tokens (`forward_mixed`). What changes from step to step lies in buffers of
fixed address; all of it, the attention plans' work lists too, goes there in one copy from pinned memory. For each size there is
one graph of the layers, and one of the head and the draw for each kind of sampling; tokens come back in one copy:

    host      fill pinned words, plan attention | copy | launch, launch | copy results, record event
    device    words -> [ table updates, lay out, layers ] -> [ head, draw, write tokens ] -> tokens, codes

Mixed sizes gather the hidden states that are sampled from; one launch takes them to the decoding size of as many entries,
whose draw it is from there on. Sizes beyond LONG tokens have two sets of graphs: for long queries attention has larger tiles.

Sizes are captured when the worker starts (`capture_all`) or with their first step, which runs eagerly and so compiles what is
not compiled yet. All graphs share one pool of memory, since they run one after the other. A padding entry belongs to a row of
its own whose block table is all null: it writes into the null block and attends to nothing. So does a padding token of a mixed
step, which belongs to no entry.

What samples need beside temperature, top-k, top-p and min-p (penalties, masks, log probabilities, beams) is done eagerly from
the hidden states. Does not know the scheduler.

Shape legend: S = entries of the step, N = entries of a size, X = arrays of one number a token, M = samples, T = tokens, U =
table entries that change, V = vocabulary, H = hidden size.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from quire.attention.base import AttentionBackend, AttentionBatch, AttentionSpec
from quire.core.step import SchedulerOutput
from quire.kernels.triton import blocks, linear, sampling
from quire.layers.context import ForwardContext
from quire.sampling.sampler import SamplerOutput
from quire.sampling.state import SamplingState, Use
from quire.sampling.transfer import Inbox, Outbox, ToHost
from quire.sampling.triton import write_entries
from quire.worker.compile_ahead import compiling_ahead
from quire.worker.input_batch import PackedInputBatch, Packing
from quire.worker.kv_store import KVStore

LARGEST = 512  # entries: beyond, launching takes less time than the layers do
MIXED_LARGEST = 8192  # tokens
LONG = 1024  # tokens of a query: see `attention.work_list.choose_tile`
_IN_GRAPH = int(Use.RANDOM | Use.TEMPERATURE | Use.TRUNCATE | Use.NUCLEUS)
_TRUNCATE = int(Use.TRUNCATE)


def graph_sizes(max_num_seqs: int) -> list[int]:
    """1, 2, 4, then 16 and its doubles up to 128, every 16th up to 192, 256, and every 32nd up to LARGEST; the last one holds
    max_num_seqs.

    Up to 128 a step takes as long as reading the weights, and linear layers of so many tokens read them faster than those of
    fewer (`kernels.triton.linear`). Of 224 tokens cuBLAS's take as long as of 256.
    """
    sizes = [1, 2, 4, 16, 32, 64, *range(128, 193, 16), *range(256, LARGEST + 1, 32)]
    return [size for i, size in enumerate(sizes) if i == 0 or sizes[i - 1] < max_num_seqs]


def mixed_sizes(max_num_tokens: int) -> list[int]:
    """16, 32, then every 32nd up to 128, 64th up to 512, 128th up to 1,024, 256th up to 2,048, 1,024th up to MIXED_LARGEST;
    and max_num_tokens."""
    evenly = [16, 32, *range(64, 128, 32), *range(128, 512, 64), *range(512, 1024, 128), *range(1024, 2048, 256)]
    evenly += range(2048, MIXED_LARGEST + 1, 1024)
    last = [max_num_tokens] if 0 < max_num_tokens <= MIXED_LARGEST else []
    return [size for size in evenly if size < max_num_tokens] + last


class GraphBackend(Protocol):
    """An attention backend whose plan can be replayed: see `attention.triton.TritonBackend`.

    Buffers have `work`, int32 words on the device, and `at(work)` gives the same in other words.
    """

    def buffers(self, spec: AttentionSpec, dtype: torch.dtype, max_num_seqs: int) -> Any: ...

    def mixed_buffers(
        self, spec: AttentionSpec, dtype: torch.dtype, max_num_seqs: int, max_tokens: int, max_query_len: int
    ) -> Any: ...

    def plan(self, batch: AttentionBatch, buffers: Any = None) -> Any: ...

    def fill(self, buffers: Any, query_starts_S1: np.ndarray, seq_lens_S: np.ndarray, words: np.ndarray) -> None: ...


Capture = Callable[[Callable[[], Tensor]], tuple[Callable[[], object], Tensor]]
"""Records a function that launches kernels: gives what replays it, and its result, whose address stays."""


class CudaCapture:
    """Captures CUDA graphs that share one pool of memory."""

    def __init__(self, device: torch.device) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)

    def __call__(self, function: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        # As torch.cuda.graph does it, without its collection of garbage and emptying of caches, which take longer than all
        # the rest; but no garbage may be collected midway, for it may hold CUDA objects.
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        collects = gc.isenabled()
        gc.disable()
        try:
            with torch.cuda.stream(self._stream):
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    result = function()
                finally:
                    graph.capture_end()
        finally:
            if collects:
                gc.enable()
        return graph.replay, result


@dataclass
class _Size:
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


class GraphRunner:
    """`takes` a step or `takes_mixed`, or neither; then `forward` or `forward_mixed`, then `sample`, which gives None where the
    draw is not in a graph.

    capture: how graphs are made; tests pass one that just calls the function again.
    """

    def __init__(
        self,
        model: nn.Module,
        attention: GraphBackend,
        inputs: PackedInputBatch,
        sampling: SamplingState,
        store: KVStore,
        specs: Sequence[AttentionSpec],
        dtype: torch.dtype,
        capture: Capture | None = None,
        max_num_tokens: int = 0,
    ) -> None:
        """specs: of each layer. dtype: of queries. max_num_tokens: of a mixed step; 0: they are not taken."""
        self._model = model
        self._attention = attention
        self._inputs = inputs
        self._sampling = sampling
        self._store = store
        self._dtype = dtype
        self._capture: Capture = capture or CudaCapture(inputs.device)
        device = inputs.device
        max_num_seqs = inputs.padding_row
        self.sizes = graph_sizes(max_num_seqs)
        self.mixed_sizes = mixed_sizes(max_num_tokens)
        self.num_replays = 0
        self.num_mixed_replays = 0
        self.num_captures = 0
        num_groups = len(inputs.tables_RB)
        # the first layer of each cache group speaks for all: they differ in nothing that a plan depends on
        self._group_specs = [specs[store.group_of_layer.index(g)] for g in range(num_groups)]
        largest = self.sizes[-1]
        packings = [self._packing(size, self._capacity(size), self._decode_buffers(size)) for size in self.sizes]
        packings += [
            self._packing(self._mixed_entries(size), self._mixed_capacity(size), self._mixed_buffers(size, long))
            for size, long in self._kinds_of_mixed(self.mixed_sizes)
        ]
        num_words = max(packing.num_words for packing in packings)
        self._words = torch.empty(num_words, dtype=torch.int32, device=device)
        self._outbox = Outbox(num_words, device)
        self._one_token_each = np.arange(largest + 1, dtype=np.int32)  # a decoding step's query_start_loc, however many
        # input ids, positions, and slots of each cache group, in rows of a multiple of 16 bytes
        num_tokens = -(-max([largest, *self.mixed_sizes]) // 4) * 4
        self._flat_XT = torch.zeros((2 + num_groups, num_tokens), dtype=torch.int32, device=device)
        width = -(-inputs.tables_RB[0].shape[1] // 4) * 4
        self._tables_NB = [torch.zeros((largest, width), dtype=torch.int32, device=device) for _ in range(num_groups)]
        self._result_2N = torch.empty((2, largest), dtype=torch.int32, device=device)
        self._gathered_NH: Tensor | None = None  # what mixed graphs write; made with the first of them
        self._made: dict[int, _Size] = {}
        self._made_mixed: dict[tuple[int, bool], _Size] = {}
        self._running: _Size | None = None
        self._truncates = False  # any sample of the step that was staged
        self._is_beyond_graphs = False  # likewise

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
        return [self._attention.buffers(spec, self._dtype, num_entries) for spec in self._group_specs]

    def _mixed_buffers(self, num_tokens: int, long: bool) -> list[Any]:
        num_entries, longest = self._mixed_entries(num_tokens), num_tokens if long else LONG
        return [
            self._attention.mixed_buffers(spec, self._dtype, num_entries, num_tokens, longest)
            for spec in self._group_specs
        ]

    @staticmethod
    def _kinds_of_mixed(sizes: Iterable[int]) -> Iterator[tuple[int, bool]]:
        """Each size with what there are graphs of: not for long queries, and for long ones."""
        for size in sizes:
            yield from ((size, is_long) for is_long in ((False, True) if size > LONG else (False,)))

    @staticmethod
    def _capacity(size: int) -> int:
        """Table entries that a graph can change: a decoding sequence needs a block at most. Steps with more send them first."""
        return max(64, size)

    def _mixed_entries(self, num_tokens: int) -> int:
        """A decoding size, so that whatever draw the step ends with has padding to read."""
        return next(size for size in self.sizes if size >= min(num_tokens, self.sizes[-1]))

    def _mixed_capacity(self, num_tokens: int) -> int:
        """A block for each entry, and those of the prompts' tokens; more where a prefix is found in the cache."""
        return -(-(64 + self._mixed_entries(num_tokens) + num_tokens // self._inputs.block_size) // 4) * 4

    def takes(self, step: SchedulerOutput) -> bool:
        """Whether each entry of the step decodes one token and draws the next."""
        num_entries = len(step.rows)
        return (
            0 < num_entries <= self.sizes[-1]
            and num_entries == len(step.sample_rows)
            and not step.draft_token_ids
            and _are_all(step.num_tokens, 1)
            and (step.sample_rows is step.rows or _are_all(step.sample_rows, step.rows))
            and _are_all(step.sample_positions - step.starts, 1)
            and _are_all(step.sample_entries, self._one_token_each[:num_entries])
        )

    def takes_mixed(self, step: SchedulerOutput) -> bool:
        """Whether the step fits in a mixed size."""
        num_tokens = int(step.num_tokens.sum())
        size = self._mixed_size(num_tokens)
        return (
            size is not None
            and 0 < len(step.rows) <= self._mixed_entries(size)
            and len(step.sample_rows) <= self._mixed_entries(size)
            and not step.draft_token_ids
        )

    def _mixed_size(self, num_tokens: int) -> int | None:
        return next((size for size in self.mixed_sizes if size >= num_tokens), None)

    def forward_mixed(self, step: SchedulerOutput) -> Tensor:
        """Runs the layers; -> hidden states of the samples [M, H], which the next call overwrites."""
        num_tokens, num_samples = int(step.num_tokens.sum()), len(step.sample_rows)
        found = self._mixed_size(num_tokens)
        assert found is not None
        size = self._mixed(found, found > LONG and int(step.num_tokens.max()) > LONG)
        starts_S1 = np.zeros(len(step.rows) + 1, dtype=np.int32)
        np.cumsum(step.num_tokens, out=starts_S1[1:])
        lengths_S = step.starts + step.num_tokens
        self._stage(size, step, starts_S1, lengths_S)
        if size.replay_layers is None:
            self._capture_mixed(size, self._plans(size, starts_S1, lengths_S))
        else:
            size.replay_layers()
            self.num_mixed_replays += 1
        assert self._gathered_NH is not None
        hidden_MH = self._gathered_NH[:num_samples]
        self._running = None
        if num_samples:
            draw = self._size(next(size for size in self.sizes if size >= num_samples))
            if draw.hidden_NH is not None:
                hidden_MH = draw.hidden_NH[:num_samples].copy_(hidden_MH)
                self._running = draw
        return hidden_MH

    def forward(self, step: SchedulerOutput) -> Tensor:
        """Runs the layers; -> hidden states [S, H], which the next call overwrites."""
        num_entries = len(step.rows)
        size = self._size(next(size for size in self.sizes if size >= num_entries))
        starts_S1, lengths_S = self._one_token_each[: num_entries + 1], step.starts + 1
        self._stage(size, step, starts_S1, lengths_S)
        if size.replay_layers is None:
            self._capture_layers(size, self._plans(size, starts_S1, lengths_S))
        else:
            size.replay_layers()
            self.num_replays += 1
        self._running = size
        assert size.hidden_NH is not None
        return size.hidden_NH[:num_entries]

    def sample(self, step: SchedulerOutput) -> SamplerOutput | None:
        """Draws the tokens of the step that `forward` ran, and writes them into their rows."""
        size, self._running = self._running, None
        if size is None:
            return None
        if self._is_beyond_graphs:
            return None
        truncated = self._truncates
        if truncated in size.replay_draw:
            size.replay_draw[truncated]()
        else:
            self._capture_draw(size, truncated)
        sent = ToHost(size.result_2N, inbox=size.inbox)
        num_samples = len(step.sample_rows)
        token_ids_M, codes_M = size.result_2N[:, :num_samples].unbind()
        return SamplerOutput(token_ids_M, codes_M, _sent=sent)

    @torch.inference_mode()
    def capture_all(self) -> None:
        """Captures every size, with steps of nothing but padding. Draws that truncate are left to the first such step.

        The largest first: the others then find room in its memory.
        """
        nothing = np.zeros(0, dtype=np.int64)
        for num_tokens, is_long in self._kinds_of_mixed(reversed(self.mixed_sizes)):
            size = self._mixed(num_tokens, is_long)
            if size.replay_layers is None:
                size.words.copy_(torch.from_numpy(size.template))
                self._capture_mixed(size, self._plans(size, np.zeros(1, dtype=np.int64), nothing))
        for num_entries in reversed(self.sizes):
            size = self._size(num_entries)
            size.words.copy_(torch.from_numpy(size.template))
            plans = self._plans(size, np.zeros(1, dtype=np.int64), nothing)
            if size.replay_layers is None:
                self._capture_layers(size, plans)
            if False not in size.replay_draw:
                self._capture_draw(size, False)

    @torch.inference_mode()
    def compile_ahead(self, num_threads: int = 1) -> None:
        """Compiles all kernels that there are graphs of, those that `capture_all` leaves out too, so many at once.

        Goes through the layers for each number of tokens that kernels differ in, without running the kernels.
        """
        nothing = np.zeros(0, dtype=np.int64)

        def plans_of(size: _Size) -> list[Any]:
            size.words.copy_(torch.from_numpy(size.template))
            return self._plans(size, np.zeros(1, dtype=np.int64), nothing)

        def first_of(sizes: list[int], beyond: int) -> list[int]:
            return [size for i, size in enumerate(sizes) if i == 0 or sizes[i - 1] <= beyond]

        with compiling_ahead(num_threads):
            for num_entries in first_of(self.sizes, linear.MAX_TOKENS):
                size = self._size(num_entries)
                size.hidden_NH = self._layers(size, plans_of(size))
                self._draw(size, False)
                self._draw(size, True)
                size.hidden_NH = None
            for num_tokens, is_long in self._kinds_of_mixed(first_of(self.mixed_sizes, LONG)):
                size = self._mixed(num_tokens, is_long)
                self._mixed_layers(size, plans_of(size))

    def _capture_layers(self, size: _Size, plans: Sequence[Any]) -> None:
        """Runs the layers over what is staged, and captures them."""
        hidden_NH = self._layers(size, plans)
        size.replay_layers, size.hidden_NH = self._capture(lambda: self._layers(size, plans))
        self.num_captures += 1
        # This step goes on from the buffer that replays write to.
        size.hidden_NH.copy_(hidden_NH)

    def _capture_mixed(self, size: _Size, plans: Sequence[Any]) -> None:
        self._mixed_layers(size, plans)
        size.replay_layers, _ = self._capture(lambda: self._mixed_layers(size, plans))
        self.num_captures += 1

    def _capture_draw(self, size: _Size, truncated: bool) -> None:
        self._draw(size, truncated)
        size.replay_draw[truncated], _ = self._capture(lambda: self._draw(size, truncated))
        self.num_captures += 1

    def _plans(self, size: _Size, starts_S1: np.ndarray, lengths_S: np.ndarray) -> list[Any]:
        """What layers are captured with. On the device a plan has the size's buffers, on the host the step's lengths: padding
        makes no work."""
        return [
            self._attention.plan(replace(batch, query_start_loc_host_S1=starts_S1, seq_lens_host_S=lengths_S), buffers)
            for batch, buffers in zip(size.batches, size.buffers)
        ]

    # -- one size ------------------------------------------------------------------------------------------------------
    def _size(self, num_entries: int) -> _Size:
        if num_entries not in self._made:
            self._made[num_entries] = self._make(num_entries)
        return self._made[num_entries]

    def _make(self, num_entries: int) -> _Size:
        buffers = self._decode_buffers(num_entries)
        size = self._empty_size(False, num_entries, num_entries, self._capacity(num_entries), buffers)
        size.template[size.packing.slices["query_start_loc"]] = np.arange(num_entries + 1)
        size.template[size.packing.slices["seq_lens"]] = 1
        return size

    def _mixed(self, num_tokens: int, long: bool) -> _Size:
        size = self._made_mixed.get((num_tokens, long))
        if size is None:
            num_entries, capacity = self._mixed_entries(num_tokens), self._mixed_capacity(num_tokens)
            size = self._empty_size(True, num_tokens, num_entries, capacity, self._mixed_buffers(num_tokens, long))
            self._made_mixed[num_tokens, long] = size
        return size

    def _empty_size(
        self, is_mixed: bool, num_tokens: int, num_entries: int, capacity: int, buffers: Sequence[Any]
    ) -> _Size:
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
                slots_T=self._flat_XT[2 + g, :num_tokens],
                block_size=inputs.block_size,
                max_query_len=num_tokens if is_mixed else 1,
                max_seq_len=inputs.token_ids_RL.shape[1],
            )
            for g in range(len(inputs.tables_RB))
        ]
        # its own part of the buffer, so that one copy brings tokens and codes
        result_2N = self._result_2N.view(-1)[: 2 * num_entries].view(2, num_entries)
        return _Size(
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

    def _stage(self, size: _Size, step: SchedulerOutput, starts_S1: np.ndarray, lengths_S: np.ndarray) -> None:
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
        self._truncates = uses & _TRUNCATE != 0
        is_beam = np.count_nonzero(self._sampling.num_candidates_R[rows_M]) > 0
        self._is_beyond_graphs = is_beam or uses & ~_IN_GRAPH != 0
        entries_M8 = words[: num_samples * sampling.WORDS].reshape(num_samples, sampling.WORDS)
        write_entries(entries_M8, self._sampling, rows_M, step.sample_positions, uses_M)
        if any(step.table_updates):
            self._stage_updates(size, step, words)
        for g, buffers in enumerate(size.buffers):
            self._attention.fill(buffers, starts_S1, lengths_S, words[slices[f"work_{g}"]])
        self._outbox.send(size.words)

    def _stage_updates(self, size: _Size, step: SchedulerOutput, words: np.ndarray) -> None:
        slices, capacity = size.packing.slices, size.num_updates
        for g, updates_3U in enumerate(self._inputs.updates(step)):
            count = updates_3U.shape[1]
            if count > capacity:
                self._inputs.send_updates(g, updates_3U)
            elif count:
                words[slices["num_updates"]][g] = count
                words[slices[f"updates_{g}"]].reshape(3, capacity)[:, :count] = updates_3U

    def _mixed_layers(self, size: _Size, plans: Sequence[Any]) -> Tensor:
        """Everything from the words to the samples' hidden states [N, H]."""
        # what no entry writes, padding has: token 0 at position 0, in the null block
        self._flat_XT[:, : size.num_tokens].zero_()
        hidden_TH = self._layers(size, plans)
        if self._gathered_NH is None:
            self._gathered_NH = hidden_TH.new_empty((self.sizes[-1], hidden_TH.shape[1]))
        gathered_NH = self._gathered_NH[: size.num_entries]
        return torch.index_select(hidden_TH, 0, size.views["last"], out=gathered_NH)

    def _layers(self, size: _Size, plans: Sequence[Any]) -> Tensor:
        """Everything from the words to hidden states [T, H]."""
        inputs, views = self._inputs, size.views
        input_ids_T, positions_T = self._flat_XT[0, : size.num_tokens], self._flat_XT[1, : size.num_tokens]
        for g, (table_RB, batch) in enumerate(zip(inputs.tables_RB, size.batches)):
            updates = views[f"updates_{g}"].view(3, -1)
            blocks.update_table(table_RB, updates, views["num_updates"][g : g + 1])
            blocks.lay_out(
                inputs.token_ids_RL, table_RB, views["rows"], views["query_start_loc"], views["seq_lens"],
                input_ids_T, positions_T, batch.slots_T, batch.block_tables_SB, inputs.block_size,
                blocks.width_for(max(table_RB.shape[1], batch.max_query_len)), tokens=g == 0,
            )  # fmt: skip
        context = ForwardContext(plans=[plans[g] for g in self._store.group_of_layer], kv=self._store.layers)
        return self._model(input_ids_T, positions_T, context)

    def _draw(self, size: _Size, truncated: bool) -> Tensor:
        """The head and the draw; tokens go into the rows. -> tokens and codes, [2, N]."""
        assert size.hidden_NH is not None
        logits_NV = self._model.compute_logits(size.hidden_NH, fp32=False)
        sampling.choose_tokens(
            logits_NV,
            size.views["entries"].view(size.num_entries, sampling.WORDS),
            self._sampling.params_RC,
            size.result_2N,
            truncated=truncated,
            token_ids_RL=self._inputs.token_ids_RL,
        )
        return size.result_2N


def _are_all(values_S: np.ndarray, expected: np.ndarray | int) -> bool:
    return bool(np.logical_and.reduce(values_S == expected))


def graphs_for(attention: AttentionBackend) -> GraphBackend | None:
    """The backend, if its plans can be replayed."""
    return attention if hasattr(attention, "buffers") else None  # type: ignore[return-value]
