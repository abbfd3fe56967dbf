"""Steps as CUDA graphs: a few launches by the host instead of hundreds.

A step that only decodes, of n entries, runs in the smallest captured size that holds them (`forward`); a *mixed* one, with
chunks of prompts, in the smallest that holds its tokens (`forward_mixed`). What changes from step to step lies in buffers of
fixed address; all of it goes there in one copy from pinned memory (and the attention plan's work list in another). For each
size there is one graph of the layers, and one of the head and the draw for each kind of sampling; tokens come back in one copy:

    host      fill pinned words | plan attention | launch, launch | copy results, record event
    device    words, work list -> [ table updates, lay out, layers ] -> [ head, draw, write tokens ] -> tokens, codes

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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from quire.attention.base import AttentionBackend, AttentionBatch, AttentionSpec
from quire.core.step import SchedulerOutput
from quire.kernels.triton import blocks, sampling
from quire.layers.context import ForwardContext
from quire.sampling.sampler import SamplerOutput
from quire.sampling.state import SamplingState, Use
from quire.sampling.transfer import ToHost
from quire.sampling.triton import entry_words
from quire.worker.input_batch import PackedInputBatch, Packing, pinned_words
from quire.worker.kv_store import KVStore

LARGEST = 512  # entries: beyond, launching takes less time than the layers do
MIXED_LARGEST = 8192  # tokens
LONG = 1024  # tokens of a query: see `attention.triton.choose_tile`
_IN_GRAPH = Use.RANDOM | Use.TEMPERATURE | Use.TRUNCATE | Use.NUCLEUS


def graph_sizes(max_num_seqs: int) -> list[int]:
    """1, 2, 4, then every 8th up to 64, every 16th up to 256, every 32nd up to LARGEST; the last one holds max_num_seqs."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, LARGEST + 1, 32)]
    return [size for i, size in enumerate(sizes) if i == 0 or sizes[i - 1] < max_num_seqs]


def mixed_sizes(max_num_tokens: int) -> list[int]:
    """16, 32, then every 32nd up to 128, 64th up to 512, 128th up to 1,024, 256th up to 2,048, 1,024th up to MIXED_LARGEST;
    and max_num_tokens."""
    evenly = [16, 32, *range(64, 128, 32), *range(128, 512, 64), *range(512, 1024, 128), *range(1024, 2048, 256)]
    evenly += range(2048, MIXED_LARGEST + 1, 1024)
    last = [max_num_tokens] if 0 < max_num_tokens <= MIXED_LARGEST else []
    return [size for size in evenly if size < max_num_tokens] + last


