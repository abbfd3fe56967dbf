"""Steps as CUDA graphs: a few launches by the host instead of hundreds.

A step that only decodes, of n entries, runs in the smallest captured size that holds them (`forward`); a *mixed* one, with
chunks of prompts, in the smallest that holds its tokens (`forward_mixed`). What changes from step to step lies in buffers of
fixed address (`graph_sizes`); all of it, the attention plans' work lists too, goes there in one copy. For each size there is
one graph of the layers, and one of the head and the draw for each kind of sampling; tokens come back in one copy:

    host      fill pinned words, plan attention | copy | launch, launch | copy results, record event
    device    words -> [ table updates, lay out, layers ] -> [ head, draw, write tokens ] -> tokens, codes

Mixed sizes have the hidden states that are sampled from, no others; one launch takes them to the decoding size of as many
entries, whose draw it is from there on. Sizes beyond LONG tokens have two sets of graphs: for long queries attention has larger
tiles.

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
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from quire.attention.base import AttentionBackend, AttentionSpec
from quire.core.step import SchedulerOutput
from quire.kernels.triton import blocks, linear, sampling
from quire.layers.context import ForwardContext
from quire.sampling.sampler import SamplerOutput
from quire.sampling.state import SamplingState
from quire.sampling.transfer import ToHost
from quire.worker.compile_ahead import compiling_ahead
from quire.worker.graph_sizes import LONG, Draw, GraphBackend, GraphSize, GraphSizes, kinds_of_mixed
from quire.worker.input_batch import PackedInputBatch
from quire.worker.kv_store import KVStore

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
        few: int = 4,
    ) -> None:
        """specs: of each layer. dtype: of queries. max_num_tokens: of a mixed step; 0: they are not taken. few: see
        `graph_sizes`."""
        self._model = model
        self._attention = attention
        self._inputs = inputs
        self._sampling = sampling
        self._store = store
        self._capture: Capture = capture or CudaCapture(inputs.device)
        # the first layer of each cache group speaks for all
        group_specs = [specs[store.group_of_layer.index(g)] for g in range(len(inputs.tables_RB))]
        self.sizes = GraphSizes(attention, inputs, sampling, group_specs, dtype, max_num_tokens, few)
        self.num_replays = 0
        self.num_mixed_replays = 0
        self.num_captures = 0
        self._one_token_each = np.arange(self.sizes.largest + 1, dtype=np.int32)  # a decoding step's query_start_loc
        self._sampled_NH: Tensor | None = None  # what mixed graphs write; made with the first of them
        self._running: GraphSize | None = None  # that the step which was sent draws in
        self._draw_of_step: Draw | None = None

    def takes(self, step: SchedulerOutput) -> bool:
        """Whether each entry of the step decodes one token and draws the next."""
        num_entries = len(step.rows)
        return (
            0 < num_entries <= self.sizes.largest
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
        size = self.sizes.num_tokens_for(num_tokens)
        return (
            size is not None
            and 0 < len(step.rows) <= self.sizes.mixed_entries(size)
            and len(step.sample_rows) <= self.sizes.mixed_entries(size)
            and not step.draft_token_ids
        )

    def forward_mixed(self, step: SchedulerOutput) -> Tensor:
        """Runs the layers; -> hidden states of the samples [M, H], which the next call overwrites."""
        num_tokens, num_samples = int(step.num_tokens.sum()), len(step.sample_rows)
        found = self.sizes.num_tokens_for(num_tokens)
        assert found is not None
        size = self.sizes.of_tokens(found, found > LONG and int(step.num_tokens.max()) > LONG)
        starts_S1 = np.zeros(len(step.rows) + 1, dtype=np.int32)
        np.cumsum(step.num_tokens, out=starts_S1[1:])
        lengths_S = step.starts + step.num_tokens
        self._draw_of_step = self.sizes.stage(size, step, starts_S1, lengths_S)
        if size.replay_layers is None:
            self._capture_mixed(size, self._plans(size, starts_S1, lengths_S))
        else:
            size.replay_layers()
            self.num_mixed_replays += 1
        assert self._sampled_NH is not None
        hidden_MH = self._sampled_NH[:num_samples]
        self._running = None
        if num_samples:
            draw = self.sizes.for_entries(num_samples)
            if draw.hidden_NH is not None:
                hidden_MH = draw.hidden_NH[:num_samples].copy_(hidden_MH)
                self._running = draw
        return hidden_MH

    def forward(self, step: SchedulerOutput) -> Tensor:
        """Runs the layers; -> hidden states [S, H], which the next call overwrites."""
        num_entries = len(step.rows)
        size = self.sizes.for_entries(num_entries)
        starts_S1, lengths_S = self._one_token_each[: num_entries + 1], step.starts + 1
        self._draw_of_step = self.sizes.stage(size, step, starts_S1, lengths_S)
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
        draw = self._draw_of_step
        if size is None or draw is None or not draw.is_in_graph:
            return None
        truncated = draw.truncates
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
        for num_tokens, is_long in kinds_of_mixed(reversed(self.sizes.mixed)):
            size = self.sizes.of_tokens(num_tokens, is_long)
            if size.replay_layers is None:
                size.words.copy_(torch.from_numpy(size.template))
                self._capture_mixed(size, self._plans(size, np.zeros(1, dtype=np.int64), nothing))
        for num_entries in reversed(self.sizes.decode):
            size = self.sizes.of_entries(num_entries)
            size.words.copy_(torch.from_numpy(size.template))
            plans = self._plans(size, np.zeros(1, dtype=np.int64), nothing)
            if size.replay_layers is None:
                self._capture_layers(size, plans)
            if False not in size.replay_draw:
                self._capture_draw(size, False)

    @torch.inference_mode()
    def compile_ahead(self, num_threads: int = 1) -> None:
        """Compiles all kernels that there are graphs of, those that `capture_all` leaves out too, so many at once.

        Goes through the layers for each number of tokens that kernels differ in, without running the kernels: all of decoding
        steps, mixed ones up to the first for which there are many, and the most.
        """
        nothing = np.zeros(0, dtype=np.int64)

        def plans_of(size: GraphSize) -> list[Any]:
            size.words.copy_(torch.from_numpy(size.template))
            return self._plans(size, np.zeros(1, dtype=np.int64), nothing)

        sizes, beyond = self.sizes.mixed, max(LONG, linear.MANY)
        mixed = [size for i, size in enumerate(sizes) if i in (0, len(sizes) - 1) or sizes[i - 1] <= beyond]
        with compiling_ahead(num_threads):  # the largest first: what is allocated for it serves the others
            for num_tokens, is_long in reversed(list(kinds_of_mixed(mixed))):
                size = self.sizes.of_tokens(num_tokens, is_long)
                self._mixed_layers(size, plans_of(size))
            for num_entries in reversed(self.sizes.decode):
                size = self.sizes.of_entries(num_entries)
                size.hidden_NH = self._layers(size, plans_of(size))
                self._draw(size, False)
                self._draw(size, True)
                size.hidden_NH = None

    def _capture_layers(self, size: GraphSize, plans: Sequence[Any]) -> None:
        """Runs the layers over what is staged, and captures them."""
        hidden_NH = self._layers(size, plans)
        size.replay_layers, size.hidden_NH = self._capture(lambda: self._layers(size, plans))
        self.num_captures += 1
        # This step goes on from the buffer that replays write to.
        size.hidden_NH.copy_(hidden_NH)

    def _capture_mixed(self, size: GraphSize, plans: Sequence[Any]) -> None:
        self._mixed_layers(size, plans)
        size.replay_layers, _ = self._capture(lambda: self._mixed_layers(size, plans))
        self.num_captures += 1

    def _capture_draw(self, size: GraphSize, truncated: bool) -> None:
        self._draw(size, truncated)
        size.replay_draw[truncated], _ = self._capture(lambda: self._draw(size, truncated))
        self.num_captures += 1

    def _plans(self, size: GraphSize, starts_S1: np.ndarray, lengths_S: np.ndarray) -> list[Any]:
        """What layers are captured with. On the device a plan has the size's buffers, on the host the step's lengths: padding
        makes no work."""
        return [
            self._attention.plan(replace(batch, query_start_loc_host_S1=starts_S1, seq_lens_host_S=lengths_S), buffers)
            for batch, buffers in zip(size.batches, size.buffers)
        ]

    def _mixed_layers(self, size: GraphSize, plans: Sequence[Any]) -> Tensor:
        """Everything from the words to the samples' hidden states [N, H]."""
        # what no entry writes, padding has: token 0 at position 0, in the null block
        self.sizes.flat_XT[:, : size.num_tokens].zero_()
        hidden_NH = self._layers(size, plans)
        if self._sampled_NH is None:
            self._sampled_NH = hidden_NH.new_empty((self.sizes.largest, hidden_NH.shape[1]))
        return self._sampled_NH[: size.num_entries].copy_(hidden_NH)

    def _layers(self, size: GraphSize, plans: Sequence[Any]) -> Tensor:
        """Everything from the words to hidden states [N, H]."""
        inputs, views = self._inputs, size.views
        input_ids_T, positions_T = self.sizes.flat_XT[:2, : size.num_tokens]
        for g, (table_RB, batch) in enumerate(zip(inputs.tables_RB, size.batches)):
            updates = views[f"updates_{g}"].view(3, -1)
            blocks.update_table(table_RB, updates, views["num_updates"][g : g + 1])
            blocks.lay_out(
                inputs.token_ids_RL, table_RB, views["rows"], views["query_start_loc"], views["seq_lens"],
                input_ids_T, positions_T, batch.slots_T, batch.block_tables_SB, inputs.block_size,
                blocks.width_for(max(table_RB.shape[1], batch.max_query_len)), tokens=g == 0,
            )  # fmt: skip
        wanted_N = views["last"] if size.is_mixed else None
        context = ForwardContext([plans[g] for g in self._store.group_of_layer], self._store.layers, wanted_N)
        return self._model(input_ids_T, positions_T, context)

    def _draw(self, size: GraphSize, truncated: bool) -> Tensor:
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