class GraphBackend(Protocol):
    """An attention backend whose plan can be replayed: see `attention.triton.TritonBackend`."""

    def buffers(self, spec: AttentionSpec, dtype: torch.dtype, max_num_seqs: int) -> Any: ...

    def mixed_buffers(
        self, spec: AttentionSpec, dtype: torch.dtype, max_num_seqs: int, max_tokens: int, max_query_len: int
    ) -> Any: ...

    def plan(self, batch: AttentionBatch, buffers: Any = None) -> Any: ...


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

    A mixed one draws nothing by itself, and has no hidden states of its own.
    """

    is_mixed: bool
    num_tokens: int
    num_entries: int
    num_updates: int  # most table entries that its graphs can change
    packing: Packing
    template: np.ndarray  # the words of a step of padding alone
    views: dict[str, Tensor]
    batches: list[AttentionBatch]
    buffers: list[Any]
    result_2N: Tensor
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
        packings = [self._packing(size, self._capacity(size)) for size in self.sizes]
        packings += [self._packing(self._mixed_entries(size), self._mixed_capacity(size)) for size in self.mixed_sizes]
        num_words = max(packing.num_words for packing in packings)
        self._words = torch.empty(num_words, dtype=torch.int32, device=device)
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

    def _packing(self, num_entries: int, capacity: int) -> Packing:
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
            }
        )

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
            and bool((step.num_tokens == 1).all())
            and np.array_equal(step.sample_rows, step.rows)
            and np.array_equal(step.sample_positions, step.starts + 1)
            and np.array_equal(step.sample_entries, np.arange(num_entries))
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
        self._stage(size, step, starts_S1)
        plans = self._plans(size, starts_S1, step.starts + step.num_tokens)
        if size.replay_layers is None:
            self._capture_mixed(size, plans)
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
        starts_S1 = np.arange(num_entries + 1)
        self._stage(size, step, starts_S1)
        plans = self._plans(size, starts_S1, step.starts + 1)
        if size.replay_layers is None:
            self._capture_layers(size, plans)
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
        uses_M = self._sampling.uses_R[step.sample_rows]
        if (uses_M & ~int(_IN_GRAPH)).any() or self._sampling.num_candidates_R[step.sample_rows].any():
            return None
        truncated = bool((uses_M & Use.TRUNCATE).any())
        if truncated in size.replay_draw:
            size.replay_draw[truncated]()
        else:
            self._capture_draw(size, truncated)
        sent = ToHost(size.result_2N)
        num_samples = len(step.sample_rows)
        return SamplerOutput(size.result_2N[0, :num_samples], size.result_2N[1, :num_samples], _sent=sent)

    @torch.inference_mode()
    def capture_all(self) -> None:
        """Captures every size, with steps of nothing but padding. Draws that truncate are left to the first such step, and so
        are mixed sizes for long queries.

        The largest first: the others then find room in its memory.
        """
        nothing = np.zeros(0, dtype=np.int64)
        for num_tokens in reversed(self.mixed_sizes):
            size = self._mixed(num_tokens, False)
            if size.replay_layers is None:
                self._words[: size.packing.num_words].copy_(torch.from_numpy(size.template))
                self._capture_mixed(size, self._plans(size, np.zeros(1, dtype=np.int64), nothing))
        for num_entries in reversed(self.sizes):
            size = self._size(num_entries)
            self._words[: size.packing.num_words].copy_(torch.from_numpy(size.template))
            plans = self._plans(size, np.zeros(1, dtype=np.int64), nothing)
            if size.replay_layers is None:
                self._capture_layers(size, plans)
            if False not in size.replay_draw:
                self._capture_draw(size, False)

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
        """On the device a plan has the size's buffers, on the host the step's lengths: padding makes no work."""
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
        size = self._empty_size(False, num_entries, num_entries, self._capacity(num_entries))
        size.template[size.packing.slices["query_start_loc"]] = np.arange(num_entries + 1)
        size.template[size.packing.slices["seq_lens"]] = 1
        size.buffers = [self._attention.buffers(spec, self._dtype, num_entries) for spec in self._group_specs]
        return size

    def _mixed(self, num_tokens: int, long: bool) -> _Size:
        size = self._made_mixed.get((num_tokens, long))
        if size is None:
            num_entries, capacity = self._mixed_entries(num_tokens), self._mixed_capacity(num_tokens)
            size = self._empty_size(True, num_tokens, num_entries, capacity)
            longest = num_tokens if long else LONG
            size.buffers = [
                self._attention.mixed_buffers(spec, self._dtype, num_entries, num_tokens, longest)
                for spec in self._group_specs
            ]
            self._made_mixed[num_tokens, long] = size
        return size

    def _empty_size(self, is_mixed: bool, num_tokens: int, num_entries: int, capacity: int) -> _Size:
        """One whose words say that there are no tokens, and without buffers."""
        inputs = self._inputs
        packing = self._packing(num_entries, capacity)
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
        return _Size(
            is_mixed=is_mixed,
            num_tokens=num_tokens,
            num_entries=num_entries,
            num_updates=capacity,
            packing=packing,
            template=template,
            views=views,
            batches=batches,
            buffers=[],
            # its own part of the buffer, so that one copy brings tokens and codes
            result_2N=self._result_2N.view(-1)[: 2 * num_entries].view(2, num_entries),
        )

    def _stage(self, size: _Size, step: SchedulerOutput, starts_S1: np.ndarray) -> None:
        """Sends all that the step says to where the size's graphs read it. starts_S1: where entries' tokens begin."""
        packing, num_entries = size.packing, len(step.rows)
        host = pinned_words(packing.num_words, self._inputs.device)
        words = host.numpy()
        words[:] = size.template
        words[packing.slices["rows"]][:num_entries] = step.rows
        words[packing.slices["seq_lens"]][:num_entries] = step.starts + step.num_tokens
        if size.is_mixed:  # padding entries have no tokens
            words[packing.slices["query_start_loc"]] = starts_S1[-1]
            words[packing.slices["query_start_loc"]][: num_entries + 1] = starts_S1
        num_samples = len(step.sample_rows)
        words[packing.slices["last"]][:num_samples] = starts_S1[1:][step.sample_entries] - 1
        entries_N8 = words[packing.slices["entries"]].reshape(-1, sampling.WORDS)
        entries_N8[:num_samples] = entry_words(
            self._sampling, step.sample_rows, step.sample_positions, self._sampling.uses_R[step.sample_rows]
        )
        capacity = size.num_updates
        for g, updates_3U in enumerate(self._inputs.updates(step)):
            count = updates_3U.shape[1]
            if count > capacity:
                self._inputs.send_updates(g, updates_3U)
            elif count:
                words[packing.slices["num_updates"]][g] = count
                words[packing.slices[f"updates_{g}"]].reshape(3, capacity)[:, :count] = updates_3U
        self._words[: packing.num_words].copy_(host, non_blocking=True)

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


def graphs_for(attention: AttentionBackend) -> GraphBackend | None:
    """The backend, if its plans can be replayed."""
    return attention if hasattr(attention, "buffers") else None  # type: ignore[return-value]
